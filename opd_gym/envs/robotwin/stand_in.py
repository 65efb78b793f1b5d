"""
A robot in place of RoboTwin's, which come with its assets: an arm of boxes, in RoboTwin's layout of files, with the
objects of :mod:`opd_gym.envs.robotwin.stand_in_objects`.

It has the joints, names and reach that RoboTwin's tasks and its expert need, so that everything runs without a
download. It is not the benchmark's robot, and says so wherever it is used.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from opd_gym.envs.robotwin.runtime import STAND_IN_MARKER, STAND_IN_VERSION
from opd_gym.envs.robotwin.stand_in_objects import write_objects
from opd_gym.files import temporary_beside

_DARK, _LIGHT, _BLACK = (0.25, 0.25, 0.28), (0.75, 0.75, 0.78), (0.1, 0.1, 0.1)
# By link: size and centre of its box in m, colour, whether it collides, mass in kg
_BOXES: dict[str, tuple[Any, ...]] = {
    "base_link": ((0.1, 0.1, 0.1), (0, 0, 0.03), _DARK, False, 0.5),
    "link1": ((0.08, 0.08, 0.1), (0, 0, -0.02), _DARK, True, 0.5),
    "link2": ((0.3, 0.06, 0.06), (0.17, 0, 0), _LIGHT, True, 0.5),
    "link3": ((0.26, 0.05, 0.05), (0.16, 0, 0), _DARK, True, 0.5),
    "link4": ((0.05, 0.05, 0.05), (0.025, 0, 0), _LIGHT, False, 0.5),
    "link5": ((0.04, 0.04, 0.04), (0.02, 0, 0), _DARK, False, 0.5),
    "link6": ((0.05, 0.12, 0.05), (0.03, 0, 0), _LIGHT, True, 0.5),
    "link7": ((0.07, 0.012, 0.024), (0.095, 0.009, 0), _DARK, True, 0.1),
    "link8": ((0.07, 0.012, 0.024), (0.095, -0.009, 0), _DARK, True, 0.1),
    "camera": ((0.02, 0.06, 0.02), (0, 0, 0), _BLACK, False, 0.05),
}
# By joint: type, parent, child, origin in m, axis, pitch in rad, limits in rad or m
_JOINTS: dict[str, tuple[Any, ...]] = {
    "joint1": ("revolute", "base_link", "link1", (0, 0, 0.1), (0, 0, 1), 0, (-1.6, 1.6)),
    "joint2": ("revolute", "link1", "link2", (0, 0, 0.05), (0, 1, 0), -1.75, (-0.4, 1.7)),
    "joint3": ("revolute", "link2", "link3", (0.34, 0, 0), (0, 1, 0), 2.25, (-2.1, 0.6)),
    "joint4": ("revolute", "link3", "link4", (0.32, 0, 0), (0, 1, 0), 0.7, (-1.8, 1.8)),
    "joint5": ("revolute", "link4", "link5", (0.05, 0, 0), (0, 0, 1), 0, (-1.3, 1.3)),
    "joint6": ("revolute", "link5", "link6", (0.04, 0, 0), (1, 0, 0), 0, (-3.1, 3.1)),
    "joint7": ("prismatic", "link6", "link7", (0, 0, 0), (0, 1, 0), 0, (-0.003, 0.05)),
    "joint8": ("prismatic", "link6", "link8", (0, 0, 0), (0, -1, 0), 0, (-0.003, 0.05)),
    "camera_joint": ("fixed", "link6", "camera", (-0.02, 0, 0.08), None, 0.45, None),
}


def _vector(values: Any) -> str:
    return " ".join(f"{value:g}" for value in values)


def _link(robot: ElementTree.Element, name: str, box: tuple[Any, ...]) -> None:
    size, centre, colour, collides, mass = box
    link = ElementTree.SubElement(robot, "link", name=name)
    inertial = ElementTree.SubElement(link, "inertial")
    ElementTree.SubElement(inertial, "mass", value=f"{mass:g}")
    inertia = {"ixx": "0.002", "iyy": "0.002", "izz": "0.002", "ixy": "0", "ixz": "0", "iyz": "0"}
    ElementTree.SubElement(inertial, "inertia", inertia)
    for kind in ("visual", "collision") if collides else ("visual",):
        part = ElementTree.SubElement(link, kind)
        ElementTree.SubElement(part, "origin", xyz=_vector(centre))
        ElementTree.SubElement(ElementTree.SubElement(part, "geometry"), "box", size=_vector(size))
        if kind == "visual":
            material = ElementTree.SubElement(part, "material", name=f"{name}_colour")
            ElementTree.SubElement(material, "color", rgba=_vector((*colour, 1)))


def _joint(robot: ElementTree.Element, name: str, spec: tuple[Any, ...]) -> None:
    kind, parent, child, origin, axis, pitch, limits = spec
    joint = ElementTree.SubElement(robot, "joint", name=name, type=kind)
    ElementTree.SubElement(joint, "parent", link=parent)
    ElementTree.SubElement(joint, "child", link=child)
    ElementTree.SubElement(joint, "origin", xyz=_vector(origin), rpy=_vector((0, pitch, 0)))
    if axis is not None:
        ElementTree.SubElement(joint, "axis", xyz=_vector(axis))
        bounds = {"lower": f"{limits[0]:g}", "upper": f"{limits[1]:g}", "effort": "100", "velocity": "3"}
        ElementTree.SubElement(joint, "limit", bounds)


def _urdf() -> bytes:
    robot = ElementTree.Element("robot", name="stand_in_for_piper")
    for link, box in _BOXES.items():
        _link(robot, link, box)
    for joint, spec in _JOINTS.items():
        _joint(robot, joint, spec)
    return ElementTree.tostring(robot, encoding="utf-8")


# Keys are RoboTwin's, which reads the file once for each arm
_CONFIG: dict[str, Any] = {
    "urdf_path": "./robot.urdf",
    "joint_stiffness": 1000,
    "joint_damping": 200,
    "gripper_stiffness": 1000,
    "gripper_damping": 200,
    "move_group": ["link6"] * 2,
    "ee_joints": ["joint6"] * 2,
    "arm_joints_name": [[f"joint{i}" for i in range(1, 7)]] * 2,
    "gripper_name": [{"base": "joint7", "mimic": [["joint8", 1.0, 0.0]]}] * 2,
    "gripper_bias": 0.12,
    "gripper_scale": [-0.003, 0.045],
    "homestate": [[0] * 6] * 2,
    "delta_matrix": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "global_trans_matrix": [[1, 0, 0], [0, -1, 0], [0, 0, -1]],
    "robot_pose": [[0, -0.5, 0.75, 0.707, 0, 0, 0.707]],
    "planner": "mplib_RRT",
    "dual_arm": False,
    "rotate_lim": [0, 1],
    "grasp_perfect_direction": ["front_right", "front_left"],
    "static_camera_list": [
        {
            "name": "head_camera",
            "type": "D435",
            "position": [-0.032, -0.45, 1.35],
            "forward": [0, 0.6, -0.8],
            "left": [-1, 0, 0],
        }
    ],
}


def write_stand_in(root: Path) -> Path:
    """
    Write a stand-in for the robot ``piper``, of which RoboTwin puts two beside each other: ``("piper", "piper", 0.6)``,
    and for some objects.

    :param root: folder to write; replaced if it holds a stand-in already
    :return: the folder, in the layout of RoboTwin's assets
    :raises ValueError: there is something else in it
    :raises ImportError: RoboTwin's runtime is not installed
    """
    root = Path(root).expanduser()
    if root.exists() and any(root.iterdir()) and not (root / STAND_IN_MARKER).is_file():
        raise ValueError(f"{root} holds something that is not a stand-in. Choose an empty folder.")
    temporary = temporary_beside(root)
    try:
        robot = temporary / "assets" / "embodiments" / "piper"
        robot.mkdir(parents=True)
        (robot / "robot.urdf").write_bytes(_urdf())
        (robot / "config.yml").write_text(json.dumps(_CONFIG, indent=1), encoding="utf-8")
        for name in ("objects", "background_texture"):
            (temporary / "assets" / name).mkdir()
        write_objects(temporary / "assets" / "objects")
        text = json.dumps({"what": "A stand-in robot and objects, not RoboTwin's.", "version": STAND_IN_VERSION})
        (temporary / STAND_IN_MARKER).write_text(text, encoding="utf-8")
        if root.exists():
            shutil.rmtree(root)
        os.replace(temporary, root)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return root
