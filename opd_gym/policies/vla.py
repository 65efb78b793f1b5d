"""Vision-language-action policies: pictures, instruction and proprioception in, one distribution per token out."""

from __future__ import annotations

import copy
import importlib
import inspect
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch as th
from gymnasium import spaces
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from opd_gym.policies.adapters import (
    DTYPES,
    TrainedState,
    add_lora,
    cast_parameters,
    check_dtype,
    check_lora,
    enable_gradient_checkpointing,
    merged,
)
from opd_gym.tokens import TokenDistribution, token_view

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
HUB_FILES = ["*.json", "*.jinja", "*.txt", "tokenizer.model", "*.safetensors", "*checkpoint.pt"]


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    # Those of transformers would tear the progress bar of `learn`.
    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()


def _is_image(space: spaces.Space) -> bool:
    return isinstance(space, spaces.Box) and space.dtype == np.uint8 and len(space.shape) == 3


def _channels_first(space: spaces.Space) -> bool:
    shape = space.shape
    assert shape is not None
    return shape[0] in (1, 3) and shape[-1] not in (1, 3)


def _image_size(space: spaces.Space) -> tuple[int, int]:
    shape = space.shape
    assert shape is not None
    return (shape[1], shape[2]) if _channels_first(space) else (shape[0], shape[1])


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
        n_bins, n_tokens = _token_space(action_space)
        if not isinstance(observation_space, spaces.Dict):
            raise ValueError(
                "VLAPolicy expects a Dict observation of pictures, `proprio` and `instruction`, "
                f"got {observation_space}. Use MlpPolicy or CnnPolicy here."
            )
        found = observation_space.spaces
        image_keys = [key for key, space in found.items() if _is_image(space)]
        if not image_keys or "instruction" not in found:
            raise ValueError(
                "VLAPolicy expects at least one uint8 picture (H, W, 3) and the key `instruction` (UTF-8 bytes, "
                f"zero padded) in the observation, got { {k: str(s) for k, s in found.items()} }."
            )
        sizes = {key: _image_size(found[key]) for key in image_keys}
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
        n_bins, n_tokens = _token_space(action_space)
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
            if key in found and (not _is_image(found[key]) or _image_size(found[key]) != tuple(self.image_size)):
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

    :param checkpoint: directory with ``config.json`` and ``model.safetensors``
    :return: name of the body and its configuration
    """
    path = Path(checkpoint)
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


def locate_checkpoint(checkpoint: str | os.PathLike[str]) -> Path | None:
    """
    :param checkpoint: directory of a VLA checkpoint, the name of one of the zoo, or the id of one on the Hugging Face
        hub (``owner/name``), which is downloaded into the hub's cache
    :return: the directory; None if there is none
    :raises FileNotFoundError: it has the form of an id, and the hub does not give it
    """
    # Here, because the zoo's command line imports the policies
    from opd_gym.checkpoints import find_checkpoint

    path = Path(checkpoint).expanduser()
    found = path if path.exists() else find_checkpoint(os.fspath(checkpoint))
    if found is None and isinstance(checkpoint, str) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", checkpoint):
        return download_checkpoint(checkpoint)
    return found


def download_checkpoint(hub_id: str) -> Path:
    """
    :param hub_id: ``owner/name`` on the Hugging Face hub
    :return: the directory in the hub's cache; what is there already is not downloaded again
    :raises FileNotFoundError: it is not there, or the hub cannot be reached
    """
    try:
        return Path(snapshot_download(hub_id, allow_patterns=HUB_FILES))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        reason = next(iter(str(error).splitlines()), "")
        raise FileNotFoundError(
            f"{hub_id!r} is neither a directory nor a name of the zoo, and the Hugging Face hub does not give it "
            f"({type(error).__name__}: {reason}). Without a network: run `hf download {hub_id}` on a machine that has "
            "one, copy the directory that it prints, and pass its path as the checkpoint."
        ) from error


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


def _token_space(action_space: spaces.Space) -> tuple[int, int]:
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


class VLAPolicy(ActorCriticPolicy):
    """
    Actor-critic policy around a vision-language-action model with discrete action tokens.

    It takes raw observations (uint8 pictures, instruction bytes, proprioception), so none of Stable-Baselines3's
    preprocessing and feature extractors is used. All tokens of a decision are predicted in parallel, or, if the body is
    autoregressive, one after the other; then distributions are those of given actions.

    :param observation_space: flat Dict: uint8 pictures, ``instruction`` (bytes) and, optionally, ``proprio``
    :param action_space: ``MultiDiscrete([n_bins] * n_tokens)``, as ``ActionTokens`` makes it
    :param lr_schedule: learning rate schedule
    :param body: name of a registered body (see :func:`register_body`); a checkpoint names its own
    :param body_kwargs: configuration of a new body; a checkpoint brings its own
    :param checkpoint: what to start from: a directory that :meth:`save_checkpoint` wrote, the name of a checkpoint of
        the zoo, or a published OpenVLA checkpoint, its directory or its id on the Hugging Face hub (``owner/name``)
    :param temperature: divides the logits, when sampling and in log-probabilities
    :param value_head: learn a value function on the body's summary; without it values are zero
    :param lora: True, or arguments of ``peft.LoraConfig`` such as ``dict(r=32)``: freeze the body and train low-rank
        adapters of its linear layers. The base is a checkpoint that stays where it is: ``save()`` stores the adapters
        and a reference to it
    :param gradient_checkpointing: compute each layer a second time in the backward pass instead of storing its insides
    :param dtype: "bfloat16" or "float32": type in which the body computes and of the weights that are not trained;
        those that are trained are float32
    :param trainable: False for a policy that only acts or teaches: no weight is trained, and there is no optimizer
    :param optimizer_class: the optimizer
    :param optimizer_kwargs: keyword arguments of the optimizer, other than the learning rate
    :param sb3_kwargs: other arguments of ``ActorCriticPolicy``; those about feature extractors and MLPs have no effect
    """

    # The action space must consist of tokens: whoever builds an env for this policy adds ActionTokens.
    requires_tokens: ClassVar[bool] = True

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        lr_schedule: Schedule,
        body: str = "tiny",
        body_kwargs: dict[str, Any] | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        temperature: float = 1.0,
        value_head: bool = False,
        lora: bool | Mapping[str, Any] | None = None,
        gradient_checkpointing: bool = False,
        dtype: str | th.dtype = "float32",
        trainable: bool = True,
        optimizer_class: type[th.optim.Optimizer] = th.optim.AdamW,
        optimizer_kwargs: dict[str, Any] | None = None,
        **sb3_kwargs: Any,
    ):
        _token_space(action_space)
        if not temperature > 0.0:
            raise ValueError(
                f"temperature must be positive, got {temperature}. For greedy actions: deterministic=True."
            )
        if sb3_kwargs.pop("use_sde", False):
            raise ValueError("State-dependent exploration (use_sde) is for continuous actions; VLAPolicy has tokens.")
        self._lora = check_lora(lora)
        self._gradient_checkpointing = bool(gradient_checkpointing)
        self._dtype = check_dtype(dtype)
        self._trainable = bool(trainable)
        self._trained_state: TrainedState | None = None
        self._checkpoint: Path | None = None
        self._reference = checkpoint
        if checkpoint is not None:
            try:
                directory = locate_checkpoint(checkpoint)
            except FileNotFoundError:
                if body_kwargs is None:
                    raise
                directory = None
            if directory is None and body_kwargs is not None and self._lora is not None:
                raise FileNotFoundError(
                    f"The base checkpoint of these LoRA adapters is gone: {checkpoint}. Put it back there, or load "
                    'with custom_objects={"policy_kwargs": {...}} and its new place as "checkpoint".'
                )
            if directory is not None or body_kwargs is None:
                self._checkpoint = directory or Path(checkpoint).expanduser()
                body, self._config = read_checkpoint_config(self._checkpoint)
            else:
                # A saved algorithm brings its weights along and must load where the original checkpoint is gone.
                warnings.warn(f"{checkpoint} does not exist: the body starts from random weights.", stacklevel=2)
        if self._checkpoint is None:
            config_class = get_body_class(body).config_class
            self._config = config_class.from_spaces(observation_space, action_space, **(body_kwargs or {}))
        self._config.check_spaces(observation_space, action_space)
        if self._lora is not None and self._base_directory() is None:
            raise ValueError(
                "LoRA adapts pretrained weights: pass checkpoint=... (or train all weights of a new body: lora=None)."
            )
        self._body_name = body
        self._temperature = float(temperature)
        self._has_value_head = bool(value_head)
        if optimizer_class in (th.optim.Adam, th.optim.AdamW):
            # One pass over each parameter instead of ten: on a CPU a tenth of the training step.
            optimizer_kwargs = {"fused": True, **(optimizer_kwargs or {})}
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
            **sb3_kwargs,
        )

    def _build(self, lr_schedule: Schedule) -> None:
        """
        Create the body, the value head and the optimizer.

        :param lr_schedule: learning rate schedule
        """
        body_class = get_body_class(self._body_name)
        # Weights may be stored in half precision; they are trained in single.
        frozen = self._lora is not None or not self._trainable
        dtype = DTYPES[self._dtype] if frozen else th.float32
        if self._checkpoint is not None:
            if not (self._checkpoint / WEIGHTS_FILE).is_file() and not list(self._checkpoint.glob("*.safetensors")):
                raise FileNotFoundError(f"{self._checkpoint} has no {WEIGHTS_FILE}: the checkpoint is incomplete.")
            with _no_progress_bars():
                self.body = body_class.from_pretrained(
                    self._checkpoint, config=self._config, local_files_only=True, dtype=dtype
                )
        else:
            with _no_progress_bars():
                self.body = body_class.create(self._config, dtype)
        if self._lora is not None:
            add_lora(self.body, self._lora)
        if self._gradient_checkpointing:
            enable_gradient_checkpointing(self.body)
        self.value_net: nn.Linear | None = None  # type: ignore[assignment]
        if self._has_value_head:
            self.value_net = nn.Linear(self._config.hidden_size, 1)
            # Values start at zero: the first advantages are those of a policy without a critic.
            nn.init.zeros_(self.value_net.weight)
            nn.init.zeros_(self.value_net.bias)
        trained = {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}
        base = self._base_directory()
        if self._lora is not None and base is not None:
            self._trained_state = TrainedState(trained, base)
        if self._trainable:
            self.optimizer = self.optimizer_class(trained.values(), lr=lr_schedule(1), **self.optimizer_kwargs)  # type: ignore[call-arg]
        else:
            self.requires_grad_(False)
            self.optimizer = None  # type: ignore[assignment]

    def _base_directory(self) -> Path | None:
        # Where the weights are that this policy starts from
        return self._checkpoint or self._config.base_directory

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The state; of a policy with LoRA what it has trained, and which checkpoint the rest is in."""
        state = super().state_dict(*args, **kwargs)
        return state if self._trained_state is None else self._trained_state.extract(state)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """
        :param state_dict: what :meth:`state_dict` gave
        :param strict: whether a missing or unknown key is an error
        :param assign: see ``torch.nn.Module.load_state_dict``
        """
        if self._trained_state is not None:
            state_dict = self._trained_state.complete(state_dict, super().state_dict())
        return super().load_state_dict(state_dict, strict, assign)

    @property
    def config(self) -> VLAConfig:
        """Configuration of the body: bins, tokens, cameras, statistics."""
        return self._config

    @property
    def statistics(self) -> dict[str, Any] | None:
        """Un-normalisation statistics of the action tokens, None if the bins cover the env's own [-1, 1]."""
        return self._config.statistics

    @property
    def temperature(self) -> float:
        """Divides the logits when sampling and in log-probabilities; greedy actions do not depend on it."""
        return self._temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        if not value > 0.0:
            raise ValueError(f"temperature must be positive, got {value}.")
        self._temperature = float(value)

    @property
    def lora(self) -> dict[str, Any] | None:
        """Arguments of the LoRA adapters; None if there are none."""
        return self._lora

    @property
    def base_model(self) -> str | None:
        """Directory or name of what this policy started from, as far as it is known; None for random weights."""
        reference = self._config.pretrained_model if self._reference is None else self._reference
        return None if reference is None else os.fspath(reference)

    def portable_kwargs(self) -> dict[str, Any]:
        """
        Keyword arguments that rebuild this policy: with random weights and without its original checkpoint or, with
        LoRA, from the checkpoint that it adapts.

        :return: for ``policy_kwargs`` of an algorithm that is to be saved
        """
        return dict(
            body=self._body_name,
            body_kwargs=self._body_kwargs(),
            checkpoint=None if self._lora is None else self._portable_reference(),
            temperature=self._temperature,
            value_head=self._has_value_head,
            lora=self._lora,
            gradient_checkpointing=self._gradient_checkpointing,
            dtype=self._dtype,
            trainable=self._trainable,
            optimizer_class=self.optimizer_class,
            optimizer_kwargs=dict(self.optimizer_kwargs),
        )

    def _portable_reference(self) -> str | None:
        # A directory by its absolute path; the name of the zoo or of the hub means the same everywhere
        if self._reference is None:
            return None
        path = Path(self._reference).expanduser()
        return str(path.absolute()) if path.exists() else os.fspath(self._reference)

    def _body_kwargs(self) -> dict[str, Any]:
        # What the configuration's classes take, without what transformers adds for itself.
        accepted: set[str] = set()
        for config_class in type(self._config).__mro__:
            if issubclass(config_class, VLAConfig):
                accepted.update(inspect.signature(config_class.__init__).parameters)
        values = {key: value for key, value in self._config.to_dict().items() if key in accepted}
        return values if self._lora is not None else self._config.without_base(values)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return dict(
            observation_space=self.observation_space,
            action_space=self.action_space,
            lr_schedule=self._dummy_schedule,
            **self.portable_kwargs(),
        )

    def save_checkpoint(
        self, directory: str | os.PathLike[str], dtype: th.dtype | None = None, merge: bool = True
    ) -> None:
        """
        Write ``config.json`` and ``model.safetensors``; an interrupted write leaves the old files untouched.

        :param directory: created if needed; ``VLAPolicy(..., checkpoint=directory)`` reads it
        :param dtype: type in which the weights are stored, for instance ``torch.float16``; None for their own
        :param merge: add LoRA adapters to the weights that they adapt
        :raises ValueError: there are adapters, and they are not to be merged: a plain checkpoint has no place for them
        """
        if self._lora is not None and not merge:
            raise ValueError(
                "A checkpoint has no place for LoRA adapters: merge=True adds them to the weights; save() stores them "
                "apart, with a reference to the checkpoint that they adapt."
            )
        directory = Path(directory).expanduser()
        directory.mkdir(parents=True, exist_ok=True)
        # Beside the target, because os.replace must not cross file systems.
        temporary = directory / f".tmp-{os.getpid()}"
        try:
            with _no_progress_bars(), merged(self.body) as body:
                body = body if dtype is None else copy.deepcopy(body).to(dtype=dtype)  # type: ignore[call-arg,arg-type]
                body.save_pretrained(temporary)
            written = sorted(temporary.iterdir(), key=lambda path: path.name == CONFIG_FILE)
            for path in written:
                if path.name == CONFIG_FILE:
                    remove_stale_weights(directory, [path.name for path in written])
                path.chmod(0o644)  # safetensors writes files that only their owner can read
                os.replace(path, directory / path.name)
        finally:
            if temporary.exists():
                for path in temporary.iterdir():
                    path.unlink()
                temporary.rmdir()

    def body_inputs(self, obs: PyTorchObs) -> dict[str, Any]:
        """
        Raw observation to the arguments of the body.

        :param obs: dict of tensors as they come from the env, pictures (B, H, W, 3) or (B, 3, H, W)
        :return: ``images``, ``instruction``, ``proprio``
        """
        assert isinstance(obs, Mapping) and isinstance(self.observation_space, spaces.Dict)
        images = {}
        for key in self._config.image_keys:
            image = obs[key]
            # A view: the strides of a transposed HWC picture are what "channels last" convolutions want.
            images[key] = image if _channels_first(self.observation_space[key]) else image.permute(0, 3, 1, 2)
        proprio = obs["proprio"].float().flatten(1) if self._config.proprio_dim else None
        return {"images": images, "instruction": obs["instruction"].flatten(1), "proprio": proprio}

    @property
    def autoregressive(self) -> bool:
        """Whether a token depends on those before it, so that distributions are those of given actions."""
        return self.body.autoregressive

    def _precision(self) -> Any:
        dtype = DTYPES[self._dtype]
        return th.autocast(self.device.type, dtype=dtype, enabled=dtype != th.float32)

    def _distribution(self, logits: th.Tensor) -> TokenDistribution:
        logits = logits.float()
        if not bool(th.isfinite(logits).all()):
            raise FloatingPointError(
                "The policy's logits are not finite (NaN or infinite): the training has diverged or the checkpoint is "
                "broken. Lower learning_rate or max_grad_norm and go on from the last good checkpoint."
            )
        return TokenDistribution(logits / self._temperature if self._temperature != 1.0 else logits)

    def _values(self, output: VLAOutput) -> th.Tensor:
        if self.value_net is None:
            return th.zeros(len(output.logits), 1, device=output.logits.device)
        return self.value_net(output.hidden.float())

    def distribution_and_values(
        self, obs: PyTorchObs, actions: th.Tensor | None = None
    ) -> tuple[TokenDistribution, th.Tensor]:
        """
        One pass through the body for both.

        :param obs: observation
        :param actions: tokens ``(B, n_tokens)``, which an autoregressive body needs: the distribution of each token is
            the one after the tokens before it
        :return: distribution of each action token and values ``(B, 1)``
        """
        inputs = self.body_inputs(obs)
        if self.autoregressive:
            if actions is None:
                raise ValueError(
                    "This policy is autoregressive: the distribution of a token depends on the tokens before it. Pass "
                    "the actions, or sample with forward() or predict()."
                )
            inputs["tokens"] = actions
        with self._precision():
            output = self.body(**inputs)
        return self._distribution(output.logits), self._values(output)

    def decode(
        self, obs: PyTorchObs, temperature: float = 1.0, deterministic: bool = False
    ) -> tuple[th.Tensor, TokenDistribution, th.Tensor]:
        """
        Choose the tokens of a decision, in parallel or one after the other, in one pass over the observation.

        :param obs: observation
        :param temperature: divides the logits once more when sampling
        :param deterministic: most likely token instead of a sample
        :return: tokens ``(B, n_tokens)``, the distribution of each (of an autoregressive body: after the tokens before
            it; without ``temperature``), values ``(B, 1)``
        """

        def choose(distribution: TokenDistribution) -> th.Tensor:
            if deterministic or temperature == 1.0:
                return distribution.get_actions(deterministic=deterministic)
            return token_view(distribution).temper(temperature).sample()

        if not self.autoregressive:
            distribution, values = self.distribution_and_values(obs)
            return choose(distribution), distribution, values
        with self._precision():
            actions, output = self.body.decode(
                **self.body_inputs(obs), choose=lambda logits: choose(self._distribution(logits[:, None]))[:, 0]
            )
        return actions, self._distribution(output.logits), self._values(output)

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> tuple[th.Tensor, th.Tensor, th.Tensor]:  # type: ignore[override]
        """
        :param obs: observation
        :param deterministic: most likely token instead of a sample
        :return: tokens ``(B, n_tokens)``, values ``(B, 1)``, log-probability ``(B,)`` of the whole decision
        """
        actions, distribution, values = self.decode(obs, deterministic=deterministic)
        return actions, values, distribution.log_prob(actions)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        return self.forward(observation, deterministic)[0]

    def get_distribution(self, obs: PyTorchObs, actions: th.Tensor | None = None) -> TokenDistribution:  # type: ignore[override]
        """
        :param obs: observation
        :param actions: see :meth:`distribution_and_values`
        :return: distribution of each action token
        """
        return self.distribution_and_values(obs, actions)[0]

    def evaluate_actions(  # type: ignore[override]
        self, obs: PyTorchObs, actions: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        """
        :param obs: observation
        :param actions: tokens ``(B, n_tokens)``
        :return: values ``(B, 1)``, log-probability ``(B,)`` and entropy ``(B,)`` of the whole decision
        """
        distribution, values = self.distribution_and_values(obs, actions)
        return values, distribution.log_prob(actions), distribution.entropy()

    def token_log_probs(self, obs: PyTorchObs, actions: th.Tensor) -> th.Tensor:
        """
        :param obs: observation
        :param actions: tokens ``(B, n_tokens)``
        :return: log-probability of each token, ``(B, n_tokens)``
        """
        return self.get_distribution(obs, actions).token_log_prob(actions)

    def predict_values(self, obs: PyTorchObs) -> th.Tensor:
        """
        :param obs: observation
        :return: values ``(B, 1)``; zeros without a value head, so that nothing is bootstrapped from an untrained critic
        """
        batch = len(next(iter(obs.values())))  # type: ignore[union-attr]
        if self.value_net is None:
            return th.zeros(batch, 1, device=self.device)
        # The summary is made before the first token: any tokens will do
        tokens = th.zeros(batch, self._config.n_tokens, dtype=th.long, device=self.device)
        return self.distribution_and_values(obs, tokens)[1]

    def extract_features(self, *args: Any, **kwargs: Any) -> Any:
        """Not available: the body reads raw observations."""
        raise NotImplementedError("VLAPolicy reads raw observations; it has no feature extractor.")


def checkpoint_settings(policy_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """
    What an env must be like for a token policy, as far as that is known before there is an env.

    :param policy_kwargs: Keyword arguments of the policy: its ``checkpoint``, or the configuration of its body
    :return: ``chunk_size``, ``n_bins``, ``statistics`` (arguments of ``make_vec``), ``image_size``, ``cameras`` and
        ``visuals`` (of the env), those that are known
    """
    checkpoint = policy_kwargs.get("checkpoint")
    config = policy_kwargs.get("body_kwargs") or {}
    if checkpoint is not None:
        directory = locate_checkpoint(checkpoint)
        if directory is not None:
            config = read_checkpoint_config(directory)[1].to_dict()
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
