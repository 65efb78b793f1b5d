"""
How fast the RoboTwin envs are, beside the vectorised env of RoboTwin's own runtime.

    python benchmarks/robotwin_throughput.py

The same task, robot, seeds, camera, shader and chunks of 25 actions, in one run: RoboTwin's ``VectorEnv`` (threads of
one process) and ``opd_gym.make_vec`` take turns (A B, A B), so that a machine that slows down slows both. A decision
is a chunk carried out and an observation with a picture; its actions go on a random walk of small steps around the
robot's home. RoboTwin's env asks for ray tracing, which needs a GPU: it gets the rasteriser and the replacements that
ours has, so this compares the stepping. Writes ``results.json``.

Speed alone: nothing here is a success rate.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from opd_gym.versions import write_results

CHUNK = 25
EMBODIMENT = ("piper", "piper", 0.6)


def chunks(n_envs: int, decisions: int, seed: int) -> np.ndarray:
    """
    :return: joint positions, ``(decisions, n_envs, 25, 14)``
    """
    rng = np.random.default_rng(seed)
    steps = rng.normal(0.0, 0.004, (decisions * CHUNK, n_envs, 14))
    walk = np.cumsum(steps, axis=0).clip(-0.3, 0.3)
    walk[..., 6::7] = 1.0  # grippers open
    return np.ascontiguousarray(walk.reshape(decisions, CHUNK, n_envs, 14).swapaxes(1, 2))


def _timed(env: Any, actions: np.ndarray, began: float) -> dict[str, float]:
    """Seconds from ``began`` to the end of the first decision, and the speed of those after it."""
    env.step(actions[0])
    started = time.perf_counter() - began
    began = time.perf_counter()
    for chunk in actions[1:]:
        env.step(chunk)
    seconds = time.perf_counter() - began
    return {"start": started, "decisions_per_second": (len(actions) - 1) * actions.shape[1] / seconds}


def measure_runtime(task: str, n_envs: int, actions: np.ndarray) -> dict[str, float]:
    """
    :return: seconds of the start with the first reset, and decisions per second, of RoboTwin's own vectorised env
    """
    from opd_gym.envs.robotwin.runtime import find_assets, import_robotwin, quiet, use_assets

    began = time.perf_counter()
    root = find_assets()
    use_assets(root)
    sapien = import_robotwin()
    sapien.render.set_camera_shader_dir("default")
    for name in ("shader_dir", "samples_per_pixel", "path_depth", "denoiser"):
        prefix = "set_camera_" if name == "shader_dir" else "set_ray_tracing_"
        setattr(sapien.render, prefix + name, lambda value: None)
    with quiet(), tempfile.TemporaryDirectory(prefix="assets-") as folder:
        os.environ["ROBOTWIN_ASSETS_ROOT"] = folder
        link_assets(root, Path(folder))
        from robotwin.config import load_task_config
        from robotwin.envs.vector_env import VectorEnv

        config = load_task_config("demo_clean")
        config.update(task_name=task, embodiment=list(EMBODIMENT), planner_backend="mplib", step_lim=10**9)
        config["camera"]["collect_wrist_camera"] = False
        env = VectorEnv(config, n_envs, env_seeds=list(range(n_envs)))
        env.reset(env_seeds=list(range(n_envs)))
        return _timed(env, actions, began)


def link_assets(root: Path, folder: Path) -> None:
    """
    The runtime's check of the assets looks for the folder of one robot, whatever the robot: it is made beside links.

    :param root: folder that contains ``assets``
    :param folder: folder that gets the same, in links
    """
    robots = folder / "assets" / "embodiments"
    robots.mkdir(parents=True)
    for path in [*(root / "assets").iterdir(), *(root / "assets" / "embodiments").iterdir()]:
        if path.name != "embodiments":
            (folder / path.relative_to(root)).symlink_to(path)
    (robots / "aloha-agilex").mkdir(exist_ok=True)


def measure_ours(task: str, n_envs: int, actions: np.ndarray) -> dict[str, float]:
    """
    :return: the same of :func:`opd_gym.make_vec`
    """
    import opd_gym
    from opd_gym.actions import to_actions
    from opd_gym.envs.registration import ROBOTWIN_IDS

    began = time.perf_counter()
    (env_id,) = (key for key, kwargs in ROBOTWIN_IDS.items() if kwargs["task"] == task)
    env_kwargs = {"embodiment": EMBODIMENT, "horizon": 10**9, "train_seeds": range(n_envs)}
    env = opd_gym.make_vec(env_id, n_envs, seed=0, env_kwargs=env_kwargs, tokens=False)
    env.reset()
    measured = _timed(env, to_actions(actions), began)
    env.close()
    return measured


MODES = {"runtime": measure_runtime, "opd_gym": measure_ours}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="stack_blocks_two")
    parser.add_argument("--n-envs", type=int, default=2)
    parser.add_argument("--decisions", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/robotwin_throughput"))
    parser.add_argument("--child", choices=MODES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        warnings.simplefilter("ignore")
        measured = MODES[args.child](args.task, args.n_envs, chunks(args.n_envs, args.decisions + 1, seed=0))
        # Not through SAPIEN's destructors, which Python would run in any order
        print(json.dumps(measured), flush=True)
        os._exit(0)
    records: list[dict[str, Any]] = []
    for repeat in range(args.repeats):
        for mode in MODES:
            command = [sys.executable, __file__, "--child", mode, "--task", args.task]
            command += ["--n-envs", str(args.n_envs), "--decisions", str(args.decisions)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                raise SystemExit(f"{mode} failed:\n{done.stderr[-3000:]}")
            record = {"mode": mode, "repeat": repeat, **json.loads(done.stdout.splitlines()[-1])}
            records.append(record)
            print(record, flush=True)
    about = {"task": args.task, "n_envs": args.n_envs, "decisions": args.decisions, "cores": os.cpu_count()}
    about |= {"python": platform.python_version(), "shader": "default", "robot": "see assets"}
    write_results(args.output / "results.json", {"about": about, "records": records})
    for mode in MODES:
        speeds = [record["decisions_per_second"] for record in records if record["mode"] == mode]
        print(f"{mode}: {np.median(speeds):.2f} decisions/s (median of {len(speeds)})")


if __name__ == "__main__":
    main()
