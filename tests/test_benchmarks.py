"""The scripts of benchmarks/ that measure the environments, on the real simulator: short, but as they are published."""

from __future__ import annotations

import json
import math
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from opd_gym.demonstrations import Episode, write_demonstrations
from opd_gym.evaluation import EvaluationResult
from opd_gym.versions import versions

pytest.importorskip("libero", reason="LIBERO is not installed: pip install 'opd_gym[libero]'")

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import count_demonstrations  # noqa: E402
import gpu  # noqa: E402
import gymnasium_envs  # noqa: E402
import lerobot_env  # noqa: E402
import libero_throughput  # noqa: E402
import light_visuals  # noqa: E402
import scaling  # noqa: E402
import short_runs  # noqa: E402

pytestmark = pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="needs the source tree")


def cells(markdown: str, label: str) -> list[list[str]]:
    """The cells of a table's rows that begin with a label."""
    rows = [line.strip("| ").split(" | ") for line in markdown.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows if row[0].strip() == label]


def test_throughput_measures_ours_and_the_floor(tmp_path, capsys):
    missing = ["--lerobot-python", sys.executable]
    modes = ["--modes", "light", "lerobot", "floor_light"]
    libero_throughput.main(["--quick", "--image-size", "32", "--output", str(tmp_path), *modes, *missing])
    result = json.loads((tmp_path / "results.json").read_text())
    assert result["versions"] == versions()
    assert result["not_installed"] == ["lerobot"] and "lerobot is not installed" in capsys.readouterr().out
    kinds = [(r["mode"], r["processes"], r["cold"]) for r in result["records"]]
    assert kinds == [
        ("light", 1, True),
        ("light", 1, False),
        ("light", 2, False),
        ("floor_light", 1, False),
        ("floor_light", 2, False),
    ]
    assert [r.get("error") for r in result["records"]] == [None] * 5
    cold, one, two = result["records"][:3]
    assert cold["reset_s"] == [] and cold["startup_s"] > 0 and cold["first_decision_s"] > 0
    assert len(one["reset_s"]) == len(one["step_s"]) == 1
    # Both worked: 16 random actions move the hand, and those of two workers differ.
    positions = np.array(two["positions"])
    assert positions.shape == (1, 2, 3) and np.abs(positions[:, 0] - positions[:, 1]).max() > 1e-3
    assert len(two["memory"]["workers"]) == 2 and len(one["memory"]["workers"]) == 0
    text = (tmp_path / "results.md").read_text()
    speed = cells(text, "opd_gym, light")
    steps = 2 * libero_throughput.CHUNK
    assert [row[1] for row in speed[:2]] == ["1", "2"]
    assert speed[0][2] == f"{steps / one['step_s'][0]:,.1f}" and speed[1][2] == f"{2 * steps / two['step_s'][0]:,.1f}"
    assert "not installed" in cells(text, "LeRobot")[0]
    # Results are published: nothing of the machine but what it is.
    assert str(Path.home()) + "/" not in json.dumps(result) and str(ROOT) not in json.dumps(result)


def test_all_the_envs_of_a_comparison_get_the_same_work():
    values = dict(suite="libero_object", task_ids=(3,), bddl_file="", states="", image_size=8, episodes=1, decisions=4)
    plans = [
        libero_throughput.Plan(mode=mode, processes=2, seed=0, cold=False, repeat=repeat, **values)
        for mode, repeat in (("stock", 0), ("light", 1))
    ]
    first, again = (plan.actions(0) for plan in plans)
    assert first.shape == (4, 8, 2, 7) and first.dtype == np.float32 and np.abs(first).max() <= 1.0
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, plans[0].actions(1))


def test_a_failed_process_is_reported_and_not_hidden(tmp_path):
    tasks = libero_throughput.prepare("libero_object", [0], tmp_path)
    args = libero_throughput.parse_args(["--quick", "--processes", "1", "--tasks", "0"])
    _, plan = next(libero_throughput.schedule(args, tasks, ["torchrl"]))
    record = libero_throughput.run(plan, sys.executable, tmp_path, tmp_path / "cache")
    assert record["error"].startswith("ModuleNotFoundError") and "torchrl" in record["error"]
    text = libero_throughput.throughput_table([record], ["torchrl"], [1], [])
    assert "failed: ModuleNotFoundError" in text


@pytest.mark.parametrize("arguments", [["--repeats", "0"], ["--processes", "0"], ["--modes", "fast"]])
def test_throughput_refuses_bad_arguments(arguments):
    with pytest.raises(SystemExit):
        libero_throughput.parse_args(arguments)


def test_ratios_are_taken_within_a_repetition():
    """A machine that is twice as slow in the second repetition changes the speeds and not the ratio."""

    def record(mode, repeat, seconds):
        return {
            **{"mode": mode, "repeat": repeat, "task_ids": [0], "cold": False, "processes": 1},
            **{"episodes": 1, "decisions": 1, "step_s": [seconds]},
        }

    records = [record("stock", 0, 4.0), record("light", 0, 1.0), record("stock", 1, 8.0), record("light", 1, 2.0)]
    assert libero_throughput.ratios(
        libero_throughput.select(records, "light", 1), libero_throughput.select(records, "stock", 1)
    ) == [4.0, 4.0]


def test_light_pictures_are_compared_in_the_same_states(tmp_path):
    light_visuals.main(
        ["--suites", "libero_object", "--task-ids", "0", "--states", "1", "--moments", "0", "3"]
        + ["--processes", "1", "--output", str(tmp_path)]
    )
    written = json.loads((tmp_path / "pictures.json").read_text())
    records = written["records"]
    assert written["versions"] == versions()
    assert len(records) == 2 * len(light_visuals.SIZES) * len(light_visuals.CAMERAS)
    assert {r["step"] for r in records} == {0, 3}
    # Alike, but not the same: a mode that was ignored would give 1.
    assert all(0.5 < r["ssim"] < 0.9999 and r["mse"] > 0 for r in records)
    assert (tmp_path / "worst.png").read_bytes().startswith(b"\x89PNG")
    row = cells((tmp_path / "pictures.md").read_text(), "libero_object")[0]
    agent = [r["ssim"] for r in records if r["camera"] == "agentview" and r["size"] == 128]
    assert row[1] == "agentview" and row[2:4] == [f"{np.mean(agent):.3f}", f"{min(agent):.3f}"]


def test_a_policy_is_compared_on_the_same_episodes(tmp_path):
    light_visuals.main(
        ["--policy", "libero-object-student", "--task-ids", "3", "--episodes", "1"]
        + ["--processes", "1", "--output", str(tmp_path)]
    )
    result = json.loads((tmp_path / "policy_libero-object-student.json").read_text())
    exact, light = (result[visuals]["episodes"] for visuals in ("exact", "light"))
    assert [(e["task_id"], e["init_state_id"]) for e in exact] == [(3, 0)]
    assert [(e["task_id"], e["init_state_id"]) for e in light] == [(3, 0)]
    paired = result["paired"]
    assert sum(paired[key] for key in ("both", "only_exact", "only_light", "neither")) == 1
    assert paired["difference"] == light[0]["success"] - exact[0]["success"]


def test_scores_of_pictures():
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    same = light_visuals.compare(picture, picture)
    assert same == {"ssim": pytest.approx(1.0), "mse": 0.0} and light_visuals.psnr(same["mse"]) == math.inf
    # Off by one everywhere: 20 log10(255) by definition.
    assert light_visuals.psnr(1.0) == pytest.approx(48.1308, abs=1e-4)
    assert light_visuals.compare(picture, 255 - picture)["ssim"] < 0.0


def test_bootstrap_of_paired_differences():
    difference = np.array([1.0] * 10 + [0.0] * 80 + [-1.0] * 10)
    low, high = light_visuals.bootstrap(difference, seed=0)
    # Standard error of a mean of 100 with variance 0.2: 0.0447.
    assert low == pytest.approx(-1.96 * 0.0447, abs=0.012) and high == pytest.approx(1.96 * 0.0447, abs=0.012)


def test_failed_episodes_count_among_what_demonstrations_cost(tmp_path):
    def episode(n: int, **attrs: int) -> Episode:
        return Episode({}, np.zeros((n, 7), np.float32), instruction="x", attrs={"task_id": 2, **attrs})

    recipe = {"env_name": "LiberoGoal-v0", "seed": 100, "stride": 8}
    # The task's seeds begin at 2100: three episodes failed before the second success
    kept = [episode(9, seed=2100, env_steps=66), episode(10, seed=2104, env_steps=75)]
    write_demonstrations(tmp_path / "a_demo.hdf5", kept, env_args=recipe)
    expected = {"episodes": 2, "decisions": 19, "env_steps": 141, "failed": 3, "env_steps_failed": 900}
    assert count_demonstrations.count(tmp_path / "a_demo.hdf5") == expected
    first = {"episodes": 1, "decisions": 9, "env_steps": 66, "failed": 0, "env_steps_failed": 0}
    assert count_demonstrations.count(tmp_path / "a_demo.hdf5", 1) == first
    write_demonstrations(tmp_path / "b_demo.hdf5", [episode(3, seed=2100)], env_args=recipe)
    assert count_demonstrations.count(tmp_path / "b_demo.hdf5")["env_steps"] == 24


def test_students_of_gymnasium_envs_beside_their_teacher(tmp_path, monkeypatch):
    short = gymnasium_envs.Recipe("Thrusters", "PPO", 64, kwargs=dict(n_steps=64))
    monkeypatch.setattr(gymnasium_envs, "RECIPES", [short])
    monkeypatch.setattr(gymnasium_envs, "N_TEACHER_EVALS", 1)
    arguments = ["--work", str(tmp_path / "work"), "--output", str(tmp_path), "--teachers", short.name]
    for more in ([], ["--set", "group_size=1"]):
        gymnasium_envs.main([*arguments, "--methods", "opd", "--seeds", "0", "--steps", "64", *more])
    record = json.loads((tmp_path / "Thrusters-PPO_opd_seed0.json").read_text())
    assert (record["env_steps"], record["updates"], len(record["returns"])) == (64, 16, 20)
    assert len(set(record["returns"])) == 20 and record["versions"] == versions()
    rows = cells((tmp_path / "results.md").read_text(), "Thrusters-PPO")
    assert [row[2] for row in rows] == ["OPD", "OPD, group_size=1"]
    mean = f"{np.mean(record['returns']):.1f}"
    assert rows[0][4:8] == [mean, "", "64", "16"]
    assert (tmp_path / "results.png").stat().st_size > 0
    assert "Welch" not in (tmp_path / "results.md").read_text()
    gymnasium_envs.main([*arguments, "--methods", "opd", "--seeds", "1", "--steps", "64"])
    gymnasium_envs.main([*arguments, "--methods", "opd", "--seeds", "1", "--steps", "64", "--set", "group_size=1"])
    (test,) = [row for row in cells((tmp_path / "results.md").read_text(), "Thrusters-PPO") if len(row) == 5]
    assert test[1] == "OPD, group_size=1" and 0.0 < float(test[4]) <= 1.0
    # The teacher of the next seeds, trained anew where its zip was lost, has to be the same
    teacher = json.loads((tmp_path / "Thrusters-PPO.json").read_text())
    teacher["returns"][0] += 1.0
    (tmp_path / "Thrusters-PPO.json").write_text(json.dumps(teacher))
    with pytest.raises(SystemExit, match="is not the teacher of .*Thrusters-PPO.json"):
        gymnasium_envs.main([*arguments, "--methods", "opd", "--seeds", "2", "--steps", "64"])
    assert not (tmp_path / "Thrusters-PPO_opd_seed2.json").exists()


def test_a_part_that_fails_on_a_gpu_machine_is_recorded_and_the_others_go_on(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    # Without the checkpoint that another part writes
    arguments = ["--device", "cpu", "--tiny", "--parts", "decoding", "checkpoint", "--output", str(tmp_path)]
    assert gpu.main(arguments) == 1
    parts = json.loads((tmp_path / "tiny_cpu.json").read_text())["parts"]
    assert "FileNotFoundError" in parts["decoding"]["error"] and str(ROOT) not in parts["decoding"]["error"]
    assert parts["checkpoint"]["small"]["parameters"] > 1e6 and "error" not in parts["checkpoint"]
    text = (tmp_path / "tiny_cpu.md").read_text()
    assert cells(text, "decoding")[0][2] == "**failed**" and cells(text, "checkpoint")[0][2] == "ran"
    assert "says nothing of a GPU" in text and "its numbers mean nothing" in text
    with pytest.raises(SystemExit, match="no GPU") if not gpu.th.cuda.is_available() else nullcontext():
        gpu.main(["--parts", "checkpoint", "--tiny", "--output", str(tmp_path)])


def test_steps_in_lerobot_are_compared_within_a_turn():
    """Ours take six times as many steps in half of the time; the second turn is slow for both."""
    records = [
        {"what": what, "repeat": repeat, "n_steps": n, "seconds": slow * seconds, "cpu_seconds": seconds}
        for repeat, slow in ((0, 1.0), (1, 3.0))
        for what, n, seconds in zip(lerobot_env.ENVS, (10, 10, 60, 60), (2.0, 2.0, 2.0, 1.0), strict=True)
    ]
    machine = libero_throughput.machine()
    text = lerobot_env.to_markdown({"machine": machine, "note": "", "size": 128, "records": records})
    rows = [row for row in cells(text, "opd_libero, light, every 10th drawn")]
    assert rows[0][1:] == ["60.0", "12.0", "40.0 (20.0 to 60.0)", "12.0"]


def test_scaling_is_taken_within_a_turn():
    """A machine that is twice as slow in the second turn changes the speeds and not the ratios."""
    common = {"kind": "no simulator", "decisions": 10}
    records = [
        {**common, "what": what, "repeat": repeat, "seconds": slow * seconds, "cpu_seconds": seconds}
        for repeat, slow in ((0, 1.0), (1, 2.0))
        for what, seconds in (("in this process", 1.0), ("2 workers", 0.625))
    ]
    assert scaling.ratios(records, "no simulator", "2 workers", "seconds") == [0.625, 0.625]
    learners = [
        {
            **{"kind": "learner", "what": what, "repeat": 0, "processes": n, "seconds": n + 3.0, "cpu_seconds": 2.0},
            **{f"{part}, {key}": 1.0 for part in ("update", "adding gradients") for key in ("seconds", "cpu_seconds")},
        }
        for n, what in ((1, "1 process"), (2, "2 processes"))
    ]
    labels = [{**record, "kind": "teacher"} for record in records]
    results = {"machine": libero_throughput.machine(), "note": "", "records": records + labels + learners, "trained": 7}
    text = scaling.to_markdown(results)
    rows = [row for row in cells(text, "no simulator") if row[1] == "2 workers"]
    assert [row[3] for row in rows] == ["1.60"]
    assert [row[3] for row in cells(text, "teacher")] == ["1.00", "1.60"]
    # Twice the work in five fourths of the time
    assert cells(text, "2 processes")[0][2] == "1.60"


def test_short_runs_write_what_was_played(tmp_path, capsys):
    short_runs.main("little", decisions=4, n_steps=2, episodes=1, output=tmp_path)
    result = EvaluationResult.load(tmp_path / "little.json")
    assert [episode.task_id for episode in result.episodes] == [0, 1]
    assert "little: 4 decisions, 40 gradient steps" in capsys.readouterr().out
