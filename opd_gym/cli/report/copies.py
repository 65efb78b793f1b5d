"""What a report takes from its folders besides numbers: films, and copies of what it is made from."""

from __future__ import annotations

import base64
import os
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from opd_gym.cli.report.reading import means_to_be_evaluation, run_dirs, shown
from opd_gym.cli.runs import PROGRESS
from opd_gym.evaluation import EVALUATION_FILE
from opd_gym.files import replacing, visible_files
from opd_gym.versions import VERSIONS_FILE

# What a report is made from, of all that a run's folder holds
KEPT = ("args.yml", "config.yml", "command.txt", VERSIONS_FILE, EVALUATION_FILE)
FILMS = {".mp4": "video/mp4", ".gif": "image/gif"}


def films(folders: Iterable[Path]) -> list[dict[str, str]]:
    """
    :param folders: where to look
    :return: where each lies, its media type and its content as a ``data:`` address; of a film in two formats one
    """
    order = list(FILMS)
    chosen: dict[Path, tuple[str, Path]] = {}
    for folder in folders:
        found = _films_in(visible_files(folder))
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


def _films_in(files: Iterable[Path]) -> list[Path]:
    """Films, but for those of a data set of LeRobot's, which are what was trained on."""
    found = [path for path in files if path.suffix in FILMS]
    data_sets = {above for path in found for above in path.parents if (above / "meta" / "info.json").is_file()}
    return [path for path in found if not data_sets & set(path.parents)]


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
        files = [folder] if folder.is_file() else visible_files(folder)
        shown_films = set(_films_in(files))
        for path in files:
            inside = Path(path.name) if path == folder else path.relative_to(folder)
            # A folder may lie in another one that is given
            if (path in shown_films or _is_read(path, runs)) and path.resolve() not in found.values():
                if target / inside in found:
                    raise ValueError(
                        f"--keep: {found[target / inside]} and {path} would both be {target / inside}. Report the "
                        "folder above them, or rename one."
                    )
                found[target / inside] = path.resolve()
    return found


def _is_read(path: Path, runs: Sequence[Path]) -> bool:
    """Whether a report is made from it: of a run not what lies in its folders, such as weights."""
    run = next((run for run in runs if path.is_relative_to(run)), None)
    if run is not None:
        return path.parent == run and (path.name in KEPT or PROGRESS.fullmatch(path.name) is not None)
    return path.suffix == ".json" and means_to_be_evaluation(path)


def keep(files: Mapping[Path, Path], target: Path) -> None:
    """
    Copy what a report is made from. In copies of what was run, paths below the current folder begin there: nobody's
    home folder is published. Parts of a table that an earlier copy of a run had are removed, because they would count
    as its own; what else is left of earlier copies is named.

    :param files: see :func:`copies`
    :param target: folder that they are copied to
    """
    # Not from the root, where every path begins so
    here = b"" if Path.cwd() == Path(Path.cwd().anchor) else os.fsencode(f"{Path.cwd()}{os.sep}")
    for place, path in files.items():
        with replacing(place) as temporary:
            if path.suffix in (".yml", ".txt"):
                content = path.read_bytes()
                temporary.write_bytes(content.replace(here, b"") if here else content)
            else:
                shutil.copyfile(path, temporary)
    copied = {place.parent for place in files if place.name == "args.yml"}
    runs, left = run_dirs(target), []
    for path in visible_files(target):
        if path not in files and (path.suffix in FILMS or _is_read(path, runs)):
            if path.parent in copied and PROGRESS.fullmatch(path.name):
                path.unlink()
            else:
                left.append(shown(path, target))
    if left:
        print(f"In {target}, of an earlier --keep and not in this report: {', '.join(left)}.", file=sys.stderr)
