"""
Objects in place of RoboTwin's, which come with its assets: a cup, a coaster, a bowl and two bottles of cylinders and
boxes, in RoboTwin's layout of files. With them three more tasks run on the stand-in robot without a download.

Lengths are in m. An object's frame has y upwards and its origin at the bottom; tasks turn it so that its x points away
from the robot and its z to the right. RoboTwin's expert reads from the files where it may grasp (contact points: y
points to where the gripper comes from, z along the opening of its fingers) and what it has to put where (functional
points: z points downwards).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from opd_gym.envs.robotwin import runtime

_SECTIONS = 24
_WALL_PARTS = 12
# From above, fingers along z; from the side (from z), fingers along x
_FROM_ABOVE = np.eye(3)
_FROM_THE_SIDE = np.array([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
_DOWNWARDS = np.array([[1.0, 0.0, 0.0], [0.0, 0.0, -1.0], [0.0, 1.0, 0.0]])


@dataclass(frozen=True)
class _Object:
    """
    What RoboTwin's files say of an object.

    :param name: RoboTwin's name and number of it, ``021_cup/base0``
    :param colour: red, green, blue, from 0 to 255
    :param pipes: inner radius (0 for none), outer radius, lower and upper end of each pipe that it consists of
    :param contacts: contact points, ``(4, 4)`` matrices
    :param functional: height of the functional point
    """

    name: str
    colour: tuple[int, int, int]
    pipes: list[tuple[float, float, float, float]]
    contacts: list[np.ndarray]
    functional: float


def _turned(angle: float) -> np.ndarray:
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[cos, 0.0, sin], [0.0, 1.0, 0.0], [-sin, 0.0, cos]])


def _matrix(rotation: np.ndarray, position: Iterable[float]) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = rotation, list(position)
    return matrix


def _seen(inner: float, outer: float, low: float, high: float) -> Any:
    """A pipe as it is drawn."""
    import trimesh

    if inner:
        mesh = trimesh.creation.annulus(inner, outer, high - low, sections=_SECTIONS)
    else:
        mesh = trimesh.creation.cylinder(outer, high - low, sections=_SECTIONS)
    mesh.apply_transform(_matrix(_DOWNWARDS, (0.0, (low + high) / 2, 0.0)))
    return mesh


def _felt(inner: float, outer: float, low: float, high: float) -> list[Any]:
    """The same as physics has it, of convex parts: it knows no hollow ones."""
    import trimesh

    if not inner:
        return [_seen(inner, outer, low, high)]
    parts = []
    for angle in 2 * np.pi * np.arange(_WALL_PARTS) / _WALL_PARTS:
        mesh = trimesh.creation.box((2 * outer * np.tan(np.pi / _WALL_PARTS), high - low, outer - inner))
        mesh.apply_translation((0.0, (low + high) / 2, (inner + outer) / 2))
        mesh.apply_transform(_matrix(_turned(angle), (0.0, 0.0, 0.0)))
        parts.append(mesh)
    return parts


def _rim(radius: float, height: float) -> list[np.ndarray]:
    """Four places where the fingers take a wall between them, from above; tasks name the right and the left one."""
    across = _FROM_ABOVE @ _turned(np.pi / 2)
    return [
        _matrix(_FROM_ABOVE, (0.0, height, radius)),
        _matrix(across, (radius, height, 0.0)),
        _matrix(_FROM_ABOVE, (0.0, height, -radius)),
        _matrix(across, (-radius, height, 0.0)),
    ]


def _around(height: float) -> list[np.ndarray]:
    """Eight directions to take something thin from the side."""
    return [_matrix(_turned(turn * np.pi / 4) @ _FROM_THE_SIDE, (0.0, height, 0.0)) for turn in range(8)]


def _objects() -> list[_Object]:
    cup = [(0.0, 0.035, 0.0, 0.004), (0.030, 0.035, 0.004, 0.09)]
    # Deep enough for fingers that close while they rise, and its foot goes into another one
    bowl = [(0.0, 0.040, 0.0, 0.020), (0.035, 0.055, 0.020, 0.024), (0.050, 0.055, 0.024, 0.065)]
    bottle = [(0.0, 0.028, 0.0, 0.13), (0.0, 0.014, 0.13, 0.17)]
    return [
        _Object("021_cup/base0", (230, 120, 40), cup, _rim(0.0325, 0.075), 0.0),
        _Object("019_coaster/base0", (60, 60, 160), [(0.0, 0.05, 0.0, 0.006)], _rim(0.04, 0.003), 0.006),
        _Object("002_bowl/base3", (200, 200, 60), bowl, _rim(0.0525, 0.038), 0.0),
        _Object("001_bottle/base13", (40, 160, 60), bottle, _around(0.08), 0.1),
        _Object("001_bottle/base16", (160, 40, 60), bottle, _around(0.08), 0.1),
    ]


def write_objects(folder: Path) -> None:
    """
    :param folder: RoboTwin's folder ``objects``
    :raises ImportError: trimesh, which RoboTwin's runtime brings, is not installed
    """
    runtime.add_packages()
    try:
        import trimesh
    except ImportError as error:
        raise ImportError(f"Meshes of stand-in objects need trimesh. Run: {runtime.INSTALL_HINT}") from error
    for item in _objects():
        name, base = item.name.split("/")
        whole = trimesh.util.concatenate([_seen(*pipe) for pipe in item.pipes])
        material = trimesh.visual.material.PBRMaterial(
            baseColorFactor=[*item.colour, 255], metallicFactor=0.0, roughnessFactor=0.6
        )
        whole.visual = trimesh.visual.TextureVisuals(material=material)
        felt = [part for pipe in item.pipes for part in _felt(*pipe)]
        meshes = {"visual": trimesh.Scene([whole]), "collision": trimesh.Scene(felt)}
        for kind, scene in meshes.items():
            path = folder / name / kind / f"{base}.glb"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(scene.export(file_type="glb"))
        data = {
            "center": [0, 0, 0],
            "extents": whole.extents.tolist(),
            "scale": [1, 1, 1],
            "stable": True,
            "transform_matrix": np.eye(4).tolist(),
            "target_pose": [np.eye(4).tolist()],
            "orientation_point": np.eye(4).tolist(),
            "contact_points_pose": [matrix.tolist() for matrix in item.contacts],
            "contact_points_group": [list(range(len(item.contacts)))],
            "contact_points_mask": [True],
            "functional_matrix": [_matrix(_DOWNWARDS, (0.0, item.functional, 0.0)).tolist()] * 2,
        }
        number = base.removeprefix("base")
        (folder / name / f"model_data{number}.json").write_text(json.dumps(data, indent=1), encoding="utf-8")
