"""
LIBERO-Plus' sensor noise: five kinds with ten strengths each.

Its own code needs ImageMagick, OpenCV and scikit-image; the same mathematics is here in NumPy and SciPy, and gives the
same pixels (``tests/golden/liberoplus``).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

SIZE = 256  # the benchmark's pictures; fog and glass are defined for these alone

_MOTION = ((5, 2), (8, 3), (10, 4), (12, 5), (15, 6), (18, 8), (20, 10), (25, 12), (30, 15), (35, 20))
_ZOOM_END = (1.11, 1.16, 1.21, 1.26, 1.31, 1.36, 1.41, 1.46, 1.51, 1.56)
_ZOOM_STEP = (0.01, 0.01, 0.02, 0.02, 0.03, 0.01, 0.01, 0.02, 0.02, 0.03)
_FOG = ((0.5, 3), (1, 2.8), (1.5, 2.5), (2, 2.2), (2.5, 2), (3, 1.8), (3.5, 1.6), (4, 1.5), (4.5, 1.4), (5, 1.3))
_GLASS = (
    *((0.5, 1, 3), (0.7, 1, 3), (0.9, 2, 3), (1.0, 2, 2), (1.1, 3, 2)),
    *((1.3, 3, 2), (1.5, 4, 2), (1.8, 4, 2), (2.2, 5, 1), (2.5, 5, 1)),
)


def corrupt(picture: np.ndarray, number: int, rng: np.random.RandomState) -> np.ndarray:
    """
    A picture as the benchmark's noise ``number`` leaves it.

    :param picture: uint8 ``(256, 256, 3)``, upright
    :param number: 1 to 50: motion blur, Gaussian blur, zoom blur, fog, glass, ten strengths each
    :param rng: what the noise is drawn from; NumPy's legacy generator, as in the benchmark
    :return: uint8 ``(256, 256, 3)``
    :raises ValueError: unknown number, or a picture of another shape
    """
    if not 1 <= number <= 50:
        raise ValueError(f"LIBERO-Plus has the noises 1 to 50, got {number}.")
    if picture.shape != (SIZE, SIZE, 3):
        raise ValueError(f"LIBERO-Plus' noise is defined for pictures of {SIZE} pixels, got shape {picture.shape}.")
    kind, strength = divmod(number - 1, 10)
    # The benchmark's pictures are upside down
    return _KINDS[kind](picture[::-1], strength, rng)[::-1]


def _to_bytes(picture: np.ndarray) -> np.ndarray:
    """From [0, 1]; truncated and not rounded, as in the benchmark."""
    return (np.clip(picture, 0, 1) * 255).astype(np.uint8)


def _gaussian(picture: np.ndarray, sigma: float) -> np.ndarray:
    from scipy.ndimage import gaussian_filter

    return gaussian_filter(picture, (sigma, sigma, 0), mode="nearest")


def _motion_blur(picture: np.ndarray, strength: int, rng: np.random.RandomState) -> np.ndarray:
    """ImageMagick's: a one-sided Gaussian along a line, in 16 bits, edges continued."""
    radius, sigma = _MOTION[strength]
    angle = np.radians(rng.uniform(-45, 45))
    reach = np.arange(2 * radius + 1)
    weights = np.exp(-(reach**2) / (2 * sigma**2))
    weights /= weights.sum()
    columns = np.ceil(reach * np.cos(angle) - 0.5).astype(int)
    rows = np.ceil(reach * np.sin(angle) - 0.5).astype(int)
    total = np.zeros(picture.shape)
    at = np.arange(SIZE)
    for weight, row, column in zip(weights, rows, columns, strict=True):
        total += weight * 257.0 * picture[(at + row).clip(0, SIZE - 1)][:, (at + column).clip(0, SIZE - 1)]
    # Rounded to the nearest in 16 bits, but down in 8
    return (np.floor(total + 0.5).astype(np.int64) // 257).astype(np.uint8)


def _gaussian_blur(picture: np.ndarray, strength: int, rng: np.random.RandomState) -> np.ndarray:
    return _to_bytes(_gaussian(picture / 255.0, strength + 1))


def _zoom_blur(picture: np.ndarray, strength: int, rng: np.random.RandomState) -> np.ndarray:
    from scipy.ndimage import zoom

    original = (picture / 255.0).astype(np.float32)
    total = np.zeros_like(original)
    factors = np.arange(1, _ZOOM_END[strength], _ZOOM_STEP[strength])
    for factor in factors:
        n = int(np.ceil(SIZE / factor))
        top = (SIZE - n) // 2
        zoomed = zoom(original[top : top + n, top : top + n], (factor, factor, 1), order=1)
        trim = (len(zoomed) - SIZE) // 2
        total += zoomed[trim : trim + SIZE, trim : trim + SIZE]
    return _to_bytes((original + total) / (len(factors) + 1))


def _fog(picture: np.ndarray, strength: int, rng: np.random.RandomState) -> np.ndarray:
    amount, decay = _FOG[strength]
    clear = picture / 255.0
    brightest = clear.max()
    foggy = clear + amount * _plasma(decay, rng)[..., None]
    return _to_bytes(foggy * brightest / (brightest + amount))


def _plasma(decay: float, rng: np.random.RandomState) -> np.ndarray:
    """Clouds by the diamond-square algorithm, float ``(256, 256)`` in [0, 1]."""
    field = np.zeros((SIZE, SIZE))
    step, wobble = SIZE, 100.0

    def mean(total: np.ndarray) -> np.ndarray:
        return total / 4 + wobble * rng.uniform(-wobble, wobble, total.shape)

    while step >= 2:
        half = step // 2
        corners = field[::step, ::step]
        total = corners + np.roll(corners, -1, axis=0)
        field[half::step, half::step] = mean(total + np.roll(total, -1, axis=1))
        centres = field[half::step, half::step]
        across, down = centres + np.roll(centres, 1, axis=0), corners + np.roll(corners, -1, axis=1)
        field[::step, half::step] = mean(across + down)
        across, down = centres + np.roll(centres, 1, axis=1), corners + np.roll(corners, -1, axis=0)
        field[half::step, ::step] = mean(across + down)
        step, wobble = half, wobble / decay
    field -= field.min()
    return field / field.max()


def _glass(picture: np.ndarray, strength: int, rng: np.random.RandomState) -> np.ndarray:
    sigma, reach, rounds = _GLASS[strength]
    blurred = np.uint8(_gaussian(picture / 255.0, sigma) * 255)
    # The benchmark means to swap pixels. Both sides of its swap are views, so it copies; and it goes as far as 224
    # pixels, whatever the picture's size.
    scope = range(224 - reach, reach, -1)
    shifts = rng.randint(-reach, reach, size=(rounds * len(scope) ** 2, 2)).tolist()
    source = np.arange(SIZE * SIZE).tolist()  # which pixel each shows; a list, because it changes one by one
    positions = (row * SIZE + column for _ in range(rounds) for row in scope for column in scope)
    for position, (dx, dy) in zip(positions, shifts, strict=True):
        source[position] = source[position + dy * SIZE + dx]
    shuffled = blurred.reshape(-1, 3)[source].reshape(picture.shape)
    return _to_bytes(_gaussian(shuffled / 255.0, sigma))


_KINDS: tuple[Callable[[np.ndarray, int, np.random.RandomState], np.ndarray], ...] = (
    _motion_blur,
    _gaussian_blur,
    _zoom_blur,
    _fog,
    _glass,
)
