"""Distil the zoo's teacher on the two tasks of LIBERO-Object at which its student is worst; a film before and after."""

from typing import Any

import imageio.v2 as imageio
import tyro
from stable_baselines3.common.utils import LinearSchedule

from opd_gym import OPD, make_vec
from opd_gym.evaluation import eval_episodes, evaluate_success
from opd_gym.policies.loading import load_policy


def main(
    decisions: int = 2048, n_steps: int = 64, episodes: int = 10, tasks: tuple[int, ...] = (4, 7), seed: int = 0
) -> None:
    # What the zoo says of LiberoObject-v0, for two of its tasks; render_mode is for the film
    env_kwargs = {"task_ids": tasks, "visuals": "light", "image_size": 64, "horizon": 160, "render_mode": "rgb_array"}
    env = make_vec("LiberoObject-v0", n_envs=2, seed=seed, env_kwargs=env_kwargs)
    student = {"checkpoint": "libero-object-student"}
    zoo: dict[str, Any] = {"learning_rate": LinearSchedule(1e-3, 0.0, 1.0), "augmentation": "random_shift_batch"}
    zoo |= {"policy_kwargs": student, "gradient_steps": 40, "n_steps": n_steps, "temperature": 0.05}
    model = OPD("VLAPolicy", env, teacher="libero-object-teacher", seed=seed, **zoo)
    teacher = load_policy("libero-object-teacher", env.observation_space, env.action_space)

    held_out = eval_episodes(tasks, episodes)  # LIBERO's official initial states, on which nobody trains
    print("teacher:       ", evaluate_success(teacher, env, held_out, progress=False), flush=True)
    before = evaluate_success(model, env, held_out, progress=False, record=1)
    print("student before:", before, flush=True)
    model.learn(decisions)
    after = evaluate_success(model, env, held_out, progress=False, record=1)
    print("student after: ", after)
    print(after.to_markdown("after"))  # by task

    model.policy.save_checkpoint("libero_student")  # opd-gym eval --env LiberoObject-v0 --checkpoint libero_student
    imageio.mimsave("before_after.gif", [*before.frames[0], *after.frames[0]], duration=200, loop=0)
    env.close()


if __name__ == "__main__":
    tyro.cli(main)
