"""
A simulator in a process of its own: a crash in native code, a hang and whatever is printed stay there.

Messages are a JSON header and the raw bytes of arrays, so that the other process may be another Python with another
NumPy (one with RoboTwin's planner, for instance).
"""

from __future__ import annotations

import builtins
import json
import struct
import sys
from dataclasses import asdict
from typing import Any

import numpy as np

from opd_gym.envs.robotwin.runtime import SimulatorError
from opd_gym.envs.robotwin.simulator import Arrays, Settings
from opd_gym.envs.workers.process import CLOSE_SECONDS, START_SECONDS, Process, WorkerTraceback, exit_text
from opd_gym.version import PACKAGE_FILE

STEP_SECONDS = 120.0
# With this package's folder on PYTHONPATH, the other Python could import everything that is installed beside it
LOAD_LIBRARY = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("opd_gym", sys.argv[1])
sys.modules["opd_gym"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
"""
_START = (
    LOAD_LIBRARY
    + """
from opd_gym.envs.robotwin.worker import main
main(*map(int, sys.argv[2:]))
"""
)


class WorkerLost(SimulatorError):
    """A simulator's process died, or did not answer."""


def dumps(header: dict[str, Any], arrays: Arrays) -> bytes:
    """
    :param header: anything that can be written as JSON
    :param arrays: numeric arrays
    :return: both as a message
    """
    layout = [(name, array.shape, array.dtype.str) for name, array in arrays.items()]
    text = json.dumps({**header, "arrays": layout}).encode("utf-8")
    return b"".join([struct.pack("<I", len(text)), text, *(array.tobytes() for array in arrays.values())])


def loads(message: bytes) -> tuple[dict[str, Any], Arrays]:
    """
    :param message: what :func:`dumps` returned
    :return: header and arrays, which may be written to
    """
    (length,) = struct.unpack_from("<I", message)
    offset = 4 + length
    header = json.loads(message[4:offset])
    arrays = {}
    for name, shape, dtype in header.pop("arrays"):
        count = int(np.prod(shape))
        arrays[name] = np.frombuffer(message, dtype, count, offset).reshape(shape).copy()
        offset += count * np.dtype(dtype).itemsize
    return header, arrays


class RemoteSimulator:
    """
    A :class:`~opd_gym.envs.robotwin.simulator.Simulator` in a worker process.

    :param settings: what to simulate
    :param python: interpreter of the worker; None for this one
    :param timeout: seconds without an answer after which the worker counts as hung; a start and a reset have at least
        :data:`START_SECONDS`
    :raises WorkerLost: the worker died while it started
    :raises ImportError: RoboTwin is not installed for the worker's interpreter
    """

    def __init__(self, settings: Settings, python: str | None = None, timeout: float = STEP_SECONDS):
        self.timeout = timeout
        command = [python or sys.executable, "-W", "ignore", "-c", _START, str(PACKAGE_FILE)]
        self.process = Process(command, captures_output=True)
        try:
            self.call("start", timeout=max(timeout, START_SECONDS), settings=asdict(settings))
        except ImportError as error:
            if python is None:
                raise
            # Every environment has packages of its own
            raise ImportError(
                f"{error}\nThat is the worker's interpreter, which python names. Install this library in its "
                f"environment, and run there: {python} -m opd_gym.cli robotwin install"
            ) from error

    def call(
        self, command: str, arrays: Arrays | None = None, timeout: float | None = None, **arguments: Any
    ) -> tuple[dict[str, Any], Arrays]:
        """
        Call a method of the simulator.

        :param command: its name
        :param arrays: its arguments that are arrays
        :param timeout: seconds to wait; None for the worker's own
        :param arguments: its other arguments
        :return: what it returned
        :raises WorkerLost: the worker is gone; build another one
        :raises Exception: what the method raised, with the worker's traceback as its cause
        """
        if self.process.closed:
            raise WorkerLost(f"RoboTwin's worker is gone: it was ended before {command!r}.")
        timeout = self.timeout if timeout is None else timeout
        self.process.put(dumps({"command": command, "arguments": arguments}, arrays or {}))
        try:
            header, arrays = loads(self.process.get(timeout))
        except TimeoutError:
            self.process.kill()
            raise self._lost(f"no answer to {command!r} for {timeout:g} s: killed") from None
        except EOFError:
            raise self._lost(f"died in {command!r}") from None
        except BaseException:
            # Interrupted, by Ctrl-C for instance: the next call would take this one's answer for its own
            self.process.end()
            self.process.close()
            raise
        if "error" in header:
            raise _rebuild(**header["error"])
        return header["value"], arrays

    def reset(
        self, scene_seed: int, held_out: bool = False, instructions: str = "seen"
    ) -> tuple[dict[str, Any], Arrays]:
        """See the simulator's."""
        timeout = max(self.timeout, START_SECONDS)
        scene: dict[str, Any] = {"scene_seed": scene_seed, "held_out": held_out, "instructions": instructions}
        return self.call("reset", None, timeout, **scene)

    def step(self, actions: np.ndarray, observe: bool = True) -> tuple[dict[str, Any], Arrays]:
        """See the simulator's."""
        return self.call("step", {"actions": actions}, observe=observe)

    def observe(self) -> tuple[dict[str, Any], Arrays]:
        """See the simulator's."""
        return self.call("observe")

    def picture(self) -> tuple[dict[str, Any], Arrays]:
        """See the simulator's."""
        return self.call("picture")

    def record_expert(self, scene_seed: int, held_out: bool = False) -> tuple[dict[str, Any], Arrays]:
        """See the simulator's."""
        timeout = max(self.timeout, START_SECONDS)
        return self.call("record_expert", None, timeout, scene_seed=scene_seed, held_out=held_out)

    def _lost(self, reason: str) -> WorkerLost:
        # A process that has just closed its end takes a moment to be gone
        code = self.process.end(CLOSE_SECONDS)
        words = self.process.last_words()[-2000:]
        self.process.close()
        return WorkerLost(
            f"RoboTwin's worker {reason} ({exit_text(code)})." + (f" Its last words:\n{words}" if words else "")
        )

    def close(self) -> None:
        """End the worker; may be called twice."""
        self.process.hang_up()
        self.process.end(CLOSE_SECONDS)
        self.process.close()


def _rebuild(kind: str, message: str, traceback: str) -> Exception:
    cls = SimulatorError if kind == SimulatorError.__name__ else getattr(builtins, kind, None)
    known = isinstance(cls, type) and issubclass(cls, Exception) and not issubclass(cls, UnicodeError)
    error = cls(message) if known else RuntimeError(f"{kind}: {message}")  # type: ignore[misc]
    error.__cause__ = WorkerTraceback(traceback)
    return error
