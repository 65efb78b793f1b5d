"""Large bodies: low-rank adapters, half precision, gradient checkpointing; saving what was trained without the rest."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch as th
from torch import nn

from opd_gym.checks import check_at_least_one, check_range

if TYPE_CHECKING:
    from opd_gym.policies.body import VLABody

DTYPES = {"float32": th.float32, "bfloat16": th.bfloat16}

# As OpenVLA and OpenVLA-OFT are fine-tuned: every linear layer but the output embedding, alpha of at most 16
LORA_DEFAULTS: dict[str, Any] = {
    "r": 32,
    "lora_dropout": 0.0,
    "target_modules": "all-linear",
    "init_lora_weights": "gaussian",
}
LORA_OPTIONS = {
    *LORA_DEFAULTS,
    "lora_alpha",
    "exclude_modules",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
}

# Where a saved policy says which checkpoint its adapters belong to
FINGERPRINT = "base_checkpoint"
_BLOCK = 2**16
_BLOCKS = 64


# ---------------------------------------------------------------------------------------------------------------------
# Arguments


def check_dtype(dtype: str | th.dtype) -> str:
    """
    :param dtype: a type of torch, or its name
    :return: its name
    :raises ValueError: not a type that policies can have here
    """
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(
            f"dtype must be one of {list(DTYPES)}, got {name!r}. (float16 needs a scaled loss; bfloat16 does not.)"
        )
    return name


def check_lora(lora: bool | Mapping[str, Any] | None) -> dict[str, Any] | None:
    """
    :param lora: True for the defaults, or arguments of ``peft.LoraConfig``; None or False for no adapters
    :return: all arguments; None for no adapters
    :raises ValueError: unknown argument, or one that would change the frozen weights
    :raises ImportError: peft is not installed
    """
    if lora is None or lora is False:
        return None
    if lora is not True and not isinstance(lora, Mapping):
        raise ValueError(f"lora must be True or arguments such as dict(r=32), got {lora!r}.")
    given = {} if lora is True else dict(lora)
    unknown = sorted(set(given) - LORA_OPTIONS)
    if unknown:
        raise ValueError(f"Unknown arguments of lora: {unknown}; known are {sorted(LORA_OPTIONS)}.")
    values = {**LORA_DEFAULTS, **given}
    check_at_least_one(**{"The rank r of lora": values["r"]})
    check_range("[0, 1)", lora_dropout=values["lora_dropout"])
    if values["init_lora_weights"] not in (True, "gaussian", "orthogonal"):
        raise ValueError(
            'init_lora_weights must be True, "gaussian" or "orthogonal": others change the frozen weights, which are '
            f"read again from their checkpoint. Got {values['init_lora_weights']!r}."
        )
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ImportError("LoRA needs the library peft: pip install 'opd_gym[vla]'.") from error
    values.setdefault("lora_alpha", min(values["r"], 16))
    return values


# ---------------------------------------------------------------------------------------------------------------------
# Preparing a body


def cast_parameters(module: nn.Module, dtype: th.dtype) -> None:
    """
    Cast parameters and leave buffers alone: rotary frequencies in half precision are wrong frequencies.

    :param module: changed in place
    :param dtype: type of the parameters
    """
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)


def linear_layers(body: VLABody) -> list[str]:
    """
    :param body: a body
    :return: names of its linear layers, without output embeddings and without those that are trained in full
    """
    from transformers import PreTrainedModel

    heads = {body.get_submodule(name) for name in body.full_rank_modules}
    for module in body.modules():
        if isinstance(module, PreTrainedModel):
            heads.add(module.get_output_embeddings())
    excluded = {child for head in heads if head is not None for child in head.modules()}
    return [name for name, m in body.named_modules() if isinstance(m, nn.Linear) and m not in excluded]


def add_lora(body: VLABody, lora: dict[str, Any]) -> None:
    """
    Freeze a body and put trainable low-rank adapters beside its linear layers. Adapters, and what the body trains in
    full (``VLABody.full_rank_modules``), are float32.

    :param body: changed in place
    :param lora: what :func:`check_lora` returned
    :raises ValueError: ``target_modules`` names no layer
    """
    from peft import LoraConfig, inject_adapter_in_model

    kwargs = dict(lora)
    if kwargs["target_modules"] == "all-linear":
        kwargs["target_modules"] = linear_layers(body)
    body.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(**kwargs), body)
    for module in body.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            # autocast takes care of types; a cast to single precision would be a further copy for each adapter
            module.cast_input_dtype_enabled = False  # type: ignore[assignment]
    for name in body.full_rank_modules:
        body.get_submodule(name).requires_grad_(True)
    for parameter in body.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def enable_gradient_checkpointing(body: VLABody) -> None:
    """
    Keep only the inputs of each layer for the backward pass, and compute the layer a second time there.

    :param body: changed in place
    :raises ValueError: the body does not support it
    """
    if not body.supports_gradient_checkpointing:
        raise ValueError(
            f"{type(body).__name__} has no gradient checkpointing. Use gradient_checkpointing=False and, if memory is "
            "short, a smaller micro_batch_size."
        )
    # The name of the method since transformers 5.21
    if hasattr(body, "activation_checkpointing_enable"):
        body.activation_checkpointing_enable({"use_reentrant": False})
    else:
        body.gradient_checkpointing_enable({"use_reentrant": False})


# ---------------------------------------------------------------------------------------------------------------------
# Saving


def fingerprint(directory: Path) -> str:
    """
    Tell the weights of one checkpoint from those of another without reading all of them: by the names and sizes of the
    files, and samples from all over them. The path does not matter.

    :param directory: the checkpoint
    :return: 64 hexadecimal digits
    """
    digest = hashlib.sha256()
    patterns = ("[!.]*.safetensors", "[!.]*.pt", "[!.]*.bin")
    for path in sorted(path for pattern in patterns for path in directory.glob(pattern)):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for offset in np.unique(np.linspace(0, max(size - _BLOCK, 0), _BLOCKS).astype(np.int64)):
                file.seek(int(offset))
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()


class TrainedState:
    """
    The part of a policy's state that was trained, with the fingerprint of the checkpoint that holds the rest.

    :param names: names of the trained tensors in the policy's state
    :param directory: the checkpoint
    """

    def __init__(self, names: Iterable[str], directory: Path):
        self.names = frozenset(names)
        self.directory = directory
        self.fingerprint = fingerprint(directory)

    def extract(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """
        :param state: whole state of the policy
        :return: what is to be saved
        """
        digest = th.as_tensor(np.frombuffer(bytes.fromhex(self.fingerprint), dtype=np.uint8).copy())
        return {**{name: value for name, value in state.items() if name in self.names}, FINGERPRINT: digest}

    def complete(self, saved: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
        """
        :param saved: what :meth:`extract` gave
        :param state: whole present state of the policy, which has the frozen weights
        :return: a whole state
        :raises ValueError: the adapters were trained on another checkpoint
        """
        saved = dict(saved)
        digest = saved.pop(FINGERPRINT, None)
        if digest is None or bytes(digest.cpu().numpy()).hex() != self.fingerprint:
            raise ValueError(
                f"These LoRA adapters were trained on other weights than those in {self.directory}: the checkpoint "
                "there was replaced since. Put the original back."
            )
        frozen = {name: value for name, value in state.items() if name not in self.names}
        return {**frozen, **saved}


@contextmanager
def merged(body: VLABody) -> Iterator[VLABody]:
    """
    Inside, the body has no adapters and computes the same: they are merged into copies (in main memory) of the layers
    that they adapt.

    :param body: a body, with or without adapters
    :return: the same object
    """
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError:  # without peft there are no adapters
        yield body
        return
    adapted: dict[str, Any] = {name: m for name, m in body.named_modules() if isinstance(m, BaseTunerLayer)}
    try:
        for name, layer in adapted.items():
            dtype = layer.get_base_layer().weight.dtype
            # In single precision, so that a small update is not rounded before it is added
            plain: Any = copy.deepcopy(layer)
            plain.cpu().float().merge()
            body.set_submodule(name, plain.get_base_layer().to(dtype))
        yield body
    finally:
        for name, layer in adapted.items():
            body.set_submodule(name, layer)
