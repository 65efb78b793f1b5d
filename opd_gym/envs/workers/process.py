"""How a worker process is talked to."""

from __future__ import annotations

import os
import socket
import threading
from collections import deque
from contextlib import suppress
from typing import Any

# What a worker is given to close its envs
CLOSE_SECONDS = 5.0


class WorkerTraceback(Exception):
    """The cause of an exception that an env raised in its worker: the traceback there, as text."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


class Outbox:
    """
    What the learner sends to a worker, in order. It never waits for the worker to read: what the socket does not take
    at once, a thread sends.

    :param pipe: The learner's end of the pipe
    """

    def __init__(self, pipe: Any):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, fileno=os.dup(pipe.fileno()))
        self.socket.setblocking(True)  # whatever socket.setdefaulttimeout() says
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
                    rest = rest[self.socket.send(rest, socket.MSG_DONTWAIT) :]
                except BlockingIOError:
                    pass
                except OSError:
                    # A worker that has died is noticed where its answer is waited for
                    return
                if not rest:
                    return
                self._thread = threading.Thread(target=self._send_rest, name="WorkerVecEnv-outbox", daemon=True)
                self._thread.start()
            self._left.append(rest)

    def _send_rest(self) -> None:
        with self._lock:
            rest = self._left[0]
        with suppress(OSError):
            while True:
                self.socket.sendall(rest)
                with self._lock:
                    self._left.popleft()
                    if not self._left:
                        return
                    rest = self._left[0]

    def close(self) -> None:
        """Give up what is not yet sent."""
        # Ends the thread's write too, also where a process that the worker has forked holds the other end
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        if self._thread is not None:
            self._thread.join()
        self.socket.close()
