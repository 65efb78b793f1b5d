"""A training that was interrupted and resumed is the one that was not, to the bit."""

import io
import os
import signal

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecFrameStack
from toys import TINY_BODY, Match, Robot, parameters, vec

from opd_gym import GRPO, OPD, PPO, SFT
from opd_gym.demonstrations import Demonstrations
from opd_gym.envs.workers.process import give_up
from opd_gym.envs.workers.vec_env import WorkerVecEnv
from opd_gym.envs.wrappers import ActionChunk, ActionTokens, EpisodeControl

# 7 steps: in the middle of episodes of 4
COMMON = dict(seed=3, device="cpu", learning_rate=5e-3)
CASES = {
    "opd": (OPD, dict(teacher="expert", n_steps=7, batch_size=16, gradient_steps=3)),
    "opd_groups": (OPD, dict(teacher="expert", n_steps=7, batch_size=16, gradient_steps=3, group_size=3)),
    "sampled": (OPD, dict(teacher="expert", n_steps=7, estimator="sampled")),
    "grpo": (GRPO, dict(n_groups=2, group_size=3, dynamic_sampling=None, trajectories_per_batch=2)),
    "ppo": (PPO, dict(n_steps=7, batch_size=8, n_epochs=2)),
    "ppo_sde": (PPO, dict(n_steps=7, batch_size=8, n_epochs=2, use_sde=True, sde_sample_freq=3)),
}


class SavesOnce(BaseCallback):
    """Saves before an iteration, with what is replayed."""

    def __init__(self, folder, iteration):
        super().__init__()
        self.folder, self.iteration, self.n = folder, iteration, 0

    def _on_rollout_start(self):
        self.n += 1
        if self.n == self.iteration:
            self.model.save(self.folder / "model")
            if getattr(self.model, "replay_buffer", None) is not None:
                self.model.save_replay_buffer(self.folder / "states.npz")

    def _on_step(self):
        return True


def workers(n_envs):
    return WorkerVecEnv([lambda: EpisodeControl(Match())] * n_envs, n_workers=1)


def resumed(cls, folder, env, total):
    model = cls.load(folder / "model", env=env, device="cpu")
    if getattr(model, "replay_buffer", None) is not None:
        model.load_replay_buffer(folder / "states.npz")
    # Whatever was drawn in between
    th.rand(3), np.random.rand(5)
    return model.learn(total - model.num_timesteps, reset_num_timesteps=False)


@pytest.mark.parametrize(
    ("case", "make_env", "iteration"),
    [*((case, vec, n) for case in CASES for n in (1, 3)), ("opd", workers, 3), ("grpo", workers, 3)],
)
def test_same_as_without_the_interruption(case, make_env, iteration, tmp_path):
    cls, kwargs = CASES[case]
    make = (lambda: vec(2, kind="box")) if case == "ppo_sde" else lambda: make_env(2)
    env, again = make(), make()
    try:
        whole = cls("MlpPolicy", env, **COMMON, **kwargs).learn(70, callback=SavesOnce(tmp_path, iteration))
        model = resumed(cls, tmp_path, again, 70)
    finally:
        env.close(), again.close()
    assert model.num_timesteps == whole.num_timesteps and model._n_updates == whole._n_updates > 3
    assert model.num_env_steps == whole.num_env_steps and model._n_finished == whole._n_finished
    assert th.equal(parameters(model), parameters(whole))
    assert [info["r"] for info in model.ep_info_buffer] == [info["r"] for info in whole.ep_info_buffer]


def test_a_vla_goes_on_in_the_middle_of_an_episode(tmp_path):
    def env():
        return vec(2, lambda: ActionTokens(ActionChunk(Robot(horizon=40), 8)))

    kwargs = dict(teacher="expert", n_steps=3, batch_size=8, gradient_steps=2, augmentation="random_shift_batch")
    model = OPD("VLAPolicy", env(), policy_kwargs=dict(body_kwargs=TINY_BODY), **COMMON, **kwargs)
    whole = model.learn(24, callback=SavesOnce(tmp_path, 3))
    assert th.equal(parameters(resumed(OPD, tmp_path, env(), 24)), parameters(whole))


def test_supervised(tmp_path):
    obs = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    space = spaces.Box(-9, 9, (4,))
    data = Demonstrations(obs, obs.argmax(1), observation_space=space, action_space=spaces.Discrete(4))

    class Saves(SavesOnce):
        def _on_step(self):
            self._on_rollout_start()
            return True

    whole = SFT("MlpPolicy", demonstrations=data, **COMMON).learn(9, callback=Saves(tmp_path, 4))
    model = SFT.load(tmp_path / "model", device="cpu")
    assert model.num_timesteps == 4
    model.set_demonstrations(data)
    th.rand(3)
    model.learn(5, reset_num_timesteps=False)
    assert th.equal(parameters(model), parameters(whole))


class Numbered(Match):
    def process(self):
        return os.getpid()


class Noisy(Match):
    """A simulator that does not repeat itself."""

    def step(self, action):
        obs, *rest = super().step(action)
        return obs + np.random.default_rng().normal(size=obs.shape).astype(np.float32), *rest


@pytest.mark.parametrize(
    "env", [lambda: vec(2, Noisy), lambda: vec(3), lambda: vec(2, control=False), lambda: VecFrameStack(vec(2), 1)]
)
def test_new_episodes_where_the_old_ones_cannot_be_played_again(env, tmp_path):
    kwargs = dict(teacher="expert", n_steps=7, batch_size=16, gradient_steps=3)
    first = vec(2, Noisy) if isinstance(env().envs[0].unwrapped, Noisy) else vec(2)
    OPD("MlpPolicy", first, **COMMON, **kwargs).learn(42, callback=SavesOnce(tmp_path, 3))
    model = resumed(OPD, tmp_path, env(), 70)
    assert model.num_timesteps >= 70 and (model.rollout_buffer.episode_starts.reshape(-1)[0] in (0.0, 1.0))


def test_a_worker_that_died_just_before_the_save(tmp_path):
    """Its envs have lost episodes which the learner still thinks they play."""

    class Killer(SavesOnce):
        def _on_rollout_start(self):
            if self.n + 1 == self.iteration:
                os.kill(self.model.env.unwrapped.env_method("process", indices=[0])[0], signal.SIGKILL)
            super()._on_rollout_start()

    kwargs = dict(teacher="expert", n_steps=7, batch_size=16, gradient_steps=3)
    env, again = (WorkerVecEnv([lambda: EpisodeControl(Numbered())] * 2, n_workers=1) for _ in range(2))
    try:
        with pytest.warns(RuntimeWarning, match="Its episodes are lost"):
            OPD("MlpPolicy", env, **COMMON, **kwargs).learn(70, callback=Killer(tmp_path, 3))
        model = resumed(OPD, tmp_path, again, 70)
    finally:
        env.close(), again.close()
    assert model.num_timesteps >= 70 and model._n_lost == 0


def test_a_save_at_a_signal_does_not_wait_for_a_worker_that_hangs(tmp_path):
    kwargs = dict(teacher="expert", n_steps=7, batch_size=16, gradient_steps=3)
    env, again = (WorkerVecEnv([lambda: EpisodeControl(Numbered())] * 2, n_workers=1) for _ in range(2))
    try:
        model = OPD("MlpPolicy", env, **COMMON, **kwargs).learn(28)
        pid = env.env_method("process")[0]
        os.kill(pid, signal.SIGSTOP)
        give_up.set()  # as a run does when it is told to end
        try:
            model.save(tmp_path / "model")
        finally:
            give_up.clear()
            os.kill(pid, signal.SIGCONT)
        model.save_replay_buffer(tmp_path / "states.npz")
        assert resumed(OPD, tmp_path, again, 70).num_timesteps >= 70
    finally:
        env.close(), again.close()


def test_a_seed_that_is_given_after_loading_is_meant(tmp_path):
    """Otherwise three continuations with three seeds would be one."""
    OPD("MlpPolicy", vec(2), "expert", n_steps=16, device="cpu", seed=0).learn(64).save(tmp_path / "model")

    def go_on(later=None, **given):
        model = OPD.load(tmp_path / "model", env=vec(2), device="cpu", **given)
        if later is not None:
            model.set_random_seed(later)
        return parameters(model.learn(64, reset_num_timesteps=False))

    ways = [{}, {"seed": 1}, {"seed": 2}, {"later": 1}, {"later": 3}]
    found = [go_on(**way) for way in ways]
    assert th.equal(found[0], go_on()) and th.equal(found[1], go_on(seed=1)) and th.equal(found[3], found[1])
    for i, j in ((0, 1), (0, 2), (1, 2), (0, 4), (1, 4)):
        assert not th.equal(found[i], found[j]), (ways[i], ways[j])


def test_a_model_in_memory_goes_on_as_one_in_a_file(tmp_path):
    model = OPD("MlpPolicy", vec(2), "expert", n_steps=16, state_replay=False, device="cpu", seed=0).learn(64)
    memory = io.BytesIO()
    model.save(memory)
    model.save(tmp_path / "model")
    continued = []
    for file in (memory, tmp_path / "model"):
        loaded = OPD.load(file, env=vec(2), device="cpu")
        continued.append(parameters(loaded.learn(64, reset_num_timesteps=False)))
    assert th.equal(*continued)


def test_learning_anew_begins_anew(tmp_path):
    kwargs = dict(teacher="expert", n_steps=7, batch_size=16, gradient_steps=3)
    OPD("MlpPolicy", vec(2), **COMMON, **kwargs).learn(42, callback=SavesOnce(tmp_path, 3))
    model = OPD.load(tmp_path / "model", env=vec(2), device="cpu").learn(14)
    assert model.num_timesteps == 14 and model.rollout_buffer.episode_starts[0] == 1.0
    assert isinstance(model.env.envs[0], gym.Env) and model._interrupted is None


def test_an_episode_that_never_ends_takes_no_more_memory(monkeypatch):
    monkeypatch.setattr("opd_gym.envs.wrappers.MAX_REPLAYED", 5)
    env = EpisodeControl(Match(horizon=100))
    env.set_next_reset(seed=1, tag=(0, 0))
    env.reset()
    for n in (5, 1, 20):
        for _ in range(n):
            env.step(0)
        tag, actions, checksum = env.episode_so_far()
        assert len(actions) == (5 if n == 5 else 6)
        again = EpisodeControl(Match(horizon=100))
        again.set_next_reset(seed=1, tag=(0, 0))
        again.reset()
        assert again.replay({tag: (actions, checksum)}) == (n == 5)


@pytest.mark.parametrize("case", ["opd", "grpo", "ppo"])
def test_a_copy_of_a_model_that_was_only_loaded_goes_on_as_the_first(case, tmp_path):
    cls, kwargs = CASES[case]
    whole = cls("MlpPolicy", vec(2), **COMMON, **kwargs).learn(70, callback=SavesOnce(tmp_path, 3))
    copy = cls.load(tmp_path / "model", env=vec(2), device="cpu")
    copy.save(tmp_path / "copy")
    for name in ("model", "copy"):
        model = copy if name == "model" else cls.load(tmp_path / name, env=vec(2), device="cpu")
        if case == "opd":
            model.load_replay_buffer(tmp_path / "states.npz")
        model.learn(70 - model.num_timesteps, reset_num_timesteps=False)
        assert th.equal(parameters(model), parameters(whole))


def test_a_seed_that_is_set_after_the_construction_is_that_of_the_episodes_too():
    def weights(set_seed):
        model = PPO("MlpPolicy", vec(2), n_steps=7, batch_size=8, device="cpu")
        set_seed(model)
        model.policy.load_state_dict(state)
        return parameters(model.learn(28))

    state = PPO("MlpPolicy", vec(2), seed=0, device="cpu").policy.state_dict()
    one, two, other = (weights(lambda model, seed=seed: model.set_random_seed(seed)) for seed in (5, 5, 6))
    assert th.equal(one, two) and not th.equal(one, other)


def test_validation_stays_validation_where_no_seed_was_given(tmp_path):
    rng = np.random.default_rng(0)
    obs = rng.uniform(-1.0, 1.0, size=(200, 4)).astype(np.float32)
    space = spaces.Box(-1.0, 1.0, (4,), np.float32)
    data = Demonstrations(
        obs, (obs[:, 2] > 0).astype(np.int64), episodes=np.repeat(np.arange(20), 10), observation_space=space,
        action_space=spaces.Discrete(2),
    )  # fmt: skip
    model = SFT("MlpPolicy", demonstrations=data, validation_fraction=0.3, device="cpu").learn(4)
    model.save(tmp_path / "model")
    loaded = SFT.load(tmp_path / "model", demonstrations=data, device="cpu")
    np.testing.assert_array_equal(loaded._validation_rows, model._validation_rows)


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("opd", dict(gradient_steps=0), "gradient_steps must be at least 1"),
        ("opd", dict(divergence="forward"), "divergence to be one of"),
        ("opd", dict(augmentation="random_shft"), "augmentation to be one of"),
        ("opd", dict(policy="CnnPolicy"), "policy of a model that is loaded cannot be changed"),
        ("opd", dict(stats_window_size=0), "stats_window_size must be at least 1"),
        ("sampled", dict(state_replay=True), "on-policy"),
        ("sampled", dict(divergence="forward_kl"), "reverse KL"),
        ("grpo", dict(group_size=1), "group_size must be at least 2"),
        ("ppo", dict(ratio="tokens"), "ratio to be"),
        ("ppo_sde", dict(temperature=0.3), "noise"),
    ],
)
def test_what_a_constructor_refuses_load_refuses(case, change, message, tmp_path):
    cls, kwargs = CASES[case]
    env = vec(2, kind="box") if case == "ppo_sde" else vec(2)
    cls("MlpPolicy", env, **COMMON, **kwargs).save(tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        cls.load(tmp_path / "model", env=env, device="cpu", **change)


def test_as_many_episodes_are_reported_as_load_was_told(tmp_path):
    PPO("MlpPolicy", vec(2), n_steps=7, batch_size=8, device="cpu", seed=0).learn(56).save(tmp_path / "model")
    model = PPO.load(tmp_path / "model", env=vec(2), device="cpu", stats_window_size=3)
    for reset in (False, True):
        model.learn(56, reset_num_timesteps=reset)
        assert len(model.ep_info_buffer) == model.ep_info_buffer.maxlen == 3


@pytest.mark.parametrize("cls", [OPD, GRPO, PPO])
def test_a_model_of_nothing_is_refused(cls):
    with pytest.raises(ValueError, match="needs an env"):
        cls("MlpPolicy", None)
