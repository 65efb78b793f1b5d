"""LoRA, precision, gradient checkpointing, micro-batches: what is trained, what is saved, what is computed."""

import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch as th
from golden.openvla import tiny as tiny_openvla
from gymnasium import spaces
from huggingface_hub import ModelCard
from stable_baselines3.common.utils import get_device
from toys import TINY_BODY, Robot, vec
from vlas import SMALL, Recorder, logits, observation_space, sample, tensors, train

from opd_gym import GRPO, OPD, PPO, SFT, hub
from opd_gym.algorithms.buffers import micro_batches
from opd_gym.algorithms.teachers import make_teacher
from opd_gym.envs.wrappers import ActionChunk, ActionTokens, EpisodeControl
from opd_gym.evaluation import EpisodeRecord, EvaluationResult
from opd_gym.policies.body import read_checkpoint_config
from opd_gym.policies.vla import VLAPolicy
from opd_gym.versions import read_versions, versions

pytest.importorskip("peft", reason="peft is not installed: pip install 'opd_gym[vla]'")

SPACE = observation_space()
LORA = {"r": 4}


def make(**kwargs):
    return VLAPolicy(SPACE, spaces.MultiDiscrete([256] * 14), lambda _: 1e-2, **kwargs)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A checkpoint of the tiny body."""
    th.manual_seed(0)
    path = tmp_path_factory.mktemp("checkpoints") / "base"
    make(body_kwargs=SMALL).save_checkpoint(path)
    return path


@pytest.fixture(scope="module")
def openvla(tmp_path_factory):
    return tiny_openvla.write_checkpoint(tmp_path_factory.mktemp("hub") / "Openvla-oft-SFT-libero-object-traj1")


@pytest.fixture
def obs():
    return sample(SPACE)


def openvla_space(size=256):
    return observation_space(size, keys=("agentview",), proprio=0)


def make_openvla(checkpoint, **kwargs):
    # The images of the configuration are larger than what tests need
    space = openvla_space(read_checkpoint_config(checkpoint)[1].image_size[0])
    return VLAPolicy(space, spaces.MultiDiscrete([256] * 56), lambda _: 1e-3, checkpoint=checkpoint, **kwargs)


# ---------------------------------------------------------------------------------------------------------------- LoRA


def test_only_adapters_and_heads_are_trained(base, obs):
    plain = make(checkpoint=base)
    policy = make(checkpoint=base, lora=LORA, value_head=True)
    trained = [name for name, p in policy.named_parameters() if p.requires_grad]
    assert trained and all(".lora_" in name or name.startswith("value_net.") for name in trained)
    linear = [m for m in plain.body.modules() if isinstance(m, th.nn.Linear)]
    assert sum(".lora_A." in name for name in trained) == len(linear)
    expected = sum(4 * (m.in_features + m.out_features) for m in linear) + policy.value_net.weight.numel() + 1
    assert sum(p.numel() for p in policy.parameters() if p.requires_grad) == expected
    assert sum(p.numel() for group in policy.optimizer.param_groups for p in group["params"]) == expected
    # Adapters begin without effect, and what is frozen stays
    np.testing.assert_array_equal(logits(policy, obs), logits(plain, obs))
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    train(policy, obs)
    changed = {name for name, p in policy.named_parameters() if not th.equal(p, before[name])}
    assert changed == {name for name in trained if not name.startswith("value_net.")}
    assert not th.equal(logits(policy, obs), logits(plain, obs))


def test_openvla_all_linear(openvla):
    """Rank 32 by default, on every linear layer but the output embedding; the proprioception projector too."""
    policy = make_openvla(openvla, lora=True)
    adapted = {
        name.removesuffix(".lora_A.default.weight") for name, _ in policy.named_parameters() if ".lora_A" in name
    }
    linear = {
        name.removesuffix(".base_layer")
        for name, m in policy.named_modules()
        if isinstance(m, th.nn.Linear) and ".lora_" not in name
    }
    assert linear - adapted == {"body.language_model.lm_head"} and not adapted - linear
    assert {len(p) for name, p in policy.named_parameters() if ".lora_A" in name} == {32}
    parts = {name.split(".")[1] for name in adapted}
    assert parts == {"language_model", "projector", "vision_backbone"}
    assert policy.body.language_model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True, "lora_alpha": 8}])
def test_merged_checkpoint_computes_the_same(base, obs, tmp_path, options):
    policy = make(checkpoint=base, lora={**LORA, **options})
    train(policy, obs)
    expected = logits(policy, obs)
    policy.save_checkpoint(tmp_path, merge=True)
    again = make(checkpoint=tmp_path)
    assert not any("lora" in name for name in again.state_dict())
    np.testing.assert_allclose(logits(again, obs), expected, atol=1e-5)
    assert not th.equal(expected, logits(make(checkpoint=base), obs))
    # The policy goes on with its adapters
    np.testing.assert_array_equal(logits(policy, obs), expected)
    with pytest.raises(ValueError, match="merge=True"):
        policy.save_checkpoint(tmp_path, merge=False)


def test_merged_openvla_is_in_the_published_layout(openvla, tmp_path):
    policy = make_openvla(openvla, lora=LORA, dtype="bfloat16")
    obs = sample(policy.observation_space, 1)
    train(policy, obs, 2)
    expected = logits(policy, obs)
    policy.save_checkpoint(tmp_path / "merged", dtype=th.float32)
    again = make_openvla(tmp_path / "merged")
    difference = (logits(again, obs) - expected).abs().mean()
    change = (logits(make_openvla(openvla), obs) - expected).abs().mean()
    assert difference < 0.05 * change + 0.02


def test_zip_holds_adapters_and_no_frozen_weights(base, obs, tmp_path):
    policy = make(checkpoint=base, lora=LORA, value_head=True)
    train(policy, obs)
    policy.save(tmp_path / "policy.pt")
    loaded = VLAPolicy.load(tmp_path / "policy.pt", device="cpu")
    np.testing.assert_array_equal(logits(loaded, obs), logits(policy, obs))
    state = policy.state_dict()
    assert all(".lora_" in name or name.startswith("value_net.") or name == "base_checkpoint" for name in state)
    assert sum(p.requires_grad for p in loaded.parameters()) == len(state) - 1


def robot_env():
    return EpisodeControl(ActionTokens(ActionChunk(Robot(), 2)))


def algorithm(cls, **kwargs):
    return cls("VLAPolicy", vec(2, env=robot_env, control=False), seed=0, device="cpu", **kwargs)


@pytest.fixture(scope="module")
def robot_base(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoints") / "robot"
    # Wide enough for its frozen weights to be most of it
    body = {**TINY_BODY, "hidden_size": 128, "intermediate_size": 2048}
    algorithm(OPD, teacher="expert", policy_kwargs={"body_kwargs": body}).policy.save_checkpoint(path)
    return path


def opd(checkpoint, **kwargs):
    options = dict(teacher="expert", n_steps=4, batch_size=8, gradient_steps=2)
    policy_kwargs = {"checkpoint": str(checkpoint), **kwargs.pop("policy_kwargs", {})}
    return algorithm(OPD, policy_kwargs=policy_kwargs, **{**options, **kwargs})


def test_saved_algorithm_refers_to_its_base(robot_base, tmp_path):
    model = opd(robot_base, policy_kwargs={"lora": LORA}).learn(8)
    model.save(tmp_path / "student.zip")
    obs = model.env.reset()
    expected = logits(model.policy, obs)
    loaded = OPD.load(tmp_path / "student.zip", device="cpu")
    np.testing.assert_array_equal(logits(loaded.policy, obs), expected)
    assert loaded.policy_kwargs["checkpoint"] == str(robot_base)
    with zipfile.ZipFile(tmp_path / "student.zip") as file:
        stored = file.getinfo("policy.pth").file_size + file.getinfo("policy.optimizer.pth").file_size
    assert stored < 0.5 * (robot_base / "model.safetensors").stat().st_size
    # It goes on from where it was, optimizer included
    again = OPD.load(tmp_path / "student.zip", env=vec(2, env=robot_env, control=False), device="cpu").learn(8)
    assert again.num_timesteps >= 8 and not th.equal(logits(again.policy, obs), expected)
    # A teacher from this zip, frozen and in half precision
    teacher = make_teacher(tmp_path / "student.zip", model.env, model.policy, dtype="bfloat16")
    assert teacher.policy.optimizer is None and not any(p.requires_grad for p in teacher.policy.parameters())
    np.testing.assert_allclose(logits(teacher.policy, obs), expected, atol=0.1)


def test_base_that_is_gone_or_replaced(robot_base, tmp_path):
    moved = tmp_path / "base"
    moved.mkdir()
    for path in robot_base.iterdir():
        (moved / path.name).write_bytes(path.read_bytes())
    model = opd(moved, policy_kwargs={"lora": LORA})
    model.save(tmp_path / "student.zip")
    th.manual_seed(1)
    other = algorithm(OPD, teacher="expert", policy_kwargs={"checkpoint": str(moved)})
    with th.no_grad():
        other.policy.body.bins.weight.add_(1.0)
    other.policy.save_checkpoint(moved)
    with pytest.raises(ValueError, match="other weights than those in .*base"):
        OPD.load(tmp_path / "student.zip", device="cpu")
    moved.rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="base checkpoint of these LoRA adapters is gone.*base"):
        OPD.load(tmp_path / "student.zip", device="cpu")


@pytest.mark.parametrize("fault", ["missing", "integer", "shape", "nan"])
def test_damaged_adapters_are_refused(base, fault):
    policy = make(checkpoint=base, lora=LORA)
    state = policy.state_dict()
    name = next(name for name in state if ".lora_A" in name)
    value = state.pop(name)
    bad = {"integer": value.int(), "shape": value[:-1], "nan": value.clone().fill_(float("nan"))}
    with pytest.raises(ValueError, match=name):
        policy.load_state_dict(state if fault == "missing" else {**state, name: bad[fault]})


def test_a_zip_with_damaged_adapters_is_named(robot_base, tmp_path):
    model = opd(robot_base, policy_kwargs={"lora": LORA})
    name, adapter = next((name, p) for name, p in model.policy.named_parameters() if ".lora_A" in name)
    with th.no_grad():
        adapter.fill_(float("nan"))
    model.save(tmp_path / "student.zip")
    with pytest.raises(ValueError, match=f"{tmp_path / 'student.zip'}.*{name} is not finite"):
        OPD.load(tmp_path / "student.zip", device="cpu")


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"lora": {"rank": 4}}, ValueError, r"Unknown arguments of lora: \['rank'\]"),
        ({"lora": {"r": 0}}, ValueError, "rank r of lora must be"),
        ({"lora": 32}, ValueError, r"dict\(r=32\)"),
        ({"lora": {"init_lora_weights": "pissa"}}, ValueError, "change the frozen weights"),
        ({"lora": True, "body_kwargs": SMALL}, ValueError, "pass checkpoint"),
        ({"dtype": "float16", "body_kwargs": SMALL}, ValueError, "bfloat16"),
        ({"gradient_checkpointing": True, "body_kwargs": SMALL}, ValueError, "has no gradient checkpointing"),
    ],
)
def test_refusals(kwargs, error, message):
    with pytest.raises(error, match=message):
        make(**kwargs)


# ----------------------------------------------------------------------------------------------------------- precision


def test_half_precision_of_what_is_frozen(openvla):
    policy = make_openvla(openvla, lora=LORA, dtype="bfloat16", gradient_checkpointing=True)
    types = {(".lora_" in name): set() for name, _ in policy.named_parameters()}
    for name, parameter in policy.named_parameters():
        types[".lora_" in name].add(parameter.dtype)
    assert types == {False: {th.bfloat16}, True: {th.float32}}
    obs = sample(policy.observation_space, 1)
    plain = make_openvla(openvla)
    np.testing.assert_allclose(logits(policy, obs).exp(), logits(plain, obs).exp(), atol=0.05)
    train(policy, obs, 1)
    gradients = [p.grad for name, p in policy.named_parameters() if ".lora_B" in name]
    assert all(g is not None and g.dtype == th.float32 for g in gradients)
    assert sum(bool(g.any()) for g in gradients) == len(gradients)


def test_all_weights_trained_in_half_precision_stay_single(base, obs):
    """Computed in bfloat16, stored in float32: a small step is not rounded away."""
    policy = make(checkpoint=base, dtype="bfloat16")
    assert {p.dtype for p in policy.parameters()} == {th.float32}
    single = logits(make(checkpoint=base), obs)
    half = logits(policy, obs)
    assert half.dtype == th.float32 and not th.equal(half, single)
    np.testing.assert_allclose(half, single, atol=0.1)
    train(policy, obs)
    assert policy.state_dict().keys() == make(checkpoint=base).state_dict().keys()


def test_gradient_checkpointing_changes_memory_and_nothing_else(openvla):
    saved, gradients = [], []
    for checkpointing in (False, True):
        policy = make_openvla(openvla, gradient_checkpointing=checkpointing)
        policy.set_training_mode(True)
        obs = sample(policy.observation_space, 1)
        sizes = {}
        weights = {p.data_ptr() for p in policy.parameters()}

        def pack(x, sizes=sizes, weights=weights):
            if x.data_ptr() not in weights:
                sizes[x.data_ptr()] = x.nbytes
            return x

        with th.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = policy.token_log_probs(tensors(obs), th.zeros(1, 56)).mean()
        loss.backward()
        saved.append(sum(sizes.values()))
        gradients.append([p.grad for p in policy.parameters()])
    assert saved[1] < 0.6 * saved[0]
    for without, with_it in zip(*gradients, strict=True):
        th.testing.assert_close(with_it, without, atol=1e-6, rtol=1e-4)


# -------------------------------------------------------------------------------------------------------- micro-batches


def test_micro_batches():
    mask = th.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0], [1.0, 1.0], [1.0, 1.0]])
    parts = list(micro_batches(mask, 2))
    assert [(part.start, part.stop) for part, _ in parts] == [(0, 2), (2, 4), (4, 6)]
    np.testing.assert_allclose([share for _, share in parts], [3 / 7, 2 / 7, 2 / 7])
    assert list(micro_batches(mask, None)) == [(slice(0, 5), 1.0)]
    assert [share for _, share in micro_batches(th.zeros(3, 2), 2)] == [0.0, 0.0]


def check_gradients(found, expected):
    # By the norm: what comes before a normalisation has gradients of zero, and rounding in place of them
    assert expected.norm() > 1e-2 and (found - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("estimator", ["exact", "sampled"])
@pytest.mark.parametrize("micro_batch_size", [3, 1])
def test_opd_gradient_is_that_of_the_whole_minibatch(estimator, micro_batch_size):
    runs = []
    for size in (None, micro_batch_size):
        th.manual_seed(0)
        options = dict(state_replay=False, n_epochs=1) if estimator == "exact" else {}
        model = algorithm(
            OPD, teacher="expert", estimator=estimator, n_steps=7, batch_size=8, micro_batch_size=size,
            max_grad_norm=1e9, policy_kwargs={"body_kwargs": TINY_BODY}, **options,
        )  # fmt: skip
        recorder = Recorder(model)
        model.learn(14)
        runs.append(recorder.steps)
    assert len(runs[0]) == len(runs[1]) == (2 if estimator == "exact" else 1)
    check_gradients(runs[1][0], runs[0][0])


def test_sft_gradient_is_that_of_the_whole_minibatch(tmp_path):
    from opd_gym.demonstrations import Demonstrations

    rng = np.random.default_rng(0)
    env = robot_env()
    n = 20
    observations = {
        key: np.stack([space.sample() for _ in range(n)]) for key, space in env.observation_space.spaces.items()
    }
    observations["proprio"] = rng.normal(size=(n, 3)).astype(np.float32)
    data = Demonstrations(
        observations=observations,
        actions=rng.uniform(-1, 1, (n, 2, 2)).astype(np.float32),
        mask=rng.uniform(size=(n, 2)) < 0.7,
        episodes=np.repeat(np.arange(4), 5),
    )
    gradients = []
    for size in (None, 3):
        th.manual_seed(0)
        model = SFT(
            "VLAPolicy", env, data, batch_size=8, micro_batch_size=size, mask_padding=True, seed=0, device="cpu",
            policy_kwargs={"body_kwargs": TINY_BODY}, label_smoothing=1.0,
            max_grad_norm=1e9,
        )  # fmt: skip
        recorder = Recorder(model)
        model.learn(1)
        gradients.append(recorder.steps[0])
    check_gradients(gradients[1], gradients[0])


@pytest.mark.parametrize("cls", [OPD, SFT, GRPO, PPO])
def test_bad_micro_batch_size(cls):
    with pytest.raises(ValueError, match="micro_batch_size"):
        cls("VLAPolicy", None, micro_batch_size=0)


# ------------------------------------------------------------------------------------------------------------- teachers


def test_teacher_in_half_precision(robot_base):
    env = vec(2, env=robot_env, control=False)
    student = algorithm(OPD, teacher="expert", policy_kwargs={"body_kwargs": TINY_BODY}).policy
    obs = {key: th.as_tensor(value) for key, value in env.reset().items()}
    labels = th.zeros(2, 4)
    single = make_teacher(robot_base, env, student).distribution(obs, labels)
    assert make_teacher(robot_base, env, student, device="auto").policy.device == get_device("auto")
    teacher = make_teacher(robot_base, env, student, dtype="bfloat16", device="cpu")
    assert {p.dtype for p in teacher.policy.parameters()} == {th.bfloat16}
    assert teacher.policy.optimizer is None and not any(p.requires_grad for p in teacher.policy.parameters())
    half = teacher.distribution(obs, labels)
    assert half.log_probs.dtype == th.float32
    np.testing.assert_allclose(half.log_probs, single.log_probs, atol=0.1)
    assert not th.equal(half.log_probs, single.log_probs)


def test_opd_from_a_teacher_in_half_precision(robot_base):
    model = opd(
        robot_base, teacher=robot_base, teacher_kwargs={"dtype": "bfloat16", "device": "cpu"}, estimator="exact"
    )
    model.learn(8)
    assert model._teacher.policy.body.dtype == th.bfloat16


def test_teacher_that_is_not_read_cannot_be_cast(robot_base):
    for teacher in ("expert", algorithm(OPD, teacher="expert", policy_kwargs={"body_kwargs": TINY_BODY})):
        with pytest.raises(ValueError, match="read from files"):
            opd(robot_base, teacher=teacher, teacher_kwargs={"dtype": "bfloat16"})


# ------------------------------------------------------------------------------------------------------------------ hub


def evaluation():
    episodes = [EpisodeRecord(i % 2, -1, success=i != 3, steps=9, reward=1.0) for i in range(6)]
    return EvaluationResult(episodes, versions={"mujoco": "3.3.2", "gl_renderer": "llvmpipe"})


def test_folder_for_the_hub(robot_base, tmp_path):
    """A plain checkpoint with adapters merged, and a card that says what it is, without a path of this machine."""
    model = opd(robot_base, policy_kwargs={"lora": LORA}).learn(8)
    folder = hub.write_model_folder(model, tmp_path / "folder", "somebody/robot", evaluation())
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "config.json",
        "evaluation.json",
        "model.safetensors",
        "versions.json",
    ]
    obs = model.env.reset()
    loaded = VLAPolicy(model.observation_space, model.action_space, lambda _: 1e-3, checkpoint=folder)
    np.testing.assert_allclose(logits(loaded, obs), logits(model.policy, obs), atol=1e-5)
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "opd_gym" and card.data.pipeline_tag == "robotics"
    assert "opd" in card.data.tags and card.data.to_dict().get("base_model") is None
    for text in (
        "# robot",
        "| algorithm | OPD of opd_gym",
        "| started from | robot |",
        "| teacher | expert |",
        "LoRA of rank 4, merged",
        "| all | 83.3 % |",
        "| versions | mujoco 3.3.2, gl_renderer llvmpipe |",
        'policy_kwargs={"checkpoint": "somebody/robot"}',
    ):
        assert text in card.content, text
    assert str(robot_base.parent) not in card.content
    assert read_versions(folder) == {"mujoco": "3.3.2", "gl_renderer": "llvmpipe"}


def test_card_names_a_base_on_the_hub(robot_base):
    model = opd(robot_base)
    model.policy._reference = "Haozhan72/Openvla-oft-SFT-libero-object-traj1"
    card = ModelCard(hub.model_card(model, "somebody/robot"))
    assert card.data.base_model == "Haozhan72/Openvla-oft-SFT-libero-object-traj1"
    assert f"torch {versions()['torch']}" in card.content
    assert "## Success" not in card.content and "adapters" not in card.content


def test_without_a_network(robot_base, monkeypatch):
    import huggingface_hub.constants

    model = opd(robot_base)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ConnectionError, match="did not take somebody/robot.*write_model_folder.*hf upload somebody/robot"
    ):
        hub.push_to_hub(model, "somebody/robot", token="none")


def test_card_has_metrics_and_a_license(robot_base):
    """As the hub reads them."""
    model = opd(robot_base)
    episodes = [replace(episode, env_id="LiberoObject-v0") for episode in evaluation().episodes]
    card = ModelCard(hub.model_card(model, "somebody/robot", EvaluationResult(episodes), "mit"))
    (metric,) = card.data.eval_results
    assert card.data.license == "mit" and card.data.model_name == "robot"
    assert (metric.dataset_name, metric.metric_type) == ("LiberoObject-v0", "success_rate")
    assert metric.metric_value == pytest.approx(5 / 6) and metric.metric_args == {"episodes": 6}


def test_what_it_started_from_survives_saving(robot_base, tmp_path):
    """A saved model needs its base no more, but knows it."""
    model = opd(robot_base)
    model.policy._reference = "Haozhan72/Openvla-oft-SFT-libero-object-traj1"
    model._policy_is_built()  # as at the end of the constructor, which would have asked the hub
    for number in range(2):
        model.save(tmp_path / f"{number}.zip")
        model = OPD.load(tmp_path / f"{number}.zip", env=model.env, device="cpu")
    assert model.policy.base_model == "Haozhan72/Openvla-oft-SFT-libero-object-traj1"
    card = ModelCard(hub.model_card(model, "somebody/robot"))
    assert card.data.base_model == "Haozhan72/Openvla-oft-SFT-libero-object-traj1"


def test_names_and_types_that_do_not_fit(robot_base, tmp_path):
    plain = OPD("MlpPolicy", vec(1), teacher="expert", device="cpu")
    with pytest.raises(ValueError, match="Only a VLA can be stored in another dtype"):
        hub.write_model_folder(plain, tmp_path, "somebody/robot", dtype=th.float16)
    with pytest.raises(ValueError, match="owner/name"):
        hub.write_model_folder(plain, tmp_path, "x")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="opd-gym export"):
        hub.write_folder(robot_base, tmp_path, "somebody/robot", dtype=th.float16)
