"""From a checkpoint to a policy, and from a saved policy to the one that goes on from it."""

from __future__ import annotations

import inspect
import math
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.vec_env import VecEnv, VecNormalize
from stable_baselines3.common.vec_env.stacked_observations import StackedObservations

from opd_gym.checkpoints import resolve_checkpoint
from opd_gym.untrusted import read_attributes, unpickle

# Statistics that say by nothing of which model they are: names from Stable-Baselines3's documentation and from the hub
SHARED_STATISTICS = ("vec_normalize.pkl", "vecnormalize.pkl")
# Attributes of a saved model that its policy is built from
BUILT_FROM = ("policy_class", "policy_kwargs", "observation_space", "action_space", "use_sde")


def checkpoint_settings(policy_kwargs: Mapping[str, Any], trust: bool = False) -> dict[str, Any]:
    """
    What an env must be like for a token policy, as far as that is known before there is an env.

    :param policy_kwargs: Keyword arguments of the policy: its ``checkpoint`` (see ``resolve_checkpoint``), or the
        configuration of its body
    :param trust: Open a zip whatever it holds; code in it runs
    :return: ``chunk_size``, ``n_bins``, ``statistics`` (arguments of ``make_vec``), ``image_size``, ``cameras`` and
        ``visuals`` (of the env), those that are known
    """
    checkpoint = policy_kwargs.get("checkpoint")
    config = policy_kwargs.get("body_kwargs") or {}
    if checkpoint is not None:
        try:
            path = resolve_checkpoint(checkpoint)
            if path.is_dir():
                from opd_gym.policies.body import read_checkpoint_config

                config = read_checkpoint_config(path)[1].to_dict()
            else:
                kwargs = read_attributes(path, keys=("policy_kwargs",), trust=trust).get("policy_kwargs") or {}
                config = kwargs.get("body_kwargs") or {}
        except FileNotFoundError:
            # A saved algorithm has the arguments of its body, and goes without the checkpoint it once started from
            if not config:
                raise
    settings = {key: config[key] for key in ("n_bins", "statistics") if config.get(key) is not None}
    if "n_tokens" in config and "action_dim" in config:
        settings["chunk_size"] = config["n_tokens"] // config["action_dim"]
    if config.get("image_size"):
        height, width = (int(size) for size in config["image_size"])
        settings["image_size"] = height if height == width else (height, width)
    if config.get("image_keys"):
        settings["cameras"] = tuple(config["image_keys"])
    if config.get("libero_images"):
        # Trained on LIBERO's own pictures
        settings["visuals"] = "exact"
    return settings


def load_policy(
    checkpoint: str | os.PathLike[str],
    observation_space: spaces.Space,
    action_space: spaces.Space,
    dtype: str | th.dtype | None = None,
    trainable: bool = True,
    custom_objects: Mapping[str, Any] | None = None,
    trust: bool = False,
) -> BasePolicy:
    """
    The policy of a checkpoint, on the CPU.

    A zip names the class of its policy, so the class of the algorithm is not needed (nor its replay buffer). No code
    that a zip holds is run, see :func:`opd_gym.untrusted.unpickle`.

    :param checkpoint: See :func:`opd_gym.checkpoints.resolve_checkpoint`
    :param observation_space: What a VLA sees; a zip holds its policy's own spaces
    :param action_space: What a VLA's tokens are for
    :param dtype: Type in which a VLA computes, and of its weights; None: float32, or as it was saved
    :param trainable: False for a VLA without gradients and optimizer
    :param custom_objects: Attributes of a saved model to use instead of those in the zip, as in ``load()``
    :param trust: Open a zip whatever it holds; code in it runs
    :return: The policy
    :raises FileNotFoundError: There is no such checkpoint
    :raises ValueError: It holds no policy, a VLA that does not fit the spaces, or code
    """
    path = resolve_checkpoint(checkpoint)
    if path.is_dir():
        from opd_gym.policies.body import read_checkpoint_config
        from opd_gym.policies.vla import VLAPolicy

        read_checkpoint_config(path)
        try:
            return VLAPolicy(
                observation_space,
                action_space,
                _no_learning,
                checkpoint=path,
                dtype=dtype or "float32",
                trainable=trainable,
            )
        except ValueError as error:
            named = str(error).startswith(str(path))
            raise ValueError(str(error) if named else f"{path} does not fit the env. {error}") from error
    data, state = _read_zip(path, custom_objects, trust)
    policy_class, kwargs = data["policy_class"], dict(data.get("policy_kwargs") or {})
    accepted = inspect.signature(policy_class.__init__).parameters
    if "lr_schedule" in accepted:
        kwargs["lr_schedule"] = _no_learning
    if "use_sde" in accepted and data.get("use_sde"):
        kwargs["use_sde"] = True
    kwargs.pop("device", None)
    if "trainable" in accepted:
        kwargs["trainable"] = trainable
    if dtype is not None:
        if "dtype" not in accepted:
            raise ValueError(f"Only a VLA can be read in another dtype; {path} holds a {policy_class.__name__}.")
        kwargs["dtype"] = dtype
    try:
        policy = policy_class(data["observation_space"], data["action_space"], **kwargs)
        policy.load_state_dict(state)
        if getattr(policy, "use_sde", False):
            policy.reset_noise()  # which was drawn before the weights were there
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # damaged attributes raise anything
        raise ValueError(f"{path}: its attributes and weights make no {policy_class.__name__}: {error}") from error
    return policy


def stacked_frames(checkpoint: str | os.PathLike[str], observation_space: spaces.Space, trust: bool = False) -> int:
    """
    How many observations a policy sees at once (``VecFrameStack``), which nothing beside a zip says on the hub: so many
    as make its observations out of the env's, bounds included.

    :param checkpoint: See :func:`opd_gym.checkpoints.resolve_checkpoint`
    :param observation_space: Of the env that it is to act in
    :param trust: Open a zip whatever it holds; code in it runs
    :return: 1 where it sees the env's observations as they are, or where no stack of them fits
    """
    path = resolve_checkpoint(checkpoint)
    if path.is_dir():
        return 1
    own = read_attributes(path, keys=("observation_space",), trust=trust).get("observation_space")
    pair = own, observation_space
    first, found = (space[min(space)] if isinstance(space, spaces.Dict) else space for space in pair)
    if not isinstance(first, spaces.Box) or not isinstance(found, spaces.Box):
        return 1
    n, rest = divmod(math.prod(first.shape), max(math.prod(found.shape), 1))
    if n < 2 or rest:
        return 1
    try:
        stacked = StackedObservations(1, n, observation_space).stacked_observation_space  # type: ignore[arg-type]
    except TypeError:  # a part of it cannot be stacked
        return 1
    return n if (_form(stacked), _bounds(stacked)) == (_form(own), _bounds(own)) else 1


def check_spaces(policy: BasePolicy, env: VecEnv | gym.Env, checkpoint: str | os.PathLike[str]) -> None:
    """
    Refuse an env in which a policy cannot act, or in which its numbers would mean something else. Bounds are not
    compared: they differ by version of an env.

    :param policy: The policy of a checkpoint
    :param env: The env that it is to act in
    :param checkpoint: Where it is from, for the error
    :raises ValueError: They differ in the kind or the shape of actions, or of observations
    """
    pairs = [("acts in", policy.action_space, env.action_space)]
    # A VLA has said what it misses when it was built, and brings other pictures to its own size
    if not getattr(policy, "requires_tokens", False):
        pairs.append(("observes", policy.observation_space, env.observation_space))
    for does, own, found in pairs:
        if _form(own) != _form(found):
            raise ValueError(
                f"{os.fspath(checkpoint)} does not fit the env: its policy {does} {_named(own)}, and the env "
                f"has {_named(found)}. Build the env as it was in training (chunks, wrappers, stacked frames), "
                "or name the env that it was trained in."
            )


def _named(space: spaces.Space) -> str:
    if isinstance(space, spaces.MultiDiscrete) and len(set(space.nvec.flat)) == 1:
        return f"MultiDiscrete({space.nvec.size} times {space.nvec.flat[0]})"
    return str(space)


def _form(space: Any) -> Any:
    if isinstance(space, spaces.Dict):
        return {key: _form(part) for key, part in space.items()}
    if isinstance(space, spaces.Box):
        # Stable-Baselines3 moves the channels of pictures
        return sorted(space.shape) if is_image_space(space) else space.shape
    if isinstance(space, spaces.MultiDiscrete):
        return space.nvec.tolist()
    return getattr(space, "n", None), type(space)


def _bounds(space: Any) -> Any:
    if isinstance(space, spaces.Dict):
        return {key: _bounds(part) for key, part in space.items()}
    return [sorted(bound.ravel()) for bound in (space.low, space.high)] if isinstance(space, spaces.Box) else None


def check_device(device: str | th.device) -> str | th.device:
    """
    :param device: "auto", or a device of PyTorch
    :return: the same
    :raises ValueError: PyTorch does not know it, or there is none of this number
    """
    try:
        found = th.device("cuda" if device == "auto" else device)
    except (RuntimeError, TypeError, OverflowError) as error:
        raise ValueError(f'Unknown device {device!r}: expected "auto", "cpu", "cuda", "cuda:1", ...') from error
    if device != "auto" and found.type == "cuda" and not th.cuda.is_available():
        # Stable-Baselines3 takes the CPU then, and says nothing
        warnings.warn(f"device={device}: PyTorch finds no GPU, so the CPU computes.", stacklevel=2)
    if found.type == "cuda" and 0 < th.cuda.device_count() <= (found.index or 0):
        raise ValueError(f"There is no device {device}: PyTorch finds {th.cuda.device_count()}, counted from 0.")
    return device


class Start(NamedTuple):
    """
    The zip of a model that a policy starts from.

    :param path: Where it is
    :param action_space: What its policy acts in
    :param state: Weights of its policy
    :param trust: Whether code in it, and in files beside it, may run
    """

    path: Path
    action_space: spaces.Space
    state: dict[str, Any]
    trust: bool


def start_from(
    policy_class: type[BasePolicy], policy_kwargs: Mapping[str, Any] | None
) -> tuple[dict[str, Any], Start | None]:
    """
    What a policy is built with whose ``checkpoint`` may be the zip of a model or a run: its own arguments, and the
    weights that are loaded into it. The directory of a VLA checkpoint is the policy's own affair.

    :param policy_class: Class of the policy
    :param policy_kwargs: Its keyword arguments; those beside ``checkpoint`` win over what the zip says. ``trust`` among
        them is for the zip, see :func:`load_policy`
    :return: Keyword arguments, and what is to be loaded, or None
    :raises FileNotFoundError: There is no such checkpoint
    :raises ValueError: It holds another class of policy
    """
    kwargs = dict(policy_kwargs or {})
    trust = bool(kwargs.pop("trust", False))
    checkpoint = kwargs.get("checkpoint")
    is_vla = bool(getattr(policy_class, "requires_tokens", False))
    if checkpoint is None:
        return kwargs, None
    try:
        path = resolve_checkpoint(checkpoint)
    except FileNotFoundError:
        if is_vla and kwargs.get("body_kwargs"):
            # The arguments of a saved VLA, which goes without the checkpoint it once started from
            return kwargs, None
        raise
    if path.is_dir():
        if not is_vla:
            raise ValueError(
                f"{checkpoint} is a VLA checkpoint, which {policy_class.__name__} cannot start from. Use VLAPolicy, or "
                f"the zip of a model with a {policy_class.__name__}."
            )
        return kwargs, None
    data, state = _read_zip(path, trust=trust)
    if not issubclass(data["policy_class"], policy_class):
        raise ValueError(
            f"{path} holds a {data['policy_class'].__name__}, and the policy to train is a {policy_class.__name__}: "
            "they have to be of the same class."
        )
    del kwargs["checkpoint"]
    # The optimizer is the algorithm's affair
    built = {
        name: value for name, value in (data.get("policy_kwargs") or {}).items() if not name.startswith("optimizer")
    }
    return {**built, **kwargs}, Start(path, data["action_space"], state, trust)


def _read_zip(
    path: Path, custom_objects: Mapping[str, Any] | None = None, trust: bool = False
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Attributes of a saved model that its policy is built from, and the state of its policy."""
    # Schedules and last observations are pickles too, of no use to a policy
    data = read_attributes(path, custom_objects, BUILT_FROM, trust)
    policy_class = data.get("policy_class")
    if not (isinstance(policy_class, type) and issubclass(policy_class, BasePolicy)):
        raise ValueError(f"{path} holds no policy: expected the zip that a Stable-Baselines3 model's save() writes.")
    try:
        _, params, _ = load_from_zip_file(path, load_data=False, device="cpu")
    except Exception as error:  # a damaged file raises anything
        raise ValueError(f"{path}: its weights cannot be read ({type(error).__name__}: {error}).") from error
    if "policy" not in params:
        raise ValueError(
            f"{path} holds no weights of a policy. Expected what a Stable-Baselines3 model's save() writes."
        )
    return data, params["policy"]  # type: ignore[return-value]


def read_vec_normalize(path: str | os.PathLike[str], trust: bool = False) -> VecNormalize:
    """
    The statistics that ``VecNormalize.save()`` wrote. No code that the file holds is run.

    :param path: File to read
    :param trust: Open it whatever it holds; code in it runs
    :return: The ``VecNormalize``, without an env
    :raises FileNotFoundError: There is no such file
    :raises ValueError: It holds anything else
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path} with the statistics of a VecNormalize.")
    found = unpickle(path.read_bytes(), path, trust)
    if not isinstance(found, VecNormalize):
        raise ValueError(f"{path}: expected what VecNormalize.save() writes, got {type(found).__name__}.")
    return found


def normalised(env: VecEnv, path: str | os.PathLike[str], trust: bool = False) -> VecNormalize:
    """
    :param env: Vectorised env
    :param path: See :func:`read_vec_normalize`, as for ``trust``
    :return: The env as a model was trained on it, with these statistics, which stay as they are, and its own rewards
    :raises ValueError: They are of observations of another shape
    """
    found = read_vec_normalize(path, trust)
    try:
        found.set_venv(env)
    except AssertionError as error:
        raise ValueError(
            f"{os.fspath(path)} does not fit the env: {error}. It has the statistics of another env's observations."
        ) from error
    found.training = found.norm_reward = False
    return found


def find_vec_normalize(path: Path, env_id: str | None) -> Path | None:
    """
    The statistics that were left beside the zip of a model.

    :param path: The zip
    :param env_id: Id of its env, if known
    :return: What ``CheckpointCallback``, rl-zoo3 or the Hugging Face hub names so; None if there is none
    """
    names = [f"{name}/vecnormalize.pkl" for name in (path.stem, (env_id or path.stem).replace("/", "-"))]
    if match := re.fullmatch(r"(.+)_(\d+)_steps", path.stem):
        names.insert(0, f"{match[1]}_vecnormalize_{match[2]}_steps.pkl")
    if own := next((path.parent / name for name in names if (path.parent / name).is_file()), None):
        return own
    shared = next((path.parent / name for name in SHARED_STATISTICS if (path.parent / name).is_file()), None)
    if shared is not None and len(list(path.parent.glob("*.zip"))) > 1:
        warnings.warn(
            f"{shared} lies beside several models, and is taken for that of {path.name} as well. A model of raw "
            "observations belongs into a folder of its own; a teacher can be given "
            'teacher_kwargs={"vec_normalize": False}.',
            stacklevel=2,
        )
    return shared


def vec_normalize_arguments(found: VecNormalize) -> dict[str, Any]:
    """
    :param found: What :func:`read_vec_normalize` read
    :return: Arguments of a ``VecNormalize`` that is as it was, without its statistics
    """
    names = ("norm_obs", "norm_reward", "clip_obs", "clip_reward", "gamma", "epsilon", "norm_obs_keys")
    return {name: getattr(found, name) for name in names}


def _no_learning(progress_remaining: float) -> float:
    del progress_remaining
    return 0.0
