"""Steps a vectorised env in two halves, so that its workers and the learner do not wait for each other."""

from __future__ import annotations

from typing import Any

import numpy as np
from stable_baselines3.common.vec_env import VecEnv, VecTransposeImage
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn


class Pipeline:
    """
    Steps a vectorised env part by part: in two halves where that keeps its workers busy while the learner thinks
    (:class:`~opd_gym.envs.workers.vec_env.WorkerVecEnv` with several envs in a worker, also below
    ``VecTransposeImage``), elsewhere all envs at once.

    :param env: Vectorised env
    :param split: False for all envs at once, whatever the env
    """

    def __init__(self, env: VecEnv, split: bool = True):
        self.env = env
        #: Envs of each part
        self.parts = [np.arange(env.num_envs)]
        self._transpose = env if isinstance(env, VecTransposeImage) else None
        inner: Any = env.venv if isinstance(env, VecTransposeImage) else env
        # Only a WorkerVecEnv has halves. Looked up on the class: wrappers pass on attributes of what they wrap
        self._workers = inner if hasattr(type(inner), "halves") else None
        if split and self._workers is not None:
            self.parts = self._workers.halves

    def send(self, part: int, actions: np.ndarray) -> None:
        """
        :param part: Number of the part whose envs are to take a step
        :param actions: Their actions
        """
        if self._workers is None:
            self.env.step_async(actions)
        else:
            self._workers.send(actions, self.parts[part])

    def recv(self, part: int) -> VecEnvStepReturn:
        """
        :param part: Number of a part that was sent
        :return: Observations, rewards, dones and infos of its envs
        """
        if self._workers is None:
            return self.env.step_wait()
        obs, rewards, dones, infos = self._workers.recv(self.parts[part])
        if self._transpose is not None:
            for info in infos:
                if "terminal_observation" in info:
                    info["terminal_observation"] = self._transpose.transpose_observations(info["terminal_observation"])
            obs = self._transpose.transpose_observations(obs)  # type: ignore[arg-type]
        return obs, rewards, dones, infos
