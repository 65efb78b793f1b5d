"""Where the weights are that somebody names: one resolver, and the registry of the checkpoints of the zoo."""

from __future__ import annotations

import os
import re
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from opd_gym.checks import did_you_mean
from opd_gym.untrusted import read_yaml

ZOO = Path(__file__).parent / "zoo"
REGISTRY_FILE = ZOO / "checkpoints.yml"
CHECKPOINTS = ZOO / "checkpoints"
# Those that the wheel has no room for, where the package is used from its repository
REPOSITORY_CHECKPOINTS = Path(__file__).resolve().parents[1] / "benchmarks" / "checkpoints"
CONFIG_FILE = "config.json"
# The whole of a checkpoint while its files take the places of older ones
PENDING = ".opd_gym-new"
# Of a repository on the hub, what a VLA is read from, or a model of Stable-Baselines3 and its VecNormalize
HUB_FILES = ["*.json", "*.jinja", "*.txt", "tokenizer.model", "*.safetensors", "*checkpoint.pt"]
HUB_FILES += ["*.zip", "*vec_normalize.pkl", "*vecnormalize.pkl"]
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
# What ends so is the name of a file, and not of a model on the hub
_FILES = (".zip", ".safetensors", ".pt", ".pth", ".bin", ".json", ".pkl", ".yml", ".yaml")
_POINTER = b"version https://git-lfs.github.com/"
_RUN_CHECKPOINT = re.compile(r"model_(\d+)_steps\.zip")


@dataclass(frozen=True)
class Checkpoint:
    """
    One entry of ``checkpoints.yml``.

    :param name: its name, and that of its directory
    :param description: one line
    :param teacher_for: patterns of environment ids for which it is the default teacher
    :param student_for: patterns of environment ids for which it is the default student
    """

    name: str
    description: str = ""
    teacher_for: tuple[str, ...] = ()
    student_for: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        """Directory of ``config.json`` and ``model.safetensors``, in the package or in its repository."""
        inside, outside = CHECKPOINTS / self.name, REPOSITORY_CHECKPOINTS / self.name
        return outside if outside.is_dir() and not inside.is_dir() else inside


def read_registry(path: Path | None = None) -> dict[str, Checkpoint]:
    """
    :param path: registry file; None for the package's own
    :return: the checkpoints by name, in the order of the file
    """
    path = path or REGISTRY_FILE
    values = read_yaml(path) or {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} must map names to checkpoints, got {type(values).__name__}.")
    registry = {}
    for name, entry in values.items():
        entry = dict(entry or {})
        unknown = set(entry) - {"description", "teacher_for", "student_for"}
        if unknown:
            raise ValueError(
                f"{path}, {name!r}: unknown keys {sorted(unknown)}; known are description, teacher_for, student_for."
            )
        registry[str(name)] = Checkpoint(
            name=str(name),
            description=str(entry.get("description", "")),
            teacher_for=tuple(entry.get("teacher_for") or ()),
            student_for=tuple(entry.get("student_for") or ()),
        )
    return registry


def checkpoint_names() -> list[str]:
    """
    :return: names of the checkpoints that come with the package or its repository
    """
    return list(read_registry())


def checkpoint_path(name: str) -> Path:
    """
    :param name: name of a checkpoint of the zoo
    :return: its directory (``config.json`` and ``model.safetensors``)
    :raises ValueError: unknown name; lists the known ones
    :raises FileNotFoundError: the registry names it, but its files are not there
    """
    registry = read_registry()
    if name not in registry:
        known = ", ".join(registry) or "none yet"
        hint = did_you_mean(name, registry)
        raise ValueError(f"The zoo has no checkpoint {name!r}, and no such path exists. {hint}Known: {known}.")
    path = registry[name].path
    if not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"The files of the zoo's checkpoint {name!r} are missing: expected them in {path}. The wheel has not "
            f"all of them: copy benchmarks/checkpoints/{name} of the repository there, or pass the path of your copy."
        )
    return path


def run_checkpoints(run_dir: Path) -> list[Path]:
    """
    :param run_dir: directory of a run
    :return: its complete checkpoints, oldest first
    """
    paths = list((run_dir / "checkpoints").glob("[!.]*.zip"))
    found = [(int(match[1]), path) for path in paths if (match := _RUN_CHECKPOINT.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def run_of(path: Path) -> Path | None:
    """
    :param path: a checkpoint, see :func:`resolve_checkpoint`
    :return: directory of the run that it lies in: its ``model.zip``, ``policy/``, ``checkpoints/*.zip``, ...; None if
        there is none
    """
    return next((folder for folder in (path, *path.parents[:2]) if (folder / "args.yml").is_file()), None)


def resolve_checkpoint(spec: str | os.PathLike[str]) -> Path:
    """
    Where the weights are that somebody names, wherever a checkpoint is named: as ``teacher=``, in
    ``policy_kwargs["checkpoint"]`` and on the command line.

    :param spec: one of these, the first that there is: the exact name of a checkpoint of the zoo, as a string (a file
        or folder of that name is ``./name``); the directory of a VLA checkpoint; the directory of a run (its last
        checkpoint) or of one model's zip; the zip of a model, with or without ``.zip``; the id of a VLA, or of a model
        of Stable-Baselines3 as rl-zoo3 publishes it, on the Hugging Face hub (``owner/name``), which is downloaded into
        the hub's cache
    :return: an existing directory with ``config.json``, or a zip file
    :raises FileNotFoundError: it is none of these
    :raises ValueError: a directory with neither or with several models, files that are only pointers of Git LFS, or no
        name at all
    """
    name = _named(spec)
    found = find_checkpoint(name) if isinstance(spec, str) else None
    if found is not None:
        return found
    path = _existing(spec)
    if path is not None:
        return _in_directory(path) if path.is_dir() else _with_content(path)
    if isinstance(spec, str) and is_hub_id(spec):
        return _in_directory(_download(spec), spec)
    raise FileNotFoundError(
        f"There is no checkpoint {name!r}. {did_you_mean(name, checkpoint_names())}Expected the directory of a VLA "
        "checkpoint or of a run, the zip of a model, the id on the Hugging Face hub (owner/name) of a VLA or of a "
        f"model of Stable-Baselines3, or a name of the zoo ({', '.join(checkpoint_names())})."
    )


def is_hub_id(name: str) -> bool:
    """
    :param name: what may be the id of a model on the Hugging Face hub
    :return: whether it has the form of one, ``owner/name``
    """
    return _HUB_ID.fullmatch(name) is not None and not name.lower().endswith(_FILES)


def lasting_name(spec: str | os.PathLike[str]) -> str:
    """
    How a checkpoint is to be written down, for other working directories to find it as well.

    :param spec: see :func:`resolve_checkpoint`
    :return: the absolute path of an existing file or directory; names of the zoo and of the hub stay as they are
    """
    name = _named(spec)
    path = None if isinstance(spec, str) and name in read_registry() else _existing(spec)
    return name if path is None else str(path.absolute())


def _named(spec: str | os.PathLike[str]) -> str:
    if not isinstance(spec, (str, os.PathLike)) or not os.fspath(spec):
        raise ValueError(f"Expected the name or the path of a checkpoint, got {spec!r:.80}.")
    return os.fspath(spec)


def _existing(spec: str | os.PathLike[str]) -> Path | None:
    path = Path(spec).expanduser()
    candidates = (path, path.with_name(f"{path.name}.zip")) if path.name else (path,)
    return next((candidate for candidate in candidates if candidate.exists()), None)


def _with_content(path: Path) -> Path:
    """The file itself, unless Git LFS has left its content elsewhere."""
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise ValueError(
                f"{path} is a pointer of Git LFS and not the file itself. Run `git lfs install && git lfs pull` in its "
                "repository, or `hf download` for one of the Hugging Face hub."
            )
    return path


def newest_intact(checkpoints: Sequence[Path]) -> Path | None:
    """
    The last of a run's checkpoints that can be read: a power cut may leave the newest in parts. Warns of those that
    are passed over.

    :param checkpoints: zips of models, oldest first
    :return: the last that is whole; None if there are none at all
    :raises ValueError: all are damaged
    """
    for path in reversed(checkpoints):
        _with_content(path)
        try:
            with zipfile.ZipFile(path) as archive:
                # A zip that is cut off may end with a whole one, that of the weights in it
                damaged = archive.testzip() if "data" in archive.namelist() else "its end is missing"
        except Exception as error:  # a damaged file raises anything
            damaged = str(error)
        if damaged is None:
            return path
        warnings.warn(f"{path} is damaged ({damaged}): the checkpoint before it is taken.", stacklevel=2)
    if checkpoints:
        raise ValueError(f"Every checkpoint of the run is damaged: {', '.join(map(str, checkpoints))}.")
    return None


def whole_checkpoint(directory: Path) -> Path:
    """
    :param directory: directory of a VLA checkpoint
    :return: where its files belong together: a save that was killed while it replaced them has left the new ones, all
        of them, in a folder of their own
    """
    return directory / PENDING if (directory / PENDING / CONFIG_FILE).is_file() else directory


def adapter_advice(directory: Path) -> str:
    """
    :param directory: what may be the folder of LoRA adapters that were not merged into their base, as peft and
        openvla-oft write it
    :return: what to do about them; empty if there are none
    """
    for folder in (directory, directory / "lora_adapter"):
        if (folder / "adapter_config.json").is_file():
            return (
                f" {folder} holds LoRA adapters, which are no checkpoint without their base. Merge them: load the "
                "base with the code that it was fine-tuned with, then peft.PeftModel.from_pretrained(base, "
                f'"{folder}").merge_and_unload().save_pretrained(...) (vla-scripts/merge_lora_weights_and_save.py of '
                "openvla-oft), with the other files of the fine-tuned folder beside the weights."
            )
    return ""


def _in_directory(path: Path, hub_id: str = "") -> Path:
    path = whole_checkpoint(path)
    if (path / CONFIG_FILE).is_file():
        for pattern in HUB_FILES:
            for file in path.glob(pattern):
                _with_content(file)
        return path
    # Of a repository, the model that has its name
    names = (hub_id.partition("/")[2], "model")
    named = [file for file in (path / f"{name}.zip" for name in names if name) if file.is_file()]
    found = newest_intact([*named[:1], *run_checkpoints(path)])
    if found is not None:
        return found
    models = [model for model in sorted(path.glob("[!.]*.zip")) if _holds_a_model(model)]
    if len(models) == 1:
        return _with_content(models[0])
    if models:
        raise ValueError(f"{path} holds several models: {', '.join(model.name for model in models)}. Name one of them.")
    raise ValueError(
        f"{path} is neither a VLA checkpoint (it has no {CONFIG_FILE}) nor a run (it has no checkpoints/*.zip), and "
        "holds no zip of a model." + adapter_advice(path)
    )


def _holds_a_model(path: Path) -> bool:
    # rl-zoo3 puts a zip of measurements beside that of the model
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return "policy.pth" in archive.namelist()


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=HUB_FILES))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        reason = next(iter(str(error).splitlines()), "")
        raise FileNotFoundError(
            f"{hub_id!r} is neither a path nor a name of the zoo, and the Hugging Face hub does not give it "
            f"({type(error).__name__}: {reason}). Without a network: run `hf download {hub_id}` on a machine that has "
            "one, copy the directory that it prints, and pass its path as the checkpoint."
        ) from error


def _default_for(role: str, env_id: str) -> str | None:
    # Exact ids first: a checkpoint for one task is a better default there than one for the whole suite.
    bare = env_id.split(":")[-1]
    entries = [(pattern, name) for name, entry in read_registry().items() for pattern in getattr(entry, role)]
    for pattern, name in entries:
        if pattern == bare:
            return name
    for pattern, name in entries:
        if fnmatchcase(bare, pattern):
            return name
    return None


def teacher_for(env_id: str) -> str | None:
    """
    :param env_id: environment id, with or without ``opd_gym:``
    :return: name of the default teacher, None if the zoo has none
    """
    return _default_for("teacher_for", env_id)


def student_for(env_id: str) -> str | None:
    """
    :param env_id: environment id, with or without ``opd_gym:``
    :return: name of the default student to start from, None if the zoo has none
    """
    return _default_for("student_for", env_id)


def teachers_for_some_tasks(env_id: str) -> dict[str, tuple[str, ...]]:
    """
    :param env_id: environment id of a suite, with or without ``opd_gym:``
    :return: the zoo's teachers for some tasks of that suite alone, and the ids of these tasks
    """
    suite = env_id.split(":")[-1].rpartition("-v")[0]
    tasks = {
        name: tuple(pattern for pattern in entry.teacher_for if pattern.startswith(f"{suite}Task"))
        for name, entry in read_registry().items()
    }
    return {name: ids for name, ids in tasks.items() if suite and ids}


def find_teacher(env_id: str) -> Path | None:
    """
    :param env_id: environment id, with or without ``opd_gym:``
    :return: directory of the default teacher, None if the zoo has none
    """
    name = teacher_for(env_id)
    return None if name is None else checkpoint_path(name)


def find_checkpoint(name: str) -> Path | None:
    """
    :param name: what may be the name of a checkpoint of the zoo
    :return: its directory, None if the zoo has no checkpoint of that name
    """
    return checkpoint_path(name) if name in read_registry() else None
