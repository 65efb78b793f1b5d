"""LIBERO as a Gymnasium environment."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Collection, Hashable, Sequence
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from opd_gym.checks import check_at_least_one
from opd_gym.envs.libero import suites
from opd_gym.envs.libero.runtime import import_libero, require_libero, warn_of_mujoco
from opd_gym.instructions import INSTRUCTION_BYTES, encode_instruction

if TYPE_CHECKING:
    from opd_gym.envs.libero.simulator import Simulator

# Short names of the cameras that LIBERO's data sets and policies use; any other name is taken as MuJoCo's own.
CAMERAS = {"agentview": "agentview", "wrist": "robot0_eye_in_hand"}
RENDER_SIZE = 256


class LiberoEnv(gym.Env):
    """
    A suite of LIBERO (https://libero-project.github.io), a task drawn at every reset.

    ## Action space
    ``Box(-1, 1, (7,), float32)``: deltas of the end effector's position (x, y, z; 1 is 5 cm) and orientation
    (axis-angle; 1 is 0.5 rad), then the gripper (negative opens, positive closes). One step is 0.05 s.

    ## Observation space
    A flat ``Dict``: one upright ``uint8 (image_size, image_size, 3)`` picture a camera, ``proprio`` ``float32 (9,)``
    (end-effector position in m, quaternion x y z w, finger positions in m) and ``instruction`` ``uint8 (128,)`` (UTF-8
    bytes, zero padded).

    ## Reward and end
    Reward 1 and termination on success, else 0; truncation at the suite's horizon.

    ## Reset
    ``reset(options={"task_id": 3, "init_state_id": 7})`` chooses task and official initial state; what is left out is
    drawn from the seed. ``info`` has ``task_id``, ``init_state_id`` (-1 if sampled), ``instruction`` and
    ``is_success``.

    :param suite: LIBERO's name of the suite, for instance ``libero_object``
    :param task_ids: tasks to draw from; None for all
    :param image_size: side of the pictures in pixels
    :param cameras: "agentview", "wrist", or MuJoCo's name of a camera
    :param init_states: "sampled" draws from LIBERO's own placement sampler (for training), "eval" from the official
        states (for evaluation), a sequence of ints from those official states
    :param horizon: control steps until truncation, or a sequence of them, one for each task of the suite; None for the
        suite's own
    :param visuals: "exact" for LIBERO's own pictures, "light" for simplified visual meshes: much faster without a GPU,
        physics identical
    :param msaa: whether edges are smoothed; None: not in "light". In "exact" they always are
    :param max_simulators: simulators kept in memory, one a task; the least recently used is closed. Tasks share their
        meshes and textures: the first takes 0.4 GB (light) or 0.7 GB (exact), another 10 to 40 MB
    :param render_mode: None or "rgb_array"
    :raises ValueError: unknown suite, task id, initial states, visuals or render mode
    :raises ImportError: LIBERO is not installed
    :raises FileNotFoundError: LIBERO's configuration file names a folder that is not there
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}
    #: See :class:`opd_gym.envs.wrappers.ActionChunk`
    can_skip_observations = True
    instruction_bytes = INSTRUCTION_BYTES

    def __init__(
        self,
        suite: str,
        task_ids: Sequence[int] | None = None,
        image_size: int = 128,
        cameras: Sequence[str] = ("agentview", "wrist"),
        init_states: str | Sequence[int] = "sampled",
        horizon: int | Sequence[int] | None = None,
        visuals: str = "exact",
        msaa: bool | None = None,
        max_simulators: int = 100,
        render_mode: str | None = None,
    ):
        if suite not in suites.SUITES:
            raise ValueError(f"Unknown LIBERO suite {suite!r}. Known: {', '.join(suites.SUITES)}.")
        n_tasks = suites.N_TASKS.get(suite)
        if task_ids is not None:
            task_ids = [int(i) for i in task_ids]
            bad = [i for i in task_ids if i < 0 or (n_tasks is not None and i >= n_tasks)]
            if bad or not task_ids:
                raise ValueError(f"task_ids must name tasks of {suite!r}, 0 to {(n_tasks or 0) - 1}; got {task_ids}.")
        if not (isinstance(init_states, str) and init_states in ("sampled", "eval")):
            if isinstance(init_states, str) or any(int(i) < 0 for i in init_states) or not len(init_states):
                raise ValueError(
                    f'init_states must be "sampled", "eval" or ids of official states, got {init_states!r}.'
                )
            init_states = [int(i) for i in init_states]
        if visuals not in ("exact", "light"):
            raise ValueError(f'visuals must be "exact" or "light", got {visuals!r}.')
        if visuals == "exact" and msaa is False:
            raise ValueError('Exact pictures are smoothed as LIBERO\'s own: msaa=False needs visuals="light".')
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f'render_mode must be None or "rgb_array", got {render_mode!r}.')
        if isinstance(image_size, (tuple, list)):
            raise ValueError(
                f"LIBERO's pictures are square: image_size must be an integer, got {image_size}. A checkpoint that "
                "asks for such pictures was trained in another env."
            )
        check_at_least_one(image_size=image_size, max_simulators=max_simulators)
        for steps in horizon if isinstance(horizon, (list, tuple)) else [horizon]:
            check_at_least_one(horizon=steps)
        require_libero()
        warn_of_mujoco()
        if isinstance(horizon, (list, tuple)) and len(horizon) != (n_tasks := n_tasks or len(suites.tasks(suite))):
            raise ValueError(f"horizon: {suite!r} has {n_tasks} tasks, got {len(horizon)} numbers. One is for all.")
        self.suite = suite
        self.image_size = image_size
        self.cameras = tuple(cameras)
        self.init_states = init_states
        #: Control steps until truncation, of any task or of each
        self.horizon = suites.horizon(suite) if horizon is None else horizon
        self.visuals = visuals
        self.msaa = visuals == "exact" if msaa is None else bool(msaa)
        self.render_mode = render_mode
        self._task_ids = task_ids
        self._max_simulators = max_simulators
        self._simulators: OrderedDict[Hashable, Simulator] = OrderedDict()
        self._task_id: int | None = None
        self._steps = 0
        self._done = True
        #: Whether a step draws pictures; ActionChunk switches it off between two decisions
        self.observe = True
        self._pictures: list[np.ndarray] = []
        picture = spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
        self.observation_space = spaces.Dict(
            {
                **{name: picture for name in self.cameras},
                "proprio": spaces.Box(-np.inf, np.inf, (9,), np.float32),
                "instruction": spaces.Box(0, 255, (self.instruction_bytes,), np.uint8),
            }
        )
        self.action_space = spaces.Box(-1.0, 1.0, (7,), np.float32)

    @property
    def task_ids(self) -> list[int]:
        """The tasks this env draws from."""
        if self._task_ids is None:
            self._task_ids = list(range(suites.N_TASKS.get(self.suite) or len(suites.tasks(self.suite))))
        return list(self._task_ids)

    @property
    def suite_horizon(self) -> int:
        """The suite's own horizon, at which it is evaluated."""
        return suites.horizon(self.suite)

    def n_init_states(self, task_id: int) -> int:
        """
        :param task_id: number of a task
        :return: number of its official initial states
        :raises ValueError: unknown task
        :raises FileNotFoundError: the installed LIBERO has none for this task
        """
        return len(suites.load_init_states(self._task(task_id)))

    def _task(self, task_id: int) -> suites.TaskSpec:
        tasks = suites.tasks(self.suite)
        if not 0 <= task_id < len(tasks):
            raise ValueError(f"Unknown task id {task_id}: {self.suite!r} has the tasks 0 to {len(tasks) - 1}.")
        return tasks[task_id]

    @property
    def simulator(self) -> Simulator:
        """
        The simulator of the present episode.

        :raises RuntimeError: before the first reset
        """
        if self._task_id is None:
            raise RuntimeError("Call reset() first: LIBERO's simulator is built there.")
        return self._simulators[self._key(self._task_id)]

    @property
    def instruction(self) -> str:
        """The present episode's instruction."""
        return self.simulator.task.instruction

    @property
    def gl_renderer(self) -> str | None:
        """OpenGL's name of what draws the pictures; None until this process has drawn one."""
        rendering = sys.modules.get("opd_gym.envs.libero.rendering")
        return None if rendering is None else rendering.gl_renderer()

    def _key(self, task_id: int) -> Hashable:
        """Tasks with the same key share a simulator."""
        task = self._task(task_id)
        return task.bddl_file, task.scene_file, task.textures

    def _use(self, task_id: int) -> Simulator:
        """The task's simulator, built lazily in the process that uses it."""
        key = self._key(task_id)
        if key not in self._simulators:
            # MuJoCo decides on its GL library when it is imported, and fails there without one.
            import_libero()
            from opd_gym.envs.libero.simulator import Simulator

            size = max(self.image_size, RENDER_SIZE)
            self._simulators[key] = Simulator(self._task(task_id), self.visuals, size, self.msaa)
        self._simulators.move_to_end(key)
        self._trim([key] if self._task_id is None else [key, self._key(self._task_id)])
        return self._simulators[key]

    def _trim(self, in_use: Collection[Hashable]) -> None:
        """Close the least recently used simulators, but not one in use: has_expert builds some during an episode."""
        idle = [key for key in self._simulators if key not in in_use]
        for key in idle[: max(0, len(self._simulators) - self._max_simulators)]:
            self._simulators.pop(key).close()

    def _prepare(self, simulator: Simulator) -> None:
        """For subclasses: change what an episode of ``simulator.task`` begins with."""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """
        Start an episode.

        :param seed: seed of everything this env draws
        :param options: ``task_id`` and ``init_state_id`` (-1 for a sampled one) fix what would be drawn; ``horizon`` is
            that of this episode alone
        :return: observation and info
        :raises ValueError: unknown option, task or initial state
        """
        super().reset(seed=seed)
        self._done = True  # until the episode has begun
        options = dict(options or {})
        unknown = set(options) - {"task_id", "init_state_id", "horizon"}
        if unknown:
            raise ValueError(f"Unknown reset options {sorted(unknown)}. Known: task_id, init_state_id and horizon.")
        check_at_least_one(**{"The option horizon": options.get("horizon", 1)})
        task_ids = self.task_ids
        # All draws are made whatever the options say, so that an option never shifts the draws that follow.
        drawn_task = task_ids[int(self.np_random.integers(len(task_ids)))]
        drawn_state = float(self.np_random.random())
        placement_seed = int(self.np_random.integers(2**31))
        task_id = int(options.get("task_id", drawn_task))
        simulator = self._use(task_id)
        self._task_id = task_id
        self._trim([self._key(task_id)])
        simulator.task = self._task(task_id)
        self._prepare(simulator)
        init_state_id = options.get("init_state_id")
        if init_state_id is None:
            if self.init_states == "sampled":
                init_state_id = -1
            else:
                ids = range(len(simulator.init_states)) if self.init_states == "eval" else self.init_states
                init_state_id = ids[int(drawn_state * len(ids))]
        init_state_id = int(init_state_id)
        if init_state_id == -1:
            simulator.reset(placement_seed)
        else:
            states = simulator.init_states
            if not 0 <= init_state_id < len(states):
                raise ValueError(f"Unknown initial state {init_state_id}: this task has 0 to {len(states) - 1}.")
            # An official state does not say where the fixtures stand. Its id seeds that, so that a state is always
            # the same scene.
            simulator.reset(1000 * simulator.task.scene_id + init_state_id, states[init_state_id])
        self._init_state_id = init_state_id
        self._instruction = encode_instruction(self.instruction, self.instruction_bytes)
        self._steps = 0
        horizon: Any = self.horizon[task_id] if isinstance(self.horizon, (list, tuple)) else self.horizon
        self._episode_horizon = int(options.get("horizon", horizon))
        self._done = False
        return self._observation(render=True), self._info(False)

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """
        One control step of 0.05 s.

        :param action: float array of shape ``(7,)``
        :return: observation, reward, terminated, truncated, info
        :raises ValueError: wrong shape, or NaN
        :raises RuntimeError: before a reset, or after the episode's end
        """
        if self._done:
            raise RuntimeError("The episode is over (or has not begun): call reset().")
        action = np.asarray(action, dtype=np.float64)
        if action.shape != (7,):
            raise ValueError(f"LIBERO expects an action of shape (7,), got {action.shape}.")
        if not np.isfinite(action).all():
            raise ValueError(
                f"The action has NaN or infinite entries: {action}. The policy has diverged; lower its learning rate."
            )
        success = self.simulator.step(np.clip(action, -1.0, 1.0))
        self._steps += 1
        truncated = not success and self._steps >= self._episode_horizon
        self._done = success or truncated
        return self._observation(self.observe or self._done), float(success), success, truncated, self._info(success)

    def _observation(self, render: bool) -> dict[str, np.ndarray]:
        if render:
            self._pictures = self._draw()
        return {
            **{name: picture.copy() for name, picture in zip(self.cameras, self._pictures, strict=True)},
            "proprio": self.simulator.proprio(),
            "instruction": self._instruction.copy(),
        }

    def _draw(self) -> list[np.ndarray]:
        """The cameras' pictures of the present state."""
        names = tuple(CAMERAS.get(name, name) for name in self.cameras)
        return self.simulator.render(names, self.image_size) if names else []

    def current_observation(self) -> dict[str, np.ndarray]:
        """The present state's observation, drawn now (after steps with ``observe`` off, for instance)."""
        return self._observation(render=True)

    def _info(self, success: bool) -> dict[str, Any]:
        category = suites.perturbation(self.suite)
        return {
            **({} if category is None else {"category": category}),
            "task_id": self._task_id,
            "init_state_id": self._init_state_id,
            "instruction": self.instruction,
            "is_success": success,
        }

    def render(self) -> np.ndarray | None:  # type: ignore[override]
        """
        :return: the scene from the front, uint8 of shape ``(256, 256, 3)``, or None without a render mode
        """
        if self.render_mode is None:
            return None
        return self.simulator.render(("agentview",), RENDER_SIZE)[0]

    def check_expert(self, task_ids: Sequence[int]) -> None:
        """
        Refuse tasks that no scripted expert can play; builds their simulators, which stay in memory.

        :param task_ids: numbers of tasks
        :raises ValueError: there are such tasks; the error names them
        """
        able = [task_id for task_id in task_ids if self._use(task_id).has_expert]
        unable = [f"{i} ({self._task(i).instruction})" for i in task_ids if i not in able]
        if unable:
            raise ValueError(
                f"{self.suite!r} has no scripted expert for the tasks {', '.join(unable)}. Leave them out: "
                f"task_ids={able} (--task-ids)."
            )

    @property
    def has_expert(self) -> bool:
        """
        Whether scripted experts can play the tasks of this env; builds their simulators, which stay in memory.

        :raises ValueError: they can play some of the tasks but not all; the error names the others
        """
        if not any(self._use(task_id).has_expert for task_id in self.task_ids):
            return False
        self.check_expert(self.task_ids)
        return True

    def expert_action(self) -> np.ndarray:
        """
        What the task's scripted expert does in the present state.

        :return: float32 array of shape ``(7,)``
        """
        return self.simulator.expert_action()

    def expert_chunk(self, chunk_size: int) -> np.ndarray:
        """
        What the task's scripted expert does in the next steps; the env's state is left as it is.

        :param chunk_size: number of steps
        :return: float32 array of shape ``(chunk_size, 7)``
        """
        return self.simulator.expert_chunk(chunk_size)

    def close(self) -> None:
        """Free the simulators; may be called twice."""
        while self._simulators:
            self._simulators.popitem()[1].close()
        self._task_id = None
        self._done = True
