"""
What demonstrations had cost: episodes that were kept and that failed, labelled decisions and env steps.

    python benchmarks/count_demonstrations.py runs/libero_suites/goal/demos -o goal.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py

from opd_gym.envs.libero import suites
from opd_gym.files import write_atomic


def count(path: Path, n_demos: int | None = None) -> dict[str, int]:
    """
    :param path: a file of ``opd-gym demos``
    :param n_demos: only the first so many episodes of it, as SFT's ``n_demos`` takes them; None for all
    :return: ``episodes`` in it; ``decisions`` that are labelled; all ``env_steps`` of these episodes (of a file that
        does not tell, those of its labels: rounded up to whole strides, and without those before a push); ``failed``
        episodes that were played between them, which take ``env_steps_failed``: the suite's horizon each. Solved ones
        without a state to record count among these
    :raises ValueError: it holds no episode
    """
    with h5py.File(path) as file:
        data = file["data"]
        recipe: dict[str, Any] = json.loads(data.attrs["env_args"])
        demos = [data[f"demo_{number}"] for number in range(len(data))][:n_demos]
        if not demos:
            raise ValueError(f"{path} holds no episode.")
        decisions = sum(len(demo["actions"]) for demo in demos)
        steps = [int(demo.attrs.get("env_steps", recipe["stride"] * len(demo["actions"]))) for demo in demos]
        # Seeds are counted up from the first one of the task, whatever becomes of the episode
        first = recipe["seed"] + 1000 * int(demos[0].attrs["task_id"])
        played = max(int(demo.attrs["seed"]) for demo in demos) - first + 1
    spec = gym.spec(recipe["env_name"])
    failed = played - len(demos)
    return {
        "episodes": len(demos),
        "decisions": decisions,
        "env_steps": sum(steps),
        "failed": failed,
        "env_steps_failed": failed * suites.horizon(spec.kwargs["suite"]),
    }


def main() -> None:
    """Counts of all files of a folder together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where `opd-gym demos` has written")
    parser.add_argument("-n", "--n-demos", type=int, help="the first so many episodes of each task; default: all")
    parser.add_argument("-o", "--output", type=Path, help="JSON file")
    args = parser.parse_args()
    files = [count(path, args.n_demos) for path in sorted(args.folder.glob("*.hdf5"))]
    if not files:
        parser.error(f"There is no HDF5 file in {args.folder}.")
    text = json.dumps({key: sum(each[key] for each in files) for key in files[0]}, indent=1)
    print(text)
    if args.output is not None:
        write_atomic(args.output, text + "\n")


if __name__ == "__main__":
    main()
