"""
Does OPD with its defaults reach an SB3 teacher on ordinary Gymnasium envs, beside BC and DAgger of ``imitation``?

``imitation`` 1.0.1 asks for older versions of Gymnasium and SB3 than this library does, and runs with ours. Put it in a
folder of its own, with what it imports and Box2D for LunarLander; nothing in the environment changes. (dill wants
the folder to be called ``site-packages``.) ::

    pip install --no-deps --target SIDE/site-packages imitation==1.0.1 datasets pyarrow pandas dill multiprocess \
        xxhash jsonpickle huggingface-sb3 pytz python-dateutil wasabi box2d==2.3.10 pygame-ce

    PYTHONPATH=SIDE/site-packages python benchmarks/gymnasium_envs.py --work ~/teachers              # all of it
    PYTHONPATH=SIDE/site-packages python benchmarks/gymnasium_envs.py --work ~/teachers --methods opd --set group_size=1
    python benchmarks/gymnasium_envs.py --report                                       # table and picture only

HalfCheetah has not been run yet. Teachers are trained once and kept in ``--work``. Each run writes one JSON
file, and is skipped where that is there.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import itertools
import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Before PyTorch: one thread for every method
os.environ.setdefault("OMP_NUM_THREADS", "1")

import gymnasium as gym
import numpy as np
import sb3_contrib
import stable_baselines3
import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import EvalCallback, StopTrainingOnRewardThreshold
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.policies import BasePolicy
from tqdm import tqdm

from opd_gym import OPD
from opd_gym.cli.report.policies import t_interval, welch
from opd_gym.files import write_atomic
from opd_gym.untrusted import parse_yaml
from opd_gym.versions import write_results

RESULTS = Path(__file__).resolve().parent / "results" / "gymnasium_envs"
N_EVAL_EPISODES = 20
# Training seeds are 0, 1, ... and what OPD draws from them; evaluations begin here. OPD's defaults are from others:
# episodes from 1,000,000, training seeds from 10
EVAL_SEED = 3_000_000
# A teacher is evaluated this often while it is trained, in episodes of its own
N_TEACHER_EVALS, TEACHER_EVAL_SEED = 12, 2_000_000
METHODS = ("opd", "dagger", "bc")
LABELS = {"opd": "OPD", "dagger": "DAgger (imitation)", "bc": "BC (imitation)"}
# Passes of BC over the demonstrations: imitation has a default for DAgger's rounds (4) and none for BC alone
BC_EPOCHS = 10


class Thrusters(gym.Env[np.ndarray, np.ndarray]):
    """
    Four weights fall, each has a thruster that is on or off; the reward is 1 less their mean distance from 0.

    A small env with a ``MultiBinary`` action space, which Gymnasium has none of. Observations are positions and
    velocities, (8,) float32. Episodes take 100 steps.
    """

    observation_space = spaces.Box(-4.0, 4.0, (8,), np.float32)
    action_space = spaces.MultiBinary(4)

    def _obs(self) -> np.ndarray:
        return np.concatenate([self._position, self._velocity]).astype(np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """See :class:`gymnasium.Env`."""
        super().reset(seed=seed)
        self._steps = 0
        self._position = self.np_random.uniform(-2.0, 2.0, 4)
        self._velocity = self.np_random.uniform(-0.5, 0.5, 4)
        return self._obs(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        """See :class:`gymnasium.Env`."""
        self._steps += 1
        thrust = 0.2 * np.asarray(action) - 0.1 + self.np_random.normal(0.0, 0.01, 4)
        self._velocity = np.clip(0.95 * self._velocity + thrust, -1.0, 1.0)
        self._position = np.clip(self._position + 0.2 * self._velocity, -4.0, 4.0)
        return self._obs(), 1.0 - float(np.abs(self._position).mean()), False, self._steps == 100, {}


ENVS: dict[str, str | type[gym.Env]] = {
    "CartPole": "CartPole-v1",
    "Acrobot": "Acrobot-v1",
    "LunarLander": "LunarLander-v3",
    "Pendulum": "Pendulum-v1",
    "Thrusters": Thrusters,
    "Hopper": "Hopper-v5",
    "HalfCheetah": "HalfCheetah-v5",
}
# Env steps of each method: what DAgger needs, rounded to a power of two
BUDGETS = {
    "CartPole": 4096,
    "Acrobot": 4096,
    "LunarLander": 32768,
    "Pendulum": 8192,
    "Thrusters": 4096,
    "Hopper": 32768,
    "HalfCheetah": 32768,
}

# Mean return of ten episodes at which a teacher's training ends
GOOD_ENOUGH = {
    "CartPole": 500.0,
    "Acrobot": -85.0,
    "LunarLander": 240.0,
    "Pendulum": -150.0,
    "Thrusters": 90.0,
    "Hopper": 2500.0,
    "HalfCheetah": 4000.0,
}


def made(env_name: str) -> gym.Env:
    """
    :param env_name: Name in ``ENVS``
    :return: one such env
    """
    spec = ENVS[env_name]
    return gym.make(spec) if isinstance(spec, str) else spec()


@dataclass(frozen=True)
class Recipe:
    """
    How a teacher is trained: after rl-zoo3's hyperparameters, without what costs time and changes little.

    :param env: Name in ``ENVS``
    :param algo: Class of SB3 or sb3-contrib
    :param n_timesteps: Env steps
    :param n_envs: Number of envs
    :param kwargs: Arguments of the class
    """

    env: str
    algo: str
    n_timesteps: int
    n_envs: int = 1
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of its files."""
        return f"{self.env}-{self.algo}"

    @property
    def cls(self) -> type[BaseAlgorithm]:
        """The class itself."""
        return getattr(stable_baselines3, self.algo, None) or getattr(sb3_contrib, self.algo)


# Enough for these envs, at a third of the time
SMALL = {"net_arch": [64, 64]}
RECIPES = [
    Recipe(
        "CartPole",
        "PPO",
        100_000,
        8,
        dict(
            n_steps=32,
            batch_size=256,
            gae_lambda=0.8,
            gamma=0.98,
            n_epochs=20,
            learning_rate=lambda left: 1e-3 * left,
            clip_range=lambda left: 0.2 * left,
        ),
    ),
    Recipe(
        "CartPole",
        "DQN",
        50_000,
        kwargs=dict(
            learning_rate=2.3e-3,
            batch_size=64,
            buffer_size=100_000,
            learning_starts=1000,
            target_update_interval=10,
            train_freq=256,
            gradient_steps=128,
            exploration_fraction=0.16,
            exploration_final_eps=0.04,
            policy_kwargs=SMALL,
        ),
    ),
    Recipe("CartPole", "ARS", 50_000, kwargs=dict(n_delta=2, policy="LinearPolicy")),
    Recipe("Thrusters", "PPO", 60_000, 8, dict(n_steps=128, batch_size=256, learning_rate=1e-3, gamma=0.95)),
    Recipe("Pendulum", "PPO", 100_000, 4, dict(n_steps=1024, gae_lambda=0.95, gamma=0.9, learning_rate=1e-3)),
    Recipe("Pendulum", "SAC", 6_000, kwargs=dict(learning_rate=1e-3, policy_kwargs=SMALL)),
    Recipe("Acrobot", "PPO", 150_000, 16, dict(n_steps=256, gae_lambda=0.94, n_epochs=4, batch_size=128)),
    Recipe("Pendulum", "TD3", 12_000, kwargs=dict(learning_rate=1e-3, gamma=0.98, policy_kwargs=SMALL)),
    Recipe("Pendulum", "TQC", 6_000, kwargs=dict(learning_rate=1e-3, policy_kwargs=SMALL)),
    Recipe(
        "LunarLander",
        "PPO",
        1_000_000,
        16,
        dict(n_steps=1024, batch_size=64, gae_lambda=0.98, gamma=0.999, n_epochs=4, ent_coef=0.01),
    ),
    Recipe("Hopper", "SAC", 200_000, kwargs=dict(learning_starts=10_000)),
    Recipe("HalfCheetah", "SAC", 150_000, kwargs=dict(learning_starts=10_000)),
]


def trained(recipe: Recipe, work: Path) -> tuple[Path, BaseAlgorithm]:
    """
    Train a teacher with seed 0, or load it where that has been done.

    As rl-zoo3 does, it keeps the best of some evaluations; and stops once a teacher is good enough.

    :param recipe: Which
    :param work: Folder of the teachers
    :return: its zip, and the model
    """
    path = work / f"{recipe.name}.zip"
    if not path.exists():
        env = make_vec_env(ENVS[recipe.env], recipe.n_envs, seed=0)
        # SB3 writes into policy_kwargs
        model = recipe.cls(
            **{"policy": "MlpPolicy", "env": env, "seed": 0, "device": "cpu", **copy.deepcopy(recipe.kwargs)}
        )
        best = EvalCallback(
            make_vec_env(ENVS[recipe.env], 1, seed=TEACHER_EVAL_SEED),
            StopTrainingOnRewardThreshold(GOOD_ENOUGH[recipe.env], verbose=0),
            n_eval_episodes=10,
            eval_freq=recipe.n_timesteps // N_TEACHER_EVALS // recipe.n_envs,
            best_model_save_path=str(path.with_suffix("")),
            verbose=0,
        )
        started = time.process_time()
        model.learn(recipe.n_timesteps, callback=best, progress_bar=True)
        cost = {"cpu_s": round(time.process_time() - started, 1), "env_steps": model.num_timesteps}
        write_atomic(path.with_suffix(".json"), json.dumps(cost))
        (path.with_suffix("") / "best_model.zip").rename(path)
    return path, recipe.cls.load(path, device="cpu")


def returns(policy: BaseAlgorithm | BasePolicy, env_name: str) -> list[float]:
    """
    Returns of deterministic episodes; the seeds are the same for all methods.

    :param policy: What plays
    :param env_name: Name in ``ENVS``
    :return: one return an episode
    """
    envs = [made(env_name) for _ in range(N_EVAL_EPISODES)]
    obs = np.stack([env.reset(seed=EVAL_SEED + i)[0] for i, env in enumerate(envs)])
    totals, active = np.zeros(len(envs)), list(range(len(envs)))
    while active:
        actions, _ = policy.predict(obs[active], deterministic=True)
        for i, action in zip(list(active), actions, strict=True):
            obs[i], reward, terminated, truncated, _ = envs[i].step(action)
            totals[i] += float(reward)
            if terminated or truncated:
                active.remove(i)
    for env in envs:
        env.close()
    return [round(float(total), 2) for total in totals]


def run_opd(
    recipe: Recipe, teacher: Path, n_envs: int, seed: int, steps: int, kwargs: dict[str, Any]
) -> tuple[BasePolicy, dict[str, Any]]:
    """
    OPD. The env is given, not its id: an id of the zoo would bring the zoo's hyperparameters with it.

    :param recipe: Of the teacher
    :param teacher: Zip of the teacher
    :param n_envs: Number of envs
    :param seed: Seed of the run
    :param steps: Env steps
    :param kwargs: Arguments other than the defaults
    :return: the student, and numbers of the run
    """
    env: Any = made(recipe.env) if n_envs == 1 else make_vec_env(ENVS[recipe.env], n_envs)
    model = OPD("MlpPolicy", env, str(teacher), seed=seed, device="cpu", **kwargs)
    model.learn(steps)
    return model.policy, {"env_steps": model.num_timesteps, "updates": model._n_updates}


def run_imitation(
    recipe: Recipe, teacher: Path, n_envs: int, seed: int, steps: int, dagger: bool
) -> tuple[BasePolicy, dict[str, Any]]:
    """
    BC on the teacher's own episodes, or DAgger, both with the defaults of ``imitation``.

    :param recipe: Of the teacher
    :param teacher: Zip of the teacher
    :param n_envs: Number of envs
    :param seed: Seed of the run
    :param steps: Env steps; both play whole episodes and whole rounds, so they take somewhat more
    :param dagger: DAgger
    :return: the student, and numbers of the run
    """
    from imitation.algorithms import bc
    from imitation.algorithms.dagger import SimpleDAggerTrainer
    from imitation.data import rollout
    from imitation.util import logger

    expert = recipe.cls.load(teacher, device="cpu").policy
    th.manual_seed(seed)
    rng = np.random.default_rng(seed)
    venv = make_vec_env(ENVS[recipe.env], n_envs, seed=seed)
    # What imitation plays while it trains, to log returns, is no part of the method: it is left out
    updates = itertools.count()
    quiet = {"log_rollouts_venv": None, "progress_bar": False, "on_batch_end": lambda: next(updates)}
    with tempfile.TemporaryDirectory() as scratch:
        trainer = bc.BC(
            observation_space=venv.observation_space,
            action_space=venv.action_space,
            rng=rng,
            device="cpu",
            custom_logger=logger.configure(scratch, format_strs=[]),
        )
        if dagger:
            teaching = SimpleDAggerTrainer(
                venv=venv,
                scratch_dir=scratch,
                expert_policy=expert,
                rng=rng,
                bc_trainer=trainer,
                custom_logger=trainer.logger,
            )
            teaching.train(steps, bc_train_kwargs=quiet)
            taken = sum(len(demo) for demo in teaching._all_demos)
        else:
            until = rollout.make_sample_until(min_timesteps=steps)
            demos = rollout.rollout(expert, venv, until, rng=rng, unwrap=False, verbose=False)
            trainer.set_demonstrations(rollout.flatten_trajectories(demos))
            trainer.train(n_epochs=BC_EPOCHS, **quiet)
            taken = sum(len(demo) for demo in demos)
    return trainer.policy, {"env_steps": taken, "updates": next(updates)}


def run(recipe: Recipe, method: str, n_envs: int, seed: int, steps: int, work: Path, kwargs: dict[str, Any]) -> dict:
    """
    Train and evaluate one student.

    :param recipe: Of the teacher
    :param method: One of ``METHODS``
    :param n_envs: Number of envs
    :param seed: Seed of the run
    :param steps: Env steps
    :param work: Folder of the teachers
    :param kwargs: Arguments of OPD other than the defaults
    :return: the record of the run; its CPU time is that of the whole process, while the method works
    """
    teacher = work / f"{recipe.name}.zip"
    started = time.process_time()
    if method == "opd":
        policy, numbers = run_opd(recipe, teacher, n_envs, seed, steps, kwargs)
    else:
        policy, numbers = run_imitation(recipe, teacher, n_envs, seed, steps, dagger=method == "dagger")
    cpu_s = time.process_time() - started
    return {
        "teacher": recipe.name,
        "method": method,
        "settings": kwargs,
        "n_envs": n_envs,
        "seed": seed,
        "budget": steps,
        **numbers,
        "cpu_s": round(cpu_s, 2),
        "returns": returns(policy, recipe.env),
    }


def label_of(record: dict[str, Any]) -> str:
    """
    :param record: One run
    :return: its method, with what differs from the defaults
    """
    changed = [f"{name}={value}" for name, value in record["settings"].items()]
    if record["n_envs"] != 1:
        changed.append(f"{record['n_envs']} envs")
    return LABELS[record["method"]] + (f", {', '.join(changed)}" if changed else "")


def results_md(teachers: dict[str, dict[str, Any]], records: Sequence[dict[str, Any]]) -> str:
    """
    Markdown tables: one row for each teacher and method, and Welch's t test between OPD and each other method.

    :param teachers: Records of the teachers, by name
    :param records: One a run
    :return: the tables
    """
    compared = []
    lines = [
        "# OPD, DAgger and BC on Gymnasium envs",
        "",
        f"Mean return of {N_EVAL_EPISODES} deterministic episodes by training seed, from the same states for all,",
        "with the interval of their mean by Student's t. Env steps, updates and CPU time are means over the seeds. See",
        "benchmarks/README.md.",
        "",
        "| teacher | its return | method | return, seed by seed | mean | 95 % interval | env steps | updates | CPU s | "
        "CPU of DAgger |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, teacher in teachers.items():
        of_teacher = [r for r in records if r["teacher"] == name]
        of_opd = [float(np.mean(r["returns"])) for r in of_teacher if label_of(r) == LABELS["opd"]]
        for label in dict.fromkeys(map(label_of, of_teacher)):
            runs = [r for r in of_teacher if label_of(r) == label]
            means = [float(np.mean(r["returns"])) for r in runs]
            interval = "{:.1f} to {:.1f}".format(*t_interval(means)) if len(means) > 1 else ""
            steps, updates, cpu_s = (np.mean([r[key] for r in runs]) for key in ("env_steps", "updates", "cpu_s"))
            # Beside each other on one machine, seed by seed
            pairs = {(r["seed"], r["n_envs"]): r["cpu_s"] for r in of_teacher if r["method"] == "dagger"}
            ratios = [r["cpu_s"] / pairs[key] for r in runs if (key := (r["seed"], r["n_envs"])) in pairs]
            ratio = f"{np.median(ratios):.2f}" if ratios else ""
            lines.append(
                f"| {name} | {np.mean(teacher['returns']):.1f} | {label} | {', '.join(f'{m:.1f}' for m in means)} | "
                f"{np.mean(means):.1f} | {interval} | {steps:.0f} | {updates:.0f} | {cpu_s:.1f} | "
                f"{ratio} |"
            )
            if label != LABELS["opd"] and (test := welch(of_opd, means)) is not None:
                compared.append(
                    f"| {name} | {label} | {np.mean(of_opd) - np.mean(means):.1f} | {test[0]:.1f} to {test[1]:.1f} | "
                    f"{test[2]:.2g} |"
                )
    if compared:
        lines += ["", "Means over the seeds, of OPD less those of another method, by Welch's t test:", ""]
        lines += ["| teacher | method | difference | 95 % interval | p |", "|---|---|---|---|---|", *compared]
    return "\n".join(lines) + "\n"


def plot(teachers: dict[str, dict[str, Any]], records: Sequence[dict[str, Any]], path: Path) -> None:
    """
    One panel for each teacher: return against CPU seconds, one point a run, and the teacher's return as a line.

    :param teachers: Records of the teachers, by name
    :param records: One a run
    :param path: PNG to write
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [name for name in teachers if any(r["teacher"] == name for r in records)]
    n_columns = min(4, len(names))
    n_rows = -(-len(names) // n_columns)
    figure, axes = plt.subplots(n_rows, n_columns, figsize=(3.4 * n_columns, 2.8 * n_rows), squeeze=False)
    colours = {"opd": "tab:blue", "dagger": "tab:orange", "bc": "tab:green"}
    for axis in axes.flat[len(names) :]:
        axis.set_axis_off()
    for axis, name in zip(axes.flat, names, strict=False):
        axis.axhline(float(np.mean(teachers[name]["returns"])), color="grey", linestyle="--", label="teacher")
        for method in METHODS:
            # What was tried besides the defaults is in the table
            runs = [r for r in records if r["teacher"] == name and label_of(r) == LABELS[method]]
            cpu_s = [r["cpu_s"] for r in runs]
            axis.plot(cpu_s, [np.mean(r["returns"]) for r in runs], "o", color=colours[method], label=LABELS[method])
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("CPU seconds", fontsize=8)
        axis.set_ylabel("return", fontsize=8)
        axis.tick_params(labelsize=7)
    axes.flat[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def report(output: Path) -> None:
    """
    Table and picture of what has been run, from the JSON files alone.

    :param output: Folder of the results
    """
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(output.glob("*.json"))]
    teachers = {r["teacher"]: r for r in found if r["method"] == "teacher"}
    order = [recipe.name for recipe in RECIPES]
    teachers = {name: teachers[name] for name in sorted(teachers, key=order.index)}
    records = [r for r in found if r["method"] != "teacher"]
    records.sort(
        key=lambda r: (METHODS.index(r["method"]), r["n_envs"], len(r["settings"]), str(r["settings"]), r["seed"])
    )
    write_atomic(output / "results.md", results_md(teachers, records))
    if records:
        plot(teachers, records, output / "results.png")


def main(argv: Sequence[str] | None = None) -> None:
    """
    Command line.

    :param argv: Arguments; None: those of the process
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/gymnasium_envs"), help="where the teachers are kept")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the results go")
    parser.add_argument("--teachers", nargs="+", default=[recipe.name for recipe in RECIPES], metavar="ENV-ALGO")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--n-envs", type=int, default=1, help="number of envs of every method")
    parser.add_argument("--steps", type=int, help="env steps; without it, those of the env in BUDGETS")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="arguments of OPD, all else default")
    parser.add_argument("--report", action="store_true", help="only make the table and the picture again")
    args = parser.parse_args(argv)
    if not args.report:
        args.work.mkdir(parents=True, exist_ok=True)
        args.output.mkdir(parents=True, exist_ok=True)
        th.set_num_threads(1)
        settings = {name: parse_yaml(value) for name, _, value in (pair.partition("=") for pair in args.set)}
        run_all(args, settings)
    report(args.output)


def run_all(args: argparse.Namespace, settings: dict[str, Any]) -> None:
    """
    All runs that have no results yet; the methods take turns, so that what slows the machine slows all of them.

    :param args: Of the command line
    :param settings: Arguments of OPD other than the defaults
    """
    methods = list(args.methods)
    if set(methods) != {"opd"} and importlib.util.find_spec("imitation") is None:
        print("imitation is not installed (see the head of this file): its methods are left out.")
        methods = ["opd"] if "opd" in methods else []
    recipes = {recipe.name: recipe for recipe in RECIPES}
    warm: set[str] = set()
    with tqdm(total=len(args.teachers) * len(args.seeds) * len(methods), unit="run", mininterval=5) as bar:
        for recipe in (recipes[name] for name in args.teachers):
            teacher, model = trained(recipe, args.work)
            path = args.output / f"{recipe.name}.json"
            played = returns(model, recipe.env)
            if not path.exists():
                cost = json.loads(teacher.with_suffix(".json").read_text())
                write_results(path, {"teacher": recipe.name, "method": "teacher", **cost, "returns": played})
            elif json.loads(path.read_text(encoding="utf-8"))["returns"] != played:
                # Trained anew, on another machine or with other versions: its students belong to other results
                raise SystemExit(
                    f"{teacher} is not the teacher of {path}: it plays other returns. Keep its students apart, with "
                    "--output, or delete that file and the runs beside it to make all of them again."
                )
            for seed in args.seeds:
                # Each method is first as often as any other
                turn = seed % max(len(methods), 1)
                for method in methods[turn:] + methods[:turn]:
                    kwargs = settings if method == "opd" else {}
                    tags = [method, *(f"{k}-{v}" for k, v in kwargs.items())]
                    tags += [f"{args.n_envs}envs"] * (args.n_envs != 1) + [f"seed{seed}"]
                    path = args.output / f"{recipe.name}_{'_'.join(tags)}.json"
                    bar.set_postfix_str(path.stem)
                    if not path.exists():
                        if method not in warm:
                            # What is imported late, and PyTorch's first calls, belong to no run
                            run(recipe, method, args.n_envs, seed, 64, args.work, kwargs)
                            warm.add(method)
                        steps = args.steps or BUDGETS[recipe.env]
                        record = run(recipe, method, args.n_envs, seed, steps, args.work, kwargs)
                        write_results(path, record)
                    bar.update()


if __name__ == "__main__":
    main()
