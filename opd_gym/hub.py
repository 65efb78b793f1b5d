"""A trained policy on the Hugging Face hub: a plain checkpoint and a model card that says where it comes from."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch as th
from huggingface_hub import HfApi, ModelCardData

from opd_gym.checkpoints import is_hub_id, lasting_name
from opd_gym.envs.make import env_id_of
from opd_gym.files import write_atomic
from opd_gym.version import __version__
from opd_gym.versions import versions, write_versions

if TYPE_CHECKING:
    from opd_gym.algorithms.base import RolloutAlgorithm
    from opd_gym.evaluation import EvaluationResult

CARD_FILE = "README.md"


def model_card(model: RolloutAlgorithm, repo_id: str, result: EvaluationResult | None = None) -> str:
    """
    :param model: the trained model
    :param repo_id: ``owner/name`` under which it is published
    :param result: its success, to be shown
    :return: text of the card
    """
    policy: Any = model.policy
    config = policy.config
    algorithm = type(model).__name__
    base, teacher = (_public_name(source) for source in (policy.base_model, getattr(model, "teacher", None)))
    env_id = None if model.env is None else env_id_of(model.env)
    data = ModelCardData(
        library_name="opd_gym",
        pipeline_tag="robotics",
        base_model=base if base is not None and is_hub_id(base) else None,
        tags=["opd_gym", "vision-language-action", "robotics", algorithm.lower(), *([env_id] if env_id else [])],
    )
    facts = {
        "algorithm": f"{algorithm} of opd_gym {__version__}, {model.num_timesteps:,} timesteps",
        "environment": env_id,
        "started from": base or "random weights",
        "teacher": teacher,
        "adapters": policy.lora and f"LoRA of rank {policy.lora['r']}, merged into the weights",
        "action tokens": f"{config.chunk_size} actions of {config.action_dim} dimensions, {config.n_bins} bins",
        "cameras": f"{', '.join(config.image_keys)} ({config.image_size[0]} x {config.image_size[1]})",
        "versions": ", ".join(f"{name} {version}" for name, version in _versions(model, result).items()),
    }
    rows = [f"| {name} | {value} |" for name, value in facts.items() if value]
    success = [] if result is None else ["## Success", "", result.to_markdown()]
    env = f'"{env_id}"' if env_id else "env"
    return "\n".join(
        [
            f"---\n{data.to_yaml()}\n---",
            "",
            f"# {repo_id.rpartition('/')[2]}",
            "",
            f"A vision-language-action policy, trained with {algorithm}.",
            "",
            "| | |",
            "|---|---|",
            *rows,
            "",
            *success,
            "## How to load it",
            "",
            "```python",
            "from opd_gym import OPD",
            "",
            f'model = OPD("VLAPolicy", {env}, policy_kwargs={{"checkpoint": "{repo_id}"}})',
            "action, _ = model.predict(observation, deterministic=True)",
            "```",
            "",
        ]
    )


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
) -> Path:
    """
    Write what :func:`push_to_hub` uploads: a plain checkpoint (LoRA merged), its versions and its card.

    :param model: the trained model
    :param directory: created if needed
    :param repo_id: ``owner/name`` under which it will be published
    :param result: its success, for the card
    :param dtype: type in which the weights are stored; None for their own
    :return: the directory
    :raises ValueError: the policy is not a VLA, or the name is none of the hub's
    """
    policy: Any = model.policy
    if not hasattr(policy, "save_checkpoint"):
        raise ValueError(f"Only a VLAPolicy is published as a checkpoint, got {type(policy).__name__}.")
    if not is_hub_id(repo_id):
        raise ValueError(f"Expected the name on the hub as owner/name, got {repo_id!r}.")
    directory = Path(directory).expanduser()
    policy.save_checkpoint(directory, dtype=dtype)
    write_versions(directory, _versions(model, result))
    write_atomic(directory / CARD_FILE, model_card(model, repo_id, result))
    return directory


def push_to_hub(
    model: RolloutAlgorithm,
    repo_id: str,
    result: EvaluationResult | None = None,
    dtype: th.dtype | None = None,
    private: bool = False,
    token: str | None = None,
) -> str:
    """
    Publish a trained policy on the Hugging Face hub; ``policy_kwargs={"checkpoint": repo_id}`` loads it everywhere.

    :param model: the trained model
    :param repo_id: ``owner/name``; created if needed
    :param result: its success, for the card
    :param dtype: type in which the weights are stored; None for their own
    :param private: whether a new repository is private
    :param token: access token; None for the one of ``hf auth login``
    :return: address of the commit
    :raises ConnectionError: the hub cannot be reached, or does not accept it
    """
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        try:
            # Before anything large is written
            api.create_repo(repo_id, private=private, exist_ok=True)
            directory = write_model_folder(model, folder, repo_id, result, dtype)
            commit = api.upload_folder(
                repo_id=repo_id, folder_path=directory, commit_message=f"Trained with opd_gym {__version__}"
            )
        except ValueError:
            raise
        except Exception as error:  # the hub's client lets errors of its HTTP library through, which differ by version
            reason = next(iter(str(error).splitlines()), "")
            raise ConnectionError(
                f"The Hugging Face hub did not take {repo_id} ({type(error).__name__}: {reason}). Log in with `hf auth "
                "login`. Without a network: opd_gym.hub.write_model_folder(model, directory, repo_id) writes what "
                f"would be uploaded; run `hf upload {repo_id} <directory>` where there is one."
            ) from error
    return str(commit.commit_url)
