"""``opd-gym robotwin install | assets | check | record | demos | seeds``."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from tqdm import tqdm

from opd_gym.checks import check_at_least_one, check_range
from opd_gym.cli.options import (
    RobotwinAssets,
    RobotwinCheck,
    RobotwinDemos,
    RobotwinInstall,
    RobotwinRecord,
    RobotwinSeeds,
)

if TYPE_CHECKING:
    from opd_gym.envs.robotwin.env import RoboTwinEnv
    from opd_gym.envs.robotwin.remote import RemoteSimulator
    from opd_gym.envs.robotwin.traces import Trace

T = TypeVar("T")

# Replays of one trace before it is given up
MAX_ATTEMPTS = 5
# Scenes in a row in which the expert's code, or its worker, breaks, before a recording is given up
MAX_FAILURES = 5


def run_install(args: RobotwinInstall) -> int:
    """
    :param args: what to install
    :return: exit status
    """
    from opd_gym.envs.robotwin import install, runtime

    install.install_packages(args.force)
    install.install_driver(args.force)
    install.check()
    if args.planner:
        install.install_planner(args.force)
        install.check(planner=True)
    try:
        print(f"Assets: {runtime.find_assets()}")
    except FileNotFoundError:
        print(f"Assets: none yet. Next: `{runtime.DOWNLOAD_HINT}`, or `{runtime.STAND_IN_HINT}`.")
    return 0


def run_assets(args: RobotwinAssets) -> int:
    """
    :param args: what to get, and where to
    :return: exit status
    """
    from opd_gym.envs.robotwin import runtime
    from opd_gym.envs.robotwin.assets import download_assets
    from opd_gym.envs.robotwin.stand_in import write_stand_in

    if args.stand_in:
        root = write_stand_in(args.output or runtime.home() / "stand-in")
        print(f"A stand-in for RoboTwin's robot and some of its objects: {root}\n{runtime.NOT_COMPARABLE}")
    else:
        root = download_assets(args.output or runtime.home() / "assets")
        print(f"RoboTwin's assets: {root}")
    return 0


def run_check(args: RobotwinCheck) -> int:
    """
    :param args: what to play
    :return: exit status
    """
    from opd_gym.cli.video import write_video
    from opd_gym.envs.robotwin import runtime
    from opd_gym.envs.robotwin.stand_in import write_stand_in
    from opd_gym.envs.robotwin.traces import EXPERT_TRACES, Trace, find_traces, make_env, replay

    traces = [Trace.load(path) for path in find_traces([EXPERT_TRACES])]
    if args.env is not None:
        task = _task_of(args.env)
        traces = [trace for trace in traces if trace.task == task]
        if not traces:
            raise ValueError(f"There is no trace of {task}. Record one with `opd-gym robotwin record`.")
    root = runtime.home() / "stand-in"
    if not runtime.is_current_stand_in(root):
        write_stand_in(root)
    failed = 0
    for trace in traces:
        frames: list[np.ndarray] = []
        with closing(make_env([trace], assets_root=str(root), chunk_size=25, render_mode="rgb_array")) as env:
            played = replay(trace, env, frames=frames)
        film = write_video(args.output / f"{trace.task}.mp4", frames)
        failed += not played.success
        print(
            f"{trace.task}: {'solved' if played.success else 'NOT solved'} in {len(frames)} chunks, {film}", flush=True
        )
    return 1 if failed else 0


def _task_of(env_id: str) -> str:
    from opd_gym.envs.registration import ROBOTWIN_IDS, bare_id

    if bare_id(env_id) not in ROBOTWIN_IDS:
        raise ValueError(f"Expected a RoboTwin environment id, for instance RoboTwinHandoverBlock-v0, got {env_id!r}.")
    return ROBOTWIN_IDS[bare_id(env_id)]["task"]


def run_record(args: RobotwinRecord) -> int:
    """
    :param args: what to record
    :return: exit status
    """
    from opd_gym.envs.robotwin.env import RoboTwinEnv
    from opd_gym.envs.robotwin.tasks import SEED_STRIDE, TRAIN_SEEDS
    from opd_gym.envs.robotwin.traces import Trace

    task = _task_of(args.env)
    if args.seed not in TRAIN_SEEDS:
        raise ValueError(
            f"--seed must be a training scene, {TRAIN_SEEDS[0]} to {TRAIN_SEEDS[-1]:,}, got {args.seed}: a policy "
            "that learns from traces of evaluation scenes is evaluated on what it has seen."
        )
    python = _planner(args.python)
    env = RoboTwinEnv(task, task_config=args.task_config, python=python)
    # Scenes of an earlier run that was interrupted
    there = set()
    for path in args.output.glob(f"{task}_[0-9]*.npz"):
        old = Trace.load(path)
        if (old.task, old.task_config, old.stand_in) == (task, args.task_config, env.is_stand_in):
            # Also where another scene took the place of an unstable one
            there.add(old.scene_seed % SEED_STRIDE)
    about = tuple(env.settings.embodiment), args.task_config, env.is_stand_in
    scenes = range(args.seed, TRAIN_SEEDS[-1] + 1)
    for scene_seed, positions in _solved(env, python, args.n_envs, scenes, args.episodes, there):
        if positions is not None:
            Trace(task, scene_seed, *about, positions).save(args.output / f"{task}_{scene_seed}.npz")
    return 0


def run_seeds(args: RobotwinSeeds) -> int:
    """
    :param args: what to try
    :return: exit status
    """
    from opd_gym.envs.robotwin.env import RoboTwinEnv
    from opd_gym.envs.robotwin.tasks import EVAL_SEEDS, SEED_STRIDE
    from opd_gym.files import write_atomic

    python = _planner(args.python)
    env = RoboTwinEnv(_task_of(args.env), task_config=args.task_config, python=python)
    scenes = range(EVAL_SEEDS[0], SEED_STRIDE)
    found = [seed for seed, _ in _solved(env, python, args.n_envs, scenes, args.scenes, evaluates=True)]
    write_atomic(args.output, json.dumps(found) + "\n")
    print(f"{len(found)} scenes from {found[0]} to {found[-1]}: {args.output}")
    return 0


def _planner(python: str | None) -> str | None:
    """The interpreter that has RoboTwin's planner: the one that is given, or that of ``install --planner``."""
    from opd_gym.envs.robotwin import runtime

    planner = runtime.planner_dir() / "bin" / "python"
    return python or (str(planner) if planner.is_file() else None)


def _solved(
    env: RoboTwinEnv,
    python: str | None,
    n_envs: int,
    scenes: range,
    n: int,
    there: Collection[int] = (),
    evaluates: bool = False,
) -> Generator[tuple[int, np.ndarray | None], None, None]:
    """
    Let RoboTwin's expert play scenes, in several simulators at once.

    :param env: what to simulate; its own simulator is not used
    :param python: interpreter of the simulators
    :param n_envs: number of simulators
    :param scenes: scenes to try, in this order
    :param n: number of scenes that it is to solve
    :param there: scenes that it is known to solve
    :param evaluates: as RoboTwin's own evaluation does it: with the textures of evaluation scenes, and without a scene
        in place of one that is unstable
    :return: seeds of the scenes that it solved, with the positions that it went through; None for those in ``there``
    :raises ValueError: it breaks down in one scene after the other, or solves too few
    """
    from opd_gym.envs.robotwin.remote import RemoteSimulator, WorkerLost
    from opd_gym.envs.robotwin.topp import PLANNER_HINT

    check_at_least_one(n_envs=n_envs, n=n)
    simulators: SimpleQueue[RemoteSimulator | None] = SimpleQueue()
    for _ in range(n_envs):
        simulators.put(None)

    def play(scene: int) -> tuple[dict[str, Any], Any] | Exception | None:
        """What became of a scene; None if that is known. Raises what keeps a simulator from being built."""
        if scene in there:
            return None
        simulator = simulators.get()
        try:
            if simulator is None:
                simulator = RemoteSimulator(env.settings, python)
            try:
                return simulator.record_expert(scene, evaluates)
            except WorkerLost:
                raise
            except Exception as error:
                return error
        except WorkerLost as error:
            simulator = None
            return error
        finally:
            simulators.put(simulator)

    solved = failures = 0
    tried = scenes[: MAX_ATTEMPTS * n]
    with ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=n, desc="the expert plays", unit="scene"))
        stack.callback(_close_all, simulators)
        for scene, outcome in stack.enter_context(closing(_in_order(play, tried, n_envs))):
            if isinstance(outcome, Exception):
                failures += 1
                if str(outcome) == PLANNER_HINT:
                    raise ValueError(PLANNER_HINT) from outcome
                if failures >= MAX_FAILURES:
                    raise ValueError(
                        f"RoboTwin's expert broke down in {failures} scenes of {env.task} in a row, in scene {scene} "
                        f"with: {outcome}"
                    ) from outcome
                tqdm.write(f"Scene {scene} is left out: {outcome}")
                continue
            if outcome is None:
                yield scene, None
            else:
                failures = 0
                info, arrays = outcome
                if not info["success"] or (evaluates and info["scene_seed"] != scene):
                    continue
                yield info["scene_seed"], arrays["actions"]
            solved += 1
            bar.update(1)
            if solved == n:
                return
    if tried[-1] == scenes[-1]:
        raise ValueError(f"There are no more scenes after {scenes[-1]:,}: {solved} of {len(tried)} were solved.")
    raise ValueError(
        f"RoboTwin's expert solved {solved} of {len(tried)} scenes of {env.task}, too few to go on. Some tasks are "
        "beyond it with this robot."
    )


def _close_all(simulators: SimpleQueue[RemoteSimulator | None]) -> None:
    while not simulators.empty():
        simulator = simulators.get()
        if simulator is not None:
            simulator.close()


def _in_order(
    function: Callable[[int], T], items: Iterable[int], n_threads: int
) -> Generator[tuple[int, T], None, None]:
    """
    Results of calls that run at once, in the order of their items. Threads are enough: they wait for other processes.

    When the iterator is closed, or a call raises, no further call begins, and those that have begun come to their end.
    """
    waiting: deque[tuple[int, Future[T]]] = deque()
    with ThreadPoolExecutor(n_threads) as pool:
        try:
            for item in items:
                waiting.append((item, pool.submit(function, item)))
                if len(waiting) == 2 * n_threads:
                    first, future = waiting.popleft()
                    yield first, future.result()
            for first, future in waiting:
                yield first, future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def run_demos(args: RobotwinDemos) -> int:
    """
    :param args: what to replay
    :return: exit status
    """
    from opd_gym.envs.robotwin.traces import Trace, find_traces

    traces = [Trace.load(path) for path in find_traces(args.traces)]
    for task in dict.fromkeys(trace.task for trace in traces):
        path = make_demonstrations(
            [trace for trace in traces if trace.task == task],
            args.output / f"{task}_demo.hdf5",
            replays=args.replays,
            perturbation=args.perturbation,
            seed=args.seed,
            n_envs=args.n_envs,
            progress=args.progress,
            chunk_size=args.chunk_size,
            image_size=args.image_size,
            cameras=args.cameras,
            shader=args.shader,
        )
        print(f"Demonstrations: {path}")
    return 0


def make_demonstrations(
    traces: Sequence[Trace],
    path: Path,
    replays: int = 1,
    perturbation: float = 0.0,
    seed: int = 0,
    n_envs: int = 1,
    progress: bool = True,
    **env_kwargs: Any,
) -> Path:
    """
    Replay traces of one task, keep what ends in success, and write it in LIBERO's HDF5 format.

    The file's ``env_args`` hold the ``statistics`` with which action tokens cover these demonstrations.

    :param traces: of one task
    :param path: the file
    :param replays: demonstrations of each trace; every second one begins with a chunk of another length
    :param perturbation: see :func:`opd_gym.envs.robotwin.traces.replay`
    :param seed: seed of the perturbations
    :param n_envs: simulators that replay at once, each in its own process; what is written does not depend on it
    :param progress: show a progress bar
    :param env_kwargs: keyword arguments of the env
    :return: the file
    :raises ValueError: several traces in a row could not be replayed; a single one is left out
    """
    from opd_gym.actions import JOINTS, statistics_of_actions
    from opd_gym.demonstrations import Episode, write_demonstrations
    from opd_gym.envs.robotwin.traces import make_env, replay

    check_at_least_one(replays=replays, n_envs=n_envs)
    check_range("[0, 1]", perturbation=perturbation)
    if n_envs > 1 and env_kwargs.get("in_process"):
        raise ValueError(f"{n_envs} simulators at once need a process each: leave in_process out, or take n_envs=1.")

    def replays_of(i: int, env: RoboTwinEnv) -> list[Episode]:
        trace = traces[i]
        kept: list[Episode] = []
        for attempt in range(MAX_ATTEMPTS * replays):
            own_seed = seed + 1000 * (i * replays + len(kept)) + attempt
            first = int(np.random.default_rng(own_seed).integers(1, (env.chunk_size or 1) + 1))
            pushed = perturbation if kept or replays == 1 else 0.0
            # Without a push an attempt is like the one before, unless its chunks begin elsewhere
            shifted = len(kept) % 2 or (attempt and not pushed)
            played = replay(trace, env, pushed, first if shifted else None, own_seed, i)
            if not played.success:
                continue
            bar.update(1)
            attrs = {"task_id": env.task_id, "scene_seed": trace.scene_seed, "seed": own_seed}
            chunks = played.action_chunks
            kept.append(Episode(played.observations, chunks[:, 0], chunks, played.instruction, attrs=attrs))
            if len(kept) == replays:
                return kept
        return kept

    actions: list[np.ndarray] = []
    with ExitStack() as stack:
        envs: SimpleQueue[RoboTwinEnv] = SimpleQueue()
        for _ in range(min(n_envs, len(traces))):
            envs.put(stack.enter_context(closing(make_env(traces, **env_kwargs))))
        bar = stack.enter_context(
            tqdm(total=len(traces) * replays, desc="replaying", unit="episode", disable=not progress)
        )

        def take_turns(i: int) -> list[Episode]:
            env = envs.get()
            try:
                return replays_of(i, env)
            finally:
                envs.put(env)

        def episodes() -> Generator[Episode, None, None]:
            failures = 0
            for i, played in stack.enter_context(closing(_in_order(take_turns, range(len(traces)), n_envs))):
                actions.extend(episode.action_chunks.reshape(-1, JOINTS) for episode in played)  # type: ignore[union-attr]
                yield from played
                failures = 0 if played else failures + 1
                if len(played) == replays:
                    continue
                trace = traces[i]
                said = (
                    f"The trace of {trace.task} in scene {trace.scene_seed} ended in success {len(played)} times in "
                    f"{MAX_ATTEMPTS * replays} replays."
                )
                if failures == min(MAX_FAILURES, len(traces)):
                    raise ValueError(
                        f"{failures} in a row could not be replayed. {said} Lower the perturbation ({perturbation})."
                    )
                tqdm.write(f"{said} It is left at that.")

        def about() -> dict[str, Any]:
            statistics = statistics_of_actions(np.concatenate(actions))
            made = {"env_name": traces[0].task, "perturbation": perturbation, "stand_in": traces[0].stand_in}
            return {**made, "statistics": statistics}

        write_demonstrations(path, episodes(), env_args=about)
    return path
