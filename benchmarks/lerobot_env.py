"""
LIBERO in LeRobot: its own env against `--env.type=opd_libero` of this library, which gives the same observations.

    python benchmarks/lerobot_env.py --lerobot-python PYTHON --python PYTHON
    python benchmarks/lerobot_env.py --quick    # sees that it runs; the numbers mean nothing

Each Python needs LeRobot: the first with LeRobot's LIBERO, the other with this library. All envs play the same random
actions in turns (A B C D, A B C D), each in a process of its own, and ratios are taken within a turn. Steps that are
not drawn repeat the last pictures: a policy that emits chunks of ten actions looks at every tenth (``draw_every``).
Writes ``results.json`` and ``results.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SUITE, TASK = "libero_object", 3
# Visuals and draw_every of ours; the first is what the others are compared with
ENVS: dict[str, tuple[str, int] | None] = {
    "LeRobot": None,
    "opd_libero, exact": ("exact", 1),
    "opd_libero, light": ("light", 1),
    "opd_libero, light, every 10th drawn": ("light", 10),
}


def play(name: str, size: int, n_steps: int) -> dict[str, Any]:
    """
    :param name: key of ``ENVS``
    :param size: height and width of both pictures
    :param n_steps: number of env steps
    :return: seconds, CPU seconds, and what the first observation is like
    """
    import numpy as np

    ours = ENVS[name]
    env: Any
    if ours is None:
        from lerobot.envs.libero import LiberoEnv
        from libero.libero import benchmark

        suite = benchmark.get_benchmark_dict()[SUITE]()
        env = LiberoEnv(
            suite, TASK, SUITE, obs_type="pixels_agent_pos", observation_width=size, observation_height=size
        )
    else:
        from opd_gym.integrations.lerobot.env import LeRobotLiberoEnv

        env = LeRobotLiberoEnv(SUITE, TASK, image_size=size, visuals=ours[0], draw_every=ours[1])
    first, _ = env.reset(seed=1000)
    actions = np.random.default_rng(0).uniform(-1, 1, (n_steps, 7)).astype(np.float32)
    for action in actions[:10]:  # compiles
        env.step(action)
    cpu, began = time.process_time(), time.perf_counter()
    for action in actions:
        env.step(action)
    return {
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - cpu,
        "task": env.task_description,
        "shapes": {key: list(np.shape(picture)) for key, picture in first["pixels"].items()},
        "position": np.round(first["robot_state"]["eef"]["pos"], 3).tolist(),
    }


def to_markdown(results: dict[str, Any]) -> str:
    """
    :param results: what :func:`main` writes as JSON
    :return: a table
    """
    from libero_throughput import spread

    from opd_gym.cli.plan import table

    records = results["records"]
    base = {record["repeat"]: record for record in records if record["what"] == next(iter(ENVS))}
    rows = []
    for name in ENVS:
        found = [record for record in records if record["what"] == name]
        row = [name]
        for key in ("cpu_seconds", "seconds"):
            row.append(spread([r["n_steps"] / r[key] for r in found]))
            rates = [(r["n_steps"] / r[key]) / (base[r["repeat"]]["n_steps"] / base[r["repeat"]][key]) for r in found]
            row.append(spread(rates))
        rows.append(row)
    where = results["machine"]
    head = ("env", "env steps a CPU second", "x LeRobot's", "env steps a second", "x LeRobot's")
    lines = [
        f"{where['cpu']}, {where['cores']} cores; opd_gym at {where['commit']}; load before the run "
        f"{where['load_before']}. {results['note']}",
        "",
        f"Two cameras of {results['size']} x {results['size']}, one env in one process. Median (smallest to largest) "
        "of the turns; ratios are taken within a turn.",
        "",
        table(head, *rows),
        "",
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lerobot-python", default=sys.executable, help="Python that has LeRobot and its LIBERO")
    parser.add_argument("--python", default=sys.executable, help="Python that has LeRobot and this library")
    parser.add_argument("--repeats", type=int, default=3, help="turns")
    parser.add_argument("--size", type=int, default=128, help="height and width of both pictures")
    parser.add_argument("--n-steps", type=int, default=40, help="env steps a turn, six times as many of light ones")
    parser.add_argument("--quick", action="store_true", help="one short turn")
    parser.add_argument("--note", default="", help="for the results: what else the machine did, for instance")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "benchmarks" / "results" / "lerobot_env")
    parser.add_argument("--play", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if not args.play and not 1 <= args.n_steps <= 45:
        parser.error("--n-steps has to be 1 to 45: an episode has 280 steps, of which 10 are not counted")
    if args.play:
        print(json.dumps(play(args.play, args.size, args.n_steps)))
        return
    from libero_throughput import machine, write_both

    repeats, n_steps = (1, 4) if args.quick else (args.repeats, args.n_steps)
    results: dict[str, Any] = {"machine": machine(), "note": args.note, "size": args.size, "records": []}
    env = {**os.environ, "MUJOCO_GL": os.environ.get("MUJOCO_GL", "egl"), "OMP_NUM_THREADS": "1"}
    for repeat in range(repeats):
        for name, ours in ENVS.items():
            # The fast ones take more steps, or they would be measured for a moment only
            n = n_steps * (6 if ours is not None and ours[0] == "light" else 1)
            python = args.lerobot_python if ours is None else args.python
            words = ["--play", name, "--size", str(args.size), "--n-steps", str(n)]
            done = subprocess.run([python, __file__, *words], capture_output=True, text=True, env=env)
            if done.returncode != 0:
                raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
            found = json.loads(done.stdout.splitlines()[-1])
            results["records"].append({"what": name, "repeat": repeat, "n_steps": n, **found})
            print(json.dumps(results["records"][-1]), flush=True)
    for key in ("task", "shapes", "position"):
        if len({json.dumps(record[key]) for record in results["records"]}) > 1:
            raise SystemExit(f"The envs differ in {key}: {results['records']}")
    write_both(args.output, results, to_markdown(results))


if __name__ == "__main__":
    main()
