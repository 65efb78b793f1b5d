"""Distil a PPO model of Stable-Baselines3 into a network of a hundredth of its size, on CartPole."""

import tyro
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from opd_gym import OPD


def main(teacher_steps: int = 30_000, student_steps: int = 8_000, seed: int = 0) -> None:
    teacher = PPO("MlpPolicy", "CartPole-v1", seed=seed, device="cpu").learn(teacher_steps)
    teacher.save("ppo_cartpole")  # OPD takes the zip as well: teacher="ppo_cartpole.zip"

    student = OPD("MlpPolicy", "CartPole-v1", teacher=teacher, policy_kwargs={"net_arch": [8]}, seed=seed)

    def show(name, model):
        # Not the envs of the training; the seeds are the same for all three
        returns, _ = evaluate_policy(model, make_vec_env("CartPole-v1", n_envs=4, seed=1_000), 20)
        weights = sum(parameter.numel() for parameter in model.policy.parameters())
        print(f"{name:15} {weights:6,} weights, mean return {returns:5.1f}")

    show("teacher", teacher)
    show("student before", student)
    student.learn(student_steps)
    show("student after", student)
    student.save("small_cartpole")  # OPD.load("small_cartpole") reads it


if __name__ == "__main__":
    tyro.cli(main)
