"""Runs all parts of the torture one after the other, and prints a table of what they tried and found.

    python -m tests.torture --scale 0.01 --parts damage disk
    make torture                        # all parts, some hours on two cores; the table goes into docs/reliability.md

Each part is a process of its own, whose output is kept in a file. The exit code is 1 if a part has found a fault.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

from tests.torture.figures import KINDS, read

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- torture: begin -->", "<!-- torture: end -->"
LONGEST = 3 * 3600.0  # seconds; a part that takes longer hangs
HEADS = ["part", "what is tried", "times", "silent differences", "losses", "hangs", "bare tracebacks", "other faults",
         "seconds"]  # fmt: skip


@dataclass(frozen=True)
class Part:
    """A part of the torture.

    Args:
        what: it tries, for people.
        arguments: of its command line, for a scale.
        tried: how often it tries, for a scale, if its output does not say so.
    """

    what: str
    arguments: Callable[[float], list[str]]
    tried: Callable[[float], int] | None = None


def times(number: int, scale: float, least: int = 1) -> int:
    return max(least, round(number * scale))


def every(number: int, scale: float) -> int:
    """Of every so many cases one is tried at scale 1; never more than all."""
    return max(1, round(number / scale))


PARTS = {
    "kills": Part(
        "kill -9 of all ranks or of one, at random moments, in each way of training and kind of save",
        lambda scale: ["--kills", str(times(40, scale)), "--jobs", "2"],
    ),
    "damage": Part(
        "damage of a finished checkpoint, in every byte region and of every name, at six moments",
        lambda scale: ["--every", str(every(3, scale))],
    ),
    "disk": Part(
        "a call to the disk that fails, for all calls of saves and loads, on one and on two ranks",
        lambda scale: ["--every", str(every(1, scale))],
    ),
    "hostile": Part(
        "hostile manifests and data from the schema, each within 1 s and 200 MB",
        lambda scale: ["--examples", str(times(5000, scale))],
    ),
    "options": Part(
        "options, valid or not: trained 20 steps or refused at once",
        lambda scale: ["--examples", str(times(10_000, scale))],
        lambda scale: times(10_000, scale),
    ),
    "numbers": Part(
        "gradients of any pattern and scale",
        lambda scale: ["--examples", str(times(2000, scale))],
        lambda scale: times(2000, scale),
    ),
    "soak": Part(
        "steps in which everything is switched: memory within 1 %, threads and files constant",
        lambda scale: ["--steps", str(times(50_000, scale, 3000))],
    ),
    "failing_ranks": Part(
        "a rank that dies, hangs or is late in each collective of a step, a save and a load",
        lambda scale: ["--every", str(every(1, scale))],
    ),
}


def run(name: str, scale: float, folder: Path) -> tuple[list[str], bool]:
    """Run a part; returns its row of the table, and whether all is well."""
    part, log, begun = PARTS[name], folder / f"{name}.txt", time.monotonic()
    command = [sys.executable, "-m", f"tests.torture.{name}", *part.arguments(scale)]
    with log.open("w") as stream:
        process = subprocess.Popen(command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, env=environment())
        try:
            code: int | None = process.wait(LONGEST)
        except subprocess.TimeoutExpired:
            process.kill()
            code = None
    found = figures(log.read_text(errors="replace"), code, part.tried(scale) if part.tried else None)
    seconds = round(time.monotonic() - begun)
    row = [name, part.what, *(f"{found[key]:,}" for key in ("tried", *KINDS)), f"{seconds:,}"]
    return row, code == 0 and not any(found[kind] for kind in KINDS)


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def figures(text: str, code: int | None, tried: int | None) -> dict[str, int]:
    """A part's figures; what ended without them is a fault too.

    Args:
        code: exit code, None if it did not end.
        tried: how often it tried if all went well and it does not say so.
    """
    found = read(text)
    if found is None:
        found = {"tried": tried or 0, **dict.fromkeys(KINDS, 0)}
        if code is None:
            found["hangs"] = 1
        elif code and re.search(r"AssertionError: .*(is not finite|has moved too far)", text):
            found["silent"] = 1
        elif code or tried is None:
            found["bare"] = 1
    elif code and not any(found[kind] for kind in KINDS):
        found["bare"] = 1
    return found


def table(rows: Sequence[Sequence[str]]) -> str:
    lines = [HEADS, ["---"] * 2 + ["---:"] * (len(HEADS) - 2), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def processor() -> str:
    """The name of this machine's processor."""
    with Path("/proc/cpuinfo").open() as lines:
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def put_into_the_page(rows: Sequence[Sequence[str]], scale: float, page: Path = PAGE) -> None:
    """Replace the table of the last run."""
    text = page.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    _, mark, tail = rest.partition(END)
    assert mark, f"{page} has no place for the table"
    machine = (
        f"Run on {datetime.now(timezone.utc):%Y-%m-%d} at scale {scale:g} on {os.cpu_count()} cores "
        f"({processor()}), Python {platform.python_version()}, torch {torch.__version__}."
    )
    page.write_text(f"{head}{BEGIN}\n{machine}\n\n{table(rows)}\n{END}{tail}", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.torture", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", type=float, default=1.0, help="of how often each part tries")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--write", action="store_true", help="put the table into docs/reliability.md")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "torture", help="folder of the parts' output")
    args = parser.parse_args(arguments)
    args.output.mkdir(parents=True, exist_ok=True)
    rows, well = [], True
    for name in args.parts:
        row, good = run(name, args.scale, args.output)
        rows.append(row)
        well = well and good
        print(" | ".join([row[0], *row[2:]]), "" if good else f"FAULTS: {args.output / name}.txt", flush=True)
    print(f"\n{table(rows)}")
    (args.output / "table.json").write_text(json.dumps(rows))
    if args.write:
        put_into_the_page(rows, args.scale)
    return 0 if well else 1


if __name__ == "__main__":
    raise SystemExit(main())
