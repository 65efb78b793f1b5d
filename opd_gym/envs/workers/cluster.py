"""Other machines, by Ray: ``pip install 'opd-gym[ray]'``. Ray is imported when it is needed."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from opd_gym.envs.workers.process import LOOK_SECONDS, give_up

# Who is started again, and how often, is decided here and not by Ray
_OURS = (
    "max_restarts",
    "max_task_retries",
    "max_concurrency",
    "concurrency_groups",
    "lifetime",
    "name",
    "get_if_exists",
)


def connect(address: str | None = None) -> Any:
    """
    Ray, connected to a cluster. A connection that is there already is used as it is.

    :param address: As in ``ray.init``: "host:port", "auto" for the cluster that this machine is part of, "local" for
        one of this process alone; None: the environment's ``RAY_ADDRESS``, or "auto"
    :return: The module
    :raises ImportError: Ray is not installed
    :raises ConnectionError: There is no cluster
    """
    try:
        import ray
    except ImportError as error:
        raise ImportError("Envs and teachers on other machines need Ray: pip install 'opd-gym[ray]'") from error
    if not ray.is_initialized():
        try:
            # Without an address Ray would start a cluster of this machine alone, and nobody would notice
            ray.init(address=address or "auto")
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ConnectionError(
                f"No Ray cluster at {address or 'auto'!r}. Start one (`ray start --head` on one machine, and on the "
                "others what that prints) and give its address, or call ray.init() yourself before, for this machine "
                f"alone too. Ray says: {error}"
            ) from error
    return ray


def options_of(given: Mapping[str, Any] | None, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """
    :param given: Options of a Ray actor: ``num_cpus``, ``num_gpus``, ``resources``, ``runtime_env``, ...
    :param defaults: What holds for those that are not given
    :return: All of them
    :raises ValueError: One of them is decided by this library
    """
    if refused := sorted(set(given or {}) & set(_OURS)):
        raise ValueError(
            f"actor_options: {', '.join(refused)} cannot be chosen, because lost actors are replaced here."
        )
    return {**defaults, **(given or {}), "max_restarts": 0, "max_task_retries": 0}


def kill(ray: Any, actor: Any) -> None:
    """
    End an actor at once, if it and its cluster are still there.

    :param ray: Module of Ray
    :param actor: Handle of the actor
    """
    if ray.is_initialized():
        with suppress(Exception):
            ray.kill(actor)


def wait_for(ray: Any, answer: Any, timeout: float | None) -> Any:
    """
    :param ray: Module of Ray
    :param answer: Reference to what an actor is to return
    :param timeout: Seconds to wait; None: it may take for ever
    :return: What it returned
    :raises TimeoutError: It has not for so long
    :raises InterruptedError: It has not, and ``process.give_up`` is set
    :raises ray.exceptions.RayError: It raised something, or is lost
    """
    deadline = math.inf if timeout is None else time.monotonic() + timeout
    while not ray.wait([answer], timeout=min(max(deadline - time.monotonic(), 0.0), LOOK_SECONDS))[0]:
        if give_up.is_set():
            raise InterruptedError("What was waited for was given up.")
        if time.monotonic() >= deadline:
            raise TimeoutError
    return ray.get(answer)
