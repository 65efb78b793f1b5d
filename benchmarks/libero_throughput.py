"""
How fast the LIBERO envs are, beside stock LIBERO, LeRobot's env, TorchRL's env and the floor that MuJoCo sets.

    python benchmarks/libero_throughput.py --lerobot-python PYTHON --torchrl-python PYTHON

Everything runs in one go on one machine: the same tasks, official initial states, actions, cameras and picture size.
Each configuration is a process of its own, and the repetitions are interleaved (A B C, A B C), so that a machine that
slows down slows all of them. Writes ``results.json`` (one record a process) and ``results.md``.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.metadata
import json
import multiprocessing
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

# This file is also run by the Pythons of LeRobot and TorchRL, which need not have opd_gym or tqdm: what the parent
# process alone uses is imported where it is used.

CHUNK = 8
CAMERAS = ("agentview", "robot0_eye_in_hand")
CONTROL_STEP = 0.05  # seconds
NO_OP = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0], dtype=np.float32)
N_SETTLE = 10  # no-op steps after set_init_state in every published LIBERO evaluation; ours, LeRobot's, TorchRL's reset
TIMEOUT = 1800.0  # seconds for one process

LABELS = {
    "stock": "LIBERO `OffScreenRenderEnv`",
    "lerobot": "LeRobot",
    "torchrl": "TorchRL",
    "exact": "opd_gym, exact",
    "light": "opd_gym, light",
    "step_exact": "opd_gym, exact, every step drawn",
    "step_light": "opd_gym, light, every step drawn",
    "floor_exact": "floor, exact",
    "floor_light": "floor, light",
    "many_exact": "opd_gym, exact",
    "many_light": "opd_gym, light",
}
VECTORISED = ("stock", "lerobot", "torchrl", "exact", "light")
EVERY_STEP = ("step_exact", "step_light")  # what the others do, who cannot skip pictures
FLOORS = ("floor_exact", "floor_light")
MANY = ("many_exact", "many_light")
DISTRIBUTIONS = ("mujoco", "robosuite", "numpy", "torch", "gymnasium", "numba", "lerobot", "torchrl", "opd-gym")


@dataclass(frozen=True)
class Plan:
    """
    What one process measures.

    :param mode: key of ``LABELS``
    :param suite: LIBERO's name of the suite
    :param task_ids: the task; all tasks of the suite for "many_exact" and "many_light"
    :param bddl_file: the task's file
    :param states: ``.npy`` file of the task's official initial states
    :param processes: number of env processes
    :param image_size: side of the pictures in pixels
    :param episodes: episodes whose reset and steps are timed; 0 to time the start and the first decision alone
    :param decisions: chunks of 8 actions in an episode
    :param seed: seed of the actions
    :param cold: whether the caches were empty
    :param repeat: number of the repetition
    """

    mode: str
    suite: str
    task_ids: tuple[int, ...]
    bddl_file: str
    states: str
    processes: int
    image_size: int
    episodes: int
    decisions: int
    seed: int
    cold: bool
    repeat: int

    @property
    def visuals(self) -> str:
        """Ours: "exact" or "light"."""
        return self.mode.split("_")[-1]

    def actions(self, episode: int) -> np.ndarray:
        """
        Pushes into the scene, turns at every third step, and grasps: contacts, as a policy has them.

        :param episode: number of the episode
        :return: float32 array of shape ``(decisions, 8, processes, 7)``
        """
        rng = np.random.default_rng([self.seed, self.task_ids[0], episode])
        shape = (self.decisions * CHUNK, self.processes)
        xyz = rng.uniform(-1.0, 1.0, (*shape, 3)) - [0.0, 0.0, 0.3]
        turn = rng.uniform(-0.3, 0.3, (*shape, 3)) * (np.arange(shape[0]) % 3 == 0)[:, None, None]
        grip = np.where(np.arange(shape[0]) // 12 % 2, 1.0, -1.0)[:, None, None] * np.ones((*shape, 1))
        actions = np.concatenate([xyz, turn, grip], axis=-1).clip(-1.0, 1.0).astype(np.float32)
        return actions.reshape(self.decisions, CHUNK, self.processes, 7)


class Subject(ABC):
    """``processes`` envs of one task, whoever wrote them, behind one interface."""

    @abstractmethod
    def reset(self, state_id: int) -> None:
        """
        Start an episode as evaluations do: reset, set the state, settle, observe.

        :param state_id: number of the official initial state, for every env
        """

    @abstractmethod
    def decide(self, chunk: np.ndarray) -> None:
        """
        Execute a chunk of actions and observe at its end (those who cannot skip pictures draw one a step).

        :param chunk: float32 array of shape ``(8, processes, 7)``
        :raises RuntimeError: an episode ended, so that the envs would no longer do the same work
        """

    @abstractmethod
    def positions(self) -> np.ndarray:
        """
        Position of the end effectors in the last observation, in m; it shows that everybody simulated the same.

        :return: array of shape ``(processes, 3)``
        """

    @abstractmethod
    def close(self) -> None:
        """Free everything."""


def _refuse_end(done: Any) -> None:
    if np.any(done):
        raise RuntimeError("The random actions ended an episode, so this comparison is void: choose another --seed.")


class Stock(Subject):
    """LIBERO's own env, in its own vectorised envs: sequential for one env, processes for several."""

    def __init__(self, plan: Plan):
        from libero.libero.envs import OffScreenRenderEnv
        from libero.libero.envs.venv import DummyVectorEnv, SubprocVectorEnv

        kwargs = {"bddl_file_name": plan.bddl_file, "camera_heights": plan.image_size, "camera_widths": plan.image_size}
        build = functools.partial(OffScreenRenderEnv, **kwargs)
        self._env = (SubprocVectorEnv if plan.processes > 1 else DummyVectorEnv)([build] * plan.processes)
        self._states = np.load(plan.states)
        self._processes = plan.processes

    def reset(self, state_id: int) -> None:
        self._env.reset()
        self._env.set_init_state([self._states[state_id]] * self._processes)
        for _ in range(N_SETTLE):
            self._obs, *_ = self._env.step(np.tile(NO_OP, (self._processes, 1)))

    def decide(self, chunk: np.ndarray) -> None:
        for actions in chunk:
            self._obs, _, done, _ = self._env.step(actions)
            _refuse_end(done)

    def positions(self) -> np.ndarray:
        return np.array([obs["robot0_eef_pos"] for obs in self._obs])

    def close(self) -> None:
        self._env.close()


class LeRobot(Subject):
    """LeRobot's env, built by LeRobot: sequential for one env, as ``lerobot-eval`` does it, processes for several."""

    def __init__(self, plan: Plan):
        import gymnasium as gym
        from lerobot.envs.libero import create_libero_envs

        gym_kwargs = {
            "task_ids": list(plan.task_ids),
            "obs_type": "pixels_agent_pos",
            "observation_width": plan.image_size,
            "observation_height": plan.image_size,
        }
        # Its first env is built in this process too; a plain fork of a process that has rendered hangs in Mesa.
        parallel = functools.partial(gym.vector.AsyncVectorEnv, context="forkserver")
        env_cls = parallel if plan.processes > 1 else gym.vector.SyncVectorEnv
        envs = create_libero_envs(plan.suite, plan.processes, gym_kwargs=gym_kwargs, env_cls=env_cls)
        self._env = envs[plan.suite][plan.task_ids[0]]
        self._processes = plan.processes

    def reset(self, state_id: int) -> None:
        # Left alone, env i of n would take the states i, i + n, i + 2 n, ...
        self._env.set_attr("init_state_id", [state_id] * self._processes)
        self._obs, _ = self._env.reset()

    def decide(self, chunk: np.ndarray) -> None:
        for actions in chunk:
            self._obs, _, terminated, truncated, _ = self._env.step(actions)
            _refuse_end(terminated | truncated)

    def positions(self) -> np.ndarray:
        return self._obs["robot_state"]["eef"]["pos"]

    def close(self) -> None:
        self._env.close()


class TorchRL(Subject):
    """TorchRL's env; several are its own ``ParallelEnv``."""

    def __init__(self, plan: Plan):
        from torchrl.envs import LiberoEnv

        self._env = LiberoEnv(
            plan.suite,
            task_id=plan.task_ids[0],
            num_workers=plan.processes,
            camera_height=plan.image_size,
            camera_width=plan.image_size,
            wrist_camera=CAMERAS[1],
            init_state_mode="cycle",
        )
        self._processes = plan.processes
        self._next_state = 0

    def reset(self, state_id: int) -> None:
        if state_id != self._next_state:
            raise ValueError(f"TorchRL's env walks through the states in order: {self._next_state} is next.")
        self._next_state += 1
        self._td = self._env.reset()

    def decide(self, chunk: np.ndarray) -> None:
        import torch

        for actions in chunk:
            self._td["action"] = torch.from_numpy(actions if self._processes > 1 else actions[0])
            self._td = self._env.step(self._td)["next"]
            _refuse_end(self._td["done"].numpy())

    def positions(self) -> np.ndarray:
        return self._td["observation", "state"].numpy().reshape(self._processes, -1)[:, :3]

    def close(self) -> None:
        self._env.close()


class _OneEnv(Subject):
    """Ours, in this process."""

    def __init__(self, plan: Plan):
        import gymnasium as gym

        from opd_gym.envs.wrappers import ActionChunk

        self._env = ActionChunk(gym.make(f"opd_gym:{_env_id(plan.suite)}", **_our_kwargs(plan)), CHUNK)

    def reset(self, state_id: int) -> None:
        self._obs, _ = self._env.reset(options={"init_state_id": state_id})

    def decide(self, chunk: np.ndarray) -> None:
        self._obs, _, terminated, truncated, _ = self._env.step(chunk[:, 0])
        _refuse_end(terminated or truncated)

    def positions(self) -> np.ndarray:
        return self._obs["proprio"][None, :3]

    def close(self) -> None:
        self._env.close()


class _EveryStep(_OneEnv):
    """Ours, in this process, with a picture of every step."""

    def __init__(self, plan: Plan):
        super().__init__(plan)
        self._env = self._env.env  # below ActionChunk

    def decide(self, chunk: np.ndarray) -> None:
        for actions in chunk:
            self._obs, _, terminated, truncated, _ = self._env.step(actions[0])
            _refuse_end(terminated or truncated)


class _SeveralEnvs(Subject):
    """Ours, as the algorithms run it."""

    def __init__(self, plan: Plan):
        import opd_gym

        self._env = opd_gym.make_vec(
            _env_id(plan.suite),
            n_envs=plan.processes,
            n_workers=plan.processes,
            env_kwargs=_our_kwargs(plan),
            chunk_size=CHUNK,
            tokens=False,
        )

    def reset(self, state_id: int) -> None:
        self._env.set_options({"init_state_id": state_id})
        self._obs = self._env.reset()

    def decide(self, chunk: np.ndarray) -> None:
        self._obs, _, done, _ = self._env.step(chunk.swapaxes(0, 1))
        _refuse_end(done)

    def positions(self) -> np.ndarray:
        return self._obs["proprio"][:, :3]

    def close(self) -> None:
        self._env.close()


def _ours(plan: Plan) -> Subject:
    return _SeveralEnvs(plan) if plan.processes > 1 else _OneEnv(plan)


def _env_id(suite: str) -> str:
    from opd_gym.envs.registration import LIBERO_IDS

    return next(name for name, kwargs in LIBERO_IDS.items() if kwargs["suite"] == suite and "task_ids" not in kwargs)


def _our_kwargs(plan: Plan) -> dict[str, Any]:
    # No measured step may be the last of its episode: stock LIBERO does not stop there either.
    horizon = plan.decisions * CHUNK + 1
    return {
        "task_ids": plan.task_ids,
        "visuals": plan.visuals,
        "image_size": plan.image_size,
        "init_states": "eval",
        "horizon": horizon,
    }


SUBJECTS: dict[str, Callable[[Plan], Subject]] = {
    "stock": Stock,
    "lerobot": LeRobot,
    "torchrl": TorchRL,
    "exact": _ours,
    "light": _ours,
    "step_exact": _EveryStep,
    "step_light": _EveryStep,
}


# What runs in the measuring processes -----------------------------------------------------------------------------


def memory(pid: int) -> dict[str, float] | None:
    """
    :param pid: a process
    :return: in MB its largest resident set so far and its present proportional set (pages that n processes share count
        1/n); None where the system does not say
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return None
    values = {}
    for key, text, name in (("peak_rss_mb", status, "VmHWM"), ("pss_mb", rollup, "Pss")):
        match = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
        if match is None:
            return None
        values[key] = round(int(match[1]) / 1024, 1)
    return values


def worker_pids() -> list[int]:
    """
    :return: processes that host envs: those of multiprocessing, and those of a ``WorkerVecEnv``
    """
    pids = [child.pid for child in multiprocessing.active_children() if child.pid is not None]
    for task in Path("/proc/self/task").iterdir():
        for pid in map(int, (task / "children").read_text().split()):
            if b"opd_gym.envs.workers.host" in Path(f"/proc/{pid}/cmdline").read_bytes():
                pids.append(pid)
    return pids


def versions() -> dict[str, str]:
    """
    :return: versions of what is installed for this Python, and which distribution gives it LIBERO
    """
    found = {"python": platform.python_version()}
    libero = set(importlib.metadata.packages_distributions().get("libero", ()))
    for name in (*DISTRIBUTIONS, *sorted(libero)):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def gl_renderer() -> str | None:
    """
    :return: what draws in this process's GL context, None without one
    """
    from OpenGL import GL

    try:
        name = GL.glGetString(GL.GL_RENDERER)
    except Exception:  # PyOpenGL's errors differ by platform; the name is no more than a remark in the results
        return None
    return name.decode() if name else None


def measure(plan: Plan, started: float) -> dict[str, Any]:
    """
    Start, reset and step envs.

    :param plan: what to measure
    :param started: ``time.time()`` when this process was started
    :return: ``startup_s``, ``first_decision_s``, ``reset_s`` and ``step_s`` of each episode, ``positions`` at their
        ends, ``memory``
    """
    subject = SUBJECTS[plan.mode](plan)
    subject.reset(0)
    record: dict[str, Any] = {"startup_s": time.time() - started, "reset_s": [], "step_s": [], "positions": []}
    # Timed apart: it also pays for what is compiled or loaded at first use.
    begin = time.perf_counter()
    subject.decide(plan.actions(plan.episodes)[0])
    record["first_decision_s"] = time.perf_counter() - begin
    for episode in range(plan.episodes):
        chunks = plan.actions(episode)
        begin = time.perf_counter()
        subject.reset(1 + episode)
        record["reset_s"].append(time.perf_counter() - begin)
        begin = time.perf_counter()
        for chunk in chunks:
            subject.decide(chunk)
        record["step_s"].append(time.perf_counter() - begin)
        record["positions"].append(np.asarray(subject.positions(), dtype=np.float64).tolist())
    record["memory"] = {"parent": memory(os.getpid()), "workers": [memory(pid) for pid in worker_pids()]}
    if plan.processes == 1:
        record["gl_renderer"] = gl_renderer()
    subject.close()
    return record


def _floor_worker(plan: Plan, worker: int, barrier: Any, connection: Any) -> None:
    """
    MuJoCo alone. It goes through the states of the very episodes that everybody else plays: each control step starts
    from the recorded state and torques and is one call into C.
    """
    import gymnasium as gym
    import mujoco

    env = gym.make(f"opd_gym:{_env_id(plan.suite)}", **{**_our_kwargs(plan), "cameras": ()})
    spec = int(mujoco.mjtState.mjSTATE_INTEGRATION)
    times = []
    for episode in range(plan.episodes):
        env.reset(options={"init_state_id": 1 + episode})
        simulator = env.unwrapped.simulator  # type: ignore[attr-defined]
        model, data = simulator.model, simulator.data
        substeps = round(CONTROL_STEP / model.opt.timestep)
        actions = plan.actions(episode)[:, :, worker].reshape(-1, 7)
        states = np.empty((len(actions), mujoco.mj_stateSize(model, spec)))
        for state, action in zip(states, actions, strict=True):
            mujoco.mj_getState(model, data, state, spec)
            env.step(action)
        simulator.render(CAMERAS, plan.image_size)  # the first picture of a model also uploads its meshes
        barrier.wait()
        begin = time.perf_counter()
        for i, state in enumerate(states):
            mujoco.mj_setState(model, data, state, spec)
            mujoco.mj_step(model, data, nstep=substeps)
            if (i + 1) % CHUNK == 0:
                simulator.render(CAMERAS, plan.image_size)
        times.append((begin, time.perf_counter()))
    env.close()
    connection.send(times)


def measure_floor(plan: Plan) -> dict[str, Any]:
    """
    What MuJoCo's C code needs for the physics and the pictures of the same episodes.

    :param plan: what to measure
    :return: ``step_s`` of each episode
    """
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(plan.processes)
    pipes = [context.Pipe(duplex=False) for _ in range(plan.processes)]
    workers = [
        context.Process(target=_floor_worker, args=(plan, i, barrier, pipe[1]), daemon=True)
        for i, pipe in enumerate(pipes)
    ]
    for worker, (_, sender) in zip(workers, pipes, strict=True):
        worker.start()
        sender.close()  # so that a worker that died is an EOFError here
    times = np.array([receiver.recv() for receiver, _ in pipes])
    for worker in workers:
        worker.join()
    # perf_counter is one clock for all processes of a machine.
    return {"step_s": (times[:, :, 1].max(axis=0) - times[:, :, 0].min(axis=0)).tolist()}


def measure_many(plan: Plan, started: float) -> dict[str, Any]:
    """
    All tasks of a suite in one process, one after the other, all simulators kept.

    :param plan: what to measure
    :param started: ``time.time()`` when this process was started
    :return: ``first_s``, seconds to the first observation of each task (of the first: from the start of the process),
        and ``memory``
    """
    import gymnasium as gym

    kwargs = {**_our_kwargs(plan), "max_simulators": len(plan.task_ids)}
    env = gym.make(f"opd_gym:{_env_id(plan.suite)}", **kwargs)
    first, begin = [], started
    for task_id in plan.task_ids:
        env.reset(options={"task_id": task_id, "init_state_id": 0})
        now = time.time()
        first.append(now - begin)
        begin = now
    record = {"first_s": first, "memory": {"parent": memory(os.getpid()), "workers": []}}
    env.close()
    return record


def child(plan_file: Path, output: Path, started: float) -> None:
    """
    Entry point of a measuring process.

    :param plan_file: JSON of a :class:`Plan`
    :param output: JSON file to write: the record, or ``{"error": ...}``
    :param started: ``time.time()`` when the process was started
    """
    values = json.loads(plan_file.read_text())
    plan = Plan(**{**values, "task_ids": tuple(values["task_ids"])})
    try:
        if plan.mode in FLOORS:
            record = measure_floor(plan)
        elif plan.mode in MANY:
            record = measure_many(plan, started)
        else:
            record = measure(plan, started)
    except Exception as error:
        # The traceback goes to stderr; the results say in a line what was wrong, without this machine's paths.
        message = re.sub(r"(/[^\s/'\":]+)+/", "", f"{type(error).__name__}: {error}").splitlines()[0]
        output.write_text(json.dumps({"error": message}))
        raise
    output.write_text(json.dumps({**record, "versions": versions()}))


# What runs in the parent process ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A task's id, its file and the file of its official initial states."""

    task_id: int
    bddl_file: str
    states: str


def prepare(suite: str, task_ids: Iterable[int], folder: Path) -> list[Task]:
    """
    Task files and initial states as everybody can read them, and a LIBERO configuration that points there: LeRobot and
    TorchRL load ``torch.save`` files, which some distributions of LIBERO replace by ``.npz``, and the original LIBERO
    asks on stdin where its files are.

    :param suite: LIBERO's name of the suite
    :param task_ids: tasks
    :param folder: where to write; ``LIBERO_CONFIG_PATH`` of the measuring processes
    :return: one entry a task
    """
    import torch

    from opd_gym.envs.libero.runtime import import_libero
    from opd_gym.envs.libero.suites import load_init_states, tasks

    libero = import_libero()
    known = tasks(suite)
    prepared = []
    for task_id in task_ids:
        if not 0 <= task_id < len(known):
            raise ValueError(f"Unknown task {task_id}: {suite!r} has the tasks 0 to {len(known) - 1}.")
        task = known[task_id]
        states = load_init_states(task)
        source = task.init_state_files[-1]
        target = folder / "init_states" / source.parent.name / source.name
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.save(states, target)
        np.save(folder / f"{task_id}.npy", states)
        prepared.append(Task(task_id, str(task.bddl_file), str(folder / f"{task_id}.npy")))
    paths = {key: str(libero.get_libero_path(key)) for key in ("benchmark_root", "bddl_files", "datasets", "assets")}
    paths["init_states"] = str(folder / "init_states")
    # JSON is YAML.
    (folder / "config.yaml").write_text(json.dumps(paths))
    return prepared


def run(plan: Plan, python: str, folder: Path, cache: Path) -> dict[str, Any]:
    """
    Measure in a fresh process.

    :param plan: what to measure
    :param python: interpreter
    :param folder: see :func:`prepare`
    :param cache: folder of everything that the process and its libraries cache
    :return: the plan's values and what was measured, or ``error``
    """
    environment = {
        **os.environ,
        "LIBERO_CONFIG_PATH": str(folder),
        "OPD_GYM_CACHE": str(cache / "opd_gym"),
        "NUMBA_CACHE_DIR": str(cache / "numba"),
        "XDG_CACHE_HOME": str(cache / "xdg"),
        "MPLCONFIGDIR": str(cache / "matplotlib"),
    }
    if sys.platform == "linux":
        environment.setdefault("MUJOCO_GL", "egl")
    environment.setdefault("OMP_NUM_THREADS", "1")
    plan_file, output, log = folder / "plan.json", folder / "record.json", folder / "log.txt"
    plan_file.write_text(json.dumps(asdict(plan)))
    output.unlink(missing_ok=True)
    with log.open("w") as stream:
        command = [python, os.path.abspath(__file__), "--child", str(plan_file), str(output)]
        process = subprocess.Popen(
            [*command, repr(time.time())],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status: int | None = process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            # Its workers too, which an error or an interrupt would leave behind.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    measured = json.loads(output.read_text()) if output.exists() else {}
    if not measured:
        measured["error"] = f"no result within {TIMEOUT:.0f} s" if status is None else f"ended with status {status}"
    if "error" in measured:
        print(f"{plan.mode}: {measured['error']}\n{log.read_text()[-2000:]}", file=sys.stderr)
    values = asdict(plan)
    for key in ("bddl_file", "states"):
        del values[key]
    return {**values, **measured}


def installed(module: str, python: str) -> bool:
    """
    :param module: name of a top-level module
    :param python: interpreter
    :return: whether it has the module
    """
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    try:
        return subprocess.run([python, "-c", code], stdin=subprocess.DEVNULL).returncode == 0
    except FileNotFoundError:
        raise ValueError(f"There is no Python at {python!r}.") from None


def machine() -> dict[str, Any]:
    """
    :return: processor, cores, memory, system and the settings that matter for speed; no names and no paths
    """
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        cpu = match[1] if match else cpu
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "commit": commit.stdout.strip() or None,
        "load_before": round(os.getloadavg()[0], 2),
        "environment": {k: os.environ.get(k) for k in ("MUJOCO_GL", "OMP_NUM_THREADS", "LP_NUM_THREADS")},
    }


def schedule(args: argparse.Namespace, tasks: list[Task], modes: list[str]) -> Iterator[tuple[str, Plan]]:
    """
    :param args: see :func:`main`
    :param tasks: what is measured
    :param modes: keys of ``LABELS``
    :return: cache folder and plan of each process, in the order in which they run
    """
    measured = [task for task in tasks if task.task_id in args.tasks]
    base = Plan(
        mode=modes[0],
        suite=args.suite,
        task_ids=(),
        bddl_file="",
        states="",
        processes=1,
        image_size=args.image_size,
        episodes=0,
        decisions=args.decisions,
        seed=args.seed,
        cold=True,
        repeat=0,
    )
    for repeat in range(args.repeats):
        for task in measured:
            of_task = replace(
                base, repeat=repeat, task_ids=(task.task_id,), bddl_file=task.bddl_file, states=task.states
            )
            for mode in (mode for mode in modes if mode not in MANY):
                plan = replace(of_task, mode=mode)
                # Modes whose start is not measured come after ours, and find its cache filled.
                cache = f"{repeat}-{task.task_id}-{plan.visuals}"
                if mode not in FLOORS + EVERY_STEP:
                    yield cache, plan
                for processes in args.processes if mode not in EVERY_STEP else (1,):
                    yield cache, replace(plan, processes=processes, episodes=args.episodes, cold=False)
        of_suite = replace(base, repeat=repeat, task_ids=tuple(task.task_id for task in tasks))
        for mode in (mode for mode in modes if mode in MANY):
            for cold in (True, False):
                yield f"{repeat}-{mode}", replace(of_suite, mode=mode, cold=cold)


# Tables -----------------------------------------------------------------------------------------------------------

Record = dict[str, Any]


def spread(values: Iterable[float | None], digits: int = 1) -> str:
    """
    :param values: what was measured; None where something was not
    :param digits: decimal places
    :return: ``median (smallest to largest)``, empty without values
    """
    known = [value for value in values if value is not None]
    if not known:
        return ""
    median, low, high = (f"{value:,.{digits}f}" for value in (statistics.median(known), min(known), max(known)))
    return median if low == high else f"{median} ({low} to {high})"


def write_both(folder: Path, results: dict[str, Any], text: str) -> None:
    """
    :param folder: where ``results.json`` and ``results.md`` go
    :param results: what was measured
    :param text: the same as tables, which are printed too
    """
    from opd_gym.files import write_atomic
    from opd_gym.versions import write_results

    folder.mkdir(parents=True, exist_ok=True)
    write_results(folder / "results.json", results)
    write_atomic(folder / "results.md", text)
    print(text)


def env_steps_per_second(record: Record) -> float:
    """Control steps of all envs by the wall-clock of stepping alone."""
    steps = record["episodes"] * record["decisions"] * CHUNK * record["processes"]
    return steps / sum(record["step_s"])


def select(records: list[Record], mode: str, processes: int | None = None, cold: bool = False) -> dict[Any, Record]:
    """
    :param records: all records
    :param mode: key of ``LABELS``
    :param processes: number of env processes, None for any
    :param cold: whether the caches were empty
    :return: those that succeeded, by what they are compared within: repetition and tasks
    """
    return {
        (record["repeat"], tuple(record["task_ids"])): record
        for record in records
        if record["mode"] == mode and record["cold"] == cold and "error" not in record
        if processes is None or record["processes"] == processes
    }


def ratios(numerator: dict[Any, Record], denominator: dict[Any, Record]) -> list[float]:
    """Ratios of speeds, each within one repetition of one task."""
    return [
        env_steps_per_second(numerator[key]) / env_steps_per_second(denominator[key])
        for key in numerator.keys() & denominator.keys()
    ]


def deviation(records: dict[Any, Record], reference: dict[Any, Record]) -> float | None:
    """Largest distance of an end effector from the reference's at the end of an episode, in mm."""
    distances = [
        1000 * np.linalg.norm(np.array(records[key]["positions"]) - reference[key]["positions"], axis=-1).max()
        for key in records.keys() & reference.keys()
        if "positions" in records[key]
    ]
    return max(distances, default=None)


def _unavailable(records: list[Record], mode: str, missing: list[str]) -> str:
    if mode in missing:
        return "not installed"
    errors = [record["error"] for record in records if record["mode"] == mode and "error" in record]
    return f"failed: {errors[0]}" if errors else ""


def throughput_table(records: list[Record], modes: list[str], processes: list[int], missing: list[str]) -> str:
    """
    :param records: all records
    :param modes: rows
    :param processes: numbers of env processes
    :param missing: modes whose library is not installed
    :return: markdown: speed, and how it compares
    """
    lines = [
        "| | processes | env steps/s | decisions/s | × stock | × one process | share of the floor | reset, s "
        "| hand, from stock's |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for mode in (mode for mode in modes if mode not in MANY):
        for n in processes if mode not in EVERY_STEP else (1,):
            runs = select(records, mode, n)
            if not runs:
                lines.append(f"| {LABELS[mode]} | {n} | {_unavailable(records, mode, missing)} | | | | | | |")
                continue
            stock = select(records, "stock", n)
            floor = select(records, f"floor_{'light' if 'light' in mode else 'exact'}", n)
            rates = [env_steps_per_second(run) for run in runs.values()]
            far = deviation(runs, stock) if mode != "stock" else None
            share = "" if mode in FLOORS else spread((100 * r for r in ratios(runs, floor)), 0)
            cells = [
                LABELS[mode],
                str(n),
                spread(rates),
                spread((rate / CHUNK for rate in rates), 2),
                spread(ratios(runs, stock)) if mode != "stock" else "",
                spread(ratios(runs, select(records, mode, 1)), 2) if n != 1 else "",
                f"{share} %" if share else "",
                spread((s for run in runs.values() for s in run.get("reset_s", ())), 2),
                f"{far:.1f} mm" if far is not None else "",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def start_table(records: list[Record], modes: list[str], processes: list[int]) -> str:
    """
    :param records: all records
    :param modes: rows
    :param processes: numbers of env processes
    :return: markdown: start-up times and memory
    """
    lines = [
        "| | processes | start, cold, s | first decision, cold, s | start, warm, s | first decision, warm, s "
        "| peak RSS a worker, MB | PSS a worker, MB | PSS of all, MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for mode in (mode for mode in modes if mode in VECTORISED):
        for n in processes:
            runs = list(select(records, mode, n).values())
            if not runs:
                continue
            cold = select(records, mode, n, cold=True).values()
            # One env process is the measuring process itself
            hosts = [run["memory"]["workers"] or [run["memory"]["parent"]] * (n == 1) for run in runs]
            workers = [worker for found in hosts for worker in found if worker]
            totals = []
            for run in runs:
                everyone = [run["memory"]["parent"], *run["memory"]["workers"]]
                if all(everyone) and (n == 1 or len(everyone) > 1):
                    totals.append(sum(one["pss_mb"] for one in everyone))
            cells = [
                LABELS[mode],
                str(n),
                spread(run["startup_s"] for run in cold),
                spread((run["first_decision_s"] for run in cold), 2),
                spread(run["startup_s"] for run in runs),
                spread((run["first_decision_s"] for run in runs), 2),
                spread((worker["peak_rss_mb"] for worker in workers), 0),
                spread((worker["pss_mb"] for worker in workers), 0),
                spread(totals, 0),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def many_table(records: list[Record], modes: list[str]) -> str:
    """
    :param records: all records
    :param modes: rows
    :return: markdown: all tasks of the suite in one process
    """
    lines = [
        "| | caches | tasks | first task, s | each further task, s | all tasks, s | peak RSS, MB | PSS, MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for mode in (mode for mode in modes if mode in MANY):
        for cold in (True, False):
            runs = list(select(records, mode, cold=cold).values())
            if not runs:
                continue
            known = [run["memory"]["parent"] for run in runs if run["memory"]["parent"]]
            cells = [
                LABELS[mode],
                "cold" if cold else "warm",
                str(len(runs[0]["first_s"])),
                spread(run["first_s"][0] for run in runs),
                spread((s for run in runs for s in run["first_s"][1:]), 2),
                spread(sum(run["first_s"]) for run in runs),
                spread((one["peak_rss_mb"] for one in known), 0),
                spread((one["pss_mb"] for one in known), 0),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def report(result: dict[str, Any]) -> str:
    """
    :param result: content of ``results.json``
    :return: markdown
    """
    records, modes, settings, about = (result[key] for key in ("records", "modes", "settings", "machine"))
    processes = settings["processes"]
    renderer = next((r["gl_renderer"] for r in records if r.get("gl_renderer")), "unknown renderer")
    measured, planned = len(records), result["planned"]
    repeats = max(record["repeat"] for record in records) + 1  # begun
    stopped = f" Stopped after {measured} of {planned} processes." if measured < planned else ""
    text = (
        f"{settings['suite']}, tasks {', '.join(map(str, settings['tasks']))}; two cameras of "
        f"{settings['image_size']} x {settings['image_size']}; {repeats} repetition{'s' * (repeats > 1)} of "
        f"{settings['episodes']} episodes of {settings['decisions'] * CHUNK} env steps (decisions of {CHUNK}); median "
        f"(smallest to largest).{stopped}\n\n"
        f"{about['cpu']}, {about['cores']} cores, {about['memory_gb']} GB, {renderer}; "
        f"load before the run {about['load_before']}; opd_gym at {about['commit']}.\n\n"
    )
    if any(mode not in MANY for mode in modes):
        text += throughput_table(records, modes, processes, result["not_installed"])
    if any(mode in VECTORISED for mode in modes):
        text += "\n" + start_table(records, modes, processes)
    if any(mode in MANY for mode in modes):
        text += "\n" + many_table(records, modes)
    for mode in modes:
        named = next((r["versions"] for r in records if r["mode"] == mode and "versions" in r), None)
        if named and mode in ("stock", "lerobot", "torchrl", "exact"):
            text += f"\n{LABELS[mode]}: " + ", ".join(f"{name} {version}" for name, version in named.items()) + ".\n"
    return text


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """
    :param argv: arguments; None for those of the process
    :return: the arguments, checked
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", default="libero_object", help="LIBERO's name of the suite")
    parser.add_argument("--tasks", type=int, nargs="+", default=[0, 5], help="task ids")
    parser.add_argument("--modes", nargs="+", choices=tuple(LABELS), default=list(LABELS))
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="numbers of env processes")
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--episodes", type=int, default=2, help="episodes that a process plays")
    parser.add_argument("--decisions", type=int, default=10, help="decisions of 8 env steps in an episode")
    parser.add_argument("--seed", type=int, default=0, help="seed of the actions")
    parser.add_argument("--lerobot-python", default=sys.executable, help="Python that has LeRobot and LIBERO")
    parser.add_argument("--torchrl-python", default=sys.executable, help="Python that has TorchRL and LIBERO")
    parser.add_argument("--quick", action="store_true", help="see that it runs: one task, one short repetition")
    parser.add_argument("--output", type=Path, help="folder; default: the results beside this file, runs/ for --quick")
    args = parser.parse_args(argv)
    if args.quick:
        args.tasks, args.repeats, args.episodes, args.decisions = args.tasks[:1], 1, 1, 2
    if args.output is None:
        name = Path(__file__).stem
        args.output = Path("runs") / name if args.quick else Path(__file__).parent / "results" / name
    numbers = (args.image_size, args.repeats, args.episodes, args.decisions, *args.processes)
    if min(numbers) < 1:
        parser.error("--processes, --image-size, --repeats, --episodes and --decisions must be at least 1.")
    return args


def main(argv: list[str] | None = None) -> None:
    """
    :param argv: arguments; None for those of the process
    """
    args = parse_args(argv)
    from tqdm import tqdm

    from opd_gym.envs.libero.suites import tasks as suite_tasks
    from opd_gym.files import write_atomic
    from opd_gym.versions import write_results

    pythons = {"lerobot": args.lerobot_python, "torchrl": args.torchrl_python}
    missing = [mode for mode in args.modes if mode in pythons and not installed(mode, pythons[mode])]
    for mode in missing:
        print(f"{mode} is not installed for {pythons[mode]}: left out. Name a Python with --{mode}-python.")
    modes = [mode for mode in LABELS if mode in args.modes and mode not in missing]
    everyone = range(2 if args.quick else len(suite_tasks(args.suite)))
    wanted = sorted({*args.tasks, *(everyone if set(modes) & set(MANY) else ())})
    keys = ("suite", "tasks", "processes", "image_size", "repeats", "episodes", "decisions", "seed")
    result: dict[str, Any] = {
        "machine": machine(),
        "settings": {key: getattr(args, key) for key in keys},
        "modes": [mode for mode in LABELS if mode in args.modes],
        "not_installed": missing,
        "planned": 0,
        "records": [],
    }
    with tempfile.TemporaryDirectory(prefix="libero_throughput_") as temporary:
        folder = Path(temporary)
        plans = list(schedule(args, prepare(args.suite, wanted, folder), modes))
        result["planned"] = len(plans)
        with tqdm(plans, unit="process", smoothing=0) as bar:
            for cache, plan in bar:
                heat = "cold" if plan.cold else "warm"
                bar.set_postfix_str(f"{plan.mode}, task {plan.task_ids[0]}, {plan.processes} processes, {heat}")
                record = run(plan, pythons.get(plan.mode, sys.executable), folder, folder / "caches" / cache)
                result["records"].append(record)
                # After every process, so that nothing is lost when a long run is stopped.
                write_results(args.output / "results.json", result)
                write_atomic(args.output / "results.md", report(result))
    print(report(result))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(Path(sys.argv[2]), Path(sys.argv[3]), float(sys.argv[4]))
    else:
        main()
