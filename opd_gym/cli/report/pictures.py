"""The pictures of a report."""

from __future__ import annotations

import io
import math
import re
import statistics
import sys
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from opd_gym.cli.report.policies import ENV_STEPS, SECONDS, SUCCESS, UPDATES, Policy, covers, of_tasks, outcome

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RETURN = "rollout/ep_rew_mean"
# What a curve is drawn over: column of progress.csv -> its name, and what it is divided by
AXES = {
    ENV_STEPS: ("env steps (thousands)", 1e3),
    UPDATES: ("gradient steps", 1.0),
    SECONDS: ("wall-clock (minutes)", 60.0),
}
# What is drawn of the learning itself, over gradient steps: column -> its name
LEARNING = {
    "train/kl": "reverse KL to the teacher (nats a token)",
    "train/entropy": "entropy of the policy (nats a token)",
}
# Colour and line of a policy
Look = Mapping[str, Any]
# What a policy had cost when its training began: label, or label@env -> column -> value
Before = Mapping[str, Mapping[str, float]]
# Success in training of fewer episodes is not drawn: the first to end are those that succeeded
FEWEST = 20
# After matplotlib's ten colours the same come again, with another line; dashed ones are policies without a curve
LINES = ("-", ":", "-.", (0, (8, 2, 1, 2, 1, 2)))
# Letters in a line of the legend, and in a name there
LEGEND_WIDTH, NAME_WIDTH = 100, 60


def styles(labels: Sequence[str]) -> dict[str, Look]:
    """
    :param labels: names of policies
    :return: colour and line of each
    """
    return {
        label: {"color": f"C{number % 10}", "linestyle": LINES[number // 10 % len(LINES)]}
        for number, label in enumerate(dict.fromkeys(labels))
    }


def draw(
    policies: Sequence[Policy],
    column: str,
    looks: Mapping[str, Look] | None = None,
    before: Before | None = None,
) -> Figure | None:
    """
    Success in training over one measure of its cost, or the return where nothing is said of success: the mean over the
    seeds between the lowest and the highest. Diamonds are the same of held-out episodes after training, with its
    interval; dashed lines are policies without a curve.

    :param policies: of one env
    :param column: one of :data:`AXES`
    :param looks: of the policies, by label, see :func:`styles`
    :param before: what policies had cost when their training began, which moves their curves to the right
    :return: the figure; None if no run has a curve
    """
    looks = looks or styles([policy.label for policy in policies])
    runs = [rows for policy in policies for rows in policy.curves.values()]
    if not any(runs):
        return None
    key = SUCCESS if any(SUCCESS in row for rows in runs for row in rows) else RETURN
    label, unit = AXES[column]
    success = key == SUCCESS
    scale = 100.0 if success else 1.0
    figure, axis = _figure(f"{label}, with what came before" if before else label)
    drawn = False
    for policy in policies:
        look = looks[policy.label]
        spent = cost_before(before or {}, policy).get(column, 0.0)
        curves = _curves(policy, column, unit, key, scale, spent)
        # What is solved is known without a word of it in training: an id of Gymnasium has a threshold
        measured = bool(policy.results) and (policy.judged or not success)
        held_out, low, high = (scale * value for value in policy.score(judged=success)) if measured else (math.nan,) * 3
        if curves:
            drawn = True
            _draw_seeds(axis, curves, look, policy.label)
            if measured:
                x = statistics.mean(curve[-1, 0] for curve in curves)
                _draw_point(axis, x, (held_out, low, high), look["color"], markersize=6)
        elif measured:
            text = f"{policy.label}: {held_out:.0f} %" if success else f"{policy.label}: {held_out:.4g}"
            axis.axhline(held_out, linestyle="--", color=look["color"], label=_name(text))
    if not drawn:
        return None
    axis.set_ylabel("success (%)" if success else "mean return of an episode")
    if success:
        axis.set_ylim(-2, 102)
    return _finished(figure)


def draw_learning(policies: Sequence[Policy], key: str, looks: Mapping[str, Look] | None = None) -> Figure | None:
    """
    :param policies: of one env
    :param key: one of :data:`LEARNING`
    :param looks: of the policies, by label, see :func:`styles`
    :return: it over gradient steps, drawn as by :func:`draw`; None if no run says anything of it
    """
    looks = looks or styles([policy.label for policy in policies])
    column = UPDATES
    figure, axis = _figure(AXES[column][0])
    drawn = False
    for policy in policies:
        curves = _curves(policy, column, AXES[column][1], key)
        if curves:
            drawn = True
            _draw_seeds(axis, curves, looks[policy.label], policy.label)
    if not drawn:
        return None
    axis.set_ylabel(LEARNING[key])
    axis.set_ylim(bottom=min(0.0, axis.get_ylim()[0]))
    return _finished(figure)


def draw_groups(
    policies: Sequence[Policy],
    groups: Mapping[str, Sequence[int]],
    looks: Mapping[str, Look] | None = None,
) -> Figure | None:
    """
    Held-out success in two groups of tasks against each other, for instance of those that were trained on and of the
    others: what was learned to the right, what was forgotten below.

    :param policies: of one env
    :param groups: name -> tasks
    :param looks: of the policies, by label, see :func:`styles`
    :return: a diamond a policy with its 95 % intervals, and a dot a seed where there are several; None unless there are
        two groups, and a policy that was evaluated in both
    """
    looks = looks or styles([policy.label for policy in policies])
    shown = [policy for policy in policies if all(covers(policies, policy, tasks) for tasks in groups.values())]
    if len(groups) != 2 or not shown or not all(policy.judged for policy in policies):
        return None
    (x_name, x_tasks), (y_name, y_tasks) = groups.items()
    figure, axis = _figure(f"success in tasks {_name(x_name)} (%)")
    for policy in shown:
        color = looks[policy.label]["color"]
        x, y = ([100.0 * value for value in policy.score(tasks)] for tasks in (x_tasks, y_tasks))
        _draw_point(axis, x[0], y, color, x_bounds=x[1:], label=_name(policy.label), linestyle="none")
        if len(policy.results) > 1:
            seeds = [
                [100.0 * outcome(of_tasks(result, tasks), True) for tasks in (x_tasks, y_tasks)]
                for result in policy.results.values()
            ]
            axis.plot(*zip(*seeds, strict=True), color=color, marker=".", linestyle="none")
    axis.set_ylabel(f"success in tasks {_name(y_name)} (%)")
    axis.set_ylim(-2, 102)
    axis.set_xlim(-2, 102)
    _legend(figure)
    return figure


def tell_missing_glyphs(labels: Sequence[str]) -> None:
    """
    Say once which letters the pictures will lack, where matplotlib would warn of each in each picture.

    :param labels: names of policies
    """
    from matplotlib.font_manager import FontProperties, findfont, get_font

    known = get_font(findfont(FontProperties())).get_charmap()
    missing = "".join(sorted({letter for label in labels for letter in label if ord(letter) not in known}))
    if missing:
        print(f"The pictures show boxes for {missing}, which their font lacks. The tables have them.", file=sys.stderr)


def _name(text: str) -> str:
    """As matplotlib shows it: it would set what stands between dollars as a formula, and hides what begins with _."""
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def _figure(label: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.0), layout="constrained")
    axis = figure.subplots()
    axis.set_xlabel(label)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    return figure, axis


def _finished(figure: Figure) -> Figure:
    figure.axes[0].set_xlim(left=0)
    _legend(figure)
    return figure


def _legend(figure: Figure) -> None:
    """Below the axes, as high as it has to be."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    labels = ["\n".join(textwrap.wrap(label, NAME_WIDTH, drop_whitespace=False)) for label in labels]
    longest = max((len(line) for label in labels for line in label.split("\n")), default=0)
    columns = max(1, min(4, len(labels), LEGEND_WIDTH // (longest + 8)))
    lines = math.ceil(sum(label.count("\n") + 1 for label in labels) / columns)
    figure.set_figheight(figure.get_figheight() + 0.19 * max(0, lines - 2))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize="small")


def _curves(
    policy: Policy, column: str, unit: float, key: str, scale: float = 1.0, spent: float = 0.0
) -> list[np.ndarray]:
    """
    Of each seed that has more than a point: what it cost, and what it had reached by then. Where some are finished, of
    these.
    """
    seeds = [seed for seed in policy.curves if seed not in policy.unfinished] or list(policy.curves)
    curves = []
    for seed in seeds:
        rows = _carried(policy.curves[seed], column)
        rows = [row for row in rows if column in row and key in row]
        if key == SUCCESS:
            enough = [row for row in rows if row.get("time/episodes", FEWEST) >= FEWEST]
            rows = enough if len(enough) > 1 else rows
        curves.append(np.array([((row[column] + spent) / unit, scale * row[key]) for row in rows]))
    return [curve for curve in curves if len(curve) > 1]


def _carried(rows: Sequence[dict[str, float]], column: str) -> list[dict[str, float]]:
    """Rows with the last known value of a count that only an update writes."""
    found, last = [], None
    for row in rows:
        last = row.get(column, last)
        found.append(row if last is None or not column.startswith("train/") else {**row, column: last})
    return found


def _draw_seeds(axis: Axes, curves: Sequence[np.ndarray], look: Look, label: str) -> None:
    # Seeds are logged at different places: where all have begun, until the first has ended
    start, end = max(c[0, 0] for c in curves), min(c[-1, 0] for c in curves)
    if start >= end:
        for i, curve in enumerate(curves):
            axis.plot(*curve.T, label=None if i else _name(label), linewidth=1, **look)
        return
    grid = np.linspace(start, end, 200)
    values = np.stack([np.interp(grid, curve[:, 0], curve[:, 1]) for curve in curves])
    axis.plot(grid, values.mean(0), label=_name(label), linewidth=2, **look)
    if len(curves) > 1:
        axis.fill_between(grid, values.min(0), values.max(0), color=look["color"], alpha=0.2, linewidth=0)


def _draw_point(
    axis: Axes, x: float, y: Sequence[float], color: str, x_bounds: Sequence[float] | None = None, **options: Any
) -> None:
    """A diamond with intervals, of which rounding must not make negative lengths."""

    def lengths(value: float, low: float, high: float) -> list[list[float]]:
        return [[max(0.0, value - low)], [max(0.0, high - value)]]

    axis.errorbar(
        [x],
        [y[0]],
        xerr=None if x_bounds is None else lengths(x, *x_bounds),
        yerr=None if math.isnan(y[1]) else lengths(*y),
        color=color,
        marker="D",
        capsize=3,
        **options,
    )


def cost_before(before: Before, policy: Policy) -> Mapping[str, float]:
    """
    :param before: see :data:`Before`
    :param policy: a policy
    :return: what it had cost when its training began
    """
    return before.get(f"{policy.label}@{policy.env_id}", before.get(policy.label, {}))


def svg(figure: Figure, name: str) -> str:
    """
    :param figure: a picture
    :param name: begins the ids in it, which have to differ within a page
    :return: the picture as a part of HTML, the same for the same picture
    """
    from matplotlib import rc_context

    file = io.StringIO()
    with rc_context({"svg.hashsalt": name}), _quiet_font():
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    return re.sub(r'((?:id|xlink:href)="#?|url\(#)', rf"\g<1>{name}-", text[text.index("<svg") :])


def png(figure: Figure) -> bytes:
    """
    :param figure: a picture
    :return: the content of a PNG file
    """
    file = io.BytesIO()
    with _quiet_font():
        figure.savefig(file, format="png", dpi=130)
    return file.getvalue()


@contextmanager
def _quiet_font() -> Iterator[None]:
    """See :func:`tell_missing_glyphs`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield
