"""
Light visuals: the visual meshes of a compiled MuJoCo model simplified in place, its physics untouched.

Software rendering of LIBERO is bound by geometry (380,000 faces; one basket has 66,000), not by pixels. Only meshes
that
no colliding geom uses are changed, so neither contacts nor masses can differ.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

import mujoco
import numpy as np

KEEP = 0.05  # share of the faces that stay
MIN_FACES = 300  # no mesh is simplified below this
MAX_TEXTURE = 512  # pixels a side; LIBERO's largest are 4096, for pictures of 128


def _visual_meshes(model: mujoco.MjModel) -> list[int]:
    is_mesh = model.geom_type == mujoco.mjtGeom.mjGEOM_MESH
    visual = is_mesh & (model.geom_contype == 0) & (model.geom_conaffinity == 0)
    return sorted(set(model.geom_dataid[visual].tolist()) - set(model.geom_dataid[is_mesh & ~visual].tolist()))


def _normals(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    a, b, c = (vertices[faces[:, i]] for i in range(3))
    n = np.cross(b - a, c - a)
    return n / np.maximum(np.linalg.norm(n, axis=1, keepdims=True), 1e-20)


def _barycentric(points: np.ndarray, triangles: np.ndarray) -> np.ndarray:
    """Clamped barycentric coordinates of points (n, 3) in triangles (n, 3, 3)."""
    a, b, c = triangles[:, 0], triangles[:, 1], triangles[:, 2]
    v0, v1, v2 = b - a, c - a, points - a
    d00, d01, d11 = (v0 * v0).sum(1), (v0 * v1).sum(1), (v1 * v1).sum(1)
    d20, d21 = (v2 * v0).sum(1), (v2 * v1).sum(1)
    denominator = np.where(np.abs(d00 * d11 - d01 * d01) < 1e-20, 1.0, d00 * d11 - d01 * d01)
    v = (d11 * d20 - d01 * d21) / denominator
    w = (d00 * d21 - d01 * d20) / denominator
    weights = np.clip(np.stack([1.0 - v - w, v, w], axis=1), 0.0, 1.0)
    return weights / np.maximum(weights.sum(1, keepdims=True), 1e-12)


def simplify_mesh(
    vertices: np.ndarray, faces: np.ndarray, corner_normals: np.ndarray, corner_uv: np.ndarray | None, n_faces: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """
    Quadric simplification that keeps winding, shading normals and texture coordinates.

    Every corner of a new face takes its attributes from the point nearest to it on an original face that looks the same
    way, so a thin shell never borrows from its other side and the winding follows the original's.

    :param vertices: (n, 3) float
    :param faces: (m, 3) int
    :param corner_normals: (m, 3, 3) float, one normal a corner
    :param corner_uv: (m, 3, 2) float or None
    :param n_faces: target number of faces
    :return: vertices, faces, corner normals and corner texture coordinates of the simplified mesh
    """
    import fast_simplification
    from scipy.spatial import cKDTree

    welded, inverse = np.unique(np.round(vertices, 6), axis=0, return_inverse=True)
    inverse = inverse.reshape(-1)
    f = inverse[faces]
    keep = (f[:, 0] != f[:, 1]) & (f[:, 1] != f[:, 2]) & (f[:, 0] != f[:, 2])
    f, source_uv = f[keep], None if corner_uv is None else corner_uv[keep]
    source_normals = corner_normals[keep]
    reduction = max(0.0, 1.0 - n_faces / max(len(f), 1))
    new_vertices, new_faces = fast_simplification.simplify(
        welded.astype(np.float32), f.astype(np.int32), target_reduction=reduction, agg=5
    )
    new_faces = np.asarray(new_faces, dtype=np.int32)
    triangles = welded[f]
    face_normals = _normals(welded, f)
    # The shading normals say which side is seen; some of LIBERO's meshes are wound the other way round.
    tree = cKDTree(triangles.mean(axis=1))
    new_normals = _normals(new_vertices, new_faces)
    corners = new_vertices[new_faces].reshape(-1, 3).astype(np.float64)
    centers = np.repeat(new_vertices[new_faces].mean(axis=1), 3, axis=0)
    k = min(12, len(f))
    # Searched a little inside the new face, so that corners on an edge do not all pick the neighbour across it.
    distance, candidates = tree.query(0.8 * corners + 0.2 * centers, k=k)
    distance, candidates = distance.reshape(len(corners), k), candidates.reshape(len(corners), k)
    facing = (face_normals[candidates] * np.repeat(new_normals, 3, axis=0)[:, None]).sum(-1)
    nearest = candidates[np.arange(len(corners)), np.argmin(distance + np.where(facing > 0.2, 0.0, 1e3), axis=1)]
    weights = _barycentric(corners, triangles[nearest])
    normals = (weights[:, :, None] * source_normals[nearest]).sum(1)
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-12)
    uv = None if source_uv is None else (weights[:, :, None] * source_uv[nearest]).sum(1).reshape(-1, 3, 2)
    return new_vertices, new_faces, normals.reshape(-1, 3, 3), uv


def _cached(
    path: Path, mesh: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None], n_faces: int
) -> dict[str, np.ndarray]:
    if path.exists():
        with np.load(path, allow_pickle=False) as archive:
            return dict(archive)
    vertices, faces, normals, uv = simplify_mesh(*mesh, n_faces)
    result = {"vertices": vertices, "faces": faces, "normals": normals.astype(np.float32)}
    if uv is not None:
        result["uv"] = uv.astype(np.float32)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".npz")
    os.close(handle)
    np.savez_compressed(temporary, **result)  # type: ignore[arg-type]
    os.replace(temporary, path)
    return result


def _simplify_in_place(model: mujoco.MjModel, mesh: int, cache: Path) -> None:
    v0, nv = model.mesh_vertadr[mesh], model.mesh_vertnum[mesh]
    f0, nf = model.mesh_faceadr[mesh], model.mesh_facenum[mesh]
    n0, t0 = model.mesh_normaladr[mesh], model.mesh_texcoordadr[mesh]
    target = max(MIN_FACES, int(nf * KEEP))
    if nf <= 2 * MIN_FACES:
        return
    vertices = model.mesh_vert[v0 : v0 + nv].astype(np.float64)
    faces = model.mesh_face[f0 : f0 + nf].copy()
    normals = model.mesh_normal[n0 : n0 + model.mesh_normalnum[mesh]][model.mesh_facenormal[f0 : f0 + nf]]
    uv = None
    if t0 >= 0:
        uv = model.mesh_texcoord[t0 : t0 + model.mesh_texcoordnum[mesh]][model.mesh_facetexcoord[f0 : f0 + nf]]
    digest = hashlib.sha256(f"1 {target}".encode())
    for array in (vertices, faces, normals) + (() if uv is None else (uv,)):
        digest.update(np.ascontiguousarray(array).tobytes())
    new = _cached(cache / f"{digest.hexdigest()[:32]}.npz", (vertices, faces, normals, uv), target)
    n_vertices, n_faces = len(new["vertices"]), len(new["faces"])
    # MuJoCo's arrays cannot grow: three corners a face are stored in the space of the original's normals and
    # coordinates.
    fits = n_vertices <= nv and n_faces <= nf and 3 * n_faces <= model.mesh_normalnum[mesh]
    if not fits or (uv is not None and 3 * n_faces > model.mesh_texcoordnum[mesh]):
        return
    model.mesh_vert[v0 : v0 + n_vertices] = new["vertices"]
    model.mesh_face[f0 : f0 + n_faces] = new["faces"]
    corner_index = np.arange(3 * n_faces).reshape(-1, 3)
    model.mesh_normal[n0 : n0 + 3 * n_faces] = new["normals"].reshape(-1, 3)
    model.mesh_facenormal[f0 : f0 + n_faces] = corner_index
    if uv is not None:
        model.mesh_texcoord[t0 : t0 + 3 * n_faces] = new["uv"].reshape(-1, 2)
        model.mesh_facetexcoord[f0 : f0 + n_faces] = corner_index
    model.mesh_facenum[mesh] = n_faces


def _shrink_texture(model: mujoco.MjModel, texture: int) -> None:
    height, width, channels = model.tex_height[texture], model.tex_width[texture], model.tex_nchannel[texture]
    if model.tex_type[texture] != mujoco.mjtTexture.mjTEXTURE_2D:
        return
    factor = 1
    while max(height, width) // factor > MAX_TEXTURE and height % (2 * factor) == 0 and width % (2 * factor) == 0:
        factor *= 2
    if factor == 1:
        return
    start = model.tex_adr[texture]
    pixels = model.tex_data[start : start + height * width * channels].reshape(
        height // factor, factor, width // factor, factor, channels
    )
    small = pixels.mean(axis=(1, 3)).round().astype(np.uint8)
    model.tex_data[start : start + small.size] = small.reshape(-1)
    model.tex_height[texture], model.tex_width[texture] = height // factor, width // factor


def lighten(model: mujoco.MjModel, cache: Path) -> None:
    """
    Simplify the visual meshes and shrink the textures of a compiled model, in place.

    :param model: changed in place; nothing that its physics reads is touched
    :param cache: folder that keeps simplified meshes
    """
    for mesh in _visual_meshes(model):
        _simplify_in_place(model, mesh, cache)
    for texture in range(model.ntex):
        _shrink_texture(model, texture)
    model.vis.quality.offsamples = 0
