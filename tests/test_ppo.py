import numpy as np
import pytest
import stable_baselines3
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from toys import TINY_BODY, Match, Robot, parameters, vec

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


class Cut(Match):
    """Between one and three of the three tokens of a decision are executed."""

    def step(self, action):
        *rest, info = super().step(action)
        return *rest, {**info, "n_executed_tokens": 1 + self.t % 3}


@pytest.mark.parametrize("ratio", ["joint", "token"])
@pytest.mark.parametrize("micro_batch_size", [1, 5, 32])
def test_micro_batches_add_up_to_the_minibatch(ratio, micro_batch_size, tmp_path):
    """Gradient and metrics, with parts of unequal numbers of decisions and of tokens; normalised as a whole."""
    gradients, logs = [], []
    for size in (None, micro_batch_size):
        model = PPO(
            "MlpPolicy", vec(env=Cut, kind="multi_binary"), ratio=ratio, ent_coef=0.1, clip_range_vf=0.1,
            clip_range=0.01, micro_batch_size=size, temperature=1.3, max_grad_norm=1e9, **SMALL,
        )  # fmt: skip
        model.set_logger(configure(str(tmp_path / f"{size}"), ["csv"]))
        steps, step = [], model.policy.optimizer.step
        gradients.append(steps)

        def record(model=model, steps=steps, step=step):
            steps.append(th.cat([p.grad.flatten() for p in model.policy.parameters()]))
            step()

        model.policy.optimizer.step = record
        model.learn(128)
        logs.append(np.genfromtxt(tmp_path / f"{size}" / "progress.csv", delimiter=",", names=True)[-1])
    assert len(gradients[0]) == len(gradients[1]) == 12
    assert gradients[0][0].norm() > 0.1 and not th.allclose(gradients[0][0], gradients[0][1], atol=1e-3)
    assert th.allclose(gradients[0][0], gradients[1][0], atol=1e-6, rtol=0)
    assert logs[0]["trainclip_fraction"] > 0
    for name in ("loss", "policy_gradient_loss", "entropy_loss", "value_loss", "approx_kl", "clip_fraction"):
        assert logs[0][f"train{name}"] == pytest.approx(logs[1][f"train{name}"], abs=1e-5), name


def test_the_kl_of_the_whole_minibatch_stops_before_the_step():
    """Where Stable-Baselines3 stops, for several limits."""
    n_updates = set()
    for target_kl in (1e-4, 1e-3, 3e-3, 1e-2):
        settings = dict(target_kl=target_kl, n_steps=64, batch_size=32, n_epochs=8, learning_rate=3e-3, seed=1)
        expected = parameters(
            stable_baselines3.PPO("MlpPolicy", vec(control=False), device="cpu", **settings).learn(128)
        )
        runs = []
        for size in (None, 7):
            model = PPO("MlpPolicy", vec(control=False), micro_batch_size=size, device="cpu", **settings).learn(128)
            assert th.allclose(parameters(model), expected, atol=1e-5)
            assert all(p.grad is None or not p.grad.any() for p in model.policy.parameters())
            runs.append(model._n_updates)
        assert runs[0] == runs[1]
        n_updates.add(runs[0])
    assert len(n_updates) >= 3 and max(n_updates) < 32


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
        (dict(micro_batch_size=0), "micro_batch_size must be at least 1"),
        (dict(clip_range_vf=-1.0), "clip_range_vf"),
        (dict(use_sde=True, temperature=2.0), "temperature=1.0"),
    ],
)
def test_bad_arguments_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        PPO("MlpPolicy", "Pendulum-v1", **kwargs)
