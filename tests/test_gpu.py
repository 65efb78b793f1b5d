"""What may differ on a GPU. Every test that can runs on the CPU too; benchmarks/gpu.sh runs them where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch as th
from toys import TINY_BODY, Robot, parameters, vec
from vlas import Told, observations, told, write_openvla

from opd_gym import GRPO, OPD, PPO
from opd_gym.envs.wrappers import ActionChunk, ActionTokens, EpisodeControl
from opd_gym.policies.loading import load_policy
from opd_gym.policies.vla import VLAPolicy

pytestmark = pytest.mark.gpu

TESTS = Path(__file__).parent
N_GPUS = th.cuda.device_count()
NO_GPU = "PyTorch finds no GPU"
CUDA = pytest.param("cuda", marks=pytest.mark.skipif(N_GPUS == 0, reason=NO_GPU))
SPACE = Told().observation_space
on_any_device = pytest.mark.parametrize("device", ["cpu", CUDA])
PROFILES = {"parallel": "simplevla-rl", "one by one": "openvla"}


@pytest.fixture(scope="module", params=PROFILES)
def openvla(request, tmp_path_factory):
    return write_openvla(tmp_path_factory.mktemp("hub") / "openvla", 0, PROFILES[request.param])


@pytest.fixture(scope="module")
def one_by_one(tmp_path_factory):
    return write_openvla(tmp_path_factory.mktemp("hub") / "openvla", 0)


def load(checkpoint, device, **kwargs):
    return load_policy(checkpoint, SPACE, told().action_space, trainable=False, **kwargs).to(device)


def moved(obs, device):
    return {key: value.to(device) for key, value in obs.items()}


def act(policy):
    """Greedy tokens, and their log-probabilities while decoding."""
    policy.set_training_mode(False)
    with th.no_grad():
        tokens, distribution, _ = policy.decode(moved(observations(5), policy.device), deterministic=True)
    return tokens.cpu(), distribution.token_log_prob(tokens).cpu()


def score(policy, tokens):
    """Log-probabilities of given tokens."""
    policy.set_training_mode(False)
    with th.no_grad():
        return policy.token_log_probs(moved(observations(5), policy.device), tokens.to(policy.device)).cpu()


@on_any_device
def test_decoding_in_float32_is_that_of_the_cpu(openvla, device):
    policy, reference = load(openvla, device), load(openvla, "cpu")
    tokens, decoded = act(policy)
    np.testing.assert_array_equal(tokens, act(reference)[0])
    np.testing.assert_allclose(decoded, score(reference, tokens), atol=1e-3)
    np.testing.assert_allclose(decoded, score(policy, tokens), atol=1e-3)


@on_any_device
def test_a_policy_in_half_precision(openvla, device):
    policy = load(openvla, device, dtype="bfloat16")
    assert {p.dtype for p in policy.parameters()} == {th.bfloat16}
    assert {p.device.type for p in policy.parameters()} == {device}
    tokens, decoded = act(policy)
    assert tokens.shape == (5, 3) and bool((decoded < 0).all())
    # Two decimal digits
    np.testing.assert_allclose(decoded, score(policy, tokens), atol=0.2)
    np.testing.assert_allclose(decoded, score(load(openvla, "cpu"), tokens), atol=0.2)


def robots(n_envs=2):
    return vec(n_envs, env=lambda: EpisodeControl(ActionTokens(ActionChunk(Robot(), 2))), control=False)


def model_of(cls, device, checkpoint=None, **kwargs):
    policy_kwargs = {"body_kwargs": TINY_BODY} if checkpoint is None else {"checkpoint": str(checkpoint)}
    policy_kwargs |= kwargs.pop("policy_kwargs", {})
    return cls("VLAPolicy", robots(), seed=0, device=device, policy_kwargs=policy_kwargs, **kwargs)


EXACT = dict(n_steps=8, state_replay=False, n_epochs=2, batch_size=16, learning_rate=0.1)


@on_any_device
def test_an_update_of_opd_is_that_of_the_cpu(device):
    # Plain gradient descent: Adam divides by the size of the gradient, where rounding would decide
    sgd = {"policy_kwargs": {"optimizer_class": th.optim.SGD}}
    here, there = (model_of(OPD, place, teacher="expert", **EXACT, **sgd) for place in ("cpu", device))
    before = parameters(here)
    np.testing.assert_array_equal(parameters(there).cpu(), before)
    _, callback = here._setup_learn(16)
    there._setup_learn(16)
    here.collect_rollouts(here.env, callback, here.rollout_buffer, here.n_steps)
    # Each device draws its own samples: both learn from one rollout
    own = there.rollout_buffer.device
    vars(there.rollout_buffer).update({k: v for k, v in vars(here.rollout_buffer).items() if k != "device"})
    for model in (here, there):
        np.random.seed(0)
        model.train()
    assert own.type == device
    assert (parameters(here) - before).abs().max() > 1e-3
    np.testing.assert_allclose(parameters(there).cpu(), parameters(here), rtol=0, atol=1e-4)


def pair(student, teacher):
    missing = {"cuda": 1, "cuda:1": 2}
    n = max(missing.get(student, 0), missing.get(teacher, 0))
    reason = NO_GPU if N_GPUS == 0 else f"{N_GPUS} GPU"
    return pytest.param(student, teacher, marks=pytest.mark.skipif(n > N_GPUS, reason=reason))


@pytest.mark.parametrize(
    ("student", "teacher"), [pair("cpu", "cpu"), pair("cuda", "cpu"), pair("cpu", "cuda"), pair("cuda", "cuda:1")]
)
def test_a_teacher_on_a_device_of_its_own(student, teacher, tmp_path):
    th.manual_seed(1)
    model_of(OPD, "cpu", teacher="expert").policy.save_checkpoint(tmp_path / "teacher")
    kwargs = {"device": teacher, "dtype": "bfloat16", "n_eval_episodes": 0}
    model = model_of(OPD, student, teacher=str(tmp_path / "teacher"), teacher_kwargs=kwargs, **EXACT)
    assert model._teacher.policy.device == th.device(teacher if ":" in teacher or teacher == "cpu" else "cuda:0")
    before = parameters(model)
    model.learn(16)
    assert not th.equal(parameters(model), before)
    # Of other weights, and not of the student's own
    distributions = th.as_tensor(model.rollout_buffer.teacher_distributions).float()
    assert bool(distributions.isfinite().all()) and distributions.std() > 0


@on_any_device
def test_adapters_in_half_precision_with_gradient_checkpointing(openvla, device):
    pytest.importorskip("peft", reason="peft is not installed: pip install 'opd_gym[vla]'")
    kwargs = dict(lora={"r": 4}, dtype="bfloat16", gradient_checkpointing=True)
    policy = VLAPolicy(SPACE, told().action_space, lambda _: 1e-2, checkpoint=openvla, **kwargs).to(device)
    obs = moved(observations(5), device)
    tokens = th.full((5, 3), 4, device=device)
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    policy.set_training_mode(True)
    losses = []
    for _ in range(3):
        policy.optimizer.zero_grad()
        loss = -policy.token_log_probs(obs, tokens).mean()
        loss.backward()
        policy.optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    changed = {name for name, p in policy.named_parameters() if not th.equal(p, before[name])}
    assert changed == {name for name, p in policy.named_parameters() if p.requires_grad} and changed


ALGORITHMS = {
    "GRPO": (GRPO, dict(group_size=3, n_groups=3, dynamic_sampling=None, temperature=1.0)),
    "PPO": (PPO, dict(n_steps=12, batch_size=36, n_epochs=1, policy_kwargs={"value_head": True})),
}


def one_update(algo, device, checkpoint, dtype, recompute, wrong=0.0):
    """
    The model after one update of a whole rollout, and the KL of its ratios: those of an unchanged policy.

    ``wrong`` is added to what the rollout has of log-probabilities, as rounding would do.
    """
    cls, kwargs = ALGORITHMS[algo]
    # Plain gradient descent, as above
    own = {"checkpoint": checkpoint, "dtype": dtype, "optimizer_class": th.optim.SGD}
    policy_kwargs = {**own, **kwargs.get("policy_kwargs", {})}
    kwargs = {**kwargs, "policy_kwargs": policy_kwargs, "recompute_log_probs": recompute}
    model = cls("VLAPolicy", vec(3, env=told), seed=0, device=device, learning_rate=1e-2, **kwargs)
    metrics, record, train = [], model._record_metrics, model.train

    def train_on_wrong():
        model.rollout_buffer.token_log_probs += wrong
        train()

    model.train = train_on_wrong
    model._record_metrics = lambda found: (metrics.extend(found), record(found))
    model.learn(1)
    assert len(metrics) == model._n_updates == 1
    return model, metrics[0].approx_kl


@on_any_device
@pytest.mark.parametrize("algo", ALGORITHMS)
@pytest.mark.parametrize(
    ("dtype", "recompute", "corrected"),
    [("bfloat16", None, True), ("bfloat16", False, False), ("float32", None, False), ("float32", True, True)],
)
def test_ratios_begin_at_one(algo, dtype, recompute, corrected, device, one_by_one):
    """What is decoded in bfloat16 differs by rounding from what the learner computes of it."""
    kl = one_update(algo, device, one_by_one, dtype, recompute, wrong=0.1)[1]
    # exp(-0.1) - 1 + 0.1, where it is not corrected
    assert kl == pytest.approx(0.0 if corrected else 0.00484, abs=1e-3)


@on_any_device
@pytest.mark.parametrize("algo", ALGORITHMS)
def test_in_single_precision_computing_again_changes_nothing(algo, device, one_by_one):
    again, not_again = (one_update(algo, device, one_by_one, "float32", key)[0] for key in (True, False))
    np.testing.assert_allclose(parameters(again).cpu(), parameters(not_again).cpu(), rtol=0, atol=1e-5)
    log_probs = (model.rollout_buffer.token_log_probs for model in (again, not_again))
    np.testing.assert_allclose(*log_probs, atol=1e-4)


@pytest.mark.parametrize("cls", [GRPO, PPO])
def test_whether_to_compute_again_is_a_flag(cls):
    with pytest.raises(ValueError, match="recompute_log_probs must be True, False or None, got 'yes'"):
        cls("MlpPolicy", "CartPole-v1", recompute_log_probs="yes")


@on_any_device
def test_ranks(device, tmp_path):
    if device == "cuda" and N_GPUS < 2:
        pytest.skip("NCCL wants a GPU for each of two processes")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
        "OMP_NUM_THREADS": "1",
        **({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}),
    }
    done = subprocess.run(
        [*command, str(TESTS / "ranked.py"), str(tmp_path), "devices"], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (dict(np.load(tmp_path / f"devices{rank}.npz")) for rank in range(2))
    np.testing.assert_array_equal(first["trained"], second["trained"])
    expected = ["cpu", "cpu"] if device == "cpu" else ["cuda:0", "cuda:1"]
    assert [str(found["device"]) for found in (first, second)] == expected
    assert [float(found["added"]) for found in (first, second)] == [3.0, 3.0]


@pytest.mark.skipif(N_GPUS == 0, reason=NO_GPU)
def test_pictures_are_drawn_on_the_gpu():
    pytest.importorskip("libero", reason="LIBERO is not installed: pip install 'opd_gym[libero]'")
    from opd_gym.envs.libero.env import LiberoEnv

    env = LiberoEnv("libero_object", task_ids=[0], image_size=64, cameras=("agentview",), visuals="exact")
    picture = env.reset(seed=0)[0]["agentview"]
    renderer = env.gl_renderer
    env.close()
    assert picture.std() > 10
    if "NVIDIA" not in renderer:
        pytest.skip(f"EGL finds no driver of the GPU here, and draws by {renderer}")
