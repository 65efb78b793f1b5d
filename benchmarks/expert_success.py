"""
How often the scripted experts succeed, task by task, in sampled (or official) initial states.

    MUJOCO_GL=egl python benchmarks/expert_success.py --suites libero_object libero_spatial --episodes 20
    MUJOCO_GL=egl python benchmarks/expert_success.py --suites libero_object --tokens --chunk 8

Writes ``<output>/expert_success*.json`` (``records``, one an episode) and a Markdown table beside it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from opd_gym.evaluation import wilson_interval
from opd_gym.versions import write_results


class Job(NamedTuple):
    """
    Episodes of one task, run in one process.

    :param suite: LIBERO's name of the suite
    :param task_id: Task
    :param episodes: Number of episodes
    :param seed: Seed of the first episode, the following ones count up
    :param chunk: Actions in a chunk that is executed without looking, 0 for closed loop
    :param tokens: Whether actions go through the 256 bins
    :param official: Whether to start in LIBERO's official initial states
    """

    suite: str
    task_id: int
    episodes: int
    seed: int
    chunk: int
    tokens: bool
    official: bool


def run_job(job: Job) -> list[dict[str, Any]]:
    """
    Run the episodes of a job.

    :param job: What to run
    :return: One record an episode
    """
    from opd_gym.actions import decode_tokens, encode_actions
    from opd_gym.envs.libero import LiberoEnv

    env = LiberoEnv(job.suite, task_ids=[job.task_id], cameras=(), init_states="eval" if job.official else "sampled")
    records = []
    for k in range(job.episodes):
        options = {"init_state_id": k % 50} if job.official else None
        _, info = env.reset(seed=job.seed + k, options=options)
        steps, success, truncated = 0, False, False
        started = time.perf_counter()
        while not (success or truncated):
            try:
                chunk = env.expert_chunk(job.chunk) if job.chunk else env.expert_action()[None]
            except NotImplementedError as error:
                records.append({**job._asdict(), "episode": k, "success": False, "steps": 0, "error": str(error)})
                break
            if job.tokens:
                chunk = decode_tokens(encode_actions(chunk))
            for action in chunk:
                _, _, success, truncated, _ = env.step(action)
                steps += 1
                if success or truncated:
                    break
        else:
            records.append(
                {
                    **job._asdict(),
                    "episode": k,
                    "instruction": info["instruction"],
                    "success": bool(success),
                    "steps": steps,
                    "seconds": round(time.perf_counter() - started, 3),
                }
            )
    env.close()
    return records


def table(records: list[dict[str, Any]]) -> str:
    """
    Markdown table of the success by task and by suite.

    :param records: One record an episode
    """
    lines = ["| suite | task | instruction | success | rate | 95 % interval | steps |", "|---|---|---|---|---|---|---|"]
    for suite in dict.fromkeys(r["suite"] for r in records):
        of_suite = [r for r in records if r["suite"] == suite]
        for task_id in [*dict.fromkeys(r["task_id"] for r in of_suite), None]:
            rows = [r for r in of_suite if task_id is None or r["task_id"] == task_id]
            solved = [r["steps"] for r in rows if r["success"]]
            low, high = wilson_interval(len(solved), len(rows))
            task = "**all**" if task_id is None else str(task_id)
            instruction = "" if task_id is None else rows[0].get("instruction", "no expert")
            steps = f"{np.mean(solved):.0f}" if solved else ""
            rate = f"{len(solved)}/{len(rows)} | {100 * len(solved) / len(rows):.0f} %"
            interval = f"{100 * low:.0f} to {100 * high:.0f} %"
            lines.append(f"| {suite} | {task} | {instruction} | {rate} | {interval} | {steps} |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suites", nargs="+", default=["libero_object", "libero_spatial", "libero_goal", "libero_10"])
    parser.add_argument("--task-ids", nargs="+", type=int, default=list(range(10)))
    parser.add_argument("--episodes", type=int, default=20, help="episodes of each task")
    parser.add_argument("--seed", type=int, default=0, help="seed of each task's first episode")
    parser.add_argument("--chunk", type=int, default=0, help="execute chunks of so many actions without looking")
    parser.add_argument("--tokens", action="store_true", help="send the actions through the 256 bins")
    parser.add_argument("--official", action="store_true", help="LIBERO's official initial states")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()

    jobs = [
        Job(suite, task_id, args.episodes, args.seed, args.chunk, args.tokens, args.official)
        for suite in args.suites
        for task_id in args.task_ids
    ]
    kind = "_official" * args.official + "_tokens" * args.tokens + (f"_chunk{args.chunk}" if args.chunk else "")
    args.output.mkdir(parents=True, exist_ok=True)
    records: list[dict[str, Any]] = []
    # A process a task: what a simulator has allocated is given back when its process ends.
    context = multiprocessing.get_context("spawn")
    with (
        context.Pool(args.processes, maxtasksperchild=1) as pool,
        tqdm(total=len(jobs), unit="task", smoothing=0) as bar,
    ):
        for result in pool.imap(run_job, jobs):
            records += result
            bar.update()
            solved = sum(r["success"] for r in records)
            bar.set_postfix_str(f"{solved}/{len(records)} solved")
            # After every task, so that nothing is lost when a long run is stopped.
            write_results(args.output / f"expert_success{kind}.json", {"records": records})
            (args.output / f"expert_success{kind}.md").write_text(table(records) + "\n")
    print(table(records))


if __name__ == "__main__":
    main()
