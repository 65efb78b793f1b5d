"""
Traces of RoboTwin's expert, and demonstrations made of them.

A trace is what the expert did in one scene: joint positions, some 17 a second. Played in chunks it ends in success
again, so that it can be recorded with any pictures, and with the arms pushed off their way.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from opd_gym.actions import JOINTS, to_actions
from opd_gym.checks import check_at_least_one, check_fields, check_range
from opd_gym.envs.robotwin import runtime
from opd_gym.envs.robotwin.env import RoboTwinEnv
from opd_gym.envs.robotwin.tasks import SEED_STRIDE, TASKS
from opd_gym.files import replacing

# What `opd-gym robotwin check` plays, recorded with the stand-in robot
EXPERT_TRACES = Path(__file__).parent / "expert"
# How far a perturbation turns a joint, in rad (standard deviation)
PUSH = 0.05


@dataclass(frozen=True)
class Trace:
    """
    One episode of the expert.

    :param task: RoboTwin's name of the task
    :param scene_seed: seed of the scene
    :param embodiment: see :class:`RoboTwinEnv`
    :param task_config: see :class:`RoboTwinEnv`
    :param stand_in: whether the robot is a stand-in
    :param positions: float32 ``(T, 14)``: joint positions in rad and gripper openings
    """

    task: str
    scene_seed: int
    embodiment: tuple[Any, ...]
    task_config: str
    stand_in: bool
    positions: np.ndarray

    def save(self, path: str | os.PathLike[str]) -> None:
        """
        :param path: ``.npz`` file to write; an interrupted write leaves an old one untouched
        """
        about = {name: getattr(self, name) for name in ("task", "scene_seed", "embodiment", "task_config", "stand_in")}
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, positions=self.positions, about=np.array(json.dumps(about)))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Trace:
        """
        :param path: file that :meth:`save` wrote
        :return: the trace
        :raises ValueError: it is no such file
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                about, positions = json.loads(str(file["about"])), file["positions"]
            check_fields(cls, {name: value for name, value in about.items() if name != "embodiment"})
            about["embodiment"] = tuple(about["embodiment"])
            trace = cls(**about, positions=positions)
        except FileNotFoundError:
            raise
        except Exception as error:  # a damaged file raises anything
            raise ValueError(
                f"{path} is not a trace of RoboTwin's expert, or is damaged ({type(error).__name__}: {error}). Remove "
                "it; `opd-gym robotwin record` writes such files."
            ) from error
        positions = np.asarray(positions)
        if positions.ndim != 2 or positions.shape[1] != JOINTS or not len(positions) or trace.task not in TASKS:
            raise ValueError(f"{path} is not a trace: {trace.task!r:.80} with positions of shape {positions.shape}.")
        if positions.dtype.kind != "f" or not np.isfinite(positions).all():
            raise ValueError(f"{path} is not a trace: its positions are not all numbers.")
        return trace


def make_env(traces: Sequence[Trace], **kwargs: Any) -> RoboTwinEnv:
    """
    :param traces: traces of one task, recorded with the same robot and configuration
    :param kwargs: keyword arguments of the env
    :return: an env whose evaluation scenes are those of the traces, in their order
    :raises ValueError: the traces differ in task, robot or configuration, or the assets have another robot
    """
    kinds = {(trace.task, trace.embodiment, trace.task_config, trace.stand_in) for trace in traces}
    if len(kinds) != 1:
        raise ValueError(
            f"Expected traces of one task, robot (a stand-in or not) and task configuration, got {sorted(kinds)}."
        )
    ((task, embodiment, task_config, stand_in),) = kinds
    # An unstable scene is asked for by its own seed, and replaced as it was when it was recorded
    seeds = tuple(trace.scene_seed % SEED_STRIDE for trace in traces)
    other = next(seed for seed in range(len(seeds) + 1) if seed not in seeds)
    arguments = {"eval_seeds": seeds, "train_seeds": (other,), "init_states": "eval", **kwargs}
    # These count as evaluation scenes here, but were recorded as training scenes
    arguments.setdefault("held_out_textures", False)
    arguments.setdefault("instructions", "seen")
    env = RoboTwinEnv(task, embodiment=embodiment, task_config=task_config, **arguments)
    if env.is_stand_in != stand_in:
        robots = ("RoboTwin's own robot", "a stand-in")
        hint = f"`{runtime.STAND_IN_HINT}`, then set ROBOTWIN_ASSETS_ROOT to {runtime.home() / 'stand-in'}"
        raise ValueError(
            f"The traces were recorded with {robots[stand_in]}, and the assets in {env.settings.assets_root} have "
            f"{robots[not stand_in]}. Run " + (hint if stand_in else f"`{runtime.DOWNLOAD_HINT}`") + "."
        )
    return env


def find_traces(paths: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """
    :param paths: files, or folders of them
    :return: the files
    :raises FileNotFoundError: there is none
    """
    found: list[Path] = []
    for path in map(Path, paths):
        found += sorted(path.glob("[!.]*.npz")) if path.is_dir() else [path]
    if not found or not all(path.is_file() for path in found):
        raise FileNotFoundError(f"No traces (.npz) in {', '.join(map(str, paths))}.")
    return found


@dataclass
class Replay:
    """
    What became of a trace.

    :param success: whether it was solved
    :param observations: key -> array ``(T, ...)``, one row a decision
    :param action_chunks: float32 ``(T, K, 14)``: what the expert does next, for each
    :param instruction: what was to be done
    """

    success: bool
    observations: dict[str, np.ndarray] = field(default_factory=dict)
    action_chunks: np.ndarray = field(default_factory=lambda: np.zeros((0, 1, JOINTS), dtype=np.float32))
    instruction: str = ""


def replay(
    trace: Trace,
    env: RoboTwinEnv,
    perturbation: float = 0.0,
    first: int | None = None,
    seed: int = 0,
    init_state_id: int = 0,
    frames: list[np.ndarray] | None = None,
) -> Replay:
    """
    Play a trace in chunks, and label every decision with the chunk that the expert played there.

    A pushed chunk leads away from the trace: an offset that grows over the chunk is added to where the arms go (not to
    the grippers). Positions are absolute, so the label of the next decision leads back (noise injection in the manner
    of DART, https://arxiv.org/abs/1703.09327). A push is never a label.

    :param trace: the trace
    :param env: raw env of the trace's scene with chunks, see :func:`make_env`
    :param perturbation: probability that a chunk is pushed
    :param first: actions before the second decision, which moves all later decisions in time; None: a whole chunk
    :param seed: seed of the perturbations
    :param init_state_id: the env's number of that scene
    :param frames: gets what the env renders after every decision
    :return: the episode
    :raises ValueError: the env has no chunks, or its scene is another one than the trace's
    """
    if env.chunk_size is None:
        raise ValueError("A trace is replayed in chunks: build the env with chunk_size=25.")
    check_range("[0, 1]", perturbation=perturbation)
    check_at_least_one(first=first)
    rng = np.random.default_rng(seed)
    size = env.chunk_size
    actions = to_actions(trace.positions)
    # The expert stands still once it has succeeded: the last action is repeated.
    actions = np.concatenate([actions, np.repeat(actions[-1:], 2 * size, axis=0)])
    observation, info = env.reset(options={"init_state_id": init_state_id})
    if info["scene_seed"] != trace.scene_seed:
        raise ValueError(
            f"The trace was recorded in scene {trace.scene_seed}, and the env's scene {init_state_id} is "
            f"{info['scene_seed']}. Build the env with make_env, and give the number of the trace in it; a scene that "
            "is stable with one robot may be unstable, and replaced, with another."
        )
    observations, chunks = [], []
    step_info: dict[str, Any] = {}
    done, position = False, 0
    while not done and position < len(actions) - size:
        length = first if first is not None and position == 0 else size
        chunk = actions[position : position + size]
        observations.append(observation)
        chunks.append(chunk)
        # A shorter first chunk is filled up with its last action, which changes nothing
        played = np.concatenate([chunk[:length], np.repeat(chunk[length - 1 : length], size - length, axis=0)])
        if rng.random() < perturbation:
            push = rng.normal(0.0, PUSH / np.pi, JOINTS) * (np.arange(JOINTS) % 7 != 6)
            played = played + push * np.linspace(0.0, 1.0, size)[:, None]
        observation, _, terminated, truncated, step_info = env.step(played.astype(np.float32).clip(-1.0, 1.0))
        position += length
        if step_info.get("episode_lost"):
            break
        if frames is not None:
            frames.append(env.render())  # type: ignore[arg-type]
        done = terminated or truncated
    keys = [key for key in observations[0] if key != "instruction"]
    return Replay(
        bool(step_info.get("is_success")),
        {key: np.stack([obs[key] for obs in observations]) for key in keys},
        np.stack(chunks),
        info["instruction"],
    )
