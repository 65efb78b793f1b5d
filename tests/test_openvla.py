"""OpenVLA and OpenVLA-OFT: the published layout is read and written, and gives what the reference code gives."""

import json

import numpy as np
import pytest
import torch as th
from golden.openvla import tiny

from opd_gym.envs.instructions import encode_instruction
from opd_gym.envs.wrappers import decode_tokens, encode_actions
from opd_gym.policies.openvla import OpenVLAConfig, OpenVLAModel, complete_checkpoint
from opd_gym.policies.openvla.processing import (
    PromptTokenizer,
    axis_angle,
    center_crop,
    model_proprio,
    pixel_values,
    resize_bicubic,
    resize_lanczos,
)

TOLERANCE = dict(atol=1e-5, rtol=1e-5)


def golden(name):
    with np.load(tiny.HERE / f"{name}.npz") as file:
        return dict(file)


def upright(picture):
    """From stock LIBERO's picture, whose first row is the lowest, to what this library's envs show."""
    return th.as_tensor(picture[::-1].copy()).permute(2, 0, 1)[None]


@pytest.fixture(scope="module")
def pictures():
    stock = golden("observation")
    return {key: upright(stock[key]) for key in ("agentview", "wrist")}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return tiny.write_checkpoint(tmp_path_factory.mktemp("hub") / "Openvla-oft-SFT-libero-object-traj1")


def instructions(n=2):
    return th.as_tensor(np.stack([encode_instruction(text) for text in tiny.INSTRUCTIONS[:n]]))


def check_logits(logits, name, key="logits", step=7):
    """The reference's logits are in the order of the vocabulary, in which the lowest bin is the last."""
    expected = golden(name)[key][..., ::-1].copy()
    np.testing.assert_allclose(logits[: len(expected), ::step].detach().numpy(), expected, **TOLERANCE)


def check_response(logits, name):
    """Greedy tokens, in the vocabulary's numbers."""
    np.testing.assert_array_equal(31999 - logits.argmax(-1).numpy(), golden(name)["response"])


def test_simplevla_profile(published, pictures):
    model = OpenVLAModel.from_pretrained(published)
    assert model.config.input_profile == "simplevla-rl"
    images = {"agentview": th.cat([pictures["agentview"], pictures["wrist"]])}
    expected = golden("simplevla")
    with th.no_grad():
        pixels = pixel_values([images["agentview"]], model.config)[:, 0]
        features = model.vision_backbone(pixels)
        np.testing.assert_allclose(features[:, ::32].numpy(), expected["features"], **TOLERANCE)
        np.testing.assert_allclose(model.encode_images(images)[:, ::32].numpy(), expected["projected"], **TOLERANCE)
        logits = model(images, instructions()).logits
        alone = model({"agentview": pictures["agentview"]}, instructions(1)).logits
    check_logits(logits, "simplevla")
    check_logits(alone, "simplevla", "alone")
    check_response(logits, "simplevla")
    actions = decode_tokens(logits.argmax(-1).numpy().reshape(2, 8, 7), {**model.config.statistics, "gripper": None})
    np.testing.assert_allclose(actions, expected["actions"], atol=1e-6)
