"""The ten-minute check: losses of the default recipe on two short runs of each small model against those on record.

Runs of one seed differ by their rounding alone unless something changed, so their mean difference tells 0.03 nats.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.convergence.experiments import Experiment
from benchmarks.convergence.results import Result
from benchmarks.report import table

RECORD = Path(__file__).with_name("quick.json")
REGRESSION = 0.03  # nats, of the mean over all runs
EXPERIMENTS = [
    Experiment("default", cells=("llama-4m", "gpt2-4m"), seeds=(0, 1), budgets=(0.4,), rates=(3e-3,), walk=False),
    Experiment("default", cells=("llama-4m",), seeds=(0,), budgets=(1.0,), rates=(3e-3,), walk=False),
]


def key(result: Result) -> str:
    """A run as the record names it: its options may change with the default, and what it is measured by may not."""
    run = result.run
    return f"{run.text} {run.cell} seed {run.seed}, {run.steps} steps of {run.batch} x {run.length}"


def remember(results: Sequence[Result], record: Path = RECORD) -> None:
    """Put the losses on record; those of other texts stay."""
    known = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    known |= {key(r): round(r.loss, 4) for r in results}
    record.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def compare(results: Sequence[Result], record: Path = RECORD) -> tuple[str, bool]:
    """A table of losses now and on record, and whether the mean is worse by less than `REGRESSION`."""
    known = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    missing = [key(r) for r in results if key(r) not in known]
    if missing:
        return f"not on record: {missing[0]}; use --remember with the code to compare with", False
    rows = [[key(r), f"{r.loss:.4f}", f"{known[key(r)]:.4f}", f"{r.loss - known[key(r)]:+.4f}"] for r in results]
    mean = statistics.fmean(r.loss - known[key(r)] for r in results)
    good = mean < REGRESSION
    text = table(["run", "loss", "on record", "difference"], rows)
    return f"{text}\n\nmean difference {mean:+.4f} nats: {'no regression' if good else 'a REGRESSION'}", good
