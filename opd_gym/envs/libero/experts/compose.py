"""Several skills one after the other, chosen by the state alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from opd_gym.envs.libero.experts.articulated import OpenDrawer
from opd_gym.envs.libero.experts.geometry import Array
from opd_gym.envs.libero.experts.pick_place import PickPlace, Placement
from opd_gym.envs.libero.experts.scene import Scene
from opd_gym.envs.libero.experts.servo import Target


class Skill(Protocol):
    """Something an expert can do."""

    def __call__(self, scene: Scene) -> Target:
        """
        What to do in the current state.

        :param scene: Current state
        """

    def leave(self, scene: Scene) -> Target | None:
        """
        How the gripper gets clear of what this skill handles, or None where it is clear.

        :param scene: Current state
        """


@dataclass(frozen=True)
class Stage:
    """
    One of the things a task asks for.

    :param skill: Brings it about
    :param done: Whether it is so in a state
    """

    skill: Skill
    done: Callable[[Scene], bool]


class InTurn:
    """
    Do the first thing that is not done, once the gripper is clear of everything else.

    :param stages: What to do, in this order
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.stages = list(stages)

    def __call__(self, scene: Scene) -> Target:
        """
        What to do in the current state.

        :param scene: Current state
        """
        stage = next((stage for stage in self.stages if not stage.done(scene)), self.stages[-1])
        others = (other.skill.leave(scene) for other in self.stages if other is not stage)
        return next((target for target in others if target is not None), None) or stage.skill(scene)


def _nearest(spots: Array, taken: Array, grid: float = 0.01) -> Array:
    """Horizontal distance of each spot from the nearest of many points, which are thinned out to a grid."""
    taken = np.unique(np.round(taken / grid), axis=0) * grid
    return np.asarray(np.linalg.norm(spots[:, None] - taken, axis=2).min(axis=1))


class DrawerThenPlace:
    """
    Put an object into a drawer: move it out of the drawer's way, open the drawer, let go of it, put the object in.

    :param drawer: Opens the drawer
    :param place: Puts the object there
    :param room: Horizontal distance in m that the middle of the object needs from the open drawer: less, and the hand
        would hit the drawer when it grasps the object
    """

    def __init__(self, drawer: OpenDrawer, place: PickPlace, room: float = 0.055) -> None:
        self.drawer = drawer
        self.place = place
        self.room = room
        self.aside = PickPlace(place.name, self._free_spot)

    def _opened(self, scene: Scene) -> Array:
        """Points (x, y) of the drawer as it will be when open; it is pulled a little further than it must be."""
        points = scene.points(scene.joint_axis(self.drawer.joint)[0], 0.012)
        return np.asarray((points + (self.drawer.missing(scene) + 0.02) * self.drawer.direction(scene))[:, :2])

    def _free_spot(self, scene: Scene) -> Placement:
        """The spot on the table with the most room around it, if possible not far away."""
        here = scene.position(self.place.name)[:2]
        angles = np.linspace(0.0, 2.0 * np.pi, 16, endpoint=False)
        ways = np.linspace(0.0, 0.2, 11)[:, None, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        spots = here + ways.reshape(-1, 2)
        taken = np.concatenate([self._opened(scene), scene.obstacles(self.place.name)[:, :2]])
        room = np.minimum(_nearest(spots, taken), self.room + 0.03)
        spot = spots[int(np.argmax(room - 0.1 * np.linalg.norm(spots - here, axis=1)))]
        return Placement(spot, scene.table + 0.004, 0.03, 0.015)

    def __call__(self, scene: Scene) -> Target:
        """
        What to do in the current state.

        :param scene: Current state
        """
        holds = self.place.holds(scene)
        # With the object in the hand, a drawer that slid back a little is open enough.
        if self.drawer.missing(scene) < (0.05 if holds else 0.01):
            return self.drawer.leave(scene) or self.place(scene)
        here = scene.position(self.place.name)[None, :2]
        if holds or _nearest(here, self._opened(scene))[0] < self.room:
            return self.aside(scene)
        return self.place.leave(scene) or self.drawer(scene)

    def leave(self, scene: Scene) -> Target | None:
        """
        Let go of the object and rise above it, or None where the gripper is clear of it.

        :param scene: Current state
        """
        return self.place.leave(scene)
