"""Measures the steps of one rank: time, bytes, refreshed blocks, condition numbers and the length of updates.

Measuring runs no collective and never waits for the device. An accelerator's times are those of its queue: they come
from events that are read once they have passed.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from shampoo_deepspeed.runtime.devices import Arriving


class Stopwatch:
    """Adds up spans of time, in milliseconds: of the process for CPU tensors, else of the device's current stream."""

    def __init__(self) -> None:
        self._milliseconds = 0.0
        self._running: deque[tuple[torch.Event, torch.Event]] = deque()

    @contextmanager
    def span(self, device: torch.device) -> Iterator[None]:
        """Measure the work done within the context; on an accelerator, the work queued within it."""
        if device.type == "cpu":
            begin = time.perf_counter()
            yield
            self._milliseconds += 1e3 * (time.perf_counter() - begin)
            return
        start, end = torch.Event(device, enable_timing=True), torch.Event(device, enable_timing=True)
        start.record(torch.accelerator.current_stream(device))
        yield
        end.record(torch.accelerator.current_stream(device))
        self._running.append((start, end))
        self._add_finished()  # keeps only the spans that are still in the device's queue

    def _add_finished(self) -> None:
        while self._running and self._running[0][1].query():
            start, end = self._running.popleft()
            self._milliseconds += start.elapsed_time(end)

    def add(self, milliseconds: float) -> None:
        """Count a span that another stopwatch has measured."""
        self._milliseconds += milliseconds

    def read(self) -> float:
        """Milliseconds since the last reading; a span that the device has not finished counts in a later one."""
        self._add_finished()
        total, self._milliseconds = self._milliseconds, 0.0
        return total


class ExchangeMeter:
    """Counts a unit's steps and the bytes that it moved between ranks, and measures the time."""

    def __init__(self) -> None:
        self.watch = Stopwatch()
        self.steps = 0
        self.bytes_moved = 0


class RefreshMeter:
    """Measures the refreshes of a stack of blocks.

    Attributes:
        rows: those refreshed since the last reading.
        asked: whether anybody has ever asked for condition numbers, which cost an accelerator operators.
    """

    def __init__(self) -> None:
        self.watch = Stopwatch()
        self.rows: set[int] = set()
        self.asked = False
        self._worst: float | None = None
        self._read = False
        self._arriving: deque[Arriving] = deque()  # condition numbers that the device has not computed yet

    @contextmanager
    def refreshing(self, device: torch.device) -> Iterator[list[Tensor]]:
        """Measure the time of a refresh; yields a list to which its condition numbers, 0-d, are appended."""
        conditions: list[Tensor] = []
        with self.watch.span(device):
            yield conditions
        if not conditions:
            return
        widest = reduce(torch.promote_types, [condition.dtype for condition in conditions])
        worst = torch.stack([condition.to(widest) for condition in conditions]).amax()
        if worst.device.type == "cpu":
            self._note(worst.item())
        else:
            self._arriving.append(Arriving(worst.view(1)))
            self._note_arrived()

    def _note_arrived(self) -> None:
        while self._arriving and self._arriving[0].arrived:
            self._note(*self._arriving.popleft().read())

    def _note(self, condition: float) -> None:
        self._worst = condition if self._read or self._worst is None else max(self._worst, condition)
        self._read = False

    def take(self, other: RefreshMeter) -> None:
        """Add what the meter of a refresh on another thread has measured since the last call."""
        self.watch.add(other.watch.read())
        other._note_arrived()
        condition, other._worst = other._worst, None
        if condition is not None:
            self._note(condition)

    def read_condition(self) -> float | None:
        """The largest condition number of the refreshes since the last reading; without any, the previous value.

        A refresh that the device has not finished counts in a later reading.
        """
        self._note_arrived()
        self._read = self.asked = True
        return self._worst


class UpdateMeter:
    """Measures the updates of a unit's shards in one step after each reading, so that other steps cost nothing.

    Attributes:
        due: whether the next step is to be measured.
    """

    def __init__(self) -> None:
        self.due = False
        self._elements = 0
        self._norm: float | None = None
        self._arriving: Arriving | None = None

    def note(self, norms: Sequence[Tensor], elements: int) -> None:
        """Note the norms, 0-d, of all parts of a step's updates, before they are multiplied by the learning rate."""
        self.due, self._elements = False, elements
        if not norms:
            return
        norm = torch.linalg.vector_norm(torch.stack(list(norms)))
        if norm.device.type == "cpu":
            self._norm = norm.item()
        else:
            self._arriving = Arriving(norm.view(1))

    def read(self) -> tuple[float, int]:
        """(sum of squares, elements) of the last step that was measured, zeros without any; asks for the next step.

        On an accelerator, a step that the device has not finished counts in a later reading.
        """
        self.due = True
        if self._arriving is not None and self._arriving.arrived:
            (self._norm,), self._arriving = self._arriving.read(), None
        return (0.0, 0) if self._norm is None else (self._norm**2, self._elements)


class Measured(NamedTuple):
    """The meters of one step unit, and how many blocks its stacks hold on this rank."""

    exchange: ExchangeMeter
    stacks: Sequence[RefreshMeter]
    blocks: int
    updates: UpdateMeter


def read(units: Iterable[Measured], rejected_steps: int) -> dict[str, float]:
    """The metrics of an optimizer since the last reading; see ``UnitOptimizer.metrics``."""
    out = {"refresh_ms": 0.0, "exchange_ms": 0.0, "bytes_moved": 0.0}
    refreshed = held = elements = 0
    squares = 0.0
    conditions = []
    for unit in units:
        steps = max(1, unit.exchange.steps)
        out["refresh_ms"] += sum(stack.watch.read() for stack in unit.stacks) / steps
        out["exchange_ms"] += unit.exchange.watch.read() / steps
        out["bytes_moved"] += unit.exchange.bytes_moved / steps
        unit.exchange.steps = unit.exchange.bytes_moved = 0
        held += unit.blocks
        own, count = unit.updates.read()
        squares, elements = squares + own, elements + count
        for stack in unit.stacks:
            refreshed += len(stack.rows)
            stack.rows.clear()
            condition = stack.read_condition()
            conditions += [] if condition is None else [condition]
    out["refreshed_share"] = refreshed / max(1, held)
    if conditions:
        out["largest_condition_number"] = max(conditions)
    if elements:
        out["update_rms"] = math.sqrt(squares / elements)
    return {**out, "rejected_steps": float(rejected_steps)}
