"""LIBERO's HDF5 format: hand-made official files, round trips, labels of chunks."""

import gc
import json
import weakref

import h5py
import numpy as np
import pytest
from gymnasium import spaces

from opd_gym.actions import decode_tokens
from opd_gym.demonstrations import Demonstrations, Episode, read_demonstrations, write_demonstrations
from opd_gym.demonstrations.hdf5 import axis_angle_to_quat, quat_to_axis_angle, resize_images
from opd_gym.instructions import decode_instruction, encode_instruction

INSTRUCTION = "pick up the butter and place it in the basket"


def official_file(path, lengths=(5, 3), image_size=128, convention="opengl", robot_states=True):
    """A file as LIBERO's scripts/create_dataset.py writes it; each picture's upper (world) half is white."""
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["problem_info"] = json.dumps({"problem_name": "x", "language_instruction": [f'"{INSTRUCTION}"']})
        data.attrs["env_args"] = json.dumps({"env_name": "Libero_Floor_Manipulation"})
        data.attrs["macros_image_convention"] = convention
        data.attrs["num_demos"] = len(lengths)
        # h5py lists demo_10 before demo_2: the reader must sort by number
        for i, n in enumerate(lengths):
            demo = data.create_group(f"demo_{i}")
            upright = np.zeros((n, image_size, image_size, 3), dtype=np.uint8)
            upright[:, : image_size // 2] = 255
            stored = upright[:, ::-1] if convention == "opengl" else upright
            quat = rng.normal(size=(n, 4))
            quat /= np.linalg.norm(quat, axis=1, keepdims=True)
            position, gripper = rng.normal(size=(n, 3)), rng.normal(size=(n, 2))
            obs = demo.create_group("obs")
            obs["agentview_rgb"] = stored
            obs["eye_in_hand_rgb"] = stored
            obs["ee_pos"], obs["ee_ori"] = position, quat_to_axis_angle(quat)
            obs["ee_states"] = np.concatenate([position, quat_to_axis_angle(quat)], axis=1)
            obs["gripper_states"] = gripper
            obs["joint_states"] = rng.normal(size=(n, 7))
            actions = np.zeros((n, 7))
            actions[:, 0] = np.arange(n) / 10
            actions[:, 6] = -1
            demo["actions"] = actions
            demo["states"] = rng.normal(size=(n, 20))
            demo["rewards"] = np.eye(n, dtype=np.uint8)[-1]
            demo["dones"] = np.eye(n, dtype=np.uint8)[-1]
            if robot_states:
                demo["robot_states"] = np.concatenate([gripper, position, quat], axis=1)
    return path


def episode(n=4, seed=0, image_size=16, chunk=None):
    rng = np.random.default_rng(seed)
    quat = rng.normal(size=(n, 4))
    quat /= np.linalg.norm(quat, axis=1, keepdims=True)
    proprio = np.concatenate([rng.normal(size=(n, 3)), quat, rng.normal(size=(n, 2))], axis=1).astype(np.float32)
    shape = (n, image_size, image_size, 3)
    return Episode(
        {
            "agentview": rng.integers(0, 256, shape, dtype=np.uint8),
            "wrist": rng.integers(0, 256, shape, dtype=np.uint8),
            "proprio": proprio,
        },
        rng.uniform(-1, 1, (n, 7)),
        action_chunks=None if chunk is None else rng.uniform(-1, 1, (n, chunk, 7)),
    )


@pytest.mark.parametrize("convention", ["opengl", "opencv"])
def test_official_file(tmp_path, convention):
    path = official_file(tmp_path / "x_demo.hdf5", convention=convention)
    data = Demonstrations.from_hdf5(path, chunk_size=3, image_size=64)
    assert len(data) == 8 and data.n_episodes == 2
    picture = data.observations["agentview"][0]
    assert picture.shape == (64, 64, 3) and picture[0, 0, 0] == 255 and picture[-1, 0, 0] == 0
    assert decode_instruction(data.observations["instruction"][0]) == INSTRUCTION
    np.testing.assert_allclose(data.actions[0, :, 0], [0.0, 0.1, 0.2])
    # The last action is repeated beyond the end of the episode and marked
    np.testing.assert_allclose(data.actions[3, :, 0], [0.3, 0.4, 0.4])
    np.testing.assert_array_equal(data.mask[3], [True, True, False])
    np.testing.assert_array_equal(data.episodes, [0] * 5 + [1] * 3)
    # The next episode does not leak into the labels
    np.testing.assert_allclose(data.actions[4, :, 0], [0.4, 0.4, 0.4])


def test_official_proprioception_with_and_without_robot_states(tmp_path):
    a = Demonstrations.from_hdf5(official_file(tmp_path / "a.hdf5", robot_states=True))
    b = Demonstrations.from_hdf5(official_file(tmp_path / "b.hdf5", robot_states=False))
    np.testing.assert_allclose(a.observations["proprio"], b.observations["proprio"], atol=1e-6)
    with h5py.File(tmp_path / "a.hdf5") as file:
        robot = file["data/demo_0/robot_states"][0]
    np.testing.assert_allclose(a.observations["proprio"][0], [*robot[2:5], *robot[5:9], *robot[:2]], rtol=1e-6)


def test_action_offset_corrects_observations_after_the_action(tmp_path):
    path = official_file(tmp_path / "x.hdf5")
    data = Demonstrations.from_hdf5(path, chunk_size=2, action_offset=1)
    np.testing.assert_allclose(data.actions[0, :, 0], [0.1, 0.2])
    np.testing.assert_array_equal(data.mask[4], [False, False])


def test_n_demos_and_order(tmp_path):
    path = official_file(tmp_path / "x.hdf5", lengths=range(1, 13), image_size=8)
    assert [len(e.actions) for e in read_demonstrations(path)] == list(range(1, 13))
    assert Demonstrations.from_hdf5(path, n_demos=2, chunk_size=2).n_episodes == 2
    with pytest.raises(ValueError, match="12 demonstrations, expected 13"):
        Demonstrations.from_hdf5(path, n_demos=13)


def test_round_trip(tmp_path):
    first, second = episode(4), episode(3, seed=1)
    second.instruction = "etwas anderes für später"
    second.success = False
    write_demonstrations(tmp_path / "deep" / "x_demo.hdf5", [first, second], INSTRUCTION, env_args={"env_name": "E"})
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["x_demo.hdf5"]
    read = list(read_demonstrations(tmp_path / "deep" / "x_demo.hdf5"))
    for before, after in zip((first, second), read, strict=True):
        for key in ("agentview", "wrist"):
            np.testing.assert_array_equal(before.observations[key], after.observations[key])
        np.testing.assert_allclose(before.observations["proprio"], after.observations["proprio"], atol=1e-6)
        np.testing.assert_allclose(before.actions, after.actions, atol=1e-7)
        assert before.success == after.success
    assert [e.instruction for e in read] == [INSTRUCTION, "etwas anderes für später"]
    with h5py.File(tmp_path / "deep" / "x_demo.hdf5") as file:
        # What LIBERO's own readers look at
        assert json.loads(file["data"].attrs["problem_info"])["language_instruction"] == INSTRUCTION
        assert file["data"].attrs["num_demos"] == 2 and file["data"].attrs["total"] == 7
        assert file["data/demo_0/obs/ee_states"].shape == (4, 6)
        np.testing.assert_array_equal(
            file["data/demo_0/obs/agentview_rgb"][0][::-1], first.observations["agentview"][0]
        )


def test_decisions_with_chunk_labels(tmp_path):
    labelled = episode(4, chunk=8)
    write_demonstrations(tmp_path / "x.hdf5", [labelled], INSTRUCTION)
    data = Demonstrations.from_hdf5(tmp_path / "x.hdf5", chunk_size=8, stride=3)
    np.testing.assert_allclose(data.actions, labelled.action_chunks)
    assert data.mask.all()
    assert Demonstrations.from_hdf5(tmp_path / "x.hdf5", chunk_size=5).actions.shape == (4, 5, 7)
    with pytest.raises(ValueError, match="chunks of 8 actions, chunk_size is 9"):
        Demonstrations.from_hdf5(tmp_path / "x.hdf5", chunk_size=9)


def test_episodes_are_written_one_by_one(tmp_path):
    made = []

    def episodes():
        for i in range(4):
            gc.collect()
            # None but the one that the writer has just been given
            assert sum(reference() is not None for reference in made) <= 1
            new = episode(3 + i, seed=i)
            made.append(weakref.ref(new))
            yield new

    write_demonstrations(tmp_path / "x.hdf5", episodes(), env_args=lambda: {"env_name": "E", "n": len(made)})
    with h5py.File(tmp_path / "x.hdf5") as file:
        attrs = file["data"].attrs
        assert (attrs["num_demos"], attrs["total"], attrs["env_name"]) == (4, 3 + 4 + 5 + 6, "E")
        assert json.loads(attrs["env_args"])["n"] == 4
        assert json.loads(attrs["problem_info"])["language_instruction"] == (episode().instruction or "")


def test_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "x.hdf5"
    write_demonstrations(path, [episode()], INSTRUCTION)
    before = path.read_bytes()
    broken = episode()
    broken.observations = {"depth": np.zeros((4, 8), dtype=np.float32)}
    with pytest.raises(ValueError, match="no place in LIBERO's format"):
        write_demonstrations(path, [broken], INSTRUCTION)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_tokens(tmp_path):
    write_demonstrations(tmp_path / "x.hdf5", [episode(3)], INSTRUCTION)
    data = Demonstrations.from_hdf5(tmp_path / "x.hdf5", chunk_size=4)
    tokens = data.tokens(256)
    assert tokens.shape == (3, 28)
    np.testing.assert_allclose(decode_tokens(tokens).reshape(data.actions.shape), data.actions, atol=1.01 / 255)
    assert data.token_mask().sum() == (4 - 1) * 7 + (4 - 2) * 7 + (4 - 3) * 7
    assert data.action_space(256) == spaces.MultiDiscrete([256] * 28)
    assert data.observation_space["wrist"] == spaces.Box(0, 255, (16, 16, 3), np.uint8)


def test_directory_addition_and_split(tmp_path):
    for i in range(3):
        write_demonstrations(tmp_path / f"{i}_demo.hdf5", [episode(3, seed=i), episode(2, seed=9 + i)], f"task {i}")
    data = Demonstrations.from_hdf5(tmp_path, n_demos=1)
    assert len(data) == 9 and decode_instruction(data.observations["instruction"][-1]) == "task 2"
    both = data + data
    assert len(both) == 18 and both.n_episodes == 6
    training, validation = both.split(0.34, seed=0)
    assert validation.n_episodes == 2 and len(training) + len(validation) == 18
    assert not set(training.episodes) & set(validation.episodes)


def test_plain_arrays():
    rng = np.random.default_rng(0)
    data = Demonstrations(rng.normal(size=(10, 3)).astype(np.float32), np.array([0, 1, 2, 1, 0] * 2))
    assert data.action_space() == spaces.Discrete(3) and data.observation_space.shape == (3,)
    assert len(data[np.array([1, 5])]) == 2
    with pytest.raises(ValueError, match="9 rows, there are 10 actions"):
        Demonstrations(np.zeros((9, 3)), np.zeros(10))


def test_axis_angle_keeps_the_sign_of_the_quaternion():
    half = np.sqrt(0.5)
    quat = np.array([[0, 0, half, half], [1, 0, 0, 0], [0, 0, 0, 1.0], [-half, 0, 0, -half]])
    np.testing.assert_allclose(quat_to_axis_angle(quat)[0], [0, 0, np.pi / 2])
    np.testing.assert_allclose(axis_angle_to_quat(quat_to_axis_angle(quat)), quat, atol=1e-12)


def test_instruction_bytes():
    text = "ä" * 10
    with pytest.raises(ValueError, match="room for 7"):
        encode_instruction(text, 7)
    assert decode_instruction(encode_instruction(text, 20)) == text
    assert encode_instruction("").sum() == 0


def test_resize_is_the_mean_over_areas():
    image = np.zeros((1, 4, 4, 3), dtype=np.uint8)
    image[0, :2, :2] = [[[0, 0, 0], [40, 40, 40]], [[80, 80, 80], [120, 120, 120]]]
    assert resize_images(image, (2, 2))[0, 0, 0, 0] == 60
    assert resize_images(image, (3, 3)).shape == (1, 3, 3, 3)
    assert resize_images(image, (4, 4)) is image


def test_clear_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        Demonstrations.from_hdf5(tmp_path / "missing.hdf5")
    with pytest.raises(FileNotFoundError, match="No .hdf5 files"):
        Demonstrations.from_hdf5(tmp_path)
    with h5py.File(tmp_path / "other.hdf5", "w") as file:
        file["x"] = 1
    with pytest.raises(ValueError, match="not a LIBERO demonstration file"):
        Demonstrations.from_hdf5(tmp_path / "other.hdf5")
    write_demonstrations(tmp_path / "x.hdf5", [episode()], INSTRUCTION)
    with pytest.raises(ValueError, match="no pictures of"):
        Demonstrations.from_hdf5(tmp_path / "x.hdf5", cameras=["birdview"])
    with pytest.raises(ValueError, match="3 rows, the episode has 4 actions"):
        Episode({"proprio": np.zeros((3, 9))}, np.zeros((4, 7)))
