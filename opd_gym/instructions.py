"""Instructions as fixed-size arrays of UTF-8 bytes: Stable-Baselines3 has no text observations."""

from __future__ import annotations

import numpy as np

INSTRUCTION_BYTES = 128


def encode_instruction(instruction: str, length: int = INSTRUCTION_BYTES) -> np.ndarray:
    """
    :param instruction: any text; what does not fit is cut off between two characters
    :param length: number of bytes
    :return: uint8 array of ``length`` UTF-8 bytes, zero padded
    """
    # Decoding what was cut with "ignore" drops a character that was cut in half.
    text = instruction.encode("utf-8")[:length].decode("utf-8", errors="ignore").encode("utf-8")
    encoded = np.zeros(length, dtype=np.uint8)
    encoded[: len(text)] = np.frombuffer(text, dtype=np.uint8)
    return encoded


def decode_instruction(encoded: np.ndarray) -> str:
    """
    :param encoded: uint8 array of UTF-8 bytes, zero padded
    :return: the text
    """
    return bytes(np.asarray(encoded, dtype=np.uint8)).rstrip(b"\0").decode("utf-8")
