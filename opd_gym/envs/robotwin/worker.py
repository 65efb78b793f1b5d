"""What a worker process does: build a simulator, then one command after the other, until the learner is gone."""

from __future__ import annotations

import faulthandler
import os
import queue
import signal
import socket
import threading
import time
import traceback
from typing import Any

from opd_gym.envs.robotwin.remote import CLOSE_SECONDS, receive, send
from opd_gym.envs.robotwin.simulator import Arrays, Settings, Simulator


def main(fd: int) -> None:
    """
    :param fd: file descriptor of the socket to the learner
    """
    # Ctrl-C reaches the whole process group; the learner decides what comes of it
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.enable()
    connection = socket.socket(fileno=fd)
    commands: queue.SimpleQueue[tuple[dict[str, Any], Arrays] | None] = queue.SimpleQueue()

    def listen() -> None:
        # In a thread: the learner's death is noticed in the middle of a step
        try:
            while True:
                commands.put(receive(connection))
        except (EOFError, OSError):
            commands.put(None)
            time.sleep(CLOSE_SECONDS)
            os._exit(1)

    threading.Thread(target=listen, daemon=True).start()
    simulator: Simulator | None = None
    while (message := commands.get()) is not None:
        header, arrays = message
        answer, out = {}, {}
        try:
            if header["command"] == "start":
                simulator = Simulator(Settings(**header["arguments"]["settings"]))
            else:
                answer, out = getattr(simulator, header["command"])(**header["arguments"], **arrays)
            reply: dict[str, Any] = {"value": answer}
        except Exception as error:
            text = "".join(traceback.format_exception(error))
            reply = {"error": {"kind": type(error).__name__, "message": str(error), "traceback": text}}
        try:
            send(connection, reply, out)
        except OSError:
            break
    if simulator is not None:
        simulator.close()
    # Not through SAPIEN's destructors, which are not safe to run in any order
    os._exit(0)
