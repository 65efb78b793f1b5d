"""
A process that looks at HDF5 files before anyone else does: what damage does to libhdf5, it does to this process.

libhdf5 loops for ever over some damaged files, and reads outside of its memory in others. Started as a script, so that
it imports no more than h5py, with the folders to import from as arguments. It says when it is ready, reads lines on
stdin, each a number of seconds and the path of a file as JSON, and answers each with a line, or ends.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from typing import Any

if __name__ == "__main__":
    # Where the caller imports from, and not the folder of this script, whose files h5py might take for others
    sys.path[:] = sys.argv[1:]

import h5py  # noqa: E402


def look(path: str) -> None:
    """
    Touch what the loader may touch: every group, every attribute, and where the parts of every data set lie. What
    raises an error is passed over: the loader will say it, if it needs it at all. Links to elsewhere are not followed.

    :param path: the file
    """
    seen = set()

    def visit(item: Any) -> None:
        info = h5py.h5o.get_info(item.id)
        if (info.fileno, info.addr) in seen:
            return
        seen.add((info.fileno, info.addr))
        for name in item.attrs:
            attempt(item.attrs.get, name)
        if isinstance(item, h5py.Dataset):
            if not item.is_virtual and not item.external:
                attempt(item.id.get_num_chunks if item.chunks else item.id.get_storage_size)
        elif isinstance(item, h5py.Group):
            for name in item:
                if item.id.links.get_info(name.encode("utf-8", "surrogateescape")).type == h5py.h5l.TYPE_HARD:
                    attempt(lambda name=name: visit(item[name]))

    with h5py.File(path, "r") as file:
        visit(file)


def attempt(function: Any, *args: Any) -> None:
    """
    :param function: is called
    :param args: with these; what it raises does not matter
    """
    with contextlib.suppress(Exception):
        function(*args)


if __name__ == "__main__":
    print("ready", flush=True)
    for line in sys.stdin:
        seconds, file_path = json.loads(line)
        # Its default is to end the process, also out of a loop in C
        signal.alarm(seconds)
        attempt(look, file_path)
        signal.alarm(0)
        print("done", flush=True)
