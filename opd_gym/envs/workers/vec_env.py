"""A vectorised env whose worker processes do not wait for the learner, and may die without ending the run."""

from __future__ import annotations

import ast
import multiprocessing as mp
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from multiprocessing import connection, reduction, spawn
from pathlib import Path
from typing import IO, Any

import cloudpickle
import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import CloudpickleWrapper, VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn
from stable_baselines3.common.vec_env.util import dict_to_obs

from opd_gym.envs.workers.host import CALLER_ERRORS, work
from opd_gym.envs.workers.memory import Arrays, Memory
from opd_gym.envs.workers.pipeline import Pipeline
from opd_gym.envs.workers.process import CLOSE_SECONDS, Outbox, WorkerTraceback

__all__ = ["CALLER_ERRORS", "Pipeline", "WorkerDeath", "WorkerTraceback", "WorkerVecEnv"]

# A new worker imports its libraries and builds its envs first, whatever a step may take
START_SECONDS = 300.0
MAX_DEATHS = 3

# While a process starts without the learner's script, no other one does
_starting = threading.Lock()


@dataclass(frozen=True)
class WorkerDeath:
    """
    One death of a worker.

    :param worker: Number of the worker
    :param envs: Envs that it hosted
    :param exit_code: Exit status of the process, negative for a signal
    :param reason: What was noticed
    :param details: Traceback, or what the process said in its last moments; empty where it could say nothing
    """

    worker: int
    envs: tuple[int, ...]
    exit_code: int | None
    reason: str
    details: str

    def __str__(self) -> str:
        code = "unknown exit code" if self.exit_code is None else f"exit code {self.exit_code}"
        if self.exit_code is not None and -self.exit_code in set(signal.Signals):
            code = f"{code}, {signal.Signals(-self.exit_code).name}"
        return f"worker {self.worker} (envs {', '.join(map(str, self.envs))}): {self.reason} ({code})"


@dataclass(frozen=True, eq=False)
class _Announcement:
    """Arguments of ``EpisodeControl.set_next_reset``. Two of the same content are two announcements."""

    seed: int | None = None
    options: dict[str, Any] | None = None
    tag: Any = None
    frozen: bool = False


@dataclass(eq=False)
class _Request:
    """A command that a worker answers; ``announcement`` is the one in force when the command was given."""

    index: int
    command: str
    payload: Any = None
    announcement: _Announcement | None = None
    # What is said of the episode that was lost, where this reset stands in for its step
    lost: dict[str, Any] | None = None
    sent: bool = False
    answered: bool = False
    value: Any = None
    error: BaseException | None = None
    obs: Arrays = field(default_factory=dict)
    terminal_obs: Arrays = field(default_factory=dict)

    @property
    def resets(self) -> bool:
        return self.command == "reset" or (self.command == "env_method" and self.payload[0] in ("reset", "thaw"))

    @property
    def began_episode(self) -> bool:
        """Whether this is the answer of a step behind or in place of which an episode began."""
        return self.answered and self.error is None and (self.lost is not None or self.value[1])


class _Worker:
    """The learner's side of a worker process."""

    def __init__(self, number: int, envs: tuple[int, ...]):
        self.number = number
        self.envs = envs
        self.pending: deque[_Request] = deque()
        self.deaths = 0
        self.failure = ""
        self.busy = 0.0
        self.last_words: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (close() closes it)
        self.process: Any = None
        self.pipe: Any = None
        self.outbox: Any = None

    @property
    def ends(self) -> list[Any]:
        """The learner's ends of what connects it with the process."""
        return [] if self.pipe is None else [self.pipe, self.outbox.socket]

    def hang_up(self) -> None:
        self.outbox.close()
        self.pipe.close()


class WorkerVecEnv(VecEnv):
    """
    Several envs in each of several worker processes; env ``i`` lives in worker ``i % n_workers``.

    Beside ``step`` there are :meth:`send` and :meth:`recv`, which step some of the envs: a worker goes through its
    commands in order, so it simulates one half of its envs while the learner thinks about the other (:attr:`halves`,
    :class:`Pipeline`). What is received never depends on which worker was faster.

    A worker that dies (a signal, a crash in native code, a simulator that raises, no answer for ``timeout`` seconds) is
    started again. The episodes that it played are lost: their envs report ``done=True``, reward 0 and ``info`` with
    ``"episode_lost": True``, ``"TimeLimit.truncated": True``, the last observation as ``"terminal_observation"``, the
    ``"episode_tag"`` and a text under ``"worker_death"``, and go on with the episode that was announced next
    (:meth:`announce`). Attributes that were set with ``set_attr`` are set again; other state that methods of an env
    left in it is gone. The third death in a row without a completed step is an error.

    An exception that says that the caller is wrong (``CALLER_ERRORS``: a wrong action, a missing attribute), or that
    anything but a step raises, is raised here, with the worker's traceback as its cause.

    For Linux: the memory that learner and workers share is a file without a name, which is handed to a running process.

    :param env_fns: Functions that build the envs; they are sent to the workers by cloudpickle
    :param n_workers: Number of worker processes, at most one an env; None: as many as there are cores for this process
    :param timeout: Seconds without an answer after which a worker counts as dead; None: it may take for ever
    :param start_method: "forkserver", "spawn", or "fork", which is not thread-safe
    :raises NotImplementedError: On another system than Linux
    :raises ValueError: No env, a bad number of workers, envs of different spaces, or observations that are not arrays
    """

    def __init__(
        self,
        env_fns: list[Callable[[], gym.Env]],
        n_workers: int | None = None,
        timeout: float | None = 300.0,
        start_method: str = "forkserver",
    ):
        if sys.platform != "linux":
            raise NotImplementedError(
                f"WorkerVecEnv works on Linux only, and this is {sys.platform!r}. Use Stable-Baselines3's "
                "SubprocVecEnv, as make_vec() does here where it is given no n_workers."
            )
        if not env_fns:
            raise ValueError("WorkerVecEnv expects at least one function that builds an env, got none.")
        if n_workers is not None and n_workers < 1:
            raise ValueError(f"Expected n_workers to be at least 1, or None for one per core, got {n_workers}.")
        if timeout is not None and not timeout > 0.0:
            raise ValueError(f"Expected timeout to be positive, or None for no limit, got {timeout}.")
        self.closed = False
        self.timeout = timeout
        self.n_workers = min(n_workers or len(os.sched_getaffinity(0)), len(env_fns))
        #: Every death so far
        self.deaths: list[WorkerDeath] = []
        self._context: Any = mp.get_context(start_method)
        self._env_fns = [CloudpickleWrapper(env_fn) for env_fn in env_fns]
        # A forked process has everything that was here
        self._imports_main = start_method == "fork" or _can_import_main()
        self._registered = {} if self._imports_main else _registered()
        self._built = False
        self._steps: list[_Request | None] = [None] * len(env_fns)
        # Resets that replaced a lost episode which the learner does not know yet to be lost
        self._lost: list[_Request | None] = [None] * len(env_fns)
        self._was_reset = [False] * len(env_fns)
        self._announced: list[_Announcement | None] = [None] * len(env_fns)
        self._playing: list[_Announcement | None] = [None] * len(env_fns)
        self._attributes: list[dict[str, Any]] = [{} for _ in env_fns]
        self._memory: Any = None
        self._workers = [
            _Worker(number, tuple(range(number, len(env_fns), self.n_workers))) for number in range(self.n_workers)
        ]
        self.reset_stats()
        try:
            builds = [_Request(worker.envs[0], "build") for worker in self._workers]
            for worker, build in zip(self._workers, builds, strict=True):
                self._start(worker, build)
            for build in builds:
                self._wait(build)
                if build.error is not None:
                    raise build.error
            observation_space, action_space = self._check_spaces([pair for build in builds for pair in build.value])
            self._memory = Memory(observation_space, len(env_fns))
            for worker in self._workers:
                self._send_memory(worker)
            self._built = True
            self._last = {key: np.zeros_like(array[:, 0]) for key, array in self._memory.arrays.items()}
            super().__init__(len(env_fns), observation_space, action_space)
        except BaseException:
            self.close()
            raise

    @staticmethod
    def _check_spaces(found: list[tuple[spaces.Space, spaces.Space]]) -> tuple[spaces.Space, spaces.Space]:
        for pair in found[1:]:
            if pair != found[0]:
                raise ValueError(
                    "All envs of a vectorised env need the same spaces. Those of observations and actions are "
                    f"{found[0]} in one, and {pair} in another."
                )
        return found[0]

    # ------------------------------------------------------------------------------------------------------ workers

    def _start(self, worker: _Worker, build: _Request) -> None:
        worker.pipe, remote = self._context.Pipe()
        worker.outbox = Outbox(worker.pipe)
        # A forked process holds the learner's ends of every pipe: it would never see the learner's death
        forks = self._context.get_start_method() == "fork"
        inherited = [end for other in self._workers for end in other.ends] if forks else []
        env_fns = [self._env_fns[index] for index in worker.envs]
        worker.process = self._context.Process(
            target=work,
            args=(remote, inherited, self._registered, env_fns, worker.envs, len(self._env_fns)),
            name=f"WorkerVecEnv-{worker.number}",
            daemon=True,
        )
        with nullcontext() if self._imports_main else _main_is_left_out():
            worker.process.start()
        remote.close()
        worker.pending.append(build)
        _send_file(worker, worker.last_words.fileno())

    def _send_memory(self, worker: _Worker) -> None:
        _send_file(worker, self._memory.fd)

    def _worker_of(self, index: int) -> _Worker:
        return self._workers[index % self.n_workers]

    def _write(self, index: int, command: str, payload: bytes) -> None:
        self._worker_of(index).outbox.put(pickle.dumps((command, index, payload)))

    def _dumps(self, value: Any) -> bytes:
        # By name, what the learner's script defines is unknown where that has not been imported
        return (pickle if self._imports_main else cloudpickle).dumps(value)

    def _submit(self, request: _Request) -> _Request:
        payload = self._dumps(request.payload)  # before anything is noted: what cannot be sent changes nothing
        request.sent, request.answered = True, False
        self._worker_of(request.index).pending.append(request)
        self._write(request.index, request.command, payload)
        return request

    def _tell(self, index: int, announcement: _Announcement) -> None:
        self._write(index, "announce", self._dumps(vars(announcement)))

    def _wait(self, request: _Request) -> None:
        worker = self._worker_of(request.index)
        while not request.answered:
            self._receive(worker)

    def _receive(self, worker: _Worker) -> None:
        """Wait for one answer of a worker."""
        if worker.failure:
            raise RuntimeError(worker.failure)
        request = worker.pending[0]
        timeout = self.timeout
        if timeout is not None and request.command == "build":
            timeout = max(timeout, START_SECONDS)
        answers = connection.wait([worker.pipe, worker.process.sentinel], timeout)
        if not answers:
            worker.process.kill()
            self._revive(worker, f"no answer to {request.command!r} for {timeout:g} s: killed")
            return
        message = None
        with suppress(EOFError, OSError):
            # What it said before it died comes first
            message = worker.pipe.recv_bytes() if worker.pipe.poll() else None
        if message is None:
            self._revive(worker, f"died in {request.command!r}")
            return
        kind, value, seconds = pickle.loads(message)
        worker.busy += min(seconds, time.perf_counter() - self._stats_since)
        if kind == "fatal" or (kind == "error" and request.command == "build" and self._built):
            error, details = value
            self._revive(worker, f"{type(error).__name__} in {request.command!r}: {error}", details)
            return
        worker.pending.popleft()
        request.answered = True
        if kind == "error":
            request.error, details = value
            request.error.__cause__ = WorkerTraceback(details)
            return
        request.error, request.value = None, value
        self._take_note(worker, request)

    def _take_note(self, worker: _Worker, request: _Request) -> None:
        index = request.index
        reset = request.resets
        if request.command in ("reset", "step"):
            # Now, because the worker may write there again before the learner asks for it
            request.obs = self._memory.read(index, 0)
        if request.command == "step":
            worker.deaths = 0
            reset = request.value[1]
            if reset:
                request.terminal_obs = self._memory.read(index, 1)
        if reset:
            self._was_reset[index] = True
            self._playing[index] = request.announcement
            if self._announced[index] is request.announcement:
                self._announced[index] = None

    def _revive(self, worker: _Worker, reason: str, details: str = "") -> None:
        """Start a dead worker again, and give it what the old one did not answer."""
        worker.process.join(CLOSE_SECONDS)
        if worker.process.exitcode is None:
            worker.process.kill()
            worker.process.join()
        worker.last_words.seek(0)
        details = details or worker.last_words.read().decode(errors="replace").strip()
        worker.last_words.seek(0)
        worker.last_words.truncate()
        death = WorkerDeath(worker.number, worker.envs, worker.process.exitcode, reason, details)
        self.deaths.append(death)
        worker.deaths += 1
        worker.hang_up()
        if worker.deaths >= MAX_DEATHS:
            worker.failure = (
                f"WorkerVecEnv: {death}; it died {worker.deaths} times in a row without completing a step. "
                + (f"Its last words:\n{details}\n" if details else "It left no last words; look at stderr above. ")
                + "Step one of the envs in a DummyVecEnv, or under a debugger, to see why. SIGKILL without a time-out "
                "is most often the system's answer to a lack of memory: take fewer envs. A step that needs longer than "
                f"the time-out needs WorkerVecEnv(timeout=...), now {self.timeout}."
            )
            raise RuntimeError(worker.failure)
        build = _Request(worker.envs[0], "build")
        unanswered, worker.pending = worker.pending, deque()
        if unanswered and unanswered[0].command == "build":
            build = unanswered.popleft()
        self._start(worker, build)
        if self._built:
            self._send_memory(worker)
        for index in worker.envs:
            self._resume(index, [request for request in unanswered if request.index == index], str(death))
        # Last, because a filter may turn it into an exception
        message = f"WorkerVecEnv: {death}. Its episodes are lost; it was started again.\n{details}".strip()
        warnings.warn(message, RuntimeWarning, stacklevel=2)

    def _resume(self, index: int, requests: list[_Request], death: str) -> None:
        """Bring an env of a new worker to where the learner can go on with it."""
        for name, value in self._attributes[index].items():
            self._submit(_Request(index, "set_attr", (name, value)))
        playing, latest, told = self._playing[index], self._announced[index], None
        stands_still = playing is not None and playing.frozen
        if stands_still:
            self._tell(index, playing)  # type: ignore[arg-type]
            self._submit(_Request(index, "reset", (None, {}), playing))
        elif self._was_reset[index]:
            begun = next((r for r in requests if r.command in ("step", "reset")), None) or self._lost[index]
            if begun is None:
                # The learner thinks about the next step: it hears of the loss when it sends that
                begun = self._lost[index] = _Request(index, "step")
            if begun.command == "step":
                begun.command, begun.payload = "reset", (None, {})
                begun.lost = {"episode_lost": True, "TimeLimit.truncated": True, "worker_death": death}
                if playing is not None:
                    begun.lost["episode_tag"] = playing.tag
            if begun not in requests and (begun.sent or latest is not None):
                # Else the learner has not yet said what comes next: it may not know that the last episode has begun
                begun.announcement = begun.announcement if begun.sent else latest
                requests.insert(0, begun)
        for request in requests:
            if request.announcement is not None and request.announcement is not told:
                told = request.announcement
                self._tell(index, told)
            self._submit(request)
        if latest is not None and latest is not told:
            self._tell(index, latest)

    def _begin_after_loss(self, index: int) -> None:
        """Start the episode that takes the place of a lost one, if that waits for what the learner announces."""
        lost = self._lost[index]
        if lost is not None and not lost.sent:
            lost.announcement = self._announced[index]
            self._submit(lost)

    # ------------------------------------------------------------------------------------------------------ stepping

    @property
    def halves(self) -> list[np.ndarray]:
        """Two halves of the envs, each spread over all workers; all in one where no worker hosts two."""
        everything = np.arange(self.num_envs)
        if self.num_envs == self.n_workers:
            return [everything]
        rounds = -(-self.num_envs // self.n_workers)
        return np.split(everything, [rounds // 2 * self.n_workers])

    def send(self, actions: np.ndarray, indices: VecEnvIndices = None) -> None:
        """
        Let some envs take a step; this does not wait.

        :param actions: Their actions, in the order of ``indices``
        :param indices: Envs
        :raises ValueError: Not one action for each env
        :raises RuntimeError: One of them has a step on its way already
        """
        indices = self._indices(indices)
        if len(actions) != len(indices):
            raise ValueError(f"Expected one action for each of the envs {indices}, got {len(actions)}.")
        for index in indices:
            if self._steps[index] is not None:
                raise RuntimeError(f"Env {index} has a step on its way: recv() it, or reset(), before the next one.")
        for index, action in zip(indices, actions, strict=True):
            self._begin_after_loss(index)
            lost, self._lost[index] = self._lost[index], None
            if lost is None:
                lost = self._submit(_Request(index, "step", action, self._announced[index]))
            self._steps[index] = lost

    def recv(self, indices: VecEnvIndices = None) -> VecEnvStepReturn:
        """
        Wait for the steps of some envs that were sent before.

        :param indices: Envs
        :return: Observations, rewards, dones and infos, in the order of ``indices``
        :raises RuntimeError: One of them has no step on its way, or its worker died again and again
        """
        indices = self._indices(indices)
        requests = []
        for index in indices:
            request = self._steps[index]
            if request is None:
                raise RuntimeError(
                    f"Env {index} has no step on its way: send() its action first. If it was sent, the env was reset "
                    "since, by an evaluation for instance: give that an env of its own."
                )
            requests.append(request)
        self._settle(requests)
        rewards = np.zeros(len(indices), dtype=np.float32)
        dones = np.zeros(len(indices), dtype=bool)
        infos: list[dict[str, Any]] = []
        for i, (index, request) in enumerate(zip(indices, requests, strict=True)):
            if request.lost is not None:
                reset_info = request.value
                dones[i], info = True, {**request.lost, "terminal_observation": self._as_obs(self._last, index)}
            else:
                rewards[i], dones[i], info, reset_info = request.value
                if dones[i]:
                    info["terminal_observation"] = dict_to_obs(self.observation_space, request.terminal_obs)
            if dones[i]:
                self.reset_infos[index] = reset_info
            infos.append(info)
            self._show(request)
        return self._as_obs(self._last, indices), rewards, dones, infos

    def _show(self, request: _Request) -> None:
        for key, array in request.obs.items():
            self._last[key][request.index] = array

    def _as_obs(self, arrays: Arrays, rows: list[int] | int) -> Any:
        # take() copies: users keep observations, and the next step must leave them as they are
        return dict_to_obs(self.observation_space, {key: array.take(rows, axis=0) for key, array in arrays.items()})

    def _settle(self, requests: Sequence[_Request]) -> None:
        """Wait for all, then raise what the first failure among them raised."""
        try:
            for request in requests:
                self._wait(request)
        finally:
            for request in requests:
                if self._steps[request.index] is request:
                    self._steps[request.index] = None
        for request in requests:
            if request.error is not None:
                raise request.error

    def step_async(self, actions: np.ndarray) -> None:
        self.send(actions)

    def step_wait(self) -> VecEnvStepReturn:
        return self.recv()

    def reset(self) -> VecEnvObs:
        """
        Reset all envs. Steps that are on their way are waited for, and what they bring is dropped.

        :return: Observations
        """
        # Until nothing is on its way: a death that is noticed meanwhile makes new requests for all envs of the worker
        while on_their_way := [r for r in (*self._steps, *self._lost) if r is not None and r.sent and not r.answered]:
            self._wait(on_their_way[0])
        # What took the place of a lost episode is newer than what began in a step before that
        for request in (*self._lost, *self._steps):
            if request is None or request.announcement is None or not request.began_episode:
                continue
            if self._announced[request.index] is None:
                # Nobody saw the announced episode, and nothing was announced since: it is still to come
                self._announced[request.index] = request.announcement
                self._tell(request.index, request.announcement)
        self._lost, self._steps = [None] * self.num_envs, [None] * self.num_envs
        requests = [
            self._submit(_Request(index, "reset", (self._seeds[index], self._options[index]), self._announced[index]))
            for index in range(self.num_envs)
        ]
        self._settle(requests)
        for request in requests:
            self.reset_infos[request.index] = request.value
            self._show(request)
        # Seeds and options are only used once
        self._reset_seeds()
        self._reset_options()
        return self._as_obs(self._last, list(range(self.num_envs)))

    def announce(
        self,
        index: int,
        seed: int | None = None,
        options: dict[str, Any] | None = None,
        tag: Any = None,
        frozen: bool = False,
    ) -> None:
        """
        ``EpisodeControl.set_next_reset`` of one env, without waiting: the env hears of it before its next command. An
        announced episode that has not begun survives the death of its worker.

        :param index: Env
        :param seed: See ``EpisodeControl.set_next_reset``, as for the others
        :param options: Options of the reset
        :param tag: Given back as ``info["episode_tag"]``
        :param frozen: Stand still instead
        """
        announcement = _Announcement(seed, options, tag, frozen)
        self._announced[index] = announcement
        self._tell(index, announcement)
        self._begin_after_loss(index)

    # ------------------------------------------------------------------------------------------------------ the rest

    def _indices(self, indices: VecEnvIndices) -> list[int]:
        return [int(index) for index in self._get_indices(indices)]

    def _ask(self, command: str, payload: Any, indices: VecEnvIndices = None) -> list[Any]:
        requests = [
            self._submit(_Request(index, command, payload, self._announced[index])) for index in self._indices(indices)
        ]
        self._settle(requests)
        return [request.value for request in requests]

    def has_attr(self, attr_name: str) -> bool:
        return all(self._ask("has_attr", attr_name))

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        return self._ask("get_attr", attr_name, indices)

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        self._ask("set_attr", (attr_name, value), indices)
        for index in self._indices(indices):
            self._attributes[index][attr_name] = value

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """
        Call a method of envs. It waits for their answers, behind the steps that are on their way.

        :param method_name: Name of the method
        :param method_args: Its arguments
        :param indices: Envs
        :param method_kwargs: Its keyword arguments
        :return: What it returned
        """
        if method_name == "set_next_reset":
            for index in self._indices(indices):
                self.announce(index, *method_args, **method_kwargs)
            return self._ask("settle", None, indices)
        for index in self._indices(indices):
            self._begin_after_loss(index)
        return self._ask("env_method", (method_name, method_args, method_kwargs), indices)

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        return self._ask("is_wrapped", wrapper_class, indices)

    def get_images(self) -> Sequence[np.ndarray | None]:
        if self.render_mode != "rgb_array":
            warnings.warn(f"Images need render_mode='rgb_array', this one is {self.render_mode!r}.", stacklevel=2)
            return [None] * self.num_envs
        return self._ask("env_method", ("render", (), {}))

    def reset_stats(self) -> None:
        """Start to measure :meth:`utilisation` anew."""
        self._stats_since = time.perf_counter()
        for worker in self._workers:
            worker.busy = 0.0

    def utilisation(self) -> np.ndarray:
        """
        :return: For each worker, the fraction of the time since the last :meth:`reset_stats` that it spent in its envs;
            what it has not answered yet is not counted
        """
        elapsed = time.perf_counter() - self._stats_since
        return np.array([worker.busy / elapsed for worker in self._workers])

    def close(self) -> None:
        """Close the envs and end the workers; those that do not answer are killed."""
        if self.closed:
            return
        self.closed = True
        started = [worker for worker in self._workers if worker.process is not None]
        for worker in started:
            self._write(worker.envs[0], "close", pickle.dumps(None))
        deadline = time.monotonic() + CLOSE_SECONDS
        for worker in started:
            worker.process.join(max(deadline - time.monotonic(), 0.0))
            if worker.process.exitcode is None:
                worker.process.kill()
                worker.process.join()
            worker.hang_up()
        for worker in self._workers:
            worker.last_words.close()
            worker.failure = "This WorkerVecEnv is closed: build a new one."


def _send_file(worker: _Worker, fd: int) -> None:
    # This does not wait: files are sent to a new worker, before anything else. One that has died is noticed where its
    # answer is waited for
    with suppress(OSError):
        reduction.send_handle(worker.pipe, fd, worker.process.pid)


def _can_import_main() -> bool:
    """
    Whether another process may import what runs here as ``__main__``, as multiprocessing has it: a script without
    ``if __name__ == "__main__"`` would start the learner again there, and so on.
    """
    main = sys.modules["__main__"]
    path = getattr(main, "__file__", None)
    if getattr(main, "__spec__", None) is not None or path is None:
        # A module (python -m), or nothing that could be imported (a notebook)
        return True
    try:
        tree = ast.parse(Path(path).read_bytes())
    except (OSError, ValueError, SyntaxError):
        return False
    comparisons = [[node.left, *node.comparators] for node in ast.walk(tree) if isinstance(node, ast.Compare)]
    return any(isinstance(side, ast.Name) and side.id == "__name__" for sides in comparisons for side in sides)


@contextmanager
def _main_is_left_out() -> Iterator[None]:
    """Processes that are started meanwhile do not import ``__main__``."""
    with _starting:
        prepare = spawn.get_preparation_data

        def without_main(name: str) -> dict[str, Any]:
            data = prepare(name)
            return {key: value for key, value in data.items() if not key.startswith("init_main_from")}

        spawn.get_preparation_data = without_main
        try:
            yield
        finally:
            spawn.get_preparation_data = prepare


def _registered() -> dict[str, Any]:
    """Specifications of all envs, which a script may have registered; those that can be sent."""
    found = {}
    for env_id, spec in gym.registry.items():
        with suppress(Exception):
            found[env_id] = cloudpickle.dumps(spec)
    return found
