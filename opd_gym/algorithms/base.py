"""What all algorithms share: preparing the env, the one rollout loop, logging, saving."""

from __future__ import annotations

import copy
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import is_wrapped
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecFrameStack, is_vecenv_wrapped, unwrap_vec_normalize
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn

from opd_gym import ranks
from opd_gym.algorithms.buffers import TeacherRolloutBuffer, outcome_of_step
from opd_gym.algorithms.common import PolicyAlgorithm, set_statistics, statistics_of
from opd_gym.algorithms.randomness import set_rng_states
from opd_gym.envs.workers.pipeline import Pipeline
from opd_gym.envs.wrappers import EpisodeControl
from opd_gym.episodes import Dispatcher, EpisodeSpec, can_announce, release
from opd_gym.observations import join_obs, obs_rows
from opd_gym.tokens import env_actions, sample_tokens

SelfRolloutAlgorithm = TypeVar("SelfRolloutAlgorithm", bound="RolloutAlgorithm")

# Gymnasium and NumPy take seeds of 32 bits
MAX_SEED = 2**31


@dataclass
class _Decisions:
    """
    What some of the envs have been sent to do.

    :param envs: Numbers of the envs
    :param actions: Their actions, as the policy sampled them
    :param values: Estimated values, (len(envs),)
    :param token_log_probs: Log-probabilities of the tokens, (len(envs), T)
    :param labels: Labels of a privileged teacher, (len(envs), T), or None
    :param standing_still: Whether the env plays no episode
    :param tags: Tags of the episodes, see :meth:`opd_gym.episodes.Dispatcher.tag`
    :param group_ids: Group of the episode, -1 for none
    :param episode_ids: Episode
    """

    envs: np.ndarray
    actions: np.ndarray
    values: th.Tensor
    token_log_probs: th.Tensor
    labels: np.ndarray | None
    standing_still: np.ndarray
    tags: list[tuple[int, int] | None]
    group_ids: np.ndarray
    episode_ids: np.ndarray


def _callbacks(callback: Any) -> Iterator[BaseCallback]:
    """A callback, or the callbacks of a list, and those that they call."""
    called: Any
    if isinstance(callback, BaseCallback):
        yield callback
        called = [getattr(callback, name, None) for name in ("callbacks", "callback", "callback_on_new_best")]
    else:
        called = callback if isinstance(callback, (list, tuple)) else []
    for each in called:
        yield from _callbacks(each)


def _simulators(env: Any) -> set[int]:
    """Which objects are stepped in the end; two envs that share one disturb each other."""
    if not isinstance(env, (gym.Env, VecEnv)):
        return set()
    return {id(env.unwrapped), *(id(each.unwrapped) for each in getattr(env.unwrapped, "envs", ()))}


class RolloutAlgorithm(PolicyAlgorithm, OnPolicyAlgorithm):
    """
    Base of all algorithms that learn from their own rollouts.

    Subclasses implement ``train()`` and override the hooks of :meth:`collect_rollouts`: ``_begin_rollout``,
    ``_next_episode``, ``_rollout_done``, ``_label_step``, ``_step_rewards`` and ``_end_rollout``.

    Envs in ``EpisodeControl`` are told which episode to play next, and do not wait. A single env, or an id, gets one.

    :param policy: The policy model to use (VLAPolicy, MlpPolicy, ...)
    :param env: The environment to learn from: an id, an env, or a vectorised env
    :param learning_rate: The learning rate, it can be a function of the current progress remaining (from 1 to 0)
    :param n_steps: Number of decisions of each env per rollout
    :param max_grad_norm: The maximum value for the gradient clipping
    :param temperature: Temperature of the actions that the policy samples while it collects
    :param group_size: Number of consecutive episodes that start from the same state
    :param seed: Seed for the pseudo random generators
    :param _init_setup_model: Whether or not to build the network at the creation of the instance
    :param kwargs: Other arguments of ``OnPolicyAlgorithm``; those for a critic have defaults
    """

    rollout_buffer: TeacherRolloutBuffer
    learns_from_rewards: ClassVar[bool] = True
    #: See GRPO and PPO
    recompute_log_probs: bool | None = False
    _changed_by_rollouts: ClassVar[tuple[str, ...]] = (
        *("num_timesteps", "num_env_steps", "_n_finished", "_n_lost", "_n_iterations", "_timesteps_before"),
        *("_n_announced", "_group_seed", "_episode_rng", "ep_info_buffer", "ep_success_buffer"),
    )
    # What a rollout that was undone began with
    _undone: dict[str, Any] | None = None

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str | None,
        learning_rate: float | Schedule,
        n_steps: int,
        max_grad_norm: float,
        temperature: float = 1.0,
        group_size: int = 1,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        _init_setup_model: bool = True,
        **kwargs: Any,
    ):
        self.temperature = temperature
        self.use_sde = bool(kwargs.get("use_sde"))
        self._check_settings()
        env, policy_kwargs = self._prepare(policy, env, policy_kwargs, verbose, seed)
        self.group_size = group_size
        self.num_env_steps = 0
        self._n_iterations, self._timesteps_before = 0, 0
        self._n_finished = self._n_lost = self._n_announced = self._group_seed = 0
        self._lost_episodes: set[int] = set()
        self._statistics: ranks.SharedStatistics | None = None
        self._between_iterations = True
        self._episode_rng: np.random.Generator
        self._seed_episodes(seed)
        no_critic = dict(gamma=0.99, gae_lambda=0.95, ent_coef=0.0, vf_coef=0.0, use_sde=False, sde_sample_freq=-1)
        super().__init__(
            policy,
            env,  # type: ignore[arg-type]
            learning_rate=learning_rate,
            n_steps=n_steps,
            max_grad_norm=max_grad_norm,
            rollout_buffer_class=TeacherRolloutBuffer,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            _init_setup_model=False,
            supported_action_spaces=(spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary),
            **{**no_critic, **kwargs},
        )
        if _init_setup_model:
            self._setup_model()

    # ------------------------------------------------------------------------------------------------------ set-up

    @staticmethod
    def _wrap_env(env: GymEnv, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        if isinstance(env, gym.Env) and not is_wrapped(env, EpisodeControl):
            controlled = EpisodeControl(env if is_wrapped(env, Monitor) or not monitor_wrapper else Monitor(env))
            env = DummyVecEnv([lambda: controlled])
        return OnPolicyAlgorithm._wrap_env(env, verbose, monitor_wrapper)

    def _check_settings(self) -> None:
        super()._check_settings()
        if getattr(self, "use_sde", False) and self.temperature != 1.0:
            raise ValueError("State-dependent exploration has its own noise: use temperature=1.0 with use_sde=True.")

    def _check_env_given(self) -> None:
        if getattr(self, "observation_space", None) is None:
            raise ValueError(f"{type(self).__name__} needs an env: an id, an env, or a vectorised env.")

    def _setup_model(self) -> None:
        self._check_settings()  # load() does not go through __init__
        self._check_env_given()
        if not ranks.is_main():
            # The episodes of each rank are its own, also where all load the generator that the first one saved
            self._episode_rng = np.random.default_rng((int(self._episode_rng.integers(MAX_SEED)), ranks.rank()))
        super()._setup_model()
        self._policy_is_built()

    # ------------------------------------------------------------------------------------------------------ episodes

    def _next_episode(self, index: int) -> EpisodeSpec | None:
        """
        Hook: the episode that an env plays next.

        :param index: Number of the env
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
        for each in _callbacks(callback):
            if not _simulators(self.env).isdisjoint(_simulators(getattr(each, "eval_env", None))):
                raise ValueError(
                    f"{type(each).__name__} evaluates on the env that is trained on, in the middle of its episodes, "
                    "which nobody would go on with. Give the evaluation an env of its own."
                )
        if self._last_obs is not None and can_announce(self.env):
            told = [self._episodes.tag(index) for index in range(self.n_envs)]
            if any(self.env.get_attr("frozen")) or self.env.get_attr("episode_tag") != told:
                # An evaluation has played other episodes on this env
                self._last_obs = None
        resets = reset_num_timesteps or self._last_obs is None
        if reset_num_timesteps:
            self.num_env_steps = 0
        self._join_ranks()
        vec_normalize = unwrap_vec_normalize(self.env)
        several = ranks.world_size() > 1 and vec_normalize is not None and vec_normalize.training
        self._statistics = ranks.SharedStatistics(vec_normalize) if several and vec_normalize is not None else None
        interrupted, self._interrupted, self._undone = self._interrupted, None, None
        if reset_num_timesteps or ranks.world_size() > 1:
            # Several ranks would all go on as the first one
            interrupted = None
        so_far = self._episodes_to_go_on_with(interrupted)
        if resets and so_far is None:
            self._before_reset()
        elif resets:
            self._episodes = Dispatcher(self.env, self._next_episode)
            self._episodes.announce_again(so_far)
        before = statistics_of(vec_normalize)
        result = super()._setup_learn(total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar)
        if resets and so_far is not None:
            if self._episodes.replay(so_far):
                self._last_obs, self._last_episode_starts = so_far["obs"], so_far["episode_starts"]
                # The reset has added observations that were added when these episodes began
                set_statistics(vec_normalize, before)
                if vec_normalize is not None and "original_obs" in so_far:
                    vec_normalize.old_obs = so_far["original_obs"]
            else:
                # A simulator that does not repeat itself
                so_far = None
                self._before_reset()
                self._last_obs = self.env.reset()  # type: ignore[assignment]
        if resets and so_far is None:
            self._episodes.all_begun()
        if interrupted is not None and "rng" in interrupted:
            set_rng_states(interrupted["rng"])
        return result

    def _episodes_to_go_on_with(self, interrupted: dict[str, Any] | None) -> Any:
        """What an interrupted training played, where these envs can play it again; None where they cannot."""
        so_far = None if interrupted is None else interrupted.get("episodes")
        if so_far is None or self.env is None or not can_announce(self.env):
            return None
        # The frames before the last one are not known to an env that plays an episode again
        fits = len(so_far["playing"]) == self.n_envs and not is_vecenv_wrapped(self.env, VecFrameStack)
        return so_far if fits else None

    def _begin_anew(self, seed: int | None) -> None:
        super()._begin_anew(seed)
        self._seed_episodes(seed)

    def _seed_episodes(self, seed: int | None) -> None:
        if seed is None:
            # From NumPy's generator, which a script may have seeded itself
            seed = int(np.random.randint(MAX_SEED))
        self._episode_rng = np.random.default_rng(seed)

    def iteration_begun(self) -> dict[str, Any]:
        """
        For a callback's ``on_rollout_start``: what the rollout that begins will change, episodes included.

        :return: What :meth:`undo_rollout` takes
        """
        return {
            "attributes": {name: copy.deepcopy(getattr(self, name)) for name in self._changed_by_rollouts},
            "interruption": self._interruption(),
        }

    def undo_rollout(self, begun: dict[str, Any]) -> None:
        """
        If a rollout was broken off, forget it: nothing is learned from it, so nothing of it is to be counted or saved.

        :param begun: What :meth:`iteration_begun` gave when it began
        """
        if not self._between_iterations:
            vars(self).update(begun["attributes"])
            self._undone = begun["interruption"]

    def _interruption(self) -> dict[str, Any] | None:
        if self._undone is not None or not self._between_iterations:
            return self._undone
        interruption = super()._interruption() or {}
        try:
            so_far = self._episodes.so_far() if self._last_obs is not None else None
        except (EOFError, ConnectionError, InterruptedError):
            so_far = None  # its workers hang, or the signal that ends the run has reached them as well
        if so_far is not None:
            so_far.update(obs=self._last_obs, episode_starts=self._last_episode_starts)
            vec_normalize = None if self.env is None else unwrap_vec_normalize(self.env)
            if vec_normalize is not None:
                so_far["original_obs"] = vec_normalize.get_original_obs()
            interruption["episodes"] = so_far
        return interruption

    def _update_current_progress_remaining(self, num_timesteps: int, total_timesteps: int) -> None:
        # SB3's is that after the rollout: a linear schedule is at 0 in the last iteration, which may be the only one
        super()._update_current_progress_remaining(self._timesteps_before, total_timesteps)

    # ------------------------------------------------------------------------------------------------------ rollouts

    def _begin_rollout(self) -> None:
        """Hook: before the first decision of a rollout."""

    def _rollout_done(self, n_steps: int, n_rollout_steps: int) -> bool:
        """Hook: whether the rollout is complete after ``n_steps`` decisions of each env."""
        return n_steps >= n_rollout_steps

    def _label_step(self, envs: np.ndarray) -> np.ndarray | None:
        """Hook: labels of a privileged teacher for the present states of envs, (len(envs), T); before the step."""
        return None

    def _step_rewards(
        self, rewards: np.ndarray, dones: np.ndarray, infos: list[dict[str, Any]], values: th.Tensor
    ) -> np.ndarray:
        """Hook: what is stored as the rewards of a step, (n_envs,)."""
        return rewards

    def _last_values(self) -> th.Tensor | None:
        """Hook: values of the observations after the last step, (n_envs, 1), for advantages; None without a critic."""
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
        # The callback at which a saved model can go on as if it had not been interrupted
        self._between_iterations, self._undone = True, None
        callback.on_rollout_start()
        self._between_iterations = False
        self._n_iterations += 1
        self._timesteps_before = self.num_timesteps
        before = self._counters()
        rollout_buffer.reset()
        self._lost_episodes.clear()
        self._begin_rollout()
        if self.use_sde:
            self.policy.reset_noise(env.num_envs)
        assert self._last_obs is not None and self._last_episode_starts is not None, "No previous observation"

        complete = False
        try:
            complete = self._collect_rows(env, callback, rollout_buffer, n_rollout_steps)
            if not complete:
                release(env)
        except KeyboardInterrupt:
            with suppress(Exception):
                release(env)
            raise
        finally:
            if not complete:
                # Envs are somewhere in the middle of a step: the next learn() starts with a reset
                self._last_obs = None
        self._follow_callbacks()
        self._count_all_ranks(before)
        if not ranks.agree(complete):
            return False

        rollout_buffer.finish(self._last_values(), np.asarray(self._last_episode_starts))
        self._end_rollout()

        callback.update_locals(locals())
        callback.on_rollout_end()
        self._follow_callbacks()
        # The update follows, with no callback
        self._between_iterations = True
        return True

    def _check_played(self, infos: list[dict[str, Any]], tags: list[tuple[int, int] | None]) -> None:
        """Observations and labels of a rollout belong to the episodes that the envs were told to play."""
        if not self._episodes.controlled:
            return
        if any(info["episode_tag"] != tag for info, tag in zip(infos, tags, strict=True) if "episode_tag" in info):
            raise RuntimeError(
                "An env plays another episode than it was told to: the training env was used for something else, an "
                "evaluation for instance, in the middle of learn(). Give the evaluation an env of its own."
            )

    def _rescore(self, rows: np.ndarray, batch_size: int) -> None:
        """
        Before the first update, where ``recompute_log_probs`` asks for it: log-probabilities of the rollout's tokens as
        the learner computes them.

        A decision and its gradient go through the policy in batches of other sizes, and an autoregressive policy
        decodes with a cache. In exact arithmetic that changes nothing; in bfloat16 it moves a log-probability by some
        percent, and ratios would not begin at 1.

        :param rows: Rows of the finished buffer
        :param batch_size: How many go through the policy at once when it learns
        """
        asked = self.recompute_log_probs
        if not (getattr(self.policy, "half_precision", False) if asked is None else asked) or not len(rows):
            return
        buffer = self.rollout_buffer
        self.policy.set_training_mode(False)
        differences = []
        with th.no_grad():
            for samples in buffer.get(batch_size, rows=rows):
                tokens = samples.actions.reshape(len(samples.rows), -1)
                view = self._student(samples.observations, samples.actions, self.temperature)
                log_probs = view.log_prob(tokens).cpu().numpy()
                differences.append(np.abs(log_probs - buffer.token_log_probs[samples.rows]).ravel())
                buffer.token_log_probs[samples.rows] = log_probs
        self.policy.set_training_mode(True)
        # Of tokens that were executed
        counted = buffer.token_mask[rows].ravel() > 0
        self.logger.record("train/log_prob_rounding", float(np.concatenate(differences)[counted].mean()))

    def _counters(self) -> np.ndarray:
        return np.array([self.num_timesteps, self.num_env_steps, self._n_finished, self._n_lost])

    def _count_all_ranks(self, before: np.ndarray) -> None:
        """Add what the other ranks have done since the counters stood like this, and what their VecNormalize saw."""
        if ranks.world_size() == 1:
            return
        (added,) = ranks.total(self._counters() - before)
        counters = (before + added.astype(np.int64)).tolist()
        self.num_timesteps, self.num_env_steps, self._n_finished, self._n_lost = counters
        if self._statistics is not None:
            self._statistics.share()

    def _collect_rows(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: TeacherRolloutBuffer, n_rollout_steps: int
    ) -> bool:
        """The loop of :meth:`collect_rollouts`: one row of the buffer after the other."""
        # State-dependent exploration has one noise matrix for each row of a batch of all envs
        pipeline = Pipeline(env, split=not self.use_sde)
        last_part = len(pipeline.parts) - 1
        ahead: list[_Decisions | None] = [None] * len(pipeline.parts)
        n_steps = 0
        while not self._rollout_done(n_steps, n_rollout_steps):
            if self.use_sde and self.sde_sample_freq > 0 and n_steps % self.sde_sample_freq == 0:
                self.policy.reset_noise(env.num_envs)

            row = [
                ahead[part] or self._decide(pipeline, part, obs_rows(self._last_obs, envs))
                for part, envs in enumerate(pipeline.parts)
            ]
            results = []
            for part, decisions in enumerate(row):
                results.append(self._recv(pipeline, part, decisions.standing_still))
                ahead[part] = None
                if part < last_part:
                    obs, _, part_dones, part_infos = results[part]
                    self._episodes_ended(decisions, part_dones, part_infos)
                    # Whether there is a next row is not known if only the others still play
                    plays = not self._episodes.standing_still[decisions.envs].all()
                    if plays and not self._rollout_done(n_steps + 1, n_rollout_steps):
                        ahead[part] = self._decide(pipeline, part, obs)

            new_obs = join_obs([result[0] for result in results])
            rewards, dones = (np.concatenate([result[i] for result in results]) for i in (1, 2))
            infos = [info for result in results for info in result[3]]
            if not np.isfinite(rewards).all():
                self._rewards_not_finite(np.flatnonzero(~np.isfinite(rewards)))
            actions, standing_still, group_ids, episode_ids = (
                np.concatenate([getattr(decisions, name) for decisions in row])
                for name in ("actions", "standing_still", "group_ids", "episode_ids")
            )
            values, token_log_probs = (
                th.cat([getattr(decisions, name) for decisions in row]) for name in ("values", "token_log_probs")
            )
            self._check_played(infos, [tag for decisions in row for tag in decisions.tags])
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
            rewards = self._step_rewards(rewards, dones, infos, values)
            token_mask, success = outcome_of_step(infos, dones, void, token_log_probs.shape[1])
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

    def _recv(self, pipeline: Pipeline, part: int, standing_still: np.ndarray) -> VecEnvStepReturn:
        """The step of a part of the envs. What those that stand still show is no news to a ``VecNormalize``."""
        vec_normalize = self.get_vec_normalize_env()
        if vec_normalize is None or not (vec_normalize.training and standing_still.any()):
            return pipeline.recv(part)
        vec_normalize.training = False
        try:
            obs, rewards, dones, infos = pipeline.recv(part)
        finally:
            vec_normalize.training = True
        if vec_normalize.norm_obs and not standing_still.all():
            seen = obs_rows(vec_normalize.get_original_obs(), np.flatnonzero(~standing_still))
            of_keys = vec_normalize.obs_rms
            for key, rms in of_keys.items() if isinstance(of_keys, dict) else [(None, of_keys)]:
                rms.update(seen if key is None else seen[key])  # type: ignore[call-overload]
            if vec_normalize is self.env:
                obs = vec_normalize.normalize_obs(vec_normalize.get_original_obs())
        return obs, rewards, dones, infos

    def _rewards_not_finite(self, envs: np.ndarray) -> None:
        text = f"{type(self).__name__}: the rewards of envs {envs.tolist()} are NaN or infinite."
        if self.learns_from_rewards:
            raise FloatingPointError(f"{text} Nothing can be learned from them: look into the env's step().")
        warnings.warn(f"{text} They are not learned from, only logged.", stacklevel=2)

    def _decide(self, pipeline: Pipeline, part: int, obs: Any) -> _Decisions:
        """
        Sample actions for some of the envs, and send them off. Those that stand still get zeros, without the policy.

        :param pipeline: The training environment
        :param part: Number of the part of the envs
        :param obs: Their observations
        :return: What was decided
        """
        envs = pipeline.parts[part]
        standing_still = self._episodes.standing_still[envs]
        # With state-dependent exploration each row of the whole batch has its noise matrix
        acting = slice(None) if self.use_sde or not standing_still.any() else np.flatnonzero(~standing_still)
        actions = np.zeros((len(envs), *self.action_space.shape), self.action_space.dtype)  # type: ignore[misc]
        token_log_probs = th.zeros(len(envs), self.rollout_buffer.spec.n_tokens, device=self.device)
        values = th.zeros(len(envs), device=self.device)
        if len(actions[acting]):
            inputs = obs_as_tensor(obs_rows(obs, acting), self.device)
            with th.no_grad(), self._nan_named(inputs):
                tokens, view, sampled = sample_tokens(self.policy, inputs, self.temperature, self.uses_critic)
                token_log_probs[acting], values[acting] = view.log_prob(tokens), sampled.flatten()
            if not bool(th.isfinite(token_log_probs).all()):
                raise self._not_finite("log-probabilities of the policy's actions", inputs)
            actions[acting] = tokens.cpu().numpy().reshape(-1, *actions.shape[1:])
        playing = [self._episodes.playing[index] for index in envs]
        decisions = _Decisions(
            envs,
            actions,
            values,
            token_log_probs,
            labels=self._label_step(envs),
            standing_still=standing_still,
            tags=[self._episodes.tag(int(index)) for index in envs],
            group_ids=np.array([-1 if episode is None else episode.group for episode in playing]),
            episode_ids=self._episodes.numbers[envs],
        )
        pipeline.send(part, env_actions(self.policy, actions))
        return decisions

    def _episodes_ended(self, decisions: _Decisions, dones: np.ndarray, infos: list[dict[str, Any]]) -> None:
        """
        Take note of the episodes that ended with a step of some of the envs.

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
            self._episodes.begun(int(decisions.envs[i]))

    def dump_logs(self, iteration: int = 0) -> None:
        """
        Write log.

        :param iteration: Current logging iteration
        """
        self.logger.record("time/env_steps", self.num_env_steps)
        self.logger.record("time/episodes", self._n_finished)
        if self._n_lost:
            self.logger.record("rollout/episodes_lost", self._n_lost)
        own = self.ep_info_buffer, self.ep_success_buffer
        try:
            # Success and return are those of all ranks
            self.ep_info_buffer, self.ep_success_buffer = (
                deque(item for buffer in ranks.gather(buffer) for item in buffer or ()) for buffer in own
            )
            super().dump_logs(iteration)
        finally:
            self.ep_info_buffer, self.ep_success_buffer = own

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
        with self._joined_after():
            super().learn(
                total_timesteps=self._steps_to_learn(total_timesteps, log_interval),
                callback=callback,
                log_interval=log_interval,
                tb_log_name=type(self).__name__ if tb_log_name is None else tb_log_name,
                reset_num_timesteps=reset_num_timesteps,
                progress_bar=progress_bar,
            )
            self._follow_callbacks()
            # Stable-Baselines3 logs before it trains: the last iteration's training would never be written
            if ranks.largest(len(self.logger.name_to_value)):
                self.dump_logs()
        return self

    def _excluded_save_params(self) -> list[str]:
        # Observations hold images, and the envs' episodes end with the process
        runtime = ["_last_obs", "_last_original_obs", "_last_episode_starts", "_episodes", "_lost_episodes"]
        runtime += ["_statistics", "_undone"]
        return [*super()._excluded_save_params(), *runtime]
