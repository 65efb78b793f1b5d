"""
Memory and time of a run before it is started: ``opd-gym plan --student openvla-7b``.

:mod:`opd_gym.cli.sizes` counts and estimates the models. Time is floating-point operations over what a device does in
practice: a backward pass takes as many as the forward pass for frozen weights, twice as many for trained ones; gradient
checkpointing takes one forward pass more.
"""

from __future__ import annotations

import os
import timeit
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch as th

from opd_gym.cli import options
from opd_gym.cli.options import Run
from opd_gym.cli.sizes import Weights, activation_bytes, count_weights

GIB = 2**30
# What a GPU's driver, CUDA's context and its libraries take, and what fragmentation wastes
CONTEXT_BYTES = 1.0 * GIB
FRAGMENTATION = 0.08
# What sharded weights take beside their parts: in an update, and between two
GATHERED, WHOLE = "weights and gradients of the layers that are run", "all weights, between two updates (float32)"
# Fractions of the peak that such models reach in training, and in the small batches of a rollout
TRAINING_EFFICIENCY = 0.4
ROLLOUT_EFFICIENCY = 0.15


@dataclass(frozen=True)
class Plan:
    """
    Memory in bytes by what it is for, and floating-point operations of one iteration.

    :param run: what is planned
    :param student: the student's weights
    :param teacher: the teacher's weights; None without one
    :param learner: memory of the device that learns
    :param teacher_device: memory of the teacher's own device
    :param host: main memory of the process
    :param training_flops: of all gradient steps
    :param rollout_flops: of acting and of the teacher's opinions
    """

    run: Run
    student: Weights
    teacher: Weights | None
    learner: dict[str, float]
    teacher_device: dict[str, float]
    host: dict[str, float]
    training_flops: float
    rollout_flops: float

    @staticmethod
    def needed(parts: Mapping[str, float]) -> float:
        """
        :param parts: memory by what it is for
        :return: what a GPU must have for it
        """
        return sum(parts.values()) * (1.0 + FRAGMENTATION) + CONTEXT_BYTES


def make_plan(run: Run, cache: dict[Any, Weights] | None = None) -> Plan:
    """
    :param run: what is to be run
    :param cache: weights that have been counted, for further plans
    :return: what it takes
    """
    cache = {} if cache is None else cache

    def count(model: str, rank: int | None) -> Weights:
        if (model, rank) not in cache:
            cache[model, rank] = count_weights(model, rank)
        return cache[model, rank]

    student = count(run.student, run.lora_rank)
    size = {"float32": 4, "bfloat16": 2}
    trained = student.part(run.nproc) if run.shard else student.trained
    learner = {
        "student's frozen weights": float((student.total - student.trained) * size[run.dtype]),
        "trained weights (float32)": 4.0 * trained,
        "AdamW's two moments (float32)": 8.0 * trained,
    }
    update = {
        "gradients (float32)": 4.0 * trained,
        "activations of a micro-batch": activation_bytes(student, run),
    }
    if run.shard:
        # The next layer's weights come while one is run; its gradients are copied before they are sent
        update[GATHERED] = 8.0 * student.beside + 16.0 * student.layer
    elif run.dtype == "bfloat16":
        update["trained weights, copied to bfloat16 by autocast"] = 2.0 * student.trained
    acting = {WHOLE: 4.0 * student.trained} if run.shard else {}
    # Gradients and activations are gone when it acts
    learner |= update if sum(update.values()) >= sum(acting.values()) else acting
    teacher = None
    teacher_device: dict[str, float] = {}
    if run.teacher is not None:
        teacher = count(run.student if run.teacher == "student" else run.teacher, None)
        weights = float(size[run.teacher_dtype] * (teacher.part(run.nproc) if run.shard_teacher else teacher.total))
        (teacher_device if run.teacher_elsewhere else learner)["teacher's weights"] = weights
        if run.shard_teacher:
            gathered = float(size[run.teacher_dtype] * (teacher.beside + 3 * teacher.layer))
            learner["teacher's weights, gathered layer by layer"] = gathered
    config = student.config
    height, width = config.image_size
    # With the teacher's distribution in half precision
    state = len(config.image_keys) * 3 * height * width + 2 * config.n_tokens * config.n_bins
    decisions = run.n_envs * run.n_steps
    host = {
        "rollout buffer": float(decisions * (state + 24 * config.n_tokens)),
        "replay of states (at most)": float(min(GIB, run.iterations * decisions * state)),
    }
    forward = student.flops
    passes = 1 + (1 if run.lora_rank is not None else 2) + run.gradient_checkpointing
    rollout = decisions * (forward + (teacher.flops if teacher is not None else 0.0))
    training = run.gradient_steps * run.batch_size * passes * forward
    return Plan(run, student, teacher, learner, teacher_device, host, training, rollout)


# ---------------------------------------------------------------------------------------------------------------------
# Machines


@dataclass(frozen=True)
class Machine:
    """
    :param name: what it is
    :param memory: bytes of one device
    :param flops: floating-point operations per second of one device, at best
    :param n_devices: number of devices
    :param is_gpu: whether they are GPUs
    """

    name: str
    memory: float
    flops: float
    n_devices: int = 1
    is_gpu: bool = True


MACHINES = (
    Machine("one GPU of 24 GB (RTX 4090: 165 TFLOP/s)", 24e9, 165e12),
    Machine("one GPU of 80 GB (A100: 312 TFLOP/s)", 80e9, 312e12),
    Machine("eight GPUs of 80 GB (A100)", 80e9, 312e12, n_devices=8),
)


def gpus(n: int) -> tuple[Machine, ...]:
    """
    :param n: number of learners
    :return: GPUs that people have: for several learners so many of them
    """
    if n == 1:
        return MACHINES
    return tuple(
        replace(machine, name=f"{n} GPUs{machine.name.removeprefix('one GPU')}", n_devices=n)
        for machine in MACHINES[:2]
    )


# What makes a run smaller, cheapest first
CHANGES: dict[str, dict[str, Any]] = {
    "gradient_checkpointing=True": dict(gradient_checkpointing=True),
    'dtype="bfloat16"': dict(dtype="bfloat16"),
    'teacher_kwargs={"dtype": "bfloat16"}': dict(teacher_dtype="bfloat16"),
    "micro_batch_size=1": dict(micro_batch_size=1),
    'policy_kwargs={"shard": True}': dict(shard=True),
    'teacher_kwargs={"shard": True}': dict(shard_teacher=True),
    'teacher_kwargs={"device": ...} on another device': dict(teacher_elsewhere=True),
    "lora=True instead of training all weights": dict(lora_rank=32, shard=False),
}


def this_machine() -> Machine:
    """
    :return: the GPUs of this machine, or its processor, whose speed is measured in a moment
    """
    if th.cuda.is_available():
        properties = th.cuda.get_device_properties(0)
        n, device, size, dtype = th.cuda.device_count(), "cuda", 8192, th.bfloat16
        name, memory = f"this machine ({n} x {properties.name})", float(properties.total_memory)
    else:
        n, device, size, dtype = 1, "cpu", 512, th.float32
        name = f"this machine ({os.cpu_count()} cores, no GPU)"
        memory = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    a = th.ones(size, size, device=device, dtype=dtype)
    seconds = min(timeit.repeat(lambda: (a @ a)[0, 0].item(), number=1, repeat=5))
    return Machine(name, memory, 2.0 * size**3 / seconds, n, device == "cuda")


def fits(plan: Plan, machine: Machine) -> bool:
    """
    :param plan: memory of a run
    :param machine: where it is to run
    :return: whether it does
    """
    if not machine.is_gpu:  # everything lies in main memory
        parts = [*plan.learner.values(), *plan.teacher_device.values(), *plan.host.values()]
        return plan.run.nproc * sum(parts) * (1.0 + FRAGMENTATION) <= machine.memory
    devices = [plan.learner, *([plan.teacher_device] if plan.teacher_device and machine.n_devices > 1 else [])]
    return max(map(plan.needed, devices)) <= machine.memory


def advice(run: Run, machine: Machine, cache: dict[Any, Weights]) -> tuple[list[str], Plan] | None:
    """
    :param run: a run
    :param machine: where it is to run
    :param cache: see :func:`make_plan`
    :return: what to change so that it fits (nothing if it does), and the plan of that; None if no change makes it fit
    """
    changes: list[str] = []
    for text, values in {"": {}, **CHANGES}.items():
        has_lora, sharded = run.lora_rank is not None, not machine.is_gpu or run.nproc == 1
        if ("lora_rank" in values and has_lora) or (values.get("shard") and (has_lora or sharded)):
            continue
        if "shard_teacher" in values and (sharded or run.teacher is None or run.teacher_elsewhere):
            continue
        if "teacher_elsewhere" in values and run.shard_teacher:
            continue
        changed = replace(run, **values)
        if changed != run:
            changes.append(text)
        run, plan = changed, make_plan(changed, cache)
        if fits(plan, machine):
            return changes, plan
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Text


def table(*rows: tuple[str, ...]) -> str:
    """
    :param rows: the header, then the others
    :return: a table in Markdown
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [rows[0], tuple("-" * width for width in widths), *rows[1:]]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines)


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _on(machine: Machine, run: Run, cache: dict[Any, Weights]) -> tuple[str, ...]:
    """Whether a run fits a machine, what to change, and how long an iteration and all of them take."""
    found = advice(run, machine, cache)
    if found is None:
        several = "more GPUs" if run.nproc > 1 else "several GPUs (--nproc)"
        return machine.name, "no", f"a smaller model, or {several}", "-", "-"
    changes, plan = found
    training, rollout = (TRAINING_EFFICIENCY, ROLLOUT_EFFICIENCY) if machine.is_gpu else (1.0, 1.0)
    seconds = (plan.training_flops / training + plan.rollout_flops / rollout) / (machine.flops * machine.n_devices)
    seconds *= run.nproc
    times = _duration(seconds), _duration(seconds * run.iterations)
    return machine.name, "with changes" if changes else "yes", ", ".join(changes) or "-", *times


def sharding_table(run: Run, cache: dict[Any, Weights]) -> str:
    """
    :param run: what is to be run, by several learners
    :param cache: see :func:`make_plan`
    :return: what each of their GPUs holds with whole and with sharded weights
    """
    teacher = run.teacher is not None and not run.teacher_elsewhere
    sharded = replace(run, shard=run.lora_rank is None, shard_teacher=teacher)
    plans = [make_plan(each, cache) for each in (replace(run, shard=False, shard_teacher=False), sharded)]
    names = dict.fromkeys(name for plan in plans for name, size in plan.learner.items() if size)
    rows = [(name, *(_gb(plan.learner[name]) if name in plan.learner else "-" for plan in plans)) for name in names]
    needed = ("what a GPU needs", *(_gb(plan.needed(plan.learner)) for plan in plans))
    return table((f"each of {run.nproc} GPUs", "whole weights", "shard=True"), *rows, needed)


def to_markdown(run: Run, machines: tuple[Machine, ...]) -> str:
    """
    :param run: what is to be run
    :param machines: where it might
    :return: memory, what fits where and what to change, time
    """
    cache: dict[Any, Weights] = {}
    plan = make_plan(run, cache)
    student = plan.student
    how = f"LoRA of rank {run.lora_rank}" if run.lora_rank else "all weights"
    lines = [
        f"Student {run.student}: {student.total:,} weights, {student.trained:,} trained ({how}, {run.dtype})"
        + (", gradient checkpointing" if run.gradient_checkpointing else ""),
    ]
    if plan.teacher is not None:
        name = run.student if run.teacher == "student" else run.teacher
        lines.append(f"Teacher {name}: {plan.teacher.total:,} weights, frozen ({run.teacher_dtype})")
    for stack in student.stacks:
        lines.append(f"  {stack.n_layers} layers of width {stack.hidden}, {stack.tokens} tokens of each observation")
    places = (("learner", plan.learner), ("the teacher's device", plan.teacher_device), ("main memory", plan.host))
    memory = [(name, where, _gb(size)) for where, parts in places for name, size in parts.items()]
    lines += ["", sharding_table(run, cache)] if run.nproc > 1 else []
    lines += [
        "",
        table(("memory", "where", "size"), *memory),
        f"A GPU needs {_gb(plan.needed(plan.learner))} for the learner: {FRAGMENTATION:.0%} more for fragmentation and "
        f"{_gb(CONTEXT_BYTES)} for CUDA. Simulators come on top, in main memory.",
        "",
        table(
            ("machine", "fits", "what to change", "an iteration", f"{run.iterations} iterations"),
            *(_on(machine, run, cache) for machine in machines),
        ),
        f"An iteration: {run.n_envs * run.n_steps} decisions, {run.gradient_steps} gradient steps of {run.batch_size}; "
        f"{plan.training_flops / 1e15:.2f} PFLOP of training at {TRAINING_EFFICIENCY:.0%} of a GPU's peak, "
        f"{plan.rollout_flops / 1e15:.2f} PFLOP of acting and labelling at {ROLLOUT_EFFICIENCY:.0%}. The "
        "simulator's own time comes on top.",
    ]
    if run.nproc > 1:
        lines.append(
            f"{run.nproc} learners, each with so many decisions and with batches of its own. What they send each other "
            "takes time as well. With shard=True memory is that of an update or of acting, whichever takes more."
        )
    elif any(machine.n_devices > 1 for machine in machines):
        lines.append(
            "Several GPUs: the memory of each, and the time if all share the work evenly, as with opd-gym train "
            "--nproc 8. One learner uses one GPU and, with teacher_kwargs, another one to teach; --nproc plans several."
        )
    return "\n".join(lines)


def run(args: options.Plan) -> int:
    """
    :param args: what to plan
    :return: exit status
    """
    given = {item.name: getattr(args, item.name) for item in fields(Run)}
    given["teacher"] = None if args.teacher == "none" else args.teacher
    given["lora_rank"] = None if args.full else args.lora_rank
    for name in ("batch_size", "n_steps"):
        if given[name] is None:
            given[name] = max(1, -(-getattr(Run, name) // args.nproc))
    print(to_markdown(Run(**given), (*gpus(args.nproc), this_machine())))
    return 0
