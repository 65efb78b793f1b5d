"""
What a worker of a ``WorkerVecEnv`` does: build its envs, then carry out one command after the other.

Neither torch nor Stable-Baselines3 is imported here: a worker has them only if its envs import them.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import cloudpickle
import gymnasium as gym
from gymnasium import spaces

from opd_gym.envs.workers.memory import Memory
from opd_gym.envs.workers.process import Learner, Process

# Errors that say that the caller is wrong, and would be again in a new process. Whatever else an env's step raises (a
# simulator that diverged, a lost GL context, no memory) costs the episode and not the run
CALLER_ERRORS = (
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    AssertionError,
    NameError,
    ImportError,
    NotImplementedError,
    gym.error.Error,
)
# Commands that are not answered
UNANSWERED = ("announce", "memory", "close")
# The path of whoever starts a worker comes first: the library itself may be found through it alone. Ctrl-C is the
# learner's business, also while this is imported
_PROGRAM = """
import sys
sys.path[:] = sys.argv[1:-4]
import signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
from opd_gym.envs.workers.host import main
main(*map(int, sys.argv[-4:]))
"""


def start(memory: int) -> Process:
    """
    Start a worker.

    :param memory: Descriptor of the file for the memory that the worker shares with this process
    :return: Its process
    """
    path = [entry for entry in sys.path if isinstance(entry, str)]
    flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]  # as multiprocessing does
    return Process([sys.executable, *flags, "-c", _PROGRAM, *path, str(memory)], files=[memory])


def main(memory: int, last_words: int, connection: int, parent: int) -> None:
    """
    :param memory: Descriptor of the file for the memory that the workers share with the learner
    :param last_words: See :class:`~opd_gym.envs.workers.process.Learner`
    :param connection: See there
    :param parent: See there
    """
    os.set_inheritable(memory, False)
    learner = Learner(last_words, connection, parent)
    host = _Host(memory)
    try:
        host.serve(learner)
        for env in host.envs.values():
            env.close()
    except ConnectionError:
        # The learner is gone
        return


class Lazy:
    """
    What builds an env that the learner's program registered, unpickled when that env is made: its module may take
    seconds to import, or be missing here (on another machine), and neither matters to other envs.

    :param env_id: id of the env
    :param payload: the pickled function or class
    """

    def __init__(self, env_id: str, payload: bytes):
        self.env_id = env_id
        self.payload = payload

    def _load(self) -> Callable[..., gym.Env]:
        try:
            return pickle.loads(self.payload)
        except Exception as error:
            raise ImportError(
                f"{self.env_id} is registered by the program that started this worker, but cannot be loaded here "
                f"({type(error).__name__}: {error}). Put its module where the worker's Python finds it: install it "
                "there, or set PYTHONPATH."
            ) from error

    def __call__(self, **kwargs: Any) -> gym.Env:
        return self._load()(**kwargs)

    @property
    def metadata(self) -> dict[str, Any]:
        """``gym.make`` asks a class for its render modes before it builds the env."""
        # AttributeError of what has none is what gym.make expects of a function
        return self._load().metadata  # type: ignore[attr-defined]


class _Host:
    """The envs of a worker."""

    def __init__(self, fd: int):
        self.fd = fd
        self.envs: dict[int, gym.Env] = {}
        self.memory: Memory | None = None
        # What announcements raised, by env
        self._failed: dict[int, Exception] = {}

    def serve(self, learner: Learner) -> None:
        """Carry out commands until the learner is gone or has had enough, or an env breaks down."""
        busy = 0.0
        while (message := learner.get()) is not None:
            command, index, payload = pickle.loads(message)
            if command == "close":
                return
            if command == "memory":
                self.memory = Memory(self.fd, *pickle.loads(payload))
                continue
            began = time.perf_counter()
            kind, value = self._try(command, index, payload)
            busy += time.perf_counter() - began
            if command in UNANSWERED:
                # Nobody waits for this answer: a failure is that of the next command
                if kind != "value":
                    self._failed[index] = value
                continue
            learner.put(_answer(kind, value, busy))
            busy = 0.0
            if kind == "fatal":
                return

    def _try(self, command: str, index: int, payload: bytes) -> tuple[str, Any]:
        if self.memory is not None:
            self.memory.at_work[index] = True
        try:
            if index in self._failed and command != "announce":
                raise self._failed.pop(index)
            if command == "build":
                return "value", self._build(**pickle.loads(payload))
            return "value", self._execute(command, index, pickle.loads(payload))
        except Exception as error:
            dies = command == "build" or (command == "step" and not isinstance(error, CALLER_ERRORS))
            return "fatal" if dies else "error", error
        finally:
            if self.memory is not None:
                self.memory.at_work[index] = False

    def _build(
        self, argv: list[str], registered: dict[str, bytes], indices: tuple[int, ...], env_fns: list[bytes]
    ) -> list[tuple[spaces.Space, spaces.Space]]:
        sys.argv[:] = argv
        for env_id, spec in registered.items():
            if env_id not in gym.registry:
                # What it refers to besides may be missing here as well; gym.make then says that it is not registered
                with suppress(Exception):
                    gym.registry[env_id] = pickle.loads(spec)
        for index, env_fn in zip(indices, env_fns, strict=True):
            self.envs[index] = pickle.loads(env_fn)()
        return [(env.observation_space, env.action_space) for env in self.envs.values()]

    def _execute(self, command: str, index: int, payload: Any) -> Any:
        env, memory = self.envs[index], self.memory
        assert memory is not None
        if command == "step":
            obs, reward, terminated, truncated, info = env.step(payload)
            done, reset_info = bool(terminated or truncated), None
            # The meaning that Stable-Baselines3 gives it: the end of an episode that was not the end of the task
            info["TimeLimit.truncated"] = bool(truncated and not terminated)
            if done:
                memory.write(index, 1, obs)
                obs, reset_info = env.reset()
            memory.write(index, 0, obs)
            return float(reward), done, info, reset_info
        if command == "reset":
            seed, options = payload
            obs, reset_info = env.reset(seed=seed, **({"options": options} if options else {}))
            memory.write(index, 0, obs)
            return reset_info
        if command == "announce":
            return env.get_wrapper_attr("set_next_reset")(**payload)
        if command == "env_method":
            name, args, kwargs = payload
            return env.get_wrapper_attr(name)(*args, **kwargs)
        if command == "get_attr":
            return env.get_wrapper_attr(payload)
        if command == "has_attr":
            return env.has_wrapper_attr(payload)
        if command == "set_attr":
            return setattr(env, *payload)
        if command == "is_wrapped":
            return _is_wrapped(env, payload)
        assert command == "settle", command
        return None


def _is_wrapped(env: gym.Env, wrapper_class: type[gym.Wrapper]) -> bool:
    # As Stable-Baselines3 has it, which is not imported here
    while isinstance(env, gym.Wrapper):
        if isinstance(env, wrapper_class):
            return True
        env = env.env
    return False


def _answer(kind: str, value: Any, seconds: float) -> bytes:
    """What a worker answers: a value, or an exception with its traceback, as its text where it cannot be sent."""

    def dumps(answer: Any) -> bytes:
        try:
            return pickle.dumps(answer)
        except Exception:
            # What the learner's script defines is known here by value alone
            return cloudpickle.dumps(answer)

    if kind == "value":
        try:
            return dumps((kind, value, seconds))
        except Exception as error:
            kind, value = "error", error
    text = "".join(traceback.format_exception(type(value), value, value.__traceback__))
    try:
        message = dumps((kind, (value, text), seconds))
        pickle.loads(message)
    except Exception:
        message = pickle.dumps((kind, (RuntimeError(f"{type(value).__name__}: {value}"), text), seconds))
    return message
