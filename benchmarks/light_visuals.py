"""
How near the pictures of ``visuals="light"`` are to LIBERO's own.

    python benchmarks/light_visuals.py
    python benchmarks/light_visuals.py --policy libero-object-teacher --episodes 500

The first draws the same physical states in both modes and compares the pictures: SSIM and PSNR by task and camera, and
a contact sheet of the worst pairs. The second plays the same official initial states in both modes with a policy and
compares success. Everything is written as JSON (one record a picture, or an episode) and as a Markdown table.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from opd_gym.evaluation import EvaluationResult

SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")
CAMERAS = ("agentview", "robot0_eye_in_hand")
SIZES = (128, 64)
WORST = 8  # pairs on the contact sheet
AMPLIFY = 4  # the sheet shows differences so many times as large
RESAMPLES = 10_000

Record = dict[str, Any]


class Job(NamedTuple):
    """
    Pictures of one task, compared in one process.

    :param suite: LIBERO's name of the suite
    :param task_id: task
    :param states: number of official initial states
    :param moments: control steps after the reset at which pictures are compared, ascending
    :param seed: seed of the actions where the task has no scripted expert
    """

    suite: str
    task_id: int
    states: int
    moments: tuple[int, ...]
    seed: int


class Pair(NamedTuple):
    """
    The same state in both modes.

    :param record: which picture it is, and its scores
    :param exact: uint8 array of shape ``(size, size, 3)``
    :param light: the same
    """

    record: Record
    exact: np.ndarray
    light: np.ndarray


def compare(exact: np.ndarray, light: np.ndarray) -> dict[str, float]:
    """
    :param exact: uint8 array of shape ``(size, size, 3)``
    :param light: the same
    :return: ``ssim`` and mean squared error ``mse`` over all channels
    """
    from skimage.metrics import structural_similarity

    ssim = structural_similarity(exact, light, channel_axis=2, data_range=255)
    return {"ssim": float(ssim), "mse": float(np.mean((exact.astype(np.float64) - light) ** 2))}


def psnr(mse: float) -> float:
    """
    :param mse: mean squared error of 8-bit pictures
    :return: peak signal-to-noise ratio in dB, infinite for equal pictures
    """
    return 10 * math.log10(255**2 / mse) if mse > 0 else math.inf


def run_job(job: Job) -> list[Pair]:
    """
    Play a task's episodes in both modes at once and compare what they draw.

    :param job: what to compare
    :return: all pairs; pictures of all but the worst of each camera at the largest size are left out, as empty arrays
    :raises RuntimeError: the two modes came to different states
    """
    from opd_gym.envs.libero import LiberoEnv

    # Pictures are drawn below, in two sizes.
    exact, light = (
        LiberoEnv(job.suite, task_ids=[job.task_id], cameras=(), visuals=visuals) for visuals in ("exact", "light")
    )
    rng = np.random.default_rng([job.seed, job.task_id])
    pairs: list[Pair] = []
    worst: dict[str, int] = {}
    for state in range(job.states):
        for env in (exact, light):
            env.reset(options={"init_state_id": state, "horizon": job.moments[-1] + 1})
        has_expert = exact.has_expert
        over = False
        for step in range(job.moments[-1] + 1):
            if step in job.moments or over:
                if not np.array_equal(exact.simulator.data.qpos, light.simulator.data.qpos):
                    raise RuntimeError(f"{job}: the two modes differ in their physics after {step} steps.")
                for size in SIZES:
                    drawn = (env.simulator.render(CAMERAS, size) for env in (exact, light))
                    for camera, a, b in zip(CAMERAS, *drawn, strict=True):
                        record = {
                            "suite": job.suite,
                            "task_id": job.task_id,
                            "camera": camera,
                            "size": size,
                            "init_state_id": state,
                            "step": step,
                            "instruction": exact.instruction,
                            **compare(a, b),
                        }
                        pairs.append(Pair(record, a, b))
                        if size == SIZES[0]:
                            at = len(pairs) - 1
                            if record["ssim"] < pairs[worst.get(camera, at)].record["ssim"] or camera not in worst:
                                worst[camera] = at
            if over or step == job.moments[-1]:
                break
            if has_expert:
                action = exact.expert_action()
            else:
                # Down to the objects and around, so that the wrist camera sees most of the scene.
                action = np.append(rng.uniform(-1.0, 1.0, 6) * [1, 1, 1, 0.2, 0.2, 0.2] - [0, 0, 0.2, 0, 0, 0], -1.0)
            ends = [env.step(action.clip(-1.0, 1.0))[2] for env in (exact, light)]
            # A solved episode is compared where it ended.
            over = any(ends)
    exact.close()
    light.close()
    nothing = np.empty(0, dtype=np.uint8)
    kept = set(worst.values())
    return [pair if i in kept else Pair(pair.record, nothing, nothing) for i, pair in enumerate(pairs)]


def _row(name: Sequence[str], records: list[Record]) -> str:
    cells = list(name)
    for size in SIZES:
        here = [record for record in records if record["size"] == size]
        ssim = [record["ssim"] for record in here]
        cells += [f"{statistics.mean(ssim):.3f}", f"{min(ssim):.3f}"]
        cells += [f"{psnr(statistics.mean(record['mse'] for record in here)):.1f}"]
    return f"| {' | '.join(cells)} |"


def table(records: list[Record]) -> str:
    """
    :param records: one record a picture
    :return: markdown, by suite and by task
    """

    def head(first: str, columns: int) -> list[str]:
        cells = [f"{name} at {size}" for size in SIZES for name in ("SSIM", "smallest", "PSNR, dB,")]
        return [f"| {first} | {' | '.join(cells)} |", "|---" * (columns + len(cells)) + "|"]

    def group(keys: Sequence[str]) -> dict[tuple[Any, ...], list[Record]]:
        found: dict[tuple[Any, ...], list[Record]] = {}
        for record in records:
            found.setdefault(tuple(record[key] for key in keys), []).append(record)
        return found

    lines = head("suite | camera", 2)
    lines += [_row(key, of) for key, of in group(("suite", "camera")).items()]
    lines += [_row(("**all**", camera), of) for (camera,), of in group(("camera",)).items()]
    lines += ["", *head("suite | task | camera | instruction", 4)]
    for (suite, task_id, camera), of in group(("suite", "task_id", "camera")).items():
        lines.append(_row((suite, str(task_id), camera, of[0]["instruction"]), of))
    return "\n".join(lines) + "\n"


def write_sheet(path: Path, pairs: list[Pair]) -> None:
    """
    The worst pairs: exact, light, and what differs.

    :param path: PNG to write
    :param pairs: pairs with their pictures
    """
    from matplotlib.figure import Figure

    shown = sorted(pairs, key=lambda pair: pair.record["ssim"])[:WORST]
    figure = Figure(figsize=(7.5, 2.75 * len(shown)), layout="constrained")
    for axes, pair in zip(figure.subplots(len(shown), 3, squeeze=False), shown, strict=True):
        difference = np.abs(pair.exact.astype(int) - pair.light) * AMPLIFY
        pictures = (pair.exact, pair.light, difference.clip(0, 255).astype(np.uint8))
        for axis, picture in zip(axes, pictures, strict=True):
            axis.imshow(picture, interpolation="nearest")
            axis.set_axis_off()
        record = pair.record
        where = f"{record['suite']} {record['task_id']}, {record['camera']}"
        axes[0].set_title(f"{where}\nexact", fontsize="small")
        axes[1].set_title(f"state {record['init_state_id']}, step {record['step']}\nlight", fontsize="small")
        axes[2].set_title(f"SSIM {record['ssim']:.3f}\ndifference x {AMPLIFY}", fontsize="small")
    from opd_gym.files import replacing

    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=90, format="png")


def compare_pictures(args: argparse.Namespace) -> str:
    """
    Compare pictures; write ``pictures.json``, ``pictures.md`` and ``worst.png``.

    :param args: see :func:`parse_args`
    :return: markdown
    """
    from tqdm import tqdm

    from opd_gym.envs.libero.suites import tasks
    from opd_gym.files import write_atomic
    from opd_gym.versions import write_results

    jobs = []
    for suite in args.suites:
        every = range(len(tasks(suite)))
        n = min(args.tasks_per_suite, len(every))
        # Evenly spread: neighbours of the 90 tasks share a scene.
        chosen = args.task_ids if args.task_ids is not None else [every[i * len(every) // n] for i in range(n)]
        jobs += [Job(suite, i, args.states, tuple(sorted(set(args.moments))), args.seed) for i in chosen]
    records: list[Record] = []
    worst: list[Pair] = []
    context = multiprocessing.get_context("spawn")
    # A process a task: what simulators and GL have allocated is given back when it ends.
    with context.Pool(args.processes, maxtasksperchild=1) as pool, tqdm(total=len(jobs), unit="task") as bar:
        for pairs in pool.imap(run_job, jobs):
            records += [pair.record for pair in pairs]
            worst += [pair for pair in pairs if pair.exact.size]
            bar.update()
            bar.set_postfix_str(f"smallest SSIM {min(record['ssim'] for record in records):.3f}")
            write_results(args.output / "pictures.json", {"records": records})
    moments = ", ".join(map(str, jobs[0].moments))
    text = (
        f"{args.states} official initial states a task, drawn after {moments} steps (or where the episode ended) of "
        "the scripted expert, or of random actions in tasks without one. SSIM: mean, and the smallest of all pictures; "
        f"PSNR of the mean squared error.\n\n{table(records)}"
    )
    write_atomic(args.output / "pictures.md", text)
    write_sheet(args.output / "worst.png", worst)
    return text


def bootstrap(difference: np.ndarray, seed: int) -> tuple[float, float]:
    """
    :param difference: paired differences, one an episode
    :param seed: seed of the resampling
    :return: 95 % interval of their mean, from percentiles
    """
    rng = np.random.default_rng(seed)
    means = [rng.choice(difference, len(difference)).mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def play_both(args: argparse.Namespace) -> dict[str, EvaluationResult]:
    """
    Evaluate a policy in both modes, on the same official initial states.

    :param args: see :func:`parse_args`
    :return: the results by mode
    """
    from opd_gym.checkpoints import resolve_checkpoint
    from opd_gym.cli.train import default_episodes
    from opd_gym.envs.make import build_env
    from opd_gym.evaluation import evaluate_success
    from opd_gym.policies.loading import checkpoint_settings, load_policy

    path = resolve_checkpoint(args.policy)
    settings = checkpoint_settings({"checkpoint": path})
    results: dict[str, EvaluationResult] = {}
    for visuals in ("exact", "light"):
        env_kwargs: dict[str, Any] = {"visuals": visuals}
        if args.task_ids is not None:
            env_kwargs["task_ids"] = tuple(args.task_ids)
        env = build_env(args.env, n_envs=args.processes, seed=args.seed, settings=settings, **env_kwargs)
        try:
            policy = load_policy(path, env.observation_space, env.action_space)
            episodes = default_episodes(env, args.episodes, args.task_ids, "eval")
            results[visuals] = evaluate_success(policy, env, episodes)
        finally:
            env.close()
    return results


def compare_success(args: argparse.Namespace) -> str:
    """
    A policy in both modes, played or read from files; write ``policy_<name>.json`` and ``policy_<name>.md``.

    :param args: see :func:`parse_args`
    :return: markdown
    """
    from opd_gym.evaluation import EvaluationResult
    from opd_gym.files import write_atomic
    from opd_gym.versions import write_results

    if args.evaluated is None:
        results = play_both(args)
    else:
        results = {
            mode: EvaluationResult.load(path) for mode, path in zip(("exact", "light"), args.evaluated, strict=True)
        }
    exact, light = results["exact"], results["light"]
    only_exact, only_light, p_value = exact.paired(light)
    solved = np.array([(a.success, b.success) for a, b in zip(exact.episodes, light.episodes, strict=True)])
    difference = solved[:, 1].astype(float) - solved[:, 0]
    low, high = bootstrap(difference, args.seed)
    paired = {
        "both": int(solved.all(axis=1).sum()),
        "only_exact": only_exact,
        "only_light": only_light,
        "neither": int((~solved.any(axis=1)).sum()),
        "difference": float(difference.mean()),
        "interval": [low, high],
        "mcnemar_p": p_value,
    }
    text = f"{Path(args.policy).name} on {args.env}, greedy, the same official initial states in both modes.\n\n"
    text += "| visuals | success | 95 % interval | episodes |\n|---|---|---|---|\n"
    for visuals, result in results.items():
        bounds = "{:.1f} to {:.1f} %".format(*(100 * bound for bound in result.interval))
        text += f"| {visuals} | {100 * result.success_rate:.1f} % | {bounds} | {len(result.episodes)} |\n"
    text += (
        f"\nLight minus exact: {100 * difference.mean():+.1f} percentage points, 95 % interval {100 * low:+.1f} to "
        f"{100 * high:+.1f} (bootstrap over episodes). Solved in both modes {paired['both']}, in exact alone "
        f"{only_exact}, in light alone {only_light}, in neither {paired['neither']}; McNemar's exact test "
        f"p = {paired['mcnemar_p']:.3f}.\n"
    )
    name = f"policy_{Path(args.policy).name}"
    content = {visuals: result.to_dict() for visuals, result in results.items()} | {"paired": paired}
    write_results(args.output / f"{name}.json", content)
    write_atomic(args.output / f"{name}.md", text)
    return text


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """
    :param argv: arguments; None for those of the process
    :return: the arguments, checked
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suites", nargs="+", choices=SUITES, default=list(SUITES))
    parser.add_argument("--task-ids", type=int, nargs="+", help="tasks of each suite; default: see --tasks-per-suite")
    parser.add_argument("--tasks-per-suite", type=int, default=10, help="so many tasks of each suite, evenly spread")
    parser.add_argument("--states", type=int, default=5, help="official initial states a task")
    parser.add_argument("--moments", type=int, nargs="+", default=[0, 40, 80], help="control steps after the reset")
    parser.add_argument("--policy", help="checkpoint to evaluate in both modes, instead of comparing pictures")
    parser.add_argument("--env", default="LiberoObject-v0", help="with --policy: environment id")
    parser.add_argument("--episodes", type=int, default=200, help="with --policy: episodes, shared evenly by the tasks")
    parser.add_argument(
        "--evaluated",
        type=Path,
        nargs=2,
        metavar=("EXACT", "LIGHT"),
        help="with --policy: what `opd-gym eval -o` wrote for the same episodes in both modes, instead of playing them",
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / Path(__file__).stem)
    args = parser.parse_args(argv)
    if min(args.tasks_per_suite, args.states, args.episodes, args.processes) < 1 or min(args.moments) < 0:
        parser.error("--tasks-per-suite, --states, --episodes and --processes start at 1, --moments at 0.")
    return args


def main(argv: list[str] | None = None) -> None:
    """
    :param argv: arguments; None for those of the process
    """
    args = parse_args(argv)
    act: Callable[[argparse.Namespace], str] = compare_success if args.policy else compare_pictures
    print(act(args))


if __name__ == "__main__":
    main()
