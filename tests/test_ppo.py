import numpy as np
import pytest
import stable_baselines3
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from toys import TINY_BODY, Robot, parameters, vec

from opd_gym.algorithms.ppo import PPO
from opd_gym.envs.wrappers import ActionChunk, ActionTokens

SMALL = dict(n_steps=64, batch_size=32, n_epochs=3, seed=1, device="cpu")


@pytest.mark.parametrize(
    ("env_id", "kwargs"),
    [
        ("CartPole-v1", dict(ent_coef=0.01, clip_range_vf=0.2)),
        ("Pendulum-v1", dict(target_kl=0.01)),
        ("Pendulum-v1", dict(use_sde=True, sde_sample_freq=8)),
    ],
)
def test_equals_stable_baselines3(env_id, kwargs):
    runs = []
    for cls in (stable_baselines3.PPO, PPO):
        model = cls("MlpPolicy", make_vec_env(env_id, 2, seed=3), **SMALL, **kwargs)
        runs.append(parameters(model.learn(512)))
    assert th.allclose(*runs, atol=1e-5)


def test_ratio_per_token():
    model = PPO("MlpPolicy", vec(kind="multi_discrete"), ratio="token", **SMALL).learn(256)
    assert model.rollout_buffer.token_log_probs.shape == (128, 2)
    assert not PPO("MlpPolicy", vec(kind="multi_discrete"), **SMALL)._per_token


def test_learns_a_sparse_task():
    model = PPO("MlpPolicy", vec(4, horizon=2), learning_rate=3e-3, **SMALL)
    model.learn(6000)
    assert np.mean(model.ep_success_buffer) > 0.5


def test_save_load_resume(tmp_path):
    model = PPO("MlpPolicy", vec(), clip_range_vf=0.1, **SMALL).learn(128)
    model.save(tmp_path / "model")
    loaded = PPO.load(tmp_path / "model", env=vec())
    assert th.equal(parameters(loaded), parameters(model))
    assert loaded.learn(128, reset_num_timesteps=False).num_timesteps == 256


def test_vla_policy_needs_a_value_head():
    env = ActionTokens(ActionChunk(Robot(), 4))
    with pytest.raises(ValueError, match="value_head"):
        PPO("VLAPolicy", env, policy_kwargs=dict(body_kwargs=TINY_BODY), **SMALL)
    kwargs = {**SMALL, "n_steps": 16, "batch_size": 16, "policy_kwargs": dict(body_kwargs=TINY_BODY, value_head=True)}
    model = PPO("VLAPolicy", env, **kwargs)
    assert model._per_token
    model.learn(16)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(ratio="both"), "ratio"),
        (dict(batch_size=1), "batch_size"),
        (dict(clip_range_vf=-1.0), "clip_range_vf"),
        (dict(use_sde=True, temperature=2.0), "temperature=1.0"),
    ],
)
def test_bad_arguments_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        PPO("MlpPolicy", "Pendulum-v1", **kwargs)
