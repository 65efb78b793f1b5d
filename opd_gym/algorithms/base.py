"""What all algorithms share: preparing the env, the one rollout loop, logging, saving."""

from __future__ import annotations

import io
import os
import pathlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, ProgressBarCallback
from stable_baselines3.common.env_util import is_wrapped
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import (
    ActorCriticCnnPolicy,
    ActorCriticPolicy,
    BasePolicy,
    MultiInputActorCriticPolicy,
)
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, PyTorchObs, Schedule
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from opd_gym.algorithms.buffers import TeacherRolloutBuffer
from opd_gym.envs.make import prepare_env, with_action_dim
from opd_gym.envs.workers.pipeline import Pipeline
from opd_gym.envs.wrappers import EpisodeControl
from opd_gym.episodes import Dispatcher, EpisodeSpec, can_announce
from opd_gym.files import replacing
from opd_gym.observations import join_obs, obs_rows
from opd_gym.tokens import (
    TokenSpec,
    TokenView,
    action_distribution,
    distribution_and_values,
    is_autoregressive,
    token_spec,
    token_view,
)

SelfRolloutAlgorithm = TypeVar("SelfRolloutAlgorithm", bound="RolloutAlgorithm")

# Gymnasium and NumPy take seeds of 32 bits
MAX_SEED = 2**31


@dataclass
class _Decisions:
    """
    What some of the workers have been sent to do.

    :param workers: The workers
    :param actions: Their actions, as the policy sampled them
    :param values: Estimated values, (len(workers),)
    :param token_log_probs: Log-probabilities of the tokens, (len(workers), T)
    :param labels: Labels of a privileged teacher, (len(workers), T), or None
    :param standing_still: Whether the worker plays no episode
    :param group_ids: Group of the episode, -1 for none
    :param episode_ids: Episode
    """

    workers: np.ndarray
    actions: np.ndarray
    values: th.Tensor
    token_log_probs: th.Tensor
    labels: np.ndarray | None
    standing_still: np.ndarray
    group_ids: np.ndarray
    episode_ids: np.ndarray


class DecisionProgressBar(ProgressBarCallback):
    """Progress bar that counts decisions: workers that stand still make none."""

    def _on_step(self) -> bool:
        done = self.model.num_timesteps - self.model._num_timesteps_at_start
        self.pbar.update(done - self.pbar.n)
        return True


class RolloutAlgorithm(OnPolicyAlgorithm):
    """
    Base of all algorithms that learn from their own rollouts.

    Subclasses implement ``train()`` and override the hooks of :meth:`collect_rollouts`: ``_begin_rollout``,
    ``_next_episode``, ``_rollout_done``, ``_label_step`` and ``_end_rollout``.

    Workers whose env is wrapped in ``EpisodeControl`` are told which episode to play next, without waiting for each
    other. A single env, or an env id, is wrapped automatically.

    :param policy: The policy model to use (VLAPolicy, MlpPolicy, ...)
    :param env: The environment to learn from: an id, an env, or a vectorised env
    :param learning_rate: The learning rate, it can be a function of the current progress remaining (from 1 to 0)
    :param n_steps: Number of decisions of each worker per rollout
    :param max_grad_norm: The maximum value for the gradient clipping
    :param temperature: Temperature of the actions that the policy samples while it collects
    :param group_size: Number of consecutive episodes that start from the same state
    :param gamma: Discount factor (for a critic)
    :param gae_lambda: Bias-variance trade-off of generalised advantage estimation (for a critic)
    :param ent_coef: Entropy coefficient for the loss calculation
    :param vf_coef: Value function coefficient for the loss calculation
    :param use_sde: Whether to use generalized State Dependent Exploration
    :param sde_sample_freq: Sample a new noise matrix every n steps when using gSDE
    :param rollout_buffer_kwargs: Keyword arguments to pass to the rollout buffer on creation
    :param stats_window_size: Number of episodes that the reported success rate, length and reward are averaged over
    :param tensorboard_log: The log location for tensorboard (if None, no logging)
    :param policy_kwargs: Additional arguments to be passed to the policy on creation
    :param verbose: 0 for no output, 1 for info messages, 2 for debug messages
    :param seed: Seed for the pseudo random generators
    :param device: Device on which the code should be run
    :param _init_setup_model: Whether or not to build the network at the creation of the instance
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": ActorCriticPolicy,
        "CnnPolicy": ActorCriticCnnPolicy,
        "MultiInputPolicy": MultiInputActorCriticPolicy,
    }
    # Without a critic nothing is bootstrapped from, or computed for, an untrained value network
    uses_critic: ClassVar[bool] = False
    default_total_timesteps: ClassVar[int] = 20_000

    rollout_buffer: TeacherRolloutBuffer

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str | None,
        learning_rate: float | Schedule,
        n_steps: int,
        max_grad_norm: float,
        temperature: float = 1.0,
        group_size: int = 1,
        gamma: float = 0.99,
        gae_lambda: float = 0.95,
        ent_coef: float = 0.0,
        vf_coef: float = 0.0,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        rollout_buffer_kwargs: dict[str, Any] | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
    ):
        if not temperature > 0.0:
            raise ValueError(f"Expected a positive temperature, got {temperature}.")
        if use_sde and temperature != 1.0:
            raise ValueError("State-dependent exploration has its own noise: use temperature=1.0 with use_sde=True.")
        if group_size < 1:
            raise ValueError(f"Expected group_size to be at least 1, got {group_size}.")
        if n_steps < 1:
            raise ValueError(f"Expected n_steps to be at least 1, got {n_steps}.")
        if env is not None:
            policy_class = self._get_policy_from_name(policy) if isinstance(policy, str) else policy
            env = prepare_env(env, policy_class, policy_kwargs, verbose, seed)
            policy_kwargs = with_action_dim(env, policy_class, policy_kwargs)
        self.temperature = temperature
        self.group_size = group_size
        self.num_env_steps = 0
        self._n_iterations = 0
        self._n_finished = 0
        self._n_lost = 0
        self._lost_episodes: set[int] = set()
        self._n_announced = 0
        self._group_seed = 0
        self._episode_rng = np.random.default_rng(seed)
        super().__init__(
            policy,
            env,  # type: ignore[arg-type]
            learning_rate=learning_rate,
            n_steps=n_steps,
            gamma=gamma,
            gae_lambda=gae_lambda,
            ent_coef=ent_coef,
            vf_coef=vf_coef,
            max_grad_norm=max_grad_norm,
            use_sde=use_sde,
            sde_sample_freq=sde_sample_freq,
            rollout_buffer_class=TeacherRolloutBuffer,
            rollout_buffer_kwargs=rollout_buffer_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
            _init_setup_model=False,
            supported_action_spaces=(spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary),
        )
        if _init_setup_model:
            self._setup_model()

    # ------------------------------------------------------------------------------------------------------ set-up

    def _get_policy_from_name(self, policy_name: str) -> type[BasePolicy]:
        if policy_name == "VLAPolicy":
            # Lazy: a VLA imports transformers
            from opd_gym.policies.vla import VLAPolicy

            return VLAPolicy
        if policy_name not in self.policy_aliases:
            known = ["VLAPolicy", *self.policy_aliases]
            raise ValueError(f"Unknown policy {policy_name!r}: expected one of {known}, or a policy class.")
        return super()._get_policy_from_name(policy_name)

    @staticmethod
    def _wrap_env(env: GymEnv, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        if isinstance(env, gym.Env) and not is_wrapped(env, EpisodeControl):
            controlled = EpisodeControl(env if is_wrapped(env, Monitor) or not monitor_wrapper else Monitor(env))
            env = DummyVecEnv([lambda: controlled])
        return OnPolicyAlgorithm._wrap_env(env, verbose, monitor_wrapper)

    def _setup_model(self) -> None:
        super()._setup_model()
        # A saved algorithm must load where the checkpoint that its policy started from is gone
        portable_kwargs = getattr(self.policy, "portable_kwargs", None)
        if portable_kwargs is not None:
            self.policy_kwargs = portable_kwargs()

    def set_env(self, env: GymEnv | str, force_reset: bool = True) -> None:
        """
        Set the environment to go on with.

        :param env: The environment; an id or a raw env is wrapped as in the constructor
        :param force_reset: Force a reset before training
        """
        env = prepare_env(env, self.policy_class, self.policy_kwargs, self.verbose, self.seed)
        super().set_env(env, force_reset)

    @property
    def token_spec(self) -> TokenSpec:
        """Token view of the student's actions."""
        return token_spec(self.action_space, squashed=self.policy.squash_output)

    # ------------------------------------------------------------------------------------------------------ episodes

    def _next_episode(self, index: int) -> EpisodeSpec | None:
        """
        Hook: the episode that an env plays next.

        :param index: The env
        :return: None for an env that is to stand still until the next rollout
        """
        group, member = divmod(self._n_announced, self.group_size)
        if member == 0:
            self._group_seed = int(self._episode_rng.integers(MAX_SEED))
        self._n_announced += 1
        return EpisodeSpec(self._group_seed, group=group, member=member)

    def _before_reset(self) -> None:
        """Announce the first episode of every env."""
        assert self.env is not None
        self._episodes = Dispatcher(self.env, self._next_episode)
        self._episodes.announce_first()

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        if self.env is None:
            raise ValueError("This model has no env: load it with load(path, env=env), or call set_env(env), first.")
        if self._last_obs is not None and can_announce(self.env) and any(self.env.get_attr("frozen")):
            # An evaluation on this env has left its workers standing still
            self._last_obs = None
        resets = reset_num_timesteps or self._last_obs is None
        if reset_num_timesteps:
            self.num_env_steps = 0
        if resets:
            self._before_reset()
        result = super()._setup_learn(total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar)
        if resets:
            for index in range(self.n_envs):
                self._episodes.begun(index)
        return result

    def _init_callback(self, callback: MaybeCallback, progress_bar: bool = False) -> BaseCallback:
        hybrid = super()._init_callback(callback, progress_bar=False)
        if progress_bar:
            hybrid = CallbackList([hybrid, DecisionProgressBar()])
            hybrid.init_callback(self)
        return hybrid

    # ------------------------------------------------------------------------------------------------------ rollouts

    def _begin_rollout(self) -> None:
        """Hook: before the first decision of a rollout."""

    def _rollout_done(self, n_steps: int, n_rollout_steps: int) -> bool:
        """Hook: whether the rollout is complete after ``n_steps`` decisions of each worker."""
        return n_steps >= n_rollout_steps

    def _label_step(self, workers: np.ndarray) -> np.ndarray | None:
        """Hook: labels of a privileged teacher for the workers' present states, (len(workers), T); before the step."""
        return None

    def _end_rollout(self) -> None:
        """Hook: after the rollout, on the finished buffer."""

    def collect_rollouts(
        self,
        env: VecEnv,
        callback: BaseCallback,
        rollout_buffer: RolloutBuffer,
        n_rollout_steps: int,
    ) -> bool:
        """
        Collect experiences using the current policy.

        With several envs in each worker process (``WorkerVecEnv``) one half of them acts while the other half is
        simulated. The rows of the buffer and the calls of ``callback`` are the same as without; when ``callback`` is
        called for a row, the first half has already begun the next one.

        :param env: The training environment
        :param callback: Callback that will be called at each step (and at the beginning and end of the rollout)
        :param rollout_buffer: Buffer to fill with rollouts
        :param n_rollout_steps: Number of decisions to collect per environment
        :return: False if the callback terminated the rollout prematurely
        """
        assert isinstance(rollout_buffer, TeacherRolloutBuffer)
        self.policy.set_training_mode(False)
        self._n_iterations += 1
        rollout_buffer.reset()
        self._lost_episodes.clear()
        self._begin_rollout()
        if self.use_sde:
            self.policy.reset_noise(env.num_envs)
        callback.on_rollout_start()
        assert self._last_obs is not None and self._last_episode_starts is not None, "No previous observation"

        complete = False
        try:
            complete = self._collect_rows(env, callback, rollout_buffer, n_rollout_steps)
        finally:
            if not complete:
                # Workers are somewhere in the middle of a step: the next learn() starts with a reset
                self._last_obs = None
        if not complete:
            return False

        last_values = None
        if self.uses_critic:
            with th.no_grad():
                obs_tensor = obs_as_tensor(self._last_obs, self.device)  # type: ignore[arg-type]
                last_values = self.policy.predict_values(obs_tensor)
        rollout_buffer.finish(last_values, np.asarray(self._last_episode_starts))
        self._end_rollout()

        callback.update_locals(locals())
        callback.on_rollout_end()
        return True

    def _collect_rows(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: TeacherRolloutBuffer, n_rollout_steps: int
    ) -> bool:
        """The loop of :meth:`collect_rollouts`: one row of the buffer after the other."""
        # State-dependent exploration has one noise matrix for each row of a batch of all workers
        pipeline = Pipeline(env, split=not self.use_sde)
        last_part = len(pipeline.parts) - 1
        ahead: list[_Decisions | None] = [None] * len(pipeline.parts)
        n_steps = 0
        while not self._rollout_done(n_steps, n_rollout_steps):
            if self.use_sde and self.sde_sample_freq > 0 and n_steps % self.sde_sample_freq == 0:
                self.policy.reset_noise(env.num_envs)

            row = [
                ahead[part] or self._decide(pipeline, part, obs_rows(self._last_obs, workers))
                for part, workers in enumerate(pipeline.parts)
            ]
            results = []
            for part, decisions in enumerate(row):
                results.append(pipeline.recv(part))
                ahead[part] = None
                if part < last_part:
                    obs, _, part_dones, part_infos = results[part]
                    self._episodes_ended(decisions, part_dones, part_infos)
                    # Whether there is a next row is not known if only the others still play
                    plays = not self._episodes.standing_still[decisions.workers].all()
                    if plays and not self._rollout_done(n_steps + 1, n_rollout_steps):
                        ahead[part] = self._decide(pipeline, part, obs)

            new_obs = join_obs([result[0] for result in results])
            rewards, dones = (np.concatenate([result[i] for result in results]) for i in (1, 2))
            infos = [info for result in results for info in result[3]]
            actions, standing_still, group_ids, episode_ids = (
                np.concatenate([getattr(decisions, name) for decisions in row])
                for name in ("actions", "standing_still", "group_ids", "episode_ids")
            )
            values, token_log_probs = (
                th.cat([getattr(decisions, name) for decisions in row]) for name in ("values", "token_log_probs")
            )
            if any(info.get("frozen") and not still for info, still in zip(infos, standing_still, strict=True)):
                raise RuntimeError(
                    "A worker stands still that should be playing: the training env was used for something else, an "
                    "evaluation for instance, in the middle of learn(). Give the evaluation an env of its own."
                )
            # A decision that was not carried out: nothing is learned from it, and it is not counted
            void = standing_still | np.array([bool(info.get("episode_lost")) for info in infos])
            for info in infos:
                if info.get("episode_lost"):
                    # Monitor has taken it for an episode that ended without success
                    info.pop("episode", None)

            self.num_timesteps += int((~void).sum())
            self.num_env_steps += sum(info.get("n_executed", 1) for info, no in zip(infos, void, strict=True) if not no)

            # Give access to local variables
            callback.update_locals(locals())
            if not callback.on_step():
                return False

            self._update_info_buffer(infos, dones)
            n_steps += 1
            if self.uses_critic:
                rewards = self._bootstrap_truncated(rewards, dones, infos, values)

            n_tokens = token_log_probs.shape[1]
            token_mask = np.ones((env.num_envs, n_tokens), dtype=np.float32)
            success = np.full(env.num_envs, np.nan, dtype=np.float32)
            for worker, info in enumerate(infos):
                token_mask[worker, 0 if void[worker] else info.get("n_executed_tokens", n_tokens) :] = 0.0
                if dones[worker] and "is_success" in info:
                    success[worker] = info["is_success"]
            labels = None if row[0].labels is None else np.concatenate([d.labels for d in row])  # type: ignore[misc]
            rollout_buffer.add(
                self._last_obs,  # type: ignore[arg-type]
                actions,
                rewards,
                self._last_episode_starts,  # type: ignore[arg-type]
                values,
                token_log_probs,
                token_mask,
                group_id=group_ids,
                episode_id=episode_ids,
                success=success,
                teacher_action=labels,
            )
            self._last_obs = new_obs
            self._last_episode_starts = dones
            self._episodes_ended(row[last_part], *results[last_part][2:])
        return True

    def _decide(self, pipeline: Pipeline, part: int, obs: Any) -> _Decisions:
        """
        Sample actions for some of the workers, and send them off.

        :param pipeline: The training environment
        :param part: Number of the part of the workers
        :param obs: Their observations
        :return: What was decided
        """
        workers = pipeline.parts[part]
        with th.no_grad():
            actions, values, token_log_probs = self._act(obs_as_tensor(obs, self.device))
        playing = [self._episodes.playing[worker] for worker in workers]
        decisions = _Decisions(
            workers,
            actions,
            # One zero for all of them, where there is no critic
            values.flatten().expand(len(workers)),
            token_log_probs,
            labels=self._label_step(workers),
            standing_still=self._episodes.standing_still[workers],
            group_ids=np.array([-1 if episode is None else episode.group for episode in playing]),
            episode_ids=self._episodes.numbers[workers],
        )
        pipeline.send(part, self._env_actions(actions))
        return decisions

    def _episodes_ended(self, decisions: _Decisions, dones: np.ndarray, infos: list[dict[str, Any]]) -> None:
        """
        Take note of the episodes that ended with a step of some of the workers.

        :param decisions: The decisions that led there
        :param dones: Whether the episode ended
        :param infos: Infos of the step
        """
        for i in np.flatnonzero(dones):
            if infos[i].get("episode_lost"):
                self._n_lost += 1
                self._lost_episodes.add(int(decisions.episode_ids[i]))
            else:
                self._n_finished += 1
            self._episodes.begun(int(decisions.workers[i]))

    def _act(self, obs: PyTorchObs) -> tuple[np.ndarray, th.Tensor, th.Tensor]:
        """
        Sample actions for all workers.

        :param obs: Observations
        :return: actions, values, and log-probabilities of the tokens
        """
        if is_autoregressive(self.policy):
            # One pass gives all three: a token is sampled before the distribution of the next is known
            policy: Any = self.policy
            with self._nan_named():
                tokens, dist, values = policy.decode(obs, self.temperature)
            view = token_view(dist)
            view = view if self.temperature == 1.0 else view.temper(self.temperature)
            values = values if self.uses_critic else th.zeros(1, device=self.device)
            return self._checked(tokens, values, view)
        dist, values = self._distribution(obs)
        if self.temperature == 1.0:
            # The distribution's own sampling, for the sake of state-dependent exploration
            tokens, view = dist.sample(), token_view(dist)
            tokens = tokens.reshape(len(tokens), -1)
        else:
            view = token_view(dist).temper(self.temperature)
            tokens = view.sample()
        return self._checked(tokens, values, view)

    def _checked(
        self, tokens: th.Tensor, values: th.Tensor, view: TokenView
    ) -> tuple[np.ndarray, th.Tensor, th.Tensor]:
        """Actions for the env and log-probabilities of sampled tokens."""
        token_log_probs = view.log_prob(tokens)
        if not bool(th.isfinite(token_log_probs).all()):
            raise self._not_finite("log-probabilities of the policy's actions")
        actions = tokens.cpu().numpy().reshape(-1, *self.action_space.shape)  # type: ignore[misc]
        return actions.astype(self.action_space.dtype, copy=False), values, token_log_probs

    def _distribution(self, obs: PyTorchObs, actions: th.Tensor | None = None) -> tuple[Any, th.Tensor]:
        """
        The policy's distribution and, for algorithms with a critic, its values.

        :param obs: Observations
        :param actions: Actions, after whose tokens an autoregressive policy gives the distributions of the next
        :return: distribution and values (zeros without a critic)
        """
        with self._nan_named():
            if self.uses_critic:
                return distribution_and_values(self.policy, obs, actions)
            return action_distribution(self.policy, obs, actions), th.zeros(1, device=self.device)

    @contextmanager
    def _nan_named(self) -> Iterator[None]:
        """Say what has gone wrong where the policy's outputs are NaN."""
        try:
            yield
        except (ValueError, FloatingPointError) as error:
            # How torch's and the VLA's distributions refuse NaN
            finite = all(bool(th.isfinite(parameter).all()) for parameter in self.policy.parameters())
            if finite and "nan" not in str(error).lower():
                raise
            raise self._not_finite("outputs of the policy") from error

    def _student(self, obs: PyTorchObs, actions: th.Tensor | None, temperature: float = 1.0) -> TokenView:
        """
        The policy's distribution as tokens, with gradient.

        :param obs: Observations
        :param actions: Actions that were taken there; only an autoregressive policy needs them
        :param temperature: Temperature to apply
        :return: Token view
        """
        view = token_view(self._distribution(obs, actions)[0])
        return view if temperature == 1.0 else view.temper(temperature)

    def _env_actions(self, actions: np.ndarray) -> np.ndarray:
        """
        Actions as the env takes them.

        :param actions: Sampled actions
        :return: Box actions unscaled or clipped, others unchanged
        """
        if isinstance(self.action_space, spaces.Box):
            if self.policy.squash_output:
                return self.policy.unscale_action(actions)
            return np.clip(actions, self.action_space.low, self.action_space.high)
        return actions

    def _bootstrap_truncated(
        self, rewards: np.ndarray, dones: np.ndarray, infos: list[dict[str, Any]], values: th.Tensor
    ) -> np.ndarray:
        # See https://github.com/DLR-RM/stable-baselines3/issues/633
        for worker in np.flatnonzero(dones):
            info = infos[worker]
            if info.get("episode_lost"):
                # The episode is cut where its last decision was taken, which then has no advantage
                rewards[worker] = values[worker].item()
            elif info.get("terminal_observation") is not None and info.get("TimeLimit.truncated", False):
                terminal_obs = self.policy.obs_to_tensor(info["terminal_observation"])[0]
                with th.no_grad():
                    rewards[worker] += self.gamma * self.policy.predict_values(terminal_obs)[0].item()
        return rewards

    # ------------------------------------------------------------------------------------------------------ training

    def _gradient_step(self) -> float:
        """
        Clip the accumulated gradients, take an optimiser step, and clear them.

        :return: Norm of the gradients before clipping
        """
        grad_norm = th.nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm)
        if not bool(th.isfinite(grad_norm)):
            # Before the step: the weights are still good
            raise self._not_finite("gradients")
        self.policy.optimizer.step()
        self.policy.optimizer.zero_grad()
        self._n_updates += 1
        return grad_norm.item()

    def _not_finite(self, what: str) -> FloatingPointError:
        return FloatingPointError(
            f"{type(self).__name__}: the {what} are NaN or infinite in iteration {self._n_iterations} (after "
            f"{self._n_updates} updates and {self.num_timesteps} timesteps). The training has diverged, or the "
            "observations hold NaN (VecCheckNan of Stable-Baselines3 finds that). Go on from the last checkpoint with "
            f"a lower learning_rate (now {self.lr_schedule(self._current_progress_remaining):g}) or max_grad_norm (now "
            f"{self.max_grad_norm:g})."
        )

    def _record_metrics(self, metrics: list[Any]) -> None:
        """
        Log the means of the metrics of all minibatches as ``train/*``.

        :param metrics: Dataclasses of metrics
        """
        for name in metrics[0].__dataclass_fields__ if metrics else ():
            values = [getattr(m, name) for m in metrics]
            if not np.isnan(values).all():
                self.logger.record(f"train/{name}", float(np.mean(values)))

    def dump_logs(self, iteration: int = 0) -> None:
        """
        Write log.

        :param iteration: Current logging iteration
        """
        self.logger.record("time/env_steps", self.num_env_steps)
        self.logger.record("time/episodes", self._n_finished)
        if self._n_lost:
            self.logger.record("rollout/episodes_lost", self._n_lost)
        super().dump_logs(iteration)

    def learn(
        self: SelfRolloutAlgorithm,
        total_timesteps: int | None = None,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfRolloutAlgorithm:
        """
        Train the policy.

        :param total_timesteps: Number of decisions to train on (a lower bound); None: ``default_total_timesteps``
        :param callback: Callback(s) called at every step with state of the algorithm
        :param log_interval: Number of iterations before logging
        :param tb_log_name: Name of the run for TensorBoard logging; None: the name of the algorithm
        :param reset_num_timesteps: Whether to start counting from 0; False resumes
        :param progress_bar: Display a progress bar using tqdm and rich
        :return: The trained model
        """
        super().learn(
            total_timesteps=self.default_total_timesteps if total_timesteps is None else total_timesteps,
            callback=callback,
            log_interval=log_interval,
            tb_log_name=type(self).__name__ if tb_log_name is None else tb_log_name,
            reset_num_timesteps=reset_num_timesteps,
            progress_bar=progress_bar,
        )
        # Stable-Baselines3 logs before it trains: the last iteration's training would never be written
        if self.logger.name_to_value:
            self.dump_logs()
        return self

    # ------------------------------------------------------------------------------------------------------ saving

    def _excluded_save_params(self) -> list[str]:
        # Observations hold images, and the workers' episodes end with the process
        runtime = ["_last_obs", "_last_original_obs", "_last_episode_starts", "_episodes", "_lost_episodes"]
        return [*super()._excluded_save_params(), *runtime]

    def save(
        self,
        path: str | pathlib.Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """
        Save the model in a zip file. A file of that name is replaced only once the new one is complete.

        :param path: Path of the file (``.zip`` is added where there is no suffix), or a file object
        :param exclude: Names of parameters that should be excluded in addition to the default ones
        :param include: Names of parameters that might be excluded but should be included anyway
        """
        if not isinstance(path, (str, os.PathLike)):
            super().save(path, exclude=exclude, include=include)
            return
        target = pathlib.Path(path)
        if target.suffix == "":
            target = target.with_name(f"{target.name}.zip")
        with replacing(target) as temporary:
            super().save(temporary, exclude=exclude, include=include)

    @classmethod
    def load(
        cls: type[SelfRolloutAlgorithm],
        path: str | pathlib.Path | io.BufferedIOBase,
        env: GymEnv | str | None = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        **kwargs: Any,
    ) -> SelfRolloutAlgorithm:
        """
        Load the model from a zip file.

        :param path: Path of the file, or a file object
        :param env: The environment to go on with (None if only predictions are needed); an id or a raw env is wrapped
            as in the constructor
        :param device: Device on which the code should run
        :param custom_objects: Objects to replace upon loading
        :param print_system_info: Whether to print system info of the saved model
        :param force_reset: Force a reset before training
        :param kwargs: Extra arguments to change the model when loading
        :return: New model with loaded parameters
        """
        if env is not None:
            data, _, _ = load_from_zip_file(path, device="cpu", custom_objects=custom_objects)
            if isinstance(path, io.BufferedIOBase):
                path.seek(0)
            assert data is not None, "No data found in the saved file"
            env = prepare_env(env, data["policy_class"], data["policy_kwargs"], data["verbose"], data["seed"])
        return super().load(path, env, device, custom_objects, print_system_info, force_reset, **kwargs)
