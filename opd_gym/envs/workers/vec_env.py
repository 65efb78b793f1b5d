"""A vectorised env whose worker processes do not wait for the learner, and may die without ending the run."""

from __future__ import annotations

import dataclasses
import os
import pickle
import reprlib
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import cloudpickle
import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn
from stable_baselines3.common.vec_env.util import dict_to_obs, obs_space_info

from opd_gym.checks import check_at_least_one, check_range
from opd_gym.envs.workers.host import CALLER_ERRORS, Lazy, start
from opd_gym.envs.workers.memory import Arrays, Layout, Memory, open_memory
from opd_gym.envs.workers.pipeline import Pipeline
from opd_gym.envs.workers.process import CLOSE_SECONDS, START_SECONDS, WorkerTraceback, exit_text

__all__ = ["CALLER_ERRORS", "Pipeline", "WorkerDeath", "WorkerTraceback", "WorkerVecEnv"]

# So many deaths in a row, of a worker without a completed step or of an env without a finished episode, are an error
MAX_DEATHS = 3


@dataclass(frozen=True)
class WorkerDeath:
    """
    One death of a worker.

    :param worker: Number of the worker
    :param envs: Envs that it hosted
    :param exit_code: Exit status of the process, negative for a signal; None where nobody could see it end, as on a
        machine that was lost
    :param reason: What was noticed
    :param details: Traceback, or what the process said in its last moments; empty where it could say nothing
    :param env: The env whose command it was carrying out; None where it was idle, or built its envs
    """

    worker: int
    envs: tuple[int, ...]
    exit_code: int | None
    reason: str
    details: str
    env: int | None = None

    def __str__(self) -> str:
        at_work = "" if self.env is None else f", at work for env {self.env}"
        envs = ", ".join(map(str, self.envs))
        return f"worker {self.worker} (envs {envs}){at_work}: {self.reason} ({exit_text(self.exit_code)})"


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
        """Whether this is the answer of a step, and an episode began after it or in its place."""
        return self.answered and self.error is None and (self.lost is not None or self.value[1])


class _Worker:
    """A worker process, and what it has not answered yet."""

    def __init__(self, number: int, envs: tuple[int, ...], build: bytes):
        self.number = number
        self.envs = envs
        self.build = build
        self.pending: deque[_Request] = deque()
        # Since it last completed a step
        self.deaths = 0
        self.failure = ""
        self.busy = 0.0
        self.process: Any = None


class WorkerVecEnv(VecEnv):
    """
    Several envs in each of several worker processes; env ``i`` lives in worker ``i % n_workers``.

    Beside ``step`` there are :meth:`send` and :meth:`recv`, which step some of the envs: a worker goes through its
    commands in order, so it simulates one half of its envs while the learner thinks about the other (:attr:`halves`,
    :class:`Pipeline`). What is received never depends on which worker was faster.

    A worker that dies (a signal, a crash in native code, a simulator that raises, no answer for ``timeout`` seconds) is
    started again. The episodes that it played are lost: their envs report ``done=True``, reward 0 and ``info`` with
    ``"episode_lost": True``, ``"TimeLimit.truncated": True``, the last observation as ``"terminal_observation"``, the
    ``"episode_tag"``, a text under ``"worker_death"`` and under ``"at_fault"`` whether the env was at work, and go on
    with the episode that was announced next (:meth:`announce`). Attributes that were set with ``set_attr`` are set
    again; other state that methods of an env left in it is gone.

    Two things are an error, which says what was lost: ``MAX_DEATHS`` deaths of a worker in a row without a completed
    step, and ``MAX_DEATHS`` episodes in a row that an env lost by its own fault, without one of it that ended. A death
    costs the episodes of all envs of the worker, but only the env whose command was being carried out is at fault
    (:attr:`WorkerDeath.env`): none is if the worker was idle, killed from outside for instance.

    An exception that says that the caller is wrong (``CALLER_ERRORS``: a wrong action, a missing attribute), or that
    anything but a step raises, is raised here, with the worker's traceback as its cause.

    Workers are Python processes of their own, with the learner's ``sys.path``, working directory, environment, options
    of the interpreter and registered envs. They do not run the learner's script (or notebook): it needs no
    ``if __name__ == "__main__"``. What it defines is sent to them by value, together with the globals that this uses;
    what modules define is imported there.

    For Linux: the memory that learner and workers share is a file without a name, which a new process inherits.

    :param env_fns: Functions that build the envs; they are sent to the workers by cloudpickle
    :param n_workers: Number of worker processes, at most one an env; None: as many as there are cores for this process
    :param timeout: Seconds without an answer after which a worker counts as dead; None: it may take for ever
    :param start_method: Deprecated and without effect, as there is only one way to start a worker
    :raises NotImplementedError: On another system than Linux
    :raises ValueError: No env, a bad number of workers, envs of different spaces, or observations that are not arrays
    """

    def __init__(
        self,
        env_fns: list[Callable[[], gym.Env]],
        n_workers: int | None = None,
        timeout: float | None = 300.0,
        start_method: str | None = None,
    ):
        if sys.platform != "linux":
            raise NotImplementedError(
                f"WorkerVecEnv works on Linux only, and this is {sys.platform!r}. Use Stable-Baselines3's "
                "SubprocVecEnv, as make_vec() does here where it is given no n_workers."
            )
        if not env_fns:
            raise ValueError("WorkerVecEnv expects at least one function that builds an env, got none.")
        check_at_least_one(n_workers=n_workers)
        if timeout is not None:
            check_range("(0, inf]", timeout=timeout)
        if start_method is not None:
            warnings.warn(
                f"WorkerVecEnv ignores start_method={start_method!r}: a worker is a Python process of its own, which "
                "needs nothing of the learner's script. Leave the argument out.",
                DeprecationWarning,
                stacklevel=2,
            )
        self.closed = False
        self.timeout = timeout
        self.n_workers = min(n_workers or self._default_workers(), len(env_fns))
        #: Every death so far
        self.deaths: list[WorkerDeath] = []
        self._built = False
        self._steps: list[_Request | None] = [None] * len(env_fns)
        # Resets that replaced a lost episode which the learner does not know yet to be lost
        self._lost: list[_Request | None] = [None] * len(env_fns)
        self._was_reset = [False] * len(env_fns)
        self._announced: list[_Announcement | None] = [None] * len(env_fns)
        self._playing: list[_Announcement | None] = [None] * len(env_fns)
        self._attributes: list[dict[str, Any]] = [{} for _ in env_fns]
        # Episodes that each env lost by its own fault since it last finished one
        self._lost_in_a_row: list[list[str]] = [[] for _ in env_fns]
        self._memory: Any = None
        self._memory_file = open_memory()
        registered = _registered()
        self._workers = []
        for number in range(self.n_workers):
            envs = tuple(range(number, len(env_fns), self.n_workers))
            # One by one: envs do not share what their functions refer to
            functions = [cloudpickle.dumps(env_fns[index]) for index in envs]
            message = {"argv": sys.argv, "registered": registered, "indices": envs, "env_fns": functions}
            self._workers.append(_Worker(number, envs, pickle.dumps(message)))
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
            self._layout = _layout(observation_space)
            self._memory = Memory(self._memory_file.fileno(), self._layout, len(env_fns))
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

    def _default_workers(self) -> int:
        """How many workers there are at most if nobody says."""
        return len(os.sched_getaffinity(0))

    def _launch(self) -> Any:
        """Start the process of a worker. Elsewhere it is something else that can be talked to in the same way."""
        return start(self._memory_file.fileno())

    def _start(self, worker: _Worker, build: _Request) -> None:
        worker.process = self._launch()
        worker.pending.append(build)
        self._write(build.index, "build", worker.build)

    def _send_memory(self, worker: _Worker) -> None:
        self._write(worker.envs[0], "memory", pickle.dumps((self._layout, len(self._attributes))))

    def _worker_of(self, index: int) -> _Worker:
        return self._workers[index % self.n_workers]

    def _write(self, index: int, command: str, payload: bytes) -> None:
        self._worker_of(index).process.put(pickle.dumps((command, index, payload)))

    def _submit(self, request: _Request) -> _Request:
        payload = cloudpickle.dumps(request.payload)  # before anything is noted: what cannot be sent changes nothing
        request.sent, request.answered = True, False
        self._worker_of(request.index).pending.append(request)
        self._write(request.index, request.command, payload)
        return request

    def _tell(self, index: int, announcement: _Announcement) -> None:
        self._write(index, "announce", cloudpickle.dumps(vars(announcement)))

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
        try:
            message = worker.process.get(timeout)
        except TimeoutError:
            worker.process.kill()
            self._revive(worker, f"no answer to {request.command!r} for {timeout:g} s: killed")
            return
        except EOFError:
            self._revive(worker, f"died in {request.command!r}")
            return
        kind, value, seconds = pickle.loads(message)
        worker.busy += min(seconds, time.perf_counter() - self._stats_since)
        if kind == "fatal" and (request.command != "build" or self._built):
            error, details = value
            env = None if request.command == "build" else request.index
            self._revive(worker, f"{type(error).__name__} in {request.command!r}: {error}", details, env)
            return
        worker.pending.popleft()
        request.answered = True
        if kind != "value":
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
            _, reset, info, _ = request.value
            if reset:
                if not info.get("episode_lost"):  # which an env may say of itself
                    self._lost_in_a_row[index].clear()
                request.terminal_obs = self._memory.read(index, 1)
        if reset:
            self._was_reset[index] = True
            self._playing[index] = request.announcement
            if self._announced[index] is request.announcement:
                self._announced[index] = None

    def _revive(self, worker: _Worker, reason: str, details: str = "", env: int | None = None) -> None:
        """
        Start a dead worker again, and give it what the old one did not answer.

        :param reason: What was noticed
        :param details: Traceback; empty where the worker did not send one
        :param env: The env that is at fault; None: the one that it died at work for, if any
        """
        exit_code = worker.process.end(CLOSE_SECONDS)
        details = details or worker.process.last_words()
        worker.process.close()
        if self._memory is not None:
            at_work = [index for index in worker.envs if self._memory.at_work[index]]
            env = at_work[0] if at_work else env
            self._memory.at_work[list(worker.envs)] = False
        death = WorkerDeath(worker.number, worker.envs, exit_code, reason, details, env)
        self.deaths.append(death)
        worker.deaths += 1
        lost = [] if env is None else self._lost_in_a_row[env]
        if env is not None:
            lost.append(self._episode_text(worker, env))
        if max(worker.deaths, len(lost)) >= MAX_DEATHS:
            again = (
                f"env {env} lost {len(lost)} episodes in a row to such deaths, and finished none in between: "
                f"{'; '.join(lost)}. "
                if len(lost) >= MAX_DEATHS
                else f"it died {worker.deaths} times in a row without completing a step. "
            )
            worker.failure = (
                f"{type(self).__name__}: {death}; {again}"
                + (f"Its last words:\n{details}\n" if details else "It left no last words; look at stderr above. ")
                + "Step one of the envs in a DummyVecEnv, or under a debugger, to see why. SIGKILL without a time-out "
                "is most often the system's answer to a lack of memory: take fewer envs. A step that needs longer than "
                f"the time-out needs {type(self).__name__}(timeout=...), now {self.timeout}."
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
            self._resume(index, [request for request in unanswered if request.index == index], death)
        # Last, because a filter may turn it into an exception
        # With a number, because Python shows a warning of the same words only once
        outcome = f"Its episodes are lost; it was started again (death {len(self.deaths)} of these workers)."
        message = f"{type(self).__name__}: {death}. {outcome}\n{details}".strip()
        warnings.warn(message, RuntimeWarning, stacklevel=2)

    def restart_failed(self) -> None:
        """
        Start workers anew that died again and again, and count all deaths in a row from zero: for whoever has left out
        what they died of. All envs have to be reset after that.
        """
        for worker in self._workers:
            worker.deaths = 0
            for index in worker.envs:
                self._lost_in_a_row[index].clear()
            if self.closed or not worker.failure:
                continue
            worker.failure = ""
            worker.pending.clear()
            self._start(worker, _Request(worker.envs[0], "build"))
            self._send_memory(worker)
            for index in worker.envs:
                self._steps[index] = self._lost[index] = self._announced[index] = self._playing[index] = None
                self._was_reset[index] = False
                for name, value in self._attributes[index].items():
                    self._submit(_Request(index, "set_attr", (name, value)))

    def _episode_text(self, worker: _Worker, index: int) -> str:
        """How the episode was announced that an env was in when its worker died."""
        request = next((request for request in worker.pending if request.index == index), None)
        episode = request.announcement if request is not None and request.resets else self._playing[index]
        if episode is None:
            return "one that was not announced"
        options, tag = reprlib.repr(episode.options), reprlib.repr(episode.tag)
        return f"seed={episode.seed}, options={options}, tag={tag}"

    def _resume(self, index: int, requests: list[_Request], death: WorkerDeath) -> None:
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
                begun.lost = {"episode_lost": True, "TimeLimit.truncated": True, "worker_death": str(death)}
                begun.lost["at_fault"] = death.env == index
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
        answers = self._ask("env_method", (method_name, method_args, method_kwargs), indices)
        if method_name == "release":
            for index in self._indices(indices):
                self._forget_announcements(index)
        return answers

    def _forget_announcements(self, index: int) -> None:
        """What an env that was released has been told, a worker in its place is not told again."""
        self._announced[index] = None
        if (playing := self._playing[index]) is not None and playing.frozen:
            self._playing[index] = None
        for request in (self._lost[index], self._steps[index]):
            if request is not None:
                request.announcement = None

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
            worker.process.end(max(deadline - time.monotonic(), 0.0))
            worker.process.close()
        for worker in self._workers:
            worker.failure = "This WorkerVecEnv is closed: build a new one."
        self._memory_file.close()


def _layout(space: spaces.Space) -> Layout:
    try:
        keys, shapes, dtypes = obs_space_info(space)
        layout = [(key, tuple(shapes[key]), np.dtype(dtypes[key])) for key in keys]
    except (NotImplementedError, AssertionError, TypeError) as error:
        raise _unsupported(space) from error
    if any(dtype.kind not in "biuf" for _, _, dtype in layout):
        raise _unsupported(space)
    return layout


def _unsupported(space: spaces.Space) -> ValueError:
    return ValueError(
        "WorkerVecEnv expects an observation space of arrays: Box, Discrete, MultiDiscrete, MultiBinary, or a flat "
        f"Dict or Tuple of these. Got {space}. Wrap the env so that it returns arrays."
    )


def _registered() -> dict[str, Any]:
    """
    Specifications of all envs, which a script may have registered; those that can be sent. What builds an env is
    pickled on its own: a worker imports its module only if it makes that env.
    """
    found = {}
    for env_id, spec in gym.registry.items():
        with suppress(Exception):
            entry_point = spec.entry_point
            if callable(entry_point):
                entry_point = Lazy(env_id, cloudpickle.dumps(entry_point))
            found[env_id] = cloudpickle.dumps(dataclasses.replace(spec, entry_point=entry_point))
    return found
