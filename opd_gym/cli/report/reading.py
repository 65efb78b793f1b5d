"""From the files that training and evaluation left to the policies that a report compares."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from opd_gym.cli.report.policies import WINDOW, Policy
from opd_gym.cli.runs import progress_files, read_progress
from opd_gym.cli.train import read_args, read_mapping
from opd_gym.envs.registration import bare_id
from opd_gym.evaluation import EVALUATION_FILE, EvaluationResult, LostEpisode
from opd_gym.files import visible_files

# Runs of one policy may differ in these settings, and in what lies below them. Where they differ in those of NOTED, a
# note says so
NOTED = ("teacher", "demonstrations", "n_envs")
INCIDENTAL = (
    *NOTED,
    *("teacher_kwargs.device", "teacher_kwargs.vec_normalize", "policy_kwargs.checkpoint"),
    *("n_timesteps", "n_workers", "worker_timeout", "ray"),
)

# So many paths, or settings, are named in a line
MOST_SHOWN = 10


@dataclass
class _Found:
    """
    A run, or an evaluation without one.

    :param file: the run's directory, or the file of the evaluation
    :param path: the same below the folder that was given, for labels and notes; as it was given where another one has
        that path too
    :param paths: all that a label may call it: below each of the folders that were given, and as it was given
    :param name: the algorithm, or the stem of the file without its seed
    :param env_id: environment id; empty if nothing says it
    :param seed: of the training
    :param settings: the run's configuration, by dotted keys, without what may differ within a policy
    :param noted: what of that is told where it differs
    :param rows: of ``progress.csv``
    :param result: the held-out evaluation
    :param command: how it was run
    :param notes: what its numbers do not show
    :param total: timesteps that it was to have
    :param seeded: whether ``seed`` is that of a training
    :param window: number of episodes that success in training is averaged over
    """

    file: Path
    path: str
    paths: frozenset[str]
    name: str
    env_id: str
    seed: str
    settings: dict[str, Any] = field(default_factory=dict)
    noted: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, float]] = field(default_factory=list)
    result: EvaluationResult | None = None
    command: str = ""
    notes: list[str] = field(default_factory=list)
    total: float | None = None
    seeded: bool = True
    window: int = WINDOW

    @property
    def done(self) -> float:
        """Timesteps that it has."""
        return self.rows[-1]["time/total_timesteps"] if self.rows else 0.0

    @property
    def unfinished(self) -> bool:
        """Whether its training has not ended."""
        return self.total is not None and self.done < self.total

    @property
    def is_run(self) -> bool:
        """Whether it was trained here; otherwise it is an evaluation alone."""
        return self.file.is_dir()

    def matches(self, pattern: str) -> bool:
        """
        :param pattern: of a label
        :return: whether it is found there; brackets may be a part of the name as well
        """
        plain = pattern.replace("[", "[[]")
        return any(fnmatch(path, pattern) or fnmatch(path, plain) for path in self.paths)


def find_policies(folders: Iterable[Path], labels: Mapping[str, str]) -> list[Policy]:
    """
    Read all runs and evaluations below some folders. Runs of one algorithm and env with the same settings are seeds of
    one policy, named after the algorithm and the settings that most runs have otherwise; where there is no majority,
    after all that differ. Evaluations outside of a run, ``NAME_seed0.json``, are named after their files.

    :param folders: runs, evaluations, or folders that hold some
    :param labels: pattern of a path, below its folder or as it was given -> name of what is there; the first match
        counts
    :return: the policies, in the order of ``labels`` and then of their paths, runs first
    :raises ValueError: there is nothing in a folder, or a file of a run is damaged
    :raises OSError: there is no such folder, or something in it cannot be read
    """
    every = [item for folder in folders for item in _find(Path(folder).expanduser())]
    # A folder may lie in another one that is given, and the evaluation of a run be given by itself. Of what is found
    # twice the run counts, and the path without links
    every.sort(key=lambda item: (not item.is_run, os.path.abspath(item.file) != str(item.file.resolve())))
    of_runs = {item.file.resolve() / EVALUATION_FILE for item in every if item.is_run}
    unique = {(item.file.resolve(), item.env_id): item for item in reversed(every)}
    for item in every:
        unique[item.file.resolve(), item.env_id].paths |= item.paths
    found = [item for item in reversed(unique.values()) if item.file.resolve() not in of_runs]
    places: dict[str, set[Path]] = {}
    for item in found:
        places.setdefault(item.path, set()).add(item.file.resolve())
    for item in found:
        if len(places[item.path]) > 1:
            item.path = f"{item.file.as_posix()}{'/' * item.is_run}"
    _name_envs(found)
    _tell_apart(found)
    settings: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for item in found:
        if item.is_run:
            settings.setdefault((item.name, item.env_id), []).append(item.settings)
    common = {key: _usual(alike) for key, alike in settings.items()}
    policies: dict[tuple[str, str], Policy] = {}
    members: dict[tuple[str, str], list[_Found]] = {}
    unlabelled: dict[tuple[str, str], list[str]] = {}
    order: dict[str, int] = {}
    for item in found:
        label = item.name
        usual = common[item.name, item.env_id] if item.is_run else {}
        told = [key for key in sorted(usual) if usual[key] != [item.settings.get(key)]]
        if told:
            values = (f"{key}={item.settings[key]}" if key in item.settings else f"no {key}" for key in told)
            label += f" ({', '.join(values)})"
        number = len(labels)
        for i, (pattern, text) in enumerate(labels.items()):
            if item.matches(pattern):
                number, label = i, text
                break
        else:
            unlabelled.setdefault((item.env_id, label), []).append(item.path)
        order[label] = min(order.get(label, number), number)
        policy = policies.setdefault((item.env_id, label), Policy(label, item.env_id))
        members.setdefault((item.env_id, label), []).append(item)
        seed = item.seed
        while (item.rows and seed in policy.curves) or (item.result is not None and seed in policy.results):
            seed += "'"  # the same seed once more
        if seed != item.seed:
            policy.notes.append(f"seed {item.seed} is there more than once, in {item.path} too, and counts as another.")
        policy.notes += item.notes
        policy.seeded |= item.seeded
        if item.unfinished:
            policy.unfinished.add(seed)
        if item.rows:
            policy.curves[seed] = item.rows
            policy.windows[seed] = item.window
        if item.result is not None:
            policy.results[seed] = item.result
        if item.command:
            policy.commands.append(item.command)
    for pattern, text in labels.items():
        if not any(item.matches(pattern) for item in found):
            # Of an experiment that is not finished, or a slip
            there = sorted({item.path for item in found})
            more = f" and {len(there) - MOST_SHOWN} more" * (len(there) > MOST_SHOWN)
            print(
                f"--label {pattern}={text}: nothing is found at such a path; there is "
                f"{', '.join(there[:MOST_SHOWN])}{more}.",
                file=sys.stderr,
            )
        elif text not in order:
            print(f"--label {pattern}={text}: what is there has its name from a label before.", file=sys.stderr)
    for key, items in members.items():
        policies[key].notes += [*_differing(items), *_not_evaluated(items)]
    for key in unlabelled.keys() & {(env_id, text) for env_id, _ in policies for text in labels.values()}:
        paths = ", ".join(unlabelled[key])
        policies[key].notes.append(f"without a label this is the name of {paths} too, which counts here.")
    return sorted(policies.values(), key=lambda policy: order[policy.label])


def _differing(items: Sequence[_Found]) -> list[str]:
    """In what else the seeds of a policy differ."""
    runs = [item for item in items if item.is_run]
    found = []
    totals = {item.total for item in runs if item.total is not None and not item.unfinished}
    if len(totals) > 1:
        shown = ", ".join(f"{total:,.0f}" for total in sorted(totals))
        found.append(f"its seeds were trained for different numbers of timesteps: {shown}.")
    algorithms = sorted({item.name for item in runs})
    if len(algorithms) > 1:
        found.append(f"its seeds are of different algorithms: {', '.join(algorithms)}.")
    # A label may stand for runs of different settings. Algorithms have others anyway
    keys = {key for item in runs for key in item.settings} if len(algorithms) == 1 else set()
    every = [{**item.settings, **item.noted} for item in runs]
    told = [
        key for key in (*NOTED, *sorted(keys)) if len({json.dumps(each.get(key), default=str) for each in every}) > 1
    ]
    if told:
        more = f" and {len(told) - MOST_SHOWN} more settings" * (len(told) > MOST_SHOWN)
        found.append(f"its seeds differ in {', '.join(told[:MOST_SHOWN])}{more}.")
    return found


def _not_evaluated(items: Sequence[_Found]) -> list[str]:
    """Finished seeds that are in the curve and not in its success: they may have been the bad ones."""
    if not any(item.result is not None for item in items):
        return []
    return [
        f"seed {item.seed} ({item.path}) has no {EVALUATION_FILE}: its training counts, but not its success and costs."
        for item in items
        if item.rows and item.result is None and not item.unfinished
    ]


def _usual(settings: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """The commonest values of each setting: several where none is commoner than the others."""
    usual: dict[str, list[Any]] = {}
    for key in {key for each in settings for key in each}:
        values = [each.get(key) for each in settings]
        most = max(map(values.count, values))
        top = [value for value in values if values.count(value) == most]
        usual[key] = [value for i, value in enumerate(top) if value not in top[:i]]
    return usual


def run_dirs(folder: Path) -> list[Path]:
    """
    :param folder: where to look
    :return: directories of runs in it
    :raises OSError: a folder in it cannot be read
    """
    found = {path.parent for path in visible_files(folder) if path.name == "args.yml"}
    # In one of them are other args.yml and config.yml, for rl-zoo3
    return sorted(
        path for path in found if path.parent not in found or (path / "command.txt").is_file() or progress_files(path)
    )


def shown(path: Path, folder: Path) -> str:
    """
    :param path: in a folder
    :param folder: that folder
    :return: the path from there, as text that can be written
    """
    return path.relative_to(folder).as_posix().encode("utf-8", "replace").decode("utf-8")


def _find(folder: Path) -> list[_Found]:
    found = []
    runs = run_dirs(folder)
    for run in runs:
        args = read_args(run)
        where = f"{folder.absolute().name if run == folder else shown(run, folder)}/"
        if not (run / "config.yml").is_file():
            # Or it was killed before it began
            if progress_files(run) or (run / EVALUATION_FILE).exists():
                _leave_out(where, "its config.yml is missing")
            continue
        config = _flat(read_mapping(run / "config.yml"))
        command = run / "command.txt"
        paths = frozenset({where, f"{run.as_posix()}/"})
        item = _Found(run, where, paths, args.algo, bare_id(args.env), str(args.seed or 0))
        item.settings = {key: value for key, value in config.items() if not _is_incidental(key)}
        item.noted = {key: value for key, value in config.items() if key in NOTED}
        item.rows = read_progress(run)
        item.command = command.read_text(encoding="utf-8", errors="replace").strip() if command.is_file() else ""
        window = config.get("stats_window_size", WINDOW)
        if isinstance(window, int) and window != WINDOW and item.rows:
            item.window = window
            item.notes.append(
                f"success of seed {item.seed} ({item.path}) in training is of its last {window} episodes."
            )
        total = config.get("n_timesteps")
        item.total = total if isinstance(total, (int, float)) else None
        if item.unfinished:
            item.notes.append(
                f"seed {item.seed} ({item.path}) has {item.done:,.0f} of its {total:,} timesteps: its costs and its "
                "curve end there, and beside finished seeds both are left out; success counts where it was evaluated."
            )
        # `opd-gym eval` may have played other envs as well
        parts = _by_env(_evaluation(run / EVALUATION_FILE, certain=True), item.env_id)
        item.result = parts.pop(item.env_id, None)
        found.append(item)
        found += [
            replace(item, env_id=env_id, rows=[], notes=[], total=None, result=part) for env_id, part in parts.items()
        ]
    own = {run / EVALUATION_FILE for run in runs}
    given = folder.suffix == ".json" and folder.is_file()
    for path in [folder] if given else [path for path in visible_files(folder) if path.suffix == ".json"]:
        text = path.name if given else shown(path, folder)
        if any(path.is_relative_to(run) for run in runs):
            if path not in own and means_to_be_evaluation(path):
                _leave_out(text, f"of a run what counts is its {EVALUATION_FILE}. Move it out of the run's folder")
            continue
        if path.stat().st_size == 0:
            _leave_out(text, "it is empty")
            continue
        seed = re.fullmatch(r"(.+)_seed(\d+)", path.stem)
        for env_id, part in _by_env(_evaluation(path, certain=given), "").items():
            name, number = (seed[1], seed[2]) if seed else (path.stem, "0")
            paths = frozenset({text, path.as_posix()})
            found.append(_Found(path, text, paths, name, env_id, number, result=part, seeded=seed is not None))
    if not found and not folder.exists():
        raise FileNotFoundError(f"There is no {folder}.")
    if not found:
        raise ValueError(
            f"There is nothing to report in {folder}: expected runs of `opd-gym train`, or files of `opd-gym eval -o`."
        )
    for item in found:
        temperature = item.result.temperature if item.result else None
        if temperature is not None:
            item.notes.append(
                f"seed {item.seed} ({item.path}) was evaluated with actions sampled at temperature {temperature:g}."
            )
    return found


def _leave_out(path: str, why: str) -> None:
    print(f"{path} is left out: {why}.", file=sys.stderr)


def _evaluation(path: Path, certain: bool = False) -> EvaluationResult | None:
    """None for another JSON file, unless it has to be one, and for none."""
    if not path.exists() or not (certain or means_to_be_evaluation(path)):
        return None
    result = EvaluationResult.load(path)
    if not result.episodes and not result.lost:
        raise ValueError(f"{path} is an evaluation without an episode. Play it again, or move it away.")
    return result


def means_to_be_evaluation(path: Path) -> bool:
    """
    :param path: a JSON file
    :return: whether it is the result of an evaluation, or was one that is damaged now, in whatever encoding and layout
    """
    data = path.read_bytes().replace(b"\0", b"")
    try:
        values = json.loads(data.decode("utf-8-sig"))
        return isinstance(values, dict) and {"success_rate", "episodes"} <= values.keys()
    except (ValueError, RecursionError):
        return b'"success_rate"' in data


def _by_env(result: EvaluationResult | None, env_id: str) -> dict[str, EvaluationResult]:
    """
    The parts of an evaluation, whose episodes name their env from now on: ``env_id`` where they do not say, or the only
    one that others of them name.
    """
    parts: dict[str, EvaluationResult] = {}
    every: list[Any] = [] if result is None else [*result.episodes, *result.lost]
    named_envs = {episode.env_id for episode in every} - {None, ""}
    if not env_id and len(named_envs) == 1:
        (env_id,) = named_envs
    for episode in every:
        named = replace(episode, env_id=bare_id(episode.env_id or env_id))
        part = parts.get(named.env_id)
        if part is None:
            assert result is not None
            part = EvaluationResult([], versions=result.versions, temperature=result.temperature)
            parts[named.env_id] = part
        (part.lost if isinstance(named, LostEpisode) else part.episodes).append(named)
    return parts


def _name_envs(found: Sequence[_Found]) -> None:
    """An evaluation from Python does not say in which env it was played. Where all others are of one, it is that."""
    nameless = [item for item in found if not item.env_id]
    others = sorted({item.env_id for item in found} - {""})
    if nameless and len(others) > 1:
        raise ValueError(
            f"{nameless[0].file} does not say in which env it was played, and here are {', '.join(others)}. Evaluate "
            "with `opd-gym eval`, or set env_id of its episodes before it is saved."
        )
    for item in nameless:
        item.env_id = others[0] if others else "an env without a name"
        if others:
            item.notes.append(f"{item.path} does not say in which env it was played, and is taken for {others[0]}.")


def _tell_apart(found: Iterable[_Found]) -> None:
    """Evaluations of equal names in different folders are of different policies, and not seeds of one."""
    alone = [item for item in found if not item.is_run]
    for name in (lambda file: f"{file.absolute().parent.name}/", lambda file: f"{file.absolute().parent}/"):
        places: dict[tuple[str, str], set[Path]] = {}
        for item in alone:
            places.setdefault((item.name, item.env_id), set()).add(item.file.parent)
        equal = {key[0] for key, folders in places.items() if len(folders) > 1}
        for item in alone:
            if item.name in equal:
                item.name = name(item.file) + item.name.rpartition("/")[2]


def _is_incidental(key: str) -> bool:
    return any(key == setting or key.startswith(f"{setting}.") for setting in INCIDENTAL)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat
