"""VLAPolicy and the tiny body: words, shapes, temperature, saving, refusals."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from safetensors.torch import load_file, save_file
from stable_baselines3 import A2C
from stable_baselines3.common.vec_env import DummyVecEnv
from vlas import (
    SMALL,
    check_damaged,
    damaged_configurations,
    damaged_weights,
    observation_space,
    sample,
    tensors,
)

from opd_gym.instructions import encode_instruction
from opd_gym.policies.body import VLABody, VLAConfig, VLAOutput, get_body_class, register_body
from opd_gym.policies.tiny import TinyVLAConfig, TinyVLAModel, split_words
from opd_gym.policies.vla import VLAPolicy
from opd_gym.tokens import TokenDistribution


def make(space=None, n_tokens=14, n_bins=256, **kwargs):
    th.manual_seed(0)
    kwargs = {"body_kwargs": SMALL, **kwargs}
    return VLAPolicy(space or observation_space(), spaces.MultiDiscrete([n_bins] * n_tokens), lambda _: 1e-3, **kwargs)


# --------------------------------------------------------------------------------------------------------------- words


def words(*texts):
    hashes, mask = split_words(th.as_tensor(np.stack([encode_instruction(text) for text in texts])))
    return [
        [tuple(h.tolist()) for h, m in zip(row, keep, strict=True) if m] for row, keep in zip(hashes, mask, strict=True)
    ]


def test_words_are_named_alike_wherever_they_stand():
    first, second, third = words("Pick up the MILK.", "  the  milk, pick", "")
    assert len(first) == 4 and len(second) == 3 and third == []
    assert second == [first[2], first[3], first[0]]
    assert len(set(first)) == 4


def test_words_of_any_script():
    (umlaut,), chinese = words("Käse", "拿起 牛奶")
    assert len(chinese) == 4 and umlaut not in chinese
    assert words("x" * 128)[0][0] != words("x" * 127)[0][0]
    # Order of letters matters
    assert words("pot")[0] != words("top")[0]


# -------------------------------------------------------------------------------------------------------------- policy


@pytest.mark.parametrize("size", [64, 128])
def test_default_body_takes_the_image_size_of_the_space(size):
    space = observation_space(size)
    policy = make(space, 56, body_kwargs=None)
    assert sum(p.numel() for p in policy.parameters()) < 5e6
    assert policy.predict(sample(space))[0].shape == (3, 56)


def test_other_cameras_and_no_proprioception():
    space = observation_space(24, keys=("front",), proprio=0)
    policy = make(space, n_tokens=6)
    assert policy.config.action_dim == 6 and policy.config.chunk_size == 1
    actions = policy.predict(sample(space))[0]
    assert all(policy.action_space.contains(a) for a in actions)


def test_sb3_contract():
    policy = make()
    obs = tensors(sample(policy.observation_space))
    actions, values, log_prob = policy(obs)
    assert actions.shape == (3, 14) and log_prob.shape == (3,)
    assert values.shape == (3, 1) and not values.any() and not policy.predict_values(obs).any()
    values, again, entropy = policy.evaluate_actions(obs, actions)
    th.testing.assert_close(again, log_prob)
    assert entropy.shape == (3,)
    th.testing.assert_close(policy.token_log_probs(obs, actions).sum(dim=1), log_prob)
    distribution = policy.get_distribution(obs)
    assert isinstance(distribution, TokenDistribution) and distribution.logits.shape == (3, 14, 256)
    th.testing.assert_close(distribution.logits.exp().sum(-1), th.ones(3, 14))


def test_one_observation_and_a_batch_agree():
    policy = make()
    obs = sample(policy.observation_space)
    batch = policy.predict(obs, deterministic=True)[0]
    one = policy.predict({key: value[1] for key, value in obs.items()}, deterministic=True)[0]
    np.testing.assert_array_equal(one, batch[1])


def test_longer_instructions_in_the_batch_do_not_matter():
    policy = make()
    obs = sample(policy.observation_space, 2)
    alone = policy.get_distribution(tensors(obs)).logits
    obs["instruction"][1] = encode_instruction("put the bowl on the stove and turn it on")
    together = policy.get_distribution(tensors(obs)).logits
    th.testing.assert_close(alone[0], together[0], atol=1e-5, rtol=1e-5)
    assert not th.allclose(alone[1], together[1], atol=1e-5)


def test_empty_instruction():
    policy = make()
    assert th.isfinite(policy.get_distribution(tensors(sample(policy.observation_space, instruction=""))).logits).all()


def test_transposed_pictures_are_the_same_pictures():
    policy = make()
    other = make(observation_space(channels_first=True))
    other.load_state_dict(policy.state_dict())
    obs = sample(policy.observation_space)
    swapped = {key: np.moveaxis(value, -1, 1) if value.ndim == 4 else value for key, value in obs.items()}
    th.testing.assert_close(
        policy.get_distribution(tensors(obs)).logits, other.get_distribution(tensors(swapped)).logits
    )
    # predict() takes either
    np.testing.assert_array_equal(other.predict(obs, deterministic=True)[0], policy.predict(obs, deterministic=True)[0])


def test_the_only_temperature_is_that_of_the_algorithm():
    policy = make(temperature=1.0)  # as models saved by version 0.1 say
    assert not hasattr(policy, "temperature") and "temperature" not in policy.portable_kwargs()
    with pytest.raises(ValueError, match="Pass temperature= to the algorithm"):
        make(temperature=1.5)


def test_every_parameter_gets_a_gradient():
    policy = make(value_head=True)
    obs = sample(policy.observation_space)
    obs["instruction"][1] = encode_instruction("a second sentence")
    values, log_prob, _ = policy.evaluate_actions(tensors(obs), th.zeros(3, 14))
    (log_prob.mean() + values.mean()).backward()
    without = [name for name, p in policy.named_parameters() if p.grad is None]
    assert without == []


def test_value_head_starts_at_zero_and_learns():
    policy = make(value_head=True)
    obs = tensors(sample(policy.observation_space))
    assert not policy.predict_values(obs).any()
    for _ in range(20):
        loss = (policy.predict_values(obs) - 1.0).pow(2).mean()
        policy.optimizer.zero_grad()
        loss.backward()
        policy.optimizer.step()
    assert loss.item() < 0.9


def test_learns_which_object_is_meant():
    """One picture, two instructions, two answers; and one instruction, two pictures, two answers."""
    space = observation_space()
    policy = make(space)
    obs = sample(space, 4, "pick up the milk")
    obs["instruction"][2:] = encode_instruction("pick up the butter")
    for key in ("agentview", "wrist"):
        obs[key][2:] = obs[key][:2]
    obs["proprio"][:] = 0
    labels = th.tensor([10, 100, 150, 250])[:, None].expand(4, 14)
    for _ in range(150):
        loss = -policy.token_log_probs(tensors(obs), labels).mean()
        policy.optimizer.zero_grad()
        loss.backward()
        policy.optimizer.step()
    np.testing.assert_array_equal(policy.predict(obs, deterministic=True)[0], labels.numpy())


def test_optimizer_is_adamw_and_can_be_overridden():
    assert isinstance(make().optimizer, th.optim.AdamW)
    policy = make(optimizer_class=th.optim.SGD, optimizer_kwargs={"momentum": 0.5})
    assert isinstance(policy.optimizer, th.optim.SGD) and policy.optimizer.defaults["momentum"] == 0.5
    # PyTorch refuses two implementations at once
    policy = make(optimizer_kwargs={"foreach": True})
    assert policy.optimizer.defaults["foreach"] and not policy.optimizer.defaults["fused"]


# -------------------------------------------------------------------------------------------------------------- saving


def test_checkpoint_round_trip(tmp_path):
    statistics = {"q01": np.full(7, -0.5), "q99": np.full(7, 0.5), "mask": np.ones(7, dtype=bool)}
    policy = make(body_kwargs={**SMALL, "statistics": statistics})
    directory = tmp_path / "a" / "student"
    policy.save_checkpoint(directory)
    assert sorted(path.name for path in directory.iterdir()) == ["config.json", "model.safetensors"]
    obs = sample(policy.observation_space)
    other = make(checkpoint=directory, body_kwargs=None)
    np.testing.assert_array_equal(policy.predict(obs, deterministic=True)[0], other.predict(obs, deterministic=True)[0])
    assert other.statistics == {"q01": [-0.5] * 7, "q99": [0.5] * 7, "mask": [True] * 7}
    # Saving again over it
    other.save_checkpoint(directory)
    assert len(list(directory.iterdir())) == 2


def test_failed_checkpoint_keeps_the_old_one(tmp_path, monkeypatch):
    policy = make()
    policy.save_checkpoint(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()

    def broken(path):
        path.mkdir()
        (path / "model.safetensors").write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(policy.body, "save_pretrained", broken)
    with pytest.raises(OSError, match="disk full"):
        policy.save_checkpoint(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_a_weight_beyond_half_precision_is_not_written(tmp_path):
    policy = make()
    with th.no_grad():
        policy.body.proprio.bias[3] = 1e6
    with pytest.raises(ValueError, match=r"In torch\.float16 .* not the same: proprio\.bias is not finite"):
        policy.save_checkpoint(tmp_path / "half", dtype=th.float16)
    assert not list((tmp_path / "half").iterdir())
    policy.save_checkpoint(tmp_path / "whole", dtype=th.bfloat16)


def test_policy_save_and_load(tmp_path):
    policy = make(value_head=True)
    policy.save(tmp_path / "policy.pt")
    loaded = VLAPolicy.load(tmp_path / "policy.pt", device="cpu")
    assert loaded.value_net is not None
    obs = sample(policy.observation_space)
    np.testing.assert_array_equal(
        policy.predict(obs, deterministic=True)[0], loaded.predict(obs, deterministic=True)[0]
    )


class TokenEnv(DummyVecEnv):
    def __init__(self):
        import gymnasium as gym

        class Env(gym.Env):
            observation_space = observation_space()
            action_space = spaces.MultiDiscrete([256] * 14)

            def reset(self, *, seed=None, options=None):
                return {k: v[0] for k, v in sample(self.observation_space, 1).items()}, {}

            def step(self, action):
                return self.reset()[0], 1.0, False, True, {}

        super().__init__([Env])


def test_plain_sb3_algorithm(tmp_path):
    """Any algorithm of Stable-Baselines3 can drive the policy, and its zip loads where the checkpoint is gone."""
    make().save_checkpoint(tmp_path / "student")
    model = A2C(
        VLAPolicy, TokenEnv(), n_steps=2, device="cpu", gae_lambda=1.0,
        policy_kwargs={"checkpoint": str(tmp_path / "student"), "body_kwargs": SMALL},
    ).learn(4)  # fmt: skip
    model.save(tmp_path / "model.zip")
    (tmp_path / "student").rename(tmp_path / "moved")
    with pytest.warns(UserWarning, match="does not exist"):
        loaded = A2C.load(tmp_path / "model.zip", device="cpu")
    obs = sample(observation_space())
    np.testing.assert_array_equal(model.predict(obs, deterministic=True)[0], loaded.predict(obs, deterministic=True)[0])


# -------------------------------------------------------------------------------------------------------- other bodies


class ConstantVLA(VLABody):
    """The least that a body must do."""

    class Config(VLAConfig):
        model_type = "constant_vla"

        def __init__(self, hidden_size=4, **kwargs):
            self.hidden_size = hidden_size
            super().__init__(**kwargs)

    config_class = Config

    def __init__(self, config):
        super().__init__(config)
        self.table = th.nn.Parameter(th.zeros(config.n_tokens, config.n_bins))
        self.post_init()

    def forward(self, images, instruction, proprio=None):
        n = len(instruction)
        assert all(image.dtype == th.uint8 and image.shape[1] == 3 for image in images.values())
        return VLAOutput(self.table.expand(n, -1, -1), self.table.new_zeros(n, self.config.hidden_size))


def test_another_body(tmp_path):
    register_body("constant", ConstantVLA)
    policy = make(body="constant", body_kwargs=None)
    with th.no_grad():
        policy.body.table[:, 42] = 5.0
    policy.save_checkpoint(tmp_path)
    # The checkpoint knows its body
    loaded = make(checkpoint=tmp_path)
    assert isinstance(loaded.body, ConstantVLA)
    assert (loaded.predict(sample(policy.observation_space), deterministic=True)[0] == 42).all()


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("action_space", "message"),
    [
        (spaces.Box(-1, 1, (7,)), "ActionTokens"),
        (spaces.Discrete(5), "ActionTokens"),
        (spaces.MultiDiscrete([256, 255]), "same number of bins"),
    ],
)
def test_action_spaces_without_tokens_are_refused(action_space, message):
    with pytest.raises(ValueError, match=message):
        VLAPolicy(observation_space(), action_space, lambda _: 1e-3)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (spaces.Box(0, 255, (16, 16, 3), np.uint8), "Dict observation"),
        (spaces.Dict(instruction=spaces.Box(0, 255, (128,), np.uint8)), "at least one uint8 picture"),
        (spaces.Dict(agentview=spaces.Box(0, 255, (16, 16, 3), np.uint8)), "instruction"),
    ],
)
def test_observation_spaces_without_pictures_or_text_are_refused(space, message):
    with pytest.raises(ValueError, match=message):
        VLAPolicy(space, spaces.MultiDiscrete([256] * 7), lambda _: 1e-3)


def test_too_small_pictures_are_refused():
    with pytest.raises(ValueError, match="too small"):
        make(observation_space(8), body_kwargs=None)


def test_checkpoint_of_other_spaces_is_refused(tmp_path):
    make().save_checkpoint(tmp_path)
    for arguments, message in [
        (dict(n_bins=128), "n_bins: policy 256, action space 128"),
        (dict(n_tokens=28), "action tokens: policy 14"),
        (dict(space=observation_space(32)), "pictures of"),
        (dict(space=observation_space(keys=("agentview",))), "observation keys"),
        (dict(space=observation_space(proprio=8)), "`proprio`: policy expects 9"),
    ]:
        with pytest.raises(ValueError, match=message):
            make(checkpoint=tmp_path, body_kwargs=None, **arguments)


def test_broken_checkpoints_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no checkpoint"):
        make(checkpoint=tmp_path / "nowhere", body_kwargs=None)
    with pytest.raises(ValueError, match="neither a VLA checkpoint"):
        make(checkpoint=tmp_path, body_kwargs=None)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "unheard_of"}))
    with pytest.raises(ValueError, match="unheard_of"):
        make(checkpoint=tmp_path, body_kwargs=None)
    (tmp_path / "config.json").unlink()
    make().save_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="incomplete"):
        make(checkpoint=tmp_path, body_kwargs=None)


@pytest.mark.parametrize("fault", ["missing", "unexpected", "integer", "shape", "nan", "cut"])
def test_damaged_weights_are_refused(tmp_path, fault):
    make().save_checkpoint(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    name = "bins.weight"
    if fault == "missing":
        del weights[name]
    elif fault == "unexpected":
        name = "unheard_of"
        weights[name] = th.zeros(3)
    elif fault == "integer":
        weights[name] = weights[name].int()
    elif fault == "shape":
        weights[name] = weights[name].T.contiguous()
    elif fault == "nan":
        weights[name][0, 0] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    if fault == "cut":
        name = "damaged"
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=name) as error:
        make(checkpoint=tmp_path, body_kwargs=None)
    assert str(tmp_path) in str(error.value)


def test_damaged_configurations_are_refused(tmp_path):
    make().save_checkpoint(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    rng = np.random.default_rng(0)
    fields = ["image_keys", "image_size", "n_bins", "n_tokens", "action_dim", "hidden_size", "num_hidden_layers"]
    fields += ["stem_channels", "grid_size", "vocab_size", "instruction_length", "proprio_dim", "num_attention_heads"]
    wrong = [None, "word", 10**9, 10**400, -1, float("nan"), 1.5, [], {}, [None], True]
    for field in rng.permutation(fields):
        for i in rng.choice(len(wrong), 4, replace=False):
            path.write_text(json.dumps({**values, str(field): wrong[i]}))
            with pytest.raises(ValueError):
                make(checkpoint=tmp_path, body_kwargs=None)
    for text in (b"", b"[1]", b"\xff\xfe", b"[" * 100_000):
        path.write_bytes(text)
        with pytest.raises(ValueError):
            make(checkpoint=tmp_path, body_kwargs=None)


def test_whatever_a_damaged_checkpoint_holds(tmp_path):
    make().save_checkpoint(tmp_path)
    rng = np.random.default_rng(0)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"

    def load():
        make(checkpoint=tmp_path, body_kwargs=None)

    check_damaged(config, damaged_configurations(json.loads(config.read_text()), rng, 60), load)
    check_damaged(weights, damaged_weights(weights.read_bytes(), rng, 10), load)
    load()


@pytest.mark.parametrize("fault", ["missing", "unexpected", "integer", "shape", "nan"])
@pytest.mark.parametrize("name", ["value_net.weight", "body.bins.weight"])
def test_damaged_weights_of_a_saved_policy_are_refused(name, fault):
    """As they come from a zip; PyTorch would take integers, and a policy with NaN acts until it is looked at."""
    policy = make(value_head=True)
    state = dict(policy.state_dict())
    value = state.pop(name)
    bad = {
        "unexpected": {name: value, f"{name}s": value},
        "integer": {name: value.int()},
        "shape": {name: value[:, :-1]},
        "nan": {name: value.clone().fill_(float("nan"))},
    }
    with pytest.raises(ValueError, match=name):
        policy.load_state_dict({**state, **bad.get(fault, {})})
    policy.load_state_dict({**state, name: value})


def test_saving_leaves_the_files_of_others(tmp_path):
    own = ["config.json", "model.safetensors"]
    foreign = ["llama.safetensors", "optimizer_checkpoint.pt", "flux.safetensors.index.json"]
    for name in foreign:
        (tmp_path / name).write_text("mine")
    for _ in range(2):
        make().save_checkpoint(tmp_path)
        assert all((tmp_path / name).read_text() == "mine" for name in foreign)
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(own + foreign)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="empty directory"):
        make().save_checkpoint(tmp_path)
    assert "llama" in (tmp_path / "config.json").read_text()


def test_a_save_that_was_killed_does_not_block_the_next_one(tmp_path, monkeypatch):
    def killed(source, target):
        if Path(target).name == "model.safetensors":
            raise KeyboardInterrupt
        rename(source, target)

    rename = os.replace
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        make().save_checkpoint(tmp_path)
    make().save_checkpoint(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_unknown_body_and_argument_are_refused():
    with pytest.raises(ValueError, match="Unknown VLA body"):
        make(body="huge")
    with pytest.raises(ValueError, match="use_sde"):
        make(use_sde=True)
    with pytest.raises(ValueError, match="whole number of actions"):
        make(body_kwargs={**SMALL, "action_dim": 5})


def test_nan_is_refused():
    policy = make()
    with th.no_grad():
        policy.body.bins.bias[0] = float("nan")
    with pytest.raises(FloatingPointError, match="not finite"):
        policy.predict(sample(policy.observation_space))


def test_registry_resolves_names_lazily():
    assert get_body_class("tiny") is TinyVLAModel
    assert TinyVLAConfig().chunk_size == 8
