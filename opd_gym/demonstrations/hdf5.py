"""Demonstrations on disk, in the HDF5 format of LIBERO."""

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

from opd_gym.files import replacing

# Names of LIBERO's files for the cameras of our observations.
CAMERA_DATASETS = {"agentview": "agentview_rgb", "wrist": "eye_in_hand_rgb"}

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
        self.actions = np.asarray(self.actions, dtype=np.float32)
        if self.actions.ndim != 2 or len(self.actions) == 0:
            raise ValueError(f"actions of an episode must have shape (T, D) with T > 0, got {self.actions.shape}.")
        arrays = {f"observations[{key!r}]": value for key, value in self.observations.items()}
        for name in ("action_chunks", "states", "joint_states", "rewards"):
            if getattr(self, name) is not None:
                arrays[name] = getattr(self, name)
        for name, value in arrays.items():
            if len(value) != len(self.actions):
                raise ValueError(f"{name} has {len(value)} rows, the episode has {len(self.actions)} actions.")
        if self.action_chunks is not None:
            self.action_chunks = np.asarray(self.action_chunks, dtype=np.float32)
            if self.action_chunks.ndim != 3 or self.action_chunks.shape[2] != self.actions.shape[1]:
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
    for key, attribute in episode.attrs.items():
        group.attrs[key] = attribute


def _instruction_of(file: h5py.File) -> str:
    info = file["data"].attrs.get("problem_info")
    if info is None:
        raise ValueError(f"{file.filename} has no attribute data.problem_info: it is not a LIBERO demonstration file.")
    text = json.loads(info)["language_instruction"]
    # LIBERO's own files hold one text or a list of its pieces, some in quotation marks.
    return (text if isinstance(text, str) else "".join(text)).strip().strip('"')


def _proprio_of(group: h5py.Group) -> np.ndarray:
    if "proprio" in group["obs"]:
        return group["obs"]["proprio"][()]
    if "robot_states" in group:
        robot = group["robot_states"][()]
        if robot.shape[1] == 9:
            return np.concatenate([robot[:, 2:], robot[:, :2]], axis=1).astype(np.float32)
    obs = group["obs"]
    position = obs["ee_pos"][()] if "ee_pos" in obs else obs["ee_states"][:, :3]
    orientation = obs["ee_ori"][()] if "ee_ori" in obs else obs["ee_states"][:, 3:]
    if orientation.shape[1] == 3:
        orientation = axis_angle_to_quat(orientation)
    return np.concatenate([position, orientation, obs["gripper_states"][()]], axis=1).astype(np.float32)


def read_demonstrations(
    path: PathLike, n_demos: int | None = None, cameras: Sequence[str] | None = None
) -> Iterator[Episode]:
    """
    Read the episodes of one LIBERO HDF5 file, official ones or those of :func:`write_demonstrations`.

    :param path: the file
    :param n_demos: number of episodes to read; by default all
    :param cameras: cameras to read; by default all
    :return: episodes with upright pictures in their stored size
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"Demonstration file {path} does not exist.")
    with h5py.File(path, "r") as file:
        if "data" not in file:
            raise ValueError(f"{path} has no group `data`: it is not a LIBERO demonstration file.")
        instruction = _instruction_of(file)
        flipped = str(file["data"].attrs.get("macros_image_convention", "opengl")) == "opengl"
        names = sorted(
            (name for name in file["data"] if re.fullmatch(r"demo_\d+", name)), key=lambda name: int(name[5:])
        )
        if not names or (n_demos is not None and len(names) < n_demos):
            raise ValueError(f"{path} holds {len(names)} demonstrations, expected {n_demos or 'at least one'}.")
        for name in names[:n_demos]:
            group = file["data"][name]
            keys = {dataset: key for key, dataset in CAMERA_DATASETS.items()}
            found = {keys.get(d, d[: -len("_rgb")]): d for d in group["obs"] if d.endswith("_rgb")}
            missing = [camera for camera in cameras or () if camera not in found]
            if missing:
                raise ValueError(f"{path} has no pictures of {missing}; it has {sorted(found)}.")
            observations: dict[str, np.ndarray] = {}
            for key in cameras if cameras is not None else sorted(found):
                images = group["obs"][found[key]][()]
                observations[key] = np.ascontiguousarray(images[:, ::-1]) if flipped else images
            observations["proprio"] = _proprio_of(group)
            rewards = group["rewards"][()] if "rewards" in group else None
            yield Episode(
                observations,
                group["actions"][()],
                action_chunks=group["action_chunks"][()] if "action_chunks" in group else None,
                instruction=str(group.attrs.get("language_instruction", instruction)),
                states=group["states"][()] if "states" in group else None,
                joint_states=group["obs"]["joint_states"][()] if "joint_states" in group["obs"] else None,
                rewards=rewards,
                success=bool(group.attrs.get("success", rewards is None or rewards[-1] > 0)),
                attrs={k: v for k, v in group.attrs.items() if k not in ("model_file", "init_state")},
            )


def find_files(paths: PathLike | Sequence[PathLike]) -> list[Path]:
    """
    :param paths: HDF5 files or directories of them
    :return: the files, in the order given, directories sorted by name
    """
    files: list[Path] = []
    for item in [paths] if isinstance(paths, (str, os.PathLike)) else paths:
        path = Path(item).expanduser()
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix in (".hdf5", ".h5") and not p.name.startswith("."))
            if not inside:
                raise FileNotFoundError(f"No .hdf5 files in {path}.")
            files += inside
        else:
            files.append(path)
    if not files:
        raise ValueError("No demonstration files given.")
    return files


def read_statistics(paths: PathLike | Sequence[PathLike]) -> dict[str, list[Any]] | None:
    """
    Statistics stored with demonstrations: with them, action tokens cover the demonstrated actions.

    :param paths: HDF5 files or directories of them
    :return: statistics for ``ActionTokens`` that cover all files; None if no file has any
    :raises ValueError: the files normalise different dimensions, only some have statistics, or one is not a file of
        demonstrations
    """
    found: list[dict[str, Any]] = []
    without: list[str] = []
    for path in find_files(paths):
        with h5py.File(path, "r") as file:
            if "data" not in file:
                raise ValueError(f"{path} has no group `data`: it is not a LIBERO demonstration file.")
            statistics = json.loads(file["data"].attrs.get("env_args", "{}")).get("statistics")
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
    masks = [statistics.get("mask") for statistics in found]
    if any(mask != masks[0] for mask in masks):
        raise ValueError(f"The statistics of {paths} normalise different dimensions: {masks}.")
    merged = {
        "q01": np.min([statistics["q01"] for statistics in found], axis=0).tolist(),
        "q99": np.max([statistics["q99"] for statistics in found], axis=0).tolist(),
    }
    return merged if masks[0] is None else {**merged, "mask": masks[0]}
