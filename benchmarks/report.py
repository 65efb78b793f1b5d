"""
Tables and curves of a comparison of OPD with GRPO, from the files of its runs.

    python benchmarks/report.py libero_object
    python benchmarks/report.py robotwin_handover
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from opd_gym.cli.runs import read_progress
from opd_gym.evaluation import EvaluationResult
from opd_gym.files import write_atomic
from opd_gym.versions import VERSIONS_FILE, differences


@dataclass(frozen=True)
class Study:
    """
    What a comparison is about; ``benchmarks/<name>.sh`` runs it.

    :param env: environment id
    :param title: what is evaluated
    :param n_tasks: number of tasks
    :param labels: name of an evaluation -> its row in the table
    """

    env: str
    title: str
    n_tasks: int
    labels: dict[str, str]


STUDIES = {
    "libero_object": Study(
        "LiberoObject-v0",
        "LIBERO-Object, ten tasks",
        10,
        {
            "student": "student: SFT, one demonstration a task",
            "grpo": "student + GRPO",
            "opd": "student + OPD",
            "teacher": "teacher: SFT, 40 demonstrations a task, then DAgger",
            "teacher_exact": "the teacher on LIBERO's own pictures",
        },
    ),
    "robotwin_handover": Study(
        "RoboTwinHandoverBlock-v0",
        "RoboTwin handover_block, stand-in robot",
        1,
        {
            "student": "student: SFT, traces of 10 scenes",
            "grpo": "student + GRPO",
            "opd": "student + OPD",
            "teacher": "teacher: SFT, traces of 680 scenes",
            "student80": "another student: SFT, traces of 80 scenes",
            "grpo80": "that student + GRPO",
        },
    ),
}
# What learns: name -> (its runs, its name in pictures, its colour)
LEARNERS = {
    "opd": ("seed*/opd", "OPD", "tab:blue"),
    "grpo": ("seed*/grpo", "GRPO", "tab:orange"),
    "grpo80": ("seed*/grpo80/grpo", "GRPO from 80 scenes", "tab:brown"),
}
PAIRS = (("opd", "student"), ("opd", "grpo"), ("opd", "teacher"), ("opd", "grpo80"), ("grpo80", "student80"))


def load_runs(study: Study, folder: Path, output: Path) -> dict[str, dict[str, dict[str, list[float]]]]:
    """
    Learning curves of all seeds; their files are copied to the results.

    :param study: what is compared
    :param folder: folder of the runs
    :param output: folder of the results
    :return: learner -> seed -> column -> values
    """
    curves: dict[str, dict[str, dict[str, list[float]]]] = {}
    columns = ("time/env_steps", "time/episodes", "time/time_elapsed", "rollout/success_rate", "train/kl")
    for name, (pattern, _, _) in LEARNERS.items():
        for run in sorted(folder.glob(f"{pattern}/{study.env}_1")):
            rows = [row for row in read_progress(run) if "rollout/success_rate" in row]
            if not rows:  # no episode has come to its end
                continue
            seed = run.relative_to(folder).parts[0].removeprefix("seed")
            values = {key: [row.get(key, float("nan")) for row in rows] for key in columns}
            curves.setdefault(name, {})[seed] = values
            target = output / "runs" / f"{name}_seed{seed}"
            target.mkdir(parents=True, exist_ok=True)
            for file in (run / "config.yml", run / "command.txt", run / VERSIONS_FILE, *run.glob("progress*.csv")):
                if file.is_file():
                    shutil.copyfile(file, target / file.name)
    return curves


def load_evaluations(
    study: Study, folder: Path, output: Path, keep: bool = False
) -> dict[str, dict[str, EvaluationResult]]:
    """
    Evaluations of all policies; they are copied to the results.

    :param study: what is compared
    :param folder: folder of the runs
    :param output: folder of the results
    :param keep: with those that are there already
    :return: policy -> seed -> result; the seed is "-" where one policy is that of all seeds
    """
    target = output / "eval"
    if not keep:
        shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True, exist_ok=True)
    for path in (folder / "eval").glob("*.json"):
        shutil.copyfile(path, target / path.name)
    evaluations: dict[str, dict[str, EvaluationResult]] = {}
    for path in sorted((target if keep else folder / "eval").glob("*.json")):
        name, _, seed = path.stem.partition("_seed")
        if name in study.labels:
            evaluations.setdefault(name, {})[seed or "-"] = EvaluationResult.load(path)
    return evaluations


def pooled(results: list[EvaluationResult]) -> EvaluationResult:
    """One result of the episodes of all seeds."""
    return EvaluationResult([episode for result in results for episode in result.episodes])


def table(study: Study, evaluations: dict[str, dict[str, EvaluationResult]], curves: dict[str, Any]) -> str:
    """
    :param study: what is compared
    :param evaluations: policy -> seed -> result
    :param curves: see :func:`load_runs`
    :return: markdown
    """
    lines = [
        f"| {study.title}, held-out initial states | success | 95 % interval | each seed | episodes "
        "| training: env steps | training: wall-clock |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, label in study.labels.items():
        seeds = evaluations.get(name)
        if not seeds:
            continue
        result = pooled(list(seeds.values()))
        low, high = result.interval
        each = ", ".join(f"{100 * r.success_rate:.1f} %" for r in seeds.values()) if len(seeds) > 1 else ""
        steps = clock = ""
        if name in curves:
            steps = f"{np.mean([c['time/env_steps'][-1] for c in curves[name].values()]):,.0f}"
            clock = f"{np.mean([c['time/time_elapsed'][-1] for c in curves[name].values()]) / 60:.0f} min"
        lines.append(
            f"| {label} | **{100 * result.success_rate:.1f} %** | {100 * low:.1f} to {100 * high:.1f} % | {each} "
            f"| {len(result.episodes)} | {steps} | {clock} |"
        )
    return "\n".join(lines) + "\n"


def per_task(study: Study, evaluations: dict[str, dict[str, EvaluationResult]]) -> str:
    """
    :param study: what is compared
    :param evaluations: policy -> seed -> result
    :return: markdown, success of every task
    """
    names = [name for name in study.labels if name in evaluations]
    tasks = {name: pooled(list(evaluations[name].values())).per_task() for name in names}
    lines = ["| task | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for task in sorted(tasks[names[0]]):
        lines.append(f"| {task} | " + " | ".join(f"{100 * tasks[n][task].success_rate:.0f} %" for n in names) + " |")
    return "\n".join(lines) + "\n"


def paired(evaluations: dict[str, dict[str, EvaluationResult]]) -> str:
    """
    Policies compared in the same episodes, seed by seed.

    :param evaluations: policy -> seed -> result
    :return: markdown
    """
    lines = [
        "| the same episodes | seed | only the first solves | only the second solves | McNemar's exact p |",
        "|---|---|---|---|---|",
    ]
    for first, second in PAIRS:
        others = evaluations.get(second, {})
        for seed, result in evaluations.get(first, {}).items():
            # Students and teacher may be the same for all seeds
            other = others.get(seed, others.get("-"))
            if other is not None:
                only_first, only_second, p = result.paired(other)
                shown = f"{p:.3f}" if p >= 0.001 else f"{p:.0e}"
                lines.append(f"| {first} against {second} | {seed} | {only_first} | {only_second} | {shown} |")
    return "\n".join(lines) + "\n"


def mixed_versions(evaluations: dict[str, dict[str, EvaluationResult]]) -> str:
    """
    :param evaluations: policy -> seed -> result
    :return: markdown: evaluations that were not played with the versions of the first; empty if there are none
    """
    every = [(f"{name}, seed {seed}", r.versions) for name, seeds in evaluations.items() for seed, r in seeds.items()]
    known = [(name, found) for name, found in every if found]
    lines = []
    for name, found in known[1:]:
        changed = differences(known[0][1], found)
        if changed:
            lines.append(f"- {known[0][0]} and {name}: {', '.join(changed)}")
    return "\n".join(["Not all were evaluated with the same versions:\n", *lines]) + "\n" if lines else ""


def draw(study: Study, path: Path, evaluations: dict[str, dict[str, EvaluationResult]], curves: dict[str, Any]) -> None:
    """
    Success while training, over env steps and over wall-clock, with the held-out success before and after.

    :param study: what is compared
    :param path: PNG to write
    :param evaluations: policy -> seed -> result
    :param curves: see :func:`load_runs`
    """
    figure = Figure(figsize=(10.5, 3.9), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    panels = (("time/env_steps", 1e3, "env steps (thousands)"), ("time/time_elapsed", 60, "wall-clock (minutes)"))
    for axis, (key, unit, label) in zip(axes, panels, strict=True):
        for learner, seeds in curves.items():
            _, title, color = LEARNERS[learner]
            for number, (seed, curve) in enumerate(seeds.items()):
                x = np.array(curve[key]) / unit
                shown = title if number == 0 else None
                axis.plot(x, 100 * np.array(curve["rollout/success_rate"]), color=color, label=shown, alpha=0.9)
                result = evaluations.get(learner, {}).get(seed)
                if result is not None:
                    low, high = result.interval
                    rate = result.success_rate
                    error = [[100 * (rate - low)], [100 * (high - rate)]]
                    axis.errorbar(
                        x[-1:] * 1.02, [100 * rate], yerr=error, color=color, marker="D", capsize=3, markersize=5
                    )
        for name, color in (("teacher", "tab:green"), ("student", "tab:gray"), ("student80", "tab:brown")):
            if name in evaluations:
                rate = 100 * pooled(list(evaluations[name].values())).success_rate
                axis.axhline(rate, linestyle="--", color=color, label=f"{name}, held out: {rate:.0f} %")
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
        axis.set_ylim(-2, 102)
    axes[0].set_ylabel("success (%)")
    axes[0].legend(fontsize="small", loc="best")
    figure.suptitle(
        f"{study.title}: success while training (sampled actions, at most the last 100 episodes);\n"
        "diamonds: held out afterwards (greedy actions, 95 % interval)",
        fontsize="medium",
    )
    figure.savefig(path, dpi=120)


def main() -> None:
    """Read the runs, write results.json, results.md and curves.png."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--runs", type=Path, help="default: runs/STUDY")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/STUDY")
    parser.add_argument("--keep", action="store_true", help="the seeds of the output's earlier results, beside these")
    args = parser.parse_args()
    study = STUDIES[args.study]
    runs = args.runs or Path("runs") / args.study
    output = args.output or Path("benchmarks/results") / args.study
    output.mkdir(parents=True, exist_ok=True)
    evaluations = load_evaluations(study, runs, output, args.keep)
    if not evaluations:
        raise SystemExit(f"No evaluations in {runs / 'eval'}: run benchmarks/{args.study}.sh first.")
    curves = load_runs(study, runs, output)
    if args.keep and (output / "results.json").is_file():
        for learner, seeds in json.loads((output / "results.json").read_text(encoding="utf-8"))["curves"].items():
            curves[learner] = {**seeds, **curves.get(learner, {})}
    parts = (table(study, evaluations, curves), paired(evaluations), per_task(study, evaluations))
    text = "\n".join(filter(None, (*parts, mixed_versions(evaluations))))
    for learner, seeds in curves.items():
        for seed, curve in seeds.items():
            teachers = evaluations.get("teacher", {})
            teachers = {seed: teachers[seed]} if seed in teachers else teachers
            goal = 0.9 * pooled(list(teachers.values())).success_rate if teachers else 0.9
            reached = next((i for i, s in enumerate(curve["rollout/success_rate"]) if s >= goal), None)
            if reached is None:
                said = f"did not reach it in {curve['time/episodes'][-1] / study.n_tasks:.0f} episodes a task"
            else:
                said = (
                    f"after {curve['time/episodes'][reached] / study.n_tasks:.0f} episodes a task, "
                    f"{curve['time/env_steps'][reached]:,.0f} env steps, "
                    f"{curve['time/time_elapsed'][reached] / 60:.1f} min"
                )
            text += f"\n{LEARNERS[learner][1]}, seed {seed}: 90 % of the teacher's success while training {said}.\n"
    (output / "results.md").write_text(text, encoding="utf-8")
    summary = {
        name: {
            seed: {"success_rate": r.success_rate, "interval": r.interval, "versions": r.versions}
            for seed, r in seeds.items()
        }
        for name, seeds in evaluations.items()
    }
    # Versions are those of the evaluations, not those of this table
    write_atomic(output / "results.json", json.dumps({"success": summary, "curves": curves}, indent=1) + "\n")
    draw(study, output / "curves.png", evaluations, curves)
    print(text)


if __name__ == "__main__":
    main()
