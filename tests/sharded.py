"""What test_sharding.py starts with torchrun: the same training with whole and with sharded weights."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from ranked import EXACT, GROUPS
from stable_baselines3.common.callbacks import BaseCallback
from toys import TINY_BODY, Robot, parameters, vec

from opd_gym import GRPO, OPD, PPO, SFT, ranks
from opd_gym.algorithms.common import PolicyAlgorithm
from opd_gym.demonstrations import Demonstrations
from opd_gym.envs.wrappers import ActionChunk, ActionTokens
from opd_gym.instructions import encode_instruction
from opd_gym.policies.loading import checkpoint_settings

# Adam divides by the size of the gradient: where that is next to nothing, rounding would decide
ADAM = {"optimizer_class": th.optim.AdamW, "optimizer_kwargs": {"eps": 1e-2}}
TINY = {"body_kwargs": {**TINY_BODY, "num_hidden_layers": 3}}
# Names tell what inputs a published checkpoint needs: these two have the same weights, and other outputs
STUDENT, TEACHER = "Openvla-oft-SFT-libero-object-traj1", "RLinf-OpenVLAOFT-LIBERO"
COMMON: dict[str, Any] = {"seed": 0, "device": "cpu", "learning_rate": 0.01}


class Noise(Robot):
    """A picture in which no channel has a variance of nearly 0, which normalisation would magnify rounding by."""

    def _observe(self):
        seed = int(1e6 * abs(self.goal[0]))
        picture = np.random.default_rng(seed).integers(0, 256, self.observation_space["agentview"].shape, np.uint8)
        return {**super()._observe(), "agentview": picture}

    def step(self, action):
        # What counts is the return, which differs within most groups
        return *super().step(action)[:-1], {}


class Arm(Noise):
    """What OpenVLA sees: one picture of 64x64 and an instruction; actions have seven dimensions."""

    def __init__(self):
        super().__init__()
        self.observation_space = spaces.Dict(
            agentview=spaces.Box(0, 255, (64, 64, 3), np.uint8), instruction=spaces.Box(0, 255, (128,), np.uint8)
        )
        self.action_space = spaces.Box(-1.0, 1.0, (7,), np.float32)

    def _observe(self):
        picture = super()._observe()["agentview"]
        return {"agentview": picture, "instruction": encode_instruction("pick up the Milk")}

    def step(self, action):
        return super().step(action[:2])


def arms(checkpoint: Path, n_envs: int) -> Any:
    """
    :param checkpoint: what they are for
    :param n_envs: number of envs
    :return: the vectorised env
    """
    settings = checkpoint_settings({"checkpoint": checkpoint})
    chunk_size, statistics = settings["chunk_size"], settings["statistics"]
    return vec(n_envs, lambda: ActionTokens(ActionChunk(Arm(), chunk_size), statistics=statistics))


def robots(n_envs: int) -> Any:
    """
    :param n_envs: number of envs
    :return: a vectorised env for the small VLA
    """
    return vec(n_envs, lambda: ActionTokens(ActionChunk(Noise(), 8)))


def make(case: str, folder: Path, shard: bool) -> Any:
    """
    Each rank has other numbers of envs, rows, trajectories and micro-batches.

    :param case: what is trained
    :param folder: with the checkpoints :data:`STUDENT` and :data:`TEACHER`
    :param shard: whether weights are sharded
    :return: the model
    """
    more = ranks.rank()
    kwargs = {**COMMON, "policy_kwargs": {**ADAM, **TINY, "shard": shard}}
    if case == "openvla":
        policy_kwargs = {"checkpoint": str(folder / STUDENT), "shard": shard, "gradient_checkpointing": True}
        kwargs.update(policy_kwargs={**ADAM, **policy_kwargs}, micro_batch_size=2, batch_size=4)
        teacher_kwargs = {"n_eval_episodes": 0, "shard": shard}
        env = arms(folder / STUDENT, 1 + more)
        return OPD("VLAPolicy", env, str(folder / TEACHER), n_steps=3, teacher_kwargs=teacher_kwargs, **kwargs)
    if case == "sft":
        rng = np.random.default_rng(0)
        env = robots(1)
        data = Demonstrations(
            {"agentview": rng.integers(0, 256, (40, 32, 32, 3), np.uint8), "proprio": rng.random((40, 3), np.float32),
             "instruction": np.zeros((40, 16), np.uint8)},
            rng.integers(0, 256, (40, 16)), observation_space=env.observation_space, action_space=env.action_space,
        )  # fmt: skip
        kwargs.update(batch_size=4 + 3 * more, micro_batch_size=2, validation_fraction=0.2, validation_freq=1)
        return SFT("VLAPolicy", env, data, **kwargs)
    env = robots(1 + more)
    if case == "bfloat16":
        kwargs["policy_kwargs"]["dtype"] = "bfloat16"
        return OPD("VLAPolicy", env, **{**EXACT, **kwargs})
    if case == "exact":
        kwargs["policy_kwargs"]["optimizer_class"] = th.optim.SGD
        kwargs["policy_kwargs"]["optimizer_kwargs"] = {"momentum": 0.9}
        # Which is run, and gets no gradient
        kwargs["policy_kwargs"]["value_head"] = True
        return OPD("VLAPolicy", env, **{**EXACT, **kwargs, "batch_size": 9, "micro_batch_size": 4})
    if case == "sampled":
        return OPD("VLAPolicy", env, "expert", n_steps=8, estimator="sampled", batch_size=5, **kwargs)
    if case == "grpo":
        groups = {**GROUPS, "n_groups": 2 + more, "trajectories_per_batch": 4, "micro_batch_size": 7}
        groups["recompute_log_probs"] = True
        return GRPO("VLAPolicy", env, **{**groups, **kwargs})
    kwargs["policy_kwargs"]["value_head"] = True
    critic = {"n_steps": 8, "n_epochs": 2, "batch_size": 6, "micro_batch_size": 4, "ent_coef": 0.01}
    critic["recompute_log_probs"] = True
    return PPO("VLAPolicy", env, **critic, **kwargs)


# Which of a rollout's callbacks save
SAVES = {"exact": ("start", "step", "rollout", "end"), "openvla": ("step",), "sft": ("step", "end")}
# Of the minibatches of this rank
LOSSES: list[float] = []


def losses_kept() -> None:
    """Keep the losses that algorithms log."""
    record = PolicyAlgorithm._record_metrics

    def kept(model: PolicyAlgorithm, metrics: list[Any]) -> None:
        LOSSES.extend(m.loss for m in metrics)
        record(model, metrics)

    PolicyAlgorithm._record_metrics = kept  # type: ignore[method-assign]


class Watch(BaseCallback):
    """What a callback of the first rank may do alone: predict, save, write a checkpoint."""

    def __init__(self, folder: Path, saves: tuple[str, ...]):
        super().__init__()
        self.folder = folder
        self.saves = saves

    def _look(self, name: str) -> None:
        spaces_ = self.model.observation_space.spaces
        self.model.predict({key: np.zeros((1, *box.shape), box.dtype) for key, box in spaces_.items()})
        if name in self.saves:
            self.model.save(self.folder / f"{name}.zip")
            self.model.policy.save_checkpoint(self.folder / name)

    def _on_training_start(self) -> None:
        self._look("start")

    def _on_step(self) -> bool:
        if self.n_calls == 2:
            self._look("step")
        return True

    def _on_rollout_end(self) -> None:
        self._look("rollout")

    def _on_training_end(self) -> None:
        self._look("end")


def measured(model: Any) -> dict[str, int]:
    """
    :param model: one whose weights, if they are sharded, have just been updated
    :return: bytes of this rank's weights, of their gradients, and of the optimizer's state
    """

    def size(tensors: Iterable[Any]) -> int:
        # Gradients of a layer lie in one piece of memory
        own = [(x.to_local() if hasattr(x, "to_local") else x).untyped_storage() for x in tensors]
        return sum({storage.data_ptr(): storage.nbytes() for storage in own}.values())

    optimizer = model.policy.optimizer
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        "weights": size(trained),
        "gradients": size(p.grad for p in trained if p.grad is not None),
        "optimizer": size(x for p in trained for x in optimizer.state.get(p, {}).values() if x.ndim),
    }


def compare(case: str, folder: Path) -> None:
    """Two learn() of one model, with whole and with sharded weights, and one of what it has saved."""
    found: dict[bool, Any] = {}
    for shard in (False, True):
        LOSSES.clear()
        out = folder / f"{case}_{shard}"
        model = make(case, folder, shard)
        total = {"sft": 2, "grpo": 20, "openvla": 6}.get(case, 12)
        memory: dict[str, int] = {}
        hook = model.policy.optimizer.register_step_post_hook(lambda *_: memory.update(measured(model)))  # noqa: B023
        model.learn(total, callback=Watch(out, SAVES.get(case, ())))
        hook.remove()
        weights = [parameters(model).clone()]
        if case in SAVES:
            model.learn(total, reset_num_timesteps=False)
            weights.append(parameters(model).clone())
        assert model.policy.sharding is None
        if case == "exact":
            again = type(model).load(out / "end.zip", env=robots(1 + ranks.rank()), device="cpu")
            again.learn(total)
            weights.append(parameters(again).clone())
        if case in SAVES:
            model.save(out / "after")
        found[shard] = {"weights": weights, "losses": list(LOSSES), "steps": model._n_updates, "memory": memory}
    th.save(found, folder / f"{case}{ranks.rank()}.pt")


def broken(folder: Path) -> None:
    """The training ends with an error, and nobody waits for the other ranks any more."""
    model = make("exact", folder, shard=True)

    def fails() -> float:
        model._keep_pace()
        raise ZeroDivisionError

    model._gradient_step = fails
    told = []
    for attempt in (lambda: model.learn(12), lambda: model.save(folder / "broken"), lambda: model.learn(12)):
        try:
            attempt()
        except (ZeroDivisionError, RuntimeError) as error:
            told.append(repr(error))
    (folder / f"broken{ranks.rank()}").write_text("\n".join(told))


if __name__ == "__main__":
    out = Path(sys.argv[1])
    losses_kept()
    for name in sys.argv[2:]:
        broken(out) if name == "broken" else compare(name, out)
