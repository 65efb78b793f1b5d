"""Whole updates of OPD, PPO and GRPO against ones that are written out, and what an interrupted one leaves behind."""

from __future__ import annotations

import copy
import math

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import ActorCriticPolicy
from toys import Match, parameters, vec

from opd_gym import GRPO, OPD, PPO, SFT
from opd_gym.demonstrations import Demonstrations

LEARNING_RATE, WEIGHT_DECAY, N_STEPS = 1e-2, 0.1, 8
NETWORK = {"net_arch": {"pi": [8], "vf": []}, "activation_fn": th.nn.Tanh}


class Walk(gym.Env):
    """Two tokens of three bins push a point about; episodes of three decisions, of which one token or both count."""

    observation_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
    action_space = spaces.MultiDiscrete([3, 3])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.x = 0, np.array([0.3, -0.4], np.float32)
        return self.x, {}

    def step(self, action):
        self.x = np.tanh(self.x + 0.5 * (np.asarray(action) - 1)).astype(np.float32)
        self.t += 1
        return self.x, 0.0, self.t == 3, False, {"n_executed_tokens": 1 + self.t % 2}


def plain_network(policy: ActorCriticPolicy) -> th.nn.Module:
    """A copy of a policy's actor, in torch alone."""
    layers = [policy.mlp_extractor.policy_net[0], th.nn.Tanh(), policy.action_net, th.nn.Unflatten(1, (2, 3))]
    return th.nn.Sequential(*copy.deepcopy(layers))


def opd_by_hand(student, teacher, estimator, temperature, max_norm, iterations):
    """Algorithm 1 of VLA-OPD: act, ask the teacher, descend the reverse KL; with AdamW and a clipped gradient."""
    optimizer = th.optim.AdamW(student.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    workers = [Walk(), Walk()]
    x = th.as_tensor(np.stack([worker.reset()[0] for worker in workers]))
    episodes, gradients = [0, 1], []
    for _ in range(iterations):
        rows = []
        for _ in range(N_STEPS):
            logits = student(x).detach() / temperature
            # As Stable-Baselines3 draws them at temperature 1: one token after the other
            parts = logits.split(1, dim=1) if temperature == 1.0 else [logits]
            tokens = th.cat([th.distributions.Categorical(logits=part).sample() for part in parts], dim=1)
            steps = [worker.step(token) for worker, token in zip(workers, tokens.numpy(), strict=True)]
            counts = th.tensor([[1.0, float(step[4]["n_executed_tokens"] == 2)] for step in steps])
            rows.append((x, tokens, counts, list(episodes)))
            x = th.as_tensor(np.stack([w.reset()[0] if s[2] else s[0] for w, s in zip(workers, steps, strict=True)]))
            episodes = [e + 2 if step[2] else e for e, step in zip(episodes, steps, strict=True)]
        seen, tokens, counts = (th.cat([row[i] for row in rows]) for i in range(3))
        if estimator == "exact":
            log_p, log_q = student(seen).log_softmax(-1), teacher(seen).log_softmax(-1).detach()
            log_q = log_q.half().float().log_softmax(-1)  # the teacher's opinions are kept in half precision
            loss = ((log_p.exp() * (log_p - log_q)).sum(-1) * counts).sum() / counts.sum()
        else:
            log_p, log_q = ((net(seen) / temperature).log_softmax(-1) for net in (student, teacher))
            log_p, log_q = (x.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) for x in (log_p, log_q))
            reward = -(log_p - log_q).detach()
            loss = -(log_p * reward * counts).sum() / len({episode for row in rows for episode in row[3]})
        optimizer.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(float((p.grad**2).sum()) for p in student.parameters()))
        for p in student.parameters():
            p.grad *= min(1.0, max_norm / (norm + 1e-6))
        assert (norm > max_norm) == (max_norm == CLIPS), "the small limit must matter, and the large one must not"
        gradients.append(th.cat([p.grad.flatten() for p in student.parameters()]))
        optimizer.step()
    return gradients


# A clipped gradient does not tell what a loss was multiplied with, so some are not clipped
CLIPS, NEVER_CLIPS = 0.02, 1e4


@pytest.mark.parametrize(("micro_batch_size", "max_norm"), [(None, CLIPS), (5, NEVER_CLIPS)])
@pytest.mark.parametrize("temperature", [1.0, 1.6])
@pytest.mark.parametrize("estimator", ["exact", "sampled"])
def test_opd_is_the_step_that_torch_takes(estimator, temperature, micro_batch_size, max_norm):
    th.manual_seed(1)
    teacher = ActorCriticPolicy(Walk.observation_space, Walk.action_space, lambda _: 0.0, **NETWORK)
    with th.no_grad():
        teacher.action_net.weight.mul_(100.0)
        teacher.action_net.bias.normal_(std=0.5)
    model = OPD(
        "MlpPolicy", vec(2, env=Walk), teacher=teacher, estimator=estimator, temperature=temperature, n_steps=N_STEPS,
        batch_size=2 * N_STEPS, micro_batch_size=micro_batch_size, n_epochs=1, state_replay=False, seed=0, device="cpu",
        policy_kwargs=NETWORK, learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY, max_grad_norm=max_norm,
    )  # fmt: skip
    student = plain_network(model.policy)
    actor = [model.policy.mlp_extractor.policy_net, model.policy.action_net]
    ours = [p for module in actor for p in module.parameters()]
    gradients, step = [], model.policy.optimizer.step

    def record():
        gradients.append(th.cat([p.grad.flatten() for p in ours]))
        step()

    model.policy.optimizer.step = record
    th.manual_seed(2)
    # Three updates: Adam's first one is blind to the length of the gradient
    model.learn(3 * 2 * N_STEPS)
    th.manual_seed(2)
    expected = opd_by_hand(student, plain_network(teacher), estimator, temperature, max_norm, iterations=3)
    assert len(gradients) == len(expected) == 3
    for found, wanted in zip(gradients, expected, strict=True):
        th.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)
    for found, wanted in zip(ours, student.parameters(), strict=True):
        th.testing.assert_close(found, wanted, atol=1e-6, rtol=0)


# --------------------------------------------------------------------------------------------------------------- ratios

# Ratios of the two tokens of a decision, and its advantage: tokens and products within [0.8, 1.2] and outside
DECISIONS = [
    (first, second, advantage)
    for first, second in [
        (1.0, 1.0),
        (1.1, 0.9),
        (1.25, 1.0),
        (1.15, 1.15),
        (0.85, 0.85),
        (1.5, 0.7),
        (0.7, 1.05),
        (1.05, 1.5),
    ]
    for advantage in (1.5, -0.5)
]


class Rewrites(BaseCallback):
    """Gives the decisions of a rollout the ratios and advantages above, in place of those that they had."""

    def _on_step(self):
        return True

    def _on_rollout_end(self):
        buffer = self.model.rollout_buffer
        rows = buffer.valid_rows()
        table = np.array([DECISIONS[i % len(DECISIONS)] for i in range(len(rows))], dtype=np.float32)
        buffer.token_log_probs[rows] -= np.log(table[:, :2])
        buffer.advantages[rows] = table[:, 2]
        self.table, self.rows = table, rows
        bias = self.model.policy.action_net.bias.detach().numpy().astype(np.float64)
        self.logits = bias.reshape(2, 3) / self.model.temperature


def policy_of_its_bias(model):
    """Its logits are the biases of the last layer, whatever it sees."""
    with th.no_grad():
        model.policy.action_net.weight.zero_()
        model.policy.action_net.bias.copy_(th.tensor([0.3, -0.2, 0.5, 0.1, 0.4, -0.6]))
    model.policy.optimizer.step = lambda: gradients.append(model.policy.action_net.bias.grad.clone().numpy())
    gradients: list[np.ndarray] = []
    return gradients


def score(logits, actions):
    """d log pi(token) / d logits of each token, (n, 2, 3)."""
    p = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    return np.eye(3)[actions.astype(int)] - p


def passes(ratio, advantage, low, high):
    """Whether a gradient passes the clip: not where the ratio has left the range on the side of the advantage."""
    return np.where(advantage > 0, ratio < 1 + high, ratio > 1 - low)


@pytest.mark.parametrize("ratio", ["token", "joint"])
def test_gradient_of_ppos_ratios_by_hand(ratio):
    model = PPO(
        "MlpPolicy", vec(2, env=Walk), ratio=ratio, n_steps=21, batch_size=42, n_epochs=1, normalize_advantage=False,
        vf_coef=0.0, max_grad_norm=1e9, clip_range=0.2, seed=0, device="cpu",
    )  # fmt: skip
    gradients, rewrites = policy_of_its_bias(model), Rewrites()
    model.learn(42, callback=rewrites)
    buffer, table = model.rollout_buffer, rewrites.table.astype(np.float64)
    mask, ratios, advantages = buffer.token_mask.astype(np.float64), table[:, :2], table[:, 2:]
    assert sorted(set(mask[:, 1])) == [0.0, 1.0] and mask[:, 0].all()
    scores = score(rewrites.logits, buffer.actions)
    if ratio == "joint":
        # One ratio a decision, of the tokens that were executed
        ratios = (ratios**mask).prod(axis=1, keepdims=True)
        weights = np.full((42, 1), 1 / 42)
    else:
        weights = mask / mask.sum()
    kept = passes(ratios, advantages, 0.2, 0.2)
    # Inside, outside with a gradient and outside without are all among them, on both sides
    inside = (ratios > 0.8) & (ratios < 1.2)
    for side in (ratios > 1.2, ratios < 0.8):
        assert (side & kept).any() and (side & ~kept).any()
    assert inside.any() and kept[inside].all()
    factors = -weights * advantages * ratios * kept * mask
    expected = (factors[:, :, None] * scores).sum(axis=0).flatten()
    np.testing.assert_allclose(gradients, [expected], atol=1e-6, rtol=0)
    assert np.abs(expected).min() > 1e-3


def test_gradient_of_grpos_ratios_by_hand():
    """One ratio a token, another limit above than below, each trajectory as much as another however long it is."""

    class Uneven(Walk):
        def step(self, action):
            # Ends after one decision to three
            *rest, _, truncated, info = super().step(action)
            return *rest, self.t > action[0], truncated, info

    model = GRPO(
        "MlpPolicy", vec(2, env=Uneven), group_size=4, n_groups=8, dynamic_sampling=None, temperature=1.6,
        micro_batch_size=5, max_grad_norm=1e9, clip_range=0.2, clip_range_high=0.28, seed=0, device="cpu",
    )  # fmt: skip
    gradients, rewrites = policy_of_its_bias(model), Rewrites()
    model.learn(1, callback=rewrites)
    buffer, rows = model.rollout_buffer, rewrites.rows
    mask, ids = buffer.token_mask[rows].astype(np.float64), buffer.episode_ids[rows]
    lengths = {i: mask[ids == i].sum() for i in np.unique(ids)}
    assert len(lengths) == 32 and len(set(lengths.values())) > 1
    weights = mask / np.array([lengths[i] for i in ids])[:, None] / 32
    table = rewrites.table.astype(np.float64)
    ratios, advantages = table[:, :2], table[:, 2:]
    kept = passes(ratios, advantages, 0.2, 0.28)
    factors = -weights * advantages * ratios * kept / 1.6
    expected = (factors[:, :, None] * score(rewrites.logits, buffer.actions[rows])).sum(axis=0).flatten()
    np.testing.assert_allclose(gradients, [expected], atol=1e-6, rtol=0)
    assert np.abs(expected).max() > 1e-2


# ----------------------------------------------------------------------------------------------------------- interrupts


def interrupted(make, where):
    """A model whose learning was stopped by the keyboard: in the middle of a gradient, or just before its step."""
    model = make()
    calls = []

    def stop(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt

    if where == "step":
        step, model.policy.optimizer.step = model.policy.optimizer.step, lambda: (stop(), step())
        undo = lambda: setattr(model.policy.optimizer, "step", step)  # noqa: E731
    else:
        # The second part of a gradient that is accumulated over micro-batches: some weights have it, some do not
        undo = model.policy.action_net.bias.register_post_accumulate_grad_hook(stop).remove
    with pytest.raises(KeyboardInterrupt):
        model.learn(64)
    undo()
    assert any(p.grad is not None and bool(p.grad.any()) for p in model.policy.parameters())
    return model


def sft():
    rng = np.random.default_rng(0)
    obs = rng.uniform(-1, 1, (64, 4)).astype(np.float32)
    space = Match().observation_space
    data = Demonstrations(obs, obs.argmax(axis=1), observation_space=space, action_space=Match().action_space)
    return SFT("MlpPolicy", demonstrations=data, batch_size=16, micro_batch_size=4, seed=0, device="cpu")


def opd(**kwargs):
    kwargs = {"n_steps": 16, "batch_size": 16, "gradient_steps": 4, "micro_batch_size": 4, **kwargs}
    return OPD("MlpPolicy", vec(), teacher="expert", seed=0, device="cpu", **kwargs)


def grpo():
    kwargs = dict(group_size=4, n_groups=4, micro_batch_size=4, n_epochs=2, dynamic_sampling=None, learning_rate=1e-3)
    return GRPO("MlpPolicy", vec(horizon=1), seed=0, device="cpu", **kwargs)


def ppo():
    return PPO("MlpPolicy", vec(), n_steps=16, batch_size=16, micro_batch_size=4, seed=0, device="cpu")


MAKES = [opd, lambda: opd(state_replay=False), lambda: opd(estimator="sampled"), grpo, ppo, sft]
NAMES = ["opd", "opd_without_replay", "opd_sampled", "grpo", "ppo", "sft"]


@pytest.mark.parametrize("where", ["gradient", "step"])
@pytest.mark.parametrize("make", MAKES, ids=NAMES)
def test_learning_after_an_interrupt_begins_with_clean_gradients(make, where):
    results = []
    for clean in (False, True):
        model = interrupted(make, where)
        if clean:
            model.policy.optimizer.zero_grad()
        before = parameters(model)
        np.random.seed(1)
        th.manual_seed(1)
        model.learn(64)
        assert not th.equal(parameters(model), before)
        results.append(parameters(model))
    assert th.equal(*results)


@pytest.mark.parametrize("make", MAKES, ids=NAMES)
def test_learning_after_gradients_that_were_not_finite(make):
    """The error says to go on with a lower learning rate: what was NaN must not be there still."""
    model = make()
    hook = model.policy.action_net.bias.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(FloatingPointError, match="gradients are NaN"):
        model.learn(32)
    hook.remove()
    model.learn(32)
    assert bool(th.isfinite(parameters(model)).all())
