"""Files that others made, damaged at random: each gives a result, or one error that names it, within a moment."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import yaml
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize
from toys import vec

from opd_gym import OPD
from opd_gym.demonstrations import Demonstrations
from opd_gym.demonstrations.hdf5 import Episode, write_demonstrations
from opd_gym.policies.loading import load_policy, read_vec_normalize
from opd_gym.untrusted import read_yaml
from opd_gym.zoo.hyperparams import load_hyperparams

# How often each file is damaged: more of them by the variable, for a longer look
N = int(os.environ.get("OPD_GYM_FUZZ", "40"))
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


def check(path: Path, contents: Iterator[bytes], load: Callable[[], object]) -> None:
    whole = path.read_bytes()
    load()
    outcomes = []
    for n, content in enumerate(contents):
        path.write_bytes(content)
        try:
            load()
            outcomes.append(True)
        except (ValueError, OSError) as error:
            assert str(path) in str(error), f"case {n}: {error!r}"
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


def test_demonstrations(tmp_path, rng):
    path = tmp_path / "pick_up_the_milk_demo.hdf5"
    pictures = {name: rng.integers(0, 255, (3, 8, 8, 3), dtype=np.uint8) for name in ("agentview", "wrist")}
    proprio = np.concatenate([rng.normal(size=(3, 3)), np.tile([0, 0, 0, 1], (3, 1)), rng.normal(size=(3, 2))], axis=1)
    episode = Episode({**pictures, "proprio": proprio.astype(np.float32)}, rng.uniform(-1, 1, (3, 7)))
    write_demonstrations(path, [episode, episode], instruction="pick up the milk")
    whole = path.read_bytes()
    check(path, (damaged(whole, rng) for _ in range(2 * N)), lambda: Demonstrations.from_hdf5(path))


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
