"""
Memory and time of a run before it is started: ``opd-gym plan --student openvla-7b``.

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

Time is floating-point operations over what a device does in practice: forward 2 operations for each weight of a
layer and token, and 4 times tokens times width for attention; backward as much again for frozen weights, twice as much
for trained ones; gradient checkpointing one forward pass more.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch as th
from torch import nn

GIB = 2**30
# What a GPU's driver, CUDA's context and its libraries take, and what fragmentation wastes
CONTEXT_BYTES = 1.0 * GIB
FRAGMENTATION = 0.08
# Of the peak, that large matrix products of such models reach in training, and in the small batches of a rollout
TRAINING_EFFICIENCY = 0.4
ROLLOUT_EFFICIENCY = 0.15
# Words of an instruction and what is around them
PROMPT_TOKENS = 40


# ---------------------------------------------------------------------------------------------------------------------
# Models


def _openvla(**kwargs: Any) -> tuple[str, Any]:
    from opd_gym.policies.openvla import OpenVLAConfig

    return "openvla", OpenVLAConfig(**kwargs)


def _vlm(values: dict[str, Any], **kwargs: Any) -> tuple[str, Any]:
    from opd_gym.policies.vlm import VLMConfig

    return "vlm", VLMConfig(vlm_config=values, **kwargs)


_QWEN_3B = {
    "model_type": "qwen2_5_vl",
    "tie_word_embeddings": True,
    "text_config": {
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
    },
    "vision_config": {"hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 2048},
}
_SMOLVLM_256M = {
    "model_type": "idefics3",
    "scale_factor": 4,
    "tie_word_embeddings": False,
    "text_config": {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49280,
        "pad_token_id": 2,
    },
    "vision_config": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 512,
        "patch_size": 16,
    },
}

PUBLISHED: dict[str, Callable[[], tuple[str, Any]]] = {
    "openvla-7b": lambda: _openvla(input_profile="openvla"),
    "openvla-oft-7b": lambda: _openvla(input_profile="simplevla-rl"),
    "openvla-oft-7b-two-arms": lambda: _openvla(
        input_profile="simplevla-rl", n_tokens=350, action_dim=14, gripper=None, libero_images=False
    ),
    "qwen2.5-vl-3b": lambda: _vlm(_QWEN_3B, image_size=(224, 224)),
    "smolvlm-256m": lambda: _vlm(_SMOLVLM_256M, image_size=(512, 512)),
}


def resolve(model: str) -> tuple[str, Any]:
    """
    :param model: a name of :data:`PUBLISHED`, the directory of a checkpoint or its ``config.json``, a name of the zoo
    :return: name of the body and its configuration
    :raises ValueError: it is none of these
    """
    from opd_gym.checkpoints import CONFIG_FILE, resolve_checkpoint
    from opd_gym.policies.body import read_checkpoint_config
    from opd_gym.policies.vlm import VLMConfig

    if model in PUBLISHED:
        return PUBLISHED[model]()
    path = Path(model).expanduser()
    try:
        directory = path.parent if path.name == CONFIG_FILE else resolve_checkpoint(model)
    except FileNotFoundError as error:
        raise ValueError(f"{error} Or the name of a published model: {', '.join(PUBLISHED)}.") from error
    if not (directory / CONFIG_FILE).is_file():
        raise ValueError(f"{directory} is not the directory of a VLA checkpoint: it has no {CONFIG_FILE}.")
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    if json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8")).get("model_type") in (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    ):
        return "vlm", VLMConfig(model=directory)
    return read_checkpoint_config(directory)


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
        """
        :return: floating-point operations of one observation
        """
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
class Run:
    """
    What is to be run.

    :param student: see :func:`resolve`
    :param teacher: likewise; "student" for the same model, None for none (or a scripted expert)
    :param lora_rank: rank of the student's adapters; None to train all weights
    :param dtype: type of the student's frozen weights and computations
    :param teacher_dtype: likewise of the teacher
    :param teacher_elsewhere: the teacher has a device of its own
    :param gradient_checkpointing: compute layers a second time in the backward pass
    :param micro_batch_size: observations that go through the student at once, in training
    :param batch_size: observations of a gradient step
    :param gradient_steps: gradient steps of an iteration
    :param n_envs: number of workers
    :param n_steps: decisions of each worker in an iteration
    :param iterations: number of iterations
    """

    student: str
    teacher: str | None = "student"
    lora_rank: int | None = 32
    dtype: str = "bfloat16"
    teacher_dtype: str = "bfloat16"
    teacher_elsewhere: bool = False
    gradient_checkpointing: bool = True
    micro_batch_size: int = 4
    batch_size: int = 128
    gradient_steps: int = 40
    n_envs: int = 8
    n_steps: int = 32
    iterations: int = 20

    def __post_init__(self) -> None:
        numbers = ("micro_batch_size", "batch_size", "gradient_steps", "n_envs", "n_steps", "iterations")
        for name in numbers:
            if getattr(self, name) < 1:
                raise ValueError(f"Expected {name} to be at least 1, got {getattr(self, name)}.")
        if self.lora_rank is not None and self.lora_rank < 1:
            raise ValueError(f"Expected lora_rank to be at least 1, got {self.lora_rank}.")


@dataclass(frozen=True)
class Weights:
    """
    :param total: number of weights
    :param trained: how many of them are trained
    :param stacks: the transformers among them
    :param between: numbers that the linear layers between the transformers keep of one observation
    :param activations: bytes that one observation leaves for the backward pass, where they were measured
    :param config: configuration of the body
    """

    total: int
    trained: int
    stacks: list[Stack]
    between: int
    activations: float | None
    config: Any


def count_weights(model: str, lora_rank: int | None) -> Weights:
    """
    Count on the meta device: nothing is allocated.

    :param model: see :func:`resolve`
    :param lora_rank: rank of adapters; None to train all weights
    :return: numbers of weights, adapters included
    :raises ValueError: a model of unknown kind that is too large to be measured
    """
    from opd_gym.policies.adapters import add_lora, check_lora
    from opd_gym.policies.body import get_body_class

    name, config = resolve(model)
    body_class = get_body_class(name)
    lora = check_lora({"r": lora_rank} if lora_rank else None)
    with th.device("meta"):
        body = body_class(config)
        layers, between = stacks(body)
        if lora is not None:
            add_lora(body, lora)
    total = sum(p.numel() for p in body.parameters())
    trained = sum(p.numel() for p in body.parameters() if p.requires_grad)
    activations = None
    if not layers:
        if total > 10**8:
            raise ValueError(f"{model!r} has {total:,} weights and no layers of transformers: it cannot be planned.")
        activations = _measure(body_class(config), config)
    return Weights(total, trained, layers, between, activations, config)


def _measure(body: Any, config: Any) -> float:
    height, width = config.image_size
    images = {key: th.zeros(1, 3, height, width, dtype=th.uint8) for key in config.image_keys}
    instruction = th.full((1, config.instruction_length), ord("a"), dtype=th.uint8)
    with saved_bytes(body) as measured:
        body(images, instruction, th.zeros(1, config.proprio_dim) if config.proprio_dim else None)
    return float(measured[0])


@dataclass(frozen=True)
class Plan:
    """
    Memory in bytes by what it is for, and floating-point operations of one iteration.

    :param run: what is planned
    :param student: the student's weights
    :param teacher: the teacher's weights; None without one
    :param learner: memory of the device that learns
    :param teacher_device: memory of the teacher's own device
    :param host: main memory of the process
    :param training_flops: of all gradient steps
    :param rollout_flops: of acting and of the teacher's opinions
    """

    run: Run
    student: Weights
    teacher: Weights | None
    learner: dict[str, float]
    teacher_device: dict[str, float]
    host: dict[str, float]
    training_flops: float
    rollout_flops: float

    @staticmethod
    def needed(parts: Mapping[str, float]) -> float:
        """
        :param parts: memory by what it is for
        :return: what a GPU must have for it
        """
        return sum(parts.values()) * (1.0 + FRAGMENTATION) + CONTEXT_BYTES


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


def _forward_flops(weights: Weights) -> float:
    if weights.stacks:
        return sum(stack.forward_flops() for stack in weights.stacks)
    return 2.0 * weights.total


def make_plan(run: Run, cache: dict[Any, Weights] | None = None) -> Plan:
    """
    :param run: what is to be run
    :param cache: weights that have been counted, for further plans
    :return: what it takes
    """
    cache = {} if cache is None else cache

    def count(model: str, rank: int | None) -> Weights:
        if (model, rank) not in cache:
            cache[model, rank] = count_weights(model, rank)
        return cache[model, rank]

    student = count(run.student, run.lora_rank)
    size = {"float32": 4, "bfloat16": 2}
    learner = {
        "student's frozen weights": float((student.total - student.trained) * size[run.dtype]),
        "trained weights (float32)": 4.0 * student.trained,
        "gradients (float32)": 4.0 * student.trained,
        "AdamW's two moments (float32)": 8.0 * student.trained,
        "activations of a micro-batch": activation_bytes(student, run),
    }
    if run.dtype == "bfloat16":
        learner["trained weights, copied to bfloat16 by autocast"] = 2.0 * student.trained
    teacher = None
    teacher_device: dict[str, float] = {}
    if run.teacher is not None:
        teacher = count(run.student if run.teacher == "student" else run.teacher, None)
        weights = float(teacher.total * size[run.teacher_dtype])
        (teacher_device if run.teacher_elsewhere else learner)["teacher's weights"] = weights
    config = student.config
    height, width = config.image_size
    # With the teacher's distribution in half precision
    state = len(config.image_keys) * 3 * height * width + 2 * config.n_tokens * config.n_bins
    decisions = run.n_envs * run.n_steps
    host = {
        "rollout buffer": float(decisions * (state + 24 * config.n_tokens)),
        "replay of states (at most)": float(min(GIB, run.iterations * decisions * state)),
    }
    forward = _forward_flops(student)
    passes = 1 + (1 if run.lora_rank is not None else 2) + run.gradient_checkpointing
    rollout = decisions * (forward + (_forward_flops(teacher) if teacher is not None else 0.0))
    training = run.gradient_steps * run.batch_size * passes * forward
    return Plan(run, student, teacher, learner, teacher_device, host, training, rollout)


# ---------------------------------------------------------------------------------------------------------------------
# Machines


@dataclass(frozen=True)
class Machine:
    """
    :param name: what it is
    :param memory: bytes of one device
    :param flops: floating-point operations per second of one device, at best
    :param n_devices: number of devices
    :param is_gpu: whether they are GPUs
    """

    name: str
    memory: float
    flops: float
    n_devices: int = 1
    is_gpu: bool = True


MACHINES = (
    Machine("one GPU of 24 GB (RTX 4090: 165 TFLOP/s)", 24e9, 165e12),
    Machine("one GPU of 80 GB (A100: 312 TFLOP/s)", 80e9, 312e12),
    Machine("eight GPUs of 80 GB (A100)", 80e9, 312e12, n_devices=8),
)


def this_machine() -> Machine:
    """
    :return: the GPUs of this machine, or its processor, whose speed is measured in a moment
    """
    if th.cuda.is_available():
        properties = th.cuda.get_device_properties(0)
        n, device = th.cuda.device_count(), "cuda"
        name, memory = f"this machine ({n} x {properties.name})", float(properties.total_memory)
    else:
        n, device = 1, "cpu"
        name = f"this machine ({os.cpu_count()} cores, no GPU)"
        memory = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    size = 8192 if device == "cuda" else 512
    a = th.ones(size, size, device=device, dtype=th.bfloat16 if device == "cuda" else th.float32)
    fastest = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        fastest = min(fastest, time.perf_counter() - start)
    return Machine(name, memory, 2.0 * size**3 / fastest, n, device == "cuda")


CHANGES: tuple[tuple[str, Callable[[Run], Run]], ...] = (
    ("gradient_checkpointing=True", lambda run: replace(run, gradient_checkpointing=True)),
    ('dtype="bfloat16"', lambda run: replace(run, dtype="bfloat16")),
    ('teacher_kwargs={"dtype": "bfloat16"}', lambda run: replace(run, teacher_dtype="bfloat16")),
    ("micro_batch_size=1", lambda run: replace(run, micro_batch_size=1)),
    ('teacher_kwargs={"device": ...} on another device', lambda run: replace(run, teacher_elsewhere=True)),
    ("lora=True instead of training all weights", lambda run: replace(run, lora_rank=run.lora_rank or 32)),
)


def fits(plan: Plan, machine: Machine) -> bool:
    """
    :param plan: memory of a run
    :param machine: where it is to run
    :return: whether it does
    """
    if not machine.is_gpu:  # everything lies in main memory
        parts = [*plan.learner.values(), *plan.teacher_device.values(), *plan.host.values()]
        return sum(parts) * (1.0 + FRAGMENTATION) <= machine.memory
    needed = [plan.needed(plan.learner)]
    if plan.teacher_device and machine.n_devices > 1:
        needed.append(plan.needed(plan.teacher_device))
    return max(needed) <= machine.memory


def advice(run: Run, machine: Machine, cache: dict[Any, Weights]) -> list[str] | None:
    """
    :param run: a run
    :param machine: where it is to run
    :param cache: see :func:`make_plan`
    :return: what to change so that it fits, nothing if it does; None if no change makes it fit
    """
    changes: list[str] = []
    for text, change in ((None, lambda run: run), *CHANGES):
        changed = change(run)
        if text is not None and changed == run:
            continue
        run = changed
        changes += [text] if text is not None else []
        if fits(make_plan(run, cache), machine):
            return changes
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Text


@dataclass
class Table:
    """A table in Markdown."""

    header: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)

    def __str__(self) -> str:
        widths = [max(len(row[i]) for row in [self.header, *self.rows]) for i in range(len(self.header))]
        lines = [self.header, tuple("-" * width for width in widths), *self.rows]
        return "\n".join(
            "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines
        )


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def to_markdown(run: Run, machines: tuple[Machine, ...]) -> str:
    """
    :param run: what is to be run
    :param machines: where it might
    :return: memory, what fits where and what to change, time
    """
    cache: dict[Any, Weights] = {}
    plan = make_plan(run, cache)
    student = plan.student
    how = f"LoRA of rank {run.lora_rank}" if run.lora_rank else "all weights"
    lines = [
        f"Student {run.student}: {student.total:,} weights, {student.trained:,} trained ({how}, {run.dtype})"
        + (", gradient checkpointing" if run.gradient_checkpointing else ""),
    ]
    if plan.teacher is not None:
        name = run.student if run.teacher == "student" else run.teacher
        lines.append(f"Teacher {name}: {plan.teacher.total:,} weights, frozen ({run.teacher_dtype})")
    for stack in student.stacks:
        lines.append(f"  {stack.n_layers} layers of width {stack.hidden}, {stack.tokens} tokens of each observation")
    parts = [
        *((name, "learner", size) for name, size in plan.learner.items()),
        *((name, "the teacher's device", size) for name, size in plan.teacher_device.items()),
        *((name, "main memory", size) for name, size in plan.host.items()),
    ]
    memory = Table(("memory", "where", "size"), [(name, where, _gb(size)) for name, where, size in parts])
    lines += ["", str(memory)]
    lines.append(
        f"A GPU needs {_gb(plan.needed(plan.learner))} for the learner: {FRAGMENTATION:.0%} more for fragmentation and "
        f"{_gb(CONTEXT_BYTES)} for CUDA. Simulators come on top, in main memory."
    )
    table = Table(("machine", "fits", "what to change", "an iteration", f"{run.iterations} iterations"))
    for machine in machines:
        changes = advice(run, machine, cache)
        chosen = plan
        if changes:
            changed = run
            for text, change in CHANGES:
                changed = change(changed) if text in changes else changed
            chosen = make_plan(changed, cache)
        if changes is None:
            table.rows.append((machine.name, "no", "a smaller model, or weights sharded over several GPUs", "-", "-"))
            continue
        efficiencies = (TRAINING_EFFICIENCY, ROLLOUT_EFFICIENCY) if machine.is_gpu else (1.0, 1.0)
        speed = machine.flops * machine.n_devices
        seconds = chosen.training_flops / efficiencies[0] / speed + chosen.rollout_flops / efficiencies[1] / speed
        table.rows.append(
            (
                machine.name,
                "yes" if not changes else "with changes",
                ", ".join(changes) or "-",
                _duration(seconds),
                _duration(seconds * run.iterations),
            )
        )
    lines += ["", str(table)]
    decisions = run.n_envs * run.n_steps
    lines.append(
        f"An iteration: {decisions} decisions, {run.gradient_steps} gradient steps of {run.batch_size}; "
        f"{plan.training_flops / 1e15:.2f} PFLOP of training at {TRAINING_EFFICIENCY:.0%} of a GPU's peak, "
        f"{plan.rollout_flops / 1e15:.2f} PFLOP of acting and labelling at {ROLLOUT_EFFICIENCY:.0%}. The "
        "simulator's own time comes on top."
    )
    if any(machine.n_devices > 1 for machine in machines):
        lines.append(
            "Several GPUs: the memory of each, and the time if all shared the work evenly. This library itself uses "
            "one GPU to learn and, with teacher_kwargs, another one to teach."
        )
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """
    :param parser: gets the arguments of ``opd-gym plan``
    """
    known = f"{', '.join(PUBLISHED)}; the directory of a checkpoint; its config.json; a name of the zoo"
    parser.add_argument("--student", required=True, help=known)
    parser.add_argument("--teacher", default="student", help='likewise; "none" for none; default: as the student')
    parser.add_argument("--lora-rank", type=int, default=32)
    parser.add_argument("--full", action="store_true", help="train all weights instead of LoRA adapters")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--teacher-dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--teacher-elsewhere", action="store_true", help="the teacher has a device of its own")
    parser.add_argument("--no-gradient-checkpointing", dest="gradient_checkpointing", action="store_false")
    for name, default in (("micro-batch-size", 4), ("batch-size", 128), ("gradient-steps", 40)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("n-envs", 8), ("n-steps", 32), ("iterations", 20)):
        parser.add_argument(f"--{name}", type=int, default=default)


def main(args: argparse.Namespace) -> int:
    """
    :param args: what :func:`add_arguments` asked for
    :return: exit status
    """
    run = Run(
        student=args.student,
        teacher=None if args.teacher == "none" else args.teacher,
        lora_rank=None if args.full else args.lora_rank,
        dtype=args.dtype,
        teacher_dtype=args.teacher_dtype,
        teacher_elsewhere=args.teacher_elsewhere,
        gradient_checkpointing=args.gradient_checkpointing,
        micro_batch_size=args.micro_batch_size,
        batch_size=args.batch_size,
        gradient_steps=args.gradient_steps,
        n_envs=args.n_envs,
        n_steps=args.n_steps,
        iterations=args.iterations,
    )
    print(to_markdown(run, (*MACHINES, this_machine())))
    return 0
