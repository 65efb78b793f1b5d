"""Weights of a policy that are spread over the GPUs of all ranks, by PyTorch's ``fully_shard`` (FSDP2)."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch as th
from torch import nn

from opd_gym import ranks

if TYPE_CHECKING:
    from opd_gym.policies.vla import VLAPolicy

# What the first rank asks of the others while its callbacks run
COLLECT = "collect"


def _set_parameters(module: nn.Module, values: Mapping[str, nn.Parameter]) -> None:
    for name, value in values.items():
        owner, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(owner), attribute, value)


def _names(module: nn.Module) -> dict[str, str]:
    """From every name of a parameter to the one under which it is listed: weights may be tied."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(p), name) for name, p in module.named_parameters(remove_duplicate=False)}


class Sharding:
    """
    A policy whose weights, gradients and optimizer state are spread over all ranks, for as long as it learns. Each rank
    keeps its part of every tensor. All ranks call the constructor and all methods but :meth:`whole` together.

    - In an update a layer's weights are gathered when it is run, and given up after it; gradients are added up where
      the part of the weight is.
    - Between two updates each rank has the whole weights besides (:meth:`gather`). Then a forward pass is the rank's
      own affair: ranks act at their own pace, and the first one may evaluate or predict alone.
    - The first rank alone may save, in a callback (:meth:`whole`): the others take part as soon as they wait for its
      callbacks (:meth:`follow`). Tensor by tensor, so no GPU holds more than one of them.

    Weights that are not trained (a teacher's) are never gathered but layer by layer: all ranks run it together.

    :param policy: the policy, on every rank with the same weights; its modules are replaced until :meth:`end`
    :param device: where this rank's part goes; the policy itself may be on the CPU
    """

    def __init__(self, policy: VLAPolicy, device: th.device):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

        if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
            raise RuntimeError(f"shard=True needs a newer PyTorch than {th.__version__}: 2.13 is tested.")
        if device.type == "cuda":
            th.cuda.set_device(device)
        self._policy = policy
        self._device = device
        self._abandoned = False
        self._optimizer: th.optim.Optimizer | None = policy.optimizer
        self.trained = self._optimizer is not None
        # Whether all ranks run the policy together, and whether this one does so for its own sake
        self._together, self._idle = not self.trained, False
        names: dict[th.Tensor, str] = {parameter: name for name, parameter in policy.named_parameters()}
        groups = self._optimizer.param_groups if self._optimizer is not None else []
        self._groups = [[names[parameter] for parameter in group["params"]] for group in groups]
        state: dict[str, dict[str, Any]] = {name: {} for name in names.values()}
        if self._optimizer is not None:
            state.update({names[parameter]: values for parameter, values in self._optimizer.state.items()})
            # Nobody holds on to a whole tensor
            self._optimizer.state.clear()
            for group in groups:
                group["params"] = []
        del names
        self._plain = {name: m for name, m in policy.named_children() if next(m.parameters(), None) is not None}
        self._tied = {name: _names(module) for name, module in self._plain.items()}
        mesh = init_device_mesh(device.type, (ranks.world_size(),))
        # What is beside the layers of a policy that learns stays until its gradients are there
        beside: dict[str, Any] = {} if self.trained else {"reshard_after_forward": True}
        for name, module in self._plain.items():
            sharded = self._taken_from(name, module)
            for layer in sharded.transformer_layers() if hasattr(sharded, "transformer_layers") else []:
                fully_shard(layer, mesh=mesh)
            fully_shard(sharded, mesh=mesh, **beside)
            for part in self._parts(sharded):
                # The gradients of all ranks are weighed by what they have, and added up
                part.set_gradient_divide_factor(1.0)
                part.set_force_sum_reduction_for_comms(True)
            if hasattr(sharded, "decode"):  # which is no forward(), and has to be treated as one
                register_fsdp_forward_method(sharded, "decode")
            setattr(policy, name, sharded)
        self._parameters: dict[str, Any] = dict(policy.named_parameters())
        if self._optimizer is not None:
            self._optimize(self._parameters, self._scatter(state))

    def _taken_from(self, name: str, module: nn.Module) -> Any:
        """A copy of one of the policy's modules that has its weights, which that has no more."""
        own = [*module.parameters(), *module.buffers()]
        taken = copy.deepcopy(module, {id(tensor): tensor for tensor in own})
        self._empty(name, module)
        return taken

    def _empty(self, name: str, module: nn.Module) -> None:
        empty = {n: nn.Parameter(p.detach().to("meta"), p.requires_grad) for n, p in module.named_parameters()}
        _set_parameters(module, {n: empty[listed] for n, listed in self._tied[name].items()})

    @staticmethod
    def _parts(module: nn.Module) -> list[Any]:
        from torch.distributed.fsdp import FSDPModule

        return [part for part in module.modules() if isinstance(part, FSDPModule)]

    def _sharded(self) -> list[Any]:
        return [getattr(self._policy, name) for name in self._plain]

    # ---------------------------------------------------------------------------------------- acting and learning

    def gather(self) -> None:
        """From here on each rank has the whole weights, and runs the policy when it likes."""
        for module in self._sharded():
            module.set_reshard_after_forward(False)
            for part in self._parts(module):
                part.unshard()
        self._together = False

    def spread(self) -> None:
        """Before an update: from here on layers are gathered one at a time, and all ranks run the policy together."""
        for module in self._sharded():
            for part in self._parts(module):
                part.set_reshard_after_forward(part is not module, recurse=False)
        self._together = True

    def begin_pass(self) -> None:
        """Before each forward pass: the ranks that have nothing to run any more join in, see :meth:`others_pass`."""
        if self._together and not self._idle:
            ranks.largest(1 + th.is_grad_enabled())

    @contextmanager
    def others_pass(self) -> Iterator[bool]:
        """
        For a rank that has run all that it has to: inside, it runs the policy for the sake of those that have not, with
        gradients if they do.

        :return: whether one of them runs the policy now
        """
        kind = ranks.largest(0) if self._together else 0
        self._idle = True
        try:
            with th.set_grad_enabled(kind == 2):
                yield kind > 0
        finally:
            self._idle = False

    # -------------------------------------------------------------------------------------------------- saving

    @contextmanager
    def whole(self) -> Iterator[None]:
        """
        For the first rank, in its callbacks: inside, the policy and its optimizer are as if they were not sharded, in
        main memory.

        :raises RuntimeError: the other ranks do not wait for this
        """
        if self._abandoned:
            raise RuntimeError(
                "The weights are in parts on all ranks, and the training ended with an error: they cannot be put "
                "together any more. Load the last checkpoint."
            )
        if not ranks.is_main():
            raise RuntimeError(
                "While it learns, the weights of a model with shard=True are put together for the first rank alone, in "
                "its callbacks."
            )
        ranks.call(COLLECT)
        sharded = {name: getattr(self._policy, name) for name in self._plain}
        parameters, state = self._collect(th.device("cpu"))
        kept = {} if self._optimizer is None else dict(self._optimizer.state)
        self._replace(parameters, state)
        try:
            yield
        finally:
            for name, module in self._plain.items():
                self._empty(name, module)
                setattr(self._policy, name, sharded[name])
            if self._optimizer is not None:
                by_name = {name: kept.get(parameter, {}) for name, parameter in self._parameters.items()}
                self._optimize(self._parameters, by_name)

    def follow(self) -> None:
        """Where the first rank alone has had callbacks: the others wait, and take part in what it saves."""
        ranks.follow({COLLECT: self._collect})

    def abandon(self) -> None:
        """After an error: other ranks may be anywhere, so nothing is gathered any more."""
        self._abandoned = True

    def end(self) -> None:
        """
        The policy is again what it was, on each rank, with the weights learned. Of the optimizer's state each rank has
        nothing but the first one, in main memory.
        """
        for module in self._sharded():
            for part in self._parts(module):
                part.reshard()
        training = self._policy.training
        self._replace(*self._collect(self._device))
        self._policy.train(training)

    def _collect(self, device: th.device | None = None) -> tuple[dict[str, nn.Parameter], dict[str, dict[str, Any]]]:
        """
        Whole weights on a device, None for nowhere, and on the first rank the state of the optimizer, in main memory.
        One tensor after the other.
        """
        parameters: dict[str, nn.Parameter] = {}
        state: dict[str, dict[str, Any]] = {}
        for name, parameter in self._parameters.items():
            value = parameter.detach().full_tensor()
            if device is not None:
                parameters[name] = nn.Parameter(value.to(device), parameter.requires_grad)
        for names, group in zip(self._groups, self._optimizer.param_groups if self._optimizer else [], strict=True):
            for name, parameter in zip(names, group["params"], strict=True):
                for key, value in self._optimizer.state.get(parameter, {}).items():  # type: ignore[union-attr]
                    value = value.full_tensor() if hasattr(value, "full_tensor") else value
                    if ranks.is_main():
                        state.setdefault(name, {})[key] = value.cpu() if isinstance(value, th.Tensor) else value
        return parameters, state

    def _scatter(self, state: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        """Each rank's part of the optimizer's state that the first one has."""
        from torch.distributed.tensor import distribute_tensor

        def is_large(value: Any, name: str) -> bool:
            return isinstance(value, th.Tensor) and value.shape == self._parameters[name].shape and value.ndim > 0

        described = {
            name: {
                key: (v.dtype,) if is_large(v, name) else v.cpu() if isinstance(v, th.Tensor) else v
                for key, v in values.items()
            }
            for name, values in state.items()
        }
        described = ranks.gather(described if ranks.is_main() else None)[0]
        parts: dict[str, dict[str, Any]] = {name: {} for name in described}
        for name, values in described.items():
            parameter = self._parameters[name]
            for key, value in values.items():
                if isinstance(value, tuple):
                    own = state[name][key] if ranks.is_main() else th.empty(parameter.shape, dtype=value[0])
                    value = distribute_tensor(own.to(self._device), parameter.device_mesh, parameter.placements)
                parts[name][key] = value
        return parts

    def _replace(self, parameters: Mapping[str, nn.Parameter], state: Mapping[str, dict[str, Any]]) -> None:
        """Put the plain modules, with these weights, into their places."""
        for name, module in self._plain.items():
            _set_parameters(module, {n: parameters[f"{name}.{listed}"] for n, listed in self._tied[name].items()})
            setattr(self._policy, name, module)
        if self._optimizer is not None:
            self._optimize(parameters, state)

    def _optimize(self, parameters: Mapping[str, Any], state: Mapping[str, dict[str, Any]]) -> None:
        """Make these the parameters of the optimizer, with this state."""
        assert self._optimizer is not None
        self._optimizer.state.clear()
        for group, names in zip(self._optimizer.param_groups, self._groups, strict=True):
            group["params"] = [parameters[name] for name in names]
            # Where PyTorch's own load_state_dict() would have the step counter
            on_device = group.get("fused") or group.get("capturable")
            for name in names:
                if state.get(name):
                    self._optimizer.state[parameters[name]] = {
                        key: value.to(parameters[name].device)
                        if on_device and isinstance(value, th.Tensor) and not value.ndim
                        else value
                        for key, value in state[name].items()
                    }
