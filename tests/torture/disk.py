"""A disk that fails: whoever says "saved" has a complete checkpoint; else an error says why and the last save is there.

    python -m tests.torture.disk

The calls of one save (open, write, fsync, rename, mkdir, flock, ...) are counted. Then the n-th of them fails, for
every n: once, or from then on as on a full, read-only or vanished disk; before it had its effect or after. Saves wait
or are asynchronous, into an empty folder or over an earlier save, by one process or two ranks. Loads meet the same.
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import io
import logging
import os
import resource
import shutil
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from shampoo_deepspeed import CheckpointError, Shampoo, load_shampoo, save_shampoo, wait_for_saves
from tests.support.launch import Check, run_checks
from tests.support.stepping import drive, same_bits
from tests.torture.figures import Figures, Hang, at_most
from tests.torture.small_runs import SECONDS, STEPS, made, resumed, stepped

# The functions that stand for a kind of call.
GATES: dict[str, list[tuple[ModuleType, str]]] = {
    "open": [(os, "open"), (io, "open")],
    "write": [(os, "pwrite"), (os, "write")],
    "truncate": [(os, "ftruncate")],
    "fsync": [(os, "fsync")],
    "rename": [(os, "replace"), (os, "rename")],
    "mkdir": [(os, "mkdir")],
    "flock": [(fcntl, "flock")],
    "unlink": [(os, "unlink"), (os, "remove")],
    "rmdir": [(os, "rmdir")],
    "stat": [(os, "stat"), (os, "lstat"), (os, "fstat")],
    "list": [(os, "scandir"), (os, "listdir")],
    "read": [(os, "pread"), (os, "preadv")],
}
# What a call may fail with, once.
ERRORS: dict[str, tuple[int, ...]] = {
    "open": (errno.ENOSPC, errno.EACCES, errno.EMFILE, errno.EINTR, errno.EIO),
    "write": (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EINTR),
    "truncate": (errno.ENOSPC, errno.EIO),
    "fsync": (errno.EIO, errno.ENOSPC, errno.EINVAL, errno.EINTR),
    "rename": (errno.EIO, errno.ENOSPC, errno.EXDEV, errno.EACCES, errno.EPERM),
    "mkdir": (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EEXIST),
    "flock": (errno.EIO, errno.ENOTSUP, errno.ENOLCK, errno.EINTR),
    "unlink": (errno.EIO, errno.EACCES, errno.EBUSY),
    "rmdir": (errno.EIO, errno.ENOTEMPTY),
    "stat": (errno.EIO, errno.ESTALE, errno.EACCES),
    "list": (errno.EIO, errno.ESTALE),
    "read": (errno.EIO, errno.EINTR, errno.ESTALE),
}
CHANGING = ("open to write", "write", "truncate", "rename", "mkdir", "unlink", "rmdir")
# What fails from the n-th call on, and with what.
STATES: dict[str, tuple[tuple[str, ...], int]] = {
    "full": (("open to write", "write", "mkdir"), errno.ENOSPC),
    "read-only": (CHANGING, errno.EROFS),
    "gone": ((*GATES, "open to write"), errno.ENOTCONN),
    "without fsync": (("fsync",), errno.ENOTSUP),
    "without flock": (("flock",), errno.ENOTSUP),
    "without rename": (("rename",), errno.ENOTSUP),
}
WAYS_OF_WRITES = ("short", "nothing")  # fewer bytes than were asked, or none
WAYS_OF_RENAMES = ("removes", "half")  # the target is gone, or half written, when a rename that is not atomic fails


@dataclass(frozen=True)
class Fault:
    """What fails: the n-th of all calls, once or from then on.

    Args:
        number: of the call, from 1 on.
        gates: kinds of calls that fail; all others work.
        code: the errno.
        after: the call has its effect and then fails.
        way: of a write or rename that goes wrong otherwise.
    """

    name: str
    number: int
    gates: tuple[str, ...]
    code: int = 0
    after: bool = False
    onwards: bool = False
    way: str = ""


@dataclass
class Disk:
    """Counts calls, and lets some of them fail."""

    fault: Fault | None = None
    calls: list[str] = field(default_factory=list)
    lock: threading.RLock = field(default_factory=threading.RLock)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        with ExitStack() as stack:
            for gate, functions in GATES.items():
                for module, name in functions:
                    original = getattr(module, name)
                    stack.enter_context(patch.object(module, name, self.gated(gate, name, original)))
            yield

    def gated(self, gate: str, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            kind = gate
            if gate == "open":
                kind = "open to write" if writes(name, *args, **kwargs) else "open"
            fault = self.next(kind)
            if fault is None:
                return original(*args, **kwargs)
            if fault.way:
                return self.goes_wrong(fault, original, *args, **kwargs)
            if fault.after:
                found = original(*args, **kwargs)
                if gate == "open":
                    close(found)
            raise OSError(fault.code, os.strerror(fault.code))

        return call

    def next(self, kind: str) -> Fault | None:
        """Count a call; returns the fault if it is this one's."""
        with self.lock:
            self.calls.append(kind)
            fault, number = self.fault, len(self.calls)
        if fault is None or kind not in fault.gates:
            return None
        return fault if number == fault.number or (fault.onwards and number > fault.number) else None

    def goes_wrong(self, fault: Fault, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if fault.way == "nothing":
            return 0
        if fault.way == "short":
            data = memoryview(args[1])
            return original(args[0], data[: max(1, len(data) // 2)], *args[2:])
        source, target = args
        content = Path(source).read_bytes()
        Path(target).unlink(missing_ok=True)
        if fault.way == "half":
            Path(target).write_bytes(content[: len(content) // 2])
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def writes(name: str, *args: Any, **kwargs: Any) -> bool:
    """Whether an `open` is one to write, by its flags or its mode."""
    how = args[1] if len(args) > 1 else kwargs.get("mode", "r")
    if isinstance(how, int):
        return bool(how & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    return any(mark in how for mark in "wax+")


def close(found: Any) -> None:
    """Close what an `open` has given whose caller gets an error."""
    if isinstance(found, io.IOBase):
        found.close()
    else:
        os.close(found)


def faults(calls: Sequence[str]) -> Iterator[Fault]:
    """Every fault of a save or load that makes these calls."""
    for number, kind in enumerate(calls, 1):
        gate = kind.removesuffix(" to write")
        for code in ERRORS[gate]:
            yield Fault(f"{kind} {number}: {errno.errorcode[code]}", number, (kind,), code)
        if gate not in ("stat", "list", "read", "flock") and kind != "open":
            yield Fault(f"{kind} {number}: EIO after its effect", number, (kind,), errno.EIO, after=True)
        ways = {"write": WAYS_OF_WRITES, "rename": WAYS_OF_RENAMES}.get(gate, ())
        for way in ways:
            yield Fault(f"{kind} {number}: {way}", number, (kind,), way=way)
        for name, (gates, code) in STATES.items():
            if kind in gates:
                yield Fault(f"{name} from call {number} on", number, gates, code, onwards=True)
        if gate == "write":
            yield Fault(f"writes nothing from call {number} on", number, ("write",), way="nothing", onwards=True)


class Trial:
    """An optimizer that is saved over an earlier save of the same run, or into an empty folder."""

    def __init__(self, folder: Path, group: Any = None) -> None:
        self.group, self.folder, self.path = group, folder, folder / "saved"
        self.params, self.optimizer = made(STEPS, group)
        self.earlier = folder / "earlier"
        save_shampoo(self.optimizer, self.earlier)
        drive(self.optimizer, self.params, range(STEPS, STEPS + 2))
        save_shampoo(self.optimizer, folder / "new")
        self.old, self.new = (resumed(path, group) for path in (self.earlier, folder / "new"))
        assert not same_bits(self.old, self.new)

    def prepare(self, over: bool, first: bool = True) -> None:
        """Make an empty folder, or one with the earlier save, on the first rank."""
        if first:
            shutil.rmtree(self.path, ignore_errors=True)
            if over:
                shutil.copytree(self.earlier, self.path)
        if self.group is not None:
            dist.barrier()

    def save(self, asynchronous: bool) -> None:
        save_shampoo(self.optimizer, self.path, asynchronous=asynchronous).result()

    def calls(self, over: bool, asynchronous: bool, first: bool = True) -> list[str]:
        """The calls of one save that nothing disturbs."""
        self.prepare(over, first)
        disk = Disk()
        with disk.in_place():
            self.save(asynchronous)
        return disk.calls

    def outcome(self, fault: Fault | None, asynchronous: bool) -> tuple[str, str]:
        """How a save under a fault ends: "saved", "error", or of `figures.KINDS` the fault; and what it says."""
        disk = Disk(fault)
        try:
            with disk.in_place(), at_most(SECONDS):
                self.save(asynchronous)
            return "saved", ""
        except CheckpointError as error:
            return named(str(error), self.path, fault)
        except Hang:
            return "hangs", "no end in time"
        except BaseException:
            return "bare", traceback.format_exc()
        finally:
            with suppress(CheckpointError):
                wait_for_saves()

    def what_is_there(self, said: str, over: bool) -> tuple[str, str]:
        """Whether the folder holds what it must: the new state if "saved" was said, else that or the old one."""
        try:
            found = resumed(self.path, self.group)
        except CheckpointError as error:
            return ("losses", f"{said}, and then: {error}") if over or said == "saved" else ("nothing", "")
        except Exception:
            return "bare", f"{said}, and then: {traceback.format_exc()}"
        if same_bits(found, self.new):
            return "the new save", ""
        if said == "error" and over and same_bits(found, self.old):
            return "the old save", ""
        return "silent", f"{said}, and then other weights"

    def next_save(self) -> tuple[str, str]:
        """Whether the next save works, and leaves nothing of the one that failed."""
        try:
            self.save(False)
            if not same_bits(resumed(self.path, self.group), self.new):
                return "silent", "the next save gives other weights"
        except Exception:
            return "losses", f"the next save: {traceback.format_exc()}"
        left = sorted(file.name for file in self.path.iterdir())
        if self.group is not None:
            dist.barrier()  # before another rank prepares the folder anew
        return ("", "") if len(left) == 2 else ("others", f"the next save leaves {left}")


def named(text: str, path: Path, fault: Fault | None) -> tuple[str, str]:
    """How a CheckpointError counts: it must name the folder, and say why, also if another rank has met the fault."""
    why = [os.strerror(fault.code)] if fault is not None and fault.code else [""]
    if str(path) not in text or not any(word in text for word in why):
        return "others", f"does not say where or why: {text!r}"
    return "error", text


def count(figures: Figures, what: str, steps: Sequence[tuple[str, str]]) -> None:
    """Count one fault of the disk: the first of its steps that is at fault, or how all of them ended."""
    figures.tried += 1
    for how, text in steps:
        if how in ("silent", "losses", "hangs", "bare", "others"):
            figures.fault(how, f"{what}: {text}")
            return
    figures.seen[" and ".join(how for how, _ in steps if how)] += 1


def saves(trial: Trial, figures: Figures, every: int) -> None:
    """Every fault of a save, or only every n-th."""
    for over in (True, False):
        for asynchronous in (False, True):
            for number, fault in enumerate(faults(trial.calls(over, asynchronous))):
                if number % every:
                    continue
                trial.prepare(over)
                said = trial.outcome(fault, asynchronous)
                there = trial.what_is_there(said[0], over)
                what = f"{fault.name}, {'over a save' if over else 'empty folder'}, {asynchronous=}"
                count(figures, what, [said, there, trial.next_save()])


def loads(trial: Trial, figures: Figures, every: int) -> None:
    """Every fault of a load and of the step that reads: the same weights, or an error, and then a load that works."""
    disk = Disk()
    with disk.in_place():
        resumed(trial.earlier)
    for number, fault in enumerate(faults(disk.calls)):
        if number % every:
            continue
        params, optimizer = made()
        how = load_under(Disk(fault), params, optimizer, trial)
        count(figures, f"load: {fault.name}", [how])


def load_under(disk: Disk, params: list[Any], optimizer: Shampoo, trial: Trial) -> tuple[str, str]:
    try:
        with disk.in_place(), at_most(SECONDS):
            load_shampoo(optimizer, trial.earlier)
            found = stepped(params, optimizer)
        return ("loaded", "") if same_bits(found, trial.old) else ("silent", "other weights")
    except CheckpointError as error:
        load_shampoo(optimizer, trial.earlier)
        if not same_bits(stepped(params, optimizer), trial.old):
            return "silent", "the load after the error gives other weights"
        where = str(trial.earlier) in str(error)
        return ("refused", "") if where else ("others", f"does not say where: {str(error)!r}")
    except Hang:
        return "hangs", "no end in time"
    except BaseException:
        return "bare", traceback.format_exc()


def by_bytes(trial: Trial, figures: Figures, every: int) -> None:
    """The kernel itself refuses to let a file grow beyond so many bytes, for every 64th of them."""
    trial.calls(True, False)
    largest = max(file.stat().st_size for file in trial.path.rglob("*") if file.is_file())
    fault = Fault("", 0, (), errno.EFBIG)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in range(0, largest + 64, 64 * every):
        trial.prepare(True)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            trial.save(False)
            ended = "saved", ""
        except CheckpointError as error:
            ended = named(str(error), trial.path, fault)
        except Exception:
            ended = "bare", traceback.format_exc()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        count(
            figures, f"files of at most {limit} bytes", [ended, trial.what_is_there(ended[0], True), trial.next_save()]
        )


def under_signals(trial: Trial, figures: Figures, times: int) -> None:
    """Signals interrupt every call that waits; saves and loads go on."""
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    try:
        for number in range(times):
            trial.prepare(True)
            signal.setitimer(signal.ITIMER_REAL, 1e-4, 1e-4)
            trial.save(bool(number % 2))
            there = trial.what_is_there("saved", True)
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            count(figures, "signals", [("saved", ""), there])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


CLOCKS: Mapping[str, Callable[[], float]] = {
    "1970": lambda: 1.0,
    "2100": lambda: 4.1e9,
    "back": lambda: -time.monotonic(),
}


def with_other_clocks(trial: Trial, figures: Figures) -> None:
    """The clock is set back or forward between two saves: names and locks do not depend on it."""
    for name, clock in CLOCKS.items():
        for asynchronous in (False, True):
            trial.prepare(True)
            with patch("time.time", clock):
                trial.save(asynchronous)
            for file in trial.path.rglob("*"):
                os.utime(file, (1.0, 1.0))
            steps = [("saved", ""), trial.what_is_there("saved", True), trial.next_save()]
            count(figures, f"clock {name}", steps)


def by_two_ranks(figures: Figures, every: int, seconds: float = 3600.0) -> None:
    """The same faults on one of two ranks, which must both say the same."""
    with tempfile.TemporaryDirectory() as folder:
        check = Check("disk", 2, "torture:disk", (folder, every), seconds)
        result = run_checks([check], Path(folder) / "launch")["disk"]
    if result.failure is not None:
        figures.fault("hangs" if "no result in time" in result.failure else "bare", result.failure)
        return
    found = result.values[0]
    figures.tried += found["tried"]
    for how, number in found["seen"].items():
        figures.seen[how] += number
    for how, text in (fault for rank in result.values for fault in rank["faults"]):
        figures.fault(how, text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="only every n-th fault")
    parser.add_argument("--ranks", nargs="+", type=int, choices=(1, 2), default=(1, 2))
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    logging.getLogger("shampoo_deepspeed").setLevel(logging.CRITICAL)
    figures = Figures()
    if 1 in args.ranks:
        with tempfile.TemporaryDirectory() as folder:
            trial = Trial(Path(folder))
            saves(trial, figures, args.every)
            loads(trial, figures, args.every)
            by_bytes(trial, figures, args.every)
            under_signals(trial, figures, max(10, 200 // args.every))
            with_other_clocks(trial, figures)
    if 2 in args.ranks:
        by_two_ranks(figures, args.every)
    return figures.told()


if __name__ == "__main__":
    raise SystemExit(main())
