"""Instructions as fixed-size arrays of UTF-8 bytes: Stable-Baselines3 has no text observations."""

from __future__ import annotations

import warnings

import numpy as np

INSTRUCTION_BYTES = 128


def encode_instruction(instruction: str, length: int = INSTRUCTION_BYTES) -> np.ndarray:
    """
    :param instruction: any text; what does not fit is cut off between two characters, with a warning
    :param length: number of bytes
    :return: uint8 array of ``length`` UTF-8 bytes, zero padded
    """
    # Decoding what was cut with "ignore" drops a character that was cut in half.
    whole = instruction.encode("utf-8")
    text = whole[:length].decode("utf-8", errors="ignore").encode("utf-8")
    if len(text) < len(whole):
        warnings.warn(
            f"An instruction has {len(whole)} bytes, {length} fit: {whole[len(text) :].decode()!r} is cut off. "
            "Make room with instruction_bytes (LIBERO-Plus) or instruction_length (demonstrations).",
            stacklevel=2,
        )
    encoded = np.zeros(length, dtype=np.uint8)
    encoded[: len(text)] = np.frombuffer(text, dtype=np.uint8)
    return encoded


def decode_instruction(encoded: np.ndarray) -> str:
    """
    :param encoded: uint8 array of UTF-8 bytes, zero padded
    :return: the text
    """
    return bytes(np.asarray(encoded, dtype=np.uint8)).rstrip(b"\0").decode("utf-8")
