"""The results file: a JSON line per finished run, appended in one write, so that it can grow while it is read."""

from __future__ import annotations

import fcntl
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from benchmarks.convergence.training import Run

R = TypeVar("R")  # what determines a run: this benchmark's `Run` or that of another one


@dataclass(frozen=True)
class Result(Generic[R]):
    """A run, the name under which it ran, and what was recorded."""

    run: R
    name: str
    record: dict[str, Any]

    @property
    def loss(self) -> float:
        """On held-out documents; infinite if the run diverged or failed."""
        loss = self.record.get("held_out")
        return math.inf if loss is None else float(loss)

    def seconds(self, tokens: int | None = None) -> float:
        """CPU seconds of all steps; with `tokens`, what they would be with so many tokens a step."""
        run: Any = self.run
        share = 1.0 if tokens is None else tokens / (run.batch * run.length)
        return float(self.record["model_seconds"]) * share + float(self.record["optimizer_seconds"])


def append(file: Path, result: Result) -> None:
    """Add a line, under a lock, because several loops may write into one file."""
    line = json.dumps({"name": result.name, "run": asdict(result.run), **result.record}) + "\n"
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab+") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        if stream.seek(0, 2):
            stream.seek(-1, 2)
            if stream.read(1) != b"\n":  # what a full disk or a killed process left
                line = "\n" + line
        stream.write(line.encode())


def read(file: Path, kind: type = Run) -> list[Result]:
    """All whole lines of runs of a kind; the last one counts if two are of the same run."""
    found: dict[str, Result] = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            record = json.loads(line)
            run, name = kind(**record.pop("run")), record.pop("name")
        except (ValueError, KeyError, TypeError):
            continue
        found[run.key] = Result(run, name, record)
    return list(found.values())


def best(results: Iterable[Result]) -> Result | None:
    """The result with the lowest loss, if one is finite."""
    lowest = min(results, key=lambda r: r.loss, default=None)
    return lowest if lowest is not None and math.isfinite(lowest.loss) else None
