"""Experts for LIBERO's tasks, built from the goal in the task's BDDL file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from opd_gym.envs.libero.experts.articulated import OpenDrawer, TurnKnob
from opd_gym.envs.libero.experts.geometry import Array
from opd_gym.envs.libero.experts.pick_place import PickPlace, Placement
from opd_gym.envs.libero.experts.scene import Scene
from opd_gym.envs.libero.experts.servo import Servo, Target
from opd_gym.envs.libero.experts.slide import Slide

Skill = Callable[[Scene], Target]


class Expert:
    """
    Labels the current state of a LIBERO domain with an action.

    :param domain: LIBERO's domain (``ControlEnv(...).env``)
    :param skill: Returns the wanted gripper pose for a state
    :param servo: Turns it into an action
    """

    def __init__(self, domain: Any, skill: Skill, servo: Servo | None = None) -> None:
        self.scene = Scene(domain)
        self.skill = skill
        self.servo = servo or Servo()

    def __call__(self) -> npt.NDArray[np.float32]:
        """
        Action of the expert in the current state.

        :return: OSC delta action in [-1, 1] of shape (7,), gripper last (-1 opens, +1 closes)
        """
        self.scene.update()
        return self.servo(self.scene, self.skill(self.scene))


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
        if self.drawer.missing(scene) < (0.05 if holds else 0.0):
            return self.drawer.retreat(scene) or self.place(scene)
        here = scene.position(self.place.name)[None, :2]
        if holds or _nearest(here, self._opened(scene))[0] < self.room:
            return self.aside(scene)
        return self.place.leave(scene) or self.drawer(scene)


def _nearest(spots: Array, taken: Array, grid: float = 0.01) -> Array:
    """Horizontal distance of each spot from the nearest of many points, which are thinned out to a grid."""
    taken = np.unique(np.round(taken / grid), axis=0) * grid
    return np.asarray(np.linalg.norm(spots[:, None] - taken, axis=2).min(axis=1))


def _surface(points: Array, xy: Array, radius: float, below: float = np.inf) -> float:
    """Height of the highest point near ``xy`` that is under ``below``; minus infinity if there is none."""
    near = (np.abs(points[:, :2] - xy) < radius).all(axis=1) & (points[:, 2] < below)
    return float(points[near, 2].max()) if near.any() else -np.inf


def _into_container(container: str, site: str) -> Callable[[Scene], Placement]:
    """Into a basket: let go over the rim."""

    def placement(scene: Scene) -> Placement:
        centre, _ = scene.site(site)
        rim = float(scene.points(scene.body(container))[:, 2].max())
        return Placement(centre[:2], rim - 0.005, 0.03, 0.03, container)

    return placement


def _onto_object(name: str) -> Callable[[Scene], Placement]:
    """Onto or into another object: it will stand on the surface in the middle, not on the brim."""

    def placement(scene: Scene) -> Placement:
        centre = scene.position(name)
        points = scene.points(scene.body(name))
        surface = _surface(points, centre[:2], 0.03)
        if not np.isfinite(surface):
            surface = float(points[:, 2].max())
        return Placement(centre[:2], surface + 0.004, 0.05, 0.015, name)

    return placement


def _onto_site(site: str, container: str) -> Callable[[Scene], Placement]:
    """Onto a region of a fixture: the surface below it."""

    def placement(scene: Scene) -> Placement:
        centre, rotation = scene.site(site)
        if abs(float(rotation[2, 2])) < 0.9:
            # The region of a sloping board (the wine rack) begins at its site and goes up the board; LIBERO measures
            # it along the third row of the site's matrix. Its middle is the safest place.
            centre = centre + 0.05 * rotation[2]
            return Placement(centre[:2], float(centre[2]) + 0.003, 0.05, 0.02, container)
        points = [scene.points(body, spacing=0.012) for body in scene.bodies(container)]
        surface = max((_surface(p, centre[:2], 0.03, float(centre[2]) + 0.05) for p in points), default=-np.inf)
        return Placement(centre[:2], max(surface, float(centre[2])) + 0.003, 0.05, 0.02, container)

    return placement


def _into_drawer(site: str, container: str) -> Callable[[Scene], Placement]:
    """Into an open drawer: its floor is the surface below the region."""

    def placement(scene: Scene) -> Placement:
        centre, _ = scene.site(site)
        points = [scene.points(body, spacing=0.012) for body in scene.bodies(container)]
        floor = max((_surface(p, centre[:2], 0.03, float(centre[2])) for p in points), default=-np.inf)
        return Placement(centre[:2], max(floor, float(centre[2]) - 0.04) + 0.006, 0.1, 0.02, container)

    return placement


def _drawer(domain: Any, site: str) -> OpenDrawer:
    region = domain.object_sites_dict[site]
    opened = domain.get_object(region.parent_name).object_properties["articulation"]["default_open_ranges"]
    # For LIBERO a drawer is open beyond the nearer end of the range. A little further is on the safe side.
    sign = float(np.sign(sum(opened)))
    return OpenDrawer(region.joints[0], sign, min(abs(v) for v in opened) + 0.002)


def _skill(domain: Any) -> Skill | None:
    goal = domain.parsed_problem["goal_state"]
    if len(goal) != 1:
        return None
    predicate, *arguments = goal[0]
    objects, sites = domain.objects_dict, domain.object_sites_dict
    if predicate == "open" and arguments[0] in sites and sites[arguments[0]].joints:
        return _drawer(domain, arguments[0])
    if predicate == "turnon" and arguments[0] in domain.fixtures_dict:
        fixture = domain.fixtures_dict[arguments[0]]
        wanted = min(fixture.object_properties["articulation"]["default_turnon_ranges"]) + 0.1
        return TurnKnob(fixture.joints[0], wanted)
    if predicate not in ("in", "on") or arguments[0] not in objects:
        return None
    name, place = arguments
    if place in objects:
        return PickPlace(name, _onto_object(place)) if predicate == "on" else None
    if place not in sites:
        return None
    parent = getattr(sites[place], "parent_name", None)
    if parent is None:
        if objects[name].category_name == "plate":
            return Slide(name, lambda scene: scene.site(place)[0][:2])
        return None
    if predicate == "in" and parent in objects and place.endswith("contain_region"):
        return PickPlace(name, _into_container(parent, place))
    if predicate == "in" and sites[place].joints:
        return DrawerThenPlace(_drawer(domain, place), PickPlace(name, _into_drawer(place, parent)))
    if predicate == "on" and (parent in domain.fixtures_dict or parent in objects):
        return PickPlace(name, _onto_site(place, parent))
    return None


def supports(domain: Any) -> bool:
    """
    Whether there is a scripted expert for the task of a domain.

    :param domain: LIBERO's domain (``ControlEnv(...).env``)
    """
    return _skill(domain) is not None


def make_expert(domain: Any) -> Expert:
    """
    Expert for the task of a domain.

    :param domain: LIBERO's domain (``ControlEnv(...).env``)
    """
    skill = _skill(domain)
    if skill is None:
        raise NotImplementedError(
            f"There is no scripted expert for the goal {domain.parsed_problem['goal_state']}. "
            "Use another task, or a learnt policy as the teacher."
        )
    return Expert(domain, skill)
