"""
Light visuals: simplified meshes and smaller textures.

Software rendering of LIBERO is bound by geometry (380,000 faces; one basket has 66,000), not by pixels. A mesh is given
as many faces as it needs to look alike from where a camera may be: shape, shading and texture are compared with the
original's, and the number is doubled until they agree.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

KEEP = 0.03  # share of the faces to begin with
MIN_FACES = 300  # no mesh is simplified below this
MAX_FACES = 6000  # a mesh that does not look alike with so many stays a little coarse
# How far a simplified mesh may be from its original: 90 % of its surface within 1.5 mm (half a pixel of a picture of
# 128 from half a metre), 95 % of its texture within 3 %, and its shading within 12 degrees on average.
MAX_DISTANCE, MAX_TEXTURE_SHIFT, MAX_SHADING = 0.0015, 0.03, 12.0
MAX_TEXTURE = 512  # pixels a side; LIBERO's largest are 4096, for pictures of 128
# Part of the cached meshes' names; the first number is that of the method.
MESH_SETTINGS = (2, KEEP, MIN_FACES, MAX_FACES, MAX_DISTANCE, MAX_TEXTURE_SHIFT, MAX_SHADING)

_N_SAMPLES = 60_000
_CANDIDATES = 16
_JUMP = 0.1  # a corner this much of the texture away from where it should be lies beyond a seam


@dataclass
class Mesh:
    """
    Triangles, with what is known at each of their corners.

    :param vertices: float (n, 3)
    :param faces: int (m, 3)
    :param normals: float (m, 3, 3), for shading
    :param uv: float (m, 3, 2), texture coordinates, or None
    """

    vertices: np.ndarray
    faces: np.ndarray
    normals: np.ndarray
    uv: np.ndarray | None

    @property
    def triangles(self) -> np.ndarray:
        """Corners, float (m, 3, 3)."""
        return self.vertices[self.faces]

    def face_normals(self) -> np.ndarray:
        """
        :return: float (m, 3); zero for a face without area
        """
        a, b, c = self.triangles.swapaxes(0, 1)
        normals = np.cross(b - a, c - a)
        return normals / np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-20)

    def areas(self) -> np.ndarray:
        """
        :return: float (m,)
        """
        a, b, c = self.triangles.swapaxes(0, 1)
        return 0.5 * np.linalg.norm(np.cross(b - a, c - a), axis=1)


def _barycentric(points: np.ndarray, triangles: np.ndarray, inside: bool = True) -> np.ndarray:
    """Barycentric coordinates (n, 3) of points (n, 3) in triangles (n, 3, 3), clamped if they must be inside."""
    a, b, c = triangles[:, 0], triangles[:, 1], triangles[:, 2]
    v0, v1, v2 = b - a, c - a, points - a
    d00, d01, d11 = (v0 * v0).sum(1), (v0 * v1).sum(1), (v1 * v1).sum(1)
    d20, d21 = (v2 * v0).sum(1), (v2 * v1).sum(1)
    determinant = d00 * d11 - d01 * d01
    denominator = np.where(np.abs(determinant) < 1e-20, 1.0, determinant)
    v = (d11 * d20 - d01 * d21) / denominator
    w = (d00 * d21 - d01 * d20) / denominator
    weights = np.stack([1.0 - v - w, v, w], axis=1)
    if not inside:
        return weights
    weights = np.clip(weights, 0.0, 1.0)
    return weights / np.maximum(weights.sum(1, keepdims=True), 1e-12)


def _sample(mesh: Mesh, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points spread over a surface: their faces (k,), weights of the corners (k, 3) and positions (k, 3)."""
    rng = np.random.default_rng(0)
    areas = mesh.areas()
    total = areas.sum()
    drawn = rng.choice(len(areas), n, p=areas / total) if total > 0.0 else np.zeros(0, dtype=int)
    # Every face at least once: the large ones get many, and none is overlooked
    faces = np.concatenate([np.arange(len(areas)), drawn])
    weights = rng.dirichlet([1.0, 1.0, 1.0], len(faces))
    weights[: len(areas)] = 1.0 / 3.0
    return faces, weights, np.einsum("kc,kcd->kd", weights, mesh.triangles[faces])


def interpolate(values: np.ndarray, faces: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """
    :param values: of the corners of all faces, (m, 3, d)
    :param faces: faces (k,)
    :param weights: weights of their corners (k, 3)
    :return: values at these points (k, d)
    """
    return np.einsum("kc,kcd->kd", weights, values[faces])


class _Surface:
    """An original mesh, to look up which of its points a simplified one shows."""

    def __init__(self, mesh: Mesh):
        from scipy.spatial import cKDTree

        self.mesh = mesh
        self._normals = mesh.face_normals()
        self.triangles = mesh.triangles
        self._faces, _, self._points = _sample(mesh, _N_SAMPLES)
        self._tree = cKDTree(self._points)

    def nearest(self, points: np.ndarray, normals: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """
        The nearest face that looks the same way, so that a thin shell never borrows from its other side.

        :param points: float (k, 3)
        :param normals: direction in which each looks, float (k, 3)
        :return: faces (k,), weights of their corners (k, 3), distances (k,)
        """
        n = min(_CANDIDATES, len(self._points))
        distance, found = (x.reshape(len(points), n) for x in self._tree.query(points, k=n))
        candidates = self._faces[found]
        facing = np.einsum("knd,kd->kn", self._normals[candidates], normals)
        cost = distance + np.where(facing > 0.2, 0.0, 1e3)
        best = cost.argmin(axis=1)[:, None]
        faces = np.take_along_axis(candidates, best, axis=1)[:, 0]
        weights = _barycentric(points, self.triangles[faces])
        closest = np.einsum("kc,kcd->kd", weights, self.triangles[faces])
        return faces, weights, np.linalg.norm(points - closest, axis=1)


def _dress(vertices: np.ndarray, faces: np.ndarray, surface: _Surface) -> Mesh:
    """Give the corners of a simplified mesh the shading and the texture of the original."""
    bare = Mesh(vertices, faces, np.zeros((len(faces), 3, 3)), None)
    middles = bare.triangles.mean(axis=1)
    normals = bare.face_normals()
    corners = bare.triangles.reshape(-1, 3)
    # A little inside the face, so that corners on an edge do not all pick the neighbour across it
    inside = 0.9 * corners + 0.1 * np.repeat(middles, 3, axis=0)
    found, _, _ = surface.nearest(inside, np.repeat(normals, 3, axis=0))
    weights = _barycentric(corners, surface.triangles[found])
    shading = interpolate(surface.mesh.normals, found, weights)
    shading /= np.maximum(np.linalg.norm(shading, axis=1, keepdims=True), 1e-12)
    uv = surface.mesh.uv
    if uv is not None:
        # Across a seam two corners are far apart in the texture, and the face would show all that lies between. The
        # texture at its middle is continued there.
        middle, at, _ = surface.nearest(middles, normals)
        here = np.repeat(interpolate(uv, middle, at), 3, axis=0)
        middle = np.repeat(middle, 3)
        continued = interpolate(uv, middle, _barycentric(corners, surface.triangles[middle], inside=False))
        uv = interpolate(uv, found, weights)
        expected = np.linalg.norm(continued - here, axis=1)
        beyond = np.linalg.norm(uv - here, axis=1) > _JUMP + 2.0 * expected
        uv = np.where(beyond[:, None], continued, uv).reshape(-1, 3, 2)
    return Mesh(vertices, faces, shading.reshape(-1, 3, 3), uv)


def _alike(mesh: Mesh, surface: _Surface) -> bool:
    from scipy.spatial import cKDTree

    faces, weights, points = _sample(mesh, 5000)
    found, at, distance = surface.nearest(points, mesh.face_normals()[faces])
    # And back: parts that have gone altogether
    missing, _ = cKDTree(points).query(surface._points[:: max(1, len(surface._points) // 5000)])
    spacing = np.sqrt(mesh.areas().sum() / 5000)
    if np.quantile(distance, 0.9) > MAX_DISTANCE or np.quantile(missing, 0.9) > MAX_DISTANCE + spacing:
        return False
    shading, original = interpolate(mesh.normals, faces, weights), interpolate(surface.mesh.normals, found, at)
    lengths = np.linalg.norm(shading, axis=1) * np.linalg.norm(original, axis=1)
    cosine = (shading * original).sum(axis=1) / np.maximum(lengths, 1e-12)
    if np.degrees(np.arccos(np.clip(cosine, -1.0, 1.0))).mean() > MAX_SHADING:
        return False
    if mesh.uv is None or surface.mesh.uv is None:
        return True
    shift = interpolate(mesh.uv, faces, weights) - interpolate(surface.mesh.uv, found, at)
    shift -= shift.round()  # textures repeat
    # Stricter, because a few faces that show the wrong part of a texture are seen at once
    return bool(np.quantile(np.linalg.norm(shift, axis=1), 0.95) <= MAX_TEXTURE_SHIFT)


def lighten_mesh(mesh: Mesh) -> Mesh:
    """
    A mesh with fewer faces that looks alike; the same mesh where that would not save half of them.

    :param mesh: any mesh
    :return: the simplified one: winding, shading normals and texture coordinates are the original's
    """
    import fast_simplification

    if len(mesh.faces) <= 2 * MIN_FACES:
        return mesh
    welded, index = np.unique(np.round(mesh.vertices, 6).astype(np.float64), axis=0, return_inverse=True)
    faces = index.reshape(-1)[mesh.faces]
    solid = (faces[:, 0] != faces[:, 1]) & (faces[:, 1] != faces[:, 2]) & (faces[:, 0] != faces[:, 2])
    original = Mesh(welded, faces[solid], mesh.normals[solid], None if mesh.uv is None else mesh.uv[solid])
    surface = _Surface(original)
    target = max(MIN_FACES, int(len(original.faces) * KEEP))
    while True:
        vertices, simplified = fast_simplification.simplify(
            welded.astype(np.float32),
            original.faces.astype(np.int32),
            target_reduction=max(0.0, 1.0 - target / len(original.faces)),
            agg=3,
        )
        if 2 * len(simplified) > len(mesh.faces):
            return mesh
        candidate = _dress(np.asarray(vertices, dtype=np.float64), np.asarray(simplified, dtype=np.int64), surface)
        if 2 * target > MAX_FACES or _alike(candidate, surface):
            return candidate
        target *= 2


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
