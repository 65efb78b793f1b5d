"""Pictures of a MuJoCo model, drawn only when they are asked for. One GL context serves all models of a process."""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Sequence
from typing import Any

import mujoco
import numpy as np

from opd_gym.envs.libero.runtime import gl_context_class, gl_error

_context: Any = None
_renderers: weakref.WeakSet[Renderer] = weakref.WeakSet()


def _gl_context() -> Any:
    global _context
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


def _close_all() -> None:
    global _context
    for renderer in list(_renderers):
        renderer.close()
    if _context is not None:
        _context.free()
        _context = None


class Renderer:
    """
    Draws one compiled model as robosuite does: the same scene, options and flags, so the same pixels.

    :param model: compiled model
    :param max_size: largest side of a picture, in pixels
    """

    def __init__(self, model: mujoco.MjModel, max_size: int):
        self._model = model
        model.vis.global_.offwidth = max(max_size, model.vis.global_.offwidth)
        model.vis.global_.offheight = max(max_size, model.vis.global_.offheight)
        context = _gl_context()
        context.make_current()
        try:
            self._mjr: Any = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_150)
        except Exception as error:
            raise gl_error(error) from error
        self._scene = mujoco.MjvScene(model, maxgeom=1000)
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._option = mujoco.MjvOption()
        self._option.geomgroup[0] = 0  # collision geoms
        self._perturbation = mujoco.MjvPerturb()
        self._camera_ids: dict[str, int] = {}
        _renderers.add(self)

    def _camera_id(self, name: str) -> int:
        if name not in self._camera_ids:
            found = mujoco.mj_name2id(self._model, mujoco.mjtObj.mjOBJ_CAMERA, name)
            if found < 0:
                names = [mujoco.mj_id2name(self._model, mujoco.mjtObj.mjOBJ_CAMERA, i) for i in range(self._model.ncam)]
                raise ValueError(f"Unknown camera {name!r}. This scene has: {', '.join(names)}.")
            self._camera_ids[name] = found
        return self._camera_ids[name]

    def render(self, data: mujoco.MjData, cameras: Sequence[str], size: int) -> list[np.ndarray]:
        """
        :param data: state to draw
        :param cameras: MuJoCo's names of the cameras
        :param size: height and width in pixels
        :return: one uint8 array of shape ``(size, size, 3)`` a camera, upright
        """
        if self._mjr is None:
            raise RuntimeError("This renderer is closed.")
        _gl_context().make_current()
        # The frame buffer belongs to the GL context, which other models draw in too.
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._mjr)
        viewport = mujoco.MjrRect(0, 0, size, size)
        pictures = []
        for name in cameras:
            self._camera.fixedcamid = self._camera_id(name)
            category = mujoco.mjtCatBit.mjCAT_ALL
            mujoco.mjv_updateScene(
                self._model, data, self._option, self._perturbation, self._camera, category, self._scene
            )
            mujoco.mjr_render(viewport, self._scene, self._mjr)
            pixels = np.empty((size, size, 3), dtype=np.uint8)
            mujoco.mjr_readPixels(pixels, None, viewport, self._mjr)
            pictures.append(pixels[::-1].copy())  # OpenGL's first row is the lowest
        return pictures

    def close(self) -> None:
        """Free the GL resources; may be called twice."""
        if self._mjr is not None:
            if _context is not None:
                _context.make_current()
                self._mjr.free()
            self._mjr = None
