"""
How large a model is: weights, floating-point operations, and what an observation leaves for the backward pass.

Weights are counted exactly, on torch's meta device. What one micro-batch leaves for its backward pass is estimated per
token and layer of a transformer, with ``h`` the width, ``q`` and ``kv`` the widths of queries and of keys (or values),
``i`` the width of the feed-forward part, ``r`` the rank of adapters and ``e`` the bytes of a number (2 in bfloat16):

    8h + e (2q + 2kv + out + c + m i + n r)

Two normalisations keep their inputs in single precision (8h); attention keeps queries, keys, values and its output
(once more as the input of the projection after it); ``c`` counts the inputs of the linear layers (2h where they share
them, 4h behind layer norms in bfloat16), ``m`` is 4 for gated and 2 for plain feed-forward parts, and ``n`` the number
of adapters. Training the weights themselves adds 4h for each normalisation's scale. Linear layers between the
transformers keep inputs and outputs. With gradient checkpointing each layer keeps its input (e h), and one layer at a
time what is above. Scores of attention are never stored (SDPA).

A forward pass takes 2 operations for each weight of a layer and token, and 4 times tokens times width for attention. A
small body without transformers is run once instead: torch says what it keeps and how much it computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch as th
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from opd_gym.cli.options import Run

# Words of an instruction and what is around them
PROMPT_TOKENS = 40


# ---------------------------------------------------------------------------------------------------------------------
# Models

# Of the published configurations, what differs from the defaults of transformers
_QWEN_3B: dict[str, Any] = dict(
    model_type="qwen2_5_vl",
    tie_word_embeddings=True,
    text_config=dict(
        hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=2,
        vocab_size=151936, tie_word_embeddings=True,
        rope_parameters=dict(rope_type="default", mrope_section=[16, 24, 24], rope_theta=1e6),
    ),
    vision_config=dict(hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=2048),
)  # fmt: skip
_SMOLVLM_256M: dict[str, Any] = dict(
    model_type="idefics3",
    scale_factor=4,
    tie_word_embeddings=False,
    text_config=dict(
        model_type="llama", hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=49280, pad_token_id=2,
    ),
    vision_config=dict(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, image_size=512,
        patch_size=16,
    ),
)  # fmt: skip
# Name of the body, and arguments of its configuration
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "openvla-7b": ("openvla", dict(input_profile="openvla")),
    "openvla-oft-7b": ("openvla", dict(input_profile="simplevla-rl")),
    "openvla-oft-7b-two-arms": (
        "openvla",
        dict(input_profile="simplevla-rl", n_tokens=350, action_dim=14, gripper=None, libero_images=False),
    ),
    "qwen2.5-vl-3b": ("vlm", dict(vlm_config=_QWEN_3B, image_size=(224, 224))),
    "smolvlm-256m": ("vlm", dict(vlm_config=_SMOLVLM_256M, image_size=(512, 512))),
}


def resolve(model: str) -> tuple[str, Any]:
    """
    :param model: a name of :data:`PUBLISHED`, a ``config.json``, or a checkpoint (see ``resolve_checkpoint``)
    :return: name of the body and its configuration
    :raises ValueError: it is none of these
    """
    from opd_gym.checkpoints import CONFIG_FILE, resolve_checkpoint
    from opd_gym.policies.body import get_body_class, read_checkpoint_config, read_config
    from opd_gym.policies.vlm import VLMConfig

    if model in PUBLISHED:
        body, values = PUBLISHED[model]
        return body, get_body_class(body).config_class(**values)
    path = Path(model).expanduser()
    try:
        path = path.parent if path.name == CONFIG_FILE else resolve_checkpoint(model)
    except FileNotFoundError as error:
        raise ValueError(f"{error} Or the name of a published model: {', '.join(PUBLISHED)}.") from error
    if path.is_file():
        return read_checkpoint_config(path)
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    if read_config(path / CONFIG_FILE).get("model_type") in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return "vlm", VLMConfig(model=path)
    return read_checkpoint_config(path)


@dataclass(frozen=True)
class Stack:
    """
    Layers of one transformer.

    :param n_layers: number of layers
    :param hidden: width ``h``
    :param queries: width of the queries
    :param keys: width of the keys, as attention takes them
    :param intermediate: width of the feed-forward part
    :param gated: whether the feed-forward part has a gate
    :param layer_norm: layer norms (of vision transformers) instead of RMS norms
    :param weights: weights of the linear layers of one layer
    :param n_linear: number of these linear layers
    :param tokens: tokens of one observation
    """

    n_layers: int
    hidden: int
    queries: int
    keys: int
    intermediate: int
    gated: bool
    layer_norm: bool
    weights: int
    n_linear: int
    tokens: int

    def layer_bytes(self, half: bool, rank: int | None) -> float:
        """
        :param half: computed in bfloat16
        :param rank: of adapters; None where the weights themselves are trained
        :return: bytes that one layer keeps of one observation for the backward pass
        """
        e, h = 2 if half else 4, self.hidden
        # Single precision is cast for each linear layer by itself
        copies = half and (self.layer_norm or rank is None)
        inputs = (4 if self.layer_norm or not self.gated else 5) * h if copies else 2 * h
        numbers = 3 * self.queries + 2 * self.keys + inputs + (4 if self.gated else 2) * self.intermediate
        per_token = 8 * h + e * (numbers + self.n_linear * (rank or 0))
        if rank is None and not self.layer_norm:
            per_token += 8 * h
        return self.tokens * per_token

    def forward_flops(self) -> float:
        """:return: floating-point operations of one observation"""
        return self.n_layers * self.tokens * (2.0 * self.weights + 4.0 * self.tokens * self.queries)


def token_counts(config: Any) -> tuple[int, int, int]:
    """
    :param config: configuration of OpenVLA or of a vision-language model
    :return: of an observation: patches of all pictures, what they become in the language model, and all tokens there
    """
    n_images = len(config.image_keys)
    if hasattr(config, "n_patches"):
        patches = merged = config.n_patches
    else:
        vision: Any = getattr(config.vlm_config, "vision_config", None)
        if not isinstance(getattr(vision, "patch_size", None), int):
            raise ValueError(
                f"{config.vlm_config.model_type!r} does not say how many patches a picture has "
                "(vision_config.patch_size): it cannot be planned."
            )
        sides = [getattr(vision, "image_size", None) or side for side in config.image_size]
        patches = n_images * (sides[0] // vision.patch_size) * (sides[1] // vision.patch_size)
        scale: Any = getattr(vision, "spatial_merge_size", None) or getattr(config.vlm_config, "scale_factor", 1)
        merged = patches // scale**2
    return patches, merged, merged + PROMPT_TOKENS + bool(config.proprio_dim) + config.n_tokens


def _first_linear(layer: nn.Module, *names: str) -> nn.Linear | None:
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in names:
            return module
    return None


def stacks(body: Any) -> tuple[list[Stack], int]:
    """
    :param body: a body, on the meta device
    :return: its transformers (none if it is not made of transformers' layers), and how many numbers the linear layers
        between them keep of one observation
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    from opd_gym.policies.adapters import linear_layers

    found = []
    decoder = getattr(body, "language_model", None) or getattr(body, "vlm", None)
    if decoder is None:
        return [], 0
    inside: set[nn.Module] = set()
    in_decoder = set((decoder.get_decoder() or decoder).modules())
    n_vision, n_merged, n_text = token_counts(body.config)
    for module in body.modules():
        if not isinstance(module, nn.ModuleList) or not len(module):
            continue
        layer = module[0]
        if not isinstance(layer, GradientCheckpointingLayer):
            continue
        inside.update(module.modules())
        linear = [m for m in layer.modules() if isinstance(m, nn.Linear)]
        query, key, qkv = (_first_linear(layer, *names) for names in (("q_proj",), ("k_proj",), ("qkv",)))
        gate = _first_linear(layer, "gate_proj")
        width = qkv or query
        if width is None:
            continue
        queries = width.out_features // (3 if qkv else 1)
        found.append(
            Stack(
                n_layers=len(module),
                hidden=width.in_features,
                queries=queries,
                # Grouped keys and values are repeated for each query, where there is a mask
                keys=queries if key is not None else width.out_features // 3,
                intermediate=gate.out_features if gate else max(m.out_features for m in linear if m is not qkv),
                gated=gate is not None,
                layer_norm=any(isinstance(m, nn.LayerNorm) for m in layer.modules()),
                weights=sum(m.weight.numel() for m in linear),
                n_linear=len(linear),
                tokens=n_text if module in in_decoder else n_vision,
            )
        )
    names = linear_layers(body) if found else []
    between = [m for m in map(body.get_submodule, names) if m not in inside]
    return found, n_merged * sum(m.in_features + m.out_features for m in between)


@contextmanager
def saved_bytes(*modules: nn.Module) -> Iterator[list[int]]:
    """
    Measure what is kept for the backward pass.

    :param modules: whose parameters and buffers do not count
    :return: a list that has one number, bytes, at the end
    """
    own = {x.untyped_storage().data_ptr() for m in modules for x in [*m.parameters(), *m.buffers()]}
    sizes: dict[int, int] = {}
    kept: list[th.Tensor] = []  # alive to the end: memory that is given back would be counted under the same address
    result: list[int] = []

    def pack(x: th.Tensor) -> th.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
            kept.append(x)
        return x

    with th.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield result
    result.append(sum(sizes.values()))


# ---------------------------------------------------------------------------------------------------------------------
# A run


@dataclass(frozen=True)
class Weights:
    """
    :param total: number of weights
    :param trained: how many of them are trained
    :param stacks: the transformers among them
    :param between: numbers that the linear layers between the transformers keep of one observation
    :param activations: bytes that one observation leaves for the backward pass, where they were measured
    :param flops: floating-point operations of one observation
    :param config: configuration of the body
    :param tensors: of each tensor, the size of its first dimension and its number of weights; without adapters
    :param layer: weights of the largest of its ``transformer_layers``
    :param beside: weights beside these layers
    """

    total: int
    trained: int
    stacks: list[Stack]
    between: int
    activations: float | None
    flops: float
    config: Any
    tensors: tuple[tuple[int, int], ...] = ()
    layer: int = 0
    beside: int = 0

    def part(self, n_ranks: int) -> int:
        """
        :param n_ranks: over how many ranks they are sharded
        :return: weights of the first one, which has the most: each tensor is cut along its first dimension
        """
        return sum(-(-rows // n_ranks) * (size // rows) for rows, size in self.tensors)


def count_weights(model: str, lora_rank: int | None) -> Weights:
    """
    Count on the meta device: nothing is allocated.

    :param model: see :func:`resolve`
    :param lora_rank: rank of adapters; None to train all weights
    :return: numbers of weights, adapters included
    :raises ValueError: a model of unknown kind that is too large to be measured
    """
    from opd_gym.policies.adapters import linear_layers
    from opd_gym.policies.body import get_body_class

    name, config = resolve(model)
    body_class = get_body_class(name)
    with th.device("meta"):
        body = body_class(config)
        layers, between = stacks(body)
    tensors = tuple((p.shape[0] if p.ndim else 1, p.numel()) for p in body.parameters())
    in_layers = [sum(p.numel() for p in layer.parameters()) for layer in body.transformer_layers()]
    total = trained = sum(p.numel() for p in body.parameters())
    sharded: dict[str, Any] = dict(tensors=tensors, layer=max([0, *in_layers]), beside=total - sum(in_layers))
    if lora_rank:
        # Two matrices beside each linear layer, counted here so that planning does not need peft
        adapted: list[Any] = [body.get_submodule(name) for name in linear_layers(body)]
        adapters = sum(lora_rank * (layer.in_features + layer.out_features) for layer in adapted)
        in_full = (p for name in body.full_rank_modules for p in body.get_submodule(name).parameters())
        total, trained = total + adapters, adapters + sum(p.numel() for p in in_full)
    if layers:
        flops = sum(stack.forward_flops() for stack in layers)
        return Weights(total, trained, layers, between, None, flops, config, **sharded)
    if total > 10**8:
        raise ValueError(f"{model!r} has {total:,} weights and no layers of transformers: it cannot be planned.")
    return Weights(total, trained, [], between, *_measure(body_class(config), config), config, **sharded)


def _measure(body: Any, config: Any) -> tuple[float, float]:
    """What one observation leaves for the backward pass, in bytes, and its floating-point operations."""
    height, width = config.image_size
    images = {key: th.zeros(1, 3, height, width, dtype=th.uint8) for key in config.image_keys}
    instruction = th.full((1, config.instruction_length), ord("a"), dtype=th.uint8)
    with saved_bytes(body) as measured, FlopCounterMode(display=False) as counter:
        body(images, instruction, th.zeros(1, config.proprio_dim) if config.proprio_dim else None)
    return float(measured[0]), float(counter.get_total_flops())


def activation_bytes(weights: Weights, run: Run) -> float:
    """
    :param weights: the student's
    :param run: the run
    :return: what one micro-batch keeps for its backward pass
    """
    if weights.activations is not None:
        return weights.activations * run.micro_batch_size
    half = run.dtype == "bfloat16"
    layers = [(stack, stack.layer_bytes(half, run.lora_rank)) for stack in weights.stacks]
    if run.gradient_checkpointing:
        e = 2 if half and run.lora_rank is not None else 4
        kept = float(sum(stack.n_layers * stack.tokens * stack.hidden * e for stack, _ in layers))
        kept += max(size for _, size in layers)
    else:
        kept = sum(stack.n_layers * size for stack, size in layers)
    config = weights.config
    kept += weights.between * (2 if half else 4)
    # Logits, log-probabilities and what a divergence of two distributions makes of them
    loss = 6 * 4 * config.n_tokens * config.n_bins
    return run.micro_batch_size * (kept + loss)
