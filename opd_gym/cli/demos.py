"""Demonstrations by the scripted expert or a policy: one LIBERO file a task, or a data set in LeRobot's format."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import gymnasium as gym
import numpy as np
from tqdm import tqdm

from opd_gym.checks import check_at_least, check_at_least_one, check_range
from opd_gym.cli.options import Demos
from opd_gym.envs.make import DEFAULT_CHUNK_SIZE, env_arguments, make_env_fn
from opd_gym.envs.registration import LIBERO_IDS, bare_id

if TYPE_CHECKING:
    from opd_gym.demonstrations import Episode
    from opd_gym.envs.libero.env import LiberoEnv

# The expert fails in a few of a hundred initial states, a policy in more. A task that they never solve must not run for
# ever.
MAX_ATTEMPTS_PER_EPISODE = 5


def record_demonstrations(
    env_id: str,
    folder: Path,
    episodes_per_task: int = 1,
    task_ids: Sequence[int] | None = None,
    seed: int = 0,
    chunk_size: int | None = None,
    stride: int = 1,
    perturbation: float = 0.0,
    image_size: int | None = None,
    visuals: str | None = None,
    progress: bool = True,
    format: Literal["hdf5", "lerobot"] = "hdf5",
    videos: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    device: str = "auto",
    trust: bool = False,
) -> list[Path]:
    """
    Record successful episodes in sampled initial states, in LIBERO's HDF5 format or LeRobot's. The scripted expert
    plays them, or a policy, with its most likely actions.

    A task whose file is there, recorded with the same arguments, is not recorded again; a data set of LeRobot's is
    written as a whole. No other file is replaced.

    :param env_id: LIBERO environment id
    :param folder: where the files go, ``<task>_demo.hdf5``, or the data set
    :param episodes_per_task: number of successful episodes of each task
    :param task_ids: tasks; None for all tasks of the env
    :param seed: seed of the first episode, counted up for the next ones
    :param chunk_size: number of actions of a label; None for as many as the policy decides at once, or 8
    :param stride: record one of every ``stride`` steps
    :param perturbation: probability of a push at a step, see :func:`opd_gym.envs.libero.experts.record.record_episode`
    :param image_size: height and width of the pictures; None for what the policy was trained with, or 128
    :param visuals: see ``LiberoEnv``; None for what the policy was trained with, or "light"
    :param progress: show a progress bar
    :param format: "hdf5" or "lerobot"
    :param videos: whether LeRobot's format gets videos in place of pictures
    :param checkpoint: policy that plays, see :func:`opd_gym.checkpoints.resolve_checkpoint`; None for the scripted
        expert
    :param device: where the policy computes
    :param trust: open a checkpoint's zip whatever it holds; code in it runs
    :return: the files, or the folder of the data set
    :raises FileExistsError: where the recording is to go lies something else
    :raises FileNotFoundError: there is no such checkpoint
    :raises ValueError: no scripted expert can play one of the tasks, the policy does not fit the env, one of them fails
        too often, or LeRobot's format has no place for what is asked for
    """
    if bare_id(env_id) not in LIBERO_IDS:
        raise ValueError(f"Demonstrations are recorded on LIBERO environments, got {env_id!r}. See `opd-gym list`.")
    check_at_least_one(episodes_per_task=episodes_per_task, chunk_size=chunk_size, stride=stride, image_size=image_size)
    check_range("[0, 1]", perturbation=perturbation)
    check_at_least(0, seed=seed)
    if format not in ("hdf5", "lerobot"):
        raise ValueError(f'format must be "hdf5" or "lerobot", got {format!r}.')
    if format == "lerobot" and (stride > 1 or perturbation > 0.0):
        raise ValueError(
            "LeRobot's labels are the actions of the frames that follow, so every step has to be there, and no pushes: "
            f"expected stride=1 and perturbation=0, got {stride} and {perturbation}. Or record HDF5."
        )
    if videos and format != "lerobot":
        raise ValueError("videos are for LeRobot's format: pass --format lerobot.")
    from opd_gym.demonstrations import was_recorded, was_recorded_as, write_demonstrations, write_lerobot
    from opd_gym.demonstrations.lerobot import check_vacant
    from opd_gym.envs.libero import suites
    from opd_gym.envs.libero.env import LiberoEnv

    folder = Path(folder).expanduser()
    settings: dict[str, Any] = {}
    if checkpoint is not None:
        from opd_gym.policies.loading import checkpoint_settings

        settings = checkpoint_settings({"checkpoint": checkpoint}, trust)
    chunk_size = chunk_size or settings.get("chunk_size", DEFAULT_CHUNK_SIZE)
    pictures: dict[str, Any] = {
        "image_size": image_size or settings.get("image_size", 128),
        "visuals": visuals or settings.get("visuals", "light"),
    }
    recipe = {
        "env_name": env_id,
        "episodes_per_task": episodes_per_task,
        "seed": seed,
        "chunk_size": chunk_size,
        "stride": stride,
        "perturbation": perturbation,
        **pictures,
        **({} if checkpoint is None else {"checkpoint": str(checkpoint)}),
    }
    outer = make_env_fn(env_id, **env_arguments(env_id, {}, settings, **pictures, max_simulators=1))()
    policy = None if checkpoint is None else _acting(outer, checkpoint, device, trust)
    env = outer.unwrapped
    assert isinstance(env, LiberoEnv)
    tasks = list(task_ids) if task_ids else env.task_ids
    unknown = sorted(set(tasks) - set(env.task_ids))
    if unknown:
        raise ValueError(f"{env_id} has the tasks {env.task_ids}, and --task-ids names {unknown}.")
    bar = tqdm(total=len(tasks) * episodes_per_task, desc="recording", unit="episode", disable=not progress)

    def record(task_id: int) -> Iterator[Episode]:
        for episode in _solved(env, task_id, episodes_per_task, seed, chunk_size, stride, perturbation, policy):
            yield episode
            bar.update(1)

    try:
        if format == "lerobot":
            about = {**recipe, "task_ids": tasks, "videos": videos}
            if was_recorded_as(folder, about):
                bar.write(f"{folder} is there already")
                return [folder]
            check_vacant(folder)
            if policy is None:
                env.check_expert(tasks)
            episodes = (episode for task_id in tasks for episode in record(task_id))
            write_lerobot(folder, episodes, videos, env.metadata["render_fps"], "panda", about)
            return [folder]
        if policy is None:
            env.check_expert(tasks)
        files = [folder / f"{suites.tasks(env.suite)[task_id].name}_demo.hdf5" for task_id in tasks]
        there = [path for path in files if was_recorded(path, recipe)]
        others = [str(path) for path in files if path.exists() and path not in there]
        if others:
            raise FileExistsError(
                f"{', '.join(others)}: there already, and not what this command records, from {recipe}. Name another "
                "folder (--output), or remove what is there."
            )
        for task_id, path in zip(tasks, files, strict=True):
            task = suites.tasks(env.suite)[task_id]
            if path in there:
                bar.write(f"{path} is there already")
                bar.update(episodes_per_task)
                continue
            write_demonstrations(
                path,
                record(task_id),
                task.instruction,
                env_args=recipe,
                bddl_file_name=task.bddl_file.name,
            )
        return files
    finally:
        bar.close()
        env.close()


def _acting(
    env: gym.Env, checkpoint: str | os.PathLike[str], device: str, trust: bool
) -> Callable[[dict[str, np.ndarray]], np.ndarray]:
    """From an observation of the raw env to the actions that a policy decides on in ``env``, which has its tokens."""
    from stable_baselines3.common.utils import get_device

    from opd_gym.policies.loading import check_device, check_spaces, load_policy

    policy = load_policy(checkpoint, env.observation_space, env.action_space, trainable=False, trust=trust)
    check_spaces(policy, env, checkpoint)
    policy.to(get_device(check_device(device)))
    decode = env.get_wrapper_attr("action")  # of ActionTokens

    def act(obs: dict[str, np.ndarray]) -> np.ndarray:
        tokens = policy.predict({key: value[None] for key, value in obs.items()}, deterministic=True)[0]
        return decode(tokens[0])

    return act


def _solved(
    env: LiberoEnv,
    task_id: int,
    n_episodes: int,
    seed: int,
    chunk_size: int,
    stride: int,
    perturbation: float,
    policy: Callable[[dict[str, np.ndarray]], np.ndarray] | None,
) -> Iterator[Episode]:
    """Episodes of a task that the expert, or a policy, has solved."""
    from opd_gym.demonstrations import Episode
    from opd_gym.envs.libero.experts.record import record_episode

    solved = 0
    for attempt in range(MAX_ATTEMPTS_PER_EPISODE * n_episodes):
        of_attempt = seed + 1000 * task_id + attempt
        recorded = record_episode(env, of_attempt, task_id, chunk_size, stride, perturbation, policy)
        if not recorded.success or not len(recorded.actions):
            continue
        yield Episode(
            {key: value for key, value in recorded.observations.items() if key != "instruction"},
            recorded.actions,
            action_chunks=recorded.action_chunks,
            instruction=env.instruction,
            attrs={"task_id": task_id, "seed": recorded.seed, "env_steps": recorded.n_steps},
        )
        solved += 1
        if solved == n_episodes:
            return
    player = "scripted expert" if policy is None else "policy"
    raise ValueError(
        f"Only {solved} of {MAX_ATTEMPTS_PER_EPISODE * n_episodes} episodes of task {task_id} were solved by the "
        f"{player}, with states to record. Leave this task out with --task-ids, or lower --perturbation and --stride."
    )


def run(args: Demos) -> int:
    """
    :param args: what to record
    :return: exit status
    """
    values = vars(args).copy()
    record_demonstrations(values.pop("env"), values.pop("output"), **values)
    return 0
