"""kill -9 at random moments: a run resumed from the newest complete save is equal to the bit, or an error names it.

    python -m tests.torture.kills --kills 40 --ways single ddp fsdp2 zero1 zero2 zero3 --jobs 2

A reference run of each way notes a checksum of the weights after every step. Then the same run lives again and again:
it resumes, trains and saves every second step, until all its ranks, or one of them alone, are killed. Each life must
resume at the last step that was said to be saved, or later, and each of its steps must have the reference's checksum.
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tests.distributed.ranks.lives import KINDS, Life
from tests.support.launch import ROOT, Check, Launch, run_checks
from tests.support.moves import RANKS
from tests.torture.figures import KINDS as FAULTS
from tests.torture.figures import MARK, Figures
from tests.torture.figures import read as read_figures

WAYS = ("single", "ddp", "fsdp2", "zero1", "zero2", "zero3")
STEPS = 60
LONGEST = 2.5  # seconds that a life lasts at most, from the moment at which its ranks know each other
RUNNING = 0.9  # of the kills wait until the run has resumed; the others may hit its start
START = 300.0  # seconds within which the ranks know each other
ALONE = 0.3  # of the kills hit one rank only; the others get a second to notice


@dataclass
class Run:
    """One way of training with one kind of saves, through all its lives."""

    way: str
    kind: str
    folder: Path
    reference: list[dict[int, str]]
    generator: random.Random
    told: int = 0
    saved: int = 0  # the last step that any life said to have saved
    counts: Counter[str] = field(default_factory=Counter)
    figures: Figures = field(default_factory=Figures)
    alone: bool = False  # whether one rank alone was killed in the present life

    @property
    def state(self) -> Path:
        return self.folder / "state"

    def live_and_die(self, number: int) -> None:
        """Start a life, kill it at a random moment, and compare what it did."""
        self.state.mkdir(exist_ok=True)
        for file in self.state.glob("rank*.txt"):
            file.unlink()
        launch = Launch([check(self.way, self.kind, self.state)], self.folder / f"life{number}")
        launch.start(fork=True)
        self.figures.tried += 1
        try:
            self.wait_and_kill(launch)
        finally:
            launch.end_now()
        for rank in range(launch.ranks if not self.alone else 0):  # one that loses its peer gets errors of gloo
            if launch.file(0, rank).exists() and (failure := launch.read(0, rank).failure) is not None:
                self.figures.fault("bare", f"life {number}, rank {rank}: {failure}")
        self.compare(number)
        shutil.rmtree(launch.folder)

    def wait_and_kill(self, launch: Launch) -> None:
        self.alone, begun = False, time.monotonic()
        while not launch.ready():
            time.sleep(0.005)
            if time.monotonic() - begun > START:
                self.figures.fault("hangs", f"the ranks do not start: {launch.folder}")
                return
        if self.generator.random() < RUNNING:
            while not read(self.state / "rank0.txt") and launch.processes[0].poll() is None:
                time.sleep(0.002)
        end = time.monotonic() + self.generator.uniform(0.0, LONGEST)
        while time.monotonic() < end and any(process.poll() is None for process in launch.processes):
            time.sleep(0.002)
        if len(launch.processes) > 1 and self.generator.random() < ALONE:
            self.generator.choice(launch.processes).kill()
            self.counts["one rank alone"] += 1
            self.alone = True
            time.sleep(1.0)

    def compare(self, number: int) -> None:
        notes = [read(self.state / f"rank{rank}.txt") for rank in range(RANKS[self.way])]
        before, self.saved = self.saved, max(self.saved, *(numbers(found, "saved") for found in notes))
        refused = [line for found in notes for line in found if line.startswith("refused")]
        if refused:
            allowed = self.way.startswith("zero") and self.kind == "one_tag"  # DeepSpeed overwrites its own files
            self.counts["error names it"] += 1
            if not allowed:
                self.figures.fault("losses", f"life {number}: {refused[0]}")
            return self.begin_anew()
        for rank, found in enumerate(notes):
            for line in found:
                word, *values = line.split()
                if word == "resumed" and int(values[0]) < before:
                    self.figures.fault("losses", f"life {number}: resumed at {values[0]} though {before} was saved")
                if word == "step" and self.reference[rank].get(int(values[0])) != values[1]:
                    self.figures.fault("silent", f"life {number}, rank {rank}: other weights after step {values[0]}")
        self.counts["equal"] += any(line.startswith("step") for found in notes for line in found)
        self.counts["killed while it started"] += not any(map(len, notes))
        if any("end" in found for found in notes) or self.saved >= STEPS:
            self.begin_anew()
        return None

    def begin_anew(self) -> None:
        shutil.rmtree(self.state)
        self.saved = 0


def check(way: str, kind: str, folder: Path) -> Check:
    refresh = "background" if kind == "asynchronous" else "staggered"
    return Check("life", RANKS[way], "lives:live", Life(way, way, "default", str(folder), kind, STEPS, refresh))


def read(file: Path) -> list[str]:
    """The whole lines of a rank's notes."""
    text = file.read_text() if file.exists() else ""
    return text[: text.rfind("\n") + 1].splitlines()


def numbers(lines: Sequence[str], word: str) -> int:
    return max((int(line.split()[1]) for line in lines if line.startswith(f"{word} ")), default=0)


def torture(way: str, kind: str, kills: int, folder: Path, seed: int) -> Run:
    """Live and die so often; the run says what was wrong."""
    first = folder / "reference"
    first.mkdir(parents=True)
    result = run_checks([check(way, kind, first)], folder / "launch")["life"]
    assert result.failure is None, result.failure
    reference = []
    for rank in range(RANKS[way]):
        steps = [line.split() for line in read(first / f"rank{rank}.txt") if line.startswith("step")]
        reference.append({int(step): value for _, step, value in steps})
    run = Run(way, kind, folder, reference, random.Random(seed))
    for number in range(kills):
        run.live_and_die(number)
    return run


def row(run: Run, kills: int) -> list[str]:
    """A line of the table."""
    return [
        run.way, run.kind.replace("_", " "), str(kills), str(run.counts["one rank alone"]), str(run.counts["equal"]),
        str(run.counts["error names it"]), str(run.counts["killed while it started"]),
        str(sum(run.figures.faults.values())),
    ]  # fmt: skip


HEADS = ["way", "saves", "kills", "of one rank alone", "equal to the bit", "error names it", "before it began", "wrong"]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="ways and kinds at a time, each a process of its own")
    args = parser.parse_args(arguments)
    every = [(way, kind) for way in args.ways for kind in args.kinds]
    figures = Figures()
    print(" | ".join(HEADS), flush=True)
    if args.jobs > 1:
        with ThreadPoolExecutor(args.jobs) as pool:
            for text in pool.map(lambda one: in_a_process(one[0], one[1], args.kills, args.seed), every):
                add(figures, text)
        return figures.told()
    for way, kind in every:
        with tempfile.TemporaryDirectory() as folder:
            run = torture(way, kind, args.kills, Path(folder), args.seed)
        print(" | ".join(row(run, args.kills)), flush=True)
        figures.tried += run.figures.tried
        figures.faults += run.figures.faults
    return figures.told()


def in_a_process(way: str, kind: str, kills: int, seed: int) -> str:
    """What the torture of one way and kind prints."""
    command = [sys.executable, "-m", "tests.torture.kills", "--ways", way, "--kinds", kind]
    command += ["--kills", str(kills), "--seed", str(seed)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.stdout


def add(figures: Figures, text: str) -> None:
    """Print what a process has printed, and add its figures."""
    found = read_figures(text)
    own = (line for line in text.splitlines() if line != " | ".join(HEADS) and not line.startswith(MARK))
    print("\n".join(own), flush=True)
    if found is None:
        figures.fault("bare", "it ended without figures")
        return
    figures.tried += found["tried"]
    figures.faults.update({kind: found[kind] for kind in FAULTS if found[kind]})


if __name__ == "__main__":
    raise SystemExit(main())
