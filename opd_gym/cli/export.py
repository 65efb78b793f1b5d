"""``opd-gym export``: a trained VLA as a plain checkpoint."""

from __future__ import annotations

from typing import Any

import torch as th

from opd_gym.checkpoints import resolve_checkpoint
from opd_gym.cli.options import Export
from opd_gym.envs.make import build_env
from opd_gym.policies.loading import checkpoint_settings, load_policy
from opd_gym.versions import read_versions, write_versions


def run(args: Export) -> int:
    """
    Write the checkpoint, with the versions that it was trained with.

    :param args: what to write, and where
    :return: exit status
    :raises ValueError: it is no VLA, or does not fit the env
    """
    path = resolve_checkpoint(args.checkpoint)
    settings = checkpoint_settings({"checkpoint": path}, args.trust)
    env = build_env(args.env, n_envs=1, settings=settings)
    try:
        spaces = env.observation_space, env.action_space
    finally:
        env.close()
    policy: Any = load_policy(path, *spaces, trainable=False, trust=args.trust)
    if not hasattr(policy, "save_checkpoint"):
        raise ValueError(
            f"{path} holds a {type(policy).__name__}. Only a VLAPolicy has a checkpoint of its own form; a zip of "
            "Stable-Baselines3 is complete as it is."
        )
    policy.save_checkpoint(args.output, dtype=None if args.dtype is None else getattr(th, args.dtype))
    trained_with = read_versions(path)
    if trained_with:
        write_versions(args.output, trained_with)
    print(args.output)
    return 0
