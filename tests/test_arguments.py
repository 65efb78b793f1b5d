"""Command lines, changed at random: each gives a result, or one message that says what is wrong."""

from __future__ import annotations

import os
import re
import warnings
from dataclasses import fields
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3 import PPO
from toys import Match, cartpole_teacher

from opd_gym.algorithms import algorithm_class
from opd_gym.cli.main import COMMANDS, main
from opd_gym.evaluation import SAMPLED_EVAL_SEED, EvaluationResult
from opd_gym.zoo.hyperparams import RUN_KEYS, algorithm_parameters

# How many are tried, and which: more of them by the variables, for a longer look
N = int(os.environ.get("OPD_GYM_FUZZ", "30"))
SEED = int(os.environ.get("OPD_GYM_FUZZ_SEED", "0"))

QUICK = "--no-progress --device cpu"
TRAIN = f"train --env CartPole-v1 {QUICK} -n 8 -f runs -P n_envs=1"
# Words of each command that is cheap; of the others, what is refused before anything is simulated
PPO_WORDS = f"{TRAIN} --algo ppo -P n_steps=8 -P batch_size=8"
OPD_WORDS = f"{TRAIN} --algo opd -P n_steps=8 -P batch_size=8 --teacher teacher.zip -P teacher_kwargs.n_eval_episodes=0"
GRPO_WORDS = f"{TRAIN} --algo grpo -P group_size=2 -P n_groups=1"
BASES = {
    "eval": f"eval --env CartPole-v1 --checkpoint teacher.zip --episodes 1 --n-envs 1 {QUICK} -o results.json",
    "enjoy": f"enjoy --env Filmed-v0 --checkpoint filmed.zip {QUICK} -o film.gif",
    "report": "report results.json -o page.html --tasks seen=0-5 -l results.json=student",
    "list": "list --all",
    "plan": "plan --student nothing --teacher none",
    "export": "export --env CartPole-v1 --checkpoint teacher.zip -o exported",
    "hub push": "hub push teacher.zip somebody/cart -f published",
    "hub pull": "hub pull somebody/cart -o pulled",
    "demos": "demos --env CartPole-v1 -o demos --task-ids 0 -n 1",
    "quickstart": "quickstart --env CartPole-v1 --minutes 0.01 --eval-episodes 1 -f quick --student none",
    "robotwin demos": "robotwin demos --traces file -o demos",
    "robotwin check": "robotwin check --env CartPole-v1 -o films",
    "robotwin record": "robotwin record --env CartPole-v1 -n 1 -o traces",
    "robotwin seeds": "robotwin seeds --env CartPole-v1 -n 1 -o seeds.json",
}
NUMBERS = [
    "-1",
    "0",
    "1.5",
    "nan",
    "-inf",
    "1e400",
    "99999999999999999999",
    "abc",
    "true",
    "0x10",
    "\u0967",
    "1_0",
    "-0.0",
]
TEXTS = [
    "",
    " ",
    "\u00fc\U0001f600",
    "a" * 300,
    "\n",
    "--",
    "-",
    "*",
    "Libero*-v0",
    "None",
    "missing",
    "file",
    "folder",
    "pipe",
]
TEXTS += [
    "file/below",
    "nobody/nothing",
    "os:CartPole-v1",
    "nowhere:CartPole-v1",
    ":",
    "a=b",
    "{",
    "[1, 2]",
    "cuda:99",
]
TEXTS += ["cpu:7", "teacher.zip", "Acrobot-v1", "Pendulum-v1", "expert"]
VALUES = [
    "abc",
    "-1",
    "0",
    "1.5",
    ".nan",
    ".inf",
    "true",
    "null",
    "[]",
    "{}",
    "{a: 1}",
    "[1, 2]",
    "",
    "lin_x",
    "2026-01-01",
]
VALUES += ["99999999999999999999", "!!python/name:os.system", "&a [*a]", "os.system", "1e400", "'\u00fc'", "json.dumps"]
KEYS = ["policy_kwargs.x", "policy_kwargs.net_arch", "policy_kwargs.checkpoint", "policy_kwargs.trust", "env_kwargs.x"]
KEYS += [
    "teacher_kwargs.device",
    "teacher_kwargs.vec_normalize",
    "normalize.gamma",
    "callback.x",
    "nonsense",
    "a..b",
    "",
]


class Filmed(Match):
    metadata = {"render_modes": ["rgb_array"]}

    def __init__(self, render_mode: str | None = None):
        super().__init__()
        self.render_mode = render_mode

    def render(self):
        return np.zeros((16, 16, 3), np.uint8)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with something of each kind, in which everything happens."""
    folder = tmp_path_factory.mktemp("world")
    if "Filmed-v0" not in gym.registry:
        gym.register("Filmed-v0", Filmed)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HOME", str(folder))
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        cartpole_teacher().save("teacher.zip")
        PPO("MlpPolicy", Filmed(), device="cpu").save("filmed.zip")
        Path("file").write_text("x")
        Path("folder").mkdir()
        os.mkfifo("pipe")
        assert main(BASES["eval"].split()) == 0
        yield folder


def changed(words: list[str], options: list[str], rng: np.random.Generator) -> list[str]:
    """A word is missing, another, doubled, misspelt or new; or an option is given that the command has."""
    words, i, value = list(words), int(rng.integers(len(words))), str(rng.choice(NUMBERS + TEXTS))
    kind = rng.integers(8)
    if kind == 0:
        del words[i]
    elif kind == 1:
        words[i] = value
    elif kind == 2:
        words.insert(i, value)
    elif kind == 3:
        words[i] += words[i][-1:]
    elif kind == 4:
        words += words[i : i + 2]
    elif kind == 5:
        words += [str(rng.choice(options)), value]
    elif kind == 6:
        words.append(f"{rng.choice(options)}={value}")
    else:
        given = [n for n, (a, b) in enumerate(zip(words, words[1:], strict=False)) if a[0:1] == "-" != b[0:1]]
        if given:
            words[int(rng.choice(given)) + 1] = value
    return words


def play(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit status and what was said of it. Whatever is raised fails the test."""
    before = {path.name: path.lstat().st_mode for path in Path().iterdir()}
    capsys.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            status = main(words)
        except SystemExit as stop:  # of the parser
            status = int(stop.code or 0)
        except Exception as error:
            raise AssertionError(f"{words}: {error!r}") from error
    said = capsys.readouterr().err
    assert status in (0, 2) and "Traceback" not in said, (words, status, said)
    assert status == 0 or re.search(r"opd-gym: error: .*\w|[a-z]{3}", said), (words, said)
    # No pipe and no folder has become a file, or the other way round
    assert before.items() <= {path.name: path.lstat().st_mode for path in Path().iterdir()}.items(), words
    return status, said


@pytest.mark.parametrize("command", BASES)
def test_words(command, world, capsys):
    options = ["--" + item.name.replace("_", "-") for item in fields(COMMANDS[command][0])]
    rng = np.random.default_rng((SEED, *command.encode()))
    for _ in range(N // 3):
        play(changed(BASES[command].split(), options, rng), capsys)
    # And whatever they have left is in nobody's way
    assert play(BASES[command].split(), capsys) == play(BASES[command].split(), capsys)


@pytest.mark.parametrize(("algo", "words"), [("ppo", PPO_WORDS), ("opd", OPD_WORDS), ("grpo", GRPO_WORDS)])
def test_hyperparameters(algo, words, world, capsys):
    # Those of others are refused by their names; ray looks for a cluster
    keys = [*(RUN_KEYS.keys() | algorithm_parameters(algorithm_class(algo)).keys()) - {"ray", "n_workers"}, *KEYS]
    rng = np.random.default_rng((SEED, *algo.encode()))
    for _ in range(N // 2):
        key, value = str(rng.choice(sorted(keys))), str(rng.choice(VALUES))
        runs = set(Path("runs").rglob("*.yml"))
        status, said = play([*words.split(), "-P", f"{key}={value}"], capsys)
        assert status == 0 or any(part in said for part in key.split(".")), (key, value, said)
        # What is refused at once has no run
        assert status == 0 or set(Path("runs").rglob("*.yml")) == runs, (key, value, said)


def test_of_an_empty_variable(world, capsys):
    for words, name in (
        (["eval", "--checkpoint", "", "--env", "CartPole-v1"], "'--checkpoint' is empty"),
        (["eval", "--checkpoint=", "--env", "CartPole-v1"], "--checkpoint is empty"),
        (["report", ""], "'report' is empty"),
    ):
        status, said = play(words, capsys)
        assert status == 2 and name in said and "variable of the shell" in said


# Command lines that once raised, or were wrong in silence, and what names their fault
BROKEN = (
    (f"{PPO_WORDS} -P teacher_kwargs=word", "teacher_kwargs: expected a mapping"),
    (f"{PPO_WORDS} -P policy_kwargs=[1]", "policy_kwargs: expected a mapping"),
    (f"{PPO_WORDS} -P policy_kwargs.checkpoint=5", "path of a checkpoint, got 5"),
    (f"{PPO_WORDS} -P policy=1.5", "policy: expected a name"),
    (f"{PPO_WORDS} -P env_wrapper=json.dumps", "env_wrapper: .*cannot wrap"),
    (f"{PPO_WORDS} -P normalize.gamma=abc", "normalize.gamma must be a number"),
    (f"{PPO_WORDS} -P worker_timeout=0", "worker_timeout must be"),
    (f"{PPO_WORDS} -P n_steps=99999999999999999999", r"n_steps must be below 2\*\*63"),
    (f"{OPD_WORDS} -P teacher_kwargs.vec_normalize=1.5", "Expected vec_normalize to be"),
    ("eval --env Acrobot-v1 --checkpoint teacher.zip --no-progress", "teacher.zip does not fit the env: .*Discrete"),
    ("eval --env CartPole-v1 --checkpoint teacher.zip -o pipe", "pipe cannot be written: it is a device or a pipe"),
)


@pytest.mark.parametrize(("words", "told"), BROKEN)
def test_command_lines_that_once_broke_it(words, told, world, capsys):
    status, said = play(words.split(), capsys)
    assert status == 2 and re.search(told, said)


class Fragile(Match):
    """Breaks in one of the held-out episodes, whenever it is played."""

    def reset(self, *, seed=None, options=None):
        if seed == SAMPLED_EVAL_SEED + 1:
            raise RuntimeError("it broke")
        return super().reset(seed=seed, options=options)


def test_lost_episodes_are_told_by_the_exit_status(world, capsys):
    if "Fragile-v0" not in gym.registry:
        gym.register("Fragile-v0", Fragile)
    words = f"eval --env Fragile-v0 --checkpoint filmed.zip --episodes 3 {QUICK} -o lost.json".split()
    assert main(words) == 1
    assert "1 of 3 episodes were lost" in capsys.readouterr().err
    assert len(EvaluationResult.load("lost.json").episodes) == 2
    assert main([*words, "--max-lost", "1"]) == 0
    assert "lost" not in capsys.readouterr().err
