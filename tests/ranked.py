"""What test_ranks.py starts with torchrun: each rank plays its own envs, and writes down what it saw and learned."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback
from stable_baselines3.common.vec_env import VecNormalize
from toys import Match, Robot, parameters, vec

from opd_gym import GRPO, OPD, PPO, SFT, ranks
from opd_gym.demonstrations import Demonstrations
from opd_gym.envs.wrappers import ActionChunk, ActionTokens

TESTS = Path(__file__).parent
ROWS = ("actions", "rewards", "values", "token_log_probs", "token_mask", "advantages", "returns", "teacher_log_probs")
ROWS += ("teacher_distributions", "group_ids", "episode_ids", "successes")
# Adam divides by the size of the gradient: where that is next to nothing, rounding would decide
COMMON: dict[str, Any] = {"seed": 0, "device": "cpu", "learning_rate": 0.5}
SGD = {"optimizer_class": th.optim.SGD}
# The minibatch is the whole rollout: what is compared is an update, and not the order of the rows
EXACT = {"teacher": "expert", "n_steps": 8, "n_epochs": 2, "state_replay": False, "batch_size": 1000}
SAMPLED = {"teacher": "expert", "n_steps": 8, "estimator": "sampled", "batch_size": 5}
GROUPS = {"n_groups": 3, "group_size": 2, "dynamic_sampling": None, "trajectories_per_batch": 100, "n_epochs": 2}
CRITIC = {"n_steps": 8, "n_epochs": 2, "batch_size": 1000, "target_kl": 10.0, "ent_coef": 0.01}


class Cut(Match):
    """Not every token of a decision is executed; what counts is the return, which differs within most groups."""

    def step(self, action):
        *rest, info = super().step(action)
        info = {key: value for key, value in info.items() if key != "is_success"}
        return *rest, {**info, "n_executed_tokens": 1 + self.t % 2}


def torchrun(*words: object, n: int = 2, **env: str) -> subprocess.CompletedProcess:
    """
    :param words: a script and its arguments
    :param n: number of ranks
    :param env: further environment variables
    :return: what it said
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [*command, *map(str, words)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1", **env},
        capture_output=True,
        text=True,
        timeout=300,
    )


def make(case: str, n_envs: int, base: Path, **kwargs: Any) -> Any:
    """
    :param case: what is trained
    :param n_envs: number of envs
    :param base: checkpoint to adapt, for the case "lora"
    :param kwargs: further arguments of the algorithm
    :return: the model
    """
    policy, policy_kwargs = "MlpPolicy", dict(SGD)
    if case == "lora":
        policy, policy_kwargs = "VLAPolicy", {**SGD, "checkpoint": str(base), "lora": {"r": 2}}
        env = vec(n_envs, lambda: ActionTokens(ActionChunk(Robot(), 8)))
    else:
        env = vec(n_envs, Cut, kind="multi_discrete")
    if case == "normalized":
        env = VecNormalize(env)
    cls, settings = {
        "exact": (OPD, EXACT),
        "lora": (OPD, EXACT),
        "sampled": (OPD, SAMPLED),
        "grpo": (GRPO, GROUPS),
        "ppo": (PPO, CRITIC),
        "ppo_token": (PPO, {**CRITIC, "ratio": "token"}),
        "normalized": (PPO, CRITIC),
    }[case]
    return cls(policy, env, policy_kwargs=policy_kwargs, **{**COMMON, **settings, **kwargs})


def rows(model: Any) -> dict[str, np.ndarray]:
    """
    :param model: one whose rollout is finished
    :return: its rows, by name
    """
    buffer = model.rollout_buffer
    obs = buffer.observations
    named = {f"obs.{key}": array for key, array in obs.items()} if isinstance(obs, dict) else {"obs": obs}
    return {**named, **{name: getattr(buffer, name) for name in ROWS}}


def sft(**kwargs: Any) -> SFT:
    """
    :param kwargs: further arguments
    :return: a model with demonstrations
    """
    obs = np.random.default_rng(0).normal(size=(500, 6)).astype(np.float32)
    data = Demonstrations(
        obs, obs.argmax(1) % 3, observation_space=spaces.Box(-9, 9, (6,)), action_space=spaces.Discrete(3)
    )
    return SFT("MlpPolicy", demonstrations=data, policy_kwargs=dict(SGD), lr_decay="constant", **{**COMMON, **kwargs})


def supervised(folder: Path) -> None:
    """Three gradient steps on demonstrations, of which each rank draws its own."""
    model = sft(batch_size=20 + 12 * ranks.rank())
    drawn: list[np.ndarray] = []
    batch = model._batch
    model._batch = lambda rows: (drawn.append(rows), batch(rows))[1]  # type: ignore[method-assign]
    model._join_ranks()
    if ranks.is_main():
        th.save(model.policy.state_dict(), folder / "sft.pt")
    model.learn(3)
    np.savez(folder / f"sft{ranks.rank()}.npz", trained=parameters(model).numpy(), drawn=np.stack(drawn))


class _StopsAfter(BaseCallback):
    """Ends a training at a step of the first rank."""

    def __init__(self, n: int):
        super().__init__()
        self.n = n

    def _on_step(self) -> bool:
        return self.n_calls < self.n


def stopped(folder: Path) -> None:
    """The callback of the first rank ends the training of both, in the middle of a rollout."""
    model = make("exact", 2, folder / "base").learn(1000, callback=_StopsAfter(11))
    (folder / f"stopped{ranks.rank()}").write_text(f"{model._n_iterations} {model.num_timesteps}")


def killed(folder: Path) -> None:
    """The second rank dies in the middle of its training."""
    model = make("exact", 2, folder / "base")
    if not ranks.is_main():
        collect = model._collect_rows

        def dying(*args: Any) -> bool:
            if model._n_iterations == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return collect(*args)

        model._collect_rows = dying  # type: ignore[method-assign]
    model.learn(10_000, callback=CheckpointCallback(1, str(folder / "checkpoints")))


def update(case: str, folder: Path) -> None:
    """One rollout and one update; each rank has other numbers of envs, rows, tokens and trajectories."""
    more = {"n_groups": 3 + ranks.rank()} if case == "grpo" else {}
    model = make(case, 2 + ranks.rank(), folder / "base", **more)
    _, callback = model._setup_learn(1000)
    if ranks.is_main():
        th.save(model.policy.state_dict(), folder / f"{case}.pt")
    model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    collected = rows(model)
    model.train()
    trained = parameters(model).numpy()
    np.savez(folder / f"{case}{ranks.rank()}.npz", trained=trained, num_timesteps=model.num_timesteps, **collected)


def whole(folder: Path) -> None:
    """Whole trainings, of minibatches of which some ranks have more than others."""
    for case in ("exact", "grpo", "ppo", "normalized"):
        more = {"trajectories_per_batch": 1} if case == "grpo" else {"batch_size": 5}
        model = make(case, 1 + 2 * ranks.rank(), folder / "base", **more, learning_rate=0.01, verbose=1)
        model.learn(60)
        model.save(folder / f"whole_{case}")
        found = {"seen": model.env.obs_rms.mean, "count": model.env.obs_rms.count} if case == "normalized" else {}
        np.savez(
            folder / f"whole_{case}{ranks.rank()}.npz",
            trained=parameters(model).numpy(),
            counts=[model.num_timesteps, model.num_env_steps, model._n_finished, model._n_updates],
            obs=rows(model)["obs"],
            **found,
        )


def devices(folder: Path) -> None:
    """A short training on this rank's own device."""
    model = make("exact", 2, folder / "base", device="auto", learning_rate=0.01).learn(32)
    (added,) = ranks.total(1.0 + ranks.rank())
    device, trained = str(model.policy.device), parameters(model).cpu().numpy()
    np.savez(folder / f"devices{ranks.rank()}.npz", trained=trained, device=device, added=added)


if __name__ == "__main__":
    out = Path(sys.argv[1])
    programs = {"whole": whole, "sft": supervised, "stopped": stopped, "killed": killed, "devices": devices}
    for name in sys.argv[2:]:
        programs[name](out) if name in programs else update(name, out)
