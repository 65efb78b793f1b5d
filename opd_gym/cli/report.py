"""Runs compared on one page: curves, tables and films, from the files that training and evaluation left."""

from __future__ import annotations

import base64
import io
import math
import os
import shutil
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from opd_gym.cli.options import Report
from opd_gym.cli.runs import read_progress, run_dirs
from opd_gym.cli.train import read_args, read_mapping
from opd_gym.envs.registration import bare_id
from opd_gym.evaluation import EvaluationResult, LostEpisode
from opd_gym.files import replacing, write_atomic
from opd_gym.versions import VERSIONS_FILE, differences

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TEMPLATE = Path(__file__).with_name("report.html")
EVALUATION = "evaluation.json"
# What a report is made from, of all that a run's folder holds
KEPT = ("args.yml", "config.yml", "command.txt", VERSIONS_FILE, EVALUATION)
FILMS = {".mp4": "video/mp4", ".gif": "image/gif"}
# What a curve is drawn over: column of progress.csv -> its name, and what it is divided by
AXES = {
    "time/env_steps": ("env steps (thousands)", 1e3),
    "train/n_updates": ("gradient steps", 1.0),
    "time/time_elapsed": ("wall-clock (minutes)", 60.0),
}
SUCCESS = "rollout/success_rate"
RETURN = "rollout/ep_rew_mean"
# What is drawn of the learning itself, over gradient steps: column -> its name
LEARNING = {
    "train/kl": "reverse KL to the teacher (nats a token)",
    "train/entropy": "entropy of the policy (nats a token)",
}
# What a policy had cost when its training began: label, or label@env -> column -> value
Before = Mapping[str, Mapping[str, float]]
# Settings in which runs of one policy may differ, those that they map to values included
INCIDENTAL = (
    *("teacher", "teacher_kwargs.device", "teacher_kwargs.vec_normalize", "demonstrations", "policy_kwargs.checkpoint"),
    *("n_timesteps", "n_envs", "n_workers", "worker_timeout", "ray"),
)
# How a file of `EvaluationResult.save` begins
_BEGINS = b'{\n "success_rate"'
# No benchmark has more
MAX_TASKS = 100_000
# Training has reached another policy at this share of its success
SHARE = 0.9
# Success in training is that of the last so many episodes, Stable-Baselines3's stats_window_size
WINDOW = 100
# Of fewer episodes it is not drawn: the first to end are those that succeeded
FEWEST = 20
# Enough for the bounds not to move by what is printed
REPETITIONS = 20_000


@dataclass
class Policy:
    """
    What was trained or evaluated under one name, with all its seeds.

    :param label: its name in tables and pictures
    :param env_id: environment id
    :param curves: seed -> rows of ``progress.csv``
    :param results: seed -> held-out evaluation
    :param commands: the commands of its runs
    :param notes: sentences about what its numbers do not show
    :param unfinished: seeds whose training has not ended
    """

    label: str
    env_id: str
    curves: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    results: dict[str, EvaluationResult] = field(default_factory=dict)
    commands: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unfinished: set[str] = field(default_factory=set)

    @property
    def pooled(self) -> EvaluationResult:
        """The episodes of all seeds."""
        results = self.results.values()
        return EvaluationResult([e for r in results for e in r.episodes], lost=[e for r in results for e in r.lost])

    @property
    def judged(self) -> bool:
        """Whether it is measured by success; by the return of its episodes where nothing says what solves one."""
        return not self.results or self.pooled.n_judged > 0

    def score(self, tasks: Sequence[int] | None = None) -> tuple[float, float, float]:
        """
        Held-out success and its 95 % interval: of one seed by Wilson's formula over its episodes, of several that of
        their mean by Student's t, see :func:`over_seeds`. Seeds that happen to agree leave that no width, so it is
        widened to Wilson's of all their episodes. Returns likewise, with a bootstrap over episodes in the place of
        Wilson's formula.

        :param tasks: those that count; None for all
        :return: success rate from 0 to 1, or mean return, and its bounds; NaN without an evaluation
        :raises ImportError: several seeds or returns, and SciPy is not installed
        :raises ValueError: the seeds were evaluated in different tasks, or an outcome is NaN
        """
        parts = {seed: _of_tasks(result, tasks) for seed, result in self.results.items()}
        seeds = [seed for seed, part in parts.items() if part.episodes]
        results = [parts[seed] for seed in seeds]
        if not results:
            return math.nan, math.nan, math.nan
        judged = self.judged
        for seed in seeds:
            if any(math.isnan(_mean(task, judged)) for task in parts[seed].per_task().values()):
                what = "does not say of each task what was solved, as others do" if judged else "has returns of NaN"
                raise ValueError(f"The evaluation of {self.label} on {self.env_id} with seed {seed} {what}.")
        episodes = EvaluationResult([episode for result in results for episode in result.episodes])
        returns = np.array([episode.reward for episode in episodes.episodes])
        low, high = episodes.interval if judged else bootstrap(returns)
        if len(results) == 1:
            return _mean(episodes, judged), low, high
        each = [set(result.per_task()) for result in results]
        # A seed may have lost all episodes of a task
        lost = [{loss.task_id for loss in self.results[seed].lost} for seed in seeds]
        if any(set.union(*each) - played - gone for played, gone in zip(each, lost, strict=True)):
            told = "; ".join(f"seed {seed}: {sorted(played)}" for seed, played in zip(seeds, each, strict=True))
            raise ValueError(
                f"The seeds of {self.label} were evaluated in different tasks of {self.env_id} ({told:.300}), so that "
                "they have no mean. Evaluate all in the same, or give them names of their own with --label."
            )
        rates = [_mean(result, judged) for result in results]
        lowest, highest = over_seeds(rates)
        low, high = min(low, lowest), max(high, highest)
        return statistics.fmean(rates), max(low, 0.0) if judged else low, min(high, 1.0) if judged else high

    def shown(self, result: EvaluationResult, digits: int = 1) -> str:
        """
        :param result: one of its evaluations, or a part of one
        :param digits: after the point of a percentage
        :return: success or mean return
        """
        return _number(_mean(result, self.judged), self.judged, digits)

    def last(self, column: str) -> float | None:
        """
        :param column: of ``progress.csv``
        :return: its last value, as a mean over the seeds whose success is shown, or all where none is; None where it
            was not written
        """
        seeds = [seed for seed in self.curves if seed in self.results] or list(self.curves)
        values = [next((row[column] for row in reversed(self.curves[seed]) if column in row), None) for seed in seeds]
        there = [value for value in values if value is not None]
        return statistics.mean(there) if there else None

    def reached(self, goal: float, column: str) -> dict[str, float | None]:
        """
        :param goal: success rate
        :param column: of ``progress.csv``
        :return: for each seed that plays while it trains its value where success over the last :data:`WINDOW` episodes
            first was at the goal; None where it has not been
        """
        found: dict[str, float | None] = {}
        for seed, rows in self.curves.items():
            if any(SUCCESS in row for row in rows):
                whole = [row for row in rows if SUCCESS in row and row.get("time/episodes", WINDOW) >= WINDOW]
                # 0.9 of 0.8 is a little more than 0.72
                found[seed] = next((row.get(column) for row in whole if row[SUCCESS] >= goal - 1e-9), None)
        return found


def _of_tasks(result: EvaluationResult, tasks: Sequence[int] | None) -> EvaluationResult:
    """The episodes of some tasks; None for all."""
    if tasks is None:
        return result
    episodes = [episode for episode in result.episodes if episode.task_id in tasks]
    lost = [episode for episode in result.lost if episode.task_id in tasks]
    return EvaluationResult(episodes, versions=result.versions, lost=lost)


def _mean(result: EvaluationResult, judged: bool) -> float:
    return result.success_rate if judged else result.mean_reward


def over_seeds(scores: Sequence[float]) -> tuple[float, float]:
    """
    The 95 % interval of a mean over seeds by Student's t. A bootstrap would promise too much: over three seeds its
    interval goes from the lowest to the highest, which holds the mean of all seeds in 75 of 100 cases, and if it draws
    anew for each task (as rliable does, where each task is trained for itself) in fewer. Two seeds say very little, and
    this shows it.

    :param scores: one of each seed, at least two
    :return: lower and upper bound
    :raises ImportError: SciPy is not installed
    """
    try:
        from scipy.stats import t
    except ImportError as error:
        raise ImportError("Intervals over several seeds need SciPy. Run: pip install 'opd_gym[plots]'") from error
    mean, n = statistics.fmean(scores), len(scores)
    half = float(t.ppf(0.975, n - 1)) * statistics.stdev(scores) / math.sqrt(n)
    return mean - half, mean + half


def bootstrap(scores: np.ndarray) -> tuple[float, float]:
    """
    :param scores: one of each episode
    :return: 95 % interval of their mean, by the percentiles of a bootstrap; NaN for one
    :raises ImportError: SciPy is not installed
    """
    try:
        from scipy.stats import bootstrap as resampled
    except ImportError as error:
        raise ImportError("Intervals of returns need SciPy. Run: pip install 'opd_gym[plots]'") from error
    if len(scores) == 1:
        return math.nan, math.nan
    if (scores == scores[0]).all():
        return float(scores[0]), float(scores[0])  # SciPy has NaN for these
    interval = resampled(
        (scores,), np.mean, n_resamples=REPETITIONS, batch=1000, method="percentile", random_state=0
    ).confidence_interval
    return float(interval.low), float(interval.high)


@dataclass
class _Found:
    """A run, or an evaluation without one: ``name`` is its algorithm or the stem of its file, in ``file``."""

    file: Path
    path: str
    name: str
    env_id: str
    seed: str
    settings: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, float]] = field(default_factory=list)
    result: EvaluationResult | None = None
    command: str = ""
    notes: list[str] = field(default_factory=list)
    total: float | None = None

    @property
    def unfinished(self) -> bool:
        """Whether its training has not ended."""
        done = self.rows[-1]["time/total_timesteps"] if self.rows else 0.0
        return self.total is not None and done < self.total


def find_policies(folders: Iterable[Path], labels: Mapping[str, str]) -> list[Policy]:
    """
    Read all runs and evaluations below some folders. Runs of one algorithm and env with the same settings are seeds of
    one policy, named after the algorithm and the settings that most runs have otherwise; where there is no majority,
    after all that differ. Evaluations outside of a run, ``NAME_seed0.json``, are named after their files.

    :param folders: runs, evaluations, or folders that hold some
    :param labels: pattern of a path below its folder -> name of what is there; the first match counts
    :return: the policies, in the order of ``labels`` and then of their paths
    :raises ValueError: there is nothing in a folder, or a file of a run is damaged
    """
    every = [item for folder in folders for item in _find(Path(folder).expanduser())]
    # A folder may lie in another one that is given
    found = list({(item.file.resolve(), item.env_id): item for item in reversed(every)}.values())[::-1]
    _tell_apart(found)
    for pattern in labels:
        if not any(fnmatch(item.path, pattern) for item in found):
            # Of an experiment that is not finished, or a slip
            print(f"--label {pattern}={labels[pattern]}: nothing is found at such a path.", file=sys.stderr)
    settings: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for item in found:
        settings.setdefault((item.name, item.env_id), []).append(item.settings)
    common = {key: _usual(alike) for key, alike in settings.items()}
    policies: dict[tuple[str, str], Policy] = {}
    lengths: dict[tuple[str, str], set[float]] = {}
    unlabelled: dict[tuple[str, str], list[str]] = {}
    order: dict[str, int] = {}
    for item in found:
        label = item.name
        usual = common[item.name, item.env_id]
        told = [key for key in sorted(usual) if usual[key] != [item.settings.get(key)]]
        if told:
            label += f" ({', '.join(f'{key}={item.settings.get(key)}' for key in told)})"
        number = len(labels)
        for i, (pattern, text) in enumerate(labels.items()):
            if fnmatch(item.path, pattern):
                number, label = i, text
                break
        else:
            unlabelled.setdefault((item.env_id, label), []).append(item.path)
        order.setdefault(label, number)
        policy = policies.setdefault((item.env_id, label), Policy(label, item.env_id))
        seed = item.seed
        while (item.rows and seed in policy.curves) or (item.result is not None and seed in policy.results):
            seed += "'"  # the same seed once more
        if seed != item.seed:
            policy.notes.append(f"seed {item.seed} is there more than once, in {item.path} too, and counts as another.")
        policy.notes += item.notes
        if item.unfinished:
            policy.unfinished.add(seed)
        if item.total is not None and not item.unfinished:
            lengths.setdefault((item.env_id, label), set()).add(item.total)
        if item.rows:
            policy.curves[seed] = item.rows
        if item.result is not None:
            policy.results[seed] = item.result
        if item.command:
            policy.commands.append(item.command)
    for key, totals in lengths.items():
        if len(totals) > 1:
            shown = ", ".join(f"{total:,.0f}" for total in sorted(totals))
            policies[key].notes.append(f"its seeds were trained for different numbers of timesteps: {shown}.")
    for key in unlabelled.keys() & {(env_id, text) for env_id, _ in policies for text in labels.values()}:
        paths = ", ".join(unlabelled[key])
        policies[key].notes.append(f"without a label this is the name of {paths} too, which counts here.")
    return sorted(policies.values(), key=lambda policy: order[policy.label])


def _usual(settings: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """The commonest values of each setting: several where none is commoner than the others."""
    usual: dict[str, list[Any]] = {}
    for key in {key for each in settings for key in each}:
        values = [each.get(key) for each in settings]
        most = max(map(values.count, values))
        top = [value for value in values if values.count(value) == most]
        usual[key] = [value for i, value in enumerate(top) if value not in top[:i]]
    return usual


def _find(folder: Path) -> list[_Found]:
    found = []
    runs = run_dirs(folder)
    for run in runs:
        args = read_args(run)
        if not (run / "config.yml").is_file():
            continue  # killed before it began
        config = _flat(read_mapping(run / "config.yml"))
        command = run / "command.txt"
        item = _Found(run, f"{run.relative_to(folder).as_posix()}/", args.algo, bare_id(args.env), str(args.seed or 0))
        item.settings = {key: value for key, value in config.items() if not _is_incidental(key)}
        item.rows = read_progress(run)
        item.command = command.read_text(encoding="utf-8", errors="replace").strip() if command.is_file() else ""
        total = config.get("n_timesteps")
        item.total = total if isinstance(total, (int, float)) else None
        if item.unfinished:
            done = item.rows[-1]["time/total_timesteps"] if item.rows else 0.0
            item.notes.append(
                f"seed {item.seed} ({item.path}) has {done:,.0f} of its {total:,} timesteps: its costs and its "
                "curve end there."
            )
        # `opd-gym eval` may have played other envs as well
        parts = _by_env(_evaluation(run / EVALUATION, certain=True), item.env_id)
        item.result = parts.pop(item.env_id, None)
        found.append(item)
        found += [
            replace(item, env_id=env_id, rows=[], notes=[], total=None, result=part) for env_id, part in parts.items()
        ]
    files = [folder] if folder.suffix == ".json" else sorted(folder.rglob("[!.]*.json"))
    for path in files:
        if not any(path.is_relative_to(run) for run in runs):
            name, _, seed = path.stem.partition("_seed")
            shown = path.name if path == folder else path.relative_to(folder).as_posix()
            for env_id, part in _by_env(_evaluation(path, certain=path == folder), "").items():
                found.append(_Found(path, shown, name, env_id, seed or "0", result=part))
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


def _evaluation(path: Path, certain: bool = False) -> EvaluationResult | None:
    """None for another JSON file, unless it has to be one, and for none."""
    try:
        return EvaluationResult.load(path)
    except FileNotFoundError:
        return None
    except ValueError:
        with path.open("rb") as file:
            if certain or file.read(len(_BEGINS)) == _BEGINS:
                raise
        return None


def _by_env(result: EvaluationResult | None, env_id: str) -> dict[str, EvaluationResult]:
    """The parts of an evaluation, whose episodes name their env from now on: ``env_id`` where they do not say."""
    parts: dict[str, EvaluationResult] = {}
    every: list[Any] = [] if result is None else [*result.episodes, *result.lost]
    for episode in every:
        named = replace(episode, env_id=bare_id(episode.env_id or env_id))
        part = parts.get(named.env_id)
        if part is None:
            assert result is not None
            part = EvaluationResult([], versions=result.versions, temperature=result.temperature)
            parts[named.env_id] = part
        (part.lost if isinstance(named, LostEpisode) else part.episodes).append(named)
    return parts


def _tell_apart(found: Iterable[_Found]) -> None:
    """Evaluations of equal names in different folders are of different policies, and not seeds of one."""
    alone = [item for item in found if item.file.is_file()]
    for name in (lambda file: f"{file.parent.name}/", lambda file: f"{file.parent}/"):
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


def percent(rate: float, digits: int = 1) -> str:
    """
    :param rate: from 0 to 1
    :param digits: after the point
    :return: as a percentage; empty for NaN
    """
    return "" if np.isnan(rate) else f"{100 * rate:.{digits}f} %"


def with_interval(score: float, low: float, high: float, judged: bool = True) -> str:
    """
    :param score: success rate from 0 to 1, or mean return
    :param low: lower bound
    :param high: upper bound
    :param judged: whether it is a success rate
    :return: "85.0 % [80.0, 90.0]", or "-150.2 [-170.0, -130.9]"; empty for NaN
    """
    scale = 100 if judged else 1
    interval = "" if np.isnan(low) else f" [{scale * low:.1f}, {scale * high:.1f}]"
    return "" if np.isnan(score) else f"{_number(score, judged)}{interval}"


def _bounds(low: float, high: float, judged: bool) -> str:
    if np.isnan(low):
        return ""
    return f"{100 * low:.1f} to {100 * high:.1f} %" if judged else f"{low:.1f} to {high:.1f}"


def _number(score: float, judged: bool, digits: int = 1) -> str:
    if judged:
        return percent(score, digits)
    return "" if np.isnan(score) else f"{score:.1f}"


Table = list[list[str]]


def overview(policies: Sequence[Policy]) -> Table:
    """
    :param policies: of one env or several
    :return: held-out success, or return, with its interval: one row a policy, one column an env
    """
    envs = list(dict.fromkeys(policy.env_id for policy in policies))
    cells: dict[str, dict[str, str]] = {}
    for policy in policies:
        if policy.results:
            cells.setdefault(policy.label, {})[policy.env_id] = (
                f"{with_interval(*policy.score(), policy.judged)} \N{MULTIPLICATION SIGN}{len(policy.results)}"
            )
    return [["", *envs], *([label, *(row.get(env, "") for env in envs)] for label, row in cells.items())]


def details(policies: Sequence[Policy], reference: Policy | None) -> Table:
    """
    :param policies: of one env
    :param reference: whose success the training is measured by
    :return: one row a policy: success, its interval, each seed, episodes, the cost of training
    """
    judged = all(policy.judged for policy in policies)
    header = ["policy", "success" if judged else "mean return", "95 % interval", "each seed", "episodes"]
    header += ["env steps", "gradient steps", "minutes"]
    goal = SHARE * reference.pooled.success_rate if reference is not None and reference.judged else None
    if goal is not None and reference is not None:
        header.append(f"env steps to {percent(goal, 0)} ({100 * SHARE:.0f} % of {reference.label})")
    rows = [header]
    for policy in policies:
        score, low, high = policy.score()
        n_lost = len(policy.pooled.lost)
        costs = [(policy.last(column), unit) for column, unit in zip(AXES, (1.0, 1.0, 60.0), strict=True)]
        row = [
            policy.label,
            _number(score, policy.judged),
            _bounds(low, high, policy.judged) if policy.results else "",
            ", ".join(policy.shown(result) for result in policy.results.values() if len(policy.results) > 1),
            str(len(policy.pooled.episodes) or "") + (f" and {n_lost} lost" if n_lost else ""),
            *(f"{value / unit:,.0f}" if value is not None else "" for value, unit in costs),
        ]
        if goal is not None:
            reached = {} if policy is reference else policy.reached(goal, "time/env_steps")
            never = {seed: "not yet" if seed in policy.unfinished else "never" for seed in reached}
            row.append(", ".join(never[seed] if at is None else f"{at:,.0f}" for seed, at in reached.items()))
        rows.append(row)
    return rows


def by_task(policies: Sequence[Policy]) -> Table:
    """
    :param policies: of one env
    :return: success, or mean return, of each task over all seeds; without rows where there is one task
    """
    shown = [policy for policy in policies if policy.results]
    tasks = sorted({task for policy in shown for task in policy.pooled.per_task()})
    rows = [["task", *(policy.label for policy in shown)]]
    if len(tasks) > 1:
        each = [policy.pooled.per_task() for policy in shown]
        rows += [
            [str(task), *(p.shown(r[task], 0) if task in r else "" for p, r in zip(shown, each, strict=True))]
            for task in tasks
        ]
    return rows


def by_group(policies: Sequence[Policy], groups: Mapping[str, Sequence[int]]) -> Table:
    """
    :param policies: of one env
    :param groups: name -> tasks, for instance those that were trained on and those that were not
    :return: success of each group with its interval, empty for a policy that was evaluated in a part of it; without
        rows where there is no group
    """
    rows = [["tasks", *groups]]
    everywhere = {task for policy in policies for task in policy.pooled.per_task()}
    for policy in policies if groups else ():
        if policy.results:
            own = {*policy.pooled.per_task(), *(loss.task_id for loss in policy.pooled.lost)}
            whole = {name: everywhere & set(tasks) <= own for name, tasks in groups.items()}
            cells = (
                with_interval(*policy.score(tasks), policy.judged) if whole[name] else ""
                for name, tasks in groups.items()
            )
            rows.append([policy.label, *cells])
    return rows


def paired(
    policies: Sequence[Policy], reference: Policy | None, groups: Mapping[str, Sequence[int]] | None = None
) -> Table:
    """
    :param policies: of one env
    :param reference: what the others are compared with, in the same episodes
    :param groups: name -> tasks, which are compared by themselves as well
    :return: one row a policy, seed and group: McNemar's exact test
    """
    rows = [["in the same episodes", "seed", "it alone solves", "the other alone solves", "p"]]
    for policy in policies:
        if reference is None or policy is reference or not (policy.judged and reference.judged):
            continue
        for seed, result in policy.results.items():
            other = reference.results.get(seed.rstrip("'"))
            if other is None and len(reference.results) == 1:
                other = next(iter(reference.results.values()))
            other = EvaluationResult([]) if other is None else other
            compared = f"{policy.label} against {reference.label}"
            own = result.per_task()
            parts = {name: tasks for name, tasks in (groups or {}).items() if own.keys() & set(tasks)}
            for name, tasks in {"": None, **parts}.items():
                shown = f"{compared}, {name}" if name else compared
                try:
                    alone, other_alone, p = _of_tasks(result, tasks).paired(_of_tasks(other, tasks))
                except ValueError:
                    rows.append([shown, seed, "other episodes", "", ""])
                    break
                rows.append([shown, seed, str(alone), str(other_alone), f"{p:.3f}" if p >= 0.001 else f"{p:.0e}"])
    return rows


def mixed_versions(policies: Sequence[Policy]) -> list[str]:
    """
    :param policies: what is compared
    :return: a sentence for each evaluation that was played with other versions than the first
    """
    every = [(f"{p.label}, seed {seed}", r.versions) for p in policies for seed, r in p.results.items() if r.versions]
    changes = [(name, differences(every[0][1], found)) for name, found in every[1:]]
    return [f"{every[0][0]} and {name} differ in {', '.join(changed)}." for name, changed in changes if changed]


def notes(policies: Sequence[Policy]) -> list[str]:
    """
    :param policies: what is compared
    :return: sentences about what the numbers do not show: seeds that are there twice, runs that are not finished, other
        tasks than most were evaluated in
    """
    found = [f"{policy.label}: {note}" for policy in policies for note in policy.notes]
    for env_id in dict.fromkeys(policy.env_id for policy in policies):
        here = [policy for policy in policies if policy.env_id == env_id and policy.results]
        # A task of which all episodes were lost was asked for
        tasks = [frozenset(p.pooled.per_task()) | {loss.task_id for loss in p.pooled.lost} for p in here]
        usual = max(tasks, key=tasks.count, default=frozenset())
        found += [
            f"{policy.label} was evaluated in other tasks of {env_id} than most: {', '.join(map(str, sorted(own)))}."
            for policy, own in zip(here, tasks, strict=True)
            if own != usual
        ]
    return found


def draw(
    policies: Sequence[Policy], column: str, colors: Mapping[str, str], before: Before | None = None
) -> Figure | None:
    """
    Success in training over one measure of its cost, or the return where nothing is said of success: the mean over the
    seeds between the lowest and the highest. Diamonds are the same of held-out episodes after training, with its
    interval; dashed lines are policies without a curve.

    :param policies: of one env
    :param column: one of :data:`AXES`
    :param colors: of the policies, by label
    :param before: what policies had cost when their training began, which moves their curves to the right
    :return: the figure; None if no run has a curve
    """
    runs = [rows for policy in policies for rows in policy.curves.values()]
    key = SUCCESS if any(SUCCESS in row for rows in runs for row in rows) else RETURN
    label, unit = AXES[column]
    scale = 100.0 if key == SUCCESS else 1.0
    figure, axis = _figure(f"{label}, with what came before" if before else label)
    drawn = False
    for policy in policies:
        color = colors[policy.label]
        spent = _of(before or {}, policy).get(column, 0.0)
        curves = _curves(policy, column, unit, key, scale, spent)
        measured = bool(policy.results) and policy.judged == (key == SUCCESS)
        held_out, low, high = (scale * value for value in policy.score()) if measured else (math.nan,) * 3
        if curves:
            drawn = True
            _draw_seeds(axis, curves, color, policy.label)
            if measured:
                error = [[held_out - low], [high - held_out]]
                x = statistics.mean(curve[-1, 0] for curve in curves)
                axis.errorbar([x], [held_out], yerr=error, color=color, marker="D", capsize=3, markersize=6)
        elif measured:
            text = f"{policy.label}: {held_out:.0f}" + (" %" if key == SUCCESS else "")
            axis.axhline(held_out, linestyle="--", color=color, label=text)
    if not drawn:
        return None
    axis.set_ylabel("success (%)" if key == SUCCESS else "mean return of an episode")
    if key == SUCCESS:
        axis.set_ylim(-2, 102)
    return _finished(figure)


def draw_learning(policies: Sequence[Policy], key: str, colors: Mapping[str, str]) -> Figure | None:
    """
    :param policies: of one env
    :param key: one of :data:`LEARNING`
    :param colors: of the policies, by label
    :return: it over gradient steps, drawn as by :func:`draw`; None if no run says anything of it
    """
    column = "train/n_updates"
    figure, axis = _figure(AXES[column][0])
    drawn = False
    for policy in policies:
        curves = _curves(policy, column, AXES[column][1], key)
        if curves:
            drawn = True
            _draw_seeds(axis, curves, colors[policy.label], policy.label)
    if not drawn:
        return None
    axis.set_ylabel(LEARNING[key])
    axis.set_ylim(bottom=min(0.0, axis.get_ylim()[0]))
    return _finished(figure)


def draw_groups(
    policies: Sequence[Policy], groups: Mapping[str, Sequence[int]], colors: Mapping[str, str]
) -> Figure | None:
    """
    Held-out success in two groups of tasks against each other, for instance of those that were trained on and of the
    others: what was learned to the right, what was forgotten below.

    :param policies: of one env
    :param groups: name -> tasks
    :param colors: of the policies, by label
    :return: a diamond a policy with its 95 % intervals, and a dot a seed where there are several; None unless there are
        two groups, and a policy that was evaluated in both
    """
    shown = [row[0] for row in by_group(policies, groups)[1:] if all(row[1:])]
    if len(groups) != 2 or not shown or not all(policy.judged for policy in policies):
        return None
    (x_name, x_tasks), (y_name, y_tasks) = groups.items()
    figure, axis = _figure(f"success in tasks {x_name} (%)")
    for policy in policies:
        if policy.label in shown:
            (x, *x_bounds), (y, *y_bounds) = (
                [100.0 * value for value in policy.score(tasks)] for tasks in (x_tasks, y_tasks)
            )
            axis.errorbar(
                [x],
                [y],
                xerr=[[x - x_bounds[0]], [x_bounds[1] - x]],
                yerr=[[y - y_bounds[0]], [y_bounds[1] - y]],
                color=colors[policy.label],
                label=policy.label,
                marker="D",
                capsize=3,
                linestyle="none",
            )
            if len(policy.results) > 1:
                seeds = [
                    [100.0 * _mean(_of_tasks(result, tasks), True) for tasks in (x_tasks, y_tasks)]
                    for result in policy.results.values()
                ]
                axis.plot(*zip(*seeds, strict=True), color=colors[policy.label], marker=".", linestyle="none")
    axis.set_ylabel(f"success in tasks {y_name} (%)")
    axis.set_ylim(-2, 102)
    axis.set_xlim(-2, 102)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize="small")
    return figure


def _figure(label: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.0), layout="constrained")
    axis = figure.subplots()
    axis.set_xlabel(label)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    return figure, axis


def _finished(figure: Figure) -> Figure:
    figure.axes[0].set_xlim(left=0)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    return figure


def _curves(
    policy: Policy, column: str, unit: float, key: str, scale: float = 1.0, spent: float = 0.0
) -> list[np.ndarray]:
    """
    Of each seed that has more than a point: what it cost, and what it had reached by then. Where some are finished, of
    these.
    """
    seeds = [seed for seed in policy.curves if seed not in policy.unfinished] or list(policy.curves)
    curves = []
    for seed in seeds:
        rows = _carried(policy.curves[seed], column)
        rows = [row for row in rows if column in row and key in row]
        if key == SUCCESS:
            enough = [row for row in rows if row.get("time/episodes", FEWEST) >= FEWEST]
            rows = enough if len(enough) > 1 else rows
        curves.append(np.array([((row[column] + spent) / unit, scale * row[key]) for row in rows]))
    return [curve for curve in curves if len(curve) > 1]


def _carried(rows: Sequence[dict[str, float]], column: str) -> list[dict[str, float]]:
    """Rows with the last known value of a count that only an update writes."""
    found, last = [], None
    for row in rows:
        last = row.get(column, last)
        found.append(row if last is None or not column.startswith("train/") else {**row, column: last})
    return found


def _draw_seeds(axis: Axes, curves: Sequence[np.ndarray], color: str, label: str) -> None:
    # Seeds are logged at different places: where all have begun, until the first has ended
    start, end = max(c[0, 0] for c in curves), min(c[-1, 0] for c in curves)
    if start >= end:
        for i, curve in enumerate(curves):
            axis.plot(*curve.T, color=color, label=None if i else label, linewidth=1)
        return
    grid = np.linspace(start, end, 200)
    values = np.stack([np.interp(grid, curve[:, 0], curve[:, 1]) for curve in curves])
    axis.plot(grid, values.mean(0), color=color, label=label, linewidth=2)
    if len(curves) > 1:
        axis.fill_between(grid, values.min(0), values.max(0), color=color, alpha=0.2, linewidth=0)


def films(folders: Iterable[Path]) -> list[dict[str, str]]:
    """
    :param folders: where to look
    :return: where each lies, its media type and its content as a ``data:`` address; of a film in two formats one
    """
    order = list(FILMS)
    chosen: dict[Path, tuple[str, Path]] = {}
    for folder in folders:
        found = [path for path in folder.rglob("[!.]*") if path.suffix in FILMS] if folder.is_dir() else []
        for path in sorted(found, key=lambda path: (path.with_suffix(""), order.index(path.suffix))):
            shown = path.relative_to(folder).with_suffix("").as_posix()
            chosen.setdefault(path.with_suffix(""), (shown, path))
    return [
        {
            "name": shown,
            "kind": FILMS[path.suffix],
            "data": f"data:{FILMS[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}",
        }
        for shown, path in chosen.values()
    ]


def markdown(table: Table) -> str:
    """
    :param table: rows of cells, the header first
    :return: Markdown; empty for a table without rows
    """
    if len(table) < 2:
        return ""
    lines = [table[0], ["---"] * len(table[0]), *table[1:]]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |\n" for row in lines)


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
        for path in [folder] if folder.is_file() else folder.rglob("[!.]*"):
            if path.name in KEPT and path.parent.parent in runs:
                continue  # the same for rl-zoo3
            inside = Path(path.name) if path == folder else path.relative_to(folder)
            wanted = path.name in KEPT or path.match("progress*.csv") or path.suffix in FILMS
            wanted = wanted or (path.suffix == ".json" and _evaluation(path) is not None)
            # A folder may lie in another one that is given
            if wanted and "policy" not in inside.parts and path.resolve() not in found.values():
                if target / inside in found:
                    raise ValueError(
                        f"--keep: {found[target / inside]} and {path} would both be {target / inside}. Report the "
                        "folder above them, or rename one."
                    )
                found[target / inside] = path.resolve()
    return found


def keep(files: Mapping[Path, Path]) -> None:
    """
    Copy what a report is made from. In copies of what was run, paths below the current folder begin there: nobody's
    home folder is published.

    :param files: see :func:`copies`
    """
    for place, path in files.items():
        place.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in (".yml", ".txt"):
            text = path.read_text(encoding="utf-8").replace(f"{Path.cwd()}{os.sep}", "")
            place.write_text(text, encoding="utf-8")
        else:
            shutil.copyfile(path, place)


def report(args: Report) -> None:
    """
    Write the page, and what else is asked for.

    :param args: what to compare, and where to write
    :raises ValueError: there is nothing to report, or no policy of the name to compare with
    :raises ImportError: there is nothing to draw with
    """
    from jinja2 import Environment, select_autoescape

    try:
        import matplotlib  # noqa: F401
        import scipy  # noqa: F401
    except ImportError as error:
        raise ImportError("A report needs matplotlib and scipy. Run: pip install 'opd_gym[plots]'") from error
    labels = {pattern: text for pattern, text in map(_named, args.label)}
    groups = {name: _task_ids(text) for name, text in map(_named, args.tasks)}
    for folder in args.results:
        if args.keep is not None and args.keep.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"--keep {args.keep} lies in {folder}, which it is to copy. Name another folder.")
    policies = find_policies(args.results, labels)
    kept = {} if args.keep is None else copies(args.results, args.keep)
    names = list(dict.fromkeys(policy.label for policy in policies))
    if args.reference is not None and args.reference not in names:
        raise ValueError(f"Expected --reference to be one of {', '.join(names)}; got {args.reference!r}.")
    before = dict(map(_before, args.before))
    known = {*names, *(f"{policy.label}@{policy.env_id}" for policy in policies)}
    for name in sorted(before.keys() - known):
        print(f"--before {name}: nothing is called that; there is {', '.join(sorted(known))}.", file=sys.stderr)
    colors = {name: f"C{number}" for number, name in enumerate(names)}
    sections: list[dict[str, Any]] = []
    pictures: dict[str, bytes] = {}
    for env_id in dict.fromkeys(policy.env_id for policy in policies):
        here = [policy for policy in policies if policy.env_id == env_id]
        reference = next((policy for policy in here if policy.label == args.reference and policy.results), None)
        if reference is not None and any(seed.endswith("'") for seed in reference.results):
            raise ValueError(
                f"--reference {args.reference}: on {env_id} more than one policy is called that, or a seed is there "
                f"more than once ({' '.join(reference.notes)}) Give the others names of their own with --label."
            )
        figures = [(label, env_id, draw(here, column, colors)) for column, (label, _) in AXES.items()]
        if any(_of(before, policy) for policy in here):
            figures += [
                (f"{AXES[column][0]}, with what came before", f"{env_id}-before", draw(here, column, colors, before))
                for column in ("time/env_steps", "time/time_elapsed")
            ]
        for key, label in LEARNING.items():
            figures.append((label, f"{env_id}-{key.partition('/')[2]}", draw_learning(here, key, colors)))
        figures.append((" and ".join(groups), f"{env_id}-groups", draw_groups(here, groups, colors)))
        svgs = []
        for label, file, figure in figures:
            if figure is not None:
                svgs.append((label, _svg(figure)))
                if file not in pictures:
                    pictures[file] = _png(figure)
        sections.append(
            {
                "env": env_id,
                "figures": svgs,
                "details": details(here, reference),
                "groups": by_group(here, groups),
                "tasks": by_task(here),
                "paired": paired(here, reference, groups),
                "commands": [(policy.label, command) for policy in here for command in policy.commands],
            }
        )
    summary = overview(policies)
    page = Environment(autoescape=select_autoescape(default=True), trim_blocks=True, lstrip_blocks=True)
    html = page.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=args.title,
        overview=summary,
        sections=sections,
        films=films(args.results),
        versions=mixed_versions(policies),
        notes=notes(policies),
    )
    write_atomic(args.output, html)
    if args.markdown is not None:
        parts = [markdown(summary)]
        for section in sections:
            parts.append(f"## {section['env']}\n")
            parts += [markdown(section[name]) for name in ("details", "groups", "paired", "tasks")]
        parts += ["\n".join(notes(policies)), "\n".join(mixed_versions(policies))]
        write_atomic(args.markdown, "\n".join(filter(None, parts)))
    if args.pictures is not None:
        args.pictures.mkdir(parents=True, exist_ok=True)
        for name, picture in pictures.items():
            with replacing(args.pictures / f"{name.replace('/', '-')}.png") as temporary:
                temporary.write_bytes(picture)
    keep(kept)
    print(markdown(summary) + "".join(f"\n{note}" for note in notes(policies)) + f"\n{args.output}")


def _named(item: str) -> tuple[str, str]:
    name, _, text = item.partition("=")
    if not name or not text:
        raise ValueError(f"Expected NAME=VALUE, as in --label 'student/*=student' or --tasks seen=0-5, got {item!r}.")
    return name, text


def _before(item: str) -> tuple[str, dict[str, float]]:
    name, text = _named(item)
    try:
        steps, minutes = map(float, text.split(","))
        if not (0.0 <= steps < math.inf and 0.0 <= minutes < math.inf):
            raise ValueError
    except ValueError:
        raise ValueError(
            f"Expected --before NAME=ENV_STEPS,MINUTES or NAME@ENV=... with two numbers from 0 on, got {item!r}."
        ) from None
    return name, {"time/env_steps": steps, "time/time_elapsed": 60.0 * minutes}


def _of(before: Before, policy: Policy) -> Mapping[str, float]:
    return before.get(f"{policy.label}@{policy.env_id}", before.get(policy.label, {}))


def _task_ids(text: str) -> list[int]:
    try:
        ends = [[int(end) for end in part.split("-")] for part in text.split(",")]
    except ValueError:
        raise ValueError(f"Expected tasks as in 0-5 or 0,3,7, got {text!r}.") from None
    if not all(len(part) <= 2 and 0 <= part[0] <= part[-1] < MAX_TASKS for part in ends):
        raise ValueError(f"Expected tasks as in 0-5 or 0,3,7, got {text!r}.")
    return [task for part in ends for task in range(part[0], part[-1] + 1)]


def _svg(figure: Figure) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=130)
    return file.getvalue()


def run(args: Report) -> int:
    """
    :param args: what to compare
    :return: exit status
    """
    report(args)
    return 0
