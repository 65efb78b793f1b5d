"""Small vision-language-action policies: what they see, what they think, and a few steps of training."""

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
