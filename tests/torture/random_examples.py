"""Runs a check on many random examples, in a test or from the command line."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from typing import TypeVar

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

Example = TypeVar("Example")


def check_all(
    check: Callable[[Example], object], examples: st.SearchStrategy[Example], count: int, derandomize: bool = False
) -> None:
    """Call ``check`` with this many examples; if one raises, a small one that does is shown. Warnings are not logged.

    Args:
        derandomize: take the same examples every time.
    """
    limits = settings(
        max_examples=count,
        deadline=None,
        derandomize=derandomize,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )

    @limits
    @given(examples)
    def check_one(example: Example) -> None:
        check(example)

    logging.disable(logging.WARNING)
    try:
        check_one()
    finally:
        logging.disable(logging.NOTSET)


def count_from_command_line(description: str | None, default: int) -> int:
    """Read ``--examples`` from the command line, for a run on one thread."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--examples", type=int, default=default)
    torch.set_num_threads(1)
    return int(parser.parse_args(sys.argv[1:]).examples)
