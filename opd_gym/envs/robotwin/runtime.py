"""
The one place that decides where RoboTwin's runtime, its assets and a Vulkan driver come from, and how it is imported.

RoboTwin's runtime pins old versions of PyTorch, NumPy and Gymnasium, and wants packages that only its data collection
uses. Here it lies in a folder of its own (:func:`packages_dir`), which nobody else sees, and runs on the versions that
are installed: what is missing is replaced before the first import.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import io
import json
import os
import random
import sys
import warnings
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from opd_gym.envs.robotwin.tasks import MESHLESS_TASKS, STAND_IN_TASKS
from opd_gym.files import cache_dir
from opd_gym.untrusted import read_yaml

INSTALL_HINT = "opd-gym robotwin install"
DOWNLOAD_HINT = "opd-gym robotwin assets --download"
STAND_IN_HINT = "opd-gym robotwin assets --stand-in"
UNSET_HINT = "unset VK_ICD_FILENAMES VK_DRIVER_FILES"
NOT_COMPARABLE = "Success rates with it cannot be compared to published ones."

# Environment variables that choose a Vulkan driver
DRIVER_VARIABLES = ("VK_ICD_FILENAMES", "VK_DRIVER_FILES")
# Where drivers describe themselves to Vulkan
DRIVER_FOLDERS = ("/usr/share/vulkan/icd.d", "/etc/vulkan/icd.d")
STAND_IN_MARKER = ".stand-in.json"
# 2: with objects
STAND_IN_VERSION = 2
_renderers: list[Any] = []
# What has to be importable for RoboTwin to run.
MODULES = ("robotwin", "sapien", "toppra", "transforms3d", "trimesh", "cv2", "scipy", "imageio", "yaml", "torch")


class SimulatorError(RuntimeError):
    """RoboTwin's simulator cannot go on; the message says what to do."""


def home() -> Path:
    """
    :return: folder for everything of RoboTwin's
    """
    return cache_dir() / "robotwin"


def packages_dir() -> Path:
    """
    :return: folder of the Python packages for RoboTwin alone, one for each Python environment: it holds what that
        environment lacks
    """
    return home() / f"packages-{_environment()}"


def planner_dir() -> Path:
    """
    :return: virtual environment in which RoboTwin's expert plans, one for each Python environment, whose packages
        it shares
    """
    return home() / f"planner-{_environment()}"


def _environment() -> str:
    return f"{sys.implementation.cache_tag}-{hashlib.sha256(sys.prefix.encode()).hexdigest()[:8]}"


def driver_file() -> Path:
    """
    :return: description of the private software Vulkan driver
    """
    return home() / "vulkan" / "lvp_icd.json"


# ------------------------------------------------------------------------------------------------------------- assets


def find_assets(assets_root: str | os.PathLike[str] | None = None) -> Path:
    """
    The folder that contains RoboTwin's ``assets``: the one that is given, ``$ROBOTWIN_ASSETS_ROOT``, the downloaded
    one, the stand-in.

    :param assets_root: folder; None to look for it
    :return: the folder
    :raises FileNotFoundError: there is none; the message has the commands that make one
    """
    named = assets_root or os.environ.get("ROBOTWIN_ASSETS_ROOT")
    candidates = [Path(named).expanduser()] if named else [home() / "assets", home() / "stand-in"]
    for root in candidates:
        if (root / "assets" / "embodiments").is_dir():
            return root.resolve()
    raise FileNotFoundError(
        f"RoboTwin's assets are not in {' or '.join(map(str, candidates))}: expected a folder assets/embodiments "
        f"there. Run `{DOWNLOAD_HINT}` for the real ones (from the Hugging Face hub), or `{STAND_IN_HINT}` for a "
        "stand-in robot that needs no download."
    )


def is_stand_in(assets_root: Path) -> bool:
    """
    :param assets_root: see :func:`find_assets`
    :return: whether these are not RoboTwin's assets but generated in their place
    """
    return (assets_root / STAND_IN_MARKER).is_file()


def is_current_stand_in(assets_root: Path) -> bool:
    """
    :param assets_root: see :func:`find_assets`
    :return: whether it is a stand-in as this version of the library writes it
    """
    marker = assets_root / STAND_IN_MARKER
    try:
        found = json.loads(marker.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # one that is damaged is written anew
        return False
    return isinstance(found, dict) and found.get("version") == STAND_IN_VERSION


def _robot(path: Path) -> dict[str, Any]:
    values = read_yaml(path)
    arms = values.get("arm_joints_name") if isinstance(values, dict) else None
    if not isinstance(arms, list) or not arms or not all(isinstance(joints, list) for joints in arms):
        raise ValueError(
            f"{path} does not describe a robot: its arm_joints_name must be a list of joints for each arm."
        )
    return values


def robots(assets_root: Path, embodiment: tuple[Any, ...]) -> list[tuple[Path, dict[str, Any]]]:
    """
    :param assets_root: see :func:`find_assets`
    :param embodiment: ``(robot,)`` with two arms, or ``(left, right, distance in m)``
    :return: folder and configuration of the left and of the right arm's robot
    :raises FileNotFoundError: there is no such robot
    :raises ValueError: it does not have two arms, or not six joints in each
    """
    names = embodiment[:2]
    found = [assets_root / "assets" / "embodiments" / name for name in names]
    for folder in found:
        if not (folder / "config.yml").is_file():
            there = sorted(path.parent.name for path in folder.parent.glob("*/config.yml"))
            raise FileNotFoundError(
                f"There is no robot {folder.name!r} in {folder.parent}; there are: {', '.join(there) or 'none'}."
            )
    both = [(folder, _robot(folder / "config.yml")) for folder in (found[0], found[-1])]
    if len(names) == 1 and not both[0][1].get("dual_arm", False):
        raise ValueError(
            f"Robot {names[0]!r} has one arm. Give two robots and their distance in m, "
            f"({names[0]!r}, {names[0]!r}, 0.6), or one with two arms, such as 'aloha-agilex'."
        )
    for arm, (folder, config) in enumerate(both):
        joints = config["arm_joints_name"][min(arm, len(config["arm_joints_name"]) - 1)]
        if len(joints) != 6:
            raise ValueError(
                f"Robot {folder.name!r} has {len(joints)} joints in an arm; actions here are those of RoboTwin's "
                "policies, two arms with six joints each (aloha-agilex, piper, ARX-X5, y1)."
            )
    return both


def check_task_assets(assets_root: Path, task: str, task_config: str) -> None:
    """
    :param assets_root: see :func:`find_assets`
    :param task: RoboTwin's name of a task
    :param task_config: "demo_clean" or "demo_randomized"
    :raises FileNotFoundError: the task needs what is not there
    """

    def empty(name: str) -> bool:
        return not any((assets_root / "assets" / name).glob("*/*"))

    stand_in = is_stand_in(assets_root)
    without = STAND_IN_TASKS if is_current_stand_in(assets_root) else MESHLESS_TASKS
    missing = []
    if task not in without and (stand_in or empty("objects")):
        missing.append(f"the objects of {task!r}")
    if task_config == "demo_randomized":
        missing += [name for name in ("objects", "background_texture") if stand_in or empty(name)]
    if missing:
        raise FileNotFoundError(
            f"{' and '.join(missing)} are missing in {assets_root / 'assets'}. Run `{DOWNLOAD_HINT}`. Without a "
            f"download, after `{STAND_IN_HINT}`, these tasks run, with task_config='demo_clean': "
            f"{', '.join(STAND_IN_TASKS)}."
        )


# ------------------------------------------------------------------------------------------------------------ imports


def add_packages() -> None:
    """Let imports find RoboTwin's packages, after everything that is installed."""
    folder = str(packages_dir())
    if folder not in sys.path and os.path.isdir(folder):
        sys.path.append(folder)
        importlib.invalidate_caches()


def missing_modules() -> list[str]:
    """
    :return: modules that RoboTwin needs and that are not installed
    """
    add_packages()
    return [name for name in MODULES if importlib.util.find_spec(name) is None]


def require_robotwin() -> None:
    """
    Look for what the simulator needs, without importing it.

    :raises ImportError: something is not installed, with the command that installs it
    """
    if sys.platform != "linux":
        raise ImportError(f"RoboTwin's simulator (SAPIEN) runs on Linux with x86-64, this is {sys.platform}.")
    missing = missing_modules()
    if missing:
        raise ImportError(
            f"The RoboTwin environments need {', '.join(missing)}, not installed for {sys.executable}. "
            f"Run: {INSTALL_HINT}"
        )


def has_gpu() -> bool:
    """
    :return: whether an NVIDIA driver is loaded and can be used with Vulkan: many containers have it for CUDA alone
    """
    described = (path for folder in DRIVER_FOLDERS for path in Path(folder).glob("nvidia_icd*.json"))
    return nvidia_driver() and any(described)


def nvidia_driver() -> bool:
    """
    :return: whether an NVIDIA driver is loaded
    """
    return os.path.exists("/proc/driver/nvidia/version")


def _choose_driver() -> None:
    """Use the private software driver, unless a GPU has one for Vulkan or the user has chosen another."""
    if has_gpu() or any(name in os.environ for name in DRIVER_VARIABLES):
        return
    if driver_file().is_file():
        os.environ["VK_ICD_FILENAMES"] = str(driver_file())


@functools.cache
def import_robotwin() -> Any:
    """
    Import RoboTwin and SAPIEN, with what is missing replaced.

    :return: the module ``sapien``
    :raises ImportError: something is not installed, or cannot be imported, with the command that installs it
    :raises SimulatorError: SAPIEN finds no Vulkan device
    """
    require_robotwin()
    _choose_driver()
    if not _importable("open3d"):
        # Imported for point clouds, which no policy here sees
        sys.modules["open3d"] = ModuleType("open3d")
        sys.modules["open3d"].__spec__ = ModuleSpec("open3d", None)
    if int(np.__version__.split(".")[0]) >= 2 or not _importable("mplib"):
        from opd_gym.envs.robotwin.topp import install_as_mplib

        install_as_mplib()
    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sapien = importlib.import_module("sapien")
            importlib.import_module("robotwin.envs._base_task")
            robot = importlib.import_module("robotwin.envs.robot.robot")
            clutter = importlib.import_module("robotwin.envs.utils.rand_create_cluttered_actor")
    except ImportError as error:
        raise ImportError(
            f"RoboTwin is installed but cannot be imported ({error}). Reinstall it with: {INSTALL_HINT} --force"
        ) from error
    # Configurations of a planner that runs on CUDA alone and plays no part here; the stand-in robots have none
    robot.load_curobo_config = lambda embodiment_root, arm: {}  # type: ignore[attr-defined]
    # This module alone prefers a variable that users set, from which an env's own assets_root may differ
    clutter._assets_root = lambda: Path(os.environ["ASSETS_PATH"])  # type: ignore[attr-defined]
    try:
        # Kept alive, because new scenes share what it has computed: without it each takes 5 s on a CPU
        _renderers.append(sapien.SapienRenderer())
    except RuntimeError as error:
        raise vulkan_error(error) from error
    return sapien


def _importable(name: str) -> bool:
    # find_spec raises for a module that is imported already, or replaced, and has no specification
    return name in sys.modules or importlib.util.find_spec(name) is not None


def vulkan_error(error: BaseException) -> SimulatorError:
    """
    :param error: what SAPIEN said
    :return: an error that says what to do
    """
    chosen = {name: os.environ[name] for name in DRIVER_VARIABLES if name in os.environ}
    private = str(driver_file())
    if chosen and any(value != private for value in chosen.values()):
        named = " and ".join(f"{name}={value}" for name, value in chosen.items())
        return SimulatorError(
            f"SAPIEN finds no Vulkan device with the driver that {named} names ({error}). Name another one, or run "
            f"`{UNSET_HINT}` to leave the choice to this library."
        )
    return SimulatorError(
        f"SAPIEN finds no Vulkan device to render with ({error}). Without a GPU run `{INSTALL_HINT}`, which fetches a "
        "software driver for this library alone; with an NVIDIA GPU install its driver's Vulkan library "
        "(libnvidia-gl)."
    )


def use_assets(assets_root: Path) -> None:
    """
    Tell RoboTwin where its assets are; it reads that from the environment when it loads one. Not
    ``$ROBOTWIN_ASSETS_ROOT``, which is the user's: the next env would take it for theirs.

    :param assets_root: see :func:`find_assets`
    """
    os.environ["ASSETS_PATH"] = str(assets_root)


# -------------------------------------------------------------------------------------------------------- side effects


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """RoboTwin, and what it imports, print to stdout and stderr."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


class RandomState:
    """
    The global random state that RoboTwin seeds and draws from, kept apart from everybody else's.

    ``with state:`` puts RoboTwin's in place, and restores the other one at the end. RoboTwin's scenes are made without
    CUDA: its generators are left out, and ``torch.manual_seed``, which would seed them too, seeds the CPU's alone.
    """

    def __init__(self) -> None:
        self._ours: tuple[Any, ...] | None = None
        self._theirs: tuple[Any, ...] = ()
        self._manual_seed: Any = None

    @staticmethod
    def _get() -> tuple[Any, ...]:
        import torch

        return np.random.get_state(), random.getstate(), torch.get_rng_state()

    @staticmethod
    def _set(state: tuple[Any, ...]) -> None:
        import torch

        np.random.set_state(state[0])
        random.setstate(state[1])
        torch.set_rng_state(state[2])

    def seed(self, seed: int) -> None:
        """
        :param seed: seed of the generators that RoboTwin does not seed itself
        """
        random.seed(seed)

    def __enter__(self) -> RandomState:
        import torch

        self._theirs = self._get()
        if self._ours is not None:
            self._set(self._ours)
        self._manual_seed, torch.manual_seed = torch.manual_seed, torch.default_generator.manual_seed
        return self

    def __exit__(self, *exception: Any) -> None:
        import torch

        torch.manual_seed = self._manual_seed
        self._ours = self._get()
        self._set(self._theirs)
