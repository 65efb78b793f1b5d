"""The programs of docs/examples run, in small, and their page shows all of them."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

from opd_gym import OPD
from opd_gym.policies import body
from opd_gym.policies.body import read_checkpoint_config

EXAMPLES = Path(__file__).resolve().parent.parent / "docs" / "examples"
NOTEBOOK = EXAMPLES / "opd_gym_on_a_gpu.ipynb"
PAGE = EXAMPLES.parent / "examples.md"

pytestmark = pytest.mark.skipif(not EXAMPLES.is_dir(), reason="needs the source tree")


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run an example as a script in a folder of its own; returns what it prints."""

    def run(name: str, *arguments: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        monkeypatch.setattr(body, "_BODIES", dict(body._BODIES))
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_distil_cartpole(run):
    printed = run("distil_cartpole.py", "--teacher-steps", "64", "--student-steps", "8")
    assert re.findall(r"^(teacher|student before|student after) .* mean return +[\d.]+$", printed, re.MULTILINE) == [
        "teacher",
        "student before",
        "student after",
    ]
    teacher, *students = (int(n.replace(",", "")) for n in re.findall(r"([\d,]+) weights", printed))
    assert all(85 * student < teacher for student in students)
    assert OPD.load("small_cartpole").num_timesteps >= 8


def test_privileged_teacher(run):
    printed = run("privileged_teacher.py", "--teacher-steps", "64", "--student-steps", "8")
    assert re.findall(r"^student, which sees (\d) .*: [\d.]+$", printed, re.MULTILINE) == ["1", "4"]


def test_distil_libero(run):
    pytest.importorskip("libero", reason="LIBERO is not installed: pip install 'opd_gym[libero]'")
    printed = run("distil_libero.py", "--decisions", "8", "--n-steps", "4", "--episodes", "1", "--tasks", "3")
    assert len(re.findall(r"^(?:teacher|student before|student after): .*\(\d/1\)$", printed, re.MULTILINE)) == 3
    assert Path("before_after.gif").read_bytes()[:3] == b"GIF"
    assert read_checkpoint_config("libero_student")[0] == "tiny"


def test_own_vla(run):
    pytest.importorskip("libero", reason="LIBERO is not installed: pip install 'opd_gym[libero]'")
    printed = run("own_vla.py", "--decisions", "8", "--n-steps", "2")
    assert len(re.findall(r"updates: KL [\d.]+ a token, \d+ % as the teacher's$", printed, re.MULTILINE)) == 2
    assert read_checkpoint_config("own_vla/student")[0] == "your_vla"


def test_the_notebook_runs(tmp_path, monkeypatch):
    """All cells, in a kernel of their own."""
    pytest.importorskip("libero", reason="LIBERO is not installed: pip install 'opd_gym[libero]'")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed: pip install 'opd_gym[dev]'")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: pip install 'opd_gym[dev]'")
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)
    for name in ("DECISIONS", "EPISODES"):
        monkeypatch.setenv(name, "1")
    done = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in done.cells for output in cell.get("outputs", [])]
    shown = [kind for output in outputs for kind in output.get("data", {})]
    assert shown.count("image/png") == 1
    films = [output["data"]["text/html"] for output in outputs if "text/html" in output.get("data", {})]
    assert sum("data:video/mp4;base64," in film for film in films) == 2
    printed = "".join(output.get("text", "") for output in outputs)
    assert "student after:" in printed and re.search(r"Student openvla-oft-7b: 7,[\d,]{11} weights", printed)


def test_the_page_shows_every_example():
    shown = re.findall(r"```\{literalinclude\} examples/(\S+)", PAGE.read_text(encoding="utf-8"))
    assert sorted(shown) == sorted(path.name for path in EXAMPLES.glob("*.py"))
