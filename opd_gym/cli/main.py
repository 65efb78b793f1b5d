"""The command line: ``opd-gym train | eval | enjoy | export | hub | report | demos | list | plan | ...``."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from tyro.conf import DisallowNone, FlagCreatePairsOff
from tyro.extras import SubcommandApp

from opd_gym.checks import did_you_mean
from opd_gym.cli import options

GROUPS = {
    "hub": "Publish policies on the Hugging Face hub, and fetch them.",
    "robotwin": "RoboTwin: its runtime, assets and demonstrations.",
}
# What carries out a command is imported once it is given: `opd-gym --help` has no use for PyTorch.
COMMANDS = {
    "train": (options.Train, "opd_gym.cli.train:run"),
    "eval": (options.Eval, "opd_gym.cli.evaluate:run"),
    "enjoy": (options.Enjoy, "opd_gym.cli.evaluate:run"),
    "export": (options.Export, "opd_gym.cli.export:run"),
    "hub push": (options.HubPush, "opd_gym.cli.hub:push"),
    "hub pull": (options.HubPull, "opd_gym.cli.hub:pull"),
    "report": (options.Report, "opd_gym.cli.report:run"),
    "demos": (options.Demos, "opd_gym.cli.demos:run"),
    "list": (options.List, "opd_gym.cli.listing:run"),
    "plan": (options.Plan, "opd_gym.cli.plan:run"),
    "quickstart": (options.Quickstart, "opd_gym.cli.quickstart:run"),
    "doctor": (options.Doctor, "opd_gym.cli.doctor:run"),
    "robotwin install": (options.RobotwinInstall, "opd_gym.cli.robotwin:run_install"),
    "robotwin assets": (options.RobotwinAssets, "opd_gym.cli.robotwin:run_assets"),
    "robotwin check": (options.RobotwinCheck, "opd_gym.cli.robotwin:run_check"),
    "robotwin record": (options.RobotwinRecord, "opd_gym.cli.robotwin:run_record"),
    "robotwin seeds": (options.RobotwinSeeds, "opd_gym.cli.robotwin:run_seeds"),
    "robotwin demos": (options.RobotwinDemos, "opd_gym.cli.robotwin:run_demos"),
}
ALIASES = {"enjoy": ("video",)}


def parse(argv: Sequence[str]) -> Any:
    """
    :param argv: arguments
    :return: one of the classes of :mod:`opd_gym.cli.options`
    :raises SystemExit: they are no command, or ask for help
    """
    apps = {group: SubcommandApp() for group in ("", *GROUPS)}
    app = apps[""]
    for command, (cls, _) in COMMANDS.items():
        group, _, name = command.rpartition(" ")
        apps[group].command(cls, name=name, aliases=ALIASES.get(command))  # type: ignore[call-overload]
    for group, text in GROUPS.items():
        app.command(apps[group], name=group, help=text)
    return app.cli(
        prog="opd-gym",
        description="On-policy distillation for vision-language-action policies.",
        args=argv,
        config=(DisallowNone, FlagCreatePairsOff),
    )


def _empty(words: Sequence[str]) -> str | None:
    """What is given as nothing, which as a path would be this folder."""
    for before, word in zip(["", *words], words, strict=False):
        if not word:
            return f"What follows {before!r}" if before else "The first argument"
        if word.startswith("--") and word.find("=") == len(word) - 1:
            return word.removesuffix("=")
    return None


def _unknown_command(word: str) -> str | None:
    """What to say of a word that is no command; of an option nothing."""
    known = {name.partition(" ")[0] for name in [*COMMANDS, *(alias for names in ALIASES.values() for alias in names)]}
    if word.startswith("-") or word in known:
        return None
    return f"There is no command {word!r}. {did_you_mean(word, known)}`opd-gym --help` lists all."


def errors() -> tuple[type[Exception], ...]:
    """
    :return: what bad input raises, and what is missing on the machine
    """
    from gymnasium.error import Error

    from opd_gym.envs.robotwin.install import InstallError
    from opd_gym.envs.robotwin.runtime import SimulatorError

    # OSError: a full disk, no permission. RuntimeError: GL, CUDA, workers that died, compiled code without a cache
    known = (ValueError, OSError, RuntimeError, ImportError, ArithmeticError, MemoryError)
    return *known, InstallError, SimulatorError, Error


def main(argv: Sequence[str] | None = None) -> int:
    """
    :param argv: arguments; None for those of the process
    :return: exit status
    """
    words = sys.argv[1:] if argv is None else argv
    if (empty := _empty(words)) is not None:
        print(f"opd-gym: error: {empty} is empty: is a variable of the shell not set?", file=sys.stderr)
        return 2
    if words and (unknown := _unknown_command(words[0])) is not None:
        print(f"opd-gym: error: {unknown}", file=sys.stderr)
        return 2
    given = parse(words)
    from opd_gym.envs.registration import register_envs

    register_envs()
    env = getattr(given, "env", None) or ""
    if any(":" in name for name in ([env] if isinstance(env, str) else env)):
        # As `python script.py` does: the module may lie in this folder. Last, so that it hides nothing
        sys.path.append(os.getcwd())
    module, _, function = dict(COMMANDS.values())[type(given)].partition(":")
    try:
        if isinstance(given, options.Options):
            given.check_outputs()
        if isinstance(given, options.Train) and given.nproc != 1:
            launch = import_module("opd_gym.cli.train").launch
            if (status := launch(words, given.nproc)) is not None:
                return status
        return getattr(import_module(module), function)(given)
    except KeyboardInterrupt:
        print("opd-gym: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if not isinstance(error, errors()):
            raise
        # The message says what to do, a traceback would only hide it
        if getattr(given, "verbose", 0):
            traceback.print_exc()
        out_of_memory = isinstance(error, MemoryError) and not str(error)
        print(f"opd-gym: error: {'out of memory' if out_of_memory else error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
