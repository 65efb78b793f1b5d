"""The published layout of OpenVLA's checkpoints: where they are, what they leave unsaid, their weights."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch as th
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from opd_gym.policies.openvla.configuration import INPUT_PROFILES, OpenVLAConfig, data_set, get_profile
from opd_gym.policies.openvla.processing import PromptTokenizer
from opd_gym.policies.vla import CONFIG_FILE, WEIGHTS_FILE, locate_checkpoint, remove_stale_weights

if TYPE_CHECKING:
    from opd_gym.policies.openvla.modeling import OpenVLAModel

INDEX_FILE = "model.safetensors.index.json"
STATISTICS_FILE = "dataset_statistics.json"
TOKENIZER_FILE = "tokenizer.json"
PREPROCESSOR_FILE = "preprocessor_config.json"
PROPRIO_FILE = "proprio_projector--latest_checkpoint.pt"
PROPRIO_PATTERN = "proprio_projector--*checkpoint.pt"
# As in the published checkpoints; all else is in tokenizer.json
TOKENIZER_CONFIG = {
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": "<s>",
    "clean_up_tokenization_spaces": False,
    "eos_token": "</s>",
    "legacy": False,
    "model_max_length": 2048,
    "pad_token": "<PAD>",
    "padding_side": "right",
    "processor_class": "PrismaticProcessor",
    "tokenizer_class": "LlamaTokenizer",
    "unk_token": "<unk>",
}
LIBERO_CAMERAS = ("agentview", "wrist")
TWO_ARM_CAMERAS = ("head", "left_wrist", "right_wrist")
HEAD_PATTERNS = ("action_head--*checkpoint.pt", "noisy_action_projector--*checkpoint.pt")

# ---------------------------------------------------------------------------------------------------------------------
# Where a checkpoint is, and what it is


def locate(checkpoint: str | os.PathLike[str]) -> Path:
    """
    :param checkpoint: see :func:`opd_gym.policies.vla.locate_checkpoint`
    :return: the directory
    :raises FileNotFoundError: there is none
    """
    directory = locate_checkpoint(checkpoint)
    if directory is None or not directory.is_dir():
        raise FileNotFoundError(
            f"{os.fspath(checkpoint)!r} is neither a directory, nor a name of the zoo, nor the id of a model on the "
            "Hugging Face hub (owner/name)."
        )
    return directory


def read_values(directory: Path) -> dict[str, Any]:
    """
    :param directory: a checkpoint
    :return: its ``config.json``
    :raises FileNotFoundError: there is none
    :raises ValueError: it is not OpenVLA's
    """
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{directory} is not a checkpoint of OpenVLA: {CONFIG_FILE} is missing.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        model_type = values.get("model_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not a configuration of OpenVLA: {error!r}.") from error
    if model_type != OpenVLAConfig.model_type:
        raise ValueError(f"{path} is of model type {model_type!r}, expected {OpenVLAConfig.model_type!r}.")
    return values


def detect_profile(directory: Path, implementation: str | None = None) -> str:
    """
    Find out which code trained a published checkpoint, from the name under which it was published.

    :param directory: the checkpoint
    :param implementation: which of its two implementations RLinf wrote into the configuration
    :return: the name of its :class:`InputProfile`
    :raises ValueError: it does not show
    """
    path = directory.absolute()
    in_cache = path.parent.name == "snapshots"  # of the hub: models--owner--name/snapshots/<revision>
    name = (path.parent.parent if in_cache else path).name.lower().removeprefix("models--")
    # RLinf took over SimpleVLA-RL's inputs for two arms, and for whatever was trained by openvla-oft itself
    if implementation == "official" or (name.startswith("rlinf") and "robotwin" in name):
        return "simplevla-rl"
    if implementation == "rlinf" or name.startswith("rlinf"):
        return "rlinf"
    if name.startswith("haozhan72--") or "openvla-oft-sft-" in name:
        return "simplevla-rl"
    if re.fullmatch(r"(openvla--)?openvla-7b(-finetuned-libero-\w+)?", name):
        return "openvla"
    raise ValueError(
        f"{directory} does not say what inputs it was trained on, and on others it scores far lower. Say it once: "
        "opd_gym.policies.openvla.complete_checkpoint(checkpoint, input_profile=...) writes it to its config.json. One "
        f"of {sorted(INPUT_PROFILES)}, the code that it was fine-tuned with (a discrete checkpoint of openvla-oft: "
        '"simplevla-rl").'
    )


def _translate(values: Mapping[str, Any]) -> dict[str, Any]:
    """Other software's configuration in our terms; some of its fields have our names and mean something else."""
    ours = dict(values)
    # The projector's inputs, not the env's numbers; the vision transformers' pictures, not the env's; of no use
    n_proprio = ours.pop("proprio_dim", 0)
    for name in ("image_size", "hidden_size", "vocab_size"):
        ours.pop(name, None)
    if "use_proprio" in ours:
        ours["proprio_inputs"] = n_proprio if ours.pop("use_proprio") else 0
    return ours


def complete_values(directory: Path, values: Mapping[str, Any], **fields: Any) -> dict[str, Any]:
    """
    Fill in what a published ``config.json`` leaves open: inputs, action space, statistics.

    :param directory: the checkpoint
    :param values: its ``config.json``; what it says stands
    :param fields: what is known besides
    :return: the arguments of :class:`OpenVLAConfig`
    :raises ValueError: continuous actions, no statistics, or something cannot be found out
    """
    heads = [path.name for pattern in HEAD_PATTERNS for path in directory.glob(pattern)]
    if heads:
        raise ValueError(
            f"{directory} predicts continuous actions ({', '.join(sorted(heads))}). Distillation needs action tokens: "
            "use a checkpoint of the discrete variant."
        )
    values = {**(values if _is_complete(values) else _translate(values)), **fields}
    norm_stats = dict(values.get("norm_stats") or {})
    path = directory / STATISTICS_FILE
    if path.is_file():
        fine_tuned = json.loads(path.read_text(encoding="utf-8"))
        norm_stats.update(fine_tuned)
        # config.json may still hold the statistics of all that the base model was trained on
        if len(fine_tuned) == 1:
            values.setdefault("unnorm_key", next(iter(fine_tuned)))
    if not norm_stats:
        raise ValueError(
            f"{directory} has no statistics to turn tokens into actions: expected `norm_stats` in {CONFIG_FILE}, or "
            f"{STATISTICS_FILE}."
        )
    values["norm_stats"] = norm_stats
    if "input_profile" not in values:
        values["input_profile"] = detect_profile(directory, values.get("implement_version"))
    values["unnorm_key"] = data_set(norm_stats, values.get("unnorm_key"))
    action = norm_stats[values["unnorm_key"]].get("action") or {}
    action_dim = values.setdefault("action_dim", len(action.get("q01") or action.get("min") or [0.0] * 7))
    two_arms = action_dim == 14
    chunk_size = values.get("num_action_chunks", 25 if two_arms else 8)
    parallel = get_profile(values["input_profile"]).parallel
    values.setdefault("n_tokens", action_dim * (chunk_size if parallel else 1))
    cameras = TWO_ARM_CAMERAS if two_arms else LIBERO_CAMERAS
    values.setdefault("image_keys", list(cameras[: values.get("num_images_in_input", 1)]))
    if two_arms:
        # RoboTwin and ALOHA: joint angles, normalised from min to max
        values.setdefault("normalization", "bounds")
        values.setdefault("image_size", [240, 320])
        values.setdefault("joint_positions", True)
    libero = values["unnorm_key"].startswith("libero")
    values.setdefault("libero_images", libero)
    values.setdefault("gripper", "open_is_one" if libero else None)
    path = directory / PREPROCESSOR_FILE
    if path.is_file():
        preprocessor = json.loads(path.read_text(encoding="utf-8"))
        for name, field in (("pixel_means", "means"), ("pixel_stds", "stds")):
            if field in preprocessor:
                values.setdefault(name, preprocessor[field])
    projector = _proprio_file(directory)
    if projector is not None and "proprio_inputs" not in values:
        values["proprio_inputs"] = _load_proprio(projector)["fc1.weight"].shape[1]
    if values.get("proprio_inputs"):
        values.setdefault("proprio_dim", 9 if values["proprio_inputs"] == 8 else values["proprio_inputs"])
    return values


def _is_complete(values: Mapping[str, Any]) -> bool:
    # A field that nobody else's configuration has
    return "libero_images" in values


def complete_checkpoint(checkpoint: str | os.PathLike[str], **fields: Any) -> OpenVLAConfig:
    """
    Write into a checkpoint's ``config.json`` what its authors left unsaid, so that it is known from then on.

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


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A path to write to, which then replaces ``path``: nobody sees half a file."""
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        yield temporary
        temporary.chmod(0o644)  # safetensors writes files that only their owner can read
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_text(path: Path, text: str) -> None:
    with _replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _write_json(path: Path, values: Any) -> None:
    _write_text(path, json.dumps(values, indent=2) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# Names of weights


@dataclass(frozen=True)
class Part:
    """
    One published tensor and where it is in :class:`OpenVLAModel`.

    :param names: parameters that it is split into along the first dimension
    :param split: the tensor to the parameters' values
    :param join: the parameters' values, and those of ``reads``, to the tensor
    :param reads: further parameters that are needed to write it
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


def _proprio_file(directory: Path) -> Path | None:
    found = sorted(directory.glob(PROPRIO_PATTERN))
    if len(found) > 1:
        raise ValueError(
            f"{directory} has {len(found)} proprioception projectors ({', '.join(path.name for path in found)}); keep "
            "the one that belongs to the weights."
        )
    return found[0] if found else None


def _load_proprio(path: Path) -> dict[str, th.Tensor]:
    state = th.load(path, map_location="cpu", weights_only=True)
    # Written by a model that was wrapped for several GPUs
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def _shards(directory: Path) -> list[Path]:
    index = directory / INDEX_FILE
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        names = [WEIGHTS_FILE]
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{directory} is incomplete: {', '.join(missing)} is missing.")
    return [directory / name for name in names]


def _published_tensors(directory: Path, with_proprio: bool) -> Iterator[tuple[str, th.Tensor]]:
    for shard in _shards(directory):
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                # timm's own name; the published files avoid it because transformers once renamed it
                yield re.sub(r"(\.ls[12])\.gamma$", r"\1.scale_factor", name), file.get_tensor(name)
    projector = _proprio_file(directory) if with_proprio else None
    if projector is not None:
        for name, tensor in _load_proprio(projector).items():
            yield f"proprio_projector.{name}", tensor


def _assign(model: nn.Module, name: str, tensor: th.Tensor) -> None:
    """Replace a parameter or buffer without memory for the old one."""
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    old = getattr(module, attribute)
    if tuple(old.shape) != tuple(tensor.shape):
        raise ValueError(
            f"The checkpoint's weights do not fit its configuration: {name} has shape {tuple(tensor.shape)}, expected "
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
    with th.device("meta"):
        model = model_class(config)
    layout = published_layout(model)
    if model.proprio_projector is not None:
        layout |= {name: Part((name,)) for name in model.proprio_projector.state_dict(prefix="proprio_projector.")}
    missing = set(layout)
    unknown = []
    for name, tensor in _published_tensors(directory, model.proprio_projector is not None):
        # Older versions of transformers saved what can be computed; RLinf saves the critic
        if name.endswith("rotary_emb.inv_freq") or name.startswith("value_head."):
            continue
        if name not in layout:
            unknown.append(name)
            continue
        missing.discard(name)
        part = layout[name]
        for ours, value in zip(part.names, part.split(tensor), strict=True):
            # A copy, or the memory of the file would be the model's
            _assign(model, ours, value.to(device=device, dtype=dtype or value.dtype, copy=True).contiguous())
    for name in sorted(missing):
        (ours, *_), unused = layout[name].names, ".unused."
        if unused in ours:  # nobody misses what nobody uses
            missing.remove(name)
            _assign(model, ours, th.zeros_like(model.get_buffer(ours), device=device, dtype=dtype or th.float32))
    if missing or unknown:
        raise ValueError(
            f"The weights of {directory} are not in OpenVLA's published layout: {len(missing)} missing "
            f"({', '.join(sorted(missing)[:3])}), {len(unknown)} unknown ({', '.join(sorted(unknown)[:3])})."
        )
    model.reset_computed_buffers(device)
    model.tokenizer = PromptTokenizer(tokenizer.read_text(encoding="utf-8"))
    return model.eval()


def save_model(model: OpenVLAModel, directory: str | os.PathLike[str], max_shard_size: int = 5 * 10**9) -> None:
    """
    Write a checkpoint in the published layout, one shard in memory at a time.

    :param model: the model
    :param directory: created if needed
    :param max_shard_size: largest size of a shard in bytes
    """
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
        with _replacing(directory / file) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
    written = set(weight_map.values())
    if len(shards) > 1:
        written.add(INDEX_FILE)
        _write_json(directory / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
    if model.proprio_projector is not None:
        written.add(PROPRIO_FILE)
        weights = {name: tensor.cpu() for name, tensor in model.proprio_projector.state_dict().items()}
        with _replacing(directory / PROPRIO_FILE) as temporary:
            th.save(weights, temporary)
    config = model.config
    if model.tokenizer is not None:
        _write_text(directory / TOKENIZER_FILE, model.tokenizer.to_str())
        _write_json(directory / "tokenizer_config.json", TOKENIZER_CONFIG)
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
