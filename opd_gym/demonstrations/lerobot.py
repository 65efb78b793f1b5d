"""
LeRobot's data sets (format v3, https://huggingface.co/docs/lerobot/lerobot-dataset-v3): read, with pictures or videos,
and written, for LeRobot to read. Needs ``pip install 'opd-gym[lerobot]'``, and no LeRobot.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from opd_gym.checks import check_at_least_one
from opd_gym.demonstrations.hdf5 import LEROBOT_INFO, Episode, PathLike, axis_angle_to_quat, quat_to_axis_angle
from opd_gym.demonstrations.untrusted import reading
from opd_gym.files import sync, temporary_beside

Layout = Literal["libero", "plain"]

DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
EPISODES_PATH = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
# What the recorder says of itself; LeRobot passes over it
ABOUT = "meta/opd_gym.json"

# LeRobot's names for LIBERO (HuggingFaceVLA/libero), and those of openpi (physical-intelligence/libero)
LIBERO_NAMES = (
    {
        "agentview": "observation.images.image",
        "wrist": "observation.images.image2",
        "proprio": "observation.state",
        "actions": "action",
    },
    {"agentview": "image", "wrist": "wrist_image", "proprio": "state", "actions": "actions"},
)
MAX_FILES_OF_A_CHUNK = 1000
MAX_FILE_BYTES = 100 * 2**20
QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
# Panda's fingers move over [0, 0.04] and [-0.04, 0] m, and a little beyond where they are pressed
FINGERS = ((-0.01, 0.06), (-0.06, 0.01))


def _parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("LeRobot's data sets need pyarrow: pip install 'opd-gym[lerobot]'") from error
    return pyarrow.parquet


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("The pictures of LeRobot's data sets need Pillow: pip install 'opd-gym[lerobot]'") from error
    return Image


def _ffmpeg() -> str:
    try:
        from imageio_ffmpeg import get_ffmpeg_exe
    except ImportError as error:
        raise ImportError("LeRobot's videos need imageio-ffmpeg: pip install 'opd-gym[lerobot]'") from error
    return str(get_ffmpeg_exe())


# -------------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class _Names:
    """Features of a data set by our names for them."""

    cameras: dict[str, str]
    proprio: str
    actions: str
    is_libero: bool


def _shape(features: Mapping[str, Any], name: str) -> tuple[int, ...]:
    shape = features[name].get("shape")
    if not isinstance(shape, list) or not all(isinstance(n, int) for n in shape):
        raise ValueError(f"The feature {name} has shape {shape!r}, expected a list of numbers.")
    return tuple(shape)


def _names_of(features: Mapping[str, Any], layout: str | None, given: Mapping[str, str] | None) -> _Names:
    """Which feature is which."""
    if layout not in (None, "libero", "plain"):
        raise ValueError(f'layout must be "libero", "plain" or None, got {layout!r}.')
    # Depth has one channel
    pictures = [key for key in features if features[key].get("dtype") in ("image", "video")]
    pictures = [key for key in pictures if 3 in _shape(features, key)]
    if given is not None:
        names = dict(given)
    else:
        libero = next((names for names in LIBERO_NAMES if _is_libero(features, names)), None)
        names = {} if libero is None or layout == "plain" else libero
        layout = layout or ("libero" if names else "plain")
        cameras = {feature: camera for camera, feature in names.items()}
        called = {key: cameras.get(key, _camera(key)) for key in pictures}
        twice = [key for key in pictures if list(called.values()).count(called[key]) > 1]
        if twice:
            raise ValueError(
                f"{' and '.join(twice)} would be called the same, {called[twice[0]]!r}. Say which is which: "
                'features={"agentview": ..., "proprio": ..., "actions": ...}.'
            )
        names = {
            **{camera: key for key, camera in called.items()},
            "proprio": next((key for key in ("observation.state", "state") if key in features), "observation.state"),
            "actions": next((key for key in ("action", "actions") if key in features), "action"),
        }
    wanted = {"proprio", "actions"}
    missing = [*sorted(wanted - names.keys()), *(key for key in names.values() if key not in features)]
    if missing:
        raise ValueError(
            f"The data set has no {missing}; it has {sorted(features)}. Say which feature is which: "
            'features={"agentview": ..., "proprio": ..., "actions": ...}.'
        )
    cameras = {name: key for name, key in names.items() if name not in wanted}
    wrong = [key for key in cameras.values() if key not in pictures]
    if wrong:
        raise ValueError(f"{wrong} are no pictures in colour; these are: {pictures}.")
    if layout == "libero" and not _is_libero(features, names):
        raise ValueError(
            f'layout="libero" expects {names["proprio"]} of shape [8] and {names["actions"]} of shape [7], got '
            f'{_shape(features, names["proprio"])} and {_shape(features, names["actions"])}. Pass layout="plain".'
        )
    return _Names(cameras, names["proprio"], names["actions"], layout == "libero")


def _camera(feature: str) -> str:
    return feature.removeprefix("observation.images.").removeprefix("observation.")


def _is_libero(features: Mapping[str, Any], names: Mapping[str, str]) -> bool:
    needed = [names[key] for key in ("agentview", "proprio", "actions") if key in names]
    if any(key not in features for key in needed):
        return False
    return _shape(features, names["proprio"]) == (8,) and _shape(features, names["actions"]) == (7,)


def _read_json(path: Path) -> dict[str, Any]:
    with reading(str(path)):
        value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {type(value).__name__}, expected a JSON object.")
    return value


def _read_table(path: Path, columns: list[str] | None = None, filters: Any = None) -> Any:
    parquet = _parquet()
    if not path.is_file():
        raise ValueError(f"{path} is missing: the data set is not complete.")
    with reading(str(path)):
        return parquet.read_table(path, columns=columns, filters=filters, partitioning=None)


def _read_info(folder: Path) -> dict[str, Any]:
    info = _read_json(folder / LEROBOT_INFO)
    version = info.get("codebase_version")
    if not (isinstance(version, str) and re.fullmatch(r"v3\.\d+", version)):
        raise ValueError(
            f"{folder} has LeRobot's format {version!r}, expected v3.0. LeRobot converts older ones: "
            "python -m lerobot.scripts.convert_dataset_v21_to_v30"
        )
    features, fps = info.get("features"), info.get("fps")
    if not isinstance(features, dict) or not all(isinstance(feature, dict) for feature in features.values()):
        raise ValueError(f"The features of {folder / LEROBOT_INFO} are {features!r}, expected a description of each.")
    if not isinstance(fps, (int, float)) or not 0 < fps < 1e6:
        raise ValueError(f"fps in {folder / LEROBOT_INFO} is {fps!r}, expected a positive number.")
    # Any other path might lead out of the folder. All data sets that LeRobot writes have these
    for key, path in (("data_path", DATA_PATH), ("video_path", VIDEO_PATH)):
        if info.get(key) not in (None, path):
            raise ValueError(f"{key} in {folder / LEROBOT_INFO} is {info[key]!r}, expected {path!r}.")
    return info


def _read_tasks(folder: Path) -> dict[int, str]:
    table = _read_table(folder / "meta/tasks.parquet")
    # The text is the index of LeRobot's data frame, which may have no name
    name = next((key for key in ("task", "__index_level_0__") if key in table.column_names), None)
    if name is None or "task_index" not in table.column_names:
        raise ValueError(f"{folder}/meta/tasks.parquet has {table.column_names}, expected task_index and task.")
    return {int(row["task_index"]): str(row[name]) for row in table.select(["task_index", name]).to_pylist()}


def _read_episodes(folder: Path, videos: Sequence[str], total: Any) -> list[dict[str, Any]]:
    """One row an episode: its number, length and tasks, and in which files it lies."""
    columns = ["episode_index", "length", "tasks", "data/chunk_index", "data/file_index"]
    columns += [f"videos/{key}/{name}" for key in videos for name in ("chunk_index", "file_index", "from_timestamp")]
    files = sorted((folder / "meta/episodes").glob("*/*.parquet"))
    rows = [row for file in files for row in _read_table(file, columns).to_pylist()]
    if not rows:
        raise ValueError(f"{folder}/meta/episodes describes no episode.")
    for row in rows:
        if any(value is None for value in row.values()):
            raise ValueError(f"{folder}/meta/episodes leaves something open of an episode: {row}.")
    rows.sort(key=lambda row: int(row["episode_index"]))
    numbers = [int(row["episode_index"]) for row in rows]
    if numbers != list(range(len(rows))) or total not in (None, len(rows)):
        raise ValueError(
            f"{folder}/meta/episodes describes {len(rows)} episodes, {numbers[0]} to {numbers[-1]}, and "
            f"{LEROBOT_INFO} says {total}. Expected each once, numbered from 0: the data set is not complete."
        )
    return rows


def _choose(rows: Sequence[dict[str, Any]], n_demos: int | None) -> list[dict[str, Any]]:
    """The first episodes of each task."""
    if n_demos is None:
        return list(rows)
    seen: Counter[tuple[str, ...]] = Counter()
    chosen = []
    for row in rows:
        task = tuple(map(str, row["tasks"]))
        seen[task] += 1
        if seen[task] <= n_demos:
            chosen.append(row)
    few = {" | ".join(task): n for task, n in seen.items() if n < n_demos}
    if few:
        raise ValueError(f"n_demos={n_demos} of each task were asked for, and there are fewer of some: {few}.")
    return chosen


def _matrix(table: Any, name: str, n_columns: int) -> np.ndarray:
    with reading(f"The column {name}"):
        values = np.asarray(table.column(name).to_pylist(), dtype=np.float32)
        return values.reshape(len(table), n_columns)


def _decode_pictures(table: Any, name: str) -> np.ndarray:
    image = _pillow()
    pictures = []
    for number, cell in enumerate(table.column(name).to_pylist()):
        data = cell.get("bytes") if isinstance(cell, dict) else None
        if not isinstance(data, bytes):
            raise ValueError(f"Frame {number} of {name} only refers to a picture elsewhere, expected its bytes.")
        with (
            reading(f"Frame {number} of {name}"),
            image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as picture,
        ):
            pictures.append(np.asarray(picture.convert("RGB")))
    with reading(name):
        return np.stack(pictures)


def _decode_video(path: Path, start: float, n_frames: int, fps: float) -> np.ndarray:
    """The frames from ``start`` (s) on, uint8 ``(n_frames, H, W, 3)``."""
    if not path.is_file():
        raise ValueError(f"{path} is missing: the data set is not complete.")
    # Half a frame early, so that rounding loses none. The format is named because others refer to further files
    seek = ["-ss", f"{start - 0.5 / fps:.6f}"] if start > 0.5 / fps else []
    command = [_ffmpeg(), "-nostdin", "-loglevel", "error", "-protocol_whitelist", "file,pipe", *seek, "-f", "mov"]
    command += ["-i", f"file:{path}", "-map", "0:v:0", "-frames:v", str(n_frames), "-fps_mode", "passthrough"]
    command += ["-pix_fmt", "rgb24", "-c:v", "ppm", "-f", "image2pipe", "-"]
    done = subprocess.run(command, capture_output=True, check=False)
    # Of each frame, its size and then its pixels
    header = re.match(rb"P6\s(\d+)\s(\d+)\s255\s", done.stdout)
    said = done.stderr.decode(errors="replace").strip()
    if done.returncode or header is None:
        raise ValueError(f"{path} cannot be decoded: {said or 'it holds no frames there'}.")
    width, height = int(header[1]), int(header[2])
    size = len(header[0]) + 3 * width * height
    if len(done.stdout) != n_frames * size:
        raise ValueError(f"{path} has {len(done.stdout) // size} frames from {start} s on, expected {n_frames}. {said}")
    frames = np.frombuffer(done.stdout, np.uint8).reshape(n_frames, size)[:, len(header[0]) :]
    return frames.reshape(n_frames, height, width, 3)


def _proprio_of_libero(state: np.ndarray) -> np.ndarray:
    """LIBERO's nine numbers out of the eight of LeRobot: position, axis-angle, fingers."""
    inside = [(state[:, 6 + i] >= low) & (state[:, 6 + i] <= high) for i, (low, high) in enumerate(FINGERS)]
    if not np.all(inside) or np.linalg.norm(state[:, 3:6], axis=1).max() > 2 * np.pi + 0.01:
        raise ValueError(
            "The data set has LeRobot's names for LIBERO, but its state is not LIBERO's (end-effector position in m, "
            'axis-angle, two finger positions in m). Pass layout="plain" to take pictures and state as they are.'
        )
    return np.concatenate([state[:, :3], axis_angle_to_quat(state[:, 3:6]), state[:, 6:]], axis=1).astype(np.float32)


def read_lerobot(
    folder: PathLike,
    n_demos: int | None = None,
    cameras: Sequence[str] | None = None,
    instruction: str | None = None,
    layout: Layout | None = None,
    features: Mapping[str, str] | None = None,
) -> Iterator[Episode]:
    """
    Read the episodes of a data set in LeRobot's format v3.

    LeRobot's LIBERO data hold pictures that are turned by 180 degrees from the simulator's, which are upside down: as
    a whole they are upright and mirrored, left for right. They are mirrored back here, and the state's axis-angle
    becomes a quaternion, so that an episode is as this library's envs and files show it. Actions are the same.

    :param folder: the data set, with ``meta/info.json`` in it
    :param n_demos: number of episodes of each task; by default all
    :param cameras: cameras to read, by our names for them; by default all
    :param instruction: the task in words; by default what the data set says
    :param layout: "libero" for data as LeRobot keeps LIBERO's; "plain" takes pictures, state and actions as they are.
        By default "libero" where the features have the names and sizes of LIBERO's
    :param features: which of the data set's features is ``proprio``, ``actions`` and each camera, for instance
        ``{"agentview": "observation.images.top", "proprio": "observation.state", "actions": "action"}``; by default
        known from their names
    :return: episodes with upright pictures in their stored size
    :raises ImportError: a library of the extra ``lerobot`` is missing
    :raises ValueError: the data set is damaged, incomplete, of another format or not as ``layout`` says
    """
    check_at_least_one(n_demos=n_demos)
    folder = Path(folder).expanduser()
    info = _read_info(folder)
    names = _names_of(info["features"], layout, features)
    missing = [camera for camera in cameras or () if camera not in names.cameras]
    if missing:
        raise ValueError(
            f"{folder} has no pictures of {missing}; it has {sorted(names.cameras)}. Say which feature is which camera "
            'with features={"agentview": ..., "proprio": ..., "actions": ...}.'
        )
    pictures = {camera: names.cameras[camera] for camera in (names.cameras if cameras is None else cameras)}
    videos = [key for key in pictures.values() if info["features"][key]["dtype"] == "video"]
    if videos:
        _ffmpeg()
    if len(videos) < len(pictures):
        _pillow()
    tasks = _read_tasks(folder)
    for row in _choose(_read_episodes(folder, videos, info.get("total_episodes")), n_demos):
        with reading(f"Episode {row['episode_index']} of {folder}"):
            episode = _read_episode(folder, info, row, names, pictures, videos, tasks, instruction)
        yield episode


def _read_episode(
    folder: Path,
    info: Mapping[str, Any],
    row: Mapping[str, Any],
    names: _Names,
    pictures: Mapping[str, str],
    videos: Sequence[str],
    tasks: Mapping[int, str],
    instruction: str | None,
) -> Episode:
    number, n, fps = int(row["episode_index"]), int(row["length"]), float(info["fps"])
    columns = [names.proprio, names.actions, "frame_index", "timestamp", "task_index"]
    columns += [key for key in pictures.values() if key not in videos]
    path = folder / DATA_PATH.format(chunk_index=row["data/chunk_index"], file_index=row["data/file_index"])
    table = _read_table(path, columns, [("episode_index", "=", number)]).sort_by("frame_index")
    if not np.array_equal(table.column("frame_index").to_numpy(), np.arange(n)):
        raise ValueError(f"{path} has {len(table)} of its frames, expected {n}, numbered from 0.")
    if videos and np.abs(table.column("timestamp").to_numpy() - np.arange(n) / fps).max() > 0.25 / fps:
        raise ValueError(f"Its frames are not {1 / fps:.3g} s apart, as the data set says and its videos are.")
    if instruction is None:
        found = {tasks.get(int(index)) for index in table.column("task_index").to_pylist()}
        instruction = found.pop() if len(found) == 1 else None
        if instruction is None:
            raise ValueError(f"Its frames have the tasks {sorted(map(str, found))}, expected one that is known.")
    observations: dict[str, np.ndarray] = {}
    for camera, key in pictures.items():
        if key in videos:
            file = VIDEO_PATH.format(
                video_key=_plain_name(key),
                chunk_index=row[f"videos/{key}/chunk_index"],
                file_index=row[f"videos/{key}/file_index"],
            )
            images = _decode_video(folder / file, float(row[f"videos/{key}/from_timestamp"]), n, fps)
        else:
            images = _decode_pictures(table, key)
        observations[camera] = np.ascontiguousarray(images[:, :, ::-1] if names.is_libero else images)
    state = _matrix(table, names.proprio, int(np.prod(_shape(info["features"], names.proprio))))
    observations["proprio"] = _proprio_of_libero(state) if names.is_libero else state
    actions = _matrix(table, names.actions, int(np.prod(_shape(info["features"], names.actions))))
    return Episode(observations, actions, instruction=instruction, attrs={"episode_index": number})


def _plain_name(name: str) -> str:
    """Of a feature whose name is that of a folder."""
    if not re.fullmatch(r"[\w-][\w.-]*", name):
        raise ValueError(f"The feature {name!r} has videos, so its name has to be one of a folder.")
    return name


# -------------------------------------------------------------------------------------------------------------- writing


class _Video:
    """A video that grows frame by frame, H.264 with every second frame a key frame, as LeRobot's for random access."""

    def __init__(self, path: Path, size: tuple[int, int], fps: int):
        if size[0] % 2 or size[1] % 2:
            raise ValueError(f"Pictures of a video need even sides, got {size}. Write pictures instead.")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.n_frames = 0
        command = [_ffmpeg(), "-nostdin", "-loglevel", "error", "-f", "rawvideo", "-pix_fmt", "rgb24"]
        command += ["-s", f"{size[1]}x{size[0]}", "-r", str(fps), "-i", "pipe:0", "-an", "-c:v", "libx264"]
        command += ["-crf", "18", "-g", "2", "-bf", "0", "-pix_fmt", "yuv420p", str(path)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE)

    @property
    def _pipe(self) -> IO[bytes]:
        assert self._process.stdin is not None
        return self._process.stdin

    def write(self, images: np.ndarray) -> None:
        """
        :param images: uint8 ``(N, H, W, 3)``
        :raises OSError: the video cannot be written
        """
        try:
            self._pipe.write(np.ascontiguousarray(images).tobytes())
        except BrokenPipeError:
            self.close()
        self.n_frames += len(images)

    def close(self) -> None:
        """
        Finish the file.

        :raises OSError: the video cannot be written
        """
        _, said = self._process.communicate()
        if self._process.returncode:
            raise OSError(f"{self.path} cannot be written: {said.decode(errors='replace').strip()}")

    def abort(self) -> None:
        """End the writer without a file; may be called after :meth:`close`."""
        self._process.kill()
        self._process.communicate()


def _summary(values: np.ndarray) -> dict[str, Any]:
    """LeRobot's statistics of rows of numbers."""
    x = values.reshape(len(values), -1).astype(np.float64)
    found = {"min": x.min(0), "max": x.max(0), "mean": x.mean(0), "std": x.std(0)}
    found |= {name: np.quantile(x, q, axis=0) for name, q in QUANTILES.items()}
    return {**{name: value.tolist() for name, value in found.items()}, "count": [len(x)]}


def _picture_summary(counts: np.ndarray, n_frames: int) -> dict[str, Any]:
    """The same of pictures, in units of 255, from how often a channel has each level, ``(3, 256)``."""
    levels = np.arange(256) / 255.0
    shares = counts / counts.sum(axis=1, keepdims=True)
    mean = shares @ levels
    found = {
        "min": levels[(counts > 0).argmax(axis=1)],
        "max": levels[255 - (counts[:, ::-1] > 0).argmax(axis=1)],
        "mean": mean,
        "std": np.sqrt(np.maximum(shares @ levels**2 - mean**2, 0.0)),
    }
    cumulative = shares.cumsum(axis=1)
    found |= {name: levels[np.minimum((cumulative < q).sum(axis=1), 255)] for name, q in QUANTILES.items()}
    return {**{name: value.reshape(3, 1, 1).tolist() for name, value in found.items()}, "count": [n_frames]}


def _levels(images: np.ndarray) -> np.ndarray:
    return np.stack([np.bincount(images[..., channel].ravel(), minlength=256) for channel in range(3)])


class _Writer:
    """The files of a data set that grows episode by episode, in a folder of their own."""

    def __init__(self, folder: Path, videos: bool, fps: int, robot_type: str | None):
        self.folder = folder
        self.use_videos = videos
        self.fps = fps
        self.robot_type = robot_type
        self.features: dict[str, dict[str, Any]] = {}
        self.rows: list[dict[str, Any]] = []
        self.tasks: dict[str, int] = {}
        self.n_frames = 0
        self._columns: dict[str, list[np.ndarray]] = {}
        self._counts: dict[str, np.ndarray] = {}
        self._file = -1
        self._data: Any = None
        self._data_path = folder
        self._videos: dict[str, _Video] = {}

    def add(self, episode: Episode) -> None:
        """
        :param episode: the next episode
        :raises ValueError: its labels are not the actions that follow, or its shapes are not those of the others
        """
        number, n = len(self.rows), len(episode.actions)
        if not episode.instruction:
            raise ValueError(f"Episode {number} has no instruction.")
        _check_labels(episode, number)
        images, numbers = _columns_of(episode)
        features = _features_of(images, numbers, self.use_videos, self.fps)
        if self.features and features != self.features:
            raise ValueError(f"Episode {number} is {features}, the ones before it are {self.features}.")
        self.features = features
        self._rotate(images)
        numbers |= {
            "timestamp": (np.arange(n) / self.fps).astype(np.float32),
            "frame_index": np.arange(n),
            "episode_index": np.full(n, number),
            "index": self.n_frames + np.arange(n),
            "task_index": np.full(n, self.tasks.setdefault(episode.instruction, len(self.tasks))),
        }
        statistics = {key: _summary(value) for key, value in numbers.items()}
        for key, value in numbers.items():
            self._columns.setdefault(key, []).append(value)
        for key, value in images.items():
            counts = _levels(value)
            statistics[key] = _picture_summary(counts, n)
            self._counts[key] = self._counts.get(key, 0) + counts
        where = {"chunk_index": self._file // MAX_FILES_OF_A_CHUNK, "file_index": self._file % MAX_FILES_OF_A_CHUNK}
        row: dict[str, Any] = {"episode_index": number, "tasks": [episode.instruction], "length": n}
        row |= {f"data/{key}": value for key, value in where.items()}
        row |= {"dataset_from_index": self.n_frames, "dataset_to_index": self.n_frames + n}
        for key, video in self._videos.items():
            row |= {f"videos/{key}/{name}": value for name, value in where.items()}
            row[f"videos/{key}/from_timestamp"] = video.n_frames / self.fps
            row[f"videos/{key}/to_timestamp"] = (video.n_frames + n) / self.fps
            video.write(images[key])
        self._write_rows({} if self.use_videos else images, numbers)
        row |= {f"stats/{key}/{name}": value for key, found in statistics.items() for name, value in found.items()}
        self.rows.append({**row, "meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0})
        self.n_frames += n

    def _rotate(self, images: Mapping[str, np.ndarray]) -> None:
        """Begin new files where the present ones are large."""
        paths = [self._data_path, *(video.path for video in self._videos.values())] if self._data is not None else []
        if paths and max(path.stat().st_size for path in paths if path.exists()) < MAX_FILE_BYTES:
            return
        self._finish_files()
        self._file += 1
        self._data_path = self.folder / self._name(DATA_PATH)
        self._data_path.parent.mkdir(parents=True, exist_ok=True)
        if self.use_videos:
            for key, value in images.items():
                size = (value.shape[1], value.shape[2])
                self._videos[key] = _Video(self.folder / self._name(VIDEO_PATH, video_key=key), size, self.fps)

    def _name(self, path: str, **names: str) -> str:
        chunk, file = divmod(self._file, MAX_FILES_OF_A_CHUNK)
        return path.format(chunk_index=chunk, file_index=file, **names)

    def _write_rows(self, images: Mapping[str, np.ndarray], numbers: Mapping[str, np.ndarray]) -> None:
        import pyarrow as pa

        columns: dict[str, Any] = {}
        for key, value in images.items():
            cells = [{"bytes": _png(image), "path": f"frame-{i:06d}.png"} for i, image in enumerate(value)]
            columns[key] = pa.array(cells, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
        for key, value in numbers.items():
            flat = pa.array(value.ravel())
            columns[key] = flat if value.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, value.shape[1])
        table = pa.table(columns).replace_schema_metadata({"huggingface": json.dumps(_described(columns, numbers))})
        if self._data is None:
            self._data = _parquet().ParquetWriter(self._data_path, table.schema)
        self._data.write_table(table, row_group_size=len(table))

    def _finish_files(self) -> None:
        if self._data is not None:
            self._data.close()
            self._data = None
        for video in self._videos.values():
            video.close()
        self._videos = {}

    def finish(self, about: Mapping[str, Any] | None) -> None:
        """
        Write what describes the data set.

        :param about: for :func:`was_recorded_as`
        :raises ValueError: there are no episodes
        """
        import pyarrow as pa

        if not self.rows:
            raise ValueError("There are no episodes to write.")
        self._finish_files()
        episodes = self.folder / EPISODES_PATH.format(chunk_index=0, file_index=0)
        episodes.parent.mkdir(parents=True, exist_ok=True)
        _parquet().write_table(pa.Table.from_pylist(self.rows), episodes)
        # LeRobot reads a data frame whose index is the text
        index = {"name": "task", "field_name": "task", "pandas_type": "unicode", "numpy_type": "object"}
        value = {"name": "task_index", "field_name": "task_index", "pandas_type": "int64", "numpy_type": "int64"}
        pandas = {"index_columns": ["task"], "column_indexes": [], "columns": [value, index], "pandas_version": "2.0.0"}
        tasks = pa.table({"task_index": list(self.tasks.values()), "task": list(self.tasks)})
        tasks = tasks.replace_schema_metadata({"pandas": json.dumps(pandas)})
        _parquet().write_table(tasks, self.folder / "meta/tasks.parquet")
        statistics = {key: _summary(np.concatenate(parts)) for key, parts in self._columns.items()}
        statistics |= {key: _picture_summary(counts, self.n_frames) for key, counts in self._counts.items()}
        plain: dict[str, Any] = {"dtype": "int64", "shape": [1], "names": None}
        own = dict.fromkeys(("timestamp", "frame_index", "episode_index", "index", "task_index"), plain)
        info = {
            "codebase_version": "v3.0",
            "fps": self.fps,
            "features": {**self.features, **own, "timestamp": {**plain, "dtype": "float32"}},
            "total_episodes": len(self.rows),
            "total_frames": self.n_frames,
            "total_tasks": len(self.tasks),
            "chunks_size": MAX_FILES_OF_A_CHUNK,
            "data_files_size_in_mb": MAX_FILE_BYTES // 2**20,
            "video_files_size_in_mb": MAX_FILE_BYTES // 2**20,
            "data_path": DATA_PATH,
            "video_path": VIDEO_PATH if self.use_videos else None,
            "robot_type": self.robot_type,
            "splits": {"train": f"0:{len(self.rows)}"},
        }
        for path, content in (("meta/stats.json", statistics), (LEROBOT_INFO, info), (ABOUT, dict(about or {}))):
            (self.folder / path).write_text(json.dumps(content, indent=4), encoding="utf-8")

    def abort(self) -> None:
        """Let go of the files, whatever state they are in."""
        if self._data is not None:
            self._data.close()
        for video in self._videos.values():
            video.abort()


def _check_labels(episode: Episode, number: int) -> None:
    chunks, actions = episode.action_chunks, episode.actions
    if chunks is None:
        return
    for k in range(chunks.shape[1]):
        if not np.array_equal(chunks[: max(0, len(actions) - k), k], actions[k:]):
            raise ValueError(
                f"The labels of episode {number} are not the actions that follow, and LeRobot's format knows no "
                "others. Record every step, and without pushes (stride=1, perturbation=0)."
            )


def _columns_of(episode: Episode) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Pictures and numbers of an episode by LeRobot's names, and in its LIBERO convention where they are LIBERO's."""
    proprio = np.asarray(episode.observations["proprio"], dtype=np.float32)
    is_libero = proprio.shape[1] == 9 and episode.actions.shape[1] == 7
    images: dict[str, np.ndarray] = {}
    for camera, value in episode.observations.items():
        if camera in ("proprio", "instruction"):
            continue
        value = np.asarray(value)
        if value.dtype != np.uint8 or value.ndim != 4 or value.shape[3] != 3:
            raise ValueError(f"{camera} has shape {value.shape} and type {value.dtype}, expected uint8 (T, H, W, 3).")
        key = LIBERO_NAMES[0].get(camera) if is_libero else None
        images[_plain_name(key or f"observation.images.{camera}")] = value[:, :, ::-1] if is_libero else value
    if is_libero:
        parts = [proprio[:, :3], quat_to_axis_angle(proprio[:, 3:7]), proprio[:, 7:]]
        proprio = np.concatenate(parts, axis=1).astype(np.float32)
    return images, {"observation.state": proprio, "action": episode.actions}


def _features_of(
    images: Mapping[str, np.ndarray], numbers: Mapping[str, np.ndarray], videos: bool, fps: int
) -> dict[str, dict[str, Any]]:
    features: dict[str, dict[str, Any]] = {}
    for key, value in images.items():
        height, width = value.shape[1:3]
        features[key] = {
            "dtype": "video" if videos else "image",
            "shape": [height, width, 3],
            "names": ["height", "width", "channel"],
        }
        if videos:
            features[key]["info"] = {
                "video.height": height,
                "video.width": width,
                "video.codec": "h264",
                "video.pix_fmt": "yuv420p",
                "video.fps": fps,
                "video.channels": 3,
                "has_audio": False,
                "is_depth_map": False,
            }
    for key, value in numbers.items():
        names = [f"{key.rpartition('.')[2]}_{i}" for i in range(value.shape[1])]
        features[key] = {"dtype": "float32", "shape": [value.shape[1]], "names": names}
    return features


def _described(columns: Mapping[str, Any], numbers: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """What the libraries of Hugging Face read of the columns' types."""
    described: dict[str, Any] = {}
    for key in columns:
        if key not in numbers:
            described[key] = {"_type": "Image"}
            continue
        value = {"dtype": str(numbers[key].dtype), "_type": "Value"}
        is_row = numbers[key].ndim == 2
        described[key] = {"feature": value, "length": numbers[key].shape[1], "_type": "List"} if is_row else value
    return {"info": {"features": described}}


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    _pillow().fromarray(np.ascontiguousarray(image)).save(buffer, format="PNG")
    return buffer.getvalue()


def write_lerobot(
    folder: PathLike,
    episodes: Iterable[Episode],
    videos: bool = False,
    fps: int = 20,
    robot_type: str | None = None,
    about: Mapping[str, Any] | None = None,
) -> None:
    """
    Write episodes as a data set in LeRobot's format v3. An interrupted write leaves nothing behind.

    Episodes with LIBERO's proprioception and actions are written as LeRobot keeps LIBERO's (see :func:`read_lerobot`),
    so that its policies see in its LIBERO env what they saw in training; others as they are.

    :param folder: the data set; nothing may lie there
    :param episodes: the demonstrations, each with an instruction; each is written before the next one is requested
    :param videos: write pictures as videos (H.264), which loses a little of them, instead of PNG
    :param fps: steps in a second
    :param robot_type: name of the robot
    :param about: how they were recorded, for :func:`was_recorded_as`
    :raises FileExistsError: something lies there
    :raises ImportError: a library of the extra ``lerobot`` is missing
    :raises ValueError: no episodes, episodes of different shapes, or with labels that are not the actions that follow
    """
    check_at_least_one(fps=fps)
    folder = Path(folder).expanduser()
    check_vacant(folder)
    _parquet()
    if videos:
        _ffmpeg()
    else:
        _pillow()
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(folder)
    writer = _Writer(temporary, videos, fps, robot_type)
    try:
        for episode in episodes:
            writer.add(episode)
        writer.finish(about)
        for path in sorted(temporary.rglob("*")):
            sync(path)
        os.replace(temporary, folder)
        sync(folder.parent)
    finally:
        writer.abort()
        shutil.rmtree(temporary, ignore_errors=True)


def check_vacant(folder: Path) -> None:
    """
    :param folder: where a data set is to be written
    :raises FileExistsError: something lies there
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(
            f"{folder} is not empty: a data set of LeRobot's is written as a whole. Name another one."
        )


def was_recorded_as(folder: PathLike, about: Mapping[str, Any]) -> bool:
    """
    :param folder: a folder, which need not be there
    :param about: as it was passed to :func:`write_lerobot`
    :return: whether a whole data set lies there that was written with it
    """
    path = Path(folder).expanduser() / ABOUT
    try:
        return path.is_file() and _read_json(path) == dict(about)
    except ValueError:
        return False
