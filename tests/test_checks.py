"""Numbers that make no sense are refused by the name of their argument, before anything is built."""

import math
import re
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from toys import Robot, vec

import opd_gym
from opd_gym import GRPO, OPD, PPO, SFT
from opd_gym.actions import bin_centers
from opd_gym.algorithms.buffers import StateReplay
from opd_gym.checks import check_at_least, check_range, check_schedule
from opd_gym.cli import options
from opd_gym.cli.video import write_video
from opd_gym.demonstrations import Demonstrations
from opd_gym.envs.workers.vec_env import WorkerVecEnv
from opd_gym.envs.wrappers import ActionChunk, ActionTokens
from opd_gym.episodes import EpisodeSpec
from opd_gym.evaluation import eval_episodes
from opd_gym.instructions import encode_instruction
from opd_gym.policies.adapters import check_lora
from opd_gym.tokens import CategoricalTokens, GaussianTokens, TokenSpec

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("value", [1, 7, np.int64(1), np.uint8(200)])
def test_integers_of_any_kind_are_counts(value):
    check_at_least(1, n=value, m=None)


@pytest.mark.parametrize("value", [True, np.True_, 1.0, np.float32(2), NAN, "3", [2]])
def test_other_things_are_no_counts(value):
    with pytest.raises(ValueError, match="n must be an integer, got"):
        check_at_least(1, n=value)


def test_intervals_say_whether_they_include_their_bounds():
    check_range("[0, 1)", x=0, y=np.float32(0.5), z=0.999)
    check_range("(0, inf]", x=INF)
    for interval, value in [("[0, 1)", 1.0), ("(0, inf)", 0.0), ("(0, inf)", INF), ("[0, 1]", -1e-9), ("[0, 1]", NAN)]:
        with pytest.raises(ValueError, match=re.escape(f"x must be a number in {interval}, got {value!r}.")):
            check_range(interval, x=value)
    for value in (True, "0.5", None, np.array([0.5]), 10**400):
        with pytest.raises(ValueError, match="x must be a number in"):
            check_range("[0, 1]", x=value)


def test_schedules_are_followed_to_their_end():
    check_schedule("(0, inf)", rate=lambda progress: 0.1 * progress)
    with pytest.raises(ValueError, match=r"rate at progress 0.0 must be a number in \[0, inf\), got -0.1"):
        check_schedule("(0, inf)", rate=lambda progress: 0.2 * progress - 0.1)


SHARED = {
    "learning_rate": [-1e-3, NAN, INF, None, lambda progress: progress - 0.1, lambda progress: NAN],
    "max_grad_norm": [-1, 0.0, NAN],
    "seed": [-1, 1.5],
    "stats_window_size": [0, 2.5],
}
ROLLOUT = {"temperature": [0, -1.0, INF, NAN]}
WRONG = {
    OPD: {**SHARED, **ROLLOUT, "n_steps": [0, 1.5, NAN, None], "batch_size": [0, 2.0, True], "micro_batch_size": [0]}
    | {"group_size": [0], "state_replay": [-5, 1.5], "gradient_steps": [0, 1.5], "n_epochs": [0, True]}
    | {"weight_decay": [-1.0, NAN, INF]},
    GRPO: {**SHARED, **ROLLOUT, "group_size": [1, 2.5], "n_groups": [0, 1.5], "n_epochs": [0], "micro_batch_size": [0]}
    | {"clip_range": [-0.2, 0.0, NAN], "clip_range_high": [0, INF], "trajectories_per_batch": [0, 1.0]}
    | {"dynamic_sampling": [0.5, (0.1,), (NAN, 0.9)], "weight_decay": [NAN]},
    PPO: {**SHARED, **ROLLOUT, "n_steps": [0], "n_epochs": [0, 1.5], "gamma": [-0.1, 1.1, NAN], "gae_lambda": [2, NAN]}
    | {"ent_coef": [-1.0, NAN], "vf_coef": [-0.5, INF], "clip_range": [0, NAN, lambda progress: -1.0]}
    | {"clip_range_vf": [-1, NAN], "target_kl": [0, -0.1, NAN], "sde_sample_freq": [-2, 1.5]},
    SFT: {**SHARED, "label_smoothing": [-1.0, NAN, INF], "validation_fraction": [-0.1, 1.0, NAN], "n_demos": [0, 1.5]}
    | {"chunk_size": [0, 2.5], "warmup_steps": [-1, 0.5], "batch_size": [0, 8.0], "validation_freq": [0]},
}


@pytest.mark.parametrize(
    ("algorithm", "name", "value"),
    [(cls, name, value) for cls, wrong in WRONG.items() for name, values in wrong.items() for value in values],
)
def test_hyperparameters_that_make_no_sense(algorithm, name, value):
    with pytest.raises(ValueError, match=name):
        algorithm("MlpPolicy", "no such env", **{name: value})  # refused before the env is looked for


@pytest.mark.parametrize("kwargs", [{"temperature": INF}, {"max_grad_norm": NAN}, {"learning_rate": -1.0}])
def test_load_refuses_them_too(kwargs, tmp_path):
    OPD("MlpPolicy", vec(1), teacher="expert", device="cpu").save(tmp_path / "model")
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        OPD.load(tmp_path / "model", **kwargs)


def test_a_schedule_that_turns_negative_in_between_ends_the_training():
    def rate(progress):
        return -1e-3 if 0.5 < progress < 1.0 else 1e-3

    model = OPD("MlpPolicy", vec(1), teacher="expert", learning_rate=rate, n_steps=8, device="cpu")
    with pytest.raises(ValueError, match="learning_rate must be"):
        model.learn(32)


@pytest.mark.parametrize("kwargs", [{"total_timesteps": -1}, {"total_timesteps": NAN}, {"log_interval": 0}])
def test_learning_for_no_such_time(kwargs):
    data = Demonstrations(np.zeros((4, 3), np.float32), np.zeros(4, np.int64))
    for model in (PPO("MlpPolicy", vec(1), device="cpu"), SFT("MlpPolicy", demonstrations=data, device="cpu")):
        with pytest.raises(ValueError, match=next(iter(kwargs))):
            model.learn(**{"total_timesteps": 4, **kwargs})


def test_what_numpy_counts_is_a_count():
    kwargs = dict(seed=np.int64(1), n_steps=np.int32(8), batch_size=np.int16(4), max_grad_norm=np.float32(0.5))
    OPD("MlpPolicy", vec(1), teacher="expert", device="cpu", **kwargs).learn(np.int64(8))
    opd_gym.make_vec("CartPole-v1", n_envs=np.int64(1), seed=np.int64(3)).reset()
    assert type(EpisodeSpec(seed=np.int64(4)).seed) is int


LOGITS = th.zeros(1, 1, 2).log_softmax(-1)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("n_envs", lambda: opd_gym.make_vec("CartPole-v1", n_envs=0)),
        ("n_envs", lambda: opd_gym.make_vec("CartPole-v1", n_envs=1.5)),
        ("n_envs", lambda: opd_gym.make_vec("CartPole-v1", n_envs=True)),
        ("n_workers", lambda: opd_gym.make_vec("CartPole-v1", n_envs=2, n_workers=1.5)),
        ("seed", lambda: opd_gym.make_vec("CartPole-v1", seed=-1)),
        ("n_workers", lambda: WorkerVecEnv([Robot], n_workers=True)),
        ("timeout", lambda: WorkerVecEnv([Robot], timeout=NAN)),
        ("chunk_size", lambda: ActionChunk(Robot(), 2.5)),
        ("chunk_size", lambda: ActionChunk(Robot(), True)),
        ("n_bins", lambda: ActionTokens(ActionChunk(Robot(), 2), n_bins=16.0)),
        ("n_bins", lambda: bin_centers(2)),
        ("n_per_task", lambda: eval_episodes([0], 1.5)),
        ("seed", lambda: eval_episodes([0], 1, "sampled", seed=-1)),
        ("seed", lambda: EpisodeSpec(seed=-1)),
        ("length", lambda: encode_instruction("", 0)),
        ("rank r", lambda: check_lora({"r": True})),
        ("lora_dropout", lambda: check_lora({"lora_dropout": 1.0})),
        ("capacity", lambda: StateReplay(2.5, gym.spaces.Box(-1, 1, (2,)), TokenSpec(1, 2))),
        ("temperature", lambda: CategoricalTokens(LOGITS).temper(0.0)),
        ("temperature", lambda: GaussianTokens(th.zeros(1, 1), th.zeros(1, 1)).temper(INF)),
        ("fps", lambda: write_video("film.gif", [np.zeros((2, 2, 3), np.uint8)], fps=0)),
        ("chunk_size", lambda: Demonstrations.from_episodes([], chunk_size=2.0)),
        ("image_size", lambda: Demonstrations.from_episodes([], image_size=(8, 8, 3))),
        ("image_size", lambda: Demonstrations.from_episodes([], image_size=(8, 0))),
        ("--episodes", lambda: options.Eval(checkpoint="c", env=("A",), episodes=-1)),
        ("--n-envs", lambda: options.Enjoy(checkpoint="c", env="A", n_envs=0)),
        ("--fps", lambda: options.Enjoy(checkpoint="c", env="A", fps=NAN)),
        ("--reward-threshold", lambda: options.Eval(checkpoint="c", env=("A",), reward_threshold=NAN)),
        ("--task-ids", lambda: options.Eval(checkpoint="c", env=("A",), task_ids=(0, -1))),
        ("--eval-episodes", lambda: options.Train(eval_episodes=-1)),
        ("--checkpoint-interval", lambda: options.Train(checkpoint_interval=NAN)),
        ("--n-timesteps", lambda: options.Train(n_timesteps=0)),
        ("--minutes", lambda: options.Quickstart(minutes=-3.0)),
        ("--perturbation", lambda: options.Demos(env="A", perturbation=1.5)),
        ("--image-size", lambda: options.RobotwinDemos(traces=(Path("t"),), image_size=(240, 0))),
        ("--scenes", lambda: options.RobotwinSeeds(env="A", scenes=0)),
    ],
)
def test_arguments_that_make_no_sense(name, make):
    with pytest.raises(ValueError, match=f"{name} .*must be|{name} must be"):
        make()
