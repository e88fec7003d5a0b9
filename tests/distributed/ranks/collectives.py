"""What a rank does in the checks of collectives: raises errors and returns what every rank gets of them."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from shampoo_deepspeed import CheckpointError
from shampoo_deepspeed.distributed.collectives import (
    all_gather_objects,
    decide_on_first_rank,
    job_group,
    on_all_ranks,
)


class NeedsTwo(ValueError):
    """An error that cannot be rebuilt from its message alone."""

    def __init__(self, what: str, why: str) -> None:
        super().__init__(f"{what}: {why}")


ERRORS = {
    "checkpoint": CheckpointError("damaged"),
    "system": OSError(28, "No space left"),
    "key": KeyError("w"),
    "unicode": UnicodeDecodeError("utf-8", b"x", 0, 1, "no such byte"),
    "two": NeedsTwo("block", "too large"),
}


def shared_errors(_: None) -> dict[str, Any]:
    """Return type, message and cause of each error that the second rank raises."""
    seen: dict[str, Any] = {}
    for name, error in ERRORS.items():
        try:
            with on_all_ranks(job_group()):
                if dist.get_rank() == 1:
                    raise error
        except Exception as caught:
            seen[name] = (type(caught).__name__, str(caught), caught.__cause__ is error)
    with on_all_ranks(job_group()):
        pass
    seen["both"] = both_fail()
    seen["decided"] = decide_on_first_rank(dist.get_rank(), sum, job_group())
    try:
        decide_on_first_rank(None, lambda _: dict[str, int]()["nothing"], job_group())
    except LookupError as caught:
        seen["undecided"] = str(caught)
    seen["gathered"] = all_gather_objects(dist.get_rank(), job_group())
    return seen


def both_fail() -> tuple[str, str]:
    """Return the message that is raised if each rank has its own error, and the message of the cause."""
    try:
        with on_all_ranks(job_group()):
            raise RuntimeError(f"of rank {dist.get_rank()}")
    except RuntimeError as caught:
        return str(caught), str(caught.__cause__)
