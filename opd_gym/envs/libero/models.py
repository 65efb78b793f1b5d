"""
Compiled models on disk, with what only the pictures need kept apart from what the physics needs.

A LIBERO model is 250 MB, of which the physics reads five: the rest are textures and visual meshes, most of them shared
by many tasks. Here they are files of their own, named by their content, which all workers map into memory and whose GL
objects all tasks of a process share. The model that is left loads in milliseconds, and its physics is that of the
original bit by bit: every array but those of visual meshes and textures is the original's.
"""

from __future__ import annotations

import atexit
import errno
import functools
import hashlib
import json
import logging
import os
import shutil
import tempfile
import xml.etree.ElementTree as ET
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mujoco
import numpy as np

from opd_gym.envs.libero import light
from opd_gym.files import replacing, write_atomic

logger = logging.getLogger(__name__)

FORMAT = 3  # of the files; in their names, so that an older version's are not read
# What may differ from the original: the data of meshes, textures and the trees that only ray casting reads.
_VISUAL_ARRAYS = ("_", "mesh_", "tex_", "bvh_", "oct_")


@dataclass(frozen=True)
class Visuals:
    """
    What has been taken out of a model, by the model's own ids.

    :param meshes: id -> stem of ``<stem>.vertices.npy`` (float32 ``(n, 8)``: position, normal, texture coordinates) and
        ``<stem>.indices.npy`` (uint32 ``(3 m,)``), each followed by a checksum
    :param textures: id -> ``<name>.<kind>.npy``, uint8 ``(height, width, channels)``; the kind is "rgb" or "srgb" (the
        colour space of a flat texture) or "cube", whose six faces lie below each other, or are the same if there is
        only one
    """

    meshes: dict[int, Path]
    textures: dict[int, Path]


def load_model(xml: str, visuals: str, cache: Path) -> tuple[mujoco.MjModel, Visuals]:
    """
    Compile a model, or take it from the cache. What is damaged there is made anew; a cache that cannot be written or
    read is replaced by a temporary one of this process.

    :param xml: MJCF with absolute paths of its assets
    :param visuals: "exact" or "light"
    :param cache: folder of the cache; several processes, and users, may use it at once
    :return: the model without its visual meshes and textures, and those
    :raises FileNotFoundError: an asset is missing
    """
    key = _key(xml)
    try:
        return _load(xml, visuals, cache, cache / "models" / key)
    except OSError as error:
        private = _private_cache()
        logger.warning(
            "The cache %s cannot be used (%s): models go to %s until this process ends.", cache, error, private
        )
        return _load(xml, visuals, private, private / "models" / key)


@functools.cache
def _private_cache() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="opd_gym-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _load(xml: str, visuals: str, cache: Path, entry: Path) -> tuple[mujoco.MjModel, Visuals]:
    for attempt in range(2):
        if not (entry / f"{visuals}.json").is_file():
            _build(xml, visuals, cache, entry)
        try:
            index = json.loads((entry / f"{visuals}.json").read_text(encoding="utf-8"))
            if index.pop("checksum") != _checksum_of(index):
                raise ValueError(f"{visuals}.json has changed")
            physics = entry / f"{visuals}.mjb"
            if hashlib.sha256(physics.read_bytes()).hexdigest() != index["sha256"]:
                raise ValueError(f"{physics.name} has changed")
            model = mujoco.MjModel.from_binary_path(str(physics))
            found = Visuals(
                {int(i): cache / "meshes" / stem for i, stem in index["meshes"].items()},
                {int(i): cache / "textures" / name for i, name in index["textures"].items()},
            )
            files = [*found.textures.values(), *(file for stem in found.meshes.values() for file in _mesh_files(stem))]
            damaged = [file for file in files if not _is_intact(file)]
            if damaged:
                raise ValueError(f"{damaged[0].name} is missing or damaged")
            return model, found
        except (ValueError, KeyError, TypeError, AttributeError, FileNotFoundError) as error:
            if attempt:
                raise
            logger.warning("The cached model in %s is damaged (%s) and is made anew.", entry, error)
            (entry / f"{visuals}.json").unlink(missing_ok=True)
    raise AssertionError("unreachable")


def read_mesh(stem: Path) -> tuple[np.ndarray, np.ndarray]:
    """
    :param stem: see :class:`Visuals`
    :return: vertices and indices, mapped into memory
    """
    vertices, indices = _mesh_files(stem)
    return np.load(vertices, mmap_mode="r"), np.load(indices, mmap_mode="r")


def _mesh_files(stem: Path) -> tuple[Path, Path]:
    return stem.with_name(f"{stem.name}.vertices.npy"), stem.with_name(f"{stem.name}.indices.npy")


def _save_array(path: Path, array: np.ndarray) -> None:
    """Write an array as NumPy does, and behind it four bytes of checksum: GL would run into wrong indices."""
    with replacing(path) as temporary:
        np.save(temporary, array)
        with temporary.open("ab") as file:
            file.write(zlib.crc32(temporary.read_bytes()).to_bytes(4, "little"))


def _is_intact(path: Path) -> bool:
    """Whether an array is there as it was written. A process reads a file once for that."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return False
    version = status.st_ino, status.st_size, status.st_mtime_ns
    if _intact.get(path) != version:
        if status.st_size <= 4:
            return False
        content = memoryview(np.memmap(path, mode="r"))  # type: ignore[arg-type]
        if zlib.crc32(content[:-4]) != int.from_bytes(content[-4:], "little"):
            return False
        _intact[path] = version
    return True


# Files that this process has found intact
_intact: dict[Path, tuple[int, int, int]] = {}


def _checksum_of(index: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(index, sort_keys=True).encode())


def _key(xml: str) -> str:
    settings = FORMAT, mujoco.mj_versionString(), light.MESH_SETTINGS, light.MAX_TEXTURE
    digest = hashlib.sha256(f"{settings} {xml}".encode())
    for element in ET.fromstring(xml).iter():
        if "file" in element.attrib:
            status = os.stat(element.attrib["file"])
            digest.update(f"{status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()[:32]


def _save_model(model: mujoco.MjModel, path: Path) -> None:
    mujoco.mj_saveModel(model, str(path))
    # MuJoCo does not say that the disk is full
    if not path.is_file() or path.stat().st_size != mujoco.mj_sizeModel(model):
        raise OSError(errno.ENOSPC, "the compiled model could not be written whole", str(path))


def _build(xml: str, visuals: str, cache: Path, entry: Path) -> None:
    full = mujoco.MjModel.from_xml_string(xml)
    try:
        stripped = _strip(xml, full)
        reason = _copy_physics(full, stripped) or _difference(full, stripped)
    except (AttributeError, TypeError, ValueError) as error:  # another version's MjSpec
        reason = str(error)
    if reason:
        logger.warning("The visuals stay in the compiled model, which costs memory and time: %s.", reason)
        stripped = None
    meshes: dict[int, str] = {}
    textures: dict[int, str] = {}
    if stripped is not None:
        shown = set(full.geom_dataid[full.geom_type == mujoco.mjtGeom.mjGEOM_MESH].tolist())
        for mesh in _visual_meshes(full):
            if mesh in shown:
                meshes[mesh] = _save_mesh(full, mesh, visuals, cache)
        for texture in range(full.ntex):
            textures[texture] = _save_texture(full, texture, visuals, cache)
    model = full if stripped is None else stripped
    with replacing(entry / f"{visuals}.mjb") as temporary:
        _save_model(model, temporary)
    digest = hashlib.sha256((entry / f"{visuals}.mjb").read_bytes()).hexdigest()
    # Through JSON, in which keys are strings
    index = json.loads(json.dumps({"sha256": digest, "meshes": meshes, "textures": textures}))
    # Last, because it says that the rest is there
    write_atomic(entry / f"{visuals}.json", json.dumps({**index, "checksum": _checksum_of(index)}))


def _visual_meshes(model: mujoco.MjModel) -> list[int]:
    """Meshes that no geom collides with; LIBERO's scenes also bring meshes that no geom uses at all."""
    is_mesh = model.geom_type == mujoco.mjtGeom.mjGEOM_MESH
    collides = is_mesh & ((model.geom_contype != 0) | (model.geom_conaffinity != 0))
    return sorted(set(range(model.nmesh)) - set(model.geom_dataid[collides].tolist()))


def _strip(xml: str, full: mujoco.MjModel) -> mujoco.MjModel:
    """The same model with a tetrahedron for every visual mesh and a pixel for every texture."""
    spec = mujoco.MjSpec.from_string(xml)
    textured = full.mesh_texcoordadr >= 0
    drop = set(_visual_meshes(full))
    for i, mesh in enumerate(spec.meshes):
        if i not in drop:
            continue
        mesh.name = mujoco.mj_id2name(full, mujoco.mjtObj.mjOBJ_MESH, i)
        mesh.file = ""
        mesh.uservert = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], dtype=np.float32).ravel()
        mesh.userface = np.array([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]], dtype=np.int32).ravel()
        if textured[i]:
            mesh.usertexcoord = np.zeros(8, dtype=np.float32)
    for i, texture in enumerate(spec.textures):
        texture.name = mujoco.mj_id2name(full, mujoco.mjtObj.mjOBJ_TEXTURE, i) or ""  # a sky box needs no name
        texture.file = ""
        texture.builtin = mujoco.mjtBuiltin.mjBUILTIN_FLAT
        texture.width = texture.height = 1
    return spec.compile()


def _copy_physics(source: mujoco.MjModel, target: mujoco.MjModel) -> str | None:
    """
    :return: what does not fit, None if all does
    """
    if (source.nmesh, source.ntex) != (target.nmesh, target.ntex):
        return "the numbers of meshes or textures differ"
    for name in dir(source):
        value = getattr(source, name)
        if name.startswith(_VISUAL_ARRAYS) or not isinstance(value, np.ndarray):
            continue
        copy = getattr(target, name)
        if copy.shape != value.shape:
            return f"{name} has shape {copy.shape} and not {value.shape}"
        if copy.flags.writeable:
            copy[...] = value
        elif not np.array_equal(copy, value):
            return f"{name} differs"
    for name in ("extent", "meaninertia", "meanmass", "meansize"):
        setattr(target.stat, name, getattr(source.stat, name))
    target.stat.center[:] = source.stat.center
    # The bounding volumes of a body's geoms, which collision detection reads, come before those of the meshes.
    n = int((source.body_bvhadr + source.body_bvhnum).max())
    for name in ("bvh_aabb", "bvh_child", "bvh_nodeid", "bvh_depth"):
        getattr(target, name)[:n] = getattr(source, name)[:n]
    return None


def _difference(a: mujoco.MjModel, b: mujoco.MjModel, n_steps: int = 200) -> str | None:
    """
    Let two models fall and flail.

    :return: what differs, None if all bits agree
    """
    states = []
    warn = mujoco.get_mju_user_warning()
    # The objects lie in each other before a reset has placed them, and some fly apart: MuJoCo need not warn of it
    mujoco.set_mju_user_warning(lambda text: None)
    try:
        for model in (a, b):
            data, rng = mujoco.MjData(model), np.random.default_rng(0)
            trace = []
            for _ in range(n_steps):
                data.ctrl[:] = rng.uniform(-1.0, 1.0, model.nu)
                mujoco.mj_step(model, data)
                trace.append(np.concatenate([data.qpos, data.qvel]))
            states.append(np.array(trace))
    finally:
        mujoco.set_mju_user_warning(warn)
    if not np.array_equal(states[0], states[1]):
        return f"their physics differ from step {int((states[0] != states[1]).any(1).argmax())} on"
    return None


def _save_mesh(model: mujoco.MjModel, mesh: int, visuals: str, cache: Path) -> str:
    vertices, faces, normals, uv = _mesh_arrays(model, mesh)
    if uv is None:
        normals = _shading_normals(vertices[faces], normals)
    elif visuals == "light" and not _is_textured(model, mesh):
        uv = None  # nothing to spend faces on
    digest = hashlib.sha256(f"{FORMAT} {visuals} {light.MESH_SETTINGS if visuals == 'light' else ''}".encode())
    for array in (vertices, faces, normals, uv):
        digest.update(b"-" if array is None else np.ascontiguousarray(array).tobytes())
    stem = digest.hexdigest()[:32]
    vertex_file, index_file = _mesh_files(cache / "meshes" / stem)
    if not (_is_intact(vertex_file) and _is_intact(index_file)):
        if visuals == "light":
            simple = light.lighten_mesh(light.Mesh(vertices, faces, normals, uv))
            vertices, faces, normals, uv = simple.vertices, simple.faces, simple.normals, simple.uv
        corners, indices = _interleave(vertices, faces, normals, uv)
        for file, array in ((vertex_file, corners), (index_file, indices)):
            _save_array(file, array)
    return stem


def _is_textured(model: mujoco.MjModel, mesh: int) -> bool:
    shows = (model.geom_type == mujoco.mjtGeom.mjGEOM_MESH) & (model.geom_dataid == mesh) & (model.geom_matid >= 0)
    return bool((model.mat_texid[model.geom_matid[shows]] >= 0).any())


def _mesh_arrays(model: mujoco.MjModel, mesh: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """
    :return: vertices (n, 3), faces (m, 3), normals of the corners (m, 3, 3), texture coordinates of the corners
        (m, 3, 2) or None
    """
    v0, n0, t0 = model.mesh_vertadr[mesh], model.mesh_normaladr[mesh], model.mesh_texcoordadr[mesh]
    part = slice(model.mesh_faceadr[mesh], model.mesh_faceadr[mesh] + model.mesh_facenum[mesh])
    return (
        model.mesh_vert[v0 : v0 + model.mesh_vertnum[mesh]],
        model.mesh_face[part],
        model.mesh_normal[n0 + model.mesh_facenormal[part]],
        model.mesh_texcoord[t0 + model.mesh_facetexcoord[part]] if t0 >= 0 else None,
    )


def _shading_normals(positions: np.ndarray, normals: np.ndarray) -> np.ndarray:
    """
    MuJoCo shades an untextured mesh flat where its edges are sharp.

    :param positions: corners of the faces, float32 (m, 3, 3)
    :param normals: their normals, float32 (m, 3, 3)
    :return: the normals that are drawn
    """
    face_normals = np.cross(positions[:, 1] - positions[:, 0], positions[:, 2] - positions[:, 0])
    length = np.sqrt((face_normals * face_normals).sum(axis=1, keepdims=True))
    # Multiplied by the inverse and not divided, as MuJoCo does: the last bits show in the pixels
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = np.float32(1) / length
        face_normals = np.where(length < 1e-10, np.array([0, 0, 1], dtype=np.float32), face_normals * inverse)
    sharp = np.einsum("fcx,fx->fc", normals, face_normals) < 0.8
    return np.where(sharp[..., None], face_normals[:, None], normals)


def _interleave(
    vertices: np.ndarray, faces: np.ndarray, normals: np.ndarray, uv: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """What MuJoCo's renderer sends to GL for a mesh, equal corners merged: see ``read_mesh``."""
    positions = np.asarray(vertices, dtype=np.float32)[faces]
    normals = np.asarray(normals, dtype=np.float32)
    uv = np.zeros((*faces.shape, 2), dtype=np.float32) if uv is None else uv
    corners = np.concatenate([positions, normals, uv], axis=-1, dtype=np.float32).reshape(-1, 8)
    _, first, unique = np.unique(corners.view("V32").ravel(), return_index=True, return_inverse=True)
    # In the order of their first use, which keeps neighbours together
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return corners[first[order]], rank[unique].astype(np.uint32)


def _save_texture(model: mujoco.MjModel, texture: int, visuals: str, cache: Path) -> str:
    height, width, channels = model.tex_height[texture], model.tex_width[texture], model.tex_nchannel[texture]
    start = model.tex_adr[texture]
    pixels = model.tex_data[start : start + height * width * channels].reshape(height, width, channels)
    settings = light.MAX_TEXTURE if visuals == "light" else ""
    digest = hashlib.sha256(f"{FORMAT} {visuals} {settings} {pixels.shape}".encode())
    digest.update(np.ascontiguousarray(pixels).tobytes())
    if model.tex_type[texture] != mujoco.mjtTexture.mjTEXTURE_2D:
        kind = "cube"
    # Before MuJoCo 3.3 textures had no colour space
    elif hasattr(model, "tex_colorspace") and model.tex_colorspace[texture] == mujoco.mjtColorSpace.mjCOLORSPACE_SRGB:
        kind = "srgb"
    else:
        kind = "rgb"
    name = f"{digest.hexdigest()[:32]}.{kind}.npy"
    if not _is_intact(cache / "textures" / name):
        _save_array(cache / "textures" / name, light.shrink_texture(pixels) if visuals == "light" else pixels)
    return name
