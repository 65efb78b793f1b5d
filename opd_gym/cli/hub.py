"""``opd-gym hub``: policies to the Hugging Face hub, and back."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import torch as th

from opd_gym import hub
from opd_gym.checkpoints import resolve_checkpoint, run_checkpoints, run_of
from opd_gym.cli.options import HubPull, HubPush
from opd_gym.cli.train import read_args
from opd_gym.envs.registration import bare_id
from opd_gym.evaluation import EVALUATION_FILE, EvaluationResult
from opd_gym.untrusted import read_attributes


def push(args: HubPush) -> int:
    """
    Publish a policy, or write what would be published.

    :param args: what, and where
    :return: exit status
    """
    path = resolve_checkpoint(args.checkpoint)
    run = run_of(path)
    evaluation = args.evaluation
    algorithm, env_id = None, None
    if run is not None:
        started = read_args(run)
        algorithm, env_id = started.algo.upper(), bare_id(started.env)
        own = run / EVALUATION_FILE
        if evaluation is None and own.is_file():
            if _is_last(path, run):
                evaluation = own
            else:
                print(
                    f"{own} is of the run's last model, and {path} is another: the card goes without. Evaluate it "
                    "(opd-gym eval -o FILE) and pass --evaluation FILE.",
                    file=sys.stderr,
                )
    write = partial(
        hub.write_folder,
        path,
        repo_id=args.repo,
        result=None if evaluation is None else EvaluationResult.load(evaluation),
        dtype=None if args.dtype is None else getattr(th, args.dtype),
        license=args.license,
        algorithm=algorithm,
        env_id=env_id,
        trust=args.trust,
    )
    if args.folder is not None:
        print(write(args.folder))
        return 0
    print(hub.upload(lambda folder: write(folder), args.repo, args.private))
    return 0


def _is_last(path: Path, run: Path) -> bool:
    """Whether weights are those that a run ended with, and that it evaluated."""
    final = run / "model.zip"
    if path.is_dir() or path == final:
        return True
    if path not in run_checkpoints(run) or not final.is_file():
        return False
    # Otherwise the run went on after it was evaluated, or came to an end after that checkpoint
    ends = [read_attributes(zipped, keys=()).get("num_timesteps") for zipped in (path, final)]
    return ends[0] == ends[1]


def pull(args: HubPull) -> int:
    """
    Fetch a policy.

    :param args: what, and where to
    :return: exit status
    """
    print(hub.pull(args.repo, args.output or Path(args.repo.rpartition("/")[2]), args.revision))
    return 0
