"""Small vision-language-action policies: what they see, what they think, and a few steps of training."""

import json

import numpy as np
import torch as th
from gymnasium import spaces

from opd_gym.instructions import encode_instruction

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
