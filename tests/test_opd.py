import io
import math
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    EveryNTimesteps,
)
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize
from toys import TINY_BODY, Match, Robot, cartpole_teacher, parameters, vec

from opd_gym.algorithms import teachers
from opd_gym.algorithms.common import policy_kwargs_over
from opd_gym.algorithms.grpo import GRPO
from opd_gym.algorithms.opd import OPD
from opd_gym.algorithms.ppo import PPO
from opd_gym.algorithms.teachers import Teacher
from opd_gym.envs.workers.vec_env import WorkerVecEnv
from opd_gym.envs.wrappers import EpisodeControl
from opd_gym.tokens import CategoricalTokens, GaussianTokens
from opd_gym.zoo.hyperparams import split_hyperparams

FAST = dict(learning_rate=5e-3, n_steps=32, batch_size=64, gradient_steps=20, device="cpu", seed=0)


def recorded(model, folder):
    """Everything that a model logs, as rows of a CSV file."""
    model.set_logger(configure(str(folder), ["csv"]))
    return lambda: np.genfromtxt(folder / "progress.csv", delimiter=",", names=True, dtype=None, encoding=None)


def cartpole_return(model) -> float:
    env = gym.make("CartPole-v1")
    env.reset(seed=0)  # the lengths of its episodes say how many random numbers the rest of a test draws before its own
    return evaluate_policy(model, env, n_eval_episodes=5, deterministic=False)[0]


@pytest.mark.parametrize("dict_obs", [False, True])
def test_replayed_states_are_normalised_as_new_ones_are(dict_obs, tmp_path):
    """Behind a VecNormalize whose statistics move: kept are raw observations."""
    keys = {"norm_obs_keys": ["vector"]} if dict_obs else {}
    env = VecNormalize(vec(2, dict_obs=dict_obs), norm_reward=False, **keys)
    policy = "MultiInputPolicy" if dict_obs else "MlpPolicy"
    model = OPD(policy, env, teacher="expert", **{**FAST, "n_steps": 8, "gradient_steps": 2})
    if dict_obs:  # pictures are transposed around it
        with pytest.warns(UserWarning, match="another wrapper lies around the VecNormalize"):
            model.learn(16)
        assert not model.replay_buffer.raw
        return
    seen = []
    original = model._label_step

    def note(envs):
        seen.append(env.get_original_obs())
        return original(envs)

    model._label_step = note
    model.learn(48)
    replay = model.replay_buffer
    assert replay.raw and replay.size == 48
    # Rows are flattened env by env
    rollouts = [np.stack(seen[first : first + 8]).swapaxes(0, 1).reshape(16, 4) for first in (0, 8, 16)]
    np.testing.assert_array_equal(replay.observations[:48], np.concatenate(rollouts))
    (states, *_) = model._exact_batches()
    known = env.normalize_obs(np.concatenate(rollouts))
    assert all(np.abs(known - state).max(1).min() < 1e-5 for state in states.observations.numpy())
    # And they come back as such alone
    model.save_replay_buffer(tmp_path / "raw.npz")
    plain = OPD("MlpPolicy", vec(2), teacher="expert", **FAST)
    with pytest.raises(ValueError, match="holds observations before a VecNormalize, this model keeps them after it"):
        plain.load_replay_buffer(tmp_path / "raw.npz")
    plain.learn(64)
    plain.set_env(VecNormalize(vec(2)))
    with pytest.warns(UserWarning, match="The 64 states to replay are forgotten: they were seen without"):
        plain.learn(64)
    assert plain.replay_buffer.size == 64 and plain.replay_buffer.raw


def test_distils_a_cartpole_teacher(tmp_path):
    cartpole_teacher().save(tmp_path / "teacher")
    student = OPD("MlpPolicy", "CartPole-v1", teacher=str(tmp_path / "teacher.zip"), **{**FAST, "n_steps": 128})
    before = cartpole_return(student)
    rows = recorded(student, tmp_path)
    student.learn(3000)
    assert before < 100
    assert cartpole_return(student) > 400
    log = rows()
    assert log["trainkl"][-1] < 0.3 * log["trainkl"][1]
    assert log["trainagreement"][-1] > 0.9


def test_without_a_gradient_step_nothing_happens():
    student = OPD("MlpPolicy", "CartPole-v1", teacher=cartpole_teacher(), **{**FAST, "learning_rate": 0.0})
    before = parameters(student)
    student.learn(64)
    assert th.equal(before, parameters(student))
    assert cartpole_return(student) < 100


def test_sampled_estimator_learns():
    student = OPD(
        "MlpPolicy", vec(4, horizon=2), teacher="expert", estimator="sampled", n_steps=32, learning_rate=1e-2, seed=0
    )
    assert student.replay_buffer is None
    before = accuracy(student)
    student.learn(10_000)
    assert student._n_updates == student._n_iterations  # one update per rollout
    assert accuracy(student) > max(0.6, before + 0.2)


def test_sampled_estimator_at_a_temperature():
    kwargs = {**FAST, "temperature": 1.6, "estimator": "sampled"}
    model = OPD("MlpPolicy", vec(), teacher="expert", **kwargs).learn(64)
    buffer = model.rollout_buffer
    (samples,) = buffer.get(rows=buffer.valid_rows())
    with th.no_grad():
        teacher = model._teacher.distribution(samples.observations, th.as_tensor(buffer.teacher_actions)).temper(1.6)
    assert th.allclose(samples.teacher_log_probs, teacher.log_prob(samples.actions))


def accuracy(model, **kwargs) -> float:
    env = Match(**kwargs)
    return evaluate_policy(model, env, n_eval_episodes=50, warn=False)[0] / env.horizon


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "hard_ce", "jsd"])
@pytest.mark.parametrize("kind", ["discrete", "multi_discrete", "multi_binary", "box"])
def test_every_action_space_and_divergence(kind, divergence):
    student = OPD("MlpPolicy", vec(kind=kind), teacher="expert", divergence=divergence, **FAST)
    student.learn(600)
    assert accuracy(student, kind=kind) > 0.6


@pytest.mark.parametrize("state_replay", [False, 100, True])
def test_dict_observations_augmentation_and_replay(state_replay):
    student = OPD(
        "MultiInputPolicy",
        vec(dict_obs=True),
        teacher="expert",
        state_replay=state_replay,
        augmentation="random_shift",
        **{**FAST, "gradient_steps": 2},
    )
    student.learn(128)
    if state_replay:
        assert student.replay_buffer.size == {100: 100, True: 128}[state_replay]
        assert student.replay_buffer.observations["picture"].dtype == np.uint8
    else:
        assert student.replay_buffer is None


def test_same_seed_same_run(tmp_path):
    def run(seed):
        model = OPD("MlpPolicy", vec(seed=seed), teacher="expert", **{**FAST, "seed": seed}).learn(200)
        return parameters(model)

    assert th.equal(run(3), run(3))
    assert not th.equal(run(3), run(4))


def test_the_kind_of_teacher_does_not_change_the_student(tmp_path):
    teacher = cartpole_teacher()
    teacher.save(tmp_path / "teacher")
    live, loaded = (OPD("MlpPolicy", "CartPole-v1", teacher=t, **FAST) for t in (teacher, tmp_path / "teacher"))
    assert th.equal(parameters(live), parameters(loaded))


def test_save_load_predict_resume(tmp_path):
    cartpole_teacher().save(tmp_path / "teacher")
    model = OPD("MlpPolicy", "CartPole-v1", teacher=str(tmp_path / "teacher.zip"), **FAST).learn(64)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "states.npz")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.zip", "states.npz", "teacher.zip"]

    obs = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
    loaded = OPD.load(tmp_path / "model")
    assert np.array_equal(model.predict(obs, deterministic=True)[0], loaded.predict(obs, deterministic=True)[0])
    with pytest.raises(ValueError, match="no env"):
        loaded.learn(64)

    loaded.set_env("CartPole-v1")
    loaded.learn(64, reset_num_timesteps=False)

    resumed = OPD.load(tmp_path / "model", env="CartPole-v1")
    resumed.load_replay_buffer(tmp_path / "states.npz")
    resumed.learn(64, reset_num_timesteps=False)
    assert resumed.num_timesteps == resumed.replay_buffer.size == 2 * model.num_timesteps

    file = io.BytesIO()
    model.save(file)
    file.seek(0)
    assert th.equal(parameters(OPD.load(file)), parameters(model))


def test_a_live_teacher_is_not_saved(tmp_path):
    model = OPD("MlpPolicy", "CartPole-v1", teacher=cartpole_teacher(), **FAST)
    model.save(tmp_path / "model")
    loaded = OPD.load(tmp_path / "model", env="CartPole-v1")
    assert loaded.teacher is None
    with pytest.raises(ValueError, match="saved with a live teacher, which the file does not hold"):
        loaded.learn(32)
    OPD.load(tmp_path / "model", env="CartPole-v1", teacher=cartpole_teacher()).learn(32)


def test_a_live_teacher_that_load_was_given_is_not_saved_either(tmp_path, monkeypatch):
    cartpole_teacher().save(tmp_path / "teacher")
    OPD("MlpPolicy", "CartPole-v1", teacher=tmp_path / "teacher.zip", **FAST).save(tmp_path / "model")
    OPD.load(tmp_path / "model", env="CartPole-v1", teacher=cartpole_teacher()).learn(32).save(tmp_path / "live")
    with pytest.raises(ValueError, match="saved with a live teacher"):
        OPD.load(tmp_path / "live", env="CartPole-v1").learn(32)
    # And a path is one for every working directory
    monkeypatch.chdir(tmp_path)
    OPD.load("live", env="CartPole-v1", teacher="teacher.zip").learn(32).save("named")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    OPD.load(tmp_path / "named", env="CartPole-v1").learn(32)


def test_a_teacher_that_shares_weights_with_the_student_is_refused():
    teacher = PPO("MlpPolicy", "CartPole-v1", device="cpu")
    model = OPD("MlpPolicy", "CartPole-v1", teacher=teacher, **FAST)
    model.policy.mlp_extractor = teacher.policy.mlp_extractor
    with pytest.raises(ValueError, match="share weights"):
        model.learn(32)


def test_the_zoos_teacher_takes_nobodys_place(tmp_path, monkeypatch):
    cartpole_teacher().save(tmp_path / "zoo")
    monkeypatch.setattr(teachers, "find_teacher", lambda env_id: tmp_path / "zoo.zip")
    for teacher in (cartpole_teacher(), None):
        OPD("MlpPolicy", "CartPole-v1", teacher=teacher, **FAST).save(tmp_path / "model")
        loaded = OPD.load(tmp_path / "model", env="CartPole-v1")
        if teacher is None:
            loaded.learn(32)
            continue
        with pytest.raises(ValueError, match="saved with a live teacher"):
            loaded.learn(32)


@pytest.mark.parametrize("dict_obs", [False, True])
def test_a_new_teacher_labels_replayed_states_anew(dict_obs, tmp_path):
    """Otherwise the student goes on learning from the old one, as long as its states are replayed."""
    name = "MultiInputPolicy" if dict_obs else "MlpPolicy"

    def policy(seed):
        return PPO(name, vec(2, dict_obs=dict_obs), seed=seed, device="cpu").policy

    def labels(model):
        replay = model.replay_buffer
        return replay.states(np.arange(replay.size)).distributions.float()

    first, second = policy(1), policy(2)
    with th.no_grad():
        for one in (first, second):
            one.action_net.weight *= 500.0  # they disagree
    model = OPD(name, vec(2, dict_obs=dict_obs), teacher=first, micro_batch_size=7, **FAST).learn(128)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "states.npz")
    n_states, was = model.replay_buffer.size, labels(model)

    def go_on(teacher):
        model = OPD.load(tmp_path / "model", env=vec(2, dict_obs=dict_obs), teacher=teacher, device="cpu")
        model.load_replay_buffer(tmp_path / "states.npz")
        return model

    model = go_on(first)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.learn(64, reset_num_timesteps=False)
    assert th.equal(labels(model)[:n_states], was), "those of the same teacher stay as they are"
    model = go_on(second)
    asked, get_distribution = [], second.get_distribution
    second.get_distribution = lambda obs: (
        asked.append(len(next(iter(obs.values())) if dict_obs else obs)) or (get_distribution(obs))
    )
    with pytest.warns(UserWarning, match=f"The {n_states} states to replay were labelled by another teacher"):
        model.learn(64, reset_num_timesteps=False)
    assert sum(asked) >= n_states and max(asked) == 7, "no more than the memory is for"
    states = model.replay_buffer.states(np.arange(n_states))
    with th.no_grad():
        expected = second.get_distribution(states.observations).distribution.logits
    assert th.allclose(labels(model)[:n_states], expected, atol=0.02) and not th.allclose(was, expected, atol=0.5)


def test_a_failing_save_leaves_the_old_file(tmp_path, monkeypatch):
    model = OPD("MlpPolicy", vec(), teacher="expert", **FAST)
    model.save(tmp_path / "model.zip")
    old = (tmp_path / "model.zip").read_bytes()

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("stable_baselines3.common.base_class.save_to_zip_file", fail)
    with pytest.raises(OSError, match="disk full"):
        model.save(tmp_path / "model.zip")
    assert (tmp_path / "model.zip").read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["model.zip"]


def test_logs_callbacks_and_progress_bar(tmp_path):
    class Count(BaseCallback):
        n = 0

        def _on_step(self):
            assert "infos" in self.locals and "new_obs" in self.locals
            self.n += 1
            return True

    model = OPD("MlpPolicy", vec(2, horizon=4), teacher="expert", **FAST)
    rows = recorded(model, tmp_path)
    count = Count()
    save = CheckpointCallback(16, str(tmp_path / "checkpoints"), save_replay_buffer=True)
    model.learn(128, callback=[count, save], progress_bar=True)
    assert count.n == 64
    assert list((tmp_path / "checkpoints").glob("*_32_steps.zip"))
    log = rows()
    names = set(log.dtype.names)
    wanted = {"rolloutsuccess_rate", "rolloutep_rew_mean", "timeenv_steps", "traingrad_norm", "trainlearning_rate"}
    assert wanted <= names
    assert {"trainkl", "trainentropy", "trainteacher_log_prob", "trainloss", "trainagreement"} <= names
    # Two rollouts, and the training after the last of them
    assert len(log) == 3 and np.isfinite(log["trainkl"][-1])
    assert log["timeenv_steps"].tolist() == [64, 128, 128]


def test_stops_when_the_callback_says_so():
    model = OPD("MlpPolicy", vec(), teacher="expert", **FAST)
    model.learn(1000, callback=lambda locals_, globals_: False)
    assert model.num_timesteps == 2 and model._n_updates == 0


def test_groups_start_from_the_same_state():
    model = OPD("MlpPolicy", vec(2, horizon=4), teacher="expert", group_size=3, **FAST)
    starts: dict[int, list] = {}

    def look(locals_, globals_):
        for worker, first in enumerate(locals_["self"]._last_episode_starts):
            if first:
                group = locals_["self"]._episodes.playing[worker].group
                starts.setdefault(group, []).append(tuple(locals_["self"]._last_obs[worker]))
        return True

    model.learn(64, callback=look)
    assert len(starts) >= 4
    assert all(len(set(group)) == 1 for group in starts.values())
    assert len({group[0] for group in starts.values()}) == len(starts)
    assert all(len(group) == 3 for index, group in starts.items() if index < max(starts) - 1)


def test_envs_without_episode_control_work_too():
    OPD("MlpPolicy", vec(control=False), teacher="expert", **FAST).learn(64)


def of_one_process_and_of_several(make):
    """The same run with its envs in this process and in one process each."""
    for cls in (DummyVecEnv, SubprocVecEnv):
        env = cls([lambda: EpisodeControl(Match(horizon=3)), lambda: EpisodeControl(Match(horizon=5))])
        try:
            yield make(env)
        finally:
            env.close()


def test_workers_in_processes():
    """Which process an env lives in changes nothing: not what is seen and labelled, not what is learned."""
    here, there = of_one_process_and_of_several(
        lambda env: OPD("MlpPolicy", env, teacher="expert", group_size=2, **FAST).learn(128)
    )
    buffer = there.rollout_buffer
    # The expert labels the states that each worker is in, before it acts there
    np.testing.assert_array_equal(buffer.teacher_actions[:, 0], buffer.observations.argmax(axis=1))
    # Of 32 decisions each, in episodes of 3 and of 5
    ends = np.flatnonzero(~np.isnan(buffer.successes))
    assert len(ends) > 10 and set(np.diff(ends[ends < 32])) == {3} and set(np.diff(ends[ends >= 32])) == {5}
    for name in ("observations", "actions", "rewards", "successes", "group_ids", "episode_ids", "teacher_actions"):
        np.testing.assert_array_equal(getattr(here.rollout_buffer, name), getattr(buffer, name), err_msg=name)
    assert here._n_updates == there._n_updates == 2 * FAST["gradient_steps"]
    assert th.equal(parameters(here), parameters(there))


@pytest.mark.parametrize("privileged", [True, False])
def test_the_teacher_labels_every_other_decision(privileged, tmp_path):
    kwargs = {**FAST, "n_steps": 5, "teacher_interval": 2}
    teacher = "expert" if privileged else OPD("MlpPolicy", vec(), teacher="expert", **FAST).policy
    env = WorkerVecEnv([lambda: EpisodeControl(Match())] * 4, n_workers=2)
    try:
        model = OPD("MlpPolicy", env, teacher=teacher, **kwargs)
        log = recorded(model, tmp_path)
        model.learn(20)
    finally:
        env.close()
    buffer = model.rollout_buffer
    labelled = np.tile([True, False] * 2 + [True], 4)
    assert buffer.valid_rows().tolist() == np.flatnonzero(labelled).tolist()
    assert model.num_timesteps == 20 and model.replay_buffer.size == 12
    if privileged:
        np.testing.assert_array_equal(buffer.teacher_actions[labelled, 0], buffer.observations[labelled].argmax(axis=1))
        assert np.isnan(buffer.teacher_actions[~labelled]).all()
    else:
        assert (buffer.teacher_log_probs[:, 0] != 0.0).tolist() == labelled.tolist()
    assert "timeteacher_seconds" in log().dtype.names


@pytest.mark.parametrize("reward", [math.nan, math.inf])
def test_rewards_that_are_no_numbers_are_named(reward):
    class Unpaid(Match):
        def step(self, action):
            obs, _, *rest = super().step(action)
            return obs, reward, *rest

    with pytest.warns(
        UserWarning, match=r"OPD: the rewards of envs \[0, 1\] are NaN or infinite. They are not learned"
    ):
        OPD("MlpPolicy", vec(env=Unpaid), teacher="expert", **FAST).learn(64)
    for cls, kwargs in ((PPO, dict(n_steps=8)), (GRPO, dict(group_size=2, n_groups=2))):
        with pytest.raises(FloatingPointError, match=f"{cls.__name__}: the rewards of envs .0, 1. are NaN or infinite"):
            cls("MlpPolicy", vec(env=Unpaid), device="cpu", **kwargs).learn(16)


def test_a_rollout_that_was_lost_teaches_nothing():
    class Lost(Match):
        def step(self, action):
            *rest, info = super().step(action)
            return *rest, {**info, "episode_lost": True}

    for estimator in ("exact", "sampled"):
        kwargs = dict(teacher="expert", estimator=estimator, n_steps=8, batch_size=8, seed=0, device="cpu")
        model = OPD("MlpPolicy", vec(env=Lost), **kwargs)
        before = parameters(model)
        model.collect_rollouts(model.env, *model._setup_learn(64)[1:], model.rollout_buffer, 8)
        model.train()
        assert model._n_updates == model.num_timesteps == 0 and th.equal(parameters(model), before)


def test_masks_tokens_that_were_not_executed():
    class Chunked(Match):
        def step(self, action):
            *rest, info = super().step(action)
            return *rest, {**info, "n_executed": 1, "n_executed_tokens": 1}

    model = OPD("MlpPolicy", vec(env=Chunked, kind="multi_binary"), teacher="expert", **FAST).learn(64)
    assert (model.rollout_buffer.token_mask == [1.0, 0.0, 0.0]).all()
    assert not model.replay_buffer.masks[: model.replay_buffer.size, 1:].any()
    assert model.num_env_steps == 64


def test_vla_policy_gets_action_tokens(tmp_path, capsys):
    kwargs = dict(teacher="expert", policy_kwargs=dict(body_kwargs=TINY_BODY), **{**FAST, "n_steps": 8})
    model = OPD("VLAPolicy", Robot(), verbose=1, augmentation="random_shift_batch", **kwargs)
    assert "action tokens" in capsys.readouterr().out
    assert model.action_space == spaces.MultiDiscrete([256] * 16)
    model.learn(8)
    # The episode of 10 steps ends after 2 of the 8 actions of its second chunk
    assert model.rollout_buffer.token_mask.sum(axis=1).tolist() == [16, 4] * 4
    assert model.num_env_steps == 40
    model.policy.save_checkpoint(tmp_path / "vla")
    model.save(tmp_path / "model")
    loaded = OPD.load(tmp_path / "model", env=Robot())
    obs = loaded.env.reset()
    assert np.array_equal(model.predict(obs, deterministic=True)[0], loaded.predict(obs, deterministic=True)[0])
    # The checkpoint of the teacher, and of the student
    start = dict(checkpoint=str(tmp_path / "vla"))
    again = OPD("VLAPolicy", Robot(), **{**kwargs, "teacher": tmp_path / "vla", "policy_kwargs": start})
    again.learn(8)
    assert np.array_equal(
        again._teacher.policy.predict(obs, deterministic=True)[0], model.predict(obs, deterministic=True)[0]
    )

    with pytest.raises(ValueError, match="make_vec"):
        OPD("VLAPolicy", vec(env=Robot), teacher="expert")
    with pytest.raises(ValueError, match="Box action space"):
        OPD("VLAPolicy", "CartPole-v1", teacher="expert")


def test_nan_in_the_policy_is_named():
    model = OPD("MlpPolicy", vec(), teacher="expert", **FAST)
    with th.no_grad():
        model.policy.action_net.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="after 0 updates .*learning_rate"):
        model.learn(64)


class Broken(Match):
    """Observations or rewards are NaN from the tenth step on."""

    steps = 0

    def step(self, action):
        self.steps += 1
        obs, reward, *rest = super().step(action)
        if self.steps < 10:
            return obs, reward, *rest
        if self.kind == "discrete":
            return {**obs, "vector": obs["vector"] * np.nan} if self.dict_obs else obs * np.nan, reward, *rest
        return obs, np.nan, *rest


class Opinion(Teacher):
    """Gives what it was told to give."""

    def __init__(self, view):
        self.view = view

    def distribution(self, observations, labels, actions=None):
        rows = th.zeros(len(labels), dtype=th.long)
        return type(self.view)(*(value[rows] for value in vars(self.view).values() if isinstance(value, th.Tensor)))


@pytest.mark.parametrize(
    ("view", "message"),
    [
        (CategoricalTokens(th.tensor([[[3.0, 1.0, 0.0, 0.0]]])), r"sum is up to 24\.8.*log_softmax"),  # e^3 + e + 2
        (
            CategoricalTokens(th.log_softmax(th.zeros(1, 1, 3), -1)),
            r"shape \(32, 1, 4\).*got CategoricalTokens of.* 3\)",
        ),
        (GaussianTokens(th.zeros(1, 1), th.zeros(1, 1)), r"return CategoricalTokens.*got GaussianTokens of.* 1\)"),
    ],
)
def test_what_an_own_teacher_says_is_a_distribution_over_the_students_tokens(view, message):
    for kwargs in ({}, {"estimator": "sampled", "gradient_steps": "auto"}):
        with pytest.raises(ValueError, match=message):
            OPD("MlpPolicy", vec(1), teacher=Opinion(view), **{**FAST, **kwargs}).learn(32)


NAN = th.full((1, 2), math.nan)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OPD("MlpPolicy", vec(env=Broken), teacher="expert", **FAST), r"So are the observations, which.*env"),
        (
            lambda: OPD("MultiInputPolicy", vec(env=Broken, dict_obs=True), teacher="expert", **FAST),
            r"So are the observations\['vector'\], which.*env",
        ),
        (
            lambda: PPO("MlpPolicy", vec(env=Broken, kind="box"), n_steps=32, batch_size=64),
            "rewards of envs.*Nothing can be learned from them",
        ),
        (
            lambda: OPD("MlpPolicy", vec(kind="box"), teacher=Opinion(GaussianTokens(NAN, NAN)), **FAST),
            "teacher's outputs are NaN",
        ),
        (
            lambda: OPD(
                "MlpPolicy",
                vec(kind="box"),
                teacher=Opinion(GaussianTokens(th.zeros(1, 2), -th.full((1, 2), th.inf))),
                **FAST,
            ),
            "teacher's outputs are NaN or infinite",
        ),
        (
            lambda: OPD("MlpPolicy", vec(), teacher=Opinion(CategoricalTokens(NAN[:, None].repeat(1, 1, 2))), **FAST),
            "teacher's outputs are NaN",
        ),
    ],
)
def test_the_cause_of_nan_is_named(make, message):
    with pytest.raises(FloatingPointError, match=message) as error:
        make().learn(64)
    assert "lower learning_rate" not in str(error.value)


def test_nan_in_the_gradient_leaves_the_weights():
    model = OPD("MlpPolicy", vec(), teacher="expert", **FAST)
    before = parameters(model)
    (sum(p.sum() for p in model.policy.parameters()) * float("nan")).backward()
    with pytest.raises(FloatingPointError, match="gradients are NaN or infinite"):
        model._gradient_step()
    assert th.equal(before, parameters(model))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(divergence="kl"), "divergence to be one of"),
        (dict(estimator="both"), 'estimator to be "exact" or "sampled"'),
        (dict(estimator="sampled", state_replay=True), "state_replay=False"),
        (dict(estimator="sampled", divergence="jsd"), 'estimator="exact"'),
        (dict(estimator="sampled", augmentation="random_shift"), "augmentation=None"),
        (dict(augmentation="blur"), "random_shift"),
        (dict(temperature=0.0), r"temperature must be a number in \(0, inf\), got 0.0"),
        (dict(batch_size=0), "batch_size must be at least 1"),
        (dict(n_steps=0), "n_steps must be at least 1"),
        (dict(group_size=0), "group_size must be at least 1"),
        (dict(teacher_interval=0), "teacher_interval must be at least 1"),
    ],
)
def test_bad_arguments_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        OPD("MlpPolicy", vec(1), **{"teacher": "expert", **kwargs})


@pytest.mark.parametrize("algorithm", [OPD, GRPO, PPO])
def test_a_student_with_memory_is_refused(algorithm):
    from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy

    kwargs = {"teacher": "expert"} if algorithm is OPD else {}
    with pytest.raises(ValueError, match=f"{algorithm.__name__} does not train recurrent policies.*VecFrameStack"):
        algorithm(RecurrentActorCriticPolicy, vec(2), device="cpu", **kwargs)


def test_an_augmentation_of_pictures_needs_some():
    with pytest.raises(ValueError, match="augmentation='random_shift' shifts pictures, and there are none in Box"):
        OPD("MlpPolicy", vec(2), teacher="expert", augmentation="random_shift", device="cpu")
    OPD("MultiInputPolicy", vec(2, dict_obs=True), teacher="expert", augmentation="random_shift", device="cpu")


def test_unknown_policy():
    with pytest.raises(ValueError, match="expected one of .*VLAPolicy"):
        OPD("Transformer", vec(1), teacher="expert")


def test_training_goes_on_after_an_evaluation_on_the_training_env():
    from opd_gym.evaluation import EpisodeSpec, evaluate_success

    model = OPD("MlpPolicy", vec(2), teacher="expert", n_steps=8, gradient_steps=1, seed=0)
    model.learn(16)
    evaluate_success(model, model.env, [EpisodeSpec(seed=i) for i in range(3)], progress=False)
    assert not any(model.env.get_attr("frozen")), "for whoever uses it next"
    model.learn(32, reset_num_timesteps=False)
    assert not any(model.env.get_attr("frozen")) and model._n_finished > 4
    assert model.rollout_buffer.token_mask[model.rollout_buffer.valid_rows()].all()


def test_an_evaluation_in_the_middle_of_a_rollout_is_noticed():
    from opd_gym.evaluation import EpisodeSpec, evaluate_success

    class Evaluate(BaseCallback):
        def _on_step(self):
            evaluate_success(self.model, self.model.env, [EpisodeSpec(seed=1)], progress=False)
            return True

    model = OPD("MlpPolicy", vec(2), teacher="expert", n_steps=8, seed=0)
    with pytest.raises(RuntimeError, match="env of its own"):
        model.learn(64, callback=EveryNTimesteps(4, Evaluate()))


def test_an_evaluation_by_stable_baselines3_in_the_middle_is_noticed_too():
    """It resets the envs and leaves them playing: labels would be those of other states."""

    class Evaluate(BaseCallback):
        def _on_step(self):
            if self.n_calls == 4:
                evaluate_policy(self.model, self.model.get_env(), 2, warn=False)
            return True

    model = OPD("MlpPolicy", vec(2), teacher="expert", n_steps=8, seed=0)
    with pytest.raises(RuntimeError, match="env of its own"):
        model.learn(64, callback=Evaluate())
    model.learn(64)


def test_an_eval_callback_on_the_training_env_is_refused():
    """It would reset what is being trained on: OPD would notice, GRPO could wait for ever."""
    venv = vec(2)
    model = OPD("MlpPolicy", venv, teacher="expert", n_steps=8, seed=0)
    evaluation = EvalCallback(VecNormalize(venv, training=False), n_eval_episodes=2, eval_freq=4, warn=False)
    for callback in (evaluation, [evaluation], CallbackList([EveryNTimesteps(4, evaluation)])):
        with pytest.raises(ValueError, match="env of its own"):
            model.learn(64, callback=callback)
    own = EvalCallback(vec(1), n_eval_episodes=2, eval_freq=4, warn=False)
    assert model.learn(64, callback=[own]).num_timesteps == 64 and own.n_calls

    single = Match()
    model = OPD("MlpPolicy", single, teacher="expert", n_steps=8, seed=0)
    with pytest.raises(ValueError, match="env of its own"):
        model.learn(64, callback=EvalCallback(single, eval_freq=4, warn=False))


def test_an_evaluation_by_stable_baselines3_between_two_trainings_begins_new_episodes():
    class Labels(OPD):
        """Labels of the rollout that are not the expert's for the observation beside them."""

        def _end_rollout(self):
            buffer = self.rollout_buffer
            self.wrong = int((buffer.teacher_actions[:, 0] != buffer.observations.argmax(-1)).sum())
            super()._end_rollout()

    model = Labels("MlpPolicy", vec(2), teacher="expert", n_steps=8, seed=0, device="cpu")
    model.learn(16)
    for _ in range(2):
        evaluate_policy(model, model.get_env(), 3, warn=False)
        model.learn(16, reset_num_timesteps=False)
        assert model.wrong == 0


class LosesEveryOther(Match):
    """As an env whose simulator dies, and that says so itself."""

    n = 0

    def reset(self, **kwargs):
        self.n += 1
        return super().reset(**kwargs)

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        if self.n % 2 and self.t == 2:
            return obs, 0.0, False, True, {"episode_lost": True}
        return obs, reward, terminated, truncated, info


def test_a_lost_episode_is_none_of_the_statistics():
    model = OPD("MlpPolicy", vec(env=LosesEveryOther), teacher="expert", **FAST).learn(64)
    assert model._n_lost > 4 and {info["l"] for info in model.ep_info_buffer} == {4}


def test_a_new_body_learns_the_action_dimension_from_the_env():
    body = {key: value for key, value in TINY_BODY.items() if key != "action_dim"}
    model = OPD("VLAPolicy", Robot(), teacher="expert", policy_kwargs={"body_kwargs": body}, n_steps=4)
    assert (model.policy.config.action_dim, model.policy.config.chunk_size) == (2, 8)


def test_updates_follow_from_the_decisions_alone():
    for n_envs, n_steps in ((1, 32), (4, 16)):
        model = OPD("MlpPolicy", vec(n_envs), teacher="expert", n_steps=n_steps, device="cpu").learn(64)
        assert model._n_updates == 64 // 4
    with pytest.raises(ValueError, match='a number or "auto"'):
        OPD("MlpPolicy", vec(1), teacher="expert", gradient_steps="many")
    with pytest.raises(ValueError, match=r'gradient_steps to be a number or "auto", got None'):
        OPD("MlpPolicy", vec(1), teacher="expert", gradient_steps=None)


def test_the_learning_rate_follows_from_the_observations(tmp_path):
    model = OPD("MlpPolicy", vec(1), teacher="expert", n_steps=4, device="cpu").learn(8)
    assert model.learning_rate == 3e-3 and model.policy.optimizer.param_groups[0]["lr"] == 3e-3
    model.save(tmp_path / "model")
    assert OPD.load(tmp_path / "model").learning_rate == 3e-3
    body = {key: value for key, value in TINY_BODY.items() if key != "action_dim"}
    pictures = OPD("VLAPolicy", Robot(), teacher="expert", policy_kwargs={"body_kwargs": body}, n_steps=4)
    assert pictures.learning_rate == 5e-4
    assert OPD("MlpPolicy", vec(1), teacher="expert", learning_rate=0.0).learning_rate == 0.0
    # The word is OPD's alone, on the command line as well
    values = {"learning_rate": "auto"}
    assert split_hyperparams("opd", values, OPD)[1] == values
    with pytest.raises(ValueError, match="learning_rate: expected a number or a schedule"):
        split_hyperparams("grpo", values, GRPO)
    with pytest.raises(ValueError, match="learning_rate must be a number"):
        GRPO("MlpPolicy", vec(1), learning_rate="auto")


def test_a_falling_rate_is_never_zero():
    rates = []

    class Note(OPD):
        def train(self):
            super().train()
            rates.append(self.policy.optimizer.param_groups[0]["lr"])

    Note("MlpPolicy", vec(1), teacher="expert", learning_rate=lambda left: left, n_steps=8, device="cpu").learn(32)
    assert rates == [1.0, 0.75, 0.5, 0.25]


@pytest.mark.parametrize("algorithm", [OPD, GRPO])
def test_weight_decay_is_not_lost_among_the_optimizers_arguments(algorithm):
    def group(**policy_kwargs):
        kwargs = dict(teacher="expert") if algorithm is OPD else {}
        model = algorithm("MlpPolicy", vec(1), weight_decay=0.25, policy_kwargs=policy_kwargs, device="cpu", **kwargs)
        return model.policy.optimizer.param_groups[0]

    betas = (0.5, 0.9)
    found = group(optimizer_kwargs=dict(betas=betas))
    assert found["weight_decay"] == 0.25 and found["betas"] == betas and found["fused"]
    assert group(optimizer_kwargs=dict(weight_decay=0.5))["weight_decay"] == 0.5
    assert group()["weight_decay"] == 0.25
    assert group(optimizer_class=th.optim.SGD, optimizer_kwargs=dict(momentum=0.5))["weight_decay"] == 0.25
    assert "weight_decay" not in group(optimizer_class=th.optim.Rprop)


def test_the_zoos_weight_decay_is_not_lost_either():
    own = {"optimizer_kwargs": {"betas": (0.5, 0.9)}, "checkpoint": "c"}
    kwargs = policy_kwargs_over({"optimizer_kwargs": {"weight_decay": 1e-4}, "body": "tiny"}, own)
    assert kwargs == {**own, "body": "tiny", "optimizer_kwargs": {"weight_decay": 1e-4, "betas": (0.5, 0.9)}}
