"""Runs: from an algorithm, an environment id and a YAML file to a run directory that can be resumed."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import stat
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize

from opd_gym import ranks
from opd_gym.algorithms import algorithm_class
from opd_gym.algorithms.common import set_statistics, statistics_of
from opd_gym.checkpoints import (
    lasting_name,
    newest_intact,
    resolve_checkpoint,
    run_checkpoints,
    student_for,
    teacher_for,
)
from opd_gym.checks import check_at_least_one, check_fields
from opd_gym.cli.options import Train, TrainArgs
from opd_gym.cli.runs import (
    STATES_FOLDER,
    USED_CONFIG,
    EpisodeTable,
    Evaluations,
    RunCheckpoint,
    WandbOutputFormat,
    env_name,
    locked,
    make_logger,
    name_for_rl_zoo3,
    new_run_dir,
    optional,
    plot_learning_curve,
    save_statistics,
    write_for_rl_zoo3,
    write_run_files,
)
from opd_gym.demonstrations import read_statistics
from opd_gym.envs.make import build_env, env_spec, import_paths, without_training_horizon
from opd_gym.envs.registration import CHUNK_SIZES, bare_id
from opd_gym.envs.workers.process import give_up
from opd_gym.evaluation import (
    EVALUATION_FILE,
    SAMPLED_EVAL_SEED,
    EpisodeSpec,
    EvaluationResult,
    eval_episodes,
    evaluate_success,
)
from opd_gym.policies.loading import (
    check_device,
    checkpoint_settings,
    find_vec_normalize,
    read_vec_normalize,
    vec_normalize_arguments,
)
from opd_gym.untrusted import read_yaml
from opd_gym.versions import versions, write_versions
from opd_gym.zoo.hyperparams import (
    RUN_KEYS,
    algorithm_parameters,
    check_mappings,
    load_hyperparams,
    merge,
    parse_overrides,
    rl_zoo3_hyperparams,
    split_hyperparams,
)


def default_episodes(
    env: VecEnv,
    n_episodes: int | None,
    task_ids: Sequence[int] | None = None,
    init_states: str = "eval",
    suite_horizon: bool = False,
) -> list[EpisodeSpec]:
    """
    Held-out episodes: official initial states where the env has tasks, seeds that nobody trains with elsewhere.

    :param env: the env
    :param n_episodes: number of episodes, rounded up to the same number for every task; of LIBERO-Plus' thousands of
        tasks fewer episodes take a part, see ``LiberoPlusEnv.sample_tasks``. None: 100, or as many as there are
        official initial states
    :param task_ids: tasks; None for all that the env draws from
    :param init_states: "eval" or "sampled", see :func:`eval_episodes`
    :param suite_horizon: evaluate at the suite's own horizon, whatever the env was made with for training
    :return: reset specs
    :raises ValueError: there are not so many official initial states, or there is nothing to choose from
    """
    as_many_as_there_are = n_episodes is None
    n_episodes = 100 if n_episodes is None else n_episodes
    if not env.has_attr("task_ids"):
        if task_ids or init_states != "eval":
            raise ValueError("This env has no tasks and no initial states to choose from: name neither.")
        return [EpisodeSpec(seed=SAMPLED_EVAL_SEED + i) for i in range(n_episodes)]
    tasks = list(task_ids) if task_ids else [int(task) for task in env.get_attr("task_ids", indices=0)[0]]
    if n_episodes < len(tasks) and env.has_attr("sample_tasks"):
        tasks = env.env_method("sample_tasks", n_episodes, indices=0)[0]
    per_task = max(1, -(-n_episodes // len(tasks)))
    if init_states == "eval" and env.has_attr("n_init_states"):
        # Now, and not when all the others have been played
        there = min(int(env.env_method("n_init_states", task, indices=0)[0]) for task in tasks)
        if as_many_as_there_are:
            per_task = min(per_task, there)
        if per_task > there:
            raise ValueError(
                f"{n_episodes} episodes are {per_task} a task, and there are {there} initial states for evaluation. "
                f"Ask for at most {there * len(tasks)}, or for sampled initial states."
            )
    episodes = eval_episodes(tasks, per_task, init_states)
    if suite_horizon and env.has_attr("suite_horizon"):
        horizon = int(env.get_attr("suite_horizon", indices=0)[0])
        episodes = [replace(spec, options={**(spec.options or {}), "horizon": horizon}) for spec in episodes]
    return episodes


def default_threshold(env_id: str) -> float | None:
    """
    :param env_id: environment id
    :return: return that counts as success, for envs that say nothing about it; None where the env does say
    """
    if bare_id(env_id) in CHUNK_SIZES:
        return None
    return env_spec(env_id).reward_threshold


class _Stop(BaseCallback):
    """
    Ends the training at the next step after a signal: between two updates, so that the last checkpoint is whole. A
    worker that does not answer is not waited for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.asked = False

    def _on_step(self) -> bool:
        return not self.asked

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        def ask(signum: int, frame: Any) -> None:
            if self.asked:
                raise KeyboardInterrupt
            self.asked = True
            give_up.set()
            for fd in (1, 2):
                # A terminal that is gone: to write there would raise, in the middle of the training
                with suppress(OSError):
                    if stat.S_ISCHR(os.fstat(fd).st_mode) and not os.isatty(fd):
                        null = os.open(os.devnull, os.O_WRONLY)
                        os.dup2(null, fd)
                        os.close(null)
            with suppress(OSError):
                os.write(2, b"\nStopping after this step or update, with a checkpoint; once more ends it at once.\n")

        signums = [signal.SIGINT, signal.SIGTERM]
        # Not below nohup, and Windows has no such signal
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            signums.append(signal.SIGHUP)
        try:
            old = {signum: signal.signal(signum, ask) for signum in signums}
        except ValueError:  # only the main thread may set handlers
            yield
            return
        try:
            yield
        finally:
            give_up.clear()
            for signum, handler in old.items():
                signal.signal(signum, handler)


def _load_to_resume(
    cls: type[BaseAlgorithm],
    path: Path,
    env: VecEnv,
    args: TrainArgs,
    kwargs: Mapping[str, Any],
    changed: Sequence[str],
) -> BaseAlgorithm:
    """The model of a run's last checkpoint, with what its zip leaves out, and what has changed of the configuration."""
    load_kwargs: dict[str, Any] = {}
    if "teacher" in changed:
        load_kwargs["teacher"] = kwargs.get("teacher")
    if "teacher_kwargs" in changed:
        load_kwargs["teacher_kwargs"] = kwargs.get("teacher_kwargs") or {}
    if "demonstrations" in algorithm_parameters(cls):
        load_kwargs["demonstrations"] = kwargs.get("demonstrations")
    model = cls.load(path, env=env, device=args.device, trust=args.trust, **load_kwargs)
    if getattr(model, "_interrupted", None) is None:
        # Loading seeds the generators as at the start; the noise of the first iterations should not come again
        model.set_random_seed(((args.seed or 0) + model.num_timesteps) % 2**32)
    statistics = find_vec_normalize(path, bare_id(args.env))
    if statistics is not None and model.get_vec_normalize_env() is not None:
        saved = statistics_of(read_vec_normalize(statistics, args.trust))
        set_statistics(model.get_vec_normalize_env(), saved)
    states = path.parent / STATES_FOLDER
    # Of version 0.1
    states = states if states.exists() else states.with_suffix(".npz")
    if getattr(model, "replay_buffer", None) is not None:
        if states.exists():
            try:
                model.load_replay_buffer(states)  # type: ignore[attr-defined]
            except (OSError, ValueError) as error:
                print(f"{error} Its states are not replayed.", flush=True)
        if ranks.is_main():
            print(f"{model.replay_buffer.size} states to replay from {states}", flush=True)  # type: ignore[attr-defined]
    return model


@dataclass
class TrainResult:
    """
    Outcome of :func:`train`.

    :param run_dir: directory of the run
    :param model: the trained model
    :param finished: False if a signal ended it early
    :param evaluation: the final evaluation, if one was asked for
    """

    run_dir: Path
    model: BaseAlgorithm
    finished: bool
    evaluation: EvaluationResult | None = None


def read_args(run_dir: Path) -> TrainArgs:
    """
    :param run_dir: directory of a run
    :return: what it was started with
    """
    path = run_dir / "args.yml"
    if not run_dir.exists():
        raise FileNotFoundError(f"There is no {run_dir}.")
    if not path.is_file():
        raise FileNotFoundError(
            f"{run_dir} is not the directory of a run, or the run was killed before it began: {path.name} is missing."
        )
    values = read_mapping(path)
    # Whether to trust a run is not for the run to say
    known = {item.name for item in fields(TrainArgs)} - {"trust"}
    given = {key: value for key, value in values.items() if key in known and value is not None}
    try:
        check_fields(TrainArgs, given)
        return TrainArgs(**given)
    except ValueError as error:
        raise ValueError(f"{path} is not what a run was started with, or is damaged: {error}") from error


def read_mapping(path: Path) -> dict[str, Any]:
    """
    :param path: YAML file, for instance the ``config.yml`` of a run
    :return: its values by name
    :raises ValueError: it holds something else
    """
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path} must map names to values, got {type(values).__name__}.")
    return values


def complete_hyperparams(args: TrainArgs, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """
    The configuration of a run: the YAML file, the overrides, and the checkpoints that they leave open.

    :param args: what the run is started with
    :param overrides: hyperparameters that win, besides those of ``args``
    :return: plain values, as they are written to ``config.yml``
    """
    values = load_hyperparams(args.algo, args.env, args.config)
    given_here = merge(parse_overrides(args.hyperparams), overrides or {})
    values = merge(values, given_here)
    check_mappings(values)
    parameters = algorithm_parameters(algorithm_class(args.algo))
    if args.n_timesteps is not None:
        values["n_timesteps"] = args.n_timesteps
    if args.ray is not None:
        values["ray"] = args.ray
    if args.teacher is not None:
        if "teacher" not in parameters:
            raise ValueError(f"{args.algo} has no teacher. Drop --teacher, or use --algo opd.")
        values["teacher"] = args.teacher
    elif "teacher" in parameters and values.get("teacher") is None:
        # None in the end means that the algorithm says what is missing.
        values["teacher"] = teacher_for(args.env)
    if args.demonstrations:
        if "demonstrations" not in parameters:
            raise ValueError(f"{args.algo} takes no demonstrations. Drop --demonstrations, or use --algo sft.")
        values["demonstrations"] = list(args.demonstrations)
    given = values.get("demonstrations") or []
    if "demonstrations" in parameters and not given:
        raise ValueError(f"{args.algo} learns from demonstrations: pass --demonstrations, a file or a folder.")
    if not isinstance(given, (str, list)) or not all(isinstance(path, str) for path in given):
        raise ValueError(f"demonstrations: expected a path, or a list of them, got {given!r:.80}.")
    policy_kwargs = dict(values.get("policy_kwargs") or {})
    if args.student == "none":
        policy_kwargs.pop("checkpoint", None)
    elif args.student is not None:
        policy_kwargs["checkpoint"] = args.student
    elif values.get("policy") == "VLAPolicy" and "demonstrations" not in parameters:
        ours = student_for(args.env)
        if ours is not None and "checkpoint" not in policy_kwargs:
            policy_kwargs["checkpoint"] = ours
    if values.get("demonstrations") and values.get("policy") == "VLAPolicy" and "checkpoint" not in policy_kwargs:
        # A new policy's tokens cover what is demonstrated, where the demonstrations say what that is
        skip = bool((values.get("demonstration_kwargs") or {}).get("skip"))
        statistics = read_statistics(values["demonstrations"], skip)
        if statistics is not None:
            policy_kwargs["body_kwargs"] = {"statistics": statistics, **(policy_kwargs.get("body_kwargs") or {})}
    # For a run to be resumed from another folder. Names of the zoo and of the hub stay: a published configuration
    # should not hold the user's paths
    if policy_kwargs.get("checkpoint") is not None:
        student = resolve_checkpoint(policy_kwargs["checkpoint"])
        file = find_vec_normalize(student, bare_id(args.env)) if student.is_file() else None
        if file is not None and values.get("normalize") is None:
            found = read_vec_normalize(file, args.trust)
            if found.norm_obs:
                # For the student to see in this run what it saw where it was trained
                values["normalize"] = vec_normalize_arguments(found)
        policy_kwargs["checkpoint"] = lasting_name(policy_kwargs["checkpoint"])
    if "horizon" not in (given_here.get("env_kwargs") or {}):
        values = without_training_horizon(args.env, values, checkpoint_settings(policy_kwargs, args.trust))
    if isinstance(values.get("teacher"), str) and values["teacher"] != "expert":
        values["teacher"] = lasting_name(values["teacher"])
    vec_normalize = (values.get("teacher_kwargs") or {}).get("vec_normalize")
    if isinstance(vec_normalize, str):
        values["teacher_kwargs"] = {**values["teacher_kwargs"], "vec_normalize": lasting_name(vec_normalize)}
    if values.get("demonstrations"):
        given = [given] if isinstance(given, str) else given
        values["demonstrations"] = [str(Path(path).expanduser().absolute()) for path in given]
    if policy_kwargs:
        values["policy_kwargs"] = policy_kwargs
    if values.get("env_kwargs"):
        values["env_kwargs"] = {name: _lasting_path(name, value) for name, value in values["env_kwargs"].items()}
    return values


def _lasting_path(name: str, value: Any) -> Any:
    """The value of an argument that is a path by its name, for other working directories to find it as well."""
    if not isinstance(value, str) or name.rpartition("_")[2] not in ("file", "path", "dir", "folder", "root"):
        return value
    path = Path(value).expanduser()
    return str(path.absolute()) if path.exists() else value


def trusting(algo: str, kwargs: Mapping[str, Any], trust: bool) -> dict[str, Any]:
    """
    :param algo: name of the algorithm
    :param kwargs: its keyword arguments
    :param trust: whether its teacher and its student are opened whatever their files hold
    :return: the keyword arguments that say so
    """
    names = [
        name for name in ("teacher_kwargs", "policy_kwargs") if name in algorithm_parameters(algorithm_class(algo))
    ]
    return {**kwargs, **{name: {**(kwargs.get(name) or {}), "trust": True} for name in names if trust}}


def changes(run_dir: Path, values: Mapping[str, Any]) -> list[str]:
    """
    What somebody has changed of a run's configuration since its last checkpoint.

    :param run_dir: directory of a run
    :param values: its configuration now
    :return: names of the values
    :raises ValueError: some are a matter of the saved model, which has them as they were
    """
    path = run_dir / USED_CONFIG
    before = read_mapping(path) if path.is_file() else dict(values)
    found = [key for key in {**before, **values} if before.get(key) != values.get(key)]
    may_change = {"teacher", "teacher_kwargs", "demonstrations", *RUN_KEYS} - {"policy"}
    refused = [
        f"{key} ({before.get(key)!r:.40}, now {values.get(key)!r:.40})" for key in found if key not in may_change
    ]
    if refused:
        raise ValueError(
            f"{run_dir / 'config.yml'} was changed: {', '.join(refused)}. A run goes on with what it began with, but "
            "for the env, the teacher and the demonstrations. Undo that, or begin another run with its weights: "
            f"--student {run_dir}."
        )
    return found


def train(args: TrainArgs, resume: Path | None = None) -> TrainResult:
    """
    Train, keeping checkpoints, logs, the configuration and a learning curve in a run directory.

    :param args: what to run
    :param resume: directory of a run to go on with; ``args`` are then those of :func:`read_args`
    :return: the outcome
    :raises RuntimeError: another process trains into that directory
    """
    with ExitStack() as held:
        if resume is not None and ranks.is_main():
            held.enter_context(locked(resume))
        return _train(args, resume, held)


def _train(args: TrainArgs, resume: Path | None, held: ExitStack) -> TrainResult:
    if args.eval_freq is not None and args.eval_episodes == 0:
        raise ValueError("--eval-freq plays held-out episodes: say how many, for instance --eval-episodes 20.")
    check_device(args.device)
    cls = algorithm_class(args.algo)
    if resume is None or not (resume / "config.yml").exists():  # killed right after args.yml was written
        values = complete_hyperparams(args)
    else:
        values = read_mapping(resume / "config.yml")
        if args.n_timesteps is not None:
            values["n_timesteps"] = args.n_timesteps
        if args.ray is not None:
            values["ray"] = args.ray
    try:
        run, kwargs = split_hyperparams(args.algo, values, cls)
    except ValueError as error:
        if resume is None:
            raise
        raise ValueError(f"{resume / 'config.yml'}: {error}") from error
    if args.eval_freq is not None and (kwargs.get("policy_kwargs") or {}).get("shard") and ranks.world_size() > 1:
        raise ValueError(
            "--eval-freq plays with the first learner's weights, and shard=true spreads them over all learners. Leave "
            "it out: --eval-episodes alone plays at the end."
        )
    user_callbacks = _user_callbacks(run.get("callback"))
    if args.track and find_spec("wandb") is None:
        raise ImportError("--track needs Weights & Biases. Run: pip install 'opd_gym[track]'")
    policy = run.get("policy") or "MlpPolicy"
    if not isinstance(policy, str):
        raise ValueError(f"policy: expected a name, for instance MlpPolicy, got {policy!r:.80}.")
    start = (kwargs.get("policy_kwargs") or {}).get("checkpoint")
    saved = newest_intact(run_checkpoints(resume)) if resume is not None else None
    changed = [] if resume is None or saved is None else changes(resume, values)
    if resume is not None and saved is None:
        if (resume / "model.zip").exists():
            raise ValueError(
                f"{resume} has a model.zip and no checkpoint to go on from: its training would begin anew and replace "
                f"what it ended with. To begin with that, start another run: --student {resume / 'model.zip'}."
            )
        # Of a first checkpoint that was never finished
        shutil.rmtree(resume / "checkpoints" / STATES_FOLDER, ignore_errors=True)
    source = saved or start
    kwargs = trusting(args.algo, kwargs, args.trust)
    settings = checkpoint_settings(
        {"checkpoint": source} if source is not None else kwargs.get("policy_kwargs") or {}, args.trust
    )
    # Simulators that are never stepped are not started: SFT reads the spaces off one env
    off = dict.fromkeys(("n_workers", "worker_timeout", "ray"))
    slots = {} if getattr(cls, "steps_env", True) else {"n_envs": 1, **off}
    env = build_env(args.env, {**run, **slots}, seed=ranks.rank_seed(args.seed), settings=settings)
    try:
        eval_env = None
        if args.eval_freq is not None and ranks.is_main():
            eval_env = build_env(args.env, run, seed=args.seed, settings=settings)
            held.callback(eval_env.close)
        if saved is not None:
            model = _load_to_resume(cls, saved, env, args, kwargs, changed)
        else:
            try:
                model = cls(policy, env, seed=args.seed, device=args.device, **kwargs)  # type: ignore[misc]
            except TypeError as error:  # a wrong name or type in policy_kwargs, teacher_kwargs, ...
                given = ", ".join(f"{name}={value!r:.80}" for name, value in kwargs.items())
                raise ValueError(
                    f"The hyperparameters do not fit {args.algo} with {policy}: {error}. Given are {given}."
                ) from error
        run_dir = resume
        if run_dir is None and ranks.is_main():
            run_dir = new_run_dir(args.folder, args.algo, args.env)
            held.enter_context(locked(run_dir))
        ranks.join()
        run_dir = ranks.gather(run_dir)[0]
        assert run_dir is not None
        if ranks.is_main():
            write_run_files(run_dir, asdict(args), values)
            write_for_rl_zoo3(run_dir, asdict(args), rl_zoo3_hyperparams(args.env, values, settings))
            print(f"{args.algo} on {args.env}: {run_dir}" + (f", from {source}" if source else ""), flush=True)
        checkpoint = RunCheckpoint(run_dir, args.checkpoint_interval, states_at_end=eval_env is not None)
        callbacks: list[BaseCallback] = [checkpoint, EpisodeTable(run_dir, args.env)]
        evaluations = None
        if eval_env is not None and args.eval_freq is not None:
            evaluations = Evaluations(run_dir, partial(_evaluate, env=eval_env, args=args), args.eval_freq)
            callbacks.append(evaluations)
        callbacks += user_callbacks
        tracked = values if args.track else None
        learned, finished = _learn(model, callbacks, run.get("n_timesteps"), args, tracked)
        if not ranks.is_main():
            return TrainResult(run_dir, model, finished)
        if finished and not learned and evaluations is not None:
            evaluations.make_up(model)
        if finished:
            if learned:
                # Of the model that is replaced now
                (run_dir / EVALUATION_FILE).unlink(missing_ok=True)
            save_statistics(model, run_dir / env_name(args.env) / "vecnormalize.pkl")
            model.save(run_dir / "model.zip")
            with optional(run_dir):
                name_for_rl_zoo3(run_dir / "model.zip", f"{env_name(args.env)}.zip")
            # Once more: now it is known what draws the pictures
            used = versions(env)
            write_versions(run_dir, used)
            save_checkpoint = getattr(model.policy, "save_checkpoint", None)
            if save_checkpoint is not None:
                save_checkpoint(run_dir / "policy")
                write_versions(run_dir / "policy", used)
        # Last, because a run can do without
        if learned:
            checkpoint.save_states()
        with optional(run_dir / "curve.png"):
            plot_learning_curve(run_dir, title=f"{args.algo} on {args.env}")
        if not finished:
            kept = f"{model.num_timesteps:,} timesteps are kept"
            print(f"Stopped, {kept}. Go on with: opd-gym train --resume {shlex.quote(str(run_dir))}", flush=True)
            return TrainResult(run_dir, model, False)
        result = None
        if args.eval_episodes > 0:
            if slots and eval_env is None:
                env.close()
                env = build_env(args.env, run, seed=args.seed, settings=settings)
            result = _evaluate(model, eval_env or env, args, args.progress)
            result.save(run_dir / EVALUATION_FILE)
            print(result.to_markdown())
        return TrainResult(run_dir, model, True, result)
    finally:
        env.close()


def _user_callbacks(spec: Any) -> list[BaseCallback]:
    """Those that a configuration names."""
    callbacks = []
    for cls, kwargs in import_paths(spec, "callback"):
        if not (isinstance(cls, type) and issubclass(cls, BaseCallback)):
            raise ValueError(f"callback: expected a subclass of BaseCallback of Stable-Baselines3, got {cls!r}.")
        try:
            callbacks.append(cls(**kwargs))
        except TypeError as error:
            raise ValueError(f"callback: {cls.__name__} does not take {kwargs}: {error}") from error
    return callbacks


def _evaluate(model: BaseAlgorithm, env: VecEnv, args: TrainArgs, progress: bool = False) -> EvaluationResult:
    """The held-out episodes of a run, the same whenever they are played."""
    normalize = unwrap_vec_normalize(env)
    if normalize is not None:
        set_statistics(normalize, statistics_of(model.get_vec_normalize_env()))
        normalize.training = normalize.norm_reward = False
    return evaluate_success(
        model,
        env,
        default_episodes(env, args.eval_episodes, suite_horizon=True),
        progress=progress,
        reward_threshold=default_threshold(args.env),
    )


def _learn(
    model: BaseAlgorithm,
    callbacks: Sequence[BaseCallback],
    n_timesteps: int | None,
    args: TrainArgs,
    tracked: Mapping[str, Any] | None,
) -> tuple[bool, bool]:
    """Whether anything was learned, and whether the run has all its timesteps. A checkpoint is the first callback."""
    checkpoint = callbacks[0]
    assert isinstance(checkpoint, RunCheckpoint)
    stop = _Stop()
    total = n_timesteps if n_timesteps is not None else getattr(model, "default_total_timesteps", None)
    if total is not None and model.num_timesteps > 0:
        total -= model.num_timesteps
        if total <= 0:
            print(f"The run has its {model.num_timesteps} timesteps already. Ask for more with --n-timesteps.")
            return False, True
    if ranks.is_main():
        model.set_logger(make_logger(checkpoint.run_dir, args.verbose, tracked, model.num_timesteps))
    checkpoint.model = model  # a signal may come before learn() says so
    began = time.monotonic()
    with stop.on_signals():
        try:
            model.learn(
                total,  # type: ignore[arg-type]
                callback=[stop, *callbacks],
                # One that was stopped in its first iteration goes on as well
                reset_num_timesteps=model.num_timesteps == 0 and getattr(model, "_interrupted", None) is None,
                progress_bar=args.progress,
            )
        except (EOFError, ConnectionError, InterruptedError):
            # A signal may reach worker processes as well, and they are gone, or hang, before the callback is asked.
            if not stop.asked:
                raise
            checkpoint.save()
    for writer in model.logger.output_formats:
        if isinstance(writer, WandbOutputFormat):
            writer.close()
    if ranks.is_main():
        print(f"{model.num_timesteps} timesteps, {time.monotonic() - began:.0f} s", flush=True)
    # A signal reaches all ranks or one; the first one's callback heeds it
    return True, not ranks.gather(stop.asked)[0]


def launch(words: Sequence[str], nproc: int) -> int | None:
    """
    Start the learners of a training, each with the same command.

    :param words: the command line
    :param nproc: how many
    :return: exit status; None in a learner
    """
    check_at_least_one(nproc=nproc)
    if ranks.world_size() > 1:
        return None
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # What `torchrun --standalone` does, whose own options our words might be taken for
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=nproc, run_id=uuid.uuid4().hex, rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", max_restarts=0,
    )  # fmt: skip
    try:
        elastic_launch(config, sys.executable)("-m", "opd_gym.cli", *words)
    except SignalException:
        return 130
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        print(
            f"opd-gym: learner {rank} ended with exit status {failure.exitcode}, and the others with it.",
            file=sys.stderr,
        )
        return failure.exitcode if failure.exitcode > 0 else 1
    return 0


def run(args: Train) -> int:
    """
    Start a run, or go on with one.

    :param args: what to run
    :return: exit status
    """
    given = {item.name: getattr(args, item.name) for item in fields(TrainArgs)}
    given["hyperparams"] = [*args.hyperparams, *args.param]
    if args.resume is None:
        if not args.env:
            raise ValueError("Which environment? Pass --env, for instance --env LiberoObject-v0, or --resume DIR.")
        return 0 if train(TrainArgs(**given)).finished else 130
    stored = read_args(args.resume)
    kept = ("algo", "env", "seed", "hyperparams", "config", "teacher", "student", "demonstrations", "folder")
    changed = [name for name in kept if given[name] != getattr(TrainArgs(), name)]
    if changed:
        raise ValueError(
            f"--resume goes on with the run's own {', '.join(changed)}. Leave out --{' --'.join(changed)}. Another "
            "path of the teacher or the demonstrations, and what concerns the env, may be written to "
            f"{args.resume / 'config.yml'}."
        )
    if (args.resume / "evaluations.npz").is_file() and args.eval_episodes not in (0, stored.eval_episodes):
        raise ValueError(
            f"--eval-episodes {args.eval_episodes}: {args.resume / 'evaluations.npz'} is of {stored.eval_episodes} "
            "episodes, and the same ones tell which model is the best. Leave it out, and use opd-gym eval for more."
        )
    for name in ("n_timesteps", "eval_episodes", "eval_freq", "checkpoint_interval", "ray"):
        if given[name] != getattr(TrainArgs(), name):
            setattr(stored, name, given[name])
    for name in ("device", "progress", "verbose", "trust", "track"):
        setattr(stored, name, stored.track or args.track if name == "track" else getattr(args, name))
    return 0 if train(stored, resume=args.resume).finished else 130
