"""Experts for LIBERO's tasks, built from the goal in the task's BDDL file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from opd_gym.envs.experts.pick_place import PickPlace, Placement
from opd_gym.envs.experts.scene import Scene
from opd_gym.envs.experts.servo import Servo, Target

Skill = Callable[[Scene], Target]


class Expert:
    """
    Labels the current state of a LIBERO domain with an action.

    :param domain: LIBERO's domain (``ControlEnv(...).env``)
    :param skill: Gives the wanted gripper pose for a state
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


def _into_basket(site: str, basket: str) -> Callable[[Scene], Placement]:
    def placement(scene: Scene) -> Placement:
        centre, _ = scene.site(site)
        rim = float(scene.points(scene.body(basket))[:, 2].max())
        return Placement(centre[:2], rim - 0.005, 0.03, 0.03, basket)

    return placement


def _onto_object(name: str) -> Callable[[Scene], Placement]:
    def placement(scene: Scene) -> Placement:
        centre = scene.position(name)
        points = scene.points(scene.body(name))
        # The surface in the middle, not the brim: that is where a bowl stands on a plate.
        inside = points[np.linalg.norm(points[:, :2] - centre[:2], axis=1) < 0.03]
        surface = float(inside[:, 2].max()) if len(inside) else float(points[:, 2].max())
        return Placement(centre[:2], surface + 0.004, 0.05, 0.015, name)

    return placement


def _skill(domain: Any) -> Skill | None:
    goal = domain.parsed_problem["goal_state"]
    if len(goal) != 1:
        return None
    predicate, *arguments = goal[0]
    objects = domain.objects_dict
    if predicate == "in" and arguments[1].endswith("_contain_region"):
        return PickPlace(arguments[0], _into_basket(arguments[1], arguments[1].removesuffix("_contain_region")))
    if predicate == "on" and arguments[0] in objects and arguments[1] in objects:
        return PickPlace(arguments[0], _onto_object(arguments[1]))
    return None


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
