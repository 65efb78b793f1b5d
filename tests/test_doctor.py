"""``opd-gym doctor``, on this machine and on what can be wrong with one."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

from opd_gym.cli import doctor
from opd_gym.cli.main import main
from opd_gym.envs.libero import runtime
from opd_gym.envs.robotwin import runtime as robotwin

pytest.importorskip("libero", reason="LIBERO is not installed: pip install 'opd_gym[libero]'")

ROOT = Path(__file__).resolve().parent.parent


def diagnose(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, dict[str, str]]]:
    status = main(["doctor", "--json", *arguments])
    told = json.loads(capsys.readouterr().out)
    assert told["works"] == (status == 0)
    assert (status == 1) == any(check["status"] in ("wrong", "differs") for check in told["checks"])
    return status, {check.pop("name"): check for check in told["checks"]}


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"[\d.]+", text.partition("(")[0])]


def test_the_installed_libero_is_the_published_one(capsys: pytest.CaptureFixture[str]) -> None:
    """The three scenes in the real simulator; the numbers of stock LIBERO on MuJoCo 2.3.7 to 3.3.2."""
    _, found = diagnose(capsys)
    assert found["LIBERO"]["status"] == found["OpenGL"]["status"] == found["robosuite"]["status"] == "ok"
    agrees = "ok" if not runtime.mujoco_changes(runtime.mujoco_version()) else "differs"
    assert found["MuJoCo"]["status"] == agrees
    scenes = [found[scene.name] for scene in doctor.SCENES]
    assert [scene["status"] for scene in scenes] == [agrees] * 3, scenes
    if agrees == "ok":
        bowl, bottle, colour = (numbers(scene["found"]) for scene in scenes)
        assert bowl == pytest.approx([14.5], abs=0.2) and bottle == pytest.approx([0.509], abs=0.002)
        assert colour == pytest.approx([145, 139, 133], abs=6)


@pytest.mark.parametrize(
    ("measured", "same"),
    [
        (((14.5,), (0.509,), (140, 135, 129)), (True, True, True)),  # MuJoCo 2.3.7
        (((14.5,), (0.509,), (112, 103, 94)), (True, True, False)),  # 3.3.3
        (((37.2,), (1.054,), (112, 103, 94)), (False, False, False)),  # 3.4.0
        (((62.3,), (1.054,), (112, 103, 94)), (False, False, False)),  # 3.17.0
    ],
)
def test_scenes_tell_versions_of_mujoco_apart(
    measured: tuple[tuple[float, ...], ...], same: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "mujoco_version", lambda: "3.17.0")
    for scene, values, agrees in zip(doctor.SCENES, measured, same, strict=True):
        check = scene.compare(values)
        assert (check.status == "ok") == agrees
        assert check.mend == ("" if agrees else "pip install mujoco==3.3.2")


@pytest.fixture
def no_robotwin(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of something else: its simulator, which takes many seconds to start, is given up at once."""
    monkeypatch.setattr(doctor, "ROBOTWIN_SECONDS", 0.01)


def test_text_is_aligned_and_ends_with_a_verdict(
    no_robotwin: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "mujoco_version", lambda: "3.4.0")
    assert main(["doctor", "--no-self-check"]) == 1
    *rows, blank, verdict = capsys.readouterr().out.splitlines()
    assert blank == "" and re.search("need attention: .*MuJoCo", verdict)
    column = next(row for row in rows if " Python " in row).index("3.")
    for row in rows:
        assert row[column - 1] == " " and row[column] != " ", row
    at = next(i for i, row in enumerate(rows) if row.startswith("differs  MuJoCo"))
    assert "3.4.0" in rows[at] and rows[at + 1].split() == ["->", "pip", "install", "mujoco==3.3.2"]


def test_what_is_missing_is_named_with_its_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    absent = ("libero", "sapien")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in absent else real(name, *rest))
    status, found = diagnose(capsys)
    assert status == 1
    assert found["LIBERO"] == {"status": "wrong", "found": "not installed", "mend": "pip install 'opd_gym[libero]'"}
    # Optional: no reason to fail
    assert found["RoboTwin"]["status"] == "-" and "sapien" in found["RoboTwin"]["found"]
    assert found["RoboTwin"]["mend"] == "opd-gym robotwin install"
    assert found["self-check"]["found"] == "not run: LIBERO first"


def test_no_gl(no_robotwin: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("MUJOCO_GL", "PYOPENGL_PLATFORM"):
        monkeypatch.setenv(variable, "osmesa")
    status, found = diagnose(capsys)
    if found["OpenGL"]["status"] == "ok":
        pytest.skip("OSMesa is installed here, so nothing is missing")
    assert status == 1 and found["OpenGL"]["status"] == "wrong" and "MUJOCO_GL=osmesa" in found["OpenGL"]["found"]
    assert "apt-get install libegl1" in found["OpenGL"]["mend"]
    assert found["self-check"] == {"status": "-", "found": "not run: OpenGL first", "mend": ""}


def test_robotwin_that_does_not_start_is_no_reason_to_fail(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in robotwin.DRIVER_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(robotwin, "missing_modules", lambda: [])
    # Whether RoboTwin is installed or not, it cannot be imported in no time
    monkeypatch.setattr(doctor, "ROBOTWIN_SECONDS", 0.01)
    _, found = diagnose(capsys, "--no-self-check")
    assert found["RoboTwin"]["status"] == "-" and "no answer within 0 s" in found["RoboTwin"]["found"]
    assert found["RoboTwin"]["mend"] == "opd-gym robotwin install --force"
    monkeypatch.setenv("VK_ICD_FILENAMES", "/nowhere.json")
    _, found = diagnose(capsys, "--no-self-check")
    assert found["RoboTwin"]["mend"].startswith("unset VK_ICD_FILENAMES")
    assert found["Vulkan"]["found"] == "VK_ICD_FILENAMES=/nowhere.json"


@pytest.mark.skipif(not (ROOT / ".ci").is_dir(), reason="needs the source tree")
def test_the_command_for_gl_is_that_of_the_setup_script() -> None:
    assert f'GL_PACKAGES="{runtime.GL_PACKAGES}"' in (ROOT / ".ci" / "setup.sh").read_text()


def test_a_cache_that_cannot_be_written_and_a_stale_configuration(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("OPD_GYM_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setenv("LIBERO_CONFIG_PATH", str(tmp_path))
    (tmp_path / "config.yaml").write_text("bddl_files: /nowhere\ninit_states: /nowhere\n")
    status, found = diagnose(capsys)
    assert status == 1
    assert found["cache"]["status"] == "wrong" and found["cache"]["mend"].startswith("export OPD_GYM_CACHE=")
    assert found["LIBERO's configuration"]["status"] == "wrong"
    assert str(tmp_path / "config.yaml") in found["LIBERO's configuration"]["found"]
    assert found["LIBERO's configuration"]["mend"] == "unset LIBERO_CONFIG_PATH"
    assert found["self-check"]["found"] == "not run: cache, LIBERO's configuration first"


def test_a_check_that_crashes_hangs_or_fails_is_survived() -> None:
    crash = "import os, signal; print('before', flush=True); os.kill(os.getpid(), signal.SIGSEGV)"
    assert doctor._ask(crash, 60.0) == (["before"], "it crashes (SIGSEGV)")
    assert doctor._ask("import time; time.sleep(1000)", 1.0)[1] == "no answer within 1 s"
    assert doctor._ask("print(1); raise ValueError('why')", 60.0) == (["1"], "ValueError: why")


def test_scenes_that_break_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(code: str, timeout: float) -> tuple[list[str], str | None]:
        return ['{"scene": 0, "error": "TypeError: mj_fullM()"}', '{"scene": 1, "measured": [0.51]}'], "it crashes"

    monkeypatch.setattr(doctor, "_ask", ask)
    monkeypatch.setattr(runtime, "mujoco_version", lambda: "3.4.0")
    first, second, third = doctor._self_check()
    assert (first.status, first.found, first.mend) == ("wrong", "TypeError: mj_fullM()", "pip install mujoco==3.3.2")
    assert second.status == "ok" and (third.status, third.found) == ("wrong", "it crashes")
