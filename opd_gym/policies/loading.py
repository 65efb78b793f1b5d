"""From a checkpoint to a policy, and from a saved policy to the one that goes on from it."""

from __future__ import annotations

import base64
import inspect
import io
import json
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.save_util import load_from_zip_file

from opd_gym.checkpoints import resolve_checkpoint

# Attributes of a saved model that its policy is built from
BUILT_FROM = ("policy_class", "policy_kwargs", "observation_space", "action_space", "use_sde")


def load_policy(
    checkpoint: str | os.PathLike[str],
    observation_space: spaces.Space,
    action_space: spaces.Space,
    dtype: str | th.dtype | None = None,
    trainable: bool = True,
    custom_objects: Mapping[str, Any] | None = None,
) -> BasePolicy:
    """
    The policy of a checkpoint, on the CPU.

    A zip names the class of its policy, so the class of the algorithm is not needed (nor its replay buffer). Reading a
    zip runs what it holds, as Stable-Baselines3 does: read none from people you do not trust.

    :param checkpoint: See :func:`opd_gym.checkpoints.resolve_checkpoint`
    :param observation_space: What a VLA sees; a zip holds its policy's own spaces
    :param action_space: What a VLA's tokens are for
    :param dtype: Type in which a VLA computes, and of its weights; None: float32, or as it was saved
    :param trainable: False for a VLA without gradients and optimizer
    :param custom_objects: Attributes of a saved model to use instead of those in the zip, as in ``load()``
    :return: The policy
    :raises FileNotFoundError: There is no such checkpoint
    :raises ValueError: It holds no policy, or a VLA that does not fit the spaces
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
            raise ValueError(f"{path} does not fit the env. {error}") from error
    data, state = _read_zip(path, custom_objects)
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
    policy = policy_class(data["observation_space"], data["action_space"], **kwargs)
    policy.load_state_dict(state)
    return policy


def start_from(
    policy_class: type[BasePolicy], policy_kwargs: Mapping[str, Any] | None
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """
    What a policy is built with whose ``checkpoint`` may be the zip of a model or a run: its own arguments, and the
    weights that are loaded into it. The directory of a VLA checkpoint is the policy's own affair.

    :param policy_class: Class of the policy
    :param policy_kwargs: Its keyword arguments; those beside ``checkpoint`` win over what the zip says
    :return: Keyword arguments, and the state of the policy to load, or None
    :raises FileNotFoundError: There is no such checkpoint
    :raises ValueError: It holds another class of policy
    """
    kwargs = dict(policy_kwargs or {})
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
    data, state = _read_zip(path)
    if not issubclass(data["policy_class"], policy_class):
        raise ValueError(
            f"{path} holds a {data['policy_class'].__name__}, and the policy to train is a {policy_class.__name__}: "
            "they have to be of the same class."
        )
    del kwargs["checkpoint"]
    return {**(data.get("policy_kwargs") or {}), **kwargs}, state


class _Unpickler(pickle.Unpickler):
    """Reads spaces of the old ``gym`` as Gymnasium's, which takes their states."""

    def find_class(self, module: str, name: str) -> Any:
        return super().find_class(f"gymnasium{module[3:]}" if module.split(".")[0] == "gym" else module, name)


def _unpickle(path: Path, key: str, serialized: str) -> Any:
    try:
        return _Unpickler(io.BytesIO(base64.b64decode(serialized))).load()
    except Exception as error:  # a pickle of other versions fails in any way
        raise ValueError(
            f"{path}: its {key} cannot be read ({type(error).__name__}: {error}); it was saved with other versions of "
            f"Python, gym or Stable-Baselines3. Pass it yourself: custom_objects={{{key!r}: ...}} (for a teacher, in "
            "teacher_kwargs)."
        ) from error


def _read_zip(path: Path, custom_objects: Mapping[str, Any] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Attributes of a saved model that its policy is built from, and the state of its policy."""
    given = dict(custom_objects or {})
    try:
        with zipfile.ZipFile(path) as archive:
            saved = json.loads(archive.read("data")) if "data" in archive.namelist() else {}
    except (zipfile.BadZipFile, ValueError) as error:
        raise ValueError(
            f"{path} is not the zip of a Stable-Baselines3 model (as model.save() writes it): {error}"
        ) from error
    for key, value in saved.items():
        if key not in given and isinstance(value, dict) and ":serialized:" in value:
            # Schedules and last observations are pickles too, of no use to a policy
            given[key] = _unpickle(path, key, value[":serialized:"]) if key in BUILT_FROM else None
    try:
        data, params, _ = load_from_zip_file(path, device="cpu", custom_objects=given)
    except ValueError as error:
        raise ValueError(
            f"{path} is not the zip of a Stable-Baselines3 model (as model.save() writes it): {error}"
        ) from error
    if data is None or "policy_class" not in data or "policy" not in params:
        raise ValueError(f"{path} holds no policy: expected the zip that a Stable-Baselines3 model's save() writes.")
    return data, params["policy"]  # type: ignore[return-value]


# How NumPy's arrays, their types and single numbers are rebuilt
_NUMPY = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
}


class _Inert:
    """Stands in for whatever else a pickle holds: it keeps its state and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def extend(self, values: Any) -> None:
        pass

    append = add = extend


class _InertUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _NUMPY:
            return super().find_class(module, name)
        if name == "_frombuffer":
            return lambda buffer, dtype, shape, order: np.frombuffer(buffer, dtype).reshape(shape, order=order)
        # One of its own for each, as a pickle may set state on a class
        return type("Inert", (_Inert,), {})


def read_vec_normalize(path: str | os.PathLike[str]) -> Any:
    """
    The statistics that ``VecNormalize.save()`` wrote. Nothing that the file holds is run.

    :param path: File to read
    :return: An object with the attributes of the ``VecNormalize``, and none of its methods
    :raises FileNotFoundError: There is no such file
    :raises ValueError: It holds anything else
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path} with the statistics of a VecNormalize.")
    try:
        found = _InertUnpickler(io.BytesIO(path.read_bytes())).load()
    except Exception as error:  # a damaged pickle raises anything
        raise ValueError(f"{path} cannot be read as a VecNormalize ({type(error).__name__}: {error}).") from error
    if not all(hasattr(found, name) for name in ("norm_obs", "clip_obs", "epsilon")):
        raise ValueError(f"{path}: expected what VecNormalize.save() writes, got something else.")
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
    candidates = (path.parent / name for name in (*names, "vec_normalize.pkl", "vecnormalize.pkl"))
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def _no_learning(progress_remaining: float) -> float:
    del progress_remaining
    return 0.0
