"""Reads the configuration of a published OpenVLA checkpoint, and infers what it leaves out from its files and name."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch as th

from opd_gym.checkpoints import CONFIG_FILE, adapter_advice, resolve_checkpoint
from opd_gym.policies.body import check_weight, read_config, read_json

MODEL_TYPE = "openvla"
INDEX_FILE = "model.safetensors.index.json"
STATISTICS_FILE = "dataset_statistics.json"
TOKENIZER_FILE = "tokenizer.json"
SENTENCEPIECE_FILE = "tokenizer.model"
PREPROCESSOR_FILE = "preprocessor_config.json"
PROPRIO_FILE = "proprio_projector--latest_checkpoint.pt"
PROPRIO_PATTERN = "proprio_projector--*checkpoint.pt"
LIBERO_CAMERAS = ("agentview", "wrist")
TWO_ARM_CAMERAS = ("head", "left_wrist", "right_wrist")
FILM_PATTERN = "vision_backbone--*checkpoint.pt"
HEAD_PATTERNS = ("action_head--*checkpoint.pt", "noisy_action_projector--*checkpoint.pt")


@dataclass(frozen=True)
class InputProfile:
    """
    What the inputs of a checkpoint look like. They must be made the way they were made for its training.

    :param parallel: all tokens of a decision come from one pass with bidirectional attention (OpenVLA-OFT); otherwise
        one after the other with causal attention (OpenVLA)
    :param stop_token: parallel decoding only: whether the tokens attend to an end-of-sequence token behind them
    :param resize: "jpeg": through JPEG and a Lanczos resize, as in OpenVLA's data loader, unless a picture has the size
        that the model sees; "jpeg_libero": LIBERO's pictures likewise, whatever their size, and no others; "bicubic":
        one bicubic resize
    :param crop: cut out the middle, 0.9 of the area, after that
    :param rounded_frequencies: whether a model in bfloat16 has the frequencies of its rotary positions rounded to
        bfloat16 as well
    """

    parallel: bool
    stop_token: bool
    resize: str
    crop: bool
    rounded_frequencies: bool


INPUT_PROFILES = {
    "openvla": InputProfile(False, False, "jpeg_libero", crop=True, rounded_frequencies=False),
    "openvla-oft": InputProfile(True, True, "jpeg", crop=True, rounded_frequencies=False),
    "simplevla-rl": InputProfile(True, True, "jpeg_libero", crop=True, rounded_frequencies=False),
    "rlinf": InputProfile(True, False, "bicubic", crop=False, rounded_frequencies=True),
    "rlinf-openvla": InputProfile(False, False, "bicubic", crop=False, rounded_frequencies=True),
}


# In lower case; the hub's cache has -- between owner and name
PUBLISHED_NAMES = {
    r"(rlinf--)?rlinf-openvlaoft-.*robotwin.*": "simplevla-rl",
    r"(rlinf--)?rlinf-openvlaoft-.*": "rlinf",
    r"(rlinf--)?rlinf-openvla-.*": "rlinf-openvla",
    r"haozhan72--.*|.*openvla-oft-sft-.*": "simplevla-rl",
    r"(openvla--)?openvla-7b(-finetuned-libero-\w+)?": "openvla",
}


def get_profile(name: str) -> InputProfile:
    """
    :param name: "openvla", "openvla-oft", "simplevla-rl", "rlinf" or, for autoregressive models, "rlinf-openvla"
    :return: the profile
    :raises ValueError: unknown name
    """
    if name not in INPUT_PROFILES:
        raise ValueError(f"input_profile must be one of {sorted(INPUT_PROFILES)}, got {name!r}.")
    return INPUT_PROFILES[name]


def data_set(norm_stats: Mapping[str, Any], unnorm_key: str | None) -> str:
    """
    :param norm_stats: statistics by data set
    :param unnorm_key: name of a data set, with or without LIBERO's suffix ``_no_noops``; None if there is one only
    :return: the name in ``norm_stats``
    :raises ValueError: it is not there, or there are several to choose from
    """
    if unnorm_key is None and len(norm_stats) == 1:
        return next(iter(norm_stats))
    for name in (unnorm_key, f"{unnorm_key}_no_noops"):
        if name in norm_stats:
            return str(name)
    raise ValueError(
        f"unnorm_key {unnorm_key!r} names no data set of this checkpoint. It has statistics of: "
        f"{sorted(norm_stats) or 'none'}. Say which ones to use: "
        'opd_gym.policies.openvla.complete_checkpoint(checkpoint, unnorm_key="...").'
    )


def locate(checkpoint: str | os.PathLike[str]) -> Path:
    """
    :param checkpoint: see :func:`opd_gym.checkpoints.resolve_checkpoint`
    :return: the directory
    :raises FileNotFoundError: there is none
    """
    directory = resolve_checkpoint(checkpoint)
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} is not the directory of a checkpoint of OpenVLA.")
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
    values = read_config(path)
    model_type = values.get("model_type")
    if model_type != MODEL_TYPE:
        raise ValueError(f"{path} is of model type {model_type!r}, expected {MODEL_TYPE!r}.")
    return values


def detect_profile(directory: Path, implementation: str | None = None) -> str:
    """
    Find out which code trained a published checkpoint, from the name under which it was published.

    :param directory: the checkpoint
    :param implementation: ``implement_version`` of the configuration: which of its two implementations RLinf used
    :return: the name of its :class:`InputProfile`
    :raises ValueError: the name does not tell
    """
    path = directory.absolute()
    in_cache = path.parent.name == "snapshots"  # of the hub: models--owner--name/snapshots/<revision>
    name = (path.parent.parent if in_cache else path).name.lower().removeprefix("models--")
    # RLinf took over SimpleVLA-RL's inputs for two arms, and for whatever was trained by openvla-oft itself
    if implementation == "official":
        return "simplevla-rl"
    if implementation == "rlinf":
        return "rlinf"
    for pattern, profile in PUBLISHED_NAMES.items():
        if re.fullmatch(pattern, name):
            return profile
    raise ValueError(
        f"{directory} does not say what inputs it was trained on, and on others it scores far lower. Say it once, by "
        f"the code that it was trained with, one of {sorted(INPUT_PROFILES)}; this writes it to its config.json: "
        'python -c "from opd_gym.policies.openvla import complete_checkpoint; '
        f"complete_checkpoint({str(directory)!r}, input_profile='openvla-oft')\""
    )


def _translate(values: Mapping[str, Any]) -> dict[str, Any]:
    """Other software's configuration in our terms. Some of its fields have our names for other things."""
    ours = dict(values)
    # There the size of the projector's input, here of the observation
    n_proprio = ours.pop("proprio_dim", 0)
    # There the size of what the vision transformers see, here of the observation; the others follow from the parts
    for name in ("image_size", "hidden_size", "vocab_size"):
        ours.pop(name, None)
    if "use_proprio" in ours:
        ours["proprio_inputs"] = n_proprio if ours.pop("use_proprio") else 0
    return ours


def complete_values(directory: Path, values: Mapping[str, Any], **fields: Any) -> dict[str, Any]:
    """
    Fill in what a published ``config.json`` leaves out: inputs, action space, statistics.

    :param directory: the checkpoint
    :param values: its ``config.json``; what it says stands
    :param fields: what is known besides
    :return: the arguments of :class:`OpenVLAConfig`
    :raises ValueError: continuous actions, FiLM, unmerged adapters, no statistics, or the files do not tell enough
    """
    heads = [path.name for pattern in HEAD_PATTERNS for path in directory.glob(pattern)]
    if heads:
        raise ValueError(
            f"{directory} predicts continuous actions ({', '.join(sorted(heads))}). Distillation needs action tokens: "
            "use a checkpoint of the discrete variant."
        )
    film = sorted(path.name for path in directory.glob(FILM_PATTERN))
    if film or values.get("use_film"):
        raise ValueError(
            f"{directory} has a vision backbone that sees the instruction (FiLM: {', '.join(film) or 'use_film'}). "
            "That is not supported, and without it the model would not see what it was trained on. Use a checkpoint "
            "that was trained without FiLM."
        )
    advice = adapter_advice(directory)
    if advice and not any(directory.glob("model*.safetensors")):
        raise ValueError(f"{directory} has no weights of its own.{advice}")
    values = {**(values if _is_complete(values) else _translate(values)), **fields}
    norm_stats = dict(values.get("norm_stats") or {})
    path = directory / STATISTICS_FILE
    if path.is_file():
        fine_tuned = read_json(path)
        if not isinstance(fine_tuned, dict):
            raise ValueError(f"{path} must map data sets to statistics.")
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
        preprocessor = read_json(path)
        if not isinstance(preprocessor, dict):
            raise ValueError(f"{path} must be a JSON object.")
        for name, field in (("pixel_means", "means"), ("pixel_stds", "stds")):
            if field in preprocessor:
                values.setdefault(name, preprocessor[field])
    projector = proprio_file(directory)
    if projector is not None and "proprio_inputs" not in values:
        values["proprio_inputs"] = load_proprio(projector)["fc1.weight"].shape[-1]
    if values.get("proprio_inputs"):
        values.setdefault("proprio_dim", 9 if values["proprio_inputs"] == 8 else values["proprio_inputs"])
    return values


def _is_complete(values: Mapping[str, Any]) -> bool:
    # A field that nobody else's configuration has
    return "libero_images" in values


def proprio_file(directory: Path) -> Path | None:
    found = sorted(directory.glob(PROPRIO_PATTERN))
    if len(found) > 1:
        raise ValueError(
            f"{directory} has {len(found)} proprioception projectors ({', '.join(path.name for path in found)}); keep "
            "the one that belongs to the weights."
        )
    return found[0] if found else None


def load_proprio(path: Path) -> dict[str, th.Tensor]:
    try:
        # Written by a model that was wrapped for several GPUs
        state = {
            name.removeprefix("module."): tensor
            for name, tensor in th.load(path, map_location="cpu", weights_only=True).items()
        }
    except Exception as error:  # a pickle that is damaged raises anything
        raise ValueError(f"{path} is not a file of weights, or is damaged: {error!r}") from error
    for name, tensor in state.items():
        check_weight(str(path), name, tensor)
    if "fc1.weight" not in state:
        raise ValueError(f"{path} has no `fc1.weight`: it is not a projector of proprioception.")
    return state
