"""Demonstrations on disk: LIBERO's HDF5 format is read and written, robomimic's is read."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch as th
from torch.nn import functional as F

from opd_gym.actions import normalisation_bounds
from opd_gym.checks import check_at_least_one
from opd_gym.demonstrations.untrusted import array, attribute, check_finite, json_attribute, member, opened, reading
from opd_gym.files import replacing

# Names of LIBERO's files for the cameras of our observations.
CAMERA_DATASETS = {"agentview": "agentview_rgb", "wrist": "eye_in_hand_rgb"}

# What a folder is known by that holds a data set of LeRobot's
LEROBOT_INFO = "meta/info.json"

PathLike = str | os.PathLike[str]


def axis_angle_to_quat(axis_angle: np.ndarray) -> np.ndarray:
    """
    Inverse of robosuite's ``quat2axisangle``, whose angles run over [0, 2 pi]: the quaternion's sign is kept.

    :param axis_angle: ``(..., 3)``
    :return: quaternions ``(..., 4)``, xyzw
    """
    axis_angle = np.asarray(axis_angle, dtype=np.float64)
    angle = np.linalg.norm(axis_angle, axis=-1, keepdims=True)
    # sin(a / 2) / a, also at a = 0.
    return np.concatenate([axis_angle * 0.5 * np.sinc(angle / (2.0 * np.pi)), np.cos(angle / 2.0)], axis=-1)


def quat_to_axis_angle(quat: np.ndarray) -> np.ndarray:
    """
    As robosuite's ``quat2axisangle``.

    :param quat: ``(..., 4)``, xyzw
    :return: ``(..., 3)``, angles in [0, 2 pi]
    """
    quat = np.asarray(quat, dtype=np.float64)
    norm = np.linalg.norm(quat[..., :3], axis=-1, keepdims=True)
    angle = 2.0 * np.arctan2(norm, quat[..., 3:])
    return np.where(norm > 0.0, quat[..., :3] * angle / np.maximum(norm, 1e-12), 0.0)


def resize_images(images: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """
    :param images: uint8 ``(N, H, W, 3)``
    :param size: height and width wanted
    :return: uint8 ``(N, *size, 3)``; the mean over areas where the picture shrinks by whole factors, else antialiased
        bilinear
    """
    height, width = images.shape[1:3]
    if (height, width) == size:
        return images
    parts = []
    # In parts, because the floating-point copy of a long episode is large.
    for start in range(0, len(images), 256):
        x = th.as_tensor(images[start : start + 256]).permute(0, 3, 1, 2).float()
        if height % size[0] == 0 and width % size[1] == 0:
            x = F.avg_pool2d(x, (height // size[0], width // size[1]))
        else:
            x = F.interpolate(x, size=size, mode="bilinear", antialias=True, align_corners=False)
        parts.append(x.round().clamp(0, 255).to(th.uint8).permute(0, 2, 3, 1).numpy())
    return np.ascontiguousarray(np.concatenate(parts))


@dataclass
class Episode:
    """
    One demonstration of T steps, or of T decisions if ``action_chunks`` is given.

    :param observations: arrays ``(T, ...)``: upright uint8 pictures (H, W, 3) by camera, and ``proprio`` (LIBERO's:
        end-effector position 3, quaternion xyzw 4, gripper 2; another robot's has another size)
    :param actions: ``(T, D)``, the action taken in each observation (the first one of the chunk at decisions)
    :param action_chunks: ``(T, K, D)``, K actions as the label of each observation. Only for labels that are not the
        actions that follow, such as an expert's labels of states a policy visited
    :param instruction: the task in words; None for the file's
    :param states: ``(T, S)`` flattened simulator states
    :param joint_states: ``(T, 7)``
    :param rewards: ``(T,)``; by default 1 at the end of the episode if it was a success
    :param success: whether the task was solved
    :param attrs: other attributes of the episode, numbers or text
    :raises ValueError: shapes or lengths do not match, or a number is NaN or infinite
    """

    observations: Mapping[str, np.ndarray]
    actions: np.ndarray
    action_chunks: np.ndarray | None = None
    instruction: str | None = None
    states: np.ndarray | None = None
    joint_states: np.ndarray | None = None
    rewards: np.ndarray | None = None
    success: bool = True
    attrs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        with np.errstate(over="ignore"):  # what is too large for float32 becomes infinite, and is refused below
            self.actions = np.asarray(self.actions, dtype=np.float32)
            if self.action_chunks is not None:
                self.action_chunks = np.asarray(self.action_chunks, dtype=np.float32)
        if self.actions.ndim != 2 or len(self.actions) == 0:
            raise ValueError(f"actions of an episode must have shape (T, D) with T > 0, got {self.actions.shape}.")
        arrays = {f"observations[{key!r}]": value for key, value in self.observations.items()}
        for name in ("actions", "action_chunks", "states", "joint_states", "rewards"):
            if getattr(self, name) is not None:
                arrays[name] = getattr(self, name)
        for name, value in arrays.items():
            if len(value) != len(self.actions):
                raise ValueError(f"{name} has {len(value)} rows, the episode has {len(self.actions)} actions.")
            check_finite(name, np.asarray(value))
        if self.action_chunks is not None and (
            self.action_chunks.ndim != 3 or self.action_chunks.shape[2] != self.actions.shape[1]
        ):
            raise ValueError(
                f"action_chunks must have shape (T, K, {self.actions.shape[1]}), got {self.action_chunks.shape}."
            )


def write_demonstrations(
    path: PathLike,
    episodes: Iterable[Episode],
    instruction: str | None = None,
    env_args: Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None = None,
    problem_info: Mapping[str, Any] | None = None,
    bddl_file_name: str = "",
    compression: str | None = "gzip",
) -> None:
    """
    Write episodes of one task in LIBERO's HDF5 format. An interrupted write leaves an old file untouched.

    Pictures are stored upside down as in LIBERO's own files (``macros_image_convention = "opengl"``), so other readers
    of LIBERO data can read this file too.

    :param path: the file, ``<task name>_demo.hdf5`` by LIBERO's convention
    :param episodes: the demonstrations; each is written before the next one is requested, so a generator may yield more
        than fits in memory
    :param instruction: the task's instruction; None for the first episode's
    :param env_args: description of the env, stored as JSON; or a function that returns it, called after the last one
    :param problem_info: LIBERO's description of the problem, stored as JSON with the instruction
    :param bddl_file_name: file of the task's definition
    :param compression: how pictures are compressed; uncompressed ones (None) are read faster
    """
    with replacing(Path(path).expanduser()) as temporary, h5py.File(temporary, "w") as file:
        data = file.create_group("data")
        n = total = 0
        for n, episode in enumerate(episodes, start=1):
            _write_episode(data.create_group(f"demo_{n - 1}"), episode, compression)
            instruction = episode.instruction if instruction is None else instruction
            total += len(episode.actions)
        about = dict(env_args() if callable(env_args) else env_args or {})
        data.attrs["problem_info"] = json.dumps({**(problem_info or {}), "language_instruction": instruction or ""})
        data.attrs["env_args"] = json.dumps(about)
        data.attrs["env_name"] = str(about.get("env_name", ""))
        data.attrs["bddl_file_name"] = str(bddl_file_name)
        data.attrs["macros_image_convention"] = "opengl"
        data.attrs["num_demos"] = n
        data.attrs["total"] = total


def _write_episode(group: h5py.Group, episode: Episode, compression: str | None) -> None:
    n = len(episode.actions)
    obs = group.create_group("obs")
    for key, value in episode.observations.items():
        value = np.asarray(value)
        if key == "proprio":
            proprio = np.asarray(value, dtype=np.float64)
            if proprio.ndim != 2:
                raise ValueError(f"proprio must have shape ({n}, P), got {proprio.shape}.")
            if proprio.shape[1] != 9:  # another robot's, for which LIBERO's format has no dataset
                obs["proprio"] = np.asarray(value, dtype=np.float32)
                continue
            orientation = quat_to_axis_angle(proprio[:, 3:7])
            obs["ee_pos"] = proprio[:, :3]
            obs["ee_ori"] = orientation
            obs["ee_states"] = np.concatenate([proprio[:, :3], orientation], axis=1)
            obs["gripper_states"] = proprio[:, 7:]
            group["robot_states"] = np.concatenate([proprio[:, 7:], proprio[:, :7]], axis=1)
        elif value.dtype == np.uint8 and value.ndim == 4:
            name = CAMERA_DATASETS.get(key, f"{key}_rgb")
            chunks = (1, *value.shape[1:]) if compression else None
            obs.create_dataset(name, data=value[:, ::-1], compression=compression, chunks=chunks)
        elif key != "instruction":
            raise ValueError(
                f"Observation {key!r} of shape {value.shape} and type {value.dtype} has no place in LIBERO's format."
            )
    if episode.joint_states is not None:
        obs["joint_states"] = episode.joint_states
    group["actions"] = episode.actions.astype(np.float64)
    if episode.action_chunks is not None:
        group["action_chunks"] = episode.action_chunks
    if episode.states is not None:
        group["states"] = episode.states
        group.attrs["init_state"] = episode.states[0]
    rewards = np.zeros(n, dtype=np.uint8)
    rewards[-1] = episode.success
    group["rewards"] = rewards if episode.rewards is None else np.asarray(episode.rewards)
    dones = np.zeros(n, dtype=np.uint8)
    dones[-1] = 1
    group["dones"] = dones
    group.attrs["num_samples"] = n
    group.attrs["success"] = bool(episode.success)
    if episode.instruction is not None:
        group.attrs["language_instruction"] = episode.instruction
    group.attrs.update(episode.attrs)


def _instruction_of(data: h5py.Group, demo: h5py.Group) -> str:
    text = json_attribute(data, "problem_info").get("language_instruction")
    # LIBERO's own files hold one text or a list of its pieces, some in quotation marks.
    pieces: list[Any] = text if isinstance(text, list) else [] if text is None else [text]
    if not all(isinstance(piece, str) for piece in pieces):
        raise ValueError(f"The language_instruction in problem_info of {data.name} is {text!r}, expected text.")
    # Filtered files may have no attributes, but they keep LIBERO's names: [SCENE_]task_demo.
    name = re.fullmatch(r"(?:[A-Z_]+_SCENE\d+_)?(.+)_demo", Path(data.file.filename).stem)
    candidates = (
        attribute(demo, "language_instruction"),
        "".join(pieces).strip().strip('"') if pieces else None,
        name[1].replace("_", " ") if name else None,
    )
    known = [candidate for candidate in candidates if candidate is not None]
    if not known:
        raise ValueError(
            "No attribute holds the instruction. Name the file <instruction>_demo.hdf5, as LIBERO does, or pass the "
            "instruction."
        )
    return next(filter(None, known), "")


def _pictures_of(data: h5py.Group, obs: h5py.Group, key: str, n: int) -> np.ndarray:
    name = f"{obs.name}/{key}"
    images = array(obs, key, rows=n, ndim=4)
    assert images is not None
    if images.shape[1] == 3 != images.shape[3]:
        images = np.moveaxis(images, 1, 3)
    if images.shape[3] != 3:
        raise ValueError(f"{name} has shape {images.shape}, expected pictures ({n}, H, W, 3).")
    low, high = images.min(), images.max()
    if images.dtype.kind == "f" and low >= 0.0 and high <= 1.0:
        images = np.round(images * 255.0).astype(np.uint8)
    if images.dtype != np.uint8:
        raise ValueError(f"{name} has {images.dtype} from {low} to {high}, expected uint8, or floats from 0 to 1.")
    # LIBERO stores pictures upside down unless it says otherwise, robomimic (`_image`) upright.
    convention = attribute(data, "macros_image_convention") or ("opengl" if key.endswith("_rgb") else "opencv")
    if convention not in ("opengl", "opencv"):
        raise ValueError(f'macros_image_convention of {data.name} is {convention!r}, expected "opengl" or "opencv".')
    return np.ascontiguousarray(images[:, ::-1] if convention == "opengl" else images)


def _proprio_of(demo: h5py.Group, obs: h5py.Group, n: int) -> np.ndarray:
    proprio = array(obs, "proprio", rows=n, ndim=2)
    if proprio is not None:
        return proprio
    robot = array(demo, "robot_states", rows=n, ndim=2)
    if robot is not None and robot.shape[1] == 9:
        return np.concatenate([robot[:, 2:], robot[:, :2]], axis=1).astype(np.float32)
    names = (
        ("ee_pos", "ee_ori", "gripper_states"),
        ("ee_states", "gripper_states"),
        ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos"),
    )
    for keys in names:
        parts = [part for key in keys if (part := array(obs, key, rows=n, ndim=2)) is not None]
        if len(parts) < len(keys):
            continue
        pose, gripper = np.concatenate(parts[:-1], axis=1), parts[-1]
        if pose.shape[1] == 6:
            pose = np.concatenate([pose[:, :3], axis_angle_to_quat(pose[:, 3:])], axis=1)
        if pose.shape[1] != 7:
            raise ValueError(f"{keys[:-1]} in {obs.name} have {pose.shape[1]} columns, expected 6 or 7.")
        return np.concatenate([pose, gripper], axis=1).astype(np.float32)
    raise ValueError(f"{obs.name} has none of the proprioception {names}; it has {sorted(obs)}.")


def _read_episode(data: h5py.Group, name: str, cameras: Sequence[str] | None, instruction: str | None) -> Episode:
    demo = member(data, name)
    obs = member(demo, "obs") if isinstance(demo, h5py.Group) else None
    actions = array(demo, "actions", ndim=2) if isinstance(demo, h5py.Group) else None
    if demo is None or not isinstance(obs, h5py.Group) or actions is None:
        raise ValueError(f"{data.name}/{name} must have a group `obs` and `actions`.")
    n = len(actions)
    # Sorted, so that LIBERO's name wins where both are there.
    with reading(obs.name):
        matches = [match for key in sorted(obs) if (match := re.fullmatch("(.+)_(image|rgb)", key))]
    hands = {"eye_in_hand": "wrist", "robot0_eye_in_hand": "wrist"}
    found = {hands.get(match[1], match[1]): match[0] for match in matches}
    missing = [camera for camera in cameras or () if camera not in found]
    if missing:
        raise ValueError(f"{obs.name} has no pictures of {missing}; it has {sorted(found)}.")
    optional = {
        "action_chunks": array(demo, "action_chunks", rows=n, ndim=3),
        "states": array(demo, "states", rows=n),
        "joint_states": array(obs, "joint_states", rows=n),
        "rewards": (rewards := array(demo, "rewards", rows=n, ndim=1)),
    }
    success = attribute(demo, "success", int)
    if instruction is None:
        instruction = _instruction_of(data, demo)
    with reading(f"Attributes of {demo.name}"):
        attrs = {key: value for key, value in demo.attrs.items() if key not in ("model_file", "init_state")}
    observations = {
        camera: _pictures_of(data, obs, found[camera], n) for camera in (sorted(found) if cameras is None else cameras)
    }
    observations["proprio"] = _proprio_of(demo, obs, n)
    try:
        return Episode(
            observations,
            actions,
            instruction=instruction,
            success=bool((rewards is None or rewards[-1] > 0) if success is None else success),
            attrs={key: _plain(value) for key, value in attrs.items()},
            **optional,
        )
    except ValueError as error:
        raise ValueError(f"{demo.name}: {error}") from error


def _plain(value: Any) -> Any:
    """An attribute as Python has it: Gymnasium takes no seed of NumPy's."""
    return value.decode() if isinstance(value, bytes) else value.item() if isinstance(value, np.generic) else value


def read_demonstrations(
    path: PathLike,
    n_demos: int | None = None,
    cameras: Sequence[str] | None = None,
    instruction: str | None = None,
) -> Iterator[Episode]:
    """
    Read the episodes of one HDF5 file: an official one of LIBERO, a filtered one without attributes, one of robomimic,
    or one of :func:`write_demonstrations`.

    :param path: the file
    :param n_demos: number of episodes to read; by default all
    :param cameras: cameras to read; by default all
    :param instruction: the task in words; by default from the file's attributes, or else from its name
    :return: episodes with upright pictures in their stored size
    :raises ValueError: the file is damaged, incomplete or of another format; names the file and what is wrong in it
    """
    check_at_least_one(n_demos=n_demos)
    with opened(Path(path).expanduser()) as data:
        names = sorted((name for name in data if re.fullmatch(r"demo_\d+", name)), key=lambda name: int(name[5:]))
        if not names or (n_demos is not None and len(names) < n_demos):
            raise ValueError(f"it holds {len(names)} demonstrations, expected {n_demos or 'at least one'}.")
        for name in names[:n_demos]:
            yield _read_episode(data, name, cameras, instruction)


def find_files(paths: PathLike | Sequence[PathLike]) -> list[Path]:
    """
    :param paths: HDF5 files or directories of them, or data sets of LeRobot's
    :return: the files, in the order given, directories sorted by name, each once; a data set of LeRobot's is one of
        them
    :raises FileNotFoundError: a directory has none
    :raises ValueError: none is given, or a directory has files of both kinds
    """
    files: list[Path] = []
    for item in [paths] if isinstance(paths, (str, os.PathLike)) else paths:
        path = Path(item).expanduser()
        if path.is_dir() and not (path / LEROBOT_INFO).is_file():
            every = sorted(path.rglob("*"))
            named = (p for p in every if p.suffix in (".hdf5", ".h5") and not p.name.startswith("."))
            inside = [p for p in named if not p.is_dir()]
            sets = [str(p.parent.parent) for p in every if p.as_posix().endswith(f"/{LEROBOT_INFO}")]
            if sets and inside:
                raise ValueError(f"{path} holds HDF5 files, and data sets of LeRobot's: {', '.join(sets)}. Name each.")
            if sets:
                raise FileNotFoundError(
                    f"{path} is no data set of LeRobot's, it holds some. Name each: {', '.join(sets)}."
                )
            if not inside:
                raise FileNotFoundError(f"No .hdf5 files in {path}, and no {LEROBOT_INFO} of LeRobot's.")
            files += inside
        else:
            files.append(path)
    if not files:
        raise ValueError("No demonstration files given.")
    # One that is named twice, or lies in a folder that is named as well, would count twice
    return list({path.resolve(): path for path in reversed(files)}.values())[::-1]


def was_recorded(path: PathLike, env_args: Mapping[str, Any]) -> bool:
    """
    :param path: a file, which need not be there
    :param env_args: as they were passed to :func:`write_demonstrations`
    :return: whether it is a whole file that was written with these
    """
    try:
        with opened(Path(path)) as data:
            return json_attribute(data, "env_args") == dict(env_args)
    except (OSError, ValueError):
        return False


def read_statistics(paths: PathLike | Sequence[PathLike], skip: bool = False) -> dict[str, Any] | None:
    """
    Statistics stored with demonstrations: with them, action tokens cover the demonstrated actions. LeRobot's data sets
    have none of this kind.

    :param paths: HDF5 files or directories of them, or data sets of LeRobot's
    :param skip: leave out files that cannot be read
    :return: statistics for ``ActionTokens`` that cover all files; None if no file has any
    :raises ValueError: the files normalise different dimensions, only some have statistics, or one cannot be read
    """
    found: list[dict[str, Any]] = []
    without: list[str] = []
    for path in find_files(paths):
        if path.is_dir():  # LeRobot's statistics do not say which dimensions are normalised
            without.append(str(path))
            continue
        try:
            with opened(path) as data:
                statistics = json_attribute(data, "env_args").get("statistics")
                if statistics is not None:
                    _check_statistics(statistics)
        except (OSError, ValueError):
            if not skip:
                raise
            continue
        if statistics is None:
            without.append(str(path))
        else:
            found.append(statistics)
    if not found:
        return None
    if without:
        raise ValueError(
            f"Some files of demonstrations have statistics for action tokens, and these have none: "
            f"{', '.join(without)}. Train on files of one kind."
        )
    kinds: list[dict[str, Any]] = [{key: s[key] for key in ("mask", "gripper") if key in s} for s in found]
    if any(kind != kinds[0] for kind in kinds) or len({len(s["q01"]) for s in found}) > 1:
        raise ValueError(f"The statistics of {paths} normalise different dimensions: {kinds}.")
    return {
        "q01": np.min([statistics["q01"] for statistics in found], axis=0).tolist(),
        "q99": np.max([statistics["q99"] for statistics in found], axis=0).tolist(),
        **kinds[0],
    }


def _check_statistics(statistics: Any) -> None:
    if not isinstance(statistics, dict) or not {"q01", "q99"} <= set(statistics):
        raise ValueError(f"statistics in env_args must have q01 and q99, got {statistics!r}.")
    low, high, _ = normalisation_bounds(statistics, np.size(statistics["q01"]))
    if not (np.isfinite(low) & np.isfinite(high) & (low <= high)).all():
        raise ValueError(f"statistics in env_args must be finite, with q01 <= q99, got {statistics}.")
