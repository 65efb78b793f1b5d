import math

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import (
    BernoulliDistribution,
    CategoricalDistribution,
    DiagGaussianDistribution,
    MultiCategoricalDistribution,
    SquashedDiagGaussianDistribution,
    StateDependentNoiseDistribution,
)
from stable_baselines3.common.policies import ActorCriticPolicy, MultiInputActorCriticPolicy
from stable_baselines3.common.vec_env import DummyVecEnv

import opd_gym
from opd_gym import GRPO, OPD, PPO, SFT
from opd_gym.algorithms.teachers import make_teacher
from opd_gym.tokens import (
    CategoricalTokens,
    TokenDistribution,
    distribution_and_values,
    token_spec,
    token_view,
)


def test_integers_in_a_box_are_refused():
    with pytest.raises(ValueError, match="of integers"):
        token_spec(spaces.Box(0, 5, (2,), np.uint8))
    assert token_spec(spaces.Box(0, 5, (2,), np.float64)).n_tokens == 2


def make_distribution(name: str):
    th.manual_seed(0)
    if name == "categorical":
        return CategoricalDistribution(4).proba_distribution(th.randn(5, 4))
    if name == "multi_categorical":
        return MultiCategoricalDistribution([2, 3]).proba_distribution(th.randn(5, 5))
    if name == "bernoulli":
        return BernoulliDistribution(3).proba_distribution(th.randn(5, 3))
    if name == "gaussian":
        return DiagGaussianDistribution(2).proba_distribution(th.randn(5, 2), th.randn(2) * 0.1)
    if name == "squashed":
        return SquashedDiagGaussianDistribution(2).proba_distribution(th.randn(5, 2) * 0.3, th.randn(2) * 0.1)
    if name == "gsde":
        dist = StateDependentNoiseDistribution(2, squash_output=True)
        _, log_std = dist.proba_distribution_net(3, latent_sde_dim=3)
        return dist.proba_distribution(th.randn(5, 2), log_std.detach(), th.randn(5, 3))
    assert name == "tokens"
    return TokenDistribution(th.randn(5, 6, 8))


DISTRIBUTIONS = ["categorical", "multi_categorical", "bernoulli", "gaussian", "squashed", "gsde", "tokens"]


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_view_agrees_with_the_distribution(name):
    dist = make_distribution(name)
    view = token_view(dist)
    actions = dist.sample()
    tokens = actions.reshape(5, -1)
    assert view.log_prob(tokens).shape == tokens.shape
    # SB3's squash correction has an epsilon of 1e-6 inside its logarithm
    tolerance = 1e-3 if name in ("squashed", "gsde") else 1e-5
    assert th.allclose(view.log_prob(tokens).sum(1), dist.log_prob(actions), atol=tolerance)
    assert th.allclose(view.mode().float(), dist.mode().reshape(5, -1).float())
    if dist.entropy() is not None:
        assert th.allclose(view.entropy().sum(1), dist.entropy(), atol=1e-5)
    assert view.sample().shape == tokens.shape
    spec = {
        "categorical": token_spec(spaces.Discrete(4)),
        "multi_categorical": token_spec(spaces.MultiDiscrete([2, 3])),
        "bernoulli": token_spec(spaces.MultiBinary(3)),
        "tokens": token_spec(spaces.MultiDiscrete([8] * 6)),
    }.get(name, token_spec(spaces.Box(-1, 1, (2,)), squashed=name != "gaussian"))
    flat = view.flatten()
    assert flat.shape == (5, spec.flat_size)
    stored = th.as_tensor(flat.detach().numpy().astype(spec.storage_dtype))
    restored = spec.from_flat(stored)
    assert type(restored) is type(view)
    assert th.allclose(restored.log_prob(tokens), view.log_prob(tokens), atol=5e-3)


def test_gradients_flow_through_padded_tokens():
    logits = th.randn(5, 5, requires_grad=True)
    view = token_view(MultiCategoricalDistribution([2, 3]).proba_distribution(logits))
    assert th.isneginf(view.log_probs[:, 0, 2]).all()
    (view.entropy().sum() + view.log_prob(th.ones(5, 2)).sum() + view.temper(2.0).entropy().sum()).backward()
    assert th.isfinite(logits.grad).all() and logits.grad.abs().sum() > 0


def test_token_distribution_contract():
    logits = th.zeros(2, 3, 4)
    dist = TokenDistribution(logits)
    assert th.allclose(dist.logits, th.full((2, 3, 4), -math.log(4)))
    actions = th.tensor([[0, 1, 2], [3, 3, 3]])
    assert th.allclose(dist.token_log_prob(actions), th.full((2, 3), -math.log(4)))
    assert th.allclose(dist.log_prob(actions), th.full((2,), -3 * math.log(4)))
    assert th.allclose(dist.token_entropy(), th.full((2, 3), math.log(4)))
    assert th.allclose(dist.entropy(), th.full((2,), 3 * math.log(4)))
    assert dist.proba_distribution_net(7, 3, 4)(th.zeros(2, 7)).shape == (2, 3, 4)
    with pytest.raises(ValueError, match="shape"):
        TokenDistribution(th.zeros(2, 3))


def test_temper():
    view = CategoricalTokens(th.log_softmax(th.tensor([[[0.0, 1.6]]]), dim=-1))
    assert th.allclose(view.temper(1.6).log_probs, th.log_softmax(th.tensor([[[0.0, 1.0]]]), dim=-1))
    gaussian = token_view(make_distribution("gaussian"))
    assert th.allclose(gaussian.temper(4.0).log_std, gaussian.log_std + math.log(2.0))


class Spaces(gym.Env):
    """Any two spaces; is never stepped."""

    def __init__(self, observation_space, action_space):
        self.observation_space, self.action_space = observation_space, action_space


BOX = spaces.Box(-1.0, 1.0, (1,))


@pytest.mark.parametrize(
    ("observation_space", "action_space", "named"),
    [
        (BOX, spaces.Discrete(3, start=-1), "action space"),
        (BOX, spaces.MultiDiscrete([2, 3], start=[0, 1]), "action space"),
        (spaces.Discrete(3, start=1), spaces.Discrete(3), "observation space"),
        (spaces.Dict(x=BOX, n=spaces.Discrete(3, start=1)), spaces.Discrete(3), r"observation space\['n'\]"),
    ],
)
def test_a_space_that_does_not_count_from_0_is_refused_everywhere(observation_space, action_space, named):
    def make():
        return Spaces(observation_space, action_space)

    policy = "MultiInputPolicy" if isinstance(observation_space, spaces.Dict) else "MlpPolicy"
    message = f"env's {named} to count from 0.*TransformAction"
    for algorithm in (OPD, GRPO, PPO, SFT):
        for env in (make(), DummyVecEnv([make])):
            with pytest.raises(ValueError, match=message):
                algorithm(policy, env)
    gym.register("Spaces-v0", make)
    try:
        with pytest.raises(ValueError, match=message):
            opd_gym.make_vec("Spaces-v0")
    finally:
        del gym.registry["Spaces-v0"]
    teacher = MultiInputActorCriticPolicy if isinstance(observation_space, spaces.Dict) else ActorCriticPolicy
    with pytest.raises(ValueError, match=f"teacher's {named} to count from 0"):
        make_teacher(
            teacher(observation_space, action_space, lambda _: 0.0),
            DummyVecEnv([lambda: Spaces(BOX, spaces.Discrete(3))]),
            ActorCriticPolicy(BOX, spaces.Discrete(3), lambda _: 0.0),
        )


def test_token_spec_refuses_other_spaces():
    with pytest.raises(ValueError, match="count from 0"):
        token_spec(spaces.Discrete(3, start=1))
    with pytest.raises(ValueError, match="Expected a Discrete"):
        token_spec(spaces.Text(3))


@pytest.mark.parametrize(
    "action_space", [spaces.Discrete(3), spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(2), spaces.Box(-1, 1, (2,))]
)
def test_log_probs_of_the_tokens_add_up_to_the_policys(action_space):
    th.manual_seed(0)
    policy = ActorCriticPolicy(spaces.Box(-1, 1, (4,)), action_space, lambda _: 1e-3)
    obs = th.randn(6, 4)
    actions, values, log_prob = policy(obs)
    dist, got_values = distribution_and_values(policy, obs)
    token_log_probs = token_view(dist).log_prob(actions.reshape(6, -1))
    assert token_log_probs.shape == (6, token_spec(action_space).n_tokens)
    assert th.allclose(got_values, values)
    assert th.allclose(token_log_probs.sum(1), log_prob, atol=1e-5)
    assert np.isfinite(token_log_probs.detach().numpy()).all()
