"""Memory and time of a run before it is started: published numbers, and what a small model really keeps."""

import dataclasses
import json
import re
import sys

import numpy as np
import pytest
import torch as th
from golden.openvla import tiny
from stable_baselines3.common.utils import get_device
from torch.utils.flop_counter import FlopCounterMode

from opd_gym.cli import main as cli
from opd_gym.cli import plan, sizes
from opd_gym.cli.options import Run
from opd_gym.cli.plan import MACHINES, Machine
from opd_gym.cli.sizes import Weights
from opd_gym.instructions import encode_instruction
from opd_gym.policies.adapters import DTYPES, add_lora, cast_parameters, check_lora, enable_gradient_checkpointing
from opd_gym.policies.openvla import OpenVLAConfig, OpenVLAModel
from opd_gym.policies.openvla.checkpoints import published_layout
from opd_gym.policies.openvla.processing import PromptTokenizer
from opd_gym.zoo import load_hyperparams

SMALL, LARGE, EIGHT = MACHINES


@pytest.fixture(scope="module")
def cache():
    """Weights that have been counted."""
    return {}


# -------------------------------------------------------------------------------------------------------- known numbers


def test_published_openvla_has_its_published_number_of_weights():
    name, config = sizes.resolve("openvla-7b")
    assert name == "openvla" and not config.profile.parallel and config.n_tokens == 7
    with th.device("meta"):
        model = OpenVLAModel(config)
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    published = sum(
        part.join(*(tensors[ours] for ours in (*part.names, *part.reads))).numel()
        for part in published_layout(model).values()
    )
    assert published == 7_541_237_184


def test_published_vision_language_models_have_their_published_number_of_weights():
    from transformers import AutoModelForImageTextToText

    for name, published in (("qwen2.5-vl-3b", 3_754_622_976), ("smolvlm-256m", 256_484_928)):
        with th.device("meta"):
            model = AutoModelForImageTextToText.from_config(sizes.resolve(name)[1].vlm_config)
        assert sum(p.numel() for p in model.parameters()) == published


def test_lora_of_openvla(cache):
    """OpenVLA-OFT's 110.8 million at rank 32, plus what separate queries, keys and values of the pictures need more."""
    weights = plan.make_plan(Run("openvla-oft-7b"), cache).student
    assert weights.trained == pytest.approx(110.8e6, rel=0.01)
    full = plan.make_plan(Run("openvla-oft-7b", lora_rank=None), cache).student
    assert full.trained == full.total == weights.total - weights.trained
    shapes = [(s.n_layers, s.hidden, s.intermediate, s.gated, s.tokens) for s in full.stacks]
    assert shapes[:2] == [(23, 1024, 4096, False, 256), (26, 1152, 4304, False, 256)]
    assert shapes[2] == (32, 4096, 11008, True, 256 + 56 + sizes.PROMPT_TOKENS)
    # A token costs two operations for each weight of the language model's layers, and attention
    flops = full.stacks[2].forward_flops() / full.stacks[2].tokens
    assert flops == pytest.approx(2 * 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 32 * 4 * 352 * 4096)


def test_the_default_plan_is_the_zoos_run(capsys):
    run, zoo = Run("openvla-oft-7b"), load_hyperparams("opd", "LiberoObject-v0")
    for name in ("n_envs", "n_steps", "batch_size", "gradient_steps"):
        assert getattr(run, name) == zoo[name]
    decisions = run.n_envs * run.n_steps
    assert (run.iterations - 1) * decisions < zoo["n_timesteps"] <= run.iterations * decisions
    for words, shared in (
        ([], "128 decisions, 40 gradient steps of 128"),
        (["--nproc", "8"], "16 decisions, 40 gradient steps of 16"),
        (["--nproc", "8", "--n-steps", "64"], "128 decisions, 40 gradient steps of 16"),
    ):
        assert cli.main(["plan", "--student", "smolvlm-256m", *words]) == 0
        assert f"An iteration: {shared};" in capsys.readouterr().out


def test_two_arms_and_other_models_have_plans():
    assert sizes.resolve("openvla-oft-7b-two-arms")[1].n_tokens == 350
    weights = sizes.count_weights("qwen2.5-vl-3b", 32)
    qwen = weights.stacks
    assert len(qwen) == 2 and 0 < weights.trained < 0.03 * weights.total
    assert [(s.n_layers, s.hidden, s.tokens) for s in qwen][0] == (32, 1280, 2 * 256)
    assert qwen[1].tokens == 2 * 64 + 56 + 1 + sizes.PROMPT_TOKENS


# ------------------------------------------------------------------------------------------------- against measurements


def small_openvla(rank, dtype):
    th.manual_seed(0)
    config = OpenVLAConfig(
        text_config=dict(
            hidden_size=192, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4, vocab_size=32064,
            pad_token_id=32000,
        ),
        dino_config=dict(hidden_size=128, num_hidden_layers=5, num_attention_heads=2),
        siglip_config=dict(hidden_size=96, num_hidden_layers=5, num_attention_heads=2, intermediate_size=384),
    )  # fmt: skip
    body = OpenVLAModel(config)
    layers = sizes.stacks(body)
    body.tokenizer = PromptTokenizer(tiny.tokenizer_json())
    if rank is not None:
        cast_parameters(body, DTYPES[dtype])
        add_lora(body, check_lora({"r": rank}))
    trained = sum(p.numel() for p in body.parameters() if p.requires_grad)
    flops = sum(stack.forward_flops() for stack in layers[0])
    return body.train(), Weights(sum(p.numel() for p in body.parameters()), trained, *layers, None, flops, config)


@pytest.fixture(scope="module", params=[(None, "float32"), (None, "bfloat16"), (8, "float32"), (8, "bfloat16")])
def small(request):
    return *request.param, *small_openvla(*request.param)


def copies(layers):
    """Bytes of the copies of weights that autocast makes, a line of their own."""
    return 2 * sum(m.weight.numel() for m in layers if isinstance(m, th.nn.Linear))


def test_activations_are_those_that_are_kept(small):
    rank, dtype, body, weights = small
    half, batch = dtype == "bfloat16", 2
    images = {"agentview": th.zeros(batch, 3, 256, 256, dtype=th.uint8)}
    instruction = th.as_tensor(np.stack([encode_instruction("pick up the milk and put it down")] * batch))
    for checkpointing in (False, True):
        if checkpointing:
            enable_gradient_checkpointing(body)
        with sizes.saved_bytes(body) as measured, th.autocast("cpu", dtype=th.bfloat16, enabled=half):
            body(images, instruction)
        kept = measured[0]
        run = Run("small", lora_rank=rank, dtype=dtype, gradient_checkpointing=checkpointing, micro_batch_size=batch)
        estimate = sizes.activation_bytes(weights, run)
        if half and rank is None:
            kept -= copies(
                [body.language_model.lm_head, *body.projector.children()] if checkpointing else body.modules()
            )
        if checkpointing:
            # One layer at a time is computed again in the backward pass
            estimate -= batch * max(s.layer_bytes(half, rank) for s in weights.stacks)
        assert estimate == pytest.approx(kept, rel=0.2), checkpointing


def test_weights_gradients_and_moments_are_those_of_a_training_step(small):
    """The plan's lines against the bytes of the tensors after one step of AdamW."""
    rank, dtype, body, weights = small
    lines = plan.make_plan(Run("small", teacher=None, lora_rank=rank, dtype=dtype), {("small", rank): weights}).learner
    trained = [p for p in body.parameters() if p.requires_grad]
    optimizer = th.optim.AdamW(trained, lr=1e-4)
    for parameter in trained:
        parameter.grad = th.zeros_like(parameter)
    optimizer.step()
    moments = sum(x.nbytes for state in optimizer.state.values() for key, x in state.items() if key != "step")
    assert lines["trained weights (float32)"] == sum(p.nbytes for p in trained)
    assert lines["gradients (float32)"] == sum(p.grad.nbytes for p in trained)
    assert lines["AdamW's two moments (float32)"] == moments
    assert lines["student's frozen weights"] == sum(p.nbytes for p in body.parameters() if not p.requires_grad)


def test_operations_are_those_that_torch_counts(small):
    """Of the body without adapters: what lies between its transformers and behind them is a few per cent."""
    rank, dtype, body, weights = small
    images = {"agentview": th.zeros(1, 3, 256, 256, dtype=th.uint8)}
    instruction = th.as_tensor(encode_instruction("pick up the milk and put it down"))[None]
    n_prompt = len(body.tokenizer(instruction.numpy(), 0)[0][0])
    precision = th.autocast("cpu", dtype=DTYPES[dtype], enabled=dtype != "float32")
    with FlopCounterMode(display=False) as counter, th.no_grad(), precision:
        body(images, instruction)
    stacks = [
        *weights.stacks[:2],
        dataclasses.replace(s := weights.stacks[2], tokens=s.tokens - sizes.PROMPT_TOKENS + n_prompt),
    ]
    estimate = sum(stack.forward_flops() for stack in stacks)
    if rank is None:
        assert estimate == pytest.approx(counter.get_total_flops(), rel=0.15)
    else:
        assert estimate < counter.get_total_flops()


def test_small_bodies_are_measured():
    weights = sizes.count_weights("libero-object-student", None)
    assert weights.stacks == [] and 10**6 < weights.trained == weights.total < 10**7
    assert weights.activations > 10**5 and weights.flops > 2 * weights.total  # a convolution's weights count many times
    run = Run("libero-object-student", lora_rank=None, dtype="float32", micro_batch_size=64)
    assert sizes.activation_bytes(weights, run) == 64 * weights.activations


# ------------------------------------------------------------------------------------------------------ what fits where


def test_what_fits_and_what_to_change(cache):
    run = Run("openvla-oft-7b")
    need = plan.Plan.needed(plan.make_plan(run, cache).learner)
    assert 30e9 < need < 40e9  # two times 15 GB of weights, and little else
    assert plan.advice(run, LARGE, cache)[0] == []
    changes, changed = plan.advice(run, SMALL, cache)
    assert plan.fits(changed, SMALL) and changed.run.teacher_elsewhere
    assert 'teacher_kwargs={"device": ...} on another device' in changes
    # All weights with their moments: 7.5 billion times 18 bytes
    full = dataclasses.replace(run, lora_rank=None, teacher=None)
    assert plan.Plan.needed(plan.make_plan(full, cache).learner) > 120e9
    assert "lora=True instead of training all weights" in plan.advice(full, LARGE, cache)[0]
    assert plan.advice(run, Machine("a small one", 8e9, 1e12), cache) is None
    # A device of its own for the teacher must be there, and large enough
    elsewhere = dataclasses.replace(run, teacher_elsewhere=True)
    assert plan.fits(plan.make_plan(elsewhere, cache), Machine("two", 24e9, 1e12, n_devices=2))
    assert not plan.fits(plan.make_plan(elsewhere, cache), Machine("two", 12e9, 1e12, n_devices=2))
    # Without a GPU it all lies in one memory
    assert not plan.fits(plan.make_plan(elsewhere, cache), Machine("cpu", 24e9, 1e12, is_gpu=False))


def test_more_work_takes_more(cache):
    run = Run("smolvlm-256m", teacher="openvla-oft-7b")
    base = plan.make_plan(run, cache)
    learner = {name: dataclasses.replace(run, **change) for name, change in {
        "checkpointing": dict(gradient_checkpointing=False), "micro": dict(micro_batch_size=8),
        "dtype": dict(dtype="float32"), "teacher": dict(teacher_dtype="float32"), "full": dict(lora_rank=None),
    }.items()}  # fmt: skip
    for name, changed in learner.items():
        assert sum(plan.make_plan(changed, cache).learner.values()) > sum(base.learner.values()), name
    without = plan.make_plan(learner["checkpointing"], cache)
    assert without.training_flops == pytest.approx(base.training_flops * 2 / 3)
    full = plan.make_plan(learner["full"], cache)
    assert full.training_flops == pytest.approx(base.training_flops * 4 / 3)
    twice = plan.make_plan(dataclasses.replace(run, n_envs=4), cache)
    assert twice.rollout_flops == 2 * base.rollout_flops
    assert twice.host["rollout buffer"] == 2 * base.host["rollout buffer"]


def test_sharding(cache, capsys):
    """All weights of OpenVLA-OFT are trained on eight GPUs of 80 GB, of which none could do it alone."""
    full = Run("openvla-oft-7b", lora_rank=None, nproc=8)
    changes, changed = plan.advice(full, plan.gpus(8)[1], cache)
    assert 'policy_kwargs={"shard": True}' in changes and changed.run.shard and changed.run.lora_rank is None
    weights = changed.student
    # Of each tensor at most one row more than an eighth
    assert 0 <= weights.part(8) - weights.total / 8 < sum(size // rows for rows, size in weights.tensors)
    assert weights.part(1) == weights.total and 0 < weights.layer < weights.beside < weights.total / 20
    # Fewer learners have larger parts, and between two updates each has all weights
    needs = [plan.Plan.needed(plan.make_plan(dataclasses.replace(full, shard=True, nproc=n), cache).learner)
             for n in (2, 4, 8)]  # fmt: skip
    assert needs[0] > needs[1] > needs[2] > 4 * weights.total
    assert "lora=True instead of training all weights" in plan.advice(full, plan.gpus(8)[0], cache)[0]
    # A teacher of LoRA's student as well, where it does not fit beside
    changes, changed = plan.advice(Run("openvla-oft-7b", nproc=8), Machine("8", 30e9, 1e12, n_devices=8), cache)
    assert changes[-1] == 'teacher_kwargs={"shard": True}' and changed.learner["teacher's weights"] < 2e9
    with pytest.raises(ValueError, match="LoRA leaves nothing to shard"):
        Run("openvla-oft-7b", nproc=8, shard=True)
    with pytest.raises(ValueError, match="there has to be one"):
        Run("openvla-oft-7b", teacher=None, nproc=8, shard_teacher=True)
    assert cli.main(["plan", "--student", "openvla-oft-7b", "--full", "--shard", "--nproc", "8"]) == 0
    text = capsys.readouterr().out
    assert "each of 8 GPUs" in text and "8 GPUs of 80 GB" in text and "8 learners" in text


def test_command_line(capsys):
    assert cli.main(["plan", "--student", "openvla-7b", "--micro-batch-size", "2"]) == 0
    text = capsys.readouterr().out
    assert "7,609,444,000 weights, 111,286,272 trained (LoRA of rank 32, bfloat16)" in text
    for machine in ("24 GB", "80 GB", "eight GPUs", "this machine"):
        assert machine in text
    assert "| yes" in text and "with changes" in text and "PFLOP" in text


def test_directories_and_configurations(pretrained, tmp_path, capsys):
    """A pretrained model that is to become a student, and a config.json alone."""
    assert cli.main(["plan", "--student", str(pretrained), "--teacher", "none", "--lora-rank", "4"]) == 0
    assert "Teacher" not in capsys.readouterr().out
    alone = tmp_path / "config.json"
    alone.write_bytes((pretrained / "config.json").read_bytes())
    assert sizes.count_weights(str(alone), 4).trained == sizes.count_weights(str(pretrained), 4).trained


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--student", "openvla-70b"], "openvla-7b, openvla-oft-7b"),
        (["--student", "openvla-7b", "--micro-batch-size", "0"], "micro_batch_size must be at least 1"),
        (["--student", "openvla-7b", "--lora-rank", "0"], "lora_rank"),
    ],
)
def test_bad_input_is_told(arguments, message, capsys):
    try:
        status = cli.main(["plan", *arguments])
    except SystemExit as stop:  # what an option cannot be is said while the options are read
        status = stop.code
    assert status == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_models_of_unknown_kind_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="model type 'llama'"):
        sizes.count_weights(str(tmp_path), None)


def test_planning_adapters_does_not_need_peft(monkeypatch):
    expected = sizes.count_weights("smolvlm-256m", 32)
    monkeypatch.setitem(sys.modules, "peft", None)
    assert sizes.count_weights("smolvlm-256m", 32).trained == expected.trained > 10**6


def test_a_damaged_configuration_is_named(tmp_path):
    for text in ("{", "[]"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=re.escape(str(tmp_path / "config.json"))):
            sizes.resolve(str(tmp_path))


def test_this_machine():
    machine = plan.this_machine()
    assert machine.memory > 10**9 and machine.flops > 10**8
    assert machine.is_gpu == (get_device("auto").type == "cuda")
