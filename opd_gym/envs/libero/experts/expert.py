"""Experts for LIBERO's tasks, built from the goal in the task's BDDL file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from opd_gym.envs.libero.experts.articulated import OpenDrawer, PushShut, TurnKnob
from opd_gym.envs.libero.experts.compose import DrawerThenPlace, InTurn, Skill, Stage
from opd_gym.envs.libero.experts.geometry import Array
from opd_gym.envs.libero.experts.pick_place import PickPlace, Placement
from opd_gym.envs.libero.experts.scene import Scene
from opd_gym.envs.libero.experts.servo import Servo, Target
from opd_gym.envs.libero.experts.slide import Slide


class Expert:
    """
    Labels the current state of a LIBERO domain with an action.

    :param domain: LIBERO's domain (``ControlEnv(...).env``)
    :param skill: Returns the wanted gripper pose for a state
    :param servo: Turns it into an action
    """

    def __init__(self, domain: Any, skill: Callable[[Scene], Target], servo: Servo | None = None) -> None:
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


def _into_drawer(drawer: OpenDrawer, site: str, container: str, depth: float) -> Callable[[Scene], Placement]:
    """Into the middle of what is open of a drawer; its floor is the surface below the region."""

    def placement(scene: Scene) -> Placement:
        centre, _ = scene.site(site)
        points = [scene.points(body, spacing=0.012) for body in scene.bodies(container)]
        floor = max((_surface(p, centre[:2], 0.03, float(centre[2])) for p in points), default=-np.inf)
        # What is higher than the drawer may be above its inner end: the rest of the cabinet, other drawers' handles.
        direction = drawer.direction(scene)
        inner, outer = (float(centre @ direction) + side * depth for side in (-1.0, 1.0))
        body = scene.joint_axis(drawer.joint)[0]
        above = np.concatenate([p for b, p in zip(scene.bodies(container), points, strict=True) if b != body])
        above = above[above[:, 2] > centre[2]] @ direction
        inner = max(inner, float(above.max(initial=-np.inf)))
        xy = (centre + (0.5 * (inner + outer) - float(centre @ direction)) * direction)[:2]
        return Placement(xy, max(floor, float(centre[2]) - 0.04) + 0.006, 0.1, 0.02, container)

    return placement


def _drawer(domain: Any, site: str) -> OpenDrawer:
    region = domain.object_sites_dict[site]
    opened = domain.get_object(region.parent_name).object_properties["articulation"]["default_open_ranges"]
    # For LIBERO a drawer is open beyond the nearer end of the range. A little further is on the safe side.
    sign = float(np.sign(sum(opened)))
    return OpenDrawer(region.joints[0], sign, min(abs(v) for v in opened) + 0.002)


def _push_shut(domain: Any, site: str) -> PushShut:
    region = domain.object_sites_dict[site]
    ranges = domain.get_object(region.parent_name).object_properties["articulation"]
    sign = float(np.sign(sum(ranges["default_open_ranges"])))
    return PushShut(region.joints[0], sign, max(sign * limit for limit in ranges["default_close_ranges"]) - 0.0005)


def _on_table(site: str) -> Callable[[Scene], Placement]:
    """Onto a region of the table."""

    def placement(scene: Scene) -> Placement:
        return Placement(scene.site(site)[0][:2], scene.table + 0.004, 0.03, 0.015)

    return placement


def _beside(placement: Callable[[Scene], Placement], offset: float) -> Callable[[Scene], Placement]:
    """Off the middle, so that there is room for more."""

    def moved(scene: Scene) -> Placement:
        middle = placement(scene)
        return replace(middle, xy=middle.xy + np.array([offset, 0.0]))

    return moved


def _placement(domain: Any, predicate: str, place: str) -> Callable[[Scene], Placement] | None:
    """Where an object must be put so that a predicate comes true."""
    objects, sites = domain.objects_dict, domain.object_sites_dict
    if place in objects:
        return _onto_object(place) if predicate == "on" else None
    if place not in sites:
        return None
    parent = getattr(sites[place], "parent_name", None)
    if parent is None:
        return _on_table(place)
    if predicate == "in" and parent in objects and place.endswith("contain_region"):
        return _into_container(parent, place)
    if predicate == "in" and sites[place].joints:
        return _into_drawer(_drawer(domain, place), place, parent, float(sites[place].size[1]))
    if predicate == "on" and (parent in domain.fixtures_dict or parent in objects):
        return _onto_site(place, parent)
    return None


def _is_at(domain: Any, predicate: str, name: str, place: str) -> Callable[[Scene], bool]:
    """LIBERO's predicates "in" and "on" of where an object is, apart from contact."""

    def is_at(scene: Scene) -> bool:
        position = scene.position(name)
        if place in domain.objects_dict:
            apart = position - scene.position(place)
            return bool(apart[2] >= 0.0 and np.linalg.norm(apart[:2]) < 0.03)
        site = domain.object_sites_dict[place]
        return bool((site.in_box if predicate == "in" else site.under)(*scene.site(place), position))

    return is_at


def _place_stage(domain: Any, predicate: str, name: str, place: str, neighbours: list[str]) -> Stage | None:
    placement = _placement(domain, predicate, place)
    if placement is None or name not in domain.objects_dict:
        return None
    site = domain.object_sites_dict.get(place)
    if len(neighbours) > 1:
        span = 1.1 * float(min(site.size[:2])) if site is not None else 0.0
        placement = _beside(placement, span * (neighbours.index(name) / (len(neighbours) - 1) - 0.5))
    pick_place = PickPlace(name, placement)
    is_at = _is_at(domain, predicate, name, place)

    def done(scene: Scene) -> bool:
        if pick_place.holds(scene) or not is_at(scene):
            return False
        # An object that is put on something must touch it.
        bottom = float(scene.points(scene.body(name))[:, 2].min())
        return predicate == "in" or bottom < pick_place.placement(scene).height + 0.006

    skill: Skill = pick_place
    if site is not None and predicate == "in" and site.joints:
        skill = DrawerThenPlace(_drawer(domain, place), pick_place)
    elif (
        site is not None
        and getattr(site, "parent_name", None) is None
        and domain.objects_dict[name].category_name == "plate"
    ):
        skill = Slide(name, lambda scene: scene.site(place)[0][:2])
    return Stage(skill, done)


def _stage(domain: Any, predicate: str, arguments: list[str], goal: list[list[str]]) -> Stage | None:
    """How to bring about one predicate of a goal, None where that is unknown."""
    sites = domain.object_sites_dict
    if predicate == "open" and arguments[0] in sites and sites[arguments[0]].joints:
        drawer = _drawer(domain, arguments[0])
        return Stage(drawer, lambda scene: drawer.missing(scene) < 0.0)
    if predicate == "turnon" and arguments[0] in domain.fixtures_dict:
        fixture = domain.fixtures_dict[arguments[0]]
        on = min(fixture.object_properties["articulation"]["default_turnon_ranges"])
        return Stage(TurnKnob(fixture.joints[0], on + 0.1), lambda scene: scene.joint(fixture.joints[0]) > on + 0.02)
    if predicate == "close" and arguments[0] in sites and sites[arguments[0]].joints:
        push = _push_shut(domain, arguments[0])
        return Stage(push, push.is_closed)
    if predicate in ("in", "on"):
        neighbours = [other[1] for other in goal if other[0] == predicate and other[2] == arguments[1]]
        return _place_stage(domain, predicate, arguments[0], arguments[1], neighbours)
    return None


def _skill(domain: Any) -> Callable[[Scene], Target] | None:
    goal = domain.parsed_problem["goal_state"]
    # First what must be open or on, last what must be closed.
    order = {"open": 0, "turnon": 0, "in": 1, "on": 1, "close": 2}
    stages = [
        _stage(domain, predicate, arguments, goal)
        for predicate, *arguments in sorted(goal, key=lambda g: order.get(g[0], 3))
    ]
    known = [stage for stage in stages if stage is not None]
    if len(known) < len(stages):
        return None
    return known[0].skill if len(known) == 1 else InTurn(known)


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
