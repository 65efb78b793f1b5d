"""What a worker process does: build a simulator, then one command after the other, until the learner is gone."""

from __future__ import annotations

import os
import traceback
from typing import Any

from opd_gym.envs.robotwin.remote import dumps, loads
from opd_gym.envs.robotwin.simulator import Settings, Simulator
from opd_gym.envs.workers.process import Learner


def main(last_words: int, connection: int, parent: int) -> None:
    """
    :param last_words: see :class:`~opd_gym.envs.workers.process.Learner`
    :param connection: see there
    :param parent: see there
    """
    learner = Learner(last_words, connection, parent)
    simulator: Simulator | None = None
    while (message := learner.get()) is not None:
        header, arrays = loads(message)
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
            learner.put(dumps(reply, out))
        except OSError:
            break
    if simulator is not None:
        simulator.close()
    # Not through SAPIEN's destructors, which are not safe to run in any order
    os._exit(0)
