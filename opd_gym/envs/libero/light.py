"""
Light visuals: simplified meshes and smaller textures.

Software rendering of LIBERO is bound by geometry (380,000 faces; one basket has 66,000), not by pixels.
"""

from __future__ import annotations

import numpy as np

KEEP = 0.05  # share of the faces that stay
MIN_FACES = 300  # no mesh is simplified below this
MAX_TEXTURE = 512  # pixels a side; LIBERO's largest are 4096, for pictures of 128
MESH_SETTINGS = (1, KEEP, MIN_FACES)  # part of the cached meshes' names; the first number is that of the method


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


def lighten_mesh(
    vertices: np.ndarray, faces: np.ndarray, corner_normals: np.ndarray, corner_uv: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """
    Simplify a mesh to ``KEEP`` of its faces; small ones stay as they are. See :func:`simplify_mesh`.

    :param vertices: (n, 3) float
    :param faces: (m, 3) int
    :param corner_normals: (m, 3, 3) float
    :param corner_uv: (m, 3, 2) float or None
    :return: the same of the simplified mesh
    """
    if len(faces) <= 2 * MIN_FACES:
        return vertices, faces, corner_normals, corner_uv
    target = max(MIN_FACES, int(len(faces) * KEEP))
    return simplify_mesh(vertices.astype(np.float64), faces, corner_normals, corner_uv, target)


def shrink_texture(pixels: np.ndarray) -> np.ndarray:
    """
    Halve a texture until its shorter side is no longer than ``MAX_TEXTURE`` (the six faces of a cube are one column).

    :param pixels: uint8 (height, width, channels)
    :return: uint8, the same picture
    """
    height, width, channels = pixels.shape
    factor = 1
    while min(height, width) // factor > MAX_TEXTURE and height % (2 * factor) == 0 and width % (2 * factor) == 0:
        factor *= 2
    if factor == 1:
        return pixels
    blocks = pixels.reshape(height // factor, factor, width // factor, factor, channels)
    return blocks.mean(axis=(1, 3)).round().astype(np.uint8)
