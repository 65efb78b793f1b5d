"""
OPD, GRPO and SFT in rl-zoo3: ``python -m opd_gym.zoo.rl_zoo3 train --algo opd --env CartPole-v1 ...``.

rl-zoo3 fixes the choices of ``--algo`` before it imports ``--gym-packages``, so that its own command cannot be told of
other algorithms. This one registers them and calls the scripts of rl-zoo3, whose options are all there.
"""

from __future__ import annotations

import runpy
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from importlib import import_module
from pprint import pprint
from typing import TYPE_CHECKING, Any

from opd_gym.algorithms import algorithm_class
from opd_gym.cli.options import TrainArgs
from opd_gym.cli.train import complete_hyperparams
from opd_gym.envs.registration import CHUNK_SIZES, bare_id, register_envs
from opd_gym.policies.loading import checkpoint_settings
from opd_gym.zoo.hyperparams import SCHEDULE_KEYS, rl_zoo3_hyperparams, schedule

try:
    from rl_zoo3 import exp_manager, hyperparams_opt
except ImportError as error:
    raise ImportError(f"rl-zoo3 is missing ({error}). Run: pip install 'opd_gym[rl_zoo3]'") from error

if TYPE_CHECKING:
    import optuna

# rl-zoo3 has a PPO, which is Stable-Baselines3's
ALGORITHMS = ("opd", "grpo", "sft")
SCRIPTS = ("train", "enjoy", "plot_train", "plot_from_file", "all_plots")
# Those that rl-zoo3's own command does not have
MODULES = ("push_to_hub", "load_from_hub", "record_video", "record_training")


class ExperimentManager(exp_manager.ExperimentManager):
    """
    rl-zoo3's, with the hyperparameters of this library for its algorithms: from its zoo or ``--conf-file``, with the
    teacher and the student that they leave open, and with the env that the student's checkpoint asks for.
    """

    def read_hyperparameters(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """
        :return: the hyperparameters, and the same to be written to ``config.yml``
        """
        if self.algo not in ALGORITHMS:
            return super().read_hyperparameters()
        env_id, config = self.env_name.gym_id, self.args.conf_file
        print(f"Loading hyperparameters from: {config or 'the zoo of opd_gym'}")
        overrides: dict[str, Any] = {}
        if self.storage and self.study_name and self.trial_id:
            overrides.update(self.load_trial(self.storage, self.study_name, self.trial_id))
        overrides.update(self.custom_hyperparams or {})
        if self.env_kwargs:
            overrides["env_kwargs"] = self.env_kwargs
        values = complete_hyperparams(TrainArgs(algo=self.algo, env=env_id, config=config), overrides)  # type: ignore[arg-type]
        values.setdefault("n_timesteps", algorithm_class(self.algo).default_total_timesteps)
        values = rl_zoo3_hyperparams(env_id, values, checkpoint_settings(values.get("policy_kwargs") or {}))
        if bare_id(env_id) in CHUNK_SIZES:
            values.setdefault("monitor_kwargs", {"info_keywords": ("is_success",)})
        # As it is trained, so it is evaluated
        self.eval_env_kwargs = {**values["env_kwargs"], **(self._eval_env_kwargs_args or {})}
        saved = OrderedDict(sorted(values.items()))
        pprint(saved)
        return values, saved

    def _preprocess_schedules(self, hyperparams: dict[str, Any]) -> dict[str, Any]:  # type: ignore[override]
        # Numbers stay numbers: no clip range of GRPO is a schedule
        if self.algo not in ALGORITHMS:
            return super()._preprocess_schedules(hyperparams)
        return {key: schedule(value, key) if key in SCHEDULE_KEYS else value for key, value in hyperparams.items()}


# ------------------------------------------------------------------------------------------------------ optimization

Sampler = Callable[["optuna.Trial", int, int, dict[str, Any]], dict[str, Any]]


def convert(sampled: Mapping[str, Any]) -> dict[str, Any]:
    """
    :param sampled: parameters of a trial, some as powers of 2
    :return: the hyperparameters that they stand for
    """
    return {key.removesuffix("_pow"): 2**value if key.endswith("_pow") else value for key, value in sampled.items()}


def sample_opd(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """
    :param trial: of Optuna
    :param n_actions: not used, as the arguments that follow
    :return: hyperparameters of :class:`opd_gym.OPD` to try
    """
    return convert(
        {
            "learning_rate": trial.suggest_float("learning_rate", 1e-5, 1e-2, log=True),
            "n_steps_pow": trial.suggest_int("n_steps_pow", 4, 8),
            "batch_size_pow": trial.suggest_int("batch_size_pow", 5, 9),
            "divergence": trial.suggest_categorical("divergence", ["reverse_kl", "forward_kl", "jsd"]),
            "temperature": trial.suggest_float("temperature", 0.3, 1.6),
            "max_grad_norm": trial.suggest_float("max_grad_norm", 0.3, 2.0),
        }
    )


def sample_grpo(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """
    :param trial: of Optuna
    :param n_actions: not used, as the arguments that follow
    :return: hyperparameters of :class:`opd_gym.GRPO` to try
    """
    return convert(
        {
            "learning_rate": trial.suggest_float("learning_rate", 1e-6, 1e-2, log=True),
            "group_size_pow": trial.suggest_int("group_size_pow", 1, 4),
            "n_groups_pow": trial.suggest_int("n_groups_pow", 1, 4),
            "trajectories_per_batch_pow": trial.suggest_int("trajectories_per_batch_pow", 3, 7),
            "n_epochs": trial.suggest_int("n_epochs", 1, 4),
            "clip_range_high": trial.suggest_float("clip_range_high", 0.2, 0.4),
            "temperature": trial.suggest_float("temperature", 0.3, 1.6),
        }
    )


def sample_sft(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """
    :param trial: of Optuna
    :param n_actions: not used, as the arguments that follow
    :return: hyperparameters of :class:`opd_gym.SFT` to try
    """
    return convert(
        {
            "learning_rate": trial.suggest_float("learning_rate", 1e-5, 1e-2, log=True),
            "batch_size_pow": trial.suggest_int("batch_size_pow", 5, 9),
            "lr_decay": trial.suggest_categorical("lr_decay", ["cosine", "constant"]),
            "label_smoothing": trial.suggest_float("label_smoothing", 0.0, 2.0),
        }
    )


SAMPLERS: dict[str, Sampler] = {"opd": sample_opd, "grpo": sample_grpo, "sft": sample_sft}


# ------------------------------------------------------------------------------------------------------ registration


def register() -> None:
    """
    Tell rl-zoo3 of OPD, GRPO and SFT, of the hyperparameters to try, and of this library's env ids. Its own algorithms
    stay as they are.
    """
    import rl_zoo3.train

    register_envs()
    tables: tuple[dict[str, Any], ...] = (
        rl_zoo3.ALGOS,
        hyperparams_opt.HYPERPARAMS_SAMPLER,
        hyperparams_opt.HYPERPARAMS_CONVERTER,
    )
    for name in ALGORITHMS:
        for table, value in zip(tables, (algorithm_class(name), SAMPLERS[name], convert), strict=True):
            table[name] = value
    exp_manager.ExperimentManager = ExperimentManager  # type: ignore[misc]
    rl_zoo3.train.ExperimentManager = ExperimentManager  # type: ignore[misc]


def _mend_push_to_hub() -> None:
    """rl-zoo3 2.9.2 imports a function that sb3-team-hf-integration 3.2 has under another name, with another result."""
    module: Any = import_module("huggingface_sb3.push_to_hub")
    if not hasattr(module, "generate_metadata"):
        module.generate_metadata = lambda *args: module._generate_metadata(*args).to_dict()


def main() -> int:
    """
    Run a script of rl-zoo3 with the arguments of the process.

    :return: exit status
    """
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in (*SCRIPTS, *MODULES):
        print(f"usage: python -m opd_gym.zoo.rl_zoo3 {{{','.join((*SCRIPTS, *MODULES))}}} ...", file=sys.stderr)
        return 0 if name in ("-h", "--help") else 2
    register()
    if name in SCRIPTS:
        from rl_zoo3.cli import main as rl_zoo3_main

        rl_zoo3_main()
    else:
        if name == "push_to_hub":
            _mend_push_to_hub()
        del sys.argv[1]
        runpy.run_module(f"rl_zoo3.{name}", run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
