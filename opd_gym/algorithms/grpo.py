"""Group relative policy optimisation: the outcome of an episode against other episodes from the same state."""

from __future__ import annotations

import warnings
from collections import deque
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule

from opd_gym import ranks
from opd_gym.algorithms.base import MAX_SEED, RolloutAlgorithm
from opd_gym.algorithms.common import policy_kwargs_over, zoo_hyperparams
from opd_gym.algorithms.losses import (
    PolicyGradientMetrics,
    clipped_surrogate,
    group_advantages,
    masked_mean,
    trajectory_weights,
)
from opd_gym.checks import check_at_least, check_flag
from opd_gym.episodes import EpisodeSpec, can_announce

# After so many iterations in a row whose episodes were all lost, the env is broken
MAX_WITHOUT_EPISODES = 10


class GRPO(RolloutAlgorithm):
    """
    Group Relative Policy Optimization (GRPO) with the recipe of SimpleVLA-RL (https://arxiv.org/abs/2509.09674).

    Each iteration plays ``n_groups`` groups of ``group_size`` complete episodes; the episodes of a group start from the
    same state (they are reset with the same seed). The advantage of every token of an episode is the episode's outcome,
    minus the mean of its group, divided by the standard deviation of its group. The outcome is the success of the
    episode (``info["is_success"]``), or its return where the env does not report success. There is no critic, no KL
    term and no entropy bonus.

    Episodes are handed out from a queue: an env that has finished takes the next one, and stands still at no cost when
    the queue is empty. So the envs must be wrapped in ``EpisodeControl`` (``make_vec`` does it, and so does this
    class for a single env or an env id), must be determined by the seed of their reset, and must end their episodes.
    An episode that is lost with its worker (``WorkerVecEnv``) has no outcome: its group is one member smaller, and
    nothing is learned from it.

    :param policy: The policy model to use (VLAPolicy, MlpPolicy, CnnPolicy, MultiInputPolicy, or a class)
    :param env: The environment to learn from: an id, an env, or a vectorised env
    :param group_size: Number of episodes in a group
    :param n_groups: Number of groups in an iteration (SimpleVLA-RL: 64)
    :param learning_rate: The learning rate, it can be a function of the current progress remaining (from 1 to 0)
    :param trajectories_per_batch: Number of trajectories in a minibatch
    :param micro_batch_size: Number of decisions that go through the policy at once; gradients are accumulated over the
        trajectories of a minibatch
    :param n_epochs: Number of epochs when optimizing the surrogate loss
    :param clip_range: Clipping parameter below 1
    :param clip_range_high: Clipping parameter above 1 ("clip-higher")
    :param dynamic_sampling: Groups whose success rate is outside this range are dropped, for they teach little; where
        outcomes are returns, groups of equal returns are dropped. None drops no group
    :param temperature: Temperature of the policy, when it acts and when it learns; ``predict()`` is not affected
    :param recompute_log_probs: Whether the log-probabilities that ratios are relative to are computed again before the
        first update, by the pass that learns; one more forward pass. None: where the policy computes in bfloat16, in
        which the ratios of an unchanged policy are not 1 otherwise
    :param max_grad_norm: The maximum value for the gradient clipping
    :param weight_decay: Weight decay of the optimizer, unless ``optimizer_kwargs`` of ``policy_kwargs`` name one
    :param stats_window_size: Number of episodes that the reported success rate, length and reward are averaged over
    :param tensorboard_log: The log location for tensorboard (if None, no logging)
    :param policy_kwargs: Additional arguments to be passed to the policy on creation
    :param verbose: 0 for no output, 1 for info messages, 2 for debug messages
    :param seed: Seed for the pseudo random generators
    :param device: Device (cpu, cuda, ...) on which the code should be run
    :param batch_size: Not taken: see ``trajectories_per_batch``
    :param _init_setup_model: Whether or not to build the network at the creation of the instance
    """

    _own_argument = "n_groups"
    _changed_by_rollouts = (*RolloutAlgorithm._changed_by_rollouts, "_first_group", "_group_seeds")

    @zoo_hyperparams
    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str | None,
        group_size: int = 8,
        n_groups: int = 8,
        learning_rate: float | Schedule = 5e-6,
        trajectories_per_batch: int = 128,
        micro_batch_size: int = 128,
        n_epochs: int = 1,
        clip_range: float = 0.2,
        clip_range_high: float = 0.28,
        dynamic_sampling: tuple[float, float] | None = (0.1, 0.9),
        temperature: float = 1.6,
        recompute_log_probs: bool | None = None,
        max_grad_norm: float = 1.0,
        weight_decay: float = 1e-2,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        batch_size: None = None,
        _init_setup_model: bool = True,
    ):
        if batch_size is not None:
            raise ValueError(
                f"GRPO takes whole trajectories: write trajectories_per_batch={batch_size} instead of "
                f"batch_size={batch_size}, which meant the same. batch_size counts decisions, in all other algorithms."
            )
        self.n_groups = n_groups
        self.trajectories_per_batch = trajectories_per_batch
        self.micro_batch_size = micro_batch_size
        self.n_epochs = n_epochs
        self.clip_range = clip_range
        self.clip_range_high = clip_range_high
        self.dynamic_sampling = dynamic_sampling
        self.recompute_log_probs = recompute_log_probs
        self.group_size = group_size
        self._check_settings()
        # Here alone: rl-zoo3 loads every model that it shows with a function in its place
        for name, value in (("clip_range", clip_range), ("clip_range_high", clip_range_high)):
            if callable(value):
                raise ValueError(f"{name} of GRPO is a number and no schedule, got {value!r:.80}.")
        self._queue: deque[EpisodeSpec] = deque()
        self._first_group = 0
        # Of the groups that are queued and not begun
        self._group_seeds: list[int] = []
        self._just_reset = False
        self._trajectories: list[np.ndarray] = []
        # Once an episode has said whether it succeeded, outcomes are successes for good: an env that says so of solved
        # episodes alone would have some iterations learn from returns
        self._reports_success = False
        self._n_without_episodes = 0
        self._warned_of_outcomes = False
        super().__init__(
            policy,
            env,
            learning_rate=learning_rate,
            n_steps=64,  # A first guess: the buffer grows with the episodes
            max_grad_norm=max_grad_norm,
            temperature=temperature,
            group_size=group_size,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs_over({"optimizer_class": th.optim.AdamW}, policy_kwargs, weight_decay),
            verbose=verbose,
            seed=seed,
            device=device,
            _init_setup_model=False,
        )
        if self.env is not None:
            self._check_env()
        if _init_setup_model:
            self._setup_model()

    def _check_settings(self) -> None:
        super()._check_settings()
        check_flag(recompute_log_probs=self.recompute_log_probs)
        check_at_least(2, group_size=self.group_size)  # an episode is compared with its group
        limits = self.dynamic_sampling
        if limits is not None and not (np.shape(limits) == (2,) and 0.0 <= limits[0] <= limits[1] <= 1.0):
            raise ValueError(f"Expected dynamic_sampling to be (low, high) within [0, 1] or None, got {limits}.")

    def _setup_model(self) -> None:
        super()._setup_model()
        # What models saved by version 0.1 call it
        self.trajectories_per_batch = self.__dict__.pop("batch_size", self.trajectories_per_batch)

    def _check_env(self) -> None:
        assert self.env is not None
        if not can_announce(self.env):
            raise ValueError(
                "GRPO starts groups of episodes from the same state, which needs every env of the vectorised env "
                "wrapped in opd_gym.envs.wrappers.EpisodeControl. Build it with opd_gym.make_vec(env_id, n_envs), or "
                "with make_vec_env(env_id, n_envs, wrapper_class=EpisodeControl)."
            )

    def set_env(self, env: GymEnv | str, force_reset: bool = True) -> None:
        """
        Set the environment to go on with.

        :param env: The environment; an id or a raw env is wrapped as in the constructor
        :param force_reset: Force a reset before training
        :raises ValueError: Its episodes cannot be chosen (``EpisodeControl``)
        """
        previous = self.env
        super().set_env(env, force_reset)
        try:
            self._check_env()
        except ValueError:
            # Its iterations would never end
            self.env = previous
            raise

    # ------------------------------------------------------------------------------------------------------ rollout

    def _before_reset(self) -> None:
        """Queue the groups of one iteration: those of an iteration that was queued and not begun, if there is one."""
        if len(self._group_seeds) != self.n_groups:
            self._group_seeds = [int(self._episode_rng.integers(MAX_SEED)) for _ in range(self.n_groups)]
        self._queue.clear()
        for group, seed in enumerate(self._group_seeds, self._first_group):
            self._queue.extend(EpisodeSpec(seed, group=group, member=member) for member in range(self.group_size))
        self._just_reset = True
        super()._before_reset()

    def _next_episode(self, index: int) -> EpisodeSpec | None:
        return self._queue.popleft() if self._queue else None

    def _begin_rollout(self) -> None:
        assert self.env is not None
        if not self._just_reset:
            self._before_reset()
            self._last_obs = self.env.reset()  # type: ignore[assignment]
            self._last_episode_starts = np.ones((self.n_envs,), dtype=bool)
            self._episodes.all_begun()
        self._just_reset = False
        self._first_group += self.n_groups
        self._group_seeds = []

    def _step_rewards(
        self, rewards: np.ndarray, dones: np.ndarray, infos: list[dict[str, Any]], values: th.Tensor
    ) -> np.ndarray:
        """Those of the env itself: a ``VecNormalize`` scales each step by what it has seen until then."""
        vec_normalize = self.get_vec_normalize_env()
        return rewards if vec_normalize is None else vec_normalize.get_original_reward()

    def _rollout_done(self, n_steps: int, n_rollout_steps: int) -> bool:
        return bool(self._episodes.standing_still.all())

    def _end_rollout(self) -> None:
        """Outcome, group and advantage of every trajectory; drop groups that teach little."""
        buffer = self.rollout_buffer
        rows = buffer.valid_rows()
        # Rows of one episode follow each other: the buffer is flattened env by env
        trajectories = np.split(rows, np.flatnonzero(np.diff(buffer.episode_ids[rows])) + 1)
        trajectories = [t for t in trajectories if len(t) and int(buffer.episode_ids[t[0]]) not in self._lost_episodes]
        self._trajectories = []
        self._n_without_episodes = 0 if trajectories else self._n_without_episodes + 1
        if self._n_without_episodes >= MAX_WITHOUT_EPISODES:
            raise RuntimeError(
                f"GRPO: all episodes of {self._n_without_episodes} iterations in a row were lost "
                '(info["episode_lost"]), so there is nothing to learn from. Play one in a DummyVecEnv to see why.'
            )
        if not trajectories:
            return
        groups = np.array([buffer.group_ids[trajectory[0]] for trajectory in trajectories])
        successes = np.array([buffer.successes[trajectory[-1]] for trajectory in trajectories])
        unknown = np.isnan(successes)
        if not unknown.all():
            self._reports_success = True
        if unknown.any() and self._reports_success:
            self._warn_of_unknown_outcomes(int(unknown.sum()), len(unknown))
        returns = np.array([buffer.rewards[trajectory].sum() for trajectory in trajectories])
        outcomes = np.where(unknown, 0.0, successes) if self._reports_success else returns
        kept = [group for group in np.unique(groups) if self._keeps(outcomes[groups == group])]
        advantages = group_advantages(outcomes, groups)
        for trajectory, advantage in zip(trajectories, advantages, strict=True):
            buffer.advantages[trajectory] = advantage
        self._trajectories = [t for t, group in zip(trajectories, groups, strict=True) if group in kept]
        self.logger.record("rollout/outcome", float(outcomes.mean()))
        self.logger.record("rollout/groups_kept", len(kept))
        self.logger.record("rollout/groups_dropped", len(np.unique(groups)) - len(kept))

    def _warn_of_unknown_outcomes(self, n_unknown: int, n_episodes: int) -> None:
        if not self._warned_of_outcomes:
            self._warned_of_outcomes = True
            warnings.warn(
                f"The env does not say of {n_unknown} of {n_episodes} episodes whether they were solved; they count as "
                'failed. Set info["is_success"] at the end of every episode, False if it failed.',
                stacklevel=2,
            )

    def _keeps(self, outcomes: np.ndarray) -> bool:
        if self.dynamic_sampling is None:
            return True
        if self._reports_success:
            return bool(self.dynamic_sampling[0] <= outcomes.mean() <= self.dynamic_sampling[1])
        return bool(outcomes.std() > 1e-8)

    # ------------------------------------------------------------------------------------------------------ training

    def train(self) -> None:
        """
        Update policy using the trajectories of the groups that were kept.
        """
        self.policy.set_training_mode(True)
        # An update that was interrupted, or refused, has left its gradients
        self.policy.optimizer.zero_grad()
        self._update_learning_rate(self.policy.optimizer)
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        if not ranks.largest(len(self._trajectories)):
            if self.verbose >= 1:
                print(
                    f"GRPO, iteration {self._n_iterations}: all {self.n_groups} groups were dropped (success rates "
                    f"outside {self.dynamic_sampling}, or equal returns). No update."
                )
            return
        if self._trajectories:
            self._rescore(np.concatenate(self._trajectories), self.micro_batch_size)
        self._keep_pace()
        losses, grad_norms, entropies = [], [], []
        metrics: list[PolicyGradientMetrics] = []
        for _ in range(self.n_epochs):
            order = np.random.permutation(len(self._trajectories))
            starts = range(0, len(order), self.trajectories_per_batch)
            for start in ranks.in_step(starts, len(starts)):
                if start is None:
                    grad_norms.append(self._idle_step())
                    continue
                trajectories = [self._trajectories[i] for i in order[start : start + self.trajectories_per_batch]]
                of_all_ranks = ranks.share(len(trajectories))
                batch_metrics, batch_entropies = self._accumulate_gradients(np.concatenate(trajectories), of_all_ranks)
                grad_norms.append(self._gradient_step())
                # Micro-batches add up to the loss of the minibatch
                losses.append(sum(m.loss for m in batch_metrics))
                metrics += batch_metrics
                entropies += batch_entropies
        if metrics:
            self._record_metrics(metrics)
            self.logger.record("train/loss", float(np.mean(losses)))
            self.logger.record("train/entropy", float(np.mean(entropies)))
        self.logger.record("train/grad_norm", float(np.mean(grad_norms)))
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

    def _accumulate_gradients(
        self, rows: np.ndarray, of_all_ranks: float
    ) -> tuple[list[PolicyGradientMetrics], list[float]]:
        """
        Gradients of the surrogate over whole trajectories, a few decisions at a time.

        :param rows: Rows of the trajectories of a minibatch
        :param of_all_ranks: Which part they are of the trajectories of all ranks
        :return: Metrics and entropies of the parts
        """
        buffer = self.rollout_buffer
        weights = np.zeros_like(buffer.token_mask)
        weights[rows] = trajectory_weights(
            th.as_tensor(buffer.token_mask[rows]), th.as_tensor(buffer.episode_ids[rows])
        ).numpy()
        metrics, entropies = [], []
        for samples in buffer.get(self.micro_batch_size, rows=rows):
            policy = self._student(samples.observations, samples.actions, self.temperature)
            loss, micro_metrics = clipped_surrogate(
                policy.log_prob(samples.actions.reshape(len(samples.rows), -1)),
                samples.old_token_log_probs,
                samples.advantages.unsqueeze(1),
                buffer.to_torch(weights[samples.rows]),
                self.clip_range,
                self.clip_range_high,
            )
            (of_all_ranks * loss).backward()
            metrics.append(micro_metrics)
            with th.no_grad():
                # At temperature 1, as those of other algorithms and settings
                entropy = policy.detach().temper(1.0 / self.temperature).entropy()
            entropies.append(masked_mean(entropy, samples.token_mask).item())
        return metrics, entropies

    def _interruption(self) -> dict[str, Any] | None:
        # An iteration begins with new groups: between two there are no episodes to go on with
        interruption = super()._interruption()
        return interruption and {"rng": interruption["rng"]}

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_trajectories", "_queue"]
