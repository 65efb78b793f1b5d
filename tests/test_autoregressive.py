"""Autoregressive policies (OpenVLA) in every algorithm, as students and teachers: each token given those before it."""

import copy

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import configure
from toys import TINY_BODY, parameters, vec
from vlas import N_BINS, STATISTICS, Told, observations, told, write_openvla

from opd_gym import GRPO, OPD, PPO, SFT
from opd_gym.algorithms.teachers import make_teacher
from opd_gym.demonstrations import Demonstrations
from opd_gym.envs.wrappers import ActionChunk, ActionTokens
from opd_gym.policies.body import VLABody, VLAConfig, VLAOutput, register_body
from opd_gym.policies.vla import VLAPolicy
from opd_gym.tokens import CategoricalTokens, action_distribution, distribution_and_values, token_view

PLAIN = dict(seed=0, device="cpu")


def told_two():
    return ActionTokens(ActionChunk(Told(n_dims=2), 1), n_bins=N_BINS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def student(folder):
    return write_openvla(folder / "student", 0)


@pytest.fixture(scope="module")
def teacher(folder):
    return write_openvla(folder / "teacher", 1)


@pytest.fixture(scope="module")
def parallel(folder):
    return write_openvla(folder / "parallel", 2, "simplevla-rl")


def transposed(obs):
    """As Stable-Baselines3's VecTransposeImage shows it to the policy of an algorithm."""
    return {**obs, "agentview": th.as_tensor(obs["agentview"]).movedim(-1, 1)}


class TwoTokens(VLABody):
    """
    Two tokens: the logits of the first are linear in the brightness of the picture, those of the second also have a row
    for each value of the first.
    """

    class Config(VLAConfig):
        model_type = "two_tokens"
        hidden_size = 1

        def __init__(self, **kwargs):
            super().__init__(**kwargs)

    config_class = Config
    autoregressive = True

    def __init__(self, config):
        super().__init__(config)
        v = config.n_bins
        self.slope, self.start, self.after = (th.nn.Parameter(th.randn(*s)) for s in ((2, v), (v,), (v, v)))
        self.post_init()

    def _logits(self, x, first=None):
        return x * self.slope[0] + self.start if first is None else x * self.slope[1] + self.after[first.long()]

    def forward(self, images, instruction, proprio=None, tokens=None):
        x = brightness(images["agentview"])
        return VLAOutput(th.stack([self._logits(x), self._logits(x, tokens[:, 0])], dim=1), x)

    def decode(self, images, instruction, proprio=None, *, choose):
        x = brightness(images["agentview"])
        first = choose(self._logits(x))
        tokens = th.stack([first, choose(self._logits(x, first))], dim=1)
        return tokens, self(images, instruction, tokens=tokens)


def brightness(pictures):
    return pictures.float().flatten(1).mean(dim=1, keepdim=True) / 255.0


register_body("two_tokens", TwoTokens)
TOY = dict(body="two_tokens", body_kwargs={"action_dim": 2})


def toy_vec(n_envs=3):
    return vec(n_envs, env=told_two)


def toy_teacher(seed=7):
    env = told_two()
    th.manual_seed(seed)
    return VLAPolicy(env.observation_space, env.action_space, lambda _: 0.0, trainable=False, **TOY)


# ------------------------------------------------------------------------------------------- what a rollout remembers


class Passes(BaseCallback):
    """Counts how often pictures are looked at in a rollout."""

    n, in_rollout = 0, 0

    def _on_training_start(self):
        self.model.policy.body.vision_backbone.register_forward_hook(self.count)

    def count(self, *_):
        self.n += 1

    def _on_rollout_start(self):
        self.before = self.n

    def _on_step(self):
        return True

    def _on_rollout_end(self):
        self.in_rollout = self.n - self.before


@pytest.mark.parametrize("options", [{}, {"lora": {"r": 4}, "gradient_checkpointing": True}], ids=["full", "lora"])
def test_log_probs_of_a_rollout_are_those_of_a_teacher_forced_pass(student, options):
    """At a temperature, with prompts of two lengths in a batch, in other batches than those that acted."""
    model = PPO(
        "VLAPolicy", vec(3, env=told), n_steps=5, batch_size=15, n_epochs=1, learning_rate=0.0, temperature=0.7,
        policy_kwargs={"checkpoint": student, "value_head": True, **options}, **PLAIN,
    )  # fmt: skip
    policy = model.policy
    with th.no_grad():
        for name, parameter in policy.named_parameters():
            if ".lora_B" in name or name == "value_net.weight":
                parameter.normal_(std=0.3)
    passes = Passes()
    model.learn(15, callback=passes)
    # Each row of the rollout in one pass, tokens, log-probabilities and values; and the values after the last row
    assert passes.in_rollout == 5 + 1
    buffer = model.rollout_buffer
    tokens = th.as_tensor(buffer.actions)
    assert len({tuple(row) for row in tokens.tolist()}) > 10
    policy.set_training_mode(True)
    for size in (15, 4, 1):
        for samples in buffer.get(size):
            dist, values = model._distribution(samples.observations, samples.actions)
            view = model._student(samples.observations, samples.actions, 0.7)
            th.testing.assert_close(
                view.log_prob(samples.actions), samples.old_token_log_probs, atol=1e-5, rtol=0, check_dtype=True
            )
            th.testing.assert_close(values.flatten(), samples.old_values, atol=1e-5, rtol=0)
    # One batch, neither length alone; and another token changes what comes after it, and only that
    assert len({int(n) for n in (buffer.observations["instruction"] > 0).sum(1)}) == 2
    (samples,) = buffer.get(rows=np.arange(15))
    other = samples.actions.clone()
    other[:, 0] = (other[:, 0] + 3) % N_BINS
    change = (model._student(samples.observations, other, 0.7).log_probs - view_of(model, samples)).abs().amax((0, 2))
    assert change[0] == 0 and change[1] > 0.1 and change[2] > 0.1
    dist, values = distribution_and_values(policy, samples.observations, samples.actions)
    log_probs = token_view(dist).log_prob(samples.actions)
    th.testing.assert_close(values.flatten(), samples.old_values, atol=1e-5, rtol=0)
    assert (log_probs - samples.old_token_log_probs).abs().max() > 0.05, "the temperature makes a difference"
    # A body that is being trained decodes as one that is not
    th.manual_seed(0)
    trained = policy.decode(samples.observations, 0.7)
    policy.set_training_mode(False)
    th.manual_seed(0)
    for one, two in zip(trained, policy.decode(samples.observations, 0.7), strict=True):
        one, two = (x.logits if hasattr(x, "logits") else x for x in (one, two))
        th.testing.assert_close(one, two, atol=1e-5, rtol=0)


def view_of(model, samples):
    return model._student(samples.observations, samples.actions, 0.7).log_probs


def test_tokens_are_sampled_at_the_temperature(student):
    model = PPO(
        "VLAPolicy", vec(3, env=told), n_steps=5, batch_size=15, n_epochs=1, learning_rate=0.0, temperature=1e-4,
        policy_kwargs={"checkpoint": student, "value_head": True}, **PLAIN,
    )  # fmt: skip
    buffer = model.learn(15).rollout_buffer
    np.testing.assert_array_equal(buffer.actions, model.predict(buffer.observations, deterministic=True)[0])
    (samples,) = buffer.get()
    assert not th.equal(model.policy.decode(samples.observations)[0], samples.actions), "at its own it is random"


def logged(model, path):
    model.set_logger(configure(str(path), ["csv"]))
    return lambda: np.genfromtxt(path / "progress.csv", delimiter=",", names=True)


@pytest.mark.parametrize("cls", [PPO, GRPO])
def test_first_ratio_is_one_and_the_right_parameters_change(cls, student, tmp_path):
    kwargs = dict(n_steps=4, batch_size=12) if cls is PPO else dict(group_size=2, n_groups=2, dynamic_sampling=None)
    model = cls(
        "VLAPolicy", vec(3, env=told), n_epochs=1, temperature=0.7, learning_rate=1e-3, micro_batch_size=5,
        policy_kwargs={"checkpoint": student, "value_head": True, "lora": {"r": 4}}, **kwargs, **PLAIN,
    )  # fmt: skip
    log = logged(model, tmp_path)
    before = {name: p.detach().clone() for name, p in model.policy.named_parameters()}
    model.learn(12)
    assert model._n_updates == 1
    assert abs(log()["trainapprox_kl"][-1]) < 1e-6 and log()["trainclip_fraction"][-1] == 0.0
    # The first step of an adapter moves its B, for B begins at zero. Without a critic values stay
    changed = {name for name, p in model.policy.named_parameters() if not th.equal(p, before[name])}
    expected = {name for name in before if ".lora_B" in name}
    if cls is PPO:
        expected |= {"value_net.weight", "value_net.bias"}
    # GRPO decays weights, and so moves A a little
    assert {name for name in changed if ".lora_A" not in name} == expected


# ---------------------------------------------------------------------------------------------------------------- OPD


def by_hand(model, policy, teacher, samples, estimator, prefix):
    """The loss of OPD in a loop over decisions and tokens, with copies of the student's parameters."""
    theirs = teacher.body
    leaves = [p.detach().clone().requires_grad_() for p in policy.body.parameters()]
    (slope, start, after), total = leaves, 0.0
    for i in range(len(samples.rows)):
        x = samples.observations["agentview"][i].double().mean().float() / 255.0
        for t in range(2):
            token, first = int(samples.actions[i, t]), int(prefix[i])
            mine = x * slope[t] + (start if t == 0 else after[first])
            other = x * theirs.slope[t] + (theirs.start if t == 0 else theirs.after[first])
            log_p, log_q = th.log_softmax(mine, 0), th.log_softmax(other.detach(), 0)
            if estimator == "exact":
                total = total + (log_p.exp() * (log_p - log_q)).sum() / (2 * len(samples.rows))
            else:
                ratio = (log_p[token] - log_q[token]).detach()
                total = total + log_p[token] * ratio / len(np.unique(model.rollout_buffer.episode_ids))
    return th.cat([g.flatten() for g in th.autograd.grad(total, leaves)])


@pytest.mark.parametrize("micro_batch_size", [None, 4])
@pytest.mark.parametrize("estimator", ["exact", "sampled"])
def test_opd_gradient_is_that_of_a_loop_over_tokens(estimator, micro_batch_size):
    """Without a gradient of how likely the prefix is: a prefix is part of the state."""
    replay = {"state_replay": False} if estimator == "exact" else {}
    th.manual_seed(0)
    teacher = toy_teacher()
    model = OPD(
        "VLAPolicy", toy_vec(), teacher=teacher, estimator=estimator, n_steps=7, batch_size=21, n_epochs=1,
        micro_batch_size=micro_batch_size, learning_rate=0.0, max_grad_norm=1e9, policy_kwargs=TOY, **replay, **PLAIN,
    )  # fmt: skip
    gradients = []
    step = model.policy.optimizer.step
    body = model.policy.body
    model.policy.optimizer.step = lambda: [
        gradients.append(th.cat([p.grad.flatten() for p in body.parameters()])), step()
    ]  # fmt: skip
    model.learn(21)
    (found,) = gradients
    (samples,) = model.rollout_buffer.get(rows=np.arange(21))
    expected, wrong = (
        by_hand(model, model.policy, teacher, samples, estimator, prefix)
        for prefix in (samples.actions[:, 0], (samples.actions[:, 0] + 1) % N_BINS)
    )
    # The teacher's distributions of the exact estimator are stored in half precision
    tolerance = 2e-3 if estimator == "exact" else 1e-5
    assert expected.norm() > 0.05 and (found - expected).norm() < tolerance * expected.norm()
    assert (wrong - expected).norm() > 0.1 * expected.norm()


def kl(model, n=64):
    """KL(student, teacher) per token after prefixes of the student's own, in states of no rollout."""
    obs = transposed(observations(n))
    th.manual_seed(3)
    model.policy.set_training_mode(False)
    with th.no_grad():
        tokens = model.policy.decode(obs)[0]
        log_p = action_distribution(model.policy, obs, tokens).distribution.logits
        log_q = model._teacher.distribution(obs, tokens.float(), tokens).log_probs
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean(0)


def openvla_opd(student, teacher, **kwargs):
    settings = dict(n_steps=8, batch_size=32, gradient_steps=20, learning_rate=5e-3, **PLAIN)
    return OPD(
        "VLAPolicy", vec(4, env=told), teacher=teacher, policy_kwargs={"checkpoint": student}, **{**settings, **kwargs}
    )


def test_opd_learns_every_token(student, teacher):
    model = openvla_opd(student, teacher)
    before = kl(model)
    model.learn(96)
    replay, buffer = model.replay_buffer, model.rollout_buffer
    assert replay.actions.dtype == np.uint8 and replay.size == 96
    np.testing.assert_array_equal(replay.actions[64:96], buffer.actions)
    assert (before > 0.5).all() and (kl(model) < 0.4 * before).all(), (before, kl(model))


def test_the_teacher_is_asked_after_the_students_tokens(student, teacher, parallel):
    """Whichever of the two is autoregressive."""
    for one, two in ((student, teacher), (student, parallel), (parallel, teacher), (parallel, parallel)):
        model = openvla_opd(one, two, gradient_steps=2)
        model.learn(32)
        buffer, policy = model.rollout_buffer, model._teacher.policy
        (samples,) = buffer.get(rows=np.arange(32))
        assert policy.autoregressive == (two != parallel)
        assert (model.replay_buffer.actions.size > 0) == model.policy.autoregressive == (one != parallel)
        expected = policy.token_log_probs(samples.observations, samples.actions)
        th.testing.assert_close(samples.teacher_log_probs, expected, atol=1e-5, rtol=0)
        view = model.token_spec.from_flat(samples.teacher_distribution)
        th.testing.assert_close(view.log_prob(samples.actions), expected, atol=5e-3, rtol=0)


def test_an_expert_labels_every_token_whatever_comes_before(student):
    model = openvla_opd(student, "expert", gradient_steps=1)
    obs, labels = transposed(observations(4)), th.tensor([[1, 2, 3]]).expand(4, -1).float()
    views = [model._teacher.distribution(obs, labels, th.full((4, 3), token)).log_probs for token in (0, 5)]
    assert th.equal(*views) and views[0].argmax(-1).tolist() == [[1, 2, 3]] * 4
    before = parameters(model)
    model.learn(32)
    assert not th.equal(before, parameters(model))


def test_a_teacher_in_half_precision(student, teacher):
    model = openvla_opd(student, teacher)
    obs, tokens = transposed(observations(2)), th.tensor([[1, 2, 3], [7, 0, 4]])
    single, half = (make_teacher(teacher, model.env, model.policy, dtype=d) for d in (None, "bfloat16"))
    views = [t.distribution(obs, tokens.float(), tokens).log_probs for t in (single, half)]
    assert half.policy.body.dtype == th.bfloat16 and not th.equal(*views)
    np.testing.assert_allclose(*(view.exp() for view in views), atol=0.05)


def test_a_resumed_run_is_the_same_run(student, teacher, tmp_path):
    model = openvla_opd(student, teacher, gradient_steps=3).learn(32)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "states.npz")
    runs = []
    for resumed in (False, True):
        if resumed:
            model = OPD.load(tmp_path / "model", env=vec(4, env=told))
            model.load_replay_buffer(tmp_path / "states.npz")
        model.learn(32, reset_num_timesteps=False)
        runs.append((parameters(model), model.replay_buffer.actions[: model.replay_buffer.size].copy()))
    assert th.equal(runs[0][0], runs[1][0])
    np.testing.assert_array_equal(runs[0][1], runs[1][1])
    assert len(runs[1][1]) == 64 and runs[1][1][:32].any()


def test_states_of_a_parallel_student_are_refused(student, teacher, parallel, tmp_path):
    openvla_opd(parallel, teacher, gradient_steps=1).learn(32).save_replay_buffer(tmp_path / "states.npz")
    with pytest.raises(ValueError, match="no tokens of the student"):
        openvla_opd(student, teacher).load_replay_buffer(tmp_path / "states.npz")


def test_nan_is_named():
    model = OPD("VLAPolicy", toy_vec(), teacher=toy_teacher(), n_steps=4, policy_kwargs=TOY, **PLAIN)
    with th.no_grad():
        model.policy.body.after.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"outputs of the policy .*after "):
        model.learn(12)


# ---------------------------------------------------------------------------------------------------------------- SFT


def demonstrations(n_dims, n=64):
    """The first dimension is anything, the others are as the first."""
    obs = {key: value.numpy() for key, value in observations(n).items()}
    first = np.random.default_rng(0).uniform(-1, 1, (n, 1, 1)).astype(np.float32)
    return Demonstrations(obs, np.tile(first, (1, 1, n_dims)), np.ones((n, 1), dtype=bool))


@pytest.mark.parametrize("label_smoothing", [0.0, 1.0])
def test_sft_is_teacher_forced(student, label_smoothing):
    data = demonstrations(3)
    model = SFT(
        "VLAPolicy", told(), data, batch_size=16, micro_batch_size=6, label_smoothing=label_smoothing,
        policy_kwargs={"checkpoint": student}, **PLAIN,
    )  # fmt: skip
    frozen = copy.deepcopy(model.policy)
    metrics = model.validate(data)
    labels = th.as_tensor(data.tokens(N_BINS, STATISTICS))
    obs = transposed({key: th.as_tensor(value) for key, value in data.observations.items()})
    with th.no_grad():
        logits = frozen.get_distribution(obs, labels).logits
    nll = -sum(logits[i, t, labels[i, t]] for i in range(64) for t in range(3)) / (64 * 3)
    assert metrics.neg_log_prob == pytest.approx(nll.item(), abs=1e-4)
    assert (metrics.loss == pytest.approx(metrics.neg_log_prob)) == (label_smoothing == 0.0)
    before = {name: p.detach().clone() for name, p in model.policy.named_parameters()}
    model.learn(2)
    moved = {name for name, p in model.policy.named_parameters() if not th.equal(p, before[name])}
    assert moved == set(before)


def test_sft_learns_what_parallel_decoding_cannot():
    """Either of many actions is right, a mixture of two is not."""
    data = demonstrations(2)
    model = SFT(
        "VLAPolicy", told_two(), data, batch_size=64, learning_rate=0.2, warmup_steps=1, policy_kwargs=TOY, **PLAIN
    ).learn(150)
    tokens = model.policy.decode(transposed(observations(200)))[0]
    assert (tokens[:, 0] == tokens[:, 1]).float().mean() > 0.95
    assert len(tokens[:, 0].unique()) >= 5


def test_the_entropy_of_a_token_is_that_after_its_prefix():
    """What PPO's bonus and the logs sum: entropies given the tokens that were taken, by hand for one decision."""
    policy = toy_teacher()
    obs = {key: value[:1] for key, value in observations(1).items()}
    tokens = th.tensor([[2, 5]])
    view = CategoricalTokens(policy.get_distribution(obs, tokens).logits)
    body, x = policy.body, brightness(obs["agentview"].permute(0, 3, 1, 2))[0]
    rows = [th.softmax(x * body.slope[0] + body.start, -1), th.softmax(x * body.slope[1] + body.after[2], -1)]
    expected = th.stack([-(p * p.log()).sum() for p in rows])
    th.testing.assert_close(view.entropy()[0], expected, atol=1e-5, rtol=0)


def test_a_parallel_policy_decodes_in_one_pass_as_ever():
    env = ActionTokens(ActionChunk(Told(n_dims=2), 1))
    th.manual_seed(0)
    policy = VLAPolicy(env.observation_space, env.action_space, lambda _: 0.0, body_kwargs=TINY_BODY)
    obs = observations(3)
    tokens, distribution, values = policy.decode(obs, deterministic=True)
    assert not policy.autoregressive and th.equal(tokens, distribution.mode()) and values.shape == (3, 1)
    th.testing.assert_close(distribution.logits, policy.get_distribution(obs).logits)
    # Cold samples are the mode, hot ones are not
    assert th.equal(policy.decode(obs, 1e-4)[0], tokens) and not th.equal(policy.decode(obs, 100.0)[0], tokens)
