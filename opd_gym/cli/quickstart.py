"""On-policy distillation on real LIBERO in minutes: success of the student before and after, a curve and a film."""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv
from tqdm import tqdm

from opd_gym.cli.options import Quickstart, TrainArgs
from opd_gym.envs.registration import LIBERO_IDS, bare_id
from opd_gym.evaluation import EpisodeSpec, EvaluationResult, evaluate_success
from opd_gym.files import write_atomic
from opd_gym.versions import versions, write_results, write_versions

# Decisions a task after which success on LIBERO-Object passes the student's; until then it is below
DECISIONS_A_TASK = 300
# Seconds of the budget that are for starting up, the curve and the film
OVERHEAD = 45.0
# GB, measured: the learner, and a worker with ten tasks (half as much once their models are in the cache).
LEARNER_MEMORY, WORKER_MEMORY = 1.5, 1.3
MIN_TRAINING = 30.0


def available_memory() -> float | None:
    """
    :return: memory that can be had, in GB; None where the system does not say
    """
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1e6 for line in lines if line.startswith("MemAvailable")), None)


def fit_memory(n_envs: int, available: float | None) -> int:
    """
    As many workers as fit into memory.

    :param n_envs: workers wanted
    :param available: memory, in GB; None if unknown
    :return: workers to use, at least one
    """
    if available is None:
        return n_envs
    return max(1, min(n_envs, int((available - LEARNER_MEMORY) / WORKER_MEMORY)))


class TimeBudget(BaseCallback):
    """
    Ends the training when its time is up, with a progress bar over the time.

    :param seconds: time for the training
    """

    def __init__(self, seconds: float):
        super().__init__()
        self.seconds = seconds
        self.elapsed = 0.0

    def _on_training_start(self) -> None:
        self._began = time.monotonic()
        # The budget is in seconds, so the learning rate falls with the seconds that are left.
        self._schedule = self.model.lr_schedule
        self.model.lr_schedule = lambda _: self._schedule(max(0.0, 1.0 - self.elapsed / self.seconds))
        form = "{desc} |{bar}| {n:.0f}/{total:.0f} s{postfix}"
        self._bar = tqdm(total=self.seconds, desc="OPD", bar_format=form)

    def _on_step(self) -> bool:
        self.elapsed = time.monotonic() - self._began
        self._bar.update(min(self.elapsed, self.seconds) - self._bar.n)
        return self.elapsed < self.seconds

    def _on_rollout_end(self) -> None:
        success = list(self.model.ep_success_buffer or [])
        episodes = list(self.model.ep_info_buffer or [])
        shown: dict[str, Any] = {"decisions": self.model.num_timesteps, "episodes": len(episodes)}
        if success:
            shown["success"] = f"{100 * sum(success) / len(success):.0f} %"
        kl = self.model.logger.name_to_value.get("train/kl")
        if kl is not None:
            shown["kl"] = f"{kl:.3f}"
        self._bar.set_postfix(shown)

    def _on_training_end(self) -> None:
        self.model.lr_schedule = self._schedule
        self._bar.close()


def _film(before: EvaluationResult, after: EvaluationResult) -> int | None:
    """The episode to show: one that only the distilled student solves, if there is one."""
    common = sorted(set(before.frames) & set(after.frames))
    common = [i for i in common if before.episodes[i].key == after.episodes[i].key]  # none before them was lost
    better = [i for i in common if after.episodes[i].success and not before.episodes[i].success]
    solved = [i for i in common if after.episodes[i].success]
    return next(iter([*better, *solved, *common]), None)


def in_turns(episodes: list[EpisodeSpec]) -> list[EpisodeSpec]:
    """
    :param episodes: held-out episodes, task by task
    :return: the same, one of each task in turn: wherever they are cut off, all tasks are there
    """
    turns: Counter[Any] = Counter()
    numbered = []
    for spec in episodes:
        task = (spec.options or {}).get("task_id")
        numbered.append((turns[task], spec))
        turns[task] += 1
    return [spec for _, spec in sorted(numbered, key=lambda pair: pair[0])]


def fit_episodes(seconds: float, per_episode: float, n_played: int, n_tasks: int, n_episodes: int) -> int:
    """
    How many episodes to evaluate, before and after each, so that half of the time is left for the training.

    :param seconds: what is left
    :param per_episode: what one took so far
    :param n_played: how many were played
    :param n_tasks: the number is a multiple of it
    :param n_episodes: how many were asked for
    :return: at least those that were played
    """
    fitting = (seconds / 2.0 / max(per_episode, 1e-6) + n_played) / 2.0
    return max(n_played, min(n_episodes, int(fitting) // n_tasks * n_tasks))


def _too_few(minutes: float, elapsed: float, per_episode: float, n_episodes: int) -> str:
    """What is wrong with the minutes, and which would do, for someone who has just waited."""
    enough = elapsed + per_episode * n_episodes + OVERHEAD + MIN_TRAINING
    return (
        f"{minutes:g} minutes are too few here: an episode takes {per_episode:.0f} s, and {n_episodes} are played "
        f"before and after the training. Raise --minutes to {math.ceil(enough / 60.0)} at least."
    )


def run(args: Quickstart) -> int:
    """
    Evaluate the student, distil, evaluate again, and write curve, film and table.

    :param args: what to run
    :return: exit status
    """
    began = time.monotonic()
    from opd_gym.algorithms.opd import OPD
    from opd_gym.cli.train import complete_hyperparams, default_episodes, trusting
    from opd_gym.envs.make import build_env
    from opd_gym.policies.loading import checkpoint_settings
    from opd_gym.zoo.hyperparams import split_hyperparams

    overrides = [*args.hyperparams, *args.param]
    train_args = TrainArgs(
        "opd", args.env, seed=args.seed, teacher=args.teacher, student=args.student, hyperparams=overrides
    )
    values = complete_hyperparams(train_args)
    student = (values.get("policy_kwargs") or {}).get("checkpoint")
    teacher = values.get("teacher")
    if student is None or teacher is None:
        role = "student" if student is None else "teacher"
        raise ValueError(f"The zoo has no {role} for {args.env}. Pass --{role} with a checkpoint.")
    run_values, kwargs = split_hyperparams("opd", values, OPD)
    env_kwargs: dict[str, Any] = {"render_mode": "rgb_array"}
    if args.task_ids:
        env_kwargs["task_ids"] = tuple(args.task_ids)
    n_envs = args.n_envs or run_values.get("n_envs") or 1
    if bare_id(args.env) in LIBERO_IDS:
        wanted, n_envs = n_envs, fit_memory(n_envs, available_memory())
        if n_envs < wanted:
            print(f"Not enough memory for {wanted} parallel simulators: {n_envs}.", flush=True)
    settings = checkpoint_settings({"checkpoint": student}, args.trust)
    kwargs = trusting("opd", kwargs, args.trust)
    print(f"Student {Path(student).name}, teacher {teacher}, on {args.env} (LIBERO's own simulator)", flush=True)
    env = build_env(args.env, run_values, n_envs, args.seed, settings, **env_kwargs)
    try:
        model = OPD(run_values.get("policy", "VLAPolicy"), env, seed=args.seed, device=args.device, **kwargs)
        args.folder.mkdir(parents=True, exist_ok=True)
        return _distil(model, env, default_episodes(env, args.eval_episodes, suite_horizon=True), args, began)
    finally:
        env.close()


def _distil(model: Any, env: VecEnv, episodes: list[EpisodeSpec], args: Quickstart, began: float) -> int:
    from opd_gym.cli.runs import make_logger, plot_learning_curve, progress_files
    from opd_gym.cli.video import side_by_side, write_video

    folder: Path = args.folder
    episodes = in_turns(episodes)
    n_tasks = len({(spec.options or {}).get("task_id") for spec in episodes})
    recorded = range(min(n_tasks, 4))

    if env.has_attr("task_ids"):
        # Building a simulator takes seconds and happens once: it must not be counted as time of the evaluation.
        for task in tqdm(env.get_attr("task_ids", indices=0)[0], desc="starting simulators", unit="task", leave=False):
            env.env_method("reset", options={"task_id": int(task)})
    print(f"1/3  Success of the student before: {len(episodes)} held-out episodes", flush=True)
    first = episodes[: n_tasks * math.ceil(2 * env.num_envs / n_tasks)]
    start = time.monotonic()
    before = evaluate_success(model, env, first, record=recorded)
    now = time.monotonic()
    per_episode = (now - start) / len(first)
    left = 60.0 * args.minutes - (now - began) - OVERHEAD
    n_episodes = fit_episodes(left, per_episode, len(first), n_tasks, len(episodes))
    # The evaluation afterwards takes no longer: episodes that succeed are shorter.
    seconds = left - per_episode * (2 * n_episodes - len(first))
    if seconds < MIN_TRAINING:
        raise ValueError(_too_few(args.minutes, now - began, per_episode, len(first)))
    if n_episodes < len(episodes):
        print(f"     An episode takes {per_episode:.0f} s here: {n_episodes} of {len(episodes)}, for time to train")
    episodes = episodes[:n_episodes]
    if rest := episodes[len(first) :]:
        more = evaluate_success(model, env, rest)
        before = replace(before, episodes=[*before.episodes, *more.episodes], lost=[*before.lost, *more.lost])
    print(f"     {before}", flush=True)

    print(f"2/3  On-policy distillation: {seconds / 60:.1f} minutes", flush=True)
    for old in progress_files(folder):
        old.unlink()
    model.set_logger(make_logger(folder))
    budget = TimeBudget(seconds)
    # The budget ends it.
    model.learn(10**9, callback=budget)
    few = ""
    if bare_id(args.env) in LIBERO_IDS and model.num_timesteps < DECISIONS_A_TASK * n_tasks:
        few = (
            f"Only {model.num_timesteps} decisions: success falls before it rises, and needs some "
            f"{DECISIONS_A_TASK * n_tasks} to be above its start. Raise --minutes.\n"
        )
        print(f"     {few}", end="", flush=True)
    model.save(folder / "model.zip")
    if hasattr(model.policy, "save_checkpoint"):
        model.policy.save_checkpoint(folder / "policy")
        write_versions(folder / "policy", versions(env))

    print(f"3/3  Success of the student after: the same {len(episodes)} episodes", flush=True)
    after = evaluate_success(model, env, episodes, record=recorded)
    print(f"     {after}", flush=True)

    plot_learning_curve(
        folder,
        title=f"OPD on {args.env}: success while training (sampled states and actions)",
        references={"held out, before": before.success_rate, "held out, after": after.success_rate},
    )
    shown = _film(before, after)
    if shown is not None:
        frames = side_by_side(before.frames[shown], after.frames[shown], ("before", "after OPD"))
        for suffix in (".mp4", ".gif"):
            write_video(folder / f"before_after{suffix}", frames)
    total = time.monotonic() - began
    env_steps = int(getattr(model, "num_env_steps", model.num_timesteps))
    results = {
        "env": args.env,
        "before": before.to_dict(),
        "after": after.to_dict(),
        "train_env_steps": env_steps,
        "train_decisions": model.num_timesteps,
        "train_seconds": budget.elapsed,
        "total_seconds": total,
    }
    write_results(folder / "results.json", results, env)
    named = f" (tasks {', '.join(map(str, args.task_ids))})" if args.task_ids else ""
    table = (
        f"| {args.env}{named}, {len(episodes)} held-out episodes | success (95 % interval) |\n|---|---|\n"
        f"| student before | {before} |\n| after OPD | {after} |\n\n"
        f"{model.num_timesteps} decisions of training ({env_steps} env steps) in {budget.elapsed / 60:.1f} minutes; "
        f"{total / 60:.1f} minutes in all.\n{few}"
    )
    write_atomic(folder / "results.md", table)
    print(f"\n{table}\nResults, curve and film: {folder}/", flush=True)
    return 0
