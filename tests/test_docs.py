"""The documentation: the site builds, its links lead somewhere, and its Python blocks are programs that run."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import stable_baselines3
from stable_baselines3.common.vec_env import VecEnv

from opd_gym.algorithms.common import PolicyAlgorithm
from opd_gym.demonstrations import Episode, write_demonstrations
from opd_gym.evaluation import EvaluationResult, mcnemar
from opd_gym.policies import body

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [
    path
    for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md", "docs/*.md")
    for path in sorted(ROOT.glob(name))
]
# Blocks that need what CI machines lack; more of them would be promises that nobody checks
MOST_NOT_RUN = 8

pytestmark = pytest.mark.skipif(not DOCS.is_dir(), reason="needs the source tree")


class Block(NamedTuple):
    where: str
    code: str
    line: int
    not_run: str | None

    @property
    def needs_libero(self) -> bool:
        return "Libero" in self.code


def blocks() -> Iterator[Block]:
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        for found in re.finditer(r"(?:<!-- not run: (.+) -->\n)?^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            line = text[: found.start(2)].count("\n")
            yield Block(f"{path.relative_to(ROOT)}:{line + 1}", found[2], line, found[1])


BLOCKS = list(blocks())


def plain(path: Path) -> str:
    """A page without its code."""
    return re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)


def anchors(path: Path) -> set[str]:
    """What a code host calls the headings of a page."""
    found = set()
    for heading in re.findall(r"^#+ +(.*)$", plain(path), re.MULTILINE):
        words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        found.add(re.sub(r"[^\w\- ]", "", words).strip().replace(" ", "-"))
    return found


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    """On a code host, where pages are plain Markdown."""
    for target in re.findall(r"\]\(([^)\s]+)\)", plain(path)):
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        assert file.exists(), f"{path.name} links to {target}"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{path.name} links to {target}; headings: {sorted(anchors(file))}"


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("sphinx", reason="Sphinx is not installed: pip install 'opd_gym[docs]'")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
    done = subprocess.run([*command, str(DOCS), str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {path.stem for path in DOCS.glob("*.md")} <= {path.stem for path in tmp_path.glob("*.html")}
    # Parameters from docstrings, with their types
    page = (tmp_path / "opd.html").read_text(encoding="utf-8")
    assert 'id="opd_gym.OPD.learn"' in page and re.search(r"teacher_interval.{0,40}\(.*?int", page)
    # Links to files that are no pages leave the site
    assert re.search(r'href="[^"]*/opd_gym/algorithms/opd\.py"', page)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Iterations of a few decisions, of the zoo's hyperparameters (in this process) and of teachers."""
    entry = PolicyAlgorithm._zoo_entry.__func__  # type: ignore[attr-defined]

    def shortened(cls: type[PolicyAlgorithm], env_id: str, policy: Any) -> dict[str, Any] | None:
        found = entry(cls, env_id, policy)
        if found is None:
            return None
        few = {"n_steps": 4, "gradient_steps": 2, "batch_size": 8} if cls.__name__ == "OPD" else {}
        return {**found, **few, "n_envs": 1}

    monkeypatch.setattr(PolicyAlgorithm, "_zoo_entry", classmethod(shortened))
    init = stable_baselines3.PPO.__init__

    def short_rollouts(self: stable_baselines3.PPO, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **{"n_steps": 64, **kwargs})

    monkeypatch.setattr(stable_baselines3.PPO, "__init__", short_rollouts)


def with_stand_ins(code: str, folder: Path) -> str:
    """Small ones of what a block downloads, or what a command recorded for it."""
    published = "HuggingFaceTB/SmolVLM-256M-Instruct"
    if published in code:
        # Late: it imports much of transformers
        import vlms

        code = code.replace(published, str(vlms.smolvlm(folder / "smolvlm")))
    if "runs/demos" in code:
        pictures = {name: np.zeros((3, 32, 32, 3), np.uint8) for name in ("agentview", "wrist")}
        episode = Episode({**pictures, "proprio": np.zeros((3, 9))}, np.zeros((3, 7)), instruction="pick up the milk")
        (folder / "runs" / "demos").mkdir(parents=True)
        write_demonstrations(folder / "runs" / "demos" / "milk_demo.hdf5", [episode])
    return code


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.where)
def test_python_blocks_run(block: Block, short: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if block.not_run or block.where == BLOCKS[0].where:
        compile(block.code, block.where, "exec")
        return  # test_main_job runs the first as it stands, with all that it costs
    code = re.sub(r"(\blearn\()\d[\d_]*", r"\g<1>8", with_stand_ins(block.code, tmp_path))
    # With the page's line numbers
    program = compile("\n" * block.line + code, str(ROOT / block.where.partition(":")[0]), "exec")
    if block.needs_libero:
        pytest.importorskip("libero", reason="LIBERO is not installed: pip install 'opd_gym[libero]'")
    if "lora" in block.code:
        pytest.importorskip("peft", reason="peft is not installed: pip install 'opd_gym[vla]'")
    monkeypatch.chdir(tmp_path)
    # What a program announces is gone with it
    monkeypatch.setattr(body, "_BODIES", dict(body._BODIES))
    registered = set(gym.registry)
    names: dict[str, Any] = {"__name__": "__main__"}
    try:
        exec(program, names)
    finally:
        for value in list(names.values()):
            env = getattr(value, "env", value)
            if isinstance(env, (gym.Env, VecEnv)):
                env.close()
        for name in set(gym.registry) - registered:
            del gym.registry[name]


def test_few_blocks_are_not_run() -> None:
    assert len(BLOCKS) > 20
    assert len([block for block in BLOCKS if block.not_run]) <= MOST_NOT_RUN


def intervals(text: str) -> set[tuple[float, ...]]:
    """Success and its 95 % interval: "41.6 % (37.4 to 46.0)", "| 41.6 % | 37.4 to 46.0 %" or "41.6 % [37.4, 46.0]"."""
    number = r"(\d+(?:\.\d+)?)"
    found = re.findall(rf"{number} %(?:\*\*)? (?:\(|\| |\[){number}(?: to |, ){number}", text)
    values = {tuple(map(float, numbers)) for numbers in found}
    return {(success, low, high) for success, low, high in values if low <= success <= high}


def test_intervals_are_those_of_results() -> None:
    """Success that is published with an interval is that of committed results, and not of older ones."""
    results = ROOT / "benchmarks" / "results"
    measured = {found for path in results.rglob("*.md") for found in intervals(path.read_text(encoding="utf-8"))}
    # Each seed of RoboTwin has a student and a teacher of its own
    for path in results.glob("robotwin_*/**/evaluation.json"):
        evaluation = EvaluationResult.load(path)
        measured.add(tuple(round(100 * share, 1) for share in (evaluation.success_rate, *evaluation.interval)))
    # But for what an example prints
    pages = [path for path in PAGES if path.name != "examples.md"]
    published = {(path.name, *found) for path in pages for found in intervals(plain(path))}
    assert len(published) > 100
    assert not {found for found in published if found[1:] not in measured}


@pytest.mark.parametrize("page", ["results.md", "grpo.md"])
def test_paired_tests_are_those_of_results(page: str) -> None:
    """A test that is published as "gained, lost, p" has the numbers of a committed table, and their p."""
    tables = [path.read_text(encoding="utf-8") for path in (ROOT / "benchmarks" / "results").rglob("*.md")]
    measured = {found for text in tables for found in re.findall(r"\| (\d+) \| (\d+) \| \d[\d.e-]* \|\n", text)}
    p_value = r"(\d\.\d+|\de-\d+|1)(?![\d.])"
    published = re.findall(rf"(?<![\d,.])(\d+), (\d+), {p_value}", plain(DOCS / page))
    assert len(published) > 5
    for gained, lost, p in published:
        assert (gained, lost) in measured
        exact = mcnemar(int(gained), int(lost))
        assert float(p) in {round(exact, 2), float(f"{exact:.1g}")}
