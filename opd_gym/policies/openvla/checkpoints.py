"""The weights of OpenVLA's checkpoints in their published layout."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch as th
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from opd_gym.checkpoints import CONFIG_FILE
from opd_gym.checks import check_at_least_one
from opd_gym.files import replacing, write_atomic
from opd_gym.policies.body import (
    WEIGHTS_FILE,
    check_weight,
    is_weights_file,
    meta_body,
    read_json,
    read_weight_shapes,
    remove_stale_weights,
)
from opd_gym.policies.openvla.configuration import OpenVLAConfig
from opd_gym.policies.openvla.processing import PromptTokenizer
from opd_gym.policies.openvla.published import (
    INDEX_FILE,
    PREPROCESSOR_FILE,
    PROPRIO_FILE,
    SENTENCEPIECE_FILE,
    STATISTICS_FILE,
    TOKENIZER_FILE,
    load_proprio,
    locate,
    proprio_file,
    read_values,
)

if TYPE_CHECKING:
    from opd_gym.policies.openvla.modeling import OpenVLAModel

SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<PAD>", "unk_token": "<unk>"}
# As in the published checkpoints; all else is in tokenizer.json
TOKENIZER_CONFIG = {
    **SPECIAL_TOKENS,
    "add_bos_token": True,
    "add_eos_token": False,
    "clean_up_tokenization_spaces": False,
    "legacy": False,
    "model_max_length": 2048,
    "padding_side": "right",
    "processor_class": "PrismaticProcessor",
    "tokenizer_class": "LlamaTokenizer",
}


def complete_checkpoint(checkpoint: str | os.PathLike[str], **fields: Any) -> OpenVLAConfig:
    """
    Write what a checkpoint's ``config.json`` leaves out into it.

    :param checkpoint: its directory, or its id on the hub (then the copy in the hub's cache is completed)
    :param fields: arguments of :class:`OpenVLAConfig`, for instance ``input_profile="rlinf"``,
        ``unnorm_key="libero_object_no_noops"`` or ``image_keys=["agentview", "wrist"]``
    :return: the configuration
    :raises ValueError: unknown field, or the configuration is still incomplete
    """
    directory = locate(checkpoint)
    unknown = sorted(set(fields) - set(OpenVLAConfig().to_dict()))
    if unknown:
        raise ValueError(f"Unknown fields of OpenVLA's configuration: {unknown}.")
    values = read_values(directory)
    config = OpenVLAConfig.from_checkpoint(directory, values, **fields)
    _write_json(directory / CONFIG_FILE, {**values, **config.to_dict()})
    return config


def _write_json(path: Path, values: Any) -> None:
    write_atomic(path, json.dumps(values, indent=2) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# Names of weights


@dataclass(frozen=True)
class Part:
    """
    One published tensor and where it is in :class:`OpenVLAModel`.

    :param names: parameters that it is split into along the first dimension
    :param split: from the tensor to the parameters' values
    :param join: back, from the parameters' values and those of ``reads``
    :param reads: further parameters that the tensor depends on
    """

    names: tuple[str, ...]
    split: Callable[[th.Tensor], tuple[th.Tensor, ...]] = lambda x: (x,)
    join: Callable[..., th.Tensor] = lambda x: x
    reads: tuple[str, ...] = ()


def _add_linear(layout: dict[str, Part], published: str, ours: str) -> None:
    for kind in ("weight", "bias"):
        layout[f"{published}.{kind}"] = Part((f"{ours}.{kind}",))


def _add_blocks(
    layout: dict[str, Part], timm: str, ours: str, n_blocks: int, attention: str, out: str, norms: tuple[str, str]
) -> None:
    for i in range(n_blocks):
        block, layer = f"{timm}.blocks.{i}", f"{ours}.{i}"
        for kind in ("weight", "bias"):
            layout[f"{block}.attn.qkv.{kind}"] = Part(
                tuple(f"{layer}.{attention}.{x}_proj.{kind}" for x in ("q", "k", "v")),
                lambda x: x.chunk(3),
                lambda *x: th.cat(x),
            )
        _add_linear(layout, f"{block}.attn.proj", f"{layer}.{attention}.{out}")
        for name, norm in zip(("norm1", "norm2"), norms, strict=True):
            _add_linear(layout, f"{block}.{name}", f"{layer}.{norm}")
        for name in ("fc1", "fc2"):
            _add_linear(layout, f"{block}.mlp.{name}", f"{layer}.mlp.{name}")


def published_layout(model: OpenVLAModel) -> dict[str, Part]:
    """
    :param model: the model
    :return: for every tensor in the published shards, where it is in the model
    """
    layout: dict[str, Part] = {}
    n_blocks = model.config.dino_config.num_hidden_layers - 1
    timm, ours = "vision_backbone.featurizer", "vision_backbone.dino"
    _add_blocks(layout, timm, f"{ours}.encoder.layer", n_blocks, "attention", "o_proj", ("norm1", "norm2"))
    for i in range(n_blocks):
        for j in (1, 2):
            scale = f"{ours}.encoder.layer.{i}.layer_scale{j}.lambda1"
            layout[f"{timm}.blocks.{i}.ls{j}.scale_factor"] = Part((scale,))
    cls, positions = f"{ours}.embeddings.cls_token", f"{ours}.embeddings.position_embeddings"
    # timm gives the CLS token no position; transformers adds the first row to it
    layout[f"{timm}.cls_token"] = Part((cls,), join=lambda cls, pos: cls + pos[:, :1], reads=(positions,))
    layout[f"{timm}.pos_embed"] = Part(
        (positions,), lambda x: (th.cat([th.zeros_like(x[:, :1]), x], dim=1),), lambda x: x[:, 1:]
    )
    layout[f"{timm}.reg_token"] = Part((f"{ours}.embeddings.register_tokens",))
    _add_linear(layout, f"{timm}.patch_embed.proj", f"{ours}.embeddings.patch_embeddings.projection")

    n_blocks = model.config.siglip_config.num_hidden_layers - 1
    timm, ours = "vision_backbone.fused_featurizer", "vision_backbone.siglip"
    norms = ("layer_norm1", "layer_norm2")
    _add_blocks(layout, timm, f"{ours}.encoder.layers", n_blocks, "self_attn", "out_proj", norms)
    positions = f"{ours}.embeddings.position_embedding.weight"
    layout[f"{timm}.pos_embed"] = Part((positions,), lambda x: (x[0],), lambda x: x[None])
    _add_linear(layout, f"{timm}.patch_embed.proj", f"{ours}.embeddings.patch_embedding")

    for name in model.vision_backbone.unused.shapes:
        layout[f"vision_backbone.{name}"] = Part((f"vision_backbone.unused.{model.vision_backbone.unused.key(name)}",))
    for part in ("projector", "language_model"):
        for name in getattr(model, part).state_dict(prefix=f"{part}."):
            layout[name] = Part((name,))
    return layout


# ---------------------------------------------------------------------------------------------------------------------
# Reading and writing weights


def _shards(directory: Path) -> list[Path]:
    index = directory / INDEX_FILE
    if index.is_file():
        values = read_json(index)
        weight_map = values.get("weight_map") if isinstance(values, dict) else None
        if not isinstance(weight_map, dict) or not weight_map or not all(map(is_weights_file, weight_map.values())):
            raise ValueError(f"{index} is damaged: expected a `weight_map` from weights to files beside it.")
        names = sorted(set(weight_map.values()))
    else:
        names = [WEIGHTS_FILE]
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{directory} is incomplete: {', '.join(missing)} is missing.")
    return [directory / name for name in names]


def _published_tensors(directory: Path, shards: list[Path], with_proprio: bool) -> Iterator[tuple[str, th.Tensor]]:
    for shard in shards:
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                # timm's own name; the published files avoid it because transformers once renamed it
                yield re.sub(r"(\.ls[12])\.gamma$", r"\1.scale_factor", name), file.get_tensor(name)
    projector = proprio_file(directory) if with_proprio else None
    if projector is not None:
        for name, tensor in load_proprio(projector).items():
            yield f"proprio_projector.{name}", tensor


def _assign(model: nn.Module, directory: Path, name: str, tensor: th.Tensor) -> None:
    """Replace a parameter or buffer without memory for the old one."""
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    old = getattr(module, attribute)
    if tuple(old.shape) != tuple(tensor.shape):
        raise ValueError(
            f"The weights in {directory} do not fit {CONFIG_FILE}: {name} has shape {tuple(tensor.shape)}, expected "
            f"{tuple(old.shape)}."
        )
    if isinstance(old, nn.Parameter):
        tensor = nn.Parameter(tensor, requires_grad=old.requires_grad)
    setattr(module, attribute, tensor)


def load_model(
    model_class: type[OpenVLAModel],
    directory: Path,
    config: OpenVLAConfig,
    dtype: th.dtype | None = None,
    device: th.device | str = "cpu",
) -> OpenVLAModel:
    """
    Load a checkpoint tensor by tensor, so that the model is in memory once.

    :param model_class: class of the model
    :param directory: the checkpoint
    :param config: its configuration
    :param dtype: type of the weights; None for the one they are stored in
    :param device: where they go
    :return: the model, in evaluation mode
    :raises FileNotFoundError: the tokenizer or a shard is missing
    :raises ValueError: weights are missing, unknown, or of another shape
    """
    tokenizer = directory / TOKENIZER_FILE
    if not tokenizer.is_file():
        raise FileNotFoundError(
            f"{directory} has no {TOKENIZER_FILE}: copy it from the checkpoint that this one was fine-tuned from."
        )
    shards = _shards(directory)
    stored = read_weight_shapes(directory, shards)
    model: OpenVLAModel = meta_body(model_class, config, directory, len(stored))  # type: ignore[assignment]
    layout = published_layout(model)
    if model.proprio_projector is not None:
        layout |= {name: Part((name,)) for name in model.proprio_projector.state_dict(prefix="proprio_projector.")}
    missing = set(layout)
    unknown = []
    dtypes = {dtype}
    for name, tensor in _published_tensors(directory, shards, model.proprio_projector is not None):
        # Older versions of transformers saved what can be computed; RLinf saves the critic
        if name.endswith("rotary_emb.inv_freq") or name.startswith("value_head."):
            continue
        if name not in layout:
            unknown.append(name)
            continue
        missing.discard(name)
        check_weight(str(directory), name, tensor)
        part = layout[name]
        dtypes.add(tensor.dtype)
        try:
            pairs = list(zip(part.names, part.split(tensor), strict=True))
        except (RuntimeError, IndexError, ValueError) as error:
            raise ValueError(f"{directory}: {name} has a shape that does not fit, {tuple(tensor.shape)}.") from error
        for ours, value in pairs:
            # A copy, or the memory of the file would be the model's
            _assign(model, directory, ours, value.to(device=device, dtype=dtype or value.dtype, copy=True).contiguous())
    for name in sorted(missing):
        (ours, *_), unused = layout[name].names, ".unused."
        if unused in ours:  # no output depends on them
            missing.remove(name)
            _assign(
                model, directory, ours, th.zeros_like(model.get_buffer(ours), device=device, dtype=dtype or th.float32)
            )
    if missing or unknown:
        raise ValueError(
            f"The weights of {directory} are not in OpenVLA's published layout: {len(missing)} missing "
            f"({', '.join(sorted(missing)[:3])}), {len(unknown)} unknown ({', '.join(sorted(unknown)[:3])})."
        )
    config.rounded_frequencies |= config.profile.rounded_frequencies and th.bfloat16 in dtypes
    model.reset_computed_buffers(device)
    sentencepiece = directory / SENTENCEPIECE_FILE
    try:
        model.tokenizer = PromptTokenizer(
            tokenizer.read_text(encoding="utf-8"), sentencepiece.read_bytes() if sentencepiece.is_file() else b""
        )
    except Exception as error:  # of the library, which has no type of its own
        raise ValueError(f"{tokenizer} is damaged: {error}") from error
    return model.eval()


def save_model(model: OpenVLAModel, directory: str | os.PathLike[str], max_shard_size: int = 5 * 10**9) -> None:
    """
    Write a checkpoint in the published layout, one shard in memory at a time.

    :param model: the model
    :param directory: created if needed
    :param max_shard_size: largest size of a shard in bytes
    """
    check_at_least_one(max_shard_size=max_shard_size)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    layout = published_layout(model)
    shards: list[dict[str, Part]] = [{}]
    room = max_shard_size
    total = 0
    for name, part in layout.items():
        size = sum(state[ours].nbytes for ours in part.names)
        if size > room and shards[-1]:
            shards.append({})
            room = max_shard_size
        shards[-1][name] = part
        room -= size
        total += size
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file = WEIGHTS_FILE if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = {
            name: part.join(*(state[ours] for ours in (*part.names, *part.reads))).contiguous().cpu()
            for name, part in shard.items()
        }
        with replacing(directory / file) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
            temporary.chmod(0o644)  # safetensors writes files that only their owner can read
        weight_map.update(dict.fromkeys(shard, file))
    written = set(weight_map.values())
    if len(shards) > 1:
        written.add(INDEX_FILE)
        _write_json(directory / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
    if model.proprio_projector is not None:
        written.add(PROPRIO_FILE)
        weights = {name: tensor.cpu() for name, tensor in model.proprio_projector.state_dict().items()}
        with replacing(directory / PROPRIO_FILE) as temporary:
            th.save(weights, temporary)
    config = model.config
    if model.tokenizer is not None:
        write_atomic(directory / TOKENIZER_FILE, model.tokenizer.to_str())
        _write_json(directory / "tokenizer_config.json", TOKENIZER_CONFIG)
        _write_json(directory / "special_tokens_map.json", SPECIAL_TOKENS)
        _write_json(directory / "added_tokens.json", {SPECIAL_TOKENS["pad_token"]: config.pad_token_id})
        if model.tokenizer.sentencepiece:
            with replacing(directory / SENTENCEPIECE_FILE) as temporary:
                temporary.write_bytes(model.tokenizer.sentencepiece)
    if config.norm_stats:
        # Where openvla-oft looks for them; a file of an earlier checkpoint would win over config.json
        _write_json(directory / STATISTICS_FILE, config.norm_stats)
    tokens = {name: getattr(config.text_config, name) for name in ("bos_token_id", "eos_token_id")}
    generation = {"_from_model_config": True, **tokens, "pad_token_id": config.pad_token_id}
    _write_json(directory / "generation_config.json", generation)
    input_size = [3, config.vision_size, config.vision_size]
    preprocessor = {
        "image_processor_type": "PrismaticImageProcessor",
        "image_resize_strategy": "resize-naive",
        "input_sizes": [input_size, input_size],
        "interpolations": ["bicubic", "bicubic"],
        "means": config.pixel_means,
        "processor_class": "PrismaticProcessor",
        "stds": config.pixel_stds,
        "use_fused_vision_backbone": True,
    }
    _write_json(directory / PREPROCESSOR_FILE, preprocessor)
    remove_stale_weights(directory, written)
    # The configuration is last: with it the checkpoint is complete
    _write_json(
        directory / CONFIG_FILE,
        {
            **config.to_dict(),
            "architectures": ["OpenVLAForActionPrediction"],
            "torch_dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        },
    )
