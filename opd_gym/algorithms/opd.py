"""On-policy distillation: the student acts, the teacher scores what it might have done, the student follows."""

from __future__ import annotations

import os
import pathlib
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import GymEnv, PyTorchObs, Schedule
from stable_baselines3.common.vec_env import VecNormalize, unwrap_vec_normalize

from opd_gym import ranks
from opd_gym.algorithms.base import RolloutAlgorithm
from opd_gym.algorithms.buffers import ReplayedStates, StateReplay
from opd_gym.algorithms.common import (
    accumulate_gradients,
    augment,
    check_augmentation,
    has_images,
    policy_kwargs_over,
    zoo_hyperparams,
)
from opd_gym.algorithms.losses import (
    DIVERGENCES,
    DistillationMetrics,
    Divergence,
    exact_opd_loss,
    masked_mean,
    sampled_opd_loss,
    token_divergence,
)
from opd_gym.algorithms.remote_teacher import RemoteTeacher
from opd_gym.algorithms.teacher_inputs import Normalisation, unchanged, warn_of_own_statistics
from opd_gym.algorithms.teacher_trial import try_teacher
from opd_gym.algorithms.teachers import Teacher, check_answer, check_finite, make_teacher
from opd_gym.checkpoints import lasting_name
from opd_gym.checks import check_at_least, check_at_least_one
from opd_gym.observations import join_obs, obs_rows
from opd_gym.tokens import TokenView, is_autoregressive

# Unasked the teacher plays before runs of so many decisions: a shorter one is over sooner than that
TRIED_FROM = 64
# What `state_replay=True` may take of the memory
REPLAY_BYTES = 2**30
# As many replayed states show whether another teacher has labelled them: their labels are then farther from this one's
# than so many nats a token; half precision, in which they are kept, makes less
PROBED_STATES, SAME_TEACHER = 32, 0.05
# What `gradient_steps="auto"` means: minibatches for each decision collected, whatever n_envs and n_steps are
UPDATES_PER_DECISION = 0.25
# What `learning_rate="auto"` means, for observations with and without images. Small networks on numbers begin at random
# weights and want more (benchmarks/gymnasium_envs.py)
LEARNING_RATE_OF_IMAGES, LEARNING_RATE_OF_NUMBERS = 5e-4, 3e-3


class OPD(RolloutAlgorithm):
    """
    On-Policy Distillation (OPD), after VLA-OPD: https://arxiv.org/abs/2603.26666

    Each iteration the student acts for ``n_steps`` decisions in every env, the frozen teacher gives its distribution in
    the states the student visited (its own mistakes included), and the student descends the divergence between the two.
    The environment's reward is not used. Episodes need not be complete, so no env waits for another.

    ``estimator="exact"`` (the default) sums the divergence over all bins, or takes the closed form for Gaussians. It is
    an expectation over states alone, so every state visited so far remains a valid target: they are kept with the
    teacher's labels (``state_replay``), and each iteration takes ``gradient_steps`` minibatches from all of them.

    Tokens of an autoregressive student (OpenVLA) are compared one by one after its own tokens before them, as on-policy
    distillation of language models does (GKD, https://arxiv.org/abs/2306.13649). Such a prefix is part of the state:
    its probability gets no gradient, and replayed states keep the tokens that the student chose there.

    ``estimator="sampled"`` is Eq. 6 and 7 of the paper to the letter: REINFORCE with the token's own log-ratio as
    advantage, one update per rollout, no replay.

    :param policy: The policy model to use (VLAPolicy, MlpPolicy, CnnPolicy, MultiInputPolicy, or a class)
    :param env: The environment to learn from: an id, an env, or a vectorised env
    :param teacher: The directory of a VLA checkpoint, the zip of any model of Stable-Baselines3 or sb3-contrib, a name
        in the zoo, "expert" for the env's scripted expert, or a live policy; None: the teacher that the zoo has for
        this env
    :param learning_rate: The learning rate, it can be a function of the current progress remaining (from 1 to 0);
        "auto": 5e-4 where an observation has images, 3e-3 where it has only numbers
    :param n_steps: Number of decisions of each env per iteration
    :param batch_size: Minibatch size
    :param micro_batch_size: Number of decisions that go through student or teacher at once; gradients are accumulated
        over the parts of a minibatch. None: the whole minibatch
    :param divergence: "reverse_kl" (the paper's), "forward_kl", "hard_ce" (cross-entropy on the teacher's mode) or
        "jsd"
    :param estimator: "exact" or "sampled" ("sampled" estimates the reverse KL only)
    :param group_size: Number of consecutive episodes that start from the same state (where envs can be told). 1 visits
        the most initial states; the paper has 8
    :param state_replay: Whether to keep all states visited so far, or how many at most; True: as many as fit in 1 GiB;
        None: with the exact estimator, and not with the sampled one. Behind a ``VecNormalize`` raw observations are
        kept, and normalised as new ones are
    :param gradient_steps: Minibatches per iteration, with state replay; "auto": one for every four labelled decisions
        of the rollout, and at least one; so the number of updates depends on the decisions alone where a rollout has a
        multiple of four
    :param n_epochs: Passes over the rollout per iteration, with the exact estimator and no state replay
    :param temperature: Temperature of the student's actions while it collects. The sampled estimator compares student
        and teacher at this temperature (the actions must be the policy's own), the exact one at temperature 1
    :param max_grad_norm: The maximum value for the gradient clipping
    :param augmentation: "random_shift" shifts each image of a minibatch by up to 1/16 of its size, "random_shift_batch"
        all images of a minibatch alike (cheaper); None for none
    :param weight_decay: Weight decay of the optimizer, unless ``optimizer_kwargs`` of ``policy_kwargs`` name one
    :param teacher_kwargs: How to read the teacher, see ``opd_gym.algorithms.teachers`` (``temperature`` for Q-values,
        ``std`` for deterministic continuous actions, ``smoothing`` and ``floor`` for labels, ``vec_normalize`` for the
        statistics that it was trained with, ``obs_keys`` for the keys of a Dict observation that it sees,
        ``shard=True`` to spread the weights of a VLA over the GPUs of all ranks).
        ``ray`` puts it on another machine, see :class:`~opd_gym.algorithms.remote_teacher.RemoteTeacher`.
        ``n_eval_episodes`` is how many episodes it plays before training, for a comparison with the student: 5, but
        none in this library's benchmarks and of an expert
    :param teacher_interval: The teacher labels every so-manieth decision of each env, beginning with the first of a
        rollout; nothing is learned from the others. For a teacher that costs more than acting does
    :param stats_window_size: Number of episodes that the reported success rate, length and reward are averaged over
    :param tensorboard_log: The log location for tensorboard (if None, no logging)
    :param policy_kwargs: Additional arguments to be passed to the policy on creation
    :param verbose: 0 for no output, 1 for info messages, 2 for debug messages
    :param seed: Seed for the pseudo random generators
    :param device: Device (cpu, cuda, ...) on which the code should be run
    :param _init_setup_model: Whether or not to build the network at the creation of the instance
    """

    learns_from_rewards = False

    _own_argument = "divergence"
    _fixed_arguments = ("policy", "weight_decay", "estimator")

    @zoo_hyperparams
    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str | None,
        teacher: Any = None,
        learning_rate: float | Schedule | Literal["auto"] = "auto",
        n_steps: int = 32,
        batch_size: int = 128,
        micro_batch_size: int | None = None,
        divergence: Divergence = "reverse_kl",
        estimator: Literal["exact", "sampled"] = "exact",
        group_size: int = 1,
        state_replay: bool | int | None = None,
        gradient_steps: int | Literal["auto"] = "auto",
        n_epochs: int = 2,
        temperature: float = 1.0,
        max_grad_norm: float = 1.0,
        augmentation: Literal["random_shift", "random_shift_batch"] | None = None,
        weight_decay: float = 1e-4,
        teacher_kwargs: dict[str, Any] | None = None,
        teacher_interval: int = 1,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
    ):
        self.teacher = teacher
        self.teacher_kwargs = teacher_kwargs or {}
        self.teacher_interval = teacher_interval
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.divergence = divergence
        self.estimator = estimator
        self.state_replay = estimator == "exact" if state_replay is None else state_replay
        self.gradient_steps = gradient_steps
        self.n_epochs = n_epochs
        self.augmentation = augmentation
        self._check_settings()
        self.replay_buffer: StateReplay | None = None
        # Observations of the rollout before a VecNormalize, one of each step
        self._raw_obs: list[Any] = []
        self._teacher: Teacher | None = None
        # A zip does not hold a live teacher, and no other is to take its place unasked
        self._live_teacher = False
        self._n_eval_episodes: int | None = None
        self._teacher_seconds = 0.0
        # States that were added to the replay so far: a saved model says which of those beside it are its own
        self._n_states = 0
        self._replay_identity: str | None = None
        super().__init__(
            policy,
            env,
            learning_rate=learning_rate,  # type: ignore[arg-type]
            n_steps=n_steps,
            max_grad_norm=max_grad_norm,
            temperature=temperature,
            group_size=group_size,
            rollout_buffer_kwargs={"store_distribution": estimator == "exact"},
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs_over({"optimizer_class": th.optim.AdamW}, policy_kwargs, weight_decay),
            verbose=verbose,
            seed=seed,
            device=device,
            _init_setup_model=False,
        )
        if _init_setup_model:
            self._setup_model()
            self._setup_teacher()

    def _check_settings(self) -> None:
        super()._check_settings()
        if self.divergence not in DIVERGENCES:
            raise ValueError(f"Expected divergence to be one of {DIVERGENCES}, got {self.divergence!r}.")
        if self.estimator not in ("exact", "sampled"):
            raise ValueError(f'Expected estimator to be "exact" or "sampled", got {self.estimator!r}.')
        check_augmentation(self.augmentation)
        if self.gradient_steps != "auto":
            if self.gradient_steps is None or isinstance(self.gradient_steps, str):
                raise ValueError(f'Expected gradient_steps to be a number or "auto", got {self.gradient_steps!r}.')
            check_at_least_one(gradient_steps=self.gradient_steps)
        if not isinstance(self.state_replay, bool):
            check_at_least(0, state_replay=self.state_replay)
        if self.estimator == "exact":
            return
        if self.divergence != "reverse_kl":
            raise ValueError(
                f'estimator="sampled" scores the student\'s own samples, which estimates the reverse KL; got '
                f'divergence={self.divergence!r}. Use estimator="exact" for it.'
            )
        if self.state_replay:
            raise ValueError(
                'estimator="sampled" is on-policy: old states come with actions of an old student. Use '
                'state_replay=False, or estimator="exact".'
            )
        if self.augmentation is not None:
            raise ValueError('estimator="sampled" scores the observations that were acted on: use augmentation=None.')

    def _setup_model(self) -> None:
        self._check_env_given()
        if self.learning_rate == "auto":
            images = has_images(self.observation_space)
            self.learning_rate = LEARNING_RATE_OF_IMAGES if images else LEARNING_RATE_OF_NUMBERS
        super()._setup_model()
        self.replay_buffer = self._new_replay() if self.state_replay else None

    def _new_replay(self) -> StateReplay:
        spec = self.token_spec
        # A prefix of an autoregressive student belongs to the state
        prefixes = is_autoregressive(self.policy)
        capacity = int(self.state_replay)
        normalises = self._outer_vec_normalize()
        space = self.observation_space if normalises is None else normalises.venv.observation_space
        if self.state_replay is True:
            capacity = max(REPLAY_BYTES // StateReplay.bytes_per_state(space, spec, prefixes), 1)
        return StateReplay(capacity, space, spec, self.device, prefixes, raw=normalises is not None)

    def _outer_vec_normalize(self) -> VecNormalize | None:
        """What normalises the student's observations; None also where another wrapper changes them after it."""
        found = self.env if isinstance(self.env, VecNormalize) else None
        return found if found is not None and found.norm_obs else None

    def _setup_teacher(self) -> None:
        """Resolve the teacher's specification; a loaded model needs it only when it goes on learning."""
        assert self.env is not None
        if self.teacher is None and self._live_teacher:
            raise ValueError(
                f"This {type(self).__name__} was saved with a live teacher, which the file does not hold. Pass it "
                f"again, {type(self).__name__}.load(path, env=env, teacher=...), or the name of another one."
            )
        if self.teacher is not None:
            # Again, because load() may have brought another one
            self._live_teacher = not isinstance(self.teacher, (str, os.PathLike))
            if not self._live_teacher and self.teacher != "expert":
                self.teacher = lasting_name(self.teacher)  # type: ignore[arg-type]
        if self.teacher is self.policy:
            raise ValueError("The teacher is the student's own policy: there is nothing to distil. Give a frozen copy.")
        kwargs = dict(self.teacher_kwargs or {})
        self._n_eval_episodes = kwargs.pop("n_eval_episodes", None)
        check_at_least(0, n_eval_episodes=self._n_eval_episodes)
        remote = kwargs.get("ray") is not None
        if not remote:
            kwargs.pop("ray", None)
        if kwargs.get("shard"):
            if remote:
                raise ValueError("A teacher on another machine is whole: teacher_kwargs take shard or ray, not both.")
            if ranks.world_size() > 1:
                if self._n_eval_episodes:
                    raise ValueError(
                        'With teacher_kwargs={"shard": True} no rank has the whole teacher, so that it cannot play '
                        f"alone before the training: leave out n_eval_episodes={self._n_eval_episodes}."
                    )
                self._n_eval_episodes = 0
        warn_of_own_statistics(self.env)
        make = RemoteTeacher if remote else make_teacher
        self._teacher = make(self.teacher, self.env, self.policy, **kwargs)
        self.rollout_buffer.label_size = self._teacher.label_size or self.rollout_buffer.spec.n_tokens
        if self.verbose >= 1 and self._teacher.sees:
            print(f"The teacher sees {self._teacher.sees}.")

    def set_env(self, env: GymEnv | str, force_reset: bool = True) -> None:
        """
        Set the environment to go on with. The teacher is set up again: what it sees depends on the env.

        :param env: The environment; an id or a raw env is wrapped as in the constructor
        :param force_reset: Force a reset before training
        :raises ValueError: The teacher does not fit the env
        """
        super().set_env(env, force_reset)
        if self._teacher is not None:
            self._teacher = None
            self._setup_teacher()

    def _setup_learn(self, *args: Any, **kwargs: Any) -> tuple[int, BaseCallback]:
        if self._teacher is None and self.env is not None:
            self._setup_teacher()
        theirs = getattr(self._teacher, "policy", None)
        if isinstance(theirs, th.nn.Module) and not {*map(id, theirs.parameters())}.isdisjoint(
            map(id, self.policy.parameters())
        ):
            raise ValueError("The teacher and the student share weights, which would train both. Give a frozen copy.")
        self._teacher_seconds = 0.0
        results = {}
        # Between episodes, and before the student has learnt of it
        fresh = self._n_updates == 0 and self._last_obs is None and ranks.is_main()
        if fresh and self._teacher is not None and self.env is not None:
            n_episodes = self._n_eval_episodes
            if n_episodes is None and kwargs.get("total_timesteps", args[0] if args else TRIED_FROM) < TRIED_FROM:
                n_episodes = 0
            results = try_teacher(self._teacher, self.env, self.policy, n_episodes, self.verbose)
        learning = super()._setup_learn(*args, **kwargs)
        if self._teacher is not None and self._teacher.sharded:
            self._teacher.shard(self.device)
        self._label_replay_anew()
        for name, value in results.items():
            self.logger.record(f"teacher/{name}", value)
        return learning

    def _label_replay_anew(self) -> None:
        """
        Replayed states that another teacher has labelled (before ``load(teacher=...)``, for instance) get this one's
        labels, where it can be asked without the simulator.
        """
        replay, teacher = self.replay_buffer, self._teacher
        if replay is None or teacher is None or not replay.size or teacher.privileged or teacher.sharded:
            return
        probed = np.unique(np.linspace(0, replay.size - 1, PROBED_STATES).astype(int))
        states = replay.states(probed)
        asked = th.cat([flat.to(self.device) for _, flat in self._labels_of_replay(probed)])
        now, before = map(self.token_spec.from_flat, (asked, states.distributions))
        if float(masked_mean(token_divergence(now, before), states.masks)) < SAME_TEACHER:
            return
        warnings.warn(
            f"The {replay.size} states to replay were labelled by another teacher. This one labels them anew.",
            stacklevel=2,
        )
        for rows, flat in self._labels_of_replay(np.arange(replay.size)):
            replay.distributions[rows] = flat.cpu().numpy()

    def _labels_of_replay(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, th.Tensor]]:
        """Some replayed states, so many at a time as the memory is for, and what the teacher says of them."""
        assert self._teacher is not None and self.replay_buffer is not None
        size = self.micro_batch_size or self.batch_size
        for part in np.split(rows, range(size, len(rows), size)):
            states = self.replay_buffer.states(part)
            labels = th.full((len(part), self.rollout_buffer.label_size), th.nan, device=self.device)
            view = self._teacher.ask(states.observations, labels, states.actions)()
            check_finite(view)
            check_answer(view, self.token_spec, len(part))
            yield part, view.flatten()

    # ------------------------------------------------------------------------------------------------------ rollout

    def _begin_rollout(self) -> None:
        super()._begin_rollout()
        # One half of the envs may be a row ahead of the other
        self._next_row = np.zeros(self.n_envs, dtype=np.int64)
        self._raw_obs = []
        replay = self.replay_buffer
        if replay is None:
            return
        if replay.raw != (self._outer_vec_normalize() is not None):
            if replay.size:
                was, now = ("with", "none") if replay.raw else ("without", "one")
                warnings.warn(
                    f"The {replay.size} states to replay are forgotten: they were seen {was} a VecNormalize, and the "
                    f"env has {now} now.",
                    stacklevel=2,
                )
            self.replay_buffer = self._new_replay()
        inner = None if self.env is None or replay.raw else unwrap_vec_normalize(self.env)
        if inner is not None and inner is not self.env and inner.norm_obs and inner.training:
            warnings.warn(
                "Replayed states keep the normalisation that they were seen with, while that of new ones moves: "
                "another wrapper lies around the VecNormalize. Make it the outermost one, or pass state_replay=False.",
                stacklevel=2,
            )

    def _label_step(self, envs: np.ndarray) -> np.ndarray | None:
        assert self._teacher is not None and self.env is not None
        if self.replay_buffer is not None and self.replay_buffer.raw:
            # Behind a VecNormalize all envs act at once
            self._raw_obs.append(self.env.get_original_obs())  # type: ignore[attr-defined]
        row = self._next_row[envs[0]]
        self._next_row[envs] += 1
        if not self._teacher.privileged or row % self.teacher_interval:
            return None
        # All envs simulate ahead at once: a vectorised env sends to all of them before it waits for the first
        with self._teacher_timed():
            return self._teacher.label(self.env, envs)

    def _end_rollout(self) -> None:
        """The teacher labels the states of the rollout, in large batches."""
        buffer = self.rollout_buffer
        # Rows are flattened env by env
        buffer.token_mask[np.arange(len(buffer.token_mask)) % buffer.buffer_size % self.teacher_interval != 0] = 0.0
        with self._teacher_timed():
            self._label_rollout()
        if self.replay_buffer is not None:
            rows = buffer.valid_rows()
            if self.replay_buffer.raw:
                envs, steps = rows // buffer.buffer_size, rows % buffer.buffer_size
                observations = obs_rows(join_obs(self._raw_obs), steps * self.n_envs + envs)
                self._raw_obs = []
            else:
                observations = obs_rows(buffer.observations, rows)
            self.replay_buffer.add(
                observations, buffer.teacher_distributions[rows], buffer.token_mask[rows], buffer.actions[rows]
            )
            self._n_states, self._replay_identity = self.replay_buffer.n_added, self.replay_buffer.identity

    def _label_rollout(self) -> None:
        assert self._teacher is not None
        buffer = self.rollout_buffer
        asked: deque[tuple[np.ndarray, th.Tensor, Callable[[], TokenView]]] = deque()

        def take_note() -> None:
            rows, tokens, answer = asked.popleft()
            teacher = answer()
            check_finite(teacher)
            check_answer(teacher, self.token_spec, len(rows))
            if self.estimator == "sampled" and self.temperature != 1.0:
                teacher = teacher.temper(self.temperature)
            buffer.set_teacher(rows, teacher.log_prob(tokens), teacher.flatten() if buffer.store_distribution else None)

        for samples in buffer.get(self.micro_batch_size or self.batch_size, rows=buffer.valid_rows()):
            labels = th.as_tensor(buffer.teacher_actions[samples.rows], device=self.device)
            tokens = samples.actions.reshape(len(samples.rows), -1)
            asked.append((samples.rows, tokens, self._teacher.ask(samples.observations, labels, tokens)))
            if len(asked) > self._teacher.asked_ahead:
                take_note()
        while asked:
            take_note()
        if self._teacher.sharded:
            self._teacher.keep_pace()

    @contextmanager
    def _teacher_timed(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._teacher_seconds += time.perf_counter() - started

    def dump_logs(self, iteration: int = 0) -> None:
        """
        Write log.

        :param iteration: Current logging iteration
        """
        self.logger.record("time/teacher_seconds", round(self._teacher_seconds, 1), exclude="tensorboard")
        super().dump_logs(iteration)

    # ------------------------------------------------------------------------------------------------------ training

    def train(self) -> None:
        """
        Update policy using the currently gathered rollout buffer (and the replayed states).
        """
        self.policy.set_training_mode(True)
        # An update that was interrupted, or refused, has left its gradients
        self.policy.optimizer.zero_grad()
        self._update_learning_rate(self.policy.optimizer)
        if not ranks.largest(len(self.rollout_buffer.valid_rows())):
            # All its episodes were lost
            return
        if self.estimator == "sampled":
            metrics, grad_norms = self._train_sampled()
        else:
            metrics, grad_norms = self._train_exact()
        self._record_metrics(metrics)
        self.logger.record("train/grad_norm", float(np.mean(grad_norms)))
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        if self.replay_buffer is not None:
            self.logger.record("train/replayed_states", self.replay_buffer.size)

    def _train_exact(self) -> tuple[list[DistillationMetrics], list[float]]:
        """Descend the divergence of the two distributions, on replayed states or on those of this rollout."""
        metrics, grad_norms = [], []
        for states in self._exact_batches():
            if states is None:
                grad_norms.append(self._idle_step())
                continue
            metrics.append(self._descend(*states))
            grad_norms.append(self._gradient_step())
        return metrics, grad_norms

    def _descend(
        self, observations: PyTorchObs, distributions: th.Tensor, mask: th.Tensor, actions: th.Tensor | None
    ) -> DistillationMetrics:
        """Gradients of the divergence on a minibatch of states."""
        observations = augment(observations, self.observation_space, self.augmentation)

        def loss_of(rows: slice) -> tuple[th.Tensor, DistillationMetrics]:
            student = self._student(obs_rows(observations, rows), None if actions is None else actions[rows])
            return exact_opd_loss(student, self.token_spec.from_flat(distributions[rows]), mask[rows], self.divergence)

        return accumulate_gradients(mask, self.micro_batch_size, loss_of)

    def _exact_batches(self) -> Iterator[ReplayedStates | None]:
        """Minibatches of this rank; None where only others have one."""
        n_rows = len(self.rollout_buffer.valid_rows())
        if self.replay_buffer is not None:
            if self.gradient_steps == "auto":
                (of_all_ranks,) = ranks.total(n_rows)
                steps = max(round(UPDATES_PER_DECISION * of_all_ranks / ranks.world_size()), 1)
            else:
                steps = self.gradient_steps
            normalises = self._outer_vec_normalize()
            normalise: Callable[[Any], Any] = unchanged
            if normalises is not None and self.replay_buffer.raw:
                normalise = Normalisation(normalises, normalises.venv.observation_space)
            for _ in range(steps):
                states = self.replay_buffer.sample(self.batch_size) if self.replay_buffer.size else None
                yield states and states._replace(observations=normalise(states.observations))
        else:
            for _ in range(self.n_epochs):
                for samples in ranks.in_step(self.rollout_buffer.get(self.batch_size), -(-n_rows // self.batch_size)):
                    yield samples and ReplayedStates(
                        samples.observations, samples.teacher_distribution, samples.token_mask, samples.actions
                    )

    def _train_sampled(self) -> tuple[list[DistillationMetrics], list[float]]:
        """One update (Algorithm 1 of the paper), its gradient accumulated over minibatches."""
        buffer = self.rollout_buffer
        (n_trajectories,) = ranks.total(len(np.unique(buffer.episode_ids[buffer.valid_rows()])))
        metrics: list[DistillationMetrics] = []
        for samples in buffer.get(self.micro_batch_size or self.batch_size):
            student = self._student(samples.observations, samples.actions, self.temperature)
            log_probs = student.log_prob(samples.actions.reshape(len(samples.rows), -1))
            loss, batch_metrics = sampled_opd_loss(
                log_probs,
                samples.teacher_log_probs,
                samples.token_mask,
                n_trajectories,
                student.detach().temper(1.0 / self.temperature).entropy(),
            )
            loss.backward()
            metrics.append(batch_metrics)
        # Minibatches add up to the loss of the rollout
        total_loss = sum(m.loss for m in metrics)
        return [replace(m, loss=total_loss) for m in metrics], [self._gradient_step()]

    # ------------------------------------------------------------------------------------------------------ saving

    def _excluded_save_params(self) -> list[str]:
        # A live teacher would be pickled with all its weights; a specification (a string) is saved
        live = [] if self.teacher is None or isinstance(self.teacher, (str, os.PathLike)) else ["teacher"]
        return [*super()._excluded_save_params(), "_teacher", "_raw_obs", *live]

    def save_replay_buffer(self, path: str | os.PathLike[str]) -> None:
        """
        Save the states visited so far, which ``save()`` leaves out; of several ranks those of the first one.

        :param path: File to write, whose name ends with ``.npz``, or a folder: states that are there already are not
            written again
        """
        if self.replay_buffer is None:
            raise ValueError("This model keeps no states: it was made with state_replay=False.")
        path = pathlib.Path(path)
        if not ranks.is_main():
            return
        if path.suffix == ".npz":
            self.replay_buffer.save(path)
        else:
            self.replay_buffer.save_to(path)

    def load_replay_buffer(self, path: str | os.PathLike[str], truncate_last_traj: bool = True) -> None:
        """
        Add the states of a file that :meth:`save_replay_buffer` wrote, or take over those of a folder, in place of what
        is replayed so far.

        :param path: File or folder to read. Of its own folder a model takes the states that it had when it was saved;
            its next ``save_replay_buffer()`` goes on with the folder and removes later ones. Of another model's folder
            it takes all, and saves them elsewhere. What is missing or damaged is named in a warning
        :param truncate_last_traj: Of Stable-Baselines3, which rl-zoo3 passes; states are kept one by one
        """
        del truncate_last_traj
        if self.replay_buffer is None:
            raise ValueError("This model keeps no states: make it with state_replay=True.")
        path = pathlib.Path(path)
        if not path.is_dir():
            self.replay_buffer.load(path)
        else:
            for missing in self.replay_buffer.load_from(path, self._n_states, self._replay_identity):
                warnings.warn(missing, stacklevel=2)
        self._n_states, self._replay_identity = self.replay_buffer.n_added, self.replay_buffer.identity
