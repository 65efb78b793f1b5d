"""Instructions as fixed-size arrays of UTF-8 bytes: Stable-Baselines3 has no text observations."""

from __future__ import annotations

import numpy as np

from opd_gym.checks import check_at_least_one

INSTRUCTION_BYTES = 128


def encode_instruction(instruction: str, length: int = INSTRUCTION_BYTES) -> np.ndarray:
    """
    :param instruction: any text of at most ``length`` bytes
    :param length: number of bytes
    :return: uint8 array of ``length`` UTF-8 bytes, zero padded
    :raises ValueError: the text is longer: a policy would be told half of what to do
    """
    check_at_least_one(length=length)
    text = instruction.encode("utf-8")
    if len(text) > length:
        raise ValueError(
            f"The instruction {instruction!r} has {len(text)} bytes, the observation has room for {length}. Shorten "
            "it, or make the room larger (instruction_bytes of LiberoPlusEnv, instruction_length of demonstrations)."
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
