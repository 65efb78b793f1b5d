"""``opd-gym report``: runs compared on one page, from the files that training and evaluation left."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from opd_gym.cli.options import Report
from opd_gym.cli.report.copies import copies, films, keep
from opd_gym.cli.report.pictures import (
    AXES,
    LEARNING,
    cost_before,
    draw,
    draw_groups,
    draw_learning,
    png,
    styles,
    svg,
    tell_missing_glyphs,
)
from opd_gym.cli.report.policies import ENV_STEPS, SECONDS, evaluated_tasks
from opd_gym.cli.report.reading import find_policies
from opd_gym.cli.report.tables import (
    by_group,
    by_task,
    details,
    escaped,
    markdown,
    mixed_versions,
    notes,
    over_seeds,
    overview,
    paired,
)
from opd_gym.files import replacing, write_atomic

TEMPLATE = Path(__file__).with_name("page.html")
# No benchmark has more
MAX_TASKS = 100_000
# What may be written over: a page of another suffix could replace what it is made from, or weights
SUFFIXES = {"--output": (".html", ".htm"), "--markdown": (".md", ".markdown")}
# Of more films a page is slow to open
MOST_FILM_BYTES = 20 * 2**20
CURVES = (
    "Lines: training episodes, mean of the seeds, as far as all of them go; bands: lowest and highest seed. Diamonds: "
    "held-out episodes afterwards, with their 95 % interval. Dashed: policies without a curve."
)
SEEDS = "Lines: mean of the seeds, as far as all of them go; bands: lowest and highest seed."
GROUPS = "Held-out episodes. Diamonds: mean of the seeds with its 95 % intervals; dots: seeds."

T = TypeVar("T")


def report(args: Report) -> None:
    """
    Write the page, and what else is asked for.

    :param args: what to compare, and where to write
    :raises ValueError: there is nothing to report, or no policy of the name to compare with
    :raises ImportError: there is nothing to draw with
    """
    from jinja2 import Environment, select_autoescape

    try:
        import matplotlib  # noqa: F401
        import scipy  # noqa: F401
    except ImportError as error:
        raise ImportError("A report needs matplotlib and scipy. Run: pip install 'opd_gym[plots]'") from error
    labels = _once("--label", map(_named, args.label))
    groups = _once("--tasks", ((name, _task_ids(text)) for name, text in map(_named, args.tasks)))
    before = _once("--before", map(_before, args.before))
    _check_outputs(args)
    policies = find_policies(args.results, labels)
    kept = {} if args.keep is None else copies(args.results, args.keep)
    names = list(dict.fromkeys(policy.label for policy in policies))
    if args.reference is not None and args.reference not in names:
        raise ValueError(f"Expected --reference to be one of {', '.join(names)}; got {args.reference!r}.")
    known = {*names, *(f"{policy.label}@{policy.env_id}" for policy in policies)}
    for name in sorted(before.keys() - known):
        print(f"--before {name}: nothing is called that; there is {', '.join(sorted(known))}.", file=sys.stderr)
    played = {task for policy in policies for task in evaluated_tasks(policy.pooled)}
    for name, tasks in groups.items():
        if played and not played & set(tasks):
            print(f"--tasks {name}: nobody was evaluated in one of these tasks.", file=sys.stderr)
    tell_missing_glyphs(names)
    looks = styles(names)
    sections: list[dict[str, Any]] = []
    pictures: dict[str, bytes] = {}
    for env_id in dict.fromkeys(policy.env_id for policy in policies):
        here = [policy for policy in policies if policy.env_id == env_id]
        reference = next((policy for policy in here if policy.label == args.reference and policy.results), None)
        if reference is not None and any(seed.endswith("'") for seed in reference.results):
            raise ValueError(
                f"--reference {args.reference}: on {env_id} more than one policy is called that, or a seed is there "
                f"more than once ({' '.join(reference.notes)}) Give the others names of their own with --label."
            )
        figures = [(label, env_id, CURVES, draw(here, column, looks)) for column, (label, _) in AXES.items()]
        if any(cost_before(before, policy) for policy in here):
            for column in (ENV_STEPS, SECONDS):
                label = f"{AXES[column][0]}, with what came before"
                figures.append((label, f"{env_id}-before", CURVES, draw(here, column, looks, before)))
        for key, label in LEARNING.items():
            figures.append((label, f"{env_id}-{key.partition('/')[2]}", SEEDS, draw_learning(here, key, looks)))
        figures.append((" and ".join(groups), f"{env_id}-groups", GROUPS, draw_groups(here, groups, looks)))
        drawings: list[dict[str, str]] = []
        for label, file, caption, figure in figures:
            if figure is not None:
                name = f"picture-{len(sections) + 1}-{len(drawings) + 1}"
                drawings.append({"label": label, "svg": svg(figure, name), "caption": caption})
                if file not in pictures:
                    pictures[file] = png(figure)
        tables = {
            "Success and cost": details(here, reference),
            "Groups of tasks": by_group(here, groups),
            "McNemar's exact test": paired(here, reference, groups),
            "Welch's t test": over_seeds(here, reference, groups),
            "By task": by_task(here),
        }
        commands = [(policy.label, command) for policy in here for command in policy.commands]
        sections.append({"env": env_id, "figures": drawings, "tables": tables, "commands": commands})
    summary, remarks, versions = overview(policies), notes(policies, args.reference), mixed_versions(policies)
    shown_films = films(args.results)
    size = sum(len(film["data"]) for film in shown_films)
    if size > MOST_FILM_BYTES:
        print(f"The page holds {len(shown_films)} films of {size / 2**20:,.0f} MB in all.", file=sys.stderr)
    page = Environment(autoescape=select_autoescape(default=True), trim_blocks=True, lstrip_blocks=True)
    html = page.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=args.title,
        overview=summary,
        sections=sections,
        films=shown_films,
        versions=versions,
        notes=remarks,
        most=max(len(section["figures"]) for section in sections) or 1,
    )
    write_atomic(args.output, html)
    listed = "".join(f"- {escaped(line)}\n" for line in (*remarks, *versions))
    if args.markdown is not None:
        parts = [markdown(summary)]
        for section in sections:
            parts.append(f"## {escaped(section['env'])}\n")
            named = {name: markdown(rows) for name, rows in section["tables"].items()}
            parts += [f"### {name}\n\n{text}" for name, text in named.items() if text]
        write_atomic(args.markdown, "\n".join(filter(None, [*parts, listed])))
    if args.pictures is not None:
        args.pictures.mkdir(parents=True, exist_ok=True)
        for name, picture in pictures.items():
            with replacing(args.pictures / f"{name.replace('/', '-')}.png") as temporary:
                temporary.write_bytes(picture)
    if args.keep is not None:
        keep(kept, args.keep)
    print("\n".join(filter(None, [markdown(summary), listed, str(args.output)])))


def _check_outputs(args: Report) -> None:
    """Nothing that is read may be written over."""
    for option, path in (("--output", args.output), ("--markdown", args.markdown)):
        if path is not None and path.suffix.lower() not in SUFFIXES[option]:
            raise ValueError(f"{option} {path}: expected a name that ends with {SUFFIXES[option][0]}.")
    for folder in args.results:
        if args.keep is not None:
            source, target = folder.resolve(), args.keep.resolve()
            if target.is_relative_to(source) or source.is_relative_to(target):
                raise ValueError(
                    f"--keep {args.keep} is to hold a copy of {folder}, and one lies in the other. Name another folder."
                )


def _once(option: str, items: Iterable[tuple[str, T]]) -> dict[str, T]:
    found: dict[str, T] = {}
    for name, value in items:
        if name in found:
            raise ValueError(f"{option} {name}=... is given twice, and the first would not count. Give it once.")
        found[name] = value
    return found


def _named(item: str) -> tuple[str, str]:
    name, _, text = item.partition("=")
    if not item.isprintable():
        raise ValueError(f"{item!r} holds a character that cannot be printed, such as a tab or the end of a line.")
    if not name or not text:
        raise ValueError(f"Expected NAME=VALUE, as in --label 'student/*=student' or --tasks seen=0-5, got {item!r}.")
    return name, text


def _before(item: str) -> tuple[str, dict[str, float]]:
    name, text = _named(item)
    try:
        steps, minutes = map(float, text.split(","))
        if not (0.0 <= steps < math.inf and 0.0 <= minutes < math.inf):
            raise ValueError
    except ValueError:
        raise ValueError(
            f"Expected --before NAME=ENV_STEPS,MINUTES or NAME@ENV=... with two numbers from 0 on, got {item!r}."
        ) from None
    return name, {ENV_STEPS: steps, SECONDS: 60.0 * minutes}


def _task_ids(text: str) -> list[int]:
    try:
        ends = [[int(end) for end in part.split("-")] for part in text.split(",")]
    except ValueError:
        raise ValueError(f"Expected tasks as in 0-5 or 0,3,7, got {text!r}.") from None
    if not all(len(part) <= 2 and 0 <= part[0] <= part[-1] < MAX_TASKS for part in ends):
        raise ValueError(f"Expected tasks as in 0-5 or 0,3,7, got {text!r}.")
    return [task for part in ends for task in range(part[0], part[-1] + 1)]


def run(args: Report) -> int:
    """
    :param args: what to compare
    :return: exit status
    """
    report(args)
    return 0
