"""From an environment id, or any env, to the vectorised env that the algorithms train on."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import gymnasium as gym
from gymnasium import spaces
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecFrameStack, VecNormalize

from opd_gym.actions import Statistics
from opd_gym.checks import check_at_least, check_flag, check_range, check_seed
from opd_gym.envs.registration import CHUNK_SIZES, LIBERO_IDS, ROBOTWIN_IDS, bare_id, register_envs, training_defaults
from opd_gym.envs.wrappers import ActionChunk, ActionTokens, EpisodeControl
from opd_gym.tokens import check_starts

if TYPE_CHECKING:
    from gymnasium.envs.registration import EnvSpec
    from stable_baselines3.common.policies import BasePolicy
    from stable_baselines3.common.type_aliases import GymEnv

DEFAULT_CHUNK_SIZE = 8
# Of the settings of a checkpoint, those that the env itself takes
ENV_SETTINGS = ("image_size", "cameras", "visuals")


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
    A function that builds one env: ``env -> wrapper -> ActionChunk -> ActionTokens -> Monitor ->
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
    kwargs, chunk, tokenised = env_layers(env_id, env_kwargs, chunk_size, tokens)

    def build() -> gym.Env:
        register_envs()  # a fresh worker process has not registered them yet
        try:
            env = gym.make(env_id, **kwargs)
        except (TypeError, AttributeError, KeyError, AssertionError) as error:
            raise ValueError(
                f"{env_id} does not take its env_kwargs {kwargs}: {type(error).__name__}: {error}"
            ) from error
        if wrapper is not None:
            env = wrapper(env)
        if chunk:
            env = ActionChunk(env, chunk)
        if tokenised:
            env = ActionTokens(env, n_bins, statistics)
        return EpisodeControl(Monitor(env))

    return build


def env_layers(
    env_id: str, env_kwargs: Mapping[str, Any] | None, chunk_size: int | None, tokens: bool | None
) -> tuple[dict[str, Any], int, bool]:
    """
    :param env_id: registered id
    :param env_kwargs: see :func:`make_env_fn`, as for the arguments that follow
    :return: keyword arguments of the env itself; the size of the chunks of an ``ActionChunk`` around it, 0 for none;
        and whether there is an ``ActionTokens``
    :raises ValueError: two different sizes of a chunk, or other tasks than that of the id
    """
    known = CHUNK_SIZES.get(bare_id(env_id), 0)
    kwargs = dict(env_kwargs or {})
    own_tasks = LIBERO_IDS.get(bare_id(env_id), {}).get("task_ids")
    given = kwargs.get("task_ids")
    if own_tasks is not None and given is not None and list(given) != list(own_tasks):
        raise ValueError(f"{env_id} is task {own_tasks[0]} alone, and task_ids is {given}. Use the id of the suite.")
    if bare_id(env_id) in ROBOTWIN_IDS:
        own = kwargs.get("chunk_size")
        if own is not None and chunk_size not in (None, own):
            raise ValueError(f"chunk_size is {chunk_size}, and {own} in env_kwargs. Give one of the two.")
        chunk_size = chunk_size if own is None else own
    chunk = known if chunk_size is None else chunk_size
    if chunk and bare_id(env_id) in ROBOTWIN_IDS:
        kwargs["chunk_size"], chunk = chunk, 0
    return kwargs, chunk, bool(known) if tokens is None else tokens


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
    worker_timeout: float | None = None,
    ray: str | Mapping[str, Any] | None = None,
) -> VecEnv:
    """
    The vectorised env that the algorithms of this library train on.

    On a benchmark's ids (LIBERO, RoboTwin) one step is one decision of a policy that emits a chunk of action tokens.

    :param env_id: registered id, for instance ``LiberoObject-v0``
    :param n_envs: number of envs
    :param seed: env i gets ``seed + i``
    :param env_kwargs: keyword arguments of the env
    :param chunk_size: actions in a chunk; None for that of ``env_kwargs`` (RoboTwin) or what the benchmark's policies
        use, 0 for no chunks
    :param tokens: whether actions are tokens; None: as for ``chunk_size``
    :param n_bins: tokens of an action dimension
    :param statistics: un-normalisation statistics, see :class:`ActionTokens`
    :param wrapper: a further wrapper, next to the env
    :param vec_env_cls: None for :class:`WorkerVecEnv` where a benchmark has several envs, or ``n_workers`` is given,
        and for ``DummyVecEnv`` elsewhere. On other systems than Linux a benchmark's envs go to ``SubprocVecEnv``
    :param n_workers: processes that host the envs, see :class:`WorkerVecEnv`; None for one a core, at most one an env
    :param worker_timeout: seconds without an answer after which one of them is replaced; None for a limit that no
        healthy one meets (300, for RoboTwin more), ``inf`` for none
    :param ray: address of the Ray cluster whose machines host the envs ("auto": the one that this machine is part of),
        or keyword arguments of :class:`~opd_gym.envs.workers.ray_vec_env.RayVecEnv`; None: they are on this machine
    :return: the vectorised env
    :raises ImportError: ``ray`` without Ray
    :raises NotImplementedError: ``n_workers`` or ``worker_timeout`` on another system than Linux
    :raises ValueError: ``n_envs`` or ``n_workers`` below 1, ``n_workers``, ``worker_timeout`` or ``ray`` for another
        class of env, or a space that does not count from 0
    """
    from opd_gym.envs.workers.vec_env import WorkerVecEnv

    check_at_least(1, n_envs=n_envs, n_workers=n_workers)
    check_at_least(0, seed=seed, chunk_size=chunk_size)
    check_flag(tokens=tokens)
    if worker_timeout is not None:
        check_range("(0, inf]", worker_timeout=worker_timeout)
    asked = {"n_workers": n_workers, "worker_timeout": worker_timeout, "ray": ray}
    given = [name for name, value in asked.items() if value is not None]
    if given and vec_env_cls is not None:
        raise ValueError(
            f"{' and '.join(given)}: for WorkerVecEnv alone, got vec_env_cls={vec_env_cls}. Give one of the two."
        )
    build = make_env_fn(env_id, env_kwargs, chunk_size, tokens, n_bins, statistics, wrapper)
    patience = _patience(env_id, env_kwargs) if worker_timeout is None else {"timeout": worker_timeout}
    if ray is not None:
        from opd_gym.envs.workers.ray_vec_env import RayVecEnv

        elsewhere = {"address": ray} if isinstance(ray, str) else dict(ray)
        vec_env_cls = partial(RayVecEnv, **{"n_workers": n_workers, **patience, **elsewhere})
    elif given or (vec_env_cls is None and n_envs > 1 and bare_id(env_id) in CHUNK_SIZES):
        workers = partial(WorkerVecEnv, n_workers=n_workers, **patience)
        # Off Linux, what is asked of it raises
        vec_env_cls = workers if given or sys.platform == "linux" else SubprocVecEnv
    cls = vec_env_cls or DummyVecEnv
    if cls is not DummyVecEnv and ray is None:  # else a simulator need not be here
        # What is wrong with the arguments or the installation is said here and not in a worker, whose error would
        # arrive as a broken connection. Simulators are lazy, so this costs little.
        build().close()
    env = cls([build] * n_envs)
    try:
        _check_spaces(env)
    except ValueError:
        env.close()
        raise
    env.seed(check_seed(seed))
    return env


def _check_spaces(env: GymEnv) -> None:
    check_starts("env's observation space", env.observation_space)
    check_starts("env's action space", env.action_space)


def env_spec(env_id: str) -> EnvSpec:
    """
    :param env_id: registered id; of ``module:Id-v0`` the module is imported, as ``gymnasium.make`` does
    :return: what is registered
    """
    module, _, bare = env_id.rpartition(":")
    if module:
        importlib.import_module(module)
    return gym.spec(bare)


def env_id_of(env: VecEnv) -> str | None:
    """
    :param env: A vectorised env
    :return: Id that its envs are registered with; None if they are not
    """
    spec = env.get_attr("spec")[0] if env.has_attr("spec") else None
    return None if spec is None else str(spec.id)


def import_paths(spec: Any, key: str) -> list[tuple[Callable[..., Any], dict[str, Any]]]:
    """
    What a configuration names by import paths; nothing is evaluated.

    :param spec: an import path, a mapping from it to keyword arguments, a list of these, or None
    :param key: key of the configuration, for errors
    :return: what was imported, with its keyword arguments
    :raises ValueError: it is nothing of the kind, or cannot be imported
    """
    found: list[tuple[Callable[..., Any], dict[str, Any]]] = []
    for item in spec if isinstance(spec, list) else [spec] if spec else []:
        if isinstance(item, Mapping) and len(item) == 1:
            ((path, kwargs),) = item.items()
        else:
            path, kwargs = item, {}
        if not isinstance(path, str) or not isinstance(kwargs or {}, Mapping):
            raise ValueError(f"{key}: expected an import path or one mapped to keyword arguments, got {item!r}.")
        module, _, name = path.replace(":", ".").rpartition(".")
        try:
            imported = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"{key}: cannot import {path!r} ({error}). Expected module.ClassName.") from error
        found.append((imported, dict(kwargs or {})))
    return found


def _apply_wrappers(env: gym.Env, spec: Any) -> gym.Env:
    for wrapper, kwargs in import_paths(spec, "env_wrapper"):
        inner = env
        try:
            env = wrapper(inner, **kwargs)
        except TypeError as error:
            raise ValueError(f"env_wrapper: {wrapper} cannot wrap {inner} with {kwargs}: {error}") from error
        if not isinstance(env, gym.Env):
            raise ValueError(f"env_wrapper: {wrapper} makes a {type(env).__name__} of the env, which is none.")
    return env


def wrapper_function(spec: Any) -> Callable[[gym.Env], gym.Env] | None:
    """
    :param spec: import path of a wrapper, a mapping from it to its keyword arguments, a list of these, or None
    :return: a function that applies them in order and can be sent to a worker process
    """
    return partial(_apply_wrappers, spec=spec) if import_paths(spec, "env_wrapper") else None


def build_env(
    env_id: str,
    run: Mapping[str, Any] | None = None,
    n_envs: int | None = None,
    seed: int | None = None,
    settings: Mapping[str, Any] | None = None,
    **env_kwargs: Any,
) -> VecEnv:
    """
    The vectorised env of a configuration.

    :param env_id: environment id
    :param run: the part of the configuration about the env, see ``opd_gym.zoo.hyperparams.split_hyperparams``
    :param n_envs: number of envs; None for what the configuration says
    :param seed: seed of the envs, see :func:`make_vec`
    :param settings: what a checkpoint needs, see ``opd_gym.policies.loading.checkpoint_settings``; it wins over the
        configuration where it comes to pictures
    :param env_kwargs: keyword arguments of the env that win over the configuration's
    :return: the env
    """
    env_spec(env_id)  # an unknown id is reported here, not in the traceback of a worker process
    run = dict(run or {})
    env = make_vec(
        env_id,
        n_envs=n_envs or run.get("n_envs") or 1,
        seed=seed,
        wrapper=wrapper_function(run.get("env_wrapper")),
        n_workers=run.get("n_workers"),
        worker_timeout=run.get("worker_timeout"),
        ray=run.get("ray"),
        **env_arguments(env_id, run, settings, **env_kwargs),
    )
    try:
        if run.get("normalize"):
            given = run["normalize"]
            for name in ("gamma", "epsilon", "clip_obs", "clip_reward"):
                if isinstance(given, Mapping) and name in given:
                    check_range("[0, inf]", **{f"normalize.{name}": given[name]})
            env = VecNormalize(env, **(given if isinstance(given, Mapping) else {}))
        if run.get("frame_stack"):
            env = VecFrameStack(env, run["frame_stack"])
    except (TypeError, ValueError, AssertionError) as error:
        env.close()
        raise ValueError(f"{env_id} cannot be normalised or stacked as asked: {error}") from error
    return env


def without_training_horizon(env_id: str, run: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """
    A policy that was trained on LIBERO's own demonstrations is as slow as people are, of whose demonstrations the
    longest have 193, 254, 270 and 505 steps on Spatial, Object, Goal and Long (https://github.com/openvla/openvla,
    run_libero_eval.py). The horizon of :func:`training_defaults` is made for students of the scripted expert.

    :param env_id: environment id
    :param run: the part of the configuration about the env, without what the user says
    :param settings: what the policy's checkpoint needs, see :func:`build_env`
    :return: for such a policy without that horizon, so that the suite's own is left
    """
    own_pace = settings.get("visuals") == "exact" and bare_id(env_id) in LIBERO_IDS
    kwargs = dict(run.get("env_kwargs") or {})
    if not own_pace or kwargs.get("horizon") != training_defaults(env_id)["env_kwargs"].get("horizon"):
        return dict(run)
    kwargs.pop("horizon", None)
    return {**run, "env_kwargs": kwargs}


def env_arguments(
    env_id: str, run: Mapping[str, Any], settings: Mapping[str, Any] | None = None, **env_kwargs: Any
) -> dict[str, Any]:
    """
    :param env_id: environment id
    :param run: see :func:`build_env`, as for the arguments that follow
    :return: arguments of :func:`make_env_fn`: ``env_kwargs``, ``chunk_size``, ``tokens``, ``n_bins``, ``statistics``,
        those that are known
    """
    settings = settings or {}
    kwargs = {**(run.get("env_kwargs") or {}), **env_kwargs}
    if bare_id(env_id) in CHUNK_SIZES:
        for key in ENV_SETTINGS:
            # How LIBERO's pictures are drawn is nothing that other benchmarks know of
            known = key != "visuals" or bare_id(env_id) in LIBERO_IDS
            if known and key in settings and key not in env_kwargs:
                kwargs[key] = settings[key]
    token_kwargs: dict[str, Any] = {
        key: settings[key] for key in ("chunk_size", "n_bins", "statistics") if key in settings
    }
    if token_kwargs:
        token_kwargs["tokens"] = True
    token_kwargs.update({key: run[key] for key in ("chunk_size", "tokens", "n_bins") if run.get(key) is not None})
    return {"env_kwargs": kwargs, **token_kwargs}


def prepare_env(
    env: GymEnv | str,
    policy_class: type[BasePolicy],
    policy_kwargs: dict[str, Any] | None = None,
    verbose: int = 0,
    seed: int | None = None,
    n_envs: int | None = None,
    run: Mapping[str, Any] | None = None,
) -> VecEnv | gym.Env:
    """
    Make an env from its id, and give a policy of tokens an env of tokens.

    :param env: An id, an env, or a vectorised env
    :param policy_class: Class of the policy
    :param policy_kwargs: Its keyword arguments; a ``checkpoint`` among them fixes chunk size, bins and statistics
    :param verbose: 1 to say what was wrapped
    :param seed: Seed for an env that is made here
    :param n_envs: How many envs are made of an id; None: what ``run`` says
    :param run: How an id is trained on, see :func:`build_env`; None: its training defaults
    :return: The env, ready for the policy
    :raises ValueError: The policy cannot act in this env, or a space does not count from 0
    """
    requires_tokens = getattr(policy_class, "requires_tokens", False)
    settings: dict[str, Any] = {}
    if requires_tokens:
        from opd_gym.policies.loading import checkpoint_settings

        settings = checkpoint_settings(policy_kwargs or {})
    if isinstance(env, str):
        env = _make_from_id(env, requires_tokens, settings, seed, n_envs, run)
    _check_spaces(env)
    for key in ENV_SETTINGS:
        settings.pop(key, None)
    if not requires_tokens or isinstance(env.action_space, spaces.MultiDiscrete):
        return env
    if isinstance(env, VecEnv):
        raise ValueError(
            f"{policy_class.__name__} expects a MultiDiscrete action space of action tokens, the vectorised env has "
            f"{env.action_space}. Wrap each of its envs in ActionChunk and ActionTokens (opd_gym.envs.wrappers), or "
            "build it with opd_gym.make_vec(env_id, n_envs, chunk_size=8, tokens=True)."
        )
    if not isinstance(env.action_space, spaces.Box):
        raise ValueError(
            f"{policy_class.__name__} expects an env with a Box action space (which is turned into action tokens) or a "
            f"MultiDiscrete one, got {env.action_space}. Use MlpPolicy, CnnPolicy or MultiInputPolicy for this env."
        )
    if len(env.action_space.shape) == 1:
        env = ActionChunk(env, settings.pop("chunk_size", DEFAULT_CHUNK_SIZE))
    env = ActionTokens(env, **settings)
    if verbose >= 1:
        print(f"Wrapping the env, because {policy_class.__name__} needs action tokens: {env}")
    return env


def _make_from_id(
    env_id: str,
    requires_tokens: bool,
    settings: dict[str, Any],
    seed: int | None,
    n_envs: int | None,
    run: Mapping[str, Any] | None,
) -> VecEnv:
    """An env from its id alone, as the algorithms of this library train on it."""
    run = without_training_horizon(env_id, training_defaults(env_id) if run is None else run, settings)
    if bare_id(env_id) not in CHUNK_SIZES and requires_tokens:
        run = {"tokens": True, **run}
    if n_envs is not None:
        run = {**run, "n_envs": n_envs, "n_workers": None, "worker_timeout": None, "ray": None}
    return build_env(env_id, run, seed=seed, settings=settings)


def with_action_dim(
    env: VecEnv | gym.Env, policy_class: type[BasePolicy], policy_kwargs: dict[str, Any] | None
) -> dict[str, Any] | None:
    """
    Tell a new body of a token policy how many dimensions an action has: the number of tokens does not say it.

    :param env: The env that the policy acts in
    :param policy_class: Class of the policy
    :param policy_kwargs: Its keyword arguments
    :return: These, with ``action_dim`` among those of the body where it was open and the env knows it
    """
    kwargs = dict(policy_kwargs or {})
    body_kwargs = dict(kwargs.get("body_kwargs") or {})
    if not getattr(policy_class, "requires_tokens", False) or kwargs.get("checkpoint") or "action_dim" in body_kwargs:
        return policy_kwargs
    if isinstance(env, VecEnv):
        found = env.get_attr("action_dim", indices=0)[0] if env.has_attr("action_dim") else None
    else:
        found = env.get_wrapper_attr("action_dim") if env.has_wrapper_attr("action_dim") else None
    if found is None:
        return policy_kwargs
    return {**kwargs, "body_kwargs": {**body_kwargs, "action_dim": int(found)}}
