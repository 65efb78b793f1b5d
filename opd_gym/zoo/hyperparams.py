"""
Hyperparameters in rl-zoo3's format: one YAML file an algorithm, keyed by environment id.

Unlike there nothing is evaluated: ``policy_kwargs`` is a mapping, and a wrapper is an import path.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from opd_gym.checks import check_at_least, did_you_mean
from opd_gym.envs.registration import ROBOTWIN_IDS, bare_id, training_defaults
from opd_gym.untrusted import parse_yaml, read_yaml

HYPERPARAMS = Path(__file__).parent / "hyperparams"
ALGORITHMS = ("opd", "grpo", "ppo", "sft")

# What concerns the environment and the run; everything else goes to the algorithm.
RUN_KEYS = {
    "n_timesteps": "total number of decisions of all envs",
    "n_envs": "number of parallel envs",
    "n_workers": "processes that host the envs",
    "worker_timeout": "seconds without an answer after which one of them is replaced",
    "ray": "address of the Ray cluster whose machines host the envs, or a mapping of RayVecEnv's arguments",
    "env_kwargs": "keyword arguments of the env",
    "env_wrapper": "import path of a wrapper, a mapping from it to its keyword arguments, or a list of these",
    "callback": "import path of a callback, or as for env_wrapper",
    "chunk_size": "actions per decision",
    "normalize": "true for a VecNormalize, or its keyword arguments",
    "frame_stack": "observations that the policy sees at once",
    "tokens": "whether actions are tokens",
    "n_bins": "tokens of one action dimension",
    "policy": "name of the policy",
}
# Arguments of the algorithms that the command line sets by itself.
_RESERVED = {"self", "env", "policy", "seed", "device", "_init_setup_model"}
# The zoo's numbers of these are for one learner; several share them
_SHARED = ("n_steps", "batch_size", "n_groups", "trajectories_per_batch")
# As in rl-zoo3: constants or, from a string like lin_5e-4, linear schedules.
SCHEDULE_KEYS = ("learning_rate", "clip_range", "clip_range_high", "clip_range_vf")


def algorithm_parameters(cls: type) -> dict[str, inspect.Parameter]:
    """
    Keyword arguments of an algorithm that a configuration may set.

    :param cls: class of the algorithm
    :return: the parameters by name; those that a ``**kwargs`` passes on to a base class are among them
    """
    found: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        if "__init__" not in base.__dict__ or base is object:
            continue
        parameters = inspect.signature(base.__init__).parameters  # type: ignore[misc]
        for name, parameter in parameters.items():
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY) and name not in _RESERVED:
                found.setdefault(name, parameter)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            break
    return found


def read_hyperparams(path: Path) -> dict[str, Any]:
    """
    :param path: YAML file of one algorithm
    :return: its entries by environment id
    """
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path} must map environment ids to hyperparameters, got {type(values).__name__}.")
    return values


def suite_id(env_id: str) -> str:
    """
    :param env_id: environment id
    :return: ``LiberoObject-v0`` for ``LiberoObjectTask3-v0``, ``RoboTwin-v0`` for any of RoboTwin's; other ids as they
        are
    """
    if env_id in ROBOTWIN_IDS:
        return "RoboTwin-v0"
    return re.sub(r"Task\d+(-v\d+)$", r"\1", env_id)


def load_hyperparams(algo: str, env_id: str, path: Path | str | None = None) -> dict[str, Any]:
    """
    Hyperparameters for an environment. A single task without an entry of its own has its suite's; else ``default``.
    What an entry leaves open of a benchmark's env follows from :func:`opd_gym.envs.registration.training_defaults`.
    Of several learners (``torchrun``) each has its part of the zoo's rollouts and minibatches; a file of your own says
    what each of them has.

    :param algo: "opd", "grpo", "ppo" or "sft"
    :param env_id: environment id, with or without ``opd_gym:``
    :param path: YAML file; None for the zoo's own
    :return: plain values
    """
    if algo.lower() not in ALGORITHMS:
        raise ValueError(f"Unknown algorithm {algo!r}. Known: {', '.join(ALGORITHMS)}.")
    path = Path(path) if path is not None else HYPERPARAMS / f"{algo.lower()}.yml"
    if not path.is_file():
        raise FileNotFoundError(f"No hyperparameters of {algo!r}: expected them in {path}.")
    entries = read_hyperparams(path)
    bare = bare_id(env_id)
    found = _entry(entries, path, env_id, bare, suite_id(bare), "default")
    if found is None:
        raise ValueError(
            f"{path} has neither an entry {bare!r} nor a `default`. It has: {', '.join(map(str, entries))}."
        )
    return found


def tuned_hyperparams(algo: str, env_id: str) -> dict[str, Any] | None:
    """
    :param algo: "opd", "grpo", "ppo" or "sft"
    :param env_id: environment id, with or without ``opd_gym:``
    :return: what :func:`load_hyperparams` gives where the zoo has an entry for the id or its suite; None where only
        ``default`` is left
    """
    path = HYPERPARAMS / f"{algo}.yml"
    bare = bare_id(env_id)
    return _entry(read_hyperparams(path), path, env_id, bare, suite_id(bare))


def _entry(entries: dict[str, Any], path: Path, env_id: str, *keys: str) -> dict[str, Any] | None:
    for key in keys:
        if key in entries:
            values = entries[key]
            if not isinstance(values, dict):
                raise ValueError(f"{path}, {key!r}: expected a mapping of hyperparameters, got {values!r}.")
            shared = _of_one_learner(values) if path.parent == HYPERPARAMS else values
            return merge(training_defaults(env_id), shared)
    return None


def _of_one_learner(values: dict[str, Any]) -> dict[str, Any]:
    """So that a run in several learners has as many updates, from as many decisions, as one in a single learner."""
    from opd_gym.ranks import world_size  # here: it takes PyTorch

    learners = world_size()
    return {key: max(1, -(-value // learners)) if key in _SHARED else value for key, value in values.items()}


def rl_zoo3_hyperparams(env_id: str, values: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """
    A configuration as rl-zoo3 reads it, whose envs are single ones made by ``gymnasium.make``: chunks, tokens and what
    the student's checkpoint asks of the env become ``env_kwargs`` and ``env_wrapper``; processes are left out.

    :param env_id: environment id, with or without the module to import
    :param values: hyperparameters, as :func:`load_hyperparams` gives them
    :param settings: what that checkpoint needs, see ``opd_gym.policies.loading.checkpoint_settings``
    :return: plain values
    """
    from opd_gym.envs.make import env_arguments, env_layers  # here: `opd-gym --help` has no use for PyTorch

    given = env_arguments(env_id, values, settings)
    env_kwargs, chunk, tokens = env_layers(env_id, given["env_kwargs"], given.get("chunk_size"), given.get("tokens"))
    own = values.get("env_wrapper") or []
    wrappers = list(own) if isinstance(own, list) else [own]
    if chunk:
        wrappers.append({"opd_gym.envs.wrappers.ActionChunk": {"chunk_size": chunk}})
    if tokens:
        binning = {key: given[key] for key in ("n_bins", "statistics") if key in given}
        wrappers.append({"opd_gym.envs.wrappers.ActionTokens": binning})
    wrappers.append("opd_gym.envs.wrappers.EpisodeControl")
    left_out = ("n_workers", "worker_timeout", "ray", "chunk_size", "tokens", "n_bins")
    converted = {key: value for key, value in values.items() if key not in left_out}
    return _plain({**converted, "env_kwargs": env_kwargs, "env_wrapper": wrappers})


def _plain(value: Any) -> Any:
    """Arrays and tuples as lists."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.tolist() if hasattr(value, "tolist") else value


def parse_overrides(items: Iterable[str]) -> dict[str, Any]:
    """
    Hyperparameters from the command line.

    :param items: ``key:value`` or ``key=value``; the value is YAML, and ``env_kwargs.image_size=64`` reaches into a
        mapping
    :return: nested values
    """
    values: dict[str, Any] = {}
    for item in items:
        key, separator, value = re.match(r"([^:=]*)([:=]?)(.*)", item, re.DOTALL).groups()  # type: ignore[union-attr]
        *parents, last = key.strip().split(".")
        if not separator or not last or not all(parents):
            raise ValueError(
                f"Expected key:value or key=value, for instance learning_rate:5e-4 or learning_rate=5e-4, got {item!r}."
            )
        target = values
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise ValueError(f"{item!r}: {parent!r} was given a value before; it cannot be a mapping as well.")
        try:
            target[last] = parse_yaml(value)
        except ValueError as error:
            raise ValueError(f"{item!r}: expected YAML after {key!r}: {error}") from None
    return values


def merge(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """
    :param base: values
    :param overrides: values that win; mappings are merged, not replaced
    :return: a new dict
    """
    merged = deepcopy(dict(base))
    for key, value in overrides.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else deepcopy(value)
    return merged


def schedule(value: Any, key: str) -> Any:
    """
    :param value: a number, or ``lin_5e-4`` for a linear decrease from there to 0
    :param key: name of the hyperparameter, for the error
    :return: the number or the schedule
    """
    if not isinstance(value, str):
        return value
    kind, _, number = value.partition("_")
    try:
        start = float(number if kind == "lin" else value)
    except ValueError:
        raise ValueError(f"{key}: expected a number or a schedule like lin_5e-4, got {value!r}.") from None
    if kind != "lin":
        return start
    from stable_baselines3.common.utils import LinearSchedule  # here: `opd-gym --help` has no use for PyTorch

    return LinearSchedule(start, 0.0, 1.0)


def check_mappings(values: Mapping[str, Any]) -> None:
    """
    :param values: hyperparameters, as :func:`load_hyperparams` gives them
    :raises ValueError: what should map names to values is something else
    """
    known = {"env_kwargs", "policy_kwargs", "teacher_kwargs", "demonstration_kwargs", "normalize"}
    given = {key: values[key] for key in values if key in known}
    if isinstance(policy_kwargs := given.get("policy_kwargs"), Mapping):
        given["policy_kwargs.body_kwargs"] = policy_kwargs.get("body_kwargs")
    for key, value in given.items():
        if not (value is None or isinstance(value, Mapping) or (key == "normalize" and isinstance(value, bool))):
            hint = " Nothing is evaluated here: write dict(a=1) as {a: 1}." if isinstance(value, str) else ""
            raise ValueError(f"{key}: expected a mapping, got {value!r:.80}.{hint}")


def split_hyperparams(algo: str, values: Mapping[str, Any], cls: type) -> tuple[dict[str, Any], dict[str, Any]]:
    """
    Check a configuration and part it.

    :param algo: name of the algorithm, for errors
    :param values: hyperparameters, as :func:`load_hyperparams` gives them
    :param cls: class of the algorithm
    :return: what concerns the environment and the run, and the algorithm's keyword arguments with schedules resolved
    """
    parameters = algorithm_parameters(cls)
    unknown = [key for key in values if key not in RUN_KEYS and key not in parameters]
    if unknown:
        raise ValueError(
            f"Unknown hyperparameters of {algo}: {', '.join(map(str, unknown))}. "
            f"{did_you_mean(str(unknown[0]), [*RUN_KEYS, *parameters])}"
            f"Of the run: {', '.join(RUN_KEYS)}. Of the algorithm: {', '.join(parameters)}."
        )
    run = {key: value for key, value in values.items() if key in RUN_KEYS}
    kwargs = {key: value for key, value in values.items() if key not in RUN_KEYS}
    check_mappings(values)
    for key in ("teacher_kwargs", "policy_kwargs"):
        if isinstance(kwargs.get(key), Mapping) and "trust" in kwargs[key]:
            raise ValueError(f"{key}.trust: a configuration does not say whom you trust. Pass --trust if you do.")
    if isinstance(run.get("normalize"), Mapping) and "gamma" in kwargs:
        run["normalize"] = {"gamma": kwargs["gamma"], **run["normalize"]}
    elif run.get("normalize") is True and "gamma" in kwargs:
        run["normalize"] = {"gamma": kwargs["gamma"]}
    for key in SCHEDULE_KEYS:
        if key in kwargs and "Schedule" in str(parameters[key].annotation) and kwargs[key] != parameters[key].default:
            kwargs[key] = schedule(kwargs[key], key)
    for key in ("n_timesteps", "n_envs", "n_workers", "chunk_size", "n_bins", "frame_stack"):
        if run.get(key) is not None:
            if not isinstance(run[key], (int, float)) or isinstance(run[key], bool):
                raise ValueError(f"{key}: expected a number, got {run[key]!r}.")
            if not float(run[key]).is_integer():
                raise ValueError(f"{key}: expected an integer, got {run[key]!r}.")
            run[key] = int(run[key])
            check_at_least(0 if key == "chunk_size" else 1, **{key: run[key]})
    timeout = run.get("worker_timeout")
    if timeout is not None and (isinstance(timeout, bool) or not isinstance(timeout, (int, float))):
        raise ValueError(f"worker_timeout: expected a number of seconds, got {timeout!r}.")
    return run, kwargs
