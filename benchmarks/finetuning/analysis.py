"""What each contestant learned and forgot, as tables and a picture; AdamW's best run is what they are compared with."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.convergence.analysis import spread
from benchmarks.convergence.results import Result, best
from benchmarks.report import figure, table


class Reached(NamedTuple):
    """Where a run first has a task loss, interpolated between its evaluations; figures at that point."""

    step: float
    general: float
    drift: float


def points(result: Result) -> list[dict[str, float]]:
    """The evaluations of a run, beginning with those of the model as it was."""
    return [{"step": 0, **result.record["start"]}, *result.record["curve"]]


def reached(result: Result, loss: float) -> Reached | None:
    """Where a run has this task loss; None if it never does."""
    found = points(result)
    for left, right in zip(found, found[1:], strict=False):
        if right["loss"] <= loss < left["loss"]:
            part = (left["loss"] - loss) / (left["loss"] - right["loss"])
            values = [left[n] + part * (right[n] - left[n]) for n in ("step", "general", "drift")]
            return Reached(*values)
    return None


def cells(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Results that can be compared: of one task, method, text, number of steps and tokens."""
    several = len({r.run.text for r in results}) > 1
    groups: dict[str, list[Result]] = {}
    for r in results:
        title = f"{r.run.task}, {r.run.method}, {r.run.steps} steps of {r.run.tokens} tokens"
        groups.setdefault(title + (f", text {r.run.text}" if several else ""), []).append(r)
    return groups


def contestants(results: Sequence[Result]) -> dict[str, dict[int, list[Result]]]:
    """Runs by name and seed that did not fail or diverge, with the rates in their order."""
    names: dict[str, dict[int, list[Result]]] = {}
    identities: dict[str, str] = {}
    for r in sorted(results, key=lambda r: r.run.lr):
        if not math.isfinite(r.loss):
            continue
        identity = repr((r.run.kind, sorted(r.run.options.items()), r.run.warm_up, r.run.version))
        if identity not in identities:
            same = sum(n == r.name or n.startswith(f"{r.name} (") for n in identities.values())
            identities[identity] = f"{r.name} ({same + 1})" if same else r.name
        names.setdefault(identities[identity], {}).setdefault(r.run.seed, []).append(r)
    return names


def anchors(found: dict[str, dict[int, list[Result]]]) -> dict[int, Result]:
    """By seed, AdamW's best run over all rates."""
    by_seed: dict[int, list[Result]] = {}
    for seeds in found.values():
        for seed, runs in seeds.items():
            by_seed.setdefault(seed, []).extend(r for r in runs if r.run.kind == "adamw")
    return {seed: r for seed, runs in by_seed.items() if (r := best(runs))}


def soonest(runs: Sequence[Result], loss: float) -> Reached | None:
    """The first of all rates to have a task loss."""
    return min((r for run in runs if (r := reached(run, loss))), default=None)


def rates_table(results: Sequence[Result]) -> str:
    """Task loss and drift of every rate, mean over seeds."""
    found = contestants(results)
    rates = sorted({r.run.lr for r in results})
    rows = []
    for name, seeds in found.items():
        cells_of = []
        for lr in rates:
            runs = [r for own in seeds.values() for r in own if r.run.lr == lr]
            last = [r.record["curve"][-1] for r in runs]
            cells_of.append(
                f"{spread([p['loss'] for p in last])} · {spread([p['drift'] for p in last])}" if runs else ""
            )
        rows.append([name, *cells_of])
    return table(["task loss · drift", *(f"{lr:g}" for lr in rates)], rows)


def cell_table(results: Sequence[Result]) -> str:
    """One line per contestant at its best rate, and where it has AdamW's best task loss."""
    found = contestants(results)
    base = anchors(found)
    heads = ["contestant", "seeds", "best lr", "task loss", "accuracy", "exact", "general loss", "drift", "moved"]
    heads += ["share of AdamW's steps", "drift there - AdamW's", "s a step", "of AdamW's", "state, MB", "peak, MB"]
    seconds_of_adamw = [seconds(r) for r in base.values()]
    rows = []
    for name, seeds in found.items():
        chosen = {seed: r for seed, runs in seeds.items() if (r := best(runs))}
        own = list(chosen.values())
        last = [r.record["curve"][-1] for r in own]
        row = [name, str(len(own)), " ".join(f"{lr:g}" for lr in sorted({r.run.lr for r in own}))]
        row += [spread([p[n] for p in last]) for n in ("loss", "accuracy", "exact", "general", "drift")]
        row += [spread([r.record["displacement"] for r in own], 5)]
        met = [(soonest(runs, base[s].loss), base[s]) for s, runs in seeds.items() if s in base]
        there = [(r, a) for r, a in met if r is not None]
        share = spread([r.step / a.run.steps for r, a in there], 2) if there else ""
        never = len(met) - len(there)
        row += [f"{share}{f' ({never} never)' if never and there else 'never' if never else ''}" or "-"]
        row += [spread([r.drift - a.record["curve"][-1]["drift"] for r, a in there])]
        mine = statistics.median(seconds(r) for r in own)
        row += [f"{mine:.2f}", f"{mine / statistics.median(seconds_of_adamw):.2f}" if seconds_of_adamw else "-"]
        row += [f"{max(r.record['state_mb'] for r in own):.0f}", f"{max(r.record['peak_mb'] for r in own):.0f}"]
        rows.append((statistics.fmean(r.loss for r in own), row))
    return table(heads, [row for _, row in sorted(rows, key=lambda entry: entry[0])])


def seconds(result: Result) -> float:
    """CPU seconds of a step."""
    return result.seconds() / max(1, len(result.record["losses"]))


def report(results: Sequence[Result]) -> str:
    """The tables of all cells, the figures before training, and what failed or diverged."""
    parts = []
    for title, group in cells(results).items():
        good = [r for r in group if math.isfinite(r.loss)]
        if good:
            start = ", ".join(f"{name} {value:.3f}" for name, value in good[0].record["start"].items())
            parts.append(f"**{title}**\n\nBefore: {start}\n\n{cell_table(good)}\n\n{rates_table(good)}")
    for what, bad in (
        ("failed", [r for r in results if "error" in r.record]),
        ("diverged", [r for r in results if "error" not in r.record and not math.isfinite(r.loss)]),
    ):
        if bad:
            parts.append(f"{len(bad)} runs {what}: {', '.join(sorted({f'{r.name} {r.run.lr:g}' for r in bad}))}")
    return "\n\n".join(parts)


def draw(results: Sequence[Result], path: Path) -> None:
    """A panel per cell: drift against task loss, a line through the rates of each contestant; lower left is better."""
    groups = cells([r for r in results if math.isfinite(r.loss)])
    made, panels = figure(path, max(1, len(groups)), 4.4)
    for panel, (title, group) in zip(panels, groups.items(), strict=False):
        for name, seeds in contestants(group).items():
            rates = sorted({r.run.lr for own in seeds.values() for r in own})
            ends = [[r.record["curve"][-1] for own in seeds.values() for r in own if r.run.lr == lr] for lr in rates]
            x, y = ([statistics.fmean(p[n] for p in end) for end in ends] for n in ("loss", "drift"))
            panel.plot(x, y, marker="o", markersize=3, linewidth=1.2, label=name)
        panel.set_title(title, fontsize=8)
        panel.set_xlabel("held-out task loss")
    panels[0].set_ylabel("drift on general text, nats a token")
    panels[0].legend(frameon=False, fontsize=7)
    made.savefig(path, dpi=130)
