"""Proximal policy optimisation on the shared rollout buffer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from stable_baselines3.common.utils import FloatSchedule, explained_variance, obs_as_tensor
from torch.nn import functional as F

from opd_gym import ranks
from opd_gym.algorithms.base import RolloutAlgorithm
from opd_gym.algorithms.buffers import TeacherRolloutSamples
from opd_gym.algorithms.common import accumulate_gradients, zoo_hyperparams
from opd_gym.algorithms.losses import PolicyGradientMetrics, clipped_surrogate, masked_mean
from opd_gym.checks import check_flag
from opd_gym.observations import obs_rows
from opd_gym.tokens import token_view


@dataclass(frozen=True)
class PPOMetrics:
    """
    :param loss: The loss that was differentiated
    :param policy_gradient_loss: Clipped surrogate
    :param entropy_loss: Negative entropy
    :param value_loss: Squared error of the values
    :param clip_fraction: See :class:`PolicyGradientMetrics`
    :param approx_kl: See :class:`PolicyGradientMetrics`
    """

    loss: float
    policy_gradient_loss: float
    entropy_loss: float
    value_loss: float
    clip_fraction: float
    approx_kl: float


class PPO(RolloutAlgorithm):
    """
    Proximal Policy Optimization algorithm (PPO) (clip version): https://arxiv.org/abs/1707.06347

    With ``ratio="joint"`` it computes what Stable-Baselines3's PPO computes. A policy of action tokens has dozens of
    tokens in one decision, whose joint ratio leaves any clip range at once: ``ratio="token"`` clips each by itself.

    :param policy: The policy model to use (MlpPolicy, VLAPolicy with ``value_head=True``, ...)
    :param env: The environment to learn from: an id, an env, or a vectorised env
    :param learning_rate: The learning rate, it can be a function of the current progress remaining (from 1 to 0)
    :param n_steps: Number of decisions of each env per update
    :param batch_size: Minibatch size
    :param n_epochs: Number of epochs when optimizing the surrogate loss
    :param gamma: Discount factor
    :param gae_lambda: Factor for trade-off of bias vs variance for Generalized Advantage Estimator
    :param clip_range: Clipping parameter, it can be a function of the current progress remaining (from 1 to 0)
    :param clip_range_vf: Clipping parameter for the value function; None: no clipping
    :param normalize_advantage: Whether to normalize or not the advantage
    :param ent_coef: Entropy coefficient for the loss calculation
    :param vf_coef: Value function coefficient for the loss calculation
    :param max_grad_norm: The maximum value for the gradient clipping
    :param ratio: "joint": one ratio per decision, "token": one per token, "auto": "token" for policies of action tokens
    :param temperature: Temperature of the policy, when it acts and when it learns; ``predict()`` is not affected
    :param micro_batch_size: Number of decisions that go through the policy at once; gradients are accumulated over the
        parts of a minibatch. None: the whole minibatch
    :param recompute_log_probs: Whether the log-probabilities that ratios are relative to are computed again before the
        first update, by the pass that learns; one more forward pass. None: where the policy computes in bfloat16, in
        which the ratios of an unchanged policy are not 1 otherwise
    :param use_sde: Whether to use generalized State Dependent Exploration (gSDE)
    :param sde_sample_freq: Sample a new noise matrix every n steps when using gSDE
    :param target_kl: Limit the KL divergence between updates; None: no limit
    :param stats_window_size: Number of episodes that the reported success rate, length and reward are averaged over
    :param tensorboard_log: The log location for tensorboard (if None, no logging)
    :param policy_kwargs: Additional arguments to be passed to the policy on creation
    :param verbose: 0 for no output, 1 for info messages, 2 for debug messages
    :param seed: Seed for the pseudo random generators
    :param device: Device (cpu, cuda, ...) on which the code should be run
    :param _init_setup_model: Whether or not to build the network at the creation of the instance
    """

    _own_argument = "ratio"
    uses_critic: ClassVar[bool] = True

    @zoo_hyperparams
    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str | None,
        learning_rate: float | Schedule = 3e-4,
        n_steps: int = 2048,
        batch_size: int = 64,
        n_epochs: int = 10,
        gamma: float = 0.99,
        gae_lambda: float = 0.95,
        clip_range: float | Schedule = 0.2,
        clip_range_vf: float | Schedule | None = None,
        normalize_advantage: bool = True,
        ent_coef: float = 0.0,
        vf_coef: float = 0.5,
        max_grad_norm: float = 0.5,
        ratio: Literal["auto", "joint", "token"] = "auto",
        temperature: float = 1.0,
        micro_batch_size: int | None = None,
        recompute_log_probs: bool | None = None,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        target_kl: float | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
    ):
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.recompute_log_probs = recompute_log_probs
        self.n_epochs = n_epochs
        self.clip_range = clip_range
        self.clip_range_vf = clip_range_vf
        self.normalize_advantage = normalize_advantage
        self.ratio = ratio
        self.target_kl = target_kl
        self._check_settings()
        super().__init__(
            policy,
            env,
            learning_rate=learning_rate,
            n_steps=n_steps,
            max_grad_norm=max_grad_norm,
            temperature=temperature,
            gamma=gamma,
            gae_lambda=gae_lambda,
            ent_coef=ent_coef,
            vf_coef=vf_coef,
            use_sde=use_sde,
            sde_sample_freq=sde_sample_freq,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
            _init_setup_model=_init_setup_model,
        )

    def _check_settings(self) -> None:
        super()._check_settings()
        check_flag(recompute_log_probs=self.recompute_log_probs)
        if self.ratio not in ("auto", "joint", "token"):
            raise ValueError(f'Expected ratio to be "auto", "joint" or "token", got {self.ratio!r}.')
        if self.normalize_advantage and self.batch_size < 2:
            raise ValueError(f"batch_size must be at least 2 with normalize_advantage, got {self.batch_size}.")

    def _setup_model(self) -> None:
        super()._setup_model()
        if getattr(self.policy, "value_net", self) is None:
            raise ValueError(
                'PPO learns a critic: pass policy_kwargs={"value_head": True}, or use GRPO, which needs none.'
            )
        if self.normalize_advantage and self.n_steps * self.n_envs == 1:
            raise ValueError("One decision has no normalised advantage: raise n_steps or the number of envs.")
        self.clip_range = FloatSchedule(self.clip_range)
        if self.clip_range_vf is not None:
            self.clip_range_vf = FloatSchedule(self.clip_range_vf)

    # ------------------------------------------------------------------------------------------------------ rollout

    def _step_rewards(
        self, rewards: np.ndarray, dones: np.ndarray, infos: list[dict[str, Any]], values: th.Tensor
    ) -> np.ndarray:
        """A truncated episode goes on in its value: https://github.com/DLR-RM/stable-baselines3/issues/633"""
        for index in np.flatnonzero(dones):
            info = infos[index]
            if info.get("episode_lost"):
                # The episode is cut where its last decision was taken, which then has no advantage
                rewards[index] = values[index].item()
            elif info.get("terminal_observation") is not None and info.get("TimeLimit.truncated", False):
                terminal_obs = self.policy.obs_to_tensor(info["terminal_observation"])[0]
                with th.no_grad():
                    rewards[index] += self.gamma * self.policy.predict_values(terminal_obs)[0].item()
        return rewards

    def _last_values(self) -> th.Tensor:
        with th.no_grad():
            return self.policy.predict_values(obs_as_tensor(self._last_obs, self.device))  # type: ignore[arg-type]

    # ------------------------------------------------------------------------------------------------------ training

    @property
    def _per_token(self) -> bool:
        return self.ratio == "token" or (self.ratio == "auto" and getattr(self.policy, "requires_tokens", False))

    def train(self) -> None:
        """
        Update policy using the currently gathered rollout buffer.
        """
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        clip_range = self.clip_range(self._current_progress_remaining)  # type: ignore[operator]
        buffer = self.rollout_buffer
        metrics: list[PPOMetrics] = []
        grad_norms = []
        continue_training = True
        self._rescore(buffer.valid_rows(), self.micro_batch_size or self.batch_size)
        self._keep_pace()

        for epoch in range(self.n_epochs):
            n_minibatches = -(-len(buffer.valid_rows()) // self.batch_size)
            for samples in ranks.in_step(buffer.get(self.batch_size), n_minibatches):
                self.policy.optimizer.zero_grad()
                if samples is None:
                    self._stand_by()
                else:
                    metrics.append(self._accumulate_gradients(samples, clip_range))
                self._keep_pace()
                approx_kl = self._approx_kl(samples, metrics)
                if self.target_kl is not None and approx_kl > 1.5 * self.target_kl:
                    # Known only when all parts of the minibatch have gone through: their gradients are dropped
                    self.policy.optimizer.zero_grad()
                    continue_training = False
                    if self.verbose >= 1:
                        print(f"Early stopping at step {epoch} due to reaching max kl: {approx_kl:.2f}")
                    break
                grad_norms.append(self._gradient_step())
            if not continue_training:
                break

        self._record_metrics(metrics)
        if metrics:
            self.logger.record("train/loss", metrics[-1].loss)
        if grad_norms:
            self.logger.record("train/grad_norm", float(np.mean(grad_norms)))
        self.logger.record("train/explained_variance", explained_variance(buffer.values, buffer.returns))
        if hasattr(self.policy, "log_std"):
            self.logger.record("train/std", th.exp(self.policy.log_std).mean().item())
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.logger.record("train/clip_range", clip_range)

    def _accumulate_gradients(self, samples: TeacherRolloutSamples, clip_range: float) -> PPOMetrics:
        """Gradients of the loss of a minibatch, a part of it at a time."""
        if self.normalize_advantage:
            samples = samples._replace(advantages=self._normalised(samples.advantages))
        counts = self._counts(samples)
        n_decisions, n_counted = ranks.total(len(samples.rows), counts.sum())

        def loss_of(rows: slice) -> tuple[th.Tensor, PPOMetrics]:
            part = TeacherRolloutSamples(*(obs_rows(field, rows) for field in samples))
            policy_loss, policy_metrics, entropy, values = self._evaluate(part, clip_range)
            # The value loss is a mean over decisions, and the part will be weighed by its tokens
            rate = (len(part.rows) / n_decisions) / (counts[rows].sum() / n_counted)
            value_loss = rate * self._value_loss(part, values)
            loss = policy_loss - self.ent_coef * entropy + self.vf_coef * value_loss
            return loss, PPOMetrics(
                loss=loss.item(),
                policy_gradient_loss=policy_metrics.loss,
                entropy_loss=-entropy.item(),
                value_loss=value_loss.item(),
                clip_fraction=policy_metrics.clip_fraction,
                approx_kl=policy_metrics.approx_kl,
            )

        return accumulate_gradients(counts, self.micro_batch_size, loss_of)

    def _counts(self, samples: TeacherRolloutSamples) -> th.Tensor:
        """What policy loss and entropy are means over: 1 for tokens that were executed, or 1 for each decision."""
        return samples.token_mask if self._per_token else th.ones_like(samples.advantages).unsqueeze(1)

    def _approx_kl(self, samples: TeacherRolloutSamples | None, metrics: list[PPOMetrics]) -> float:
        """That of the last minibatch, or of the minibatches of all ranks: all stop early, or none."""
        if ranks.world_size() == 1:
            return metrics[-1].approx_kl
        n = 0.0 if samples is None else float(self._counts(samples).sum())
        added, everywhere = ranks.total(n * metrics[-1].approx_kl if n else 0.0, n)
        return added / everywhere

    @staticmethod
    def _normalised(advantages: th.Tensor) -> th.Tensor:
        """Advantages of a minibatch, with mean 0 and standard deviation 1 over those of all ranks."""
        if ranks.world_size() == 1:
            return (advantages - advantages.mean()) / (advantages.std() + 1e-8) if len(advantages) > 1 else advantages
        exact = advantages.double()
        n, added, squares = ranks.total(len(exact), exact.sum().item(), exact.square().sum().item())
        mean = added / n
        std = (max(squares - n * mean**2, 0.0) / (n - 1)) ** 0.5 if n > 1 else 1.0
        return (advantages - mean) / (std + 1e-8)

    def _stand_by(self) -> None:
        """The part that a rank without a minibatch has in what is computed from the minibatches of all."""
        if self.normalize_advantage:
            self._normalised(th.zeros(0))
        ranks.total(0.0, 0.0)
        ranks.share(0.0)

    def _evaluate(
        self, samples: TeacherRolloutSamples, clip_range: float
    ) -> tuple[th.Tensor, PolicyGradientMetrics, th.Tensor, th.Tensor]:
        """Policy loss with its metrics, entropy and values of decisions whose advantages are normalised."""
        dist, values = self._distribution(samples.observations, samples.actions)
        view = token_view(dist).temper(self.temperature)
        mask = samples.token_mask
        log_probs = view.log_prob(samples.actions.reshape(len(samples.rows), -1))
        old_log_probs = samples.old_token_log_probs
        if self._per_token:
            entropy = masked_mean(view.entropy(), mask)
        else:
            log_probs, old_log_probs = ((x * mask).sum(dim=1, keepdim=True) for x in (log_probs, old_log_probs))
            squashed = self.policy.squash_output
            # The entropy of a squashed Gaussian has no closed form: estimated at the sample
            entropy = -log_probs.mean() if squashed else (view.entropy() * mask).sum(dim=1).mean()
            mask = th.ones_like(log_probs)
        loss, metrics = clipped_surrogate(
            log_probs, old_log_probs, samples.advantages.unsqueeze(1), mask / mask.sum(), clip_range
        )
        return loss, metrics, entropy, values.flatten()

    def _value_loss(self, samples: TeacherRolloutSamples, values: th.Tensor) -> th.Tensor:
        if self.clip_range_vf is not None:
            clip_range_vf = self.clip_range_vf(self._current_progress_remaining)  # type: ignore[operator]
            change = th.clamp(values - samples.old_values, -clip_range_vf, clip_range_vf)
            values = samples.old_values + change
        return F.mse_loss(samples.returns, values)
