"""Files that somebody else wrote: YAML and pickles are read for their values, and nothing in them runs."""

from __future__ import annotations

import base64
import io
import json
import os
import pickle
import re
import zipfile
import zlib
from collections.abc import Collection, Mapping
from enum import Enum
from importlib import import_module
from typing import IO, Any

import yaml

# Far more than a configuration has. Values are counted with aliases written out
MAX_YAML_CHARACTERS = 1_000_000
MAX_YAML_VALUES = 20_000
MAX_YAML_DEPTH = 50
MAX_YAML_DIGITS = 1000

_SPACES = ("Box", "Dict", "Discrete", "Graph", "OneOf", "Sequence", "Text", "Tuple")
_GENERATORS = ("_mt19937.MT19937", "_pcg64.PCG64", "_pcg64.PCG64DXSM", "_philox.Philox", "_sfc64.SFC64")
# What Stable-Baselines3 and sb3-contrib write instances of, and the functions that rebuild them
_CALLED = {
    "collections.OrderedDict",
    "collections.deque",
    "numpy.dtype",
    "numpy.ndarray",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy._core.numeric._frombuffer",
    "numpy.random._pickle.__bit_generator_ctor",
    "numpy.random._pickle.__generator_ctor",
    "numpy.random._pickle.__randomstate_ctor",
    "numpy.random.bit_generator.SeedSequence",
    "numpy.random.bit_generator.__pyx_unpickle_SeedSequence",
    *(f"numpy.random.{name}" for name in _GENERATORS),
    "pathlib.PosixPath",
    "torch._utils._rebuild_tensor_v2",
    "torch.device",
    *(f"gymnasium.spaces.{name.lower()}.{name}" for name in _SPACES),
    "gymnasium.spaces.multi_binary.MultiBinary",
    "gymnasium.spaces.multi_discrete.MultiDiscrete",
    "stable_baselines3.common.noise.NormalActionNoise",
    "stable_baselines3.common.noise.OrnsteinUhlenbeckActionNoise",
    "stable_baselines3.common.noise.VectorizedActionNoise",
    "stable_baselines3.common.running_mean_std.RunningMeanStd",
    "stable_baselines3.common.type_aliases.TrainFreq",
    "stable_baselines3.common.type_aliases.TrainFrequencyUnit",
    "stable_baselines3.common.utils.ConstantSchedule",
    "stable_baselines3.common.utils.FloatSchedule",
    "stable_baselines3.common.utils.LinearSchedule",
    "stable_baselines3.common.vec_env.vec_normalize.VecNormalize",
    "stable_baselines3.her.goal_selection_strategy.GoalSelectionStrategy",
}
# Where classes may come from that are only named, for instance as policy_class or activation_fn
_NAMED = (
    "opd_gym.algorithms.",
    "opd_gym.policies.",
    "sb3_contrib.",
    "stable_baselines3.",
    "torch.nn.modules.",
    "torch.optim.",
)
# Where other versions have what a pickle names
_MOVED = (
    (r"^gym\.utils\.seeding\.RandomNumberGenerator\._generator_ctor$", "numpy.random._pickle.__generator_ctor"),
    (r"^gym\.", "gymnasium."),
    (r"^numpy\.core\.", "numpy._core."),
    (r"^pathlib\._local\.", "pathlib."),
)


# ---------------------------------------------------------------------------------------------------------------------
# YAML


class _Loader(yaml.SafeLoader):
    """YAML 1.1 takes ``5e-4`` for a string; nobody who writes it means one."""

    depth = composed = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        # What is too much is refused before all of it is read
        self.depth += 1
        self.composed += 1
        if self.depth > MAX_YAML_DEPTH:
            raise yaml.YAMLError(f"nested more than {MAX_YAML_DEPTH} deep")
        if self.composed > MAX_YAML_VALUES:
            raise yaml.YAMLError(f"more than {MAX_YAML_VALUES} values")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [(key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = {key[1] for key in keys if keys.count(key) > 1 and key[0] != "tag:yaml.org,2002:merge"}
        if twice:
            raise yaml.YAMLError(f"it has a key twice: {', '.join(sorted(twice))}, line {node.start_mark.line + 1}")
        return super().construct_mapping(node, deep)

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            _count_values(node, {}, 0)
        return node


_Loader.yaml_implicit_resolvers = {key: list(value) for key, value in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def _count_values(node: yaml.Node, counted: dict[yaml.Node, int], depth: int) -> int:
    """How many values a node has with its aliases written out, without writing them out."""
    if depth > MAX_YAML_DEPTH:
        raise yaml.YAMLError(f"nested more than {MAX_YAML_DEPTH} deep with its aliases written out, or in itself")
    if node not in counted:
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        if isinstance(node, yaml.MappingNode):
            children = [part for pair in children for part in pair]
        elif node.tag.endswith((":int", ":float")) and len(node.value) > MAX_YAML_DIGITS:
            raise yaml.YAMLError(f"a number of more than {MAX_YAML_DIGITS} digits")
        total = 1 + sum(_count_values(child, counted, depth + 1) for child in children)
        if total > MAX_YAML_VALUES:
            raise yaml.YAMLError(f"more than {MAX_YAML_VALUES} values with its aliases written out")
        counted[node] = total
    return counted[node]


def parse_yaml(text: str, source: str | os.PathLike[str] = "") -> Any:
    """
    :param text: YAML
    :param source: what it was read from, for the error
    :return: plain Python values; tags that would create anything else are refused
    :raises ValueError: it is not YAML, or larger, deeper or more repetitive than a configuration needs
    """
    reason: object = f"it has more than {MAX_YAML_CHARACTERS} characters"
    if len(text) <= MAX_YAML_CHARACTERS:
        try:
            return yaml.load(text, Loader=_Loader)  # noqa: S506  (a SafeLoader)
        except (yaml.YAMLError, ValueError, OverflowError) as error:
            reason = " ".join(str(error).split())
    raise ValueError(f"{os.fspath(source) or repr(text[:60])} is not YAML that can be read: {reason}.")


def read_yaml(path: str | os.PathLike[str]) -> Any:
    """
    :param path: YAML file
    :return: see :func:`parse_yaml`
    :raises ValueError: as there; also if it is not UTF-8
    """
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(MAX_YAML_CHARACTERS + 1)
    except UnicodeDecodeError as error:
        raise ValueError(f"{os.fspath(path)} is not text in UTF-8: {error}.") from error
    return parse_yaml(text, path)


# ---------------------------------------------------------------------------------------------------------------------
# Pickles


# In Python: the one in C does not tell naming a class from calling it, and lets state be set on a class
_PythonUnpickler: Any = pickle._Unpickler  # type: ignore[attr-defined]


class _Unpickler(_PythonUnpickler):
    dispatch = dict(_PythonUnpickler.dispatch)

    def __init__(self, data: bytes, trust: bool):
        super().__init__(io.BytesIO(data))
        self._trust = trust
        self._found: set[int] = set()
        self._callable: set[int] = set()

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        for old, new in _MOVED:
            full = re.sub(old, new, full)
        if full in _CALLED:
            module, _, name = full.rpartition(".")
            found = getattr(_import(module), name)
            self._callable.add(id(found))
        elif self._trust:
            return super().find_class(full[: -len(name) - 1], name)
        elif full == "torch.storage._load_from_bytes":
            found = _load_tensor  # torch's own unpickles whatever it is given
            self._callable.add(id(found))
        else:
            found = _named(full)
        self._found.add(id(found))
        return found

    def get_extension(self, code: int) -> None:
        raise pickle.UnpicklingError("it asks for an extension, which Stable-Baselines3 does not write")

    def _check_call(self, function: Any) -> None:
        if not self._trust and id(function) not in self._callable:
            name = getattr(function, "__name__", type(function).__name__)
            raise pickle.UnpicklingError(f"it calls {name}, which may only be named")

    def _instantiate(self, klass: Any, args: Any) -> None:
        self._check_call(klass)
        super()._instantiate(klass, args)

    def load_reduce(self) -> None:
        self._check_call(self.stack[-2])
        super().load_reduce()

    def load_newobj(self) -> None:
        self._check_call(self.stack[-2])
        super().load_newobj()

    def load_newobj_ex(self) -> None:
        self._check_call(self.stack[-3])
        super().load_newobj_ex()

    def load_build(self) -> None:
        target, state = self.stack[-2:]
        if not self._trust:
            if id(target) in self._found or isinstance(target, Enum):
                raise pickle.UnpicklingError("it changes a class, a function or a constant")
            if isinstance(state, tuple) and not hasattr(target, "__setstate__"):
                # It would set any attribute, __class__ among them
                raise pickle.UnpicklingError("it sets slots, which Stable-Baselines3 does not write")
        super().load_build()

    for _code, _load in (
        (pickle.REDUCE, load_reduce),
        (pickle.NEWOBJ, load_newobj),
        (pickle.NEWOBJ_EX, load_newobj_ex),
        (pickle.BUILD, load_build),
    ):
        dispatch[_code[0]] = _load


def _import(module: str) -> Any:
    try:
        return import_module(module)
    except ImportError:
        return import_module(module.replace("numpy._core", "numpy.core"))  # NumPy 1


def _named(full: str) -> Any:
    """A class that may be named and not called, or a type of numbers."""
    import numpy as np
    import torch as th
    from stable_baselines3.common.buffers import BaseBuffer

    module, _, name = full.rpartition(".")
    if full.startswith(_NAMED) or module in ("numpy", "torch"):
        found = getattr(import_module(module), name, None)
        bases = (th.nn.Module, th.optim.Optimizer, BaseBuffer, np.number, np.bool_)
        if isinstance(found, th.dtype) or (isinstance(found, type) and issubclass(found, bases)):
            return found
    raise pickle.UnpicklingError(f"it asks for {full}, which Stable-Baselines3 and sb3-contrib do not write")


def _load_tensor(data: bytes) -> Any:
    import torch as th

    return th.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def unpickle(data: bytes, source: str | os.PathLike[str], trust: bool = False, remedy: str = "") -> Any:
    """
    Read a pickle that holds what Stable-Baselines3 and sb3-contrib write: numbers, arrays, spaces, schedules,
    statistics. Classes of policies, modules, optimizers and buffers may be named in it, not called; anything else is
    refused. Spaces of the old ``gym`` become Gymnasium's.

    :param data: the pickle
    :param source: what it was read from, for the error
    :param trust: admit everything: whatever code the pickle holds runs
    :param remedy: what else to do about one that cannot be read, for the error
    :return: the object
    :raises ValueError: it holds anything else, is damaged, or was written by other versions
    """
    try:
        return _Unpickler(data, trust).load()
    except Exception as error:  # a damaged pickle raises anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        advice = "" if trust else " If you trust who wrote it, pass trust=True (--trust): whatever code it holds runs."
        raise ValueError(f"{os.fspath(source)} cannot be read ({reason}).{remedy}{advice}") from error


def read_attributes(
    path: str | os.PathLike[str] | IO[bytes],
    custom_objects: Mapping[str, Any] | None = None,
    keys: Collection[str] | None = None,
    trust: bool = False,
) -> dict[str, Any]:
    """
    The attributes in the zip of a model. As ``custom_objects`` of Stable-Baselines3's own functions they keep those
    from unpickling anything.

    :param path: zip of a model, or an open file
    :param custom_objects: attributes to use instead of those in the zip
    :param keys: attributes that are wanted: others that are pickled are None. None: all, save for ``lr_schedule``,
        which follows from ``learning_rate``
    :param trust: see :func:`unpickle`
    :return: the attributes by name; empty if the zip has none
    :raises ValueError: it is not the zip of a model, or what is wanted cannot be read
    """
    name = os.fspath(path) if isinstance(path, (str, os.PathLike)) else getattr(path, "name", "The zip of the model")
    given = dict(custom_objects or {})
    try:
        with zipfile.ZipFile(path) as archive:
            saved = json.loads(archive.read("data")) if "data" in archive.namelist() else {}
            if not isinstance(saved, dict):
                raise ValueError(f"its data is a {type(saved).__name__}")
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, RuntimeError, OSError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise  # it is not there, or may not be read
        raise ValueError(
            f"{name} is not the zip of a Stable-Baselines3 model (as model.save() writes it), or is damaged: {error}"
        ) from error
    found: dict[str, Any] = {}
    for key, value in saved.items():
        if key in given:
            found[key] = given[key]
        elif not isinstance(value, dict) or ":serialized:" not in value:
            found[key] = value
        elif key == "lr_schedule" if keys is None else key not in keys:
            found[key] = None
        else:
            try:
                data = base64.b64decode(value[":serialized:"])
            except (ValueError, TypeError) as error:
                raise ValueError(f"{name}: its {key} is damaged: {error}") from error
            remedy = (
                " It was written by other versions of Python, gym or Stable-Baselines3, or holds code. Pass it "
                f"yourself: custom_objects={{{key!r}: ...}} (for a teacher, in teacher_kwargs)."
            )
            found[key] = unpickle(data, f"{name}: its {key}", trust, remedy)
    return found
