"""What a worker process does: build its envs, then one command after the other."""

from __future__ import annotations

import faulthandler
import os
import pickle
import queue
import signal
import threading
import time
import traceback
from collections.abc import Iterable
from multiprocessing import reduction
from typing import Any

import cloudpickle
import gymnasium as gym
from stable_baselines3.common.env_util import is_wrapped
from stable_baselines3.common.vec_env import CloudpickleWrapper

from opd_gym.envs.workers.memory import Memory
from opd_gym.envs.workers.process import CLOSE_SECONDS

# What says that the caller is wrong, and would be wrong again in a new process. Whatever else an env's step raises (a
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


def work(
    pipe: Any,
    inherited: Iterable[Any],
    registered: dict[str, bytes],
    env_fns: list[CloudpickleWrapper],
    indices: tuple[int, ...],
    num_envs: int,
) -> None:
    """What a worker process does: build its envs, then one command after the other."""
    # Ctrl-C reaches the whole process group; the learner decides what comes of it
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for learner_end in inherited:
        learner_end.close()
    try:
        # A crash in native code leaves the Python stack here
        last_words = os.fdopen(reduction.recv_handle(pipe), "wb")
        faulthandler.enable(last_words)
        began = time.perf_counter()
        envs: dict[int, gym.Env] = {}
        try:
            for env_id, spec in registered.items():
                if env_id not in gym.registry:
                    gym.registry[env_id] = pickle.loads(spec)
            for index, env_fn in zip(indices, env_fns, strict=True):
                envs[index] = env_fn.var()
            found = [(env.observation_space, env.action_space) for env in envs.values()]
        except Exception as error:
            pipe.send_bytes(_answer("error", error, time.perf_counter() - began))
            return
        pipe.send_bytes(_answer("value", found, time.perf_counter() - began))
        memory = Memory(envs[indices[0]].observation_space, num_envs, reduction.recv_handle(pipe))
        _serve(pipe, envs, memory)
        for env in envs.values():
            env.close()
    except (EOFError, ConnectionError):
        # The learner is gone
        return


def _serve(pipe: Any, envs: dict[int, gym.Env], memory: Memory) -> None:
    commands: queue.SimpleQueue[tuple[str, int, bytes] | None] = queue.SimpleQueue()

    def listen() -> None:
        # In a thread: the learner's death is noticed in the middle of a step
        stream = os.fdopen(pipe.fileno(), "rb", closefd=False)
        try:
            while True:
                commands.put(pickle.load(stream))
        except (EOFError, OSError, pickle.UnpicklingError):
            commands.put(None)
            time.sleep(CLOSE_SECONDS)
            os._exit(1)

    threading.Thread(target=listen, daemon=True).start()
    failed: dict[int, Exception] = {}
    busy = 0.0
    while (message := commands.get()) is not None:
        command, index, payload = message
        if command == "close":
            return
        began = time.perf_counter()
        kind, value = "value", None
        try:
            if index in failed and command != "announce":
                raise failed.pop(index)
            value = _execute(command, envs[index], index, pickle.loads(payload), memory)
        except Exception as error:
            dies = command == "step" and not isinstance(error, CALLER_ERRORS)
            kind, value = "fatal" if dies else "error", error
        busy += time.perf_counter() - began
        if command == "announce":
            # Nobody waits for this answer: a failure is that of the next command
            if isinstance(value, Exception):
                failed[index] = value
            continue
        pipe.send_bytes(_answer(kind, value, busy))
        busy = 0.0
        if kind == "fatal":
            return


def _execute(command: str, env: gym.Env, index: int, payload: Any, memory: Memory) -> Any:
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
        return is_wrapped(env, payload)
    assert command == "settle", command
    return None


def _answer(kind: str, value: Any, seconds: float) -> bytes:
    """What a worker answers: a value, or an exception with its traceback, as its text where it cannot be sent."""

    def dumps(answer: Any) -> bytes:
        try:
            return pickle.dumps(answer)
        except Exception:
            # What the learner's script defines, where that has not been imported
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
