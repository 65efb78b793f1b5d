"""RoboTwin 2.0 as a Gymnasium environment."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from opd_gym.actions import JOINTS, to_positions
from opd_gym.checks import check_at_least_one, check_range
from opd_gym.envs.robotwin import runtime, tasks
from opd_gym.envs.robotwin.remote import STEP_SECONDS, RemoteSimulator, WorkerLost
from opd_gym.envs.robotwin.simulator import CAMERAS, PICTURE_SIZE, Settings
from opd_gym.instructions import INSTRUCTION_BYTES, encode_instruction

if TYPE_CHECKING:
    from opd_gym.envs.robotwin.simulator import Simulator

TASK_CONFIGS = ("demo_clean", "demo_randomized")
# SAPIEN's: its rasteriser, and the ray tracing of RoboTwin's own pictures
SHADERS = ("default", "rt")
INSTRUCTIONS = ("seen", "unseen")
MAX_DEATHS = 3


class RoboTwinEnv(gym.Env):
    """
    A task of RoboTwin 2.0 (https://robotwin-platform.github.io): two arms at a table.

    ## Action space
    ``Box(-1, 1, (14,), float32)``, or ``(chunk_size, 14)``: where the six joints and the gripper of the left arm go to,
    then those of the right one. A joint's position is the action times pi, in rad; a gripper is closed at -1 and open
    at 1. See :mod:`opd_gym.actions`. As RoboTwin does for chunked policies, a chunk is carried out on one time-optimal
    path through all of its positions. One action after the other is not the same: with ``chunk_size=None`` the arms
    come to rest after every action.

    ## Observation space
    A flat ``Dict``: one ``uint8 (height, width, 3)`` picture a camera, ``proprio`` ``float32 (14,)`` (joint positions
    in rad and gripper openings from 0 to 1, left then right) and ``instruction`` ``uint8 (128,)`` (UTF-8 bytes, zero
    padded).

    ## Reward and end
    Reward 1 and termination on success, else 0; truncation after ``horizon`` actions.

    ## Reset
    ``reset(options={"init_state_id": 7})`` chooses the evaluation scene ``eval_seeds[7]``; what is left out is drawn
    from the seed. ``info`` has ``task_id``, ``init_state_id`` (-1 for a training scene), ``scene_seed``,
    ``instruction`` and ``is_success``.

    ## Workers
    The simulator runs in a process of its own. If that dies or hangs, the step (or the next one) returns ``truncated``
    with ``info["episode_lost"]`` and ``info["worker_death"]``, and the next reset starts another.

    :param task: RoboTwin's name of the task, for instance ``handover_block``
    :param chunk_size: actions in a step; None for one, without the axis
    :param horizon: actions until truncation; None for the limit of RoboTwin's own evaluation
    :param image_size: height and width of the pictures, or the side of square ones; None for RoboTwin's own, 240 x 320
    :param cameras: "head", "left_wrist", "right_wrist"
    :param init_states: "sampled" draws from ``train_seeds``, "eval" from ``eval_seeds``, a sequence of ints from those
        entries of ``eval_seeds``
    :param train_seeds: seeds of the scenes to train in; None for 0 to 99,999
    :param eval_seeds: seeds of the scenes to evaluate in, or a JSON file of them (``opd-gym robotwin seeds``); None for
        100,000 to 100,099
    :param assets_root: folder that contains RoboTwin's ``assets``; None to look for it, see
        :func:`opd_gym.envs.robotwin.runtime.find_assets`
    :param embodiment: two robots and their distance in m (published policies of chunked tokens have two pipers), or one
        robot of two arms, ``("aloha-agilex",)``
    :param task_config: "demo_clean", or "demo_randomized" for random textures, lights, table heights and clutter
    :param held_out_textures: whether "demo_randomized" takes RoboTwin's "unseen" textures; None for evaluation scenes
    :param shader: "default" for SAPIEN's rasteriser without shadows, "rt" for RoboTwin's own ray tracing, which takes
        seconds without an NVIDIA GPU, and shows noise, because its denoiser needs CUDA
    :param instructions: RoboTwin's "seen" or "unseen" phrasings of the task; None for unseen ones in evaluation scenes
        and seen ones elsewhere, as RoboTwin has it
    :param in_process: simulate in this process, which then dies with the simulator
    :param python: interpreter of the worker; None for this one
    :param timeout: seconds without an answer after which the worker counts as hung; its start and its resets, which
        load assets and compile shaders, have 300 at least
    :param render_mode: None or "rgb_array"
    :raises ValueError: an argument is invalid, or a scene is in both train_seeds and eval_seeds
    :raises ImportError: RoboTwin is not installed
    :raises FileNotFoundError: the assets, or those of the task or the robot, are not there
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    #: See :class:`opd_gym.envs.wrappers.ActionChunk`
    can_skip_observations = True
    #: No scripted expert sees the state here; recorded traces are demonstrations, not labels
    has_expert = False

    def __init__(
        self,
        task: str,
        chunk_size: int | None = None,
        horizon: int | None = None,
        image_size: int | Sequence[int] | None = None,
        cameras: Sequence[str] = ("head",),
        init_states: str | Sequence[int] = "sampled",
        train_seeds: Sequence[int] | None = None,
        eval_seeds: Sequence[int] | str | None = None,
        assets_root: str | None = None,
        embodiment: Sequence[Any] = ("piper", "piper", 0.6),
        task_config: str = "demo_clean",
        held_out_textures: bool | None = None,
        shader: str = "default",
        instructions: str | None = None,
        in_process: bool = False,
        python: str | None = None,
        timeout: float = STEP_SECONDS,
        render_mode: str | None = None,
    ):
        self.task_id = tasks.task_id(task)
        for name, value, known in (
            ("task_config", task_config, TASK_CONFIGS),
            ("shader", shader, SHADERS),
            ("instructions", instructions, (None, *INSTRUCTIONS)),
            ("render_mode", render_mode, (None, "rgb_array")),
            *(("cameras", camera, tuple(CAMERAS)) for camera in cameras),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(str, known))}; got {value!r}.")
        check_at_least_one(chunk_size=chunk_size, horizon=horizon)
        check_range("(0, inf)", timeout=timeout)
        if image_size is None:
            size = list(PICTURE_SIZE)
        else:
            size = [int(n) for n in np.ravel(image_size)] * (2 if np.ndim(image_size) == 0 else 1)
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"image_size must be a height and a width, or one number for both, got {image_size}.")
        try:
            # As JSON can write it
            robots: tuple[Any, ...] = (*map(str, embodiment[:2]), *map(float, embodiment[2:]))
        except ValueError:
            robots = ()
        if len(robots) not in (1, 3):
            raise ValueError(
                "embodiment must name one robot of two arms, ('aloha-agilex',), or two robots and their distance in m, "
                f"('piper', 'piper', 0.6); got {embodiment!r}."
            )
        if python is not None and in_process:
            raise ValueError("python names the worker's interpreter: it cannot be given with in_process=True.")
        if python is not None and shutil.which(python) is None:
            raise ValueError(f"python must name an interpreter; there is no program {python!r}.")
        if isinstance(eval_seeds, str):
            eval_seeds = tasks.read_seeds(eval_seeds)
        self.train_seeds = tasks.TRAIN_SEEDS if train_seeds is None else tasks.check_seeds("train_seeds", train_seeds)
        self.eval_seeds = tasks.EVAL_SEEDS if eval_seeds is None else tasks.check_seeds("eval_seeds", eval_seeds)
        both = set(self.train_seeds).intersection(self.eval_seeds)
        if both:
            raise ValueError(
                f"{len(both)} scenes are both in train_seeds and in eval_seeds, for instance {min(both)}: an "
                "evaluation there says nothing about new scenes. Give lists with no scene in common."
            )
        self.init_states = self._check_init_states(init_states)
        if python is None:
            runtime.require_robotwin()
        root = runtime.find_assets(assets_root)
        runtime.check_task_assets(root, task, task_config)
        runtime.robots(root, robots)
        self.is_stand_in = runtime.is_stand_in(root)
        reasons = ["a stand-in for RoboTwin's robot"] * self.is_stand_in
        if shader != "rt":
            reasons.append("pictures without ray tracing (shader='default')")
        elif not runtime.has_gpu():
            reasons.append("ray tracing without a GPU, so without its denoiser, and with seconds for each picture")
        if reasons:
            warnings.warn(f"RoboTwin with {' and '.join(reasons)}: {runtime.NOT_COMPARABLE}", stacklevel=2)

        self.task = task
        self.chunk_size = chunk_size
        self.horizon = tasks.TASKS[task] if horizon is None else int(horizon)
        self.cameras = tuple(cameras)
        self.render_mode = render_mode
        self.held_out_textures = held_out_textures
        self.instructions = instructions
        self.settings = Settings(task, str(root), robots, task_config, shader, self.cameras, tuple(size))
        #: Whether a step draws pictures; ActionChunk switches it off between two decisions
        self.observe = True
        self._in_process, self._python, self._timeout = in_process, python, timeout
        self._simulator: Simulator | RemoteSimulator | None = None
        self._deaths = 0
        # What ended the worker of the present episode
        self._death = ""
        self._done = True
        self._obs: dict[str, np.ndarray] = {}
        self._picture = np.zeros((*PICTURE_SIZE, 3), np.uint8)
        picture = spaces.Box(0, 255, (*size, 3), np.uint8)
        self.observation_space = spaces.Dict(
            {
                **{name: picture for name in self.cameras},
                "proprio": spaces.Box(-np.inf, np.inf, (JOINTS,), np.float32),
                "instruction": spaces.Box(0, 255, (INSTRUCTION_BYTES,), np.uint8),
            }
        )
        shape = (JOINTS,) if chunk_size is None else (chunk_size, JOINTS)
        self.action_space = spaces.Box(-1.0, 1.0, shape, np.float32)

    def _check_init_states(self, init_states: str | Sequence[int]) -> str | list[int]:
        if isinstance(init_states, str):
            if init_states in ("sampled", "eval"):
                return init_states
        elif len(init_states) and all(0 <= int(i) < len(self.eval_seeds) for i in init_states):
            return [int(i) for i in init_states]
        raise ValueError(
            f'init_states must be "sampled", "eval", or ids of evaluation scenes, 0 to {len(self.eval_seeds) - 1}; got '
            f"{init_states!r}."
        )

    @property
    def task_ids(self) -> list[int]:
        """The one task of this env."""
        return [self.task_id]

    @property
    def suite_horizon(self) -> int:
        """The limit of RoboTwin's own evaluation."""
        return tasks.TASKS[self.task]

    def n_init_states(self, task_id: int) -> int:
        """
        :param task_id: the one task of this env
        :return: number of evaluation scenes
        """
        return len(self.eval_seeds)

    @property
    def simulator(self) -> Simulator | RemoteSimulator:
        """
        The simulator, in this process or in a worker.

        :raises RuntimeError: before the first reset
        """
        if self._simulator is None:
            raise RuntimeError("Call reset() first: RoboTwin's simulator is built there.")
        return self._simulator

    def _use(self) -> Simulator | RemoteSimulator:
        """The simulator, built lazily in the process that uses it."""
        if self._simulator is None:
            if self._in_process:
                from opd_gym.envs.robotwin.simulator import Simulator

                self._simulator = Simulator(self.settings)
            else:
                self._simulator = RemoteSimulator(self.settings, self._python, self._timeout)
        return self._simulator

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """
        Start an episode.

        :param seed: seed of everything this env draws
        :param options: ``init_state_id`` (-1 for a training scene) fixes what would be drawn; ``horizon`` is that of
            this episode alone; ``task_id`` must be this env's
        :return: observation and info
        :raises ValueError: unknown option or scene, or another task than this env's
        :raises SimulatorError: the simulator cannot be started, or no scene is stable
        """
        super().reset(seed=seed)
        self._done = True  # until the episode has begun
        self._death = ""
        options = dict(options or {})
        unknown = set(options) - {"task_id", "init_state_id", "horizon"}
        if unknown:
            raise ValueError(f"Unknown reset options {sorted(unknown)}. Known: task_id, init_state_id and horizon.")
        if int(options.get("task_id", self.task_id)) != self.task_id:
            raise ValueError(
                f"This env's only task is {self.task_id} ({self.task}), got task_id {options['task_id']}. Every task "
                "of RoboTwin has an id of its own, see `opd-gym list --all`."
            )
        horizon = options.get("horizon", self.horizon)
        check_at_least_one(**{"The option horizon": horizon})
        horizon = int(horizon)
        # All draws are made whatever the options say, so that an option never shifts the draws that follow.
        drawn = int(self.train_seeds[int(self.np_random.integers(len(self.train_seeds)))])
        ids = self.init_states if isinstance(self.init_states, list) else range(len(self.eval_seeds))
        drawn_id = ids[int(self.np_random.integers(len(ids)))]
        init_state_id = options.get("init_state_id")
        if init_state_id is None:
            init_state_id = -1 if self.init_states == "sampled" else drawn_id
        init_state_id = int(init_state_id)
        if not -1 <= init_state_id < len(self.eval_seeds):
            raise ValueError(f"Unknown evaluation scene {init_state_id}: there are 0 to {len(self.eval_seeds) - 1}.")
        evaluates = init_state_id != -1
        held_out = evaluates if self.held_out_textures is None else self.held_out_textures
        instructions = self.instructions or ("unseen" if evaluates else "seen")
        scene = self._start_scene(int(self.eval_seeds[init_state_id]) if evaluates else drawn, held_out, instructions)
        self._described = {
            "task_id": self.task_id,
            "init_state_id": init_state_id,
            "scene_seed": scene["scene_seed"],
            "instruction": scene["instruction"],
        }
        self._obs["instruction"] = encode_instruction(scene["instruction"])
        self._steps = 0
        self._episode_horizon = horizon
        self._done = False
        return self._observation(), {**self._described, "is_success": False}

    def _start_scene(self, scene_seed: int, held_out: bool, instructions: str) -> dict[str, Any]:
        while True:
            try:
                scene, arrays = self._use().reset(scene_seed, held_out, instructions)
            except WorkerLost as death:
                self._bury(death)
                continue
            self._obs = dict(arrays)
            for text in scene.get("broken", ()):
                warnings.warn(
                    f"RoboTwin's {self.task} broke down in {text}. Scene {scene['scene_seed']} takes its place.",
                    RuntimeWarning,
                    stacklevel=3,
                )
            return scene

    def _bury(self, death: WorkerLost) -> None:
        self._simulator = None
        self._deaths += 1
        if self._deaths >= MAX_DEATHS:
            self._deaths = 0
            raise runtime.SimulatorError(
                f"RoboTwin's worker died {MAX_DEATHS} times in a row without completing a step; the last time: "
                f"{death}\nBuild the env with in_process=True to see why, or raise timeout if it is only slow."
            ) from death
        warnings.warn(f"{death}\nIts episode is lost; another worker takes its place.", RuntimeWarning, stacklevel=3)

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """
        Carry out an action, or a chunk of them.

        :param action: float array of the shape of the action space
        :return: observation, reward, terminated, truncated, info. ``info["n_executed"]`` is the number of actions
            carried out: all of a chunk, because they shape its path together, except those beyond the horizon
        :raises ValueError: wrong shape, or NaN
        :raises RuntimeError: before a reset, or after the episode's end
        :raises SimulatorError: RoboTwin's code breaks down
        """
        if self._done:
            raise RuntimeError("The episode is over (or has not begun): call reset().")
        action = np.asarray(action, dtype=np.float64)
        if action.shape != self.action_space.shape:
            raise ValueError(f"RoboTwin expects an action of shape {self.action_space.shape}, got {action.shape}.")
        if not np.isfinite(action).all():
            raise ValueError(
                f"The action has NaN or infinite entries: {action}. The policy has diverged; lower its learning rate."
            )
        if self._death:
            return self._lose_episode()
        chunk = action.reshape(-1, JOINTS)[: self._episode_horizon - self._steps]
        try:
            result, arrays = self.simulator.step(to_positions(np.clip(chunk, -1.0, 1.0)), observe=self.observe)
            self._deaths = 0
            self._obs.update(arrays)
            self._steps += len(chunk)
            success = bool(result["success"])
            truncated = not success and self._steps >= self._episode_horizon
            if (success or truncated) and not self.observe:
                self._obs.update(self.simulator.observe()[1])
        except WorkerLost as death:
            self._death = str(death)
            self._bury(death)
            return self._lose_episode()
        self._done = success or truncated
        info = {**self._described, "is_success": success, "n_executed": len(chunk)}
        return self._observation(), float(success), success, truncated, info

    def _lose_episode(self) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        self._done = True
        lost = {"episode_lost": True, "worker_death": self._death, "n_executed": 0}
        return self._observation(), 0.0, False, True, {**self._described, **lost}

    def _observation(self) -> dict[str, np.ndarray]:
        return {name: self._obs[name].copy() for name in self.observation_space.spaces}  # type: ignore[attr-defined]

    def current_observation(self) -> dict[str, np.ndarray]:
        """The present state's observation, drawn now (after steps with ``observe`` off, for instance)."""
        self._obs.update(self._drawn("observe"))
        return self._observation()

    def render(self) -> np.ndarray | None:  # type: ignore[override]
        """
        :return: the head camera's picture, uint8 of shape ``(240, 320, 3)``, or None without a render mode; the last
            one (or a black one) if the worker is lost
        """
        if self.render_mode is None:
            return None
        self._picture = self._drawn("picture").get("picture", self._picture)
        return self._picture.copy()

    def _drawn(self, command: str) -> dict[str, np.ndarray]:
        """What the simulator draws; nothing if it is lost, which a picture cannot say: the next step does."""
        if self._death:
            return {}
        try:
            return getattr(self.simulator, command)()[1]
        except WorkerLost as death:
            self._death = str(death)
            self._bury(death)
            return {}

    def close(self) -> None:
        """End the simulator; may be called twice."""
        if self._simulator is not None:
            self._simulator.close()
            self._simulator = None
        self._done, self._death = True, ""
