"""opd-gym report: which runs belong together, numbers computed by hand, a page that needs nothing else."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from matplotlib.figure import Figure
from scipy.stats import binomtest, ttest_1samp

from opd_gym.cli.main import main
from opd_gym.cli.report.pictures import draw, draw_groups, draw_learning, styles
from opd_gym.cli.report.policies import Policy, t_interval, welch
from opd_gym.cli.report.reading import find_policies
from opd_gym.cli.report.tables import by_group, details, markdown, notes, over_seeds, overview, paired
from opd_gym.cli.runs import read_progress
from opd_gym.evaluation import EpisodeRecord, EvaluationResult, LostEpisode

ENV = "LiberoObject-v0"


def evaluation(*solved: int, n: int = 10) -> EvaluationResult:
    """So many of ``n`` episodes of each task."""
    return EvaluationResult(
        [
            EpisodeRecord(task, i, i < k, 50, float(i < k), seed=i, env_id=ENV)
            for task, k in enumerate(solved)
            for i in range(n)
        ]
    )


def run(folder: Path, algo: str, seed: int, success: list[float], result: EvaluationResult, **settings: object) -> Path:
    path = folder / algo / f"{ENV}_{seed + 1}"
    path.mkdir(parents=True)
    (path / "args.yml").write_text(yaml.safe_dump({"algo": algo, "env": ENV, "seed": seed}))
    (path / "config.yml").write_text(yaml.safe_dump({"policy_kwargs": {"checkpoint": f"student{seed}"}, **settings}))
    (path / "command.txt").write_text(f"opd-gym train --algo {algo} --seed {seed}")
    (path / "model.zip").write_text("large")
    rows = [(256 * i, 2000 * i, 60 * i, 40 * i, rate) for i, rate in enumerate(success, 1)]
    keys = ["time/total_timesteps", "time/env_steps", "time/time_elapsed", "train/n_updates", "rollout/success_rate"]
    with (path / "progress.csv").open("w", newline="") as file:
        csv.writer(file).writerows([keys, *rows])
    result.save(path / "evaluation.json")
    return path


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    for seed, solved in enumerate([(9, 7), (10, 8)]):
        run(folder, "opd", seed, [0.1, 0.5, 0.9], evaluation(*solved), divergence="reverse_kl")
        run(folder, "grpo", seed, [0.1, 0.1, 0.2], evaluation(2, 2))
    evaluation(10, 8).save(folder / "eval" / "teacher.json")
    return folder


def test_seeds_of_a_policy_belong_together(results):
    policies = {policy.label: policy for policy in find_policies([results], {})}
    assert list(policies["opd"].curves) == list(policies["opd"].results) == ["0", "1"]
    assert policies["opd"].env_id == ENV and len(policies["opd"].commands) == 2
    assert len(policies["grpo"].curves) == 2 and not policies["teacher"].curves


def test_runs_are_named_after_the_settings_that_tell_them_apart(results):
    run(results, "opd", 2, [0.3], evaluation(5, 5), divergence="jsd")
    labels = [policy.label for policy in find_policies([results], {})]
    assert sorted(labels) == ["grpo", "opd", "opd (divergence=jsd)", "teacher"]
    # As many with the one as with the other
    run(results, "opd", 3, [0.3], evaluation(5, 5), divergence="jsd")
    labels = {policy.label for policy in find_policies([results], {})}
    assert labels == {"grpo", "opd (divergence=reverse_kl)", "opd (divergence=jsd)", "teacher"}
    named = find_policies([results], {"eval/*": "the teacher", f"opd/{ENV}_3/*": "third"})
    assert [policy.label for policy in named][:2] == ["the teacher", "third"]


def test_numbers(results):
    policies = {policy.label: policy for policy in find_policies([results], {})}
    opd, teacher = policies["opd"], policies["teacher"]
    rate, low, high = opd.score()
    assert rate == pytest.approx(0.85)
    # Seeds at 0.8 and 0.9: 12.706 standard errors of 0.05 to each side, as far as there is success
    assert (low, high) == pytest.approx((0.85 - 12.7062 * 0.05, 1.0), abs=1e-4)
    assert teacher.score() == (0.9, *teacher.results["0"].interval)
    assert opd.last("time/env_steps") == 6000
    assert opd.reached(0.5, "time/env_steps") == {"0": 4000, "1": 4000}
    assert policies["grpo"].reached(0.5, "time/env_steps") == {"0": None, "1": None}
    assert teacher.reached(0.5, "time/env_steps") == {}  # it does not play while it trains
    row = details(list(policies.values()), teacher)[list(policies).index("opd") + 1]
    assert row == ["opd", "85.0 %", "21.5 to 100.0 %", "80.0 %, 90.0 %", "40", "6,000", "120", "3", "6,000, 6,000"]
    assert ["opd against teacher", "0", "0", "2", "0.500"] in paired([opd, teacher], teacher)
    assert overview([opd])[1] == ["opd", "85.0 % [21.5, 100.0] \N{MULTIPLICATION SIGN}2"]


def test_groups_of_tasks(results):
    policies = find_policies([results], {})
    assert by_group(policies, {"seen": [0], "unseen": [1]}) == [
        ["tasks", "seen", "unseen"],
        ["grpo", "20.0 % [8.1, 41.6]", "20.0 % [8.1, 41.6]"],
        ["opd", "95.0 % [31.5, 100.0]", "75.0 % [11.5, 100.0]"],
        ["teacher", "100.0 % [72.2, 100.0]", "80.0 % [49.0, 94.3]"],
    ]
    assert len(by_group(policies, {})) == 1
    opd, teacher = policies[1], policies[2]
    assert paired([opd, teacher], teacher, {"seen": [0], "unseen": [1], "other": [7]})[1:4] == [
        ["opd against teacher", "0", "0", "2", "0.500"],
        ["opd against teacher, seen", "0", "0", "1", "1.000"],
        ["opd against teacher, unseen", "0", "0", "1", "1.000"],
    ]
    # Of a policy that was evaluated in a part of a group there is no number beside the others'
    part = Policy("part", ENV, results={"0": evaluation(9)})
    assert by_group([*policies, part], {"both": [0, 1], "first": [0], "other": [7]})[-1] == [
        *("part", "", "90.0 % [59.6, 98.2]", "")
    ]


def test_two_groups_of_tasks_are_drawn_against_each_other(results):
    policies = find_policies([results], {})
    axis = draw_groups(policies, {"seen": [0], "unseen": [1]}).axes[0]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("success in tasks seen (%)", "success in tasks unseen (%)")
    points = {bar.get_label(): bar.lines[0].get_xydata()[0].tolist() for bar in axis.containers}
    assert points == {"grpo": [20.0, 20.0], "opd": [95.0, 75.0], "teacher": [100.0, 80.0]}
    dots = [line.get_xydata().tolist() for line in axis.lines if line.get_marker() == "."]
    assert dots == [[[20.0, 20.0], [20.0, 20.0]], [[90.0, 70.0], [100.0, 80.0]]]
    assert draw_groups(policies, {"seen": [0]}) is None
    assert draw_groups(policies, {"seen": [0], "other": [7]}) is None


def test_an_evaluation_of_several_envs_is_one_of_each(tmp_path):
    both = evaluation(5).episodes + [
        replace(episode, env_id="LiberoObjectSwap-v0") for episode in evaluation(2).episodes
    ]
    EvaluationResult(both).save(tmp_path / "student.json")
    found = find_policies([tmp_path], {})
    assert [(p.env_id, p.score()[0]) for p in found] == [(ENV, 0.5), ("LiberoObjectSwap-v0", 0.2)]


def test_the_wider_interval_counts():
    def interval(*solved):
        return Policy("opd", ENV, results={str(seed): evaluation(k, n=100) for seed, k in enumerate(solved)}).score()[
            1:
        ]

    assert interval(10, 90) == (0.0, 1.0)
    assert interval(0, 0) == pytest.approx((0.0, 0.0188), abs=1e-4)


def test_a_seed_is_as_good_in_one_task_as_in_another():
    """One training has all tasks, so ten of them make nothing surer than one."""
    seeds = {str(seed): evaluation(*[k] * 10, n=50) for seed, k in enumerate((15, 25, 35))}
    rate, low, high = Policy("opd", ENV, results=seeds).score()
    # 4.303 standard errors, of 0.2 / sqrt(3)
    assert (rate, low, high) == pytest.approx((0.5, 0.5 - 4.3027 * 0.11547, 0.5 + 4.3027 * 0.11547), abs=1e-4)


def test_intervals_are_those_of_scipy():
    for k, n in ((0, 7), (3, 10), (10, 10), (499, 500)):
        low, high = binomtest(k, n).proportion_ci(method="wilson")
        assert Policy("x", ENV, results={"0": evaluation(k, n=n)}).score() == pytest.approx(
            (k / n, low, high), abs=1e-4
        )
    scores = np.random.default_rng(0).normal(size=50).tolist()
    known = ttest_1samp(scores, 0.0).confidence_interval(0.95)
    assert t_interval(scores) == pytest.approx((known.low, known.high))
    assert np.isnan(t_interval(scores[:1])).all()


def test_training_is_measured_once_its_window_is_full():
    """The first episodes to end are those that succeed."""
    rows = [(4, 0.9), (20, 0.3), (99, 0.8), (120, 0.5), (150, 0.72)]
    curve = [{"time/env_steps": 10.0 * n, "time/episodes": float(n), "rollout/success_rate": rate} for n, rate in rows]
    policy = Policy("opd", ENV, curves={"0": curve})
    assert policy.reached(0.9 * 0.8, "time/env_steps") == {"0": 1500.0}  # 0.9 * 0.8 is more than 0.72, for a computer
    figure = draw([policy], "time/env_steps")
    assert figure is not None and figure.axes[0].lines[0].get_xdata()[0] == pytest.approx(0.2)
    # Of a run that has not ended it cannot be said that it never gets there
    teacher = Policy("teacher", ENV, results={"0": evaluation(10)})
    assert details([policy, teacher], teacher)[1][-1] == "never"
    policy.unfinished.add("0")
    assert [row[-1] for row in details([policy, teacher], teacher)[1:]] == ["not yet", ""]


def test_costs_are_those_of_the_seeds_that_are_shown():
    curves = {seed: [{"time/env_steps": n / 2}, {"time/env_steps": n}] for seed, n in (("0", 9000.0), ("1", 2000.0))}
    policy = Policy("opd", ENV, curves=curves, results={"0": evaluation(9)}, unfinished={"1"})
    assert policy.last("time/env_steps") == 9000
    assert Policy("opd", ENV, curves=curves).last("time/env_steps") == 5500


def test_seeds_are_paired_with_their_own():
    def policy(label, **seeds):
        return Policy(label, ENV, results={seed[1:]: evaluation(k) for seed, k in seeds.items()})

    two = policy("teacher", s1=9, s2=5)
    rows = paired([policy("opd", s0=5, s1=5, s2=5)], two)[1:]
    assert [row[1:] for row in rows] == [
        ["0", "there is no seed 0 of teacher", "", ""],
        ["1", "0", "4", "0.125"],
        ["2", "0", "0", "1.000"],
    ]


def test_episodes_that_one_has_lost_are_in_no_pair():
    whole, part = evaluation(9, 5), evaluation(7, 5)
    part.lost.append(LostEpisode(0, 0, 0, "killed", ENV))
    part.episodes.pop(0)
    policies = [Policy("a", ENV, results={"0": part}), Policy("b", ENV, results={"0": whole})]
    assert paired(policies, policies[1], {"one": [0], "two": [1]})[1:] == [
        ["a against b", "0", "0", "2", "0.500"],
        ["a against b, one", "0", "0", "2", "0.500"],
        ["a against b, two", "0", "0", "0", "1.000"],
    ]


def test_what_was_evaluated_in_other_tasks_is_told():
    whole, one = (Policy(name, ENV, results={"0": evaluation(*k)}) for name, k in (("all", (5, 5)), ("one", (5,))))
    assert notes([whole, replace(whole, label="more"), one]) == [
        f"one was evaluated in other tasks of {ENV} than most: 0."
    ]


def test_seeds_of_different_tasks_have_no_mean():
    def score(second, lost=()):
        return Policy("opd", ENV, results={"0": evaluation(9, 7), "1": replace(second, lost=list(lost))}).score()

    with pytest.raises(
        ValueError, match=r"different tasks of LiberoObject-v0 \(seed 0: \[0, 1\]; seed 1: \[0, 1, 2\]\)"
    ):
        score(evaluation(9, 7, 2))
    with pytest.raises(ValueError, match="different tasks"):
        score(evaluation(9))
    # Unless it lost all episodes of one: 16 of 20 and 7 of 10
    assert score(evaluation(7), [LostEpisode(1, 0, 0, "killed")])[0] == pytest.approx(0.75)
    with pytest.raises(ValueError, match="different tasks"):
        score(evaluation(7), [LostEpisode(0, 0, 0, "killed")])
    nothing_said = [replace(episode, success=None) for episode in evaluation(9, 7).episodes]
    with pytest.raises(ValueError, match="seed 1 does not say"):
        score(EvaluationResult(nothing_said))


def test_what_is_given_twice_counts_once(results):
    once = find_policies([results], {})
    twice = find_policies([results, results / "opd", results / "eval" / "teacher.json", results], {})
    assert [policy.score() for policy in once] == [policy.score() for policy in twice]
    assert not any(policy.notes for policy in twice)


def test_equal_names_in_different_folders_are_different_policies(tmp_path):
    for folder, k in (("before", 2), ("after", 8)):
        for seed in (0, 1):
            evaluation(k).save(tmp_path / folder / f"student_seed{seed}.json")
    found = {policy.label: policy.score()[0] for policy in find_policies([tmp_path], {})}
    assert found == {"before/student": 0.2, "after/student": 0.8}
    # They are no seeds of one either where the numbers of their seeds differ
    (tmp_path / "before" / "student_seed1.json").unlink()
    (tmp_path / "after" / "student_seed0.json").unlink()
    assert {policy.label for policy in find_policies([tmp_path], {})} == set(found)
    assert found == {p.label: p.score()[0] for p in find_policies([tmp_path / "before", tmp_path / "after"], {})}


def test_a_label_that_other_runs_have_for_a_name_is_told(tmp_path):
    run(tmp_path / "a", "opd", 0, [0.1, 0.5], evaluation(5))
    run(tmp_path / "b", "grpo", 1, [0.1, 0.5], evaluation(7))
    policies = find_policies([tmp_path], {"b/*": "opd"})
    assert [policy.label for policy in policies] == ["opd"]
    assert policies[0].notes[1:] == [f"without a label this is the name of a/opd/{ENV}_1/ too, which counts here."]
    assert not any(policy.notes for policy in find_policies([tmp_path], {"b/*": "GRPO"}))


def test_a_label_for_more_than_seeds_is_told(tmp_path):
    for seed, divergence in enumerate(("jsd", "reverse_kl")):
        run(tmp_path, "opd", seed, [0.1, 0.5], evaluation(5), divergence=divergence, learning_rate=0.1 + seed)
    (policy,) = find_policies([tmp_path], {"*": "OPD"})
    assert policy.notes == ["its seeds differ in divergence, learning_rate."]
    run(tmp_path, "grpo", 2, [0.1, 0.5], evaluation(7))
    (policy,) = find_policies([tmp_path], {"*": "OPD"})
    assert policy.notes == ["its seeds are of different algorithms: grpo, opd."]


def test_a_seed_that_was_not_evaluated_is_told(results, capsys):
    (results / "opd" / f"{ENV}_2" / "evaluation.json").unlink()
    (opd,) = (policy for policy in find_policies([results], {}) if policy.label == "opd")
    assert opd.notes == [
        f"seed 1 (opd/{ENV}_2/) has no evaluation.json: its training counts, but not its success and costs."
    ]
    # Where none was, nothing is shown of the others either
    (results / "opd" / f"{ENV}_1" / "evaluation.json").unlink()
    assert not any(policy.notes for policy in find_policies([results], {}))
    # What cannot be told from a run that never began is not left out in silence
    (results / "opd" / f"{ENV}_1" / "config.yml").unlink()
    assert len(next(policy for policy in find_policies([results], {}) if policy.label == "opd").curves) == 1
    assert capsys.readouterr().err == f"opd/{ENV}_1/ is left out: its config.yml is missing.\n"


def test_labels_are_of_paths_as_they_are_given_too(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for folder, k in (("lr[1e-4]", 2), ("lr[1e-3]", 8)):
        run(Path(folder), "opd", 0, [0.1, 0.5], evaluation(k))
    labels = {"lr[1e-4]/*": "small", "lr[1e-3]/*": "large"}
    for folders in ([Path()], [Path("lr[1e-4]"), Path("lr[1e-3]")], [Path("lr[1e-4]/opd"), Path("lr[1e-3]"), Path()]):
        found = {policy.label: policy.score()[0] for policy in find_policies(folders, labels)}
        assert found == {"small": 0.2, "large": 0.8}
    # And where nothing is at such a path, what is
    (both,) = find_policies([Path("lr[1e-4]"), Path("lr[1e-3]")], {"lr/*": "x"})
    assert f"there is lr[1e-3]/opd/{ENV}_1/, lr[1e-4]/opd/{ENV}_1/." in capsys.readouterr().err
    assert both.notes[0].startswith(f"seed 0 is there more than once, in lr[1e-3]/opd/{ENV}_1/ too")


def test_success_of_a_short_window_is_not_that_of_others(results):
    path = results / "opd" / f"{ENV}_1" / "config.yml"
    path.write_text(f"{path.read_text()}stats_window_size: 10\n")
    (opd,) = (policy for policy in find_policies([results], {"opd/*": "opd"}) if policy.label == "opd")
    assert opd.notes[0] == f"success of seed 0 (opd/{ENV}_1/) in training is of its last 10 episodes."
    reached = opd.reached(0.5, "time/env_steps")
    assert math.isnan(reached["0"]) and reached["1"] == 4000


def test_what_pictures_and_groups_lack_is_told_once(results, capsys):
    page(
        results,
        "--tasks",
        "none=77",
        "-l",
        "opd/*=\N{CJK UNIFIED IDEOGRAPH-6A5F}",
        "--pictures",
        results.parent / "png",
    )
    told = capsys.readouterr().err
    assert "--tasks none: nobody was evaluated in one of these tasks." in told
    assert told.count("\N{CJK UNIFIED IDEOGRAPH-6A5F}") == 1 and "UserWarning" not in told


def test_lost_episodes_are_of_the_env_of_the_others(tmp_path):
    result = evaluation(5)
    result.lost.append(LostEpisode(0, 77, None, "killed"))
    result.save(tmp_path / "a.json")
    (policy,) = find_policies([tmp_path], {})
    assert len(policy.results["0"].lost) == 1
    alone = Policy("b", ENV, results={"0": EvaluationResult([], lost=result.lost)})
    assert overview([alone])[1] == ["b", "all episodes were lost"]


def test_a_seed_that_is_there_twice_and_a_run_that_is_not_finished_are_told(tmp_path, capsys):
    run(tmp_path, "opd", 0, [0.1, 0.5], evaluation(5), n_timesteps=512)
    again = run(tmp_path, "opd", 1, [0.1], evaluation(7), n_timesteps=512)
    (again / "args.yml").write_text(yaml.safe_dump({"algo": "opd", "env": ENV, "seed": 0}))
    assert main(["report", str(tmp_path), "-o", str(tmp_path / "page.html"), "--markdown", str(tmp_path / "t.md")]) == 0
    for text in (capsys.readouterr().out, *(path.read_text() for path in (tmp_path / "page.html", tmp_path / "t.md"))):
        assert f"opd: seed 0 is there more than once, in opd/{ENV}_2/ too" in text
        assert f"seed 0 (opd/{ENV}_2/) has 256 of its 512 timesteps" in text


def test_what_an_evaluation_of_a_run_has_of_other_envs_is_apart(results):
    other = [replace(episode, env_id="LiberoGoal-v0") for episode in evaluation(1, 1).episodes]
    path = results / "opd" / f"{ENV}_1" / "evaluation.json"
    own = [replace(episode, env_id=None) for episode in evaluation(9, 7).episodes]
    # A lost episode is known by its env too
    lost = [LostEpisode(0, 0, 0, "killed")]
    EvaluationResult(own[1:] + other, lost=lost).save(path)
    found = {(policy.label, policy.env_id): policy for policy in find_policies([results], {})}
    opd, teacher = found["opd", ENV], found["teacher", ENV]
    assert len(opd.results["0"].episodes) == 19 and found["opd", "LiberoGoal-v0"].score()[0] == 0.1
    assert [row[1] for row in paired([opd, teacher], teacher)[1:]] == ["0", "1"]


def test_settings_of_a_teacher_tell_runs_apart_and_its_name_does_not(results):
    for seed, settings in ((2, {"teacher_interval": 4}), (3, {"teacher": "x", "teacher_kwargs": {"device": "cuda"}})):
        run(results, "opd", seed, [0.3], evaluation(5, 5), divergence="reverse_kl", **settings)
    found = {policy.label: list(policy.results) for policy in find_policies([results], {})}
    assert found["opd"] == ["0", "1", "3"] and found["opd (teacher_interval=4)"] == ["2"]


def test_a_row_that_is_cut_off_has_other_numbers(results):
    path = results / "opd" / f"{ENV}_1" / "progress.csv"
    whole = path.read_text()
    path.write_text(whole[:-4])  # 6000,180,120,0.9 -> 6000,180,120
    assert read_progress(path.parent)[-1]["time/total_timesteps"] == 512


def test_an_evaluation_that_was_not_greedy_is_named(results):
    sampled = evaluation(5)
    sampled.temperature = 0.05
    sampled.save(results / "eval" / "student_seed1.json")
    (student,) = (policy for policy in find_policies([results], {}) if policy.label == "student")
    assert student.notes[-1] == (
        "seed 1 (eval/student_seed1.json) was evaluated with actions sampled at temperature 0.05."
    )


def test_a_damaged_evaluation_is_not_left_out(results):
    path = results / "eval" / "student_seed1.json"
    evaluation(5).save(path)
    (results / "eval" / "settings.json").write_text("{,")  # nobody's evaluation
    path.write_text(path.read_text()[:-99])
    with pytest.raises(ValueError, match=f"{path} is not the result.*damaged"):
        find_policies([results], {})


def test_kept_copies(results, tmp_path, capsys):
    (tmp_path / "a").mkdir()
    for name in ("a/x.json", "x.json"):
        evaluation(5).save(tmp_path / name)
    words = ["report", "-o", str(tmp_path / "page.html"), "--keep", str(tmp_path / "kept")]
    # A file is kept as folders are, and what two arguments name once
    assert main([*words, str(tmp_path / "x.json"), str(results), str(results / "opd")]) == 0
    assert (tmp_path / "kept" / "x.json").is_file() and not (tmp_path / "kept" / f"{ENV}_1").exists()
    kept = sorted((tmp_path / "kept").rglob("*"))
    capsys.readouterr()
    assert main([*words, str(tmp_path / "x.json"), str(tmp_path / "a")]) == 2
    assert "would both be" in capsys.readouterr().err
    assert sorted((tmp_path / "kept").rglob("*")) == kept


def test_page(results, tmp_path, capsys, monkeypatch):
    (results / "opd.gif").write_bytes(b"GIF89a")
    (results / "run").mkdir()
    # Not of what was trained on
    for file in ("meta/info.json", "videos/observation.images.image/file-000.mp4"):
        (results / "demos" / file).parent.mkdir(parents=True)
        (results / "demos" / file).write_text("{}")
    for name in ("after.gif", "after.mp4"):  # the same film
        (results / "run" / name).write_bytes(b"a film")
    monkeypatch.chdir(tmp_path)
    command = results / "opd" / f"{ENV}_1" / "command.txt"
    command.write_text(f"opd-gym train --student {tmp_path}/runs/student")
    page, table = tmp_path / "page.html", tmp_path / "results.md"
    words = ["report", str(results), "-o", str(page), "--title", "A <b>", "--reference", "teacher"]
    words += ["--markdown", str(table), "--pictures", str(tmp_path / "png"), "--keep", str(tmp_path / "kept")]
    assert main(words) == 0
    text = page.read_text(encoding="utf-8")
    assert "A &lt;b&gt;" in text and text.count("<svg") == 3 and "data:image/gif;base64,R0lGODlh" in text
    assert re.findall("<figcaption>(.+?)</figcaption>", text)[-2:] == ["opd", "run/after"]
    assert text.count("data:video/mp4") == 1 == text.count("data:image/gif")
    # Nothing is loaded from elsewhere
    assert not re.search(r"(src|href)=\"(?!data:|#)", re.sub(r"<svg.*?</svg>", "", text, flags=re.DOTALL))
    assert "| opd | 85.0 % |" in table.read_text(encoding="utf-8")
    assert (tmp_path / "png" / f"{ENV}.png").read_bytes().startswith(b"\x89PNG")
    # What is kept is enough for the same page, and holds no weights
    assert not list((tmp_path / "kept").rglob("*.zip"))
    # And nothing of where it was run
    kept = tmp_path / "kept" / command.relative_to(results)
    assert kept.read_text(encoding="utf-8") == "opd-gym train --student runs/student"
    assert main([*words[:1], str(tmp_path / "kept"), "-o", str(tmp_path / "again.html"), "--reference", "teacher"]) == 0
    again = (tmp_path / "again.html").read_text(encoding="utf-8")
    assert "21.5 to 100.0 %" in again and "data:image/gif" in again


def ends(figure: Figure | None) -> list[tuple[tuple[float, ...], ...]]:
    """First and last point of each line that has a name."""
    assert figure is not None
    points = [np.asarray(line.get_xydata()) for line in figure.axes[0].lines if str(line.get_label())[0] != "_"]
    return [(tuple(line[0].tolist()), tuple(line[-1].tolist())) for line in points]


def test_what_came_before_moves_the_curves_and_learning_is_drawn_where_it_was_written(results, tmp_path, capsys):
    path = results / "opd" / f"{ENV}_1" / "progress.csv"
    header, *rows = path.read_text().splitlines()
    path.write_text("\n".join([f"{header},train/entropy", f"{rows[0]},", f"{rows[1]},3.0", f"{rows[2]},2.0", ""]))
    page = tmp_path / "page.html"
    words = ["report", str(results), "-o", str(page), "--pictures", str(tmp_path), "--before", f"opd@{ENV}=90000,30"]
    assert main([*words, "--before", "sft=1,1"]) == 0
    assert "--before sft: nothing is called that; there is grpo, grpo@" in capsys.readouterr().err
    # Success over env steps, gradient steps and minutes; over two of these with what came before; entropy, and no KL
    assert page.read_text(encoding="utf-8").count("<svg") == 6
    assert {path.name for path in tmp_path.glob("*.png")} == {f"{ENV}{end}.png" for end in ("", "-before", "-entropy")}
    policies = find_policies([results], {})
    figure = draw(
        policies, "time/env_steps", None, {"opd": {"time/env_steps": 9e4}, "grpo@Other-v0": {"time/env_steps": 1.0}}
    )
    # The bounds of each curve; the teacher has none
    assert ends(figure)[:2] == [((2.0, 10.0), (6.0, 20.0)), ((92.0, 10.0), (96.0, 90.0))]
    # Where it was written in one seed of two
    assert ends(draw_learning(policies, "train/entropy")) == [((80.0, 3.0), (120.0, 2.0))]
    assert draw_learning(policies, "train/kl") is None


def test_where_nothing_says_what_is_solved_returns_are_compared(tmp_path):
    env_id = "Pendulum-v1"

    def returns(*values):
        return EvaluationResult([EpisodeRecord(-1, -1, None, 200, value, seed) for seed, value in enumerate(values)])

    for name, result in {
        "a_seed0": returns(-100.0, -200.0),
        "a_seed1": returns(-120.0, -220.0),
        "b_seed0": returns(-90.0, -90.0),
    }.items():
        episodes = [replace(episode, env_id=env_id) for episode in result.episodes]
        lost = [LostEpisode(-1, -1, 7, "killed", env_id)] * (name == "a_seed0")
        EvaluationResult(episodes, lost=lost).save(tmp_path / f"{name}.json")
    a, b = find_policies([tmp_path], {})
    mean, low, high = a.score()
    # Seeds at -150 and -170
    assert mean == -160.0 and (low, high) == pytest.approx((-160 - 127.062, -160 + 127.062), abs=1e-2)
    assert b.score() == (-90.0, -90.0, -90.0)
    rows = details([a, b], b)
    assert rows[0][1] == "mean return" and rows[1][:5] == [
        "a",
        "-160.0",
        f"{low:.1f} to {high:.1f}",
        "-150.0, -170.0",
        "4 and 1 lost",
    ]
    assert overview([b])[1] == ["b", "-90.0 [-90.0, -90.0] \N{MULTIPLICATION SIGN}1"]
    assert len(paired([a, b], b)) == 1


def test_refused(results, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for words, told in (
        ([str(tmp_path / "empty")], "nothing to report"),
        ([str(tmp_path / "missing")], "There is no"),
        ([str(results), "--reference", "nobody"], "one of grpo, opd, teacher"),
        ([str(results), "--label", "eval/*"], "NAME=VALUE"),
        ([str(results), "--tasks", "seen=a-b"], "0-5 or 0,3,7"),
        ([str(results), "--tasks", "seen=5-3"], "0-5 or 0,3,7"),
        ([str(results), "--tasks", "seen=0-2-5"], "0-5 or 0,3,7"),
        ([str(results), "--tasks", "seen=0-999999999999"], "0-5 or 0,3,7"),
        ([str(results), "--before", "opd=1"], "NAME=ENV_STEPS,MINUTES"),
        ([str(results), "--before", "opd=-1,nan"], "NAME=ENV_STEPS,MINUTES"),
        ([str(results), "--keep", str(results / "kept")], "Name another folder"),
        ([str(results), "--keep", str(results.parent)], "Name another folder"),
        ([str(results), "--markdown", str(results / "x.json")], "ends with .md"),
        ([str(results), "--markdown", str(tmp_path / "page.html")], "ends with .md"),
        ([str(results), "--tasks", "a=0", "--tasks", "a=1"], "--tasks a=... is given twice"),
        ([str(results), "--label", "a=x", "--label", "a=y"], "--label a=... is given twice"),
        ([str(results), "--label", "a=x\ny"], "cannot be printed"),
    ):
        assert main(["report", *words, "-o", str(tmp_path / "page.html")]) == 2
        assert told in capsys.readouterr().err
    weights = results / "opd" / f"{ENV}_1" / "model.zip"
    assert main(["report", str(results), "-o", str(weights)]) == 2
    assert "ends with .html" in capsys.readouterr().err and weights.read_text() == "large"
    assert not (tmp_path / "page.html").exists()
    # An experiment that is not finished has a report as well
    find_policies([results], {"typo/*": "student", "eval/*": "teacher"})
    assert capsys.readouterr().err == (
        f"--label typo/*=student: nothing is found at such a path; there is eval/teacher.json, grpo/{ENV}_1/, "
        f"grpo/{ENV}_2/, opd/{ENV}_1/, opd/{ENV}_2/.\n"
    )
    assert np.isnan(Policy("x", ENV).score()[0])
    (results / "grpo" / f"{ENV}_1" / "evaluation.json").write_text("{")
    with pytest.raises(ValueError, match=r"evaluation\.json is not the result of an evaluation.*or is damaged"):
        find_policies([results], {})


@pytest.mark.parametrize("name", ["matplotlib", "scipy"])
def test_a_report_without_its_extra_names_it(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, name, None)
    assert main(["report", str(tmp_path)]) == 2
    assert "pip install 'opd_gym[plots]'" in capsys.readouterr().err


def page(folder: Path, *words: object) -> str:
    """The page of a report."""
    assert main(["report", str(folder), "-o", str(folder.parent / "page.html"), *map(str, words)]) == 0
    return (folder.parent / "page.html").read_text(encoding="utf-8")


def test_only_a_number_is_a_seed(tmp_path):
    for name in ("opd_seed0", "opd_seed12", "opd_seed0_500", "student_seeded"):
        evaluation(5).save(tmp_path / f"{name}.json")
    found = {policy.label: list(policy.results) for policy in find_policies([tmp_path], {})}
    assert found == {"opd": ["0", "12"], "opd_seed0_500": ["0"], "student_seeded": ["0"]}


def test_hidden_files_are_left_out_and_links_are_followed(results, tmp_path):
    (results / "opd").rename(tmp_path / "elsewhere")
    (results / "opd").symlink_to(tmp_path / "elsewhere")
    (results / "opd" / "loop").symlink_to(results)
    run(results / ".old", "opd", 5, [0.1], evaluation(1, 1), divergence="reverse_kl")
    evaluation(1).save(results / ".ipynb_checkpoints" / "teacher-checkpoint.json")
    (results / "nothing.json").symlink_to(tmp_path / "nothing")
    policies = {policy.label: list(policy.results) for policy in find_policies([results], {})}
    assert policies == {"opd": ["0", "1"], "grpo": ["0", "1"], "teacher": ["0"]}


def test_what_cannot_be_read_is_not_left_out(results, monkeypatch):
    scandir = os.scandir

    def refuse(path):  # as the system does, but for root
        if str(path).endswith(f"opd/{ENV}_1"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match=f"opd/{ENV}_1"):
        find_policies([results], {})


def test_runs_beside_a_stray_file_of_arguments(results):
    shutil.copy(results / "opd" / f"{ENV}_1" / "args.yml", results / "opd" / "args.yml")
    (opd,) = (policy for policy in find_policies([results], {}) if policy.label == "opd")
    assert list(opd.results) == ["0", "1"]


def test_only_its_own_tables_are_progress_of_a_run(results):
    path = results / "opd" / f"{ENV}_1" / "progress.csv"
    before = read_progress(path.parent)
    shutil.copy(path, path.with_name("progress_old.csv"))
    # As Excel saves it; a cell without a number is none
    path.write_text("\ufeff" + path.read_text().replace("6000", "nan"), encoding="utf-8")
    rows = read_progress(path.parent)
    assert rows == [*before[:2], {key: value for key, value in before[2].items() if key != "time/env_steps"}]
    path.write_text("time;success\n1;0.5\n")
    with pytest.raises(ValueError, match="no row has time/total_timesteps"):
        read_progress(path.parent)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.encode("utf-16"),
        lambda text: json.dumps(json.loads(text), indent=3)[:-50].encode(),
        lambda text: json.dumps({**json.loads(text), "episodes": []}).encode(),
        lambda text: text.replace("true", "1").encode(),
    ],
)
def test_an_evaluation_in_another_layout_is_not_left_out(results, change):
    path = results / "eval" / "teacher.json"
    path.write_bytes(change(path.read_text()))
    with pytest.raises(ValueError, match=str(path)):
        find_policies([results], {})


def test_what_is_left_out_is_named(results, capsys):
    (results / "empty.json").write_text("")
    evaluation(1, 1).save(results / "opd" / f"{ENV}_1" / "swap.json")
    twice = find_policies([results, results / "opd" / f"{ENV}_2" / "evaluation.json"], {})
    told = capsys.readouterr().err
    assert "empty.json is left out: it is empty" in told and f"opd/{ENV}_1/swap.json is left out" in told
    # The evaluation of a run is the run's, also where it is given by itself
    assert [list(policy.results) for policy in twice] == [["0", "1"], ["0", "1"], ["0"]]


def test_an_evaluation_from_python_is_of_the_env_of_the_others(results):
    nameless = [replace(episode, env_id=None) for episode in evaluation(5, 5).episodes]
    EvaluationResult(nameless).save(results / "eval" / "student.json")
    (student,) = (policy for policy in find_policies([results], {}) if policy.label == "student")
    assert student.env_id == ENV and "is taken for LiberoObject-v0" in student.notes[0]
    EvaluationResult([replace(e, env_id="LiberoGoal-v0") for e in nameless]).save(results / "eval" / "goal.json")
    with pytest.raises(ValueError, match=r"student\.json does not say in which env"):
        find_policies([results], {})


def test_an_evaluation_that_is_called_like_an_algorithm_has_no_settings(results):
    evaluation(5, 5).save(results / "opd.json")
    labels = {policy.label for policy in find_policies([results], {})}
    assert labels == {"opd", "grpo", "teacher"}


def test_notes_of_episodes(results):
    lost = evaluation(9, 5)
    lost.lost.append(LostEpisode(1, 99, 99, "killed", ENV))
    partly = EvaluationResult([replace(e, success=e.success or None) for e in evaluation(3, 3).episodes])
    twice = EvaluationResult([*evaluation(9, 9).episodes, *evaluation(9, 9).episodes])
    sampled = EvaluationResult([replace(e, init_state_id=-1) for e in evaluation(9, 9).episodes])
    every = {"lost": lost, "partly": partly, "twice": twice, "sampled": sampled, "a": evaluation(1, 1)}
    policies = [Policy(name, ENV, results={"0": result}) for name, result in every.items()]
    assert notes(policies) == [
        "lost, seed 0: 1 of 21 episodes were lost, and count neither as solved nor as failed.",
        "partly, seed 0: the env says only of 6 of 20 episodes whether they were solved; the success rate counts these "
        "alone.",
        "twice, seed 0: 20 of 40 episodes are there more than once, so that its interval is too narrow.",
        f"lost was evaluated in other episodes of {ENV} than most.",
        f"sampled was evaluated in other episodes of {ENV} than most.",
    ]
    assert notes([policies[0], policies[3]]) == [
        "lost, seed 0: 1 of 21 episodes were lost, and count neither as solved nor as failed.",
        f"No two evaluations on {ENV} are of the same episodes.",
    ]
    assert notes([policies[4]], "teacher") == [
        f"teacher was not evaluated on {ENV}, so nothing is compared with it there."
    ]


def test_seeds_that_differ_in_what_they_learned_from_are_told(tmp_path):
    for seed, folder in enumerate(("expert", "noisy")):
        run(tmp_path, "sft", seed, [0.5], evaluation(5, 5), demonstrations=folder)
    (sft,) = find_policies([tmp_path], {})
    assert list(sft.results) == ["0", "1"] and sft.notes == ["its seeds differ in demonstrations."]


def test_what_was_not_trained_is_compared_with_all_seeds():
    opd = Policy("opd", ENV, results={str(seed): evaluation(k) for seed, k in enumerate((9, 5))})
    student = Policy("student", ENV, results={"0": evaluation(3)})
    trained = replace(student, seeded=True)
    assert [row[1] for row in paired([trained], opd)[1:]] == ["0"]
    rows = [[*row[:2], *row[2:4]] for row in paired([student], opd)[1:]]
    assert rows == [
        ["student against opd", "the other's 0", "0", "6"],
        ["student against opd", "the other's 1", "0", "2"],
    ]
    # A group in which the episodes are the same is compared where the others are not
    part = Policy("part", ENV, results={"0": evaluation(4)})
    whole = Policy("whole", ENV, results={"0": evaluation(6, 6)})
    assert [row[:3] for row in paired([part], whole, {"first": [0]})[1:]] == [
        ["part against whole", "0", "other episodes"],
        ["part against whole, first", "0", "0"],
    ]


def test_means_over_seeds():
    def policy(label, *solved):
        return Policy(label, ENV, results={str(seed): evaluation(k) for seed, k in enumerate(solved)})

    sft, opd = policy("SFT", 5, 6, 7), policy("OPD", 9, 10)
    # Variances 0.01 of three and 0.005 of two: a standard error of 0.076376, and degrees of freedom
    # (1/300 + 1/400)^2 / (1/300^2 / 2 + 1/400^2) = 2.88. Of these Student's t at 97.5 % is 3.263; 2.1 % lie beyond 4.58
    row = ["SFT less OPD", "-35.0 points", "-59.9 to -10.1", "3 and 2"]
    assert over_seeds([sft, opd, policy("teacher", 9)], opd)[1:] == [[*row, "0.021"]]
    grouped = over_seeds([sft, opd], opd, {"first": [0], "other": [7]})
    assert [row[0] for row in grouped[1:]] == ["SFT less OPD", "SFT less OPD, first"]
    assert grouped[2][1:] == grouped[1][1:]
    # In other tasks there is nothing to compare
    more = Policy("more", ENV, results={"0": evaluation(5, 5), "1": evaluation(6, 6)})
    assert len(over_seeds([more], opd, {"first": [0]})) == 2 and len(over_seeds([more], opd)) == 1
    assert welch([0.5, 0.5], [0.7, 0.7]) is None and welch([0.5], [0.7, 0.8]) is None


def test_a_goal_is_a_share_of_what_the_table_shows():
    teacher = Policy("teacher", ENV, results={"0": evaluation(10), "1": evaluation(50, n=100)})
    curve = [{"time/env_steps": 1000.0, "time/episodes": 60.0, "rollout/success_rate": 0.9}]
    short = Policy("short", ENV, curves={"0": curve})
    table = details([short, teacher], teacher)
    assert [row[-1] for row in table] == ["env steps to 68 % (90 % of teacher)", "fewer than 100 episodes", ""]
    nobody = Policy("nobody", ENV, results={"0": evaluation(0)})
    assert details([short, nobody], nobody)[0][-1] == "env steps"
    # Columns in which nobody has anything are left out
    assert details([nobody], nobody)[0] == ["policy", "success", "95 % interval", "episodes"]


def test_returns_are_shown_beside_success_and_small_ones_in_three_digits():
    solved = [EpisodeRecord(-1, -1, False, 10, value, seed) for seed, value in enumerate((0.012, 0.014))]
    policy = Policy("ppo", "Some-v0", results={"0": EvaluationResult(solved)})
    rows = details([policy], None)
    low, high = ttest_1samp([0.012, 0.014], 0.0).confidence_interval(0.95)
    assert rows[0][3] == "mean return" and rows[1][3] == f"0.013 [{low:.3g}, {high:.3g}]"
    mixed = Policy("x", "Some-v0", results={"0": EvaluationResult([replace(e, success=None) for e in solved])})
    assert details([policy, mixed], None)[0][1] == "success or mean return"
    # A run that has no evaluation yet is measured by whatever the others are
    assert details([mixed, Policy("z", "Some-v0")], None)[0][1] == "mean return"
    # Where a return is no number, or infinite, there is no mean, and success is shown all the same
    for value, shown in ((math.nan, ""), (math.inf, "inf")):
        broken = EvaluationResult([replace(solved[0], reward=value), solved[1]])
        table = details([Policy("x", "Some-v0", results={"0": broken})], None)
        assert [*table[1][1:3], dict(zip(*table, strict=True)).get("mean return", "")] == [
            *("0.0 %", "0.0 to 65.8 %", shown)
        ]
        assert draw([Policy("x", "Some-v0", results={"0": broken})], "time/env_steps") is None
    # Returns that are equal but for rounding have no interval of negative length
    equal = EvaluationResult([EpisodeRecord(-1, -1, None, 10, 27.57, seed) for seed in range(3)])
    rows = [{"time/env_steps": 10.0 * n, "rollout/ep_rew_mean": 27.57} for n in (1, 2)]
    assert draw([Policy("y", "Some-v0", curves={"0": rows}, results={"0": equal})], "time/env_steps") is not None


def test_names_in_pictures(tmp_path):
    names = ["_hidden", r"$\foo$ 5$", "long " * 40, *(f"policy {n}" for n in range(40))]
    rows = [{"time/env_steps": 10.0 * n, "rollout/success_rate": n / 3} for n in (1, 2)]
    figure = draw([Policy(name, ENV, curves={"0": rows}) for name in names], "time/env_steps")
    assert figure is not None
    figure.savefig(tmp_path / "picture.png")
    (legend,) = figure.legends
    assert len(legend.get_texts()) == len(names) and figure.get_figheight() > 8
    width = figure.bbox.width
    assert all(text.get_window_extent().x0 >= 0 and text.get_window_extent().x1 <= width for text in legend.get_texts())
    assert len({tuple(look.values()) for look in styles(names).values()}) == 40


def test_a_page_is_the_same_again_and_all_its_pictures_can_be_seen(results):
    words = ["--before", "opd=1000,10", "--tasks", "a=0", "--tasks", "b=1"]
    path = results / "opd" / f"{ENV}_1" / "progress.csv"
    header, *rows = path.read_text().splitlines()
    more = [f"{header},train/entropy,train/kl", *(f"{row},2.0,0.1" for row in rows), ""]
    path.write_text("\n".join(more))
    text = page(results, *words)
    assert text == page(results, *words)
    n = text.count("<svg")
    assert n == 8 and f"figure:nth-of-type({n})" in text
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'(?:xlink:href="#|url\(#)([^")]+)', text))
    assert used and used <= set(ids)


def test_markdown_begins_nothing_of_its_own():
    assert markdown([["a|b"], ["<script>\nx"]]) == "| a\\|b |\n| --- |\n| &lt;script> x |\n"
    assert markdown([["a\\|b"], ["*x* [y](z) [1, 2]"]]).splitlines()[::2] == [
        *("| a\\\\\\|b |", r"| \*x\* [y]\(z) [1, 2] |")
    ]


def test_kept_copies_of_a_run_that_was_trained_again(results, tmp_path, capsys):
    kept = tmp_path / "kept"
    first = results / "opd" / f"{ENV}_1"
    (first / "command.txt").write_bytes(b"opd-gym \xff")
    (first / "progress.csv").rename(first / "progress.1.csv")
    shutil.copy(first / "progress.1.csv", first / "progress.csv")
    page(results, "--keep", kept)
    (first / "progress.1.csv").unlink()
    shutil.rmtree(results / "grpo")
    (results / "eval" / "teacher.json").unlink()
    page(results, "--keep", kept)
    told = capsys.readouterr().err
    assert f"grpo/{ENV}_1/args.yml" in told and "eval/teacher.json" in told
    assert read_progress(kept / "opd" / f"{ENV}_1") == read_progress(first)
    assert (kept / "opd" / f"{ENV}_1" / "command.txt").read_bytes() == b"opd-gym \xff"
    # What is called like weights is not weights
    (results / "opd").rename(results / "policy")
    page(results, "--keep", tmp_path / "again")
    assert (tmp_path / "again" / "policy" / f"{ENV}_1" / "evaluation.json").is_file()
