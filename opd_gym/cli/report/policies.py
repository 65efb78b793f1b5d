"""What a report compares: a policy with all its seeds, and what is computed from them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from opd_gym.evaluation import EvaluationResult

# Columns of progress.csv that tell what training had cost
ENV_STEPS, UPDATES, SECONDS = "time/env_steps", "train/n_updates", "time/time_elapsed"
SUCCESS = "rollout/success_rate"
# Success in training is that of the last so many episodes, Stable-Baselines3's stats_window_size
WINDOW = 100


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
    :param windows: seed -> number of episodes that success in training is averaged over
    :param seeded: whether its seeds are of a training: those of another policy with the same numbers belong to them
    """

    label: str
    env_id: str
    curves: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    results: dict[str, EvaluationResult] = field(default_factory=dict)
    commands: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unfinished: set[str] = field(default_factory=set)
    windows: dict[str, int] = field(default_factory=dict)
    seeded: bool = False

    @property
    def pooled(self) -> EvaluationResult:
        """The episodes of all seeds."""
        results = self.results.values()
        return EvaluationResult([e for r in results for e in r.episodes], lost=[e for r in results for e in r.lost])

    @property
    def judged(self) -> bool:
        """Whether it is measured by success; by the return of its episodes where nothing says what solves one."""
        return not self.results or self.pooled.n_judged > 0

    def score(self, tasks: Sequence[int] | None = None, judged: bool | None = None) -> tuple[float, float, float]:
        """
        Held-out success and its 95 % interval: of one seed by Wilson's formula over its episodes, of several that of
        their mean by Student's t, see :func:`t_interval`. Seeds that happen to agree leave that no width, so it is
        widened to Wilson's of all their episodes. Returns likewise, with Student's t over episodes in the place of
        Wilson's formula.

        :param tasks: those that count; None for all
        :param judged: success, or returns; None for :attr:`judged`
        :return: success rate from 0 to 1, or mean return, and its bounds; NaN without an evaluation
        :raises ImportError: several seeds or returns, and SciPy is not installed
        :raises ValueError: the seeds were evaluated in different tasks, or an outcome is NaN
        """
        parts = {seed: of_tasks(result, tasks) for seed, result in self.results.items()}
        seeds = [seed for seed, part in parts.items() if part.episodes]
        results = [parts[seed] for seed in seeds]
        if not results:
            return math.nan, math.nan, math.nan
        judged = self.judged if judged is None else judged
        for seed in seeds:
            if any(math.isnan(outcome(task, judged)) for task in parts[seed].per_task().values()):
                what = "does not say of each task what was solved, as others do" if judged else "has returns of NaN"
                raise ValueError(
                    f"The evaluation of {self.label} on {self.env_id} with seed {seed} {what}. Evaluate it again, or "
                    "move it away."
                )
        pooled = EvaluationResult([episode for result in results for episode in result.episodes])
        low, high = pooled.interval if judged else t_interval([episode.reward for episode in pooled.episodes])
        if len(results) == 1:
            return outcome(pooled, judged), low, high
        each = [set(result.per_task()) for result in results]
        # A seed may have lost all episodes of a task
        lost = [{loss.task_id for loss in self.results[seed].lost} for seed in seeds]
        if any(set.union(*each) - played - gone for played, gone in zip(each, lost, strict=True)):
            told = "; ".join(f"seed {seed}: {sorted(played)}" for seed, played in zip(seeds, each, strict=True))
            raise ValueError(
                f"The seeds of {self.label} were evaluated in different tasks of {self.env_id} ({told:.300}), so that "
                "they have no mean. Evaluate all in the same, or give them names of their own with --label."
            )
        rates = [outcome(result, judged) for result in results]
        lowest, highest = t_interval(rates)
        low, high = min(low, lowest), max(high, highest)
        return statistics.fmean(rates), max(low, 0.0) if judged else low, min(high, 1.0) if judged else high

    def last(self, column: str) -> float | None:
        """
        :param column: of ``progress.csv``
        :return: its last value, as a mean over the seeds whose success is shown, or all where none is, and of these
            over the finished ones, if there are any; None where it was not written
        """
        seeds = [seed for seed in self.curves if seed in self.results] or list(self.curves)
        seeds = [seed for seed in seeds if seed not in self.unfinished] or seeds
        values = [next((row[column] for row in reversed(self.curves[seed]) if column in row), None) for seed in seeds]
        there = [value for value in values if value is not None]
        return statistics.mean(there) if there else None

    def reached(self, goal: float, column: str) -> dict[str, float | None]:
        """
        :param goal: success rate
        :param column: of ``progress.csv``
        :return: for each seed that plays while it trains its value where success over the last :data:`WINDOW` episodes
            first was at the goal; None where it has not been, NaN where it was never that of so many
        """
        found: dict[str, float | None] = {}
        for seed, rows in self.curves.items():
            there = [row for row in rows if SUCCESS in row and column in row]
            if there:
                enough = self.windows.get(seed, WINDOW) >= WINDOW
                whole = [row for row in there if enough and row.get("time/episodes", WINDOW) >= WINDOW]
                # 0.9 of 0.8 is a little more than 0.72
                at = next((row[column] for row in whole if row[SUCCESS] >= goal - 1e-9), None)
                found[seed] = at if whole else math.nan
        return found


def of_tasks(result: EvaluationResult, tasks: Sequence[int] | None) -> EvaluationResult:
    """
    :param result: an evaluation
    :param tasks: those that count; None for all
    :return: their episodes
    """
    if tasks is None:
        return result
    episodes = [episode for episode in result.episodes if episode.task_id in tasks]
    lost = [episode for episode in result.lost if episode.task_id in tasks]
    return EvaluationResult(episodes, versions=result.versions, lost=lost)


def evaluated_tasks(result: EvaluationResult) -> set[int]:
    """
    :param result: an evaluation
    :return: the tasks that were asked for; of one all episodes may have been lost
    """
    return {episode.task_id for episode in result.episodes} | {loss.task_id for loss in result.lost}


def covers(policies: Sequence[Policy], policy: Policy, tasks: Sequence[int]) -> bool:
    """
    :param policies: what is compared
    :param policy: one of them
    :param tasks: a group of tasks
    :return: whether the policy was evaluated in all of the group that any of them was, and in one at least
    """
    everywhere = {task for other in policies for task in evaluated_tasks(other.pooled)} & set(tasks)
    return bool(everywhere) and everywhere <= evaluated_tasks(policy.pooled)


def outcome(result: EvaluationResult, judged: bool) -> float:
    """
    :param result: an evaluation
    :param judged: whether success is meant, or the return
    :return: success rate from 0 to 1, or mean return
    """
    return result.success_rate if judged else result.mean_reward


def t_interval(scores: Sequence[float]) -> tuple[float, float]:
    """
    The 95 % interval of a mean by Student's t. A bootstrap would promise too much: over three seeds its interval goes
    from the lowest to the highest, which holds the mean of all seeds in 75 of 100 cases, and if it draws anew for each
    task (as rliable does, where each task is trained for itself) in fewer. Two seeds say very little, and this shows
    it.

    :param scores: one of each seed, or of each episode
    :return: lower and upper bound; NaN for one score, or where one is not finite
    :raises ImportError: SciPy is not installed
    """
    try:
        from scipy.stats import t
    except ImportError as error:
        raise ImportError("Intervals over seeds and returns need SciPy. Run: pip install 'opd_gym[plots]'") from error
    n = len(scores)
    if n == 1 or not all(map(math.isfinite, scores)):
        return math.nan, math.nan
    mean = statistics.fmean(scores)
    half = float(t.ppf(0.975, n - 1)) * statistics.stdev(scores) / math.sqrt(n)
    return mean - half, mean + half


def welch(scores: Sequence[float], others: Sequence[float]) -> tuple[float, float, float] | None:
    """
    Whether the means of two policies differ, by Welch's t test over their seeds.

    :param scores: one of each seed
    :param others: those of what is subtracted
    :return: 95 % interval of the difference of the means and the two-sided p-value; None where that cannot be told: one
        of the two has a single seed, or all seeds of each agree
    :raises ImportError: SciPy is not installed
    """
    if min(len(scores), len(others)) < 2 or len(set(scores)) == len(set(others)) == 1:
        return None
    from scipy.stats import ttest_ind

    test = ttest_ind(scores, others, equal_var=False)
    interval = test.confidence_interval(0.95)
    return float(interval.low), float(interval.high), float(test.pvalue)
