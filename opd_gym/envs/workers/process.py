"""
A Python process at the other end of a socket: how it is started, talked to and ended.

:class:`Process` is the learner's side, :class:`Learner` the worker's. A message is any bytes; on the socket its length
comes before it. Nothing heavy is imported here, because every worker imports this module.
"""

from __future__ import annotations

import ctypes
import faulthandler
import math
import os
import queue
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import suppress

# A new worker imports its libraries and builds its envs or simulator first, which takes longer than a step
START_SECONDS = 300.0
# The time a worker has to close them
CLOSE_SECONDS = 5.0
# How often the learner looks whether a silent worker is still there
LOOK_SECONDS = 1.0
_LENGTH = struct.Struct("<Q")
_PR_SET_PDEATHSIG = 1

#: Set it to have :meth:`Process.get` give up, by an ``InterruptedError``, what does not come within a second
give_up = threading.Event()
_MOST_AT_ONCE = 1 << 20


class WorkerTraceback(Exception):
    """The cause of an exception that was raised in a worker: the traceback there, as text."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def exit_text(code: int | None) -> str:
    """
    :param code: exit status of a process, negative for a signal; None where nobody could see it end
    :return: how it is shown
    """
    if code is None:
        return "exit code unknown"
    name = f", {signal.Signals(-code).name}" if -code in set(signal.Signals) else ""
    return f"exit code {code}{name}"


class _Outbox:
    """
    What is sent to a worker, in order. It never waits for the worker to read: what the socket does not take at once, a
    thread sends.

    :param connection: The learner's end of the socket
    """

    def __init__(self, connection: socket.socket):
        self._socket = connection
        self._lock = threading.Lock()
        self._left: deque[memoryview] = deque()
        self._thread: threading.Thread | None = None

    def put(self, message: bytes) -> None:
        """
        :param message: What is to be sent; what is said to a process that has ended is dropped
        """
        rest = memoryview(message)
        with self._lock:
            if not self._left:
                try:
                    rest = rest[self._socket.send(rest, socket.MSG_DONTWAIT) :]
                except BlockingIOError:
                    pass
                except OSError:
                    # A worker that has died is noticed where its answer is waited for
                    return
                if not rest:
                    return
                self._thread = threading.Thread(target=self._send_rest, name="worker-outbox", daemon=True)
                self._thread.start()
            self._left.append(rest)

    def _send_rest(self) -> None:
        with self._lock:
            rest = self._left[0]
        with suppress(OSError):
            while True:
                self._socket.sendall(rest)
                with self._lock:
                    self._left.popleft()
                    if not self._left:
                        return
                    rest = self._left[0]

    def close(self) -> None:
        """Give up what is not yet sent."""
        # Ends the thread's write too, also where a process that the worker has forked holds the other end
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        if self._thread is not None:
            self._thread.join()


class Process:
    """
    A worker process, as the learner sees it. It is killed when this object is collected, and when the learner ends.

    :param command: Program and arguments. Three more are appended, for :class:`Learner`: the descriptors of a file for
        last words and of the socket, and the number of this process
    :param files: Descriptors that the process inherits under the same numbers
    :param captures_output: Whether what it prints counts as its last words, instead of being shown
    """

    def __init__(self, command: Sequence[str], files: Sequence[int] = (), captures_output: bool = False):
        self._last_words = tempfile.TemporaryFile()  # noqa: SIM115  (close() closes it)
        self._socket, remote = socket.socketpair()
        with remote:
            # Whatever socket.setdefaulttimeout() says
            self._socket.setblocking(True)
            remote.setblocking(True)
            ends = (self._last_words.fileno(), remote.fileno())
            # The system would kill the worker when the thread ends that starts it, and not only with the process
            parent = os.getpid() if threading.current_thread() is threading.main_thread() else 0
            output = self._last_words if captures_output else None
            try:
                self._popen = subprocess.Popen(
                    [*command, *map(str, (*ends, parent))],
                    pass_fds=[*files, *ends],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                )
            except BaseException:
                self._socket.close()
                self._last_words.close()
                raise
        self._kill_at_last = weakref.finalize(self, _kill, self._popen)
        self._outbox = _Outbox(self._socket)
        self._received = bytearray()
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)

    @property
    def pid(self) -> int:
        """Number of the process."""
        return self._popen.pid

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self._popen.poll() is None

    def put(self, message: bytes) -> None:
        """
        Send a message, without waiting for the process to read it; what is said to one that has ended is dropped.

        :param message: The message
        """
        self._outbox.put(_LENGTH.pack(len(message)) + message)

    def get(self, timeout: float | None = None) -> bytes:
        """
        Wait for a message.

        :param timeout: Seconds to wait; None: it may take for ever
        :return: The message
        :raises TimeoutError: There was none for so long
        :raises InterruptedError: There was none, and :data:`give_up` is set
        :raises EOFError: The process has ended, and has said nothing more before that
        """
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while (message := self._take_message()) is None:
            left = max(deadline - time.monotonic(), 0.0)
            if self._poll.poll(1000.0 * min(left, LOOK_SECONDS)):
                self._read()
            elif not self.running and not self._poll.poll(0):
                # It has ended, and a process that it forked still holds its end of the socket
                raise EOFError
            elif give_up.is_set():
                raise InterruptedError("What was waited for was given up.")
            elif time.monotonic() >= deadline:
                raise TimeoutError
        return message

    def _read(self) -> None:
        try:
            data = self._socket.recv(_MOST_AT_ONCE)
        except ConnectionError:
            data = b""
        if not data:
            raise EOFError
        # Kept here: a call that is interrupted in the middle of a message leaves what it has read to the next one
        self._received += data

    def _take_message(self) -> bytes | None:
        if len(self._received) < _LENGTH.size:
            return None
        end = _LENGTH.size + _LENGTH.unpack_from(self._received)[0]
        if len(self._received) < end:
            return None
        message = bytes(memoryview(self._received)[_LENGTH.size : end])
        del self._received[:end]
        return message

    def kill(self) -> None:
        """End the process at once."""
        self._popen.kill()

    def end(self, patience: float = 0.0) -> int:
        """
        Wait until the process has ended; kill it if it does not.

        :param patience: Seconds to wait before that
        :return: Its exit status, negative for a signal
        """
        with suppress(subprocess.TimeoutExpired):
            return self._popen.wait(patience)
        self._popen.kill()
        return self._popen.wait()

    def last_words(self) -> str:
        """
        :return: What it said in its last moments: the Python stack of a crash in native code, and what it printed where
            that is captured
        """
        self._last_words.seek(0)
        # Python ends its report of a crash with a list of all modules
        return self._last_words.read().decode(errors="replace").split("\nExtension modules: ")[0].strip()

    def hang_up(self) -> None:
        """Close the connection, after which the process ends by itself; what is not yet sent is given up."""
        self._outbox.close()
        self._socket.close()

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._last_words.closed

    def close(self) -> None:
        """Close all that belongs to the process, which has ended (:meth:`end`). May be called twice."""
        self.hang_up()
        self._last_words.close()


def _kill(popen: subprocess.Popen[bytes]) -> None:
    # Also called in forks of the learner. They are not the worker's parent: to them it has ended, and they kill nothing
    if popen.poll() is None:
        popen.kill()
        popen.wait()


class Learner:
    """
    The learner, as a worker process sees it. The process ends soon after the learner does.

    :param last_words: Descriptor of the file for last words
    :param connection: Descriptor of the socket
    :param parent: Number of the learner's process, if it is to take this one with it at once; 0: only when this one's
        interpreter gets to it
    """

    def __init__(self, last_words: int, connection: int, parent: int = 0):
        if parent and sys.platform == "linux":
            # Also where native code keeps the interpreter's lock, so that the thread below does not run
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:  # it ended before that
                os._exit(1)
        # Ctrl-C and the end of a terminal reach the whole process group; the learner decides what comes of it
        for signum in (signal.SIGINT, signal.SIGHUP):
            signal.signal(signum, signal.SIG_IGN)
        for fd in (last_words, connection):
            os.set_inheritable(fd, False)
        # A crash in native code leaves the Python stack here
        self._last_words = os.fdopen(last_words, "wb")
        faulthandler.enable(self._last_words)
        self._socket = socket.socket(fileno=connection)
        self._socket.setblocking(True)
        self._messages: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        # In a thread, so that the learner's death is noticed in the middle of a step
        threading.Thread(target=self._listen, name="learner", daemon=True).start()

    def _listen(self) -> None:
        try:
            with self._socket.makefile("rb") as stream:
                while header := stream.read(_LENGTH.size):
                    (length,) = _LENGTH.unpack(header)
                    message = stream.read(length)
                    if len(message) < length:
                        break
                    self._messages.put(message)
        except (OSError, struct.error):
            pass
        self._messages.put(None)
        time.sleep(CLOSE_SECONDS)
        os._exit(1)

    def get(self) -> bytes | None:
        """
        :return: The learner's next message; None once it is gone
        """
        return self._messages.get()

    def put(self, message: bytes) -> None:
        """
        :param message: What the learner is told
        :raises OSError: It is gone
        """
        self._socket.sendall(_LENGTH.pack(len(message)) + message)
