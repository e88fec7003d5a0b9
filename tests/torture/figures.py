"""What a part of the torture has tried and found, as one line that `python -m tests.torture` reads again."""

from __future__ import annotations

import json
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

# silent: weights or state other than they must be, and no error. losses: a save that was complete cannot be read, or
# "saved" was said of one that is not. hangs: no end in time. bare: an exception that is not the package's own. others:
# memory that grows, a limit that is passed, an error that names nothing.
KINDS = ("silent", "losses", "hangs", "bare", "others")
MARK = "figures: "


@dataclass
class Figures:
    """How often a part tried something, and its faults by kind."""

    tried: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    seen: Counter[str] = field(default_factory=Counter)  # how the harmless ones ended

    def fault(self, kind: str, text: str) -> None:
        assert kind in KINDS
        self.faults[kind] += 1
        print(f"    {kind}: {text}", flush=True)

    def told(self) -> int:
        """Print the figures; returns the exit code."""
        if self.seen:
            print(", ".join(f"{count:,} {how}" for how, count in sorted(self.seen.items())))
        found = {kind: self.faults[kind] for kind in KINDS}
        print(f"{MARK}{json.dumps({'tried': self.tried, **found})}", flush=True)
        return 1 if self.faults else 0


def read(text: str) -> dict[str, int] | None:
    """The figures at the end of a part's output, if it got so far."""
    lines = [line for line in text.splitlines() if line.startswith(MARK)]
    return dict(json.loads(lines[-1].removeprefix(MARK))) if lines else None


class Hang(BaseException):
    """Something did not end in time."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise Hang in the main thread after so many seconds."""

    def ring(_: int, __: FrameType | None) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
