"""Open a drawer by its handle, turn a knob."""

from __future__ import annotations

from math import cos, pi, sin

import numpy as np

from opd_gym.envs.libero.experts.geometry import Array, yaw_of_closing_axis, yaw_rotation
from opd_gym.envs.libero.experts.scene import Scene
from opd_gym.envs.libero.experts.servo import CLOSE, OPEN, Target, rise_from


def axis_rotation(axis: Array, angle: float) -> Array:
    """
    Rotation matrix about an axis.

    :param axis: Unit vector
    :param angle: Angle in rad
    """
    x, y, z = axis
    cross = np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
    return np.eye(3) + sin(angle) * cross + (1.0 - cos(angle)) * cross @ cross


class OpenDrawer:
    """
    Stateless opening of a drawer: point the gripper at its front, close on the handle, pull.

    :param joint: Name of the drawer's slide joint
    :param opening: Direction in which the joint opens, +1 or -1
    :param wanted: Joint position (times ``opening``) from which the drawer counts as open
    :param slope: Angle in rad by which the gripper looks down on the handle
    """

    def __init__(self, joint: str, opening: float, wanted: float, slope: float = 0.4) -> None:
        self.joint = joint
        self.opening = opening
        self.wanted = wanted
        self.slope = slope
        self._handle: int | None = None

    def missing(self, scene: Scene) -> float:
        """
        How much further in m the drawer must be pulled to be open; negative once it is.

        :param scene: Current state
        """
        return self.wanted - self.opening * scene.joint(self.joint)

    def direction(self, scene: Scene) -> Array:
        """
        Horizontal unit vector in which the drawer opens.

        :param scene: Current state
        """
        return self.opening * scene.joint_axis(self.joint)[1]

    def handle(self, scene: Scene) -> Array:
        """
        Centre of the handle: the part of the drawer that is furthest out.

        :param scene: Current state
        """
        body, axis, _ = scene.joint_axis(self.joint)
        if self._handle is None:
            boxes = {g: scene.geom_box(g) for g in scene.collision_geoms(body)}
            out = {g: float(c @ axis) * self.opening + float(np.abs(r.T @ axis) @ h) for g, (c, r, h) in boxes.items()}
            self._handle = max(out, key=lambda g: out[g])
        return scene.geom_box(self._handle)[0]

    def leave(self, scene: Scene) -> Target | None:
        """
        Let go of the handle and back off, or None where the gripper is clear of it.

        :param scene: Current state
        """
        direction = self.direction(scene)
        offset = scene.eef - self.handle(scene)
        tilted = -float(scene.eef_rotation[2, 2]) < 0.8
        if not tilted or float(np.linalg.norm(offset)) > 0.13:
            return None
        away = 0.06 * direction + (np.array([0.0, 0.0, 0.05]) if float(offset @ direction) > 0.05 else 0.0)
        rotation = None if float(offset @ direction) > 0.07 else self._rotation(direction)
        return Target(scene.eef + away, OPEN, 0.0, rotation)

    def _rotation(self, direction: Array) -> Array:
        # Turns a gripper that points down towards the front, so that the fingers close vertically on a horizontal bar.
        # Not quite level: the hand is wide in that plane and must stay above the objects on the table.
        return axis_rotation(np.cross([0.0, 0.0, -1.0], -direction), pi / 2 - self.slope)

    def __call__(self, scene: Scene) -> Target:
        """
        What to do in the current state.

        :param scene: Current state
        """
        direction = self.direction(scene)
        rotation = self._rotation(direction)
        handle = self.handle(scene)
        offset = handle - scene.eef
        depth = float(offset @ direction)
        lateral = offset - depth * direction
        side = float(np.linalg.norm(lateral))
        body = scene.joint_axis(self.joint)[0]
        touching = max(scene.finger_distances(body)) < 0.002
        turned = float((rotation @ scene.rest_rotation)[:, 2] @ scene.eef_rotation[:, 2])
        at_handle = abs(depth) < 0.02 and side < 0.025 and turned > 0.9
        if touching and at_handle and scene.gap < 0.06:
            if scene.finger_speed > 0.03:
                return Target(scene.eef.copy(), CLOSE, None, rotation)
            return Target(scene.eef + 0.08 * direction + np.array([0.0, 0.0, lateral[2]]), CLOSE, None, rotation)
        closing = 0.004 < scene.gap < 0.072
        if at_handle and (closing or (abs(depth) < 0.008 and side < 0.015)):
            return Target(scene.eef.copy(), CLOSE, None, rotation)
        # Funnel along the opening direction; far out until the gripper points at the front.
        out = 0.12 if turned < 0.8 else min(0.1, 4.0 * max(0.0, side - 0.008)) + (0.05 if turned < 0.95 else 0.0)
        if scene.gap < 0.06 and abs(depth) < 0.06:
            out = max(out, 0.08)
        goal = handle + out * direction
        if turned < 0.8:
            # Turning sweeps the hand sideways: keep it above and outside meanwhile.
            goal = goal + np.array([0.0, 0.0, 0.02])
        return Target(goal, OPEN, None, rotation)


class PushShut:
    """
    Stateless closing of a drawer: push its handle with closed fingers.

    :param joint: Name of the drawer's slide joint
    :param opening: Direction in which the joint opens, +1 or -1
    :param closed: Joint position (times ``opening``) below which the drawer counts as closed
    :param slope: Angle in rad by which the gripper looks down on the handle
    """

    def __init__(self, joint: str, opening: float, closed: float, slope: float = 0.7) -> None:
        self.joint = joint
        self.opening = opening
        self.closed = closed
        self.slope = slope

    def is_closed(self, scene: Scene) -> bool:
        """
        Whether the drawer is closed.

        :param scene: Current state
        """
        return self.opening * scene.joint(self.joint) < self.closed

    def _contact(self, scene: Scene) -> tuple[Array, Array]:
        """Where to push and in which direction."""
        body, axis, _ = scene.joint_axis(self.joint)
        inwards = -self.opening * axis
        points = scene.points(body)
        depths = points @ inwards
        handle = points[depths < depths.min() + 0.02]
        return 0.5 * (handle.max(axis=0) + handle.min(axis=0)), inwards

    def leave(self, scene: Scene) -> Target | None:
        """
        Nothing is held, so nothing has to be let go of.

        :param scene: Current state
        """
        return None

    def __call__(self, scene: Scene) -> Target:
        """
        What to do in the current state.

        :param scene: Current state
        """
        contact, inwards = self._contact(scene)
        across = np.array([-inwards[1], inwards[0]])
        # The fingers side by side, so that the hand is flat where it passes above and below other things.
        rotation = axis_rotation(np.cross([0.0, 0.0, -1.0], inwards), pi / 2 - self.slope) @ yaw_rotation(
            yaw_of_closing_axis(across)
        )
        offset = contact - scene.eef
        before = float(offset @ inwards)
        aside = abs(float(offset[:2] @ across))
        turned = float(np.trace((rotation @ scene.rest_rotation).T @ scene.eef_rotation))
        if turned > 2.8 and before > -0.01 and aside < 0.03 and abs(offset[2]) < 0.02 and scene.gap < 0.03:
            return Target(contact + (0.06 - before) * inwards, CLOSE, None, rotation)
        if turned > 2.6 and 0.03 < before < 0.14 and aside < 0.05:
            return Target(contact - 0.05 * inwards, CLOSE, None, rotation)
        # Over everything to the place in front.
        front = contact - 0.09 * inwards
        body = scene.joint_axis(self.joint)[0]
        high = max(float(scene.points(body, 0.012)[:, 2].max()), float(contact[2])) + 0.12
        freedom = float(np.clip(1.0 - (high - float(scene.eef[2]) - 0.03) / 0.06, 0.0, 1.0))
        xy = scene.eef[:2] + freedom * (front - scene.eef)[:2]
        return Target(np.array([xy[0], xy[1], high]), CLOSE, None, rotation)


class TurnKnob:
    """
    Stateless turning of a knob with a ridge: grip the ridge from above, turn with the wrist.

    :param joint: Name of the knob's hinge joint
    :param wanted: Joint position from which the knob counts as turned
    :param hover: Height from which the gripper descends
    :param tilt: Angle in rad by which the fingers point back at the robot if the knob is near its base: there the
        folded elbow keeps them from pointing straight down
    """

    def __init__(self, joint: str, wanted: float, hover: float = 0.08, tilt: float = 0.7) -> None:
        self.joint = joint
        self.wanted = wanted
        self.hover = hover
        self.tilt = tilt
        self._ridge: int | None = None

    def leave(self, scene: Scene) -> Target | None:
        """
        Let go of the knob and rise above it, or None where the gripper is clear of it.

        :param scene: Current state
        """
        return rise_from(scene, scene.joint_axis(self.joint)[0])

    def __call__(self, scene: Scene) -> Target:
        """
        What to do in the current state.

        :param scene: Current state
        """
        body, axis, anchor = scene.joint_axis(self.joint)
        if self._ridge is None:
            boxes = {g: scene.geom_box(g) for g in scene.collision_geoms(body)}
            self._ridge = max(boxes, key=lambda g: float(boxes[g][0][2] + np.abs(boxes[g][1][2]) @ boxes[g][2]))
        centre, rotation, half = scene.geom_box(self._ridge)
        top = float(centre[2] + np.abs(rotation[2]) @ half)
        extents = np.linalg.norm(rotation[:2] * half, axis=0)
        length = rotation[:2, int(np.argmax(extents))]
        ridge_yaw = yaw_of_closing_axis(np.array([-length[1], length[0]]))
        # Gripped off the hinge, the ridge would be pushed instead of turned: grip it where it passes over the hinge.
        along = length / np.linalg.norm(length)
        spot = centre[:2] + float((anchor[:2] - centre[:2]) @ along) * along
        goal = np.array([spot[0], spot[1], top - 0.012])
        offset = goal - scene.eef
        side = float(np.linalg.norm(offset[:2]))
        touching = max(scene.finger_distances(body)) < 0.0015
        near = side < 0.02 and abs(offset[2]) < 0.015
        position = scene.joint(self.joint)
        tilt = self.tilt if float(np.linalg.norm((goal - scene.shoulder)[:2])) < 0.42 else 0.0

        def turned(yaw: float) -> Array:
            return yaw_rotation(yaw) @ axis_rotation(np.array([0.0, 1.0, 0.0]), tilt)

        error = (ridge_yaw - scene.yaw + pi / 2) % pi - pi / 2
        if near and touching and scene.gap < 0.07 and scene.finger_speed < 0.03:
            lead = 0.4 * float(np.sign(self.wanted - position)) * float(np.sign(axis[2]))
            return Target(goal, CLOSE, None, turned(scene.yaw + lead))
        if near and abs(error) < 0.5 and (scene.gap < 0.072 or (side < 0.01 and abs(offset[2]) < 0.008)):
            return Target(goal, CLOSE, None, turned(scene.yaw + error))
        rise = min(self.hover, 5.0 * max(0.0, side - 0.01)) + (0.04 if abs(error) > 0.25 or scene.gap < 0.06 else 0.0)
        height = goal[2] + rise
        freedom = float(np.clip(1.0 - (height - float(scene.eef[2]) - 0.015) / 0.03, 0.0, 1.0))
        xy = scene.eef[:2] + freedom * offset[:2]
        return Target(np.array([xy[0], xy[1], height]), OPEN, None, turned(scene.yaw + error))
