"""Files of others: what Stable-Baselines3 writes is read, and nothing in it runs."""

import base64
import json
import os
import pickle
import zipfile
from contextlib import suppress

import gymnasium as gym
import numpy as np
import pytest
import sb3_contrib
import stable_baselines3
import torch as th
from gymnasium.utils.env_checker import data_equivalence
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.utils import ConstantSchedule
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from toys import TINY_BODY, Robot, cartpole_teacher

from opd_gym import OPD, SFT
from opd_gym.cli.main import main
from opd_gym.envs.wrappers import ActionChunk, ActionTokens
from opd_gym.policies.loading import checkpoint_settings, load_policy, read_vec_normalize
from opd_gym.untrusted import parse_yaml, read_attributes, unpickle

CONTINUOUS = ("SAC", "TD3", "DDPG", "TQC", "CrossQ")
ALGORITHMS = ("PPO", "A2C", "DQN", *CONTINUOUS, "TRPO", "ARS", "QRDQN", "MaskablePPO", "RecurrentPPO")


def check_same(path):
    """All that Stable-Baselines3 unpickles is admitted, and the same."""
    expected, _, _ = load_from_zip_file(path, device="cpu")
    found = read_attributes(path)
    assert list(found) == list(expected) and found["lr_schedule"] is None
    for name in found.keys() - {"lr_schedule"}:
        assert type(found[name]) is type(expected[name]), name
        if name in ("policy_kwargs", "policy_class", "observation_space", "action_space"):
            assert found[name] == expected[name] or data_equivalence(found[name], expected[name])


@pytest.mark.parametrize("name", ALGORITHMS)
def test_what_every_algorithm_saves_is_admitted(name, tmp_path):
    cls = getattr(stable_baselines3, name, None) or getattr(sb3_contrib, name)
    kwargs = {} if name == "ARS" else {"policy_kwargs": dict(net_arch=[8], activation_fn=th.nn.ELU)}
    if name in ("SAC", "TD3", "DDPG", "TQC"):
        kwargs["action_noise"] = NormalActionNoise(np.zeros(1), np.ones(1))
    policy = "MlpLstmPolicy" if name == "RecurrentPPO" else "MlpPolicy"
    model = cls(policy, "Pendulum-v1" if name in CONTINUOUS else "CartPole-v1", device="cpu", seed=0, **kwargs)
    if hasattr(model, "replay_buffer"):
        model.learn(4)
    model.save(tmp_path / "model.zip")
    check_same(tmp_path / "model.zip")


def test_what_her_and_this_library_save_is_admitted(tmp_path):
    from stable_baselines3.common.envs import BitFlippingEnv

    her = stable_baselines3.DQN(
        "MultiInputPolicy", BitFlippingEnv(2, discrete_obs_space=False, continuous=False), device="cpu",
        replay_buffer_class=stable_baselines3.HerReplayBuffer,
        replay_buffer_kwargs=dict(goal_selection_strategy=stable_baselines3.her.GoalSelectionStrategy.FUTURE),
    )  # fmt: skip
    her.save(tmp_path / "her.zip")
    env = ActionTokens(ActionChunk(Robot(), 4))
    OPD("VLAPolicy", env, teacher="expert", policy_kwargs=dict(body_kwargs=TINY_BODY), device="cpu").save(
        tmp_path / "vla.zip"
    )
    for name in ("her.zip", "vla.zip"):
        check_same(tmp_path / name)


def test_spaces_of_old_gym_and_other_versions():
    generator = np.random.default_rng(0)
    parts = pickle.dumps(generator, 3)
    space = pickle.dumps(gym.spaces.Box(-1, 1, (2,), np.float32), 3)
    found = unpickle(space.replace(b"gymnasium.spaces", b"gym.spaces").replace(b"numpy._core", b"numpy.core"), "old")
    assert found == gym.spaces.Box(-1, 1, (2,), np.float32)
    old = parts.replace(
        b"cnumpy.random._pickle\n__generator_ctor", b"cgym.utils.seeding\nRandomNumberGenerator._generator_ctor"
    )
    assert old != parts and unpickle(old, "old").random() == generator.random()


class Call:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def changed(cls):
    # A class whose state is set: it would be another class from then on
    return b"\x80\x02c" + f"{cls.__module__}\n{cls.__name__}\n".encode() + b"N}X\x08\x00\x00\x00__call__K\x01s\x86b."


def slots(cls):
    # An object whose class is set
    made = pickle.dumps(ConstantSchedule(1.0), 2)[:-1]
    return made + b"N}X\x09\x00\x00\x00__class__c" + f"{cls.__module__}\n{cls.__name__}\ns\x86b.".encode()


@pytest.mark.parametrize(
    "data",
    [
        pickle.dumps(Call(os.system, "true")),
        pickle.dumps(Call(eval, "1")),
        pickle.dumps(Call(th.load, "nothing")),
        pickle.dumps(Call(th.nn.ReLU)),
        pickle.dumps(Call(ConstantSchedule(1.0), 2)),
        pickle.dumps(Call(th.storage._load_from_bytes, pickle.dumps(Call(os.system, "true"), 2))),
        changed(ConstantSchedule),
        changed(th.nn.ReLU),
        slots(th.nn.ReLU),
        b"\x80\x04\x8c\x08builtins\x8c\x04exec\x93.",
        b"\x80\x04\x8c\x1dstable_baselines3.common.utils\x8c\x08os.system\x93.",
        b"",
    ],
)
def test_nothing_else_is_admitted(data):
    with pytest.raises(ValueError, match=r"model\.zip cannot be read.*trust=True"):
        unpickle(data, "model.zip")


def bomb(tmp_path, *keys):
    """A good zip with code in some attributes, and the folder that the code would make."""
    cartpole_teacher().save(tmp_path / "bomb.zip")
    with zipfile.ZipFile(tmp_path / "bomb.zip") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    data = json.loads(members["data"])
    payload = base64.b64encode(pickle.dumps(Call(os.makedirs, str(tmp_path / "ran")))).decode()
    data.update({key: {":serialized:": payload} for key in keys})
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w") as archive:
        for name, content in {**members, "data": json.dumps(data)}.items():
            archive.writestr(name, content)
    return tmp_path / "bomb.zip", tmp_path / "ran"


USES = {
    "teacher": lambda path, **trust: OPD("MlpPolicy", "CartPole-v1", teacher=path, teacher_kwargs=trust),
    "student": lambda path, **trust: SFT("MlpPolicy", "CartPole-v1", policy_kwargs={"checkpoint": path, **trust}),
    "policy": lambda path, **trust: load_policy(path, None, None, **trust),
    "settings": lambda path, **trust: checkpoint_settings({"checkpoint": path}, **trust),
    "load": lambda path, **trust: OPD.load(path, **trust),
    "load with an env": lambda path, **trust: OPD.load(path, env="CartPole-v1", **trust),
    "load a file": lambda path, **trust: OPD.load(path.open("rb"), **trust),
}


@pytest.mark.parametrize("use", USES)
def test_code_in_a_zip_runs_nowhere_unless_it_is_trusted(use, tmp_path):
    path, ran = bomb(tmp_path, "policy_kwargs")
    with pytest.raises(ValueError, match="its policy_kwargs cannot be read.*trust=True"):
        USES[use](path)
    assert not ran.exists()
    with suppress(ValueError, AttributeError, TypeError):  # what it makes is no model
        USES[use](path, trust=True)
    assert ran.exists()


def test_code_in_a_zip_runs_on_the_command_line_only_with_trust(tmp_path, capsys):
    path, ran = bomb(tmp_path, "policy_kwargs")
    play = ["eval", "--env", "CartPole-v1", "--checkpoint", str(path), "--episodes", "1", "--no-progress"]
    train = ["train", "--env", "CartPole-v1", "--teacher", str(path), "-n", "8", "-f", str(tmp_path), "--no-progress"]
    student = ["train", "--env", "CartPole-v1", "--algo", "ppo", "--student", str(path), "-n", "8", "-f", str(tmp_path)]
    for words in (play, train, student):
        assert main(words) == 2 and "--trust" in capsys.readouterr().err and not ran.exists()
        main([*words, "--trust"])
        assert ran.is_dir()
        ran.rmdir()


def test_a_file_does_not_say_that_it_is_to_be_trusted(tmp_path):
    path, ran = bomb(tmp_path, "policy_kwargs")
    model = OPD("MlpPolicy", "CartPole-v1", teacher=cartpole_teacher(), n_steps=4, batch_size=4, device="cpu")
    model.teacher, model.teacher_kwargs = str(path), {"trust": True}
    model.save(tmp_path / "model.zip")
    with pytest.raises(ValueError, match="its policy_kwargs cannot be read"):
        OPD.load(tmp_path / "model.zip", env="CartPole-v1").learn(4)
    (tmp_path / "their.yml").write_text(f"default: {{teacher: {path}, teacher_kwargs: {{trust: true}}}}")
    assert main(["train", "--env", "CartPole-v1", "--config", str(tmp_path / "their.yml"), "-n", "8"]) == 2
    assert not ran.exists()


def test_a_learning_rate_that_is_code_needs_trust_or_another(tmp_path):
    def rate(progress):
        return 1e-3 * progress

    kwargs = dict(device="cpu", n_steps=4, batch_size=4)
    OPD("MlpPolicy", "CartPole-v1", cartpole_teacher(), rate, **kwargs).save(tmp_path / "model.zip")
    with pytest.raises(ValueError, match="its learning_rate cannot be read.*custom_objects.*trust=True"):
        OPD.load(tmp_path / "model.zip")
    assert OPD.load(tmp_path / "model.zip", trust=True).lr_schedule(0.5) == 5e-4
    assert OPD.load(tmp_path / "model.zip", custom_objects={"learning_rate": 1e-4}).lr_schedule(0.5) == 1e-4
    # A policy that only acts has no use for it
    load_policy(tmp_path / "model.zip", None, None)


def test_a_policy_that_is_code_needs_trust(tmp_path):
    class Own(th.nn.ReLU):
        pass

    stable_baselines3.PPO("MlpPolicy", "CartPole-v1", policy_kwargs=dict(activation_fn=Own), device="cpu").save(
        tmp_path / "own.zip"
    )
    with pytest.raises(ValueError, match=r"own\.zip: its policy_kwargs cannot be read.*trust=True"):
        load_policy(tmp_path / "own.zip", None, None)
    assert load_policy(tmp_path / "own.zip", None, None, trust=True).activation_fn.__name__ == "Own"


def test_statistics_of_vec_normalize(tmp_path):
    env = VecNormalize(DummyVecEnv([lambda: gym.make("CartPole-v1")]))
    env.obs_rms.mean[:] = 3.0
    env.save(str(tmp_path / "vecnormalize.pkl"))
    assert (read_vec_normalize(tmp_path / "vecnormalize.pkl").obs_rms.mean == 3.0).all()


def test_yaml_that_grows_without_end_is_refused():
    levels = ["a0: &a0 [0, 0]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 40))]
    for text in (
        "\n".join(levels),
        "[" * 100_000,
        "[" * 60 + "]" * 60,
        "a: &a [*a]",
        "a: [",
        "a: !!python/name:os.system",
        "a" * 2_000_000,
        "1" + ":1" * 20_000,
        "9" * 5000,
        "2026-99-99",
    ):
        with pytest.raises(ValueError, match="not YAML that can be read"):
            parse_yaml(text)
    assert parse_yaml("a: &a {x: 5e-4}\nb: {<<: *a, y: 1}")["b"] == {"x": 5e-4, "y": 1}


def test_a_key_that_is_there_twice_is_refused():
    assert parse_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}")["b"] == {"x": 3, "y": 2}
    for text in ("E: {n: 1}\nF: 2\nE: {m: 3}", "E: {n: 1, n: 1}"):
        with pytest.raises(ValueError, match="a key twice: [En], line 1"):
            parse_yaml(text)
