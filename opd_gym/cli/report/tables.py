"""The tables of a report: rows of text, the header first."""

from __future__ import annotations

import math
import re
import statistics
import warnings
from collections.abc import Iterator, Mapping, Sequence

from opd_gym.cli.report.policies import (
    ENV_STEPS,
    SECONDS,
    UPDATES,
    WINDOW,
    Policy,
    covers,
    evaluated_tasks,
    of_tasks,
    outcome,
    welch,
)
from opd_gym.evaluation import EvaluationResult
from opd_gym.versions import differences

Table = list[list[str]]
# Training has reached another policy at this share of its success
SHARE = 0.9
# What training cost: column of progress.csv -> what it is divided by
COSTS = {ENV_STEPS: 1.0, UPDATES: 1.0, SECONDS: 60.0}


def number(score: float, judged: bool = True, digits: int = 1) -> str:
    """
    :param score: success rate from 0 to 1, or mean return
    :param judged: whether it is a success rate
    :param digits: of a success rate, after the point
    :return: "85.0 %", or "-150.2"; three significant digits of returns below 1; empty for NaN
    """
    if math.isnan(score):
        return ""
    return f"{100 * score:.{digits}f} %" if judged else _return(score)


def _return(value: float) -> str:
    return f"{value + 0.0:.1f}" if abs(value) >= 1.0 or value == 0.0 else f"{value:.3g}"


def _end(value: float, judged: bool) -> str:
    return f"{100 * value:.1f}" if judged else _return(value)


def with_interval(score: float, low: float, high: float, judged: bool = True) -> str:
    """
    :param score: success rate from 0 to 1, or mean return
    :param low: lower bound
    :param high: upper bound
    :param judged: whether it is a success rate
    :return: "85.0 % [80.0, 90.0]", or "-150.2 [-170.0, -130.9]"; empty for NaN
    """
    interval = "" if math.isnan(low) else f" [{_end(low, judged)}, {_end(high, judged)}]"
    return "" if math.isnan(score) else f"{number(score, judged)}{interval}"


def _bounds(low: float, high: float, judged: bool) -> str:
    return "" if math.isnan(low) else f"{_end(low, judged)} to {_end(high, judged)}{' %' if judged else ''}"


def _p(p: float) -> str:
    return "<1e-300" if p == 0.0 else f"{p:.3f}" if p >= 0.00095 else f"{p:.0e}"


def overview(policies: Sequence[Policy]) -> Table:
    """
    :param policies: of one env or several
    :return: held-out success, or return, with its interval: one row a policy, one column an env
    """
    envs = list(dict.fromkeys(policy.env_id for policy in policies))
    cells: dict[str, dict[str, str]] = {}
    for policy in policies:
        if policy.results:
            n_seeds = sum(bool(result.episodes) for result in policy.results.values())
            cells.setdefault(policy.label, {})[policy.env_id] = (
                f"{with_interval(*policy.score(), policy.judged)} \N{MULTIPLICATION SIGN}{n_seeds}"
                if n_seeds
                else "all episodes were lost"
            )
    return [["", *envs], *([label, *(row.get(env, "") for env in envs)] for label, row in cells.items())]


def details(policies: Sequence[Policy], reference: Policy | None) -> Table:
    """
    :param policies: of one env
    :param reference: whose success the training is measured by
    :return: one row a policy: success (or mean return), its interval, each seed, the mean return where it says more
        than success, episodes, the cost of training, and the env steps to :data:`SHARE` of the reference's success;
        without columns in which nobody has anything
    """
    kinds = {policy.judged for policy in policies if policy.results} or {True}
    header = ["policy", "success or mean return" if len(kinds) > 1 else "success" if True in kinds else "mean return"]
    header += ["95 % interval", "each seed"]
    returns = any(policy.judged and policy.pooled.has_returns for policy in policies)
    header += ["mean return"] if returns else []
    header += ["episodes", "env steps", "gradient steps", "minutes"]
    goal = SHARE * reference.score()[0] if reference is not None and reference.judged else 0.0
    if reference is not None and goal > 0.0:
        header.append(f"env steps to {number(goal, digits=0)} ({100 * SHARE:.0f} % of {reference.label})")
    rows = [header]
    for policy in policies:
        score, low, high = policy.score()
        pooled = policy.pooled
        each = [number(outcome(result, policy.judged), policy.judged) for result in policy.results.values()]
        costs = [(policy.last(column), unit) for column, unit in COSTS.items()]
        row = [
            policy.label,
            number(score, policy.judged),
            _bounds(low, high, policy.judged) if policy.results else "",
            ", ".join(each) if len(each) > 1 else "",
            *([_mean_return(policy)] if returns else []),
            str(len(pooled.episodes) or "") + (f" and {len(pooled.lost)} lost" if pooled.lost else ""),
            *("" if value is None else _cost(value / unit) for value, unit in costs),
        ]
        if goal > 0.0:
            reached = {} if policy is reference else policy.reached(goal, ENV_STEPS)
            row.append(", ".join(_reached(at, seed in policy.unfinished) for seed, at in reached.items()))
        rows.append(row)
    filled = [any(column) for column in zip(*rows[1:], strict=True)]
    # Its success is looked for
    filled[:3] = [True] * 3
    return [[cell for cell, there in zip(row, filled, strict=True) if there] for row in rows] if rows[1:] else rows


def _cost(value: float) -> str:
    return f"{value:,.0f}" if value >= 1.0 or value == 0.0 else f"{value:.1g}"


def _mean_return(policy: Policy) -> str:
    if math.isnan(policy.pooled.mean_reward):
        return ""
    return with_interval(*policy.score(judged=False), judged=False)


def _reached(at: float | None, unfinished: bool) -> str:
    if at is None or math.isnan(at):
        return "not yet" if unfinished else "never" if at is None else f"fewer than {WINDOW} episodes"
    return f"{at:,.0f}"


def by_task(policies: Sequence[Policy]) -> Table:
    """
    :param policies: of one env
    :return: success, or mean return, of each task, as a mean over the seeds; without rows where there is one task
    """
    shown = [policy for policy in policies if policy.results]
    tasks = sorted({task for policy in shown for task in policy.pooled.per_task()})
    rows = [["task", *(policy.label for policy in shown)]]
    if len(tasks) > 1:
        parts = [[result.per_task() for result in policy.results.values()] for policy in shown]
        for task in tasks:
            row = [str(task)]
            for policy, seeds in zip(shown, parts, strict=True):
                rates = [outcome(seed[task], policy.judged) for seed in seeds if task in seed]
                row.append(number(statistics.fmean(rates), policy.judged, 0) if rates else "")
            rows.append(row)
    return rows


def by_group(policies: Sequence[Policy], groups: Mapping[str, Sequence[int]]) -> Table:
    """
    :param policies: of one env
    :param groups: name -> tasks, for instance those that were trained on and those that were not
    :return: success of each group with its interval, empty for a policy that was evaluated in a part of it; without
        rows where there is no group
    """
    rows = [["tasks", *groups]]
    for policy in policies if groups else ():
        if policy.results:
            cells = (
                with_interval(*policy.score(tasks), policy.judged) if covers(policies, policy, tasks) else ""
                for tasks in groups.values()
            )
            rows.append([policy.label, *cells])
    return rows


def paired(
    policies: Sequence[Policy], reference: Policy | None, groups: Mapping[str, Sequence[int]] | None = None
) -> Table:
    """
    A seed is compared with the same seed of the reference, or with its only one; a policy without a training seed with
    each of the reference's.

    :param policies: of one env
    :param reference: what the others are compared with, in the same episodes
    :param groups: name -> tasks, which are compared by themselves as well
    :return: one row a policy, seed and group: McNemar's exact test
    """
    rows = [["in the same episodes", "seed", "it alone solves", "the other alone solves", "p"]]
    for policy in policies:
        if reference is None or policy is reference or not (policy.judged and reference.judged):
            continue
        compared = f"{policy.label} against {reference.label}"
        for seed, result in policy.results.items():
            partners = list(_partners(policy, seed, reference))
            if not partners:
                rows.append([compared, seed, f"there is no seed {seed} of {reference.label}", "", ""])
            own = result.per_task()
            parts = {name: tasks for name, tasks in (groups or {}).items() if own.keys() & set(tasks)}
            for shown_seed, other in partners:
                tests = {"": _paired(result, other)}
                tests.update({name: _paired(of_tasks(result, t), of_tasks(other, t)) for name, t in parts.items()})
                # Where nothing can be compared, one row says so
                comparable = any(len(test) > 1 for test in tests.values())
                for name, test in tests.items():
                    if comparable or not name:
                        shown = f"{compared}, {name}" if name else compared
                        rows.append([shown, shown_seed, *test, *[""] * (3 - len(test))])
    return rows


def _paired(result: EvaluationResult, other: EvaluationResult) -> list[str]:
    """The numbers of McNemar's test, or one text that says why there are none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that versions differ: see mixed_versions()
            alone, other_alone, p = result.paired(other)
    except ValueError:
        episodes = [*result.episodes, *other.episodes]
        if any(episode.init_state_id < 0 and episode.seed is None for episode in episodes):
            return ["nothing says which episodes"]
        return ["not all are judged" if any(e.success is None for e in episodes) else "other episodes"]
    return [str(alone), str(other_alone), _p(p)]


def _partners(policy: Policy, seed: str, reference: Policy) -> Iterator[tuple[str, EvaluationResult]]:
    """With which evaluations of the reference one of a policy is compared, and what their pair is called."""
    if len(policy.results) == 1 and not policy.seeded and len(reference.results) > 1:
        for other_seed, other in reference.results.items():
            yield f"the other's {other_seed}", other
    elif seed.rstrip("'") in reference.results:
        yield seed, reference.results[seed.rstrip("'")]
    elif len(reference.results) == 1:
        yield seed, next(iter(reference.results.values()))


def over_seeds(
    policies: Sequence[Policy], reference: Policy | None, groups: Mapping[str, Sequence[int]] | None = None
) -> Table:
    """
    :param policies: of one env
    :param reference: what the others are compared with
    :param groups: name -> tasks, which are compared by themselves as well
    :return: one row a policy that has several seeds, as the reference has, and group: how far their means lie apart, by
        Welch's t test over seeds. None where they were evaluated in different tasks
    """
    rows = [["means over seeds", "difference", "95 % interval", "seeds", "p"]]
    for policy in policies:
        if reference is None or policy is reference or policy.judged != reference.judged:
            continue
        for name, tasks in {"": None, **(groups or {})}.items():
            parts = ([of_tasks(r, tasks) for r in p.results.values()] for p in (policy, reference))
            ours, theirs = ([r for r in results if r.episodes] for results in parts)
            own, others = ([outcome(r, policy.judged) for r in results] for results in (ours, theirs))
            test = welch(own, others)
            if test is None or len({frozenset(evaluated_tasks(r)) for r in (*ours, *theirs)}) > 1:
                continue
            difference = statistics.fmean(own) - statistics.fmean(others)
            ends = [difference, *test[:2]]
            shown = [f"{100 * value:+.1f}" if policy.judged else f"{value:+.3g}" for value in ends]
            rows.append(
                [
                    f"{policy.label} less {reference.label}{name and f', {name}'}",
                    f"{shown[0]} points" if policy.judged else shown[0],
                    f"{shown[1]} to {shown[2]}",
                    f"{len(own)} and {len(others)}",
                    _p(test[2]),
                ]
            )
    return rows


def mixed_versions(policies: Sequence[Policy]) -> list[str]:
    """
    :param policies: what is compared
    :return: a sentence for each evaluation that was played with other versions than the first
    """
    every = [(f"{p.label}, seed {seed}", r.versions) for p in policies for seed, r in p.results.items() if r.versions]
    changes = [(name, differences(every[0][1], found)) for name, found in every[1:]]
    return [f"{every[0][0]} and {name} differ in {', '.join(changed)}." for name, changed in changes if changed]


def notes(policies: Sequence[Policy], reference: str | None = None) -> list[str]:
    """
    :param policies: what is compared
    :param reference: label of what the others are to be compared with
    :return: sentences about what the numbers do not show: seeds that are there twice, runs that are not finished,
        episodes that were lost or not judged, other tasks or episodes than most were evaluated in
    """
    found = [f"{policy.label}: {note}" for policy in policies for note in policy.notes]
    for policy in policies:
        for seed, result in policy.results.items():
            found += [f"{policy.label}, seed {seed}: {note}" for note in _of_episodes(result)]
    for env_id in dict.fromkeys(policy.env_id for policy in policies):
        here = [policy for policy in policies if policy.env_id == env_id and policy.results]
        found += _other_episodes(here, env_id)
        if reference is not None and any(policy.label != reference for policy in here):
            other = next((policy for policy in here if policy.label == reference), None)
            if other is None:
                found.append(f"{reference} was not evaluated on {env_id}, so nothing is compared with it there.")
            elif not other.judged:
                found.append(f"On {env_id} returns are compared, for which there is no test in the same episodes.")
            else:
                found += [
                    f"{policy.label} has returns alone on {env_id}, and {reference} successes: nothing tests the two."
                    for policy in here
                    if not policy.judged
                ]
    return found


def _of_episodes(result: EvaluationResult) -> list[str]:
    n, n_lost = len(result.episodes), len(result.lost)
    found = []
    if n_lost:
        found.append(f"{n_lost} of {n + n_lost} episodes were lost, and count neither as solved nor as failed.")
    if 0 < result.n_judged < n:
        found.append(
            f"the env says only of {result.n_judged} of {n} episodes whether they were solved; the success rate counts "
            "these alone."
        )
    keys = [episode.key for episode in result.episodes]
    repeated = n - len(set(keys))
    if any(state < 0 and seed is None for _, state, seed in keys):
        found.append("nothing says which episodes were played: they have neither an initial state nor a seed.")
    elif repeated:
        found.append(f"{repeated} of {n} episodes are there more than once, so that its interval is too narrow.")
    return found


def _other_episodes(policies: Sequence[Policy], env_id: str) -> list[str]:
    """What was evaluated in other tasks or episodes than most."""
    tasks = [frozenset(evaluated_tasks(policy.pooled)) for policy in policies]
    usual = max(tasks, key=tasks.count, default=frozenset())
    found = [
        f"{policy.label} was evaluated in other tasks of {env_id} than most: {', '.join(map(str, sorted(own)))}."
        for policy, own in zip(policies, tasks, strict=True)
        if own != usual
    ]
    alike = [policy for policy, own in zip(policies, tasks, strict=True) if own == usual]
    keys = {
        (policy.label, seed): frozenset(
            [e.key for e in r.episodes] + [(e.task_id, e.init_state_id, e.seed) for e in r.lost]
        )
        for policy in alike
        for seed, r in policy.results.items()
    }
    every = list(keys.values())
    most = max(every, key=every.count, default=frozenset())
    if len(every) > 1 and every.count(most) == 1:
        return [*found, f"No two evaluations on {env_id} are of the same episodes."]
    for policy in alike:
        others = [seed for seed in policy.results if keys[policy.label, seed] != most]
        if others:
            which = f", seed {', '.join(others)}," if len(others) < len(policy.results) else ""
            found.append(f"{policy.label}{which} was evaluated in other episodes of {env_id} than most.")
    return found


def markdown(table: Table) -> str:
    """
    :param table: rows of cells, the header first
    :return: Markdown; empty for a table without rows
    """
    if len(table) < 2:
        return ""
    lines = [table[0], ["---"] * len(table[0]), *table[1:]]
    return "".join(f"| {' | '.join(escaped(cell) for cell in row)} |\n" for row in lines)


def escaped(text: str) -> str:
    """
    :param text: a cell, or a line
    :return: the same in Markdown, where it begins no cell, line or HTML of its own
    """
    text = re.sub(r"[\\|*`]|(?<=])\(", r"\\\g<0>", text.replace("&", "&amp;").replace("<", "&lt;"))
    return " ".join(text.splitlines())
