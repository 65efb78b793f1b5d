"""The cache of compiled LIBERO models, and the pictures that are drawn from what it keeps apart."""

import gc
import os
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("libero", reason="LIBERO is not installed: pip install 'opd_gym[libero]'")

import mujoco  # noqa: E402

from opd_gym.envs.libero import light, rendering  # noqa: E402
from opd_gym.envs.libero.models import _interleave, _shading_normals, load_model, read_mesh  # noqa: E402
from opd_gym.envs.libero.simulator import Simulator  # noqa: E402
from opd_gym.envs.libero.suites import tasks  # noqa: E402

CAMERAS = ("agentview", "robot0_eye_in_hand")
XML = """
<mujoco>
  <asset>
    <texture name="paint" type="2d" builtin="checker" width="64" height="32" rgb1="1 0 0" rgb2="0 0 1"/>
    <texture name="sky" type="skybox" builtin="gradient" width="16" height="96"/>
    <material name="paint" texture="paint"/>
    <mesh name="shown" file="{folder}/shown.obj"/>
    <mesh name="hit" vertex="0 0 0  .1 0 0  0 .1 0  0 0 .1"/>
    <mesh name="unused" vertex="0 0 0  .2 0 0  0 .2 0  0 0 .2"/>
  </asset>
  <worldbody>
    <geom type="plane" size="1 1 .1" material="paint"/>
    <body pos="0 0 .3">
      <freejoint/>
      <geom type="mesh" mesh="hit" rgba="0 0 0 0" mass=".1"/>
      <geom name="look" type="mesh" mesh="shown" contype="0" conaffinity="0" material="paint" mass="0"/>
    </body>
  </worldbody>
</mujoco>
"""
OBJ = """
v 0 0 0
v .1 0 0
v 0 .1 0
v 0 0 .1
v .1 .1 .1
vt 0 0
vt 1 0
vt 0 1
vt 1 1
f 1/1 3/2 2/3
f 1/1 2/2 4/4
f 1/1 4/2 3/3
f 2/1 3/2 5/3
f 3/1 4/2 5/3
f 4/1 2/2 5/4
"""


@pytest.fixture
def xml(tmp_path):
    (tmp_path / "shown.obj").write_text(OBJ)
    return XML.format(folder=tmp_path)


def fall(model, n=300):
    data = mujoco.MjData(model)
    trace = []
    for _ in range(n):
        mujoco.mj_step(model, data)
        trace.append(data.qpos.copy())
    return np.array(trace)


def test_visuals_are_taken_out_and_nothing_else(xml, tmp_path):
    original = mujoco.MjModel.from_xml_string(xml)
    for _ in range(2):  # made, and read from the cache
        model, visuals = load_model(xml, "exact", tmp_path / "cache")
        assert list(visuals.meshes) == [0], "shown by a geom and hit by none; the unused one needs no file"
        assert sorted(visuals.textures) == [0, 1]
        np.testing.assert_array_equal(fall(model), fall(original))
        for name in dir(original):
            value = getattr(original, name)
            if isinstance(value, np.ndarray) and not name.startswith(("_", "mesh_", "tex_", "bvh_", "oct_")):
                np.testing.assert_array_equal(getattr(model, name), value, err_msg=name)
        assert model.ntexdata < 100 < original.ntexdata
        vertices, indices = read_mesh(visuals.meshes[0])
        assert vertices.shape[1] == 8 and len(indices) == 18 and indices.max() == len(vertices) - 1
    texture = np.load(visuals.textures[0])
    assert texture.shape == (32, 64, 3) and visuals.textures[0].name.split(".")[1] in ("rgb", "srgb")
    np.testing.assert_array_equal(texture.ravel(), original.tex_data[: texture.size])


def test_corners_are_merged_only_if_all_of_them_is_equal():
    vertices = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0]], dtype=np.float32)
    faces = np.array([[0, 1, 2], [0, 1, 3]])
    normals = np.tile(np.float32([0, 0, 1]), (2, 3, 1))
    uv = np.zeros((2, 3, 2), dtype=np.float32)
    uv[1, 0] = 0.5
    corners, indices = _interleave(vertices, faces, normals, uv)
    assert indices.tolist() == [0, 1, 2, 3, 1, 2]  # the third corners agree, the first have other coordinates
    np.testing.assert_array_equal(corners[3], [0, 0, 0, 0, 0, 1, 0.5, 0.5])


def test_untextured_corners_get_the_faces_normal_where_the_edge_is_sharp():
    positions = np.array([[[0, 0, 0], [1, 0, 0], [0, 1, 0]]], dtype=np.float32)
    normals = np.array([[[0, 0, 1], [0, 0.6, 0.8], [0, 0.8, 0.6]]], dtype=np.float32)
    np.testing.assert_allclose(_shading_normals(positions, normals)[0], [[0, 0, 1], [0, 0.6, 0.8], [0, 0, 1]])


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("harm", [truncate, flip_a_bit, empty, lambda path: path.unlink()])
@pytest.mark.parametrize(
    "pattern",
    ["models/*/exact.mjb", "models/*/exact.json", "meshes/*.vertices.npy", "meshes/*.indices.npy", "textures/*.npy"],
)
def test_a_damaged_cache_is_made_anew(xml, tmp_path, pattern, harm, caplog):
    cache = tmp_path / "cache"
    model, visuals = load_model(xml, "exact", cache)
    expected = fall(model), [array.copy() for array in read_mesh(visuals.meshes[0])]
    file = next(cache.glob(pattern))
    before = file.read_bytes()
    harm(file)
    model, visuals = load_model(xml, "exact", cache)
    np.testing.assert_array_equal(fall(model), expected[0])
    assert "made anew" in caplog.text or pattern.endswith(".json")
    for array, original in zip(read_mesh(visuals.meshes[0]), expected[1], strict=True):
        np.testing.assert_array_equal(array, original)
    if file.suffix == ".npy":
        assert file.read_bytes() == before


def test_other_users_may_read_the_cache(xml, tmp_path):
    umask = os.umask(0o022)
    try:
        load_model(xml, "exact", tmp_path / "cache")
    finally:
        os.umask(umask)
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert len(files) == 6 and {path.stat().st_mode & 0o777 for path in files} == {0o644}


def test_without_a_writable_cache_models_go_to_a_temporary_folder(xml, tmp_path, caplog):
    (tmp_path / "cache").write_text("a file where a folder should be")
    model, visuals = load_model(xml, "exact", tmp_path / "cache")
    assert "cannot be used" in caplog.text
    np.testing.assert_array_equal(fall(model), fall(mujoco.MjModel.from_xml_string(xml)))
    read_mesh(visuals.meshes[0])


def test_a_full_disk_leaves_no_half_of_a_model(xml, tmp_path):
    """With files limited to 4 kB: the model, of 20, cannot be written."""
    script = (
        "import resource, signal, sys, pathlib; from opd_gym.envs.libero.models import load_model\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))\n"
        "load_model(sys.argv[1], 'exact', pathlib.Path(sys.argv[2]))"
    )
    command = [sys.executable, "-c", script, xml, str(tmp_path / "cache")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert "cannot be used" in result.stderr and "OSError" in result.stderr
    assert not list((tmp_path / "cache").rglob("*.json")) and not list((tmp_path / "cache").rglob(".tmp-*"))
    load_model(xml, "exact", tmp_path / "cache")


def test_a_changed_asset_is_noticed(xml, tmp_path):
    before = load_model(xml, "exact", tmp_path / "cache")[1].meshes[0]
    (tmp_path / "shown.obj").write_text(OBJ.replace("v .1 .1 .1", "v .2 .1 .1"))
    os.utime(tmp_path / "shown.obj", (1, 1))
    assert load_model(xml, "exact", tmp_path / "cache")[1].meshes[0] != before


def test_workers_may_build_the_same_model_at_once(xml, tmp_path):
    script = (
        "import sys, pathlib; from opd_gym.envs.libero.models import load_model\n"
        "load_model(sys.argv[1], 'exact', pathlib.Path(sys.argv[2]))"
    )
    command = [sys.executable, "-c", script, xml, str(tmp_path / "cache")]
    workers = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    for worker in workers:
        assert worker.communicate(timeout=600)[1] == "" and worker.returncode == 0
    assert not list((tmp_path / "cache").rglob(".tmp-*"))


@pytest.mark.parametrize(("suite", "task_id"), [("libero_object", 0), ("libero_goal", 1)])
def test_what_is_not_drawn_could_not_be_seen(suite, task_id, monkeypatch):
    """LIBERO-Goal has a stove that mirrors what the camera does not see."""
    simulator = Simulator(tasks(suite)[task_id], "light")
    simulator.reset(0)
    rng = np.random.default_rng(0)
    dropped = 0
    original = rendering.Renderer._outside
    for _ in range(6):
        for _ in range(8):
            simulator.step(rng.uniform(-1, 1, 7))
        culled = simulator.render(CAMERAS, 96)
        camera = simulator._renderer._camera_id(CAMERAS[1])
        dropped += original(simulator._renderer, simulator.data, camera).sum()
        with monkeypatch.context() as patch:
            patch.setattr(rendering.Renderer, "_outside", lambda self, *_: np.zeros(self._model.ngeom, dtype=bool))
            everything = simulator.render(CAMERAS, 96)
        for a, b in zip(culled, everything, strict=True):
            np.testing.assert_array_equal(a, b)
    simulator.close()
    assert dropped > 60, "the camera at the wrist sees few of the robot's parts"


def test_tasks_share_what_they_show_and_the_last_one_frees_it():
    first, second = (Simulator(task, "light") for task in tasks("libero_object")[:2])
    before = len(rendering._textures._objects), len(rendering._meshes._objects)
    for simulator in (first, second):
        simulator.reset(0)
        simulator.render(CAMERAS, 32)
    shared = set(first._visuals.textures.values()) & set(second._visuals.textures.values())
    assert len(shared) >= 8 and min(rendering._textures._objects[path][1] for path in shared) >= 2
    picture = second.render(CAMERAS, 32)[0]
    first.close()
    np.testing.assert_array_equal(second.render(CAMERAS, 32)[0], picture)
    second.close()
    assert (len(rendering._textures._objects), len(rendering._meshes._objects)) == before


def test_a_simulator_that_was_not_closed_takes_nothing_from_others():
    first, second = (Simulator(task, "light") for task in tasks("libero_object")[:2])
    for simulator in (first, second):
        simulator.reset(0)
        simulator.render(CAMERAS, 32)
    picture = first.render(CAMERAS, 32)[0]
    n_live = len(rendering._Objects.live)
    del simulator, second
    gc.collect()
    np.testing.assert_array_equal(first.render(CAMERAS, 32)[0], picture)
    assert len(rendering._Objects.live) == n_live - 1
    first.close()


def test_a_renderer_refuses_what_it_would_draw_wrongly():
    simulator = Simulator(tasks("libero_object")[0], "light", max_size=64)
    simulator.reset(0)
    with pytest.raises(ValueError, match="1 to 64"):
        simulator.render(CAMERAS, 65)
    simulator.close()


def test_light_pictures_can_have_smooth_edges():
    task = tasks("libero_object")[0]
    rough, smooth = Simulator(task, "light", msaa=False), Simulator(task, "light", msaa=True)
    pictures = []
    for simulator in (rough, smooth):
        simulator.reset(0)
        pictures.append(simulator.render(CAMERAS, 64)[0].astype(float))
        simulator.close()
    difference = np.abs(pictures[0] - pictures[1])
    assert difference.max() > 20 and np.median(difference) < 2, "only edges differ"


def sphere(n=60):
    """A sphere whose texture runs once around it: there is a seam, at which the texture jumps from 1 to 0."""
    u, v = np.meshgrid(np.linspace(0, 1, n + 1), np.linspace(0, 1, n + 1), indexing="ij")
    points = np.stack(
        [np.sin(np.pi * v) * np.cos(2 * np.pi * u), np.sin(np.pi * v) * np.sin(2 * np.pi * u), np.cos(np.pi * v)], -1
    ).reshape(-1, 3)
    i = np.arange((n + 1) ** 2).reshape(n + 1, n + 1)
    a, b, c, d = i[:-1, :-1].ravel(), i[1:, :-1].ravel(), i[1:, 1:].ravel(), i[:-1, 1:].ravel()
    faces = np.concatenate([np.stack([a, d, b], 1), np.stack([b, d, c], 1)])
    uv = np.stack([u, v], -1).reshape(-1, 2)[faces]
    return light.Mesh(0.05 * points, faces, points[faces], uv)


def test_a_simplified_mesh_keeps_shape_winding_shading_and_texture():
    mesh = sphere()
    small = light.lighten_mesh(mesh)
    assert 2 * len(small.faces) < len(mesh.faces)
    middle = small.triangles.mean(axis=1)
    outward = middle / np.linalg.norm(middle, axis=1, keepdims=True)
    assert np.abs(np.linalg.norm(middle, axis=1) - 0.05).max() < 0.003
    assert (small.areas() > 1e-9).mean() > 0.95
    wound = (small.face_normals() * outward).sum(1)[small.areas() > 1e-9]
    assert (wound > 0).all(), "every face looks outwards, as the original's do"
    assert (small.normals * outward[:, None]).sum(-1).min() > 0.9
    spread = np.ptp(small.uv[..., 0], axis=1)
    assert (spread > 0.5).mean() < 0.03, "faces beside the seam do not show the whole texture"


def test_a_mesh_that_has_few_faces_stays_as_it_is():
    mesh = sphere(10)
    assert light.lighten_mesh(mesh) is mesh


def test_shrunk_textures_are_averages():
    pixels = np.zeros((2048, 1024, 3), dtype=np.uint8)
    pixels[::2] = 200
    small = light.shrink_texture(pixels)
    assert small.shape == (1024, 512, 3) and (small == 100).all()
    cube = np.zeros((6 * 256, 256, 3), dtype=np.uint8)
    assert light.shrink_texture(cube) is cube
