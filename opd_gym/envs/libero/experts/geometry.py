"""Pure geometry for the scripted experts: no simulator, only numpy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import acos, atan2, cos, pi, sin, sqrt

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def wrap_half_turn(angle: float) -> float:
    """
    Fold an angle into [-pi/2, pi/2): a parallel gripper is the same after half a turn.

    :param angle: Angle in rad
    :return: The equivalent angle of a gripper with two equal fingers
    """
    return (angle + pi / 2) % pi - pi / 2


def yaw_rotation(yaw: float) -> Array:
    """
    Rotation matrix about the world's vertical axis.

    :param yaw: Angle in rad
    :return: 3 x 3 rotation matrix
    """
    c, s = cos(yaw), sin(yaw)
    return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])


def rotation_vector(rotation: Array) -> Array:
    """
    Axis times angle of a rotation matrix.

    :param rotation: 3 x 3 rotation matrix
    :return: Rotation vector, its norm in [0, pi]
    """
    skew = np.array([rotation[2, 1] - rotation[1, 2], rotation[0, 2] - rotation[2, 0], rotation[1, 0] - rotation[0, 1]])
    angle = acos(min(1.0, max(-1.0, (float(np.trace(rotation)) - 1.0) / 2.0)))
    norm = sqrt(float(skew @ skew))
    if norm < 1e-6:
        if angle < 1.0:
            return 0.5 * skew
        # Half a turn: the skew part vanishes and the axis is read off the symmetric part.
        axis = np.sqrt(np.clip((np.diag(rotation) + 1.0) / 2.0, 0.0, None))
        largest = int(np.argmax(axis))
        axis = np.where(rotation[largest] < 0.0, -axis, axis)
        axis[largest] = abs(axis[largest])
        return np.asarray(angle * axis / np.linalg.norm(axis))
    return np.asarray(skew * (angle / norm))


def box_points(half: Array, spacing: float = 0.006, most: int = 14) -> Array:
    """
    Points of a regular grid on the surface of a box.

    :param half: Half extents
    :param spacing: Wanted distance between neighbouring points in m
    :param most: Largest number of points along an edge
    :return: (n, 3) points in the frame of the box
    """
    counts = [int(np.clip(np.ceil(2.0 * h / spacing) + 1, 2, most)) for h in half]
    grids = np.meshgrid(*(np.linspace(-h, h, n) for h, n in zip(half, counts, strict=True)), indexing="ij")
    points = np.stack([g.ravel() for g in grids], axis=1)
    surface = (np.abs(np.abs(points) - half) < 1e-9).any(axis=1)
    return np.asarray(points[surface])


@dataclass(frozen=True)
class Grasp:
    """
    A grasp from above.

    :param position: Where the point between the finger pads should be
    :param yaw: Angle of the closing axis, 0 is the arm's rest pose (closing along the world's y axis)
    :param width: What is between the pads, in m
    :param margin: How far off along the closing axis the gripper may be and still descend without touching the object
    """

    position: Array
    yaw: float
    width: float
    margin: float


@dataclass(frozen=True)
class Gripper:
    """
    Dimensions of a parallel gripper for the planners (defaults: Panda hand in robosuite).

    :param stroke: Largest gap between the pads
    :param pad_below: How far the pads reach below the grip site
    :param tip_below: How far the fingers reach below the grip site
    :param pad_above: How far the pads reach above the grip site
    :param pad_half_width: Half the width of a pad
    :param depth: How deep an object may reach up between the fingers, measured from the grip site
    :param hand_bottom: Lowest point of the hand above the grip site
    :param hand_along: Half the hand's extent along the closing axis
    :param hand_across: Half the hand's extent across it
    :param wrist_offset: How much further out the grip site is than the wrist
    :param wrist_height: How far the wrist is above the grip site
    :param arm_reach: Largest distance between shoulder and wrist with a comfortably bent elbow
    """

    stroke: float = 0.078
    pad_below: float = 0.005
    tip_below: float = 0.0095
    pad_above: float = 0.012
    pad_half_width: float = 0.008
    depth: float = 0.021
    hand_bottom: float = 0.024
    hand_along: float = 0.108
    hand_across: float = 0.037
    wrist_offset: float = 0.088
    wrist_height: float = 0.204
    arm_reach: float = 0.67


def closing_axis(yaw: float) -> Array:
    """
    Horizontal direction in which the fingers close.

    :param yaw: Yaw of the gripper, 0 in the arm's rest pose
    :return: Unit vector (x, y)
    """
    return np.array([-sin(yaw), cos(yaw)])


def yaw_of_closing_axis(axis: Array) -> float:
    """
    Yaw at which the fingers close along a horizontal direction.

    :param axis: Direction (x, y), sign and length are free
    :return: Yaw in [-pi/2, pi/2)
    """
    return wrap_half_turn(atan2(-float(axis[0]), float(axis[1])))


def grasp_height(bottom: float, top: float, gripper: Gripper) -> float:
    """
    Height of the grip site: as low as the hand allows on tall objects, the middle of flat ones.

    :param bottom: Lowest point of the object
    :param top: Highest point of the object
    :param gripper: Dimensions of the gripper
    :return: Height in m
    """
    middle = 0.5 * (bottom + top) - 0.5 * (gripper.pad_above - gripper.pad_below)
    return max(min(middle, top - 0.008), top - gripper.depth, bottom + gripper.tip_below)


def hand_hits(obstacles: Array, position: Array, yaw: float, gripper: Gripper) -> int:
    """
    Number of obstacle points inside the hand or an open finger, or above them.

    :param obstacles: (n, 3) points in the world
    :param position: Grip site
    :param yaw: Yaw of the gripper
    :param gripper: Dimensions of the gripper
    :return: Number of points that a gripper hits when it comes straight down
    """
    if len(obstacles) == 0:
        return 0
    axis = closing_axis(yaw)
    relative = obstacles - position
    along = np.abs(relative[:, :2] @ axis)
    across = np.abs(relative[:, 0] * axis[1] - relative[:, 1] * axis[0])
    hand = (relative[:, 2] > gripper.hand_bottom) & (along < gripper.hand_along) & (across < gripper.hand_across)
    finger = (relative[:, 2] > -gripper.pad_below) & (across < gripper.pad_half_width + 0.006)
    # The fingers' whole way of closing, so that nothing else is gripped together with the object.
    finger &= along < 0.5 * gripper.stroke + 0.016
    return int((hand | finger).sum())


def overreach(position: Array, shoulder: Array, gripper: Gripper) -> float:
    """
    How far a grasp from above stretches the arm beyond what it reaches with a bent elbow.

    robosuite's controller cannot leave a straight elbow again, so a rotation is better than the last centimetres.

    :param position: Grip site
    :param shoulder: Position of the arm's shoulder
    :param gripper: Dimensions of the gripper
    :return: Distance in m, 0 if the elbow stays bent
    """
    relative = position - shoulder
    out = sqrt(float(relative[0] ** 2 + relative[1] ** 2)) - gripper.wrist_offset
    up = float(relative[2]) + gripper.wrist_height
    return max(0.0, sqrt(out * out + up * up) - gripper.arm_reach)


def plan_top_grasp(
    points: Array,
    current_yaw: float,
    gripper: Gripper,
    obstacles: Array | None = None,
    n_yaws: int = 12,
) -> Grasp:
    """
    Grasp an object of any pose from above, from points on its surface.

    The yaw of the rest pose wins wherever the object fits between the fingers there, so that most grasps need no
    rotation at all; the current yaw has a bonus, so that the choice does not flip on the way.

    :param points: (n, 3) points on the surface of the object in the world
    :param current_yaw: Yaw of the gripper now
    :param gripper: Dimensions of the gripper
    :param obstacles: (m, 3) points of other objects, which the hand should not hit
    :param n_yaws: Number of yaws tried between -90 and +90 degrees
    :return: The best grasp; its width exceeds the stroke if none fits
    """
    bottom, top = float(points[:, 2].min()), float(points[:, 2].max())
    height = grasp_height(bottom, top, gripper)
    between = points[(points[:, 2] > height - 0.012) & (points[:, 2] < height + 0.016)]
    # The open fingers come down past everything above the pads, so that part must fit between them as well.
    above = points[points[:, 2] > height - gripper.pad_below - 0.004]
    if len(between) < 4:
        between = above if len(above) >= 4 else points
    near = np.empty((0, 3))
    if obstacles is not None and len(obstacles):
        close = np.abs(obstacles[:, :2] - between[:, :2].mean(axis=0)).max(axis=1) < gripper.hand_along + 0.05
        near = obstacles[close & (obstacles[:, 2] > height - gripper.pad_below)]
    candidates: list[tuple[float, Grasp]] = []
    for k in range(n_yaws):
        yaw = wrap_half_turn(k * pi / n_yaws)
        axis = closing_axis(yaw)
        across = np.array([axis[1], -axis[0]])
        along = between[:, :2] @ axis
        side = between[:, :2] @ across
        side_low, side_high = float(side.min()), float(side.max())
        room = max(0.0, 0.5 * (side_high - side_low) - 0.012)
        turn_cost = abs(yaw) + 0.4 * abs(wrap_half_turn(yaw - current_yaw))
        # Gripping off centre is only worth it where a neighbour is in the way.
        for shift in (0.0, 0.012, -0.012, 0.024, -0.024) if len(near) else (0.0,):
            if abs(shift) > room:
                continue
            centre_side = 0.5 * (side_high + side_low) + shift
            window = along[np.abs(side - centre_side) < gripper.pad_half_width + 0.006]
            if len(window) < 2:
                window = along
            low, high = float(window.min()), float(window.max())
            xy = 0.5 * (low + high) * axis + centre_side * across
            margin = max(0.5 * (gripper.stroke - (high - low)), 0.003)
            grasp = Grasp(np.array([xy[0], xy[1], height]), yaw, high - low, margin)
            candidates.append((turn_cost + 12.0 * abs(shift), grasp))
    narrowest = min(grasp.width for _, grasp in candidates)

    def cost_of(base: float, grasp: Grasp) -> float:
        # Gripped obliquely, a box turns in the hand or slips.
        cost = base + 70.0 * max(0.0, grasp.width - narrowest - 0.006) + 2.0 * grasp.width
        return cost + 40.0 * max(0.0, grasp.width - 0.066) + (100.0 if grasp.width > gripper.stroke - 0.004 else 0.0)

    ranked = sorted(((cost_of(base, grasp), k) for k, (base, grasp) in enumerate(candidates)))
    best_cost, best = np.inf, candidates[ranked[0][1]][1]
    for cost, k in ranked:
        if cost >= best_cost:
            break
        grasp = candidates[k][1]
        hits = hand_hits(near, grasp.position, grasp.yaw, gripper)
        cost += 2.0 + 0.05 * min(hits, 40) if hits else 0.0
        if cost < best_cost:
            best_cost, best = cost, grasp
    return best


@dataclass(frozen=True)
class Rim:
    """
    Rim of a hollow, round object in the frame of its body.

    :param axis: Which of the body's axes is the object's
    :param sign: +1 or -1: the rim is on the positive or on the negative side
    :param centre: Where the object's axis is, in the body's two other axes
    :param level: Height along the axis at which the wall is gripped
    :param radii: Radius of the wall at equally spaced angles, nan where there is none
    :param thickness: Radial extent of the wall there
    """

    axis: int
    sign: float
    centre: Array
    level: float
    radii: Array
    thickness: Array


def find_rim(points: Array, axis: int, sign: float, gripper: Gripper, n_angles: int = 24) -> Rim | None:
    """
    Find the rim of an object that is too wide for the gripper but hollow (a bowl).

    :param points: (n, 3) points on the surface in the frame of the body
    :param axis: Which of the body's axes points up or down
    :param sign: +1 if it points up
    :param gripper: Dimensions of the gripper
    :param n_angles: Number of places on the rim
    :return: The rim, or None if the object is not hollow and round
    """
    along = sign * points[:, axis]
    flat = points[:, [(axis + 1) % 3, (axis + 2) % 3]]
    rim_height = float(along.max())
    rim = flat[along > rim_height - 0.01]
    centre = 0.5 * (rim.max(axis=0) + rim.min(axis=0))
    level = rim_height - 0.012
    wall = flat[np.abs(along - level) < 0.008] - centre
    if len(wall) < n_angles:
        return None
    distances = np.linalg.norm(wall, axis=1)
    radius = float(distances.mean())
    # Flat things (plates) have a brim that the pads would slip off.
    if rim_height - float(along.min()) < 0.03 or 2.0 * radius < gripper.stroke - 0.006:
        return None
    if float(distances.min()) < 0.6 * radius or float(distances.max()) > 1.4 * radius:
        return None
    if (np.linalg.norm(rim - centre, axis=1) < 0.5 * radius).any():
        return None  # closed at the top
    angles = np.arctan2(wall[:, 1], wall[:, 0])
    radii, thickness = np.full(n_angles, np.nan), np.zeros(n_angles)
    for j in range(n_angles):
        offset = (angles - 2.0 * pi * j / n_angles + pi) % (2.0 * pi) - pi
        window = distances[np.abs(offset) < 0.25]
        if len(window):
            radii[j], thickness[j] = window.mean(), window.max() - window.min()
    return Rim(axis, sign, centre, level, radii, thickness)


def plan_rim_grasp(
    rim: Rim,
    position: Array,
    rotation: Array,
    current_yaw: float,
    current_xy: Array,
    gripper: Gripper,
    obstacles: Array | None = None,
    shoulder: Array | None = None,
    ways: Sequence[Array] = (),
) -> Grasp:
    """
    Grasp a bowl by its rim, one finger inside.

    :param rim: The rim in the frame of the body
    :param position: Position of the body
    :param rotation: Orientation of the body
    :param current_yaw: Yaw of the gripper now
    :param current_xy: Position of the gripper now; the nearer side of the rim is preferred
    :param gripper: Dimensions of the gripper
    :param obstacles: (m, 3) points of other objects, which the hand should not hit
    :param shoulder: Position of the arm's shoulder; places that would stretch the elbow are avoided
    :param ways: Displacements of the carried object at which the hand should be clear of obstacles too
    :return: The best grasp
    """
    side_u, side_v = rotation[:, (rim.axis + 1) % 3], rotation[:, (rim.axis + 2) % 3]
    middle = position + rim.centre[0] * side_u + rim.centre[1] * side_v + rim.level * rim.sign * rotation[:, rim.axis]
    radius = float(np.nanmax(rim.radii))
    reach = gripper.hand_along + radius + 0.02

    def near(way: Array | float) -> Array:
        if obstacles is None or len(obstacles) == 0:
            return np.empty((0, 3))
        moved = obstacles - way
        close = np.abs(moved[:, :2] - middle[:2]).max(axis=1) < reach
        return np.asarray(moved[close & (moved[:, 2] > middle[2] - radius - gripper.pad_below)])

    here, there = near(0.0), [near(way) for way in ways]
    best: Grasp | None = None
    best_cost = np.inf
    for j, wall in enumerate(rim.radii):
        if np.isnan(wall):
            continue
        angle = 2.0 * pi * j / len(rim.radii)
        outwards = cos(angle) * side_u + sin(angle) * side_v
        point = middle + wall * outwards
        yaw = yaw_of_closing_axis(outwards[:2])
        cost = abs(yaw) + 0.4 * abs(wrap_half_turn(yaw - current_yaw))
        cost += 3.0 * sqrt(float((point[0] - current_xy[0]) ** 2 + (point[1] - current_xy[1]) ** 2))
        # The hand reaches the high side of a tilted bowl without touching the rest.
        cost += 10.0 * float(middle[2] - point[2])
        if shoulder is not None:
            cost += 80.0 * overreach(point, shoulder, gripper)
        if cost >= best_cost:
            continue
        hits = hand_hits(here, point, yaw, gripper)
        cost += 2.0 + 0.05 * min(hits, 40) if hits else 0.0
        for obstacles_there in there:
            hits = hand_hits(obstacles_there, point, yaw, gripper)
            cost += 2.0 + 0.05 * min(hits, 40) if hits else 0.0
        if cost < best_cost:
            best_cost = cost
            best = Grasp(point, yaw, float(rim.thickness[j]), 0.012)
    assert best is not None
    return best
