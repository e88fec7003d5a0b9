"""Draws the log of a run as one HTML page with plots in SVG: no script, no other file, no network."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from html import escape
from itertools import cycle
from typing import NamedTuple

from shampoo_deepspeed.runtime.run_log import Points, RunLog, finite

WIDTH, HEIGHT = 560, 240  # of a plot, in pixels
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 12, 32  # of its frame
MOST_POINTS = 1000  # of a line; more would not be seen
LOGARITHMIC = 1e2  # the ratio of the largest to the smallest value from which a panel has a logarithmic scale
NARROW = 1e-9  # a range that is a smaller share of its values is drawn as one value
TINY = 1e-290  # values below are drawn as 0
COLOURS = ("#3b6fb6", "#c8354a", "#3c8d5a", "#a5720f", "#7a5195")


class Panel(NamedTuple):
    """A plot: its title, and the names of the series that it may have, as shell patterns."""

    title: str
    names: tuple[str, ...]


# The Trainer's names, those of `Shampoo.metrics()`, and some that scripts may log.
PANELS = (
    Panel("Loss", ("loss", "*_loss")),
    Panel("Accuracy", ("*accuracy",)),
    Panel("Learning rate", ("learning_rate", "lr")),
    Panel("Gradient norm", ("grad_norm",)),
    Panel("Root mean square of the update", ("update_rms",)),
    Panel("Relative displacement of the weights", ("displacement",)),
    Panel("Largest condition number of a factor matrix", ("largest_condition_number",)),
    Panel("Milliseconds a step", ("refresh_ms", "exchange_ms")),
    Panel("Bytes moved a step", ("bytes_moved",)),
    Panel("Share of blocks refreshed", ("refreshed_share",)),
    Panel("Rejected steps", ("rejected_steps",)),
)
STYLE = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1180px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1rem; margin: 0 0 .2rem; }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(340px, 1fr)); gap: 1.6rem; }
svg { width: 100%; height: auto; } text { font-size: 12px; fill: currentColor; }
.grid { stroke: var(--line); } .curve { fill: none; stroke-width: 1.8; }
table { border-collapse: collapse; margin: 1.5rem 0; } td, th { padding: .15rem .8rem .15rem 0; text-align: right; }
td:first-child, th:first-child { text-align: left; } tr { border-bottom: 1px solid var(--line); }
.note { color: #c8354a; margin: 0; } .legend { margin: 0; font-size: 13px; } .legend span { margin-right: 1em; }
"""


def page(log: RunLog, title: str) -> str:
    """The page of a run; as XML it is well-formed too."""
    panels = "\n".join(_section(panel, log) for panel in _panels(log))
    intro = f"{log.steps:,} steps, from {_shown(log.source.name)}."
    title = _shown(title)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/><title>{title}</title>'
        f"<style>{STYLE}</style></head>\n<body><h1>{title}</h1>\n"
        f"<p>{intro}</p>\n{_table(log)}\n<main>\n{panels}\n</main></body></html>\n"
    )


def _shown(text: str) -> str:
    """Text as HTML. What XML or UTF-8 cannot hold, such as half of a surrogate pair, becomes an escape."""
    return escape("".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text))


def _panels(log: RunLog) -> Iterator[Panel]:
    """Panels with series of this run; a series of which nothing is known has one of its own."""
    left = sorted(log.series)
    for panel in PANELS:
        names = tuple(name for pattern in panel.names for name in left if fnmatchcase(name, pattern))
        left = [name for name in left if name not in names]
        if names:
            yield Panel(panel.title, names)
    yield from (Panel(name, (name,)) for name in left)


def _table(log: RunLog) -> str:
    rows = []
    for panel in _panels(log):
        for name in panel.names:
            values = [value for _, value in finite(log.series[name])]
            shown = [values[0], values[-1], min(values), _median(values), max(values)] if values else []
            cells = "".join(f"<td>{number(value)}</td>" for value in shown) or '<td colspan="5">not finite</td>'
            rows.append(f"<tr><td>{_shown(name)}</td>{cells}</tr>")
    heads = "".join(f"<th>{head}</th>" for head in ("", "first", "last", "least", "median", "largest"))
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _median(values: Sequence[float]) -> float:
    found = statistics.median(values)
    return found if math.isfinite(found) else 2.0 * statistics.median(value / 2.0 for value in values)


def _section(panel: Panel, log: RunLog) -> str:
    drawn = {name: finite(log.series[name]) for name in panel.names}
    wrong = sum(len(log.series[name]) - len(points) for name, points in drawn.items())
    note = f'<p class="note">values that are not finite: {wrong}</p>' if wrong else ""
    plot = _plot({name: points for name, points in drawn.items() if points})
    return f"<section><h2>{_shown(panel.title)}</h2>{note}{_legend(log, panel)}{plot}</section>"


def _legend(log: RunLog, panel: Panel) -> str:
    """The names of a plot's lines in their colours, each with its last value."""
    names = [name for name in panel.names if finite(log.series[name])]
    parts = [
        f'<span style="color:{colour}">{_shown(name)} {number(finite(log.series[name])[-1][1])}</span>'
        for name, colour in zip(names, cycle(COLOURS), strict=False)
    ]
    return f'<p class="legend">{" ".join(parts)}</p>'


class Scale(NamedTuple):
    """From values to pixels, along one axis."""

    low: float
    high: float
    begin: float
    end: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log10(x) if self.logarithmic else x for x in (self.low, self.high, value))
        half = 1.0 if math.isfinite(high - low) else 0.5  # of values near the ends of floats, whose difference is none
        share = (half * value - half * low) / (half * high - half * low)
        return self.begin + share * (self.end - self.begin)

    def ticks(self) -> list[float]:
        """Round values within the range, about five."""
        if self.logarithmic:
            first, last = math.ceil(math.log10(self.low)), math.floor(math.log10(self.high))
            return [10.0**n for n in range(first, last + 1, max(1, (last - first) // 4))]
        rough = self.high / 5 - self.low / 5
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * n for n in (1, 2, 5, 10) if power * n >= rough)
        first = math.ceil(self.low / step)
        return [step * n for n in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _plot(series: dict[str, Points]) -> str:
    if not series:
        return ""
    steps = [step for points in series.values() for step, _ in points]
    values = [value for points in series.values() for _, value in points]
    x = Scale(*_widened(min(steps), max(steps), 0.0), LEFT, WIDTH - RIGHT)
    logarithmic = min(values) > 0 and max(values) / min(values) >= LOGARITHMIC
    margin = 0.0 if logarithmic else 0.04
    y = Scale(*_widened(min(values), max(values), margin), HEIGHT - BOTTOM, TOP, logarithmic)
    parts = [_axes(x, y)]
    for (name, points), colour in zip(series.items(), cycle(COLOURS), strict=False):
        line = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in thinned(points))
        dots = f'<circle cx="{x(points[0][0]):.1f}" cy="{y(points[0][1]):.1f}" r="3" fill="{colour}"/>'
        curve = f'<polyline class="curve" data-name="{_shown(name)}" stroke="{colour}" points="{line}"/>'
        parts.append(curve if len(points) > 1 else dots)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}</svg>'


def _axes(x: Scale, y: Scale) -> str:
    lines = []
    for tick in y.ticks():
        at = f"{y(tick):.1f}"
        lines.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>')
        lines.append(f'<text x="{LEFT - 6}" y="{at}" dy="4" text-anchor="end">{number(tick)}</text>')
    for tick in x.ticks():
        lines.append(f'<text x="{x(tick):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{number(tick)}</text>')
    return "".join(lines)


def _widened(low: float, high: float, margin: float) -> tuple[float, float]:
    """A range that is not empty, with a margin on both sides."""
    size = max(abs(low), abs(high))
    if size < TINY:
        spare = 1.0
    elif high - low <= NARROW * size:
        spare = size / 10
    else:
        spare = margin * high - margin * low
    return max(low - spare, -sys.float_info.max), min(high + spare, sys.float_info.max)


def thinned(points: Sequence[tuple[int, float]]) -> Points:
    """At most about MOST_POINTS: of each run of neighbours its least and its largest value, so that peaks stay."""
    length = math.ceil(2 * len(points) / MOST_POINTS)
    if length <= 2:
        return list(points)
    kept: Points = []
    for begin in range(0, len(points), length):
        part = points[begin : begin + length]
        ends = {min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}
        kept += sorted(ends)
    return kept


def number(value: float) -> str:
    """A number in few characters."""
    if abs(value) < 1e6 and (value == int(value) or abs(value) >= 1e4):
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 1 or abs(value) >= 1e4 else f"{value:,.4g}"
