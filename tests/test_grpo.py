import csv

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize
from toys import TINY_BODY, Match, Robot, parameters, vec

from opd_gym.algorithms.grpo import GRPO
from opd_gym.envs.make import make_vec
from opd_gym.envs.wrappers import ActionChunk, ActionTokens, EpisodeControl

SMALL = dict(group_size=4, n_groups=2, learning_rate=1e-3, device="cpu", seed=0)


def watch(starts):
    """Callback that notes the first observation of every episode, by group."""

    def look(locals_, globals_):
        algorithm = locals_["self"]
        for worker, first in enumerate(algorithm._last_episode_starts):
            if first and algorithm._episodes.playing[worker] is not None:
                starts.setdefault(algorithm._episodes.playing[worker].group, []).append(
                    tuple(algorithm._last_obs[worker])
                )
        return True

    return look


class Steps(gym.Env):
    """Episodes of so many steps of reward 1, which show one number."""

    observation_space = spaces.Box(-1e3, 1e3, (1,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, length, number=1.0):
        self.length, self.number = length, number

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.full(1, self.number, np.float32), {}

    def step(self, action):
        self.t += 1
        return np.full(1, self.number, np.float32), 1.0, self.t >= self.length, False, {}


def test_outcomes_are_the_rewards_of_the_env():
    """A VecNormalize scales them by a moving deviation: equal returns would not be equal any more."""
    env = VecNormalize(DummyVecEnv([lambda: EpisodeControl(Steps(5))] * 2))
    model = GRPO("MlpPolicy", env, **SMALL)
    model.learn(1)
    buffer = model.rollout_buffer
    rows = buffer.valid_rows()
    assert set(buffer.rewards[rows].tolist()) == {1.0} and len(rows) == 40
    assert model._n_updates == 0 and not model._trajectories


def test_envs_that_stand_still_show_a_vec_normalize_nothing():
    lengths = {100.0: 2, 0.0: 50}
    env = VecNormalize(DummyVecEnv([lambda x=x, n=n: EpisodeControl(Steps(n, x)) for x, n in lengths.items()]))
    GRPO("MlpPolicy", env, **{**SMALL, "group_size": 2, "n_groups": 1}, dynamic_sampling=None).learn(1)
    # A reset and the steps of one episode each; VecNormalize begins with a count of 1e-4
    assert env.obs_rms.count == pytest.approx(54, abs=0.01)
    assert env.obs_rms.mean.item() == pytest.approx(300 / 54, rel=1e-3) and env.training


def test_entropy_is_that_of_the_policy_itself(tmp_path):
    """At temperature 1, whatever it samples at: comparable with other settings and algorithms."""
    logged = []
    for temperature in (1.0, 0.2):
        kwargs = {**SMALL, "learning_rate": 0.0, "dynamic_sampling": None, "temperature": temperature}
        model = GRPO("MlpPolicy", vec(2, env="CartPole-v1"), **kwargs)
        with th.no_grad():
            model.policy.action_net.weight.zero_()
            model.policy.action_net.bias.copy_(th.tensor([1.0, 0.0]))
        model.set_logger(configure(str(tmp_path / str(temperature)), ["csv"]))
        model.learn(1)
        with (tmp_path / str(temperature) / "progress.csv").open() as file:
            logged += [float(row["train/entropy"]) for row in csv.DictReader(file) if row["train/entropy"]]
    p = 1 / (1 + np.exp(-1.0))
    assert logged == pytest.approx([-p * np.log(p) - (1 - p) * np.log(1 - p)] * 2, abs=1e-4)


@pytest.mark.parametrize("n_envs", [1, 3, 10])
def test_plays_complete_groups_only(n_envs):
    model = GRPO("MlpPolicy", vec(n_envs, env="CartPole-v1"), **SMALL)
    starts: dict[int, list] = {}
    model.learn(1, callback=watch(starts))
    model.learn(1, callback=watch(starts), reset_num_timesteps=False)
    assert sorted(starts) == [0, 1, 2, 3]
    assert all(len(group) == 4 and len(set(group)) == 1 for group in starts.values())
    assert len({group[0] for group in starts.values()}) == 4
    buffer = model.rollout_buffer
    rows = buffer.valid_rows()
    assert len(np.unique(buffer.episode_ids[rows])) == 8
    assert buffer.episode_starts[rows].sum() == 8
    # Decisions of workers that stood still are neither counted nor learned from
    assert len(rows) <= model.num_timesteps
    lengths = {int(i): int((buffer.episode_ids[rows] == i).sum()) for i in np.unique(buffer.episode_ids[rows])}
    assert len(set(lengths.values())) > 1


def test_envs_that_stand_still_do_not_go_through_the_policy():
    model = GRPO("MlpPolicy", vec(10, env="CartPole-v1"), **SMALL)
    seen, sampled = [], model.policy.get_distribution
    model.policy.get_distribution = lambda obs: (seen.append(len(obs)), sampled(obs))[1]
    model.learn(1)
    buffer = model.rollout_buffer
    plays = buffer.token_mask.any(axis=1)
    seen = seen[: buffer.buffer_size]  # what follows are updates
    # Two of ten envs have no episode from the beginning, the others stop one by one
    assert seen[0] == 8 and sorted(seen, reverse=True) == seen and sum(seen) == plays.sum()
    assert not buffer.actions[~plays].any() and not buffer.token_log_probs[~plays].any()


def test_advantages_and_dynamic_sampling(tmp_path):
    model = GRPO("MlpPolicy", vec(2, horizon=1), **{**SMALL, "n_groups": 6})
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn(1)
    buffer = model.rollout_buffer
    groups, advantages, successes = buffer.group_ids, buffer.advantages, buffer.successes
    kept = 0
    for group in range(6):
        rows = (groups == group) & buffer.token_mask.any(axis=1)
        outcomes = successes[rows]
        assert len(outcomes) == 4
        expected = (outcomes - outcomes.mean()) / (outcomes.std(ddof=1) + 1e-6)
        assert np.allclose(advantages[rows], expected, atol=1e-5)
        kept += 0.1 <= outcomes.mean() <= 0.9
    assert len(model._trajectories) == 4 * kept


def test_no_update_when_every_group_is_dropped(capsys):
    class Hopeless(Match):
        def step(self, action):
            *rest, info = super().step(action)
            return *rest, {**info, "is_success": False}

    model = GRPO("MlpPolicy", vec(2, env=Hopeless), verbose=1, **SMALL)
    before = parameters(model)
    model.learn(16)
    assert th.equal(before, parameters(model)) and model._n_updates == 0
    assert "all 2 groups were dropped" in capsys.readouterr().out


def test_returns_are_the_outcome_where_success_is_unknown():
    model = GRPO("MlpPolicy", vec(2, env="CartPole-v1"), **SMALL).learn(1)
    buffer = model.rollout_buffer
    assert np.isnan(buffer.successes).all()
    trajectory = model._trajectories[0]
    members = [t for t in model._trajectories if buffer.group_ids[t[0]] == buffer.group_ids[trajectory[0]]]
    returns = np.array([len(t) for t in members], dtype=float)
    expected = (len(trajectory) - returns.mean()) / (returns.std(ddof=1) + 1e-6)
    assert np.allclose(buffer.advantages[trajectory], expected, atol=1e-5)


@pytest.mark.parametrize("workers", [False, True])
@pytest.mark.parametrize("interrupt", [False, True])
def test_a_run_that_is_stopped_leaves_its_envs_to_others(interrupt, workers):
    """Some were told to stand still after their episode; Stable-Baselines3's evaluate_policy would wait for ever."""

    class Stop(BaseCallback):
        def _on_step(self):
            if interrupt and self.num_timesteps >= 6:
                raise KeyboardInterrupt
            return self.num_timesteps < 6

    env = make_vec("CartPole-v1", 2, n_workers=2) if workers else vec(2, env="CartPole-v1")
    model = GRPO("MlpPolicy", env, **{**SMALL, "group_size": 2, "n_groups": 1}, temperature=1.0)
    try:
        if interrupt:
            with pytest.raises(KeyboardInterrupt):
                model.learn(1000, callback=Stop())
        else:
            model.learn(1000, callback=Stop())
        rewards, _ = evaluate_policy(model, env, 4, warn=False, return_episode_rewards=True)
        assert len(rewards) == 4
        env.seed(7)
        env.reset()
        ended = sum(env.step(np.ones(2, dtype=np.int64))[2].astype(int) for _ in range(30))
        assert (ended > 0).all()
        model.learn(1)
    finally:
        env.close()


def test_an_evaluation_in_envs_that_stand_still_does_not_wait_for_ever(monkeypatch):
    monkeypatch.setattr("opd_gym.envs.wrappers.MAX_STEPS_FROZEN", 100)

    class Evaluate(BaseCallback):
        def _on_step(self):
            evaluate_policy(self.model, self.model.get_env(), 1, warn=False)
            return True

    # One episode for each env: all are to stand still afterwards
    model = GRPO("MlpPolicy", vec(4), group_size=4, n_groups=1, seed=0, device="cpu")
    with pytest.raises(RuntimeError, match=r"stood still for 100 steps.*env of its own"):
        model.learn(64, callback=Evaluate())


def test_a_schedule_of_the_clip_range_is_refused():
    with pytest.raises(ValueError, match="clip_range of GRPO is a number and no schedule"):
        GRPO("MlpPolicy", vec(2), clip_range=lambda progress: 0.2 * progress, device="cpu")


def test_another_env_has_to_be_one_whose_episodes_can_be_chosen():
    model = GRPO("MlpPolicy", vec(2), group_size=2, n_groups=2, seed=0, device="cpu")
    with pytest.raises(ValueError, match="EpisodeControl"):
        model.set_env(DummyVecEnv([Match] * 2))
    assert model.learn(8).num_timesteps >= 8, "the one that it had"


def test_envs_that_lose_every_episode_end_the_run():
    class Lost(Match):
        def step(self, action):
            obs, reward, *_ = super().step(action)
            return obs, reward, False, True, {"episode_lost": True}

    model = GRPO("MlpPolicy", vec(2, env=Lost), **SMALL)
    with pytest.raises(RuntimeError, match="all episodes of 10 iterations in a row were lost"):
        model.learn(1000)


class TellsOfSuccessAlone(gym.Env):
    """Action 1 solves it, and has the lower reward."""

    observation_space, action_space = spaces.Box(-1, 1, (1,), np.float32), spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        solved = action == 1
        return np.zeros(1, np.float32), -1.0 if solved else -0.1, True, False, {"is_success": True} if solved else {}


def test_episodes_that_say_nothing_failed_where_others_succeeded():
    model = GRPO(
        "MlpPolicy", TellsOfSuccessAlone(), group_size=8, n_groups=4, learning_rate=1e-2, temperature=1.0, seed=0,
        device="cpu",
    )  # fmt: skip
    with pytest.warns(UserWarning, match="count as failed. Set info") as warned:
        model.learn(600)
    assert len([w for w in warned if "count as failed" in str(w.message)]) == 1
    assert float(model.policy.get_distribution(th.zeros(1, 1)).distribution.probs[0, 1]) > 0.9


def test_learns_a_sparse_task():
    model = GRPO("MlpPolicy", vec(8, horizon=1), group_size=8, n_groups=16, learning_rate=2e-2, temperature=1.0, seed=0)
    model.learn(128)
    before = np.mean(model.ep_success_buffer)
    model.learn(5000)
    assert before < 0.5
    assert np.mean(model.ep_success_buffer) > 0.75


def test_improves_cartpole():
    model = GRPO(
        "MlpPolicy",
        "CartPole-v1",
        n_groups=4,
        learning_rate=5e-3,
        temperature=1.0,
        trajectories_per_batch=16,
        n_epochs=4,
        seed=0,
        device="cpu",
    )
    model.learn(1)
    before = np.mean([info["r"] for info in model.ep_info_buffer])
    model.learn(6000)
    assert np.mean([info["r"] for info in list(model.ep_info_buffer)[-32:]]) > 1.5 * before


def test_micro_batches_do_not_change_the_update():
    runs = [
        parameters(GRPO("MlpPolicy", vec(2, env="CartPole-v1"), micro_batch_size=size, **SMALL).learn(1))
        for size in (7, 10_000)
    ]
    assert th.allclose(*runs, atol=1e-6)


def test_first_ratio_is_one_at_any_temperature(tmp_path):
    model = GRPO("MlpPolicy", vec(2, env="CartPole-v1"), **SMALL)
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn(1)
    log = np.genfromtxt(tmp_path / "progress.csv", delimiter=",", names=True)
    assert abs(log["trainapprox_kl"][-1]) < 1e-6 and log["trainclip_fraction"][-1] == 0.0


def test_same_seed_same_run_and_resume(tmp_path):
    first, second = (GRPO("MlpPolicy", vec(3, env="CartPole-v1"), **SMALL).learn(300) for _ in range(2))
    assert th.equal(parameters(first), parameters(second))
    first.save(tmp_path / "model")
    loaded = GRPO.load(tmp_path / "model", env=vec(2, env="CartPole-v1"))
    assert th.equal(parameters(first), parameters(loaded))
    steps = loaded.num_timesteps
    starts: dict[int, list] = {}
    assert loaded.learn(1, reset_num_timesteps=False, callback=watch(starts)).num_timesteps > steps
    # New groups, not those of the first run again
    assert min(starts) == first._first_group


def test_workers_in_processes():
    """Episodes of unequal length from one queue: who plays which, and what is learned, is the same in any process."""
    runs = []
    for cls in (DummyVecEnv, SubprocVecEnv):
        env = cls([lambda: EpisodeControl(Match(horizon=2)), lambda: EpisodeControl(Match(horizon=5))])
        starts: dict[int, list] = {}
        try:
            model = GRPO("MlpPolicy", env, **{**SMALL, "dynamic_sampling": None}).learn(30, callback=watch(starts))
        finally:
            env.close()
        runs.append((model, starts))
    (here, starts_here), (there, starts) = runs
    # Whole groups, each from one state of its own
    assert len(starts) >= 4 and starts == starts_here
    assert all(len(group) == 4 and len(set(group)) == 1 for group in starts.values())
    assert len({group[0] for group in starts.values()}) == len(starts)
    buffer = there.rollout_buffer
    rows = buffer.valid_rows()
    lengths = [int((buffer.episode_ids[rows] == i).sum()) for i in np.unique(buffer.episode_ids[rows])]
    # Nobody waits: the worker of short episodes plays more of them
    assert set(lengths) == {2, 5} and len(lengths) == 8 and lengths.count(2) > lengths.count(5)
    for name in ("observations", "actions", "rewards", "successes", "advantages", "group_ids", "episode_ids"):
        np.testing.assert_array_equal(getattr(here.rollout_buffer, name), getattr(buffer, name), err_msg=name)
    assert here._n_updates == there._n_updates > 0
    assert th.equal(parameters(here), parameters(there))


def test_vla_policy():
    env = ActionTokens(ActionChunk(Robot(), 4))
    model = GRPO("VLAPolicy", env, policy_kwargs=dict(body_kwargs=TINY_BODY), **{**SMALL, "dynamic_sampling": None})
    before = parameters(model)
    model.learn(1)
    # 10 steps in chunks of 4: the last one executes 2 actions of 2 dimensions
    assert model.rollout_buffer.token_mask.sum(axis=1).tolist() == [8, 8, 4] * 8
    assert model.num_env_steps == 80
    assert not th.equal(before, parameters(model))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(group_size=1), "group_size must be at least 2"),
        (dict(dynamic_sampling=(0.9, 0.1)), "dynamic_sampling"),
        (dict(n_groups=0), "n_groups must be at least 1"),
    ],
)
def test_bad_arguments_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        GRPO("MlpPolicy", "CartPole-v1", **kwargs)


def test_needs_episode_control():
    with pytest.raises(ValueError, match="EpisodeControl"):
        GRPO("MlpPolicy", vec(control=False))


def test_what_an_interrupted_iteration_left_is_not_played_later():
    model = GRPO("MlpPolicy", vec(2), group_size=4, n_groups=3, temperature=1.0, seed=0)

    class Stop(BaseCallback):
        def _on_step(self):
            return self.n_calls < 5

    model.learn(1, callback=Stop())
    assert len(model._queue) > 0
    model.learn(1)
    rows = model.rollout_buffer.valid_rows()
    groups = model.rollout_buffer.group_ids[rows]
    episodes = model.rollout_buffer.episode_ids[rows]
    assert [len(np.unique(episodes[groups == g])) for g in np.unique(groups)] == [4, 4, 4]
