"""Slide a flat object over the table."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from opd_gym.envs.libero.experts.geometry import Array, Gripper
from opd_gym.envs.libero.experts.scene import Scene
from opd_gym.envs.libero.experts.servo import CLOSE, Target, rise_from


class Slide:
    """
    Stateless sliding: press the closed fingers on the middle of the object and drag it to the goal.

    The pads have more friction than the table, so the object follows. Unlike pushing, this needs no room behind the
    object.

    :param name: Name of the object
    :param goal: Returns the wanted position (x, y) of the object's root body
    :param hover: Height above the object at which the gripper moves over it
    :param pressure: How far below the surface the grip site is commanded
    """

    def __init__(self, name: str, goal: Callable[[Scene], Array], hover: float = 0.06, pressure: float = 0.004) -> None:
        self.name = name
        self.goal = goal
        self.hover = hover
        self.pressure = pressure
        self.gripper = Gripper()

    def leave(self, scene: Scene) -> Target | None:
        """
        Rise from the object, or None where the gripper is clear of it.

        :param scene: Current state
        """
        return rise_from(scene, scene.body(self.name))

    def __call__(self, scene: Scene) -> Target:
        """
        What to do in the current state.

        :param scene: Current state
        """
        points = scene.points(scene.body(self.name))
        centre = 0.5 * (points[:, :2].max(axis=0) + points[:, :2].min(axis=0))
        middle = points[np.linalg.norm(points[:, :2] - centre, axis=1) < 0.03]
        surface = float(middle[:, 2].max()) if len(middle) else float(points[:, 2].max())
        contact = surface + self.gripper.pad_below
        offset = centre - scene.eef[:2]
        apart = float(np.linalg.norm(offset))
        pressed = float(scene.eef[2]) < contact + 0.006
        if pressed and apart < 0.045 and scene.gap < 0.03:
            way = self.goal(scene) - scene.position(self.name)[:2]
            # Slow enough for the friction to hold.
            step = way * min(1.0, 0.02 / max(float(np.linalg.norm(way)), 1e-6))
            xy = scene.eef[:2] + step
            return Target(np.array([xy[0], xy[1], contact - self.pressure]), CLOSE, 0.0)
        rise = min(self.hover, 4.0 * max(0.0, apart - 0.01))
        if scene.gap > 0.03:
            rise = max(rise, 0.02)
        height = contact + rise if rise > 0.0 else contact - self.pressure
        freedom = float(np.clip(1.0 - (height - float(scene.eef[2]) - 0.015) / 0.03, 0.0, 1.0))
        xy = scene.eef[:2] + freedom * offset
        return Target(np.array([xy[0], xy[1], height]), CLOSE, 0.0)
