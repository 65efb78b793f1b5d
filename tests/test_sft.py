"""Supervised fine-tuning: the loss by hand, learning, saving, wrong input."""

import math
from dataclasses import fields

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from opd_gym.algorithms.sft import SFT, SFTLoss
from opd_gym.demonstrations import Demonstrations, Episode, write_demonstrations
from opd_gym.tokens import CategoricalTokens, GaussianTokens

BODY = {"hidden_size": 32, "intermediate_size": 64, "stem_channels": [16, 32], "summary_size": 32, "vocab_size": 64}
VLA = {"policy_kwargs": {"body_kwargs": BODY}, "device": "cpu"}


def vla_demonstrations(n_episodes=4, length=6, chunk_size=2, image_size=32):
    """The brightness of the picture says what to do."""
    rng = np.random.default_rng(0)
    episodes = []
    for i in range(n_episodes):
        level = rng.uniform(0, 1, length)
        pictures = np.broadcast_to((255 * level)[:, None, None, None], (length, image_size, image_size, 3))
        proprio = np.zeros((length, 9), dtype=np.float32)
        proprio[:, 6] = 1
        actions = np.repeat((2 * level - 1)[:, None], 7, axis=1)
        observations = {"agentview": pictures.astype(np.uint8), "wrist": pictures.astype(np.uint8), "proprio": proprio}
        chunks = np.repeat(actions[:, None], chunk_size, axis=1)
        episodes.append(Episode(observations, actions, action_chunks=chunks, instruction=f"task {i % 2}"))
    return episodes


@pytest.fixture(scope="module")
def hdf5_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("demos") / "x_demo.hdf5"
    write_demonstrations(path, vla_demonstrations(), "do it")
    return path


def plain_demonstrations(n=400, kind="discrete"):
    rng = np.random.default_rng(0)
    obs = rng.uniform(-1, 1, (n, 3)).astype(np.float32)
    if kind == "discrete":
        actions, space = (obs[:, 0] > 0).astype(np.int64), spaces.Discrete(2)
    else:
        actions, space = (0.5 * obs[:, :2]).astype(np.float32), spaces.Box(-2.0, 2.0, (2,), np.float32)
    return Demonstrations(obs, actions, observation_space=spaces.Box(-1, 1, (3,), np.float32), action_space=space)


def test_plain_cross_entropy_by_hand():
    view = CategoricalTokens(th.tensor([[[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]]).log())
    loss, metrics = SFTLoss()(view, th.tensor([[0, 1]]))
    assert loss.item() == pytest.approx(-(math.log(0.5) + math.log(0.1)) / 2)
    assert metrics.accuracy == 0.5 and metrics.error == pytest.approx(0.5)
    # A masked token does not count
    loss, metrics = SFTLoss()(view, th.tensor([[0, 1]]), th.tensor([[1.0, 0.0]]))
    assert loss.item() == pytest.approx(-math.log(0.5)) and metrics.accuracy == 1.0


def test_label_smoothing_by_hand():
    probabilities = th.tensor([[[0.2, 0.5, 0.3]]])
    loss, metrics = SFTLoss(label_smoothing=2.0)(CategoricalTokens(probabilities.log()), th.tensor([[0]]))
    weights = np.exp([0.0, -1 / 8, -4 / 8])
    expected = -(weights / weights.sum() * np.log([0.2, 0.5, 0.3])).sum()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert metrics.neg_log_prob == pytest.approx(-math.log(0.2))


def test_smoothing_where_tokens_have_fewer_bins():
    """A label spreads over the bins that its token has: such a token is as one of a space of fewer bins."""
    logits = th.tensor([[[0.4, -0.3, 1.0], [0.1, 0.9, 0.0]]], requires_grad=True)
    padding = th.tensor([[False, False, False], [False, False, True]])
    view = CategoricalTokens(th.log_softmax(logits.masked_fill(padding, -math.inf), dim=-1))
    loss, _ = SFTLoss(1.0)(view, th.tensor([[2, 1]]))
    loss.backward()
    expected, gradients = [], []
    for x, distances in (([0.4, -0.3, 1.0], [2, 1, 0]), ([0.1, 0.9], [1, 0])):
        label = np.exp([-0.5 * d**2 for d in distances])
        label, p = label / label.sum(), np.exp(x) / np.exp(x).sum()
        expected.append(-(label * np.log(p)).sum())
        gradients.append((p - label) / 2)
    assert loss.item() == pytest.approx(np.mean(expected), abs=1e-6)
    np.testing.assert_allclose(logits.grad[0], [gradients[0], [*gradients[1], 0.0]], atol=1e-6)


def test_smoothing_learns_tokens_of_different_bins():
    obs = np.random.default_rng(0).uniform(-1, 1, (400, 3)).astype(np.float32)
    actions = np.stack([obs[:, 0] > 0, np.digitize(obs[:, 1], [-0.5, 0.0, 0.5])], axis=1).astype(np.int64)
    data = Demonstrations(
        obs, actions, observation_space=spaces.Box(-1, 1, (3,), np.float32), action_space=spaces.MultiDiscrete([2, 4])
    )
    model = SFT(
        "MlpPolicy", demonstrations=data, learning_rate=1e-2, batch_size=64, label_smoothing=0.5, seed=0, device="cpu"
    ).learn(150)
    metrics = model.validate(data)
    # A label keeps 0.88 of itself with one neighbour and 0.79 with two: its entropy, 0.44 in the mean, stays
    assert metrics.accuracy > 0.9 and 0.3 < metrics.loss < 0.8


def test_gaussian_negative_log_likelihood_by_hand():
    loss, metrics = SFTLoss(3.0)(GaussianTokens(th.zeros(1, 1), th.zeros(1, 1)), th.full((1, 1), 2.0))
    assert loss.item() == pytest.approx(2.0 + 0.5 * math.log(2 * math.pi))
    assert math.isnan(metrics.accuracy) and metrics.error == 2.0


def test_vla_learns_from_a_file_without_an_env(hdf5_file):
    model = SFT(
        "VLAPolicy", demonstrations=hdf5_file, chunk_size=2, batch_size=24, learning_rate=3e-3, label_smoothing=3.0,
        warmup_steps=5, seed=0, **VLA,
    )  # fmt: skip
    assert model.action_space == spaces.MultiDiscrete([256] * 14)
    before = model.validate(model.demonstrations)
    model.learn(80)
    after = model.validate(model.demonstrations)
    assert after.loss < before.loss - 1.0 and after.error < 0.5 * before.error


def test_save_and_load(hdf5_file, tmp_path):
    model = SFT("VLAPolicy", demonstrations=hdf5_file, chunk_size=2, batch_size=8, seed=0, label_smoothing=2.0, **VLA)
    model.learn(3)
    model.save(tmp_path / "model")
    assert (tmp_path / "model.zip").stat().st_size < 3e6, "demonstrations must not be saved along"
    loaded = SFT.load(tmp_path / "model", device="cpu")
    obs = model.demonstrations[np.arange(5)].observations
    np.testing.assert_array_equal(model.predict(obs, deterministic=True)[0], loaded.predict(obs, deterministic=True)[0])
    assert loaded.loss.label_smoothing == 2.0
    with pytest.raises(ValueError, match="no demonstrations"):
        loaded.learn(1)
    again = SFT.load(tmp_path / "model", demonstrations=hdf5_file, device="cpu")
    again.learn(2, reset_num_timesteps=False)
    assert again.num_timesteps == 5


def test_loads_without_the_checkpoint_it_started_from(hdf5_file, tmp_path):
    first = SFT("VLAPolicy", demonstrations=hdf5_file, chunk_size=2, seed=0, **VLA)
    first.policy.save_checkpoint(tmp_path / "student")
    kwargs = {"checkpoint": str(tmp_path / "student")}
    # The checkpoint says how long chunks are
    second = SFT("VLAPolicy", demonstrations=hdf5_file, policy_kwargs=kwargs, device="cpu")
    obs = second.demonstrations[np.arange(4)].observations
    expected = first.predict(obs, deterministic=True)[0]
    np.testing.assert_array_equal(second.predict(obs, deterministic=True)[0], expected)
    second.save(tmp_path / "second.zip")
    for file in (tmp_path / "student").iterdir():
        file.unlink()
    (tmp_path / "student").rmdir()
    loaded = SFT.load(tmp_path / "second.zip", device="cpu")
    np.testing.assert_array_equal(loaded.predict(obs, deterministic=True)[0], expected)


def test_same_seed_same_run(hdf5_file):
    def run():
        model = SFT(
            "VLAPolicy",
            demonstrations=hdf5_file,
            chunk_size=2,
            batch_size=4,
            seed=3,
            augmentation="random_shift",
            **VLA,
        )
        return model.learn(3).policy.parameters_to_vector()

    np.testing.assert_array_equal(run(), run())


@pytest.mark.parametrize("kind", ["discrete", "box"])
def test_behaviour_cloning_of_any_policy(kind):
    data = plain_demonstrations(kind=kind)
    model = SFT("MlpPolicy", demonstrations=data, learning_rate=1e-2, batch_size=64, seed=0, device="cpu")
    model.learn(150)
    metrics = model.validate(data)
    assert metrics.accuracy > 0.95 if kind == "discrete" else metrics.error < 0.1


def test_env_gives_the_spaces_and_prediction_works():
    env = gym.make("CartPole-v1")
    rng = np.random.default_rng(0)
    data = Demonstrations(rng.normal(size=(50, 4)).astype(np.float32), rng.integers(0, 2, 50))
    model = SFT("MlpPolicy", env, demonstrations=data, seed=0, device="cpu").learn(5)
    assert model.action_space == env.action_space
    assert env.action_space.contains(model.predict(env.reset(seed=0)[0])[0])


class TokenEnv(gym.Env):
    """Pictures, instruction and proprioception; never stepped here."""

    def __init__(self, image_size=16, n_tokens=14):
        picture = spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
        self.observation_space = spaces.Dict(
            agentview=picture, wrist=picture, proprio=spaces.Box(-9, 9, (9,), np.float32),
            instruction=spaces.Box(0, 255, (128,), np.uint8),
        )  # fmt: skip
        self.action_space = spaces.MultiDiscrete([256] * n_tokens)


def test_env_decides_on_image_and_chunk_size(hdf5_file):
    model = SFT("VLAPolicy", TokenEnv(), demonstrations=hdf5_file, batch_size=4, augmentation="random_shift", **VLA)
    # Stable-Baselines3 transposes the env's pictures, the demonstrations' are brought to the same layout
    assert model.observation_space["wrist"].shape == (3, 16, 16)
    assert model.demonstrations.observations["wrist"].shape[1:] == (16, 16, 3)
    model.learn(2)
    obs = model.demonstrations[np.arange(2)].observations
    assert model.predict(obs)[0].shape == (2, 14)


def test_validation_by_episodes(hdf5_file, tmp_path):
    model = SFT(
        "VLAPolicy", demonstrations=hdf5_file, chunk_size=2, batch_size=4, validation_fraction=0.25, validation_freq=2,
        seed=0, mask_padding=True, **VLA,
    )  # fmt: skip
    assert len(model._validation_rows) == 6 and len(model._training_rows) == 18
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn(4, log_interval=2)
    header = (tmp_path / "progress.csv").read_text().splitlines()[0].split(",")
    assert {"train/loss", "validation/loss", "train/learning_rate", "time/samples_per_second"} <= set(header)
    assert all(np.isfinite(getattr(model.validate(), f.name)) for f in fields(model.validate()))


def test_callbacks_progress_bar_and_learning_rate(hdf5_file):
    class Record(BaseCallback):
        rates: list[float] = []

        def _on_step(self):
            self.rates.append(self.model.policy.optimizer.param_groups[0]["lr"])
            return self.n_calls < 8

    model = SFT(
        "VLAPolicy", demonstrations=hdf5_file, chunk_size=2, batch_size=2, learning_rate=1.0, warmup_steps=2, **VLA
    )
    model.policy.optimizer.step = lambda: None
    callback = Record()
    model.learn(10, callback=callback, progress_bar=True)
    expected = [min(1, (i + 1) / 2) * 0.5 * (1 + math.cos(math.pi * i / 10)) for i in range(8)]
    np.testing.assert_allclose(callback.rates, expected, rtol=1e-6)
    assert model.num_timesteps == 8


def test_aggregation(hdf5_file):
    model = SFT("VLAPolicy", demonstrations=hdf5_file, chunk_size=2, batch_size=4, **VLA).learn(1)
    model.set_demonstrations(model.demonstrations + model.demonstrations)
    model.learn(1, reset_num_timesteps=False)
    assert len(model.demonstrations) == 48 and model.num_timesteps == 2


def test_clear_errors(hdf5_file):
    with pytest.raises(ValueError, match="expects demonstrations"):
        SFT("VLAPolicy")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        SFT("VLAPolicy", demonstrations="missing.hdf5")
    with pytest.raises(ValueError, match="chunks of 2 actions, chunk_size is 8"):
        SFT("VLAPolicy", demonstrations=hdf5_file)
    with pytest.raises(ValueError, match="28 tokens"):
        data = Demonstrations.from_episodes(vla_demonstrations(chunk_size=4), chunk_size=4, image_size=16)
        SFT("VLAPolicy", TokenEnv(), demonstrations=data, **VLA)
    with pytest.raises(ValueError, match="have no `agentview`"):
        SFT("VLAPolicy", TokenEnv(), demonstrations=Demonstrations({"x": np.zeros((2, 3))}, np.zeros((2, 2, 7))), **VLA)
    with pytest.raises(ValueError, match="augmentation"):
        SFT("VLAPolicy", demonstrations=hdf5_file, augmentation="flip")
    with pytest.raises(ValueError, match="outside Discrete"):
        SFT("MlpPolicy", "CartPole-v1", demonstrations=Demonstrations(np.zeros((2, 4), np.float32), np.array([0, 2])))
    with pytest.raises(ValueError, match="expects demonstrations|Unknown policy"):
        SFT("NoPolicy", demonstrations=hdf5_file)


def learned_by(space, actions, action_space=None):
    env = DummyVecEnv([lambda: SpaceOnly(space)])
    observations = np.zeros((len(actions), 3), np.float32)
    data = Demonstrations(observations, np.asarray(actions), action_space=action_space)
    return SFT("MlpPolicy", env, demonstrations=data, device="cpu")


class SpaceOnly(gym.Env):
    """Never stepped."""

    observation_space = spaces.Box(-1, 1, (3,), np.float32)

    def __init__(self, space):
        self.action_space = space


@pytest.mark.parametrize(
    ("space", "actions", "match"),
    [
        (spaces.Discrete(2), [0.2, 0.9], "whole numbers, got for instance 0.2. Are they probabilities"),
        (spaces.MultiDiscrete([2, 3]), [[0, 1], [1, 1.5]], "whole numbers, got for instance 1.5"),
        (spaces.MultiBinary(2), [[0, 1], [0.7, 1]], "whole numbers, got for instance 0.7"),
        (spaces.MultiBinary(2), [[0, 1], [2, 1]], "reach from 0 to 2, outside MultiBinary"),
        (
            spaces.Box(-1, 1, (1,)),
            [[-2.0], [2.0], [1.5]],
            r"100% .* dimension 0 lie outside of \[-1, 1\], the bounds of",
        ),
    ],
)
def test_actions_that_are_none_of_the_env_are_refused(space, actions, match):
    with pytest.raises(ValueError, match=match):
        learned_by(space, actions)


def test_actions_at_the_edge():
    torques = np.linspace(-1.2, 1.2, 100)[:, None]
    with pytest.warns(UserWarning, match=r"16% .* lie outside of \[-1, 1\], the bounds of the action space"):
        learned_by(spaces.Box(-1, 1, (1,)), torques)
    # True and False
    for space, actions in ((spaces.Discrete(2), [True, False]), (spaces.MultiBinary(2), [[True, False], [True, True]])):
        model = learned_by(space, actions, space)
        model.learn(1)
        assert model._actions.dtype == np.int64 and np.array_equal(model._actions.ravel(), np.ravel(actions))
    with pytest.raises(ValueError, match="pass action_space"):
        SFT("MlpPolicy", demonstrations=Demonstrations(np.zeros((2, 3), np.float32), np.array([True, False])))


def test_pictures_from_0_to_1_would_be_divided_by_255_again():
    space = spaces.Box(0, 255, (3, 36, 36), np.uint8)
    pictures, actions = np.random.default_rng(0).integers(0, 256, (4, 3, 36, 36), dtype=np.uint8), np.arange(4) % 2

    def learn(observations):
        data = Demonstrations(observations, actions, observation_space=space, action_space=spaces.Discrete(2))
        return SFT("CnnPolicy", demonstrations=data, device="cpu").learn(1)

    learn(pictures)
    learn(pictures.astype(np.float32))  # which Stable-Baselines3 divides by 255 as well
    with pytest.raises(ValueError, match="float32 from 0 to 1, the policy expects pictures from 0 to 255"):
        learn((pictures / 255).astype(np.float32))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda pictures: pictures.astype(np.uint16) * 200, "uint16 from 0 to 51000"),
        (lambda pictures: (pictures / 100.0 - 1.0).astype(np.float32), "pictures from 0 to 255"),
        (lambda pictures: pictures > 100, "bool"),
    ],
)
def test_pictures_of_another_kind_are_refused(make, match):
    space = spaces.Box(0, 255, (3, 36, 36), np.uint8)
    pictures = np.random.default_rng(0).integers(0, 256, (4, 3, 36, 36), dtype=np.uint8)
    data = Demonstrations(make(pictures), np.arange(4) % 2, observation_space=space, action_space=spaces.Discrete(2))
    with pytest.raises(ValueError, match=match):
        SFT("CnnPolicy", demonstrations=data, device="cpu")


@pytest.mark.parametrize(
    ("space", "observations", "match"),
    [
        (spaces.Discrete(3), np.array([0, 1, 3, 2]), "whole numbers in Discrete"),
        (spaces.Discrete(3), np.array([0.0, 0.5, 1.0, 2.0]), "whole numbers in Discrete"),
    ],
)
def test_observations_that_the_env_cannot_show_are_refused(space, observations, match):
    data = Demonstrations(observations, np.arange(4) % 2, observation_space=space, action_space=spaces.Discrete(2))
    with pytest.raises(ValueError, match=match):
        SFT("MlpPolicy", demonstrations=data, device="cpu")


def test_observations_beyond_the_bounds_are_told():
    space, observations = spaces.Box(-1, 1, (2,), np.float32), np.full((4, 2), 1e6, np.float32)
    data = Demonstrations(observations, np.arange(4) % 2, observation_space=space, action_space=spaces.Discrete(2))
    with pytest.warns(UserWarning, match="Scale them as the env does"):
        SFT("MlpPolicy", demonstrations=data, device="cpu")


def test_chunks_of_another_arm_are_refused():
    class Chunks(gym.Env):
        observation_space = spaces.Box(-1, 1, (3,), np.float32)

        def __init__(self, action_space):
            self.action_space = action_space
            if isinstance(action_space, spaces.MultiDiscrete):
                self.action_dim = 4

    data = Demonstrations(np.zeros((5, 3), np.float32), np.zeros((5, 4, 2), np.float32))
    for space in (spaces.MultiDiscrete([16] * 8), spaces.Box(-1, 1, (2, 4), np.float32)):
        with pytest.raises(ValueError, match="Demonstrated actions have shape|have 2 dimensions, those of the env 4"):
            SFT("MlpPolicy", DummyVecEnv([lambda space=space: Chunks(space)]), data, device="cpu")


def test_padding_that_nobody_has_marked_is_told(hdf5_file):
    with pytest.warns(UserWarning, match="mask_padding=True leaves nothing out"):
        SFT("VLAPolicy", demonstrations=hdf5_file, chunk_size=2, mask_padding=True, **VLA)


def test_nan_is_refused(hdf5_file):
    model = SFT("VLAPolicy", demonstrations=hdf5_file, chunk_size=2, batch_size=2, **VLA)
    with th.no_grad():
        next(iter(model.policy.parameters())).fill_(float("nan"))
    with pytest.raises(FloatingPointError):
        model.learn(1)


def test_an_env_that_normalises_what_is_demonstrated_raw_is_refused():
    data = Demonstrations(np.zeros((8, 4), np.float32), np.zeros(8, np.int64), action_space=spaces.Discrete(2))
    env = DummyVecEnv([lambda: gym.make("CartPole-v1")])
    with pytest.raises(ValueError, match="normalize: false"):
        SFT("MlpPolicy", VecNormalize(env), demonstrations=data)
    SFT("MlpPolicy", VecNormalize(env, norm_obs=False), demonstrations=data)


def test_validation_is_a_mean_over_the_tokens_that_count():
    """Batches of unlike numbers of them: the first episodes end in the middle of their chunks."""
    rng = np.random.default_rng(0)
    data = Demonstrations(rng.normal(size=(12, 3)).astype(np.float32), rng.uniform(-1, 1, (12, 6)).astype(np.float32))
    model = SFT("MlpPolicy", demonstrations=data, batch_size=4, seed=0)
    whole, rows = model._evaluate(np.arange(12), 3).neg_log_prob, np.arange(12)
    mask = np.ones((12, 6), np.float32)
    mask[:8, 1:] = 0.0
    model._mask = mask
    obs, actions, _ = model._batch(rows)
    log_probs = model._student(obs, actions).log_prob(actions).detach().numpy()
    assert model._evaluate(rows, 3).neg_log_prob == pytest.approx(-(log_probs * mask).sum() / mask.sum(), rel=1e-5)
    assert whole == pytest.approx(-log_probs.mean(), rel=1e-5)
