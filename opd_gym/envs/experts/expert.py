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
        return Placement(centre[:2], rim - 0.005, 0.03, 0.03)

    return placement


def _skill(domain: Any) -> Skill:
    goal = domain.parsed_problem["goal_state"]
    (state,) = goal
    return PickPlace(state[1], _into_basket(state[2], state[2].replace("_contain_region", "")))


def supports(parsed_problem: dict[str, Any]) -> bool:
    """
    Whether there is a scripted expert for a task.

    :param parsed_problem: The parsed BDDL file (``domain.parsed_problem``)
    """
    goal = parsed_problem["goal_state"]
    return len(goal) == 1 and goal[0][0] == "in" and goal[0][2].endswith("contain_region")


def make_expert(domain: Any) -> Expert:
    """
    Expert for the task of a domain.

    :param domain: LIBERO's domain (``ControlEnv(...).env``)
    """
    return Expert(domain, _skill(domain))
