"""Reads the log of a run as series of numbers by step: a Trainer's ``trainer_state.json``, or JSON lines."""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shampoo_deepspeed.runtime import json_text

TRAINER_STATE = "trainer_state.json"
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
PREFIX = "shampoo/"  # of `Shampoo.metrics()` in a Trainer's log
STEP = "step"
# What a Trainer adds to logs that is no measurement of training.
LEFT_OUT = re.compile(rf"{STEP}|epoch|total_flos|(\w+_)?runtime|\w+_per_second")
LARGEST_STEP = 2**53  # as float64 it is still exact

Points = list[tuple[int, float]]


class LogError(ValueError):
    """There is no log, or it cannot be read; the message names the file and what is needed."""


@dataclass(frozen=True)
class RunLog:
    """The numbers of a run by name, in the order of their steps; names are without ``shampoo/``."""

    source: Path
    series: Mapping[str, Points]

    @property
    def steps(self) -> int:
        """The last step."""
        return max(step for points in self.series.values() for step, _ in points)


def find_log(run: Path) -> Path:
    """The file with the log of a run: the file itself, or in a folder the state of the Trainer or the JSON lines.

    A Trainer writes its state at the end of training (``save_state``) and with each checkpoint; the latest counts.

    Raises:
        LogError: if there is none, or several files of JSON lines.
    """
    try:
        if run.is_file():
            return run
        if not run.is_dir():
            raise LogError(f"{run}: no such file or folder")
    except OSError as error:  # such as for a name that is too long
        raise LogError(f"{run} cannot be read: {error}") from None
    own = run / TRAINER_STATE
    saved = [(int(m[1]), p) for p in run.glob(f"*/{TRAINER_STATE}") if (m := CHECKPOINT.fullmatch(p.parent.name))]
    last = max(saved)[1] if saved else None
    if own.is_file() and (last is None or _last_step(own) >= _last_step(last)):
        return own
    if last is not None:
        return last
    lines = sorted(run.glob("*.jsonl"))
    if len(lines) == 1:
        return lines[0]
    found = f"several files of JSON lines, {', '.join(p.name for p in lines)}; name one of them" if lines else "no log"
    raise LogError(f"{run} has {found}: a {TRAINER_STATE}, also in a checkpoint-N, or one *.jsonl file is needed")


def _last_step(state: Path) -> int:
    """The step at which a Trainer wrote its state."""
    whole = _content(state)
    step = whole.get("global_step") if isinstance(whole, dict) else None
    if type(step) is not int:
        raise LogError(f"{state}: global_step = {reprlib.repr(step)} is not allowed: a whole number")
    return step


def read_log(run: Path) -> RunLog:
    """The log of a run, from the file that ``find_log`` finds.

    In JSON lines, each object has a "step" and numbers, such as ``{"step": 10, "loss": 2.5, **optimizer.metrics()}``.

    Raises:
        LogError: if the file cannot be read, or holds no numbers.
    """
    file = find_log(run)
    series: dict[str, dict[int, float]] = {}
    for record in _records(file):
        for name, value in record.items():
            if not LEFT_OUT.fullmatch(name) and type(value) in (int, float):
                series.setdefault(name.removeprefix(PREFIX), {})[record[STEP]] = _as_float(value)
    if not series:
        raise LogError(f"{file} holds no numbers by step")
    return RunLog(file, {name: sorted(points.items()) for name, points in series.items()})


def _records(file: Path) -> Iterable[Mapping[str, Any]]:
    """The objects of a log, each with a step."""
    found = _content(file)
    if file.suffix != ".jsonl":
        if isinstance(found, dict) and "log_history" not in found:
            raise LogError(f"{file} cannot be read as a log: it has no 'log_history'")
        found = found["log_history"] if isinstance(found, dict) else None
    if not isinstance(found, list):
        raise LogError(f"{file} is neither a {TRAINER_STATE} nor a file of JSON lines (*.jsonl)")
    for number, record in enumerate(found, 1):
        step = record.get(STEP) if isinstance(record, dict) else None
        if type(step) is not int or abs(step) > LARGEST_STEP:
            raise LogError(f"{file}: entry {number} has no whole number as {STEP!r}, at most 2**53")
    return found


def _content(file: Path) -> Any:
    """The value that a file holds; of JSON lines the list of their values."""
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".jsonl":
            return [json_text.parse(line) for line in text.split("\n") if line.strip()]
        return json_text.parse(text)
    except (OSError, ValueError) as error:
        raise LogError(f"{file} cannot be read as a log: {type(error).__name__}: {error}") from None


def _as_float(value: float) -> float:
    """A number; an integer that is too large for a float is infinite."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def finite(points: Iterable[tuple[int, float]]) -> Points:
    """The points whose values are finite."""
    return [(step, value) for step, value in points if math.isfinite(value)]
