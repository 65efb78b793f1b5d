"""Pick an object up from above and put it somewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from opd_gym.envs.libero.experts.geometry import (
    Array,
    Grasp,
    Gripper,
    Rim,
    closing_axis,
    find_rim,
    plan_rim_grasp,
    plan_top_grasp,
)
from opd_gym.envs.libero.experts.scene import Scene
from opd_gym.envs.libero.experts.servo import CLOSE, OPEN, Target, rise_from

GraspPlanner = Callable[[Scene, int], Grasp]


@dataclass(frozen=True)
class Placement:
    """
    Where an object should be let go.

    :param xy: Wanted position of the object's root body
    :param height: Height of the object's lowest point at which the gripper opens
    :param clearance: How far above ``height`` the lowest point stays at least until it is over the target
    :param container: Name of the object or fixture it is put on or in
    :param tolerance: Horizontal error at which the gripper may open
    :param yaw: Wanted yaw of the gripper, None for any
    """

    xy: Array
    height: float
    clearance: float
    tolerance: float
    container: str = ""
    yaw: float | None = None


class PickPlace:
    """
    Stateless pick and place: approach down a funnel, close, lift, carry, lower, open.

    The phase depends on the state alone: where the object is relative to the gripper, whether both pads touch it,
    how far apart the fingers are.

    :param name: Name of the object
    :param placement: Returns the placement for the current state
    :param planner: Returns the grasp for the current state; by default a grasp from above
    :param hover: Height above the grasp from which the gripper descends
    """

    def __init__(
        self,
        name: str,
        placement: Callable[[Scene], Placement],
        planner: GraspPlanner | None = None,
        hover: float = 0.09,
        gripper: Gripper | None = None,
    ) -> None:
        self.name = name
        self.placement = placement
        self.gripper = gripper or Gripper()
        self.planner = planner or self._plan
        self.hover = hover
        self._rims: dict[tuple[int, float], Rim | None] = {}

    def _plan(self, scene: Scene, body: int) -> Grasp:
        obstacles = scene.obstacles(self.name)
        rotation = scene.data.xmat[body].reshape(3, 3)
        axis = int(np.argmax(np.abs(rotation[2])))
        sign = float(np.sign(rotation[2, axis]))
        if abs(rotation[2, axis]) > 0.75:
            if (axis, sign) not in self._rims:
                self._rims[axis, sign] = find_rim(scene.local_points(body), axis, sign, self.gripper)
            rim = self._rims[axis, sign]
            if rim is not None:
                position = scene.position(self.name)
                placement = self.placement(scene)
                to_place = np.append(placement.xy - position[:2], placement.height - position[2])
                # The hand should also be clear halfway, where the bowl is still lifted, and at the end.
                ways = [0.5 * to_place + np.array([0.0, 0.0, 0.06]), to_place]
                return plan_rim_grasp(
                    rim, position, rotation, scene.yaw, scene.eef[:2], self.gripper, obstacles, scene.shoulder, ways
                )
        return plan_top_grasp(scene.points(body), scene.yaw, self.gripper, obstacles)

    def _travel_height(self, scene: Scene, grasp: Grasp) -> float:
        """Height of the grip site at which the hand and the open fingers clear everything on the way to the grasp."""
        way = grasp.position[:2] - scene.eef[:2]
        obstacles = scene.obstacles(self.name)
        below_hand = highest_on_way(obstacles, scene.eef[:2], way, self.gripper.hand_along) - 0.005
        below_fingers = highest_on_way(obstacles, scene.eef[:2], way, 0.5 * self.gripper.stroke + 0.016) + 0.015
        return max(float(grasp.position[2]) + self.hover, below_hand, below_fingers)

    def holds(self, scene: Scene) -> bool:
        """
        Whether the object is between the pads, and both touch it.

        :param scene: Current state
        """
        return max(scene.finger_distances(scene.body(self.name))) < 0.0015 and scene.gap < self.gripper.stroke

    def leave(self, scene: Scene) -> Target | None:
        """
        Let go of the object and rise above it, or None where the gripper is clear of it.

        :param scene: Current state
        """
        return rise_from(scene, scene.body(self.name))

    def __call__(self, scene: Scene) -> Target:
        """
        What to do in the current state.

        :param scene: Current state
        """
        body = scene.body(self.name)
        grasp = self.planner(scene, body)
        offset = grasp.position - scene.eef
        axis = closing_axis(scene.yaw)
        along = abs(float(offset[:2] @ axis))
        across = abs(float(offset[0] * axis[1] - offset[1] * axis[0]))
        placement = self.placement(scene)
        points = scene.points(body)
        bottom = float(points[:, 2].min())
        position = scene.position(self.name)
        to_place = placement.xy - position[:2]
        away = float(np.linalg.norm(to_place))

        if self.holds(scene):
            over_target = away < placement.tolerance
            if over_target and bottom < placement.height + 0.01:
                # Let go without moving up: rising would leave the release zone before the fingers are open.
                lower = min(0.0, placement.height - bottom)
                return Target(scene.eef + np.array([0.0, 0.0, lower]), OPEN, None)
            if scene.finger_speed > 0.03 and offset[2] > -0.03:
                # The fingers are still closing: lifting now would slip.
                return Target(grasp.position, CLOSE, None)
            return self._carry(scene, placement, points, to_place, away)
        aligned = abs(scene_yaw_error(scene, grasp.yaw)) < 0.3
        near = along < 0.03 and across < 0.022 and abs(offset[2]) < 0.022
        between = scene.gap > 0.6 * min(grasp.width, self.gripper.stroke)
        ready = along < grasp.margin and across < 0.012 and abs(offset[2]) < 0.008
        # Whether the fingers are closing or opening again shows in their speed. Fingers that stand still without
        # touching the object on both sides are blocked by something else: open and try again.
        wide = scene.gap > self.gripper.stroke - 0.012
        closing = scene.gap < self.gripper.stroke - 0.003 and scene.gap_speed < -0.005
        if aligned and near and between and (closing or (ready and wide)):
            return Target(grasp.position, CLOSE, None)
        return self._approach(scene, grasp, along, across)

    def _approach(self, scene: Scene, grasp: Grasp, along: float, across: float) -> Target:
        offset = grasp.position - scene.eef
        distance = float(np.linalg.norm(offset[:2]))
        # Funnel: full height far away, down to the grasp where the fingers pass left and right of the object.
        slack = 0.0 if along < 0.8 * grasp.margin and across < 0.014 else max(0.0, distance - 0.005)
        hover = self._travel_height(scene, grasp) - float(grasp.position[2])
        rise = min(hover, 5.0 * slack)
        if (
            scene.gap < min(self.gripper.stroke - 0.004, grasp.width + 0.012)
            or abs(scene_yaw_error(scene, grasp.yaw)) > 0.2
        ):
            rise = max(rise, 0.6 * hover)
        height = grasp.position[2] + rise
        below = height - float(scene.eef[2])
        # Too low to move sideways: go up first.
        freedom = float(np.clip(1.0 - (below - 0.015) / 0.03, 0.0, 1.0))
        xy = scene.eef[:2] + freedom * offset[:2]
        return Target(np.array([xy[0], xy[1], height]), OPEN, grasp.yaw)

    def _carry(self, scene: Scene, placement: Placement, points: Array, to_place: Array, away: float) -> Target:
        bottom = float(points[:, 2].min())
        clearance = placement.clearance
        centre = 0.5 * (points[:, :2].max(axis=0) + points[:, :2].min(axis=0))
        radius = 0.5 * float((points[:, :2].max(axis=0) - points[:, :2].min(axis=0)).max()) + 0.02
        highest = highest_on_way(scene.obstacles(self.name, placement.container), centre, to_place, radius)
        clearance = max(clearance, highest + 0.015 - placement.height)
        rise = float(np.clip(3.0 * (away - 0.6 * placement.tolerance), 0.0, clearance))
        height = placement.height + rise
        below = height - bottom
        freedom = float(np.clip(1.0 - (below - 0.03) / 0.06, 0.0, 1.0))
        xy = scene.eef[:2] + freedom * to_place
        z = float(scene.eef[2]) + below
        return Target(np.array([xy[0], xy[1], z]), CLOSE, placement.yaw)


def highest_on_way(obstacles: Array, start: Array, way: Array, radius: float) -> float:
    """
    Height of the highest obstacle near a straight line.

    :param obstacles: (n, 3) points in the world
    :param start: Where the line begins (x, y)
    :param way: Vector from there to its end
    :param radius: Distance within which an obstacle counts as near
    :return: Height in m, minus infinity if nothing is near
    """
    if len(obstacles) == 0:
        return -np.inf
    relative = obstacles[:, :2] - start
    fraction = np.clip(relative @ way / (float(way @ way) + 1e-9), 0.0, 1.0)
    apart = relative - fraction[:, None] * way
    passed = obstacles[(apart * apart).sum(axis=1) < radius * radius, 2]
    return float(passed.max()) if len(passed) else -np.inf


def scene_yaw_error(scene: Scene, yaw: float) -> float:
    """
    Rotation about the vertical axis by which the gripper is off, in [-pi/2, pi/2).

    :param scene: Current state
    :param yaw: Wanted yaw
    """
    return float((yaw - scene.yaw + np.pi / 2) % np.pi - np.pi / 2)
