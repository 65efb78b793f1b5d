"""A teacher that sees velocities, a student that has to read them off the last four positions, on CartPole."""

from collections import deque

import gymnasium as gym
import numpy as np
import tyro
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy

from opd_gym import OPD, make_vec
from opd_gym.envs.wrappers import PrivilegedObservation


class Positions(gym.ObservationWrapper):
    """CartPole's whole `state`, and the last `n` positions of cart and pole: what a camera would see."""

    def __init__(self, env, n=4):
        super().__init__(env)
        self.seen = deque(maxlen=n)
        positions = spaces.Box(-np.inf, np.inf, (2 * n,), np.float32)
        self.observation_space = spaces.Dict({"positions": positions, "state": env.observation_space})

    def reset(self, **kwargs):
        self.seen.clear()
        return super().reset(**kwargs)

    def observation(self, state):
        self.seen.extend([state[[0, 2]]] * (1 if self.seen else self.seen.maxlen))
        return {"positions": np.concatenate(self.seen), "state": state}


def main(teacher_steps: int = 30_000, student_steps: int = 8_000, seed: int = 0) -> None:
    teacher = PPO("MlpPolicy", "CartPole-v1", seed=seed, device="cpu").learn(teacher_steps)
    print("teacher, which sees the velocities:", evaluate_policy(teacher, teacher.get_env(), 20)[0])
    for n in (1, 4):
        # What is wrapped away from the student, the teacher still sees
        hide = lambda env, n=n: PrivilegedObservation(Positions(env, n), keys=["state"])  # noqa: E731
        env = make_vec("CartPole-v1", n_envs=4, seed=seed, wrapper=hide)
        kwargs = {"teacher": teacher, "teacher_kwargs": {"obs_keys": ["state"]}, "seed": seed}
        student = OPD("MultiInputPolicy", env, **kwargs).learn(student_steps)
        print(f"student, which sees {n} position(s):", evaluate_policy(student, env, 20)[0])


if __name__ == "__main__":
    tyro.cli(main)
