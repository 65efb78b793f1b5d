"""Demonstrations recorded with the scripted expert, one LIBERO file a task."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import gymnasium as gym
from tqdm import tqdm

from opd_gym.checks import check_at_least, check_at_least_one, check_range
from opd_gym.cli.options import Demos
from opd_gym.envs.registration import LIBERO_IDS, bare_id

# The expert fails in a few of a hundred initial states. A task that it never solves must not run for ever.
MAX_ATTEMPTS_PER_EPISODE = 5


def record_demonstrations(
    env_id: str,
    folder: Path,
    episodes_per_task: int = 1,
    task_ids: Sequence[int] | None = None,
    seed: int = 0,
    chunk_size: int = 8,
    stride: int = 1,
    perturbation: float = 0.0,
    image_size: int = 128,
    visuals: str = "light",
    progress: bool = True,
) -> list[Path]:
    """
    Record successful episodes of the scripted expert in sampled initial states, in LIBERO's HDF5 format. A task whose
    file is there, recorded with the same arguments, is not recorded again.

    :param env_id: LIBERO environment id
    :param folder: where the files go, ``<task>_demo.hdf5``
    :param episodes_per_task: number of successful episodes of each task
    :param task_ids: tasks; None for all tasks of the env
    :param seed: seed of the first episode, counted up for the next ones
    :param chunk_size: number of actions of a label
    :param stride: record one of every ``stride`` steps
    :param perturbation: probability of a push at a step, see :func:`opd_gym.envs.libero.experts.record.record_episode`
    :param image_size: height and width of the pictures
    :param visuals: see ``LiberoEnv``
    :param progress: show a progress bar
    :return: the files
    :raises ValueError: no scripted expert can play one of the tasks, or it fails too often
    """
    if bare_id(env_id) not in LIBERO_IDS:
        raise ValueError(f"Demonstrations are recorded on LIBERO environments, got {env_id!r}. See `opd-gym list`.")
    check_at_least_one(episodes_per_task=episodes_per_task, chunk_size=chunk_size, stride=stride, image_size=image_size)
    check_range("[0, 1]", perturbation=perturbation)
    check_at_least(0, seed=seed)
    from opd_gym.demonstrations import Episode, was_recorded, write_demonstrations
    from opd_gym.envs.libero import suites
    from opd_gym.envs.libero.env import LiberoEnv
    from opd_gym.envs.libero.experts.record import record_episode

    env = gym.make(env_id, image_size=image_size, visuals=visuals, max_simulators=1).unwrapped
    assert isinstance(env, LiberoEnv)
    files = []
    tasks = list(task_ids) if task_ids else env.task_ids
    env.check_expert(tasks)
    recipe = {
        "env_name": env_id,
        "episodes_per_task": episodes_per_task,
        "seed": seed,
        "chunk_size": chunk_size,
        "stride": stride,
        "perturbation": perturbation,
        "image_size": image_size,
        "visuals": visuals,
    }
    bar = tqdm(total=len(tasks) * episodes_per_task, desc="recording", unit="episode", disable=not progress)
    try:
        for task_id in tasks:
            task = suites.tasks(env.suite)[task_id]
            path = Path(folder).expanduser() / f"{task.name}_demo.hdf5"
            files.append(path)
            if was_recorded(path, recipe):
                bar.write(f"{path} is there already")
                bar.update(episodes_per_task)
                continue
            episodes: list[Episode] = []
            attempt = 0
            while len(episodes) < episodes_per_task:
                if attempt >= MAX_ATTEMPTS_PER_EPISODE * episodes_per_task:
                    raise ValueError(
                        f"Only {len(episodes)} of {attempt} episodes of task {task_id} were solved by the scripted "
                        "expert, with states to record. Leave this task out with --task-ids, or lower --perturbation "
                        "and --stride."
                    )
                recorded = record_episode(
                    env, seed + 1000 * task_id + attempt, task_id, chunk_size, stride, perturbation
                )
                attempt += 1
                if not recorded.success or not len(recorded.actions):
                    continue
                episodes.append(
                    Episode(
                        {key: value for key, value in recorded.observations.items() if key != "instruction"},
                        recorded.actions,
                        action_chunks=recorded.action_chunks,
                        instruction=env.instruction,
                        attrs={"task_id": task_id, "seed": recorded.seed},
                    )
                )
                bar.update(1)
            write_demonstrations(
                path,
                episodes,
                task.instruction,
                env_args=recipe,
                bddl_file_name=task.bddl_file.name,
            )
    finally:
        bar.close()
        env.close()
    return files


def run(args: Demos) -> int:
    """
    :param args: what to record
    :return: exit status
    """
    values = vars(args).copy()
    record_demonstrations(values.pop("env"), values.pop("output"), **values)
    return 0
