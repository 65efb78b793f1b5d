"""Weights in parts on all ranks: the same is learned as with whole ones, and all that is written is whole."""

import json
from dataclasses import replace

import numpy as np
import pytest
import sharded
import torch as th
from golden.openvla import tiny
from ranked import torchrun
from safetensors.torch import load_file
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.vec_env import VecNormalize
from toys import parameters, vec

from opd_gym import OPD
from opd_gym.algorithms.teachers import PolicyTeacher, make_teacher
from opd_gym.cli.options import Run
from opd_gym.cli.plan import make_plan
from opd_gym.policies.openvla import complete_checkpoint
from opd_gym.policies.vla import VLAPolicy

CASES = ["openvla", "bfloat16", "exact", "sampled", "grpo", "ppo", "sft"]
CLOSE = dict(rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two ranks did."""
    folder = tmp_path_factory.mktemp("sharding")
    for name in (sharded.STUDENT, sharded.TEACHER):
        complete_checkpoint(tiny.write_checkpoint(folder / name, n_shards=1), image_size=[64, 64])
    done = torchrun(sharded.__file__, folder, *CASES, "broken")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "FSDP2" not in done.stderr
    return folder


@pytest.mark.parametrize("case", CASES)
def test_the_same_is_learned(two, case):
    first, second = (th.load(two / f"{case}{rank}.pt") for rank in range(2))
    for found in (first, second):
        whole, parts = found[False], found[True]
        assert whole["steps"] == parts["steps"] > 0
        assert case == "sft" or whole["losses"]
        np.testing.assert_allclose(parts["losses"], whole["losses"], **CLOSE)
        for ours, theirs in zip(parts["weights"], whole["weights"], strict=True):
            th.testing.assert_close(ours, theirs, **CLOSE)
    for ours, theirs in zip(first[True]["weights"], second[True]["weights"], strict=True):
        assert th.equal(ours, theirs)


@pytest.mark.parametrize(("case", "when"), [(c, when) for c, s in sharded.SAVES.items() for when in (*s, "after")])
def test_what_is_saved_is_whole(two, case, when):
    (_, whole, _), (_, parts, _) = (
        load_from_zip_file(two / f"{case}_{shard}" / f"{when}.zip") for shard in (False, True)
    )
    assert whole["policy"].keys() == parts["policy"].keys()
    for name, value in whole["policy"].items():
        th.testing.assert_close(parts["policy"][name], value, **CLOSE)
    states = [params["policy.optimizer"] for params in (whole, parts)]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    assert states[0]["state"].keys() == states[1]["state"].keys()
    assert bool(states[0]["state"]) == (when in ("end", "after") or (case, when) == ("sft", "step"))
    for number, state in states[0]["state"].items():
        for key, value in state.items():
            th.testing.assert_close(states[1]["state"][number][key], value, **CLOSE)


@pytest.mark.parametrize("case", ["openvla", "exact"])
def test_a_checkpoint_of_sharded_weights_is_as_published(two, case):
    """Written by a callback of the first rank, in the middle of a rollout."""
    folders = [two / f"{case}_{shard}" / "step" for shard in (False, True)]
    files = [{p.relative_to(folder) for p in folder.iterdir()} for folder in folders]
    assert files[0] == files[1]
    assert json.loads((folders[0] / "config.json").read_text()) == json.loads((folders[1] / "config.json").read_text())
    whole, parts = (load_file(folder / "model.safetensors") for folder in folders)
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        th.testing.assert_close(parts[name], value, **CLOSE)
    model = OPD.load(two / f"{case}_True" / "step.zip")
    again = VLAPolicy(model.observation_space, model.action_space, lambda _: 0.0, checkpoint=folders[1])
    body = model.policy.body.state_dict()
    for name, value in again.body.state_dict().items():
        assert th.equal(value, body[name]), name


def test_the_plan_is_what_a_rank_keeps(two):
    """Bytes of weights, gradients and optimizer state after an update: the first rank's are those planned."""
    first, second = (th.load(two / f"openvla{rank}.pt")[True]["memory"] for rank in range(2))
    run = Run(str(two / sharded.STUDENT), teacher=None, lora_rank=None, nproc=2, shard=True)
    lines = make_plan(run).learner
    assert first["weights"] == first["gradients"] == lines["trained weights (float32)"]
    assert first["optimizer"] == lines["AdamW's two moments (float32)"]
    assert all(0.99 * first[name] < second[name] <= first[name] for name in first)
    whole = make_plan(replace(run, shard=False)).learner
    assert th.load(two / "openvla0.pt")[False]["memory"]["optimizer"] == whole["AdamW's two moments (float32)"]
    assert lines["trained weights (float32)"] == pytest.approx(whole["trained weights (float32)"] / 2, rel=0.01)


def test_one_process_learns_as_if_weights_were_not_sharded(two):
    """Also from a model that several have saved."""
    learned = []
    for shard in (False, True):
        model = sharded.make("exact", two, shard).learn(12)
        assert model.policy.sharding is None and model.policy.portable_kwargs()["shard"] is shard
        learned.append(parameters(model))
    assert th.equal(*learned)
    model = OPD.load(two / "exact_True" / "after", env=sharded.robots(1))
    before = parameters(model).clone()
    assert not th.equal(parameters(model.learn(12)), before)


def test_after_an_error_nobody_waits_for_the_others(two):
    told = [(two / f"broken{rank}").read_text().splitlines() for rank in range(2)]
    assert [line.partition("(")[0] for line in told[0]] == ["ZeroDivisionError", "RuntimeError", "RuntimeError"]
    assert "Load the last checkpoint" in told[0][1] and "load the last checkpoint" in told[0][2]
    # Which had nothing to write
    assert len(told[1]) == 2 and told[1][0] == "ZeroDivisionError()" and told[1][1] == told[0][2]


def test_what_cannot_be_sharded_is_refused(two, monkeypatch):
    env = sharded.arms(two / sharded.STUDENT, 1)

    def policy(**kwargs):
        return VLAPolicy(env.observation_space, env.action_space, lambda _: 0.0, **kwargs)

    with pytest.raises(ValueError, match="leave out one of shard and lora"):
        policy(checkpoint=two / sharded.STUDENT, lora=True, shard=True)
    with pytest.raises(ValueError, match="shard must be True or False"):
        policy(checkpoint=two / sharded.STUDENT, shard=8)
    student = policy(checkpoint=two / sharded.STUDENT)
    with pytest.raises(ValueError, match="leave out device"):
        make_teacher(two / sharded.TEACHER, env, student, shard=True, device="cpu")
    with pytest.raises(ValueError, match="for a teacher that is read from files"):
        make_teacher("expert", env, student, shard=True)
    assert not make_teacher(two / sharded.TEACHER, env, student, shard=True).sharded, "one process"
    for name, value in dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="1").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="leave out n_eval_episodes=5"):
        kwargs = {"shard": True, "n_eval_episodes": 5}
        OPD("VLAPolicy", env, two / sharded.TEACHER, policy_kwargs={"checkpoint": two / sharded.STUDENT},
            teacher_kwargs=kwargs, device="cpu")  # fmt: skip
    with pytest.raises(ValueError, match="asked in each step, since it sees raw observations"):
        normalized = VecNormalize(sharded.robots(1), norm_obs_keys=["proprio"])
        seen = normalized.observation_space
        small, other = (VLAPolicy(seen, normalized.action_space, lambda _: 0.0, **sharded.TINY) for _ in range(2))
        PolicyTeacher(small, normalized, other, shard=True)
    with pytest.raises(ValueError, match="is for a VLA, got a ActorCriticPolicy"):
        numbers = vec(1)
        OPD("MlpPolicy", numbers, "expert", device="cpu").save(two / "mlp")
        make_teacher(two / "mlp.zip", numbers, OPD("MlpPolicy", numbers, "expert").policy, shard=True)
