"""What a rank does in the checks of collectives: raises errors and returns what every rank gets of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from shampoo_deepspeed import CheckpointError, LayoutError, ShampooConfig
from shampoo_deepspeed.distributed.collectives import (
    all_gather_numbers,
    all_gather_objects,
    decide_on_first_rank,
    first_rank_that,
    job_group,
    object_of_rank,
    on_all_ranks,
)
from shampoo_deepspeed.distributed.frameworks import Layout, Parameter, Shard
from shampoo_deepspeed.engine.policy import policy_of
from shampoo_deepspeed.engine.step_unit import StepUnit
from shampoo_deepspeed.geometry.boxes import Box


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

# Options that the second rank gives otherwise.
OTHERS: dict[str, dict[str, Any]] = {
    "options": {"max_preconditioner_dim": 8, "memory": "half"},
    "lr": {"lr": 0.5},
    "rules": {"rules": [{"match": "*w*", "factor_beta": 0.5}]},
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
    seen["numbers"] = all_gather_numbers([7] * (1 + 2 * dist.get_rank()), job_group())
    seen["of the second"] = object_of_rank(1, f"of rank {dist.get_rank()}", job_group())
    seen["first"] = [first_rank_that(dist.get_rank() in those, job_group()) for those in ((), (1,), (0, 1))]
    seen["layouts"] = refused_layouts(dist.get_rank())
    return seen


def refused_layouts(rank: int) -> dict[str, str]:
    """Return what is raised if the second rank has other options, kinds or a problem, or if nobody holds a row.

    Without phases of a staggered refresh, which would show another policy too.
    """
    seen = {}
    for name in ("options", "lr", "rules", "kinds", "problem", "rows"):
        other = OTHERS.get(name, {}) if rank else {}
        config = ShampooConfig.from_options({"max_preconditioner_dim": 4, "refresh": "sync", **other})
        kinds = frozenset({"embedding"} if rank and name == "kinds" else ())
        parameter = Parameter("w", (8, 8), 0, "w", kinds)
        shard = Shard(0, Box((4 * rank, 0), (4 - (name == "rows"), 8)), 0, 0)
        layout = Layout([parameter], [torch.zeros(shard.box.lengths)], [0], [shard], dist.group.WORLD)
        layout.problem = "it is damaged" if rank and name == "problem" else None
        try:
            StepUnit(layout, {"w": policy_of(parameter, config)}, {0: config})
        except LayoutError as error:
            seen[name] = str(error)
    return seen


def both_fail() -> tuple[str, str]:
    """Return the message that is raised if each rank has its own error, and the message of the cause."""
    try:
        with on_all_ranks(job_group()):
            raise RuntimeError(f"of rank {dist.get_rank()}")
    except RuntimeError as caught:
        return str(caught), str(caught.__cause__)
