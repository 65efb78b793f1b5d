"""Films of episodes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from opd_gym.checks import check_range
from opd_gym.files import replacing


def check_film(path: str | os.PathLike[str]) -> None:
    """
    :param path: film to write
    :raises ValueError: neither an MP4 nor a GIF, by the suffix
    :raises ImportError: imageio is not installed
    """
    if Path(path).suffix.lower() not in (".mp4", ".gif"):
        raise ValueError(f"A film is an .mp4 or a .gif, got {Path(path).name!r}.")
    try:
        import imageio.v2  # noqa: F401
    except ImportError as error:
        raise ImportError("Films need imageio. Run: pip install 'opd_gym[plots]'") from error


def write_video(path: str | os.PathLike[str], frames: Sequence[np.ndarray], fps: float = 5.0) -> Path:
    """
    Write an MP4 or a GIF, by the suffix; an interrupted write leaves no file of that name.

    :param path: file to write
    :param frames: pictures, uint8 ``(H, W, 3)``, all of one size
    :param fps: pictures per second
    :return: the file
    """
    check_range("(0, inf)", fps=fps)
    path = Path(path)
    check_film(path)
    if not frames:
        raise ValueError("There is no picture to make a film of: no episode was recorded.")
    if len({frame.shape for frame in frames}) > 1:
        raise ValueError(f"The pictures of a film have one size, these have {sorted({f.shape[:2] for f in frames})}.")
    import imageio.v2 as imageio

    with replacing(path) as temporary:
        if path.suffix.lower() == ".gif":
            imageio.mimsave(temporary, list(frames), duration=1000.0 / fps, loop=0)
        else:
            # H.264 with 4:2:0 needs even sides; without macro_block_size=1 imageio would stretch the pictures to 16.
            even = [frame[: frame.shape[0] // 2 * 2, : frame.shape[1] // 2 * 2] for frame in frames]
            imageio.mimsave(temporary, list(even), fps=fps, macro_block_size=1)
    return path


def caption(frame: np.ndarray, text: str, height: int = 20) -> np.ndarray:
    """
    :param frame: picture
    :param text: one line, written above it
    :param height: height of the strip in pixels
    :return: the picture with the strip
    """
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (frame.shape[1], frame.shape[0] + height), (20, 20, 20))
    picture.paste(Image.fromarray(frame), (0, height))
    ImageDraw.Draw(picture).text((5, height // 2 - 6), text, fill=(240, 240, 240))
    return np.asarray(picture)


def side_by_side(left: Sequence[np.ndarray], right: Sequence[np.ndarray], titles: tuple[str, str]) -> list[np.ndarray]:
    """
    Two episodes at once; the shorter one stands still at its end.

    :param left: pictures of one episode
    :param right: pictures of the other
    :param titles: what is written above them
    :return: the pictures
    """
    if not left or not right:
        return []
    frames = []
    for i in range(max(len(left), len(right))):
        pair = [caption(film[min(i, len(film) - 1)], title) for film, title in zip((left, right), titles, strict=True)]
        frames.append(np.concatenate(pair, axis=1))
    return frames
