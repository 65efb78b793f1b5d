"""The command line: ``opd-gym train | eval | enjoy | demos | list | plan | quickstart | doctor | robotwin``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gymnasium.error import Error as GymError

from opd_gym.envs.robotwin.install import InstallError
from opd_gym.envs.robotwin.runtime import SimulatorError
from opd_gym.zoo.hyperparams import ALGORITHMS

# Bad input, and what is missing on the machine
ERRORS = (ValueError, FileNotFoundError, ImportError, ConnectionError, InstallError, SimulatorError, GymError)
_CHECKPOINT_HELP = "directory of a VLA checkpoint, zip of a model, directory of a run, or a name of the zoo"


def build_parser() -> argparse.ArgumentParser:
    """
    :return: parser of the command line
    """
    parser = argparse.ArgumentParser(
        prog="opd-gym", description="On-policy distillation for vision-language-action policies."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train a policy", description="Train a policy, or go on with a run.")
    train.add_argument("--algo", choices=ALGORITHMS, default="opd")
    train.add_argument("--env", help="environment id, for instance LiberoObject-v0")
    train.add_argument("-n", "--n-timesteps", type=int, help="number of decisions; default: what the YAML file says")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument(
        "--hyperparams",
        nargs="+",
        default=[],
        metavar="KEY:VALUE",
        help="override the YAML file, for instance learning_rate:5e-4 env_kwargs.image_size:64",
    )
    train.add_argument("--config", metavar="FILE", help="YAML file of hyperparameters instead of the zoo's")
    train.add_argument("--teacher", help=f'{_CHECKPOINT_HELP}, or "expert"; default: the zoo\'s teacher for this env')
    train.add_argument(
        "--student",
        "--checkpoint",
        dest="student",
        help=f'{_CHECKPOINT_HELP}, to start from; "none" for random weights; default: the zoo\'s student for this env',
    )
    train.add_argument(
        "--demonstrations", nargs="+", default=[], metavar="PATH", help="HDF5 files or folders of them, for sft"
    )
    train.add_argument("-f", "--folder", default="runs", help="where the directory of the run goes")
    train.add_argument("--eval-episodes", type=int, default=0, help="held-out episodes to play at the end")
    train.add_argument("--resume", metavar="DIR", type=Path, help="go on with this run from its last checkpoint")
    train.add_argument("--device", default="auto")
    train.add_argument(
        "--checkpoint-interval", type=float, default=60.0, metavar="SECONDS", help="between two checkpoints, at least"
    )
    train.add_argument("--no-progress", dest="progress", action="store_false", help="no progress bar")
    train.add_argument("-v", "--verbose", action="count", default=0, help="print the table of every iteration")
    train.set_defaults(run=_train)

    for name, text in (("eval", "success rate over held-out episodes"), ("enjoy", "film a policy (alias: video)")):
        sub = commands.add_parser(name, aliases=["video"] if name == "enjoy" else [], help=text, description=text)
        sub.add_argument(
            "--env",
            required=True,
            nargs="+" if name == "eval" else None,
            help="environment id, for instance LiberoObject-v0"
            + ("; several give one table, by perturbation" if name == "eval" else ""),
        )
        sub.add_argument("--checkpoint", "--student", dest="checkpoint", required=True, help=_CHECKPOINT_HELP)
        sub.add_argument("--task-ids", type=int, nargs="+", help="tasks; default: all of the env")
        sub.add_argument("--categories", nargs="+", help="LIBERO-Plus' perturbations, for instance camera language")
        sub.add_argument(
            "--difficulty",
            type=int,
            nargs="+",
            help="LIBERO-Plus' levels, 1 to 5; needs --difficulty-file",
        )
        sub.add_argument("--difficulty-file", metavar="FILE", help="LIBERO-Plus' task_classification.json")
        sub.add_argument(
            "--episodes",
            type=int,
            default=100 if name == "eval" else 1,
            help="of each env, shared evenly by the tasks; fewer than LIBERO-Plus' tasks take a part of each category",
        )
        sub.add_argument("--init-states", choices=("eval", "sampled"), default="eval", help="official or drawn states")
        sub.add_argument("--n-envs", type=int, default=2 if name == "eval" else 1)
        sub.add_argument("--stochastic", action="store_true", help="sample actions instead of taking the most likely")
        sub.add_argument("--reward-threshold", type=float, help="for envs that say nothing about success")
        sub.add_argument(
            "--env-kwargs", nargs="+", default=[], metavar="KEY:VALUE", help="for instance visuals:exact horizon:400"
        )
        sub.add_argument("--seed", type=int, default=0)
        sub.add_argument("--device", default="auto")
        sub.add_argument("--no-progress", dest="progress", action="store_false")
        if name == "eval":
            sub.add_argument("-o", "--output", type=Path, help="JSON file for the result of every episode")
        else:
            sub.add_argument("-o", "--output", type=Path, default=Path("runs/video.mp4"), help=".mp4 or .gif")
            sub.add_argument("--fps", type=float, default=5.0)
            sub.add_argument("--before", metavar="CHECKPOINT", help="a second policy in the same episodes, on the left")
        sub.set_defaults(run=_evaluate)

    demos = commands.add_parser(
        "demos", help="record demonstrations", description="Record demonstrations with the scripted expert (HDF5)."
    )
    demos.add_argument("--env", required=True, help="LIBERO environment id, for instance LiberoObject-v0")
    demos.add_argument("--task-ids", type=int, nargs="+", help="tasks; default: all of the env")
    demos.add_argument("-n", "--episodes-per-task", type=int, default=1)
    demos.add_argument("--seed", type=int, default=0, help="seed of the first episode")
    demos.add_argument("--image-size", type=int, default=128)
    demos.add_argument("--visuals", choices=("exact", "light"), default="light")
    demos.add_argument("--chunk-size", type=int, default=8, help="length of the labels")
    demos.add_argument("--stride", type=int, default=1, help="record every so many steps")
    demos.add_argument("--perturbation", type=float, default=0.0, help="probability of a push at a step")
    demos.add_argument("-o", "--output", type=Path, default=Path("runs/demos"), help="folder, one file a task")
    demos.set_defaults(run=_demos)

    listing = commands.add_parser("list", help="environments and checkpoints", description="What there is to run.")
    listing.add_argument("--all", action="store_true", help="every environment id, single tasks included")
    listing.set_defaults(run=_list)

    plan = commands.add_parser(
        "plan",
        help="memory and time of a run",
        description="What a run of OPD takes: memory by what it is for, which GPUs have it, what to change, time.",
    )
    from opd_gym.cli.plan import add_arguments as add_plan_arguments

    add_plan_arguments(plan)
    plan.set_defaults(run=_plan)

    quick = commands.add_parser(
        "quickstart", help="OPD on real LIBERO in minutes", description="Student before and after OPD, on real LIBERO."
    )
    from opd_gym.cli.quickstart import add_arguments

    add_arguments(quick)
    quick.set_defaults(run=_quickstart)

    doctor = commands.add_parser(
        "doctor",
        help="what is installed, what is wrong, how to mend it",
        description="What is installed, what is wrong, the command that mends it, and whether LIBERO is as published.",
    )
    from opd_gym.cli.doctor import add_arguments as add_doctor_arguments
    from opd_gym.cli.doctor import run as run_doctor

    add_doctor_arguments(doctor)
    doctor.set_defaults(run=run_doctor)

    robotwin = commands.add_parser(
        "robotwin", help="RoboTwin: runtime, assets, demonstrations", description="What the RoboTwin ids need."
    )
    from opd_gym.cli.robotwin import add_arguments as add_robotwin_arguments

    add_robotwin_arguments(robotwin)
    return parser


def _train(args: argparse.Namespace) -> int:
    from opd_gym.cli.train import TrainArgs, read_args, train

    if args.resume is not None:
        stored = read_args(args.resume)
        kept = ("algo", "env", "seed", "hyperparams", "config", "teacher", "student", "demonstrations")
        defaults = build_parser().parse_args(["train"])
        given = [name for name in kept if getattr(args, name) != getattr(defaults, name)]
        if given:
            raise ValueError(
                f"--resume goes on with the run's own {', '.join(given)}. Leave out --{' --'.join(given)}, or edit "
                f"{args.resume / 'config.yml'}, which is read again."
            )
        stored.n_timesteps = args.n_timesteps if args.n_timesteps is not None else stored.n_timesteps
        stored.device, stored.progress, stored.verbose = args.device, args.progress, args.verbose
        return 0 if train(stored, resume=args.resume).finished else 130
    if args.env is None:
        raise ValueError("Which environment? Pass --env, for instance --env LiberoObject-v0, or --resume DIR.")
    values = {key: value for key, value in vars(args).items() if key in TrainArgs.__dataclass_fields__}
    return 0 if train(TrainArgs(**values)).finished else 130


def _evaluate(args: argparse.Namespace) -> int:
    from stable_baselines3.common.utils import get_device

    from opd_gym.checkpoints import resolve_checkpoint
    from opd_gym.cli.train import default_episodes, default_threshold
    from opd_gym.cli.video import side_by_side, write_video
    from opd_gym.envs.make import build_env
    from opd_gym.envs.registration import LIBERO_IDS, LIBERO_PLUS_IDS, bare_id
    from opd_gym.evaluation import EvaluationResult, evaluate_success
    from opd_gym.policies.body import checkpoint_settings
    from opd_gym.policies.loading import load_policy
    from opd_gym.versions import differences, read_versions
    from opd_gym.zoo.hyperparams import parse_overrides

    film = args.command != "eval"
    names = [args.checkpoint] if not film or args.before is None else [args.before, args.checkpoint]
    paths = [resolve_checkpoint(name) for name in names]
    settings = checkpoint_settings({"checkpoint": paths[-1]})
    if checkpoint_settings({"checkpoint": paths[0]}) != settings:
        raise ValueError(
            f"Both policies of a film act in one env, but {names[0]} and {names[1]} differ in what they were trained "
            "with (pictures, chunk or the statistics of their action tokens). Film them one by one."
        )

    plus = ("categories", "difficulty", "difficulty_file")
    given = [name for name in plus if getattr(args, name)]
    if given and not any(bare_id(env_id) in LIBERO_PLUS_IDS for env_id in ([args.env] if film else args.env)):
        raise ValueError(f"{', '.join(given)}: only LIBERO-Plus has these; its ids are {', '.join(LIBERO_PLUS_IDS)}.")

    device = get_device(args.device)

    def play(env_id: str) -> list[EvaluationResult]:
        env_kwargs: dict[str, Any] = {}
        if bare_id(env_id) in LIBERO_IDS:
            env_kwargs["visuals"] = settings.get("visuals", "light")
            if args.task_ids:
                env_kwargs["task_ids"] = tuple(args.task_ids)
        if bare_id(env_id) in LIBERO_PLUS_IDS:
            env_kwargs.update({name: getattr(args, name) for name in plus})
        if film:
            env_kwargs["render_mode"] = "rgb_array"
        env_kwargs.update(parse_overrides(args.env_kwargs))
        env = build_env(env_id, n_envs=args.n_envs, seed=args.seed, settings=settings, **env_kwargs)
        try:
            episodes = default_episodes(env, args.episodes, args.task_ids, args.init_states)
            if env.has_attr("left_out"):
                left_out = env.get_attr("left_out", indices=0)[0]
                if left_out:
                    counts = ", ".join(f"{n} of {category}" for category, n in left_out.items())
                    print(f"{env_id} leaves out tasks that cannot run here: {counts}.", file=sys.stderr)
            threshold = args.reward_threshold if args.reward_threshold is not None else default_threshold(env_id)
            return [
                evaluate_success(
                    load_policy(path, env.observation_space, env.action_space, trainable=False).to(device),
                    env,
                    episodes[: args.episodes] if film else episodes,
                    deterministic=not args.stochastic,
                    progress=args.progress,
                    reward_threshold=threshold,
                    record=sys.maxsize if film else 0,
                )
                for path in paths
            ]
        finally:
            env.close()

    if film:
        results = play(args.env)
    else:
        played = [(bare_id(env_id), play(env_id)[0]) for env_id in args.env]
        episodes = [replace(episode, env_id=env_id) for env_id, result in played for episode in result.episodes]
        results = [EvaluationResult(episodes, versions=played[-1][1].versions)]
    for name, path, result in zip(names, paths, results, strict=True):
        print(result.to_markdown())
        changed = differences(read_versions(path), result.versions)
        if changed:
            print(f"Not what {name} was trained with: {', '.join(changed)}")
    if film:
        films = [result.frames for result in results]
        frames = [frame for index in sorted(films[-1]) for frame in films[-1][index]]
        if len(films) == 2:
            shared = sorted(films[0].keys() & films[1].keys())
            pairs = (side_by_side(films[0][i], films[1][i], ("before", "after")) for i in shared)
            frames = [frame for pair in pairs for frame in pair]
        print(f"Film: {write_video(args.output, frames, args.fps)}")
    elif args.output is not None:
        results[0].save(args.output)
        print(f"Every episode: {args.output}")
    return 0


def _demos(args: argparse.Namespace) -> int:
    from opd_gym.cli.demos import record_demonstrations

    record_demonstrations(
        args.env,
        args.output,
        episodes_per_task=args.episodes_per_task,
        task_ids=args.task_ids,
        seed=args.seed,
        chunk_size=args.chunk_size,
        stride=args.stride,
        perturbation=args.perturbation,
        image_size=args.image_size,
        visuals=args.visuals,
    )
    return 0


def _list(args: argparse.Namespace) -> int:
    from opd_gym.checkpoints import read_registry
    from opd_gym.envs.registration import LIBERO_IDS, ROBOTWIN_IDS

    shown = [env_id for env_id, kwargs in LIBERO_IDS.items() if args.all or "task_ids" not in kwargs]
    print("Environments:")
    for env_id in shown:
        print(f"  {env_id}")
    if len(shown) < len(LIBERO_IDS):
        print(f"  and {len(LIBERO_IDS) - len(shown)} of single tasks, such as LiberoObjectTask0-v0 (--all shows them)")
    robotwin = list(ROBOTWIN_IDS)
    for env_id in robotwin if args.all else robotwin[:1]:
        print(f"  {env_id}")
    if not args.all:
        print(f"  and {len(robotwin) - 1} of RoboTwin's other tasks (--all shows them)")
    print("  and every id of Gymnasium that has a policy for its spaces")
    print("Checkpoints:")
    for entry in read_registry().values():
        roles = [f"teacher for {', '.join(entry.teacher_for)}"] if entry.teacher_for else []
        roles += [f"student for {', '.join(entry.student_for)}"] if entry.student_for else []
        print(f"  {entry.name}: {'; '.join([entry.description, *roles])}")
    if not read_registry():
        print("  none")
    return 0


def _plan(args: argparse.Namespace) -> int:
    from opd_gym.cli.plan import main

    return main(args)


def _quickstart(args: argparse.Namespace) -> int:
    from opd_gym.cli.quickstart import run

    return run(args)


def main(argv: Sequence[str] | None = None) -> int:
    """
    :param argv: arguments; None for those of the process
    :return: exit status
    """
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except ERRORS as error:
        # The message says what to do, a traceback would only hide it
        print(f"opd-gym: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("opd-gym: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
