"""What a scripted expert sees: poses, surfaces and contacts as a pure function of the simulator's (qpos, qvel)."""

from __future__ import annotations

from math import atan2
from typing import Any

import mujoco
import numpy as np

from opd_gym.envs.libero.experts.geometry import Array, box_points


class Scene:
    """
    Read-only view of one LIBERO domain.

    Everything is computed on a private ``MjData`` from a copy of qpos and qvel: robosuite's own ``data`` lags one
    physics sub-step behind after a step but up to date after a state is restored, so an expert's action would depend
    on how the state was reached. The simulation itself is never changed.

    :param domain: LIBERO's domain (``ControlEnv(...).env``)
    """

    def __init__(self, domain: Any) -> None:
        self.domain = domain
        self._sim: Any = None
        self.update()

    def _bind(self) -> None:
        """Look up ids, again whenever robosuite's hard reset has compiled a new model."""
        self._sim = self.domain.sim
        self.model: Any = getattr(self._sim.model, "_model", self._sim.model)
        self.data = mujoco.MjData(self.model)
        robot = self.domain.robots[0]
        self._eef_site = int(robot.eef_site_id)
        fingers = [int(i) for i in robot._ref_gripper_joint_pos_indexes]
        finger_velocities = [int(i) for i in robot._ref_gripper_joint_vel_indexes]
        if len(fingers) != 2:
            raise ValueError(
                f"The scripted experts need a gripper with two finger joints, this one has {len(fingers)}."
            )
        self._fingers, self._finger_velocities = fingers, finger_velocities
        pads = robot.gripper.important_geoms
        # A rim may be held above the pads, by the fingers themselves.
        self._finger_geoms = [[self._geom(name) for name in pads[side]] for side in ("left_finger", "right_finger")]
        self._points: dict[tuple[int, float], Array] = {}
        self._geoms: dict[int, list[int]] = {}
        self._obstacle_bodies = self._find_obstacle_bodies()
        # The arm's rest pose defines "not rotated": LIBERO's episodes start there, slightly tilted.
        self.data.qpos[:] = self.model.qpos0
        self.data.qpos[robot._ref_joint_pos_indexes] = robot.init_qpos
        mujoco.mj_kinematics(self.model, self.data)
        # The second joint of the Panda is its shoulder; it does not move.
        self.shoulder: Array = self.data.xanchor[int(robot._ref_joint_indexes[1])].copy()
        self.rest_rotation = self.data.site_xmat[self._eef_site].reshape(3, 3).copy()

    def _geom(self, name: str) -> int:
        return int(mujoco.mj_name2id(self.model, mujoco.mjtObj.mjOBJ_GEOM, name))

    def update(self) -> None:
        """Copy the current state of the simulation."""
        if self._sim is not self.domain.sim:
            self._bind()
        source = self._sim.data
        self.data.qpos[:] = source.qpos
        self.data.qvel[:] = source.qvel
        mujoco.mj_kinematics(self.model, self.data)
        self._obstacle_cache: dict[tuple[str, ...], Array] = {}
        self.eef: Array = self.data.site_xpos[self._eef_site].copy()
        self.eef_rotation: Array = self.data.site_xmat[self._eef_site].reshape(3, 3).copy()
        self.gap = float(abs(self.data.qpos[self._fingers[0]]) + abs(self.data.qpos[self._fingers[1]]))
        first, second = (float(self.data.qvel[i]) for i in self._finger_velocities)
        self.gap_speed = first - second
        self.finger_speed = float(np.abs(self.data.qvel[self._finger_velocities]).max())
        relative = self.eef_rotation @ self.rest_rotation.T
        self.yaw = atan2(float(relative[1, 0] - relative[0, 1]), float(relative[0, 0] + relative[1, 1]))

    def body(self, name: str) -> int:
        """
        Id of the root body of an object or fixture.

        :param name: Name of the instance in the task's BDDL file
        """
        return int(self.domain.obj_body_id[name])

    def position(self, name: str) -> Array:
        """
        Position of an object's root body, which LIBERO's predicates use.

        :param name: Name of the instance
        """
        return np.asarray(self.data.xpos[self.body(name)].copy())

    @property
    def table(self) -> float:
        """Height of the table: the lowest object stands on it."""
        lowest = min(float(self.points(self.body(name), 0.012)[:, 2].min()) for name in self.domain.objects_dict)
        return max(lowest, float(self.domain.workspace_offset[2]))

    def site(self, name: str) -> tuple[Array, Array]:
        """
        Pose of a site.

        :param name: Name of the site
        :return: Position and rotation matrix
        """
        index = mujoco.mj_name2id(self.model, mujoco.mjtObj.mjOBJ_SITE, name)
        if index < 0:
            raise KeyError(f"The simulation has no site {name!r}.")
        return self.data.site_xpos[index].copy(), self.data.site_xmat[index].reshape(3, 3).copy()

    def joint(self, name: str) -> float:
        """
        Position of a hinge or slide joint.

        :param name: Name of the joint
        """
        index = mujoco.mj_name2id(self.model, mujoco.mjtObj.mjOBJ_JOINT, name)
        if index < 0:
            raise KeyError(f"The simulation has no joint {name!r}.")
        return float(self.data.qpos[self.model.jnt_qposadr[index]])

    def joint_axis(self, name: str) -> tuple[int, Array, Array]:
        """
        Where a hinge or slide joint is.

        :param name: Name of the joint
        :return: Id of the body that it moves, its axis and its anchor in the world
        """
        index = mujoco.mj_name2id(self.model, mujoco.mjtObj.mjOBJ_JOINT, name)
        return int(self.model.jnt_bodyid[index]), self.data.xaxis[index].copy(), self.data.xanchor[index].copy()

    def geom_box(self, geom: int) -> tuple[Array, Array, Array]:
        """
        Bounding box of a geom.

        :param geom: Geom id
        :return: Centre and rotation in the world, half extents
        """
        rotation = self.data.geom_xmat[geom].reshape(3, 3)
        box = self.model.geom_aabb[geom]
        return self.data.geom_xpos[geom] + rotation @ box[:3], rotation.copy(), np.asarray(box[3:])

    def collision_geoms(self, body: int) -> list[int]:
        """
        Geoms of one body that can touch something.

        :param body: Body id
        """
        if body not in self._geoms:
            start, count = int(self.model.body_geomadr[body]), int(self.model.body_geomnum[body])
            self._geoms[body] = [
                g for g in range(start, start + count) if self.model.geom_contype[g] or self.model.geom_conaffinity[g]
            ]
        return self._geoms[body]

    def _find_obstacle_bodies(self) -> list[tuple[str, list[int]]]:
        """Rigid bodies of each object and fixture that can be in the way; the table and the floor are left out."""
        found = []
        for name in [*self.domain.objects_dict, *self.domain.fixtures_dict]:
            if name not in self.domain.obj_body_id:
                continue
            root = self.body(name)
            bodies = []
            for body in range(root, self.model.nbody):
                ancestor = body
                while ancestor > root:
                    ancestor = int(self.model.body_parentid[ancestor])
                if ancestor == root and self.collision_geoms(body):
                    bodies.append(body)
            if bodies:
                found.append((name, bodies))
        return found

    def bodies(self, name: str) -> list[int]:
        """
        All rigid bodies of an object or fixture that can touch something.

        :param name: Name of the instance
        """
        return next((bodies for other, bodies in self._obstacle_bodies if other == name), [])

    def obstacles(self, *excluded: str) -> Array:
        """
        Coarse surface points of everything that can be in the way.

        :param excluded: Names of the objects that do not count
        :return: (n, 3) points in the world
        """
        if excluded not in self._obstacle_cache:
            clouds = [
                self.points(body, spacing=0.012)
                for name, bodies in self._obstacle_bodies
                if name not in excluded
                for body in bodies
            ]
            self._obstacle_cache[excluded] = np.concatenate(clouds) if clouds else np.empty((0, 3))
        return self._obstacle_cache[excluded]

    def local_points(self, body: int, spacing: float = 0.006) -> Array:
        """
        Points on the collision surface of a rigid body, in its own frame.

        :param body: Body id
        :param spacing: Distance between neighbouring points in m
        """
        if (body, spacing) not in self._points:
            clouds = []
            for geom in self.collision_geoms(body):
                box = self.model.geom_aabb[geom]
                rotation = np.empty(9)
                mujoco.mju_quat2Mat(rotation, self.model.geom_quat[geom])
                local = box_points(np.asarray(box[3:]), spacing) + box[:3]
                clouds.append(local @ rotation.reshape(3, 3).T + self.model.geom_pos[geom])
            if not clouds:
                raise ValueError(f"Body {self.model.body(body).name!r} has no geometry that could be grasped.")
            self._points[body, spacing] = np.concatenate(clouds)
        return self._points[body, spacing]

    def points(self, body: int, spacing: float = 0.006) -> Array:
        """
        Points on the collision surface of a rigid body.

        :param body: Body id
        :param spacing: Distance between neighbouring points in m
        :return: (n, 3) points in the world
        """
        rotation = self.data.xmat[body].reshape(3, 3)
        return np.asarray(self.local_points(body, spacing) @ rotation.T + self.data.xpos[body])

    def finger_distances(self, body: int, most: float = 0.02) -> tuple[float, float]:
        """
        Distance of each finger to a body; zero or less is contact.

        :param body: Body id
        :param most: Larger distances are returned as this
        """
        geoms = np.asarray(self.collision_geoms(body))
        result = []
        for finger in self._finger_geoms:
            nearest = most
            for part in finger:
                reach = self.model.geom_rbound[geoms] + self.model.geom_rbound[part] + most
                apart = np.linalg.norm(self.data.geom_xpos[geoms] - self.data.geom_xpos[part], axis=1)
                for geom in geoms[apart < reach]:
                    distance = mujoco.mj_geomDistance(self.model, self.data, part, int(geom), nearest, None)
                    nearest = min(nearest, float(distance))
            result.append(nearest)
        return result[0], result[1]
