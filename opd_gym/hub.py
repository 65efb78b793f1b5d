"""A trained policy on the Hugging Face hub: its files and a model card that says where it comes from, and back."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch as th
from huggingface_hub import EvalResult, HfApi, ModelCardData, snapshot_download

from opd_gym.checkpoints import HUB_FILES, is_hub_id, lasting_name, resolve_checkpoint
from opd_gym.envs.make import env_id_of
from opd_gym.evaluation import EVALUATION_FILE, EvaluationResult
from opd_gym.files import replacing, write_atomic
from opd_gym.version import __version__
from opd_gym.versions import read_versions, versions, write_versions

if TYPE_CHECKING:
    from opd_gym.algorithms.base import RolloutAlgorithm

CARD_FILE = "README.md"
STATISTICS_FILE = "vec_normalize.pkl"


def model_card(
    model: RolloutAlgorithm,
    repo_id: str,
    result: EvaluationResult | None = None,
    license: str | None = None,
) -> str:
    """
    :param model: the trained model
    :param repo_id: ``owner/name`` under which it is published
    :param result: its success, to be shown, and for the ``model-index``
    :param license: as the hub spells it, for instance "mit"; None: the card says nothing
    :return: text of the card
    """
    env_id = None if model.env is None else env_id_of(model.env)
    algorithm = type(model).__name__
    facts = {
        "algorithm": f"{algorithm} of opd_gym {__version__}, {model.num_timesteps:,} timesteps",
        "environment": env_id,
        "teacher": _public_name(getattr(model, "teacher", None)),
    }
    normalised = model.get_vec_normalize_env() is not None
    found = _versions(model, result)
    return _card(repo_id, algorithm, facts, _of_policy(model.policy), result, license, found, normalised)


def _of_policy(policy: Any) -> dict[str, Any]:
    """What a card says about a policy; a VLA alone has a configuration."""
    config = getattr(policy, "config", None)
    if config is None:
        return {"policy": type(policy).__name__}
    return {
        "base": _public_name(policy.base_model),
        "started from": _public_name(policy.base_model) or "random weights",
        "adapters": policy.lora and f"LoRA of rank {policy.lora['r']}, merged into the weights",
        **_of_config(config),
    }


def _of_config(config: Any) -> dict[str, str]:
    return {
        "action tokens": f"{config.chunk_size} actions of {config.action_dim} dimensions, {config.n_bins} bins",
        "cameras": f"{', '.join(config.image_keys)} ({config.image_size[0]} x {config.image_size[1]})",
    }


def _card(
    repo_id: str,
    algorithm: str | None,
    facts: Mapping[str, Any],
    about: dict[str, Any],
    result: EvaluationResult | None,
    license: str | None,
    found: Mapping[str, str],
    normalised: bool,
) -> str:
    """
    :param algorithm: class of this library's algorithm, if known
    :param facts: rows of the card about the training
    :param about: rows about the policy; ``base`` is what it started from, and no row
    :param found: versions
    :param normalised: whether the policy saw observations of a ``VecNormalize``
    """
    about = dict(about)
    base = about.pop("base", None)
    is_vla = "action tokens" in about
    task = "robotics" if is_vla else "reinforcement-learning"
    env_id = facts.get("environment")
    name = repo_id.rpartition("/")[2]
    tags = ["opd_gym", *(["vision-language-action", "robotics"] if is_vla else ["reinforcement-learning"])]
    data = ModelCardData(
        library_name="opd_gym" if is_vla else "stable-baselines3",
        pipeline_tag=task,
        license=license,
        base_model=base if base is not None and is_hub_id(base) else None,
        tags=[*tags, *([algorithm.lower()] if algorithm else []), *([env_id] if env_id else [])],
        model_name=name,
        eval_results=[] if result is None else _eval_results(result, task, env_id),
    )
    rows = {**facts, **about, "versions": ", ".join(f"{key} {version}" for key, version in found.items())}
    trained = f", trained with {algorithm}" if algorithm else ""
    env = f'"{env_id}"' if env_id else "env"
    if is_vla:
        lines = [
            "from opd_gym import OPD",
            "",
            f'model = OPD("VLAPolicy", {env}, policy_kwargs={{"checkpoint": "{repo_id}"}})',
        ]
    else:
        names = [] if algorithm else ["load_policy"]
        names += ["find_vec_normalize", "read_vec_normalize"] if normalised else []
        lines = [f"from opd_gym import {algorithm}"] if algorithm else []
        lines += ["from opd_gym.checkpoints import resolve_checkpoint"]
        lines += [f"from opd_gym.policies.loading import {', '.join(sorted(names))}"] if names else []
        lines += ["", f'path = resolve_checkpoint("{repo_id}")']
        loaded = (
            f"{algorithm}.load(path)" if algorithm else "load_policy(path, env.observation_space, env.action_space)"
        )
        lines += [f"model = {loaded}"]
        if normalised:
            lines += ["observation = read_vec_normalize(find_vec_normalize(path, None)).normalize_obs(observation)"]
    return "\n".join(
        [
            f"---\n{data.to_yaml()}\n---",
            "",
            f"# {name}",
            "",
            f"A {'vision-language-action policy' if is_vla else 'policy'}{trained}.",
            "",
            "| | |",
            "|---|---|",
            *(f"| {key} | {value} |" for key, value in rows.items() if value),
            "",
            *([] if result is None else ["## Success", "", result.to_markdown()]),
            "## How to load it",
            "",
            "```python",
            *lines,
            "action, _ = model.predict(observation, deterministic=True)",
            "```",
            "",
        ]
    )


def _eval_results(result: EvaluationResult, task: str, env_id: str | None) -> list[EvalResult]:
    """Entries of the ``model-index``: success of each env, or its mean return where it says nothing about success."""
    found = []
    for name, part in result.per("env_id").items():
        dataset = name or env_id
        if dataset is None or not part.episodes:
            continue
        judged = bool(part.n_judged)
        value: Any = part.success_rate if judged else f"{part.mean_reward:.2f} +/- {part.std_reward:.2f}"
        found.append(
            EvalResult(
                task_type=task,
                dataset_type=dataset,
                dataset_name=dataset,
                metric_type="success_rate" if judged else "mean_reward",
                metric_value=value,
                metric_args={"episodes": len(part.episodes)},
            )
        )
    return found


def _versions(model: RolloutAlgorithm, result: EvaluationResult | None) -> dict[str, str]:
    """Those of its success, which is what somebody compares with, else of here and now."""
    return versions(model.env) if result is None or not result.versions else result.versions


def _public_name(source: Any) -> str | None:
    """The name of a model without the path to it; None for what has none."""
    if source is None or not isinstance(source, (str, os.PathLike)):
        return None
    text = lasting_name(source)
    if is_hub_id(text):
        return text
    # In the hub's cache: models--owner--name/snapshots/<revision>
    cached = re.search(r"models--([\w.-]+?)--([\w.-]+)", text)
    return f"{cached[1]}/{cached[2]}" if cached else Path(text).name


def write_model_folder(
    model: RolloutAlgorithm,
    directory: str | os.PathLike[str],
    repo_id: str,
    result: EvaluationResult | None = None,
    dtype: th.dtype | None = None,
    license: str | None = None,
) -> Path:
    """
    Write what :func:`push_to_hub` uploads: of a VLA a plain checkpoint (LoRA merged), of any other policy the zip of
    the model, its versions and its card.

    :param model: the trained model
    :param directory: created if needed
    :param repo_id: ``owner/name`` under which it will be published
    :param result: its success, for the card
    :param dtype: type in which the weights of a VLA are stored; None for their own
    :param license: see :func:`model_card`
    :return: the directory
    :raises ValueError: the name is none of the hub's, ``dtype`` is given for a policy that is no VLA, or the directory
        has the evaluation or the VecNormalize of another policy
    """
    _check_repo_id(repo_id)
    directory = Path(directory).expanduser()
    policy: Any = model.policy
    is_vla = hasattr(policy, "save_checkpoint")
    _check_nothing_left(directory, result, is_vla or model.get_vec_normalize_env())
    if is_vla:
        # Older weights of a VLA are replaced
        _check_no_other_weights(directory, (), ("*.zip",))
        policy.save_checkpoint(directory, dtype=dtype)
    else:
        _check_no_dtype(policy, dtype)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.zip"
            model.save(path)
            _copy_zip(path, directory / f"{repo_id.rpartition('/')[2]}.zip")
        statistics = model.get_vec_normalize_env()
        if statistics is not None:
            statistics.save(str(directory / STATISTICS_FILE))
    _finish(directory, model_card(model, repo_id, result, license), result, _versions(model, result))
    return directory


def write_folder(
    source: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    repo_id: str,
    result: EvaluationResult | None = None,
    dtype: th.dtype | None = None,
    license: str | None = None,
    algorithm: str | None = None,
    env_id: str | None = None,
    trust: bool = False,
) -> Path:
    """
    As :func:`write_model_folder`, from what was saved: no env is needed. A checkpoint's directory is copied as it is,
    with every file that other loaders ask for.

    :param source: see :func:`opd_gym.checkpoints.resolve_checkpoint`
    :param directory: created if needed
    :param repo_id: ``owner/name`` under which it will be published
    :param result: its success, for the card
    :param dtype: see :func:`write_model_folder`
    :param license: see :func:`model_card`
    :param algorithm: class of the algorithm, for the card
    :param env_id: environment id, for the card
    :param trust: open a zip even where it holds code, which then runs
    :return: the directory
    :raises ValueError: as there; or ``dtype`` is given for a directory
    """
    _check_repo_id(repo_id)
    path, directory = resolve_checkpoint(source), Path(directory).expanduser()
    facts: dict[str, Any] = {"algorithm": algorithm, "environment": env_id}
    if path.is_dir():
        from opd_gym.policies.body import read_checkpoint_config

        if dtype is not None:
            raise ValueError(f"{path} is published as it is. Convert it first: opd-gym export --dtype ...")
        about: dict[str, Any] = _of_config(read_checkpoint_config(path)[1])
        _check_nothing_left(directory, result, True)
        files = {file.name: file for pattern in HUB_FILES for file in path.glob(pattern) if file.name[0] != "."}
        _check_no_other_weights(directory, files)
        directory.mkdir(parents=True, exist_ok=True)
        for name in sorted(files):
            with replacing(directory / name) as temporary:
                shutil.copyfile(files[name], temporary)
    else:
        from opd_gym.policies.loading import find_vec_normalize, load_policy
        from opd_gym.untrusted import read_attributes

        saved = read_attributes(path, keys=("observation_space", "action_space"), trust=trust)
        policy: Any = load_policy(path, saved["observation_space"], saved["action_space"], trainable=False, trust=trust)
        about = _of_policy(policy)
        facts["teacher"] = _public_name(saved.get("teacher"))
        facts["timesteps"] = f"{saved['num_timesteps']:,}" if saved.get("num_timesteps") else None
        if hasattr(policy, "save_checkpoint"):
            _check_nothing_left(directory, result, True)
            # Older weights of a VLA are replaced
            _check_no_other_weights(directory, (), ("*.zip",))
            policy.save_checkpoint(directory, dtype=dtype)
        else:
            _check_no_dtype(policy, dtype)
            statistics = find_vec_normalize(path, env_id)
            _check_nothing_left(directory, result, statistics)
            _copy_zip(path, directory / f"{repo_id.rpartition('/')[2]}.zip")
            if statistics is not None:
                shutil.copyfile(statistics, directory / STATISTICS_FILE)
    found = result.versions if result is not None and result.versions else read_versions(path)
    normalised = (directory / STATISTICS_FILE).is_file()
    _finish(directory, _card(repo_id, algorithm, facts, about, result, license, found, normalised), result, found)
    return directory


def _check_repo_id(repo_id: str) -> None:
    if not is_hub_id(repo_id):
        raise ValueError(f"Expected the name on the hub as owner/name, got {repo_id!r}.")


def _check_nothing_left(directory: Path, result: EvaluationResult | None, statistics: Any) -> None:
    """Refuse a folder whose evaluation or VecNormalize, of another policy, would be taken for this one's."""
    for name, own in ((EVALUATION_FILE, result), (STATISTICS_FILE, statistics)):
        if not own and (directory / name).exists():
            raise ValueError(
                f"{directory / name} would be published with this policy, and is of another. Name an empty folder, or "
                "remove it."
            )


_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*checkpoint.pt", "*.zip")


def _check_no_other_weights(directory: Path, own: Iterable[str], kinds: Iterable[str] = _WEIGHTS) -> None:
    """Refuse a folder with weights that stay beside this policy's, and may be loaded instead of them."""
    left = sorted({file.name for kind in kinds for file in directory.glob(kind)} - set(own))
    if left:
        raise ValueError(
            f"{directory} has weights of another policy, which would stay beside those of this one: {', '.join(left)}. "
            "Name an empty folder, or remove them."
        )


def _check_no_dtype(policy: Any, dtype: th.dtype | None) -> None:
    if dtype is not None:
        raise ValueError(f"Only a VLA can be stored in another dtype, and this is a {type(policy).__name__}.")


def _copy_zip(source: Path, target: Path) -> None:
    """The zip of a model without the paths of this machine that it holds."""
    _check_no_other_weights(target.parent, (target.name,))
    with zipfile.ZipFile(source) as archive, replacing(target) as temporary, zipfile.ZipFile(temporary, "w") as copy:
        for item in archive.infolist():
            content = archive.read(item)
            if item.filename == "data":
                content = json.dumps(_without_paths(json.loads(content))).encode()
            copy.writestr(item, content)


def _without_paths(value: Any, key: str = "") -> Any:
    """Paths as None: a teacher's, a log's. What is pickled stays as it is."""
    if isinstance(value, dict):
        return {name: _without_paths(item, name) for name, item in value.items()}
    return None if isinstance(value, str) and key != ":serialized:" and os.path.isabs(value) else value


def _finish(directory: Path, card: str, result: EvaluationResult | None, found: Mapping[str, str]) -> None:
    if found:
        write_versions(directory, found)
    if result is not None:
        result.save(directory / EVALUATION_FILE)
    write_atomic(directory / CARD_FILE, card)


def push_to_hub(
    model: RolloutAlgorithm,
    repo_id: str,
    result: EvaluationResult | None = None,
    dtype: th.dtype | None = None,
    private: bool = False,
    token: str | None = None,
    license: str | None = None,
) -> str:
    """
    Publish a trained policy on the Hugging Face hub; ``policy_kwargs={"checkpoint": repo_id}`` loads it everywhere.

    :param model: the trained model
    :param repo_id: ``owner/name``; created if needed
    :param result: its success, for the card
    :param dtype: type in which the weights of a VLA are stored; None for their own
    :param private: whether a new repository is private
    :param token: access token; None for the one of ``hf auth login``
    :param license: see :func:`model_card`
    :return: address of the commit
    :raises ConnectionError: the hub cannot be reached, or does not accept it
    """
    return upload(
        lambda folder: write_model_folder(model, folder, repo_id, result, dtype, license), repo_id, private, token
    )


def upload(write: Callable[[Path], Path], repo_id: str, private: bool = False, token: str | None = None) -> str:
    """
    :param write: writes what is to be uploaded into a folder
    :param repo_id: see :func:`push_to_hub`, as for the arguments that follow
    :return: address of the commit
    :raises ConnectionError: the hub cannot be reached, or does not accept it
    """
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        try:
            # Before anything large is written
            api.create_repo(repo_id, private=private, exist_ok=True)
            directory = write(Path(folder))
            commit = api.upload_folder(
                repo_id=repo_id, folder_path=directory, commit_message=f"Trained with opd_gym {__version__}"
            )
        except ValueError:
            raise
        except Exception as error:  # the hub's client lets errors of its HTTP library through, which differ by version
            reason = next(iter(str(error).splitlines()), "")
            raise ConnectionError(
                f"The Hugging Face hub did not take {repo_id} ({type(error).__name__}: {reason}). Log in with `hf auth "
                "login`. Without a network: opd_gym.hub.write_model_folder(model, directory, repo_id), or `opd-gym hub "
                f"push --folder`, writes what would be uploaded; run `hf upload {repo_id} <directory>` where there is "
                "one."
            ) from error
    return str(commit.commit_url)


def pull(repo_id: str, directory: str | os.PathLike[str], revision: str | None = None) -> Path:
    """
    Fetch a policy into a folder, with its card and its evaluation: no code.

    :param repo_id: ``owner/name``
    :param directory: created if needed
    :param revision: branch, tag or commit; None for the newest
    :return: the directory
    :raises ConnectionError: the hub cannot be reached, or has no such repository
    :raises ValueError: the folder has weights that the repository has not
    """
    _check_repo_id(repo_id)
    try:
        # Where the hub cannot be asked, snapshot_download() takes a folder that is there for what was to be fetched
        found = HfApi().model_info(repo_id, revision=revision)
        commit, files = found.sha, [sibling.rfilename for sibling in found.siblings or ()]
    except Exception as error:
        raise _not_given(repo_id, error) from error
    _check_no_other_weights(Path(directory), files)
    try:
        return Path(
            snapshot_download(
                repo_id, revision=commit, local_dir=Path(directory), allow_patterns=[*HUB_FILES, CARD_FILE]
            )
        )
    except Exception as error:
        raise _not_given(repo_id, error) from error


def _not_given(repo_id: str, error: Exception) -> ConnectionError:
    # As in upload()
    reason = next(iter(str(error).splitlines()), "")
    return ConnectionError(
        f"The Hugging Face hub does not give {repo_id} ({type(error).__name__}: {reason}). Without a network: run "
        f"`hf download {repo_id} --local-dir <directory>` on a machine that has one, and copy the directory."
    )
