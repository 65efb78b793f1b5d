"""
Ours against stock LIBERO over whole episodes: positions and velocities bit by bit after every control step, pictures
pixel by pixel wherever one is drawn.

    MUJOCO_GL=egl python benchmarks/libero_exactness.py --processes 2                # all 130 tasks, about an hour
    MUJOCO_GL=egl python benchmarks/libero_exactness.py --suites libero_object -o /tmp/exactness

Writes ``results.json`` (one record a task) and ``results.md``; tasks that are there already are not played again.
``tests/test_exactness.py`` plays a sample of them in CI.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")
CAMERAS = ("agentview", "robot0_eye_in_hand")
SIZE = 128
N_PICTURES = 8
SEED = 3  # of the fixtures' places

# compare() runs without PyTorch, so that any Python with a simulator can be tried: what is imported late needs it.


def stock_env(bddl_file: Path) -> Any:
    """
    :param bddl_file: a task's file
    :return: stock LIBERO's env, which draws only when it is asked to
    """
    from libero.libero.envs.env_wrapper import ControlEnv

    return ControlEnv(str(bddl_file), use_camera_obs=False, has_offscreen_renderer=True, has_renderer=False)


def stock_picture(stock: Any, camera: str) -> np.ndarray:
    """
    :param stock: see :func:`stock_env`
    :param camera: MuJoCo's name of a camera
    :return: its picture, upright, uint8 of shape ``(SIZE, SIZE, 3)``
    """
    # robosuite draws in whatever GL context is current
    stock.env.sim._render_context_offscreen.gl_ctx.make_current()
    return stock.env.sim.render(width=SIZE, height=SIZE, camera_name=camera)[::-1]


def episode_actions(n: int, seed: int) -> np.ndarray:
    """
    Smooth pushes into the scene with turns and grasps, so that things are touched and fall over.

    :param n: number of actions
    :param seed: of the actions
    :return: float64 array of shape ``(n, 7)``
    """
    rng = np.random.default_rng(seed)
    knots = rng.uniform(-1.0, 1.0, (n // 20 + 2, 6)) * [1, 1, 1, 0.3, 0.3, 0.3] - [0, 0, 0.35, 0, 0, 0]
    position = np.linspace(0, len(knots) - 1.001, n)
    low = position.astype(int)
    arm = knots[low] + (position - low)[:, None] * (knots[low + 1] - knots[low])
    grip = np.where(rng.random(n // 20 + 2) < 0.5, -1.0, 1.0)[low]
    return np.concatenate([arm, grip[:, None]], axis=1).clip(-1, 1)


def compare(suite: str, task_id: int) -> dict[str, Any]:
    """
    Play one episode from an official initial state in both, to the suite's horizon.

    :param suite: LIBERO's name of the suite
    :param task_id: number of the task
    :return: ``steps`` that agree bit by bit, of ``horizon``; ``difference`` of the first that does not, None if all do;
        ``pictures`` compared and ``different_pixels`` in them; ``moved``: how far anything but the robot went, in its
        own coordinates
    """
    from opd_gym.envs.libero.rendering import gl_renderer
    from opd_gym.envs.libero.simulator import N_SETTLE, NO_OP, Simulator, _global_seed
    from opd_gym.envs.libero.suites import horizon, load_init_states, tasks

    task = tasks(suite)[task_id]
    init_state_id = task_id % 5
    init_state = load_init_states(task)[init_state_id]
    stock, ours = stock_env(task.bddl_file), Simulator(task)
    n = horizon(suite)
    record: dict[str, Any] = {
        "suite": suite, "task_id": task_id, "init_state_id": init_state_id, "horizon": n, "steps": 0,
        "difference": None, "pictures": 0, "different_pixels": 0, "gl_renderer": None,
    }  # fmt: skip
    try:
        # Reloading the model at a reset appends to this list what is there already, so that each reset draws more than
        # the one before for tasks with doors and knobs. Ours draws as the first does.
        stock.env.object_property_initializers.clear()
        with _global_seed(SEED):
            stock.reset()
        stock.set_init_state(init_state)
        for _ in range(N_SETTLE):
            stock.step(NO_OP)
        ours.reset(SEED, init_state)
        if not np.array_equal(stock.env.sim.model._model.body_pos, ours.model.body_pos):
            return {**record, "difference": "the fixtures stand elsewhere"}
        shown = set(np.linspace(0, n - 1, N_PICTURES).astype(int).tolist())
        for i, action in enumerate(episode_actions(n, task_id)):
            stock.step(action)
            ours.step(action)
            data = stock.env.sim.data
            for name in ("qpos", "qvel"):
                gap = np.abs(getattr(ours.data, name) - getattr(data, name)).max()
                if not np.array_equal(getattr(ours.data, name), getattr(data, name)):
                    return {**record, "difference": f"{name} differs by {gap:.1e} after step {i}"}
            record["steps"] += 1
            if i in shown:
                for camera, picture in zip(CAMERAS, ours.render(CAMERAS, SIZE), strict=True):
                    record["pictures"] += 1
                    record["different_pixels"] += int((picture != stock_picture(stock, camera)).any(axis=-1).sum())
        record["gl_renderer"] = gl_renderer()
        record["moved"] = round(float(np.abs(ours.data.qpos[9:] - init_state[10 : 1 + ours.model.nq]).max()), 4)
        return record
    finally:
        ours.close()
        stock.close()


def _compare(job: tuple[str, int]) -> dict[str, Any]:
    return compare(*job)


def table(records: list[dict[str, Any]]) -> str:
    """
    :param records: one a task
    :return: Markdown, one row a suite and one for each task that is not equal
    """
    lines = [
        "| suite | tasks | equal bit by bit and pixel by pixel | control steps | pictures |",
        "|---|---|---|---|---|",
    ]
    for suite in dict.fromkeys(r["suite"] for r in records):
        rows = [r for r in records if r["suite"] == suite]
        equal = [r for r in rows if r["difference"] is None and not r["different_pixels"]]
        steps, pictures = (sum(r[key] for r in rows) for key in ("steps", "pictures"))
        lines.append(f"| {suite} | {len(rows)} | {len(equal)} | {steps:,} | {pictures:,} |")
    for r in records:
        if r["difference"] is not None or r["different_pixels"]:
            why = r["difference"] or f"{r['different_pixels']} pixels of {r['pictures']} pictures differ"
            lines.append(f"\n{r['suite']}, task {r['task_id']}: {why}.")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suites", nargs="+", default=list(SUITES), choices=SUITES)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent / "results" / "libero_exactness")
    args = parser.parse_args()

    from opd_gym.envs.libero.suites import N_TASKS
    from opd_gym.files import write_atomic
    from opd_gym.versions import write_results

    path = args.output / "results.json"
    records: list[dict[str, Any]] = json.loads(path.read_text())["tasks"] if path.exists() else []
    done = {(r["suite"], r["task_id"]) for r in records}
    jobs = [(suite, task) for suite in args.suites for task in range(N_TASKS[suite]) if (suite, task) not in done]
    # A process a task: what a simulator has allocated is given back when its process ends
    context = multiprocessing.get_context("spawn")
    with context.Pool(args.processes, maxtasksperchild=1) as pool:
        for record in tqdm(pool.imap_unordered(_compare, jobs), total=len(jobs), unit="task"):
            records.append(record)
            records.sort(key=lambda r: (SUITES.index(r["suite"]), r["task_id"]))
            write_results(path, {"tasks": records})
            write_atomic(args.output / "results.md", table(records))
    print(table(records))


if __name__ == "__main__":
    main()
