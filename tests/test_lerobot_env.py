"""This library's LIBERO as LeRobot's policies see it, and ``lerobot-eval`` itself where LeRobot is."""

import importlib.util
import json

import gymnasium as gym
import numpy as np
import pytest

from opd_gym.integrations.lerobot.env import LeRobotLiberoEnv

pytestmark = pytest.mark.libero
HAS_LEROBOT = importlib.util.find_spec("lerobot") is not None
ACTION = np.array([0.5, 0.0, -0.5, 0.0, 0.0, 0.0, 1.0], dtype=np.float32)


@pytest.fixture(autouse=True)
def libero():
    pytest.importorskip("libero.libero", reason="pip install opd-gym[libero]")


def test_an_episode_is_that_of_our_env():
    from opd_gym.envs.libero.env import LiberoEnv

    ours = LiberoEnv("libero_object", [3], image_size=32, visuals="light", init_states="eval")
    env = LeRobotLiberoEnv("libero_object", 3, 1, 2, image_size=32, visuals="light", draw_every=3, max_steps=5)
    assert env.task_description == "pick up the bbq sauce and place it in the basket" and env._max_episode_steps == 5
    assert env.task == "pick_up_the_bbq_sauce_and_place_it_in_the_basket"
    for state in (1, 3):
        # LeRobot's own option, and whatever comes
        obs, info = env.reset(seed=0, options={"lerobot_new_rollout": True})
        expected, _ = ours.reset(seed=0, options={"init_state_id": state})
        assert info["is_success"] is False
        for step in range(6):
            assert env.observation_space.contains(obs)
            if step % 3 == 0 or step == 5:  # the last one ends the episode
                drawn = expected
            for camera, name in (("agentview", "image"), ("wrist", "image2")):
                np.testing.assert_array_equal(obs["pixels"][name][::-1], drawn[camera])
            np.testing.assert_array_equal(env.render(), drawn["agentview"])
            robot = obs["robot_state"]
            state_now = np.concatenate([robot["eef"]["pos"], robot["eef"]["quat"], robot["gripper"]["qpos"]])
            np.testing.assert_array_equal(state_now, expected["proprio"].astype(np.float64))
            if step < 5:
                obs, reward, terminated, truncated, info = env.step(ACTION)
                expected, *_ = ours.step(ACTION)
                assert reward == 0.0 and not terminated and truncated == (step == 4)
                assert info.keys() == {"task", "task_id", "done", "is_success"}
    env.close()
    ours.close()


def test_arguments():
    env = LeRobotLiberoEnv("libero_spatial", 0, pictures={"wrist": "hand"}, with_state=False)
    assert env._max_episode_steps == 280, "LeRobot's; the published one is 220"
    assert set(env.observation_space["pixels"]) == {"hand"} and "robot_state" not in env.observation_space.spaces
    assert LeRobotLiberoEnv("libero_goal", 0)._max_episode_steps == 300
    for kwargs in (
        {"draw_every": 0}, {"n_envs": 0}, {"pictures": {}}, {"visuals": "dark"}, {"task_id": 10},
        {"max_steps": [9] * 10},
    ):  # fmt: skip
        with pytest.raises(ValueError):
            LeRobotLiberoEnv(**{"suite": "libero_goal", "task_id": 0, **kwargs})
    with pytest.raises(RuntimeError, match="reset"):
        env.render()


needs_lerobot = pytest.mark.skipif(not HAS_LEROBOT, reason="LeRobot is not installed (Python 3.12)")


@needs_lerobot
def test_settings_that_are_not_ours():
    from opd_gym.integrations.lerobot.config import OpdLiberoConfig

    for kwargs, match in (
        ({"visuals": "dark"}, "visuals"),
        ({"draw_every": 0}, "draw_every"),
        ({"observation_height": 128}, "square"),
        ({"fps": 10}, "20 steps a second"),
        ({"control_mode": "absolute"}, "relative"),
        ({"is_libero_plus": True}, "LIBERO-Plus"),
        ({"task": "libero_object,kitchen"}, "Known"),
    ):
        with pytest.raises(ValueError, match=match):
            OpdLiberoConfig(**kwargs)


@needs_lerobot
def test_policies_see_in_the_env_what_is_written_for_them(tmp_path):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset
    from lerobot.envs.utils import preprocess_observation
    from lerobot.processor.env_processor import LiberoProcessorStep

    from opd_gym.demonstrations import Episode, write_lerobot
    from opd_gym.envs.libero.env import LiberoEnv

    ours = LiberoEnv("libero_object", [3], image_size=32, visuals="light")
    obs, _ = ours.reset(seed=0, options={"init_state_id": 0})
    rows = {key: obs[key][None] for key in ("agentview", "wrist", "proprio")}
    write_lerobot(tmp_path / "x", [Episode(rows, ACTION[None], instruction=ours.instruction)])
    written = LeRobotDataset("opd_gym/x", tmp_path / "x")[0]
    theirs = LeRobotLiberoEnv("libero_object", 3, image_size=32, visuals="light")
    vector = gym.vector.SyncVectorEnv([lambda: theirs])
    seen = LiberoProcessorStep().observation(preprocess_observation(vector.reset(seed=0)[0]))
    for key in ("observation.images.image", "observation.images.image2", "observation.state"):
        np.testing.assert_allclose(seen[key][0].numpy(), written[key].numpy(), atol=1e-5, err_msg=key)
    vector.close()
    ours.close()


@needs_lerobot
def test_envs_by_suite_and_task():
    from lerobot.envs.configs import EnvConfig

    import opd_gym.integrations.lerobot.config  # noqa: F401

    config = EnvConfig.get_choice_class("opd_libero")(task="libero_object,libero_goal", task_ids=[2, 0])
    envs = config.create_envs(n_envs=2)
    assert {suite: list(tasks) for suite, tasks in envs.items()} == {"libero_object": [0, 2], "libero_goal": [0, 2]}
    env = envs["libero_goal"][0]
    assert isinstance(env, gym.vector.SyncVectorEnv) and env.num_envs == 2
    assert env.call("_max_episode_steps") == (300, 300)
    lazy = config.create_envs(n_envs=2, use_async_envs=True)["libero_object"][2]
    assert lazy._env is None, "no process before it is played"


@needs_lerobot
def test_lerobot_eval(tmp_path, monkeypatch):
    import sys

    import torch as th
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.policies.act.configuration_act import ACTConfig
    from lerobot.policies.act.modeling_act import ACTPolicy
    from lerobot.policies.act.processor_act import make_act_pre_post_processors
    from lerobot.scripts.lerobot_eval import main

    features = {f"observation.images.{n}": PolicyFeature(FeatureType.VISUAL, (3, 64, 64)) for n in ("image", "image2")}
    features["observation.state"] = PolicyFeature(FeatureType.STATE, (8,))
    config = ACTConfig(
        input_features=features,
        output_features={"action": PolicyFeature(FeatureType.ACTION, (7,))},
        chunk_size=4,
        n_action_steps=4,
        dim_model=16,
        n_heads=2,
        dim_feedforward=16,
        n_encoder_layers=1,
        n_decoder_layers=1,
        use_vae=False,
        pretrained_backbone_weights=None,
        device="cpu",
    )
    statistics = {"observation.state": (8,), "action": (7,), **dict.fromkeys(list(features)[:2], (3, 1, 1))}
    statistics = {key: {"mean": th.zeros(shape), "std": th.ones(shape)} for key, shape in statistics.items()}
    for part in (ACTPolicy(config), *make_act_pre_post_processors(config, statistics)):
        part.save_pretrained(tmp_path / "act")
    arguments = f"""
    lerobot-eval --policy.path={tmp_path}/act --policy.device=cpu
    --env.discover_packages_path=opd_gym.integrations.lerobot --env.type=opd_libero --env.task=libero_object
    --env.task_ids=[3] --env.observation_height=64 --env.observation_width=64 --env.visuals=light --env.draw_every=4
    --env.episode_length=6 --eval.n_episodes=2 --eval.batch_size=2 --eval.use_async_envs=false
    --output_dir={tmp_path}/out
    """
    monkeypatch.setattr(sys, "argv", arguments.split())
    main()
    result = json.loads((tmp_path / "out/eval_info.json").read_text())
    assert result["overall"]["n_episodes"] == 2 and result["overall"]["pc_success"] == 0.0
    assert len(list((tmp_path / "out/videos").rglob("*.mp4"))) == 2
