"""What a user installs, and the scripts that install it."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email import message_from_bytes
from importlib.metadata import distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import opd_gym

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("test", "quickstart", ".ci/run", ".ci/setup.sh")

pytestmark = pytest.mark.skipif(not (ROOT / "setup.cfg").is_file(), reason="needs the source tree")


def requirement_name(line: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[\s;<>=!~\[]", line.strip(), maxsplit=1)[0]).lower()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    # In a copy: a build in the source tree would leave files there.
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "opd_gym", source / "opd_gym", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("algorithms", "envs"):
        (source / name).symlink_to(f"opd_gym/{name}")
    # Whatever else lies in the tree stays out of the wheel.
    for name in ("tests", "benchmarks", "runs"):
        (source / name).mkdir()
        (source / name / "__init__.py").touch()
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-q", "-w", "dist"]
    subprocess.run(command, cwd=source, check=True)
    (path,) = (source / "dist").glob("*.whl")
    return zipfile.ZipFile(path)


def test_one_top_level_package(wheel: zipfile.ZipFile) -> None:
    top = {name.split("/")[0] for name in wheel.namelist()}
    assert top == {"opd_gym", f"opd_gym-{opd_gym.__version__}.dist-info"}


def test_everything_is_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    data = {".py", ".yml", ".json", ".safetensors", ".typed", ".npz"}
    wanted = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "opd_gym").rglob("*")
        if path.is_file() and (path.suffix in data or path.name == "py.typed")
    }
    assert {"opd_gym/py.typed", "opd_gym/zoo/checkpoints.yml", "opd_gym/zoo/hyperparams/opd.yml"} <= wanted
    assert wanted - names == set()
    assert sum(info.compress_size for info in wheel.infolist()) < 20e6


def test_metadata(wheel: zipfile.ZipFile) -> None:
    info = f"opd_gym-{opd_gym.__version__}.dist-info"
    metadata = message_from_bytes(wheel.read(f"{info}/METADATA"))
    assert metadata["Name"] == "opd-gym" and metadata["Version"] == opd_gym.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    assert "MIT" in str(metadata["License-Expression"] or metadata["License"])
    assert {"libero", "plots", "docs", "dev"} <= set(metadata.get_all("Provides-Extra") or [])
    assert "opd-gym = opd_gym.cli.main:main" in wheel.read(f"{info}/entry_points.txt").decode()


def test_every_dependency_was_tested_in_one_version() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    texts = [setup["options"]["install_requires"], *setup["options.extras_require"].values()]
    wanted = {requirement_name(line) for text in texts for line in text.splitlines() if re.match(r"\s*[A-Za-z]", line)}
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    pinned = {requirement_name(line) for line in lines}
    assert wanted - pinned == set()
    assert "torch==2.13.0" in lines
    # A local build (torch +cpu, +cu130) exists on some machines only, and so do files and addresses.
    assert [line for line in lines if "+" in line or "@" in line or "/" in line] == []


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_what_is_pinned_can_be_installed(python: str) -> None:
    """One Python runs the tests; what another needs in an older version has a line of its own."""
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pin = Requirement(line)
        installed = next(iter(distributions(name=pin.name)), None)
        if installed is None or not pin.specifier.contains(installed.version):
            continue
        wanted = installed.metadata["Requires-Python"]
        if wanted and (pin.marker is None or pin.marker.evaluate({"python_version": python})):
            assert f"{python}.20" in SpecifierSet(wanted), f"{line} wants Python {wanted}"


def test_no_file_names_a_package_index() -> None:
    files = [ROOT / name for name in ("setup.cfg", "pyproject.toml", "constraints.txt", *SCRIPTS)]
    files += [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    for path in files:
        found = re.findall(r"--(?:extra-)?index-url|--find-links|https?://(?:download\.|pypi\.)\S*", path.read_text())
        assert not found, f"{path.name}: {found}"


def test_a_release_says_one_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == opd_gym.__version__ and citation["license"] == "MIT"
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## \[(Unreleased|{re.escape(opd_gym.__version__)})\]", changelog, re.MULTILINE)
    # What publishes waits for what tests, and that for what builds
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8"))["jobs"]
    assert {name: job.get("needs") for name, job in jobs.items()} == {
        "build": None,
        "test": "build",
        "publish": "test",
    }


def test_links_of_the_top_level() -> None:
    for name in ("algorithms", "envs"):
        assert os.readlink(ROOT / name) == f"opd_gym/{name}"


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts(name: str) -> None:
    path = ROOT / name
    subprocess.run(["bash", "-n", str(path)], check=True)
    if not name.endswith(".sh"):
        assert os.access(path, os.X_OK), f"{name} cannot be executed"


def test_an_installed_environment_is_left_alone(tmp_path: Path) -> None:
    # The second call of ./test or ./quickstart: nothing is installed, whatever pip would say.
    for name in ("setup.cfg", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    binaries = tmp_path / ".venv" / "bin"
    binaries.mkdir(parents=True)
    log = tmp_path / "log"
    (binaries / "python").write_text(f'#!/bin/sh\necho "$@" >> {log}\n')
    (binaries / "python").chmod(0o755)
    script = f"cd {tmp_path}; . {ROOT}/.ci/setup.sh; make_venv; install libero,dev"
    subprocess.run(["bash", "-c", script], check=True, capture_output=True)
    first = log.read_text()
    assert "-e .[libero,dev] -c constraints.txt" in first
    subprocess.run(["bash", "-c", script], check=True, capture_output=True)
    assert "install" not in log.read_text()[len(first) :]
    # A changed list of versions is installed again.
    with (tmp_path / "constraints.txt").open("a") as file:
        file.write("# changed\n")
    subprocess.run(["bash", "-c", script], check=True, capture_output=True)
    assert "install" in log.read_text()[len(first) :]


def test_a_python_that_is_too_old_is_refused(tmp_path: Path) -> None:
    fake = tmp_path / "bin"
    fake.mkdir()
    for name in ("python3", "python3.10", "python3.11", "python3.12", "python3.13"):
        (fake / name).write_text("#!/bin/sh\n[ \"$1\" = --version ] && echo 'Python 3.8.1'\nexit 1\n")
        (fake / name).chmod(0o755)
    result = subprocess.run(
        ["bash", "-c", f". {ROOT}/.ci/setup.sh; find_python"],
        env={"PATH": f"{fake}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert "Python 3.10 to 3.13 is needed" in result.stderr and "3.8.1" in result.stderr
