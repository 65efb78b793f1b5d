"""LIBERO on the real simulator."""

import os
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.vec_env import DummyVecEnv

import opd_gym
from opd_gym.cli.train import default_episodes
from opd_gym.envs.libero import CLASSIC_SUITES, SUITES, LiberoEnv
from opd_gym.envs.registration import LIBERO_IDS, LIBERO_PLUS_IDS
from opd_gym.envs.wrappers import ActionChunk, ActionTokens

pytest.importorskip("libero", reason="LIBERO is not installed: pip install 'opd_gym[libero]'")

from opd_gym.envs.libero.physics import OscStepper  # noqa: E402
from opd_gym.envs.libero.simulator import NO_OP, Simulator, _global_seed  # noqa: E402
from opd_gym.envs.libero.suites import load_init_states, read_states, tasks  # noqa: E402


def actions(n, seed=0):
    """Pushes downwards into the scene, turns at every third step, and grasps."""
    rng = np.random.default_rng(seed)
    xyz = rng.uniform(-1, 1, (n, 3)) - [0.0, 0.0, 0.5]
    turn = rng.uniform(-0.3, 0.3, (n, 3)) * (np.arange(n) % 3 == 0)[:, None]
    return np.concatenate([xyz, turn, rng.choice([-1.0, 1.0], (n, 1))], axis=1).clip(-1, 1).astype(np.float32)


@pytest.fixture(scope="module")
def env():
    env = LiberoEnv("libero_object", task_ids=[0, 3], image_size=64, visuals="light", render_mode="rgb_array")
    yield env
    env.close()


def stock_env(suite, task_id, **kwargs):
    from libero.libero.envs import OffScreenRenderEnv

    return OffScreenRenderEnv(bddl_file_name=str(tasks(suite)[task_id].bddl_file), **kwargs)


def state(simulator):
    return np.concatenate([simulator.data.qpos, simulator.data.qvel])


@pytest.mark.parametrize(
    ("suite", "task_id", "init_state_id"),
    [("libero_object", 4, None), ("libero_object", 6, 13)],
)
def test_bit_identical_to_stock_libero(suite, task_id, init_state_id):
    """
    Placement, settling, control steps: robosuite's own env, newly built and hard-reset, against ours.

    Not on tasks with doors or knobs: there stock LIBERO draws once more at every reset than at the one before.
    """
    stock = stock_env(suite, task_id, camera_heights=64, camera_widths=64)
    ours = Simulator(tasks(suite)[task_id])
    with _global_seed(5):
        stock.reset()
    ours.reset(5, None if init_state_id is None else ours.init_states[init_state_id])
    if init_state_id is not None:
        stock.set_init_state(load_init_states(tasks(suite)[task_id])[init_state_id])
    for _ in range(10):
        obs, *_ = stock.step(NO_OP)
    for i, action in enumerate(actions(30)):
        obs, *_ = stock.step(action.astype(np.float64))
        ours.step(action)
        data = stock.env.sim.data
        assert np.array_equal(state(ours), np.concatenate([data.qpos, data.qvel])), f"differs at step {i}"
    if init_state_id is not None:
        # set_init_state shifts robosuite's sampling of observations: from then on they show the step's state one
        # simulation step (2 ms) before its end, where ours show its end. The physics above is the same.
        np.testing.assert_allclose(ours.proprio()[:3], obs["robot0_eef_pos"], atol=2e-3)
        ours.close()
        stock.close()
        return
    np.testing.assert_array_equal(ours.proprio()[:3], obs["robot0_eef_pos"].astype(np.float32))
    np.testing.assert_array_equal(ours.proprio()[3:7], obs["robot0_eef_quat"].astype(np.float32))
    picture = ours.render(("agentview", "robot0_eye_in_hand"), 64)
    # robosuite's first row is the lowest, ours the highest; nothing is mirrored.
    np.testing.assert_array_equal(picture[0], obs["agentview_image"][::-1])
    np.testing.assert_array_equal(picture[1], obs["robot0_eye_in_hand_image"][::-1])
    ours.close()
    stock.close()


def episode(env, seed, options=None, n=20):
    obs, info = env.reset(seed=seed, options=options)
    trace = [obs["agentview"], obs["proprio"], state(env.simulator)]
    for action in actions(n):
        obs, *_ = env.step(action)
        trace += [obs["proprio"], state(env.simulator)]
    return [*trace, obs["agentview"], obs["wrist"]], info


@pytest.mark.parametrize("options", [{"task_id": 3}, {"task_id": 3, "init_state_id": 11}])
def test_tenth_episode_equals_the_first_in_a_fresh_simulator(env, options):
    for seed in range(9):
        episode(env, seed, n=12)
    tenth, info = episode(env, 42, options)
    fresh_env = LiberoEnv("libero_object", task_ids=[0, 3], image_size=64, visuals="light")
    first, fresh_info = episode(fresh_env, 42, options)
    fresh_env.close()
    assert info == fresh_info
    for a, b in zip(tenth, first, strict=True):
        np.testing.assert_array_equal(a, b)


def test_light_visuals_leave_physics_alone_and_pictures_alike(env):
    light, _ = episode(env, 1, {"task_id": 0})
    exact_env = LiberoEnv("libero_object", task_ids=[0, 3], image_size=64)
    exact, _ = episode(exact_env, 1, {"task_id": 0})
    for a, b in zip(light[1:-2], exact[1:-2], strict=True):
        np.testing.assert_array_equal(a, b)
    for i in (0, -2, -1):
        difference = np.abs(light[i].astype(float) - exact[i]).mean()
        assert 0.0 < difference < 12.0, "pictures should be alike, and not the very same"
    exact_env.close()


def test_sampled_training_states_are_not_the_official_evaluation_states(env, monkeypatch):
    # Official states are stored before anything has settled, so settling is left out on both sides.
    monkeypatch.setattr("opd_gym.envs.libero.simulator.N_SETTLE", 0)
    _, info = env.reset(seed=0, options={"task_id": 0})
    assert info["init_state_id"] == -1
    official = env.simulator.init_states
    nq = env.simulator.model.nq
    sampled = []
    for seed in range(5):
        env.reset(seed=seed, options={"task_id": 0})
        sampled.append(env.simulator.data.qpos.copy())
    env.reset(options={"task_id": 0, "init_state_id": 7})

    def distance(qpos):
        return np.abs(qpos[..., None, 9:] - official[:, 10 : 1 + nq]).max(-1)

    assert distance(env.simulator.data.qpos).argmin() == 7 and distance(env.simulator.data.qpos).min() == 0.0
    assert distance(np.array(sampled)).min() > 1e-3
    assert np.abs(np.diff(np.array(sampled), axis=0)).max(axis=1).min() > 1e-3, "seeds must differ in their states"


def test_evaluation_states_and_explicit_ids():
    env = LiberoEnv("libero_object", task_ids=[2], image_size=8, visuals="light", init_states=[4, 9], cameras=())
    seen = {env.reset(seed=s)[1]["init_state_id"] for s in range(12)}
    assert seen == {4, 9}
    assert env.reset(options={"init_state_id": 30})[1]["init_state_id"] == 30
    with pytest.raises(ValueError, match="0 to 49"):
        env.reset(options={"init_state_id": 50})
    env.close()


def test_more_episodes_than_official_states_are_refused_before_the_first():
    vec = opd_gym.make_vec("LiberoObject-v0", env_kwargs={"task_ids": [0, 3]})
    assert len(default_episodes(vec, 100)) == 100
    with pytest.raises(ValueError, match="101 episodes are 51 a task, and there are 50 .* Ask for at most 100, or for"):
        default_episodes(vec, 101)
    with pytest.raises(ValueError, match="Unknown task id -1: 'libero_object' has the tasks 0 to 9"):
        default_episodes(vec, 10, [-1])
    vec.close()


def test_observation_info_and_truncation():
    env = gym.make("opd_gym:LiberoObjectTask1-v0", image_size=32, visuals="light", horizon=5, cameras=("wrist",))
    obs, info = env.reset(seed=0)
    assert set(obs) == {"wrist", "proprio", "instruction"} and obs["wrist"].shape == (32, 32, 3)
    assert bytes(obs["instruction"]).rstrip(b"\0").decode() == info["instruction"]
    assert info["instruction"] == "pick up the cream cheese and place it in the basket"
    for step in range(5):
        _, reward, terminated, truncated, info = env.step(np.zeros(7, dtype=np.float32))
        assert (reward, terminated, truncated) == (0.0, False, step == 4) and info["is_success"] is False
    with pytest.raises(RuntimeError, match="reset"):
        env.unwrapped.step(np.zeros(7))
    env.close()


def test_every_task_may_have_a_horizon_of_its_own():
    env = LiberoEnv("libero_object", [1, 3], image_size=32, visuals="light", horizon=[9, 2, 9, 3, 9, 9, 9, 9, 9, 9])
    for options, horizon in (({"task_id": 3}, 3), ({"task_id": 1}, 2), ({"task_id": 1, "horizon": 4}, 4)):
        env.reset(seed=0, options=options)
        assert [env.step(np.zeros(7))[3] for _ in range(horizon)] == [False] * (horizon - 1) + [True]
    env.close()


def test_upright_and_not_mirrored(env):
    """The basket stands on the right of the agent's view, the floor fills its lower part, the gripper is above."""
    env.reset(seed=0, options={"task_id": 0})
    simulator = env.simulator
    big = simulator.render(("agentview",), 128)[0].astype(float)
    name = next(n for n in simulator.domain.obj_of_interest if "basket" in n)
    body = simulator.domain.obj_body_id[name]
    basket_y = simulator.data.xpos[body][1]
    # From the camera in front of the robot, looking back at it, the world's +y lies to the right.
    assert basket_y > 0.1
    right, left = big[40:90, 84:124].std(), big[40:90, 4:44].std()
    assert right > left, "the woven basket should be on the right"
    assert env.render().shape == (256, 256, 3)


def test_pictures_are_drawn_once_a_chunk(env, monkeypatch):
    drawn = []
    original = Simulator.render
    monkeypatch.setattr(Simulator, "render", lambda self, *args: drawn.append(1) or original(self, *args))
    chunked = ActionTokens(ActionChunk(env, 8))
    chunked.reset(seed=0)
    drawn.clear()
    obs, *_ = chunked.step(np.full(56, 127))
    assert len(drawn) == 1
    np.testing.assert_array_equal(obs["agentview"], env.current_observation()["agentview"])


def test_expert_label_leaves_no_trace(env):
    def run(label):
        obs, _ = env.reset(seed=3, options={"task_id": 0})
        out = []
        for action in actions(6, seed=1):
            if label:
                assert env.expert_chunk(8).shape == (8, 7)
            obs, *_ = env.step(action)
            out.append((state(env.simulator), obs["agentview"]))
        return out

    for (a, picture_a), (b, picture_b) in zip(run(False), run(True), strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(picture_a, picture_b)


def test_the_users_random_state_is_left_alone(env):
    np.random.seed(3)
    expected = np.random.rand(2)
    np.random.seed(3)
    first = np.random.rand()
    env.reset(seed=0)
    assert [first, np.random.rand()] == expected.tolist()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"suite": "libero_nothing"}, "Unknown LIBERO suite"),
        ({"suite": "libero_object", "task_ids": [10]}, "0 to 9"),
        ({"suite": "libero_object", "task_ids": []}, "task_ids"),
        ({"suite": "libero_object", "init_states": "test"}, "init_states"),
        ({"suite": "libero_object", "visuals": "nice"}, "visuals"),
        ({"suite": "libero_object", "render_mode": "human"}, "rgb_array"),
        ({"suite": "libero_object", "horizon": 0}, "horizon must be at least 1, got 0"),
        ({"suite": "libero_object", "horizon": [100] * 9 + [0]}, "horizon must be at least 1, got 0"),
        ({"suite": "libero_object", "horizon": [100] * 9}, "'libero_object' has 10 tasks, got 9 numbers"),
        ({"suite": "libero_object", "image_size": (240, 320)}, "pictures are square.*trained in another env"),
    ],
)
def test_bad_arguments_are_refused_at_construction(kwargs, message):
    with pytest.raises(ValueError, match=message):
        LiberoEnv(**kwargs)


def test_bad_calls_are_refused(env):
    env.reset(seed=0)
    with pytest.raises(ValueError, match="NaN"):
        env.step(np.full(7, np.nan))
    with pytest.raises(ValueError, match=r"\(7,\)"):
        env.step(np.zeros(4))
    with pytest.raises(ValueError, match="task_id, init_state_id and horizon"):
        env.reset(options={"task": 3})
    with pytest.raises(ValueError, match="The option horizon must be at least 1, got -3"):
        env.reset(options={"horizon": -3})
    with pytest.raises(ValueError, match="Unknown task id 12"):
        env.reset(options={"task_id": 12})
    with pytest.raises(ValueError, match="Unknown camera 'side'"):
        env.simulator.render(("side",), 16)


def test_every_suite_and_task_has_an_id():
    assert set(LIBERO_IDS) <= set(gym.registry)
    assert {"LiberoObject-v0", "LiberoSpatial-v0", "LiberoGoal-v0", "Libero10-v0", "Libero90-v0"} <= set(LIBERO_IDS)
    assert len(LIBERO_IDS) == len(SUITES) + 40 + len(LIBERO_PLUS_IDS) and "LiberoObjectWithMug-v0" in LIBERO_IDS
    for suite in CLASSIC_SUITES:
        assert len(tasks(suite)) == 10 and load_init_states(tasks(suite)[0]).shape[0] == 50
    with pytest.raises(ValueError, match="does not ship"):
        tasks("libero_object_env")


def test_subprocess_workers_repeat_their_episodes():
    kwargs = {"task_ids": [0], "image_size": 16, "visuals": "light"}
    traces = []
    for _ in range(2):
        vec = opd_gym.make_vec("LiberoObject-v0", n_envs=2, seed=4, env_kwargs=kwargs)
        first = vec.reset()
        rng = np.random.default_rng(0)
        for _ in range(2):
            obs, _, _, infos = vec.step(rng.integers(0, 256, (2, 56)))
        traces.append((first["agentview"], obs["agentview"], obs["proprio"]))
        assert [info["n_executed_tokens"] for info in infos] == [56, 56]
        vec.close()
    for a, b in zip(*traces, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(traces[0][2][0], traces[0][2][1]), "workers must not play the same episode"


def test_leaves_no_traceback_and_no_files(tmp_path):
    script = (
        "import os, sys\n"
        "def look(event, args):\n"
        "    if event == 'open' and 'robosuite.log' in str(args[0]):\n"
        "        os.write(2, b'a log file')\n"
        "sys.addaudithook(look)\n"
        "import opd_gym, gymnasium as gym\n"
        "env = gym.make('LiberoObjectTask0-v0', image_size=16, visuals='light')\n"
        "env.reset(seed=0); env.step(env.action_space.sample())\n"
    )
    home = tmp_path / "home"
    home.mkdir()
    variables = {**os.environ, "HOME": str(home), "OPD_GYM_CACHE": str(tmp_path / "cache"), "TMPDIR": str(tmp_path)}
    variables.pop("XDG_CACHE_HOME", None)
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=variables,
        stdin=subprocess.DEVNULL,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "" and result.stderr == ""
    assert (tmp_path / "cache" / "models").is_dir()
    # Mesa and matplotlib keep their own caches in the user's cache folder; nothing else is written.
    assert not any(p for p in home.rglob("*") if p.is_file() and not {".cache", ".config"} & set(p.parts))


def test_asking_for_experts_leaves_the_running_episode_alone():
    env = LiberoEnv("libero_object", task_ids=[0, 1, 2], image_size=8, visuals="light", cameras=(), max_simulators=1)
    env.reset(seed=0, options={"task_id": 1})
    assert env.has_expert
    env.step(np.zeros(7))
    assert env.instruction
    env.close()
    with pytest.raises(RuntimeError, match="reset"):
        env.instruction  # noqa: B018


def test_a_state_beyond_all_bounds_starts_anew_as_in_stock_mujoco(env):
    env.reset(seed=0)
    env.simulator.data.qpos[9] = 1e11
    env.step(np.zeros(7))
    assert np.abs(env.simulator.data.qpos).max() < 10


def test_stepper_refuses_other_controllers(env):
    env.reset(seed=0)

    class Domain:
        robots = [type("Robot", (), {"controller": object()})()]

    with pytest.raises(ValueError, match="OSC_POSE"):
        OscStepper(Domain())


def test_missing_libero_says_what_to_install(monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "libero" else real(name, *rest)
    )
    with pytest.raises(ImportError, match=r"libero.*pip install 'opd_gym\[libero\]'"):
        gym.make("LiberoObject-v0")


def test_missing_gl_says_what_to_install():
    script = "import gymnasium as gym, opd_gym; gym.make('LiberoObjectTask0-v0').reset()"
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        # No such library is there, whatever the machine has for EGL.
        env={**os.environ, "MUJOCO_GL": "osmesa", "PYOPENGL_PLATFORM": "osmesa"},
        timeout=300,
    )
    if result.returncode == 0:
        pytest.skip("OSMesa is installed here, so nothing is missing")
    assert "RuntimeError: MuJoCo cannot render with MUJOCO_GL='osmesa'" in result.stderr
    assert "apt-get install" in result.stderr


@pytest.mark.parametrize(
    ("variables", "mend"),
    [
        ({"MUJOCO_EGL_DEVICE_ID": "99"}, "unset MUJOCO_EGL_DEVICE_ID"),
        ({"MUJOCO_EGL_DEVICE_ID": "GPU-0"}, "unset MUJOCO_EGL_DEVICE_ID"),
        ({"MUJOCO_EGL_DEVICE_ID": ""}, "unset MUJOCO_EGL_DEVICE_ID"),
        ({"PYOPENGL_PLATFORM": "glx"}, "unset PYOPENGL_PLATFORM"),
        ({"MUJOCO_GL": "elg"}, "export MUJOCO_GL=egl"),
    ],
)
def test_a_wrong_variable_of_gl_is_named(variables, mend):
    """Nothing has to be installed: the last line says which variable to correct."""
    script = (
        "from opd_gym.envs.libero.runtime import import_libero; import_libero()\n"
        "from opd_gym.envs.libero.rendering import _gl_context; _gl_context()"
    )
    environment = {**os.environ, "MUJOCO_GL": "egl", **variables}
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=300)
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("RuntimeError: MuJoCo cannot render") and mend in last and "apt-get" not in last


def test_device_numbers_of_egl_are_not_those_of_cuda():
    script = (
        "import os; from opd_gym.envs.libero.runtime import import_libero; import_libero()\n"
        "from opd_gym.envs.libero.rendering import _gl_context; _gl_context()\n"
        "print(os.environ['MUJOCO_EGL_DEVICE_ID'])"
    )
    environment = {**os.environ, "MUJOCO_GL": "egl", "CUDA_VISIBLE_DEVICES": "1", "MUJOCO_EGL_DEVICE_ID": "0"}
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=300)
    assert run.stdout == "0\n", run.stderr


FORK = """
import os, sys
import gymnasium as gym
import opd_gym
from opd_gym.envs.libero import rendering

kwargs = dict(visuals="light", image_size=16)
env = gym.make("LiberoObjectTask0-v0", **kwargs)
env.reset()
vector = gym.make_vec("LiberoObjectTask0-v0", 2, "async", vector_kwargs={"context": "fork"}, **kwargs)
try:
    vector.reset()
except RuntimeError as error:
    print("refused" if "fork" in str(error) and "{'context': 'spawn'}" in str(error) else error)
vector.close(terminate=True)
sys.stdout.flush()
pid = os.fork()
if pid == 0:
    # What it has inherited is not drawn with, and not freed
    try:
        env.reset()
    except RuntimeError:
        print("refused", rendering.gl_renderer(), flush=True)
    env.close()
    sys.exit(5)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), env.reset()[0]["wrist"].shape)
"""


def test_a_process_that_was_forked_after_drawing_says_so():
    environment = {**os.environ, "MUJOCO_GL": "egl"}
    run = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, env=environment, timeout=300)
    assert run.stdout.splitlines() == ["refused", "refused None", "5 (16, 16, 3)"], run.stderr


@pytest.mark.parametrize("module", ["numpy._core.multiarray", "numpy.core.multiarray"])
def test_original_liberos_initial_states_load(tmp_path, module):
    """torch.save of an array, by NumPy 2 and by NumPy 1, as the original LIBERO's .pruned_init files."""
    import io
    import zipfile

    import torch

    states = np.random.default_rng(0).normal(size=(3, 5))
    buffer = io.BytesIO()
    torch.save(states, buffer)
    path = tmp_path / "task.pruned_init"
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            raw = source.read(name)
            if name.endswith("data.pkl"):
                assert b"numpy._core.multiarray" in raw
                raw = raw.replace(b"numpy._core.multiarray", module.encode())
            target.writestr(name, raw)
    np.testing.assert_array_equal(read_states(path), states)


def test_sft_of_an_id_starts_no_simulator():
    model = opd_gym.SFT("VLAPolicy", "LiberoObject-v0", device="cpu")
    envs = model.env.unwrapped
    assert isinstance(envs, DummyVecEnv) and envs.num_envs == 1
    assert not envs.envs[0].unwrapped._simulators
    assert model.action_space.nvec.tolist() == [256] * 56
    model.env.close()
