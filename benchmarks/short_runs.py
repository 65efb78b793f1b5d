"""
What do short runs of OPD do to their student? Two tasks of LIBERO-Object, the zoo's student and teacher, 512 decisions.

::

    python benchmarks/short_runs.py student --decisions 0
    python benchmarks/short_runs.py more_steps
    python benchmarks/short_runs.py fewer_steps --n-steps 128

Each writes the 30 held-out episodes after it to ``benchmarks/results/short_runs/NAME.json``. One seed.
"""

from __future__ import annotations

import os
from pathlib import Path

# Before PyTorch: the same rounding on any machine of one kind
os.environ.setdefault("OMP_NUM_THREADS", "1")

import tyro
from stable_baselines3.common.utils import LinearSchedule

from opd_gym import OPD, make_vec
from opd_gym.evaluation import eval_episodes, evaluate_success

RESULTS = Path(__file__).resolve().parent / "results" / "short_runs"
TASKS = (0, 1)


def main(
    name: tyro.conf.Positional[str],
    decisions: int = 512,
    n_steps: int = 64,
    temperature: float = 0.3,
    learning_rate: float = 1e-3,
    episodes: int = 15,
    output: Path = RESULTS,
) -> None:
    """
    :param name: of the file
    :param decisions: to train on; 0 evaluates the student as it is
    :param n_steps: decisions of each of two envs between 40 gradient steps
    :param temperature: of the student's actions while it trains
    :param learning_rate: from which it falls to 0
    :param episodes: held-out episodes of each task
    :param output: folder of the results
    """
    env_kwargs = {"task_ids": TASKS, "visuals": "light", "image_size": 64, "horizon": 160}
    env = make_vec("LiberoObject-v0", n_envs=2, n_workers=1, seed=0, env_kwargs=env_kwargs)
    model = OPD(
        "VLAPolicy",
        env,
        teacher="libero-object-teacher",
        policy_kwargs={"checkpoint": "libero-object-student"},
        learning_rate=LinearSchedule(learning_rate, 0.0, 1.0),
        n_steps=n_steps,
        gradient_steps=40,
        temperature=temperature,
        augmentation="random_shift_batch",
        seed=0,
    )
    if decisions:
        model.learn(decisions)
    result = evaluate_success(model, env, eval_episodes(TASKS, episodes), progress=False)
    env.close()
    output.mkdir(parents=True, exist_ok=True)
    result.save(output / f"{name}.json")
    print(f"{name}: {model.num_timesteps} decisions, {model._n_updates} gradient steps, {result}")


if __name__ == "__main__":
    tyro.cli(main)
