import functools
import os
import pickle
import sys
import types
import warnings

import gymnasium as gym
import numpy as np
import pytest
import sb3_contrib
import stable_baselines3
import torch as th
from gymnasium import spaces
from gymnasium.envs.classic_control import CartPoleEnv
from gymnasium.wrappers import NormalizeObservation, RescaleAction
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize, VecTransposeImage
from toys import TINY_BODY, Match, Robot, cartpole_teacher, parameters, vec

from opd_gym.algorithms.opd import OPD
from opd_gym.algorithms.teacher_inputs import check_statistics, observation_adapter
from opd_gym.algorithms.teacher_trial import try_teacher
from opd_gym.algorithms.teachers import ExpertTeacher, LabelSmoothing, Teacher, make_teacher, unsquash
from opd_gym.envs.make import make_vec
from opd_gym.envs.registration import CHUNK_SIZES
from opd_gym.envs.wrappers import ActionChunk, ActionTokens, PrivilegedObservation
from opd_gym.policies.loading import read_vec_normalize
from opd_gym.tokens import CategoricalTokens, GaussianTokens, token_spec, token_view

NO_LABELS = th.empty(0)


def student_of(env, **kwargs):
    return ActorCriticPolicy(env.observation_space, env.action_space, lambda _: 1e-3, **kwargs)


def opinion(spec, env, obs, student=None, **kwargs):
    teacher = make_teacher(spec, env, student or student_of(env), **kwargs)
    return teacher.distribution(th.as_tensor(obs), NO_LABELS)


ALGORITHMS = [
    (stable_baselines3.PPO, "CartPole-v1"),
    (stable_baselines3.A2C, "CartPole-v1"),
    (stable_baselines3.DQN, "CartPole-v1"),
    (sb3_contrib.QRDQN, "CartPole-v1"),
    (sb3_contrib.TRPO, "CartPole-v1"),
    (sb3_contrib.MaskablePPO, "CartPole-v1"),
    (sb3_contrib.ARS, "CartPole-v1"),
    (stable_baselines3.PPO, "Pendulum-v1"),
    (stable_baselines3.SAC, "Pendulum-v1"),
    (stable_baselines3.TD3, "Pendulum-v1"),
    (stable_baselines3.DDPG, "Pendulum-v1"),
    (sb3_contrib.TQC, "Pendulum-v1"),
    (sb3_contrib.CrossQ, "Pendulum-v1"),
    (sb3_contrib.ARS, "Pendulum-v1"),
]


@pytest.mark.parametrize(("cls", "env_id"), ALGORITHMS, ids=lambda x: getattr(x, "__name__", x))
def test_the_zip_of_any_algorithm(cls, env_id, tmp_path):
    kwargs = dict(policy_kwargs=dict(net_arch=[8])) if cls is not sb3_contrib.ARS else {}
    model = cls("MlpPolicy", env_id, seed=0, device="cpu", **kwargs)
    model.save(tmp_path / "teacher")
    env = vec(1, env=env_id)
    obs = np.random.default_rng(0).uniform(-1, 1, (50, *env.observation_space.shape)).astype(np.float32)
    view = opinion(str(tmp_path / "teacher.zip"), env, obs)
    best = model.predict(obs, deterministic=True)[0].reshape(50, -1)
    mode = view.mode().numpy()
    if isinstance(view, CategoricalTokens):
        assert view.log_probs.shape == (50, 1, 2)
        assert np.array_equal(mode, best)
    else:
        assert isinstance(view, GaussianTokens) and not view.squashed
        # The mean of a squashed Gaussian is not the squash of its mean, and PPO's predictions are clipped
        assert np.abs(np.clip(mode, -2, 2) - best).max() < 0.5
        assert cls is sb3_contrib.ARS or np.corrcoef(mode[:, 0], best[:, 0])[0, 1] > 0.95
    # The same policy, live
    live = opinion(model, env, obs)
    assert th.allclose(live.flatten(), view.flatten(), atol=1e-6)


def test_q_values_become_a_softmax(tmp_path):
    model = stable_baselines3.DQN("MlpPolicy", "CartPole-v1", seed=0, device="cpu")
    obs = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    q_values = model.q_net(th.as_tensor(obs)).detach()
    view = opinion(model, vec(1, env="CartPole-v1"), obs, temperature=0.1)
    assert th.allclose(view.log_probs[:, 0], th.log_softmax(q_values / 0.1, dim=-1))
    with pytest.raises(ValueError, match=r"temperature must be a number in \(0, inf\)"):
        opinion(model, vec(1, env="CartPole-v1"), obs, temperature=0.0)


def test_a_squashed_teacher_has_the_same_moments_for_a_gaussian_student():
    space = spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([2.0, 1.0], np.float32))
    squashed = GaussianTokens(th.tensor([[0.4, -1.0]]), th.tensor([[-0.5, 0.2]]), squashed=True)
    th.manual_seed(0)
    samples = GaussianTokens(*(x.expand(400_000, 2) for x in (squashed.mean, squashed.log_std)), squashed=True).sample()
    actions = th.tensor([-2.0, 0.0]) + 0.5 * (samples + 1) * th.tensor([4.0, 1.0])
    gaussian = unsquash(squashed, space)
    assert th.allclose(gaussian.mean, actions.mean(0), atol=0.01)
    assert th.allclose(gaussian.log_std.exp(), actions.std(0), atol=0.01)


def test_a_saturated_teacher_keeps_the_std_of_a_deterministic_one(tmp_path):
    space = spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([2.0, 1.0], np.float32))
    saturated = GaussianTokens(th.tensor([[4.0, -4.0]]), th.tensor([[-1.0, -1.0]]), squashed=True)
    assert th.allclose(unsquash(saturated, space).log_std.exp(), th.tensor([[0.2, 0.05]]))
    assert th.allclose(unsquash(saturated, space, 0.3).log_std.exp(), th.tensor([[0.6, 0.15]]))
    # and a teacher passes its `std` on
    sac = stable_baselines3.SAC("MlpPolicy", "Pendulum-v1", seed=0, device="cpu", policy_kwargs=dict(net_arch=[8]))
    with th.no_grad():
        sac.actor.log_std.bias.fill_(-10.0), sac.actor.log_std.weight.zero_()
    views = [opinion(sac, vec(1, env="Pendulum-v1"), np.zeros((3, 3), np.float32), **kw) for kw in ({}, {"std": 0.4})]
    assert [float(view.log_std.exp()[0]) for view in views] == pytest.approx([0.2, 0.8])


def test_squashed_student_and_squashed_teacher_are_compared_before_squashing():
    env = vec(1, env="Pendulum-v1")
    sac = stable_baselines3.SAC("MlpPolicy", "Pendulum-v1", seed=0, device="cpu", policy_kwargs=dict(net_arch=[8]))
    obs = np.zeros((3, 3), np.float32)
    student = student_of(env, use_sde=True, squash_output=True)
    view = opinion(sac, env, obs, student)
    assert view.squashed
    mean, log_std, _ = sac.actor.get_action_dist_params(th.as_tensor(obs))
    assert th.allclose(view.mean, mean) and th.allclose(view.log_std, log_std, atol=1e-6)
    ppo = stable_baselines3.PPO("MlpPolicy", "Pendulum-v1", device="cpu")
    with pytest.raises(ValueError, match="squash_output"):
        make_teacher(ppo, env, student)


def test_distils_sac_into_a_gaussian_policy(tmp_path):
    sac = stable_baselines3.SAC("MlpPolicy", "Pendulum-v1", seed=0, device="cpu", policy_kwargs=dict(net_arch=[16]))
    sac.save(tmp_path / "sac")
    student = OPD("MlpPolicy", "Pendulum-v1", teacher=tmp_path / "sac", learning_rate=3e-3, n_steps=200, seed=0)
    student.learn(1200)
    obs = student.replay_buffer.sample(200)[0]
    ours = student.policy.get_distribution(obs).mode().detach()
    theirs = student._teacher.distribution(obs, NO_LABELS).mean
    assert (ours - theirs).abs().mean() < 0.1
    assert theirs.abs().mean() > 0.2  # not because both are zero


def test_loading_a_teacher_leaves_the_random_state(tmp_path):
    cartpole_teacher().save(tmp_path / "teacher")
    env = vec(1, env="CartPole-v1")
    student = student_of(env)
    th.manual_seed(0)
    np.random.seed(0)
    expected = th.rand(1), np.random.rand()
    th.manual_seed(0)
    np.random.seed(0)
    make_teacher(str(tmp_path / "teacher"), env, student)
    assert (th.rand(1), np.random.rand()) == expected


# ---------------------------------------------------------------------------------------------------------------------
# Scripted experts


def test_expert_labels_every_worker():
    env = vec(3, kind="multi_discrete")
    env.reset()
    teacher = make_teacher("expert", env, student_of(env))
    assert isinstance(teacher, ExpertTeacher) and teacher.privileged
    labels = teacher.label(env, np.array([0, 2]))
    assert labels.shape == (2, 2)
    assert labels.tolist() == [list(a) for a in env.env_method("expert_action", indices=[0, 2])]
    view = teacher.distribution(NO_LABELS, th.as_tensor(labels))
    assert np.array_equal(view.mode().numpy(), labels)
    # The first token has two bins, padded to three
    assert th.isneginf(view.log_probs[:, 0, 2]).all()
    assert th.allclose(view.log_probs.exp().sum(-1), th.ones(2, 2))


def test_an_expert_of_single_actions_labels_chunks_of_one():
    gym.register("opd_gym_tests/Match-v0", entry_point=Match)
    rescale = functools.partial(RescaleAction, min_action=-1.0, max_action=1.0)
    kwargs = dict(env_kwargs={"kind": "box"}, tokens=True, wrapper=rescale)
    try:
        env, chunks = (make_vec("opd_gym_tests/Match-v0", 2, chunk_size=size, **kwargs) for size in (1, 2))
    finally:
        del gym.registry["opd_gym_tests/Match-v0"]
    env.reset()
    label = make_teacher("expert", env, student_of(env)).label(env, np.array([1]))
    executed = env.env_method("decode", label[0], indices=1)[0]
    inner = env.env_method("get_wrapper_attr", "vector", indices=1)[0]
    np.testing.assert_allclose(2 * executed, inner[None, :2], atol=2 / 255)  # Match acts in [-2, 2]
    with pytest.raises(ValueError, match=r"expert_action\(\).*more than one action.*expert_chunk\(chunk_size\)"):
        make_teacher("expert", chunks, student_of(chunks))


def test_ordered_bins_are_smoothed_over_neighbours():
    env = DummyVecEnv([lambda: ActionTokens(ActionChunk(Robot(), 2))])
    student = type("Student", (), {"squash_output": False})()
    teacher = make_teacher("expert", env, student, smoothing=2.0, floor=0.05)
    env.reset()
    labels = th.as_tensor(teacher.label(env, np.array([0])))
    probabilities = teacher.distribution(NO_LABELS, labels).log_probs.exp()[0, 0]
    label = int(labels[0, 0])
    assert probabilities.argmax() == label
    ratio = (probabilities[label] - 0.05 / 256) / (probabilities[label + 2] - 0.05 / 256)
    assert ratio.item() == pytest.approx(np.exp(0.5), rel=1e-3)
    assert probabilities.min().item() == pytest.approx(0.05 / 256, rel=1e-3)


def test_continuous_labels_become_gaussians():
    space = spaces.Box(-2.0, 2.0, (1,), np.float32)
    labels = th.tensor([[1.0], [2.0]])
    plain = LabelSmoothing(token_spec(space), space, False, std=0.1)(labels)
    assert th.equal(plain.mean, labels) and th.allclose(plain.log_std.exp(), th.full((2, 1), 0.2))
    squashed = LabelSmoothing(token_spec(space, squashed=True), space, False, std=0.1)(labels)
    assert squashed.squashed and th.allclose(squashed.mode() * 2, labels, atol=0.05)
    with pytest.raises(ValueError, match=r"std must be a number in \(0, inf\)"):
        LabelSmoothing(token_spec(space), space, False, std=0.0)


def test_an_expert_must_exist_and_fit():
    with pytest.raises(ValueError, match="expert_action.*CartPole-v1 has none"):
        OPD("MlpPolicy", vec(env="CartPole-v1", control=False), teacher="expert")
    with pytest.raises(ValueError, match="scripted expert"):
        OPD("MlpPolicy", vec(env="CartPole-v1"), teacher="expert").learn(32)

    class Wrong(Match):
        def expert_action(self):
            return np.zeros(7)

    with pytest.raises(ValueError, match="returned 7 numbers, the action space has 1 tokens"):
        OPD("MlpPolicy", vec(env=Wrong), teacher="expert").learn(32)


@pytest.mark.parametrize(
    ("kind", "label", "message"),
    [
        ("discrete", -1, r"what is no action of Discrete\(4\): \[-1, -1\]"),
        ("discrete", 4, "no action"),
        ("multi_discrete", [2, 0], "no action"),
        ("multi_binary", [0, 0.5, 1], "no action"),
        ("box", [0.0, np.nan], "NaN or infinity"),
    ],
)
def test_labels_that_are_no_actions_are_refused(kind, label, message):
    class Wrong(Match):
        def expert_action(self):
            return np.asarray(label)

        def step(self, action):  # Match compares with the expert's action
            return self._observe(), 0.0, False, False, {}

    with pytest.raises(ValueError, match=message):
        OPD("MlpPolicy", vec(env=Wrong, kind=kind), teacher="expert").learn(32)


# ---------------------------------------------------------------------------------------------------------------------
# A look at the teacher before it teaches


def learned(env, n_eval_episodes, **kwargs):
    kwargs = {"teacher": cartpole_teacher(), "n_steps": 32, "device": "cpu", "seed": 0, **kwargs}
    model = OPD("MlpPolicy", env, teacher_kwargs={"n_eval_episodes": n_eval_episodes}, **kwargs)
    return model.learn(64)


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("control", [False, True])
def test_a_trial_changes_nothing_of_the_run(control, behind):
    models = []
    for n_eval_episodes in (0, 3):
        env = vec(2, env="CartPole-v1", control=control)
        models.append(learned(VecNormalize(env) if behind else env, n_eval_episodes))
    assert th.equal(*map(parameters, models))
    if behind:
        assert np.array_equal(*(model.env.obs_rms.mean for model in models)) and models[1].env.training


def test_a_good_teacher_is_reported_and_a_bad_one_is_doubted(tmp_path, capsys):
    logger = configure(str(tmp_path), ["csv"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = OPD("MlpPolicy", "CartPole-v1", teacher=cartpole_teacher(), n_steps=32, device="cpu", seed=0, verbose=1)
        model.set_logger(logger)
        model.learn(64)
    printed = capsys.readouterr().out
    assert "the teacher has a mean reward of 500, the student has a mean reward of" in printed
    rows = np.genfromtxt(tmp_path / "progress.csv", delimiter=",", names=True)
    assert rows["teacherep_rew_mean"][0] == 500.0 and np.isnan(rows["teacherep_rew_mean"][1])
    worst = cartpole_teacher()
    with th.no_grad():
        worst.policy.action_net.weight.neg_()
    with pytest.warns(UserWarning, match="teacher does no better.*teacher has a mean reward of [89].*n_eval_episodes"):
        learned("CartPole-v1", None, teacher=worst)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learned("CartPole-v1", 0, teacher=worst)
        OPD("MlpPolicy", "CartPole-v1", teacher=worst, n_steps=8).learn(8)  # over sooner than the trial
        model.learn(64)  # the student has begun to learn


def test_the_success_of_whoever_tells_it():
    class Good(Teacher):
        privileged = True

        def label(self, env, indices):
            return np.array(env.env_method("expert_action", indices=list(indices)))[:, None]

        def distribution(self, observations, labels, actions=None):
            return CategoricalTokens(th.log_softmax(9.0 * th.eye(4)[labels[:, 0].long()], dim=-1).unsqueeze(1))

    env = vec(2)
    for teacher in (Good(), make_teacher("expert", env, student_of(env))):
        assert try_teacher(teacher, env, student_of(env)) == {}
        assert try_teacher(teacher, env, student_of(env), 4) == {"success_rate": 1.0, "ep_rew_mean": 4.0}


def test_an_attribute_of_the_env_makes_no_bins_of_an_experts_actions():
    class Binned(Match):
        n_bins = 10  # of something of its own

    for kind in (Match, Binned):
        env = vec(1, env=kind)
        view = make_teacher("expert", env, student_of(env)).distribution(None, th.zeros(1, 1))
        # floor / 4 on each of the four actions, the rest on the first
        assert th.allclose(view.log_probs.exp(), th.tensor([[[0.9925, 0.0025, 0.0025, 0.0025]]]), atol=1e-5)


def test_running_statistics_of_each_env_are_warned_of():
    def student(**kwargs):
        env = vec(2, env=lambda: NormalizeObservation(gym.make("CartPole-v1")))
        for key, value in kwargs.items():
            for i in range(2):
                env.env_method("set_wrapper_attr", key, value, indices=i)
        return OPD("MlpPolicy", env, teacher=cartpole_teacher(), device="cpu")

    with pytest.warns(UserWarning, match="Use Stable-Baselines3's VecNormalize"):
        student()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        student(update_running_mean=False)


def test_a_trial_in_an_env_that_never_ends_or_is_slow_or_keeps_statistics(monkeypatch):
    def tried(env, **kwargs):
        return try_teacher(make_teacher(cartpole_teacher(), env, student_of(env)), env, student_of(env), **kwargs)

    class Endless(CartPoleEnv):
        def step(self, action):
            obs, reward, *_ = super().step(action)
            return np.zeros_like(obs), reward, False, False, {}

    assert tried(vec(1, env=Endless)) == {}
    assert tried(vec(1, env=lambda: NormalizeObservation(gym.make("CartPole-v1")))) == {}
    assert tried(DummyVecEnv([lambda: Monitor(gym.make("CartPole-v1"), allow_early_resets=False)])) == {}
    env = vec(2, env="CartPole-v1")
    assert tried(env, n_episodes=2) == {"ep_rew_mean": 500.0}
    teacher = make_teacher(cartpole_teacher(), env, student_of(env))
    teacher.policy.autoregressive = True
    assert try_teacher(teacher, env, student_of(env)) == {}
    with pytest.raises(ValueError, match="autoregressive"):
        try_teacher(teacher, env, student_of(env), 1)
    for wrong, told in ((-1, "at least 0"), ("5", "an integer"), (2.5, "an integer")):
        with pytest.raises(ValueError, match=f"n_eval_episodes must be {told}"):
            learned("CartPole-v1", wrong)
    monkeypatch.setitem(CHUNK_SIZES, "CartPole-v1", 8)
    assert tried(env) == {}


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    "kwargs", [{"temperature": np.inf}, {"std": np.inf}, {"smoothing": np.inf}, {"smoothing": -1.0}, {"floor": 1.0}]
)
def test_numbers_of_the_teacher_that_make_no_sense(kwargs):
    with pytest.raises(ValueError, match=f"{next(iter(kwargs))} must be a number in"):
        OPD("MlpPolicy", "CartPole-v1", teacher=cartpole_teacher(), teacher_kwargs=kwargs)


class Other(gym.Env):
    def __init__(self, observation_space, action_space):
        self.observation_space, self.action_space = observation_space, action_space


VECTOR = spaces.Box(-1.0, 1.0, (4,), np.float32)


def teacher_for(observation_space, action_space):
    return ActorCriticPolicy(observation_space, action_space, lambda _: 0.0)


@pytest.mark.parametrize(
    ("teacher", "student", "message"),
    [
        (
            spaces.Discrete(2),
            spaces.Discrete(3),
            r"teacher's action space is Discrete\(2\), the student's Discrete\(3\)",
        ),
        (spaces.Discrete(2), spaces.Box(-1, 1, (2,)), "must act in the same space"),
        (spaces.MultiDiscrete([8] * 3), spaces.MultiDiscrete([8] * 6), "3 tokens, the student with 6: chunk size"),
        (spaces.MultiDiscrete([8] * 3), spaces.MultiDiscrete([9] * 3), "have 8 bins, the student's 9"),
        (spaces.Box(-1, 1, (2,)), spaces.Box(-2, 2, (2,)), "must act in the same space"),
        (spaces.Box(-1, 1, (2,)), spaces.Box(-1, 1, (3,)), "must act in the same space"),
        (spaces.MultiBinary(2), spaces.MultiBinary(3), "must act in the same space"),
    ],
)
def test_another_action_space_is_refused(teacher, student, message):
    env = DummyVecEnv([lambda: Other(VECTOR, student)])
    with pytest.raises(ValueError, match=message):
        OPD("MlpPolicy", env, teacher=teacher_for(VECTOR, teacher))


def test_other_observations_are_refused():
    env = DummyVecEnv([lambda: Other(VECTOR, spaces.Discrete(2))])
    with pytest.raises(ValueError, match="expects the observation as"):
        OPD("MlpPolicy", env, teacher=teacher_for(spaces.Box(-1, 1, (5,)), spaces.Discrete(2)))
    with pytest.raises(ValueError, match=r"expects a Dict observation of \['a'\]"):
        observation_adapter(spaces.Dict({"a": VECTOR}), VECTOR)
    with pytest.raises(ValueError, match=r"does not give \['b'\]"):
        observation_adapter(spaces.Dict({"a": VECTOR, "b": VECTOR}), spaces.Dict({"a": VECTOR}))


def test_the_teacher_sees_its_part_of_the_observation_in_its_own_layout():
    high = spaces.Box(0, 255, (36, 48, 3), np.uint8)
    wide = spaces.Box(0, 255, (3, 36, 48), np.uint8)
    for teacher, env in ((high, wide), (wide, high)):
        adapt = observation_adapter(spaces.Dict({"picture": teacher}), spaces.Dict({"picture": env, "vector": VECTOR}))
        seen = adapt({"picture": th.zeros(2, *env.shape), "vector": th.zeros(2, 4)})
        assert set(seen) == {"picture"} and seen["picture"].shape == (2, *teacher.shape)
    env = vec(dict_obs=True)
    assert isinstance(OPD("MultiInputPolicy", env, teacher="expert").env, VecTransposeImage)


def test_other_statistics_are_refused():
    statistics = {"q01": [-1.0, -1.0], "q99": [1.0, 0.5]}
    policies = [type("Policy", (), {"statistics": s})() for s in (statistics, None)]
    plain, normalised = (DummyVecEnv([lambda s=s: ActionTokens(Robot(), statistics=s)]) for s in (None, statistics))
    check_statistics(policies[0], normalised, policies[0])
    check_statistics(policies[1], plain, policies[1])
    with pytest.raises(ValueError, match="other statistics than those of the env"):
        check_statistics(policies[0], plain, policies[0])
    with pytest.raises(ValueError, match="other statistics than those of the student"):
        check_statistics(policies[1], plain, policies[0])


def test_vla_checkpoint_for_another_env_is_refused(tmp_path):
    env = ActionTokens(ActionChunk(Robot(), 4))
    kwargs = dict(teacher="expert", policy_kwargs=dict(body_kwargs=TINY_BODY))
    OPD("VLAPolicy", env, **kwargs).policy.save_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="does not fit the env.*action tokens") as error:
        OPD("VLAPolicy", ActionTokens(ActionChunk(Robot(), 8)), **{**kwargs, "teacher": tmp_path})
    # Once as what was asked for, once as what was found
    assert str(error.value).count(str(tmp_path)) == 2


def test_missing_teacher_of_a_suite_names_the_one_for_some_of_its_tasks(monkeypatch):
    monkeypatch.setattr("opd_gym.algorithms.teachers.env_id_of", lambda env: "Libero10-v0")
    with pytest.raises(ValueError, match="none for Libero10-v0.* libero-10-teacher is for Libero10Task0-v0, .* alone"):
        OPD("MlpPolicy", "CartPole-v1")


def test_missing_and_broken_teachers(tmp_path):
    with pytest.raises(ValueError, match="No teacher given, and the zoo has none for CartPole-v1.* or a policy.$"):
        OPD("MlpPolicy", "CartPole-v1")
    with pytest.raises(FileNotFoundError, match="'nobody' not found"):
        OPD("MlpPolicy", "CartPole-v1", teacher="nobody")
    (tmp_path / "text.zip").write_text("not a zip")
    with pytest.raises(ValueError, match="not the zip of a Stable-Baselines3 model"):
        OPD("MlpPolicy", "CartPole-v1", teacher=tmp_path / "text.zip")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="neither a VLA checkpoint"):
        OPD("MlpPolicy", "CartPole-v1", teacher=tmp_path / "empty")
    with pytest.raises(ValueError, match="got int"):
        OPD("MlpPolicy", "CartPole-v1", teacher=3)
    recurrent = sb3_contrib.RecurrentPPO("MlpLstmPolicy", "CartPole-v1", device="cpu")
    with pytest.raises(ValueError, match="recurrent"):
        OPD("MlpPolicy", "CartPole-v1", teacher=recurrent)


def test_arguments_that_no_teacher_takes():
    env = vec(1)
    student = student_of(env)
    for spec, kwargs, message in (
        ("expert", dict(obs_keys="a", std=0.1), r"\['obs_keys'\]: ExpertTeacher takes \['std', 'smoothing', 'floor'\]"),
        (student_of(env), dict(stdd=0.1), r"\['stdd'\]: PolicyTeacher takes \['temperature', 'std'"),
        (make_teacher("expert", env, student), dict(std=0.1), r"\['std'\]: ExpertTeacher takes none, it is ready"),
    ):
        with pytest.raises(ValueError, match=message):
            make_teacher(spec, env, student, **kwargs)


def test_the_student_is_not_its_own_teacher():
    env = vec(1, env="CartPole-v1")
    student = student_of(env)
    with pytest.raises(ValueError, match="own policy"):
        make_teacher(student, env, student)


def test_a_teacher_that_gives_nan_is_named():
    teacher = cartpole_teacher()
    with th.no_grad():
        teacher.policy.action_net.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="teacher's outputs are NaN"):
        OPD("MlpPolicy", "CartPole-v1", teacher=teacher).learn(32)


def normalised(n_envs=1, env="Pendulum-v1", **kwargs):
    """Statistics far from those of raw observations, some of which are clipped."""
    env = VecNormalize(vec(n_envs, env=env), training=False, clip_obs=2.0, epsilon=0.01, **kwargs)
    env.obs_rms.mean[:], env.obs_rms.var[:] = 0.2, 0.09
    return env


def seen_by(teacher, env, **kwargs):
    """What a live teacher saw in a rollout, and what was stored of its opinion."""
    policy = teacher.policy
    seen, forward = [], policy.get_distribution
    policy.get_distribution = lambda obs: (seen.append(obs), forward(obs))[1]
    kwargs = dict(n_eval_episodes=0, **kwargs)
    model = OPD("MlpPolicy", env, teacher=teacher, n_steps=6, device="cpu", seed=0, teacher_kwargs=kwargs).learn(1)
    policy.get_distribution = forward
    return model, seen


def test_a_raw_teacher_sees_raw_observations_where_the_student_sees_normalised_ones():
    teacher = stable_baselines3.PPO(
        "MlpPolicy", "Pendulum-v1", device="cpu", seed=0, policy_kwargs=dict(ortho_init=False)
    )
    env = normalised(2)
    env.training = True  # the statistics move, the raw observations do not
    model, seen = seen_by(teacher, env)
    assert len(seen) == 6 and max(float(obs[:, :2].abs().max()) for obs in seen) <= 1.0
    assert all(np.allclose(obs[:, :2].norm(dim=1), 1.0, atol=1e-5) for obs in seen)  # cosine and sine
    rows = th.stack(seen).transpose(0, 1).flatten(0, 1)
    expected = teacher.policy.get_distribution(rows).distribution
    flat = th.as_tensor(model.rollout_buffer.teacher_distributions)
    assert th.allclose(flat, th.cat([expected.mean, expected.stddev.log()], dim=1), atol=1e-5)
    # Other than what the student saw
    assert np.abs(model.rollout_buffer.observations - rows.numpy()).max() > 0.5
    env.norm_obs = False
    assert make_teacher(teacher, env, model.policy).privileged is False


@pytest.mark.parametrize("how", ["set_env", "load"])
def test_a_new_env_sets_the_teacher_up_again(how, tmp_path):
    teacher = stable_baselines3.PPO("MlpPolicy", "Pendulum-v1", device="cpu", policy_kwargs=dict(ortho_init=False))
    teacher.save(tmp_path / "teacher")
    kwargs = dict(teacher=tmp_path / "teacher.zip", n_steps=6, device="cpu", seed=0)
    behind = normalised()
    behind.clip_obs = 100.0
    for before, after in ((vec(1, env="Pendulum-v1"), behind), (behind, vec(1, env="Pendulum-v1"))):
        model = OPD("MlpPolicy", before, **kwargs).learn(1)
        if how == "set_env":
            model.set_env(after)
        else:
            model.save(tmp_path / "student")
            model = OPD.load(tmp_path / "student", env=after, device="cpu")
        model.learn(1)
        seen = model.rollout_buffer.observations
        raw = seen * np.sqrt(0.09 + 0.01) + 0.2 if after is behind else seen
        expected = teacher.policy.get_distribution(th.as_tensor(raw)).distribution.mean.flatten()
        assert th.allclose(th.as_tensor(model.rollout_buffer.teacher_distributions[:, 0]), expected, atol=1e-5)
    model.teacher_kwargs = {"vec_normalize": normalised(1, "CartPole-v1")}
    with pytest.raises(ValueError, match="statistics of the shape"):
        model.set_env(vec(1, env="Pendulum-v1"))


@pytest.mark.parametrize(
    ("zip_name", "statistics"),
    [
        ("Pendulum-v1.zip", "Pendulum-v1/vecnormalize.pkl"),
        ("best_model.zip", "Pendulum-v1/vecnormalize.pkl"),
        ("ppo-Pendulum-v1.zip", "vec_normalize.pkl"),
        ("rl_model_500_steps.zip", "rl_model_vecnormalize_500_steps.pkl"),
        ("model.zip", "elsewhere/statistics.pkl"),
    ],
)
def test_a_teacher_behind_vec_normalize_brings_its_statistics(zip_name, statistics, tmp_path, capsys):
    theirs = normalised()
    model = stable_baselines3.PPO("MlpPolicy", theirs, device="cpu", seed=0, policy_kwargs=dict(ortho_init=False))
    model.save(tmp_path / zip_name)
    (tmp_path / statistics).parent.mkdir(exist_ok=True)
    theirs.save(str(tmp_path / statistics))
    raw = np.random.default_rng(0).uniform(-1, 1, (50, 3)).astype(np.float32)
    expected = model.policy.get_distribution(th.as_tensor(theirs.normalize_obs(raw))).distribution.mean
    assert np.abs((raw - 0.2) / 0.3).max() > 2.0  # some are clipped
    given = {"vec_normalize": tmp_path / statistics} if "elsewhere" in statistics else {}
    env = vec(1, env="Pendulum-v1")
    for teacher in (tmp_path / zip_name, model):
        assert th.allclose(opinion(teacher, env, raw, **given).mean, expected, atol=1e-5)
    at_odds = opinion(tmp_path / zip_name, env, raw, vec_normalize=False).mean
    assert not th.allclose(at_odds, expected, atol=1e-2)
    # The student normalises too, with other statistics
    mixed = normalised()
    mixed.obs_rms.mean[:] = -3.0
    student = OPD("MlpPolicy", mixed, teacher=tmp_path / zip_name, teacher_kwargs=given, verbose=1, device="cpu")
    assert "observations normalised by its own statistics" in capsys.readouterr().out
    mixed.old_obs = raw[:1]
    label = student._teacher.label(mixed, np.array([0]))
    assert np.allclose(label[:, :1], expected[:1].detach(), atol=1e-5)


def test_statistics_of_dict_observations(tmp_path):
    theirs = VecNormalize(vec(1, dict_obs=True), norm_obs_keys=["vector"], training=False)
    theirs.obs_rms["vector"].mean[:] = 0.5
    theirs.save(str(tmp_path / "statistics.pkl"))
    env = VecTransposeImage(vec(1, dict_obs=True))
    obs = env.reset()
    model = stable_baselines3.PPO("MultiInputPolicy", theirs, device="cpu", seed=0, n_steps=8, batch_size=8)
    student = type("Student", (), {"squash_output": False})()
    teacher = make_teacher(model.policy, env, student, vec_normalize=tmp_path / "statistics.pkl")
    inputs = {"vector": th.as_tensor(obs["vector"] - 0.5), "picture": th.as_tensor(obs["picture"])}
    expected = model.policy.get_distribution(inputs).distribution.logits
    found = teacher.distribution({key: th.as_tensor(array) for key, array in obs.items()}, NO_LABELS)
    assert th.allclose(found.log_probs[:, 0], expected, atol=1e-5)


def test_statistics_are_read_and_nothing_runs(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    env = normalised()
    for protocol in range(3, pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / "statistics.pkl").write_bytes(pickle.dumps(env, protocol))
        found = read_vec_normalize(tmp_path / "statistics.pkl")
        assert found.norm_obs is True and found.clip_obs == 2.0 and (found.obs_rms.mean == 0.2).all()
        (tmp_path / "bomb.pkl").write_bytes(pickle.dumps([env, Bomb()], protocol))
        with pytest.raises(ValueError, match=r"bomb\.pkl cannot be read.*trust=True"):
            read_vec_normalize(tmp_path / "bomb.pkl")
        assert not (tmp_path / "ran").exists()
    with pytest.raises(ValueError, match="expected what"):
        read_vec_normalize(tmp_path / "bomb.pkl", trust=True)
    assert (tmp_path / "ran").exists()
    (tmp_path / "list.pkl").write_bytes(pickle.dumps([1]))
    (tmp_path / "cut.pkl").write_bytes(pickle.dumps(env.obs_rms)[:-20])
    for name, message in (("list", "VecNormalize.save"), ("cut", "cannot be read"), ("none", "no file")):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            read_vec_normalize(tmp_path / f"{name}.pkl")


def test_statistics_of_other_observations_are_refused(tmp_path):
    cartpole_teacher().save(tmp_path / "teacher")
    normalised().save(str(tmp_path / "vec_normalize.pkl"))
    with pytest.raises(ValueError, match=r"vec_normalize\.pkl.*shape \(3,\).*False"):
        OPD("MlpPolicy", "CartPole-v1", teacher=tmp_path / "teacher.zip")
    OPD("MlpPolicy", "CartPole-v1", teacher=tmp_path / "teacher.zip", teacher_kwargs={"vec_normalize": False})


class Doors(Match):
    """Half of the choices are open only where the first number is positive."""

    def action_masks(self):
        n_choices = {"discrete": 4, "multi_discrete": 5, "multi_binary": 6}[self.kind]
        return (np.arange(n_choices) % 2 == 0) | (self.vector[0] > 0)


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("kind", ["discrete", "multi_discrete", "multi_binary"])
def test_a_maskable_teacher_is_asked_with_the_masks_of_each_state(kind, behind):
    teacher = sb3_contrib.MaskablePPO("MlpPolicy", Doors(kind), device="cpu", seed=0)
    env = vec(2, env=Doors, kind=kind)
    if behind:
        env = VecNormalize(env, training=False)
        env.obs_rms.mean[:] = 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # what is ruled out is kept in half precision
        model = OPD("MlpPolicy", env, teacher=teacher, n_steps=16, device="cpu", seed=0).learn(1)
    raw = model.rollout_buffer.observations + 0.5 * behind
    choices = {"discrete": 4, "multi_discrete": 5, "multi_binary": 6}[kind]
    masks = (np.arange(choices) % 2 == 0) | (raw[:, :1] > 0)
    assert 0 < (~masks).sum() < masks.size // 2
    expected = token_view(teacher.policy.get_distribution(th.as_tensor(raw), action_masks=masks)).log_probs.exp()
    stored = model.token_spec.from_flat(th.as_tensor(model.rollout_buffer.teacher_distributions)).log_probs.exp()
    assert th.allclose(stored, expected, atol=2e-3)


@pytest.mark.parametrize("estimator", ["exact", "sampled"])
def test_a_student_leaves_what_the_masks_rule_out(estimator):
    teacher = sb3_contrib.MaskablePPO("MlpPolicy", Doors(), policy_kwargs=dict(net_arch=[]), device="cpu")
    with th.no_grad():
        teacher.policy.action_net.weight.zero_()
        teacher.policy.action_net.bias.copy_(th.tensor([1.0, 3.0, 0.0, 0.0]))
    model = OPD(
        "MlpPolicy",
        vec(8, env=Doors),
        teacher=teacher,
        estimator=estimator,
        n_steps=32,
        batch_size=256,
        learning_rate=1e-2,
        device="cpu",
        seed=0,
    ).learn(256 * (4 if estimator == "exact" else 40))
    obs = np.random.default_rng(0).uniform(-1, 1, (200, 4)).astype(np.float32)
    obs = obs[np.abs(obs[:, 0]) > 0.2]
    probabilities = model.policy.get_distribution(th.as_tensor(obs)).distribution.probs.detach().numpy()
    open_doors = obs[:, 0] > 0
    assert np.mean(probabilities.argmax(1) == np.where(open_doors, 1, 0)) > 0.95
    assert probabilities[~open_doors][:, [1, 3]].sum(1).mean() < 0.05


def test_masks_that_are_not_there_and_masks_that_do_not_fit():
    teacher = sb3_contrib.MaskablePPO("MlpPolicy", Doors(), device="cpu")
    with pytest.warns(UserWarning, match=r"no action_masks\(\)"):
        OPD("MlpPolicy", Match(), teacher=teacher)

    class Wrong(Doors):
        def action_masks(self):
            return np.ones(3, bool)

    with pytest.raises(ValueError, match=r"returned 3 values, Discrete\(4\) has 4 choices"):
        OPD("MlpPolicy", Wrong(), teacher=teacher).learn(1)


# ---------------------------------------------------------------------------------------------------------------------
# Privileged observations


def two_keys():
    parts = {"a": spaces.Box(-1, 1, (2,)), "b": spaces.Box(-1, 1, (1, 3)), "n": spaces.Discrete(3)}
    return DummyVecEnv([lambda: Other(spaces.Dict(parts), spaces.Discrete(2))])


def test_the_teacher_sees_the_keys_that_are_named():
    env = two_keys()
    obs = {"a": th.rand(4, 2), "b": th.rand(4, 1, 3), "n": th.zeros(4)}
    joined = th.cat([obs["b"].flatten(1), obs["a"]], dim=1)
    student = type("Student", (), {"squash_output": False})()
    for keys, seen in (("a", obs["a"]), (["b"], obs["b"]), (["b", "a"], joined)):
        teacher = teacher_for(spaces.Box(-1, 1, seen.shape[1:]), spaces.Discrete(2))
        expected = teacher.get_distribution(seen).distribution.logits
        found = make_teacher(teacher, env, student, obs_keys=keys).distribution(obs, NO_LABELS)
        assert th.allclose(found.log_probs[:, 0], expected)
    statistics = VecNormalize(DummyVecEnv([lambda: Other(spaces.Box(-1, 1, (2,)), spaces.Discrete(2))]), training=False)
    statistics.obs_rms.mean[:] = 0.5
    teacher = teacher_for(spaces.Box(-1, 1, (2,)), spaces.Discrete(2))
    found = make_teacher(teacher, env, student, obs_keys="a", vec_normalize=statistics).distribution(obs, NO_LABELS)
    assert th.allclose(found.log_probs[:, 0], teacher.get_distribution(obs["a"] - 0.5).distribution.logits, atol=1e-5)
    for keys, message in (
        (["a", "c"], r"obs_keys are \['a', 'c'\]"),
        ([], "obs_keys"),
        (["a", "n"], "cannot be joined"),
        (None, "teacher_kwargs=.*obs_keys"),
    ):
        with pytest.raises(ValueError, match=message):
            make_teacher(teacher, env, student, obs_keys=keys)


@pytest.mark.parametrize("behind", [False, True])
def test_a_teacher_of_keys_that_the_student_does_not_see(behind, tmp_path):
    def hidden():
        return PrivilegedObservation(Match(dict_obs=True), "vector")

    env = vec(2, env=hidden)
    if behind:
        env = VecNormalize(env, norm_obs_keys=["picture"])
    teacher = stable_baselines3.PPO("MlpPolicy", Match(), device="cpu", seed=0, policy_kwargs=dict(ortho_init=False))
    seen, forward = [], teacher.policy.get_distribution
    teacher.policy.get_distribution = lambda obs: (seen.append(obs), forward(obs))[1]
    kwargs = dict(teacher_kwargs={"obs_keys": ["vector"]}, n_steps=6, device="cpu", seed=0)
    model = OPD("MultiInputPolicy", env, teacher=teacher, **kwargs).learn(1)
    assert set(model.observation_space.spaces) == {"picture"}
    rows = th.stack(seen[-6:]).transpose(0, 1).flatten(0, 1)
    stored = model.token_spec.from_flat(th.as_tensor(model.rollout_buffer.teacher_distributions)).log_probs[:, 0]
    assert th.allclose(stored, forward(rows).distribution.logits, atol=2e-3)
    if not behind:  # the picture shows the first number of the vector
        shown = model.rollout_buffer.observations["picture"][:, 0, 0, 0]
        assert np.abs(shown - 127 * (1 + rows[:, 0].numpy())).max() <= 1.0
    model.save(tmp_path / "student")
    picture = model.observation_space.sample()
    assert OPD.load(tmp_path / "student").predict(picture)[0].shape == ()


def test_what_cannot_be_kept_from_the_student():
    for env, keys in (
        (Match(dict_obs=True), ["vector", "picture"]),
        (Match(dict_obs=True), "state"),
        (Match(), "state"),
    ):
        with pytest.raises(ValueError, match="PrivilegedObservation takes some of the keys"):
            PrivilegedObservation(env, keys)


def test_a_teacher_that_was_made_for_another_env_is_refused():
    env = vec(1, env="Pendulum-v1")
    ppo = stable_baselines3.PPO("MlpPolicy", "Pendulum-v1", device="cpu")
    made = make_teacher(ppo, env, student_of(env))
    OPD("MlpPolicy", env, teacher=made)
    with pytest.raises(ValueError, match="made for another env"):
        OPD("MlpPolicy", normalised(), teacher=made)


class Unreadable:
    def __reduce__(self):
        return len, (5,)


def test_what_cannot_be_unpickled_is_named_and_can_be_given(tmp_path):
    model = cartpole_teacher()
    space = model.observation_space
    model.lr_schedule = Unreadable()  # of no use to a policy
    model.save(tmp_path / "schedule")
    OPD("MlpPolicy", "CartPole-v1", teacher=tmp_path / "schedule.zip")
    model.observation_space = Unreadable()
    model.save(tmp_path / "space")
    kwargs = dict(teacher=tmp_path / "space.zip")
    with pytest.raises(ValueError, match="space.zip: its observation_space cannot be read.*custom_objects"):
        OPD("MlpPolicy", "CartPole-v1", **kwargs)
    OPD("MlpPolicy", "CartPole-v1", **kwargs, teacher_kwargs={"custom_objects": {"observation_space": space}})


def of_old_gym(space, monkeypatch, **state):
    """A space as ``gym`` 0.21 pickled it: other attributes, in modules that are not there any more."""
    module = f"gym.spaces.{type(space).__module__.rpartition('.')[2]}"
    name = type(space).__name__
    old = type(name, (), {"__module__": module, "__qualname__": name})
    for parent in ("gym", "gym.spaces", module):
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    setattr(sys.modules[module], name, old)
    sys.modules["gym"].__version__ = "0.21.0"  # Stable-Baselines3 asks when it saves
    instance = old()
    vars(instance).update(state)
    return instance


def test_a_zip_of_old_gym_teaches(tmp_path, monkeypatch):
    env = vec(1, kind="multi_discrete")
    model = stable_baselines3.PPO("MlpPolicy", env, n_steps=8, batch_size=8, device="cpu", seed=0)
    box, choices = model.observation_space, model.action_space
    with monkeypatch.context() as patch:
        bounds = dict(low=box.low, high=box.high, bounded_below=box.low > -np.inf, bounded_above=box.high < np.inf)
        rng = np.random.RandomState(0)
        model.observation_space = of_old_gym(box, patch, dtype=box.dtype, shape=box.shape, np_random=rng, **bounds)
        state = dict(nvec=choices.nvec, dtype=choices.dtype, _shape=choices.shape, _np_random=None)
        model.action_space = of_old_gym(choices, patch, **state)
        model.save(tmp_path / "old")
    assert "gym" not in sys.modules
    obs = np.random.default_rng(0).uniform(-1, 1, (5, 4)).astype(np.float32)
    found = opinion(tmp_path / "old.zip", env, obs)
    expected = token_view(model.policy.get_distribution(th.as_tensor(obs)))
    assert th.equal(found.flatten(), expected.flatten())
