"""Envs and teachers that learn, or teach, in seconds."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env

from opd_gym.envs.wrappers import EpisodeControl


class Match(gym.Env):
    """
    Each step shows a random vector; the right action is a fixed function of it. Success: right at every step.

    :param kind: "discrete", "multi_discrete", "multi_binary" or "box"
    :param horizon: Number of steps of an episode
    :param dict_obs: Whether the observation is a Dict, with a picture
    """

    def __init__(self, kind: str = "discrete", horizon: int = 4, dict_obs: bool = False):
        self.kind = kind
        self.horizon = horizon
        self.dict_obs = dict_obs
        vector = spaces.Box(-1.0, 1.0, (4,), np.float32)
        picture = spaces.Box(0, 255, (36, 36, 3), np.uint8)
        self.observation_space = spaces.Dict({"vector": vector, "picture": picture}) if dict_obs else vector
        self.action_space = {
            "discrete": spaces.Discrete(4),
            "multi_discrete": spaces.MultiDiscrete([2, 3]),
            "multi_binary": spaces.MultiBinary(3),
            "box": spaces.Box(-2.0, 2.0, (2,), np.float32),
        }[kind]

    def _observe(self):
        self.vector = self.np_random.uniform(-1.0, 1.0, 4).astype(np.float32)
        if not self.dict_obs:
            return self.vector
        return {"vector": self.vector, "picture": np.full((36, 36, 3), int(127 * (1 + self.vector[0])), np.uint8)}

    def expert_action(self):
        v = self.vector
        if self.kind == "discrete":
            return np.int64(np.argmax(v))
        if self.kind == "multi_discrete":
            return np.array([int(v[0] > 0), int(np.argmax(v[1:]))])
        if self.kind == "multi_binary":
            return (v[:3] > 0).astype(np.int8)
        return v[:2]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.right = 0, True
        return self._observe(), {}

    def step(self, action):
        if self.kind == "box":
            right = bool(np.abs(action - self.expert_action()).max() < 0.2)
        else:
            right = bool(np.all(action == self.expert_action()))
        self.right &= right
        self.t += 1
        done = self.t >= self.horizon
        info = {"is_success": bool(done and self.right)}
        return self._observe(), float(right), False, done, info


class Robot(gym.Env):
    """A raw robot env with pictures, an instruction and a scripted expert, as the VLA sees one."""

    def __init__(self, horizon: int = 10):
        self.horizon = horizon
        self.observation_space = spaces.Dict(
            {
                "agentview": spaces.Box(0, 255, (32, 32, 3), np.uint8),
                "proprio": spaces.Box(-np.inf, np.inf, (3,), np.float32),
                "instruction": spaces.Box(0, 255, (16,), np.uint8),
            }
        )
        self.action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)

    def _observe(self):
        picture = np.full((32, 32, 3), int(100 + 100 * self.goal[0]), np.uint8)
        return {"agentview": picture, "proprio": self.goal.copy(), "instruction": np.zeros(16, np.uint8)}

    def expert_chunk(self, chunk_size):
        return np.tile(self.goal[:2], (chunk_size, 1)).astype(np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        self.goal = self.np_random.uniform(-0.9, 0.9, 3).astype(np.float32)
        return self._observe(), {}

    def step(self, action):
        self.t += 1
        reward = -float(np.abs(action - self.goal[:2]).mean())
        done = self.t >= self.horizon
        return self._observe(), reward, False, done, {"is_success": reward > -0.2}


TINY_BODY = dict(
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=64,
    stem_channels=(8, 16),
    summary_size=32,
    vocab_size=64,
    word_size=16,
    token_rank=16,
    action_dim=2,
)


def vec(n_envs: int = 2, env=Match, control: bool = True, seed: int | None = 0, **kwargs):
    return make_vec_env(
        env, n_envs, seed=seed, env_kwargs=kwargs or {}, wrapper_class=EpisodeControl if control else None
    )


def cartpole_teacher() -> PPO:
    """A linear controller that balances the pole to the end, as a PPO model."""
    model = PPO("MlpPolicy", "CartPole-v1", policy_kwargs=dict(net_arch=[]), n_steps=8, batch_size=8, device="cpu")
    push_right = th.tensor([0.5, 1.0, 10.0, 3.0])
    with th.no_grad():
        model.policy.action_net.weight.copy_(th.stack([-push_right, push_right]))
        model.policy.action_net.bias.zero_()
    return model


def parameters(model) -> th.Tensor:
    return th.nn.utils.parameters_to_vector(model.policy.parameters()).detach()


def assert_same(a, b):
    """Nested containers of arrays and plain values are equal, types of arrays included."""
    if isinstance(a, dict):
        assert set(a) == set(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (tuple, list)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, np.ndarray):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    else:
        assert a == b
