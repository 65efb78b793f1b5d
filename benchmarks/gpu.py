"""
What a CUDA machine does with OpenVLA-OFT 7B, in at most nine minutes and without a network.

    benchmarks/gpu.sh                        # on the GPU
    benchmarks/gpu.sh --device cpu --tiny    # the same code anywhere, with a model of a few layers

Weights are random and lie in the published layout: what is measured is speed, memory and rounding. Each part is a
process with a limit of seconds; one that fails is recorded with its error, the others go on, and the exit status is 1.
Writes ``<device>.json`` and ``<device>.md`` to ``benchmarks/results/gpu``, ``tiny_<device>`` of them with ``--tiny``.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from libero_throughput import machine
from openvla_size import write_random
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from opd_gym import GRPO, OPD, make_vec
from opd_gym.algorithms.base import RolloutAlgorithm
from opd_gym.cli import sizes
from opd_gym.cli.options import Run
from opd_gym.cli.plan import Plan, make_plan, table
from opd_gym.files import write_atomic
from opd_gym.instructions import INSTRUCTION_BYTES, encode_instruction
from opd_gym.policies.body import read_checkpoint_config
from opd_gym.policies.loading import load_policy
from opd_gym.versions import write_results

ROOT = Path(__file__).resolve().parents[1]
# Published names, which tell how tokens are decoded
PARALLEL, ONE_BY_ONE = "openvla-oft-sft-libero-object", "openvla-7b-finetuned-libero-object"
INSTRUCTION = "pick up the milk and place it in the basket"
ENV_ID = "LiberoObject-v0"
HAS_LIBERO = importlib.util.find_spec("libero") is not None
# Seconds of each part, in the order of what matters most
PARTS = {
    "tests": 120,
    "checkpoint": 90,
    "opd": 150,
    "grpo": 120,
    "decoding": 100,
    "rendering": 80,
    "ratios": 80,
    "compiled": 150,
}
SECONDS = 525


@dataclass
class Setup:
    """
    What a part is given.

    :param device: device of the student and its teacher
    :param tiny: a model of a few layers, and little of everything
    :param work: folder of the checkpoints
    :param output: file of the part's results
    """

    device: str
    tiny: bool
    work: Path
    output: Path

    def __post_init__(self) -> None:
        self.results: dict[str, Any] = {}

    def record(self, **values: Any) -> None:
        """
        Keep results, also if the part is stopped before its end.

        :param values: ready for JSON
        """
        self.results.update(values)
        write_atomic(self.output, json.dumps(self.results, indent=1))

    @property
    def cuda(self) -> bool:
        return th.device(self.device).type == "cuda"

    def checkpoint(self, name: str = PARALLEL, small: bool = False) -> Path:
        """
        :param name: published name
        :param small: the model of a few layers, whatever is measured
        :return: its directory
        """
        return self.work / ("small" if small or self.tiny else "published") / name

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.cuda:
            th.cuda.synchronize(self.device)


@contextlib.contextmanager
def clock(setup: Setup, seconds: Counter[str], name: str) -> Iterator[None]:
    """Add the seconds of the block to those of a name."""
    setup.synchronize()
    began = time.perf_counter()
    yield
    setup.synchronize()
    seconds[name] += time.perf_counter() - began


def timed(setup: Setup, seconds: Counter[str], owner: Any, method: str, name: str) -> None:
    """Have every call of a method counted under a name."""
    inner = getattr(owner, method)

    def run(*args: Any, **kwargs: Any) -> Any:
        with clock(setup, seconds, name):
            return inner(*args, **kwargs)

    setattr(owner, method, run)


# ---------------------------------------------------------------------------------------------------------------------
# Envs


class StandIn(gym.Env):
    """
    LIBERO's spaces without a simulator: noise for pictures, no success.

    :param image_size: side of the pictures in pixels
    :param cameras: names of the pictures
    :param horizon: control steps of an episode
    """

    def __init__(self, image_size: int, cameras: list[str], horizon: int):
        self.horizon = horizon
        picture = spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
        self.observation_space = spaces.Dict(
            {
                **{name: picture for name in cameras},
                "proprio": spaces.Box(-np.inf, np.inf, (9,), np.float32),
                "instruction": spaces.Box(0, 255, (INSTRUCTION_BYTES,), np.uint8),
            }
        )
        self.action_space = spaces.Box(-1.0, 1.0, (7,), np.float32)

    def _observe(self) -> dict[str, np.ndarray]:
        found = {
            name: self.np_random.integers(0, 256, space.shape, dtype=np.uint8)
            for name, space in self.observation_space.spaces.items()  # type: ignore[attr-defined]
            if len(space.shape) == 3
        }
        proprio = self.np_random.normal(size=9).astype(np.float32)
        return {**found, "proprio": proprio, "instruction": encode_instruction(INSTRUCTION)}

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.t = 0
        return self._observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.t += 1
        return self._observe(), 0.0, False, self.t >= self.horizon, {"is_success": False}


def make_env(checkpoint: Path, n_envs: int, horizon: int, libero: bool) -> VecEnv:
    """
    :param checkpoint: what is to act
    :param n_envs: number of envs
    :param horizon: control steps of an episode
    :param libero: real simulators
    :return: envs as the checkpoint needs them
    """
    config = read_checkpoint_config(checkpoint)[1]
    kwargs: dict[str, Any] = dict(image_size=config.image_size[0], cameras=list(config.image_keys), horizon=horizon)
    common: dict[str, Any] = dict(n_bins=config.n_bins, statistics=config.statistics, seed=0)
    common |= dict(chunk_size=config.chunk_size, tokens=True)
    if libero:
        return make_vec(ENV_ID, n_envs, env_kwargs={**kwargs, "visuals": "exact", "task_ids": [0]}, **common)
    if "GpuStandIn-v0" not in gym.registry:
        gym.register("GpuStandIn-v0", StandIn)
    return make_vec("GpuStandIn-v0", n_envs, env_kwargs=kwargs, vec_env_cls=DummyVecEnv, **common)


def env_note(libero: bool) -> str:
    """Which envs were played."""
    return "LIBERO, exact pictures" if libero else "a stand-in without a simulator: LIBERO is not installed"


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def host_memory() -> float:
    """Largest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def memory(setup: Setup, run: Run, before: float, n_prompt: int) -> dict[str, Any]:
    """
    Peak of the device's memory beside what ``opd-gym plan`` says.

    :param setup: the part
    :param run: what was run
    :param before: main memory before it
    :param n_prompt: tokens of the prompt, which the plan has to guess: random checkpoints have no words in their
        vocabulary, so that prompts are longer
    :return: gigabytes
    """
    found: dict[str, Any] = {"prompt_tokens": n_prompt}
    if setup.cuda:
        free, whole = th.cuda.mem_get_info(setup.device)
        found["peak_allocated_gb"] = th.cuda.max_memory_allocated(setup.device) / 1e9
        found["peak_reserved_gb"] = th.cuda.max_memory_reserved(setup.device) / 1e9
        found["in_use_on_the_card_gb"] = (whole - free) / 1e9
    else:
        found["main_memory_gb"] = (host_memory() - before) / 1e9
    for name, tokens in (("plan_gb", sizes.PROMPT_TOKENS), ("plan_of_this_prompt_gb", n_prompt)):
        sizes.PROMPT_TOKENS = tokens
        plan = make_plan(run)
        found[name] = sum(plan.learner.values()) / 1e9
        found[name.replace("_gb", "_with_context_gb")] = Plan.needed(plan.learner) / 1e9
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Parts


def tests(setup: Setup) -> None:
    """pytest's marker gpu."""
    report = setup.work / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/test_gpu.py", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, f"--junitxml={report}"], cwd=ROOT, capture_output=True, text=True)
    cases: dict[str, list[str]] = {"failed": [], "skipped": [], "passed": []}
    for case in ElementTree.parse(report).iter("testcase") if report.is_file() else ():
        kinds = {child.tag for child in case}
        kind = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        cases[kind].append(case.attrib["name"])
    setup.record(**cases)
    if done.returncode != 0:
        raise RuntimeError(f"pytest: {done.stdout[-3000:]}")


def checkpoint(setup: Setup) -> None:
    """Random weights, drawn on the device."""
    for size in ("small",) if setup.tiny else ("small", "published"):
        folder = setup.work / size
        written = write_random(folder, PARALLEL, setup.device, small=size == "small")
        setup.record(**{size: written})
        # The same weights under the name of a model that decodes one token after the other
        again = folder / ONE_BY_ONE
        again.mkdir()
        for path in (folder / PARALLEL).iterdir():
            (again / path.name).symlink_to(path)


def settings(setup: Setup, checkpoint: Path) -> dict[str, Any]:
    """Arguments of both algorithms: LoRA, bfloat16, gradient checkpointing."""
    policy_kwargs = dict(checkpoint=str(checkpoint), lora=True, dtype="bfloat16", gradient_checkpointing=True)
    return dict(policy_kwargs=policy_kwargs, micro_batch_size=4, seed=0, device=setup.device, verbose=0)


def one_iteration(setup: Setup, model: RolloutAlgorithm, seconds: Counter[str], n_steps: int) -> None:
    """One iteration of a training, its parts timed, and the simulators by themselves."""
    assert model.env is not None
    timed(setup, seconds, model.env, "reset", "start of the simulators")
    timed(setup, seconds, model, "_decide", "decode")
    timed(setup, seconds, model, "collect_rollouts", "rollout")
    timed(setup, seconds, model, "train", "update")
    before = th.nn.utils.parameters_to_vector(p for p in model.policy.parameters() if p.requires_grad).detach().clone()
    model.learn(n_steps)
    after = th.nn.utils.parameters_to_vector(p for p in model.policy.parameters() if p.requires_grad).detach()
    if not bool((before != after).any()):
        raise RuntimeError("The update changed nothing.")
    # What the learner waited for, while some of the envs were simulated behind its back
    seconds["waiting for simulators"] = seconds["rollout"] - seconds["decode"] - seconds["teacher"]
    decisions = int(model.num_timesteps)
    setup.record(decisions=decisions, updates=model._n_updates, seconds=dict(seconds))
    actions = np.stack([model.action_space.sample() for _ in range(model.env.num_envs)])
    model.env.seed(0)
    model.env.reset()
    n = 2
    with clock(setup, seconds, "simulators alone"):
        for _ in range(n):
            model.env.step(actions)
    setup.record(simulated_decisions_per_second=n * model.env.num_envs / seconds["simulators alone"])


def prompt_tokens(model: RolloutAlgorithm) -> int:
    """Number of tokens of the prompt of an env's instruction."""
    body: Any = model.policy.body
    return int(body._prompt(th.as_tensor(model.rollout_buffer.observations["instruction"][:1]))[0].shape[1])


def opd(setup: Setup) -> None:
    """One iteration of OPD; the teacher has the same weights."""
    n_envs, n_steps, updates = (2, 2, 2) if setup.tiny else (8, 8, 8)
    before = host_memory()
    seconds: Counter[str] = Counter()
    directory = setup.checkpoint()
    env = make_env(directory, n_envs, 40, HAS_LIBERO)
    with clock(setup, seconds, "load"):
        model = OPD(
            "VLAPolicy",
            env,
            teacher=str(directory),
            teacher_kwargs={"dtype": "bfloat16", "n_eval_episodes": 0},
            n_steps=n_steps,
            batch_size=4 if setup.tiny else 32,
            temperature=1.0,
            gradient_steps=updates,
            **settings(setup, directory),
        )
    with th.no_grad():
        # Adapters begin without effect: the student would be its teacher, with nothing to learn
        for name, parameter in model.policy.named_parameters():
            if ".lora_B" in name:
                parameter.normal_(0.0, 0.02)
    setup.record(env=env_note(HAS_LIBERO))
    timed(setup, seconds, model, "_label_rollout", "teacher")
    one_iteration(setup, model, seconds, n_envs * n_steps)
    run = Run(
        str(directory / "config.json"),
        micro_batch_size=model.micro_batch_size or model.batch_size,
        batch_size=model.batch_size,
        gradient_steps=updates,
        n_envs=n_envs,
        n_steps=n_steps,
        iterations=1,
    )
    setup.record(seconds=dict(seconds), memory=memory(setup, run, before, prompt_tokens(model)))
    env.close()


class DrawnOutcomes(GRPO):
    """GRPO where the outcome of an episode is drawn: random weights never succeed, and there would be no gradient."""

    def _end_rollout(self) -> None:
        super()._end_rollout()
        rng = np.random.default_rng(0)
        for rows in self._trajectories:
            self.rollout_buffer.advantages[rows] = rng.choice([-1.0, 1.0])


def make_grpo(setup: Setup, directory: Path, env: VecEnv, **kwargs: Any) -> DrawnOutcomes:
    """GRPO with two groups of four episodes."""
    return DrawnOutcomes(
        "VLAPolicy",
        env,
        n_groups=2,
        group_size=2 if setup.tiny else 4,
        dynamic_sampling=None,
        temperature=1.0,
        trajectories_per_batch=4,
        **{**settings(setup, directory), **kwargs},
    )


def ratio_statistics(model: GRPO) -> dict[str, float]:
    """
    Ratios of probabilities before any update, computed by the learner's pass. In exact arithmetic all are 1.

    :param model: one that has collected a rollout and not learned from it
    :return: how far they are from 1, and how many are clipped
    """
    buffer = model.rollout_buffer
    order = np.random.default_rng(0).permutation(len(model._trajectories))
    rows = np.concatenate([model._trajectories[i] for i in order])
    model.policy.set_training_mode(True)
    found = []
    for samples in buffer.get(model.micro_batch_size, rows=rows):
        student = model._student(samples.observations, samples.actions, model.temperature)
        log_probs = student.log_prob(samples.actions.reshape(len(samples.rows), -1)).detach()
        ratio = (log_probs - samples.old_token_log_probs).exp()
        found.append(ratio[samples.token_mask > 0].double().cpu().numpy())
    ratios = np.concatenate(found)
    outside = (ratios < 1 - model.clip_range) | (ratios > 1 + model.clip_range_high)
    distance = np.abs(ratios - 1)
    return {
        "mean": float(distance.mean()),
        "p99": float(np.quantile(distance, 0.99)),
        "largest": float(distance.max()),
        "clipped": float(outside.mean()),
        "tokens": len(ratios),
    }


def both_ratios(model: GRPO) -> dict[str, Any]:
    """:func:`ratio_statistics` with the log-probabilities of the rollout, and with those computed again."""
    with_rollout = ratio_statistics(model)
    model.recompute_log_probs = True
    model._rescore(np.concatenate(model._trajectories), model.micro_batch_size)
    return {"of the rollout": with_rollout, "computed again": ratio_statistics(model)}


def collect(model: RolloutAlgorithm) -> None:
    """One rollout, without an update."""
    assert model.env is not None
    _, callback = model._setup_learn(1)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)


def grpo(setup: Setup) -> None:
    """One iteration of GRPO."""
    seconds: Counter[str] = Counter()
    before = host_memory()
    n_envs = 2 if setup.tiny else 8
    directory = setup.checkpoint()
    env = make_env(directory, n_envs, 16 if setup.tiny else 40, HAS_LIBERO)
    with clock(setup, seconds, "load"):
        model = make_grpo(setup, directory, env)
    setup.record(env=env_note(HAS_LIBERO))
    timed(setup, seconds, model, "_rescore", "log-probabilities computed again")
    one_iteration(setup, model, seconds, 1)
    run = Run(str(directory / "config.json"), teacher=None, micro_batch_size=model.micro_batch_size, iterations=1)
    setup.record(seconds=dict(seconds), memory=memory(setup, run, before, prompt_tokens(model)))
    env.close()


def ratios(setup: Setup) -> None:
    """How far the ratios of an unchanged policy are from 1, by precision and way of decoding."""
    cases = [(small, name, dtype) for small, dtype in ((True, "float32"), (True, "bfloat16")) for name in NAMES]
    if not setup.tiny:
        cases += [(False, name, "bfloat16") for name in NAMES]
    for small, name, dtype in cases:
        directory = setup.checkpoint(name, small)
        # Batches of another size than the learner's
        env = make_env(directory, 3, 8 if setup.tiny else 24, libero=False)
        kwargs = settings(setup, directory)["policy_kwargs"]
        model = make_grpo(setup, directory, env, policy_kwargs={**kwargs, "dtype": dtype})
        collect(model)
        label = f"{'small' if small else '7B'}, {dtype}, {NAMES[name]}"
        setup.record(**{label: both_ratios(model)})
        del model
        if setup.cuda:
            th.cuda.empty_cache()


NAMES = {PARALLEL: "parallel", ONE_BY_ONE: "one by one"}


def actor(setup: Setup, name: str) -> tuple[Any, Callable[[int], dict[str, th.Tensor]]]:
    """A policy in bfloat16 that only acts, and a function that makes so many observations."""
    directory = setup.checkpoint(name)
    config = read_checkpoint_config(directory)[1]
    space = StandIn(config.image_size[0], list(config.image_keys), 1).observation_space
    policy = load_policy(
        directory, space, spaces.MultiDiscrete([config.n_bins] * config.n_tokens), "bfloat16", trainable=False
    ).to(setup.device)
    policy.set_training_mode(False)

    def observations(batch: int) -> dict[str, th.Tensor]:
        space.seed(0)
        rows = [space.sample() for _ in range(batch)]
        obs = {key: th.as_tensor(np.stack([row[key] for row in rows])) for key in rows[0]}
        obs["instruction"] = th.as_tensor(encode_instruction(INSTRUCTION))[None].repeat(batch, 1)
        return {key: value.to(setup.device) for key, value in obs.items()}

    return policy, observations


def speed(setup: Setup, policy: Any, obs: dict[str, th.Tensor]) -> dict[str, float]:
    """Decisions and tokens per second; the first two are not counted."""
    times: list[float] = []
    batch = len(obs["instruction"])
    deadline = time.perf_counter() + (0.5 if setup.tiny else 2.0)
    with th.no_grad():
        for i in range(52):
            th.compiler.cudagraph_mark_step_begin()
            seconds: Counter[str] = Counter()
            with clock(setup, seconds, "decode"):
                policy.decode(obs)
            if i >= 2:
                times.append(seconds["decode"])
            if len(times) >= 3 and time.perf_counter() > deadline:
                break
    median = float(np.median(times))
    n_tokens = policy.config.n_tokens
    return {
        "seconds": median,
        "decisions_per_second": batch / median,
        "tokens_per_second": batch * n_tokens / median,
        "repeats": len(times),
    }


def decoding(setup: Setup) -> None:
    """Tokens per second by batch size."""
    for name, batches in ((PARALLEL, (1, 2, 4, 8, 16, 32, 64)), (ONE_BY_ONE, (1, 8, 32))):
        policy, observations = actor(setup, name)
        for batch in batches[:2] if setup.tiny else batches:
            setup.record(**{f"{NAMES[name]}, {batch}": speed(setup, policy, observations(batch))})
        del policy
        if setup.cuda:
            th.cuda.empty_cache()


VARIANTS: dict[str, dict[str, Any]] = {
    "CUDA graphs": {"backend": "cudagraphs"},
    "torch.compile": {},
    "torch.compile and CUDA graphs": {"mode": "reduce-overhead"},
}


def compiled(setup: Setup) -> None:
    """
    Parallel decoding with CUDA graphs and with torch.compile: the vision transformers and the language model; what is
    before them (pictures, the tokenizer) is not compiled. One by one the cache grows with each token, which neither
    can do without another cache.
    """
    policy, observations = actor(setup, PARALLEL)
    obs = observations(2 if setup.tiny else 8)
    with th.no_grad():
        expected = policy.get_distribution(obs).logits.clone()
    setup.record(eager=speed(setup, policy, obs))
    parts = (policy.body.vision_backbone, policy.body.language_model.model)
    failed = []
    for name, kwargs in VARIANTS.items():
        if "CUDA" in name and not setup.cuda:
            setup.record(**{name: "on a GPU only"})
            continue
        th._dynamo.reset()
        try:
            for part in parts:
                part.compile(**kwargs)
            began = time.perf_counter()
            with th.no_grad():
                error = (policy.get_distribution(obs).logits - expected).abs().max().item()
            compile_seconds = time.perf_counter() - began
            measured = speed(setup, policy, obs)
            setup.record(**{name: {**measured, "compile_seconds": compile_seconds, "largest_difference": error}})
        except Exception as error:
            setup.record(**{name: f"failed: {type(error).__name__}: {str(error)[:500]}"})
            failed.append(name)
        finally:
            for part in parts:
                part._compiled_call_impl = None
    if failed:
        raise RuntimeError(f"{', '.join(failed)}: see there.")


def rendering(setup: Setup) -> None:
    """Pictures and control steps per second of one LIBERO env, exact and light."""
    if not HAS_LIBERO:
        setup.record(skipped="LIBERO is not installed")
        return
    from opd_gym.envs.libero.env import LiberoEnv

    n = 3 if setup.tiny else 100
    for visuals in ("exact", "light"):
        env = LiberoEnv("libero_object", task_ids=[0], image_size=256, cameras=("agentview",), visuals=visuals)
        seconds: Counter[str] = Counter()
        with clock(setup, seconds, "start"):
            env.reset(seed=0)
        with clock(setup, seconds, "pictures"):
            for _ in range(n):
                env.current_observation()
        env.observe = False
        with clock(setup, seconds, "steps"):
            for _ in range(n):
                env.step(np.zeros(7))
        values = {"start_seconds": seconds["start"], "pictures_per_second": n / seconds["pictures"]}
        values["steps_per_second_without_pictures"] = n / seconds["steps"]
        setup.record(**{visuals: values}, gl_renderer=env.gl_renderer)
        env.close()


# ---------------------------------------------------------------------------------------------------------------------
# All of them


def run_part(name: str, setup: Setup, limit: float) -> dict[str, Any]:
    """
    :param name: name of the part
    :param setup: what is measured
    :param limit: seconds
    :return: what it recorded, ``wall_seconds``, and ``error`` where it failed
    """
    words = ["--part", name, "--device", setup.device, "--work", str(setup.work), "--output", str(setup.output)]
    command = [sys.executable, str(Path(__file__).resolve()), *words, *(["--tiny"] if setup.tiny else [])]
    setup.output.unlink(missing_ok=True)
    began = time.monotonic()
    error = None
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            if process.wait(timeout=limit) != 0:
                log.seek(0)
                error = log.read()[-3000:].replace(str(ROOT), ".").replace(str(setup.work), "WORK")
        except subprocess.TimeoutExpired:
            error = f"stopped after its {limit:.0f} seconds"
        finally:
            # Simulators that a stopped part leaves behind too
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    found = json.loads(setup.output.read_text()) if setup.output.is_file() else {}
    found["wall_seconds"] = time.monotonic() - began
    return found if error is None else {**found, "error": error}


def card(device: str) -> dict[str, Any]:
    """
    :param device: what is measured
    :return: the card, its driver and PyTorch's versions
    """
    found: dict[str, Any] = {"torch": th.__version__, "cuda": th.version.cuda}
    if th.device(device).type != "cuda":
        return {"card": "none: this ran on the CPU and says nothing of a GPU", **found}
    properties = th.cuda.get_device_properties(device)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.split("\n")[0].strip()
    except (OSError, subprocess.TimeoutExpired):
        driver = "unknown"
    return {
        "card": properties.name,
        "n_cards": th.cuda.device_count(),
        "memory_gb": properties.total_memory / 1e9,
        "driver": driver,
        "cudnn": th.backends.cudnn.version(),
        **found,
    }


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def to_markdown(results: dict[str, Any]) -> str:
    """
    :param results: what :func:`main` writes as JSON
    :return: short tables
    """
    parts = results["parts"]
    where = results["machine"]
    lines = [
        f"{where['card']}; driver {where.get('driver', '-')}, PyTorch {where['torch']}, CUDA {where['cuda'] or '-'}; "
        f"{where['cpu']}, {where['cores']} cores; opd_gym at {where['commit']}, {results['date']}; load before the run "
        f"{where['load_before']}.",
        "",
        "Weights are random. "
        + ("**A model of a few layers (`--tiny`): its numbers mean nothing.**" if results["tiny"] else "")
        + (f" {results['note']}" if results["note"] else ""),
        "",
        table(
            ("part", "seconds", "result"),
            *(
                (name, _number(part.get("wall_seconds", 0)), "**failed**" if "error" in part else "ran")
                for name, part in parts.items()
            ),
        ),
        "",
    ]
    tested = parts.get("tests", {})
    if "passed" in tested:
        counts = ", ".join(f"{len(tested[kind])} {kind}" for kind in ("passed", "skipped", "failed"))
        lines += [f"Tests marked `gpu`: {counts}.", ""]
    rows = []
    for name in ("opd", "grpo"):
        part = parts.get(name, {})
        for what, seconds in part.get("seconds", {}).items():
            rows.append((name, what, _number(seconds)))
        if "env" in part:
            rows.append((name, "env", part["env"]))
        if "simulated_decisions_per_second" in part:
            rows.append((name, "simulators alone, decisions/s", _number(part["simulated_decisions_per_second"])))
        for what, size in part.get("memory", {}).items():
            rows.append((name, what, _number(size)))
    if rows:
        lines += [table(("one iteration", "of", "seconds, or as said"), *rows), ""]
    rows = [
        (f"{part}: {name}", _number(found["decisions_per_second"]), _number(found["tokens_per_second"]))
        if isinstance(found, dict)
        else (f"{part}: {name}", str(found).split("\n")[0][:80], "")
        for part in ("decoding", "compiled")
        for name, found in parts.get(part, {}).items()
        if name not in ("wall_seconds", "error")
    ]
    if rows:
        lines += [table(("decoding, batch size", "decisions/s", "tokens/s"), *rows), ""]
    rows = [
        (name, whose, *(_number(of[key]) for key in ("mean", "p99", "largest", "clipped")))
        for name, found in parts.get("ratios", {}).items()
        if isinstance(found, dict)
        for whose, of in found.items()
    ]
    if rows:
        head = ("ratios before any update", "log-probabilities", "mean distance from 1", "p99", "largest", "clipped")
        lines += [table(head, *rows), ""]
    drawn = parts.get("rendering", {})
    rows = [
        (visuals, *(_number(value) for value in drawn[visuals].values()))
        for visuals in ("exact", "light")
        if visuals in drawn
    ]
    if rows:
        head = (f"rendering by {drawn['gl_renderer']}", "start, s", "pictures/s", "steps/s without pictures")
        lines += [table(head, *rows), ""]
    for name, part in parts.items():
        if "error" in part:
            lines += [f"`{name}` failed: {part['error'].strip().splitlines()[-1][:300]}", ""]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="device of PyTorch")
    parser.add_argument("--tiny", action="store_true", help="a model of a few layers, to see that it runs")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="which of them; all")
    parser.add_argument("--seconds", type=float, help=f"for everything; default: {SECONDS}, four times that on a CPU")
    parser.add_argument("--work", type=Path, help="folder for 15 GB of checkpoints; default: a temporary one")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "benchmarks" / "results" / "gpu")
    parser.add_argument("--note", default="", help="for the results: what else the machine did, for instance")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if th.device(args.device).type == "cuda" and not th.cuda.is_available():
        raise SystemExit("PyTorch finds no GPU here. --device cpu --tiny shows that everything runs.")
    if args.part is not None:
        globals()[args.part](Setup(args.device, args.tiny, args.work, args.output))
        return 0
    patience = 1 if th.device(args.device).type == "cuda" else 4
    deadline = time.monotonic() + (args.seconds or patience * SECONDS)
    results: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "tiny": args.tiny,
        "device": args.device,
        "note": args.note,
        "machine": {**machine(), **card(args.device)},
        "parts": {},
    }
    results["machine"]["commit"] = os.environ.get("COMMIT") or results["machine"]["commit"]
    name = f"{'tiny_' if args.tiny else ''}{th.device(args.device).type}"
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        setup = Setup(args.device, args.tiny, Path(work), Path(work) / "part.json")
        for part in args.parts:
            left = deadline - time.monotonic()
            if left < 5:
                results["parts"][part] = {"error": "not started: no time was left"}
            else:
                print(f"{part} ...", flush=True)
                results["parts"][part] = run_part(part, setup, min(patience * PARTS[part], left))
            print(f"{part}: {json.dumps(results['parts'][part])}", flush=True)
            args.output.mkdir(parents=True, exist_ok=True)
            write_results(args.output / f"{name}.json", results)
            write_atomic(args.output / f"{name}.md", to_markdown(results))
    failed = [part for part, found in results["parts"].items() if "error" in found]
    print(f"Failed: {', '.join(failed)}" if failed else "All parts ran.")
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Exception:
        traceback.print_exc()
        sys.exit(1)
