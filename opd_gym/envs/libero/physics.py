"""
LIBERO's control step (25 MuJoCo steps under robosuite's OSC_POSE controller) without Python inside.

Bit-identical to robosuite's ``env.step``: the same numbers go through the same compiled robosuite functions in the same
order. What is left out is what does not reach the physics: observables, sensors, buffers of recent values, look-ups by
name, and the parts of MuJoCo's pipeline that would be computed again from an unchanged state. The loop over the
sub-steps is compiled by numba, calls MuJoCo's C functions directly, and does not hold Python's global lock.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mujoco
import numpy as np

from opd_gym.envs.libero.runtime import import_libero
from opd_gym.files import code_dir

import_libero()  # first, because it tells numba where to keep compiled code and keeps robosuite quiet

import llvmlite.binding  # noqa: E402
import numba  # noqa: E402
from numba.core import types  # noqa: E402
from robosuite.utils import control_utils, transform_utils  # noqa: E402
from robosuite.utils.control_utils import (  # noqa: E402
    nullspace_torques,
    opspace_matrices,
    orientation_error,
    set_goal_orientation,
    set_goal_position,
)

_VELOCITY_STAGE = int(mujoco.mjtStage.mjSTAGE_VEL)
# Before MuJoCo 3.10, mj_fullM took the sparse inertia matrix where it now takes the data
_FULL_M_TAKES_DATA = mujoco.mj_version() >= 3010000


def _load_mujoco() -> ctypes.CDLL:
    folder = Path(mujoco.__file__).parent
    found = sorted([*folder.glob("libmujoco*.so*"), *folder.glob("libmujoco*.dylib"), *folder.glob("mujoco.dll")])
    if not found:
        raise ImportError(f"MuJoCo's library is not beside its Python package in {folder}: install mujoco as a wheel.")
    return ctypes.CDLL(str(found[0]))


_library = _load_mujoco()


def _c_function(name: str, *arguments: types.Type) -> types.ExternalFunction:
    # Bound by symbol and not by address, so that numba can keep the compiled loop on disk. Pointers are integers.
    llvmlite.binding.add_symbol(name, ctypes.cast(getattr(_library, name), ctypes.c_void_p).value)
    return types.ExternalFunction(name, types.void(*arguments))


_mj_checkPos = _c_function("mj_checkPos", types.intp, types.intp)
_mj_checkVel = _c_function("mj_checkVel", types.intp, types.intp)
_mj_forward = _c_function("mj_forward", types.intp, types.intp)
_mj_forwardSkip = _c_function("mj_forwardSkip", types.intp, types.intp, types.int32, types.int32)
_mj_step2 = _c_function("mj_step2", types.intp, types.intp)
_mj_jacSite = _c_function("mj_jacSite", types.intp, types.intp, types.intp, types.intp, types.int32)
_mj_fullM = _c_function("mj_fullM", types.intp, types.intp, types.intp)


_library.mj_copyData.argtypes = [ctypes.c_void_p] * 3
_library.mj_copyData.restype = ctypes.c_void_p


def copy_data(destination: mujoco.MjData, model: mujoco.MjModel, source: mujoco.MjData) -> None:
    """
    MuJoCo's ``mj_copyData``, which the Python package of 3.3 and 3.4 does not have.

    :param destination: data of the same model, overwritten
    :param model: the model of both
    :param source: whole state, derived quantities included
    """
    _library.mj_copyData(destination._address, model._address, source._address)


def _compiled(function: Callable[..., Any]) -> Any:
    """
    ``numba.njit`` whose cache belongs to the installed versions.

    Numba's own key is this file and the processor; but robosuite's controller and the layout of MuJoCo's functions are
    compiled in.
    """
    names = ("mujoco", "robosuite", "numba", "llvmlite", "numpy", "scipy")
    key = " ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    sources = b"".join(Path(module.__file__).read_bytes() for module in (control_utils, transform_utils))
    folder = hashlib.sha256(key.encode() + sources).hexdigest()[:16]
    before = numba.config.CACHE_DIR  # type: ignore[attr-defined]
    numba.config.CACHE_DIR = str(code_dir("numba") / folder)  # type: ignore[attr-defined]
    try:
        return numba.njit(nogil=True, cache=True)(function)
    finally:
        numba.config.CACHE_DIR = before  # type: ignore[attr-defined]


@_compiled
def _forward(model, data):  # type: ignore[no-untyped-def]
    # As mj_step does, which resets a state that is out of bounds
    _mj_checkPos(model, data)
    _mj_checkVel(model, data)
    _mj_forward(model, data)
    # robosuite calls mj_forward twice. The second changes nothing but the solver's warm start, to which the bits of the
    # result are sensitive, so its constraint stage is kept.
    _mj_forwardSkip(model, data, _VELOCITY_STAGE, 1)  # type: ignore[call-overload]


@numba.njit(inline="always")  # type: ignore[untyped-decorator]
def _measure(model, data, state, arm, work):  # type: ignore[no-untyped-def]
    """What the controller knows of the arm, as robosuite's ``Controller.update`` reads it."""
    site_xpos, site_xmat, qpos, qvel, _ctrl, _bias, _inertia = state
    site, arm_qpos, arm_qvel = arm
    jacp, jacr, full_mass = work
    n = len(arm_qvel)
    _mj_jacSite(model, data, jacp.ctypes.data, jacr.ctypes.data, site)
    if _FULL_M_TAKES_DATA:
        _mj_fullM(model, data, full_mass.ctypes.data)
    else:
        _mj_fullM(model, full_mass.ctypes.data, _inertia.ctypes.data)
    # Laid out in memory as robosuite's indexing leaves them (Fortran order): another layout is another path through
    # BLAS and gives other last bits.
    j_pos, j_ori, mass = np.empty((n, 3)).T, np.empty((n, 3)).T, np.empty((n, n)).T
    joint_pos, joint_vel = np.empty(n), np.empty(n)
    for i in range(n):
        joint_pos[i], joint_vel[i] = qpos[arm_qpos[i]], qvel[arm_qvel[i]]
        for k in range(3):
            j_pos[k, i], j_ori[k, i] = jacp[k, arm_qvel[i]], jacr[k, arm_qvel[i]]
        for k in range(n):
            mass[k, i] = full_mass[arm_qvel[k], arm_qvel[i]]
    ee_pos_vel, ee_ori_vel = np.dot(jacp, qvel), np.dot(jacr, qvel)
    ee_pos, ee_ori_mat = site_xpos[site].copy(), site_xmat[site].copy().reshape(3, 3)
    return ee_pos, ee_ori_mat, ee_pos_vel, ee_ori_vel, joint_pos, joint_vel, j_pos, j_ori, mass


@numba.njit(inline="always")  # type: ignore[untyped-decorator]
def _finish(model, data, state, arm, osc, actuation, goal_pos, goal_ori, gripper, grip, measured):  # type: ignore[no-untyped-def]
    """Torques from a measurement (``OperationalSpaceController.run_controller``), gripper, and the integration."""
    ee_pos, ee_ori_mat, ee_pos_vel, ee_ori_vel, joint_pos, joint_vel, j_pos, j_ori, mass = measured
    ctrl, bias = state[4], state[5]
    arm_qvel = arm[2]
    kp, kd, initial_joint = osc
    arm_actuators, torque_low, torque_high, gripper_actuators, gripper_bias, gripper_weight = actuation
    n = len(arm_qvel)
    force = (goal_pos - ee_pos) * kp[:3] + -ee_pos_vel * kd[:3]
    torque = orientation_error(goal_ori, ee_ori_mat) * kp[3:6] + -ee_ori_vel * kd[3:6]
    j_full = np.empty((n, 6)).T
    j_full[:3], j_full[3:] = j_pos, j_ori
    _, lambda_pos, lambda_ori, nullspace = opspace_matrices(mass, j_full, j_pos, j_ori)
    wrench = np.concatenate((np.dot(lambda_pos, force), np.dot(lambda_ori, torque)))
    torques = np.dot(j_full.T, wrench)
    null = nullspace_torques(mass, nullspace, initial_joint, joint_pos, joint_vel)
    for i in range(n):
        value = torques[i] + bias[arm_qvel[i]] + null[i]
        ctrl[arm_actuators[i]] = min(max(value, torque_low[i]), torque_high[i])
    for i in range(len(gripper)):
        gripper[i] = min(max(gripper[i] + grip[i], -1.0), 1.0)
        ctrl[gripper_actuators[i]] = gripper_bias[i] + gripper_weight[i] * gripper[i]
    # Position and velocity stages are up to date, so the second half of mj_step is all that is left of it.
    _mj_step2(model, data)


# One function with everything in it: several that call each other are compiled again for each caller
@_compiled
def _substeps(model, data, state, arm, osc, actuation, work, goal_pos, goal_ori, gripper, grip, measured, stale, n):  # type: ignore[no-untyped-def]
    for i in range(n):
        if i > 0:
            _forward(model, data)
        if i > 0 or not stale:
            measured = _measure(model, data, state, arm, work)
        _finish(model, data, state, arm, osc, actuation, goal_pos, goal_ori, gripper, grip, measured)


@dataclass(frozen=True)
class ControllerState:
    """What the controller remembers from one control step to the next, beside MuJoCo's own state."""

    goal_ori: np.ndarray
    gripper: np.ndarray


class OscStepper:
    """
    Steps a robosuite single-arm domain under its OSC_POSE controller.

    MuJoCo's sensors (the force and torque of the gripper, which robosuite computes and LIBERO never reads) are switched
    off in the model.

    :param domain: robosuite environment that has been reset; its robot 0 has a fixed-impedance OSC_POSE controller and
        a gripper with one action
    """

    def __init__(self, domain: Any):
        robot = domain.robots[0]
        controller = robot.controller
        if type(controller).__name__ != "OperationalSpaceController" or controller.impedance_mode != "fixed":
            raise ValueError(
                f"OscStepper needs a fixed-impedance OSC_POSE controller, got {type(controller).__name__}."
            )
        self._robot = robot
        self._controller = controller
        # The addresses below are valid as long as these two live
        self._model: mujoco.MjModel = domain.sim.model._model
        self._data: mujoco.MjData = domain.sim.data._data
        model, data = self._model, self._data
        model.opt.disableflags |= int(mujoco.mjtDisableBit.mjDSBL_SENSOR)
        self._n_substeps = int(domain.control_timestep / domain.model_timestep)
        self._site = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_SITE, controller.eef_name)
        self._pointers = model._address, data._address
        inertia = data.qLD if _FULL_M_TAKES_DATA else data.qM
        self._state = (data.site_xpos, data.site_xmat, data.qpos, data.qvel, data.ctrl, data.qfrc_bias, inertia)
        self._arm = self._site, _index(controller.qpos_index), _index(controller.qvel_index)
        arm_actuators = _index(robot._ref_joint_actuator_indexes)
        gripper_actuators = _index(robot._ref_joint_gripper_actuator_indexes)
        limits = model.actuator_ctrlrange
        low, high = limits[gripper_actuators, 0], limits[gripper_actuators, 1]
        self._actuation = (
            arm_actuators,
            limits[arm_actuators, 0].copy(),
            limits[arm_actuators, 1].copy(),
            gripper_actuators,
            0.5 * (high + low),
            0.5 * (high - low),
        )
        self._work = np.zeros((3, model.nv)), np.zeros((3, model.nv)), np.zeros((model.nv, model.nv))
        self.sync()

    def sync(self) -> None:
        """Take over goal and gripper from robosuite's own controller, after its reset."""
        controller = self._robot.controller
        self._controller = controller
        self._osc = tuple(
            np.array(value, dtype=np.float64) for value in (controller.kp, controller.kd, controller.initial_joint)
        )
        self._goal_ori = np.array(controller.goal_ori, dtype=np.float64)
        self._gripper = np.zeros(len(self._actuation[3]))
        # robosuite's first control step still uses what the controller measured while the robot was being reset,
        # before the gripper was set; without that first value the bits differ from the first step on.
        vectors = ("ee_pos", "ee_ori_mat", "ee_pos_vel", "ee_ori_vel", "joint_pos", "joint_vel")
        self._stale = True
        self._measured = (
            *(np.array(getattr(controller, name), dtype=np.float64) for name in vectors),
            *(np.asfortranarray(getattr(controller, name)) for name in ("J_pos", "J_ori", "mass_matrix")),
        )

    @property
    def state(self) -> ControllerState:
        """What a restart in the middle of an episode needs (the goal position is set anew by every action)."""
        return ControllerState(self._goal_ori.copy(), self._gripper.copy())

    @state.setter
    def state(self, value: ControllerState) -> None:
        self._goal_ori, self._gripper = value.goal_ori.copy(), value.gripper.copy()

    def _goal_position(self, arm_action: np.ndarray, ee_pos: np.ndarray, ee_ori_mat: np.ndarray) -> np.ndarray:
        delta = self._controller.scale_action(arm_action)
        if delta[3:].any():
            self._goal_ori = set_goal_orientation(delta[3:], ee_ori_mat)
        return set_goal_position(delta[:3], ee_pos)

    def step(self, action: np.ndarray) -> None:
        """
        One control step of 0.05 s.

        :param action: float64 array of shape ``(7,)``: OSC deltas in [-1, 1] and the gripper (negative opens)
        """
        grip = np.array([-1.0, 1.0]) * self._robot.gripper.speed * np.sign(action[6])
        stale, self._stale = self._stale, False
        if stale:
            mujoco.mj_forward(self._model, self._data)
            ee_pos, ee_ori_mat = self._measured[:2]
        else:
            _forward(*self._pointers)
            ee_pos, ee_ori_mat = self._state[0][self._site].copy(), self._state[1][self._site].reshape(3, 3).copy()
        goal_pos = self._goal_position(action[:6], ee_pos, ee_ori_mat)
        _substeps(
            *self._pointers,
            self._state,
            self._arm,
            self._osc,
            self._actuation,
            self._work,
            goal_pos,
            self._goal_ori,
            self._gripper,
            grip,
            self._measured,
            stale,
            self._n_substeps,
        )


def _index(values: Any) -> np.ndarray:
    return np.ascontiguousarray(values, dtype=np.int64)
