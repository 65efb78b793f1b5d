"""
LIBERO's control step (25 MuJoCo steps under robosuite's OSC_POSE controller) without the Python around it.

Bit-identical to robosuite's ``env.step``: the same numbers go through the same robosuite functions in the same order.
What
is left out is what does not reach the physics: observables, buffers of recent values, look-ups by name, and the parts
of
MuJoCo's pipeline that would be computed again from an unchanged state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import mujoco
import numpy as np


@dataclass(frozen=True)
class ControllerState:
    """What the controller remembers from one control step to the next, beside MuJoCo's own state."""

    goal_ori: np.ndarray
    gripper: np.ndarray


class _Measurement(NamedTuple):
    """What the controller knows of the arm in one sub-step."""

    ee_pos: np.ndarray
    ee_ori_mat: np.ndarray
    ee_pos_vel: np.ndarray
    ee_ori_vel: np.ndarray
    joint_pos: np.ndarray
    joint_vel: np.ndarray
    j_pos: np.ndarray
    j_ori: np.ndarray
    mass: np.ndarray


class OscStepper:
    """
    Steps a robosuite single-arm domain under its OSC_POSE controller.

    :param domain: robosuite environment that has been reset; its robot 0 has a fixed-impedance OSC_POSE controller and
        a gripper with one action
    """

    def __init__(self, domain: Any):
        from robosuite.utils import control_utils

        self._control = control_utils
        robot = domain.robots[0]
        controller = robot.controller
        if type(controller).__name__ != "OperationalSpaceController" or controller.impedance_mode != "fixed":
            raise ValueError(
                f"OscStepper needs a fixed-impedance OSC_POSE controller, got {type(controller).__name__}."
            )
        self._robot = robot
        self._controller = controller
        self._model = domain.sim.model._model
        self._data = domain.sim.data._data
        self._n_substeps = int(domain.control_timestep / domain.model_timestep)
        self._site = mujoco.mj_name2id(self._model, mujoco.mjtObj.mjOBJ_SITE, controller.eef_name)
        self._qpos = np.asarray(controller.qpos_index)
        self._qvel = np.asarray(controller.qvel_index)
        self._arm_actuators = np.asarray(robot._ref_joint_actuator_indexes)
        self._gripper_actuators = np.asarray(robot._ref_joint_gripper_actuator_indexes)
        limits = self._model.actuator_ctrlrange
        self._torque_low, self._torque_high = (limits[self._arm_actuators, i].copy() for i in (0, 1))
        gripper_range = limits[self._gripper_actuators]
        self._gripper_bias = 0.5 * (gripper_range[:, 1] + gripper_range[:, 0])
        self._gripper_weight = 0.5 * (gripper_range[:, 1] - gripper_range[:, 0])
        self._jacp = np.zeros((3, self._model.nv))
        self._jacr = np.zeros((3, self._model.nv))
        self._mass = np.zeros((self._model.nv, self._model.nv))
        self.sync()

    def sync(self) -> None:
        """Take over goal and gripper from robosuite's own controller, after its reset."""
        controller = self._robot.controller
        self._controller = controller
        self._initial_joint = np.array(controller.initial_joint)
        self._goal_ori = np.array(controller.goal_ori)
        self._goal_pos = np.array(controller.goal_pos)
        self._gripper = np.zeros(len(self._gripper_actuators))
        # robosuite's first control step still uses what the controller measured while the robot was being reset,
        # before the gripper was set; without that first value the bits differ from the first step on.
        self._measured: _Measurement | None = _Measurement(
            *(
                np.array(getattr(controller, name))
                for name in ("ee_pos", "ee_ori_mat", "ee_pos_vel", "ee_ori_vel", "joint_pos")
            ),
            *(np.array(getattr(controller, name)) for name in ("joint_vel", "J_pos", "J_ori", "mass_matrix")),
        )

    @property
    def state(self) -> ControllerState:
        """What a restart in the middle of an episode needs (the goal position is set anew by every action)."""
        return ControllerState(self._goal_ori.copy(), self._gripper.copy())

    @state.setter
    def state(self, value: ControllerState) -> None:
        self._goal_ori, self._gripper = value.goal_ori.copy(), value.gripper.copy()

    def _full_mass_matrix(self) -> np.ndarray:
        try:
            mujoco.mj_fullM(self._model, self._data, self._mass)
        except TypeError:  # the signature before MuJoCo 3.4
            mujoco.mj_fullM(self._model, self._mass, self._data.qM)
        return self._mass

    def _measure(self) -> _Measurement:
        data = self._data
        mujoco.mj_jacSite(self._model, data, self._jacp, self._jacr, self._site)
        qvel = data.qvel
        return _Measurement(
            ee_pos=np.array(data.site_xpos[self._site]),
            ee_ori_mat=np.array(data.site_xmat[self._site].reshape(3, 3)),
            ee_pos_vel=np.dot(self._jacp, qvel),
            ee_ori_vel=np.dot(self._jacr, qvel),
            joint_pos=data.qpos[self._qpos],
            joint_vel=qvel[self._qvel],
            # Indexed as robosuite does, in two steps: another expression gives another memory layout, another path
            # through BLAS and other last bits.
            j_pos=self._jacp[:, self._qvel],
            j_ori=self._jacr[:, self._qvel],
            mass=self._full_mass_matrix()[self._qvel, :][:, self._qvel],
        )

    def _set_goal(self, arm_action: np.ndarray, measured: _Measurement) -> None:
        delta = self._controller.scale_action(arm_action)
        if delta[3:].any():
            self._goal_ori = self._control.set_goal_orientation(delta[3:], measured.ee_ori_mat)
        self._goal_pos = self._control.set_goal_position(delta[:3], measured.ee_pos)

    def _torques(self, m: _Measurement) -> np.ndarray:
        control, kp, kd = self._control, self._controller.kp, self._controller.kd
        orientation_error = control.orientation_error(self._goal_ori, m.ee_ori_mat)
        force = (self._goal_pos - m.ee_pos) * kp[:3] + -m.ee_pos_vel * kd[:3]
        torque = orientation_error * kp[3:6] + -m.ee_ori_vel * kd[3:6]
        j_full = np.concatenate([m.j_pos, m.j_ori])
        _, lambda_pos, lambda_ori, nullspace = control.opspace_matrices(m.mass, j_full, m.j_pos, m.j_ori)
        wrench = np.concatenate([np.dot(lambda_pos, force), np.dot(lambda_ori, torque)])
        torques = np.dot(j_full.T, wrench) + self._data.qfrc_bias[self._qvel]
        torques += control.nullspace_torques(m.mass, nullspace, self._initial_joint, m.joint_pos, m.joint_vel)
        return np.minimum(np.maximum(torques, self._torque_low), self._torque_high)

    def step(self, action: np.ndarray) -> None:
        """
        One control step of 0.05 s.

        :param action: float64 array of shape ``(7,)``: OSC deltas in [-1, 1] and the gripper (negative opens)
        """
        model, data = self._model, self._data
        velocity_stage = int(mujoco.mjtStage.mjSTAGE_VEL)
        grip = np.array([-1.0, 1.0]) * self._robot.gripper.speed * np.sign(action[6])
        for i in range(self._n_substeps):
            mujoco.mj_forward(model, data)
            measured, self._measured = self._measured, None
            if measured is None:
                # robosuite calls mj_forward twice. The second changes nothing but the solver's warm start, to which
                # the bits of the result are sensitive, so its constraint stage is kept.
                mujoco.mj_forwardSkip(model, data, velocity_stage, 1)
                measured = self._measure()
            if i == 0:
                self._set_goal(action[:6], measured)
            data.ctrl[self._arm_actuators] = self._torques(measured)
            self._gripper = np.minimum(np.maximum(self._gripper + grip, -1.0), 1.0)
            data.ctrl[self._gripper_actuators] = self._gripper_bias + self._gripper_weight * self._gripper
            # Position and velocity stages are up to date, so the second half of mj_step is all that is left of it.
            mujoco.mj_step2(model, data)
