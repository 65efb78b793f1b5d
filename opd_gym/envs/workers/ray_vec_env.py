"""A vectorised env whose workers are on other machines, by Ray: ``pip install 'opd-gym[ray]'``."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import gymnasium as gym

from opd_gym.envs.workers.cluster import connect, kill, options_of, wait_for
from opd_gym.envs.workers.host import UNANSWERED
from opd_gym.envs.workers.memory import Memory
from opd_gym.envs.workers.process import CLOSE_SECONDS
from opd_gym.envs.workers.relay import Relay
from opd_gym.envs.workers.vec_env import WorkerVecEnv

# A simulator keeps one core busy, and envs go to all machines
_DEFAULTS = {"num_cpus": 1, "scheduling_strategy": "SPREAD"}


class RayWorker:
    """
    A worker on some machine of a Ray cluster, with the methods of a :class:`~opd_gym.envs.workers.process.Process`. It
    is ended when this object is collected, and by Ray when the learner ends.

    :param ray: Module of Ray
    :param options: Options of the actor
    """

    def __init__(self, ray: Any, options: dict[str, Any]):
        self._ray = ray
        self._options = options
        # The second group is heard while a command is carried out
        self._actor = ray.remote(concurrency_groups={"control": 1})(Relay).options(**options).remote()
        self._kill_at_last = weakref.finalize(self, kill, ray, self._actor)
        self._answers: deque[tuple[int, Any]] = deque()
        # What is known of an actor that is lost
        self._words: str | None = None
        #: Where observations go that arrive, and which env a worker died for
        self.memory: Memory | None = None

    def put(self, command: str, index: int, payload: bytes) -> None:
        """
        Send a command, without waiting for it to be carried out; what is said to a lost worker is dropped.

        :param command: The command
        :param index: Number of the env
        :param payload: Its argument, pickled
        """
        if not self._ray.is_initialized():
            self._words = "Ray was shut down."
        elif command in UNANSWERED:
            self._actor.tell.remote(command, index, payload)
        else:
            self._answers.append((index, self._actor.ask.remote(command, index, payload)))

    def get(self, timeout: float | None = None) -> bytes:
        """
        Wait for the next answer.

        :param timeout: Seconds to wait; None: it may take for ever
        :return: The answer; observations that came with it are in :attr:`memory`
        :raises TimeoutError: There was none for so long
        :raises InterruptedError: There was none, and ``process.give_up`` is set
        :raises EOFError: The worker is dead, or its machine is lost
        """
        if not self._ray.is_initialized():
            self._words = "Ray was shut down."
            raise EOFError
        index, answer = self._answers[0]
        try:
            found = wait_for(self._ray, answer, timeout)
        except self._ray.exceptions.RayError as error:
            self._words = str(error)
            raise EOFError from error
        self._answers.popleft()
        if found is None:
            raise EOFError
        message, observations = found
        for slot, arrays in observations.items():
            assert self.memory is not None
            for key, array in arrays.items():
                self.memory.arrays[key][index, slot] = array
        return message

    def kill(self) -> None:
        """End the worker at once; :meth:`end` waits for it."""
        if self._ray.is_initialized():
            self._actor.kill.options(concurrency_group="control").remote()

    def end(self, patience: float = 0.0) -> int | None:
        """
        Wait until the worker has ended; end it if it does not.

        :param patience: Seconds to wait before that
        :return: Its exit status, negative for a signal; None if its actor cannot say
        """
        exit_code = None
        if self._words is None and self._ray.is_initialized():
            report = self._actor.end.options(concurrency_group="control").remote(patience)
            try:
                exit_code, self._words, at_work = self._ray.get(report, timeout=patience + CLOSE_SECONDS)
                if self.memory is not None:
                    self.memory.at_work[at_work] = True
            except self._ray.exceptions.GetTimeoutError:
                self._words = (
                    f"Its actor does not answer, or was never started: it asks for {self._options}, and in the cluster "
                    f"are free {self._ray.available_resources()}."
                )
            except self._ray.exceptions.RayError as error:
                self._words = str(error)
        self._kill_at_last()
        return exit_code

    def last_words(self) -> str:
        """
        :return: What the worker said in its last moments, or Ray of a lost actor
        """
        return self._words or ""

    def close(self) -> None:
        """End the actor."""
        self._kill_at_last()


class RayVecEnv(WorkerVecEnv):
    """
    A :class:`~opd_gym.envs.workers.vec_env.WorkerVecEnv` whose workers are on any machines of a Ray cluster: the same
    episodes, steps in two halves, lost episodes. Each worker is an actor that starts a worker process beside itself.

    A worker that dies is replaced by a new actor, wherever Ray has room for it. A crash of a simulator is told as of a
    local worker, with its exit status and which env is at fault. An actor or a machine that is lost is no env's fault;
    its exit status is None.

    Every machine needs this library, its extras and the simulators' assets in the same versions. Functions and env ids
    are sent as to local workers; modules and files that they name have to be there, under the same names (Ray's
    ``runtime_env`` can bring them). Envs see the environment variables of ``ray start`` on their machine
    (``MUJOCO_GL``), or those of the ``runtime_env``.

    :param env_fns: Functions that build the envs; they are sent to the workers by cloudpickle
    :param n_workers: Number of workers, at most one an env; None: as many as the cluster has free CPUs for
    :param timeout: Seconds without an answer after which a worker counts as dead; None: it may take for ever
    :param address: See :func:`opd_gym.envs.workers.cluster.connect`
    :param actor_options: Options of the actors: ``num_cpus`` (1), ``num_gpus``, ``resources``, ``runtime_env``,
        ``scheduling_strategy`` ("SPREAD"), ...
    :raises ImportError: Ray is not installed
    :raises ConnectionError: There is no cluster
    :raises ValueError: As of a ``WorkerVecEnv``, or an option that cannot be chosen
    """

    def __init__(
        self,
        env_fns: list[Callable[[], gym.Env]],
        n_workers: int | None = None,
        timeout: float | None = 300.0,
        address: str | None = None,
        actor_options: Mapping[str, Any] | None = None,
    ):
        self._actor_options = options_of(actor_options, _DEFAULTS)
        self._ray = connect(address)
        super().__init__(env_fns, n_workers, timeout)

    def _default_workers(self) -> int:
        free = self._ray.available_resources().get("CPU", 0.0)
        return max(int(free / (self._actor_options.get("num_cpus") or 1)), 1)

    def _launch(self) -> RayWorker:
        return RayWorker(self._ray, self._actor_options)

    def _send_memory(self, worker: Any) -> None:
        worker.process.memory = self._memory
        super()._send_memory(worker)

    def _write(self, index: int, command: str, payload: bytes) -> None:
        self._worker_of(index).process.put(command, index, payload)
