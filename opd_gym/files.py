"""Files that are never half written, and the folder of what is computed once."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import socket
import stat
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# Machine, process and a random number; in earlier versions the number alone
_TEMPORARY = re.compile(r"\.tmp-(?:([0-9a-f]{12})-(\d+)-)?[0-9a-f]{32}(?:\..*)?")
# What another machine has not written to for so long is left over
_STALE_SECONDS = 24 * 3600.0


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """
    Write a file in one step: readers see the old file or the new one, never a part; except on Windows also after
    a power cut.

    ``with replacing(path) as temporary`` gives a path of the same suffix in the same folder. What is written there
    takes the place of ``path`` at the end of the block, and is removed if the block raises.

    :param path: file to replace; its folder is created
    :return: context manager that gives the path to write to
    :raises OSError: it is a device, a pipe or a folder
    """
    path = Path(path)
    _check_replaceable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        if error.errno and error.filename is None:  # a full disk, for instance
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _check_replaceable(path: Path) -> None:
    """Refuse what is there and is no file: root may put one in the place of /dev/null, for the whole machine."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} cannot be written: it is a folder. Name a file.")
    # /dev/stdout is a link to what another file may be open as
    if (path.exists() and not path.is_file()) or (path.is_symlink() and os.readlink(path).startswith("/proc/")):
        raise OSError(f"{path} cannot be written: it is a device or a pipe. Name a file.")


def check_writable(path: str | os.PathLike[str], is_folder: bool = False) -> None:
    """
    Find out whether something can be written before the work is done that it is to hold. Nothing is left behind.

    :param path: a file, or a folder for files; neither it nor the folders above it need to be there
    :param is_folder: whether it is a folder
    :raises OSError: it cannot be written; says why
    """
    path = Path(path).expanduser().absolute()
    if not is_folder:
        _check_replaceable(path)
    folder = next(parent for parent in (path, *path.parents)[not is_folder :] if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror}: {folder}") from error


def temporary_beside(path: Path) -> Path:
    """
    A name for a file or folder that will take the place of another one. What killed processes have left in that folder
    under such names is removed.

    :param path: what is to be replaced
    :return: a path of the same suffix in the same folder, at which there is nothing
    """
    with suppress(OSError):
        for other in path.parent.iterdir():
            name = _TEMPORARY.fullmatch(other.name)
            if name and _is_stale(other, name[1], name[2]):
                if other.is_dir():
                    shutil.rmtree(other, ignore_errors=True)
                else:
                    other.unlink(missing_ok=True)
    # Hidden, so that readers of the folder pass over it; there, because os.replace must not cross file systems
    return path.with_name(f".tmp-{_machine()}-{os.getpid()}-{uuid.uuid4().hex}{path.suffix}")


@functools.cache
def _machine() -> str:
    """Where a number of a process means one process: a machine since it was started, or a container on it."""
    where = [socket.gethostname()]
    with suppress(OSError):  # only Linux has these
        where += [Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii"), os.readlink("/proc/self/ns/pid")]
    return hashlib.sha256(" ".join(where).encode()).hexdigest()[:12]


def _is_stale(path: Path, machine: str | None, pid: str | None) -> bool:
    if machine != _machine() or pid is None or os.name != "posix":  # os.kill() of Windows would end the process
        with suppress(FileNotFoundError):
            return time.time() - path.stat().st_mtime > _STALE_SECONDS
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except OSError:  # somebody else's
        pass
    return False


def sync(path: Path) -> None:
    """
    Wait until a file, or the names of the files in a folder, are on the disk.

    :param path: the file or folder
    """
    if os.name != "posix":
        return  # Windows cannot open a folder, nor sync a file that is open for reading
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: str | os.PathLike[str], text: str) -> None:
    """
    Write a text file in one step, see :func:`replacing`.

    :param path: file to write
    :param text: content
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def visible_files(folder: Path) -> list[Path]:
    """
    Files below a folder, also behind links, but none that is hidden or in a hidden folder.

    :param folder: where to look
    :return: its files, sorted; none if it is no folder
    :raises OSError: a folder in it cannot be read
    """

    def refuse(error: OSError) -> None:
        raise error

    found = []
    if folder.is_dir():
        for root, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
            here = Path(root)
            above = {os.path.realpath(path) for path in (here, *here.parents)}
            folders[:] = [n for n in folders if n[0] != "." and os.path.realpath(here / n) not in above]
            found += [here / name for name in names if name[0] != "." and (here / name).is_file()]
    return sorted(found)


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


def code_dir(name: str) -> Path:
    """
    Folder of the cache for compiled code. Who can write there decides what runs here, so it is the user's alone.

    :param name: name of the folder
    :return: the folder, created
    :raises PermissionError: others can write to it, to what is in it, or to the cache folder
    """
    root = cache_dir()
    folder = root / name
    folder.mkdir(mode=0o700, exist_ok=True)
    if os.name == "posix":
        for path in (root, folder, *folder.rglob("*")):
            try:
                others = _written_by_others(path.stat())
            except FileNotFoundError:  # another process compiles, and has put it into its place
                continue
            if others:
                raise PermissionError(
                    f"{path} can be written by other users, and code that is compiled is run from {folder}. Run "
                    f"`chmod -R go-w {root}` if you trust what is in it, remove {folder} if you do not, or set "
                    "OPD_GYM_CACHE to a folder of your own."
                )
    return folder


def _written_by_others(status: os.stat_result) -> bool:
    import grp
    import pwd

    if status.st_uid not in (0, os.getuid()) or status.st_mode & stat.S_IWOTH:
        return True
    if not status.st_mode & stat.S_IWGRP:
        return False
    try:  # a group of the user alone, as many systems make it
        user, group = pwd.getpwuid(os.getuid()), grp.getgrgid(status.st_gid)
    except KeyError:
        return True
    return group.gr_name != user.pw_name or not set(group.gr_mem) <= {user.pw_name}
