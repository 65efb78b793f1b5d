"""What a VLA is made of: its configuration, the interface of its body, the bodies that are known, their checkpoints."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.save_util import load_from_zip_file
from transformers import PretrainedConfig, PreTrainedModel

from opd_gym.checkpoints import CONFIG_FILE, resolve_checkpoint
from opd_gym.policies.adapters import (
    cast_parameters,
)

WEIGHTS_FILE = "model.safetensors"


def is_image(space: spaces.Space) -> bool:
    return isinstance(space, spaces.Box) and space.dtype == np.uint8 and len(space.shape) == 3


def channels_first(space: spaces.Space) -> bool:
    shape = space.shape
    assert shape is not None
    return shape[0] in (1, 3) and shape[-1] not in (1, 3)


def picture_size(space: spaces.Space) -> tuple[int, int]:
    shape = space.shape
    assert shape is not None
    return (shape[1], shape[2]) if channels_first(space) else (shape[0], shape[1])


class VLAConfig(PretrainedConfig):
    """
    What every VLA body must know of the data that it was built for; a body's own configuration derives from it.

    Every argument has a default because transformers builds empty configurations to compare with. A derived class needs
    an ``__init__`` of its own, or transformers 5 gives it one that does not call this.

    :param image_keys: keys of the cameras in the observation, in the order in which the body sees them
    :param image_size: height and width of the pictures
    :param instruction_length: number of bytes of the instruction (UTF-8, zero padded)
    :param proprio_dim: size of the proprioception vector; 0 if there is none
    :param n_bins: number of bins (tokens) of one action dimension
    :param n_tokens: number of action tokens of one decision, ``chunk_size * action_dim``
    :param action_dim: number of dimensions of one action
    :param statistics: statistics with which actions were normalised before they were binned, as ``ActionTokens`` takes
        them; None if the bins cover the env's own [-1, 1]
    """

    model_type = "opd_gym_vla"

    def __init__(
        self,
        image_keys: list[str] | tuple[str, ...] = ("agentview", "wrist"),
        image_size: list[int] | tuple[int, int] = (64, 64),
        instruction_length: int = 128,
        proprio_dim: int = 9,
        n_bins: int = 256,
        n_tokens: int = 56,
        action_dim: int = 7,
        statistics: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        self.image_keys = list(image_keys)
        self.image_size = list(image_size)
        self.instruction_length = instruction_length
        self.proprio_dim = proprio_dim
        self.n_bins = n_bins
        self.n_tokens = n_tokens
        self.action_dim = action_dim
        self.statistics = None if statistics is None else {k: np.asarray(v).tolist() for k, v in statistics.items()}
        if n_tokens % action_dim != 0:
            raise ValueError(
                f"{n_tokens} action tokens are not a whole number of actions of {action_dim} dimensions. "
                'Pass body_kwargs={"action_dim": ...}.'
            )
        super().__init__(**kwargs)

    @property
    def chunk_size(self) -> int:
        """Number of actions of one decision."""
        return self.n_tokens // self.action_dim

    @property
    def pretrained_model(self) -> str | None:
        """Directory or name of the pretrained model that a new body starts from; None for random weights."""
        return None

    @property
    def base_directory(self) -> Path | None:
        """Where :attr:`pretrained_model` is."""
        return None

    def without_base(self, values: dict[str, Any]) -> dict[str, Any]:
        """
        :param values: arguments of this configuration
        :return: those of a body that is given all its weights, so that it need not find its pretrained model
        """
        return values

    @classmethod
    def from_checkpoint(cls, directory: Path, values: Mapping[str, Any]) -> VLAConfig:
        """
        Configuration of a stored body. Checkpoints of other software may leave unsaid what their files tell.

        :param directory: the checkpoint
        :param values: its ``config.json``
        :return: its configuration
        :raises ValueError: something is missing or wrong
        """
        del directory
        return cls.from_dict(dict(values))

    @classmethod
    def from_spaces(cls, observation_space: spaces.Space, action_space: spaces.Space, **kwargs: Any) -> VLAConfig:
        """
        Configuration of a new body for these spaces.

        :param observation_space: flat Dict with at least one uint8 picture and ``instruction``; ``proprio`` is optional
        :param action_space: ``MultiDiscrete([n_bins] * n_tokens)``
        :param kwargs: anything else of the configuration; wins over what the spaces say
        """
        n_bins, n_tokens = token_space(action_space)
        if not isinstance(observation_space, spaces.Dict):
            raise ValueError(
                "VLAPolicy expects a Dict observation of pictures, `proprio` and `instruction`, "
                f"got {observation_space}. Use MlpPolicy or CnnPolicy here."
            )
        found = observation_space.spaces
        image_keys = [key for key, space in found.items() if is_image(space)]
        if not image_keys or "instruction" not in found:
            raise ValueError(
                "VLAPolicy expects at least one uint8 picture (H, W, 3) and the key `instruction` (UTF-8 bytes, "
                f"zero padded) in the observation, got { {k: str(s) for k, s in found.items()} }."
            )
        sizes = {key: picture_size(found[key]) for key in image_keys}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"All pictures must have the same size, got {sizes}.")
        proprio = found.get("proprio")
        values: dict[str, Any] = dict(
            image_keys=image_keys,
            image_size=sizes[image_keys[0]],
            instruction_length=int(np.prod(found["instruction"].shape or (1,))),
            proprio_dim=0 if proprio is None else int(np.prod(proprio.shape or (1,))),
            n_bins=n_bins,
            n_tokens=n_tokens,
            action_dim=7 if n_tokens % 7 == 0 else n_tokens,
        )
        return cls(**{**values, **kwargs})

    def check_spaces(self, observation_space: spaces.Space, action_space: spaces.Space) -> None:
        """
        Refuse spaces that this configuration was not made for.

        :raises ValueError: names what differs
        """
        n_bins, n_tokens = token_space(action_space)
        problems = []
        if n_bins != self.n_bins:
            problems.append(f"n_bins: policy {self.n_bins}, action space {n_bins}")
        if n_tokens != self.n_tokens:
            problems.append(
                f"action tokens: policy {self.n_tokens} (chunk of {self.chunk_size} actions with {self.action_dim} "
                f"dimensions), action space {n_tokens}"
            )
        if not isinstance(observation_space, spaces.Dict):
            raise ValueError(f"VLAPolicy expects a Dict observation space, got {observation_space}.")
        found = observation_space.spaces
        wanted = [*self.image_keys, "instruction", *(["proprio"] if self.proprio_dim else [])]
        missing = [key for key in wanted if key not in found]
        if missing:
            problems.append(f"observation keys: policy needs {wanted}, the env has {sorted(found)}")
        for key in self.image_keys:
            if key in found and (not is_image(found[key]) or picture_size(found[key]) != tuple(self.image_size)):
                problems.append(f"`{key}`: policy expects uint8 pictures of {tuple(self.image_size)}, got {found[key]}")
        for key, size in (("proprio", self.proprio_dim), ("instruction", self.instruction_length)):
            if size and key in found and int(np.prod(found[key].shape or (1,))) != size:
                problems.append(f"`{key}`: policy expects {size} values, got shape {found[key].shape}")
        if problems:
            raise ValueError(
                "The policy's configuration does not fit the env: " + "; ".join(problems) + ". Build the env with the "
                "policy's image_size, chunk_size and n_bins, or use another checkpoint."
            )


@dataclass
class VLAOutput:
    """
    What a body returns.

    :param logits: ``(B, n_tokens, n_bins)``
    :param hidden: ``(B, hidden_size)``, a summary of the observation for the value head
    """

    logits: th.Tensor
    hidden: th.Tensor


class VLABody(PreTrainedModel):
    """
    Interface of a body: a transformers model whose ``forward`` takes what :meth:`VLAPolicy.body_inputs` gives.

    A new body derives from this class, sets ``config_class`` (a :class:`VLAConfig` with its own ``model_type`` and
    ``hidden_size``), implements ``forward`` and is announced with :func:`register_body`.
    """

    config_class = VLAConfig
    config: VLAConfig

    # Names of modules that no pretrained checkpoint brings: LoRA trains them in full
    full_rank_modules: tuple[str, ...] = ()

    @classmethod
    def create(cls, config: VLAConfig, dtype: th.dtype = th.float32) -> VLABody:
        """
        A body that no checkpoint of this library brings.

        :param config: its configuration
        :param dtype: type of the weights
        :return: a body with random weights, as far as they do not come from a pretrained model
        """
        body = cls(config)
        cast_parameters(body, dtype)
        return body

    @property
    def autoregressive(self) -> bool:
        """
        Whether a token depends on those before it. Then ``forward`` has a further argument ``tokens`` and there is
        :meth:`decode`.
        """
        return False

    def forward(
        self, images: dict[str, th.Tensor], instruction: th.Tensor, proprio: th.Tensor | None = None
    ) -> VLAOutput:
        """
        An autoregressive body also takes ``tokens``, ``(B, n_tokens)``; the logits of each token are those after the
        tokens before it.

        :param images: uint8 ``(B, 3, H, W)`` of each camera; normalising them is the body's business
        :param instruction: uint8 ``(B, N)``, UTF-8 bytes, zero padded
        :param proprio: float ``(B, P)`` or None
        """
        raise NotImplementedError

    def decode(
        self,
        images: dict[str, th.Tensor],
        instruction: th.Tensor,
        proprio: th.Tensor | None = None,
        *,
        choose: Callable[[th.Tensor], th.Tensor],
    ) -> tuple[th.Tensor, VLAOutput]:
        """
        Choose the tokens of an autoregressive body one after the other.

        :param images: see :meth:`forward`, as for ``instruction`` and ``proprio``
        :param choose: logits ``(B, n_bins)`` of the next token to tokens ``(B,)``
        :return: tokens ``(B, n_tokens)``, and what ``forward`` gives for them
        """
        raise NotImplementedError


# Names are resolved on first use, so that a large body costs nothing to those who do not use it.
_BODIES: dict[str, str | type[VLABody]] = {
    "tiny": "opd_gym.policies.tiny:TinyVLAModel",
    "openvla": "opd_gym.policies.openvla:OpenVLAModel",
    "vlm": "opd_gym.policies.vlm:VLMModel",
}


def register_body(name: str, body: str | type[VLABody]) -> None:
    """
    Announce a body, so that ``VLAPolicy(body=name)`` finds it and checkpoints of it can be loaded.

    :param name: its name
    :param body: class, or ``"module:Class"``
    """
    _BODIES[name] = body


def get_body_class(name: str) -> type[VLABody]:
    """
    :param name: name of a registered body
    :return: its class
    """
    if name not in _BODIES:
        raise ValueError(f"Unknown VLA body {name!r}. Known: {sorted(_BODIES)}. Announce others with register_body().")
    body = _BODIES[name]
    if isinstance(body, str):
        module, _, attribute = body.partition(":")
        body = getattr(importlib.import_module(module), attribute)
        _BODIES[name] = body
    return body


def read_checkpoint_config(checkpoint: str | os.PathLike[str]) -> tuple[str, VLAConfig]:
    """
    Read what a checkpoint was made for, without its weights.

    :param checkpoint: directory with ``config.json`` and ``model.safetensors``, or the zip of an algorithm
    :return: name of the body and its configuration
    :raises FileNotFoundError: there is no ``config.json``
    :raises ValueError: it is not a VLA
    """
    path = Path(checkpoint)
    if path.is_file():
        kwargs = _saved_policy_kwargs(path)
        if "body_kwargs" not in kwargs:
            raise ValueError(f"{path} holds a policy that is not a VLA.")
        return kwargs["body"], get_body_class(kwargs["body"]).config_class(**kwargs["body_kwargs"])
    config_path = path / CONFIG_FILE
    if not config_path.is_file():
        raise FileNotFoundError(
            f"{path} is not a VLA checkpoint: {CONFIG_FILE} is missing. Expected a directory with {CONFIG_FILE} and "
            f"{WEIGHTS_FILE}, as VLAPolicy.save_checkpoint() writes it."
        )
    try:
        values = json.loads(config_path.read_text(encoding="utf-8"))
        model_type = values["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{config_path} is not a configuration of a VLA checkpoint: {error!r}.") from error
    for name in _BODIES:
        body_class = get_body_class(name)
        if body_class.config_class.model_type == model_type:
            return name, body_class.config_class.from_checkpoint(path, values)
    raise ValueError(
        f"{config_path} is of model type {model_type!r}; known bodies: "
        f"{ {name: get_body_class(name).config_class.model_type for name in _BODIES} }."
    )


def token_space(action_space: spaces.Space) -> tuple[int, int]:
    if not isinstance(action_space, spaces.MultiDiscrete) or action_space.nvec.ndim != 1:
        raise ValueError(
            f"VLAPolicy expects action tokens, a MultiDiscrete([n_bins] * n_tokens) space, got {action_space}. Wrap "
            "the env in opd_gym.envs.wrappers.ActionTokens (after ActionChunk), or build it with opd_gym.make_vec."
        )
    n_bins = np.unique(action_space.nvec)
    if len(n_bins) != 1:
        raise ValueError(
            f"VLAPolicy expects the same number of bins in every token, got {action_space}. "
            "opd_gym.envs.wrappers.ActionTokens makes such a space."
        )
    return int(n_bins[0]), len(action_space.nvec)


def checkpoint_settings(policy_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """
    What an env must be like for a token policy, as far as that is known before there is an env.

    :param policy_kwargs: Keyword arguments of the policy: its ``checkpoint`` (see ``resolve_checkpoint``), or the
        configuration of its body
    :return: ``chunk_size``, ``n_bins``, ``statistics`` (arguments of ``make_vec``), ``image_size``, ``cameras`` and
        ``visuals`` (of the env), those that are known
    """
    checkpoint = policy_kwargs.get("checkpoint")
    config = policy_kwargs.get("body_kwargs") or {}
    if checkpoint is not None:
        try:
            path = resolve_checkpoint(checkpoint)
            config = (
                read_checkpoint_config(path)[1].to_dict()
                if path.is_dir()
                else _saved_policy_kwargs(path).get("body_kwargs") or {}
            )
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


def _saved_policy_kwargs(path: Path) -> dict[str, Any]:
    """Arguments of the policy in the zip of an algorithm; of a VLA ``body`` and ``body_kwargs`` are among them."""
    data, _, _ = load_from_zip_file(path, device="cpu")
    return (data or {}).get("policy_kwargs") or {}


def remove_stale_weights(directory: Path, written: Iterable[str]) -> None:
    """
    Remove weights that would be read besides those that replace them.

    :param directory: a checkpoint
    :param written: names of its new files
    """
    for pattern in ("*.safetensors", "*.safetensors.index.json", "*_checkpoint.pt"):
        for path in directory.glob(pattern):
            if path.name not in written:
                path.unlink()
