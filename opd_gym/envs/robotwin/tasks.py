"""
RoboTwin's tasks, their step limits, and which scenes are for training and which for evaluation. Nothing here imports
RoboTwin.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

# Actions until truncation in RoboTwin's own evaluation (its `_eval_step_limit.yml`). A task's number is its place here.
TASKS = {
    "adjust_bottle": 400,
    "beat_block_hammer": 400,
    "blocks_ranking_rgb": 1200,
    "blocks_ranking_size": 1200,
    "click_alarmclock": 400,
    "click_bell": 400,
    "dump_bin_bigbin": 600,
    "grab_roller": 400,
    "handover_block": 800,
    "handover_mic": 600,
    "hanging_mug": 900,
    "lift_pot": 400,
    "move_can_pot": 400,
    "move_pillbottle_pad": 400,
    "move_playingcard_away": 400,
    "move_stapler_pad": 400,
    "open_laptop": 700,
    "open_microwave": 1500,
    "pick_diverse_bottles": 400,
    "pick_dual_bottles": 400,
    "place_a2b_left": 400,
    "place_a2b_right": 400,
    "place_bread_basket": 700,
    "place_bread_skillet": 500,
    "place_burger_fries": 500,
    "place_can_basket": 700,
    "place_cans_plasticbox": 800,
    "place_container_plate": 400,
    "place_dual_shoes": 600,
    "place_empty_cup": 500,
    "place_fan": 400,
    "place_mouse_pad": 400,
    "place_object_basket": 700,
    "place_object_scale": 400,
    "place_object_stand": 400,
    "place_phone_stand": 400,
    "place_shoe": 500,
    "press_stapler": 400,
    "put_bottles_dustbin": 1700,
    "put_object_cabinet": 700,
    "rotate_qrcode": 400,
    "scan_object": 500,
    "shake_bottle": 700,
    "shake_bottle_horizontally": 700,
    "stack_blocks_three": 1200,
    "stack_blocks_two": 800,
    "stack_bowls_three": 1200,
    "stack_bowls_two": 900,
    "stamp_seal": 400,
    "turn_switch": 400,
}

# The tasks whose objects are primitives: they need a robot, but no mesh.
MESHLESS_TASKS = (
    "blocks_ranking_rgb",
    "blocks_ranking_size",
    "handover_block",
    "stack_blocks_three",
    "stack_blocks_two",
)

# The tasks that run with the stand-in, which has the objects of three more. These three and handover_block are the
# paper's four.
STAND_IN_TASKS = (*MESHLESS_TASKS, "pick_dual_bottles", "place_empty_cup", "stack_bowls_two")

# RoboTwin's scenes are named by a seed. Its own evaluation begins at 100,000, data are collected from 0 upwards.
TRAIN_SEEDS = range(100_000)
EVAL_SEEDS = range(100_000, 100_100)
# In some scenes an object topples. Such a seed is replaced by the one this much higher, which no list of seeds may
# contain.
SEED_STRIDE = 1_000_000
MAX_UNSTABLE = 20


def camel(task: str) -> str:
    """
    :param task: RoboTwin's name of a task, for instance ``handover_block``
    :return: as it is in an environment id, ``HandoverBlock``
    """
    return "".join(word.capitalize() for word in task.split("_"))


def task_id(task: str) -> int:
    """
    :param task: RoboTwin's name of a task
    :return: its number, which ``info["task_id"]`` gives
    :raises ValueError: unknown task
    """
    if task not in TASKS:
        raise ValueError(f"Unknown RoboTwin task {task!r}. Known: {', '.join(TASKS)}.")
    return list(TASKS).index(task)


def check_seeds(name: str, seeds: Sequence[int]) -> Sequence[int]:
    """
    :param name: name of the argument, for the error
    :param seeds: seeds of scenes
    :return: the seeds
    :raises ValueError: there is none, or one outside [0, 1,000,000), or no integer
    """
    whole = isinstance(seeds, range) or all(seed == int(seed) for seed in seeds)
    if len(seeds) == 0 or not whole or min(seeds) < 0 or max(seeds) >= SEED_STRIDE:
        raise ValueError(
            f"{name} must be seeds of scenes, at least one, all of them integers from 0 to {SEED_STRIDE - 1:,}; got "
            f"{seeds!r}. Higher ones are kept for replacing unstable scenes."
        )
    return seeds


def read_seeds(path: str | os.PathLike[str]) -> list[int]:
    """
    :param path: JSON file of a list of seeds, as ``opd-gym robotwin seeds`` writes it
    :return: the seeds
    :raises FileNotFoundError: it is not there
    :raises ValueError: it holds something else
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path} of seeds. `opd-gym robotwin seeds` writes one.")
    try:
        seeds = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        seeds = None
    if not isinstance(seeds, list) or not all(type(seed) is int for seed in seeds):
        raise ValueError(f"{path} is not a JSON list of seeds. `opd-gym robotwin seeds` writes one.")
    return seeds


def scene_seeds(seed: int) -> range:
    """
    :param seed: seed of a scene
    :return: the seed and those that take its place, in order, where the scene is unstable
    """
    return range(seed, seed + MAX_UNSTABLE * SEED_STRIDE, SEED_STRIDE)
