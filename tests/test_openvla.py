"""OpenVLA and OpenVLA-OFT: the published layout is read and written, and gives what the reference code gives.

``tests/golden/openvla`` holds what the reference code computed, with weights that follow from their names.
"""

import json
import re
import zlib

import numpy as np
import pytest
import torch as th
from golden.openvla import tiny
from gymnasium import spaces
from safetensors import safe_open
from safetensors.numpy import save_file
from stable_baselines3 import A2C
from stable_baselines3.common.vec_env import DummyVecEnv
from transformers import AutoConfig, AutoModel
from vlas import check_damaged, damaged_configurations, damaged_weights

from opd_gym import OPD
from opd_gym.actions import decode_tokens, encode_actions, to_positions
from opd_gym.checkpoints import resolve_checkpoint
from opd_gym.cli import evaluate
from opd_gym.cli.main import main
from opd_gym.cli.options import TrainArgs
from opd_gym.cli.train import complete_hyperparams
from opd_gym.envs import make
from opd_gym.envs.wrappers import ActionTokens
from opd_gym.hub import write_folder
from opd_gym.instructions import encode_instruction
from opd_gym.policies.body import read_checkpoint_config
from opd_gym.policies.loading import checkpoint_settings
from opd_gym.policies.openvla import OpenVLAConfig, OpenVLAModel, complete_checkpoint
from opd_gym.policies.openvla.jpeg import jpeg_round_trip
from opd_gym.policies.openvla.processing import (
    PromptTokenizer,
    axis_angle,
    center_crop,
    model_proprio,
    pixel_values,
    resize_bicubic,
    resize_lanczos,
)
from opd_gym.policies.openvla.published import INPUT_PROFILES, detect_profile
from opd_gym.policies.vla import VLAPolicy

TOLERANCE = dict(atol=1e-5, rtol=1e-5)
# The names under which checkpoints were published tell what inputs they need.
SFT, RL, AUTOREGRESSIVE = (
    "Openvla-oft-SFT-libero-object-traj1",
    "RLinf-OpenVLAOFT-LIBERO",
    "openvla-7b-finetuned-libero-object",
)


def golden(name):
    with np.load(tiny.HERE / f"{name}.npz") as file:
        return dict(file)


def upright(picture):
    """From stock LIBERO's picture, whose first row is the lowest, to what this library's envs show."""
    return th.as_tensor(picture[::-1].copy()).permute(2, 0, 1)[None]


def checksum(picture):
    return zlib.crc32(picture[0].permute(1, 2, 0).numpy().tobytes())


def instructions(n=2):
    return th.as_tensor(np.stack([encode_instruction(text) for text in tiny.INSTRUCTIONS[:n]]))


@pytest.fixture(scope="module")
def pictures():
    stock = golden("observation")
    return {key: upright(stock[key]) for key in ("agentview", "wrist")}


@pytest.fixture(scope="module")
def both(pictures):
    """A batch of two: either camera's picture as the only one."""
    return {"agentview": th.cat([pictures["agentview"], pictures["wrist"]])}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def sft(hub):
    return tiny.write_checkpoint(hub / SFT)


@pytest.fixture(scope="module")
def autoregressive(hub):
    return tiny.write_checkpoint(hub / AUTOREGRESSIVE)


def check_logits(logits, name, key="logits", step=7):
    """The reference's logits are in the order of the vocabulary, in which the lowest bin is the last."""
    expected = golden(name)[key][..., ::-1]
    np.testing.assert_allclose(logits[: len(expected), ::step].numpy(), expected, **TOLERANCE)


def check_tokens(tokens, name):
    np.testing.assert_array_equal(31999 - tokens.numpy(), golden(name)["response"])


def raw(statistics):
    return {key: value for key, value in statistics.items() if key != "gripper"}


# ------------------------------------------------------------------------------------------- parity with the reference


@th.no_grad()
def test_simplevla_profile(sft, both, pictures):
    """Vision features, projector, logits with and without padding in the batch, tokens and actions of SimpleVLA-RL."""
    model = OpenVLAModel.from_pretrained(sft)
    assert model.config.input_profile == "simplevla-rl" and not model.autoregressive
    expected = golden("simplevla")
    features = model.vision_backbone(pixel_values([both["agentview"]], model.config)[:, 0])
    np.testing.assert_allclose(features[:, ::32].numpy(), expected["features"], **TOLERANCE)
    np.testing.assert_allclose(model.encode_images(both)[:, ::32].numpy(), expected["projected"], **TOLERANCE)
    logits = model(both, instructions()).logits
    assert logits.shape == (2, 56, 256)
    check_logits(logits, "simplevla")
    check_logits(model({"agentview": pictures["agentview"]}, instructions(1)).logits, "simplevla", "alone")
    check_tokens(logits.argmax(-1), "simplevla")
    actions = decode_tokens(logits.argmax(-1).numpy().reshape(2, 8, 7), raw(model.config.statistics))
    np.testing.assert_allclose(actions, expected["actions"], atol=1e-6)


@th.no_grad()
def test_rlinf_profile(hub, both):
    model = OpenVLAModel.from_pretrained(tiny.write_checkpoint(hub / RL))
    assert model.config.input_profile == "rlinf"
    logits = model(both, instructions()).logits
    check_logits(logits, "rlinf")
    check_tokens(logits.argmax(-1), "rlinf")
    # RLinf pads to 128; here the batch is as long as its longest prompt
    assert golden("rlinf")["prompt_length"] == 128 > model.prefix(both, instructions()).mask.shape[1] - 256
    actions = decode_tokens(logits.argmax(-1).numpy().reshape(2, 8, 7), raw(model.config.statistics))
    np.testing.assert_allclose(actions, golden("rlinf")["actions"], atol=1e-6)


@th.no_grad()
def test_rlinf_rounds_frequencies_in_half_precision(hub, both, tmp_path):
    """RLinf casts buffers too, so its models in bfloat16 know rounded positions; the checkpoint remembers it."""
    path = tiny.write_checkpoint(hub / "rounded" / RL)
    model = OpenVLAModel.from_pretrained(path, dtype=th.bfloat16)
    frequencies = model.language_model.model.rotary_emb.inv_freq
    assert frequencies.dtype == th.float32 and th.equal(frequencies, frequencies.bfloat16().float())
    expected = golden("rlinf_bfloat16")["logits"][..., ::-1]
    # What is rounded on the way to a logit depends on the processor: by 4e-3, as much as exact frequencies change. The
    # reference was computed without oneDNN, which processors with bfloat16 instructions would use
    with th.backends.mkldnn.flags(enabled=False):
        logits = model(both, instructions()).logits[:, ::7].numpy()
    alike = th.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    assert np.abs(logits - expected).mean() < (1e-3 if alike else 1e-2)
    assert th.equal(OpenVLAModel(model.config).language_model.model.rotary_emb.inv_freq, frequencies)
    model.float().save_pretrained(tmp_path / "single")
    single = OpenVLAModel.from_pretrained(tmp_path / "single")
    assert th.equal(single.language_model.model.rotary_emb.inv_freq, frequencies)
    for other in (OpenVLAModel.from_pretrained(path), OpenVLAModel(OpenVLAConfig(**{**model.config.to_dict(),
                  "input_profile": "openvla-oft"}))):  # fmt: skip
        assert not th.equal(other.language_model.model.rotary_emb.inv_freq, frequencies)


@th.no_grad()
def test_two_cameras_and_proprioception(hub, pictures):
    """The wrist's picture and LIBERO's state: position, quaternion and fingers become the projector's 8 inputs."""
    path = tiny.write_checkpoint(hub / "wrist" / SFT, proprio_inputs=8, image_keys=["agentview", "wrist"])
    model = OpenVLAModel.from_pretrained(path)
    assert (model.config.proprio_dim, model.config.proprio_inputs) == (9, 8)
    stock = golden("observation")
    state = np.concatenate([stock["eef_pos"], stock["eef_quat"], stock["gripper_qpos"]])
    agentview, wrist = (pictures[key] for key in ("agentview", "wrist"))
    images = {"agentview": th.cat([agentview, wrist]), "wrist": th.cat([wrist, agentview])}
    logits = model(images, instructions(), th.as_tensor(np.stack([state, state]))).logits
    check_logits(logits, "simplevla_wrist")
    check_tokens(logits.argmax(-1), "simplevla_wrist")


@th.no_grad()
def test_two_arms(hub, pictures):
    """25 actions of 14 dimensions, three cameras, joint angles normalised from min to max, as for RoboTwin."""
    cameras = ["head", "left_wrist", "right_wrist"]
    path = tiny.write_checkpoint(hub / "arms" / SFT, tiny.ARMS_KEY, proprio_inputs=14, num_images_in_input=3)
    model = OpenVLAModel.from_pretrained(path)
    config = model.config
    assert (config.n_tokens, config.action_dim, config.chunk_size) == (350, 14, 25)
    assert (config.normalization, config.gripper, config.libero_images) == ("bounds", None, False)
    assert (config.image_keys, config.image_size, config.joint_positions) == (cameras, [240, 320], True)
    expected = golden("simplevla_arms")
    # The reference was given LIBERO's pictures: make the same of them by hand
    config.libero_images = True
    a, w = (pictures[key] for key in ("agentview", "wrist"))
    images = dict(zip(cameras, (th.cat(pair) for pair in ((a, w), (w, a), (a, w))), strict=True))
    proprio = th.as_tensor(np.random.default_rng(3).uniform(-3, 3, (2, 14)))
    np.testing.assert_allclose(model.encode_images(images)[:, ::32].numpy(), expected["projected"], **TOLERANCE)
    logits = model(images, instructions(), proprio).logits
    check_logits(logits, "simplevla_arms")
    check_tokens(logits.argmax(-1), "simplevla_arms")
    # The reference's actions are joint positions, the env's are in [-1, 1]
    actions = decode_tokens(logits.argmax(-1).numpy().reshape(2, 25, 14), config.statistics)
    np.testing.assert_allclose(to_positions(actions), expected["actions"], atol=1e-6)


@th.no_grad()
def test_autoregressive_openvla(autoregressive, pictures):
    model = OpenVLAModel.from_pretrained(autoregressive)
    assert model.config.input_profile == "openvla" and model.autoregressive and model.config.n_tokens == 7
    expected = golden("openvla")
    inputs = ({"agentview": pictures["agentview"]}, instructions(1))
    tokens, output = model.decode(*inputs, choose=lambda logits: logits.argmax(-1))
    check_tokens(tokens, "openvla")
    check_logits(output.logits, "openvla", step=1)
    check_logits(model(*inputs, tokens=tokens).logits, "openvla", step=1)
    given = th.as_tensor(31999 - expected["given"])
    check_logits(model(*inputs, tokens=given).logits, "openvla", "forced", step=1)
    actions = decode_tokens(tokens.numpy()[0], raw(model.config.statistics))
    np.testing.assert_allclose(actions, expected["actions"], atol=1e-6)
    with pytest.raises(ValueError, match="pass `tokens`"):
        model(*inputs)


@th.no_grad()
def test_shorter_prompts_in_the_batch_do_not_matter(autoregressive, both, pictures):
    model = OpenVLAModel.from_pretrained(autoregressive)
    tokens = th.randint(256, (2, 7), generator=th.Generator().manual_seed(0))
    together = model(both, instructions(), tokens=tokens)
    alone = model({"agentview": pictures["agentview"]}, instructions(1), tokens=tokens[:1])
    th.testing.assert_close(together.logits[:1], alone.logits, **TOLERANCE)
    th.testing.assert_close(together.hidden[:1], alone.hidden, **TOLERANCE)
    steps = iter(tokens.T)
    cached = model.decode(both, instructions(), choose=lambda logits: next(steps))[1]
    th.testing.assert_close(cached.logits, together.logits, **TOLERANCE)
    th.testing.assert_close(cached.hidden, together.hidden, **TOLERANCE)


@th.no_grad()
def test_attention_of_any_implementation(sft, autoregressive, both):
    """With padding in the batch, and without: the masks are the model's and not those of one kernel."""
    for path in (sft, autoregressive):
        models = [OpenVLAModel.from_pretrained(path, attn_implementation=kind) for kind in ("sdpa", "eager")]
        assert [model.language_model.config._attn_implementation for model in models] == ["sdpa", "eager"]
        kwargs = {"tokens": th.full((2, 7), 100)} if models[0].autoregressive else {}
        for instruction in (instructions(), instructions(1).expand(2, -1)):
            sdpa, eager = (model(both, instruction, **kwargs).logits for model in models)
            th.testing.assert_close(sdpa, eager, **TOLERANCE)


def test_images_bit_by_bit(pictures):
    """JPEG, Lanczos and crop as TensorFlow does them, the bicubic resize as torchvision does it."""
    expected = golden("images")
    seen = {
        key: center_crop(resize_lanczos(jpeg_round_trip(picture.flip(-1)), 224), 224)[0].permute(1, 2, 0).numpy()
        for key, picture in pictures.items()
    }
    np.testing.assert_array_equal(seen["agentview"], expected["agentview"])
    np.testing.assert_array_equal(seen["wrist"][::4, ::4], expected["wrist"])
    bicubic = resize_bicubic(pictures["agentview"].flip(-1), 224)[0].permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(bicubic, expected["bicubic"])
    wide = th.cat([pictures["agentview"].flip(2)[..., :240, :], pictures["wrist"].flip(2)[..., :240, :64]], dim=3)
    config = OpenVLAConfig(libero_images=False)  # what two arms see is cropped from its own size
    cropped = ((pixel_values([wide], config)[0, 0, 3:] * 0.5 + 0.5) * 255).round()[:, ::4, ::4]
    np.testing.assert_array_equal(cropped.permute(1, 2, 0).numpy(), expected["wide"])
    for profile, key in (("simplevla-rl", "pixels"), ("openvla", "pixels"), ("rlinf", "bicubic_pixels")):
        pixels = pixel_values([pictures["agentview"]], OpenVLAConfig(input_profile=profile))
        assert pixels.shape == (1, 1, 6, 224, 224)
        np.testing.assert_allclose(pixels[0, 0, :, ::8, ::8].numpy(), expected[key], **TOLERANCE)


@pytest.mark.parametrize(("height", "width"), tiny.PICTURE_SIZES)
def test_jpeg_and_lanczos_bit_by_bit(height, width):
    """Noise of any size comes out of JPEG and TensorFlow's Lanczos resize with the reference's bytes."""
    expected = json.loads((tiny.HERE / "tensorflow.json").read_text())[f"{height}x{width}"]
    picture = th.as_tensor(tiny.noise(height, width)).permute(2, 0, 1)[None]
    assert checksum(resize_lanczos(jpeg_round_trip(picture), 224)) == expected[0]
    # openvla-oft resizes what has another size, of LIBERO or not, and crops everything
    for libero_images in (False, True):
        config = OpenVLAConfig(input_profile="openvla-oft", libero_images=libero_images)
        pixels = pixel_values([picture.flip(-1) if libero_images else picture], config)[:, 0, 3:]
        assert checksum(((pixels * 0.5 + 0.5) * 255).round().to(th.uint8)) == expected[1]


def test_rlinf_crops_no_picture(pictures):
    """Off LIBERO it resizes as on LIBERO, and mirrors nothing."""
    wide = pictures["agentview"][..., :180, :]
    for profile in ("rlinf", "rlinf-openvla"):
        config = OpenVLAConfig(input_profile=profile, libero_images=False)
        seen = ((pixel_values([wide], config)[:, 0, 3:] * 0.5 + 0.5) * 255).round().to(th.uint8)
        assert th.equal(seen, resize_bicubic(wide, 224))


def test_images_of_any_size(pictures):
    for height, width in ((64, 64), (100, 75), (224, 224)):
        small = pictures["agentview"][..., :height, :width]
        assert jpeg_round_trip(small).shape == small.shape
        assert resize_lanczos(small, 32).shape == center_crop(small, 32).shape == (1, 3, 32, 32)
    flat = th.full((1, 3, 30, 30), 200, dtype=th.uint8)
    assert (center_crop(resize_lanczos(jpeg_round_trip(flat), 20), 20) == 200).all()
    th.testing.assert_close(resize_lanczos(small, 224), small)


def test_prompts():
    tokenizer = PromptTokenizer(tiny.tokenizer_json())
    for i, instruction in enumerate(tiny.INSTRUCTIONS):
        ids = tokenizer.prompt_ids(instruction)
        np.testing.assert_array_equal(ids, golden("prompts")[f"simplevla_{i}"])
        np.testing.assert_array_equal(ids, golden("prompts")[f"rlinf_{i}"])
    plain = PromptTokenizer(json.dumps({**json.loads(tiny.tokenizer_json()), "post_processor": None}))
    assert plain.prompt_ids(tiny.INSTRUCTIONS[0]) == tokenizer.prompt_ids(tiny.INSTRUCTIONS[0])
    ids, mask = tokenizer(instructions(3).numpy(), pad_token_id=32000)
    assert ids.shape == mask.shape and (ids[:, 0] == 1).all() and (ids[:, -1] == 29871).all() and mask[:, 0].all()
    assert ((ids == 32000) == (mask == 0)).all()
    for row, keep, instruction in zip(ids, mask, tiny.INSTRUCTIONS, strict=True):
        assert row[keep == 1].tolist() == tokenizer.prompt_ids(instruction)


def test_every_token_executes_what_the_reference_executes():
    expected = golden("actions")
    statistics = tiny.statistics(tiny.LIBERO_KEY)["action"]
    tokens = np.repeat(31999 - expected["ids"][:, None], 7, axis=1)
    np.testing.assert_array_equal(np.minimum(tokens[:, 0], 254), expected["bins"])
    np.testing.assert_allclose(decode_tokens(tokens, statistics), expected["unnormalised"], atol=1e-7)
    executed = decode_tokens(tokens, {**statistics, "gripper": "open_is_one"})
    np.testing.assert_allclose(executed, expected["executed"], atol=1e-7)
    assert set(executed[:, 6]) == {-1.0, 1.0}
    # The highest token opens; the two highest share a centre
    assert tokens[0, 0] == 255 and executed[0, 6] == -1.0 and executed[255, 6] == 1.0
    assert (executed[0] == executed[1]).all() and (executed[1, :6] > executed[2, :6]).all()


def test_gripper_round_trip():
    statistics = {**tiny.statistics(tiny.LIBERO_KEY)["action"], "gripper": "open_is_one"}
    actions = np.zeros((3, 7))
    actions[:, 6] = [-1.0, 1.0, 0.3]
    tokens = encode_actions(actions, statistics)
    assert tokens[:, 6].tolist() == [255, 127, 127]  # as fine-tuning data: 1 is open, 0 closed
    assert decode_tokens(tokens, statistics)[:, 6].tolist() == [-1.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="open_is_one"):
        decode_tokens(tokens, {**statistics, "gripper": "closed_is_one"})


def test_axis_angle():
    expected = golden("actions")
    found = axis_angle(th.as_tensor(expected["quaternions"])).numpy()
    np.testing.assert_allclose(found, expected["axis_angles"], atol=1e-9)


def test_proprioception_is_normalised_and_clipped():
    norm_stats = {tiny.LIBERO_KEY: tiny.statistics(tiny.LIBERO_KEY)}
    config = OpenVLAConfig(norm_stats=norm_stats, proprio_inputs=8, proprio_dim=8)
    statistics = norm_stats[tiny.LIBERO_KEY]["proprio"]
    low, high = (th.tensor([statistics[key]]) for key in ("q01", "q99"))
    for proprio, value in ((low, -1.0), (high, 1.0), (0.5 * (low + high), 0.0), (high + 1.0, 1.0)):
        th.testing.assert_close(model_proprio(proprio, config), th.full((1, 8), value), **TOLERANCE)


# ------------------------------------------------------------------------------------------------- the published layout


def read_tensors(directory):
    tensors = {}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, "np") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def test_layout_round_trip(sft, tmp_path, both):
    """What was read is written again: every tensor, bit by bit, under its name, in shards."""
    model = OpenVLAModel.from_pretrained(sft)
    model.save_pretrained(tmp_path / SFT, max_shard_size=10**7)
    shards = sorted(path.name for path in (tmp_path / SFT).glob("*.safetensors"))
    assert len(shards) >= 2 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    before, after = read_tensors(sft), read_tensors(tmp_path / SFT)
    assert {name: list(x.shape) for name, x in after.items()} == tiny.shapes()
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name], tensor, err_msg=name)
    index = json.loads((tmp_path / SFT / "model.safetensors.index.json").read_text())
    assert sorted(index["weight_map"]) == sorted(before)
    published = tiny.published_config(tiny.LIBERO_KEY)
    config = json.loads((tmp_path / SFT / "config.json").read_text())
    for key in set(published) - {"text_config", "transformers_version"}:
        assert config[key] == published[key], key
    assert config["text_config"]["vocab_size"] == 32064 and "is_causal" not in config["text_config"]
    preprocessor = json.loads((tmp_path / SFT / "preprocessor_config.json").read_text())
    assert preprocessor["means"][0] == [0.484375, 0.455078125, 0.40625]
    # A name that tells nothing: by now config.json does
    (tmp_path / SFT).rename(tmp_path / "student")
    again = OpenVLAModel.from_pretrained(tmp_path / "student")
    with th.no_grad():
        th.testing.assert_close(again(both, instructions()).logits, model(both, instructions()).logits)
    # One file over several: none of the old ones is left
    again.save_pretrained(tmp_path / "student")
    assert [path.name for path in (tmp_path / "student").glob("*.safetensors*")] == ["model.safetensors"]


def test_projector_file_and_half_precision(hub, tmp_path):
    path = tiny.write_checkpoint(hub / "half" / SFT, proprio_inputs=8)
    model = OpenVLAModel.from_pretrained(path, dtype=th.bfloat16)
    assert {p.dtype for p in model.parameters()} == {th.bfloat16}
    assert model.language_model.model.rotary_emb.inv_freq.dtype == th.float32
    model.save_pretrained(tmp_path / "half")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    again = OpenVLAModel.from_pretrained(tmp_path / "half")  # in the type that is stored
    for (name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        assert a.dtype == b.dtype and th.equal(a, b), name
    single = OpenVLAModel.from_pretrained(tmp_path / "half", dtype=th.float32)
    assert {p.dtype for p in single.parameters()} == {th.float32}


def test_export_has_what_openvla_oft_asks_for(tmp_path):
    """Its loader replaces the statistics by those of a file, and transformers 4.40 knows no ``rope_parameters``."""
    rope = {"rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    text_config = {**tiny.published_config(tiny.LIBERO_KEY)["text_config"], **rope}
    path = tiny.write_checkpoint(tmp_path / SFT, text_config=text_config)
    (path / "tokenizer.model").write_bytes(b"\0sentencepiece\0")
    model = OpenVLAModel.from_pretrained(path)
    fresh = OpenVLAModel(OpenVLAConfig(**model.config.to_dict()))
    fresh.load_state_dict(model.state_dict())  # as from a zip, which knows no folder
    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / "dataset_statistics.json").write_text(json.dumps({"kuka": {}}))  # of what was here before
    fresh.save_pretrained(saved)

    def read(name):
        return json.loads((saved / name).read_text())

    assert read("dataset_statistics.json") == {tiny.LIBERO_KEY: tiny.statistics(tiny.LIBERO_KEY)}
    assert (saved / "tokenizer.model").read_bytes() == b"\0sentencepiece\0"
    assert read("special_tokens_map.json")["pad_token"] == "<PAD>" and read("added_tokens.json") == {"<PAD>": 32000}
    ids = {key: read("generation_config.json")[f"{key}_token_id"] for key in ("bos", "eos", "pad")}
    assert ids == {"bos": 1, "eos": 2, "pad": 32000}
    exported = read("config.json")["text_config"]
    assert {key: exported[key] for key in rope} == rope
    again = OpenVLAModel.from_pretrained(saved).language_model.model.rotary_emb.inv_freq
    assert th.equal(again, model.language_model.model.rotary_emb.inv_freq)
    # The hub gets all of it
    uploaded = write_folder(saved, tmp_path / "uploaded", "somebody/openvla")
    assert {path.name for path in saved.iterdir()} <= {path.name for path in uploaded.iterdir()}


def test_gamma_is_the_other_name_of_the_layer_scales(sft, tmp_path):
    path = tiny.write_checkpoint(tmp_path / SFT)
    for shard in path.glob("*.safetensors"):
        with safe_open(shard, "np") as file:
            tensors = {name.replace("scale_factor", "gamma"): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        save_file(tensors, shard)
    index = (path / "model.safetensors.index.json").read_text().replace("scale_factor", "gamma")
    (path / "model.safetensors.index.json").write_text(index)
    for a, b in zip(
        OpenVLAModel.from_pretrained(path).parameters(), OpenVLAModel.from_pretrained(sft).parameters(), strict=True
    ):
        assert th.equal(a, b)


def test_nothing_is_left_on_the_meta_device(sft):
    model = OpenVLAModel.from_pretrained(sft)
    assert not any(x.is_meta for x in [*model.parameters(), *model.buffers()])
    assert all(p.requires_grad for p in model.parameters()) and not model.training


def test_auto_classes(sft, autoregressive, tmp_path):
    """No code of the checkpoint is run: the classes are registered."""
    assert isinstance(AutoModel.from_pretrained(sft), OpenVLAModel)
    OpenVLAModel.from_pretrained(autoregressive).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, OpenVLAConfig) and config.input_profile == "openvla"
    ours, theirs = OpenVLAConfig.from_pretrained(tmp_path).to_dict(), config.to_dict()
    assert theirs.pop("_name_or_path") == str(tmp_path) and ours.pop("_name_or_path") is not None
    assert ours == theirs


def test_published_sizes_follow_from_an_empty_configuration():
    """The published config.json has no sizes but those of the vocabulary."""
    config = OpenVLAConfig(**{**tiny.published_config(tiny.LIBERO_KEY), "text_config": {"vocab_size": 32064}})
    with th.device("meta"):
        model = OpenVLAModel(config)
    assert model.projector.fc1.weight.shape == (8704, 2176) and model.projector.fc2.weight.shape == (4096, 8704)
    assert len(model.language_model.model.layers) == 32 and config.hidden_size == 4096
    vision = model.vision_backbone
    assert (len(vision.dino.encoder.layer), len(vision.siglip.encoder.layers)) == (23, 26)
    n = sum(x.numel() for x in [*model.parameters(), *vision.unused.buffers()])
    assert n == 7_541_237_184 + 1024  # as published, and the CLS token's position, which is part of it there


def test_hub_cache(sft, tmp_path, monkeypatch):
    """An id of the hub: found in the hub's cache without a network, with the profile that its owner's name tells."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--RLinf--RLinf-OpenVLAOFT-some-teacher"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123abc")
    snapshot = repository / "snapshots" / "0123abc"
    snapshot.parent.mkdir()
    snapshot.symlink_to(sft)
    assert resolve_checkpoint("RLinf/RLinf-OpenVLAOFT-some-teacher") == snapshot
    assert read_checkpoint_config(snapshot)[1].input_profile == "rlinf"
    with pytest.raises(FileNotFoundError, match="hf download nobody/nothing"):
        resolve_checkpoint("nobody/nothing")
    # A saved algorithm has the arguments of its body, and goes without the checkpoint it once started from
    with pytest.warns(UserWarning, match="nobody/nothing does not exist"):
        VLAPolicy(*spaces_of(OpenVLAConfig()), lambda _: 1e-3, checkpoint="nobody/nothing", body_kwargs={})


# -------------------------------------------------------------------------------------------------------------- errors


def test_fields_of_other_software_are_understood(tmp_path):
    """RLinf and SimpleVLA-RL write their options into config.json, some under names that mean something else here."""
    options = {
        "implement_version": "rlinf", "action_dim": 7, "num_action_chunks": 5, "num_images_in_input": 2,
        "unnorm_key": "libero_object", "hidden_size": 4096, "vocab_size": 32000, "image_size": [224, 224],
        "use_proprio": False, "proprio_dim": 7, "max_prompt_length": 128,
    }  # fmt: skip
    path = tiny.write_checkpoint(tmp_path / "student", **options)
    config = OpenVLAConfig.from_pretrained(path)
    assert (config.input_profile, config.n_tokens, config.hidden_size) == ("rlinf", 35, 64)
    assert (config.image_keys, config.image_size) == (["agentview", "wrist"], [256, 256])
    assert (config.proprio_inputs, config.proprio_dim) == (0, 0)
    assert OpenVLAConfig.from_pretrained(path, input_profile="simplevla-rl").input_profile == "simplevla-rl"
    path = tiny.write_checkpoint(tmp_path / "other", implement_version="official", use_proprio=True, proprio_dim=8)
    config = OpenVLAConfig.from_pretrained(path)
    assert (config.input_profile, config.proprio_inputs, config.proprio_dim) == ("simplevla-rl", 8, 9)
    # What is completed stays so, and is not translated again
    assert complete_checkpoint(path, image_size=[128, 128]).proprio_dim == 9
    config = OpenVLAConfig.from_pretrained(path)
    assert (config.image_size, config.proprio_inputs, config.proprio_dim) == ([128, 128], 8, 9)


@pytest.mark.parametrize(
    ("name", "profile"),
    [
        ("models--Haozhan72--Openvla-oft-SFT-libero10-trajall/snapshots/1a2b", "simplevla-rl"),
        ("models--RLinf--RLinf-OpenVLAOFT-LIBERO-130/snapshots/1a2b", "rlinf"),
        ("RLinf-OpenVLAOFT-RoboTwin-SFT-place_empty_cup", "simplevla-rl"),
        ("models--openvla--openvla-7b-finetuned-libero-10/snapshots/1a2b", "openvla"),
        ("models--RLinf--RLinf-OpenVLA-PPO-ManiSkill3-25ood/snapshots/1a2b", "rlinf-openvla"),
        ("RLinf-OpenVLA-GRPO-ManiSkill3-25ood", "rlinf-openvla"),
        ("models--RLinf--RLinf-OpenVLAOFT-GRPO-ManiSkill3-25ood/snapshots/1a2b", "rlinf"),
        ("models--RLinf--Openvla-oft-SFT-libero10-trajall/snapshots/1a2b", "simplevla-rl"),
        ("models--RLinf--RLinf-Pi0-MetaWorld-SFT/snapshots/1a2b", None),
        ("rlinf-distilled", None),
        ("rlinf/my-model", None),
        ("openvla-7b+libero_object_no_noops+b8+lr-0.0005", None),
    ],
)
def test_profiles_of_published_names(tmp_path, name, profile):
    if profile is None:
        with pytest.raises(ValueError, match="does not say what inputs"):
            detect_profile(tmp_path / name)
    else:
        assert detect_profile(tmp_path / name) == profile


def broken(tmp_path, name=SFT, **changes):
    path = tiny.write_checkpoint(tmp_path / name)
    config = {**json.loads((path / "config.json").read_text()), **changes}
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_profile_that_does_not_show_is_asked_for(tmp_path):
    path = broken(tmp_path, "my-fine-tuned-model")
    with pytest.raises(ValueError, match=r"'openvla', 'openvla-oft', 'rlinf'") as error:
        read_checkpoint_config(path)
    # The command that the message gives
    exec(re.search(r'python -c "(.*)"', str(error.value))[1], {})
    assert read_checkpoint_config(path)[1].input_profile == "openvla-oft"
    with pytest.raises(ValueError, match="must be one of"):
        complete_checkpoint(path, input_profile="vla-rl")
    with pytest.raises(ValueError, match="Unknown fields.*profile"):
        complete_checkpoint(path, profile="rlinf")
    assert complete_checkpoint(path, input_profile="rlinf").input_profile == "rlinf"
    assert read_checkpoint_config(path)[1].input_profile == "rlinf"


def test_statistics_are_chosen_and_missing_ones_named(tmp_path):
    path = broken(tmp_path, norm_stats={"bridge_orig": tiny.statistics(tiny.LIBERO_KEY), "kuka": {}})
    # dataset_statistics.json is what the checkpoint was fine-tuned on
    assert OpenVLAConfig.from_pretrained(path).unnorm_key == tiny.LIBERO_KEY
    assert complete_checkpoint(path, unnorm_key="libero_object").statistics["gripper"] == "open_is_one"
    with pytest.raises(ValueError, match=r"'libero_spatial' names no.*'bridge_orig', 'kuka', 'libero_object_no_noops'"):
        complete_checkpoint(path, unnorm_key="libero_spatial")
    with pytest.raises(ValueError, match="'kuka' have no 'action'"):
        complete_checkpoint(path, unnorm_key="kuka")
    # A checkpoint that was saved here may change its mind too
    saved = tmp_path / "saved"
    two = {"bridge_orig": tiny.statistics(tiny.ARMS_KEY), "libero_goal": tiny.statistics(tiny.LIBERO_KEY)}
    OpenVLAConfig(norm_stats=two, unnorm_key="libero_goal").save_pretrained(saved)
    with pytest.raises(ValueError, match="14 action dimensions, action_dim is 7"):
        complete_checkpoint(saved, unnorm_key="bridge_orig")
    assert complete_checkpoint(saved, unnorm_key="bridge_orig", action_dim=14).statistics["q01"][0] != 0
    path = broken(tmp_path / "none", norm_stats={})
    (path / "dataset_statistics.json").unlink()
    with pytest.raises(ValueError, match="no statistics"):
        read_checkpoint_config(path)


def test_whatever_a_damaged_checkpoint_holds(tmp_path):
    path = tiny.write_checkpoint(tmp_path / SFT, proprio_inputs=8, image_keys=["agentview", "wrist"])
    rng = np.random.default_rng(0)
    config, index = path / "config.json", path / "model.safetensors.index.json"
    weights = path / "model-00001-of-00002.safetensors"

    def load():
        OpenVLAModel.from_pretrained(path, config=read_checkpoint_config(path)[1])

    check_damaged(config, damaged_configurations(json.loads(config.read_text()), rng, 40), load)
    check_damaged(config, damaged_configurations(json.loads(config.read_text()), rng, 10),
                  lambda: OpenVLAConfig.from_pretrained(path))  # fmt: skip
    check_damaged(weights, damaged_weights(weights.read_bytes(), rng, 4), load)
    check_damaged(index, damaged_configurations(json.loads(index.read_text()), rng, 4), load)
    for name in ("dataset_statistics.json", "proprio_projector--150000_checkpoint.pt", "tokenizer.json"):
        check_damaged(path / name, [b"", b"[1]", b"{", (path / name).read_bytes()[:-9]], load)
    load()


@pytest.mark.parametrize("part", ["text_config", "dino_config", "siglip_config"])
@pytest.mark.parametrize("layers", [10**9, 9_999, 1e9, 0])
def test_more_layers_than_there_are_weights(tmp_path, part, layers):
    path = tiny.write_checkpoint(tmp_path / SFT)
    values = json.loads((path / "config.json").read_text())
    values[part]["num_hidden_layers"] = layers
    (path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="layers") as error:
        OpenVLAModel.from_pretrained(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("fault", ["missing", "integer", "shape", "nan"])
def test_damaged_weights_are_refused(tmp_path, fault):
    path = tiny.write_checkpoint(tmp_path / SFT)
    shard = path / "model-00001-of-00002.safetensors"
    with safe_open(shard, "np") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    # The unused weights of the last blocks may be missing
    name = next(name for name in weights if "blocks.0." in name or "layers.0." in name)
    if fault == "missing":
        del weights[name]
    elif fault == "integer":
        weights[name] = weights[name].astype(np.int32)
    elif fault == "shape":
        weights[name] = weights[name][:-1].copy()
    else:
        weights[name] = np.full_like(weights[name], np.nan)
    save_file(weights, shard, metadata={"format": "pt"})
    said = r"bias has shape \(31,\), expected \(32,\)" if fault == "shape" else re.escape(name)
    with pytest.raises(ValueError, match=said) as error:
        OpenVLAModel.from_pretrained(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("file", ["../other/model.safetensors", "/etc/passwd", "config.json", 3])
def test_an_index_that_names_files_elsewhere(tmp_path, file):
    path = tiny.write_checkpoint(tmp_path / SFT)
    index = path / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"][next(iter(values["weight_map"]))] = file
    index.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=f"{index} is damaged"):
        OpenVLAModel.from_pretrained(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("libero_images", "yes"),
        ("gripper", 1),
        ("proprio_inputs", -1),
        ("pad_to_multiple_of", 10**6),
        ("pad_token_id", 10**6),
        ("pixel_stds", [[0.0] * 3] * 2),
        ("pixel_means", [0.5] * 3),
        ("norm_stats", [1]),
    ],
)
def test_fields_that_make_no_sense(tmp_path, field, value):
    path = broken(tmp_path, **{field: value})
    with pytest.raises(ValueError) as error:
        read_checkpoint_config(path)
    assert str(path) in str(error.value)


def test_film_is_refused(tmp_path):
    path = tiny.write_checkpoint(tmp_path / SFT)
    (path / "vision_backbone--150000_checkpoint.pt").touch()
    with pytest.raises(ValueError, match="FiLM: vision_backbone--150000_checkpoint.pt"):
        OpenVLAModel.from_pretrained(path)
    with pytest.raises(ValueError, match="FiLM: use_film"):
        read_checkpoint_config(broken(tmp_path / "said", use_film=True))


@pytest.mark.parametrize("inside", ["", "lora_adapter"])
def test_adapters_are_to_be_merged(tmp_path, inside):
    """Their folder alone, and what openvla-oft leaves of a run without merging: with or without a config.json."""
    (tmp_path / inside).mkdir(exist_ok=True)
    (tmp_path / inside / "adapter_config.json").write_text("{}")
    for load in (OpenVLAModel.from_pretrained, resolve_checkpoint):
        with pytest.raises(ValueError, match="LoRA adapters.*merge_and_unload"):
            load(tmp_path)
    whole = tiny.write_checkpoint(tmp_path / "whole" / SFT)
    (whole / "config.json").rename(tmp_path / "config.json")
    for load in (OpenVLAModel.from_pretrained, read_checkpoint_config):
        with pytest.raises(ValueError, match="no weights of its own.*merge_and_unload"):
            load(tmp_path)


def test_projector_that_does_not_fit_the_statistics(tmp_path):
    """Known from the configuration, before a weight is read and long before the first forward pass."""
    path = tiny.write_checkpoint(tmp_path / SFT, proprio_inputs=14)
    with pytest.raises(ValueError, match="14 inputs.*'libero_object_no_noops' are for 8"):
        read_checkpoint_config(path)
    without = {tiny.LIBERO_KEY: {"action": tiny.statistics(tiny.LIBERO_KEY)["action"]}}
    with pytest.raises(ValueError, match="no 'proprio'"):
        OpenVLAConfig(norm_stats=without, proprio_inputs=8, proprio_dim=9)


def test_long_instructions_are_not_cut():
    text = "pick up the milk " * 10
    with pytest.raises(ValueError, match=f"{len(text)} bytes, the observation has room for 128"):
        encode_instruction(text)
    tokenizer = PromptTokenizer(tiny.tokenizer_json())
    ids, _ = tokenizer(encode_instruction(text, 200)[None], pad_token_id=32000)
    assert ids[0].tolist() == tokenizer.prompt_ids(text)
    # An env with longer instructions is welcome: they become a prompt
    config = OpenVLAConfig()
    observations, tokens = spaces_of(config)
    observations["instruction"] = spaces.Box(0, 255, (200,), np.uint8)
    config.check_spaces(observations, tokens)


def test_constant_dimensions_become_the_middle_token():
    """As openvla's data loader has it: constant is what has equal extremes, whatever the quantiles."""
    statistics = {key: [value] * 3 for key, value in (("q01", -0.5), ("q99", 0.5), ("min", -1.0), ("max", 1.0))}
    statistics["mask"] = [True, True, False]
    for key in ("q01", "q99", "min", "max"):
        statistics[key][0] = 0.25
    assert encode_actions(np.full((1, 3), 0.25), statistics)[0, 0] == 127
    bounds = {key: statistics[key] for key in ("q01", "q99", "mask")}
    assert encode_actions(np.full((1, 3), 0.25), bounds)[0].tolist() == [127, 191, 159]
    assert abs(decode_tokens(np.full((1, 3), 127), bounds)[0, 0] - 0.25) < 1e-6
    # Rarely anything else than the constant, so the quantiles are equal and the extremes are not
    statistics["max"][0] = 1.0
    assert encode_actions(np.array([[0.25, 0, 0], [1.0, 0, 0]]), statistics)[:, 0].tolist() == [0, 255]
    stats = tiny.statistics(tiny.LIBERO_KEY)
    stats["action"] |= {key: [0.25, *stats["action"][key][1:]] for key in ("q01", "q99")}
    config = OpenVLAConfig(norm_stats={"libero": stats})
    assert encode_actions(np.full((1, 7), 0.25), config.statistics)[0, 0] == 0
    stats["action"] |= {key: [0.25, *stats["action"][key][1:]] for key in ("min", "max")}
    config = OpenVLAConfig(norm_stats={"libero": stats})
    assert encode_actions(np.full((1, 7), 0.25), config.statistics)[0, 0] == 127 and "min" not in config.statistics


def test_wrong_layouts_are_refused(tmp_path):
    path = broken(tmp_path)
    (path / "tokenizer.json").rename(path / "tokenizer.model")
    with pytest.raises(FileNotFoundError, match="no tokenizer.json"):
        OpenVLAModel.from_pretrained(path)
    (path / "tokenizer.model").rename(path / "tokenizer.json")
    (path / "action_head--150000_checkpoint.pt").touch()
    with pytest.raises(ValueError, match="continuous actions"):
        OpenVLAModel.from_pretrained(path)
    (path / "action_head--150000_checkpoint.pt").unlink()
    index = path / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    first = whole["weight_map"]["vision_backbone.featurizer.cls_token"]
    index.write_text(json.dumps({"weight_map": {"x": first}}))
    with pytest.raises(ValueError, match="missing.*language_model"):
        OpenVLAModel.from_pretrained(path)
    index.write_text(json.dumps(whole))
    (path / first).unlink()
    with pytest.raises(FileNotFoundError, match=f"{first} is missing"):
        OpenVLAModel.from_pretrained(path)
    for changes, message in (
        ({"vision_backbone_id": "siglip-vit-so400m"}, "vision backbone"),
        ({"model_type": "llama"}, "model type 'llama'"),
        ({"dino_config": {**tiny.DINO, "hidden_size": 64}}, "do not fit its configuration"),
        ({"n_tokens": 10}, "whole number of actions"),
        ({"normalization": "normal"}, "bounds_q99"),
    ):
        path = broken(tmp_path / message, **changes)
        with pytest.raises(ValueError, match=message):
            OpenVLAModel.from_pretrained(path)
    with pytest.raises(FileNotFoundError, match="There is no checkpoint"):
        OpenVLAModel.from_pretrained(tmp_path / "nowhere")


# -------------------------------------------------------------------------------------------------------------- policy


def spaces_of(config):
    size = (*config.image_size, 3)
    found = {key: spaces.Box(0, 255, size, np.uint8) for key in config.image_keys}
    found["instruction"] = spaces.Box(0, 255, (128,), np.uint8)
    return spaces.Dict(found), spaces.MultiDiscrete([256] * config.n_tokens)


def sample(space, n=2):
    space.seed(0)
    obs = {key: np.stack([box.sample() for _ in range(n)]) for key, box in space.spaces.items()}
    obs["instruction"] = instructions(n).numpy()
    return obs


def make_policy(path, **kwargs):
    return VLAPolicy(*spaces_of(read_checkpoint_config(path)[1]), lambda _: 1e-3, checkpoint=path, **kwargs)


def test_policy_trains_every_parameter_and_saves(sft, tmp_path):
    policy = make_policy(sft)
    obs = {key: th.as_tensor(value) for key, value in sample(policy.observation_space).items()}
    actions, _, log_prob = policy(obs)
    th.testing.assert_close(policy.token_log_probs(obs, actions).sum(1), log_prob, atol=1e-3, rtol=1e-5)
    policy.token_log_probs(obs, actions).mean().backward()
    assert [name for name, p in policy.named_parameters() if p.grad is None] == []
    policy.optimizer.step()
    policy.save_checkpoint(tmp_path / "trained")
    again = make_policy(tmp_path / "trained")
    th.testing.assert_close(again.get_distribution(obs).logits, policy.get_distribution(obs).logits)
    policy.save_checkpoint(tmp_path / "trained", dtype=th.bfloat16)
    half = make_policy(tmp_path / "trained")  # stored in half precision, trained in single
    assert half.get_distribution(obs).logits.dtype == th.float32
    th.testing.assert_close(half.get_distribution(obs).logits, policy.get_distribution(obs).logits, atol=0.2, rtol=0)
    # The state dict brings the tokenizer, the arguments the rest: the checkpoint may be gone
    fresh = VLAPolicy(policy.observation_space, policy.action_space, lambda _: 1e-3, **policy.portable_kwargs())
    with pytest.raises(RuntimeError, match="no tokenizer"):
        fresh(obs)
    fresh.load_state_dict(policy.state_dict())
    th.testing.assert_close(fresh.get_distribution(obs).logits, policy.get_distribution(obs).logits)


def test_gradient_checkpointing_changes_nothing(sft, both):
    gradients = []
    for enabled in (False, True):
        model = OpenVLAModel.from_pretrained(sft).train()
        if enabled:
            model.gradient_checkpointing_enable()
        assert model.is_gradient_checkpointing == enabled
        model(both, instructions()).logits.logsumexp(-1).mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        th.testing.assert_close(plain, checkpointed)


def test_autoregressive_policy(autoregressive):
    policy = make_policy(autoregressive, value_head=True)
    obs = {key: th.as_tensor(value) for key, value in sample(policy.observation_space).items()}
    th.manual_seed(0)
    actions, values, log_prob = policy(obs)
    assert actions.shape == (2, 7) and len(set(actions[0].tolist())) > 1
    th.testing.assert_close(policy.token_log_probs(obs, actions).sum(1), log_prob, **TOLERANCE)
    again, evaluated, entropy = policy.evaluate_actions(obs, actions)
    th.testing.assert_close(evaluated, log_prob, **TOLERANCE)
    th.testing.assert_close(policy.predict_values(obs), again)
    distribution = policy.get_distribution(obs, actions)
    assert distribution.logits.shape == (2, 7, 256) and entropy.shape == (2,)
    # Greedy tokens are the modes given the tokens before them
    greedy = th.as_tensor(policy.predict(sample(policy.observation_space), deterministic=True)[0])
    th.testing.assert_close(policy.get_distribution(obs, greedy).mode(), greedy)
    # A token changes the distributions after it, and none before
    other = actions.clone()
    other[:, 3] = (other[:, 3] + 100) % 256
    changed = (policy.get_distribution(obs, other).logits - distribution.logits).abs().amax((0, 2)) > 1e-4
    assert changed.tolist() == [False] * 4 + [True] * 3
    with pytest.raises(ValueError, match="autoregressive.*Pass the actions"):
        policy.get_distribution(obs)


class Pictures(DummyVecEnv):
    """Random pictures, one decision an episode."""

    def __init__(self, config):
        import gymnasium as gym

        class Env(gym.Env):
            observation_space, action_space = spaces_of(config)

            def reset(self, *, seed=None, options=None):
                return {key: value[0] for key, value in sample(self.observation_space, 1).items()}, {}

            def step(self, action):
                return self.reset()[0], 1.0, True, False, {}

        super().__init__([Env])


def test_stable_baselines_drives_the_autoregressive_policy(autoregressive, tmp_path):
    config = read_checkpoint_config(autoregressive)[1]
    model = A2C(VLAPolicy, Pictures(config), n_steps=2, device="cpu", policy_kwargs={"checkpoint": autoregressive})
    before = model.policy.body.projector.fc3.weight.detach().clone()
    model.learn(2)
    assert not th.equal(before, model.policy.body.projector.fc3.weight)


# -------------------------------------------------------------------------------------------------------------- LIBERO


@pytest.fixture(scope="module")
def libero():
    pytest.importorskip("libero", reason="LIBERO is not installed: pip install 'opd_gym[libero]'")


@pytest.mark.libero
def test_our_observation_is_stock_liberos(libero, pictures):
    """The same official state: what our env shows is the stock picture upright, so the model sees the same."""
    import gymnasium as gym

    env = gym.make("LiberoObject-v0", task_ids=(0,), image_size=256, init_states="eval")
    try:
        obs, _ = env.reset(options={"task_id": 0, "init_state_id": 0})
        stock = golden("stock_observation")
        for key in ("agentview", "wrist"):
            difference = np.abs(obs[key].astype(int) - stock[key][::-1])
            assert difference.mean() < 0.5, key  # another GL library shades a little differently
        state = np.concatenate([stock["eef_pos"], stock["eef_quat"], stock["gripper_qpos"]])
        np.testing.assert_allclose(obs["proprio"], state, atol=1e-3)
    finally:
        env.close()


@pytest.mark.libero
def test_opd_on_libero(libero, hub, sft, tmp_path):
    """Student and teacher in the published layout, one iteration of OPD on the real simulator."""
    import gymnasium as gym

    student = tiny.write_checkpoint(hub / "student" / SFT)
    teacher = tiny.write_checkpoint(hub / "teacher" / RL)
    for checkpoint in (student, teacher):
        complete_checkpoint(checkpoint, image_size=[64, 64])  # the published 256 would only take longer
    assert checkpoint_settings({"checkpoint": student})["visuals"] == "exact", "what it was trained on"
    env = gym.make("LiberoObject-v0", task_ids=(0,), image_size=64, visuals="light", horizon=24)
    model = OPD(
        "VLAPolicy", env, teacher=teacher, policy_kwargs={"checkpoint": student}, n_steps=2, gradient_steps=2,
        batch_size=2, seed=0,
    )  # fmt: skip
    try:
        tokens = model.env.envs[0]
        while not isinstance(tokens, ActionTokens):
            tokens = tokens.env
        assert tokens.statistics == model.policy.statistics and tokens.statistics["gripper"] == "open_is_one"
        assert model.action_space == spaces.MultiDiscrete([256] * 56)
        # What is executed is what the reference executes
        expected = golden("actions")
        action = tokens.action(np.full(56, 31999 - expected["ids"][100]))
        np.testing.assert_allclose(action, np.tile(expected["executed"][100], (8, 1)), atol=1e-7)
        before = model.policy.body.projector.fc3.weight.detach().clone()
        model.learn(2)
        assert model.num_env_steps == 16 and not th.equal(before, model.policy.body.projector.fc3.weight)
        model.save(tmp_path / "student")
        obs = model.env.reset()
        loaded = OPD.load(tmp_path / "student")
        np.testing.assert_array_equal(
            model.predict(obs, deterministic=True)[0], loaded.predict(obs, deterministic=True)[0]
        )
    finally:
        model.env.close()


def test_a_policy_of_liberos_own_demonstrations_trains_at_their_pace(tmp_path, monkeypatch):
    """People take up to 193 steps for an episode of LIBERO-Spatial; the zoo's 112 are for students of the expert."""
    student = str(tiny.write_checkpoint(tmp_path / SFT))
    complete_checkpoint(student, image_size=[64, 64])

    def horizon(env_id, checkpoint, *given):
        args = TrainArgs(env=env_id, student=checkpoint, teacher=checkpoint, hyperparams=list(given))
        return complete_hyperparams(args)["env_kwargs"].get("horizon")

    for env_id, ours in (("LiberoObject-v0", 160), ("LiberoSpatialTask3-v0", 112), ("Libero10-v0", 240)):
        assert horizon(env_id, None) == ours and horizon(env_id, student) is None
        assert horizon(env_id, student, f"env_kwargs.horizon:{ours}") == ours, "what the user says wins"
    assert horizon("Libero90-v0", student) is None
    own = tmp_path / "own.yml"
    own.write_text("default: {policy: VLAPolicy, env_kwargs: {horizon: 50}}\n")
    args = TrainArgs(env="LiberoObject-v0", student=student, teacher=student, config=own)
    assert complete_hyperparams(args)["env_kwargs"]["horizon"] == 50

    # In Python as on the command line
    class Built(Exception):
        pass

    def built(env_id, run, **_):
        raise Built(run["env_kwargs"])

    monkeypatch.setattr(make, "build_env", built)
    for checkpoint, expected in ((student, None), ("libero-object-student", 160)):
        with pytest.raises(Built) as found:
            OPD("VLAPolicy", "LiberoObject-v0", teacher=student, policy_kwargs={"checkpoint": checkpoint})
        assert found.value.args[0].get("horizon") == expected


@pytest.mark.libero
def test_a_checkpoint_is_evaluated_in_half_precision(libero, tmp_path, monkeypatch):
    """Of 7 billion weights a GPU of 24 GB holds 15 GB, and not 30."""
    student = tiny.write_checkpoint(tmp_path / SFT)
    complete_checkpoint(student, image_size=[64, 64])

    class Played(Exception):
        pass

    def played(policy, *_, **__):
        raise Played(policy)

    monkeypatch.setattr(evaluate, "evaluate_success", played)
    words = ["eval", "--env", "LiberoObjectTask0-v0", "--checkpoint", str(student), "--device", "cpu", "--n-envs", "1"]
    for more, dtype in ((["--dtype", "bfloat16"], th.bfloat16), ([], th.float32)):
        with pytest.raises(Played) as found:
            main([*words, *more])
        policy = found.value.args[0]
        assert {weight.dtype for weight in policy.body.language_model.parameters()} == {dtype}


def test_profiles_are_complete():
    assert set(INPUT_PROFILES) == {"openvla", "openvla-oft", "simplevla-rl", "rlinf", "rlinf-openvla"}
    assert [name for name, profile in INPUT_PROFILES.items() if not profile.parallel] == ["openvla", "rlinf-openvla"]
