"""``opd-gym eval`` and ``opd-gym enjoy``: the success rate of a policy, and films of it."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from stable_baselines3.common.utils import get_device, set_random_seed
from stable_baselines3.common.vec_env import VecFrameStack

from opd_gym.checkpoints import resolve_checkpoint, run_of
from opd_gym.cli.options import Enjoy, Eval
from opd_gym.cli.train import default_episodes, default_threshold, read_args, read_mapping
from opd_gym.cli.video import check_film, side_by_side, write_video
from opd_gym.envs.make import build_env
from opd_gym.envs.registration import CHUNK_SIZES, LIBERO_IDS, LIBERO_PLUS_IDS, bare_id
from opd_gym.evaluation import EvaluationResult, evaluate_success
from opd_gym.policies.loading import (
    check_device,
    check_spaces,
    checkpoint_settings,
    find_vec_normalize,
    load_policy,
    normalised,
    stacked_frames,
)
from opd_gym.versions import differences, read_versions
from opd_gym.zoo.hyperparams import merge, parse_overrides


def trained_in(checkpoint: Path, env_id: str) -> dict[str, Any]:
    """
    The env that a run was trained in, as far as it is that of its evaluation as well.

    :param checkpoint: a checkpoint; it need not lie in a run
    :param env_id: environment id that it is evaluated in
    :return: part of the run's configuration, see :func:`opd_gym.envs.make.build_env`; of a benchmark neither tasks
        nor initial states nor how long an episode is; of another env of LIBERO only how it is drawn
    """
    run_dir = run_of(checkpoint)
    if run_dir is None or not (run_dir / "config.yml").is_file():
        return {}
    own, asked = bare_id(read_args(run_dir).env), bare_id(env_id)
    values = read_mapping(run_dir / "config.yml")
    env_kwargs = dict(values.get("env_kwargs") or {})
    if own != asked:
        both = own in LIBERO_IDS and asked in LIBERO_IDS
        return {"env_kwargs": {key: env_kwargs[key] for key in ("visuals", "msaa") if both and key in env_kwargs}}
    if asked in CHUNK_SIZES:
        for key in ("task_ids", "init_states", "horizon"):
            env_kwargs.pop(key, None)
    kept = ("env_wrapper", "chunk_size", "tokens", "n_bins")
    return {"env_kwargs": env_kwargs, **{key: values[key] for key in kept if values.get(key) is not None}}


def run(args: Eval | Enjoy) -> int:
    """
    Play episodes and print how many succeed.

    :param args: what to play
    :return: exit status; 1 if more episodes were lost than may be
    """
    film = isinstance(args, Enjoy)
    if isinstance(args, Enjoy):
        check_film(args.output)
    elif args.output is not None:
        _check_replaces_results(Path(args.output))
    if args.stochastic and args.temperature is not None:
        raise ValueError("--stochastic is --temperature 1: give one of them.")
    device = get_device(check_device(args.device))
    env_ids = [args.env] if isinstance(args, Enjoy) else args.env
    before = args.before if isinstance(args, Enjoy) else None
    names = [args.checkpoint] if before is None else [before, args.checkpoint]
    paths = [resolve_checkpoint(name) for name in names]
    settings = checkpoint_settings({"checkpoint": paths[-1]}, args.trust)

    def check_same(values: list[Any], what: str) -> None:
        if values[0] != values[-1]:
            raise ValueError(
                f"Both policies of a film act in one env, but {names[0]} and {names[1]} differ in {what}. Film them "
                "one by one."
            )

    check_same(
        [checkpoint_settings({"checkpoint": paths[0]}, args.trust), settings],
        "what they were trained with (pictures, chunk or the statistics of their action tokens)",
    )

    plus = ("categories", "difficulty", "difficulty_file")
    given = [name for name in plus if getattr(args, name)]
    if given and not any(bare_id(env_id) in LIBERO_PLUS_IDS for env_id in env_ids):
        raise ValueError(f"{', '.join(given)}: only LIBERO-Plus has these; its ids are {', '.join(LIBERO_PLUS_IDS)}.")

    overrides = merge(parse_overrides(f"env_kwargs.{item}" for item in args.env_kwargs), parse_overrides(args.param))
    changed = overrides.pop("env_kwargs", {})
    wrapped = {"env_wrapper": overrides.pop("env_wrapper")} if "env_wrapper" in overrides else {}
    if overrides or not isinstance(changed, dict):
        raise ValueError(
            f"-P {', -P '.join(args.param)}: a policy is played as it was trained; only env_kwargs and env_wrapper can "
            "be changed, for instance -P env_kwargs.visuals=exact."
        )

    def play(env_id: str) -> list[EvaluationResult]:
        # What Stable-Baselines3, rl-zoo3 and the hub leave beside the zip of a model that was trained behind it
        statistics = [find_vec_normalize(path, bare_id(env_id)) if path.is_file() else None for path in paths]
        check_same(statistics, "their VecNormalize")
        env_kwargs: dict[str, Any] = {}
        # The zoo's checkpoints lie in no run
        trained = [found for found in (trained_in(path, env_id) for path in paths) if found] or [{}]
        check_same(trained, "the env that they were trained in")
        built = {**trained[0], **wrapped}
        if bare_id(env_id) in LIBERO_IDS:
            drawn = trained[0].get("env_kwargs", {}).get("visuals", "light")
            env_kwargs["visuals"] = settings.get("visuals", drawn)
            if args.task_ids:
                env_kwargs["task_ids"] = tuple(args.task_ids)
        if bare_id(env_id) in LIBERO_PLUS_IDS:
            env_kwargs.update({name: getattr(args, name) for name in plus})
        if bare_id(env_id) not in CHUNK_SIZES and any(trained[0].values()):
            print(f"The env is as in training: {trained[0]}", file=sys.stderr)
        if film:
            env_kwargs["render_mode"] = "rgb_array"
        env_kwargs.update(changed)
        try:
            env = build_env(env_id, built, n_envs=args.n_envs, seed=args.seed, settings=settings, **env_kwargs)
        except ValueError as error:
            if not settings:
                raise
            raise ValueError(f"{env_id} cannot be built for {args.checkpoint}: {error}") from error
        try:
            if statistics[0] is not None:
                env = normalised(env, statistics[0], args.trust)
            stacks = [stacked_frames(path, env.observation_space, args.trust) for path in paths]
            check_same(stacks, "how many observations they see at once")
            if stacks[0] > 1:
                env = VecFrameStack(env, stacks[0])
            episodes = default_episodes(env, args.episodes, args.task_ids, args.init_states)
            if env.has_attr("left_out"):
                left_out = env.get_attr("left_out", indices=0)[0]
                if left_out:
                    counts = ", ".join(f"{n} of {category}" for category, n in left_out.items())
                    print(f"{env_id} leaves out tasks that cannot run here: {counts}.", file=sys.stderr)
            threshold = args.reward_threshold if args.reward_threshold is not None else default_threshold(env_id)
            policies = [
                load_policy(path, env.observation_space, env.action_space, args.dtype, False, trust=args.trust)
                for path in paths
            ]
            for policy, path in zip(policies, paths, strict=True):
                check_spaces(policy, env, path)
            results = []
            for policy in policies:
                set_random_seed(args.seed)  # of sampled actions
                results.append(
                    evaluate_success(
                        policy.to(device),
                        env,
                        episodes[: args.episodes] if film else episodes,
                        deterministic=not args.stochastic,
                        progress=args.progress,
                        reward_threshold=threshold,
                        record=sys.maxsize if film else 0,
                        temperature=args.temperature,
                    )
                )
            return results
        finally:
            env.close()

    if film:
        results = play(env_ids[0])
    else:
        for env_id in env_ids:
            default_threshold(env_id)  # a slip in the last one is told before the others are played
        played: list[tuple[str, EvaluationResult]] = []
        for env_id in env_ids:
            try:
                played.append((bare_id(env_id), play(env_id)[0]))
            except Exception:
                if played:
                    print(f"What came before {env_id}:\n", *(f"{o}: {r}" for o, r in played), sep="\n", file=sys.stderr)
                raise
        episodes = [replace(episode, env_id=env_id) for env_id, result in played for episode in result.episodes]
        lost = [replace(episode, env_id=env_id) for env_id, result in played for episode in result.lost]
        last = played[-1][1]
        results = [EvaluationResult(episodes, versions=last.versions, lost=lost, temperature=last.temperature)]
    if not isinstance(args, Enjoy) and args.output is not None:
        # Before anything is printed: a pipe may be closed
        results[0].save(args.output)
    for name, path, result in zip(names, paths, results, strict=True):
        print(result.to_markdown("" if len(results) == 1 else f"{name}, by task"))
        others = differences(read_versions(path), result.versions)
        if others:
            print(f"Not what {name} was trained with: {', '.join(others)}")
    if isinstance(args, Enjoy):
        films = [result.frames for result in results]
        frames = [frame for index in sorted(films[-1]) for frame in films[-1][index]]
        if len(films) == 2:
            old, new = ({result.episodes[i].key: result.frames[i] for i in sorted(result.frames)} for result in results)
            pairs = (side_by_side(old[key], new[key], ("before", "after")) for key in new if key in old)
            frames = [frame for pair in pairs for frame in pair]
        print(f"Film: {write_video(args.output, frames, args.fps)}")
    elif args.output is not None:
        print(f"Every episode: {args.output}")
    n_lost = max(len(result.lost) for result in results)
    if n_lost > args.max_lost:
        n = len(results[0].lost) + len(results[0].episodes)
        print(
            f"opd-gym: {n_lost} of {n} episodes were lost (above is why), and what is shown is of the others. If that "
            f"is good enough: --max-lost {n_lost}.",
            file=sys.stderr,
        )
        return 1
    return 0


def _check_replaces_results(path: Path) -> None:
    """Results take the place of older ones, and of nothing else: the name of a checkpoint is soon written there."""
    if path.is_file() and path.stat().st_size:
        try:
            EvaluationResult.load(path)
        except ValueError as error:
            raise ValueError(f"{path} is there and holds no results. Name another file for them.") from error
