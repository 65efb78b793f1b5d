"""Vision-language-action policies: pictures, instruction and proprioception in, one distribution per token out."""

from __future__ import annotations

import copy
import inspect
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import nn

from opd_gym import ranks
from opd_gym.checkpoints import PENDING, lasting_name, resolve_checkpoint
from opd_gym.files import sync, temporary_beside
from opd_gym.policies.adapters import (
    DTYPES,
    TrainedState,
    add_lora,
    check_dtype,
    check_lora,
    enable_gradient_checkpointing,
    merged,
)
from opd_gym.policies.body import (
    WEIGHTS_FILE,
    VLAConfig,
    VLAOutput,
    channels_first,
    check_own_checkpoint,
    check_weight,
    finish_save,
    get_body_class,
    read_checkpoint_config,
    token_space,
)
from opd_gym.policies.optimizer import fused_by_default
from opd_gym.policies.sharding import Sharding
from opd_gym.tokens import TokenDistribution, token_view


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    # Late: what is missing without transformers is said by opd_gym.policies.body
    from transformers.utils import logging as transformers_logging

    # Those of transformers would tear the progress bar of `learn`.
    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()


class VLAPolicy(ActorCriticPolicy):
    """
    Actor-critic policy around a vision-language-action model with discrete action tokens.

    It takes raw observations (uint8 pictures, instruction bytes, proprioception), so none of Stable-Baselines3's
    preprocessing and feature extractors is used. All tokens of a decision are predicted in parallel, or, if the body is
    autoregressive, one after the other; then distributions are those of given actions.

    :param observation_space: flat Dict: uint8 pictures, ``instruction`` (bytes) and, optionally, ``proprio``
    :param action_space: ``MultiDiscrete([n_bins] * n_tokens)``, as ``ActionTokens`` makes it
    :param lr_schedule: learning rate schedule
    :param body: name of a registered body (see :func:`register_body`); a checkpoint names its own
    :param body_kwargs: configuration of a new body; a checkpoint brings its own
    :param checkpoint: what to start from: a directory that :meth:`save_checkpoint` wrote, a published OpenVLA
        checkpoint, a name of the zoo or of the Hugging Face hub, see ``opd_gym.checkpoints.resolve_checkpoint``. In the
        ``policy_kwargs`` of an algorithm also a zip or a run, which holds more than a policy
    :param temperature: not taken: the algorithm has a temperature
    :param value_head: learn a value function on the body's summary; without it values are zero
    :param lora: True, or arguments of ``peft.LoraConfig`` such as ``dict(r=32)``: freeze the body and train low-rank
        adapters of its linear layers. The base is a checkpoint that stays where it is: ``save()`` stores the adapters
        and a reference to it
    :param gradient_checkpointing: compute each layer a second time in the backward pass instead of storing its insides
    :param dtype: "bfloat16" or "float32": type in which the body computes and of the weights that are not trained;
        those that are trained are float32
    :param trainable: False for a policy that only acts or teaches: no weight is trained, and there is no optimizer
    :param shard: in a training with several ranks, spread the weights, their gradients and the optimizer's state over
        the GPUs of all ranks while it learns, see :class:`opd_gym.policies.sharding.Sharding`. Before and after, and
        with one process, it changes nothing. Not with ``lora``
    :param optimizer_class: the optimizer
    :param optimizer_kwargs: keyword arguments of the optimizer, other than the learning rate
    :param base_model: what it started from, of a saved policy that no longer needs it; see :attr:`base_model`
    :param sb3_kwargs: other arguments of ``ActorCriticPolicy``; those about feature extractors and MLPs have no effect
    """

    # The action space must consist of tokens: whoever builds an env for this policy adds ActionTokens.
    requires_tokens: ClassVar[bool] = True

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        lr_schedule: Schedule,
        body: str = "tiny",
        body_kwargs: dict[str, Any] | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        temperature: float = 1.0,
        value_head: bool = False,
        lora: bool | Mapping[str, Any] | None = None,
        gradient_checkpointing: bool = False,
        dtype: str | th.dtype = "float32",
        trainable: bool = True,
        shard: bool = False,
        optimizer_class: type[th.optim.Optimizer] = th.optim.AdamW,
        optimizer_kwargs: dict[str, Any] | None = None,
        base_model: str | None = None,
        **sb3_kwargs: Any,
    ):
        token_space(action_space)
        if temperature != 1.0:
            # Models saved by version 0.1 pass a 1
            raise ValueError(
                f"A policy has no temperature of its own any more, got {temperature}. Pass temperature= to the "
                "algorithm; for greedy actions, deterministic=True to predict()."
            )
        if sb3_kwargs.pop("use_sde", False):
            raise ValueError("State-dependent exploration (use_sde) is for continuous actions; VLAPolicy has tokens.")
        self._lora = check_lora(lora)
        self._gradient_checkpointing = bool(gradient_checkpointing)
        self._dtype = check_dtype(dtype)
        self._trainable = bool(trainable)
        if not isinstance(shard, bool):
            raise ValueError(f"shard must be True or False, got {shard!r}.")
        if shard and self._lora is not None:
            raise ValueError(
                "shard=True spreads gradients and the optimizer's state over several GPUs, of which LoRA has hardly "
                "any, and to act each GPU has the whole weights in any case: leave out one of shard and lora."
            )
        self._shard = shard
        #: What spreads the weights over all ranks, while it does
        self.sharding: Sharding | None = None
        self._trained_state: TrainedState | None = None
        self._checkpoint: Path | None = None
        self._reference = checkpoint
        self._base_model = base_model
        if checkpoint is not None:
            try:
                directory = resolve_checkpoint(checkpoint)
            except FileNotFoundError:
                if body_kwargs is None:
                    raise
                directory = None
            if directory is None and body_kwargs is not None and self._lora is not None:
                raise FileNotFoundError(
                    f"The base checkpoint of these LoRA adapters is gone: {checkpoint}. Put it back there, or load "
                    'with custom_objects={"policy_kwargs": {...}} and its new place as "checkpoint".'
                )
            if directory is not None and directory.is_file():
                raise ValueError(
                    f"{directory} holds a whole policy: pass it in the policy_kwargs of an algorithm, or use "
                    "opd_gym.policies.loading.load_policy()."
                )
            if directory is not None:
                self._checkpoint = directory
                body, self._config = read_checkpoint_config(self._checkpoint)
            else:
                # A saved algorithm brings its weights along and must load where the original checkpoint is gone.
                warnings.warn(f"{checkpoint} does not exist: the body starts from random weights.", stacklevel=2)
        if self._checkpoint is None:
            config_class = get_body_class(body).config_class
            self._config = config_class.from_spaces(observation_space, action_space, **(body_kwargs or {}))
        try:
            self._config.check_spaces(observation_space, action_space)
        except ValueError as error:
            if self._checkpoint is None:
                raise
            raise ValueError(f"{self._checkpoint}: {error}") from error
        if self._lora is not None and self._base_directory() is None:
            raise ValueError(
                "LoRA adapts pretrained weights: pass checkpoint=... (or train all weights of a new body: lora=None)."
            )
        self._body_name = body
        self._has_value_head = bool(value_head)
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            optimizer_class=optimizer_class,
            optimizer_kwargs=fused_by_default(optimizer_class, optimizer_kwargs),
            **sb3_kwargs,
        )

    def _build(self, lr_schedule: Schedule) -> None:
        """
        Create the body, the value head and the optimizer.

        :param lr_schedule: learning rate schedule
        """
        body_class = get_body_class(self._body_name)
        # Weights may be stored in half precision; they are trained in single.
        frozen = self._lora is not None or not self._trainable
        dtype = DTYPES[self._dtype] if frozen else th.float32
        if self._checkpoint is not None:
            if not (self._checkpoint / WEIGHTS_FILE).is_file() and not list(self._checkpoint.glob("[!.]*.safetensors")):
                raise FileNotFoundError(f"{self._checkpoint} has no {WEIGHTS_FILE}: the checkpoint is incomplete.")
            with _no_progress_bars():
                self.body = body_class.from_pretrained(
                    self._checkpoint, config=self._config, local_files_only=True, dtype=dtype
                )
        else:
            with _no_progress_bars():
                self.body = body_class.create(self._config, dtype)
        if self._lora is not None:
            add_lora(self.body, self._lora)
        if self._gradient_checkpointing:
            enable_gradient_checkpointing(self.body)
        self.value_net: nn.Linear | None = None  # type: ignore[assignment]
        if self._has_value_head:
            self.value_net = nn.Linear(self._config.hidden_size, 1)
            # Values start at zero: the first advantages are those of a policy without a critic.
            nn.init.zeros_(self.value_net.weight)
            nn.init.zeros_(self.value_net.bias)
        trained = {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}
        base = self._base_directory()
        if self._lora is not None and base is not None:
            self._trained_state = TrainedState(trained, base)
        if self._trainable:
            self.optimizer = self.optimizer_class(trained.values(), lr=lr_schedule(1), **self.optimizer_kwargs)  # type: ignore[call-arg]
        else:
            self.requires_grad_(False)
            self.optimizer = None  # type: ignore[assignment]

    def _base_directory(self) -> Path | None:
        # Where the weights are that this policy starts from
        return self._checkpoint or self._config.base_directory

    def shard_weights(self, device: th.device, force: bool = False) -> None:
        """
        With ``shard=True`` and several ranks: keep a part of the weights from here on. All ranks call it together.

        :param device: where this rank's part goes
        :param force: also without ``shard=True``
        """
        if (self._shard or force) and ranks.world_size() > 1:
            self.sharding = Sharding(self, device)
            if self.sharding.trained:
                self.sharding.gather()

    def join_weights(self) -> None:
        """After a training: each rank has the whole policy again. All ranks call it together."""
        if self.sharding is not None:
            self.sharding.end()
            self.sharding = None

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        """Inside, the policy and its optimizer have their whole state, see :meth:`Sharding.whole`."""
        sharding, self.sharding = self.sharding, None
        try:
            with nullcontext() if sharding is None else sharding.whole():
                yield
        finally:
            self.sharding = sharding

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The state; of a policy with LoRA what it has trained, and which checkpoint the rest is in."""
        with self.whole_weights():
            state = super().state_dict(*args, **kwargs)
        return state if self._trained_state is None else self._trained_state.extract(state)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """
        :param state_dict: what :meth:`state_dict` gave
        :param strict: whether a missing or unknown key is an error
        :param assign: see ``torch.nn.Module.load_state_dict``
        :raises ValueError: a tensor is missing, unexpected, of another shape, not of floating point or not finite
        :raises RuntimeError: the weights are in parts on all ranks
        """
        if self.sharding is not None:
            raise RuntimeError("While it learns, a model with shard=True can load no weights: each rank has a part.")
        trained = dict(self.named_parameters())
        for name in trained.keys() & state_dict.keys():
            check_weight("The saved policy", name, state_dict[name])
        if self._trained_state is not None:
            state_dict = self._trained_state.complete(state_dict, super().state_dict())
        try:
            return super().load_state_dict(state_dict, strict, assign)
        except RuntimeError as error:
            raise ValueError(f"The saved weights are not those of this policy: {error}") from error

    @property
    def config(self) -> VLAConfig:
        """Configuration of the body: bins, tokens, cameras, statistics."""
        return self._config

    @property
    def statistics(self) -> dict[str, Any] | None:
        """Un-normalisation statistics of the action tokens, None if the bins cover the env's own [-1, 1]."""
        return self._config.statistics

    @property
    def lora(self) -> dict[str, Any] | None:
        """Arguments of the LoRA adapters; None if there are none."""
        return self._lora

    @property
    def base_model(self) -> str | None:
        """Directory or name of what this policy started from, as far as it is known; None for random weights."""
        known = (self._reference, self._base_model, self._config.pretrained_model)
        reference = next((name for name in known if name is not None), None)
        return None if reference is None else os.fspath(reference)

    def portable_kwargs(self) -> dict[str, Any]:
        """
        Keyword arguments that rebuild this policy: with random weights and without its original checkpoint or, with
        LoRA, from the checkpoint that it adapts.

        :return: for ``policy_kwargs`` of an algorithm that is to be saved
        """
        return dict(
            body=self._body_name,
            body_kwargs=self._body_kwargs(),
            checkpoint=None if self._lora is None else self._portable_reference(),
            value_head=self._has_value_head,
            lora=self._lora,
            gradient_checkpointing=self._gradient_checkpointing,
            dtype=self._dtype,
            trainable=self._trainable,
            shard=self._shard,
            optimizer_class=self.optimizer_class,
            optimizer_kwargs=dict(self.optimizer_kwargs),
            base_model=None if self.base_model is None else lasting_name(self.base_model),
        )

    def _portable_reference(self) -> str | None:
        return None if self._reference is None else lasting_name(self._reference)

    def _body_kwargs(self) -> dict[str, Any]:
        # What the configuration's classes take, without what transformers adds for itself.
        accepted: set[str] = set()
        for config_class in type(self._config).__mro__:
            if issubclass(config_class, VLAConfig):
                accepted.update(inspect.signature(config_class.__init__).parameters)
        values = {key: value for key, value in self._config.to_dict().items() if key in accepted}
        return values if self._lora is not None else self._config.without_base(values)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return dict(
            observation_space=self.observation_space,
            action_space=self.action_space,
            lr_schedule=self._dummy_schedule,
            **self.portable_kwargs(),
        )

    def save_checkpoint(
        self, directory: str | os.PathLike[str], dtype: th.dtype | None = None, merge: bool = True
    ) -> None:
        """
        Write ``config.json`` and ``model.safetensors``. Files that are not of a checkpoint stay as they are. Whenever
        it is killed, the old checkpoint or the new one is read from there, and never a part of each. Of several ranks
        the first one alone writes.

        :param directory: created if needed; ``VLAPolicy(..., checkpoint=directory)`` reads it
        :param dtype: type in which the weights are stored, for instance ``torch.float16``; None for their own
        :param merge: add LoRA adapters to the weights that they adapt
        :raises ValueError: there are adapters, and they are not to be merged: a plain checkpoint has no place for them;
            the directory holds another model; a weight is beyond what ``dtype`` can hold
        """
        if self._lora is not None and not merge:
            raise ValueError(
                "A checkpoint has no place for LoRA adapters: merge=True adds them to the weights; save() stores them "
                "apart, with a reference to the checkpoint that they adapt."
            )
        if not ranks.is_main():
            return
        directory = Path(directory).expanduser()
        directory.mkdir(parents=True, exist_ok=True)
        finish_save(directory)  # one that was killed
        check_own_checkpoint(directory)
        temporary = temporary_beside(directory / PENDING)
        try:
            with _no_progress_bars(), self.whole_weights(), merged(self.body) as body:
                if dtype is not None:
                    body = copy.deepcopy(body).to(dtype=dtype)  # type: ignore[call-arg,arg-type]
                    for name, value in body.state_dict().items():
                        if value.is_floating_point():
                            check_weight(f"In {dtype} the checkpoint is not the same", name, value)
                body.save_pretrained(temporary)
            for path in temporary.iterdir():
                path.chmod(0o644)  # safetensors writes files that only their owner can read
                sync(path)
            sync(temporary)
            # From here on the new checkpoint is the one that is read
            os.replace(temporary, directory / PENDING)
            finish_save(directory)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def keep_pace(self, critic: bool = False) -> None:
        """
        After the passes of a minibatch: with sharded weights all ranks go through the policy together, so one that has
        fewer passes to make does it for nothing as often as another one still does.

        :param critic: whether the losses of the others depend on the values
        """
        passes = self.sharding is not None
        while passes and self.sharding is not None:
            with self.sharding.others_pass() as passes:
                if passes:
                    self._pass_for_nothing(critic)

    def _pass_for_nothing(self, critic: bool) -> None:
        assert isinstance(self.observation_space, spaces.Dict)
        zeros = {key: np.zeros((1, *(box.shape or ())), box.dtype) for key, box in self.observation_space.items()}
        observation = {key: th.as_tensor(value, device=self.device) for key, value in zeros.items()}
        actions = th.zeros(1, self._config.n_tokens, dtype=th.long, device=self.device)
        distribution, values = self.distribution_and_values(observation, actions)
        if th.is_grad_enabled():
            outputs = distribution.logits.sum() + (values.sum() if critic else 0.0)
            (0.0 * outputs).backward()

    def body_inputs(self, obs: PyTorchObs) -> dict[str, Any]:
        """
        Raw observation to the arguments of the body.

        :param obs: dict of tensors as they come from the env, pictures (B, H, W, 3) or (B, 3, H, W)
        :return: ``images``, ``instruction``, ``proprio``
        """
        assert isinstance(obs, Mapping) and isinstance(self.observation_space, spaces.Dict)
        images = {}
        for key in self._config.image_keys:
            image = obs[key]
            # A view: the strides of a transposed HWC picture are what "channels last" convolutions want.
            images[key] = image if channels_first(self.observation_space[key]) else image.permute(0, 3, 1, 2)
        proprio = obs["proprio"].float().flatten(1) if self._config.proprio_dim else None
        return {"images": images, "instruction": obs["instruction"].flatten(1), "proprio": proprio}

    @property
    def autoregressive(self) -> bool:
        """Whether a token depends on those before it, so that distributions are those of given actions."""
        return self.body.autoregressive

    @property
    def half_precision(self) -> bool:
        """Whether the body computes in bfloat16."""
        return DTYPES[self._dtype] != th.float32

    def _precision(self) -> Any:
        # Copies of all weights in half precision, kept to the end of a pass, are what sharding is to save
        dtype, cached = DTYPES[self._dtype], self.sharding is None
        return th.autocast(self.device.type, dtype=dtype, enabled=self.half_precision, cache_enabled=cached)

    def _distribution(self, logits: th.Tensor) -> TokenDistribution:
        logits = logits.float()
        if not bool(th.isfinite(logits).all()):
            raise FloatingPointError(
                "The policy's logits are not finite (NaN or infinite): the training has diverged or the checkpoint is "
                "broken. Lower learning_rate or max_grad_norm and go on from the last good checkpoint."
            )
        return TokenDistribution(logits)

    def _values(self, output: VLAOutput) -> th.Tensor:
        if self.value_net is None:
            return th.zeros(len(output.logits), 1, device=output.logits.device)
        return self.value_net(output.hidden.float())

    def distribution_and_values(
        self, obs: PyTorchObs, actions: th.Tensor | None = None
    ) -> tuple[TokenDistribution, th.Tensor]:
        """
        One pass through the body for both.

        :param obs: observation
        :param actions: tokens ``(B, n_tokens)``, which an autoregressive body needs: the distribution of each token is
            the one after the tokens before it
        :return: distribution of each action token and values ``(B, 1)``
        """
        inputs = self.body_inputs(obs)
        if self.autoregressive:
            if actions is None:
                raise ValueError(
                    "This policy is autoregressive: the distribution of a token depends on the tokens before it. Pass "
                    "the actions, or sample with forward() or predict()."
                )
            inputs["tokens"] = actions
        if self.sharding is not None:
            self.sharding.begin_pass()
        with self._precision(), warnings.catch_warnings():
            # That its outputs may be views, which nobody changes in place
            warnings.filterwarnings("ignore", "FSDP2-wrapped module")
            output = self.body(**inputs)
        return self._distribution(output.logits), self._values(output)

    def decode(
        self, obs: PyTorchObs, temperature: float = 1.0, deterministic: bool = False
    ) -> tuple[th.Tensor, TokenDistribution, th.Tensor]:
        """
        Choose the tokens of a decision, in parallel or one after the other, in one pass over the observation.

        :param obs: observation
        :param temperature: divides the logits when sampling
        :param deterministic: most likely token instead of a sample
        :return: tokens ``(B, n_tokens)``, the distribution of each (of an autoregressive body: after the tokens before
            it; without ``temperature``), values ``(B, 1)``
        """

        def choose(distribution: TokenDistribution) -> th.Tensor:
            if deterministic or temperature == 1.0:
                return distribution.get_actions(deterministic=deterministic)
            return token_view(distribution).temper(temperature).sample()

        if not self.autoregressive:
            distribution, values = self.distribution_and_values(obs)
            return choose(distribution), distribution, values
        with self._precision():
            actions, output = self.body.decode(
                **self.body_inputs(obs), choose=lambda logits: choose(self._distribution(logits[:, None]))[:, 0]
            )
        return actions, self._distribution(output.logits), self._values(output)

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> tuple[th.Tensor, th.Tensor, th.Tensor]:  # type: ignore[override]
        """
        :param obs: observation
        :param deterministic: most likely token instead of a sample
        :return: tokens ``(B, n_tokens)``, values ``(B, 1)``, log-probability ``(B,)`` of the whole decision
        """
        actions, distribution, values = self.decode(obs, deterministic=deterministic)
        return actions, values, distribution.log_prob(actions)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        return self.forward(observation, deterministic)[0]

    def get_distribution(self, obs: PyTorchObs, actions: th.Tensor | None = None) -> TokenDistribution:  # type: ignore[override]
        """
        :param obs: observation
        :param actions: see :meth:`distribution_and_values`
        :return: distribution of each action token
        """
        return self.distribution_and_values(obs, actions)[0]

    def evaluate_actions(  # type: ignore[override]
        self, obs: PyTorchObs, actions: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        """
        :param obs: observation
        :param actions: tokens ``(B, n_tokens)``
        :return: values ``(B, 1)``, log-probability ``(B,)`` and entropy ``(B,)`` of the whole decision
        """
        distribution, values = self.distribution_and_values(obs, actions)
        return values, distribution.log_prob(actions), distribution.entropy()

    def token_log_probs(self, obs: PyTorchObs, actions: th.Tensor) -> th.Tensor:
        """
        :param obs: observation
        :param actions: tokens ``(B, n_tokens)``
        :return: log-probability of each token, ``(B, n_tokens)``
        """
        return self.get_distribution(obs, actions).token_log_prob(actions)

    def predict_values(self, obs: PyTorchObs) -> th.Tensor:
        """
        :param obs: observation
        :return: values ``(B, 1)``; zeros without a value head, so that nothing is bootstrapped from an untrained critic
        """
        batch = len(next(iter(obs.values())))  # type: ignore[union-attr]
        if self.value_net is None:
            return th.zeros(batch, 1, device=self.device)
        # The summary is made before the first token: any tokens will do
        tokens = th.zeros(batch, self._config.n_tokens, dtype=th.long, device=self.device)
        return self.distribution_and_values(obs, tokens)[1]

    def extract_features(self, *args: Any, **kwargs: Any) -> Any:
        """Not available: the body reads raw observations."""
        raise NotImplementedError("VLAPolicy reads raw observations; it has no feature extractor.")
