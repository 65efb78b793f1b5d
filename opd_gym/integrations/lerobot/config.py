"""``--env.type=opd_libero`` of LeRobot's programs. Imports LeRobot, which imports this (``discover_packages_path``)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import gymnasium as gym

try:
    from lerobot.envs.configs import EnvConfig, LiberoEnv
    from lerobot.envs.utils import _LazyAsyncVectorEnv, freeze_after_episode_end, parse_camera_names
    from lerobot.utils.constants import (
        LIBERO_KEY_EEF_MAT,
        LIBERO_KEY_GRIPPER_QVEL,
        LIBERO_KEY_JOINTS_POS,
        LIBERO_KEY_JOINTS_VEL,
    )
except ImportError as error:
    raise ImportError(
        f"opd_gym.integrations.lerobot.config needs LeRobot 0.6 (Python 3.12): pip install lerobot ({error})"
    ) from error

from opd_gym.envs.libero import suites
from opd_gym.integrations.lerobot.env import PICTURES, LeRobotLiberoEnv

# LeRobot's names of the cameras
CAMERAS = {"agentview_image": "agentview", "robot0_eye_in_hand_image": "wrist"}
# What its own env has besides, and its processor does not use
LEFT_OUT = (LIBERO_KEY_EEF_MAT, LIBERO_KEY_GRIPPER_QVEL, LIBERO_KEY_JOINTS_POS, LIBERO_KEY_JOINTS_VEL)
FPS = 20


@EnvConfig.register_subclass("opd_libero")
@dataclass
class OpdLiberoConfig(LiberoEnv):
    """
    LeRobot's settings of LIBERO, on this library's LIBERO.

    :param visuals: "exact" for LIBERO's own pictures, "light" for simplified ones: much faster without a GPU
    :param draw_every: steps between two pictures; a policy that looks once for n actions (``n_action_steps``) needs one
        every n steps. 1 draws after each step, for policies that look at each, or at several at once
    :raises ValueError: a setting that this library's LIBERO does not have
    """

    visuals: str = "exact"
    draw_every: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in LEFT_OUT:
            self.features.pop(name, None)
            self.features_map.pop(name, None)
        if self.visuals not in ("exact", "light"):
            raise ValueError(f'env.visuals must be "exact" or "light", got {self.visuals!r}.')
        if self.draw_every < 1:
            raise ValueError(f"env.draw_every must be at least 1, got {self.draw_every}.")
        if self.observation_height != self.observation_width:
            raise ValueError(
                "opd_libero draws square pictures: expected the same env.observation_height and "
                f"env.observation_width, got {self.observation_height} and {self.observation_width}."
            )
        if self.fps != FPS:
            raise ValueError(f"opd_libero has LIBERO's {FPS} steps a second: expected env.fps={FPS}, got {self.fps}.")
        if self.control_mode != "relative":
            raise ValueError(f'opd_libero expects env.control_mode="relative", got {self.control_mode!r}.')
        if self.is_libero_plus:
            raise ValueError("opd_libero has no LIBERO-Plus: drop env.is_libero_plus.")
        unknown = [suite for suite in self._suites if suite not in suites.SUITES]
        if unknown or not self._suites:
            raise ValueError(f"env.task must name suites, got {self.task!r}. Known: {', '.join(suites.SUITES)}.")

    @property
    def _suites(self) -> list[str]:
        return [name.strip() for name in self.task.split(",") if name.strip()]

    def create_envs(self, n_envs: int, use_async_envs: bool = False) -> dict[str, dict[int, Any]]:
        """
        :param n_envs: number of envs of each task
        :param use_async_envs: whether each gets a process, started when the task is played
        :return: vectorised env by suite and task
        :raises ValueError: unknown task
        """
        given = self.camera_name_mapping or {}
        pictures = {}
        for name in parse_camera_names(self.camera_name):
            camera = CAMERAS.get(name, name.removesuffix("_image"))
            pictures[camera] = given.get(name, PICTURES.get(camera, camera))
        envs: dict[str, dict[int, Any]] = {}
        for suite in self._suites:
            ids = range(len(suites.tasks(suite))) if self.task_ids is None else sorted(set(self.task_ids))
            for task_id in ids:
                make = [
                    partial(
                        LeRobotLiberoEnv,
                        suite,
                        task_id,
                        episode_index=i,
                        n_envs=n_envs,
                        image_size=self.observation_height,
                        pictures=pictures,
                        with_state=self.obs_type == "pixels_agent_pos",
                        init_states=self.init_states,
                        max_steps=self.episode_length,
                        visuals=self.visuals,
                        draw_every=self.draw_every,
                    )
                    for i in range(n_envs)
                ]
                if use_async_envs and n_envs > 1:
                    env = _LazyAsyncVectorEnv(make)
                else:
                    # An env whose episode is over waits for the others of the batch
                    frozen = [freeze_after_episode_end(function) for function in make]
                    env = gym.vector.SyncVectorEnv(frozen, autoreset_mode=gym.vector.AutoresetMode.NEXT_STEP)
                envs.setdefault(suite, {})[task_id] = env
        return envs
