"""
What RoboTwin needs and pip alone cannot bring: its runtime without its pins, a Vulkan driver where there is none, and a
planner that lives with NumPy 1.

Everything goes into folders of this library (:func:`opd_gym.envs.robotwin.runtime.home`). Neither the Python
environment nor the system changes; LIBERO goes on rendering with the system's Mesa.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib.machinery import PathFinder
from pathlib import Path

from opd_gym.envs.robotwin import runtime
from opd_gym.envs.robotwin.remote import LOAD_LIBRARY
from opd_gym.version import PACKAGE_FILE

# Versions that were tested together, by the module that tells whether the package is there already. They are
# installed without their dependencies: the runtime's would replace PyTorch, NumPy and Gymnasium with old versions.
PACKAGES = {
    "robotwin": "rlinf-robotwin-runtime==0.1.3",
    "sapien": "sapien==3.0.3",
    "toppra": "toppra==0.6.10",
    "transforms3d": "transforms3d==0.4.2",
    "trimesh": "trimesh==5.2.0",
    "lxml": "lxml",
    "networkx": "networkx",
    "pyperclip": "pyperclip",
    "requests": "requests",
    "charset_normalizer": "charset-normalizer",
    "urllib3": "urllib3",
    "idna": "idna",
    "certifi": "certifi",
    "cv2": "opencv-python-headless",
    "scipy": "scipy",
    "imageio": "imageio",
    "matplotlib": "matplotlib",
}
PLANNER_PACKAGES = ("numpy<2", "mplib==0.2.1")
MAX_PLANNER_PYTHON = (3, 12)
DRIVER_PACKAGE = "mesa-vulkan-drivers"
# With the software driver of older releases SAPIEN finds no device
MIN_DRIVER = (24, 0)

Say = Callable[[str], None]


class InstallError(RuntimeError):
    """Something could not be installed; the message says what to do, with any "apt-get install" last."""


def _run(command: Sequence[str], what: str, cwd: Path | None = None) -> str:
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise InstallError(f"{what}: {command[0]} is not on this machine.") from error
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines()[-8:]
        raise InstallError(f"{what} failed ({' '.join(command[:4])} ...):\n" + "\n".join(said))
    return done.stdout


def install_packages(force: bool = False, say: Say = print) -> list[str]:
    """
    Install the Python packages that are missing, without their dependencies, into a folder of their own.

    :param force: install them anew
    :param say: told what happens
    :return: what was installed
    :raises InstallError: wrong platform or Python, or pip failed
    """
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        raise InstallError("RoboTwin's simulator (SAPIEN) is available for Linux on x86-64 alone.")
    if not (3, 10) <= sys.version_info[:2] <= (3, 13):
        raise InstallError(f"SAPIEN needs Python 3.10 to 3.13, this is {sys.version.split()[0]}.")
    target = runtime.packages_dir()
    runtime.add_packages()
    importlib.invalidate_caches()
    if force:
        # The present copy does not count, but stays until pip has fetched the new one
        elsewhere = [entry for entry in sys.path if entry != str(target)]
        there = {module for module in PACKAGES if PathFinder.find_spec(module, elsewhere) is not None}
    else:
        there = {module for module in PACKAGES if importlib.util.find_spec(module) is not None}
    wanted = [package for module, package in PACKAGES.items() if module not in there]
    if not wanted:
        say("Python packages: all there.")
        return []
    say(f"Python packages, into {target}: {', '.join(wanted)}")
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, and moved in the end
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".packages-") as folder:
        command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "-q", "--no-deps"]
        # The runtime says Python < 3.12 because of its pins
        command += ["--ignore-requires-python", "--target", folder, *wanted]
        _run(command, "Installing RoboTwin's Python packages (it needs a package index)")
        if force:
            shutil.rmtree(target, ignore_errors=True)
        target.mkdir(exist_ok=True)
        # Modules come last: even after an interruption, one that is found has its libraries
        for path in sorted(Path(folder).iterdir(), key=lambda path: path.name.removesuffix(".py") in PACKAGES):
            destination = target / path.name
            if destination.is_dir():
                shutil.rmtree(destination)
            os.replace(path, destination)
    runtime.add_packages()
    importlib.invalidate_caches()
    return wanted


def _apt_sources() -> list[tuple[str, str]]:
    """Mirrors and code names of the distribution that this machine is set up for."""
    listed = _run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI) $(CODENAME) $(COMPONENT)", "Created-By: Packages"],
        "Asking apt for its sources",
    )
    release = Path("/etc/os-release").read_text(encoding="utf-8")
    match = re.search(r"^VERSION_CODENAME=(\S+)", release, re.MULTILINE)
    codename = match[1] if match else ""
    rows = [line.split() for line in listed.splitlines()]
    found = [(row[0], row[1]) for row in rows if len(row) == 3 and row[1] == codename and row[2] == "main"]
    return list(dict.fromkeys(found))


def _download_driver(folder: Path, say: Say) -> Path:
    """Fetch the driver's package, from this release or from its backports, with an apt of our own."""
    tried = []
    for uri, codename in _apt_sources():
        # The release itself where its driver is new enough; backports bring newer libraries along
        for suite in (f"{codename}-updates", codename, f"{codename}-backports"):
            sources = folder / "sources.list"
            sources.write_text(f"deb {uri} {suite} main\n", encoding="utf-8")
            for name in ("lists/partial", "cache/archives/partial"):
                (folder / name).mkdir(parents=True, exist_ok=True)
            apt = ["apt-get", "-q", "-o", f"Dir::Etc::sourcelist={sources}", "-o", "Dir::Etc::sourceparts=/dev/null"]
            apt += ["-o", f"Dir::State::lists={folder / 'lists'}", "-o", f"Dir::Cache={folder / 'cache'}"]
            apt += ["-o", "APT::Sandbox::User=", "-o", "Dir::State::status=/dev/null"]
            try:
                _run([*apt, "update"], f"Reading {suite}")
                _run([*apt, "download", DRIVER_PACKAGE], f"Downloading {DRIVER_PACKAGE} of {suite}", cwd=folder)
            except InstallError as error:
                tried.append(str(error).splitlines()[0])
                continue
            (package,) = folder.glob(f"{DRIVER_PACKAGE}_*.deb")
            version = _run(["dpkg-deb", "-f", str(package), "Version"], "Reading the driver's version").strip()
            numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
            if numbers >= MIN_DRIVER:
                say(f"Software Vulkan driver: Mesa {version} of {suite}")
                return package
            package.unlink()
            tried.append(f"{suite} has Mesa {version}, too old")
    reasons = "; ".join(tried) or "apt knows no source of this release, which `sudo apt-get update` may change"
    raise InstallError(
        f"No {DRIVER_PACKAGE} of at least version {'.'.join(map(str, MIN_DRIVER))} can be downloaded with apt "
        f"({reasons}). Set VK_ICD_FILENAMES to the description of a Vulkan driver that you have, or use a machine with "
        "an NVIDIA GPU."
    )


def _missing_libraries(library: Path, folder: Path) -> list[str]:
    environment = f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}"
    listed = _run(["env", f"LD_LIBRARY_PATH={environment}", "ldd", str(library)], "Looking for the driver's libraries")
    return re.findall(r"^\s*(\S+) => not found", listed, re.MULTILINE)


def install_driver(force: bool = False, say: Say = print) -> bool:
    """
    Unpack a software Vulkan driver into a folder of its own, unless a GPU has one or a driver has been chosen.

    :param force: do it anew, and with a GPU too
    :param say: told what happens
    :return: whether one was unpacked
    :raises InstallError: it cannot be downloaded, or the system lacks a library that it needs
    """
    target = runtime.driver_file()
    if not force:
        if runtime.has_gpu():
            say("Vulkan driver: that of the NVIDIA GPU.")
            return False
        chosen = [name for name in runtime.DRIVER_VARIABLES if name in os.environ]
        if chosen:
            say(f"Vulkan driver: the one that {chosen[0]} names.")
            return False
        if target.is_file():
            say("Software Vulkan driver: there already.")
            return False
    target.parent.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent.parent, prefix=".vulkan-") as name:
        folder = Path(name)
        package = _download_driver(folder, say)
        unpacked = folder / "driver"
        _run(["dpkg-deb", "-x", str(package), str(unpacked)], "Unpacking the driver")
        (library,) = unpacked.rglob("libvulkan_lvp.so")
        missing = _missing_libraries(library, library.parent)
        if missing:
            depends = _run(["dpkg-deb", "-f", str(package), "Depends"], "Reading what the driver needs")
            names = " ".join(re.findall(r"(?:^|, )([a-z0-9.+-]+)", depends))
            raise InstallError(
                f"The software Vulkan driver needs {', '.join(missing)}. Install its dependencies, which replaces "
                f"nothing: sudo apt-get install {names}"
            )
        (description,) = unpacked.rglob("lvp_icd*.json")
        content = json.loads(description.read_text(encoding="utf-8"))
        content["ICD"]["library_path"] = str(target.parent / library.relative_to(unpacked))
        (unpacked / target.name).write_text(json.dumps(content, indent=1), encoding="utf-8")
        shutil.rmtree(target.parent, ignore_errors=True)
        os.replace(unpacked, target.parent)
    if runtime.has_gpu():
        say(f"The driver of the NVIDIA GPU goes on being used. For this one, set VK_ICD_FILENAMES={target}")
    return True


def install_planner(force: bool = False, say: Say = print) -> Path:
    """
    Make a virtual environment in which RoboTwin's expert can plan: NumPy 1 and mplib, and for everything else the
    packages of this environment and of :func:`install_packages`.

    :param force: make it anew
    :param say: told what happens
    :return: its interpreter
    :raises InstallError: wrong Python, or pip failed
    """
    target = runtime.planner_dir()
    if not force and (target / "bin" / "python").is_file():
        say("Planner: there already.")
        return target / "bin" / "python"
    if sys.version_info[:2] > MAX_PLANNER_PYTHON:
        raise InstallError(
            f"RoboTwin's planner, {PLANNER_PACKAGES[-1]}, was built for Python up to "
            f"{'.'.join(map(str, MAX_PLANNER_PYTHON))}, this is {sys.version.split()[0]}. Install this library for "
            "such a Python and record traces there: they can be replayed with any."
        )
    say(f"Planner, into {target}: {', '.join(PLANNER_PACKAGES)}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".planner-") as name:
        folder = Path(name) / "planner"
        _run([sys.executable, "-m", "venv", str(folder)], "Making a virtual environment")
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check", "-q"]
        _run([*pip, *PLANNER_PACKAGES], "Installing RoboTwin's planner (it needs a package index)")
        (packages,) = folder.glob("lib/python*/site-packages")
        shared = [entry for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]
        shared.append(str(runtime.packages_dir()))
        # Behind its own packages, so that NumPy 1 is found first
        (packages / "zz_shared.pth").write_text("\n".join(dict.fromkeys(shared)) + "\n", encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        os.replace(folder, target)
    return target / "bin" / "python"


def check(say: Say = print, planner: bool = False, timeout: float | None = None) -> None:
    """
    Import RoboTwin and look for a Vulkan device, in a process of its own.

    :param say: told what happens
    :param planner: check the planner too, with its own interpreter
    :param timeout: seconds after which it counts as hanging; None for no limit
    :raises InstallError: it does not work, with the reason
    """
    code = "from opd_gym.envs.robotwin.runtime import import_robotwin as f; print('SAPIEN', f().__version__)\n"
    environment = dict(os.environ)
    python, name = sys.executable, "RoboTwin"
    if planner:
        code += "from opd_gym.envs.robotwin.topp import has_planner; assert has_planner(), 'mplib is not used'\n"
        python, name = str(runtime.planner_dir() / "bin" / "python"), "RoboTwin's planner"
    else:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    try:
        done = subprocess.run(
            [python, "-W", "ignore", "-c", LOAD_LIBRARY + code, str(PACKAGE_FILE)],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired as error:
        raise InstallError(f"{name} does not start: no answer within {timeout:.0f} s") from error
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()
        raise InstallError(f"{name} does not start: {said[-1] if said else f'exit code {done.returncode}'}")
    say(f"{name} starts: {done.stdout.strip()}")
