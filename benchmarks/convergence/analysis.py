"""The share of AdamW's budget that each contestant needs, as a table and a picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from benchmarks.convergence.results import Result, best
from benchmarks.convergence.training import Run
from benchmarks.report import figure, table

TOKENS = 4096  # a step, for the share of CPU seconds that larger batches would need


@dataclass(frozen=True)
class Share:
    """A budget over AdamW's. With a bound it is "<" or ">": the curve begins below the target or never reaches it."""

    value: float
    bound: str = ""


@dataclass(frozen=True)
class Curve:
    """A contestant's best runs with one seed in one cell, by budget."""

    name: str
    seed: int
    runs: tuple[Result, ...]

    def at(self, budget: float) -> Result | None:
        return next((r for r in self.runs if r.run.budget == budget), None)


def share(points: Sequence[tuple[float, float]], target: float) -> Share | None:
    """Where a curve of (budget, loss) first reaches the target, interpolated over the logarithm of the budget."""
    points = sorted(points)
    if not points:
        return None
    if points[0][1] <= target:
        return Share(points[0][0], "<" if points[0][1] < target else "")
    for (left, above), (right, below) in zip(points, points[1:], strict=False):
        if below <= target:
            part = (above - target) / (above - below)
            return Share(math.exp(math.log(left) + part * math.log(right / left)))
    return Share(points[-1][0], ">")


def settings(results: Sequence[Result]) -> list[tuple[str, list[Result]]]:
    """Title and results of each group that can be compared: of one cell, text, budget and batch."""
    own = {"kind", "options", "lr", "seed", "budget", "version"}
    shared = [f.name for f in fields(Run) if f.name not in own]
    groups: dict[tuple[object, ...], list[Result]] = {}
    for result in results:
        groups.setdefault(tuple(getattr(result.run, name) for name in shared), []).append(result)
    several = len({r.run.text for r in results}) > 1

    def title(run: Run) -> str:
        text = f", text {run.text}" if several else ""
        return f"{run.cell}, {run.full_steps} steps of {run.batch} x {run.length} tokens{text}"

    return [(title(group[0].run), group) for group in groups.values()]


def curves(results: Sequence[Result]) -> dict[str, list[Curve]]:
    """Each contestant's curves, one for each seed, at the best rate of each budget."""
    names: dict[str, str] = {}
    grouped: dict[str, dict[int, dict[float, list[Result]]]] = {}
    for result in results:
        run = result.run
        identity = repr((run.kind, sorted(run.options.items()), run.version))
        if identity not in names:
            same = sum(n == result.name or n.startswith(f"{result.name} (") for n in names.values())
            names[identity] = f"{result.name} ({same + 1})" if same else result.name
        name = names[identity]
        grouped.setdefault(name, {}).setdefault(run.seed, {}).setdefault(run.budget, []).append(result)
    found: dict[str, list[Curve]] = {}
    for name, seeds in grouped.items():
        for seed, budgets in sorted(seeds.items()):
            runs = tuple(r for _, group in sorted(budgets.items()) if (r := best(group)))
            if runs:
                found.setdefault(name, []).append(Curve(name, seed, runs))
    return found


def anchors(found: dict[str, list[Curve]]) -> dict[int, Result]:
    """By seed, AdamW's best run of the whole budget, over rates and betas."""
    by_seed: dict[int, list[Result]] = {}
    for own in found.values():
        for curve in own:
            whole = curve.at(1.0)
            if whole is not None and whole.run.kind == "adamw":
                by_seed.setdefault(curve.seed, []).append(whole)
    return {seed: r for seed, group in by_seed.items() if (r := best(group))}


def in_steps(curve: Curve, anchor: Result) -> Share | None:
    return share([(r.run.budget, r.loss) for r in curve.runs], anchor.loss)


def in_seconds(curve: Curve, anchor: Result, tokens: int | None = None) -> Share | None:
    base = anchor.seconds(tokens)
    return share([(r.seconds(tokens) / base, r.loss) for r in curve.runs], anchor.loss)


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean, and half the range where there are several."""
    if not values:
        return "-"
    text = f"{statistics.fmean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {(max(values) - min(values)) / 2:.{digits}f}"


def spread_of_shares(shares: Sequence[Share | None]) -> str:
    """Mean over seeds; a bound if a seed has only one."""
    known = [s for s in shares if s is not None]
    bounds = {s.bound for s in known} - {""}
    if len(bounds) > 1:
        return "; ".join(f"{s.bound} {s.value:.2f}".strip() for s in known)
    text = spread([s.value for s in known], 2)
    return f"{bounds.pop()} {text}" if bounds else text


def cell_table(results: Sequence[Result]) -> str:
    """One line per contestant: losses by budget, and what it needs of AdamW's budget in steps and CPU seconds."""
    found = curves(results)
    base = anchors(found)
    budgets = sorted({r.run.budget for r in results})
    heads = ["contestant", "seeds", "best lr", *(f"{b:g}" for b in budgets), "share of steps", "of CPU s"]
    heads += [f"of CPU s at {TOKENS:,} tokens", "optimizer, ms a step"]
    rows = []
    for name, own in found.items():
        compared = [(curve, base[curve.seed]) for curve in own if curve.seed in base]
        whole = [r for curve in own for r in curve.runs]
        last = max(r.run.budget for r in whole)
        rates = sorted({r.run.lr for r in whole if r.run.budget == last})
        row = [name, str(len(own)), " ".join(f"{lr:g}" for lr in rates)]
        row += [spread([r.loss for curve in own if (r := curve.at(b))]) for b in budgets]
        row += [spread_of_shares([in_steps(c, a) for c, a in compared])]
        row += [spread_of_shares([in_seconds(c, a, tokens) for c, a in compared]) for tokens in (None, TOKENS)]
        row += [f"{statistics.median(1e3 * r.record['optimizer_seconds'] / r.run.steps for r in whole):.0f}"]
        rows.append((-last, statistics.fmean(r.loss for r in whole if r.run.budget == last), row))
    return table(heads, [row for *_, row in sorted(rows, key=lambda entry: entry[:2])])


def report(results: Sequence[Result]) -> str:
    """The tables of all cells, and what failed."""
    parts = [f"**{title}**\n\n{cell_table(group)}" for title, group in settings(results)]
    failed = [r for r in results if "error" in r.record]
    if failed:
        parts.append(f"{len(failed)} runs failed: {', '.join(sorted({r.name for r in failed}))}")
    return "\n\n".join(parts)


def draw(results: Sequence[Result], path: Path) -> None:
    """A panel per cell: held-out loss against the budget, mean over seeds, and AdamW's best as a line."""
    groups = settings(results)
    made, panels = figure(path, max(1, len(groups)), 4.4)
    for panel, (title, group) in zip(panels, groups, strict=False):
        found = curves(group)
        for name, own in found.items():
            budgets = sorted({r.run.budget for curve in own for r in curve.runs})
            losses = [statistics.fmean(r.loss for curve in own if (r := curve.at(b))) for b in budgets]
            panel.plot(budgets, losses, marker="o", markersize=3, linewidth=1.4, label=name)
        target = [r.loss for r in anchors(found).values()]
        if target:
            panel.axhline(statistics.fmean(target), color="grey", linewidth=0.8, linestyle="--")
        panel.set_title(title, fontsize=8)
        panel.set_xlabel("share of AdamW's steps")
    panels[0].set_ylabel("held-out loss")
    panels[0].legend(frameon=False, fontsize=7)
    made.savefig(path, dpi=130)
