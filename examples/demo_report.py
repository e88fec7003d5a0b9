"""Compares the loss logs of several training runs, in one picture and one table."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

WINDOW = 25


@dataclass(frozen=True)
class Background:
    """Colours that are readable on a light or dark background; the picture's own is transparent or white."""

    runs: tuple[str, ...]
    text: str
    muted: str
    transparent: bool = True

    def settings(self) -> dict[Any, Any]:
        """Return settings for matplotlib with which the same numbers give the same file, byte for byte."""
        lines = dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color", "axes.labelcolor"), self.text)
        return lines | {"text.color": self.text, "grid.color": self.muted, "svg.hashsalt": "demo"}


WHITE = Background(("#d1495b", "#30638e", "#3c8d5a", "#7a5195"), "black", "grey", transparent=False)
LIGHT = Background(("#c8354a", "#30638e"), "#1f2328", "#6e7781")
DARK = Background(("#ff7b8b", "#79b8ff"), "#e6edf3", "#8b949e")


@dataclass(frozen=True)
class Run:
    """One run's log; `loss` is the mean of the last WINDOW logged losses, so no step sees the future."""

    name: str
    learning_rate: float
    steps: list[int]
    seconds: list[float]
    raw_loss: list[float]
    loss: list[float]
    eval_loss: float

    @classmethod
    def read(cls, name: str, learning_rate: float, path: Path) -> Run:
        log = json.loads(path.read_text())
        raw = [record["loss"] for record in log["train"]]
        return cls(
            name=name,
            learning_rate=learning_rate,
            steps=[record["step"] for record in log["train"]],
            seconds=[record["seconds"] for record in log["train"]],
            raw_loss=raw,
            loss=trailing_mean(raw, WINDOW),
            eval_loss=log["eval_loss"],
        )

    def first_at_most(self, loss: float) -> int | None:
        """Return the index of the first smoothed loss that is at most `loss`, after the first full window, or None."""
        return next((i for i, x in enumerate(self.loss) if i + 1 >= WINDOW and x <= loss), None)


def trailing_mean(values: list[float], window: int) -> list[float]:
    windows = [values[max(0, i + 1 - window) : i + 1] for i in range(len(values))]
    return [sum(w) / len(w) for w in windows]


def draw(runs: list[Run], title: str, path: Path, background: Background = WHITE) -> None:
    """Plot loss against steps and against seconds; a line shows the last run's final loss."""
    with rc_context(background.settings()):
        figure = Figure(figsize=(10, 3.5), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for run, colour in zip(runs, cycle(background.runs), strict=False):
            label = f"{run.name}, lr {run.learning_rate:g}"
            for panel, x in zip(panels, (run.steps, run.seconds), strict=True):
                panel.plot(x, run.raw_loss, color=colour, alpha=0.2, linewidth=0.8)
                panel.plot(x, run.loss, color=colour, linewidth=1.8, label=label)
        for panel, label in zip(panels, ("step", "seconds since training began"), strict=True):
            panel.axhline(runs[-1].loss[-1], color=background.muted, linewidth=0.8, linestyle="--")
            panel.set_xlabel(label)
            panel.set_xlim(left=0)
            panel.grid(alpha=0.25)
            panel.spines[["top", "right"]].set_visible(False)
            panel.set_facecolor("none")
        lowest = min(min(run.raw_loss) for run in runs)
        panels[0].set_ylim(lowest - 0.1, max(run.raw_loss[0] for run in runs) + 0.1)
        panels[0].set_ylabel(f"training loss (mean of {WINDOW} steps)")
        panels[0].legend(frameon=False)
        panels[1].annotate(
            f"{runs[-1].name}'s final loss",
            (0.01, runs[-1].loss[-1]),
            xycoords=("axes fraction", "data"),
            xytext=(0, -11),
            textcoords="offset points",
            color=background.muted,
            fontsize=9,
        )
        figure.suptitle(title)
        no_date = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, dpi=150, transparent=background.transparent, metadata=no_date)


def table(runs: list[Run]) -> str:
    """Return a table with one line per run; it says when each run reaches the last run's final loss."""
    target = runs[-1]
    header = ("optimizer", "lr", "train loss", "held-out loss", "steps", "seconds", "ms/step", "reaches*")
    lines = [header]
    for run in runs:
        reached = None if run is target else run.first_at_most(target.loss[-1])
        when = "-" if reached is None else f"step {run.steps[reached]}, {run.seconds[reached]:.0f} s"
        lines.append(
            (
                run.name,
                f"{run.learning_rate:g}",
                f"{run.loss[-1]:.3f}",
                f"{run.eval_loss:.3f}",
                str(run.steps[-1]),
                f"{run.seconds[-1]:.0f}",
                f"{1000 * run.seconds[-1] / run.steps[-1]:.0f}",
                when,
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    rows = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    note = f"* when the mean of {WINDOW} losses first reaches {target.name}'s final {target.loss[-1]:.3f}"
    return "\n".join([*rows, note])
