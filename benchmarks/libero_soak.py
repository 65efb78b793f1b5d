"""
What a long run survives: OPD on LIBERO while something breaks every minute.

    python benchmarks/libero_soak.py                  # at least an hour, then an evaluation
    python benchmarks/libero_soak.py --minutes 10     # a look
    python benchmarks/libero_soak.py --report         # table and picture only

A training is started with ``opd-gym train``, and faults are injected at random moments from one seed (:data:`FAULTS`).
What ends the learner is followed by ``opd-gym train --resume``. Memory, open files and processes are sampled. At the
end the episodes that were lost are compared with those that were reported, and the policy is evaluated on held-out
states, as the undisturbed runs of ``libero_suites.mk`` are. The training begins with the zoo's student and teacher.

Everything goes to ``--work``, the caches too, which are damaged as well. Linux; needs ``psutil``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import psutil

from opd_gym.checkpoints import run_checkpoints
from opd_gym.cli.runs import read_progress
from opd_gym.evaluation import EvaluationResult
from opd_gym.files import replacing, write_atomic
from opd_gym.versions import write_results

RESULTS = Path(__file__).resolve().parent / "results" / "libero_soak"
ENV = "LiberoObject-v0"
N_WORKERS, N_ENVS = 2, 4
# More than a worker needs on a busy machine to compile everything anew, and short enough for several hangs an hour
WORKER_TIMEOUT = 150.0
# Mean seconds from one fault to the next
INTERVAL = 60.0
SAMPLE_SECONDS = 5.0
# For how long nothing can be written, and for how long the learner stands still
BLOCKED_SECONDS, SUSPENDED_SECONDS = 20.0, 10.0
DEATH = re.compile(r"WorkerVecEnv: .*\(death \d+ of these workers\)")


class Soak:
    """
    The training, and what is done to it.

    :param work: folder of the run and its caches
    :param seed: of the faults and of the training
    """

    def __init__(self, work: Path, seed: int):
        self.work = work
        self.rng = np.random.default_rng(seed)
        self.seed = seed
        self.run_dir = work / "opd" / f"{ENV}_1"
        self.env = {**os.environ, "OPD_GYM_CACHE": str(work / "cache"), "OMP_NUM_THREADS": "1"}
        self.began = time.monotonic()
        self.faults: list[dict[str, Any]] = []
        self.samples: list[dict[str, float]] = []
        self.starts: list[dict[str, Any]] = []
        self.learner: subprocess.Popen[bytes] | None = None
        #: Processes that are to go on at a time
        self.sleeping: dict[int, float] = {}

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self.began

    # ------------------------------------------------------------------------------------------------- the training

    def start(self, n_timesteps: int | None = None) -> None:
        """
        Start the training, or go on with it.

        :param n_timesteps: decisions in all; None: as the run has it
        """
        command = [sys.executable, "-W", "always::RuntimeWarning", "-m", "opd_gym.cli", "train", "--no-progress"]
        if (self.run_dir / "args.yml").exists():
            command += ["--resume", str(self.run_dir)]
        else:
            command += ["--algo", "opd", "--env", ENV, "-f", str(self.work), "--seed", str(self.seed)]
            command += ["-P", f"n_envs={N_ENVS}", "-P", f"n_workers={N_WORKERS}"]
            command += ["-P", f"worker_timeout={WORKER_TIMEOUT}", "--checkpoint-interval", "30"]
        command += [] if n_timesteps is None else ["--n-timesteps", str(n_timesteps)]
        # Through a pipe: what cannot be written on a full disk is the run's, not this
        self.learner = subprocess.Popen(command, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        threading.Thread(target=self._copy, args=(self.learner.stdout,), daemon=True).start()
        self.starts.append({"t": self.seconds, "pid": self.learner.pid})
        print(f"{self.seconds:6.0f} s: {'resumed' if '--resume' in command else 'started'}", flush=True)

    def _copy(self, output: IO[bytes]) -> None:
        for line in output:
            with (self.work / "log.txt").open("ab") as log:
                log.write(line)

    def ended(self) -> int | None:
        """
        :return: exit status of the learner; None while it works
        """
        assert self.learner is not None
        status = self.learner.poll()
        if status is not None and "status" not in self.starts[-1]:
            self.starts[-1].update(status=status, ended=self.seconds, decisions=self.decisions())
        return status

    def decisions(self) -> int:
        """
        :return: decisions of the newest checkpoint
        """
        paths = run_checkpoints(self.run_dir)
        return int(re.findall(r"\d+", paths[-1].name)[-1]) if paths else 0

    def workers(self) -> list[psutil.Process]:
        """
        :return: worker processes of the learner
        """
        assert self.learner is not None
        found = []
        with suppress(psutil.Error):
            for child in psutil.Process(self.learner.pid).children():
                with suppress(psutil.Error):
                    if "opd_gym.envs.workers" in " ".join(child.cmdline()):
                        found.append(child)
        return found

    # --------------------------------------------------------------------------------------------------- the faults

    def a_worker(self) -> psutil.Process | None:
        """
        :return: one that is awake, drawn; None unless all are there, and awake
        """
        workers = self.workers()
        if len(workers) < N_WORKERS or any(worker.pid in self.sleeping for worker in workers):
            return None
        return workers[int(self.rng.integers(len(workers)))]

    def kill_worker(self) -> bool:
        """SIGKILL, as the system sends it for lack of memory."""
        worker = self.a_worker()
        if worker is not None:
            worker.kill()
        return worker is not None

    def hang_worker(self) -> bool:
        """SIGSTOP, for ever."""
        worker = self.a_worker()
        if worker is not None:
            worker.suspend()
            self.sleeping[worker.pid] = np.inf
        return worker is not None

    def kill_learner(self) -> bool:
        """SIGKILL at any moment."""
        self.learner.send_signal(signal.SIGKILL)  # type: ignore[union-attr]
        return True

    def kill_learner_while_it_saves(self) -> bool:
        """SIGKILL when the next checkpoint is half written."""
        folder = self.run_dir / "checkpoints"
        until = time.monotonic() + 120.0
        while time.monotonic() < until and self.ended() is None:
            if any(path.name.startswith(".tmp-") for path in folder.glob("*")):
                return self.kill_learner()
            time.sleep(0.001)
        return False

    def end_learner(self) -> bool:
        """SIGTERM, as a cluster sends it."""
        self.learner.send_signal(signal.SIGTERM)  # type: ignore[union-attr]
        return True

    def damage_checkpoint(self) -> bool:
        """SIGKILL, and half of the newest checkpoint is gone."""
        self.kill_learner()
        self.learner.wait()  # type: ignore[union-attr]
        paths = run_checkpoints(self.run_dir)
        if len(paths) < 2:
            return False
        os.truncate(paths[-1], paths[-1].stat().st_size // 2)
        return True

    def damage_cache(self) -> bool:
        """Bytes of eight cached files are changed, and a worker that has to read them again is killed."""
        worker = self.a_worker()
        files = [path for path in (self.work / "cache").rglob("*") if path.is_file() and path.stat().st_size > 0]
        if worker is None or not files:
            return False
        for index in self.rng.choice(len(files), min(8, len(files)), replace=False):
            content = bytearray(files[index].read_bytes())
            content[int(self.rng.integers(len(content)))] ^= 0xFF
            # A new file: the old one may be mapped into a worker
            with replacing(files[index]) as temporary:
                temporary.write_bytes(content)
        worker.kill()
        return True

    def block_writes(self) -> bool:
        """For a while no file of the learner can grow past a kilobyte, as on a full disk."""
        pid = self.learner.pid  # type: ignore[union-attr]
        _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (1024, hard))
        self._watch(BLOCKED_SECONDS)
        with suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard, hard))
        return True

    def suspend_learner(self) -> bool:
        """SIGSTOP, and later SIGCONT, as when a laptop is closed."""
        self.learner.send_signal(signal.SIGSTOP)  # type: ignore[union-attr]
        self._watch(SUSPENDED_SECONDS)
        self.learner.send_signal(signal.SIGCONT)  # type: ignore[union-attr]
        return True

    # ---------------------------------------------------------------------------------------------------- the hours

    def sample(self) -> None:
        """Take note of memory (proportional, so that shared pages count once), open files and processes."""
        assert self.learner is not None
        with suppress(psutil.Error):
            learner = psutil.Process(self.learner.pid)
            workers = self.workers()
            self.samples.append(
                {
                    "t": round(self.seconds, 1),
                    "start": len(self.starts) - 1,
                    "learner_mb": learner.memory_full_info().pss / 2**20,
                    "workers_mb": sum(worker.memory_full_info().pss for worker in workers) / 2**20,
                    "learner_fds": learner.num_fds(),
                    "workers": len(workers),
                }
            )

    def _watch(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and self.ended() is None:
            self.sample()
            time.sleep(min(SAMPLE_SECONDS, max(0.0, until - time.monotonic())))

    def inject(self) -> None:
        """One fault, drawn; what ends the learner is followed by a start."""
        name = str(self.rng.choice(list(FAULTS), p=np.array(list(FAULTS.values())) / sum(FAULTS.values())))
        act: Callable[[], bool] = getattr(self, name)
        before = self.decisions()
        at = self.seconds
        done = act()
        # What is refused is no fault: too early, or the last one is not over
        self.faults.append({"t": round(at, 1), "fault": name, "injected": done, "decisions": before})
        print(f"{at:6.0f} s: {name}{'' if done else ' (not now)'}", flush=True)

    def go(self, minutes: float, n_timesteps: int) -> None:
        """
        Train to the end, and at least for some time.

        :param minutes: at least
        :param n_timesteps: decisions
        """
        self.start(n_timesteps)
        while not (self.run_dir / "checkpoints").exists() and self.ended() is None:
            self._watch(SAMPLE_SECONDS)
        while True:
            self._watch(float(self.rng.exponential(INTERVAL)))
            status = self.ended()
            if status == 0 and self.seconds >= 60 * minutes:
                return
            if status is not None:
                done = status == 0
                self.starts[-1]["expected"] = done or self._was_told_to_end()
                self.start(self.decisions() + 2000 if done else None)
                continue
            # The last minutes are quiet, or it would never end
            if self.seconds < 60 * minutes:
                self.inject()
                if self.ended() is not None:
                    continue
            self.save()

    def _was_told_to_end(self) -> bool:
        last = self.faults[-1] if self.faults else {}
        return last.get("fault") in ENDING and last["t"] >= self.starts[-1]["t"]

    def save(self) -> None:
        """Write what has happened so far."""
        path = self.work / "log.txt"
        log = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        progress = [row.get("rollout/episodes_lost", 0.0) for row in read_progress(self.run_dir)]
        values = {
            "seconds": self.seconds,
            "seed": self.seed,
            "n_envs": N_ENVS,
            "n_workers": N_WORKERS,
            "faults": self.faults,
            "starts": self.starts,
            "deaths_reported": len(DEATH.findall(log)),
            "episodes_lost_in_what_was_kept": max(progress, default=0.0),
            "samples": self.samples,
        }
        write_atomic(self.work / "soak.json", json.dumps(values) + "\n")


# How often, relative to each other
FAULTS = {
    "kill_worker": 6,
    "hang_worker": 2,
    "kill_learner": 2,
    "kill_learner_while_it_saves": 2,
    "end_learner": 2,
    "damage_checkpoint": 1,
    "damage_cache": 2,
    "block_writes": 2,
    "suspend_learner": 1,
}
# After these the learner has to be started again, and after a blocked write it may have to
ENDING = ("kill_learner", "kill_learner_while_it_saves", "end_learner", "damage_checkpoint", "block_writes")
# These cost a worker, and with it the episodes of its envs
DEADLY = ("kill_worker", "hang_worker", "damage_cache")


def report(output: Path) -> str:
    """
    Draw the picture and write the table.

    :param output: folder of ``results.json``
    :return: the table
    """
    from matplotlib.figure import Figure

    values = json.loads((output / "results.json").read_text(encoding="utf-8"))["soak"]
    injected = Counter(fault["fault"] for fault in values["faults"] if fault["injected"])
    deaths = sum(injected[name] for name in DEADLY)
    ends = Counter(start.get("status") for start in values["starts"])
    unexpected = [start for start in values["starts"] if not start.get("expected", start.get("status") == 0)]
    evaluation = EvaluationResult.load(output / "evaluation.json")
    lines = [
        f"{values['seconds'] / 60:.0f} minutes of OPD on {ENV}, {N_ENVS} envs in {N_WORKERS} workers, "
        f"{sum(injected.values())} faults, {len(values['starts']) - 1} of them followed by a new start.\n",
        "| fault | injected |",
        "| --- | --- |",
        *(f"| {name.replace('_', ' ')} | {injected[name]} |" for name in FAULTS),
        "",
        f"- Workers killed or hung by these: {deaths}; deaths reported: {values['deaths_reported']}, each with the "
        f"episodes of {N_ENVS // N_WORKERS} envs. In what was kept of the training (a killed learner takes its last "
        f"iteration along) {values['episodes_lost_in_what_was_kept']:.0f} episodes are counted as lost.",
        f"- Ends of the learner by exit status: {', '.join(f'{k}: {n}' for k, n in sorted(ends.items(), key=str))}; "
        f"not caused by a fault: {len(unexpected)}.",
        f"- Held-out success afterwards, as {len(evaluation.episodes)} official initial states tell: {evaluation}.",
    ]
    for key, text in (("learner_mb", "the learner's memory"), ("learner_fds", "its open files")):
        first, last = _early_and_late(values["samples"], key)
        lines.append(
            f"- Median of {text} in the first and the last third of the longest part: {first:.0f}, {last:.0f}."
        )
    text = "\n".join(lines) + "\n"
    write_atomic(output / "results.md", text)

    figure = Figure(figsize=(9.0, 6.5), layout="constrained")
    axes = figure.subplots(3, 1, sharex=True)
    minutes = np.array([sample["t"] for sample in values["samples"]]) / 60
    for axis, keys, label in (
        (axes[0], ("learner_mb", "workers_mb"), "memory (MB, PSS)"),
        (axes[1], ("learner_fds",), "open files"),
    ):
        for key in keys:
            name = key.partition("_")[0]
            axis.plot(minutes, [sample[key] for sample in values["samples"]], label=name, linewidth=1)
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
    axes[0].legend(loc="center right", frameon=False)
    names = list(FAULTS)
    hits = [fault for fault in values["faults"] if fault["injected"]]
    axes[2].plot([f["t"] / 60 for f in hits], [names.index(f["fault"]) for f in hits], "|", color="C3", markersize=14)
    axes[2].set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    axes[2].set_xlabel("minutes")
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    with replacing(output / "soak.png") as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    return text


def _early_and_late(samples: list[dict[str, float]], key: str) -> tuple[float, float]:
    """Medians, of the longest part without a new start in between; the minute in which it starts is left out."""
    parts = Counter(sample["start"] for sample in samples)
    longest = [sample for sample in samples if sample["start"] == parts.most_common(1)[0][0]]
    longest = [sample for sample in longest if sample["t"] > longest[0]["t"] + 60]
    third = max(1, len(longest) // 3)
    return tuple(float(np.median([s[key] for s in part])) for part in (longest[:third], longest[-third:]))  # type: ignore[return-value]


def main() -> None:
    """Break things for a while, then evaluate and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0, help="how long faults are injected, at least")
    parser.add_argument("--n-timesteps", type=int, default=12_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--episodes", type=int, default=200, help="of the evaluation")
    parser.add_argument("--work", type=Path, default=Path("runs/libero_soak"))
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true", help="table and picture only")
    args = parser.parse_args()
    if not args.report:
        if args.work.exists():
            raise SystemExit(f"{args.work} is there already. A soak is one piece: remove it, or name another --work.")
        args.work.mkdir(parents=True)
        soak = Soak(args.work.resolve(), args.seed)
        try:
            soak.go(args.minutes, args.n_timesteps)
        finally:
            if soak.learner is not None and soak.learner.poll() is None:
                soak.learner.kill()
            soak.save()
        command = ["-m", "opd_gym.cli", "eval", "--env", ENV, "--checkpoint", str(soak.run_dir / "policy")]
        command += ["--episodes", str(args.episodes), "--no-progress", "-o", str(args.output / "evaluation.json")]
        subprocess.run([sys.executable, *command], env=soak.env, check=True)
        values = json.loads((args.work / "soak.json").read_text(encoding="utf-8"))
        write_results(args.output / "results.json", {"soak": values})
    print(report(args.output))


if __name__ == "__main__":
    main()
