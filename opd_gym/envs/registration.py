"""One table of every environment id, and the vectorised envs that the algorithms train on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import gymnasium as gym

from opd_gym.actions import Statistics
from opd_gym.envs.libero.suites import CLASSIC_SUITES, N_TASKS, SUITES
from opd_gym.envs.robotwin.tasks import TASKS, camel
from opd_gym.envs.wrappers import ActionChunk, ActionTokens, EpisodeControl

if TYPE_CHECKING:
    from stable_baselines3.common.vec_env import VecEnv

_LIBERO = "opd_gym.envs.libero.env:LiberoEnv"
_LIBERO_PLUS = "opd_gym.envs.libero.plus:LiberoPlusEnv"
_ROBOTWIN = "opd_gym.envs.robotwin.env:RoboTwinEnv"


def _camel(suite: str) -> str:
    return "".join(word.capitalize() for word in suite.split("_"))


def _table() -> dict[str, dict[str, Any]]:
    table: dict[str, dict[str, Any]] = {f"{_camel(suite)}-v0": {"suite": suite} for suite in SUITES}
    for suite in CLASSIC_SUITES:
        table |= {f"{_camel(suite)}Task{i}-v0": {"suite": suite, "task_ids": (i,)} for i in range(N_TASKS[suite])}
    return table


LIBERO_PLUS_IDS = {f"{_camel(suite).replace('Libero', 'LiberoPlus')}-v0": {"suite": suite} for suite in CLASSIC_SUITES}
LIBERO_IDS = _table() | LIBERO_PLUS_IDS
ROBOTWIN_IDS: dict[str, dict[str, Any]] = {f"RoboTwin{camel(task)}-v0": {"task": task} for task in TASKS}

# The chunk that the published policies of a benchmark decode at once; ids that are not here act step by step.
CHUNK_SIZES = {env_id: 8 for env_id in LIBERO_IDS} | {env_id: 25 for env_id in ROBOTWIN_IDS}


def register_envs() -> None:
    """Register every environment id; called when ``opd_gym`` is imported."""
    # The first that registers an id wins
    for entry_point, ids in ((_LIBERO_PLUS, LIBERO_PLUS_IDS), (_LIBERO, LIBERO_IDS), (_ROBOTWIN, ROBOTWIN_IDS)):
        for env_id, kwargs in ids.items():
            if env_id not in gym.registry:
                gym.register(env_id, entry_point=entry_point, kwargs=dict(kwargs))


def bare_id(env_id: str) -> str:
    """
    :param env_id: an environment id, with or without the module to import (``opd_gym:LiberoObject-v0``)
    :return: the id without the module
    """
    return env_id.split(":")[-1]


def make_env_fn(
    env_id: str,
    env_kwargs: dict[str, Any] | None = None,
    chunk_size: int | None = None,
    tokens: bool | None = None,
    n_bins: int = 256,
    statistics: Statistics | None = None,
    wrapper: Callable[[gym.Env], gym.Env] | None = None,
) -> Callable[[], gym.Env]:
    """
    A function that builds one worker's env: ``env -> wrapper -> ActionChunk -> ActionTokens -> Monitor ->
    EpisodeControl``. A RoboTwin env carries out chunks itself, as one path, and has no ``ActionChunk``.

    :param env_id: registered id
    :param env_kwargs: keyword arguments of the env
    :param chunk_size: actions in a chunk; None for that of ``env_kwargs`` (RoboTwin) or what the benchmark's policies
        use, 0 for no chunks
    :param tokens: whether actions are tokens; None: as for ``chunk_size``
    :param n_bins: tokens of an action dimension
    :param statistics: un-normalisation statistics, see :class:`ActionTokens`
    :param wrapper: a further wrapper, next to the env
    :return: the function; it can be sent to another process
    :raises ValueError: two different sizes of a chunk
    """
    known = CHUNK_SIZES.get(bare_id(env_id))
    if bare_id(env_id) in ROBOTWIN_IDS:
        own = (env_kwargs or {}).get("chunk_size")
        if own is not None and chunk_size not in (None, own):
            raise ValueError(f"chunk_size is {chunk_size}, and {own} in env_kwargs. Give one of the two.")
        chunk_size = chunk_size if own is None else own
    chunk = known if chunk_size is None else chunk_size
    tokenised = bool(known) if tokens is None else tokens
    kwargs = dict(env_kwargs or {})
    if chunk and bare_id(env_id) in ROBOTWIN_IDS:
        kwargs["chunk_size"], chunk = chunk, 0

    def build() -> gym.Env:
        from stable_baselines3.common.monitor import Monitor

        import opd_gym  # noqa: F401  (a fresh worker process has not registered the ids yet)

        env = gym.make(env_id, **kwargs)
        if wrapper is not None:
            env = wrapper(env)
        if chunk:
            env = ActionChunk(env, chunk)
        if tokenised:
            env = ActionTokens(env, n_bins, statistics)
        return EpisodeControl(Monitor(env))

    return build


def _patience(env_id: str, env_kwargs: dict[str, Any] | None) -> dict[str, Any]:
    """Time-out of a ``WorkerVecEnv``: a RoboTwin env notices by itself that its simulator hangs, and starts another."""
    if bare_id(env_id) not in ROBOTWIN_IDS:
        return {}
    from opd_gym.envs.robotwin.remote import START_SECONDS, STEP_SECONDS

    step = float((env_kwargs or {}).get("timeout", STEP_SECONDS))
    # Behind a step with its pictures that ends an episode: the start of a simulator, and its reset
    return {"timeout": 2 * step + 2 * max(step, START_SECONDS)}


def make_vec(
    env_id: str,
    n_envs: int = 1,
    seed: int | None = None,
    env_kwargs: dict[str, Any] | None = None,
    chunk_size: int | None = None,
    tokens: bool | None = None,
    n_bins: int = 256,
    statistics: Statistics | None = None,
    wrapper: Callable[[gym.Env], gym.Env] | None = None,
    vec_env_cls: Callable[..., VecEnv] | None = None,
    n_workers: int | None = None,
) -> VecEnv:
    """
    The vectorised env that the algorithms of this library train on.

    On a benchmark's ids (LIBERO, RoboTwin) one step is one decision of a policy that emits a chunk of action tokens.

    :param env_id: registered id, for instance ``LiberoObject-v0``
    :param n_envs: number of envs
    :param seed: env i gets ``seed + i``
    :param env_kwargs: see :func:`make_env_fn`, as for the arguments that follow
    :param vec_env_cls: None for :class:`WorkerVecEnv` where a benchmark has several envs, or ``n_workers`` is given,
        and for ``DummyVecEnv`` elsewhere. On other systems than Linux a benchmark's envs go to ``SubprocVecEnv``
    :param n_workers: processes that host the envs, see :class:`WorkerVecEnv`; None for one a core, at most one an env
    :return: the vectorised env
    :raises NotImplementedError: ``n_workers`` on another system than Linux
    :raises ValueError: ``n_envs`` or ``n_workers`` below 1, or ``n_workers`` for another class of env
    """
    from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv

    from opd_gym.envs.workers.vec_env import WorkerVecEnv

    if n_envs < 1:
        raise ValueError(f"n_envs must be at least 1, got {n_envs}.")
    if n_workers is not None and vec_env_cls is not None:
        raise ValueError(
            f"n_workers is an argument of WorkerVecEnv, got it with vec_env_cls={vec_env_cls}. Give one of the two."
        )
    build = make_env_fn(env_id, env_kwargs, chunk_size, tokens, n_bins, statistics, wrapper)
    if n_workers is not None or (vec_env_cls is None and n_envs > 1 and bare_id(env_id) in CHUNK_SIZES):
        workers = partial(WorkerVecEnv, n_workers=n_workers, **_patience(env_id, env_kwargs))
        # Who asks for a number of workers is told that there are none
        vec_env_cls = workers if n_workers is not None or sys.platform == "linux" else SubprocVecEnv
    cls = vec_env_cls or DummyVecEnv
    if cls is not DummyVecEnv:
        # What is wrong with the arguments or the installation is said here and not in a worker, whose error would
        # arrive as a broken connection. Simulators are lazy, so this costs little.
        build().close()
    env = cls([build] * n_envs)
    env.seed(seed)
    return env
