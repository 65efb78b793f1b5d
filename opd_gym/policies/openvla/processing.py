"""Turns observations of an env into the inputs OpenVLA was trained on: pictures, prompt, proprioception."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch as th
from tokenizers import Tokenizer
from torch.nn import functional as F

from opd_gym.instructions import decode_instruction
from opd_gym.policies.openvla.jpeg import jpeg_round_trip

if TYPE_CHECKING:
    from opd_gym.policies.openvla.configuration import OpenVLAConfig

CROP_AREA = 0.9
BOS = 1
# The space between the prompt and the first action token. SimpleVLA-RL appends its id, RLinf ends the prompt with it.
EMPTY_TOKEN = 29871
_MAX_CACHED_PROMPTS = 4096


# ---------------------------------------------------------------------------------------------------------------------
# Prompt


class PromptTokenizer:
    """
    Instructions to the ids of OpenVLA's prompt. Prompts are remembered: a benchmark has few instructions.

    :param text: contents of ``tokenizer.json``
    :param sentencepiece: contents of ``tokenizer.model``, the same tokenizer for other software; empty if there is none
    """

    def __init__(self, text: str, sentencepiece: bytes = b""):
        self._text = text
        self.sentencepiece = sentencepiece
        self._tokenizer = Tokenizer.from_str(text)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._cache: dict[bytes, list[int]] = {}

    def to_str(self) -> str:
        """Contents of ``tokenizer.json``."""
        return self._text

    def to_bytes(self) -> bytes:
        """Both files, the first of which has no zero in it."""
        return self._text.encode("utf-8") + (b"\0" + self.sentencepiece if self.sentencepiece else b"")

    @classmethod
    def from_bytes(cls, state: bytes) -> PromptTokenizer:
        """
        :param state: what :meth:`to_bytes` gave
        :return: the tokenizer
        """
        text, _, sentencepiece = state.partition(b"\0")
        return cls(text.decode("utf-8"), sentencepiece)

    def __reduce__(self) -> tuple[Any, ...]:
        return PromptTokenizer, (self._text, self.sentencepiece)

    def prompt_ids(self, instruction: str) -> list[int]:
        """
        :param instruction: what to do
        :return: ids of the prompt, from BOS to the empty token
        """
        prompt = f"In: What action should the robot take to {instruction.lower()}?\nOut:"
        ids = self._tokenizer.encode(prompt).ids
        # Llama's tokenizer class adds BOS, whether or not the file says so
        return [*([] if ids[0] == BOS else [BOS]), *ids, EMPTY_TOKEN]

    def __call__(self, instructions: np.ndarray, pad_token_id: int) -> tuple[np.ndarray, np.ndarray]:
        """
        :param instructions: uint8 ``(B, N)``, UTF-8 bytes, zero padded
        :param pad_token_id: fills up shorter prompts, behind BOS
        :return: int64 ids and mask (1 for tokens, 0 for padding), ``(B, length of the longest prompt)``
        """
        prompts = []
        for row in instructions:
            key = row.tobytes()
            if key not in self._cache:
                if len(self._cache) >= _MAX_CACHED_PROMPTS:
                    self._cache.clear()
                self._cache[key] = self.prompt_ids(decode_instruction(row))
            prompts.append(self._cache[key])
        length = max(len(prompt) for prompt in prompts)
        ids = np.full((len(prompts), length), pad_token_id, dtype=np.int64)
        mask = np.zeros((len(prompts), length), dtype=np.int64)
        for i, (bos, *rest) in enumerate(prompts):
            ids[i, 0], ids[i, length - len(rest) :] = bos, rest
            mask[i, 0] = mask[i, length - len(rest) :] = 1
        return ids, mask


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def _sinf(x: np.ndarray) -> np.ndarray:
    """The C library's sine of float32, which is TensorFlow's; NumPy has its own, with another last bit, for reals."""
    return np.sin(x.astype(np.complex64)).real


@functools.lru_cache(maxsize=32)
def _lanczos_taps(n_in: int, n_out: int) -> tuple[np.ndarray, np.ndarray]:
    """
    Weights of TensorFlow's ``resize(method="lanczos3", antialias=True)`` along one dimension.

    :return: int64 indices and float32 weights, ``(n_taps, n_out)``
    """
    one = np.float32(1.0)
    step = one / (np.float32(n_out) / np.float32(n_in))
    stretch = max(step, one)  # the kernel is as wide as an output pixel, where there are fewer of them
    centers = (np.arange(n_out, dtype=np.float32) + np.float32(0.5)) * step
    first = np.ceil(centers - 3 * stretch - np.float32(0.5)).astype(np.int64)
    indices = first + np.arange(int(np.ceil(6 * stretch)) + 1)[:, None]
    x = np.abs(indices.astype(np.float32) + np.float32(0.5) - centers) * (one / stretch)
    near = x <= 1e-3
    pi, radius, y = np.float32(np.pi), np.float32(3.0), np.where(near, one, x)
    kernel = radius * _sinf(pi * y) * _sinf(pi * y / radius) / (pi * pi * y * y)
    inside = (x <= 3.0) & (indices >= 0) & (indices < n_in)
    weights = np.where(inside, np.where(near, one, kernel), np.float32(0.0))
    total = np.zeros(n_out, dtype=np.float32)
    for tap in weights:
        total = total + tap
    return indices.clip(0, n_in - 1), weights * (one / total)


def _gather(images: th.Tensor, size: int, dim: int) -> th.Tensor:
    indices, weights = (th.as_tensor(part, device=images.device) for part in _lanczos_taps(images.shape[dim], size))
    # In TensorFlow's order and without fused operations: the rounding that follows sees the last bit
    total = th.zeros((), device=images.device)
    for index, weight in zip(indices, weights, strict=True):
        total = total + images.index_select(dim, index) * (weight if dim == 3 else weight[:, None])
    return total


def resize_lanczos(images: th.Tensor, size: int) -> th.Tensor:
    """
    :param images: uint8 ``(B, 3, H, W)``
    :param size: new height and width
    :return: uint8 ``(B, 3, size, size)``
    """
    return _gather(_gather(images.float(), size, 2), size, 3).round().clamp(0, 255).to(th.uint8)


def resize_bicubic(images: th.Tensor, size: int) -> th.Tensor:
    """
    torchvision's resize of uint8 tensors, with antialiasing.

    :param images: uint8 ``(B, 3, H, W)``
    :param size: new height and width
    :return: uint8 ``(B, 3, size, size)``
    """
    if images.shape[-2:] == (size, size):
        return images
    resized = F.interpolate(images.float(), (size, size), mode="bicubic", align_corners=False, antialias=True)
    return resized.clamp(0, 255).round().to(th.uint8)


@functools.lru_cache(maxsize=32)
def _crop_positions(n_in: int, n_out: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    Where TensorFlow's ``crop_and_resize`` reads, for the crop in the middle: indices below and above, and the fraction.
    """
    side = np.sqrt(np.float32(CROP_AREA))
    start = (np.float32(1.0) - side) / np.float32(2.0)
    last = np.float32(n_in - 1)
    step = (start + side - start) * last / np.float32(n_out - 1)
    positions = start * last + np.arange(n_out, dtype=np.float32) * step
    below = np.floor(positions)
    return below.astype(np.int64), np.ceil(positions).astype(np.int64), positions - below


def center_crop(images: th.Tensor, size: int) -> th.Tensor:
    """
    Cut out the middle, 0.9 of the area, and enlarge it.

    :param images: uint8 ``(B, 3, H, W)``
    :param size: new height and width
    :return: uint8 ``(B, 3, size, size)``
    """
    x = images.float() * float(np.float32(1.0 / 255.0))
    for dim in (3, 2):
        below, above, fraction = (
            th.as_tensor(part, device=images.device) for part in _crop_positions(images.shape[dim], size)
        )
        low, high = x.index_select(dim, below), x.index_select(dim, above)
        x = low + (high - low) * (fraction if dim == 3 else fraction[:, None])
    # TensorFlow's way from [0, 1] to whole numbers
    return (x.clamp(0.0, 1.0) * 255.5).clamp(0, 255).to(th.uint8)


def pixel_values(images: Sequence[th.Tensor], config: OpenVLAConfig) -> th.Tensor:
    """
    What the vision transformers see.

    :param images: uint8 ``(B, 3, H, W)`` of each camera, upright
    :param config: configuration of the model
    :return: float32 ``(B, n_cameras, 6, S, S)``: normalised for DINOv2, then for SigLIP
    """
    size, profile = config.vision_size, config.profile
    seen = []
    for image in images:
        if config.libero_images:
            image = image.flip(-1)
        if profile.resize == "bicubic":
            image = resize_bicubic(image, size)
        elif config.libero_images if profile.resize == "jpeg_libero" else image.shape[-2:] != (size, size):
            image = resize_lanczos(jpeg_round_trip(image), size)
        seen.append(center_crop(image, size) if profile.crop else image)
    pixels = th.stack(seen, dim=1).float() / 255.0
    parts = []
    for means, stds in zip(config.pixel_means, config.pixel_stds, strict=True):
        mean, std = (pixels.new_tensor(values).view(3, 1, 1) for values in (means, stds))
        parts.append((pixels - mean) / std)
    return th.cat(parts, dim=2)


# ---------------------------------------------------------------------------------------------------------------------
# Proprioception


def axis_angle(quaternion: th.Tensor) -> th.Tensor:
    """
    robosuite's conversion.

    :param quaternion: ``(B, 4)``, x y z w
    :return: ``(B, 3)``, axis times angle in radians, in [0, 2 pi]
    """
    w = quaternion[:, 3:].clamp(-1.0, 1.0)
    sine = (1.0 - w * w).sqrt()
    return th.where(sine < 1e-9, th.zeros_like(w), quaternion[:, :3] * 2.0 * w.acos() / sine.clamp(min=1e-9))


def model_proprio(proprio: th.Tensor, config: OpenVLAConfig) -> th.Tensor:
    """
    :param proprio: float ``(B, config.proprio_dim)`` of the env
    :param config: configuration of the model
    :return: float32 ``(B, config.proprio_inputs)``, normalised to [-1, 1]
    """
    proprio = proprio.double()
    if config.proprio_inputs != config.proprio_dim:
        # LIBERO: position, quaternion and fingers, of which OpenVLA knows the orientation as axis-angle
        proprio = th.cat([proprio[:, :3], axis_angle(proprio[:, 3:7]), proprio[:, 7:]], dim=1)
    statistics = config.data_statistics("proprio")
    low, high = (proprio.new_tensor(statistics[key]) for key in ("q01", "q99"))
    mask = th.as_tensor(np.asarray(statistics["mask"], dtype=bool), device=proprio.device)
    normalised = 2.0 * (proprio - low) / (high - low + 1e-8) - 1.0
    return th.where(mask, normalised, proprio).clamp(-1.0, 1.0).float()
