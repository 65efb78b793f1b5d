"""One view of every action distribution: a sequence of T tokens.

A vision-language-action policy emits T categorical tokens over V bins. Every distribution of Stable-Baselines3 can be
read the same way (a Discrete action is one token, a Gaussian action dimension is one continuous token), so losses,
buffers and teachers are written once, against the two classes below.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import Distribution, SquashedDiagGaussianDistribution, TanhBijector
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn
from torch.distributions import Bernoulli, Categorical, Normal

from opd_gym.checks import check_range

LOG_2PI = math.log(2.0 * math.pi)


class TokenDistribution(Distribution):
    """
    T categorical tokens over V bins each: independent of each other or, of an autoregressive policy, each given the
    tokens before it in one sequence of actions. Then ``log_prob`` is for these actions only, and ``entropy`` sums the
    entropies of the tokens at these prefixes; samples and modes are not those of a sequence.

    ``log_prob`` and ``entropy`` keep Stable-Baselines3's contract (one number per sample); the per-token values are
    beside them.

    :param logits: Unnormalised logits of shape (batch, T, V)
    """

    distribution: Categorical

    def __init__(self, logits: th.Tensor | None = None):
        super().__init__()
        if logits is not None:
            self.proba_distribution(logits)

    def proba_distribution_net(self, latent_dim: int, n_tokens: int, n_bins: int) -> nn.Module:
        """
        :param latent_dim: Size of the features of one sample
        :param n_tokens: Number of tokens T
        :param n_bins: Number of bins V
        :return: A layer that gives the logits (batch, T, V)
        """
        return nn.Sequential(nn.Linear(latent_dim, n_tokens * n_bins), nn.Unflatten(1, (n_tokens, n_bins)))

    def proba_distribution(self, logits: th.Tensor) -> TokenDistribution:
        if logits.dim() != 3:
            raise ValueError(f"Expected logits of shape (batch, tokens, bins), got {tuple(logits.shape)}.")
        # Not validated: the check costs as much as the softmax, and VLAPolicy refuses logits that are not finite.
        self.distribution = Categorical(logits=logits, validate_args=False)
        return self

    @property
    def logits(self) -> th.Tensor:
        """Log-probabilities of all bins, (batch, T, V)."""
        return self.distribution.logits

    def token_log_prob(self, actions: th.Tensor) -> th.Tensor:
        """
        :param actions: Tokens of shape (batch, T)
        :return: Log-probability of each token, (batch, T)
        """
        return self.logits.gather(-1, actions.long().unsqueeze(-1)).squeeze(-1)

    def token_entropy(self) -> th.Tensor:
        """
        :return: Entropy of each token, (batch, T)
        """
        return self.distribution.entropy()

    def log_prob(self, actions: th.Tensor) -> th.Tensor:
        return self.token_log_prob(actions).sum(dim=1)

    def entropy(self) -> th.Tensor:
        return self.token_entropy().sum(dim=1)

    def sample(self) -> th.Tensor:
        return self.distribution.sample()

    def mode(self) -> th.Tensor:
        return self.logits.argmax(dim=-1)

    def actions_from_params(self, logits: th.Tensor, deterministic: bool = False) -> th.Tensor:
        return self.proba_distribution(logits).get_actions(deterministic=deterministic)

    def log_prob_from_params(self, logits: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        actions = self.actions_from_params(logits)
        return actions, self.log_prob(actions)


@dataclass(frozen=True)
class CategoricalTokens:
    """
    T categorical tokens, padded to a common number of bins V.

    :param log_probs: Normalised log-probabilities (batch, T, V); ``-inf`` for bins that a token does not have, or that
        are ruled out in that state
    """

    log_probs: th.Tensor

    @property
    def padding(self) -> th.Tensor | None:
        """Bins ruled out in each state, (batch, T, V), padding included; None if there are none."""
        padding = th.isneginf(self.log_probs)
        return padding if bool(padding.any()) else None

    def log_prob(self, tokens: th.Tensor) -> th.Tensor:
        """
        :param tokens: (batch, T)
        :return: Log-probability of each token, (batch, T)
        """
        return self.log_probs.gather(-1, tokens.long().unsqueeze(-1)).squeeze(-1)

    def entropy(self) -> th.Tensor:
        """
        :return: Entropy of each token, (batch, T)
        """
        padding = self.padding
        # A padded bin would give 0 * -inf = NaN, in the value and in the gradient
        finite = self.log_probs if padding is None else self.log_probs.masked_fill(padding, 0.0)
        return -th.einsum("btv,btv->bt", self.log_probs.exp(), finite)

    def mode(self) -> th.Tensor:
        """
        :return: Most likely tokens, (batch, T)
        """
        return self.log_probs.argmax(dim=-1)

    def sample(self) -> th.Tensor:
        """
        :return: Sampled tokens, (batch, T)
        """
        return Categorical(logits=self.log_probs, validate_args=False).sample()

    def temper(self, temperature: float) -> CategoricalTokens:
        """
        :param temperature: Divides the logits
        :return: The tempered distribution
        """
        if temperature == 1.0:
            return self
        check_range("(0, inf)", temperature=temperature)
        return CategoricalTokens(th.log_softmax(self.log_probs / temperature, dim=-1))

    def detach(self) -> CategoricalTokens:
        """
        :return: The same values without gradient
        """
        return CategoricalTokens(self.log_probs.detach())

    def to(self, device: th.device) -> CategoricalTokens:
        """
        :param device: Device
        :return: The same values there
        """
        return CategoricalTokens(self.log_probs.to(device))

    def flatten(self) -> th.Tensor:
        """
        :return: One row per sample, (batch, T * V)
        """
        return self.log_probs.flatten(1)


@dataclass(frozen=True)
class GaussianTokens:
    """
    T independent Gaussian tokens, one per action dimension.

    :param mean: (batch, T), before squashing
    :param log_std: (batch, T), before squashing
    :param squashed: Whether actions are the tanh of these Gaussians
    """

    mean: th.Tensor
    log_std: th.Tensor
    squashed: bool = False

    def log_prob(self, tokens: th.Tensor) -> th.Tensor:
        """
        :param tokens: Actions in the coordinates of the policy, after squashing, (batch, T)
        :return: Log-density of each token, (batch, T)
        """
        value = TanhBijector.inverse(tokens) if self.squashed else tokens
        log_prob = -0.5 * ((value - self.mean) / self.log_std.exp()) ** 2 - self.log_std - 0.5 * LOG_2PI
        if self.squashed:
            # log(1 - tanh(x)^2), in the form that stays finite for saturated actions
            log_prob = log_prob - 2.0 * (math.log(2.0) - value - nn.functional.softplus(-2.0 * value))
        return log_prob

    def entropy(self) -> th.Tensor:
        """
        Entropy before squashing: the squashed entropy has no closed form.

        :return: Entropy of each token, (batch, T)
        """
        return self.log_std + 0.5 * (1.0 + LOG_2PI)

    def mode(self) -> th.Tensor:
        """
        :return: Deterministic actions, after squashing, (batch, T)
        """
        return th.tanh(self.mean) if self.squashed else self.mean

    def sample(self) -> th.Tensor:
        """
        :return: Sampled actions, after squashing, (batch, T)
        """
        value = self.mean + self.log_std.exp() * th.randn_like(self.mean)
        return th.tanh(value) if self.squashed else value

    def temper(self, temperature: float) -> GaussianTokens:
        """
        :param temperature: Multiplies the variance: ``p(x) ** (1 / temperature)``, normalised
        :return: The tempered distribution
        """
        if temperature == 1.0:
            return self
        check_range("(0, inf)", temperature=temperature)
        return GaussianTokens(self.mean, self.log_std + 0.5 * math.log(temperature), self.squashed)

    def detach(self) -> GaussianTokens:
        """
        :return: The same values without gradient
        """
        return GaussianTokens(self.mean.detach(), self.log_std.detach(), self.squashed)

    def to(self, device: th.device) -> GaussianTokens:
        """
        :param device: Device
        :return: The same values there
        """
        return GaussianTokens(self.mean.to(device), self.log_std.to(device), self.squashed)

    def flatten(self) -> th.Tensor:
        """
        :return: One row per sample, (batch, 2 * T): means, then log standard deviations
        """
        return th.cat([self.mean, self.log_std], dim=1)


TokenView = CategoricalTokens | GaussianTokens


@dataclass(frozen=True)
class TokenSpec:
    """
    Shape of the token view of an action space: enough to store a distribution as one flat array and to read it back.

    :param n_tokens: Number of tokens T
    :param n_bins: Number of bins V (the largest, where tokens differ); 0 for Gaussian tokens
    :param squashed: Whether Gaussian tokens are squashed by a tanh
    """

    n_tokens: int
    n_bins: int
    squashed: bool = False

    @property
    def flat_size(self) -> int:
        """Length of one flattened distribution."""
        return self.n_tokens * (self.n_bins or 2)

    @property
    def storage_dtype(self) -> type[np.floating[Any]]:
        """Half precision for the many bins of categorical tokens, single for the two numbers of a Gaussian."""
        return np.float16 if self.n_bins else np.float32

    def from_flat(self, flat: th.Tensor) -> TokenView:
        """
        :param flat: Flattened distributions (batch, ``flat_size``)
        :return: The view that ``flatten()`` was called on
        """
        if self.n_bins:
            log_probs = flat.float().reshape(len(flat), self.n_tokens, self.n_bins)
            # Half precision leaves the probabilities off their sum of 1 by about 1e-3
            return CategoricalTokens(th.log_softmax(log_probs, dim=-1))
        mean, log_std = flat.float().chunk(2, dim=1)
        return GaussianTokens(mean, log_std, self.squashed)


def check_starts(name: str, space: spaces.Space) -> None:
    """
    Refuse a space that does not count from 0: as in Stable-Baselines3, tokens and one-hot encodings do.

    :param name: What the space is of, for the message
    :param space: Any space; those inside a Dict or Tuple are checked as well
    :raises ValueError: A Discrete or MultiDiscrete space in it has another start
    """
    if isinstance(space, (spaces.Dict, spaces.Tuple)):
        inner = space.spaces.items() if isinstance(space, spaces.Dict) else enumerate(space.spaces)
        for key, part in inner:
            check_starts(f"{name}[{key!r}]", part)
    elif isinstance(space, (spaces.Discrete, spaces.MultiDiscrete)) and np.any(space.start != 0):
        raise ValueError(
            f"Expected the {name} to count from 0, got {space}. Wrap each env so that it does: in "
            "gymnasium.wrappers.TransformAction, which adds the start to an action, or TransformObservation, which "
            "subtracts it from an observation. Give the wrapper the space without start."
        )


def token_spec(action_space: spaces.Space, squashed: bool = False) -> TokenSpec:
    """
    Token view of an action space.

    :param action_space: Discrete, MultiDiscrete, MultiBinary or Box
    :param squashed: Whether a Box policy squashes its actions
    :return: Its specification
    :raises ValueError: Another space, one that does not count from 0, or a Box of integers
    """
    check_starts("action space", action_space)
    if isinstance(action_space, spaces.Discrete):
        return TokenSpec(1, int(action_space.n))
    if isinstance(action_space, spaces.MultiDiscrete):
        return TokenSpec(int(action_space.nvec.size), int(action_space.nvec.max()))
    if isinstance(action_space, spaces.MultiBinary):
        return TokenSpec(int(np.prod(action_space.shape)), 2)
    if isinstance(action_space, spaces.Box):
        if not np.issubdtype(action_space.dtype, np.floating):
            raise ValueError(
                f"Expected continuous actions, got {action_space} of integers: a Gaussian's samples lie between them. "
                "Wrap the env so that its actions are float (or MultiDiscrete)."
            )
        return TokenSpec(int(np.prod(action_space.shape)), 0, squashed)
    raise ValueError(f"Expected a Discrete, MultiDiscrete, MultiBinary or Box action space, got {action_space}.")


def token_view(dist: Distribution) -> TokenView:
    """
    Read any distribution of Stable-Baselines3 (or sb3-contrib's maskable ones) as a sequence of tokens.

    Gradients flow through.

    :param dist: Distribution with its parameters set
    :return: The canonical view
    """
    # sb3-contrib names the list of a maskable multi-categorical in the plural
    inner = getattr(dist, "distribution", None)
    inner = getattr(dist, "distributions", None) if inner is None else inner
    if isinstance(inner, Categorical):
        log_probs = inner.logits
        return CategoricalTokens(log_probs if log_probs.dim() == 3 else log_probs.unsqueeze(1))
    if isinstance(inner, list) and inner and isinstance(inner[0], Categorical):
        n_bins = max(d.logits.shape[-1] for d in inner)
        padded = [nn.functional.pad(d.logits, (0, n_bins - d.logits.shape[-1]), value=-math.inf) for d in inner]
        return CategoricalTokens(th.stack(padded, dim=1))
    if isinstance(inner, Bernoulli):
        both = [nn.functional.logsigmoid(-inner.logits), nn.functional.logsigmoid(inner.logits)]
        return CategoricalTokens(th.stack(both, dim=-1))
    if isinstance(inner, Normal):
        squashed = isinstance(dist, SquashedDiagGaussianDistribution) or getattr(dist, "bijector", None) is not None
        return GaussianTokens(inner.mean, inner.stddev.log(), squashed)
    raise ValueError(
        f"Cannot read {type(dist).__name__} (holding {type(inner).__name__}) as tokens: expected a categorical, "
        "multi-categorical, Bernoulli or Gaussian distribution of Stable-Baselines3, or a TokenDistribution."
    )


def is_autoregressive(policy: Any) -> bool:
    """
    :param policy: Any policy
    :return: Whether its distribution of a token depends on the tokens before it, so that it needs the actions
    """
    return bool(getattr(policy, "autoregressive", False))


def _given(policy: Any, actions: th.Tensor | None) -> dict[str, th.Tensor | None]:
    # A policy of Stable-Baselines3 has no such argument
    return {"actions": actions} if is_autoregressive(policy) else {}


def action_distribution(policy: Any, obs: PyTorchObs, actions: th.Tensor | None = None) -> Distribution:
    """
    Action distribution of a batch of observations.

    :param policy: Any policy with ``get_distribution``
    :param obs: Observations
    :param actions: Actions, one row per observation: an autoregressive policy gives the distribution of each token
        after the tokens before it in them; other policies ignore them
    :return: The distribution
    """
    return policy.get_distribution(obs, **_given(policy, actions))


def distribution_and_values(
    policy: ActorCriticPolicy, obs: PyTorchObs, actions: th.Tensor | None = None
) -> tuple[Distribution, th.Tensor]:
    """
    Action distribution and state values of a batch of observations.

    A policy may define ``distribution_and_values(obs)`` to share one pass through its body.

    :param policy: Actor-critic policy
    :param obs: Observations
    :param actions: See :func:`action_distribution`
    :return: The distribution and the values (batch, 1)
    """
    shared_pass: Callable[..., tuple[Distribution, th.Tensor]] | None = getattr(policy, "distribution_and_values", None)
    if shared_pass is not None:
        return shared_pass(obs, **_given(policy, actions))
    return action_distribution(policy, obs, actions), policy.predict_values(obs)


def sample_tokens(
    policy: Any, obs: PyTorchObs, temperature: float = 1.0, with_values: bool = False
) -> tuple[th.Tensor, TokenView, th.Tensor]:
    """
    Sample the tokens of a decision for each observation.

    :param policy: Actor-critic policy
    :param obs: Observations
    :param temperature: Temperature of the distributions
    :param with_values: Whether to compute state values
    :return: tokens (batch, T), the tempered distributions they were sampled from, and values (batch, 1), or one zero
    """
    if is_autoregressive(policy):
        # One pass gives all three: a token is sampled before the distribution of the next is known
        tokens, dist, values = policy.decode(obs, temperature)
        view = token_view(dist).temper(temperature)
    else:
        if with_values:
            dist, values = distribution_and_values(policy, obs)
        else:
            dist = action_distribution(policy, obs)
        view = token_view(dist).temper(temperature)
        # The distribution's own sampling, for the sake of state-dependent exploration
        tokens = dist.sample() if temperature == 1.0 else view.sample()
    return tokens.reshape(len(tokens), -1), view, values if with_values else th.zeros(1, device=tokens.device)


class AtTemperature:
    """
    A policy that samples at a temperature, as the algorithms do while they collect.

    :param model: Actor-critic policy, or an algorithm that has one
    :param temperature: Divides the logits of categorical tokens, and scales the variance of Gaussian ones
    :raises ValueError: A policy of another kind, one with state-dependent exploration, or a temperature that is not
        positive
    """

    def __init__(self, model: Any, temperature: float):
        check_range("(0, inf)", temperature=temperature)
        self.policy = getattr(model, "policy", model)
        if not isinstance(self.policy, ActorCriticPolicy):
            raise ValueError(
                f"A temperature is for actor-critic policies, got {type(self.policy).__name__}. Leave it out."
            )
        if self.policy.use_sde:
            raise ValueError("State-dependent exploration has its own noise: leave the temperature out.")
        self.temperature = temperature

    def predict(self, observation: Any, *, deterministic: bool = False) -> tuple[np.ndarray, None]:
        """
        :param observation: Batch of observations
        :param deterministic: Not used: actions are samples
        :return: Batch of actions as the env takes them, and no state
        """
        self.policy.set_training_mode(False)
        inputs, _ = self.policy.obs_to_tensor(observation)
        with th.no_grad():
            tokens, _, _ = sample_tokens(self.policy, inputs, self.temperature)
        shape = self.policy.action_space.shape or ()
        return env_actions(self.policy, tokens.cpu().numpy().reshape(-1, *shape)), None


def env_actions(policy: BasePolicy, actions: np.ndarray) -> np.ndarray:
    """
    Actions as the env takes them.

    :param policy: The policy that sampled them
    :param actions: Sampled actions
    :return: Box actions unscaled or clipped, others unchanged
    """
    space = policy.action_space
    if not isinstance(space, spaces.Box):
        return actions
    return policy.unscale_action(actions) if policy.squash_output else np.clip(actions, space.low, space.high)
