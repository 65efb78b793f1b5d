"""Run directories: what was run, with which configuration, how far it came, and its learning curve."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shlex
import socket
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import CSVOutputFormat, HumanOutputFormat, KVWriter, Logger
from stable_baselines3.common.monitor import ResultsWriter

from opd_gym.algorithms.common import set_statistics, statistics_of
from opd_gym.checkpoints import run_checkpoints
from opd_gym.checks import check_at_least_one, check_range
from opd_gym.envs.registration import bare_id
from opd_gym.evaluation import EvaluationResult
from opd_gym.files import replacing, write_atomic
from opd_gym.versions import differences, read_versions, versions, write_versions

# States to replay, beside the checkpoints
STATES_FOLDER = "states"
LOCK_FILE = ".lock"
# What the checkpoints of a run were made with, where somebody edits config.yml
USED_CONFIG = "checkpoints/config.yml"
# The table of a run, and of a resumed one those before it: their number, and the timestep that the run went on from
PROGRESS = re.compile(r"progress(?:\.(\d+)(?:\.until_(\d+))?)?\.csv")


def env_name(env_id: str) -> str:
    """
    :param env_id: environment id; it may name the module that registers it, or a namespace (ALE/...)
    :return: how files and folders are named after it, here and in rl-zoo3
    """
    return bare_id(env_id).replace("/", "-")


def new_run_dir(folder: str | os.PathLike[str], algo: str, env_id: str) -> Path:
    """
    :param folder: folder of all runs
    :param algo: name of the algorithm
    :param env_id: environment id
    :return: a new directory ``folder/algo/env_id_<number>``
    """
    parent = Path(folder) / algo
    parent.mkdir(parents=True, exist_ok=True)
    name = env_name(env_id)
    suffixes = [path.name[len(name) + 1 :] for path in parent.glob(f"{name}_*")]
    number = max((int(suffix) for suffix in suffixes if suffix.isdigit()), default=0)
    while True:
        number += 1
        try:
            (parent / f"{name}_{number}").mkdir()
        except FileExistsError:
            continue  # another run took this number
        return parent / f"{name}_{number}"


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """
    Keep other processes from training into a directory meanwhile. The system gives the lock back whenever this process
    ends. On Windows and on file systems without locks there is none.

    :param run_dir: directory of the run
    :raises RuntimeError: somebody trains into it; names the process
    """
    with (run_dir / LOCK_FILE).open("a+", encoding="utf-8") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise RuntimeError(
                f"{file.read() or 'Another process'} is training into {run_dir}. Wait until it has ended, or stop it."
            ) from None
        except (ImportError, OSError):
            pass
        file.truncate(0)
        file.write(f"Process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def write_run_files(run_dir: Path, args: Mapping[str, Any], hyperparams: Mapping[str, Any]) -> None:
    """
    Write what it takes to repeat a run: ``args.yml``, ``config.yml``, ``command.txt`` and ``versions.json``. Says so
    where a run goes on with other versions than it was begun with.

    :param run_dir: directory of the run
    :param args: arguments of the command line
    :param hyperparams: the complete configuration, overrides included
    """
    write_atomic(run_dir / "args.yml", yaml.safe_dump(_plain(args), sort_keys=False))
    for name in ("config.yml", USED_CONFIG):
        write_atomic(run_dir / name, yaml.safe_dump(_plain(hyperparams), sort_keys=False))
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]) + "\n"
    path = run_dir / "command.txt"
    # A run that was resumed has more than one command.
    write_atomic(path, (path.read_text(encoding="utf-8") if path.exists() else "") + command)
    changed = differences(read_versions(run_dir), versions())
    if changed:
        print(f"Before and from now on: {', '.join(changed)}", flush=True)
    write_versions(run_dir, versions())


def write_for_rl_zoo3(run_dir: Path, args: Mapping[str, Any], hyperparams: Mapping[str, Any]) -> None:
    """
    Write what the scripts of rl-zoo3 look for in the folder of a run: ``<env>/config.yml`` and ``<env>/args.yml``, and
    under the name ``<env>.zip`` the file ``model.zip``, once it is there.

    :param run_dir: directory of the run
    :param args: arguments of the command line
    :param hyperparams: see :func:`opd_gym.zoo.hyperparams.rl_zoo3_hyperparams`
    """
    name = env_name(args["env"])
    write_atomic(run_dir / name / "config.yml", yaml.safe_dump(_plain(hyperparams)))
    # Its ids have no module, and push_to_hub looks for the arguments of the env here alone
    args = {**args, "env": bare_id(args["env"]), "env_kwargs": hyperparams["env_kwargs"]}
    write_atomic(run_dir / name / "args.yml", yaml.safe_dump(_plain(args)))


def name_for_rl_zoo3(model: Path, name: str) -> None:
    """
    Give a file a second name in its folder, without a copy of it.

    :param model: the file
    :param name: its other name, which may be that of an older file
    """
    with replacing(model.with_name(name)) as temporary:
        try:
            os.link(model, temporary)
        except OSError:  # a file system without hard links
            temporary.symlink_to(model.name)


@contextmanager
def optional(path: Path) -> Iterator[None]:
    """
    For what a run can do without: if it cannot be written, on a full disk for instance, a warning says so and the run
    goes on.

    :param path: the file, or the folder it is in
    """
    try:
        yield
    except Exception as error:  # numpy and zipfile raise others than OSError when a write fails
        warnings.warn(f"{path} could not be written ({type(error).__name__}: {error}). The run goes on.", stacklevel=3)
        error.__traceback__ = None  # TensorBoard raises the same one at every row, and it would grow


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def save_statistics(model: BaseAlgorithm, path: Path) -> None:
    """
    :param model: a model, whose env may have a ``VecNormalize``
    :param path: file for its statistics
    """
    env = model.get_vec_normalize_env()
    if env is not None:
        with replacing(path) as temporary:
            env.save(str(temporary))


class RunCheckpoint(BaseCallback):
    """
    Keeps the last checkpoints of a run; a killed run loses what came after the last one.

    It saves between two steps, so never in the middle of an update.

    :param run_dir: directory of the run; checkpoints go to ``checkpoints/model_<timesteps>_steps.zip``
    :param interval: least number of seconds between two checkpoints
    :param keep_last: number of checkpoints to keep
    :param states_at_end: at the end of the training save the states that are replayed as well, because it may take a
        while until the caller does
    """

    def __init__(self, run_dir: Path, interval: float = 60.0, keep_last: int = 2, states_at_end: bool = False):
        super().__init__()
        check_at_least_one(keep_last=keep_last)
        check_range("[0, inf)", interval=interval)
        self.run_dir = run_dir
        self.interval = interval
        self.keep_last = keep_last
        self.states_at_end = states_at_end
        self._last_save = time.monotonic()
        self._saved_at = -1
        self._begun: dict[str, Any] | None = None
        self._statistics: dict[str, Any] | None = None

    def save(self, states: bool = True) -> None:
        """
        Save the model now.

        :param states: and before it, for a model that is there to have its states, those that OPD replays
        """
        if self._begun is not None:
            if not self.model._between_iterations:  # type: ignore[attr-defined]
                set_statistics(self.model.get_vec_normalize_env(), self._statistics)
            # The last checkpoint of a run that is stopped counts no decisions that are lost with it
            self.model.undo_rollout(self._begun)  # type: ignore[attr-defined]
        if self.model.num_timesteps == self._saved_at:
            return
        if states:
            self.save_states()
        folder = self.run_dir / "checkpoints"
        save_statistics(self.model, folder / f"model_vecnormalize_{self.model.num_timesteps}_steps.pkl")
        # Atomic: the algorithms of this library replace a file only once the new one is complete.
        self.model.save(folder / f"model_{self.model.num_timesteps}_steps.zip")
        for old in run_checkpoints(self.run_dir)[: -self.keep_last]:
            old.unlink(missing_ok=True)
            old.with_name(f"{old.stem.replace('model_', 'model_vecnormalize_')}.pkl").unlink(missing_ok=True)
        self._last_save = time.monotonic()
        self._saved_at = self.model.num_timesteps

    def save_states(self) -> None:
        """Save the states that OPD replays, if there are any. A run can do without: see :func:`optional`."""
        if getattr(self.model, "replay_buffer", None) is None:
            return
        path = self.run_dir / "checkpoints" / STATES_FOLDER
        with optional(path):
            self.model.save_replay_buffer(path)  # type: ignore[attr-defined]

    def _save_if_due(self) -> None:
        if time.monotonic() - self._last_save >= self.interval:
            self.save()

    def _on_rollout_start(self) -> None:
        self._begun = self.model.iteration_begun()  # type: ignore[attr-defined]
        self._statistics = statistics_of(self.model.get_vec_normalize_env())
        self._save_if_due()

    def _on_step(self) -> bool:
        if self._begun is None:
            self._save_if_due()
        return True

    def _on_training_end(self) -> None:
        self._saved_at = -1  # the last iteration was trained after the last checkpoint of this number of timesteps
        self.save(states=self.states_at_end)  # else they follow when all else is written


class EpisodeTable(BaseCallback):
    """
    Writes ``monitor.csv``, one row an episode, as ``Monitor`` of Stable-Baselines3 does; a run that goes on adds to it.

    :param run_dir: directory of the run
    :param env_id: environment id
    """

    def __init__(self, run_dir: Path, env_id: str):
        super().__init__()
        self.path = run_dir / "monitor.csv"
        self.env_id = env_id
        self._writer: ResultsWriter | None = None
        self._began = 0.0

    def _open(self, success: bool) -> ResultsWriter:
        self._began = time.time()
        if self.path.exists() and self.path.stat().st_size:
            try:
                with self.path.open(encoding="utf-8") as file:
                    self._began = float(json.loads(file.readline()[1:])["t_start"])
                    success = "is_success" in file.readline()
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{self.path} does not begin as a table of Monitor does: {error}") from error
        header: dict[str, float | str] = {"t_start": self._began, "env_id": self.env_id}
        keys = ("is_success",) if success else ()
        return ResultsWriter(str(self.path), header, keys, override_existing=not self.path.exists())

    def _on_step(self) -> bool:
        for info in self.locals.get("infos") or ():
            if "episode" not in info:
                continue
            with optional(self.path):
                self._writer = self._writer or self._open("is_success" in info)
                row = {key: info["episode"][key] for key in ("r", "l")}
                if "is_success" in self._writer.logger.fieldnames:
                    row["is_success"] = bool(info.get("is_success"))
                self._writer.write_row({**row, "t": round(time.time() - self._began, 6)})
        return True

    def _on_training_end(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class Evaluations(BaseCallback):
    """
    Plays held-out episodes between two updates, and keeps the best model: ``best_model.zip`` and ``evaluations.npz``,
    as ``EvalCallback`` of Stable-Baselines3 does, but the same episodes every time. More successes are better; where
    the env says nothing about them, a higher return.

    :param run_dir: directory of the run; evaluations of an earlier part of it are kept
    :param evaluate: from the model to how it did
    :param eval_freq: decisions between two evaluations, at least; after the last update is one more
    """

    def __init__(self, run_dir: Path, evaluate: Callable[[BaseAlgorithm], EvaluationResult], eval_freq: int):
        super().__init__()
        check_at_least_one(eval_freq=eval_freq)
        self.run_dir = run_dir
        self.evaluate = evaluate
        self.eval_freq = eval_freq
        self._last = 0
        self._has_rollouts = False
        self._rows: dict[str, list[np.ndarray]] = {"timesteps": [], "results": [], "ep_lengths": [], "successes": []}
        self._best = (-math.inf, -math.inf)

    def _on_training_start(self) -> None:
        path = self.run_dir / "evaluations.npz"
        if path.exists():
            try:
                with np.load(path) as file:
                    rows = {name: list(file[name]) for name in self._rows}
                if (self.run_dir / "best_model.zip").exists():
                    self._best = max(map(self._score, rows["successes"], rows["results"]), default=self._best)
            except Exception as error:  # a damaged file raises anything
                raise ValueError(
                    f"{path} does not hold the evaluations of a run, or is damaged ({type(error).__name__}: {error}). "
                    "Remove it, and best_model.zip is the best from here on."
                ) from error
            # What came after the checkpoint that the run goes on from comes again
            kept = [i for i, timesteps in enumerate(rows["timesteps"]) if timesteps <= self.model.num_timesteps]
            self._rows = {name: [values[i] for i in kept] for name, values in rows.items()}
        self._last = max(map(int, self._rows["timesteps"]), default=0)

    def make_up(self, model: BaseAlgorithm) -> None:
        """
        Play the evaluation after the last update, if the training ended and it was never finished.

        :param model: the trained model
        """
        self.model = model
        self._on_training_start()
        if self._last < model.num_timesteps:
            model.set_logger(Logger(folder=None, output_formats=[]))
            self._play()

    @staticmethod
    def _score(successes: np.ndarray, returns: np.ndarray) -> tuple[float, float]:
        """What is compared: NaN is an episode without an outcome."""
        known = [values[np.isfinite(values)] for values in (successes, returns)]
        success, mean_return = (float(values.mean()) if len(values) else -math.inf for values in known)
        return success, mean_return

    def _play(self) -> None:
        self._last = self.model.num_timesteps
        result = self.evaluate(self.model)
        # Lost episodes leave gaps
        gaps = [math.nan] * len(result.lost)
        successes = np.array([math.nan if e.success is None else float(e.success) for e in result.episodes] + gaps)
        row = {
            "timesteps": np.array(self._last),
            "results": np.array([episode.reward for episode in result.episodes] + gaps),
            "ep_lengths": np.array([episode.steps for episode in result.episodes] + gaps),
            "successes": successes,
        }
        for name, values in row.items():
            self._rows[name].append(values)
        self.logger.record("eval/mean_reward", result.mean_reward)
        self.logger.record("eval/mean_ep_length", float(np.nanmean(row["ep_lengths"])))
        if result.n_judged:
            self.logger.record("eval/success_rate", result.success_rate)
        score = self._score(row["successes"], row["results"])
        if score > self._best:
            self._best = score
            save_statistics(self.model, self.run_dir / "best_model" / "vecnormalize.pkl")
            self.model.save(self.run_dir / "best_model.zip")
        # After the model that its best row is of: one that is missing would never be made up for
        with optional(self.run_dir / "evaluations.npz"), replacing(self.run_dir / "evaluations.npz") as temporary:
            np.savez(temporary, **{name: np.array(values) for name, values in self._rows.items()})  # type: ignore[arg-type]

    def _play_if_due(self) -> None:
        if self.model.num_timesteps - self._last >= self.eval_freq:
            self._play()
            # Not the model's dump_logs(), in which all ranks take part
            self.logger.record("time/total_timesteps", self._last, exclude="tensorboard")
            if hasattr(self.model, "num_env_steps"):
                self.logger.record("time/env_steps", self.model.num_env_steps)
            self.logger.dump(self._last)

    def _on_rollout_start(self) -> None:
        self._has_rollouts = True
        self._play_if_due()

    def _on_step(self) -> bool:
        if not self._has_rollouts:
            self._play_if_due()
        return True

    def _on_training_end(self) -> None:
        # After the last update, unless the training was broken off before it
        if self._last < self.model.num_timesteps >= self.model._total_timesteps:
            self._play()  # learn() logs what is left


def make_logger(
    run_dir: Path, verbose: int = 0, track: Mapping[str, Any] | None = None, start: int | None = None
) -> Logger:
    """
    Logger to ``progress.csv``, to TensorBoard where it is installed, and to the screen.

    :param run_dir: directory of the run; the table of an earlier part of a resumed run is kept under another name
    :param verbose: 1 to print the table as well
    :param track: configuration of the run, to log it to Weights & Biases as well; None: not there
    :param start: timesteps that a resumed run goes on from. What an earlier table has beyond them is done again, and
        its new name, ``progress.1.until_64.csv``, says so
    :return: the logger
    """
    table = run_dir / "progress.csv"
    if table.exists():
        parts = [PROGRESS.fullmatch(path.name) for path in progress_files(run_dir)]
        number = 1 + max((int(part[1]) for part in parts if part is not None and part[1]), default=0)
        os.replace(table, run_dir / f"progress.{number}{'' if start is None else f'.until_{start}'}.csv")
    formats: list[KVWriter] = [_optional_writer(CSVOutputFormat(str(table)), table)]
    try:
        from stable_baselines3.common.logger import TensorBoardOutputFormat

        formats.append(_optional_writer(TensorBoardOutputFormat(str(run_dir)), run_dir))
    except (ImportError, AssertionError):
        pass  # tensorboard is optional
    if track is not None:
        formats.append(_optional_writer(WandbOutputFormat(run_dir, track), run_dir))
    if verbose:
        formats.append(HumanOutputFormat(sys.stdout))
    return Logger(folder=str(run_dir), output_formats=formats)


class WandbOutputFormat(KVWriter):
    """
    Logs numbers to a run of Weights & Biases; a run that goes on is the same one there.

    :param run_dir: directory of the run, where its id and what is not uploaded yet are kept
    :param config: the complete configuration
    """

    def __init__(self, run_dir: Path, config: Mapping[str, Any]):
        import wandb

        file = run_dir / "wandb_id.txt"
        if not file.exists():
            write_atomic(file, uuid.uuid4().hex[:8])
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "opd_gym"),
            name=f"{run_dir.parent.name}/{run_dir.name}",
            id=file.read_text(encoding="utf-8"),
            resume="allow",
            dir=str(run_dir),
            config=_plain(config),
        )

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        """
        :param key_values: what is logged; other things than numbers are left out
        :param key_excluded: not used
        :param step: number of decisions
        """
        numbers = {key: float(value) for key, value in key_values.items() if isinstance(value, (int, float, np.number))}
        self.run.log(numbers, step=step)

    def close(self) -> None:
        """End the run there."""
        self.run.finish()


def _optional_writer(writer: KVWriter, path: Path) -> KVWriter:
    write = writer.write

    def write_if_possible(*args: Any, **kwargs: Any) -> None:
        with optional(path):
            write(*args, **kwargs)

    writer.write = write_if_possible  # type: ignore[method-assign]
    return writer


def progress_files(run_dir: Path) -> list[Path]:
    """
    :param run_dir: directory of a run
    :return: its table; of a resumed run those of all its parts, in their order
    """
    found = {path: PROGRESS.fullmatch(path.name) for path in run_dir.glob("progress*.csv")}
    parts = {path: int(part[1] or sys.maxsize) for path, part in found.items() if part is not None}
    return sorted(parts, key=lambda path: parts[path])


def read_progress(run_dir: Path) -> list[dict[str, float]]:
    """
    :param run_dir: directory of a run
    :return: the rows of its ``progress.csv``; of a resumed run those of all its parts, without what was done twice.
        Cells without a number are left out
    :raises ValueError: it is damaged
    """
    rows: list[dict[str, float]] = []
    # The clocks of each part begin at 0; what was done twice took its time as well
    clocks = dict.fromkeys(("time/time_elapsed", "time/teacher_seconds"), 0.0)
    for path in progress_files(run_dir):
        try:
            text = path.read_text(encoding="utf-8-sig")
            # The last line of a run that was killed may be a part of one, whose numbers are others
            lines = text[: text.rfind("\n") + 1].splitlines()
            table = list(csv.DictReader(lines))
        except (ValueError, csv.Error) as error:
            raise ValueError(f"{path} is not a table of a run's progress, or is damaged: {error}") from error
        numbers = [{key: _number(value) for key, value in row.items() if key and value} for row in table]
        numbers = [{key: value for key, value in row.items() if not math.isnan(value)} for row in numbers]
        new = [row for row in numbers if "time/total_timesteps" in row]
        if numbers and not new:
            raise ValueError(
                f"{path} is not a table of a run's progress, or is damaged: no row has time/total_timesteps."
            )
        if new:
            start = new[0]["time/total_timesteps"]
            rows = [row for row in rows if row["time/total_timesteps"] < start]
            for row in new:
                # The row of an evaluation has none
                row.update({clock: row[clock] + before for clock, before in clocks.items() if clock in row})
            clocks = {c: next((row[c] for row in reversed(new) if c in row), clocks[c]) for c in clocks}
        rows.extend(new)
        part = PROGRESS.fullmatch(path.name)
        if part is not None and part[2]:
            rows = [row for row in rows if row["time/total_timesteps"] <= int(part[2])]
    return rows


def _number(value: str) -> float:
    try:
        return float(value)
    except ValueError:
        return float("nan")


def plot_learning_curve(
    run_dir: Path, path: Path | None = None, title: str = "", references: Mapping[str, float] | None = None
) -> Path | None:
    """
    Draw success (or return) and the distance to the teacher over env steps.

    :param run_dir: directory of a run
    :param path: picture to write; None for ``curve.png`` in the run's directory
    :param title: title of the picture
    :param references: success rates to draw as horizontal lines, by label
    :return: the picture; None if there is nothing to draw or matplotlib is not installed
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    rows = read_progress(run_dir)
    success = "rollout/success_rate" if any("rollout/success_rate" in row for row in rows) else "rollout/ep_rew_mean"
    distance = _first_key(rows, ("train/kl", "train/reverse_kl", "train/divergence", "train/loss"))
    panels = [key for key in (success, distance) if key and any(key in row for row in rows)]
    if not panels:
        return None
    path = path or run_dir / "curve.png"
    figure = Figure(figsize=(5.5 * len(panels), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, key in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        steps_key = "time/env_steps" if all("time/env_steps" in row for row in rows) else "time/total_timesteps"
        points = [(row[steps_key], row[key]) for row in rows if key in row]
        axis.plot([x for x, _ in points], [y for _, y in points], marker=".", color="tab:blue")
        axis.set_xlabel(steps_key.partition("/")[2].replace("_", " "))
        axis.set_ylabel(key.partition("/")[2].replace("_", " "))
        axis.grid(alpha=0.3)
        if key == "rollout/success_rate":
            axis.set_ylim(-0.02, 1.02)
            for number, (label, value) in enumerate((references or {}).items()):
                axis.axhline(value, linestyle="--", color=f"C{number + 1}", label=f"{label} {100 * value:.0f} %")
            if references:
                axis.legend(fontsize="small", loc="best")
    if title:
        figure.suptitle(title)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    return path


def _first_key(rows: Sequence[Mapping[str, float]], keys: Sequence[str]) -> str | None:
    return next((key for key in keys if any(key in row for row in rows)), None)
