"""Output that the benchmarks share: a description of the machine, statistics, tables and plots."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


def machine() -> str:
    """Return CPU or accelerator, cores, threads, torch's version and the date, in one line."""
    name = _cpu()
    if torch.cuda.is_available():
        name += f", {torch.cuda.get_device_name()}"
    today = datetime.date.today().isoformat()
    return f"{os.cpu_count()} CPU cores, {name}; {torch.get_num_threads()} threads; torch {torch.__version__}; {today}"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a Markdown table; numbers have three significant digits."""
    texts = [[_text(cell) for cell in row] for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(heads, *texts, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = f"|{'|'.join('-' * (w + 2) for w in widths)}|"
    return "\n".join([line(list(heads)), rule, *(line(row) for row in texts)])


def _text(cell: Any) -> str:
    if not isinstance(cell, float):
        return str(cell)
    return (
        f"{cell:.0f}" if abs(cell) >= 100 else f"{cell:.3g}" if abs(cell) < 1 else f"{cell:.2f}".rstrip("0").rstrip(".")
    )


def windows(values: Sequence[float], length: int) -> list[Sequence[float]]:
    """Return whole windows of consecutive steps; each contains every phase of a refresh once."""
    return [values[n : n + length] for n in range(0, len(values) - length + 1, length)]


def ratio_of_means(values: Sequence[float], base: Sequence[float], length: int) -> float:
    """Return the median over windows of this ratio: the mean step over the base's mean step in the same window."""
    pairs = zip(windows(values, length), windows(base, length), strict=True)
    return statistics.median(statistics.fmean(v) / statistics.fmean(b) for v, b in pairs)


def mean(values: Sequence[float], length: int) -> float:
    """Return the median over windows of the mean step."""
    return statistics.median(statistics.fmean(w) for w in windows(values, length))


def slowest(values: Sequence[float], length: int) -> float:
    """Return the median over windows of the slowest step."""
    return statistics.median(max(w) for w in windows(values, length))


def figure(path: Path, columns: int = 1, height: float = 3.6) -> tuple[Any, Any]:
    """Return a matplotlib figure and its panels, in the style of the project's plots."""
    from matplotlib.figure import Figure

    path.parent.mkdir(parents=True, exist_ok=True)
    made = Figure(figsize=(9, height), layout="constrained")
    panels = made.subplots(1, columns, squeeze=False)
    for panel in panels[0]:
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    return made, panels[0]
