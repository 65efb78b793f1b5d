"""LeRobot's data sets: files that LeRobot wrote (golden/lerobot), round trips, and LeRobot's own loader where it is."""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from opd_gym import SFT
from opd_gym.demonstrations import Demonstrations, Episode, read_lerobot, read_statistics, write_lerobot
from opd_gym.demonstrations.hdf5 import quat_to_axis_angle

GOLDEN = Path(__file__).parent / "golden" / "lerobot"
TASKS = ["put the bowl on the plate", "open the drawer"]


def picture(episode, step, camera, size=64):
    """As make_golden.py of the golden files draws them."""
    rows, columns = np.mgrid[:size, :size] * (255 / (size - 1))
    return np.stack([columns, rows, np.full_like(rows, 20 * step + 100 * camera + 50 * episode)], axis=-1).astype("u1")


def libero_episode(n=5, seed=0, size=32, instruction=TASKS[0], **kwargs):
    rng = np.random.default_rng(seed)
    quat = rng.normal(size=(n, 4))
    quat /= np.linalg.norm(quat, axis=1, keepdims=True)
    fingers = rng.uniform(0.0, 0.04, (n, 2)) * [1, -1]
    pictures = {
        name: np.stack([picture(seed, step, camera, size) for step in range(n)])
        for camera, name in enumerate(("agentview", "wrist"))
    }
    proprio = np.concatenate([rng.normal(size=(n, 3)), quat, fingers], axis=1).astype(np.float32)
    return Episode({**pictures, "proprio": proprio}, rng.uniform(-1, 1, (n, 7)), instruction=instruction, **kwargs)


def copied(tmp_path, name="images"):
    return Path(shutil.copytree(GOLDEN / name, tmp_path / name))


def change_info(folder, **values):
    path = folder / "meta/info.json"
    info = json.loads(path.read_text())
    info.update(values)
    path.write_text(json.dumps(info))
    return info


@pytest.mark.parametrize("name", ["images", "videos"])
def test_what_lerobot_wrote(name):
    expected = np.load(GOLDEN / f"{name}.npz")
    episodes = list(read_lerobot(GOLDEN / name))
    assert [episode.instruction for episode in episodes] == TASKS
    assert [len(episode.actions) for episode in episodes] == [5, 7]
    for number, episode in enumerate(episodes):
        rows = expected["episode_index"] == number
        np.testing.assert_array_equal(episode.actions, expected["action"][rows])
        state, proprio = expected["observation.state"][rows], episode.observations["proprio"]
        np.testing.assert_allclose(quat_to_axis_angle(proprio[:, 3:7]), state[:, 3:6], atol=1e-5)
        np.testing.assert_array_equal(proprio[:, [0, 1, 2, 7, 8]], state[:, [0, 1, 2, 6, 7]])
        for camera, key in enumerate(("agentview", "wrist")):
            drawn = np.stack([picture(number, step, camera) for step in range(len(proprio))])
            # LeRobot's LIBERO is mirrored, left for right
            tolerance = 0 if name == "images" else 12
            np.testing.assert_allclose(episode.observations[key][:, :, ::-1].astype(int), drawn, atol=tolerance)
        if name == "videos":
            read = expected["observation.images.image"][rows].astype(int)
            # Its decoder rounds colours a little differently
            np.testing.assert_allclose(episode.observations["agentview"][:, :, ::-1].astype(int), read, atol=3)


def test_plain_layout_and_names():
    (episode, _) = read_lerobot(GOLDEN / "images", layout="plain", cameras=["image2"])
    assert episode.observations.keys() == {"image2", "proprio"} and episode.observations["proprio"].shape == (5, 8)
    np.testing.assert_array_equal(episode.observations["image2"][3], picture(0, 3, 1))
    names = {"front": "observation.images.image", "proprio": "action", "actions": "observation.state"}
    (episode, _) = read_lerobot(GOLDEN / "images", features=names)
    np.testing.assert_array_equal(episode.observations["front"][4], picture(0, 4, 0))
    assert episode.actions.shape == (5, 8)


def test_demonstrations_out_of_lerobots_files():
    data = Demonstrations.from_hdf5([GOLDEN / "images"], chunk_size=3, image_size=32, n_demos=1)
    assert len(data) == 12 and data.n_episodes == 2 and data.actions.shape == (12, 3, 7)
    assert not data.mask[4, 1] and data.mask[4, 0]
    assert data.observations["agentview"].shape == (12, 32, 32, 3)
    kwargs = {"lerobot": {"layout": "plain"}, "cameras": ["image"]}
    assert Demonstrations.from_hdf5(GOLDEN / "images", **kwargs).observations["proprio"].shape == (12, 8)
    assert read_statistics(GOLDEN / "images") is None


def test_a_policy_learns_from_lerobots_files():
    pytest.importorskip("transformers", reason="pip install opd-gym[vla]")
    body = {"hidden_size": 32, "intermediate_size": 64, "stem_channels": [16, 32], "summary_size": 32, "vocab_size": 64}
    sft = SFT(
        "VLAPolicy",
        demonstrations=str(GOLDEN / "images"),
        chunk_size=2,
        image_size=32,
        batch_size=4,
        policy_kwargs={"body_kwargs": body},
        seed=0,
        device="cpu",
    )
    assert sft.observation_space["agentview"].shape == (32, 32, 3) and len(sft.action_space.nvec) == 14
    sft.learn(2)


@pytest.mark.parametrize("videos", [False, True])
def test_round_trip(tmp_path, videos, monkeypatch):
    # Each episode in files of its own, or all in one
    for limit in (1, 2**20):
        monkeypatch.setattr("opd_gym.demonstrations.lerobot.MAX_FILE_BYTES", limit)
        episodes = [libero_episode(4 + seed, seed, instruction=TASKS[seed % 2]) for seed in range(3)]
        folder = tmp_path / str(limit)
        write_lerobot(folder, iter(episodes), videos=videos)
        assert len(list(folder.rglob("data/*/*.parquet"))) == (3 if limit == 1 else 1)
        for wrote, read in zip(episodes, read_lerobot(folder), strict=True):
            assert read.instruction == wrote.instruction
            np.testing.assert_array_equal(read.actions, wrote.actions)
            np.testing.assert_allclose(read.observations["proprio"], wrote.observations["proprio"], atol=1e-5)
            for camera in ("agentview", "wrist"):
                difference = np.abs(read.observations[camera].astype(int) - wrote.observations[camera])
                assert difference.max() <= (25 if videos else 0) and difference.mean() <= (5 if videos else 0)
    assert not list(tmp_path.glob(".tmp*"))


def test_another_robot_is_written_as_it_is(tmp_path):
    images = np.stack([picture(0, step, 0, 16) for step in range(3)])
    proprio = np.arange(42, dtype=np.float32).reshape(3, 14)
    write_lerobot(tmp_path / "x", [Episode({"head": images, "proprio": proprio}, proprio[:, :6], instruction="x")])
    (read,) = read_lerobot(tmp_path / "x")
    np.testing.assert_array_equal(read.observations["head"], images)
    np.testing.assert_array_equal(read.observations["proprio"], proprio)
    np.testing.assert_array_equal(read.actions, proprio[:, :6])


def test_the_statistics_are_lerobots(tmp_path):
    """Of the same frames as the golden files', against those that LeRobot computed."""
    # As they are, because the copy is not mirrored
    write_lerobot(tmp_path / "x", list(read_lerobot(GOLDEN / "images")))
    ours, theirs = (
        json.loads((folder / "meta/stats.json").read_text()) for folder in (tmp_path / "x", GOLDEN / "images")
    )
    assert ours.keys() == theirs.keys()
    for key, statistics in theirs.items():
        assert statistics.keys() == ours[key].keys()
        for name, value in statistics.items():
            got = np.array(ours[key][name], float)
            assert got.shape == np.shape(value), (key, name)
            if name in ("min", "max", "mean", "std", "count"):
                np.testing.assert_allclose(got, value, atol=0.01, err_msg=f"{key} {name}")


def test_labels_that_are_not_the_actions_that_follow(tmp_path):
    episode = libero_episode()
    following = np.stack([episode.actions[np.minimum(np.arange(t, t + 3), 4)] for t in range(5)])
    write_lerobot(tmp_path / "x", [libero_episode(action_chunks=following)])
    with pytest.raises(ValueError, match="not the actions that follow"):
        write_lerobot(tmp_path / "y", [libero_episode(action_chunks=following[::-1])])
    assert not (tmp_path / "y").exists()


def test_nothing_is_overwritten_and_nothing_left_behind(tmp_path):
    write_lerobot(tmp_path / "x", [libero_episode()])
    with pytest.raises(FileExistsError, match="not empty"):
        write_lerobot(tmp_path / "x", [libero_episode()])
    with pytest.raises(ValueError, match="no episodes"):
        write_lerobot(tmp_path / "y", [])
    with pytest.raises(ValueError, match="Episode 1 is"):
        write_lerobot(tmp_path / "y", [libero_episode(), libero_episode(size=16)], videos=True)
    with pytest.raises(ValueError, match="even sides"):
        write_lerobot(tmp_path / "y", [libero_episode(size=15)], videos=True)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def without_state(folder):
    info = change_info(folder)
    del info["features"]["observation.state"]
    change_info(folder, features=info["features"])


def of_old_format(folder):
    change_info(folder, codebase_version="v2.1")


def leading_out(folder):
    change_info(folder, data_path="../../{chunk_index}/{file_index}")


def without_data(folder):
    (folder / "data/chunk-000/file-000.parquet").unlink()


def cut_short(folder):
    path = folder / "data/chunk-000/file-000.parquet"
    path.write_bytes(path.read_bytes()[:-100])


def without_tasks(folder):
    (folder / "meta/tasks.parquet").unlink()


def no_json(folder):
    (folder / "meta/info.json").write_text("{")


def changed_rows(change):
    def apply(folder):
        import pyarrow.parquet as pq

        path = folder / "data/chunk-000/file-000.parquet"
        pq.write_table(change(pq.read_table(path)), path)

    return apply


def set_column(name, make):
    def change(table):
        import pyarrow as pa

        index = table.column_names.index(name)
        field = table.schema.field(name)
        return table.set_column(index, field, pa.array(make(table.column(name).to_pylist()), field.type))

    return changed_rows(change)


elsewhere = set_column(
    "observation.images.image", lambda cells: [{"bytes": None, "path": "/etc/hostname"}] * len(cells)
)
no_picture = set_column("observation.images.image", lambda cells: [{"bytes": b"x", "path": "x"}] * len(cells))
infinite = set_column("action", lambda rows: [[np.inf] * 7] * len(rows))
joints = set_column("observation.state", lambda rows: [[0.5] * 8] * len(rows))
unknown_task = set_column("task_index", lambda rows: [7] * len(rows))


def described(change):
    def apply(folder):
        import pyarrow.parquet as pq

        path = folder / "meta/episodes/chunk-000/file-000.parquet"
        pq.write_table(change(pq.read_table(path)), path)

    return apply


def twice(table):
    import pyarrow as pa

    return pa.concat_tables([table, table])


half_of_it, all_of_it_twice = described(lambda table: table.slice(1)), described(twice)
a_frame_less = changed_rows(lambda table: table.slice(1))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (without_state, r"no \['observation.state'\].*features="),
        (of_old_format, "'v2.1', expected v3.0"),
        (leading_out, "data_path"),
        (without_data, "not complete"),
        (cut_short, "cannot be read"),
        (without_tasks, "not complete"),
        (no_json, "cannot be read"),
        (elsewhere, "elsewhere"),
        (no_picture, "Frame 0 of observation.images.image cannot be read"),
        (infinite, "finite"),
        (joints, 'layout="plain"'),
        (unknown_task, "tasks"),
        (a_frame_less, "4 of its frames, expected 5"),
        (half_of_it, "Expected each once"),
        (all_of_it_twice, "Expected each once"),
        (lambda folder: change_info(folder, total_episodes=9), "says 9"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_is_wrong_is_named(tmp_path, change, match):
    folder = copied(tmp_path)
    change(folder)
    with pytest.raises(ValueError, match=match):
        list(read_lerobot(folder))


def test_cameras_of_one_name_are_told(tmp_path):
    folder = copied(tmp_path)
    features = json.loads((folder / "meta/info.json").read_text())["features"]
    change_info(folder, features={**features, "observation.image2": features["observation.images.image2"]})
    with pytest.raises(ValueError, match=r"observation.images.image2 and observation.image2 would be called the same"):
        next(read_lerobot(folder, layout="plain"))


def test_videos_that_do_not_fit(tmp_path):
    folder = copied(tmp_path, "videos")
    change_info(folder, fps=10)
    with pytest.raises(ValueError, match="0.1 s apart"):
        list(read_lerobot(folder))
    folder = copied(tmp_path / "other", "videos")
    video = folder / "videos/observation.images.image2/chunk-000/file-000.mp4"
    # A list of other files, which is no video
    video.write_text("ffconcat version 1.0\nfile /etc/hostname\n")
    with pytest.raises(ValueError, match="cannot be decoded"):
        list(read_lerobot(folder))
    video.unlink()
    with pytest.raises(ValueError, match="not complete"):
        list(read_lerobot(folder))


def test_arguments_that_fit_no_data_set():
    with pytest.raises(ValueError, match="layout must be"):
        list(read_lerobot(GOLDEN / "images", layout="droid"))
    with pytest.raises(ValueError, match=r"no pictures of \['head'\]"):
        list(read_lerobot(GOLDEN / "images", cameras=["head"]))
    with pytest.raises(ValueError, match="no pictures in colour"):
        names = {"front": "action", "proprio": "observation.state", "actions": "action"}
        list(read_lerobot(GOLDEN / "images", features=names))
    with pytest.raises(ValueError, match="n_demos=2"):
        list(read_lerobot(GOLDEN / "images", n_demos=2))


@pytest.mark.skipif(importlib.util.find_spec("lerobot") is None, reason="LeRobot is not installed (Python 3.12)")
@pytest.mark.parametrize("videos", [False, True])
def test_lerobot_reads_what_is_written(tmp_path, videos):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    episodes = [libero_episode(4 + seed, seed, instruction=TASKS[seed % 2]) for seed in range(3)]
    write_lerobot(tmp_path / "x", episodes, videos=videos, robot_type="panda")
    read = LeRobotDataset("opd_gym/x", tmp_path / "x", video_backend="pyav")
    assert len(read) == 15 and read.meta.total_episodes == 3
    rows = [(episode, step) for episode in episodes for step in range(len(episode.actions))]
    for row, (episode, step) in zip((read[i] for i in range(len(read))), rows, strict=True):
        assert row["task"] == episode.instruction
        np.testing.assert_array_equal(row["action"].numpy(), episode.actions[step])
        proprio = episode.observations["proprio"][step]
        np.testing.assert_allclose(row["observation.state"][3:6], quat_to_axis_angle(proprio[3:7]), atol=1e-5)
        image = (row["observation.images.image"].numpy() * 255).round().transpose(1, 2, 0)
        difference = np.abs(image - episode.observations["agentview"][step][:, ::-1])
        assert difference.mean() <= (5 if videos else 0)
    # Labels of chunks, as its policies are trained on
    read = LeRobotDataset("opd_gym/x", tmp_path / "x", delta_timestamps={"action": [0.0, 0.05]}, video_backend="pyav")
    np.testing.assert_array_equal(read[1]["action"].numpy(), episodes[0].actions[1:3])
    assert read.meta.stats["action"]["mean"].shape == (7,)
