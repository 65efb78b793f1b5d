"""
The part of a ``RayVecEnv`` on the machine of its envs. Neither torch, Stable-Baselines3 nor Ray is imported here.
"""

from __future__ import annotations

import pickle

import numpy as np

from opd_gym.envs.workers.host import start
from opd_gym.envs.workers.memory import Arrays, Memory, open_memory


class Relay:
    """
    Starts a worker process as a ``WorkerVecEnv`` does, on the machine where this is, and hands on what the learner
    tells it and what it answers. A simulator that crashes takes its worker with it and not this, which can say how.
    """

    def __init__(self) -> None:
        self._file = open_memory()
        self._memory: Memory | None = None
        self._process = start(self._file.fileno())

    def tell(self, command: str, index: int, payload: bytes) -> None:
        """
        :param command: A command without an answer
        :param index: Number of the env
        :param payload: Its argument, pickled
        """
        if command == "memory":
            self._memory = Memory(self._file.fileno(), *pickle.loads(payload))
        self._process.put(pickle.dumps((command, index, payload)))

    def ask(self, command: str, index: int, payload: bytes) -> tuple[bytes, dict[int, Arrays]] | None:
        """
        :param command: A command with an answer
        :param index: Number of the env
        :param payload: Its argument, pickled
        :return: The answer, and the observations that the env wrote, by slot; None if the worker is dead
        """
        self._process.put(pickle.dumps((command, index, payload)))
        try:
            answer = self._process.get()
        except EOFError:
            return None
        return answer, {} if self._memory is None else self._memory.take(index)

    def kill(self) -> None:
        """End the worker at once."""
        self._process.kill()

    def end(self, patience: float) -> tuple[int, str, list[int]]:
        """
        Wait until the worker has ended; kill it if it does not.

        :param patience: Seconds to wait before that
        :return: Its exit status, its last words, and the envs that it was at work for
        """
        exit_code = self._process.end(patience)
        at_work = [] if self._memory is None else np.flatnonzero(self._memory.at_work).tolist()
        return exit_code, self._process.last_words(), at_work
