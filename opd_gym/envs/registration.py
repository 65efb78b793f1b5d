"""One table of every environment id, and of how the algorithms train on it."""

from __future__ import annotations

from typing import Any

from opd_gym.envs.libero.suites import CLASSIC_SUITES, N_TASKS, SUITES
from opd_gym.envs.robotwin.tasks import TASKS, camel

_LIBERO = "opd_gym.envs.libero.env:LiberoEnv"
_LIBERO_PLUS = "opd_gym.envs.libero.plus:LiberoPlusEnv"
_ROBOTWIN = "opd_gym.envs.robotwin.env:RoboTwinEnv"


def _camel(suite: str) -> str:
    return "".join(word.capitalize() for word in suite.split("_"))


def _table() -> dict[str, dict[str, Any]]:
    table: dict[str, dict[str, Any]] = {f"{_camel(suite)}-v0": {"suite": suite} for suite in SUITES}
    for suite in CLASSIC_SUITES:
        table |= {f"{_camel(suite)}Task{i}-v0": {"suite": suite, "task_ids": (i,)} for i in range(N_TASKS[suite])}
    return table


LIBERO_PLUS_IDS = {f"{_camel(suite).replace('Libero', 'LiberoPlus')}-v0": {"suite": suite} for suite in CLASSIC_SUITES}
LIBERO_IDS = _table() | LIBERO_PLUS_IDS
ROBOTWIN_IDS: dict[str, dict[str, Any]] = {f"RoboTwin{camel(task)}-v0": {"task": task} for task in TASKS}

# The chunk that the published policies of a benchmark decode at once; ids that are not here act step by step.
CHUNK_SIZES = {env_id: 8 for env_id in LIBERO_IDS} | {env_id: 25 for env_id in ROBOTWIN_IDS}


def register_envs() -> None:
    """Register every environment id; called when both ``opd_gym`` and Gymnasium are imported."""
    import gymnasium as gym  # here: the table alone is read without it, and while it is being imported

    # The first that registers an id wins
    for entry_point, ids in ((_LIBERO_PLUS, LIBERO_PLUS_IDS), (_LIBERO, LIBERO_IDS), (_ROBOTWIN, ROBOTWIN_IDS)):
        for env_id, kwargs in ids.items():
            if env_id not in gym.registry:
                gym.register(env_id, entry_point=entry_point, kwargs=dict(kwargs))


def bare_id(env_id: str) -> str:
    """
    :param env_id: an environment id, with or without the module to import (``opd_gym:LiberoObject-v0``)
    :return: the id without the module
    """
    return env_id.split(":")[-1]


def training_defaults(env_id: str) -> dict[str, Any]:
    """
    How the algorithms train on an id, where neither a file of hyperparameters nor the user says otherwise.

    :param env_id: an environment id, with or without the module to import
    :return: ``n_envs`` and ``env_kwargs``, for :func:`opd_gym.envs.make.build_env`; empty for an id that is not a
        benchmark's
    """
    env_id = bare_id(env_id)
    if env_id in ROBOTWIN_IDS:
        env_kwargs: dict[str, Any] = {"image_size": 64, "cameras": ["head", "left_wrist", "right_wrist"]}
        if env_id == "RoboTwinHandoverBlock-v0":
            env_kwargs["horizon"] = 450  # a solved episode takes about 350 of the 800 actions
        return {"n_envs": 2, "env_kwargs": env_kwargs}
    if env_id in LIBERO_IDS:
        env_kwargs = {"visuals": "light", "image_size": 64}
        suite = LIBERO_IDS[env_id]["suite"]
        # Less than in an evaluation, or a student that is stuck fills the budget with states of few episodes
        if suite.startswith("libero_object"):
            env_kwargs["horizon"] = 160  # of 280; a solved episode takes about 90
        elif suite.startswith(("libero_spatial", "libero_goal")):
            # Of 220 and 300; a solved episode takes about 70 and 60, but 220 in one task of Goal; OPD never solved it
            env_kwargs["horizon"] = 112
        elif suite.startswith("libero_10"):
            env_kwargs["horizon"] = 240  # of 520; a solved episode takes 110 to 210
        return {"n_envs": 2, "env_kwargs": env_kwargs}
    return {}
