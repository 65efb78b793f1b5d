"""What a report takes from its folders besides numbers: films, and copies of what it is made from."""

from __future__ import annotations

import base64
import os
import re
import shutil
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from opd_gym.cli.report.reading import EVALUATION, is_evaluation, run_dirs, shown
from opd_gym.files import replacing, visible_files
from opd_gym.versions import VERSIONS_FILE

# What a report is made from, of all that a run's folder holds
KEPT = ("args.yml", "config.yml", "command.txt", VERSIONS_FILE, EVALUATION)
FILMS = {".mp4": "video/mp4", ".gif": "image/gif"}
PROGRESS = re.compile(r"progress(\.\d+(\.until_\d+)?)?\.csv")


def films(folders: Iterable[Path]) -> list[dict[str, str]]:
    """
    :param folders: where to look
    :return: where each lies, its media type and its content as a ``data:`` address; of a film in two formats one
    """
    order = list(FILMS)
    chosen: dict[Path, tuple[str, Path]] = {}
    for folder in folders:
        found = [path for path in visible_files(folder) if path.suffix in FILMS]
        for path in sorted(found, key=lambda path: (path.with_suffix(""), order.index(path.suffix))):
            chosen.setdefault(path.resolve().with_suffix(""), (shown(path.with_suffix(""), folder), path))
    return [
        {
            "name": name,
            "kind": FILMS[path.suffix],
            "data": f"data:{FILMS[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}",
        }
        for name, path in chosen.values()
    ]


def copies(folders: Iterable[Path], target: Path) -> dict[Path, Path]:
    """
    :param folders: what is reported
    :param target: folder to write
    :return: what a report is made from, without weights and checkpoints, by its place there
    :raises ValueError: two of the files would have one place there
    """
    found: dict[Path, Path] = {}
    for folder in folders:
        runs = run_dirs(folder)
        for path in [folder] if folder.is_file() else visible_files(folder):
            if path.name in KEPT and path.parent.parent in runs and path.parent not in runs:
                continue  # the same for rl-zoo3
            inside = Path(path.name) if path == folder else path.relative_to(folder)
            wanted = path.name in KEPT or PROGRESS.fullmatch(path.name) or path.suffix in FILMS
            wanted = wanted or (path.suffix == ".json" and is_evaluation(path))
            weights = any(path.is_relative_to(run / "policy") for run in runs)
            # A folder may lie in another one that is given
            if wanted and not weights and path.resolve() not in found.values():
                if target / inside in found:
                    raise ValueError(
                        f"--keep: {found[target / inside]} and {path} would both be {target / inside}. Report the "
                        "folder above them, or rename one."
                    )
                found[target / inside] = path.resolve()
    return found


def keep(files: Mapping[Path, Path], target: Path) -> None:
    """
    Copy what a report is made from. In copies of what was run, paths below the current folder begin there: nobody's
    home folder is published. Parts of a table that an earlier copy of a run had are removed, because they would count
    as its own; what else is left of earlier copies is named.

    :param files: see :func:`copies`
    :param target: folder that they are copied to
    """
    here = os.fsencode(f"{Path.cwd()}{os.sep}")
    for place, path in files.items():
        with replacing(place) as temporary:
            if path.suffix in (".yml", ".txt"):
                temporary.write_bytes(path.read_bytes().replace(here, b""))
            else:
                shutil.copyfile(path, temporary)
    runs = {place.parent for place in files if place.name == "args.yml"}
    left = []
    for path in visible_files(target):
        if path not in files and PROGRESS.fullmatch(path.name) and path.parent in runs:
            path.unlink()
        elif path not in files and (path.name in KEPT or PROGRESS.fullmatch(path.name)):
            left.append(shown(path, target))
    if left:
        print(f"In {target}, of an earlier --keep and not in this report: {', '.join(left)}.", file=sys.stderr)
