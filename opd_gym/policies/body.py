"""What a VLA is made of: its configuration, the interface of its body, the bodies that are known, their checkpoints."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch as th
from gymnasium import spaces
from safetensors import SafetensorError, safe_open
from torch import nn

try:
    from transformers import PretrainedConfig, PreTrainedModel
except ImportError as error:
    raise ImportError(f"A VLA needs transformers: pip install 'opd-gym[vla]' ({error})") from error

from opd_gym.checkpoints import CONFIG_FILE, PENDING, whole_checkpoint
from opd_gym.checks import check_at_least
from opd_gym.files import replacing, sync, temporary_beside
from opd_gym.policies.adapters import (
    cast_parameters,
)
from opd_gym.untrusted import read_attributes

WEIGHTS_FILE = "model.safetensors"
# So many layers are built in a moment, and so many noticed without
FEW_LAYERS, MOST_LAYERS = 100, 10_000
# The weights that `save_pretrained` of any body writes
_OWN_WEIGHTS = re.compile(
    r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|proprio_projector--\w+_checkpoint\.pt"
)


def is_weights_file(name: Any) -> bool:
    """
    :param name: what stands for a file of weights in a checkpoint's index
    :return: whether it is the name of one, and no path to somewhere else
    """
    return isinstance(name, str) and name.endswith(".safetensors") and bool(_OWN_WEIGHTS.fullmatch(name))


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


def check_count(name: str, value: Any, least: int = 1) -> None:
    """
    :param name: of a field of a configuration
    :param value: its value
    :param least: smallest value that makes sense
    :raises ValueError: it is not an integer of at least that
    """
    if value is None or (isinstance(value, int) and value >= 2**31):
        raise ValueError(f"{name} must be an integer below 2**31, got {value!r:.80}.")
    check_at_least(least, **{name: value})


@contextmanager
def configuring(path: Path) -> Iterator[None]:
    """
    :param path: configuration that is read in the block; whatever is wrong with it is a ValueError that names it
    """
    try:
        yield
    except FileNotFoundError:  # names the file itself
        raise
    except Exception as error:  # what transformers raises for a wrong type differs by field
        text = str(error) or repr(error)
        named = str(path.parent) in text
        raise ValueError(text if named else f"{path} is not a configuration of a VLA checkpoint: {text}") from error


def read_json(path: Path) -> Any:
    """
    :param path: a file of JSON
    :return: what it holds
    :raises ValueError: it is damaged; names it
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON, or is damaged: {error}") from error


def _most_layers(values: Any) -> float:
    """The largest number of layers that a configuration asks for, in any of its parts."""
    if not isinstance(values, Mapping):
        return 0
    named = (v if isinstance(v, list) else [v] for k, v in values.items() if re.search("layers|depth", str(k)))
    numbers = (number for part in named for number in part if isinstance(number, (int, float)))
    return max([0, *numbers, *map(_most_layers, values.values())])


def read_config(path: Path) -> dict[str, Any]:
    """
    :param path: a ``config.json``
    :return: what it holds
    :raises ValueError: it is damaged, or asks for so many layers that a look at it would take for ever; names it
    """
    values = read_json(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a configuration of a VLA checkpoint: expected a JSON object.")
    if _most_layers(values) > MOST_LAYERS:
        raise ValueError(f"{path} asks for more than {MOST_LAYERS} layers, which no model has.")
    return values


def check_weight(where: str, name: str, value: Any) -> None:
    """
    :param where: what it is a part of, for the message
    :param name: its name
    :param value: what was read
    :raises ValueError: it is no tensor of floating point, or holds NaN or infinite numbers
    """
    if not isinstance(value, th.Tensor) or not value.is_floating_point():
        kind = value.dtype if isinstance(value, th.Tensor) else type(value).__name__
        raise ValueError(f"{where}: {name} is of type {kind}, expected floating point.")
    if value.numel() and not bool(th.isfinite(th.stack(value.aminmax())).all()):
        raise ValueError(f"{where}: {name} is not finite (NaN or infinite).")


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

    if TYPE_CHECKING:  # see VLABody

        def __init_subclass__(cls, *args: Any, **kwargs: Any) -> None: ...

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
        if not isinstance(image_keys, (list, tuple)) or not all(isinstance(key, str) for key in image_keys):
            raise ValueError(f"image_keys must be a list of names, got {image_keys!r}.")
        if not isinstance(image_size, (list, tuple)) or len(image_size) != 2:
            raise ValueError(f"image_size must be a height and a width, got {image_size!r}.")
        for name, value in (("height", image_size[0]), ("width", image_size[1])):
            check_count(f"image_size ({name})", value)
        check_count("instruction_length", instruction_length)
        check_count("proprio_dim", proprio_dim, least=0)
        for name, value in (("n_bins", n_bins), ("n_tokens", n_tokens), ("action_dim", action_dim)):
            check_count(name, value)
        if statistics is not None and not isinstance(statistics, Mapping):
            raise ValueError(f"statistics must be a mapping of arrays or None, got {statistics!r}.")
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

    config_class: type[VLAConfig] = VLAConfig
    config: VLAConfig

    if TYPE_CHECKING:  # transformers' has no types, which `mypy --strict` reports of each subclass

        def __init_subclass__(cls, **kwargs: Any) -> None: ...

    # Names of modules that no pretrained checkpoint brings: LoRA trains them in full
    full_rank_modules: tuple[str, ...] = ()

    def _init_weights(self, module: nn.Module) -> None:
        # Constructors leave weights as they are to be: transformers would draw all of them anew, those of Linear, Conv
        # and Embedding that a constructor has read from a file among them.
        pass

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

    def transformer_layers(self) -> list[nn.Module]:
        """
        The layers that are gathered one at a time where the weights are sharded over several GPUs; what is beside them
        is gathered all at once. A layer's weights must be read by its own ``forward`` alone, and that must be called.

        :return: by default the elements of each outermost ``nn.ModuleList`` whose elements are all of one class
        """
        found: list[nn.Module] = []
        inside: set[nn.Module] = set()
        for module in self.modules():
            if isinstance(module, nn.ModuleList) and module not in inside and len(set(map(type, module))) == 1:
                found += [layer for layer in module if next(layer.parameters(), None) is not None]
                inside.update(module.modules())
        return found

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

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> Any:
        """
        Load a checkpoint whose weights are all there; transformers would make up those that are missing.

        :param pretrained_model_name_or_path: its directory
        :param args: see ``PreTrainedModel.from_pretrained``
        :param kwargs: likewise
        :return: the body
        :raises ValueError: a tensor is missing, unexpected, of another shape, not of floating point or not finite
        """
        directory = whole_checkpoint(Path(pretrained_model_name_or_path))
        stored = read_weight_shapes(directory)
        if isinstance(kwargs.get("config"), VLAConfig):
            wanted = meta_body(cls, kwargs["config"], directory, len(stored)).named_parameters()
            _check_size({name: tuple(value.shape) for name, value in wanted}, directory, stored)
        body: Any
        info: dict[str, Any]
        try:
            body, info = super().from_pretrained(directory, *args, output_loading_info=True, **kwargs)  # type: ignore[misc]
        except Exception as error:  # of torch, of safetensors, or of whatever transformers trips over
            raise ValueError(f"The weights in {directory} do not fit {CONFIG_FILE}: {error}") from error
        # Extra state is what a body stores by other means
        problems = {
            kind: sorted(name for name in map(str, info[f"{kind}_keys"]) if not name.endswith("_extra_state"))
            for kind in ("missing", "unexpected", "mismatched")
        }
        found = [f"{len(names)} {kind} ({', '.join(names[:3])})" for kind, names in problems.items() if names]
        if found:
            raise ValueError(
                f"The weights in {directory} are not those that its {CONFIG_FILE} describes: {'; '.join(found)}."
            )
        for name, value in body.named_parameters():
            check_weight(f"The weights in {directory}", name, value.detach())
        return body

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


def read_checkpoint_config(checkpoint: str | os.PathLike[str], trust: bool = False) -> tuple[str, VLAConfig]:
    """
    Read what a checkpoint was made for, without its weights.

    :param checkpoint: directory with ``config.json`` and ``model.safetensors``, or the zip of an algorithm
    :param trust: open a zip whatever it holds; code in it runs
    :return: name of the body and its configuration
    :raises FileNotFoundError: there is no ``config.json``
    :raises ValueError: it is not a VLA
    """
    path = whole_checkpoint(Path(checkpoint))
    if path.is_file():
        with configuring(path):
            kwargs = _saved_policy_kwargs(path, trust)
            if "body_kwargs" not in kwargs:
                raise ValueError(f"{path} holds a policy that is not a VLA.")
            return kwargs["body"], get_body_class(kwargs["body"]).config_class(**kwargs["body_kwargs"])
    config_path = path / CONFIG_FILE
    if not config_path.is_file():
        raise FileNotFoundError(
            f"{path} is not a VLA checkpoint: {CONFIG_FILE} is missing. Expected a directory with {CONFIG_FILE} and "
            f"{WEIGHTS_FILE}, as VLAPolicy.save_checkpoint() writes it."
        )
    values = read_config(config_path)
    model_type = values.get("model_type")
    for name in _BODIES:
        body_class = get_body_class(name)
        if body_class.config_class.model_type == model_type:
            with configuring(config_path):
                return name, body_class.config_class.from_checkpoint(path, values)
    raise ValueError(
        f"{config_path} is of model type {model_type!r}; known bodies: "
        f"{ {name: get_body_class(name).config_class.model_type for name in _BODIES} }."
    )


def read_weight_shapes(directory: Path, files: Iterable[Path] | None = None) -> dict[str, tuple[int, ...]]:
    """
    Read from the headers of a checkpoint's safetensors files which weights there are, without reading them.

    :param directory: the checkpoint
    :param files: its files of weights; None for all that have the name of one
    :return: shape of each tensor
    :raises ValueError: a file is damaged, or has tensors that are not of floating point
    """
    shapes: dict[str, tuple[int, ...]] = {}
    if files is None:
        files = sorted(path for path in directory.glob("*.safetensors") if _OWN_WEIGHTS.fullmatch(path.name))
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    tensor = file.get_slice(name)
                    if not tensor.get_dtype().startswith(("F", "BF")):
                        raise ValueError(f"{path}: {name} is of type {tensor.get_dtype()}, expected floating point.")
                    shapes[name] = tuple(tensor.get_shape())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is not a file of weights (safetensors), or is damaged: {error}") from error
    return shapes


def meta_body(body_class: type[VLABody], config: VLAConfig, directory: Path, n_stored: int) -> VLABody:
    """
    A body without memory for its weights, before any is taken: a configuration can ask for any amount.

    :param body_class: its class
    :param config: its configuration
    :param directory: where that was read
    :param n_stored: number of tensors that are there
    :return: the body, on the meta device
    :raises ValueError: there are too few weights for the layers, or there is no such body
    """
    where = directory / CONFIG_FILE
    layers = _most_layers(config.to_dict())
    if layers > max(n_stored, FEW_LAYERS):
        raise ValueError(f"{where} asks for {layers} layers, but the weights are only {n_stored} tensors.")
    try:
        with th.device("meta"):
            return body_class(config)
    except Exception as error:  # which type it is depends on the field and on transformers
        raise ValueError(f"{where} describes a model that cannot be built: {error!r}") from error


def _check_size(wanted: Mapping[str, tuple[int, ...]], directory: Path, stored: Mapping[str, tuple[int, ...]]) -> None:
    for name, shape in wanted.items():
        if stored.get(name, shape) != shape:
            raise ValueError(f"{directory}: {name} has the shape {stored[name]}, {CONFIG_FILE} asks for {shape}.")
    n_wanted, n_stored = (sum(math.prod(shape) for shape in shapes.values()) for shapes in (wanted, stored))
    if n_wanted > n_stored:
        missing = sorted(set(wanted) - set(stored))
        raise ValueError(
            f"{directory}: {CONFIG_FILE} asks for {n_wanted:,} weights and there are {n_stored:,}. Missing are "
            f"{', '.join(missing[:3])}."
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


def _saved_policy_kwargs(path: Path, trust: bool) -> dict[str, Any]:
    """Arguments of the policy in the zip of an algorithm; of a VLA ``body`` and ``body_kwargs`` are among them."""
    return read_attributes(path, keys=("policy_kwargs",), trust=trust).get("policy_kwargs") or {}


def finish_save(directory: Path) -> None:
    """
    Put the files of a new checkpoint, which are all in the folder :data:`PENDING`, into the places of older ones. They
    stay in that folder as well until the last one is in its place, see :func:`opd_gym.checkpoints.whole_checkpoint`:
    whenever it is killed, one checkpoint is whole, and this is called again.

    :param directory: of the checkpoint
    """
    pending = directory / PENDING
    if not pending.is_dir():
        return
    # The configuration first: weights without one would be taken for another model's, and not be written over
    written = sorted(pending.iterdir(), key=lambda path: path.name != CONFIG_FILE)
    for path in written:
        with replacing(directory / path.name) as temporary:
            try:
                os.link(path, temporary)
            except OSError:  # a file system without hard links
                shutil.copyfile(path, temporary)
    remove_stale_weights(directory, [path.name for path in written])
    sync(directory)
    done = temporary_beside(pending)
    os.replace(pending, done)
    shutil.rmtree(done, ignore_errors=True)


def remove_stale_weights(directory: Path, written: Iterable[str]) -> None:
    """
    Remove weights of an earlier checkpoint that would be read besides those that replace them; other files stay.

    :param directory: a checkpoint
    :param written: names of its new files
    """
    for path in directory.iterdir():
        if _OWN_WEIGHTS.fullmatch(path.name) and path.name not in written:
            path.unlink()


def check_own_checkpoint(directory: Path) -> None:
    """
    Refuse to write a checkpoint over another model.

    :param directory: where a checkpoint is to be written
    :raises ValueError: it has weights or a configuration that are not of a VLA
    """
    held = sorted(p.name for p in directory.iterdir() if p.name == CONFIG_FILE or _OWN_WEIGHTS.fullmatch(p.name))
    if not held:
        return
    try:
        read_checkpoint_config(directory)
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(
            f"{directory} holds {', '.join(held[:3])} of something else than a VLA checkpoint, which would be "
            f"replaced. Choose an empty directory. ({error})"
        ) from error
