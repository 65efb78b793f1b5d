"""Scripted experts: geometry without a simulator, behaviour in the real one."""

from __future__ import annotations

from math import pi
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from opd_gym.envs.libero.experts.articulated import axis_rotation
from opd_gym.envs.libero.experts.compose import InTurn, Stage
from opd_gym.envs.libero.experts.geometry import (
    Gripper,
    box_points,
    closing_axis,
    find_rim,
    grasp_height,
    hand_hits,
    overreach,
    plan_rim_grasp,
    plan_top_grasp,
    rotation_vector,
    wrap_half_turn,
    yaw_of_closing_axis,
    yaw_rotation,
)
from opd_gym.envs.libero.experts.pick_place import highest_on_way
from opd_gym.envs.libero.experts.servo import CLOSE, OPEN, Servo, Target

GRIPPER = Gripper()


def ring(radius: float, bottom: float, top: float, n: int = 120) -> np.ndarray:
    """Points on the wall of an open cylinder."""
    angles = np.linspace(0, 2 * pi, n, endpoint=False)
    heights = np.linspace(bottom, top, 12)
    return np.array([[radius * np.cos(a), radius * np.sin(a), h] for a in angles for h in heights])


# ---------------------------------------------------------------- geometry


def test_half_turn_and_closing_axis_agree() -> None:
    for angle in np.linspace(-6, 6, 49):
        folded = wrap_half_turn(angle)
        assert -pi / 2 <= folded < pi / 2
        assert np.isclose(abs(closing_axis(angle) @ closing_axis(folded)), 1.0)
        assert np.isclose(wrap_half_turn(yaw_of_closing_axis(closing_axis(angle)) - folded), 0.0, atol=1e-9)
    assert np.allclose(closing_axis(0.0), [0, 1])


@pytest.mark.parametrize("angle", [0.0, 1e-9, 0.3, 2.0, pi - 1e-4, pi])
def test_rotation_vector_inverts_axis_rotation(angle: float) -> None:
    axis = np.array([0.6, -0.48, 0.64])
    vector = rotation_vector(axis_rotation(axis, angle))
    assert np.allclose(
        axis_rotation(axis, angle),
        axis_rotation(axis, float(np.linalg.norm(vector)) * np.sign(vector @ axis or 1.0)),
        atol=1e-6,
    )
    assert np.isclose(np.linalg.norm(vector), angle, atol=1e-6)


def test_box_points_lie_on_the_surface_and_reach_the_corners() -> None:
    half = np.array([0.01, 0.02, 0.03])
    points = box_points(half)
    assert np.allclose(np.abs(points).max(axis=0), half)
    assert (np.isclose(np.abs(points), half).any(axis=1)).all()


def test_grasp_height() -> None:
    flat = grasp_height(0.0, 0.018, GRIPPER)
    assert GRIPPER.tip_below <= flat < 0.012, "flat things are gripped low, but the fingers do not rub on the table"
    assert grasp_height(0.0, 0.15, GRIPPER) == pytest.approx(0.15 - GRIPPER.depth), "tall ones as deep as the hand goes"


def test_box_that_fits_needs_no_rotation() -> None:
    points = box_points(np.array([0.04, 0.021, 0.009])) + [0.1, -0.2, 0.009]
    grasp = plan_top_grasp(points, 0.0, GRIPPER)
    assert grasp.yaw == 0.0
    assert np.allclose(grasp.position[:2], [0.1, -0.2], atol=1e-6)
    assert grasp.width == pytest.approx(0.042, abs=1e-6)


@pytest.mark.parametrize("yaw", [-1.2, -0.8, 0.9, 1.5])
def test_turned_box_is_gripped_across_its_narrow_side(yaw: float) -> None:
    points = box_points(np.array([0.06, 0.02, 0.02])) @ yaw_rotation(yaw).T
    grasp = plan_top_grasp(points, 0.0, GRIPPER)
    assert grasp.width < GRIPPER.stroke
    assert abs(wrap_half_turn(grasp.yaw - yaw)) < 0.5


def test_current_yaw_settles_ties() -> None:
    # A square box at 45 degrees can be turned to either way: the choice must not flip on the way.
    points = box_points(np.array([0.033, 0.033, 0.03])) @ yaw_rotation(pi / 4).T
    for current in (0.5, -0.5):
        assert np.sign(plan_top_grasp(points, current, GRIPPER).yaw) == np.sign(current)


def test_neighbour_shifts_the_grasp() -> None:
    points = box_points(np.array([0.04, 0.021, 0.009])) + [0.0, 0.0, 0.009]
    tall = box_points(np.array([0.02, 0.02, 0.07]), 0.012) + [0.052, -0.09, 0.07]
    free = plan_top_grasp(points, 0.0, GRIPPER)
    assert hand_hits(tall, free.position, free.yaw, GRIPPER) > 0
    moved = plan_top_grasp(points, 0.0, GRIPPER, tall)
    assert hand_hits(tall, moved.position, moved.yaw, GRIPPER) == 0
    assert hand_hits(np.empty((0, 3)), free.position, free.yaw, GRIPPER) == 0


def test_rim_of_a_bowl() -> None:
    bowl = np.concatenate([ring(0.05, 0.0, 0.05), ring(0.02, 0.0, 0.001)])
    rim = find_rim(bowl, 2, 1.0, GRIPPER)
    assert rim is not None
    centre = np.array([0.2, 0.1, 0.9])
    grasp = plan_rim_grasp(rim, centre, np.eye(3), 0.0, np.array([0.2, 0.0]), GRIPPER)
    assert np.isclose(np.linalg.norm(grasp.position[:2] - centre[:2]), 0.05, atol=1e-3)
    assert abs(grasp.yaw) < 1e-6 and grasp.position[1] < 0.1, "the near side, without turning"
    wall = box_points(np.array([0.02, 0.01, 0.1]), 0.01) + [0.2, 0.0, 0.95]
    other = plan_rim_grasp(rim, centre, np.eye(3), 0.0, np.array([0.2, 0.0]), GRIPPER, wall)
    assert hand_hits(wall, other.position, other.yaw, GRIPPER) == 0


def test_solid_narrow_and_flat_things_have_no_rim() -> None:
    assert find_rim(ring(0.02, 0.0, 0.05), 2, 1.0, GRIPPER) is None, "fits between the fingers"
    assert find_rim(ring(0.07, 0.0, 0.01), 2, 1.0, GRIPPER) is None, "a plate"
    assert find_rim(box_points(np.array([0.05, 0.05, 0.03])), 2, 1.0, GRIPPER) is None, "a box"


def test_overreach_grows_beyond_the_arm() -> None:
    shoulder = np.array([-0.66, 0.0, 1.245])
    assert overreach(np.array([-0.1, 0.0, 0.95]), shoulder, GRIPPER) == 0.0
    near, far = (overreach(np.array([x, 0.0, 0.95]), shoulder, GRIPPER) for x in (0.14, 0.18))
    assert 0.0 < near < far


def test_highest_on_way() -> None:
    wall = np.array([[0.5, 0.0, 0.3], [0.5, 0.5, 0.9]])
    assert highest_on_way(wall, np.zeros(2), np.array([1.0, 0.0]), 0.1) == 0.3
    assert highest_on_way(wall, np.zeros(2), np.array([0.2, 0.0]), 0.1) == -np.inf
    assert highest_on_way(np.empty((0, 3)), np.zeros(2), np.ones(2), 0.1) == -np.inf


# ---------------------------------------------------------------- servo


def scene_at(rotation: np.ndarray | None = None) -> Any:
    rest = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]])
    turn = np.eye(3) if rotation is None else rotation
    yaw = np.arctan2(turn[1, 0] - turn[0, 1], turn[0, 0] + turn[1, 1])
    return SimpleNamespace(eef=np.zeros(3), rest_rotation=rest, eef_rotation=turn @ rest, yaw=float(yaw))


def test_small_orientation_errors_give_exactly_zero_rotation() -> None:
    action = Servo()(scene_at(yaw_rotation(0.05)), Target(np.array([0.01, -1.0, 0.0]), OPEN, 0.0))
    assert action.dtype == np.float32 and action.shape == (7,)
    assert (action[3:6] == 0.0).all()
    assert action[0] == pytest.approx(0.4) and action[1] == -1.0 and action[6] == OPEN


def test_orientation_is_corrected_towards_the_target() -> None:
    servo = Servo()
    for rotation in (yaw_rotation(0.4), axis_rotation(np.array([1.0, 0.0, 0.0]), 0.3)):
        before = np.linalg.norm(servo.rotation_error(scene_at(rotation), 0.0))
        action = servo(scene_at(rotation), Target(np.zeros(3), CLOSE, 0.0))
        vector = 0.5 * action[3:6].astype(np.float64)
        size = float(np.linalg.norm(vector))
        after = servo.rotation_error(scene_at(axis_rotation(vector / size, size) @ rotation), 0.0)
        assert np.linalg.norm(after) < before - 0.2


def test_yaw_takes_the_nearer_of_two_equal_grips() -> None:
    servo = Servo()
    assert servo.rotation_error(scene_at(yaw_rotation(1.4)), -pi / 2)[2] == pytest.approx(pi / 2 - 1.4)
    assert servo.rotation_error(scene_at(yaw_rotation(2.0)), 0.9 - pi)[2] < 0, "never beyond the wrist's limit"


# ---------------------------------------------------------------- several skills


class Named:
    """A skill whose target tells it from others."""

    def __init__(self, x: float, at: bool = False) -> None:
        self.x, self.at = x, at

    def __call__(self, scene: Any) -> Target:
        return Target(np.array([self.x, 0.0, 0.0]), CLOSE)

    def leave(self, scene: Any) -> Target | None:
        return Target(np.array([self.x, 0.0, 1.0]), OPEN) if self.at else None


def test_first_thing_not_done_comes_next_once_the_gripper_is_clear_of_the_others() -> None:
    first, second = Named(1.0), Named(2.0)
    done = {first: False, second: False}
    stages = [Stage(first, lambda scene: done[first]), Stage(second, lambda scene: done[second])]
    expert = InTurn(stages)
    scene: Any = None
    assert expert(scene).position.tolist() == [1.0, 0.0, 0.0]
    done[first] = first.at = True
    assert expert(scene).position.tolist() == [1.0, 0.0, 1.0], "let go of the first"
    first.at = False
    assert expert(scene).position.tolist() == [2.0, 0.0, 0.0]
    done[first] = False
    assert expert(scene).position.tolist() == [1.0, 0.0, 0.0], "no memory: what came undone is done again"
    done.update({first: True, second: True})
    assert expert(scene).position.tolist() == [2.0, 0.0, 0.0]


# ---------------------------------------------------------------- the real simulator


def make_env(suite: str, task_id: int) -> Any:
    pytest.importorskip("libero.libero", reason="pip install opd-gym[libero]")
    from opd_gym.envs.libero import LiberoEnv

    return LiberoEnv(suite, task_ids=[task_id], cameras=())


def quantise(action: np.ndarray) -> np.ndarray:
    bins = np.linspace(-1, 1, 256)
    centres = (bins[1:] + bins[:-1]) / 2
    return centres[np.clip(np.digitize(action, bins) - 1, 0, 254)]


@pytest.mark.libero
@pytest.mark.parametrize(
    ("suite", "task_id"),
    [("libero_object", 2), ("libero_spatial", 2), ("libero_goal", 3), ("libero_10", 2), ("libero_10", 3)],
)
def test_expert_succeeds_with_tokens(suite: str, task_id: int) -> None:
    env = make_env(suite, task_id)
    env.reset(seed=3)
    success = truncated = False
    while not (success or truncated):
        action = env.expert_action()
        assert action.shape == (7,) and action.dtype == np.float32 and np.abs(action).max() <= 1.0
        _, _, success, truncated, _ = env.step(quantise(action))
    env.close()
    assert success


@pytest.mark.libero
def test_expert_is_a_function_of_the_state_and_recovers() -> None:
    from opd_gym.envs.libero.experts import make_expert

    env = make_env("libero_object", 6)
    env.reset(seed=5)
    simulator = env.simulator
    rng = np.random.default_rng(0)
    for _ in range(40):
        env.step(env.expert_action())
    middle = simulator.snapshot()
    expected = env.expert_action()
    qpos = simulator.data.qpos.copy()
    # Somebody else leads the arm astray ...
    for _ in range(25):
        env.step(np.append(rng.uniform(-1, 1, 6), rng.choice([-1.0, 1.0])))
    astray = env.expert_action()
    assert not np.array_equal(astray, expected)
    # ... a restored state has the same label, whatever happened in between, also from a new expert ...
    simulator.restore(middle)
    assert np.array_equal(env.expert_action(), expected)
    assert np.array_equal(make_expert(simulator.domain)(), expected)
    # ... asking does not change the state ...
    assert np.array_equal(simulator.data.qpos, qpos)
    # ... and the expert finishes from a state it would not have come to.
    for _ in range(25):
        env.step(np.append(rng.uniform(-1, 1, 6), rng.choice([-1.0, 1.0])))
    success = truncated = False
    while not (success or truncated):
        _, _, success, truncated, _ = env.step(env.expert_action())
    env.close()
    assert success


@pytest.mark.libero
def test_tasks_without_an_expert_are_named(tmp_path: Any) -> None:
    pytest.importorskip("libero.libero", reason="pip install opd-gym[libero]")
    from opd_gym.cli.demos import record_demonstrations
    from opd_gym.envs.libero import LiberoEnv

    env = LiberoEnv("libero_10", task_ids=[5, 7], cameras=(), visuals="light")
    with pytest.raises(ValueError, match=r"tasks 5 \(pick up the book .*task_ids=\[7\]"):
        env.has_expert  # noqa: B018
    env.close()
    with pytest.raises(ValueError, match=r"tasks 5 \(pick up the book"):
        record_demonstrations("Libero10-v0", tmp_path, 1, task_ids=[5])


@pytest.mark.libero
def test_recording_goes_on_where_it_was(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("libero.libero", reason="pip install opd-gym[libero]")
    from opd_gym.cli.demos import record_demonstrations
    from opd_gym.demonstrations import read_demonstrations, read_lerobot
    from opd_gym.envs.libero.experts import record

    recorded = []
    original = record.record_episode

    def note(env: Any, seed: int, task_id: int, *rest: Any) -> Any:
        recorded.append(task_id)
        return original(env, seed, task_id, *rest)

    monkeypatch.setattr(record, "record_episode", note)
    kwargs: dict[str, Any] = dict(stride=16, image_size=16, progress=False)
    (first,) = record_demonstrations("LiberoObject-v0", tmp_path, task_ids=[0], **kwargs)
    before = first.read_bytes()
    files = record_demonstrations("LiberoObject-v0", tmp_path, task_ids=[0, 1], **kwargs)
    assert recorded == [0, 1] and files[0] == first and first.read_bytes() == before and files[1].is_file()
    # What was recorded with other arguments, or by somebody else, is not replaced, and nothing before it recorded
    files[1].write_bytes(files[1].read_bytes()[:5000])
    for task_ids, other in (([2, 1], kwargs), ([0], {**kwargs, "seed": 1})):
        with pytest.raises(FileExistsError, match="_demo.hdf5: there already, and not what this command records"):
            record_demonstrations("LiberoObject-v0", tmp_path, task_ids=task_ids, **other)
    assert recorded == [0, 1] and first.read_bytes() == before
    # A data set of LeRobot's is recorded as a whole, with every step
    kwargs |= {"stride": 1, "format": "lerobot"}
    with pytest.raises(FileExistsError, match="not empty"):
        record_demonstrations("LiberoObject-v0", tmp_path, task_ids=[0], **kwargs)
    (folder,) = record_demonstrations("LiberoObject-v0", tmp_path / "lerobot", task_ids=[0], **kwargs)
    assert record_demonstrations("LiberoObject-v0", folder, task_ids=[0], **kwargs) == [folder]
    assert recorded == [0, 1, 0]
    (episode,) = read_lerobot(folder)
    (stored,) = read_demonstrations(files[0])
    assert episode.instruction == stored.instruction and len(episode.actions) > 50
    with pytest.raises(FileExistsError, match="not empty"):
        record_demonstrations("LiberoObject-v0", folder, task_ids=[0], **{**kwargs, "seed": 1})


@pytest.mark.libero
def test_recording_a_policy(tmp_path: Any) -> None:
    """With the pictures and the chunks that it was trained with; its labels are what it decides in these states."""
    pytest.importorskip("libero.libero", reason="pip install opd-gym[libero]")
    from opd_gym import make_vec
    from opd_gym.cli.demos import record_demonstrations
    from opd_gym.demonstrations import read_demonstrations
    from opd_gym.instructions import encode_instruction
    from opd_gym.policies.loading import load_policy

    name = "libero-object-teacher"
    with pytest.raises(FileNotFoundError, match="no-such-policy"):
        record_demonstrations("LiberoObject-v0", tmp_path, checkpoint="no-such-policy")
    (path,) = record_demonstrations(
        "LiberoObject-v0", tmp_path, task_ids=[1], stride=8, checkpoint=name, progress=False
    )
    (episode,) = read_demonstrations(path)
    env = make_vec("LiberoObject-v0", env_kwargs={"image_size": 64, "visuals": "light"})
    policy = load_policy(name, env.observation_space, env.action_space, trainable=False)
    obs = dict(episode.observations)
    obs["instruction"] = np.stack([encode_instruction(episode.instruction, 128)] * len(episode.actions))
    tokens = policy.predict(obs, deterministic=True)[0]
    decided = env.envs[0].get_wrapper_attr("decode")(tokens)
    env.close()
    assert episode.action_chunks.shape == decided.shape == (len(tokens), 8, 7) and len(tokens) > 5
    # The last chunk is cut short by success
    np.testing.assert_allclose(episode.action_chunks[:-1], decided[:-1], atol=1e-6)


def test_unknown_goal_is_refused() -> None:
    from opd_gym.envs.libero.experts import make_expert, supports

    domain = SimpleNamespace(
        parsed_problem={"goal_state": [["juggle", "milk_1"]]}, objects_dict={}, fixtures_dict={}, object_sites_dict={}
    )
    assert not supports(domain)
    with pytest.raises(NotImplementedError, match="no scripted expert"):
        make_expert(domain)
