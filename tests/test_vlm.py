"""Any image-text-to-text model of transformers as a body: tiny random SmolVLM (Idefics3) and Qwen2.5-VL."""

import json

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from toys import Robot, vec
from transformers import AutoModelForImageTextToText, LlamaConfig
from vlas import Recorder, check_damaged, damaged_configurations, logits, observation_space, sample, tensors, train
from vlms import VOCAB_SIZE, smolvlm

from opd_gym import OPD
from opd_gym.envs.wrappers import ActionChunk, ActionTokens, EpisodeControl
from opd_gym.instructions import encode_instruction
from opd_gym.policies.body import read_checkpoint_config
from opd_gym.policies.vla import VLAPolicy
from opd_gym.policies.vlm import VLMConfig, VLMModel, unpack_processor

SPACE = observation_space(32)


def make(model, space=SPACE, n_tokens=14, body_kwargs=None, **kwargs):
    th.manual_seed(0)
    return VLAPolicy(
        space, spaces.MultiDiscrete([256] * n_tokens), lambda _: 1e-2, body="vlm",
        body_kwargs={"model": model, "processor_kwargs": {}, **(body_kwargs or {})}, **kwargs,
    )  # fmt: skip


@pytest.fixture
def obs():
    obs = sample(SPACE, 3)
    obs["instruction"][1] = encode_instruction("open the middle drawer of the cabinet, and close it")
    return obs


def rows(obs, i):
    return {key: value[i] for key, value in obs.items()}


# ---------------------------------------------------------------------------------------------------------------- body


def test_starts_from_the_pretrained_weights(pretrained, obs):
    policy = make(pretrained)
    vlm = AutoModelForImageTextToText.from_pretrained(pretrained)
    ours = policy.body.vlm.state_dict()
    assert ours.keys() == vlm.base_model.state_dict().keys()
    for name, value in vlm.base_model.state_dict().items():
        assert th.equal(ours[name], value), name
    # The bins are the last 256 tokens of the vocabulary
    np.testing.assert_array_equal(policy.body.bins.weight.detach(), vlm.get_output_embeddings().weight[-256:].detach())
    assert logits(policy, obs).shape == (3, 14, 256)
    assert policy.body.vlm.config._attn_implementation == "sdpa"


def test_every_input_matters_and_the_batch_does_not(pretrained, obs):
    policy = make(pretrained)
    expected = logits(policy, obs)
    # Prompts differ in length: padding of the shorter ones changes nothing
    alone = th.cat([logits(policy, rows(obs, slice(i, i + 1))) for i in range(3)])
    np.testing.assert_allclose(alone, expected, atol=2e-4)
    for key in ("agentview", "wrist", "proprio", "instruction"):
        changed = {name: value.copy() for name, value in obs.items()}
        changed[key][0] = encode_instruction("stop") if key == "instruction" else changed[key][2] // 2
        difference = (logits(policy, changed) - expected).abs().amax(dim=(1, 2))
        assert difference[0] > 1e-4 and difference[1:].max() < 1e-4, key


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_attention_in_both_directions(pretrained, obs, bidirectional, padded):
    """A later placeholder is seen by an earlier token, if it is to be; with a mask for padding, and without."""
    policy = make(pretrained, body_kwargs={"bidirectional": bidirectional})
    if not padded:
        obs["instruction"][:] = obs["instruction"][0]
    before = logits(policy, obs)
    with th.no_grad():
        policy.body.placeholders.weight[10] += 1.0
    changed = (logits(policy, obs) - before).abs().amax(dim=(0, 2)) > 1e-6
    assert changed[10:].all() and changed[:10].all() == bidirectional and changed[:10].any() == bidirectional


def test_every_parameter_learns(pretrained, obs):
    policy = make(pretrained, value_head=True, gradient_checkpointing=True)
    policy.set_training_mode(True)
    values, log_prob, _ = policy.evaluate_actions(tensors(obs), th.full((3, 14), 7))
    (log_prob.mean() + values.mean()).backward()
    missing = {name for name, p in policy.named_parameters() if p.grad is None}
    # What a vision tower has after its last used layer
    assert all("vision_model.head" in name for name in missing)
    train(policy, obs, 30)
    assert (logits(policy, obs).argmax(-1) == 42).float().mean() > 0.9


# -------------------------------------------------------------------------------------------------------------- saving


def test_checkpoint_needs_no_pretrained_model(pretrained, obs, tmp_path):
    policy = make(pretrained)
    train(policy, obs, 1)
    policy.save_checkpoint(tmp_path / "student")
    name, config = read_checkpoint_config(tmp_path / "student")
    assert name == "vlm" and config.model is None
    assert str(pretrained) not in (tmp_path / "student" / "config.json").read_text()
    again = VLAPolicy(SPACE, policy.action_space, lambda _: 1e-3, checkpoint=tmp_path / "student")
    np.testing.assert_array_equal(logits(again, obs), logits(policy, obs))
    half = VLAPolicy(
        SPACE, policy.action_space, lambda _: 1e-3, checkpoint=tmp_path / "student", dtype="bfloat16", trainable=False
    )
    assert {p.dtype for p in half.parameters()} == {th.bfloat16}
    np.testing.assert_allclose(logits(half, obs).exp(), logits(policy, obs).exp(), atol=0.05)


def test_zip_of_a_fully_trained_model_loads_alone(tmp_path, obs):
    base = smolvlm(tmp_path / "base")
    policy = make(base)
    train(policy, obs, 1)
    expected = logits(policy, obs)
    policy.save(tmp_path / "policy.pt")
    base.rename(tmp_path / "gone")
    np.testing.assert_array_equal(logits(VLAPolicy.load(tmp_path / "policy.pt", device="cpu"), obs), expected)


def test_lora(pretrained, obs, tmp_path):
    """Adapters in the model, the new head, placeholders and proprioception in full; the zip refers to the model."""
    policy = make(pretrained, lora={"r": 2}, dtype="bfloat16")
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert {name.split(".")[1] for name in trained if ".lora_" not in name} == {"bins", "placeholders", "proprio"}
    assert all(p.dtype == (th.float32 if name in trained else th.bfloat16) for name, p in policy.named_parameters())
    train(policy, obs, 2)
    expected = logits(policy, obs)
    policy.save(tmp_path / "policy.pt")
    loaded = VLAPolicy.load(tmp_path / "policy.pt", device="cpu")
    np.testing.assert_array_equal(logits(loaded, obs), expected)
    assert set(loaded.state_dict()) == trained | {"base_checkpoint"}
    policy.save_checkpoint(tmp_path / "merged", dtype=th.float32)
    merged = VLAPolicy(SPACE, policy.action_space, lambda _: 1e-3, checkpoint=tmp_path / "merged")
    np.testing.assert_allclose(logits(merged, obs).exp(), expected.exp(), atol=0.05)


def test_opd_distils_into_a_vlm(pretrained):
    model = OPD(
        "VLAPolicy", vec(2, env=lambda: EpisodeControl(ActionTokens(ActionChunk(Robot(), 2))), control=False),
        teacher="expert", n_steps=3, batch_size=6, micro_batch_size=4, gradient_steps=1, seed=0, device="cpu",
        policy_kwargs={"body": "vlm", "body_kwargs": {"model": pretrained}, "lora": {"r": 2}},
    )  # fmt: skip
    recorder = Recorder(model, trained_only=True)
    model.learn(6)
    assert len(recorder.steps) == 1 and recorder.steps[0].norm() > 0


# -------------------------------------------------------------------------------------------------------------- errors


def test_prompts(tmp_path, obs):
    policy = make(smolvlm(tmp_path / "plain", template=False), body_kwargs={"prompt": "do {instruction}"})
    body = policy.body
    assert body._prompt(obs["instruction"][0]) == "<image>\n<image>\ndo pick up the milk"
    chat = make(smolvlm(tmp_path / "chat")).body._prompt(obs["instruction"][0])
    assert chat == "user:<image><image>What action should the robot take to pick up the milk? assistant:"
    assert logits(policy, obs).shape == (3, 14, 256)


def test_processor_options_make_pictures_cheaper(tmp_path, obs):
    base = smolvlm(tmp_path / "base")
    widths = {}
    for splitting in (True, False):
        options = {"do_image_splitting": splitting, "size": {"longest_edge": 64}}
        body = make(base, body_kwargs={"processor_kwargs": options}).body
        images = {key: th.as_tensor(obs[key]).permute(0, 3, 1, 2) for key in ("agentview", "wrist")}
        widths[splitting] = body.inputs(images, th.as_tensor(obs["instruction"]))["input_ids"].shape[1]
    assert widths[False] < 0.8 * widths[True]


def test_models_that_do_not_fit(tmp_path):
    base = smolvlm(tmp_path / "base")
    LlamaConfig(vocab_size=64).save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match="'llama'.*image-text-to-text"):
        make(tmp_path / "text")
    with pytest.raises(FileNotFoundError, match="pretrained model .*nowhere"):
        make(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="needs a model"):
        VLAPolicy(SPACE, spaces.MultiDiscrete([256] * 14), lambda _: 1e-2, body="vlm")
    with pytest.raises(ValueError, match=r"must contain \{instruction\}"):
        make(base, body_kwargs={"prompt": "go"})
    with pytest.raises(ValueError, match=f"has {VOCAB_SIZE} tokens, fewer than the 1000 bins"):
        VLAPolicy(SPACE, spaces.MultiDiscrete([1000] * 14), lambda _: 1, body="vlm", body_kwargs={"model": base})
    for path in (*base.glob("*token*"), *base.glob("*process*")):
        path.unlink()
    with pytest.raises(ValueError, match="has no processor"):
        make(base)
    with pytest.raises(RuntimeError, match="no processor"):
        VLMModel(VLMConfig(model=base))({}, th.zeros(1, 128, dtype=th.uint8))


def test_lora_without_its_model(tmp_path):
    base = smolvlm(tmp_path / "base")
    make(base, lora=True).save(tmp_path / "policy.pt")
    base.rename(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="pretrained model .*base"):
        VLAPolicy.load(tmp_path / "policy.pt", device="cpu")


@pytest.mark.parametrize("name", ["../outside", "/tmp/outside", "a/b", "..", "", "a" * 200])
def test_a_packed_processor_writes_only_plain_names(name):
    packed = th.frombuffer(bytearray(json.dumps({name: ""}).encode()), dtype=th.uint8)
    with pytest.raises(ValueError, match="not plain file names"):
        unpack_processor(packed, None)


def test_whatever_a_damaged_checkpoint_holds(pretrained, tmp_path):
    make(pretrained).save_checkpoint(tmp_path)
    rng = np.random.default_rng(0)
    config, processor = tmp_path / "config.json", tmp_path / "tokenizer.json"
    values = json.loads(config.read_text())

    def load():
        VLAPolicy(SPACE, spaces.MultiDiscrete([256] * 14), lambda _: 1e-2, checkpoint=tmp_path)

    check_damaged(config, damaged_configurations(values, rng, 20), load)
    check_damaged(processor, [b"", b"[1]"], load)
    for part in ("text_config", "vision_config"):
        many = {**values, "vlm_config": {**values["vlm_config"], part: {**values["vlm_config"][part]}}}
        many["vlm_config"][part].update(num_hidden_layers=10**9, depth=10**9)
        config.write_text(json.dumps(many))
        with pytest.raises(ValueError, match=f"{config} asks for more than 10000 layers"):
            load()


@pytest.mark.parametrize("prompt", ["do it", "{instruction} {robot}", "{instruction:>99999999}", "{instruction.upper}"])
def test_prompts_with_other_things_in_braces(prompt):
    with pytest.raises(ValueError, match="must contain {instruction}, and nothing else in braces"):
        VLMConfig(prompt=prompt)
