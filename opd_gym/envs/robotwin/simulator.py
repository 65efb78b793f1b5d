"""One of RoboTwin's tasks, simulated: scenes from seeds, chunks of joint positions, pictures."""

from __future__ import annotations

import functools
import importlib
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from opd_gym.actions import JOINTS
from opd_gym.envs.robotwin.runtime import (
    RandomState,
    SimulatorError,
    import_robotwin,
    quiet,
    robots,
    use_assets,
)
from opd_gym.envs.robotwin.tasks import camel, scene_seeds
from opd_gym.envs.robotwin.topp import PLANNER_HINT, has_planner
from opd_gym.instructions import INSTRUCTION_BYTES

# Short names of RoboTwin's cameras.
CAMERAS = {"head": "head_camera", "left_wrist": "left_camera", "right_wrist": "right_camera"}
PICTURE_SIZE = (240, 320)
# The methods that RoboTwin's experts call
EXPERT_METHODS = (
    "move",
    "grasp_actor",
    "place_actor",
    "move_by_displacement",
    "move_to_pose",
    "back_to_origin",
    "open_gripper",
    "close_gripper",
    "delay",
)
# Random starts of the inverse kinematics of a candidate grasp; mplib's own is 20
IK_ATTEMPTS = 4
# Resets after which SAPIEN's cache of meshes and textures is cleared: with other objects in every scene it grows
CLEAR_CACHE_RESETS = 50
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Settings:
    """
    What a simulator is made of; all of it can be written as JSON.

    :param task: RoboTwin's name of the task
    :param assets_root: folder that contains ``assets``
    :param embodiment: ``(robot,)`` with two arms, or ``(left, right, distance in m)``
    :param task_config: "demo_clean" or "demo_randomized"
    :param shader: SAPIEN's name of a camera shader
    :param cameras: keys of :data:`CAMERAS`
    :param image_size: height and width of the pictures
    """

    task: str
    assets_root: str
    embodiment: Sequence[Any]
    task_config: str = "demo_clean"
    shader: str = "default"
    cameras: Sequence[str] = ("head",)
    image_size: Sequence[int] = PICTURE_SIZE


class Simulator:
    """
    A task of RoboTwin in this process.

    :param settings: what to simulate
    :raises ImportError: RoboTwin is not installed
    :raises FileNotFoundError: there is no such robot
    :raises ValueError: the robot is not one of two arms with six joints each
    :raises SimulatorError: there is no Vulkan device
    """

    def __init__(self, settings: Settings):
        self.settings = settings
        import_robotwin()
        self._arguments = _task_arguments(settings)
        self._class = _task_class(settings.task)
        self._random = RandomState()
        self._task: Any = None
        self._n_resets = 0

    def reset(
        self, scene_seed: int, held_out: bool = False, instructions: str = "seen"
    ) -> tuple[dict[str, Any], Arrays]:
        """
        Build the scene of a seed, or of the one that replaces it if objects do not come to rest there, or RoboTwin's
        code breaks down.

        :param scene_seed: seed of the scene
        :param held_out: with the textures that RoboTwin keeps for evaluation ("demo_randomized" has textures)
        :param instructions: RoboTwin's "seen" or "unseen" phrasings
        :return: ``scene_seed`` (the one that was taken), ``instruction``, ``broken`` (what went wrong in others), and
            the first observation
        :raises SimulatorError: none of the seeds has a stable scene
        """
        use_assets(Path(self.settings.assets_root))
        from robotwin.envs.utils.create_actor import UnStableError

        self._n_resets += 1
        self.close(clear_cache=self._n_resets % CLEAR_CACHE_RESETS == 0)
        broken: list[str] = []
        for seed in scene_seeds(scene_seed):
            try:
                with self._random, quiet():
                    self._set_up(seed, held_out)
                    instruction = self._instruction(seed, instructions)
                return {"scene_seed": seed, "instruction": instruction, "broken": broken}, self.observe()[1]
            except UnStableError:
                self.close()
            except (FileNotFoundError, ImportError, MemoryError):
                # The next scene would fail in the same way
                raise
            except Exception as error:
                # RoboTwin's own evaluation takes another seed then, too
                broken.append(f"scene {seed}: {type(error).__name__}: {error}")
                self._give_up()
        tried = scene_seeds(scene_seed)
        said = f" RoboTwin's code broke down in {len(broken)} of them, the last time in {broken[-1]}." if broken else ""
        raise SimulatorError(
            f"{self.settings.task}: no stable scene in {len(tried)} seeds from {tried[0]} to {tried[-1]}. Take another "
            f"seed; if it happens often, the robot or the objects stand in each other's way.{said}"
        )

    def _set_up(self, seed: int, held_out: bool) -> None:
        self._random.seed(seed)
        self._task = self._class()
        self._task.shader = self.settings.shader
        # RoboTwin's name for it. It also switches the limit of steps, which is replaced below
        arguments = {**self._arguments, "eval_mode": held_out}
        try:
            self._task.setup_demo(now_ep_num=seed, seed=seed, is_test=True, **arguments)
        finally:
            # Every set-up adds the same ones again
            logging.getLogger("toppra").handlers.clear()
        # The env ends episodes; RoboTwin's own counter is out of the way
        self._task.step_lim = np.inf

    def _give_up(self) -> None:
        """Free a scene that may be half built."""
        try:
            self.close()
        except Exception:
            self._task = None

    def _instruction(self, seed: int, kind: str) -> str:
        from robotwin.description import generate_episode_descriptions

        name = self.settings.task
        self._task.describing = True
        try:
            described = self._task.get_info()
        finally:
            self._task.describing = False
        found = generate_episode_descriptions(name, [described], 100, seed)
        texts = found[0][kind] or [f"{name.replace('_', ' ')}."]
        # One that fits into the observation whole, if there is one
        fitting = [text for text in texts if len(text.encode("utf-8")) <= INSTRUCTION_BYTES]
        return random.Random(seed).choice(fitting or texts)

    def step(self, actions: np.ndarray, observe: bool = True) -> tuple[dict[str, Any], Arrays]:
        """
        Go through a chunk of joint positions on one time-optimal path, as RoboTwin does it for chunked policies.

        :param actions: ``(K, 14)``: joint positions in rad and the gripper's opening (0 to 1), left then right
        :param observe: whether to draw pictures
        :return: ``success``, and the observation
        :raises SimulatorError: RoboTwin's code breaks down
        """
        with self._breakdown("in a step"), self._random:
            _, _, _, info = self._task.gen_sparse_reward_data(np.asarray(actions, dtype=np.float64))
        return {"success": bool(info["success"])}, self.observe()[1] if observe else self._proprio()

    @contextmanager
    def _breakdown(self, where: str) -> Iterator[None]:
        """Make a SimulatorError of what RoboTwin's code raises: a ValueError, for instance, would blame the caller."""
        try:
            yield
        except Exception as error:
            raise SimulatorError(
                f"RoboTwin's {self.settings.task} broke down {where}: {type(error).__name__}: {error}"
            ) from error

    def _proprio(self) -> Arrays:
        robot = self._task.robot
        return {
            "proprio": np.array([*robot.get_left_arm_jointState(), *robot.get_right_arm_jointState()], dtype=np.float32)
        }

    def observe(self) -> tuple[dict[str, Any], Arrays]:
        """
        :return: an empty dict, and the observation: uint8 pictures and ``proprio``, float32 ``(14,)``
        """
        pictures = self._pictures([CAMERAS[name] for name in self.settings.cameras])
        return {}, {
            **{
                name: _resize(picture, self.settings.image_size)
                for name, picture in zip(self.settings.cameras, pictures, strict=True)
            },
            **self._proprio(),
        }

    def picture(self) -> tuple[dict[str, Any], Arrays]:
        """
        :return: an empty dict, and the head camera's picture in RoboTwin's own size as ``picture``
        """
        return {}, {"picture": self._pictures(["head_camera"])[0]}

    def _pictures(self, names: list[str]) -> list[np.ndarray]:
        cameras = self._task.cameras
        views = dict(zip(cameras.static_camera_name, cameras.static_camera_list, strict=True))
        if cameras.collect_wrist_camera:
            views |= {"left_camera": cameras.left_camera, "right_camera": cameras.right_camera}
        pictures = []
        with self._breakdown("in its pictures"):
            with self._random:
                self._task.draw()
            for name in names:
                views[name].take_picture()
                rgb = views[name].get_picture("Color")[..., :3]
                pictures.append((rgb * 255).clip(0, 255).astype(np.uint8))
        return pictures

    def record_expert(self, scene_seed: int, held_out: bool = False) -> tuple[dict[str, Any], Arrays]:
        """
        Let RoboTwin's own expert plan and play an episode.

        :param scene_seed: seed of the scene
        :param held_out: see :meth:`reset`
        :return: ``success``, ``scene_seed``, and ``actions``, float32 ``(T, 14)``: the joint positions that it went
            through, every ``save_freq`` physics steps of RoboTwin's task configuration
        :raises SimulatorError: the planner is not installed
        """
        if not has_planner():
            raise SimulatorError(PLANNER_HINT)
        info, _ = self.reset(scene_seed, held_out)
        trace: list[np.ndarray] = []
        self._task.trace = trace
        try:
            with self._random, quiet():
                self._task.play_once()
                success = bool(self._task.plan_success and self._task.check_success())
        finally:
            self._task.trace = None
        return {**info, "success": success}, {"actions": np.array(trace, dtype=np.float32).reshape(-1, JOINTS)}

    def close(self, clear_cache: bool = False) -> None:
        """
        Free the scene; may be called twice.

        :param clear_cache: free the meshes and textures of earlier scenes too, which SAPIEN keeps
        """
        if self._task is not None:
            self._task.close_env(clear_cache=clear_cache)
            self._task = None


def _resize(picture: np.ndarray, size: Sequence[int]) -> np.ndarray:
    import cv2

    if picture.shape[:2] == tuple(size):
        return picture
    return cv2.resize(picture, (size[1], size[0]), interpolation=cv2.INTER_AREA)


def _task_arguments(settings: Settings) -> dict[str, Any]:
    """Arguments of RoboTwin's ``setup_demo``, from its own configuration files."""
    from robotwin.config import load_task_config

    arguments = load_task_config(settings.task_config)
    embodiment = list(settings.embodiment)
    (left, left_config), (right, right_config) = robots(Path(settings.assets_root), tuple(embodiment))
    wrists = any(name != "head" for name in settings.cameras)
    arguments["camera"].update(collect_head_camera=True, collect_wrist_camera=wrists)
    arguments.update(
        task_name=settings.task,
        embodiment=embodiment,
        left_robot_file=str(left),
        right_robot_file=str(right),
        left_embodiment_config=left_config,
        right_embodiment_config=right_config,
        dual_arm_embodied=len(embodiment) == 1,
        # The only other one runs on CUDA alone, and is not needed to play joint positions
        planner_backend="mplib",
        eval_video_log=False,
        render_freq=0,
    )
    if len(embodiment) == 3:
        arguments["embodiment_dis"] = embodiment[2]
    return arguments


@functools.cache
def _task_class(task: str) -> type:
    """RoboTwin's class of a task, with the shader chosen and pictures drawn only when somebody looks."""
    import sapien

    with quiet():
        base: Any = getattr(importlib.import_module(f"robotwin.envs.{task}"), task)

    class Task(base):  # type: ignore[misc]
        shader = "default"
        # Joint positions, while the expert plays
        trace: list[np.ndarray] | None = None
        # While True, the arms stand still whatever the expert's code says
        describing = False

        def setup_scene(self, **kwargs: Any) -> None:
            # RoboTwin asks for ray tracing here, which takes a CPU seconds, and its denoiser needs CUDA
            if self.shader == "rt":
                super().setup_scene(**kwargs)
                return
            render = sapien.render
            names = (
                "set_camera_shader_dir",
                "set_ray_tracing_samples_per_pixel",
                "set_ray_tracing_path_depth",
                "set_ray_tracing_denoiser",
            )
            real = {name: getattr(render, name) for name in names}
            try:
                real["set_camera_shader_dir"](self.shader)
                for name in names:
                    setattr(render, name, lambda value: None)
                # Shadows take longer than everything else without a GPU
                super().setup_scene(**{**kwargs, "shadow": False})
            finally:
                for name, function in real.items():
                    setattr(render, name, function)

        def _update_render(self) -> None:
            """RoboTwin calls this at every physics step; nobody looks at those pictures."""

        def draw(self) -> None:
            super()._update_render()

        def _take_picture(self, reward: Any = None) -> None:
            if self.trace is not None:
                robot = self.robot
                self.trace.append(np.array([*robot.get_left_arm_jointState(), *robot.get_right_arm_jointState()]))

        def choose_best_pose(self, res_pose: Any, center_pose: Any, arm_tag: Any = None) -> Any:
            """
            RoboTwin plans to all candidates, most of them out of reach, and takes the first that it can reach. Here the
            search ends there, and gives a candidate up sooner.
            """
            if not self.plan_success:
                return super().choose_best_pose(res_pose, center_pose, arm_tag)
            left = str(arm_tag) == "left"
            plan = self.robot.left_plan_multi_path if left else self.robot.right_plan_multi_path
            planner = (self.robot.left_planner if left else self.robot.right_planner).planner
            planner.IK = functools.partial(planner.IK, n_init_qpos=IK_ATTEMPTS)
            try:
                for pose in self.robot.create_target_pose_list(res_pose, center_pose, arm_tag):
                    if plan([pose])["status"][0] == "Success":
                        return pose
            finally:
                del planner.IK
            return None

    def paused(name: str) -> Callable[..., Any]:
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            return None if self.describing else getattr(base, name)(self, *args, **kwargs)

        return method

    # stack_blocks_three, blocks_ranking_size and place_bread_basket play the whole episode to describe the scene
    for name in EXPERT_METHODS:
        setattr(Task, name, paused(name))
    Task.__name__ = Task.__qualname__ = camel(task)
    return Task
