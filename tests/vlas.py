"""Small vision-language-action policies: what they see, what they think, and a few steps of training."""

import json

import gymnasium as gym
import numpy as np
import torch as th
from golden.openvla import tiny
from gymnasium import spaces

from opd_gym.envs.wrappers import ActionChunk, ActionTokens
from opd_gym.instructions import encode_instruction
from opd_gym.policies.openvla import OpenVLAConfig, OpenVLAModel
from opd_gym.policies.openvla.processing import PromptTokenizer

SMALL = {"hidden_size": 32, "intermediate_size": 64, "stem_channels": [16, 32], "summary_size": 32, "vocab_size": 64}


def observation_space(size=16, keys=("agentview", "wrist"), channels_first=False, proprio=9):
    shape = (3, size, size) if channels_first else (size, size, 3)
    found = {key: spaces.Box(0, 255, shape, np.uint8) for key in keys}
    if proprio:
        found["proprio"] = spaces.Box(-np.inf, np.inf, (proprio,), np.float32)
    return spaces.Dict({**found, "instruction": spaces.Box(0, 255, (128,), np.uint8)})


def sample(space, n=3, instruction="pick up the milk"):
    space.seed(0)
    obs = {key: np.stack([box.sample() for _ in range(n)]) for key, box in space.spaces.items()}
    obs["instruction"] = np.tile(encode_instruction(instruction), (n, 1))
    return obs


def tensors(obs):
    return {key: th.as_tensor(value) for key, value in obs.items()}


def logits(policy, obs):
    policy.set_training_mode(False)
    with th.no_grad():
        return policy.get_distribution(tensors(obs)).logits


def train(policy, obs, steps=3):
    """A few gradient steps towards one action."""
    policy.set_training_mode(True)
    tokens = th.full((len(obs["instruction"]), policy.config.n_tokens), 42)
    for _ in range(steps):
        policy.optimizer.zero_grad()
        (-policy.token_log_probs(tensors(obs), tokens).mean()).backward()
        policy.optimizer.step()


class Recorder:
    """Keeps the gradients of every optimizer step."""

    def __init__(self, model, trained_only=False):
        self.steps = []
        parameters = [p for p in model.policy.parameters() if p.requires_grad or not trained_only]
        step = model.policy.optimizer.step

        def record(*args, **kwargs):
            self.steps.append(th.cat([p.grad.flatten() for p in parameters]))
            return step(*args, **kwargs)

        model.policy.optimizer.step = record


WRONG = [None, "word", 10**9, 10**400, -1, 0, 1.5, float("nan"), [], {}, [None], True, "../" * 3, {"a": [1e9]}]


def damaged_configurations(values, rng, n):
    """Copies of a configuration in which one value, at any depth, is another or missing."""
    text = json.dumps(values)
    for _ in range(n):
        copy = json.loads(text)
        part, key = copy, rng.choice(list(copy))
        while isinstance(part[key], (dict, list)) and part[key] and rng.random() < 0.8:
            part = part[key]
            key = rng.choice(list(part)) if isinstance(part, dict) else rng.integers(len(part))
        if rng.random() < 0.1:
            del part[key]
        else:
            part[key] = WRONG[rng.integers(len(WRONG))]
        yield json.dumps(copy).encode()


def damaged_weights(data, rng, n):
    """Copies of a safetensors file with a damaged header, of which one value is another, or one byte, or cut short."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    for text in damaged_configurations(header, rng, n):
        yield len(text).to_bytes(8, "little") + text + data[8 + size :]
        position = rng.integers(8 + size)
        yield data[:position] + bytes([rng.integers(256)]) + data[position + 1 :]
        yield data[: rng.integers(len(data))]


def check_damaged(file, contents, load):
    """Whatever a file holds, there is a result, or one error that names it or its folder."""
    whole = file.read_bytes()
    try:
        for content in contents:
            file.write_bytes(content)
            try:
                load()
            except (ValueError, OSError) as error:
                assert str(file.parent) in str(error), error
    finally:
        file.write_bytes(whole)


# A small OpenVLA and what it acts in
N_BINS = 8
STATISTICS = {"q01": [-1.0] * 3, "q99": [1.0] * 3, "mask": [True] * 3}


class Told(gym.Env):
    """Every step shows another colour, and an instruction that may be longer than that of the next worker."""

    def __init__(self, n_dims: int = 3, horizon: int = 3):
        self.horizon = horizon
        picture = spaces.Box(0, 255, (16, 16, 3), np.uint8)
        self.observation_space = spaces.Dict(agentview=picture, instruction=spaces.Box(0, 255, (128,), np.uint8))
        self.action_space = spaces.Box(-1.0, 1.0, (n_dims,), np.float32)

    def _observe(self):
        self.goal = self.np_random.uniform(-0.9, 0.9, 3).astype(np.float32)
        picture = np.broadcast_to(127 + 127 * self.goal, (16, 16, 3)).astype(np.uint8)
        return {"agentview": picture, "instruction": encode_instruction(tiny.INSTRUCTIONS[int(self.goal[0] > 0)])}

    def expert_chunk(self, chunk_size):
        return np.tile(self.goal[: self.action_space.shape[0]], (chunk_size, 1))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self._observe(), {}

    def step(self, action):
        self.t += 1
        reward = -float(np.abs(action - self.goal[: len(action)]).mean())
        return self._observe(), reward, self.t == self.horizon, False, {}


def told():
    return ActionTokens(ActionChunk(Told(), 1), n_bins=N_BINS, statistics=STATISTICS)


def write_openvla(directory, seed, profile="openvla"):
    """A random OpenVLA that takes milliseconds, and whose tokens depend on those before them."""
    th.manual_seed(seed)
    vision = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28)
    text = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    config = OpenVLAConfig(
        text_config=dict(vocab_size=32064, pad_token_id=32000, **text), dino_config=vision,
        siglip_config=dict(intermediate_size=32, **vision), input_profile=profile, libero_images=False, gripper=None,
        norm_stats={"told": {"action": STATISTICS}}, image_size=(16, 16), n_bins=N_BINS, n_tokens=3, action_dim=3,
    )  # fmt: skip
    model = OpenVLAModel(config)
    with th.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
        model.language_model.lm_head.weight.mul_(2.0)
    model.tokenizer = PromptTokenizer(tiny.tokenizer_json())
    model.save_pretrained(directory)
    return str(directory)


def observations(n, seed=5):
    env = Told()
    shown = [env.reset(seed=seed)[0], *(env._observe() for _ in range(n - 1))]
    return {key: th.as_tensor(np.stack([obs[key] for obs in shown])) for key in env.observation_space.spaces}
