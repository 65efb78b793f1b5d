"""Push a flat object over the table."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from opd_gym.envs.experts.geometry import Array, yaw_of_closing_axis
from opd_gym.envs.experts.scene import Scene
from opd_gym.envs.experts.servo import OPEN, Target


class Push:
    """
    Stateless pushing: come down behind the object, both fingers side by side, and drive it to the goal.

    Two open fingers touch a round object at two points, so it does not roll off sideways.

    :param name: Name of the object
    :param goal: Gives the wanted position (x, y) of the object's root body
    :param hover: Height above the table at which the gripper moves behind the object
    """

    def __init__(self, name: str, goal: Callable[[Scene], Array], hover: float = 0.1) -> None:
        self.name = name
        self.goal = goal
        self.hover = hover

    def __call__(self, scene: Scene) -> Target:
        """
        What to do in the current state.

        :param scene: Current state
        """
        points = scene.points(scene.body(self.name))
        centre = 0.5 * (points[:, :2].max(axis=0) + points[:, :2].min(axis=0))
        radius = 0.5 * float((points[:, :2].max(axis=0) - points[:, :2].min(axis=0)).max())
        way = self.goal(scene) - scene.position(self.name)[:2]
        distance = float(np.linalg.norm(way))
        direction = way / max(distance, 1e-6)
        across = np.array([-direction[1], direction[0]])
        yaw = yaw_of_closing_axis(across)
        floor = float(points[:, 2].min())
        low = floor + 0.007
        # The chord between the two fingers is nearer to the centre than the brim is.
        behind = float(np.sqrt(max(radius**2 - 0.045**2, 0.0))) + 0.012
        start = centre - (behind + 0.02) * direction
        relative = scene.eef[:2] - centre
        back, side = float(relative @ direction), float(relative @ across)
        turned = abs((yaw - scene.yaw + np.pi / 2) % np.pi - np.pi / 2) < 0.3
        if scene.eef[2] < low + 0.012 and back < -behind + 0.03 and abs(side) < 0.03 and turned:
            goal = scene.eef[:2] + min(0.03, distance) * direction - 1.0 * side * across
            return Target(np.array([goal[0], goal[1], low]), OPEN, yaw)
        offset = start - scene.eef[:2]
        reach = float(np.linalg.norm(offset))
        over = reach < 0.02 and turned
        height = low if over or (scene.eef[2] < low + 0.03 and reach < 0.03 and turned) else floor + self.hover
        freedom = float(np.clip(1.0 - (height - float(scene.eef[2]) - 0.015) / 0.03, 0.0, 1.0))
        xy = scene.eef[:2] + freedom * offset
        return Target(np.array([xy[0], xy[1], height]), OPEN, yaw)
