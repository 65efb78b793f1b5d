"""
Pictures of a MuJoCo model, drawn only when they are asked for.

One GL context serves all models of a process, and so do the textures and meshes that several of them show.
"""

from __future__ import annotations

import atexit
import ctypes
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import mujoco
import numpy as np

from opd_gym.envs.libero.models import Visuals, read_mesh
from opd_gym.envs.libero.runtime import gl_context_class, gl_error, gl_is_inherited, require_own_gl

_HIDDEN_GROUP = 5  # a geom group that is not drawn
_CULL_MARGIN = 0.01  # m; simplified meshes may leave their bounding boxes a little

_context: Any = None


def _gl_context() -> Any:
    global _context
    require_own_gl()
    if _context is None:
        try:
            _context = gl_context_class()(64, 64)
            _context.make_current()
        except Exception as error:  # the GL libraries raise a dozen unrelated types
            raise gl_error(error) from error
        # Registered after the GL library's own handler and so run before it: models first, then the context, then the
        # display.
        atexit.register(_close_all)
    return _context


def gl_renderer() -> str | None:
    """
    :return: OpenGL's name of what draws here; None where nothing has been drawn in this process
    """
    if _context is None or gl_is_inherited():
        return None
    from OpenGL import GL

    _context.make_current()
    name = GL.glGetString(GL.GL_RENDERER)
    return name.decode(errors="replace") if name else None


def _close_all() -> None:
    global _context
    if gl_is_inherited():
        # Never freed, for even that would hang
        for inherited in (_context, *(objects.mjr for objects in _Objects.live)):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(inherited))
        return
    for objects in list(_Objects.live):
        objects.free()
    if _context is not None:
        _context.free()
        _context = None


class _Shared:
    """GL objects by the file that they were made from, freed with their last user."""

    def __init__(self, create: Callable[[Path], int], delete: Callable[[int], None]):
        self._create = create
        self._delete = delete
        self._objects: dict[Path, tuple[int, int]] = {}  # name of the object, number of users

    def take(self, path: Path) -> int:
        name, users = self._objects.get(path, (0, 0))
        if not users:
            name = self._create(path)
        self._objects[path] = name, users + 1
        return name

    def release(self, path: Path) -> None:
        name, users = self._objects.pop(path)
        if users > 1:
            self._objects[path] = name, users - 1
        else:
            self._delete(name)


@contextmanager
def _client_arrays(vertices: np.ndarray) -> Iterator[None]:
    from OpenGL import GL

    stride, start = vertices.strides[0], vertices.ctypes.data
    position, normal, uv = (ctypes.c_void_p(start + 4 * column) for column in (0, 3, 6))
    arrays = (
        (GL.GL_VERTEX_ARRAY, lambda: GL.glVertexPointer(3, GL.GL_FLOAT, stride, position)),
        (GL.GL_NORMAL_ARRAY, lambda: GL.glNormalPointer(GL.GL_FLOAT, stride, normal)),
        (GL.GL_TEXTURE_COORD_ARRAY, lambda: GL.glTexCoordPointer(2, GL.GL_FLOAT, stride, uv)),
    )
    for array, point in arrays:
        GL.glEnableClientState(array)
        point()
    try:
        yield
    finally:
        for array, _ in arrays:
            GL.glDisableClientState(array)


def _create_mesh(stem: Path) -> int:
    from OpenGL import GL

    vertices, indices = read_mesh(stem)
    name = int(GL.glGenLists(1))
    with _client_arrays(vertices):
        GL.glNewList(name, GL.GL_COMPILE)
        GL.glDrawElements(GL.GL_TRIANGLES, len(indices), GL.GL_UNSIGNED_INT, ctypes.c_void_p(indices.ctypes.data))
        GL.glEndList()
    return name


def _delete_mesh(name: int) -> None:
    from OpenGL import GL

    GL.glDeleteLists(name, 1)


def _create_texture(path: Path) -> int:
    """As MuJoCo uploads a texture."""
    from OpenGL import GL

    pixels = np.load(path, mmap_mode="r")
    height, width, channels = pixels.shape
    faces: list[tuple[Any, np.ndarray]]
    axes: tuple[Any, ...]
    kind = path.name.split(".")[1]
    layout = GL.GL_RGB if channels == 3 else GL.GL_RGBA
    if kind == "cube":
        target, wrap, storage = GL.GL_TEXTURE_CUBE_MAP, GL.GL_CLAMP_TO_EDGE, layout
        n = height // width
        faces = [(GL.GL_TEXTURE_CUBE_MAP_POSITIVE_X + i, pixels[i % n * width :][:width]) for i in range(6)]
        axes = (GL.GL_TEXTURE_WRAP_S, GL.GL_TEXTURE_WRAP_T, GL.GL_TEXTURE_WRAP_R)
    else:
        target, wrap, storage = GL.GL_TEXTURE_2D, GL.GL_REPEAT, layout
        if kind == "srgb":
            storage = GL.GL_SRGB8 if channels == 3 else GL.GL_SRGB8_ALPHA8
        faces = [(GL.GL_TEXTURE_2D, pixels)]
        axes = (GL.GL_TEXTURE_WRAP_S, GL.GL_TEXTURE_WRAP_T)
    name = int(GL.glGenTextures(1))
    GL.glActiveTexture(GL.GL_TEXTURE0)
    GL.glBindTexture(target, name)
    for axis in axes:
        GL.glTexParameteri(target, axis, wrap)
    GL.glTexParameteri(target, GL.GL_TEXTURE_MAG_FILTER, GL.GL_LINEAR)
    GL.glTexParameteri(target, GL.GL_TEXTURE_MIN_FILTER, GL.GL_LINEAR_MIPMAP_LINEAR)
    GL.glPixelStorei(GL.GL_UNPACK_ALIGNMENT, 1)
    for face, part in faces:
        address = ctypes.c_void_p(part.ctypes.data)
        GL.glTexImage2D(face, 0, storage, width, len(part), 0, layout, GL.GL_UNSIGNED_BYTE, address)
    GL.glGenerateMipmap(target)
    return name


def _delete_texture(name: int) -> None:
    from OpenGL import GL

    GL.glDeleteTextures([name])


_meshes = _Shared(_create_mesh, _delete_mesh)
_textures = _Shared(_create_texture, _delete_texture)


class _Objects:
    """
    The GL objects of one model: MuJoCo's own and the shared ones.

    Freed on purpose and never by the garbage collector, which may run in any thread and would have MuJoCo delete
    textures that other models show.
    """

    live: ClassVar[set[_Objects]] = set()
    retired: ClassVar[deque[_Objects]] = deque()

    def __init__(self, model: mujoco.MjModel, visuals: Visuals):
        from OpenGL import GL

        self._textures: dict[int, Path] = {}
        self._meshes: list[Path] = []
        self.mjr: Any = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_50)
        self.live.add(self)
        try:
            for mesh, stem in visuals.meshes.items():
                shared = _meshes.take(stem)
                self._meshes.append(stem)
                GL.glNewList(self.mjr.baseMesh + 2 * mesh, GL.GL_COMPILE)
                GL.glCallList(shared)
                GL.glEndList()
            for texture, path in visuals.textures.items():
                shared = _textures.take(path)
                _delete_texture(int(self.mjr.texture[texture]))
                self.mjr.texture[texture] = shared
                self._textures[texture] = path
        except BaseException:
            self.free()
            raise

    @classmethod
    def free_retired(cls) -> None:
        """Free what collected renderers have left; the GL context is current."""
        while cls.retired:
            cls.retired.popleft().free()

    def free(self) -> None:
        """May be called twice; the GL context is current."""
        if self.mjr is None:
            return
        for texture, path in self._textures.items():
            self.mjr.texture[texture] = 0
            _textures.release(path)
        self.mjr.free()
        self.mjr = None
        for stem in self._meshes:
            _meshes.release(stem)
        self.live.discard(self)


class Renderer:
    """
    Draws one compiled model as robosuite does: the same scene, options and flags, so the same pixels.

    :param model: compiled model
    :param visuals: the visual meshes and textures that are not in it
    :param max_size: largest side of a picture, in pixels
    """

    def __init__(self, model: mujoco.MjModel, visuals: Visuals, max_size: int):
        self._model = model
        model.vis.global_.offwidth = model.vis.global_.offheight = max_size
        if not model.light_castshadow.any():
            model.vis.quality.shadowsize = 0  # MuJoCo would keep 64 MB for shadows that nothing casts
        self._max_size = max_size
        self._make_current()
        try:
            self._objects = _Objects(model, visuals)
        except (OSError, ValueError):  # a file of the cache
            raise
        except Exception as error:
            raise gl_error(error) from error
        weakref.finalize(self, _Objects.retired.append, self._objects).atexit = False
        self._scene = mujoco.MjvScene(model, maxgeom=1000)
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._option = mujoco.MjvOption()
        self._option.geomgroup[0] = 0  # collision geoms
        self._option.geomgroup[_HIDDEN_GROUP] = 0
        self._perturbation = mujoco.MjvPerturb()
        self._camera_ids: dict[str, int] = {}

    @staticmethod
    def _make_current() -> None:
        _gl_context().make_current()
        _Objects.free_retired()

    def _camera_id(self, name: str) -> int:
        if name not in self._camera_ids:
            found = mujoco.mj_name2id(self._model, mujoco.mjtObj.mjOBJ_CAMERA, name)
            if found < 0:
                names = [mujoco.mj_id2name(self._model, mujoco.mjtObj.mjOBJ_CAMERA, i) for i in range(self._model.ncam)]
                raise ValueError(f"Unknown camera {name!r}. This scene has: {', '.join(names)}.")
            self._camera_ids[name] = found
        return self._camera_ids[name]

    def _outside(self, data: mujoco.MjData, camera: int) -> np.ndarray:
        """
        Mesh geoms that cannot appear in a camera's picture, nor in a mirror.

        :return: bool array, one entry a geom
        """
        model = self._model
        if model.light_castshadow.any() or not _sees_a_pyramid(model, camera):
            return np.zeros(model.ngeom, dtype=bool)
        rotation = data.geom_xmat.reshape(-1, 3, 3)
        centers = data.geom_xpos + np.einsum("gij,gj->gi", rotation, model.geom_aabb[:, :3])
        radii = np.linalg.norm(model.geom_aabb[:, 3:], axis=1) + _CULL_MARGIN
        outside = model.geom_type == mujoco.mjtGeom.mjGEOM_MESH
        outside &= self._beyond(data, camera, centers, radii)
        reflectance = np.where(model.geom_matid >= 0, model.mat_reflectance[model.geom_matid], 0.0)
        is_mirror = np.isin(model.geom_type, (mujoco.mjtGeom.mjGEOM_PLANE, mujoco.mjtGeom.mjGEOM_BOX))
        for mirror in np.flatnonzero(is_mirror & (reflectance > 0)):
            normal, point = rotation[mirror, :, 2], data.geom_xpos[mirror]
            if model.geom_type[mirror] == mujoco.mjtGeom.mjGEOM_BOX:
                point = point + model.geom_size[mirror, 2] * normal
            mirrored = centers - 2.0 * ((centers - point) @ normal)[:, None] * normal
            outside &= self._beyond(data, camera, mirrored, radii)
        return outside

    def _beyond(self, data: mujoco.MjData, camera: int, centers: np.ndarray, radii: np.ndarray) -> np.ndarray:
        """Which spheres lie wholly beyond a side of the pyramid that a camera sees, its picture being square."""
        x, y, z = ((centers - data.cam_xpos[camera]) @ data.cam_xmat[camera].reshape(3, 3)).T
        slope = np.tan(0.5 * np.radians(self._model.cam_fovy[camera]))
        reach = radii * np.hypot(1.0, slope)
        return (z > radii) | (np.abs(x) + slope * z > reach) | (np.abs(y) + slope * z > reach)

    def render(self, data: mujoco.MjData, cameras: Sequence[str], size: int) -> list[np.ndarray]:
        """
        :param data: state to draw
        :param cameras: MuJoCo's names of the cameras
        :param size: height and width in pixels
        :return: one uint8 array of shape ``(size, size, 3)`` a camera, upright
        """
        if self._objects.mjr is None:
            raise RuntimeError("This renderer is closed.")
        if not 0 < size <= self._max_size:
            raise ValueError(f"This renderer draws pictures of 1 to {self._max_size} pixels, got {size}.")
        self._make_current()
        # The frame buffer belongs to the GL context, which other models draw in too.
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._objects.mjr)
        viewport = mujoco.MjrRect(0, 0, size, size)
        pictures = []
        for name in cameras:
            camera = self._camera.fixedcamid = self._camera_id(name)
            group = self._model.geom_group
            groups = group.copy()
            try:
                group[self._outside(data, camera)] = _HIDDEN_GROUP
                mujoco.mjv_updateScene(
                    self._model,
                    data,
                    self._option,
                    self._perturbation,
                    self._camera,
                    mujoco.mjtCatBit.mjCAT_ALL,
                    self._scene,
                )
            finally:
                group[:] = groups
            mujoco.mjr_render(viewport, self._scene, self._objects.mjr)
            pixels = np.empty((size, size, 3), dtype=np.uint8)
            mujoco.mjr_readPixels(pixels, None, viewport, self._objects.mjr)
            pictures.append(pixels[::-1].copy())  # OpenGL's first row is the lowest
        return pictures

    def close(self) -> None:
        """Free the GL resources; may be called twice. What a forked process has inherited stays its parent's."""
        if self._objects.mjr is not None and not gl_is_inherited():
            self._make_current()
            self._objects.free()


def _sees_a_pyramid(model: mujoco.MjModel, camera: int) -> bool:
    """Whether a camera is a plain perspective one, given by its field of view alone."""
    if hasattr(model, "cam_sensorsize") and model.cam_sensorsize[camera].any():
        return False
    kind = getattr(model, "cam_projection", getattr(model, "cam_orthographic", None))
    return kind is None or not kind[camera]
