"""LIBERO with the observations, the order of initial states and the attributes of LeRobot's own LIBERO env."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from opd_gym.checks import check_at_least, check_at_least_one
from opd_gym.envs.libero import suites
from opd_gym.envs.libero.env import LiberoEnv

# LeRobot's names of the pictures, by our names of the cameras
PICTURES = {"agentview": "image", "wrist": "image2"}
# Where LeRobot's horizon is not the published one
HORIZONS = {"libero_spatial": 280}


class LeRobotLiberoEnv(gym.Env):
    """
    One task of LIBERO as LeRobot's policies and processors expect it.

    Observations are nested: ``pixels`` holds pictures as LIBERO's simulator gives them, upside down, which LeRobot's
    processor turns; ``robot_state`` holds ``eef.pos``, ``eef.quat`` (x, y, z, w) and ``gripper.qpos``. The n-th reset
    takes official state ``episode_index + n * n_envs``, so that the envs of a batch go through all of them. Actions are
    those of :class:`~opd_gym.envs.libero.env.LiberoEnv`. Options of ``reset`` are ignored.

    :param suite: LIBERO's name of the suite
    :param task_id: number of the task
    :param episode_index: number of this env among those of the batch
    :param n_envs: number of envs of the batch
    :param image_size: side of the pictures in pixels
    :param pictures: LeRobot's name of the picture of each camera
    :param with_state: whether there is a ``robot_state``
    :param init_states: True for the official states, False for sampled ones
    :param max_steps: steps until truncation; None for LeRobot's own number
    :param visuals: "exact" or "light", see ``LiberoEnv``
    :param draw_every: draw pictures after every so many steps, and repeat the last ones in between: for policies that
        look once for as many actions
    :raises ValueError: unknown suite, task, camera or visuals, or a number below 1
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}
    render_mode = "rgb_array"

    def __init__(
        self,
        suite: str,
        task_id: int,
        episode_index: int = 0,
        n_envs: int = 1,
        image_size: int = 256,
        pictures: Mapping[str, str] | None = None,
        with_state: bool = True,
        init_states: bool = True,
        max_steps: int | None = None,
        visuals: str = "exact",
        draw_every: int = 1,
    ):
        check_at_least_one(n_envs=n_envs, draw_every=draw_every, max_steps=max_steps)
        check_at_least(0, episode_index=episode_index)
        self.pictures = dict(PICTURES if pictures is None else pictures)
        if not self.pictures:
            raise ValueError("pictures must name at least one camera.")
        horizon = HORIZONS.get(suite) if max_steps is None else max_steps
        self._env = LiberoEnv(
            suite,
            [task_id],
            image_size=image_size,
            cameras=tuple(self.pictures),
            init_states="eval",
            horizon=horizon,
            visuals=visuals,
        )
        self._max_episode_steps = self._env.suite_horizon if horizon is None else horizon
        task = suites.tasks(suite)[task_id]
        self.task_id = task_id
        self.task = task.name
        self.task_description = task.instruction
        self.init_states = init_states
        self.draw_every = draw_every
        self.with_state = with_state
        self._n_envs = n_envs
        self._next_state = episode_index
        self._steps = 0
        self._picture: np.ndarray | None = None
        picture = spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
        observation: dict[str, spaces.Space] = {
            "pixels": spaces.Dict({name: picture for name in self.pictures.values()})
        }
        if with_state:

            def numbers(n: int) -> spaces.Box:
                return spaces.Box(-np.inf, np.inf, (n,), np.float64)

            observation["robot_state"] = spaces.Dict(
                {
                    "eef": spaces.Dict({"pos": numbers(3), "quat": numbers(4)}),
                    "gripper": spaces.Dict({"qpos": numbers(2)}),
                }
            )
        self.observation_space = spaces.Dict(observation)
        self.action_space = self._env.action_space

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """
        Start an episode from the next initial state.

        :param seed: seed of everything this env draws
        :param options: ignored
        :return: observation and info
        """
        state = -1
        if self.init_states:
            state = self._next_state % self._env.n_init_states(self.task_id)
            self._next_state += self._n_envs
        self._steps = 0
        obs, _ = self._env.reset(seed=seed, options={"init_state_id": state})
        return self._observation(obs), self._info(False, False)

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """
        One control step of 0.05 s.

        :param action: float array of shape ``(7,)``
        :return: observation, reward, terminated, truncated, info
        :raises ValueError: wrong shape, or NaN
        """
        self._steps += 1
        self._env.observe = self._steps % self.draw_every == 0
        obs, reward, terminated, truncated, info = self._env.step(action)
        return self._observation(obs), reward, terminated, truncated, self._info(terminated, info["is_success"])

    def _info(self, done: bool, success: bool) -> dict[str, Any]:
        return {"task": self.task, "task_id": self.task_id, "done": done, "is_success": success}

    def _observation(self, obs: Mapping[str, np.ndarray]) -> dict[str, Any]:
        self._picture = obs[next(iter(self.pictures))]
        pixels = {name: np.ascontiguousarray(obs[camera][::-1]) for camera, name in self.pictures.items()}
        if not self.with_state:
            return {"pixels": pixels}
        proprio = obs["proprio"].astype(np.float64)
        state = {"eef": {"pos": proprio[:3], "quat": proprio[3:7]}, "gripper": {"qpos": proprio[7:]}}
        return {"pixels": pixels, "robot_state": state}

    def render(self) -> np.ndarray:  # type: ignore[override]
        """
        :return: what the policy last saw of the first camera, upright: with ``draw_every`` a film has fewer pictures
        :raises RuntimeError: before the first reset
        """
        if self._picture is None:
            raise RuntimeError("Call reset() first.")
        return self._picture

    def close(self) -> None:
        """Free the simulator; may be called twice."""
        self._env.close()
