"""``opd-gym doctor``: what is installed, what is wrong and how to mend it, and whether LIBERO is as published."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from opd_gym.cli.options import Doctor
from opd_gym.envs.libero import runtime
from opd_gym.envs.robotwin import install
from opd_gym.envs.robotwin import runtime as robotwin
from opd_gym.envs.robotwin.remote import LOAD_LIBRARY
from opd_gym.version import PACKAGE_FILE
from opd_gym.versions import libero_package, versions

# Seconds until a check that may hang is given up; the first self-check ever compiles its scenes
GPU_SECONDS, GL_SECONDS, ROBOTWIN_SECONDS, SELF_CHECK_SECONDS = 60.0, 60.0, 120.0, 300.0
MIN_DISK = 1.0  # GB
ROBOSUITE = "1.4"
_WIDTH = 34

OK, WRONG, DIFFERS, NONE = "ok", "wrong", "differs", "-"


@dataclass(frozen=True)
class Check:
    """
    What came of one check.

    :param name: what was looked at
    :param status: ``"ok"``; ``"wrong"``; ``"differs"`` from LIBERO as published; ``"-"``: not there, and not needed
    :param found: what there is
    :param mend: command or advice for what is wrong or not there
    """

    name: str
    status: str
    found: str
    mend: str = ""

    def __str__(self) -> str:
        line = f"{self.status:<8} {self.name:<{_WIDTH}} {self.found}"
        return line if not self.mend else f"{line}\n{'':<{_WIDTH + 9}} -> {self.mend}"


def checks(self_check: bool = True) -> Iterator[Check]:
    """
    :param self_check: also play the scenes that tell the versions of LIBERO apart
    :return: what is there, one after the other
    """
    yield _python()
    yield _pytorch()
    yield _gpu()
    yield from _machine()
    cache = _cache()
    yield cache
    package = [_package("MuJoCo", runtime.mujoco_version()), _package("robosuite", versions().get("robosuite"))]
    package += [_libero(), _libero_config()]
    yield from package
    needed = [check for check in (cache, *package) if check.status == WRONG]
    can_render = _gl() if find_spec("mujoco") is not None else None
    if can_render is not None:
        yield can_render
        needed += [can_render] if can_render.status == WRONG else []
    yield from _robotwin(cache)
    if self_check and needed:
        yield Check("self-check", NONE, f"not run: {', '.join(check.name for check in needed)} first")
    elif self_check:
        yield from _self_check()


# ------------------------------------------------------------------------------------------------- what is installed


def _python() -> Check:
    found = f"{sys.version.split()[0]}, {sys.executable}"
    if not (3, 10) <= sys.version_info[:2] <= (3, 13):
        return Check("Python", WRONG, found, "make an environment with Python 3.10 to 3.13")
    return Check("Python", OK, found)


def _pytorch() -> Check:
    import torch

    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "built for CPUs"
    return Check("PyTorch", OK, f"{torch.__version__}, {built}")


def _gpu() -> Check:
    import torch

    code = """
import torch
if torch.cuda.is_available():
    about = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    print("; ".join(f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GB" for gpu in about))
"""
    lines, failure = _ask(code, GPU_SECONDS)
    if failure is not None:
        return Check("GPU", NONE, f"PyTorch cannot look for one: {failure}", "nvidia-smi")
    if lines:
        return Check("GPU", OK, lines[-1])
    if not robotwin.nvidia_driver():
        return Check("GPU", NONE, "none: PyTorch computes on the CPU")
    plain = torch.__version__.partition("+")[0]
    mend = "nvidia-smi" if torch.version.cuda else f"pip install --force-reinstall torch=={plain}"
    return Check("GPU", NONE, "there is an NVIDIA driver, but this PyTorch finds no GPU", mend)


def _machine() -> Iterator[Check]:
    from opd_gym.cli.quickstart import LEARNER_MEMORY, WORKER_MEMORY, available_memory

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Check("cores", OK, str(cores))
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    free, least = available_memory(), LEARNER_MEMORY + WORKER_MEMORY
    found = f"{total:.1f} GB" + ("" if free is None else f", {free:.1f} GB free")
    if free is not None and free < least:
        yield Check("memory", WRONG, found, f"free some: a learner with one simulator takes {least:.1f} GB")
    else:
        yield Check("memory", OK, found)


def _cache() -> Check:
    another = "export OPD_GYM_CACHE=FOLDER, one that can be written"
    try:
        folder = runtime.cache_dir()
        with tempfile.TemporaryFile(dir=folder):
            pass
        free = shutil.disk_usage(folder).free / 1e9
    except OSError as error:
        return Check("cache", WRONG, str(error), another)
    found = f"{folder}, {free:.1f} GB free on its disk"
    return (
        Check("cache", OK, found) if free >= MIN_DISK else Check("cache", WRONG, found, f"{another}, on a larger disk")
    )


def _package(name: str, version: str | None) -> Check:
    if version is None:
        return Check(name, WRONG, "not installed", runtime.INSTALL_HINT)
    if name == "MuJoCo" and runtime.mujoco_changes(version):
        changes = "; ".join(runtime.mujoco_changes(version))
        return Check(name, DIFFERS, f"{version}, not LIBERO as published: {changes}", runtime.MUJOCO_HINT)
    if name == "robosuite" and not version.startswith(f"{ROBOSUITE}."):
        return Check(name, WRONG, f"{version}, LIBERO needs {ROBOSUITE}", f"pip install robosuite=={ROBOSUITE}.0")
    return Check(name, OK, version)


def _libero() -> Check:
    root = runtime.libero_root()
    if root is None:
        return Check("LIBERO", WRONG, "not installed", runtime.INSTALL_HINT)
    return Check("LIBERO", OK, f"{libero_package()}, {root}")


def _libero_config() -> Check:
    name = "LIBERO's configuration"
    try:
        runtime.configured_folders()
    except (OSError, ValueError) as error:
        return Check(name, WRONG, str(error), runtime.config_mend())
    file = runtime.config_file()
    return Check(name, OK, str(file) if file.is_file() else "none: LIBERO's own folders")


# ---------------------------------------------------------------------------------------------------------- rendering


def _gl() -> Check:
    code = """
import contextlib
with contextlib.suppress(ModuleNotFoundError):
    import cv2  # robosuite imports it, and it wants libGL
from opd_gym.envs.libero.runtime import gl_context_class
context = gl_context_class()(64, 64)
context.make_current()
from OpenGL import GL
print(GL.glGetString(GL.GL_RENDERER).decode(), flush=True)
"""
    lines, failure = _ask(code, GL_SECONDS)
    how = f"MUJOCO_GL={os.environ.get('MUJOCO_GL', '')}"
    if failure is not None or not lines:
        mend = runtime.gl_mend(failure or "")
        return Check("OpenGL", WRONG, f"MuJoCo cannot render ({how}): {failure or 'no renderer'}", mend)
    found = f"{lines[-1]} ({how})"
    if "llvmpipe" in found and robotwin.nvidia_driver():
        return Check("OpenGL", OK, f"{found}: on the CPU, not on the GPU", "install libnvidia-gl of the GPU's driver")
    return Check("OpenGL", OK, found)


def _vulkan() -> Check:
    if robotwin.has_gpu():
        return Check("Vulkan", OK, "the NVIDIA GPU's driver")
    chosen = [f"{name}={os.environ[name]}" for name in robotwin.DRIVER_VARIABLES if name in os.environ]
    if chosen:
        return Check("Vulkan", OK, " ".join(chosen))
    if robotwin.driver_file().is_file():
        return Check("Vulkan", OK, f"this library's software driver, {robotwin.driver_file()}")
    described = sorted(path.stem for folder in robotwin.DRIVER_FOLDERS for path in Path(folder).glob("*.json"))
    if described:
        return Check("Vulkan", OK, f"the system's drivers: {', '.join(described)}")
    return Check("Vulkan", NONE, "no driver (RoboTwin needs one)", robotwin.INSTALL_HINT)


def _robotwin(cache: Check) -> Iterator[Check]:
    if cache.status == WRONG:  # everything of RoboTwin's lies there
        return
    yield _vulkan()
    missing = robotwin.missing_modules()
    if missing:
        yield Check("RoboTwin", NONE, f"not installed: {', '.join(missing)}", robotwin.INSTALL_HINT)
        return
    said: list[str] = []
    try:
        install.check(said.append, timeout=ROBOTWIN_SECONDS)
        yield Check("RoboTwin", OK, said[-1])
    except install.InstallError as error:
        chosen = any(name in os.environ for name in robotwin.DRIVER_VARIABLES)
        yield Check("RoboTwin", NONE, str(error), robotwin.UNSET_HINT if chosen else f"{robotwin.INSTALL_HINT} --force")
    try:
        assets = robotwin.find_assets()
        kind = "stand-in, " if robotwin.is_stand_in(assets) else ""
        yield Check("RoboTwin's assets", OK, f"{kind}{assets}")
    except FileNotFoundError:
        yield Check("RoboTwin's assets", NONE, "none", f"{robotwin.DOWNLOAD_HINT}   or   {robotwin.STAND_IN_HINT}")


def _ask(code: str, timeout: float) -> tuple[list[str], str | None]:
    """
    Run Python code in a process of its own, which may hang or crash.

    :return: the lines that it printed; what went wrong, None if nothing did
    """
    # MuJoCo leaves its log in the working directory
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-W", "ignore", "-c", LOAD_LIBRARY + code, str(PACKAGE_FILE)],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=timeout,
                cwd=folder,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(os.path.abspath(entry) for entry in sys.path if entry),
                },
            )
        except subprocess.TimeoutExpired as error:
            return _lines(error.stdout), f"no answer within {timeout:.0f} s"
    if done.returncode < 0:
        return _lines(done.stdout), f"it crashes ({signal.Signals(-done.returncode).name})"
    if done.returncode > 0:
        return _lines(done.stdout), next(reversed(_lines(done.stderr)), f"exit status {done.returncode}")
    return _lines(done.stdout), None


def _lines(output: bytes | None) -> list[str]:
    return [line for line in (output or b"").decode(errors="replace").splitlines() if line.strip()]


# --------------------------------------------------------------------------------------------------------- self-check


@dataclass(frozen=True)
class Scene:
    """
    A scene of LIBERO that newer versions of MuJoCo change.

    :param name: for the user
    :param suite: LIBERO's name of the suite
    :param task_id: task; its first official initial state is played
    :param published: what is measured in it with the versions of published results
    :param tolerance: largest difference, in any of the numbers, that counts as the same
    :param digits: to show
    :param unit: of the numbers
    :param measure: simulator and agentview picture -> numbers
    """

    name: str
    suite: str
    task_id: int
    published: tuple[float, ...]
    tolerance: float
    digits: int
    unit: str
    measure: Callable[[Any, np.ndarray], tuple[float, ...]]

    def compare(self, measured: tuple[float, ...]) -> Check:
        """
        :param measured: what is measured here
        :return: whether it is as published
        """
        here, there = (
            ", ".join(f"{value:.{self.digits}f}" for value in values) for values in (measured, self.published)
        )
        found = f"{here} {self.unit} (published: {there})"
        if all(abs(a - b) <= self.tolerance for a, b in zip(measured, self.published, strict=True)):
            return Check(self.name, OK, found)
        return Check(self.name, DIFFERS, found, _reinstall())


def _reinstall() -> str:
    return runtime.MUJOCO_HINT if runtime.mujoco_changes(runtime.mujoco_version()) else runtime.INSTALL_HINT


def _bowl(simulator: Any, picture: np.ndarray) -> tuple[float, ...]:
    names = ("akita_black_bowl_1_main", "glazed_rim_porcelain_ramekin_1_main")
    bowl, ramekin = (simulator.data.body(name).xpos[:2] for name in names)
    return (1000 * float(np.linalg.norm(bowl - ramekin)),)


def _bottle(simulator: Any, picture: np.ndarray) -> tuple[float, ...]:
    return (float(simulator.data.body("ketchup_1_main").xpos[2]),)


def _colour(simulator: Any, picture: np.ndarray) -> tuple[float, ...]:
    red, green, blue = picture.mean(axis=(0, 1)).tolist()
    return red, green, blue


# Measured with stock LIBERO; see docs/libero_versions.md. The darker floor takes 33 off the colours.
SCENES = (
    Scene("bowl, libero_spatial task 5", "libero_spatial", 5, (14.5,), 5.0, 1, "mm from the ramekin", _bowl),
    Scene("bottle, libero_10 task 0", "libero_10", 0, (0.509,), 0.02, 3, "m high", _bottle),
    Scene("colour, libero_object task 0", "libero_object", 0, (145.0, 139.0, 133.0), 6.0, 0, "mean R, G, B", _colour),
)


def measure_scenes() -> None:
    """Print what is measured in each scene as a line of JSON, as soon as it is known; for a process of its own."""
    from opd_gym.envs.libero import LiberoEnv

    for number, scene in enumerate(SCENES):
        cameras = ("agentview",) if scene.measure is _colour else ()
        env = LiberoEnv(scene.suite, task_ids=[scene.task_id], image_size=128, cameras=cameras)
        try:
            obs, _ = env.reset(seed=0, options={"init_state_id": 0})
            picture = obs["agentview"] if cameras else np.zeros((1, 1, 3))
            line: dict[str, Any] = {"scene": number, "measured": scene.measure(env.simulator, picture)}
        except Exception as error:  # whatever another version of LIBERO, robosuite or MuJoCo comes up with
            line = {"scene": number, "error": f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"}
        finally:
            env.close()
        print(json.dumps(line), flush=True)


def _self_check() -> Iterator[Check]:
    lines, failure = _ask("from opd_gym.cli.doctor import measure_scenes; measure_scenes()", SELF_CHECK_SECONDS)
    told = {line["scene"]: line for line in (json.loads(line) for line in lines if line.startswith('{"scene"'))}
    for number, scene in enumerate(SCENES):
        line = told.get(number, {"error": failure or "no answer"})
        if "error" in line:
            yield Check(scene.name, WRONG, line["error"], _reinstall())
        else:
            yield scene.compare(tuple(line["measured"]))


# ------------------------------------------------------------------------------------------------------- command line


def run(args: Doctor) -> int:
    """
    :param args: what to check
    :return: 0 if everything that is needed works, else 1
    """
    found = []
    for check in checks(args.self_check):
        found.append(check)
        if not args.json:
            print(check, flush=True)
    bad = [check for check in found if check.status in (WRONG, DIFFERS)]
    if args.json:
        content = {"works": not bad, "versions": versions(), "checks": [asdict(check) for check in found]}
        print(json.dumps(content, indent=1))
    elif bad:
        print(f"\n{len(bad)} of {len(found)} need attention: {'; '.join(check.name for check in bad)}")
    else:
        print("\nEverything that is needed works.")
    return 1 if bad else 0
