"""Every registered id: what it makes, and Gymnasium's checker on those that are shipped (`ids.py` names the others)."""

import importlib.util
import os
import warnings

import gymnasium as gym
import ids
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as sb3_check_env

from opd_gym.envs.libero import suites
from opd_gym.envs.registration import CHUNK_SIZES, LIBERO_IDS, LIBERO_PLUS_IDS, ROBOTWIN_IDS, training_defaults

PLAYED = [*ids.LIBERO, *ids.LIBERO_TASKS, *ids.LIBERO_PRO, *ids.LIBERO_PLUS]
# One of each kind of suite; all of them with OPD_GYM_TEST_ALL_TASKS=1
SAMPLE = [
    "LiberoObject-v0",
    "LiberoSpatialTask2-v0",
    "Libero90-v0",
    "LiberoObjectWithMug-v0",
    "LiberoGoalLan-v0",
    "LiberoPlusObject-v0",
]
NO_PLUS = importlib.util.find_spec("liberoplus") is None and not os.environ.get("OPD_GYM_CI")


@pytest.fixture
def libero():
    pytest.importorskip("libero", reason="LIBERO is not installed: pip install 'opd_gym[libero]'")


def make(env_id, **kwargs):
    if env_id in ids.LIBERO_PLUS and NO_PLUS:
        pytest.skip("LIBERO-Plus' task files are not installed")
    return gym.make(f"opd_gym:{env_id}", image_size=16, visuals="light", max_simulators=1, **kwargs)


def test_every_registered_id_is_named_and_none_twice():
    ours = {env_id for env_id, spec in gym.registry.items() if str(spec.entry_point).startswith("opd_gym.")}
    named = [*PLAYED, *ids.NO_OBJECT_FILES, *ids.NO_TASK_FILES, *ids.ROBOTWIN, *ids.NO_OBJECTS]
    assert len(named) == len(set(named)) and set(named) == ours
    assert ours == LIBERO_IDS.keys() | ROBOTWIN_IDS.keys() == CHUNK_SIZES.keys()
    assert set(ids.LIBERO_PLUS) == LIBERO_PLUS_IDS.keys() and set(SAMPLE) < set(PLAYED)
    # An id in a registry is a promise of how to train on it
    assert all(training_defaults(env_id)["n_envs"] == 2 for env_id in ours)
    for env_id, kwargs in LIBERO_IDS.items():
        # Training episodes may end sooner than evaluated ones, and not later
        evaluated = suites.horizon(kwargs["suite"])
        assert training_defaults(env_id)["env_kwargs"].get("horizon", evaluated) <= evaluated
    # RoboTwin's envs need its runtime: tests/test_robotwin.py makes them
    pro = [*ids.LIBERO_PRO, *ids.NO_OBJECT_FILES, *ids.NO_TASK_FILES]
    assert {LIBERO_IDS[env_id]["suite"] for env_id in pro} == set(suites.PRO_SUITES)


@pytest.mark.parametrize("env_id", [*PLAYED, *ids.NO_OBJECT_FILES, *ids.NO_TASK_FILES])
def test_every_id_of_libero_makes_its_env(libero, env_id):
    """Up to the first reset, which starts a simulator."""
    suite = LIBERO_IDS[env_id]["suite"]
    if env_id not in ids.LIBERO_PLUS:
        # The table says who is shipped, and the installed LIBERO agrees
        if env_id in ids.NO_TASK_FILES:
            with pytest.raises(ValueError, match=f"names the suite '{suite}' but does not ship its task files"):
                suites.tasks(suite)
        else:
            found = suites.tasks(suite)
            assert len(found) == suites.N_TASKS.get(suite, len(found)) > 0
    env = make(env_id)
    assert env.spec.id == env_id and env.unwrapped.suite == suite
    assert env.unwrapped.horizon == suites.horizon(suite)
    assert env.action_space == gym.spaces.Box(-1.0, 1.0, (7,), np.float32)
    assert {key: space.shape for key, space in env.observation_space.items() if key != "instruction"} == {
        "agentview": (16, 16, 3),
        "wrist": (16, 16, 3),
        "proprio": (9,),
    }
    if env_id in ids.LIBERO_TASKS:
        assert env.unwrapped.task_ids == [int(env_id.removesuffix("-v0").split("Task")[1])]
    env.close()


@pytest.mark.parametrize("env_id", PLAYED if ids.ALL else SAMPLE)
def test_checkers_of_gymnasium_and_stable_baselines3(libero, env_id):
    tasks = {} if env_id in ids.LIBERO_TASKS else {"task_ids": [0]}
    if env_id in ids.PARTLY:
        found = suites.tasks(LIBERO_IDS[env_id]["suite"])
        tasks = {"task_ids": [next(t.task_id for t in found if "red_sticker" not in t.bddl_file.read_text())]}
    if env_id in ids.LIBERO_PLUS and not NO_PLUS:
        from opd_gym.envs.libero import plus

        found = plus.tasks(LIBERO_IDS[env_id]["suite"])
        tasks = {"task_ids": [next(task.task_id for task in found if task.category == "robot")]}
    env = make(env_id, **tasks)
    try:
        with warnings.catch_warnings():
            # Proprioception has no bounds that hold for every scene.
            warnings.filterwarnings("ignore", message=".*infinity.*")
            check_env(env.unwrapped, skip_render_check=True)
            sb3_check_env(env)
    finally:
        env.close()


@pytest.mark.parametrize("env_id", ids.NO_OBJECT_FILES if ids.ALL else ["LiberoObjectWithRedStick-v0"])
def test_an_id_whose_objects_are_not_shipped_says_so(libero, env_id):
    env = make(env_id, task_ids=[0])
    with pytest.raises(FileNotFoundError, match="it does not ship .*custom_objects"):
        env.reset(seed=0)
    env.close()
