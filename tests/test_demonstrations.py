"""LIBERO's HDF5 format: hand-made official files, round trips, labels of chunks."""

import gc
import json
import weakref
from dataclasses import replace

import h5py
import numpy as np
import pytest
from gymnasium import spaces

from opd_gym import make_vec
from opd_gym.actions import decode_tokens
from opd_gym.cli.demos import record_demonstrations
from opd_gym.cli.options import TrainArgs
from opd_gym.cli.train import complete_hyperparams
from opd_gym.demonstrations import (
    Demonstrations,
    Episode,
    read_demonstrations,
    read_statistics,
    untrusted,
    write_demonstrations,
)
from opd_gym.demonstrations.hdf5 import axis_angle_to_quat, quat_to_axis_angle, resize_images
from opd_gym.envs.libero.experts.record import record_episode
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


def changed(path, change):
    """An official file after a change to it."""
    with h5py.File(official_file(path, image_size=8), "a") as file:
        change(file)
    return path


def replaced(key, make):
    """A change: the data set gets other data, made of what it held."""

    def change(file):
        data = make(file[key][()])
        del file[key]
        file[key] = data

    return change


@pytest.mark.parametrize("convention", ["opengl", "opencv"])
def test_attributes_stored_as_bytes(tmp_path, convention):
    def change(file):
        file["data"].attrs.update({key: np.bytes_(value) for key, value in file["data"].attrs.items()})
        file["data"].attrs["macros_image_convention"] = np.array([convention.encode()])
        file["data/demo_0"].attrs["note"] = np.bytes_("text")
        file["data"].attrs["env_args"] = np.bytes_(json.dumps({"statistics": {"q01": [-1.0], "q99": [1.0]}}))
        if convention == "opencv":
            replaced("data/demo_0/obs/eye_in_hand_rgb", lambda x: x[:, ::-1])(file)

    path = changed(tmp_path / "x.hdf5", change)
    first = next(read_demonstrations(path))
    assert first.instruction == INSTRUCTION and first.attrs == {"note": "text"}
    assert first.observations["wrist"][0, 0, 0, 0] == 255 and first.observations["wrist"][0, -1, 0, 0] == 0
    assert read_statistics(path) == {"q01": [-1.0], "q99": [1.0]}


@pytest.mark.parametrize(
    ("name", "instruction"),
    [
        ("open_the_drawer_demo", "open the drawer"),
        ("KITCHEN_SCENE4_open_the_drawer_demo", "open the drawer"),
        ("LIVING_ROOM_SCENE10_put_2_mugs_on_it_demo", "put 2 mugs on it"),
        ("image_v15", None),
    ],
)
def test_instruction_without_attributes(tmp_path, name, instruction):
    def change(file):
        for key in list(file["data"].attrs):
            del file["data"].attrs[key]

    path = changed(tmp_path / f"{name}.hdf5", change)
    if instruction is None:
        with pytest.raises(ValueError, match="image_v15.*pass the instruction"):
            next(read_demonstrations(path))
    else:
        assert next(read_demonstrations(path)).instruction == instruction
    assert next(read_demonstrations(path, instruction="")).instruction == ""
    with h5py.File(path, "a") as file:
        file["data/demo_0"].attrs["language_instruction"] = np.bytes_("close it")
    first = next(read_demonstrations(path))
    assert first.instruction == "close it" and first.observations["agentview"][0, 0, 0, 0] == 255


def test_robomimic_file(tmp_path):
    pose = np.random.default_rng(0).normal(size=(4, 9))
    pictures = np.zeros((4, 8, 8, 3), np.uint8)
    pictures[:, :4] = 255
    with h5py.File(tmp_path / "image_v15.hdf5", "w") as file:
        file["data/demo_3/actions"] = np.zeros((4, 7))
        file["data/demo_3/rewards"] = np.array([0.0, 0.0, 0.0, 1.0])
        obs = file.create_group("data/demo_3/obs")
        obs["robot0_eef_pos"], obs["robot0_eef_quat"], obs["robot0_gripper_qpos"] = (
            pose[:, :3],
            pose[:, 3:7],
            pose[:, 7:],
        )
        obs["agentview_image"] = obs["robot0_eye_in_hand_image"] = pictures
        obs["agentview_depth"] = np.zeros((4, 8, 8, 1))
        file["data"].attrs["env_args"] = json.dumps({"env_name": "Lift"})
    (only,) = read_demonstrations(tmp_path / "image_v15.hdf5", instruction="lift the cube")
    assert set(only.observations) == {"agentview", "wrist", "proprio"} and only.success
    np.testing.assert_array_equal(only.observations["wrist"], pictures)
    np.testing.assert_allclose(only.observations["proprio"], pose, rtol=1e-6)


@pytest.mark.parametrize(
    "make",
    [lambda x: np.moveaxis(x, 3, 1), lambda x: x / 255.0, lambda x: np.moveaxis(x, 3, 1).astype(np.float16) / 255],
)
def test_pictures_in_other_layouts(tmp_path, make):
    key = "data/demo_0/obs/agentview_rgb"
    picture = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    path = changed(tmp_path / "x.hdf5", replaced(key, lambda _: make(picture)))
    read = next(read_demonstrations(path)).observations["agentview"]
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, picture[:, ::-1])


def nan_at(x, index, value=np.nan):
    x = x.astype(np.float64)
    x[index] = value
    return x


@pytest.mark.parametrize(
    ("key", "make", "match"),
    [
        ("actions", lambda x: nan_at(x, (1, 2)), r"actions has nan at \(1, 2\)"),
        ("actions", lambda x: nan_at(x, (1, 2), 1e300), r"actions has inf at \(1, 2\)"),
        ("actions", lambda x: x[:0], "actions has shape"),
        ("actions", lambda x: x[:, 0], "actions has shape"),
        ("actions", lambda x: np.bytes_("x"), "actions is .* expected numbers"),
        ("robot_states", lambda x: nan_at(x, (0, 3), -np.inf), "robot_states has -inf"),
        ("rewards", lambda x: x[:-1], "rewards has shape"),
        ("obs", lambda x: None, "must have a group `obs`"),
        ("obs/agentview_rgb", lambda x: x[:-1], r"obs/agentview_rgb has shape .* expected 5 rows"),
        ("obs/agentview_rgb", lambda x: x[..., :1], "agentview_rgb has shape"),
        ("obs/agentview_rgb", lambda x: x.reshape(5, -1), "agentview_rgb has shape"),
        ("obs/agentview_rgb", lambda x: x.astype(np.float32), "agentview_rgb has float32 from 0.0 to 255.0"),
        ("obs/agentview_rgb", lambda x: x.astype(np.int64), "agentview_rgb has int64"),
        ("obs/agentview_rgb", lambda x: np.full(5, b"\x89PNG"), "agentview_rgb is .* must be decoded"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path, key, make, match):
    def change(file):
        if key == "obs":
            del file["data/demo_0/obs"]
        else:
            replaced(f"data/demo_0/{key}", make)(file)

    with pytest.raises(ValueError, match=f"x.hdf5: /data/demo_0.*{match}"):
        list(read_demonstrations(changed(tmp_path / "x.hdf5", change)))


def test_incomplete_files(tmp_path):
    path = official_file(tmp_path / "x.hdf5", image_size=8)
    whole = path.read_bytes()
    for length in range(0, len(whole), len(whole) // 9):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="x.hdf5: "):
            list(read_demonstrations(path))
    for chunks in (None, (1, 7)):

        def change(file, chunks=chunks):
            del file["data/demo_1/actions"]
            actions = file["data/demo_1"].create_dataset("actions", (3, 7), np.float64, chunks=chunks)
            if chunks:
                actions[0] = 1.0

        with pytest.raises(ValueError, match="/data/demo_1/actions is incomplete"):
            list(read_demonstrations(changed(tmp_path / "x.hdf5", change)))


@pytest.mark.parametrize("kind", ["link", "soft link", "external", "virtual", "whole demo"])
def test_data_of_other_files_is_not_read(tmp_path, kind):
    official_file(tmp_path / "secret.hdf5", image_size=8)

    def change(file):
        demo = file["data/demo_0"]
        del demo["actions"]
        if kind == "link":
            demo["actions"] = h5py.ExternalLink("secret.hdf5", "/data/demo_0/actions")
        elif kind == "soft link":
            file["out"] = h5py.ExternalLink("secret.hdf5", "/data/demo_0")
            demo["actions"] = h5py.SoftLink("/out/actions")
        elif kind == "external":
            demo.create_dataset("actions", (5, 7), np.uint8, external=[(str(tmp_path / "secret.hdf5"), 0, 35)])
        elif kind == "virtual":
            layout = h5py.VirtualLayout((5, 7), np.float64)
            layout[...] = h5py.VirtualSource(str(tmp_path / "secret.hdf5"), "data/demo_0/actions", (5, 7))
            demo.create_virtual_dataset("actions", layout)
        else:
            del file["data/demo_0"]
            file["data/demo_0"] = h5py.ExternalLink("secret.hdf5", "/data/demo_0")

    with pytest.raises(ValueError, match="x.hdf5: /data/demo_0.* data elsewhere"):
        list(read_demonstrations(changed(tmp_path / "x.hdf5", change)))


def test_one_bad_file_in_a_folder(tmp_path):
    for name in "abc":
        official_file(tmp_path / f"{name}_demo.hdf5", lengths=(2, 1), image_size=8)
    (tmp_path / "b_demo.hdf5").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    statistics = {"q01": [-1.0] * 7, "q99": [1.0] * 7}
    write_demonstrations(tmp_path / "d_demo.hdf5", [episode()], "do it", env_args={"statistics": statistics})
    for read in (Demonstrations.from_hdf5, read_statistics):
        with pytest.raises(ValueError, match="b_demo.hdf5"):
            read(tmp_path)
    with pytest.warns(UserWarning, match=r"(?s)Skipped 2 of 4 .*b_demo.hdf5: .*d_demo.hdf5 has shape \(16, 16, 3\)"):
        data = Demonstrations.from_hdf5(tmp_path, skip=True)
    assert len(data) == 6
    np.testing.assert_array_equal(data.episodes, [0, 0, 1, 2, 2, 3])
    assert read_statistics([tmp_path / "b_demo.hdf5", tmp_path / "d_demo.hdf5"], skip=True) == statistics
    with pytest.raises(ValueError, match="None of the 1 files"):
        Demonstrations.from_hdf5(tmp_path / "b_demo.hdf5", skip=True)


@pytest.mark.parametrize(
    "statistics", [3, {"q01": [0.0]}, {"q01": [0.0], "q99": [np.nan]}, {"q01": [1.0], "q99": [0.0]}]
)
def test_damaged_statistics(tmp_path, statistics):
    write_demonstrations(tmp_path / "x.hdf5", [episode()], "do it", env_args={"statistics": statistics})
    with pytest.raises(ValueError, match="x.hdf5: statistics in env_args"):
        read_statistics(tmp_path / "x.hdf5")


def test_bad_files_are_left_out_on_the_command_line(tmp_path):
    statistics = {"q01": [-1.0] * 7, "q99": [1.0] * 7}
    write_demonstrations(tmp_path / "a.hdf5", [episode()], "do it", env_args={"statistics": statistics})
    (tmp_path / "b.hdf5").write_bytes(b"")
    args = TrainArgs("sft", "LiberoObject-v0", demonstrations=[str(tmp_path)])
    with pytest.raises(ValueError, match="b.hdf5"):
        complete_hyperparams(args)
    args.hyperparams = ["demonstration_kwargs.skip:true"]
    values = complete_hyperparams(args)
    assert values["demonstration_kwargs"] == {"skip": True}
    assert values["policy_kwargs"]["body_kwargs"]["statistics"] == statistics


@pytest.mark.parametrize(
    "option",
    [
        {"chunk_size": 0},
        {"stride": 0},
        {"image_size": -1},
        {"perturbation": 1.5},
        {"perturbation": np.nan},
        {"seed": -1},
    ],
)
def test_recording_with_options_that_make_no_sense(tmp_path, option):
    with pytest.raises(ValueError, match=f"{next(iter(option))} must be"):
        record_demonstrations("LiberoObject-v0", tmp_path, **option)


@pytest.mark.parametrize(
    ("option", "match"),
    [
        ({"format": "zarr"}, "format must be"),
        ({"format": "lerobot", "stride": 2}, "stride=1"),
        ({"format": "lerobot", "perturbation": 0.1}, "perturbation=0"),
        ({"videos": True}, "--format lerobot"),
    ],
)
def test_recording_what_a_format_has_no_place_for(tmp_path, option, match):
    with pytest.raises(ValueError, match=match):
        record_demonstrations("LiberoObject-v0", tmp_path, **option)


def test_an_id_of_one_task_has_no_other(tmp_path):
    with pytest.raises(ValueError, match=r"has the tasks \[3\], and --task-ids names \[0\]"):
        record_demonstrations("LiberoObjectTask3-v0", tmp_path, task_ids=[0, 3])
    with pytest.raises(ValueError, match="is task 3 alone, and task_ids is \\(0,\\)"):
        make_vec("LiberoObjectTask3-v0", env_kwargs={"task_ids": (0,)})
    make_vec("LiberoObjectTask3-v0", env_kwargs={"task_ids": [3]}).close()


def test_numbers_that_are_not_finite_are_no_labels():
    for array in (np.array([[0.0], [np.nan]]), np.array([[np.inf], [0.0]])):
        with pytest.raises(ValueError, match="actions has"):
            Demonstrations(np.zeros((2, 3)), array)
        with pytest.raises(ValueError, match="observations has"):
            Demonstrations(array, np.zeros(2))
        with pytest.raises(ValueError, match="actions has"):
            Episode({}, array)
        with pytest.raises(ValueError, match="proprio.* has"):
            Episode({"proprio": array}, np.zeros((2, 7)))


def test_statistics_of_other_data():
    actions = np.linspace(-1.0, 1.0, 100)[:, None, None] * np.array([1.0, 0.5])
    data = Demonstrations(np.zeros((100, 3)), actions)
    data.tokens()  # all inside of [-1, 1]
    data.tokens(statistics={"q01": [-0.98, -0.49], "q99": [0.98, 0.49]})  # 2 % outside, as percentiles leave it
    with pytest.warns(UserWarning, match=r"10% .* dimension 1 lie outside of \[-0.45, 0.45\]"):
        data.tokens(statistics={"q01": [-1.0, -0.45], "q99": [1.0, 0.45]})
    with pytest.raises(ValueError, match=r"98% .* dimension 0 lie outside of \[-0.02, 0.02\].* from -1 to 1"):
        data.tokens(statistics={"q01": [-0.02, -0.5], "q99": [0.02, 0.5]})
    # A dimension that is not normalised, and a gripper of which only the side counts
    data.tokens(statistics={"q01": [-0.02, -0.5], "q99": [0.02, 0.5], "mask": [False, True]})
    data.tokens(statistics={"q01": [-1.0, 0.0], "q99": [1.0, 1.0], "mask": [True, False], "gripper": "open_is_one"})


@pytest.mark.parametrize(
    "kwargs",
    [{"chunk_size": 0}, {"stride": 0}, {"stride": -1}, {"action_offset": -1}, {"image_size": 0}, {"n_demos": -1}],
)
def test_options_that_make_no_sense(tmp_path, kwargs):
    path = official_file(tmp_path / "x.hdf5", image_size=8)
    with pytest.raises(ValueError, match=f"{next(iter(kwargs))} must be at least"):
        Demonstrations.from_hdf5(path, **kwargs)


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
    with pytest.raises(ValueError, match="action_offset=1 is for labels that are the actions which follow"):
        Demonstrations.from_hdf5(tmp_path / "x.hdf5", action_offset=1)
    with pytest.raises(ValueError, match="chunks of 8 actions, chunk_size is 9"):
        Demonstrations.from_hdf5(tmp_path / "x.hdf5", chunk_size=9)


def test_what_is_named_twice_counts_once(tmp_path):
    path = tmp_path / "in" / "x_demo.hdf5"
    path.parent.mkdir()
    write_demonstrations(path, [episode()], INSTRUCTION)
    (tmp_path / "link").symlink_to(path.parent)
    assert len(Demonstrations.from_hdf5([tmp_path, path, path, tmp_path / "link"])) == 4
    # Of both kinds: which was meant?
    for folder, match in ((tmp_path, "Name each"), (tmp_path / "sets", "holds some. Name each: .*lerobot")):
        info = folder / "lerobot" / "meta" / "info.json"
        info.parent.mkdir(parents=True)
        info.write_text("{}")
        with pytest.raises((ValueError, FileNotFoundError), match=match):
            Demonstrations.from_hdf5(folder)


def test_attributes_are_those_of_python(tmp_path):
    demonstration = episode()
    demonstration.attrs["seed"] = 7
    write_demonstrations(tmp_path / "x.hdf5", [demonstration], INSTRUCTION)
    (read,) = read_demonstrations(tmp_path / "x.hdf5")
    assert type(read.attrs["seed"]) is int and read.attrs["seed"] == 7


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


def test_a_mask_outlives_an_addition():
    """Labels of the other part, which has none, all count."""
    actions, mask = np.zeros((2, 3, 1)), np.array([[True, False, False], [True, True, False]])
    masked, plain = Demonstrations(np.zeros((2, 4)), actions, mask), Demonstrations(np.zeros((2, 4)), actions)
    np.testing.assert_array_equal((masked + plain).mask, [*mask, [True] * 3, [True] * 3])
    np.testing.assert_array_equal((plain + masked).mask, [[True] * 3, [True] * 3, *mask])
    assert (plain + plain).mask is None


@pytest.mark.parametrize("kind", ["action", "observation"])
def test_spaces_that_do_not_count_from_0(kind):
    """Labels would be those of the action next to them."""
    space = {f"{kind}_space": spaces.Discrete(3, start=1)}
    with pytest.raises(ValueError, match=f"demonstrations' {kind} space to count from 0"):
        Demonstrations(np.zeros((2, 4), np.float32), np.array([1, 2]), **space)


class Pushed:
    """As much of a LIBERO env as a recording needs: an episode of 30 steps."""

    def reset(self, seed, options):
        self.t = 0

    def current_observation(self):
        return {"t": np.array([self.t])}

    def expert_action(self):
        return np.zeros(7, dtype=np.float32)

    def step(self, action):
        self.t += 1
        return None, 0.0, self.t == 30, False, {"is_success": self.t == 30}


def test_an_episode_without_a_state_to_record():
    """The expert is pushed at once, and the next state to record would come after the episode."""
    found = record_episode(Pushed(), seed=0, task_id=0, chunk_size=8, stride=100, perturbation=1.0)
    assert (
        found.success
        and found.n_steps == 30
        and found.action_chunks.shape == (0, 8, 7)
        and found.actions.shape == (0, 7)
    )
    assert record_episode(Pushed(), seed=0, task_id=0, chunk_size=8, stride=100).observations["t"].tolist() == [[0]]


def test_an_episode_of_a_policy():
    """Its chunks of 5 are carried out whole, exactly, and thrown away at a push; a push is never a label."""
    asked = []

    def policy(obs):
        asked.append(int(obs["t"][0]))
        return (asked[-1] + np.arange(5)[:, None] * 0.01) * np.ones(7)

    found = record_episode(Pushed(), seed=0, task_id=0, chunk_size=4, stride=3, policy=policy)
    assert asked == [0, 5, 10, 15, 20, 25]
    steps = found.observations["t"][:, 0]
    assert steps.tolist() == list(range(0, 30, 3))
    wanted = [5 * (t // 5) + t % 5 * 0.01 for t in range(30)]
    wanted += [wanted[-1]] * 4
    for step, chunk in zip(steps, found.action_chunks, strict=True):
        np.testing.assert_allclose(chunk, np.repeat(np.array(wanted[step : step + 4])[:, None], 7, 1), rtol=1e-6)

    asked.clear()
    found = record_episode(Pushed(), seed=0, task_id=0, chunk_size=2, stride=1, perturbation=0.2, policy=policy)
    steps = found.observations["t"][:, 0]
    # The gaps are the pushes, and the policy is asked again right after each
    after_pushes = [b for a, b in zip(steps, steps[1:], strict=False) if b > a + 1]
    assert after_pushes and set(after_pushes) <= set(asked)
    for step, action in zip(steps, found.actions, strict=True):
        begin = max(t for t in asked if t <= step)
        np.testing.assert_allclose(action, begin + (step - begin) * 0.01, rtol=1e-6)


def test_arrays_that_are_no_labels():
    for actions in (np.array(["left", "right"]), np.array([1j, 2j])):
        with pytest.raises(ValueError, match="expected numbers"):
            Demonstrations(np.zeros((2, 3)), actions)
    flat = Demonstrations(np.zeros((2, 3)), np.zeros((2, 4)), mask=[[True, False, True, True]] * 2)
    assert flat.token_mask().tolist() == [[True, False, True, True]] * 2
    with pytest.raises(ValueError, match="leaves no action of an episode of 4"):
        Demonstrations.from_episodes([replace(episode(), instruction="x")], action_offset=4)


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


def test_a_process_that_does_not_start_is_not_blamed_on_the_file(tmp_path, monkeypatch):
    path = tmp_path / "pick_up_the_milk_demo.hdf5"
    path.write_bytes(b"")
    monkeypatch.setattr(untrusted, "_probe", None)
    monkeypatch.setattr(untrusted.sys, "path", [str(tmp_path)])
    with pytest.raises(RuntimeError, match="No process could be started that reads HDF5 files"):
        untrusted._look_first(path)
