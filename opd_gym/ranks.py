"""
Several learners, one training: what the processes ("ranks") of ``torchrun`` or ``accelerate launch`` agree on.

Plain ``torch.distributed``: accelerate prepares models, optimizers and data loaders, and scales each rank's mean alike.
Here minibatches come from rollouts, and a rank counts by its tokens or trajectories, of which each has other numbers.

With one process nothing here communicates, and nothing changes.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch as th
import torch.distributed as dist
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecNormalize

T = TypeVar("T")

# What the launchers tell each process
_TOLD = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# An evaluation by the first rank may take hours, and the others wait for it. A rank that dies is noticed at once
TIMEOUT = timedelta(hours=12)
# Seconds to wait at the end for what gloo still does
LEAVE_TIMEOUT = 10.0
# Gradients travel together up to so many bytes
BUCKET_BYTES = 2**25


def world_size() -> int:
    """
    :return: number of processes of this training
    """
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in _TOLD) else 1


def rank() -> int:
    """
    :return: number of this process among them
    """
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(os.environ["RANK"]) if world_size() > 1 else 0


def is_main() -> bool:
    """
    :return: whether this is the process that logs, saves and evaluates
    """
    return rank() == 0


def join() -> None:
    """
    Wait for the other processes, unless that has been done. Every rank has to come here.

    :raises RuntimeError: PyTorch was built without ``torch.distributed``
    """
    if world_size() == 1 or (dist.is_available() and dist.is_initialized()):
        return
    if not dist.is_available():
        raise RuntimeError("This build of PyTorch has no torch.distributed: start one process.")
    dist.init_process_group("cpu:gloo,cuda:nccl" if th.cuda.is_available() else "gloo", timeout=TIMEOUT)
    atexit.register(_leave)


def _leave() -> None:
    """
    Before the interpreter ends: a thread of gloo that lets go of a tensor only then, which needs the GIL, would end the
    process by SIGABRT. They outlive the group where something refers to it, as PyTorch's caches of meshes do.
    """
    dist.destroy_process_group()
    patience = time.monotonic() + LEAVE_TIMEOUT
    while _gloo_is_busy() and time.monotonic() < patience:
        time.sleep(0.01)


def _gloo_is_busy() -> bool:
    """
    :return: whether a thread of gloo runs, or would; False where Linux does not tell
    """
    time.sleep(0.01)  # without the GIL: who waits for that alone does not wait any more
    for stat in Path("/proc/self/task").glob("*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            name, _, state = stat.read_text().rpartition(")")
            if "gloo_runloop" in name and state.split()[0] == "R":
                return True
    return False


def local_device(device: th.device | str) -> th.device | str:
    """
    :param device: "auto", or a device of PyTorch
    :return: the same; of several GPUs that nobody chose from, this rank's
    """
    if world_size() > 1 and str(device) in ("auto", "cuda") and th.cuda.is_available():
        return f"cuda:{int(os.environ.get('LOCAL_RANK', rank())) % th.cuda.device_count()}"
    return device


def rank_seed(seed: int | None) -> int | None:
    """
    :param seed: seed of the training
    :return: this rank's: the same for the first one, and a function of both for the others; None for None
    """
    if seed is None or is_main():
        return seed
    # Below 2^31, and far from where the envs of another rank count up from
    return int(np.random.SeedSequence((seed, rank())).generate_state(1)[0] >> 1)


def total(*values: Any) -> list[Any]:
    """
    :param values: numbers, or arrays, of this rank
    :return: their sums over all ranks, float64; with one process, the values themselves
    """
    if world_size() == 1:
        return list(values)
    on_cpu = (value.detach().cpu() if isinstance(value, th.Tensor) else value for value in values)
    arrays = [np.asarray(value, dtype=np.float64) for value in on_cpu]
    flat = th.from_numpy(np.concatenate([array.ravel() for array in arrays]))
    dist.all_reduce(flat)
    parts = np.split(flat.numpy(), np.cumsum([array.size for array in arrays])[:-1])
    return [p.reshape(a.shape) if a.shape else float(p[0]) for p, a in zip(parts, arrays, strict=True)]


def share(count: float | th.Tensor) -> float:
    """
    :param count: how many tokens, or trajectories, this rank has
    :return: which part that is of those of all ranks; 1 with one process
    """
    if world_size() == 1:
        return 1.0
    (everywhere,) = total(float(count))
    return float(count) / everywhere if everywhere else 0.0


def largest(count: int) -> int:
    """
    :param count: a number of this rank
    :return: the largest of all ranks
    """
    return max(gather(count))


def in_step(minibatches: Iterable[T], n: int) -> Iterator[T | None]:
    """
    :param minibatches: this rank's
    :param n: how many they are
    :return: the same; then None, as often as others have one more: each update is made by all ranks together
    """
    more = largest(n) - n
    yield from minibatches
    yield from itertools.repeat(None, more)


def agree(ready: bool) -> bool:
    """
    :param ready: whether this rank goes on
    :return: whether all do
    """
    return all(gather(ready))


def gather(value: Any) -> list[Any]:
    """
    :param value: anything that can be pickled
    :return: what each rank has, in their order
    """
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def call(what: str) -> None:
    """
    Ask the other ranks, which :func:`follow`, to take part in something. For the first rank.

    :param what: its name
    """
    dist.broadcast_object_list([what], 0)


def follow(calls: Mapping[str, Callable[[], Any]]) -> None:
    """
    Where the first rank alone has run something (its callbacks) and goes on now: the others wait for it here, and take
    part in what it asked for meanwhile.

    :param calls: what it may :func:`call` for
    """
    if is_main():
        dist.broadcast_object_list([None], 0)
        return
    while True:
        asked: list[Any] = [None]
        dist.broadcast_object_list(asked, 0)
        if asked[0] is None:
            return
        calls[asked[0]]()


def copy_from_main(tensors: Iterable[th.Tensor]) -> None:
    """
    :param tensors: on every rank the same number of them, in the same order; overwritten with those of the first rank
    """
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor.detach(), 0)


def add_gradients(parameters: Iterable[th.nn.Parameter]) -> None:
    """
    Add up the gradients of all ranks. A parameter that has none on any rank keeps none.

    :param parameters: on every rank the same ones, in the same order
    """
    if world_size() == 1:
        return
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    (found,) = total(np.array([parameter.grad is not None for parameter in trained]))
    bucket: list[th.Tensor] = []
    for parameter, n in zip(trained, found, strict=True):
        if not n:
            continue
        if parameter.grad is None:
            parameter.grad = th.zeros_like(parameter)
        fits = not bucket or (bucket[0].dtype, bucket[0].device) == (parameter.dtype, parameter.device)
        if not fits or sum(grad.nbytes for grad in bucket) + parameter.nbytes > BUCKET_BYTES:
            _add_up(bucket)
            bucket = []
        bucket.append(parameter.grad)
    _add_up(bucket)


def _add_up(gradients: Sequence[th.Tensor]) -> None:
    if not gradients:
        return
    flat = th.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, added in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(added.view_as(gradient))


class SharedStatistics:
    """
    Running means and variances of a ``VecNormalize``, which follow what the envs of all ranks show. All begin with
    those of the first rank.

    :param vec_normalize: the wrapper of this rank's envs
    """

    def __init__(self, vec_normalize: VecNormalize):
        obs = getattr(vec_normalize, "obs_rms", None)
        found = [*(obs.values() if isinstance(obs, dict) else [obs]), vec_normalize.ret_rms]
        self._statistics = [statistics for statistics in found if statistics is not None]
        self._shared = [gather(_moments(statistics))[0] for statistics in self._statistics]
        self._write()

    def share(self) -> None:
        """Count what any rank has seen since the last time."""
        for statistics, shared in zip(self._statistics, self._shared, strict=True):
            shared += total(_moments(statistics) - shared)[0]
        self._write()

    def _write(self) -> None:
        for statistics, (n, added, squares) in zip(self._statistics, self._shared, strict=True):
            statistics.mean, statistics.count = added / n, float(n.flat[0])
            statistics.var = squares / n - statistics.mean**2


def _moments(statistics: RunningMeanStd) -> np.ndarray:
    """Count, sum and sum of squares: what adds up over ranks, (3, *shape)."""
    n = np.full_like(statistics.mean, statistics.count, dtype=np.float64)
    return np.stack([n, n * statistics.mean, n * (statistics.var + np.square(statistics.mean))])
