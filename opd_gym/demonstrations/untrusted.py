"""HDF5 files that others have written: nothing is taken from them without a look at it."""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from math import prod
from pathlib import Path
from typing import Any

import h5py
import numpy as np

# Seconds for the table of contents of a file, and all attributes
READ_TIMEOUT = 60


def check_finite(name: str, values: np.ndarray) -> None:
    """
    :param name: name of the array, for the error
    :param values: array of any shape and type
    :raises ValueError: a number is NaN or infinite
    """
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        index = tuple(np.argwhere(~np.isfinite(values))[0].tolist())
        raise ValueError(f"{name} has {values[index]} at {index}, expected finite numbers.")


@contextmanager
def reading(name: str) -> Iterator[None]:
    """
    Whatever h5py raises in the block is a ValueError that names what was being read.

    :param name: what is read
    :return: context manager
    """
    try:
        yield
    except Exception as error:  # which type it is depends on what a damaged file has lost
        raise ValueError(f"{name} cannot be read: {error}") from error


class _Probe:
    """The process of :mod:`opd_gym.demonstrations.probe`. It ends with this one, whose end of the pipe closes."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("probe.py")
        self._owner = os.getpid()
        self._process = subprocess.Popen(
            [sys.executable, str(script), *sys.path],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            start_new_session=True,  # Ctrl-C is for the learner
        )  # fmt: skip
        assert self._process.stdout is not None
        if not self._process.stdout.readline():
            raise RuntimeError(
                f"No process could be started that reads HDF5 files: {sys.executable} ended with status "
                f"{self._process.wait()}. Does `import h5py` work there?"
            )

    def look(self, path: Path) -> int | None:
        """
        :param path: a file
        :return: None if nothing happened to the process; otherwise its exit status
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps([READ_TIMEOUT, str(path.absolute())]) + "\n")
            self._process.stdin.flush()
        if self._process.stdout.readline():
            return None
        return self._process.wait()

    def is_ready(self) -> bool:
        """
        :return: whether it still runs, and is not that of the process from which this one was forked
        """
        return self._owner == os.getpid() and self._process.poll() is None

    def close(self) -> None:
        """The process ends."""
        if self._owner == os.getpid():
            self._process.kill()
            self._process.communicate()


_probe: _Probe | None = None
_probe_lock = threading.Lock()


def _look_first(path: Path) -> None:
    """
    :param path: an HDF5 file
    :raises ValueError: libhdf5 does not survive it, or loops
    """
    global _probe
    with _probe_lock:
        if _probe is None or not _probe.is_ready():
            _probe = _Probe()
            atexit.register(_probe.close)
        status = _probe.look(path)
        if status is None:
            return
        atexit.unregister(_probe.close)
        _probe.close()
        _probe = None
    if status == -signal.SIGALRM:
        raise ValueError(
            f"{path} is not read in {READ_TIMEOUT} s. It is damaged, or its disk is very slow: then copy it to another."
        )
    raise ValueError(f"{path} is damaged: the process that read it ended with status {status}.")


@contextmanager
def opened(path: Path) -> Iterator[h5py.Group]:
    """
    Open a file of demonstrations. Whatever goes wrong in the block is a ValueError that names the file.

    :param path: the file
    :return: context manager that returns the group ``data``
    :raises FileNotFoundError: there is no such file
    """
    if not path.is_file():
        raise FileNotFoundError(f"Demonstration file {path} does not exist.")
    _look_first(path)
    try:
        with h5py.File(path, "r") as file:
            data = member(file, "data")
            if isinstance(data, h5py.Group):
                yield data
                return
    except Exception as error:
        raise ValueError(f"{path}: {error}") from error
    raise ValueError(f"{path} has no group `data`: it is not a LIBERO demonstration file.")


def member(group: h5py.Group, key: str) -> h5py.Group | h5py.Dataset | None:
    """
    :param group: where to look
    :param key: name of a group or data set in it
    :return: what lies there, None if nothing does
    :raises ValueError: a link, or data kept outside of the file. A stranger's file must not make us read our user's.
    """
    name = key.encode("utf-8", "surrogateescape")
    with reading(f"{group.name}/{key}"):
        if not group.id.links.exists(name):
            return None
        item = group[key] if group.id.links.get_info(name).type == h5py.h5l.TYPE_HARD else None
        elsewhere = item is None or (isinstance(item, h5py.Dataset) and (item.is_virtual or item.external))
    if elsewhere:
        raise ValueError(f"{group.name}/{key} only refers to data elsewhere. Copy the data itself into the file.")
    return item


def array(group: h5py.Group, *keys: str, rows: int | None = None, ndim: int | None = None) -> np.ndarray | None:
    """
    :param group: where to look
    :param keys: names of the data set; the first that exists is read
    :param rows: number of rows it must have; by default any but 0
    :param ndim: number of dimensions it must have; by default any
    :return: finite numbers; None if no such data set exists
    :raises ValueError: anything else
    """
    dataset = next((found for key in keys if (found := member(group, key)) is not None), None)
    if dataset is None:
        return None
    with reading(dataset.name):
        is_numbers = isinstance(dataset, h5py.Dataset) and dataset.dtype.kind in "biuf"
    if not is_numbers:
        raise ValueError(f"{dataset.name} is {dataset}, expected numbers. Encoded pictures must be decoded first.")
    shape = dataset.shape or ()
    if not shape or 0 in shape or shape[0] != (rows or shape[0]) or len(shape) != (ndim or len(shape)):
        dimensions = f" and {ndim} dimensions" if ndim else ""
        raise ValueError(
            f"{dataset.name} has shape {shape}, expected {rows or 'some'} rows, as many as actions{dimensions}."
        )
    # HDF5 reads zeros where nothing was written.
    n_chunks = prod(-(-n // size) for n, size in zip(shape, dataset.chunks or shape, strict=True))
    with reading(dataset.name):
        written = dataset.id.get_num_chunks() if dataset.chunks else int(dataset.id.get_storage_size() > 0)
    if written < n_chunks:
        raise ValueError(f"{dataset.name} is incomplete: {written} of its {n_chunks} parts were written.")
    with reading(dataset.name):
        values = dataset[()]
    check_finite(dataset.name, values)
    return values


def attribute(holder: h5py.Group, name: str, kind: type = str) -> Any:
    """
    :param holder: group with attributes
    :param name: name of the attribute
    :param kind: type it must have; text may be stored as bytes, and any value as an array of one
    :return: its value; None if it is missing or empty
    :raises ValueError: it has another type
    """
    with reading(f"Attribute {name} of {holder.name}"):
        value = holder.attrs.get(name)
        if isinstance(value, (np.ndarray, np.generic)) and value.size == 1:
            value = value.item()
        if isinstance(value, bytes):
            value = value.decode("utf-8")
    if value is None or isinstance(value, h5py.Empty):
        return None
    if not isinstance(value, kind):
        raise ValueError(f"Attribute {name} of {holder.name} is {value!r}, expected {kind.__name__}.")
    return value


def json_attribute(holder: h5py.Group, name: str) -> dict[str, Any]:
    """
    :param holder: group with attributes
    :param name: name of an attribute that holds a JSON object
    :return: the object; empty if the attribute is missing
    :raises ValueError: it holds anything else
    """
    text = attribute(holder, name)
    try:
        value = {} if text is None else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"Attribute {name} of {holder.name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"Attribute {name} of {holder.name} is {value!r}, expected a JSON object.")
    return value
