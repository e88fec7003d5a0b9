"""Progress of long work: one line that is rewritten on a terminal, else a line in the log now and then."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch.distributed as dist

logger = logging.getLogger("shampoo_deepspeed")

QUIET = 2.0  # seconds that nobody needs to be kept informed of
ON_A_TERMINAL = 0.5  # seconds between two lines
IN_THE_LOG = 30.0
ERASED = "\r\x1b[K"
LARGE = 64 << 20  # bytes; to write or read less takes no time worth showing
UNSHOWN: AbstractContextManager[Callable[[int], None]] = nullcontext(deque[int](maxlen=0).append)  # forgets at once


@contextmanager
def progress(what: str, total: int, form: Callable[[int], str] = str) -> Iterator[Callable[[int], None]]:
    """Show how far work is, on the first rank; within it, call what is yielded with what has just been done.

    Work of less than two seconds shows nothing. Longer work ends with a line in the log, at level INFO.

    Args:
        what: the work, as in "saving".
        form: turns a number into text, with its unit.
    """
    if dist.is_initialized() and dist.get_rank() != 0:
        yield list[int]().append
        return
    state = _State(what, total, form)
    thread = threading.Thread(target=state.show, name="shampoo-progress", daemon=True)
    thread.start()
    try:
        yield state.parts.append  # no call of ours for each piece of work
    finally:
        state.finished.set()
        thread.join()
    if state.seconds > QUIET:
        logger.info("%s: %s in %.1f s", what, form(state.done), state.seconds)


class _State:
    """How far the work is, for two threads: one works, one shows."""

    def __init__(self, what: str, total: int, form: Callable[[int], str]) -> None:
        self.what, self.total, self.form = what, total, form
        self.parts: list[int] = []  # what has been done
        self.begin = time.monotonic()
        self.finished = threading.Event()
        # What a thread of ours writes while the user's own output goes on would be in its way.
        self.terminal = sys.stderr.isatty() and threading.current_thread() is threading.main_thread()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.begin

    @property
    def done(self) -> int:
        return sum(self.parts)

    def line(self) -> str:
        share = f"{min(1.0, self.done / self.total):.0%}" if self.total else "100%"
        return f"{self.what}: {share}, {self.form(self.done)} of {self.form(self.total)}, {self.seconds:.0f} s"

    def show(self) -> None:
        wait, shown = (QUIET if self.terminal else IN_THE_LOG), False
        while not self.finished.wait(wait):
            if self.terminal:
                print(f"{ERASED}{self.line()}", end="", file=sys.stderr, flush=True)
                wait, shown = ON_A_TERMINAL, True
            else:
                logger.info(self.line())
        if shown:
            print(ERASED, end="", file=sys.stderr, flush=True)


def mebibytes(size: int) -> str:
    """A number of bytes as text."""
    return f"{size / 2**20:,.0f} MiB"
