"""A user's program that passes ``mypy --strict``: nothing runs it, tests/test_typing.py has it checked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO as SB3PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv

import opd_gym
from opd_gym import GRPO, OPD, PPO, SFT, VLAPolicy, make_vec
from opd_gym.actions import decode_tokens, encode_actions
from opd_gym.checkpoints import checkpoint_names, resolve_checkpoint
from opd_gym.demonstrations import Demonstrations, read_demonstrations
from opd_gym.envs.wrappers import ActionChunk, ActionTokens, EpisodeControl, PrivilegedObservation
from opd_gym.episodes import EpisodeSpec
from opd_gym.evaluation import EvaluationResult, eval_episodes, evaluate_success, wilson_interval
from opd_gym.hub import model_card, push_to_hub
from opd_gym.instructions import decode_instruction, encode_instruction
from opd_gym.policies.body import VLABody, VLAConfig, VLAOutput, register_body
from opd_gym.policies.loading import load_policy
from opd_gym.ranks import is_main, rank, world_size
from opd_gym.versions import versions


class Stop(BaseCallback):
    def _on_step(self) -> bool:
        return self.num_timesteps < 100


def distil(callback: BaseCallback) -> OPD:
    teacher = SB3PPO("MlpPolicy", "CartPole-v1").learn(1000)
    model = OPD("MlpPolicy", "CartPole-v1", teacher=teacher, divergence="forward_kl", teacher_kwargs={"std": 0.1})
    trained: OPD = model.learn(1000, callback=callback).learn()
    trained.save("student")
    loaded: OPD = OPD.load("student", env=trained.get_env())
    loaded.save_replay_buffer("states")
    loaded.load_replay_buffer("states")
    return loaded


def others(env: VecEnv) -> None:
    grpo: GRPO = GRPO("VLAPolicy", env, group_size=4, dynamic_sampling=None).learn(10)
    ppo: PPO = PPO(VLAPolicy, env, policy_kwargs={"value_head": True}).learn(10)
    data = Demonstrations(np.zeros((4, 3), np.float32), np.zeros(4, np.int64), action_space=spaces.Discrete(2))
    sft: SFT = SFT("MlpPolicy", demonstrations=data, learning_rate=lambda left: 1e-3 * left).learn(10)
    steps: int = grpo.num_env_steps + ppo.num_timesteps + sft.num_timesteps
    print(steps, [episode.instruction for episode in read_demonstrations("demos.hdf5")])


def evaluate(model: OPD, env: VecEnv) -> EvaluationResult:
    observation = env.reset()
    assert isinstance(observation, dict)
    actions, state = model.predict(observation, deterministic=True)
    print(actions.shape, state)
    result = evaluate_success(model, env, eval_episodes(range(10), 5))
    rate: float | None = result.success_rate
    low, high = wilson_interval(1, 2)
    result.save("evaluation.json")
    print(result.to_markdown(), rate, low + high, EvaluationResult.load("evaluation.json").paired(result))
    return evaluate_success(load_policy("student", env.observation_space, env.action_space), env, [EpisodeSpec(seed=3)])


def wrapped(env: gym.Env[dict[str, np.ndarray], np.ndarray]) -> VecEnv:
    chunked = ActionTokens(ActionChunk(PrivilegedObservation(env, keys=["state"]), chunk_size=4), n_bins=256)
    tokens: np.ndarray = chunked.encode(np.zeros((4, 7)))
    print(EpisodeControl(chunked).frozen, decode_tokens(encode_actions(chunked.decode(tokens))))
    build: Callable[[gym.Env], gym.Env] = EpisodeControl
    return make_vec("LiberoObject-v0", n_envs=2, env_kwargs={"visuals": "light"}, wrapper=build)


class Config(VLAConfig):
    model_type = "mine"

    def __init__(self, hidden_size: int = 8, **kwargs: Any):
        self.hidden_size = hidden_size
        super().__init__(**kwargs)


class Body(VLABody):
    config_class = Config

    def __init__(self, config: Config):
        super().__init__(config)
        self.head = th.nn.Linear(config.proprio_dim, config.n_tokens * config.n_bins)

    def forward(
        self, images: dict[str, th.Tensor], instruction: th.Tensor, proprio: th.Tensor | None = None
    ) -> VLAOutput:
        assert proprio is not None
        logits = self.head(proprio).view(-1, self.config.n_tokens, self.config.n_bins)
        return VLAOutput(logits, proprio)


def publish(model: OPD, result: EvaluationResult) -> None:
    if is_main() and rank() < world_size():
        print(model_card(model, "owner/name", result), push_to_hub(model, "owner/name", result=result))
    print(opd_gym.__version__, versions(), checkpoint_names(), resolve_checkpoint("libero-object-student").name)
    print(decode_instruction(encode_instruction("pick up the milk")))


register_body("mine", Body)
