import numpy as np
import pytest
import torch as th
from gymnasium import spaces

from opd_gym.algorithms.buffers import StateReplay, TeacherRolloutBuffer, random_shift
from opd_gym.tokens import token_spec

DICT = spaces.Dict({"a": spaces.Box(0, 255, (3, 4, 4), np.uint8), "b": spaces.Box(-1, 1, (2,), np.float32)})
PLAIN = spaces.Box(-1, 1, (2,), np.float32)
ACTIONS = spaces.MultiDiscrete([4, 4, 4])


def observe(space, n, value):
    if isinstance(space, spaces.Dict):
        return {"a": np.full((n, 3, 4, 4), value, np.uint8), "b": np.full((n, 2), value, np.float32)}
    return np.full((n, 2), value, np.float32)


def fill(buffer, n_steps, space, n_envs=2):
    for step in range(n_steps):
        mask = np.ones((n_envs, 3), np.float32)
        mask[1] = 0.0 if step >= 2 else 1.0
        buffer.add(
            observe(space, n_envs, step),
            np.full((n_envs, 3), step % 4),
            np.array([1.0, step]),
            np.array([step == 0, step == 0]),
            th.zeros(n_envs, 1),
            th.full((n_envs, 3), -float(step)),
            mask,
            group_id=np.array([0, 1]),
            episode_id=np.array([0, 1]),
            success=np.array([np.nan, 1.0]),
        )


@pytest.mark.parametrize("space", [PLAIN, DICT], ids=["plain", "dict"])
def test_grows_cuts_and_flattens_env_by_env(space):
    buffer = TeacherRolloutBuffer(2, space, ACTIONS, device="cpu", n_envs=2, store_distribution=True)
    for _ in range(2):
        buffer.reset()
        fill(buffer, 5, space)
        buffer.finish()
        assert buffer.buffer_size == 5
        assert buffer.token_log_probs.shape == (10, 3)
        assert buffer.token_log_probs[:, 0].tolist() == [-0.0, -1, -2, -3, -4] * 2
        assert buffer.episode_ids.tolist() == [0] * 5 + [1] * 5
        # The second env stood still from its third step on
        assert buffer.valid_rows().tolist() == [0, 1, 2, 3, 4, 5, 6]
        rows = np.array([1, 6])
        buffer.set_teacher(rows, th.full((2, 3), -2.0), th.zeros(2, 12))
        samples = list(buffer.get(4))
        assert [len(s.rows) for s in samples] == [4, 3]
        assert sorted(np.concatenate([s.rows for s in samples]).tolist()) == buffer.valid_rows().tolist()
        (sample,) = buffer.get(rows=rows)
        assert sample.teacher_log_probs.tolist() == [[-2.0] * 3] * 2
        assert sample.teacher_distribution.shape == (2, 12) and sample.teacher_distribution.dtype == th.float16
        assert sample.old_log_prob.tolist() == [-3.0, -3.0]
        observations = sample.observations["b"] if isinstance(space, spaces.Dict) else sample.observations
        assert observations.tolist() == [[1.0, 1.0]] * 2
        if isinstance(space, spaces.Dict):
            assert sample.observations["a"].dtype == th.uint8


def test_advantages_are_those_of_stable_baselines3():
    from stable_baselines3.common.buffers import RolloutBuffer

    rng = np.random.default_rng(0)
    ours = TeacherRolloutBuffer(6, PLAIN, ACTIONS, device="cpu", n_envs=2, gamma=0.9, gae_lambda=0.8)
    theirs = RolloutBuffer(6, PLAIN, ACTIONS, device="cpu", n_envs=2, gamma=0.9, gae_lambda=0.8)
    for _ in range(6):
        rewards, values, starts = rng.normal(size=2), th.as_tensor(rng.normal(size=(2, 1))), rng.random(2) < 0.3
        obs, action = observe(PLAIN, 2, 0), np.zeros((2, 3))
        theirs.add(obs, action, rewards, starts, values, th.zeros(2))
        ids = np.zeros(2)
        ours.add(obs, action, rewards, starts, values, th.zeros(2, 3), np.ones((2, 3)), ids, ids, ids)
    last, dones = th.ones(2, 1), np.array([True, False])
    theirs.compute_returns_and_advantage(last, dones)
    ours.finish(last, dones)
    assert np.allclose(ours.advantages, theirs.swap_and_flatten(theirs.advantages).flatten())
    assert np.allclose(ours.returns, theirs.swap_and_flatten(theirs.returns).flatten())


@pytest.mark.parametrize("space", [PLAIN, DICT], ids=["plain", "dict"])
def test_state_replay_is_a_bounded_ring(space, tmp_path):
    spec = token_spec(ACTIONS)
    replay = StateReplay(1500, space, spec, "cpu")

    def add(replay, value, n):
        replay.add(observe(space, n, value), np.full((n, 12), -1.5), np.ones((n, 3)))

    for value, n in ((1, 1000), (2, 400), (3, 300)):
        add(replay, value, n)
    assert replay.size == 1500 and len(replay.masks) == 1500
    values = replay.observations["b"] if isinstance(space, spaces.Dict) else replay.observations
    assert np.bincount(values[:, 0].astype(int)).tolist() == [0, 800, 400, 300]
    observations, distributions, masks, actions = replay.sample(32)
    if isinstance(space, spaces.Dict):
        assert observations["a"].dtype == th.uint8 and observations["a"].shape == (32, 3, 4, 4)
    assert distributions.shape == (32, 12) and masks.sum() == 96
    assert spec.from_flat(distributions).log_prob(th.zeros(32, 3)).exp().unique().item() == pytest.approx(0.25)

    add(replay, 4, 5000)
    assert replay.size == 1500
    replay.save(tmp_path / "states.npz")
    other = StateReplay(1000, space, spec, "cpu")
    other.load(tmp_path / "states.npz")
    assert other.size == 1000
    assert not list(tmp_path.glob(".*"))
    wrong = StateReplay(10, space, token_spec(spaces.Discrete(2)), "cpu")
    with pytest.raises(ValueError, match="another action space"):
        wrong.load(tmp_path / "states.npz")


def test_state_replay_in_parts(tmp_path):
    spec = token_spec(ACTIONS)

    def make():
        return StateReplay(1500, PLAIN, spec, "cpu")

    def add(replay, value, n):
        replay.add(observe(PLAIN, n, value), np.full((n, 12), -1.5), np.ones((n, 3)))

    def names():
        return sorted(path.name for path in tmp_path.iterdir())

    replay = make()
    for value, n in ((1, 1000), (2, 400)):
        add(replay, value, n)
        replay.save_to(tmp_path)
    replay.save_to(tmp_path)
    assert names() == ["0-1000.npz", "1000-1400.npz"]
    add(replay, 3, 1200)
    replay.save_to(tmp_path)
    assert names() == ["0-1000.npz", "1000-1400.npz", "1400-2600.npz"] and replay.size == 1500
    other = make()
    assert other.load_from(tmp_path, 2600) == []
    assert other.n_added == 2600
    np.testing.assert_array_equal(other.observations, replay.observations)
    # A model that was saved before the last states: they are visited again
    earlier = make()
    assert earlier.load_from(tmp_path, 2000) == []
    assert earlier.n_added == 2000 and names() == ["0-1000.npz", "1000-1400.npz", "1400-2600.npz"], "as they are"
    assert np.bincount(earlier.observations[:, 0].astype(int)).tolist() == [0, 500, 400, 600]
    for value in (4, 5):
        add(earlier, value, 600)
        earlier.save_to(tmp_path)
    # Those of the time after it are written anew, and the first thousand are long forgotten
    assert names() == ["1000-1400.npz", "1400-2600.npz", "2600-3200.npz"]
    final = make()
    assert final.load_from(tmp_path, 3200) == []
    np.testing.assert_array_equal(final.observations, earlier.observations)
    # A part that is damaged is named, and the others are still there
    (tmp_path / "1400-2600.npz").write_bytes(b"PK")
    last = make()
    (error,) = last.load_from(tmp_path, 3200)
    assert "1400-2600.npz" in error and last.size == last.n_added == 1000
    add(last, 7, 500)
    last.save_to(tmp_path)
    assert names() == ["0-1500.npz"]
    # Whoever neither wrote nor read them would leave his own out
    stranger = make()
    add(stranger, 6, 10)
    with pytest.raises(ValueError, match="holds the states of another replay"):
        stranger.save_to(tmp_path)
    again = make()
    assert again.load_from(tmp_path, 1500) == []
    np.testing.assert_array_equal(again.observations, last.observations)
    (tmp_path / "0-1500.npz").unlink()
    assert again.load_from(tmp_path, 1500) == [
        f"{tmp_path} has 0 of the 1500 states that this model replayed when it was saved."
    ]


def test_a_state_replay_that_forgets_more_than_is_saved_at_once_comes_back_as_it_was(tmp_path):
    spec = token_spec(ACTIONS)
    replay = StateReplay(150, PLAIN, spec, "cpu")
    for value in range(3):
        replay.add(observe(PLAIN, 200, value), np.full((200, 12), -1.5), np.ones((200, 3)))
        replay.save_to(tmp_path / "states")
    replay.save(tmp_path / "states.npz")
    for path in ("states", "states.npz"):
        loaded = StateReplay(150, PLAIN, spec, "cpu")
        if path == "states":
            assert loaded.load_from(tmp_path / path, 600, replay.identity) == []
        else:
            loaded.load(tmp_path / path)
        assert (loaded.n_added, loaded.size) == (600, 150)
        np.testing.assert_array_equal(loaded.observations[:150], replay.observations[:150])


def test_a_folder_of_states_of_another_model_stays_as_it_is(tmp_path):
    spec = token_spec(ACTIONS)

    def make(n, value):
        replay = StateReplay(1500, PLAIN, spec, "cpu")
        if n:
            replay.add(observe(PLAIN, n, value), np.full((n, 12), -1.5), np.ones((n, 3)))
        return replay

    make(500, 1).save_to(tmp_path / "theirs")
    before = {path.name: path.read_bytes() for path in (tmp_path / "theirs").iterdir()}
    other = make(100, 2)
    other.save_to(tmp_path / "own")
    # A new model, and one that was saved with 100 states of its own
    for until, identity in ((0, None), (100, other.identity)):
        replay = make(until, 2)
        assert replay.load_from(tmp_path / "theirs", until, identity) == []
        assert replay.size == 500 and (replay.observations[:500] == 1).all()
        with pytest.raises(ValueError, match="another replay"):
            replay.save_to(tmp_path / "theirs")
        assert {path.name: path.read_bytes() for path in (tmp_path / "theirs").iterdir()} == before


def test_states_of_other_observations_are_refused_and_change_nothing(tmp_path):
    spec = token_spec(ACTIONS)
    other = StateReplay(100, spaces.Box(-1.0, 1.0, (5,), np.float32), spec, "cpu")
    other.add(np.zeros((7, 5), np.float32), np.full((7, 12), -1.5), np.ones((7, 3)))
    other.save(tmp_path / "other.npz")
    replay = StateReplay(100, PLAIN, spec, "cpu")
    replay.add(observe(PLAIN, 10, 3), np.full((10, 12), -1.5), np.ones((10, 3)))
    with pytest.raises(ValueError, match="other observations: expected .* got \\(5,\\) float32"):
        replay.load(tmp_path / "other.npz")
    with pytest.raises(ValueError):
        replay.add(np.zeros((7, 5), np.float32), np.full((7, 12), -1.5), np.ones((7, 3)))
    assert (replay.size, replay.n_added) == (10, 10) and (replay.states(np.arange(10)).observations == 3).all()


def test_state_replay_keeps_actions_where_asked_to(tmp_path):
    spec = token_spec(ACTIONS)
    plain, replay = StateReplay(1500, PLAIN, spec, "cpu"), StateReplay(1500, PLAIN, spec, "cpu", store_actions=True)
    for n in (1000, 800):
        values = np.arange(n) % 4
        obs = np.repeat(values[:, None], PLAIN.shape[0], axis=1)
        arrays = (obs, np.full((n, 12), -1.5), np.ones((n, 3)), np.repeat(values[:, None], 3, axis=1))
        replay.add(*arrays)
        plain.add(*arrays)
    assert replay.size == 1500 and plain.sample(8).actions is None and plain.actions.nbytes == 0
    samples = replay.sample(64)
    assert samples.actions.shape == (64, 3) and len(samples.actions.unique()) == 4
    assert (samples.actions == samples.observations[:, :1]).all()
    replay.save(tmp_path / "states.npz")
    again = StateReplay(1500, PLAIN, spec, "cpu", store_actions=True)
    again.load(tmp_path / "states.npz")
    assert (again.actions == again.observations[:, :1]).all()
    assert np.array_equal(np.bincount(again.actions[:, 0]), np.bincount(replay.actions[:, 0]))
    StateReplay(1500, PLAIN, spec, "cpu").load(tmp_path / "states.npz")  # more than it needs
    plain.save(tmp_path / "plain.npz")
    with pytest.raises(ValueError, match="no tokens of the student"):
        again.load(tmp_path / "plain.npz")
    with pytest.raises(ValueError, match="pass actions"):
        replay.add(*arrays[:3])


def test_state_replay_stores_small():
    per_state = StateReplay.bytes_per_state(DICT, token_spec(ACTIONS))
    assert per_state == 48 + 8 + 12 * 2 + 3
    assert StateReplay.bytes_per_state(DICT, token_spec(ACTIONS), store_actions=True) == per_state + 3
    many = token_spec(spaces.MultiDiscrete([257, 300]))
    assert StateReplay.bytes_per_state(DICT, many, True) == StateReplay.bytes_per_state(DICT, many) + 2 * 4
    with pytest.raises(ValueError, match="capacity"):
        StateReplay(0, PLAIN, token_spec(ACTIONS))


@pytest.mark.parametrize("channels_first", [True, False])
@pytest.mark.parametrize("per_sample", [True, False])
def test_random_shift(channels_first, per_sample):
    th.manual_seed(0)
    size = 32
    column = th.arange(size, dtype=th.uint8)
    image = (column.view(1, -1) + 2 * column.view(-1, 1)).expand(3, size, size)
    images = image.expand(16, 3, size, size) if channels_first else image.movedim(0, -1).expand(16, size, size, 3)
    shifted = random_shift(images, per_sample, channels_first)
    assert shifted.shape == images.shape and shifted.dtype == th.uint8
    first = shifted if channels_first else shifted.movedim(-1, 1)
    shifts = set()
    for picture in first[:, 0].int():
        dx = int(picture[16, 16] - picture[16, 15]), int(picture[16, 16]) - 48
        assert dx[0] == 1  # a shift, not a resize
        shifts.add(dx[1])
        # Edges are replicated: values stay within the range of the picture
        assert picture.min() >= 0 and picture.max() <= 93
    assert (len(shifts) > 1) == per_sample
    assert all(abs(shift) <= 6 for shift in shifts)  # at most 2 pixels along each axis
