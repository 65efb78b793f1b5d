"""From a wanted gripper pose to an OSC_POSE delta action."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from opd_gym.envs.libero.experts.geometry import Array, rotation_vector, wrap_half_turn, yaw_rotation
from opd_gym.envs.libero.experts.scene import Scene

OPEN, CLOSE = -1.0, 1.0


@dataclass
class Target:
    """
    What the gripper should do next.

    :param position: Wanted position of the grip site
    :param gripper: ``OPEN`` or ``CLOSE``
    :param yaw: Wanted yaw relative to the rest pose; None keeps the yaw and only undoes tilt
    :param rotation: Wanted rotation relative to the rest pose of a gripper that does not point down; replaces ``yaw``
    """

    position: Array
    gripper: float
    yaw: float | None = None
    rotation: Array | None = None


def rise_from(scene: Scene, body: int, reach: float = 0.039, clear: float = 0.03) -> Target | None:
    """
    Let go of a body and rise above it, or None where it is not between the fingers.

    :param scene: Current state
    :param body: Body id
    :param reach: Distance in m within which a finger counts as being at the body: half of what the gripper can open
    :param clear: How far in m above the body the gripper is clear of it
    """
    distances = scene.finger_distances(body, 2.0 * reach)
    if max(distances) > reach or float(scene.eef[2] - scene.points(body)[:, 2].max()) > clear:
        return None
    # Rising with a finger at the body would take it along.
    rise = 0.06 if max(distances) > 0.002 else 0.0
    return Target(scene.eef + np.array([0.0, 0.0, rise]), OPEN)


class Servo:
    """
    Proportional position and dead-band orientation control on top of robosuite's OSC_POSE with delta actions.

    :param position_gain: Commanded delta per position error; 2 is the fastest without overshoot at 20 Hz
    :param position_scale: Metres at action 1
    :param rotation_scale: Radians at action 1
    :param dead_band: Orientation errors below this many rad give exactly zero: robosuite then keeps the goal
        orientation, while any other value would re-anchor it at the current, drifting one
    :param max_rotation: Largest commanded rotation per step in rad
    """

    def __init__(
        self,
        position_gain: float = 2.0,
        position_scale: float = 0.05,
        rotation_scale: float = 0.5,
        dead_band: float = 0.1,
        max_rotation: float = 0.3,
    ) -> None:
        self.position_gain = position_gain
        self.position_scale = position_scale
        self.rotation_scale = rotation_scale
        self.dead_band = dead_band
        self.max_rotation = max_rotation

    def rotation_error(self, scene: Scene, yaw: float | None) -> Array:
        """
        Rotation to the wanted yaw, as a rotation vector in the world.

        :param scene: Current state
        :param yaw: Wanted yaw relative to the rest pose, None for the current one
        """
        if yaw is None:
            yaw = scene.yaw
        # Of the two equivalent gripper poses, half a turn apart, take the nearer one away from the joint's limit.
        turn = wrap_half_turn(yaw - scene.yaw)
        goal = scene.yaw + turn
        if abs(goal) > 2.2:
            goal -= np.sign(goal) * np.pi
        return rotation_vector(yaw_rotation(goal) @ scene.rest_rotation @ scene.eef_rotation.T)

    def __call__(self, scene: Scene, target: Target) -> npt.NDArray[np.float32]:
        """
        Action towards a target.

        :param scene: Current state
        :param target: Wanted pose and gripper command
        :return: Action in [-1, 1] of shape (7,), gripper last
        """
        action = np.zeros(7)
        delta = self.position_gain * (target.position - scene.eef) / self.position_scale
        action[:3] = np.clip(delta, -1.0, 1.0)
        if target.rotation is None:
            error = self.rotation_error(scene, target.yaw)
        else:
            error = rotation_vector(target.rotation @ scene.rest_rotation @ scene.eef_rotation.T)
        size = float(np.linalg.norm(error))
        if size > self.dead_band:
            action[3:6] = error * (min(size, self.max_rotation) / size) / self.rotation_scale
        action[6] = target.gripper
        return action.astype(np.float32)
