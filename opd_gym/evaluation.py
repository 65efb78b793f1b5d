"""Success rates and returns of a policy, over exactly the episodes that were asked for."""

from __future__ import annotations

import copy
import inspect
import json
import math
import operator
import os
import warnings
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.vec_env import VecEnv

from opd_gym.checks import check_at_least, check_fields
from opd_gym.envs.workers.pipeline import Pipeline
from opd_gym.episodes import Dispatcher, EpisodeSpec, can_announce, own_rewards, release
from opd_gym.files import write_atomic
from opd_gym.observations import obs_rows
from opd_gym.tokens import AtTemperature
from opd_gym.versions import differences, parse_versions, versions

# The evaluation of a run, in its directory
EVALUATION_FILE = "evaluation.json"
# How often an episode is played again that was lost with its worker, or in which an env raised
MAX_REPLAYS = 2
# So many times envs may raise before the first episode has ended: then it is not the episodes' fault
MAX_FALSE_STARTS = 10
# Seeds of sampled evaluation episodes start here, far from the small ones that people train with.
SAMPLED_EVAL_SEED = 1_000_000


class Predictor(Protocol):
    """What is evaluated: an algorithm or a policy of Stable-Baselines3, or anything with their ``predict``."""

    def predict(self, observation: Any, *, deterministic: bool = False) -> tuple[np.ndarray, Any]:
        """
        :param observation: batch of observations
        :param deterministic: most likely action instead of a sample
        :return: batch of actions, and a state that is not used
        """
        ...


@dataclass(frozen=True)
class EpisodeRecord:
    """
    What came of one episode.

    :param task_id: task, -1 where the environment has none
    :param init_state_id: initial state, -1 where it was sampled or the environment has none
    :param success: whether the task was solved; None where the env does not say
    :param steps: actions executed
    :param reward: sum of rewards, in ``Monitor``'s precision where there is one
    :param seed: seed of the reset, None if it was left to the environment
    :param category: what was perturbed: a category of LIBERO-Plus ("camera") or a perturbation of LIBERO-PRO ("swap");
        None for nothing
    :param perturbation: how, in LIBERO-Plus' own words
    :param difficulty: LIBERO-Plus' level, if it is known
    :param env_id: environment id, if the caller has noted it
    """

    task_id: int
    init_state_id: int
    success: bool | None
    steps: int
    reward: float
    seed: int | None = None
    category: str | None = None
    perturbation: str | None = None
    difficulty: int | None = None
    env_id: str | None = None

    @property
    def key(self) -> tuple[int, int, int | None]:
        """What says that two records are of the same episode: task, initial state and seed."""
        return self.task_id, self.init_state_id, self.seed


@dataclass(frozen=True)
class LostEpisode:
    """
    An episode without an outcome: whenever it was played its worker died, or its env raised.

    :param task_id: see :class:`EpisodeRecord`
    :param init_state_id: see there
    :param seed: see there
    :param reason: what happened the last time
    :param env_id: see there
    """

    task_id: int
    init_state_id: int
    seed: int | None
    reason: str
    env_id: str | None = None


def wilson_interval(k: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """
    Wilson's score interval of a proportion; unlike the normal approximation it holds near 0 and 1.

    :param k: number of successes
    :param n: number of trials
    :param z: quantile of the normal distribution, 1.96 for 95 %
    :return: lower and upper bound; (0, 1) without a trial
    """
    if n < 0 or not 0 <= k <= n:
        raise ValueError(f"wilson_interval expects 0 <= k <= n, got k={k}, n={n}.")
    if n == 0:
        return 0.0, 1.0
    p = k / n
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # Rounding must not push the bounds of 0/n and n/n past 0 and 1.
    low = 0.0 if k == 0 else (centre - half) / scale
    high = 1.0 if k == n else (centre + half) / scale
    return low, high


def mcnemar(only_first: int, only_second: int) -> float:
    """
    McNemar's exact test: whether two policies differ, from the episodes that only one of them solved.

    :param only_first: number of episodes that only the first solved
    :param only_second: number of episodes that only the second solved
    :return: two-sided p-value
    """
    n = only_first + only_second
    tail = sum(math.comb(n, k) for k in range(min(only_first, only_second) + 1)) / 2**n
    return min(1.0, 2 * tail)


def difference_interval(k: int, n: int, k_other: int, n_other: int) -> tuple[float, float]:
    """
    Newcombe's 95 % interval of the difference of two proportions, from their Wilson intervals.

    :param k: number of successes
    :param n: number of trials, at least 1
    :param k_other: number of successes of what is subtracted
    :param n_other: number of its trials, at least 1
    :return: lower and upper bound
    """
    (low, high), (low_other, high_other) = wilson_interval(k, n), wilson_interval(k_other, n_other)
    p, p_other = k / n, k_other / n_other
    below, above = math.hypot(p - low, high_other - p_other), math.hypot(high - p, p_other - low_other)
    return p - p_other - below, p - p_other + above


@dataclass
class EvaluationResult:
    """
    Outcome of :func:`evaluate_success`.

    :param episodes: one record an episode, in the order in which they were asked for, without those that were lost
    :param frames: pictures of the recorded episodes, by position in ``episodes``; not saved
    :param versions: what the episodes were played with, see :func:`opd_gym.versions.versions`; empty where that is not
        known
    :param lost: the episodes without an outcome; they count neither as solved nor as failed
    :param temperature: at which actions were sampled; None: they were the most likely ones
    """

    episodes: list[EpisodeRecord]
    frames: dict[int, list[np.ndarray]] = field(default_factory=dict, repr=False, compare=False)
    versions: dict[str, str] = field(default_factory=dict, repr=False, compare=False)
    lost: list[LostEpisode] = field(default_factory=list)
    temperature: float | None = None

    @property
    def n_success(self) -> int:
        """Number of solved episodes."""
        return sum(episode.success is True for episode in self.episodes)

    @property
    def n_judged(self) -> int:
        """Number of episodes of which the env says whether they were solved."""
        return sum(episode.success is not None for episode in self.episodes)

    @property
    def success_rate(self) -> float:
        """Share of solved episodes; NaN if the env says of none whether it was."""
        return self.n_success / self.n_judged if self.n_judged else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the success rate."""
        return wilson_interval(self.n_success, self.n_judged)

    @property
    def mean_reward(self) -> float:
        """Mean of the episodes' returns, as ``evaluate_policy`` of Stable-Baselines3 has it; NaN without an episode."""
        with np.errstate(invalid="ignore", over="ignore"):  # of an env whose return is infinite, or nearly
            return float(np.mean(self._returns)) if self.episodes else math.nan

    @property
    def std_reward(self) -> float:
        """Standard deviation of the episodes' returns; NaN without an episode."""
        with np.errstate(invalid="ignore", over="ignore"):
            return float(np.std(self._returns)) if self.episodes else math.nan

    @property
    def _returns(self) -> list[float]:
        return [episode.reward for episode in self.episodes]

    @property
    def has_returns(self) -> bool:
        """Whether the returns say more than the successes: a return that is the success adds nothing."""
        return any(reward not in (0.0, 1.0) for reward in self._returns)

    @property
    def env_steps(self) -> int:
        """Actions executed in all episodes."""
        return sum(episode.steps for episode in self.episodes)

    def per_task(self) -> dict[int, EvaluationResult]:
        """
        :return: the result of each task, by task id
        """
        tasks = self.per("task_id")
        return {task: tasks[task] for task in sorted(tasks)}

    def per(self, name: str) -> dict[Any, EvaluationResult]:
        """
        :param name: a field of :class:`EpisodeRecord`, for instance "category"
        :return: the result of each of its values, in the order of their first episodes; what was lost is None in fields
            that :class:`LostEpisode` does not have
        """
        found: dict[Any, list[EpisodeRecord]] = defaultdict(list)
        for episode in self.episodes:
            found[getattr(episode, name)].append(episode)
        lost: dict[Any, list[LostEpisode]] = defaultdict(list)
        for loss in self.lost:
            lost[getattr(loss, name, None)].append(loss)
        return {
            value: EvaluationResult(episodes, versions=self.versions, lost=lost[value], temperature=self.temperature)
            for value, episodes in found.items()
        }

    def paired(self, other: EvaluationResult) -> tuple[int, int, float]:
        """
        Compare with a result of the same episodes. This says more than comparing two intervals. Episodes that one of
        the two has lost are left out. Warns where the two were played with different versions.

        :param other: result of the same tasks, initial states and seeds, in the same order if one is there twice, and
            of the same env as far as both name it; that the envs were alike (horizon, pictures) is up to the caller
        :return: episodes that only this one solved, episodes that only the other solved, and the p-value of
            :func:`mcnemar`
        :raises ValueError: if the episodes are not the same, there is none, or nothing says which they are
        """
        # A result from Python may not name its env
        env_ids = {e.env_id for r in (self, other) for e in r.episodes} | {
            e.env_id for r in (self, other) for e in r.lost
        }
        named = None not in env_ids
        lost = {(e.env_id if named else None, e.task_id, e.init_state_id, e.seed) for e in (*self.lost, *other.lost)}

        def key_of(episode: EpisodeRecord) -> tuple[Any, ...]:
            return (episode.env_id if named else None, *episode.key)

        def is_lost(episode: EpisodeRecord) -> bool:
            env_id, *_, seed = key_of(episode)
            # Only the end of an episode may say which task it was
            return key_of(episode) in lost or (seed is not None and (env_id, -1, -1, seed) in lost)

        own, others = ([e for e in r.episodes if not is_lost(e)] for r in (self, other))
        keys, other_keys = ([key_of(e) for e in episodes] for episodes in (own, others))
        if len(set(keys)) == len(keys) == len(other_keys) and set(keys) == set(other_keys):
            by_key = {key_of(episode): episode for episode in others}
            others = [by_key[key] for key in keys]
        elif keys != other_keys:
            raise ValueError(
                "A paired comparison expects results of the same episodes; these differ in their envs, tasks, initial "
                f"states, seeds or number ({len(keys)} and {len(other_keys)})."
            )
        if not keys:
            raise ValueError("A paired comparison expects an episode that both have, and there is none.")
        if any(episode.success is None for episode in (*own, *others)):
            raise ValueError("A paired comparison expects to know which episodes were solved, and these do not say.")
        if any(seed is None and state < 0 for *_, state, seed in keys):
            raise ValueError(
                "A paired comparison expects episodes with an initial state or a seed; these were left to the "
                "environment, so that nothing says which belong together."
            )
        changed = differences(self.versions, other.versions)
        if changed:
            warnings.warn(
                f"These results come from different versions: {', '.join(changed)}. The same episode may not be the "
                "same there.",
                stacklevel=2,
            )
        pairs = [(a.success, b.success) for a, b in zip(own, others, strict=True)]
        only_self, only_other = pairs.count((True, False)), pairs.count((False, True))
        return only_self, only_other, mcnemar(only_self, only_other)

    def __str__(self) -> str:
        low, high = self.interval
        n, unjudged = len(self.episodes), len(self.episodes) - self.n_judged
        lost = f", {len(self.lost)} lost" if self.lost else ""
        if n and not self.n_judged:
            return f"mean return {self.mean_reward:.2f} +/- {self.std_reward:.2f} ({n} episodes{lost})"
        apart = (f", {unjudged} not judged" if unjudged else "") + lost
        count = f"{self.n_success}/{self.n_judged}"
        return f"{100 * self.success_rate:.1f} % [{100 * low:.1f}, {100 * high:.1f}] ({count}{apart})"

    def to_markdown(self, title: str = "") -> str:
        """
        :param title: heading of the first column
        :return: a table with one row a task and one for all of them; where something was perturbed, one row for all,
            for each category and for each level of difficulty, with the difference from the unperturbed episodes, if
            there are any; below the table the temperature, if actions were sampled, how many episodes were judged, if
            not all were, and the episodes that were lost
        """
        categories = self.per("category")
        if set(categories) - {None}:
            rows = [("all", self), *_category_rows(self)]
            return self._table(title or "perturbation", rows, categories.get(None)) + self._below()
        env_ids = {episode.env_id for episode in self.episodes} | {loss.env_id for loss in self.lost}
        field_name = "env_id" if len(env_ids) > 1 else "task_id"
        tasks = self.per_task() if field_name == "task_id" else self.per(field_name)
        # Of one all episodes may have been lost
        gone = {getattr(loss, field_name) for loss in self.lost} - tasks.keys()
        tasks |= {task: EvaluationResult([]) for task in gone}
        order = sorted(tasks) if field_name == "task_id" else list(tasks)
        named = [(str(task), tasks[task]) for task in order] if len(tasks) > 1 else []
        return self._table(title or "task", [*named, ("all", self)], None) + self._below()

    def _below(self) -> str:
        how = "" if self.temperature is None else f"\nActions were sampled at temperature {self.temperature:g}.\n"
        if 0 < self.n_judged < len(self.episodes):
            how += f"\nThe env says of {self.n_judged} of {len(self.episodes)} episodes whether they were solved.\n"
        if not self.lost:
            return how
        lines = [
            f"- {f'{lost.env_id}, ' if lost.env_id else ''}task {lost.task_id}, initial state {lost.init_state_id}, "
            f"seed {lost.seed}: {lost.reason.partition(chr(10))[0]}\n"
            for lost in self.lost
        ]
        return f"{how}\nEpisodes lost, which count neither as solved nor as failed: {len(lines)}\n\n{''.join(lines)}"

    @staticmethod
    def _table(title: str, named: Sequence[tuple[str, EvaluationResult]], reference: EvaluationResult | None) -> str:
        every = [episode for _, result in named for episode in result.episodes]
        judged = not every or any(episode.success is not None for episode in every)
        returns = EvaluationResult(every).has_returns
        columns = [title, *(["success", "95 % interval"] if judged else []), *(["mean return"] if returns else [])]
        columns += ["episodes", "mean steps"]
        columns += [] if reference is None else ["points against unperturbed"]
        rows = [columns, ["---"] * len(columns)]
        for name, result in named:
            low, high = result.interval
            n = len(result.episodes)
            mean_steps = result.env_steps / n if n else math.nan
            row = [name]
            shown = [f"{100 * result.success_rate:.1f} %", f"{100 * low:.1f} to {100 * high:.1f} %"]
            row += (shown if result.n_judged else ["", ""]) if judged else []
            row += [f"{result.mean_reward:.2f} +/- {result.std_reward:.2f}" if n else ""] if returns else []
            row += [str(n), f"{mean_steps:.0f}" if n else ""]
            if reference is not None:
                compared = any(episode.category is not None for episode in result.episodes) and name != "all"
                if compared and result.n_judged and reference.n_judged:
                    low, high = difference_interval(
                        result.n_success, result.n_judged, reference.n_success, reference.n_judged
                    )
                    points = 100 * (result.success_rate - reference.success_rate)
                    row.append(f"{points:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]")
                else:
                    row.append("")
            rows.append(row)
        return "".join(f"| {' | '.join(row)} |\n" for row in rows)

    def to_dict(self) -> dict[str, Any]:
        """
        :return: everything but the pictures, ready for JSON
        """
        return {
            "success_rate": self.success_rate if self.n_judged else None,
            "interval": list(self.interval),
            "n_success": self.n_success,
            "n_episodes": len(self.episodes),
            "mean_reward": self.mean_reward if self.episodes else None,
            "std_reward": self.std_reward if self.episodes else None,
            "env_steps": self.env_steps,
            "versions": self.versions,
            **({} if self.temperature is None else {"temperature": self.temperature}),
            "episodes": [asdict(episode) for episode in self.episodes],
            "lost": [asdict(episode) for episode in self.lost],
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """
        Write the result as JSON; an interrupted write leaves the old file untouched.

        :param path: file to write
        """
        write_atomic(path, json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> EvaluationResult:
        """
        :param path: file that :meth:`save` wrote
        :return: the result, without pictures
        :raises OSError: it cannot be opened
        :raises ValueError: it holds something else, or is damaged
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8-sig"))
            for kind, name in ((EpisodeRecord, "episodes"), (LostEpisode, "lost")):
                for values_of_one in values.get(name, []):
                    check_fields(kind, values_of_one)
            episodes = [EpisodeRecord(**episode) for episode in values["episodes"]]
            lost = [LostEpisode(**episode) for episode in values.get("lost", [])]
            temperature = values.get("temperature")
            return cls(
                episodes,
                versions=parse_versions(values.get("versions")),
                lost=lost,
                temperature=None if temperature is None else float(temperature),
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{os.fspath(path)} is not the result of an evaluation, as `opd-gym eval -o` writes it, or is damaged "
                f"({type(error).__name__}: {error})."
            ) from error


def _category_rows(result: EvaluationResult) -> Iterable[tuple[str, EvaluationResult]]:
    for category, episodes in result.per("category").items():
        yield category or "unperturbed", episodes
        levels = episodes.per("difficulty")
        for level in sorted(level for level in levels if level is not None):
            yield f"{category}, level {level}", levels[level]


def eval_episodes(
    task_ids: Iterable[int], n_per_task: int, init_states: str | Sequence[int] = "eval", seed: int = SAMPLED_EVAL_SEED
) -> list[EpisodeSpec]:
    """
    Reset specs for a suite of tasks.

    :param task_ids: tasks, each once
    :param n_per_task: episodes of each task
    :param init_states: "eval" for the first ``n_per_task`` official initial states (of which LIBERO's classic suites
        have 50), a sequence of their ids to go through, or "sampled" for states drawn from the seeds
        ``seed, seed + 1, ...`` (the same ones for every task)
    :param seed: first seed of the episodes
    :return: one spec an episode, task by task
    :raises ValueError: a task or an initial state is there twice, or there are too few of them
    """
    tasks = [operator.index(task) for task in task_ids]
    if len(set(tasks)) < len(tasks):
        raise ValueError(f"Expected each task once, got {tasks}: its episodes would be played again and count twice.")
    check_at_least(1, n_per_task=n_per_task)
    check_at_least(0, seed=seed)
    ids: list[int]
    if init_states == "eval":
        ids = list(range(n_per_task))
    elif init_states == "sampled":
        ids = [-1] * n_per_task
    elif isinstance(init_states, str):
        raise ValueError(f'init_states must be "eval", "sampled" or ids of official states, got {init_states!r}.')
    else:
        given = [operator.index(i) for i in init_states]
        if len(set(given)) < len(given) or len(given) < n_per_task:
            raise ValueError(f"{n_per_task} episodes a task need as many different initial states, got {given}.")
        ids = given[:n_per_task]
    return [
        EpisodeSpec(seed=seed + i, options={"task_id": task, "init_state_id": init_state})
        for task in tasks
        for i, init_state in enumerate(ids)
    ]


def _as_spec(episode: EpisodeSpec | Mapping[str, Any]) -> EpisodeSpec:
    if isinstance(episode, EpisodeSpec):
        return episode
    unknown = set(episode) - {"seed", "options"}
    if unknown:
        raise ValueError(f"A reset spec has the keys seed and options, got {sorted(unknown)} as well.")
    return EpisodeSpec(**episode)


class _Queue:
    """Hands out episodes. An env preferably gets a task it has already played: a new task costs a new simulator."""

    def __init__(self, episodes: list[EpisodeSpec], n_envs: int):
        self.episodes = episodes
        self.pending = list(range(len(episodes)))
        self.seen: list[set[Any]] = [set() for _ in range(n_envs)]

    def _task(self, index: int) -> Any:
        return (self.episodes[index].options or {}).get("task_id")

    def take(self, slot: int) -> EpisodeSpec | None:
        if not self.pending:
            return None
        others = set().union(*(seen for i, seen in enumerate(self.seen) if i != slot))
        index = min(self.pending, key=lambda i: (self._task(i) not in self.seen[slot], self._task(i) in others, i))
        self.pending.remove(index)
        self.seen[slot].add(self._task(index))
        return replace(self.episodes[index], member=index)


def evaluate_success(
    model: Predictor,
    env: VecEnv,
    episodes: Iterable[EpisodeSpec | Mapping[str, Any]],
    deterministic: bool = True,
    progress: bool = True,
    reward_threshold: float | None = None,
    record: int | Collection[int] = 0,
    temperature: float | None = None,
) -> EvaluationResult:
    """
    Play exactly the given episodes, each once, and count the solved ones. Where neither the env nor
    ``reward_threshold`` says which are solved, the result has their returns alone.

    An env goes from one episode to the next without waiting for the others, and stands still when there is none left.
    An episode that is lost with its worker (``WorkerVecEnv``), or in which an env raises, is played again. One that is
    lost whenever it is played is named in the result, and the others go on.

    :param model: algorithm or policy
    :param env: vectorised env whose envs are wrapped in ``EpisodeControl``, as :func:`opd_gym.make_vec` does it
    :param episodes: reset specs, see :class:`EpisodeSpec` and :func:`eval_episodes`
    :param deterministic: most likely actions instead of samples
    :param progress: show a progress bar
    :param reward_threshold: where ``info["is_success"]`` is missing, an episode that reaches this return is a success
    :param record: number of episodes to record, or their positions; needs an env with ``render_mode="rgb_array"``
    :param temperature: sample at this temperature, as OPD and GRPO do while they collect; ``deterministic`` does not
        count then. Samples are drawn by PyTorch: ``torch.manual_seed`` before it makes them the same
    :return: the result
    :raises RuntimeError: all episodes were lost
    :raises ValueError: the policy is recurrent, the envs are not wrapped so, there is nothing to record, or the policy
        cannot be sampled, or not at a temperature
    """
    if temperature is None and not deterministic:
        _check_samples(model)
    if hasattr(getattr(model, "policy", model), "lstm_actor"):
        raise ValueError(
            "The policy is recurrent (RecurrentPPO), and here each decision is asked for without what came before: its "
            "success would be that of a policy without memory. Use evaluate_policy of Stable-Baselines3."
        )
    specs = [_as_spec(episode) for episode in episodes]
    if not can_announce(env):
        raise ValueError(
            "evaluate_success decides which episode an env plays and needs envs wrapped in EpisodeControl. "
            "Build the env with opd_gym.make_vec, or wrap each of its envs in opd_gym.envs.wrappers.EpisodeControl."
        )
    if not isinstance(record, Collection):
        check_at_least(0, record=record)
    recorded = set(range(min(record, len(specs)))) if isinstance(record, int) else {int(i) for i in record}
    if recorded and env.render_mode != "rgb_array":
        raise ValueError(
            f'Recording needs an env with render_mode="rgb_array", this one has {env.render_mode!r}. '
            'Pass env_kwargs={"render_mode": "rgb_array"} to make_vec.'
        )
    if temperature is not None:
        model, deterministic = AtTemperature(model, temperature), False
    if not specs:
        return EvaluationResult([], temperature=temperature)

    bar = _progress_bar(len(specs), progress)
    try:
        with own_rewards(env):
            result = _Evaluation(model, env, specs, deterministic, reward_threshold, recorded, bar).run()
    finally:
        bar.close()
    result.temperature = temperature if deterministic or temperature is not None else 1.0
    if 0 < result.n_judged < len(result.episodes):
        warnings.warn(
            f"The env says of {result.n_judged} of {len(result.episodes)} episodes whether they were solved, and the "
            'success rate is of these alone. Set info["is_success"] at the end of every episode, False if it failed.',
            stacklevel=2,
        )
    return result


class _Evaluation:
    """The episodes of one call of :func:`evaluate_success`, and who plays which."""

    def __init__(
        self,
        model: Predictor,
        env: VecEnv,
        specs: list[EpisodeSpec],
        deterministic: bool,
        reward_threshold: float | None,
        recorded: set[int],
        bar: Any,
    ):
        self.model = model
        self.env = env
        self.specs = specs
        self.deterministic = deterministic
        asks_for_masks = "action_masks" in inspect.signature(model.predict).parameters  # MaskablePPO
        self.masked = asks_for_masks and env.has_attr("action_masks")
        self.reward_threshold = reward_threshold
        self.bar = bar
        self.queue = _Queue(specs, env.num_envs)
        self.pipeline = Pipeline(env)
        self.records: dict[int, EpisodeRecord] = {}
        self.frames: dict[int, list[np.ndarray]] = {index: [] for index in recorded}
        self.losses = [0] * len(specs)
        self.lost: dict[int, LostEpisode] = {}
        # Played alone: episodes that were in play when an env raised, and at last those that were to blame
        self.suspects: list[int] = []
        self.culprits: list[int] = []
        self.n_raised = 0
        self.dispatcher = Dispatcher(env, self.queue.take)
        self.steps, self.returns = [0] * env.num_envs, [0.0] * env.num_envs
        # What an env that stands still is sent
        idle = copy.deepcopy(env.action_space)  # whose random numbers are the env's, or its model's
        idle.seed(0)
        self.idle_actions = np.stack([np.asarray(idle.sample()) for _ in range(env.num_envs)])

    def run(self) -> EvaluationResult:
        try:
            result = self._run()
        except BaseException:
            with suppress(Exception):  # of an env that is broken
                release(self.env)
            raise
        release(self.env)
        return result

    def _run(self) -> EvaluationResult:
        # More than once only if an env raised, or an episode was lost after the other envs had stopped
        while self.queue.pending or self.suspects or self.culprits:
            others: list[int] = []
            alone = self.suspects or ([] if self.queue.pending else self.culprits)
            if alone:
                others, self.queue.pending = self.queue.pending, [alone.pop(0)]
            if self.frames:
                self.env.env_method("draw_end")
            try:
                self._play()
            except _EnvError as error:
                self._raised(error.error, others)
            finally:
                self.queue.pending += others
                if self.frames:
                    self.env.env_method("draw_end", False)
        lost = [self.lost[index] for index in sorted(self.lost)]
        if not self.records:
            raise RuntimeError(
                f"All {len(lost)} episodes of the evaluation were lost; the last one: {lost[-1].reason}. "
                "Play one in a DummyVecEnv to see why."
            )
        played = sorted(self.records)
        frames = {played.index(index): frames for index, frames in self.frames.items() if index in self.records}
        return EvaluationResult([self.records[index] for index in played], frames, versions(self.env), lost)

    def _raised(self, error: Exception, others: list[int]) -> None:
        """
        Find the episode in which an env raised; a vectorised env does not say which env it was.

        :param error: what it raised
        :param others: episodes that were held back
        """
        self.n_raised += 1
        if not self.records and self.n_raised >= MAX_FALSE_STARTS:
            raise error
        inner: Any = self.env.unwrapped
        if hasattr(inner, "restart_failed"):  # a WorkerVecEnv
            inner.restart_failed()
        known = {*self.records, *self.lost, *self.queue.pending, *self.suspects, *self.culprits, *others}
        in_play = [index for index in range(len(self.specs)) if index not in known]
        if len(in_play) == 1:
            self._lost(in_play[0], f"{type(error).__name__}: {error}", self.culprits)
            return
        self.suspects += in_play
        for index in self.frames.keys() & set(in_play):
            self.frames[index].clear()

    def _play(self) -> None:
        """Reset all envs and play until each stands still."""
        self.env.unwrapped._reset_options()  # as with seeds: they would win over those of the first episodes
        with _from_env():
            self.dispatcher.announce_first()
            first = self.env.reset()
        for index in range(self.env.num_envs):
            self._episode_started(index)
        in_flight = [self._act(part, obs_rows(first, slots)) for part, slots in enumerate(self.pipeline.parts)]
        while any(in_flight):
            for part, is_in_flight in enumerate(in_flight):
                if is_in_flight:
                    in_flight[part] = self._act(part, self._receive(part))

    def _episode_started(self, slot: int) -> None:
        self.dispatcher.begun(slot)
        self.steps[slot], self.returns[slot] = 0, 0.0

    def _playing(self, slot: int) -> int | None:
        """Number of the episode that an env plays."""
        spec = self.dispatcher.playing[slot]
        return None if spec is None else spec.member

    def _act(self, part: int, obs: Any) -> bool:
        """Send some envs off, and say whether there was anything to do."""
        slots = self.pipeline.parts[part]
        active = [i for i, slot in enumerate(slots) if not self.dispatcher.standing_still[slot]]
        if not active:
            return False
        for slot in slots[active]:
            index = self._playing(slot)
            if index in self.frames:
                with _from_env():
                    self.frames[index].append(_render(self.env, int(slot)))
        actions = self.idle_actions[slots]
        options: dict[str, Any] = {}
        if self.masked:
            with _from_env():
                options["action_masks"] = np.stack(self.env.env_method("action_masks", indices=slots[active].tolist()))
        actions[active], _ = self.model.predict(obs_rows(obs, active), deterministic=self.deterministic, **options)
        with _from_env():
            self.pipeline.send(part, actions)
        return True

    def _receive(self, part: int) -> Any:
        """Wait for the steps of some envs, and take note of the episodes that ended."""
        with _from_env():
            obs, rewards, dones, infos = self.pipeline.recv(part)
        for slot, reward, done, info in zip(self.pipeline.parts[part].tolist(), rewards, dones, infos, strict=True):
            index = self._playing(slot)
            if index is None:
                continue
            self.steps[slot] += int(info.get("n_executed", 1))
            self.returns[slot] += float(reward)
            if done:
                if info.get("episode_lost"):
                    # The other envs of a worker that died are not to blame
                    self.losses[index] -= not info.get("at_fault", True)
                    self._lost(index, info.get("worker_death", "its env says that it is lost"), self.queue.pending)
                else:
                    self._finished(slot, index, info)
                self._episode_started(slot)
        return obs

    def _finished(self, slot: int, index: int, info: dict[str, Any]) -> None:
        self.records[index] = _record(
            self.specs[index], info, self.steps[slot], self.returns[slot], self.reward_threshold
        )
        if index in self.frames and "final_frame" in info:  # a worker that was started again does not draw it
            self.frames[index].append(np.asarray(info["final_frame"], dtype=np.uint8))
        self.bar.update(1)
        self.bar.set_postfix_str(str(EvaluationResult([*self.records.values()])))

    def _lost(self, index: int, reason: str, waiting: list[int]) -> None:
        if index in self.frames:
            self.frames[index].clear()
        self.losses[index] += 1
        if self.losses[index] <= MAX_REPLAYS:
            waiting.append(index)
            return
        spec = self.specs[index]
        options = spec.options or {}
        self.lost[index] = LostEpisode(
            int(options.get("task_id", -1)), int(options.get("init_state_id", -1)), spec.seed, reason
        )
        self.bar.update(1)


class _EnvError(Exception):
    """An exception that came out of an env, and not out of the policy or this module."""

    def __init__(self, error: Exception):
        super().__init__(str(error))
        self.error = error


@contextmanager
def _from_env() -> Iterator[None]:
    try:
        yield
    except InterruptedError:  # see opd_gym.envs.workers.process.give_up
        raise
    except Exception as error:
        raise _EnvError(error) from error


def _progress_bar(total: int, enabled: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc="evaluating", unit="episode", disable=not enabled, leave=False)


def _record(
    spec: EpisodeSpec, info: Mapping[str, Any], steps: int, episode_return: float, reward_threshold: float | None
) -> EpisodeRecord:
    # Vectorised envs hand on rewards in single precision; Monitor keeps all of it, to six decimals
    monitored = info["episode"].get("r") if isinstance(info.get("episode"), Mapping) else None
    if isinstance(monitored, (int, float)) and abs(monitored) > 1.0:
        episode_return = float(monitored) if math.isclose(monitored, episode_return, rel_tol=1e-3) else episode_return
    success = _solved(info.get("is_success"))
    if success is None and reward_threshold is not None and not math.isnan(episode_return):
        success = episode_return >= reward_threshold or math.isclose(episode_return, reward_threshold, rel_tol=1e-6)
    # An env of the user's may mean other things by these names
    task_id, init_state_id = (
        next((n for n in (_integer(said.get(name)) for said in (info, spec.options or {})) if n is not None), -1)
        for name in ("task_id", "init_state_id")
    )
    category, perturbation = (
        text if isinstance(text, str) else None for text in (info.get("category"), info.get("perturbation"))
    )
    return EpisodeRecord(
        task_id=task_id,
        init_state_id=init_state_id,
        success=success,
        steps=steps,
        reward=episode_return,
        seed=spec.seed,
        category=category,
        perturbation=perturbation,
        difficulty=_integer(info.get("difficulty")),
    )


def _solved(value: Any) -> bool | None:
    """What an env says of success; NaN says nothing."""
    if value is None:
        return None
    if isinstance(value, (str, bytes)) or np.size(value) != 1:
        raise ValueError(f'info["is_success"] is to be True or False, got {value!r}.')
    said = np.asarray(value).item()
    return None if isinstance(said, float) and math.isnan(said) else bool(said)


def _check_samples(model: Predictor) -> None:
    """A policy of Stable-Baselines3 whose actions are no samples would be evaluated as if they were."""
    policy = getattr(model, "policy", model)
    if getattr(policy, "use_sde", False) or getattr(getattr(policy, "actor", None), "use_sde", False):
        raise ValueError(
            "State-dependent exploration draws its noise once a rollout, which no rollout is here: evaluate the most "
            "likely actions (deterministic=True)."
        )
    # MaskablePPO's policy is no ActorCriticPolicy, and SAC's samples in its actor
    samples = any(hasattr(part, "action_dist") for part in (policy, getattr(policy, "actor", None)))
    if isinstance(policy, BasePolicy) and not samples:
        raise ValueError(
            f"{type(policy).__name__} has nothing to sample, its actions are always the best ones: evaluate these "
            "(deterministic=True)."
        )


def _integer(value: Any) -> int | None:
    return int(value) if isinstance(value, (int, np.integer)) and not isinstance(value, bool) else None


def _render(env: VecEnv, slot: int) -> np.ndarray:
    return np.asarray(env.env_method("render", indices=[slot])[0], dtype=np.uint8)
