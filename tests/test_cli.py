"""The command line: what each command takes, how quickly it answers, and what it says to what it does not take."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import gymnasium as gym
import pytest
from stable_baselines3 import PPO

from opd_gym.cli import options
from opd_gym.cli.main import COMMANDS, main, parse
from opd_gym.evaluation import EvaluationResult
from opd_gym.zoo.hyperparams import ALGORITHMS, parse_overrides

ROOT = Path(__file__).resolve().parent.parent


def told(command: str) -> dict[str, Any]:
    """What a command line asks for, without what it leaves at its default."""
    given = parse(shlex.split(command))
    defaults = {item.name: item.default for item in fields(given)}
    values = {name: value for name, value in vars(given).items() if value != defaults[name]}
    return {name: value for name, value in values.items() if value != []}


@pytest.mark.parametrize(
    ("command", "values"),
    [
        ("train", {}),
        ("train --algo sft --env E -n 3200 -f runs/x",
         {"algo": "sft", "env": "E", "n_timesteps": 3200, "folder": "runs/x"}),
        ("train --env=E -n64 --seed -1 -vv", {"env": "E", "n_timesteps": 64, "seed": -1, "verbose": 2}),
        ("train --hyperparams a:1 b.c:[1,2] --env E", {"hyperparams": ["a:1", "b.c:[1,2]"], "env": "E"}),
        ("train -P a=1 -P b.c=x:y", {"param": ["a=1", "b.c=x:y"]}),
        ("train --checkpoint none --demonstrations a b --no-progress",
         {"student": "none", "demonstrations": ["a", "b"], "progress": False}),
        ("train --student c --teacher expert --resume d", {"student": "c", "teacher": "expert", "resume": Path("d")}),
        ("train --checkpoint-interval 0.05 --config f.yml --eval-episodes 100",
         {"checkpoint_interval": 0.05, "config": "f.yml", "eval_episodes": 100}),
        ("eval --env A B --checkpoint c --episodes 500", {"env": ("A", "B"), "checkpoint": "c", "episodes": 500}),
        ("eval --env A --student c --task-ids 0 3 -o r.json",
         {"env": ("A",), "checkpoint": "c", "task_ids": (0, 3), "output": Path("r.json")}),
        ("eval --env A --checkpoint c --categories camera language --difficulty 1 2 --difficulty-file f",
         {"env": ("A",), "checkpoint": "c", "categories": ("camera", "language"), "difficulty": (1, 2),
          "difficulty_file": "f"}),
        ("eval --env A --checkpoint c --env-kwargs visuals:exact horizon:450",
         {"env": ("A",), "checkpoint": "c", "env_kwargs": ["visuals:exact", "horizon:450"]}),
        ("eval --env A --checkpoint c --init-states sampled --stochastic --reward-threshold 475 --n-envs 4",
         {"env": ("A",), "checkpoint": "c", "init_states": "sampled", "stochastic": True, "reward_threshold": 475.0,
          "n_envs": 4}),
        ("eval --env A --checkpoint c --temperature 0.05",
         {"env": ("A",), "checkpoint": "c", "temperature": 0.05}),
        ("video --env A --before b --checkpoint c --fps 10",
         {"env": "A", "before": "b", "checkpoint": "c", "fps": 10.0}),
        ("enjoy --env A --checkpoint c", {"env": "A", "checkpoint": "c"}),
        ("export --env A --checkpoint c --dtype float16 -o d",
         {"env": "A", "checkpoint": "c", "dtype": "float16", "output": Path("d")}),
        ("demos --env A --task-ids 5 6 -n 40 --stride 2 --perturbation 0.03 -o d",
         {"env": "A", "task_ids": (5, 6), "episodes_per_task": 40, "stride": 2, "perturbation": 0.03,
          "output": Path("d")}),
        ("demos --env A --format lerobot --videos", {"env": "A", "format": "lerobot", "videos": True}),
        ("list --all", {"all": True}),
        ("plan --student s --full --no-gradient-checkpointing --dtype float32",
         {"student": "s", "full": True, "gradient_checkpointing": False, "dtype": "float32"}),
        ("quickstart --minutes 5 --task-ids 1 --n-envs 1", {"minutes": 5.0, "task_ids": (1,), "n_envs": 1}),
        ("doctor --json --no-self-check", {"json": True, "self_check": False}),
        ("robotwin install --planner --force", {"planner": True, "force": True}),
        ("robotwin assets --stand-in -o d", {"stand_in": True, "output": Path("d")}),
        ("robotwin check --env A", {"env": "A"}),
        ("robotwin record --env A -n 680 -o t", {"env": "A", "episodes": 680, "output": Path("t")}),
        ("robotwin seeds --env A -n 9 --task-config demo_randomized",
         {"env": "A", "scenes": 9, "task_config": "demo_randomized"}),
        ("robotwin demos --traces t u --perturbation 0.3 --image-size 64 --cameras head left_wrist",
         {"traces": (Path("t"), Path("u")), "perturbation": 0.3, "image_size": (64,),
          "cameras": ("head", "left_wrist")}),
    ],
)  # fmt: skip
def test_what_is_told(command: str, values: dict[str, Any]) -> None:
    assert told(command) == values


def documented() -> list[str]:
    """Every command of README, documentation and benchmarks, without its variables and comments."""
    found = []
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.sh")]:
        text = path.read_text().replace("\\\n", " ")
        found += re.findall(r"^ *(opd-gym .*?)(?: +[#&]|;| *$)", text, re.MULTILINE)
    return found


@pytest.mark.parametrize("line", documented())
def test_documented_commands_are_understood(line: str) -> None:
    for variable, value in {"$half": "0 1", "$SFT": "a:1"}.items():
        line = line.replace(variable, value)
    words = shlex.split(re.sub(r"\$(\w+|\{[^}]*\})", "7", line))[1:]
    assert type(parse(words)) in dict(COMMANDS.values())


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("trian --env CartPole-v1", "There is no command 'trian'. Did you mean 'train'?"),
        ("hubb push", "Did you mean 'hub'?"),
        ("xyz", "There is no command 'xyz'. `opd-gym --help` lists all."),
        ("train --env CartPole-v1 -P diveregnce=jsd", "diveregnce. Did you mean 'divergence'? Of the run"),
        ("train --env LiberoObject-v0 --student libero-object-studnt", "Did you mean 'libero-object-student'?"),
        ("train --env CartPole-v1", "Pass teacher= (--teacher): the directory"),
        ("train --resume nowhere", "There is no nowhere."),
        ("train --env CartPole-v1 --teacher expert -P n_envs=0", "n_envs must be at least 1, got 0"),
        ("train --env CartPole-v1 --teacher expert -P n_timesteps=0", "n_timesteps must be at least 1, got 0"),
        ("train --env CartPole-v1 --teacher expert -P env_kwargs.render_mode=7",
         "CartPole-v1 does not take its env_kwargs {'render_mode': 7}"),
        ("train --algo sft --env CartPole-v1", "pass --demonstrations"),
        ("report nowhere", "There is no nowhere."),
        ("eval --env CartPole-v1 --checkpoint libero-object-student",
         "CartPole-v1 cannot be built for libero-object-student: ActionChunk needs a Box action space"),
    ],
)  # fmt: skip
def test_slips_are_told(command, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(command)) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", sorted(path.stem for path in (ROOT / "benchmarks").glob("libero*.mk")) + ["robotwin_handover"]
)
def test_commands_of_experiments_are_understood(name: str) -> None:
    path = ROOT / "benchmarks" / f"{name}.mk"
    words = ["make", "-n", "-f", str(path.relative_to(ROOT)), "all", "report"]
    printed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.replace("\\\n", " ")
    commands = set(re.findall(r"opd-gym [^;\n]*", printed))
    assert len(commands) > 20
    for command in commands:
        assert type(parse(shlex.split(command)[1:])) in dict(COMMANDS.values())
    # What is trained is evaluated as well (and perhaps what another file trained)
    trained = set(re.findall(rf"--resume (runs/{name}/\S+)", printed))
    evaluated = set(re.findall(rf"--checkpoint (runs/{name}/\S+)/policy", printed))
    assert {run for run in trained if "/teacher/sft/" not in run} == evaluated


@pytest.mark.skipif(not (ROOT / "README.md").is_file(), reason="needs the source tree")
def test_commands_are_documented() -> None:
    assert len(documented()) > 25


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("", "train, eval, enjoy"),
        ("train --n-timestep 3", "--n-timesteps"),
        ("train -n x", "'x'"),
        ("train --algo sac", "opd.*grpo.*ppo.*sft"),
        ("train --env", "--env"),
        ("eval --env A", "--checkpoint"),
        ("eval --env --checkpoint c", "--env needs at least one value"),
        ("demos --env A --task-ids", "--task-ids needs at least one value"),
        ("robotwin assets", "--download.*--stand-in"),
        ("robotwin assets --download --stand-in", "not allowed together"),
    ],
)
def test_what_is_not_understood(command: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(shlex.split(command))
    assert stop.value.code == 2
    assert re.search(message, re.sub(r"[\s│]+", " ", capsys.readouterr().err))


def test_commands_can_be_carried_out() -> None:
    # What is written twice, for the help to be quick
    assert get_args(options.Algorithm) == ALGORITHMS
    for cls, place in COMMANDS.values():
        module, _, function = place.partition(":")
        assert callable(getattr(import_module(module), function))
        inherited = "".join(base.__doc__ or "" for base in cls.__mro__)
        assert [item.name for item in fields(cls) if f":param {item.name}:" not in inherited] == []


def test_public_names_are_shown() -> None:
    import opd_gym

    assert {"OPD", "GRPO", "PPO", "SFT", "VLAPolicy", "make_vec"} <= set(dir(opd_gym))


def test_a_traceback_is_there_for_who_asks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(args: options.TrainArgs, resume: Path | None = None) -> Any:
        raise OSError(28, "No space left on device", "runs/model.zip")

    monkeypatch.setattr("opd_gym.cli.train.train", broken)
    for verbose in ([], ["-v"]):
        assert main(["train", "--env", "E", *verbose]) == 2
        said = capsys.readouterr().err
        assert "No space left on device: 'runs/model.zip'" in said and ("Traceback" in said) == bool(verbose)


def test_overrides_have_two_spellings() -> None:
    given = ["policy_kwargs.checkpoint=a:b=c", "learning_rate=5e-4", "cameras=[head, wrist]", "note:x=1", "gamma="]
    assert parse_overrides(given) == {
        "policy_kwargs": {"checkpoint": "a:b=c"},
        "learning_rate": 5e-4,
        "cameras": ["head", "wrist"],
        "note": "x=1",
        "gamma": None,
    }
    for bad in ("learning_rate", "=1", ":1", "a.=1", ".a=1"):
        with pytest.raises(ValueError, match="Expected key:value or key=value"):
            parse_overrides([bad])
    for bad in ("a=[1", "a=!!python/name:os.system ''"):
        with pytest.raises(ValueError, match="expected YAML after 'a'"):
            parse_overrides([bad])


@pytest.mark.parametrize("command", [["--help"], ["train", "--help"], ["robotwin", "demos", "--help"]])
def test_help_imports_nothing_heavy(command: list[str]) -> None:
    code = f"""
import sys
sys.argv = ["/somewhere/bin/opd-gym"]
from opd_gym.cli.main import main
try:
    main({command!r})
except SystemExit as stop:
    assert stop.code == 0
heavy = {{"torch", "stable_baselines3", "gymnasium", "numpy", "yaml", "transformers"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: opd-gym" in done.stdout


@pytest.mark.parametrize("first", ["opd_gym", "gymnasium", "opd_gym.envs.wrappers", "opd_gym.envs.libero.env"])
def test_ids_are_there_whatever_is_imported_first(first: str) -> None:
    code = (
        f"import importlib.util, {first}, opd_gym; importlib.util.find_spec('gymnasium'); import gymnasium; "
        "assert 'LiberoObject-v0' in gymnasium.registry and 'RoboTwinTurnSwitch-v0' in gymnasium.registry"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--tyro-write-completion", shell, str(tmp_path / "script")])
    assert not stop.value.code
    text = (tmp_path / "script").read_text()
    assert all(word in text for word in ("quickstart", "hyperparams", "stand-in", "grpo"))


def test_both_spellings_are_one_list(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    started = []

    def train(args: options.TrainArgs, resume: Path | None = None) -> Any:
        started.append(args)
        return SimpleNamespace(finished=True)

    monkeypatch.setattr("opd_gym.cli.train.train", train)
    assert main(shlex.split("train --env E --hyperparams a:1 b:2 -P b=3 -P c.d=[4]")) == 0
    assert type(started[0]) is options.TrainArgs
    assert parse_overrides(started[0].hyperparams) == {"a": 1, "b": 3, "c": {"d": [4]}}
    # A policy is played as it was trained
    for bad in ("learning_rate=1", "env_kwargs=1"):
        assert main(["eval", "--env", "E", "--checkpoint", "libero-object-student", "-P", bad]) == 2
        assert "only env_kwargs and env_wrapper can be changed" in capsys.readouterr().err
    words = "eval --env E --checkpoint libero-object-student --stochastic --temperature 0.5"
    assert main(words.split()) == 2
    assert "--stochastic is --temperature 1: give one of them" in capsys.readouterr().err


def test_sampled_actions_of_an_evaluation_come_from_its_seed(tmp_path):
    env = gym.make("CartPole-v1")
    PPO("MlpPolicy", env, n_steps=8, seed=0, device="cpu").save(tmp_path / "m.zip")

    def steps(*words):
        path = tmp_path / "result.json"
        asked = (
            f"eval --env CartPole-v1 --checkpoint {tmp_path}/m.zip --episodes 6 --device cpu --no-progress -o {path}"
        )
        assert main([*asked.split(), *words]) == 0
        result = EvaluationResult.load(path)
        return result.temperature, [episode.steps for episode in result.episodes]

    assert steps("--temperature", "2") == steps("--temperature", "2") != steps("--temperature", "2", "--seed", "1")
    assert steps("--stochastic")[0] == 1.0 and steps()[0] is None
