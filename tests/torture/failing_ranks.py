"""One rank dies, hangs or is late in each collective of a step, a save and a load; the others must not hang.

    python -m tests.torture.failing_ranks --ways ddp fsdp2

Every case is a job of two ranks. If the last rank dies or hangs, the other one must end with an error by the timeout of
its process group. If it is late, both must end with the weights of an undisturbed job.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.distributed.ranks.failing_ranks import PHASES, TIMEOUT, Case
from tests.support.launch import Check, Launch, run_checks
from tests.torture.figures import Figures

WAYS = ("ddp", "fsdp2")
SLACK = 10.0  # seconds beyond the timeout that a loaded machine may take to raise the error and to end


def seen(case: Case, folder: Path) -> list[dict[str, Any]]:
    """What the ranks saw in a job in which nothing ends a rank."""
    folder.mkdir(parents=True)
    placed = replace(case, folder=str(folder))
    result = run_checks([Check("job", 2, "failing_ranks:run", placed)], folder / "launch")["job"]
    assert result.failure is None, result.failure
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def fault(case: Case, folder: Path) -> str | None:
    """What is wrong with how the first rank ends if the last one dies or hangs; None if nothing is."""
    folder.mkdir(parents=True)
    launch = Launch([Check("job", 2, "failing_ranks:run", replace(case, folder=str(folder)))], folder / "launch")
    launch.start(fork=True)
    try:
        while not launch.ready():
            time.sleep(0.005)
        first = launch.processes[0]
        end = time.monotonic() + 30.0 + TIMEOUT + SLACK  # to begin, and to end
        while first.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        file = folder / "rank0.json"
        if first.poll() is None:
            return "raised an error and did not end" if file.exists() else "hangs"
        if not file.exists():
            return f"ended with code {first.poll()} and no error"
        found = json.loads(file.read_text())
        if not found["error"]:
            return "ended without an error"
        if found["seconds"] > TIMEOUT + SLACK:
            return f"took {found['seconds']:.0f} s to end with {found['error']}"
        return None
    finally:
        launch.end_now()


def cases(way: str, counts: dict[str, int]) -> list[Case]:
    """A case for each collective of each phase."""
    return [
        Case(way, way, "default", "", phase, number, what)
        for phase in PHASES
        for number in range(1, counts[phase] + 1)
        for what in ("dies", "hangs")
    ]


def late(way: str, folder: Path) -> list[str]:
    """What is wrong if the last rank is late in each collective of all phases."""
    plain = seen(Case(way, way, "default", ""), folder / "plain")
    wrong = []
    for phase in PHASES:
        found = seen(Case(way, way, "default", "", phase, 0, "late"), folder / phase.replace(" ", "_"))
        if [f.get("weights") for f in found] != [f["weights"] for f in plain]:
            wrong.append(f"{way}, {phase}: other weights if a rank is late: {found[0]['error']}")
    return wrong


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--every", type=int, default=1, help="only every n-th case")
    args = parser.parse_args(arguments)
    figures = Figures()
    for way in args.ways:
        with tempfile.TemporaryDirectory() as folder:
            counts = seen(Case(way, way, "default", ""), Path(folder) / "counted")[1]["counts"]
            wanted = cases(way, counts)[:: args.every]
            print(f"{way}: collectives {counts}; {len(wanted)} jobs", flush=True)
            figures.tried += len(PHASES)
            for text in late(way, Path(folder)):
                figures.fault("silent", text)
            for number, case in enumerate(wanted):
                found = fault(case, Path(folder) / str(number))
                figures.tried += 1
                if found:
                    place = f"collective {case.number} of {case.phase}"
                    hangs = "hangs" in found or "did not end" in found or "took" in found
                    figures.fault("hangs" if hangs else "bare", f"{way}: rank 1 {case.what} in {place}: {found}")
    return figures.told()


if __name__ == "__main__":
    raise SystemExit(main())
