"""One LIBERO task's simulator: built once, reset in milliseconds, stepped without Python overhead, drawn on demand."""

from __future__ import annotations

import contextlib
import ctypes
import io
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mujoco
import numpy as np

from opd_gym.envs.libero.models import Visuals, load_model
from opd_gym.envs.libero.physics import ControllerState, OscStepper, copy_data
from opd_gym.envs.libero.rendering import Renderer
from opd_gym.envs.libero.runtime import config_note, download_note, import_libero
from opd_gym.envs.libero.suites import TaskSpec, load_init_states
from opd_gym.files import cache_dir

NO_OP = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0])
N_SETTLE = 10  # no-op steps after a reset in every published LIBERO evaluation: objects fall into place


@contextlib.contextmanager
def _global_seed(seed: int) -> Iterator[None]:
    """LIBERO's placement sampler draws from NumPy's global generator, which belongs to the user."""
    state = np.random.get_state()
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        np.random.set_state(state)


def _trim_memory() -> None:
    """
    Compiling a model leaves half a gigabyte of freed memory with the C library; give it back where that can be done.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@dataclass
class Snapshot:
    """A whole simulator state, derived quantities included, to go back to."""

    data: mujoco.MjData
    controller: ControllerState


class Simulator:
    """
    The simulator of one LIBERO task. Building it takes seconds, so it is built where it is used and kept.

    :param task: which task; the attribute may be set to another one of the same scene
    :param visuals: "exact" for LIBERO's own pictures, "light" for simplified visual meshes (physics identical)
    :param max_size: largest side of a picture, in pixels
    :param msaa: whether edges are smoothed (LIBERO's own pictures always are)
    """

    def __init__(self, task: TaskSpec, visuals: str = "exact", max_size: int = 256, msaa: bool = True):
        import_libero()
        import libero.libero.envs.bddl_utils as bddl_utils
        import robosuite
        from libero.libero.envs import TASK_MAPPING

        self.task = task
        self._visuals: Visuals
        problem = bddl_utils.get_problem_info(str(task.bddl_file))["problem_name"]
        domain_class = TASK_MAPPING[problem]
        scene = {} if task.scene_file is None else {"scene_xml": str(task.scene_file)}
        self.domain: Any = domain_class.__new__(domain_class)

        # robosuite's constructor would compile the model
        self.domain._initialize_sim = lambda: self._load(visuals)
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed), _global_seed(0):
                self.domain.__init__(
                    str(task.bddl_file),
                    robots=["Panda"],
                    controller_configs=robosuite.load_controller_config(default_controller="OSC_POSE"),
                    initialization_noise=None,
                    use_camera_obs=False,
                    has_renderer=False,
                    has_offscreen_renderer=False,
                    control_freq=20,
                    horizon=10**9,
                    ignore_done=True,
                    hard_reset=False,
                    **scene,
                )
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"The installed LIBERO cannot build task {task.task_id} of {task.suite!r}: it does not ship "
                f"{error.filename}.{config_note()}{download_note(printed.getvalue())}"
            ) from error
        self.model: mujoco.MjModel = self.domain.sim.model._model
        self.data: mujoco.MjData = self.domain.sim.data._data
        self._max_size = max_size
        if not msaa:
            self.model.vis.quality.offsamples = 0
        self._renderer: Renderer | None = None
        self._init_states: np.ndarray | None = None
        self._stepper: OscStepper | None = None
        self._expert: Any = None
        self._scratch: Snapshot | None = None
        _trim_memory()
        robot = self.domain.robots[0]
        self._eef_site = robot.eef_site_id
        self._eef_body = mujoco.mj_name2id(self.model, mujoco.mjtObj.mjOBJ_BODY, robot.robot_model.eef_name)
        self._gripper_qpos = np.asarray(robot._ref_gripper_joint_pos_indexes)
        self._robot_qpos = np.array(robot.init_qpos)
        self._agentview = mujoco.mj_name2id(self.model, mujoco.mjtObj.mjOBJ_CAMERA, "agentview")
        self.agentview_pose = self.model.cam_pos[self._agentview].copy(), self.model.cam_quat[self._agentview].copy()

    def _load(self, visuals: str) -> None:
        """In place of robosuite's ``_initialize_sim``: the compiled model comes from the cache."""
        from robosuite.utils.binding_utils import MjSim

        xml = self.domain.model.get_xml()
        if self.task.textures:
            root = ET.fromstring(xml)
            for name, path in self.task.textures:
                for texture in root.findall(f"./asset/texture[@name='{name}']"):
                    texture.set("file", str(path))
            xml = ET.tostring(root, encoding="unicode")
        model, self._visuals = load_model(xml, visuals, cache_dir())
        # Fixtures are placed by editing the model, in the constructor already; every reset starts from the model as it
        # was compiled.
        self._body_pose = model.body_pos.copy(), model.body_quat.copy()
        self.domain.sim = MjSim(model)
        self.domain.sim.forward()
        self.domain.initialize_time(self.domain.control_freq)

    @property
    def init_states(self) -> np.ndarray:
        """The task's official initial states, float64 of shape (n, 1 + nq + nv)."""
        if self._init_states is None:
            states = load_init_states(self.task)
            expected = 1 + self.model.nq + self.model.nv
            if states.shape[1] != expected:
                raise ValueError(
                    f"The official initial states of {self.task.suite!r}, task {self.task.task_id}, have "
                    f"{states.shape[1]} entries, its model needs {expected}: the files do not fit together. "
                    f'Use init_states="sampled".{config_note()}'
                )
            self._init_states = states
        return self._init_states

    def perturb(
        self, robot_qpos: np.ndarray | None = None, agentview_pose: tuple[np.ndarray, np.ndarray] | None = None
    ) -> None:
        """
        Set what the next episodes begin with; what is left out is LIBERO's own again.

        :param robot_qpos: joint positions that the robot is reset to, float of shape (7,), in rad. An official initial
            state then puts the arm where it says, but the controller keeps the orientation of the reset
        :param agentview_pose: position (m) and unit quaternion (w, x, y, z) of the camera "agentview"
        """
        self.domain.robots[0].init_qpos = np.array(self._robot_qpos if robot_qpos is None else robot_qpos)
        position, quaternion = self.agentview_pose if agentview_pose is None else agentview_pose
        self.model.cam_pos[self._agentview], self.model.cam_quat[self._agentview] = position, quaternion

    def reset(self, seed: int, init_state: np.ndarray | None = None) -> None:
        """
        Start an episode, as LIBERO's ``reset`` (and ``set_init_state``) would in a newly built environment.

        :param seed: seed of LIBERO's placement sampler; with ``init_state`` it still places the fixtures, which the
            official states do not hold
        :param init_state: one of the official states, or None for the sampled one
        """
        from robosuite.utils.errors import RandomizationError

        domain = self.domain
        with _global_seed(seed):
            while True:
                self.model.body_pos[:], self.model.body_quat[:] = self._body_pose
                mujoco.mj_resetData(self.model, self.data)
                # Twice, as stock LIBERO does when it builds the simulator and then its renderer: each evaluation
                # warm-starts the constraint solver of the next one. Where the solver does not converge to the last bit
                # (hundreds of contacts before the objects are placed), the bits of the whole episode depend on it.
                mujoco.mj_forward(self.model, self.data)
                mujoco.mj_forward(self.model, self.data)
                try:
                    domain._reset_internal()
                    break
                except RandomizationError:  # no room left for an object; LIBERO draws again too
                    continue
        mujoco.mj_forward(self.model, self.data)
        domain.visualize(vis_settings={name: False for name in domain._visualizations})
        if self._stepper is None:
            self._stepper = OscStepper(domain)
        else:
            self._stepper.sync()
        if init_state is not None:
            nq = self.model.nq
            self.data.time = init_state[0]
            self.data.qpos[:] = init_state[1 : 1 + nq]
            self.data.qvel[:] = init_state[1 + nq :]
            mujoco.mj_forward(self.model, self.data)
        domain._post_process()
        for _ in range(N_SETTLE):
            self.step(NO_OP)

    def step(self, action: np.ndarray) -> bool:
        """
        One control step of 0.05 s.

        :param action: float array of shape ``(7,)``, gripper last
        :return: whether the task is solved
        """
        assert self._stepper is not None, "reset first"
        self._stepper.step(np.asarray(action, dtype=np.float64))
        self.domain._post_process()
        return bool(self.domain._check_success())

    def proprio(self) -> np.ndarray:
        """
        :return: float32 array of shape ``(9,)``: end-effector position (m), its quaternion (x, y, z, w), finger
            positions (m)
        """
        quat = self.data.xquat[self._eef_body][[1, 2, 3, 0]]
        return np.concatenate([self.data.site_xpos[self._eef_site], quat, self.data.qpos[self._gripper_qpos]]).astype(
            np.float32
        )

    def render(self, cameras: tuple[str, ...], size: int) -> list[np.ndarray]:
        """See :meth:`Renderer.render`."""
        if self._renderer is None:
            self._renderer = Renderer(self.model, self._visuals, self._max_size)
        return self._renderer.render(self.data, cameras, size)

    def snapshot(self, reuse: Snapshot | None = None) -> Snapshot:
        """
        The present state; going back to it with :meth:`restore` continues bit by bit.

        :param reuse: an old snapshot of this simulator whose memory may be taken
        """
        assert self._stepper is not None, "reset first"
        data = mujoco.MjData(self.model) if reuse is None else reuse.data
        copy_data(data, self.model, self.data)
        return Snapshot(data, self._stepper.state)

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a state of this simulator's present episode."""
        assert self._stepper is not None, "reset first"
        copy_data(self.data, self.model, snapshot.data)
        self._stepper.state = snapshot.controller
        self.domain._post_process()

    @property
    def has_expert(self) -> bool:
        """Whether there is a scripted expert for this task."""
        try:
            self._make_expert()
        except NotImplementedError:
            return False
        return True

    def _make_expert(self) -> Any:
        if self._expert is None:
            from opd_gym.envs.libero.experts import make_expert

            self._expert = make_expert(self.domain)
        return self._expert

    def expert_action(self) -> np.ndarray:
        """
        What the task's scripted expert does in the present state.

        :return: float32 array of shape ``(7,)``
        :raises NotImplementedError: there is no expert for this task
        """
        return self._make_expert()()

    def expert_chunk(self, chunk_size: int) -> np.ndarray:
        """
        What the task's scripted expert does in the next steps: simulated ahead, then taken back.

        :param chunk_size: number of steps
        :return: float32 array of shape ``(chunk_size, 7)``
        """
        before = self._scratch = self.snapshot(self._scratch)
        actions = np.empty((chunk_size, 7), dtype=np.float32)
        for i in range(chunk_size):
            actions[i] = self.expert_action()
            self.step(actions[i])
        self.restore(before)
        return actions

    def close(self) -> None:
        """Free the GL resources; may be called twice."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None
