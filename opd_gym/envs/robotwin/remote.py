"""
A simulator in a process of its own: a crash in native code, a hang and whatever is printed stay there.

Messages are a JSON header and the raw bytes of arrays, so that the other process may be another Python with another
NumPy (one with RoboTwin's planner, for instance).
"""

from __future__ import annotations

import builtins
import json
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import numpy as np

from opd_gym.envs.robotwin.runtime import SimulatorError
from opd_gym.envs.robotwin.simulator import Arrays, Settings
from opd_gym.version import PACKAGE_FILE

# A new worker imports SAPIEN and compiles shaders first, whatever a step may take
START_SECONDS = 300.0
STEP_SECONDS = 120.0
CLOSE_SECONDS = 5.0
# As PYTHONPATH this package's folder would let the other Python import everything that is installed beside it
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
main(int(sys.argv[2]))
"""
)


class WorkerLost(SimulatorError):
    """A simulator's process died, or did not answer."""


def send(connection: socket.socket, header: dict[str, Any], arrays: Arrays) -> None:
    """
    :param connection: where to
    :param header: anything that can be written as JSON
    :param arrays: numeric arrays
    """
    layout = [(name, array.shape, array.dtype.str) for name, array in arrays.items()]
    text = json.dumps({**header, "arrays": layout}).encode("utf-8")
    connection.sendall(struct.pack("<I", len(text)) + text)
    for array in arrays.values():
        connection.sendall(np.ascontiguousarray(array).tobytes())


def receive(connection: socket.socket) -> tuple[dict[str, Any], Arrays]:
    """
    :param connection: where from
    :return: header and arrays
    :raises EOFError: the other side is gone
    :raises TimeoutError: it said nothing for as long as the connection's timeout
    """
    (length,) = struct.unpack("<I", _read(connection, 4))
    header = json.loads(bytes(_read(connection, length)))
    arrays = {}
    for name, shape, dtype in header.pop("arrays"):
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        arrays[name] = np.frombuffer(_read(connection, size), dtype).reshape(shape)
    return header, arrays


def _read(connection: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    view, done = memoryview(data), 0
    while done < size:
        n = connection.recv_into(view[done:])
        if n == 0:
            raise EOFError
        done += n
    return data


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
        self._last_words = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as the worker)
        self._connection, remote = socket.socketpair()
        with remote:
            self.process = subprocess.Popen(
                [python or sys.executable, "-W", "ignore", "-c", _START, str(PACKAGE_FILE), str(remote.fileno())],
                pass_fds=[remote.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._last_words,
                stderr=self._last_words,
            )
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
        if self._connection.fileno() < 0:
            raise WorkerLost(f"RoboTwin's worker is gone: it was ended before {command!r}.")
        timeout = self.timeout if timeout is None else timeout
        self._connection.settimeout(timeout)
        try:
            send(self._connection, {"command": command, "arguments": arguments}, arrays or {})
            header, arrays = receive(self._connection)
        except TimeoutError:
            raise self._lost(f"no answer to {command!r} for {timeout:g} s: killed") from None
        except (EOFError, ConnectionError):
            raise self._lost(f"died in {command!r}") from None
        except BaseException:
            # Interrupted, by Ctrl-C for instance: the next call would take this one's answer for its own
            self._connection.close()
            self.process.kill()
            self.process.wait()
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
        # Long enough for a process that has just closed its end to be gone
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(CLOSE_SECONDS if "died" in reason else 0.0)
        self.process.kill()
        code = self.process.wait()
        self._connection.close()
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"exit code {code}"
        self._last_words.seek(0)
        # Python ends its report of a crash with a list of all modules
        words = self._last_words.read().decode(errors="replace").split("\nExtension modules: ")[0].strip()[-2000:]
        return WorkerLost(f"RoboTwin's worker {reason} ({name})." + (f" Its last words:\n{words}" if words else ""))

    def close(self) -> None:
        """End the worker; may be called twice."""
        self._connection.close()
        try:
            self.process.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._last_words.close()

    def __del__(self) -> None:
        # An env that nobody closed: the worker ends by itself, but somebody has to ask for its exit status
        if hasattr(self, "process") and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def _rebuild(kind: str, message: str, traceback: str) -> Exception:
    from opd_gym.envs.workers.process import WorkerTraceback

    cls = SimulatorError if kind == SimulatorError.__name__ else getattr(builtins, kind, None)
    known = isinstance(cls, type) and issubclass(cls, Exception) and not issubclass(cls, UnicodeError)
    error = cls(message) if known else RuntimeError(f"{kind}: {message}")  # type: ignore[misc]
    error.__cause__ = WorkerTraceback(traceback)
    return error
