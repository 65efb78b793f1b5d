import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.wrappers import ClipAction, FrameStackObservation, RescaleAction, TimeLimit, TransformObservation
from stable_baselines3.common.vec_env import DummyVecEnv

from opd_gym.actions import bin_centers, decode_tokens, encode_actions
from opd_gym.envs.wrappers import ActionChunk, ActionTokens, EpisodeControl


class Line(gym.Env):
    """A point on a line: the first action dimension moves it, at 1 it has arrived. Remembers what was asked of it."""

    observation_space = spaces.Box(-10.0, 10.0, (1,), np.float32)
    action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
    can_skip_observations = True

    def __init__(self):
        self.observe = True
        self.observed: list[bool] = []
        self.seeds: list[int | None] = []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seeds.append(seed)
        self.x = float((options or {}).get("x", self.np_random.uniform(-1.0, 0.0)))
        return self._obs(), {}

    def _obs(self):
        return np.array([self.x], dtype=np.float32)

    def step(self, action):
        self.observed.append(self.observe)
        self.x += float(action[0])
        return self._obs(), 1.0, self.x >= 1.0, False, {}

    def expert_chunk(self, chunk_size):
        return np.tile(np.array([0.5, 0.0], dtype=np.float32), (chunk_size, 1))


def test_bins_are_openvlas():
    centers = bin_centers(256)
    assert len(centers) == 255
    np.testing.assert_allclose(centers[[0, 1, 254]], [-1 + 1 / 255, -1 + 3 / 255, 1 - 1 / 255], atol=1e-12)
    assert centers[127] == 0.0  # exactly, or a "zero" rotation would re-anchor the controller
    # np.digitize over the 256 edges: 1.0 falls on the last edge, token 255, which shares the centre of 254.
    assert encode_actions(np.array([-1.0, -0.999, 0.0, 0.004, 1.0, 5.0])).tolist() == [0, 0, 127, 128, 255, 255]
    assert decode_tokens(np.array([254]))[0] == decode_tokens(np.array([255]))[0]


def test_tokens_round_trip_and_statistics():
    x = np.random.default_rng(0).uniform(-1, 1, (50, 3))
    assert np.abs(decode_tokens(encode_actions(x)) - x).max() <= 1 / 255 + 1e-6
    assert (encode_actions(decode_tokens(np.arange(255)[:, None])) == np.arange(255)[:, None]).all()
    statistics = {"q01": [0.0, -2.0, 0.0], "q99": [10.0, 2.0, 1.0], "mask": [True, True, False]}
    # By hand: token 127 is 0, the middle of [0, 10] and of [-2, 2]; the masked dimension passes through.
    np.testing.assert_allclose(decode_tokens(np.array([127, 127, 127]), statistics), [5.0, 0.0, 0.0], atol=1e-6)
    y = np.array([2.0, -1.5, 0.25])
    np.testing.assert_allclose(decode_tokens(encode_actions(y, statistics), statistics), y, atol=10 / 255)
    with pytest.raises(ValueError, match="shape"):
        encode_actions(np.zeros(4), statistics)


def test_what_is_no_action_becomes_no_token():
    for value in (np.nan, np.inf, -np.inf):
        with pytest.raises(ValueError, match=f"finite numbers to become tokens, got {value}"):
            encode_actions(np.array([[0.0, value]]))
        with pytest.raises(ValueError, match="finite"):
            ActionTokens(ActionChunk(Line(), 3)).encode(np.full((3, 2), value))
    for token in (-1, 256):
        with pytest.raises(ValueError, match=f"from 0 to 255, got .*{token}"):
            decode_tokens(np.array([0, token]))


def test_chunk_ends_with_the_episode():
    env = ActionChunk(Line(), 4)
    env.reset(seed=0, options={"x": 0.0})
    obs, reward, terminated, _, info = env.step(np.full((4, 2), 0.5, dtype=np.float32))
    assert (obs[0], reward, terminated, info["n_executed"]) == (1.0, 2.0, True, 2)
    # Of continuous chunks too, which no ActionTokens lies around
    assert info["n_executed_tokens"] == 4
    env.reset(options={"x": 0.0})
    env.unwrapped.observed.clear()
    _, reward, terminated, _, info = env.step(np.zeros((4, 2), dtype=np.float32))
    assert (reward, terminated, info["n_executed"]) == (4.0, False, 4)
    assert env.unwrapped.observed == [False, False, False, True] and env.unwrapped.observe
    with pytest.raises(ValueError, match=r"\(4, 2\)"):
        env.step(np.zeros(2))


class Halfway(gym.Wrapper):
    """Ends an episode by itself."""

    def step(self, action):
        obs, reward, _, truncated, info = self.env.step(action)
        return obs, reward, bool(obs[0] >= 0.5), truncated, info


@pytest.mark.parametrize(
    ("wrap", "observed"),
    [
        (lambda env: TimeLimit(env, 6), "...x" ".x"),
        (lambda env: TimeLimit(RescaleAction(env, -2.0, 2.0), 6), "...x" ".x"),
        (lambda env: TransformObservation(env, lambda obs: obs + 1, env.observation_space), "...x" "...x"),
        (Halfway, "xxxx" "xxxx"),
        (lambda env: FrameStackObservation(env, 2), "xxxx" "xxxx"),
    ],
)  # fmt: skip
def test_the_last_state_of_an_episode_is_always_observed(wrap, observed):
    """Whatever ends the episode inside the chunk, and what looks at every step, sees every step that it needs."""
    env = ActionChunk(wrap(Line()), 4)
    env.reset(options={"x": 0.0})
    for _ in range(2):
        env.step(np.zeros((4, 2), dtype=np.float32))
    assert "".join(".x"[seen] for seen in env.unwrapped.observed) == observed and env.unwrapped.observe is True


def test_an_attribute_named_observe_of_somebody_elses_env_is_left_alone():
    class Theirs(Line):
        can_skip_observations = False

        def __init__(self):
            super().__init__()
            self.observe = self.look

        def look(self):
            return "a method"

    env = ActionChunk(Theirs(), 2)
    env.reset()
    env.step(np.zeros((2, 2), dtype=np.float32))
    assert env.unwrapped.observe() == "a method"


class Negated(gym.ActionWrapper):
    def action(self, action):
        return -action


class Undoable(Negated):
    def reverse_action(self, action):
        assert np.shape(action) == (2,)
        return -action


class Strong(Line):
    """Remembers what it executed; its actions are in [-2, 2] and [-6, 6]."""

    action_space = spaces.Box(np.array([-2.0, -6.0], np.float32), np.array([2.0, 6.0], np.float32))
    executed: list[np.ndarray]

    def reset(self, *, seed=None, options=None):
        self.executed = []
        return super().reset(seed=seed, options=options)

    def step(self, action):
        self.executed.append(np.array(action))
        return super().step(action)

    def expert_action(self):
        return np.array([-1.5, 4.0], dtype=np.float32)

    def expert_chunk(self, chunk_size):
        return np.tile(self.expert_action(), (chunk_size, 1))


def scaled(env):
    return RescaleAction(env, -1.0, 1.0)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda env: ActionTokens(ActionChunk(scaled(env), 2)),
        lambda env: ActionTokens(ActionChunk(scaled(Undoable(env)), 2)),
        lambda env: ActionTokens(ActionChunk(TimeLimit(scaled(env), 9), 2)),
        lambda env: EpisodeControl(ClipAction(env)),
        lambda env: ActionTokens(scaled(env)),
        lambda env: EpisodeControl(scaled(Undoable(env))),
        lambda env: EpisodeControl(ActionTokens(scaled(ActionChunk(env, 2)))),
    ],
)  # fmt: skip
def test_the_experts_own_label_executes_the_experts_action(wrap):
    env = wrap(Strong())
    env.reset(seed=0)
    assert env.get_wrapper_attr("has_expert")
    env.step(env.expert_action())
    for executed in env.unwrapped.executed:
        np.testing.assert_allclose(executed, [-1.5, 4.0], atol=4 / 255)


def test_a_wrapper_that_says_not_how_to_undo_it_is_refused():
    env = EpisodeControl(Negated(Strong()))
    for ask in (lambda: env.has_expert, env.expert_action):
        with pytest.raises(ValueError, match="Negated changes actions.*reverse_action"):
            ask()
    # An env without an expert has none, whatever stands around it
    assert not EpisodeControl(Negated(gym.make("Pendulum-v1"))).has_expert


class Native(gym.Env):
    """Carries out chunks by itself, and says nothing of how many actions it took."""

    observation_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
    action_space = spaces.Box(-1.0, 1.0, (3, 2), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        assert action.shape == (3, 2)
        return np.zeros(1, np.float32), 0.0, False, False, {"n_executed": 2} if action[0, 0] > 0 else {}


def test_all_tokens_of_a_native_chunk_count():
    env = ActionTokens(Native())
    env.reset()
    assert env.step(np.zeros(6, dtype=np.int64))[4]["n_executed_tokens"] == 6
    assert env.step(np.full(6, 200))[4]["n_executed_tokens"] == 4, "two of three actions, as it says"


def test_tokens_of_a_chunk():
    env = ActionTokens(ActionChunk(Line(), 3))
    assert env.action_space == spaces.MultiDiscrete([256] * 6)
    env.reset(options={"x": 0.0})
    tokens = env.encode(np.array([[0.6, 0.0]] * 3))
    assert tokens.shape == (6,)
    assert env.encode(np.zeros((5, 3, 2))).shape == (5, 6) and env.decode(np.zeros((5, 6))).shape == (5, 3, 2)
    _, _, terminated, _, info = env.step(tokens)
    assert terminated and info["n_executed_tokens"] == 4  # two of three actions ran, two dimensions each
    np.testing.assert_array_equal(env.expert_action(), env.encode(np.array([[0.5, 0.0]] * 3)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ActionChunk(gym.make("CartPole-v1")), "Box"),
        (lambda: ActionChunk(Line(), 0), "at least 1"),
        (lambda: ActionTokens(gym.make("CartPole-v1")), "Box"),
        (lambda: ActionTokens(gym.make("Pendulum-v1")), "RescaleAction"),
        (lambda: ActionTokens(Line(), statistics={"q01": [0.0], "q99": [1.0]}), "shape"),
        (lambda: ActionTokens(Line(), n_bins=2), "at least 3"),
    ],
)
def test_wrong_spaces_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_episode_control_chooses_episodes_and_freezes():
    vec = DummyVecEnv([lambda: EpisodeControl(Line())] * 2)
    vec.env_method("set_next_reset", seed=7, options={"x": 0.5}, tag="a", indices=[0])
    obs = vec.reset()
    assert obs[0, 0] == 0.5 and vec.reset_infos[0]["episode_tag"] == "a" and vec.reset_infos[1]["episode_tag"] is None
    assert vec.envs[0].unwrapped.seeds == [7]
    # Announced during the episode, used by the automatic reset at its end.
    vec.env_method("set_next_reset", options={"x": -0.25}, tag="b", indices=[0])
    obs, _, dones, infos = vec.step([np.array([1.0, 0.0]), np.zeros(2)])
    assert dones.tolist() == [True, False] and infos[0]["episode_tag"] == "a" and obs[0, 0] == -0.25
    vec.env_method("set_next_reset", frozen=True, indices=[0])
    vec.step([np.array([1.0, 0.0])] * 2)
    obs, rewards, dones, infos = vec.step([np.array([1.0, 0.0])] * 2)
    n_steps = len(vec.envs[0].unwrapped.observed)
    assert dones.tolist()[0] is True and infos[0]["episode_tag"] == "b"
    frozen_obs = vec.step([np.array([1.0, 0.0])] * 2)
    assert frozen_obs[3][0]["frozen"] and frozen_obs[1][0] == 0.0 and not frozen_obs[2][0]
    assert len(vec.envs[0].unwrapped.observed) == n_steps
    np.testing.assert_array_equal(frozen_obs[0][0], obs[0])
    vec.env_method("set_next_reset", options={"x": 0.0}, tag="c", indices=[0])
    (thawed,) = vec.env_method("thaw", indices=[0])
    assert thawed[0][0] == 0.0 and thawed[1]["episode_tag"] == "c"
    obs, _, _, infos = vec.step([np.array([0.25, 0.0])] * 2)
    assert obs[0, 0] == 0.25 and infos[0]["episode_tag"] == "c"


def test_untouched_episode_control_changes_nothing():
    plain, controlled = Line(), EpisodeControl(Line())
    for env in (plain, controlled):
        env.action_space.seed(0)
    assert plain.reset(seed=3)[0] == controlled.reset(seed=3)[0]
    for _ in range(5):
        action = plain.action_space.sample()
        a, b = plain.step(action), controlled.step(action)
        assert a[0] == b[0] and a[1:4] == b[1:4]
