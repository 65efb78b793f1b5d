"""
Two small data sets that LeRobot itself writes, one with pictures and one with videos, and what LeRobot reads from them.

Python 3.12 with ``lerobot[dataset]==0.6.1``; ``python make_golden.py`` replaces what lies beside it.
"""

import json
import shutil
from pathlib import Path

import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset

HERE = Path(__file__).parent
SIZE, FPS = 64, 20
LENGTHS = (5, 7)
TASKS = ("put the bowl on the plate", "open the drawer")
FEATURES = {
    "observation.images.image": {"dtype": "image", "shape": (SIZE, SIZE, 3), "names": ["height", "width", "channel"]},
    "observation.images.image2": {"dtype": "image", "shape": (SIZE, SIZE, 3), "names": ["height", "width", "channel"]},
    "observation.state": {"dtype": "float32", "shape": (8,), "names": ["state"]},
    "action": {"dtype": "float32", "shape": (7,), "names": ["actions"]},
}


def picture(episode: int, step: int, camera: int) -> np.ndarray:
    """No two alike, and none like its mirror image."""
    rows, columns = np.mgrid[:SIZE, :SIZE] * (255 / (SIZE - 1))
    return np.stack([columns, rows, np.full_like(rows, 20 * step + 100 * camera + 50 * episode)], axis=-1).astype("u1")


def write(name: str, dtype: str) -> None:
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    features = {
        key: {**value, "dtype": dtype if "images" in key else value["dtype"]} for key, value in FEATURES.items()
    }
    dataset = LeRobotDataset.create(f"opd_gym/{name}", FPS, features, folder, "panda", use_videos=dtype == "video")
    rng = np.random.default_rng(0)
    for episode, (length, task) in enumerate(zip(LENGTHS, TASKS, strict=True)):
        for step in range(length):
            position, rotation = rng.uniform(-0.2, 1.2, 3), rng.uniform(-3.0, 3.0, 3)
            state = np.concatenate([position, rotation, [0.04, -0.04] if step < 3 else [0.01, -0.012]])
            frame = {
                "observation.images.image": picture(episode, step, 0),
                "observation.images.image2": picture(episode, step, 1),
                "observation.state": state.astype(np.float32),
                "action": rng.uniform(-1.0, 1.0, 7).astype(np.float32),
                "task": task,
            }
            dataset.add_frame(frame)
        dataset.save_episode(parallel_encoding=False)
    dataset.finalize()
    shutil.rmtree(folder / "images", ignore_errors=True)
    read = LeRobotDataset(f"opd_gym/{name}", folder, video_backend="pyav")
    rows = [read[i] for i in range(len(read))]
    values = {
        key: np.stack([row[key].numpy() for row in rows]) for key in ("observation.state", "action", "episode_index")
    }
    if dtype == "video":  # the others are what was written
        pictures = np.stack([row["observation.images.image"].numpy() for row in rows])
        values["observation.images.image"] = (pictures * 255).round().astype(np.uint8).transpose(0, 2, 3, 1)
    np.savez_compressed(HERE / f"{name}.npz", task=[row["task"] for row in rows], **values)


if __name__ == "__main__":
    write("images", "image")
    write("videos", "video")
    print(json.dumps({path.name: path.stat().st_size for path in sorted(HERE.rglob("*")) if path.is_file()}, indent=1))
