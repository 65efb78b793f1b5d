"""Files that others made, damaged at random: each gives a result, or one error that names it, within a moment."""

from __future__ import annotations

import json
import os
import shutil
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import BytesIO
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch as th
import yaml
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize
from toys import vec
from vlas import WRONG, damaged_configurations

from opd_gym import OPD
from opd_gym.cli.main import main
from opd_gym.cli.report.reading import find_policies
from opd_gym.cli.report.tables import by_task, details, overview
from opd_gym.demonstrations import Demonstrations, untrusted
from opd_gym.demonstrations.hdf5 import Episode, write_demonstrations
from opd_gym.envs.libero.plus import read_levels
from opd_gym.envs.libero.suites import read_states
from opd_gym.envs.robotwin.assets import unpack
from opd_gym.envs.robotwin.runtime import STAND_IN_MARKER, is_current_stand_in, robots
from opd_gym.envs.robotwin.tasks import read_seeds
from opd_gym.envs.robotwin.traces import EXPERT_TRACES, Trace
from opd_gym.evaluation import EpisodeRecord, EvaluationResult, LostEpisode
from opd_gym.policies.loading import load_policy, read_vec_normalize
from opd_gym.policies.openvla.published import load_proprio
from opd_gym.untrusted import read_yaml
from opd_gym.versions import read_versions
from opd_gym.zoo.hyperparams import load_hyperparams

# How often each file is damaged: more of them by the variable, for a longer look
N = int(os.environ.get("OPD_GYM_FUZZ", "30"))
SEED = int(os.environ.get("OPD_GYM_FUZZ_SEED", "0"))


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """A byte is another, some are, a piece is gone, doubled, or zero; or the file is cut short, or longer."""
    kind = rng.integers(7)
    i, j = sorted(rng.integers(len(data) + 1, size=2))
    if kind == 0:
        return data[:i] + bytes([rng.integers(256)]) + data[i + 1 :]
    if kind == 1:
        array = np.frombuffer(data, np.uint8).copy()
        array[rng.integers(len(data), size=1 + len(data) // 500)] = rng.integers(256)
        return array.tobytes()
    if kind == 2:
        return data[:i]
    if kind == 3:
        return data[:i] + data[min(j, i + 64) :]
    if kind == 4:
        return data[: min(j, i + 64)] + data[i:]
    if kind == 5:
        return data[:i] + bytes(min(j - i, 64)) + data[min(j, i + 64) :]
    return data + rng.bytes(rng.integers(1, 99))


def damaged_members(data: bytes, rng: np.random.Generator) -> bytes:
    """A zip whose member is damaged, with the right checksum: the damage gets through to who reads it."""
    with zipfile.ZipFile(BytesIO(data)) as file:
        members = {name: file.read(name) for name in file.namelist()}
    name = rng.choice(list(members))
    members[name] = damaged(members[name], rng)
    out = BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for key, content in members.items():
            file.writestr(key, content)
    return out.getvalue()


def damaged_values(values: object, rng: np.random.Generator) -> Iterator[bytes]:
    """JSON whose values are of other types, of other sizes, missing, or others' names; without end."""
    while True:
        yield from damaged_configurations(values, rng, 100)


def mixed(whole: bytes, values: object, rng: np.random.Generator, n: int) -> Iterator[bytes]:
    """Every second one is damaged in its bytes, the others are JSON with other values."""
    others = damaged_values(values, rng)
    return (damaged(whole, rng) if i % 2 else next(others) for i in range(n))


def check(path: Path, contents: Iterator[bytes], load: Callable[[], object], *names: str) -> None:
    """
    :param path: the file
    :param contents: what it holds instead
    :param load: reads it
    :param names: what an error may name in its place
    """
    whole = path.read_bytes()
    load()
    outcomes = []
    for n, content in enumerate(contents):
        path.write_bytes(content)
        try:
            load()
            outcomes.append(True)
        except (ValueError, OSError) as error:
            assert any(name in str(error) for name in (str(path), *names)), f"case {n}: {error!r}"
            outcomes.append(False)
        except BaseException as error:
            kept = path.with_name(f"case{n}{path.suffix}")
            kept.write_bytes(content)
            raise AssertionError(f"{kept}: {error!r}") from error
    path.write_bytes(whole)
    assert not all(outcomes)


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    return np.random.default_rng((SEED, zlib.crc32(request.node.name.encode())))


@pytest.mark.parametrize("way", [damaged, damaged_members])
def test_zips_of_stable_baselines3(way, tmp_path, rng):
    path = tmp_path / "model.zip"
    model = PPO("MlpPolicy", "CartPole-v1", device="cpu", policy_kwargs=dict(net_arch=[4]))
    model.save(path)
    space = model.observation_space, model.action_space
    whole = path.read_bytes()
    check(path, (way(whole, rng) for _ in range(N)), lambda: load_policy(path, *space))


@pytest.mark.parametrize("way", [damaged, damaged_members])
def test_zips_of_ours(way, tmp_path, rng):
    path = tmp_path / "model.zip"
    OPD("MlpPolicy", vec(2), teacher="expert", device="cpu", policy_kwargs=dict(net_arch=[4])).learn(64).save(path)
    env = vec(2)
    whole = path.read_bytes()
    check(path, (way(whole, rng) for _ in range(N)), lambda: OPD.load(path, env=env, device="cpu"))


def test_statistics(tmp_path, rng):
    path = tmp_path / "vecnormalize.pkl"
    VecNormalize(make_vec_env("CartPole-v1", 1)).save(str(path))
    whole = path.read_bytes()
    check(path, (damaged(whole, rng) for _ in range(4 * N)), lambda: read_vec_normalize(path))


def test_demonstrations(tmp_path, rng, monkeypatch):
    """libhdf5 loops over some of these files, and does not survive others."""
    monkeypatch.setattr(untrusted, "READ_TIMEOUT", 5)
    path = tmp_path / "pick_up_the_milk_demo.hdf5"
    pictures = {name: rng.integers(0, 255, (3, 8, 8, 3), dtype=np.uint8) for name in ("agentview", "wrist")}
    proprio = np.concatenate([rng.normal(size=(3, 3)), np.tile([0, 0, 0, 1], (3, 1)), rng.normal(size=(3, 2))], axis=1)
    episode = Episode({**pictures, "proprio": proprio.astype(np.float32)}, rng.uniform(-1, 1, (3, 7)))
    write_demonstrations(path, [episode, episode], instruction="pick up the milk")
    whole = path.read_bytes()
    check(path, (damaged(whole, rng) for _ in range(2 * N)), lambda: Demonstrations.from_hdf5(path))


@pytest.mark.parametrize("suffix", [".npz", ".pruned_init"])
@pytest.mark.parametrize("way", [damaged, damaged_members])
def test_initial_states(way, suffix, tmp_path, rng):
    path = tmp_path / f"pick_up_the_milk{suffix}"
    states = rng.normal(size=(2, 5))
    if suffix == ".npz":
        np.savez(path, states=states)
    else:
        th.save(states, path)
    np.testing.assert_array_equal(read_states(path), states)
    whole = path.read_bytes()
    check(path, (way(whole, rng) for _ in range(2 * N)), lambda: read_states.__wrapped__(path))


@pytest.mark.parametrize("way", [damaged, damaged_members])
def test_projectors_of_proprioception(way, tmp_path, rng):
    path = tmp_path / "proprio_projector--1_checkpoint.pt"
    th.save({"module.fc1.weight": th.randn(3, 8), "module.fc1.bias": th.randn(3)}, path)
    whole = path.read_bytes()
    check(path, (way(whole, rng) for _ in range(2 * N)), lambda: load_proprio(path))


def test_versions(tmp_path, rng):
    """They are for a warning: what cannot be read says nothing."""
    path = tmp_path / "versions.json"
    values = {"mujoco": "3.3.2", "torch": "2.13"}
    path.write_text(json.dumps(values))
    assert read_versions(tmp_path) == values
    deep = b"[" * 100_000
    for content in chain([deep], mixed(path.read_bytes(), values, rng, 2 * N)):
        path.write_bytes(content)
        found = read_versions(tmp_path)
        assert all(isinstance(text, str) for pair in found.items() for text in pair)


def test_yaml(tmp_path, rng):
    path = tmp_path / "opd.yml"
    values = {
        "CartPole-v1": {"n_envs": 2, "policy": "MlpPolicy", "learning_rate": "lin_1e-3", "policy_kwargs": {"a": [1]}}
    }
    path.write_text(yaml.safe_dump(values))
    whole = path.read_bytes()
    check(path, (damaged(whole, rng) for _ in range(4 * N)), lambda: read_yaml(path))
    check(path, (damaged(whole, rng) for _ in range(4 * N)), lambda: load_hyperparams("opd", "CartPole-v1", path))


def test_replayed_states(tmp_path, rng):
    path = tmp_path / "states.npz"
    model = OPD("MlpPolicy", vec(2), teacher="expert", device="cpu").learn(64)
    model.save_replay_buffer(path)
    whole = path.read_bytes()
    way = [damaged, damaged_members]
    check(path, (way[n % 2](whole, rng) for n in range(2 * N)), lambda: model.load_replay_buffer(path))


def test_traces(tmp_path, rng):
    path = tmp_path / "trace.npz"
    trace = Trace.load(next(EXPERT_TRACES.glob("*.npz")))
    replace(trace, positions=trace.positions[:3]).save(path)
    whole = path.read_bytes()
    way = [damaged, damaged_members]
    check(path, (way[n % 2](whole, rng) for n in range(4 * N)), lambda: Trace.load(path))
    with np.load(path) as file:
        positions, about = file["positions"], json.loads(str(file["about"]))

    def written(positions, about):
        np.savez(path, positions=positions, about=np.array(about))
        return path.read_bytes()

    others = damaged_values(about, rng)
    abouts = [written(positions, next(others).decode("utf-8", "replace")) for _ in range(N)]
    arrays = [
        positions.astype(str),
        positions[:, :3],
        positions[:0],
        positions * np.nan,
        positions[0, 0],
        about["task"],
    ]
    cases = [*abouts, *(written(array, json.dumps(about)) for array in arrays)]
    path.write_bytes(whole)
    check(path, iter(cases), lambda: Trace.load(path))


def test_seeds_and_levels(tmp_path, rng):
    seeds, levels = tmp_path / "seeds.json", tmp_path / "levels.json"
    values = [100000, 100003]
    seeds.write_text(json.dumps(values))
    others = [json.dumps(value).encode() for value in (*WRONG, *([100000, value] for value in WRONG))]
    whole = seeds.read_bytes()
    check(seeds, chain(others, (damaged(whole, rng) for _ in range(N))), lambda: read_seeds(seeds))
    tasks = {"libero_object": [{"name": "pick", "difficulty_level": 3, "id": 1}]}
    levels.write_text(json.dumps(tasks))
    check(levels, mixed(levels.read_bytes(), tasks, rng, 2 * N), lambda: read_levels(levels))


def evaluation(path):
    episodes = [EpisodeRecord(i % 2, i, i < 3, 50, 1.5, i, env_id="CartPole-v1") for i in range(4)]
    lost = [LostEpisode(0, 9, 9, "killed", "CartPole-v1")]
    EvaluationResult(episodes, versions={"mujoco": "3"}, lost=lost).save(path)
    return json.loads(path.read_text())


def test_evaluations(tmp_path, rng):
    path = tmp_path / "evaluation.json"
    values = evaluation(path)

    def load():
        result = EvaluationResult.load(path)
        return result.to_markdown(), result.to_dict(), result.paired(result) if result.n_judged else None

    check(path, mixed(path.read_bytes(), values, rng, 4 * N), load, "A paired comparison expects")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with all that it may hold."""
    folder = tmp_path_factory.mktemp("runs")
    words = (
        "train --env CartPole-v1 --algo ppo -n 64 -P n_steps=32 -P batch_size=8 -P n_envs=1 --device cpu --no-progress"
    )
    words += " --eval-episodes 1 --eval-freq 64"
    assert main([*words.split(), "-f", str(folder)]) == 0
    return folder / "ppo" / "CartPole-v1_1"


@pytest.mark.parametrize("name", ["args.yml", "config.yml", "progress.csv", "evaluation.json", "command.txt"])
def test_files_of_a_run_in_a_report(name, finished, tmp_path, rng):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    path = run / name

    def load():
        policies = find_policies([run], {})
        details(policies, policies[0])
        by_task(policies)
        return overview(policies)

    whole = path.read_bytes()
    contents: Iterator[bytes] = (damaged(whole, rng) for _ in range(2 * N))
    if path.suffix in (".yml", ".json"):
        contents = mixed(whole, yaml.safe_load(whole.decode()), rng, 2 * N)
    # A file of words alone is shown as it is
    if name == "command.txt":
        path.write_bytes(b"\xff\0")
        load()
    else:
        check(path, contents, load, "The evaluation of ppo on CartPole-v1", "There is nothing to report")
    path.write_bytes(damaged(whole, rng))
    status = main(["report", str(run), "-o", str(tmp_path / "page.html")])
    assert status in (0, 2)


@pytest.mark.parametrize("name", ["args.yml", "config.yml", "monitor.csv", "evaluations.npz"])
def test_files_of_a_run_that_goes_on(name, finished, tmp_path, rng, capsys):
    def resume(run):
        status = main(["train", "--resume", str(run), "-n", "96", "--no-progress", "--device", "cpu"])
        text = capsys.readouterr().err
        assert status == 0 or (status == 2 and str(run / name) in text and "Traceback" not in text), text
        return status

    whole = (finished / name).read_bytes()
    for number in range(max(N // 20, 1)):
        run = tmp_path / str(number)
        shutil.copytree(finished, run)
        (run / name).write_bytes(damaged(whole, rng) if number % 2 else whole[: len(whole) // 3])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if resume(run):
                # And what was refused is no hindrance once it is mended
                (run / name).write_bytes(whole)
                assert resume(run) == 0


def test_assets_of_robotwin(tmp_path, rng):
    archive = tmp_path / "assets.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("objects/box/model.json", "{}" * 99)
    whole = archive.read_bytes()
    check(archive, (damaged(whole, rng) for _ in range(N)), lambda: unpack(archive, tmp_path / "out"))
    for content in (b"", b"[1]", b"\xff", b"{"):
        (tmp_path / STAND_IN_MARKER).write_bytes(content)
        assert not is_current_stand_in(tmp_path)
    config = tmp_path / "assets" / "embodiments" / "robot" / "config.yml"
    config.parent.mkdir(parents=True)
    values = {"dual_arm": True, "arm_joints_name": [["a", "b", "c", "d", "e", "f"]] * 2}
    config.write_text(json.dumps(values))
    check(config, mixed(config.read_bytes(), values, rng, N), lambda: robots(tmp_path, ("robot",)), "Robot 'robot' has")


# What once got through a loader, or out of it as another error
BROKEN = Path(__file__).parent / "golden" / "broken"


def in_run(name):
    """The file takes the place of one in a run."""

    def read(path):
        run = path.parent / "run"
        run.mkdir()
        (run / "args.yml").write_text("algo: ppo\nenv: CartPole-v1\n")
        (run / "config.yml").write_text("{}\n")
        path.rename(run / name)
        try:
            find_policies([run], {})
        except ValueError as error:
            raise ValueError(str(error).replace(str(run / name), str(path))) from error

    return read


def as_robot(path):
    folder = path.parent / "assets" / "embodiments" / "robot"
    folder.mkdir(parents=True)
    path.rename(folder / "config.yml")
    try:
        robots(path.parent, ("robot",))
    except ValueError as error:
        raise ValueError(str(error).replace(str(folder / "config.yml"), str(path))) from error


READERS = {
    "demos": Demonstrations.from_hdf5,
    "trace": Trace.load,
    "evaluation": EvaluationResult.load,
    "args": in_run("args.yml"),
    "config": in_run("config.yml"),
    "progress": in_run("progress.csv"),
    "robot": as_robot,
    "assets": lambda path: unpack(path, path.parent / "out"),
    "seeds": read_seeds,
}


@pytest.mark.parametrize("name", sorted(path.name for path in BROKEN.iterdir()))
def test_files_that_once_broke_a_loader(name, tmp_path, monkeypatch):
    monkeypatch.setattr(untrusted, "READ_TIMEOUT", 3)
    path = tmp_path / name
    shutil.copyfile(BROKEN / name, path)
    with pytest.raises(ValueError) as error:
        READERS[name.partition("_")[0]](path)
    assert str(path) in str(error.value)
