"""
What a second process gives, and what the machinery for it costs: simulators in workers and in Ray's actors, a teacher
in Ray's actors, learners under torchrun.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --quick    # sees that it runs; the numbers mean nothing

All that is compared runs in turns (A B C, A B C) and its ratios are taken within a turn, so that what slows the machine
for a while slows all of it. CPU time, of all processes together, stands beside wall-clock: on a machine of two cores
that does something else as well, a second process gets less than a core. Writes ``results.json`` and ``results.md``.
Needs psutil; what is hosted by Ray is left out where Ray is not installed.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import psutil
import torch as th
from gpu import StandIn
from gymnasium import spaces
from libero_throughput import machine, spread, write_both
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from opd_gym import OPD, ranks
from opd_gym.algorithms.remote_teacher import RemoteTeacher
from opd_gym.algorithms.teachers import Teacher, make_teacher
from opd_gym.cli.plan import table
from opd_gym.envs.make import make_env_fn
from opd_gym.envs.workers.ray_vec_env import RayVecEnv
from opd_gym.envs.workers.vec_env import WorkerVecEnv
from opd_gym.files import write_atomic
from opd_gym.policies.vla import VLAPolicy

ROOT = Path(__file__).resolve().parents[1]
CAMERAS = ["agentview", "wrist"]
IMAGE_SIZE = 64
# How envs are hosted; the first is what the others are compared with. Another engine is one more row: a function from
# the functions that build the envs to a vectorised env
ENGINES: dict[str, Callable[[list[Callable[[], gym.Env]]], VecEnv]] = {
    "in this process": DummyVecEnv,
    "1 worker": functools.partial(WorkerVecEnv, n_workers=1),
    "2 workers": functools.partial(WorkerVecEnv, n_workers=2),
}
RAY_ENGINES: dict[str, Callable[[list[Callable[[], gym.Env]]], VecEnv]] = {
    "1 Ray actor": functools.partial(RayVecEnv, n_workers=1),
    "2 Ray actors": functools.partial(RayVecEnv, n_workers=2),
}
# How many actors share the teacher's work, likewise
TEACHERS = {"in this process": 0, "1 Ray actor": 1, "2 Ray actors": 2}
# Observations that the teacher is asked about at once, and how often in a turn
ASKED, REQUESTS = 32, 8
# Whose learners are compared, likewise: the words before the script. Each process does the same work
LEARNERS: dict[str, list[str]] = {
    "1 process": [],
    "2 processes": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
}
# Decisions of each learner in an iteration, its gradient steps, and iterations that are measured
N_ENVS, N_STEPS, UPDATES, ITERATIONS = 2, 8, 4, 4


def stand_in() -> Callable[[], gym.Env]:
    """
    :return: a function that builds an env with LIBERO's spaces and no simulator, with chunks of 8 actions as tokens
    """
    if "ScalingStandIn-v0" not in gym.registry:
        gym.register("ScalingStandIn-v0", StandIn)
    kwargs = {"image_size": IMAGE_SIZE, "cameras": CAMERAS, "horizon": 10_000}
    return make_env_fn("ScalingStandIn-v0", kwargs, chunk_size=8, tokens=True)


def libero() -> Callable[[], gym.Env]:
    """
    :return: a function that builds a light LIBERO env, as the zoo trains on it
    """
    kwargs = {"image_size": IMAGE_SIZE, "visuals": "light", "task_ids": [0], "horizon": 10_000}
    return make_env_fn("LiberoObject-v0", kwargs)


KINDS: dict[str, Callable[[], Callable[[], gym.Env]]] = {"LIBERO, light": libero, "no simulator": stand_in}


def _cpu_of_all(with_ray: bool = False) -> float:
    """
    :param with_ray: whether Ray's processes count, which are there beside all engines
    :return: CPU seconds of this process and those that it has started
    """
    this = psutil.Process()
    processes = [this]
    for child in this.children():
        with suppress(psutil.NoSuchProcess):
            # A worker's later arguments are where it may import from, which Ray adds to
            if with_ray or "/ray/" not in " ".join(child.cmdline()[:3]):
                processes += [child, *child.children(recursive=True)]
    times = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            times.append(process.cpu_times())
    return sum(t.user + t.system for t in times)


def has_ray() -> bool:
    """
    Connect to a Ray cluster of this machine alone.

    :return: whether Ray is installed
    """
    if importlib.util.find_spec("ray") is None:
        return False
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(num_cpus=8, include_dashboard=False, object_store_memory=200 * 2**20, log_to_driver=False)
    return True


@contextmanager
def measured(found: dict[str, float], cpu: Callable[[], float]) -> Iterator[None]:
    """Add wall-clock and CPU time of the block."""
    cpu_before, began = cpu(), time.perf_counter()
    yield
    found["seconds"] = found.get("seconds", 0.0) + time.perf_counter() - began
    found["cpu_seconds"] = found.get("cpu_seconds", 0.0) + cpu() - cpu_before


def envs(
    engines: dict[str, Callable[[list[Callable[[], gym.Env]]], VecEnv]],
    kind: str,
    n_envs: int,
    n_steps: int,
    repeats: int,
) -> list[dict[str, Any]]:
    """
    The same actions in the same episodes, by each engine in turn.

    :param engines: ``ENGINES``, and others
    :param kind: key of ``KINDS``
    :param n_envs: number of envs
    :param n_steps: decisions of each env in a turn
    :param repeats: number of turns
    :return: one record a turn and engine
    """
    hosted = {name: make([KINDS[kind]()] * n_envs) for name, make in engines.items()}
    actions = np.random.default_rng(0).integers(96, 160, (n_steps, n_envs, 56))
    records = []
    try:
        for repeat in range(-1, repeats):
            seen = []
            for name, env in hosted.items():
                env.seed(0)
                env.reset()
                found: dict[str, float] = {}
                with measured(found, functools.partial(_cpu_of_all, "Ray" in name)):
                    for action in actions:
                        obs = env.step(action)[0]
                seen.append(obs)
                if repeat >= 0:  # the first turn loads and compiles
                    decisions = n_envs * n_steps
                    records.append({"kind": kind, "what": name, "repeat": repeat, "decisions": decisions, **found})
            for obs in seen[1:]:
                for key, value in obs.items():
                    np.testing.assert_array_equal(value, seen[0][key])
    finally:
        for env in hosted.values():
            env.close()
    return records


def teachers(repeats: int) -> list[dict[str, Any]]:
    """
    The same observations labelled by each in turn. All requests of a turn are sent before the first answer is awaited,
    to the actors by turns.

    :param repeats: number of turns
    :return: one record a turn and number of actors
    """
    env = DummyVecEnv([stand_in()] * ASKED)
    student = VLAPolicy(env.observation_space, env.action_space, lambda _: 0.0, trainable=False)
    observations = [obs_as_tensor(env.reset(), "cpu") for _ in range(REQUESTS)]
    labels = th.empty(ASKED, 0)
    records = []
    with tempfile.TemporaryDirectory() as folder:
        student.save_checkpoint(folder)
        asked: dict[str, list[Teacher]] = {"in this process": [make_teacher(folder, env, student)]}
        for name, n in TEACHERS.items():
            if n:
                # Another batch size is another actor
                asked[name] = [
                    RemoteTeacher(folder, env, student, ray={"max_batch_size": 1024 * n + i}) for i in range(n)
                ]
        for repeat in range(-1, repeats):
            seen = []
            for name, by in asked.items():
                found: dict[str, float] = {}
                with measured(found, functools.partial(_cpu_of_all, "Ray" in name)):
                    answers = [by[i % len(by)].ask(obs, labels) for i, obs in enumerate(observations)]
                    seen.append([answer().flatten() for answer in answers])
                if repeat >= 0:  # the first turn starts the actors
                    decisions = ASKED * REQUESTS
                    records.append({"kind": "teacher", "what": name, "repeat": repeat, "decisions": decisions, **found})
            for other in seen[1:]:
                for first, second in zip(seen[0], other, strict=True):
                    th.testing.assert_close(first, second)
    return records


def learner(output: Path) -> None:
    """
    A training of the body ``tiny`` on envs without a simulator; what each rank took, without the first iteration.

    :param output: folder; each rank writes a file there
    """
    env = DummyVecEnv([stand_in()] * N_ENVS)
    teacher = VLAPolicy(env.observation_space, spaces.MultiDiscrete([256] * 56), lambda _: 0.0, trainable=False)
    model = OPD(
        "VLAPolicy",
        env,
        teacher=teacher,
        teacher_kwargs={"n_eval_episodes": 0},
        n_steps=N_STEPS,
        batch_size=32,
        gradient_steps=UPDATES,
        seed=0,
        device="cpu",
    )
    calls: dict[str, list[dict[str, float]]] = {"rollout": [], "update": [], "adding gradients": []}

    def wrap(owner: Any, method: str, name: str) -> None:
        inner = getattr(owner, method)

        def run(*args: Any, **kwargs: Any) -> Any:
            found: dict[str, float] = {}
            with measured(found, time.process_time):
                result = inner(*args, **kwargs)
            calls[name].append(found)
            return result

        setattr(owner, method, run)

    wrap(model, "collect_rollouts", "rollout")
    wrap(model, "train", "update")
    wrap(ranks, "add_gradients", "adding gradients")
    model.learn((ITERATIONS + 1) * N_ENVS * N_STEPS * ranks.world_size())
    # The first iteration loads and compiles
    first = {"rollout": 1, "update": 1, "adding gradients": UPDATES}
    totals = {
        f"{name}, {key}": sum(call[key] for call in found[first[name] :])
        for name, found in calls.items()
        for key in ("seconds", "cpu_seconds")
    }
    write_atomic(output / f"rank{ranks.rank()}.json", json.dumps(totals))


def learners(repeats: int) -> list[dict[str, Any]]:
    """
    :param repeats: number of turns
    :return: one record a turn and number of processes: means over its ranks, of all measured iterations
    """
    records = []
    for repeat in range(repeats):
        for name, launcher in LEARNERS.items():
            with tempfile.TemporaryDirectory() as folder:
                words = [str(Path(__file__).resolve()), "--learner", folder]
                done = subprocess.run([sys.executable, *launcher, *words], capture_output=True, text=True)
                if done.returncode != 0:
                    raise SystemExit(f"The learner failed:\n{done.stderr[-3000:]}")
                of_ranks = [json.loads(path.read_text()) for path in sorted(Path(folder).iterdir())]
            values = {key: float(np.mean([found[key] for found in of_ranks])) for key in of_ranks[0]}
            for key in ("seconds", "cpu_seconds"):
                values[key] = values[f"rollout, {key}"] + values[f"update, {key}"]
            records.append({"kind": "learner", "what": name, "repeat": repeat, "processes": len(of_ranks), **values})
            print(json.dumps(records[-1]), flush=True)
    return records


def ratios(records: list[dict[str, Any]], kind: str, what: str, key: str) -> list[float]:
    """
    :param records: all of them
    :param kind: what was measured
    :param what: an engine, or a number of processes
    :param key: of a record
    :return: of each turn: its value over that of the first engine, or of one process
    """
    of_kind = [record for record in records if record["kind"] == kind]
    base = {record["repeat"]: record[key] for record in of_kind if record["what"] == of_kind[0]["what"]}
    return [record[key] / base[record["repeat"]] for record in of_kind if record["what"] == what]


def to_markdown(results: dict[str, Any]) -> str:
    """
    :param results: what :func:`main` writes as JSON
    :return: three tables
    """
    where, records = results["machine"], results["records"]
    lines = [
        f"{where['cpu']}, {where['cores']} cores; opd_gym at {where['commit']}; load before the run "
        f"{where['load_before']}. {results['note']}",
        "",
        "Median (smallest to largest) of the turns. Ratios are to the first row of their kind, within a turn. CPU time "
        "is that of all processes.",
        "",
    ]
    for title, kinds in (("envs", list(KINDS)), ("labels", ["teacher"])):
        rows = []
        for kind in kinds:
            of_kind = [record for record in records if record["kind"] == kind]
            for what in dict.fromkeys(record["what"] for record in of_kind):
                found = [record for record in of_kind if record["what"] == what]
                rows.append(
                    (
                        kind,
                        what,
                        spread([r["decisions"] / r["seconds"] for r in found]),
                        spread([1 / x for x in ratios(records, kind, what, "seconds")], 2),
                        spread([1e3 * r["cpu_seconds"] / r["decisions"] for r in found], 2),
                        spread(ratios(records, kind, what, "cpu_seconds"), 2),
                    )
                )
        head = (title, "hosted", "decisions/s", "x the first", "CPU ms a decision", "CPU, x the first")
        lines += [table(head, *rows), ""] if rows else []
    rows = []
    for what in LEARNERS:
        found = [r for r in records if r["kind"] == "learner" and r["what"] == what]
        if found:
            n = found[0]["processes"]
            decisions = n * ITERATIONS * N_ENVS * N_STEPS
            rows.append(
                (
                    what,
                    spread([decisions / r["seconds"] for r in found]),
                    spread([n / x for x in ratios(records, "learner", what, "seconds")], 2),
                    spread(ratios(records, "learner", what, "cpu_seconds"), 2),
                    spread([100 * r["adding gradients, seconds"] / r["update, seconds"] for r in found], 0),
                    spread([100 * r["adding gradients, cpu_seconds"] / r["update, cpu_seconds"] for r in found], 0),
                )
            )
    head = (
        "learner",
        "decisions/s of all",
        "x one process",
        "CPU of a process, x one",
        "of an update adding gradients, %",
        "of its CPU, %",
    )
    lines += [table(head, *rows), ""] if rows else []
    lines += [
        f"A learner's iteration: {N_ENVS * N_STEPS} decisions, {UPDATES} gradient steps of 32, "
        f"{results['trained']:,} trained weights; each process does as much as the one does. Adding gradients includes "
        "waiting for the other process.",
        "",
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="turns")
    parser.add_argument("--n-envs", type=int, default=4)
    parser.add_argument("--n-steps", type=int, default=16, help="decisions of each env in a turn")
    parser.add_argument("--quick", action="store_true", help="one short turn")
    parser.add_argument("--note", default="", help="for the results: what else the machine did, for instance")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "benchmarks" / "results" / "scaling")
    parser.add_argument("--learner", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    th.set_num_threads(1)
    if args.learner is not None:
        learner(args.learner)
        return
    repeats, n_envs, n_steps = (1, 2, 2) if args.quick else (args.repeats, args.n_envs, args.n_steps)
    results: dict[str, Any] = {"machine": machine(), "note": args.note, "records": []}
    with_ray = has_ray()
    engines = {**ENGINES, **(RAY_ENGINES if with_ray else {})}
    has_libero = importlib.util.find_spec("libero") is not None
    for kind in KINDS if has_libero else ["no simulator"]:
        # What has no simulator takes a hundredth of the time
        results["records"] += envs(engines, kind, n_envs, n_steps * (1 if kind.startswith("LIBERO") else 20), repeats)
        print(f"{kind}: measured", flush=True)
    if with_ray:
        import ray

        results["records"] += teachers(repeats)
        print("teacher: measured", flush=True)
        ray.shutdown()
    env = stand_in()()
    policy = VLAPolicy(env.observation_space, env.action_space, lambda _: 0.0)
    results["trained"] = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    results["records"] += learners(repeats)
    write_both(args.output, results, to_markdown(results))


if __name__ == "__main__":
    main()
