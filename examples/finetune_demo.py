"""Fine-tunes one pre-trained model twice, with Shampoo and with AdamW, and draws what each learns and forgets.

Both runs are finetune.py with the same model, data, schedule and seed. AdamW's rate is the best of three on another
task (docs/fine-tuning.md), and Shampoo's preset "finetune" has the same.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

from matplotlib.figure import Figure

from demo_report import WHITE

HERE = Path(__file__).resolve().parent
CONTENDERS = {"Shampoo": ("shampoo", 2e-4), "AdamW": ("adamw", 2e-4)}
FIGURES = {
    "eval_task_loss": "held-out loss of the task",
    "eval_task_accuracy": "held-out accuracy of the task",
    "eval_general_loss": "loss on text that it knew",
}


@dataclass(frozen=True)
class Run:
    """The evaluations of a run: steps, and by name as many numbers."""

    name: str
    learning_rate: float
    steps: list[int]
    figures: dict[str, list[float]]
    seconds: float

    @classmethod
    def read(cls, name: str, learning_rate: float, folder: Path) -> Run:
        """Read what finetune.py leaves in its folder.

        Raises:
            ValueError: if evaluations lack a figure.
        """
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        found = {figure: {h["step"]: h[figure] for h in history if figure in h} for figure in FIGURES}
        steps = sorted(found["eval_task_loss"])
        if not steps or any(sorted(points) != steps for points in found.values()):
            raise ValueError(f"{folder}: the log has no evaluations, or they lack one of {', '.join(FIGURES)}")
        seconds = next(h["train_runtime"] for h in reversed(history) if "train_runtime" in h)
        return cls(name, learning_rate, steps, {n: [p[s] for s in steps] for n, p in found.items()}, seconds)


def train(optimizer: str, rate: float, folder: Path, steps: int, more: list[str]) -> None:
    """Run the training script in its own process."""
    command = [sys.executable, str(HERE / "finetune.py"), "--optimizer", optimizer, "--learning_rate", str(rate)]
    command += ["--output_dir", str(folder), "--model_cache", str(folder.parent), "--max_steps", str(steps)]
    subprocess.run([*command, "--eval_steps", str(max(1, steps // 4)), *more], check=True)


def draw(runs: list[Run], path: Path) -> None:
    """Plot each figure against steps."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    for panel, (name, title) in zip(figure.subplots(1, len(FIGURES)), FIGURES.items(), strict=True):
        for run, colour in zip(runs, cycle(WHITE.runs), strict=False):
            label = f"{run.name}, lr {run.learning_rate:g}"
            panel.plot(run.steps, run.figures[name], marker="o", markersize=3, color=colour, label=label)
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("step")
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False)
    figure.savefig(path, dpi=150)


def table(runs: list[Run]) -> str:
    """Return the figures before and after, one line per run."""
    rows: list[tuple[str, ...]] = [("optimizer", "lr", "task loss", "accuracy", "general loss", "seconds")]
    first = [values[0] for values in runs[0].figures.values()]
    rows.append(("before", "", *(f"{value:.3f}" for value in first), ""))
    for run in runs:
        last = [f"{values[-1]:.3f}" for values in run.figures.values()]
        rows.append((run.name, f"{run.learning_rate:g}", last[0], last[1], last[2], f"{run.seconds:.0f}"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, default=Path("finetune_output"))
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--draw_only", action="store_true", help="train nothing; draw the runs in output_dir")
    arguments, more = parser.parse_known_args()  # what is left goes to finetune.py
    output: Path = arguments.output_dir.resolve()
    runs = []
    for name, (optimizer, rate) in CONTENDERS.items():
        folder = output / optimizer
        if not arguments.draw_only:
            print(f"\n{name}: {arguments.steps} steps", flush=True)
            train(optimizer, rate, folder, arguments.steps, more)
        runs.append(Run.read(name, rate, folder))
    picture = output / "learning_and_forgetting.png"
    draw(runs, picture)
    report = table(runs)
    (output / "table.txt").write_text(report + "\n")
    print(f"\n{report}\n\npicture: {picture}")


if __name__ == "__main__":
    main()
