"""A run that is saved and resumed under the same framework equals the uninterrupted one, to the last bit."""

from __future__ import annotations

import pytest

from tests.support.covering import fewest
from tests.support.fsdp_runs import Run
from tests.support.launch import Ask, Check, named

PRECONDITIONERS = ("shampoo", "soap", "kl_shampoo", "kl_soap", "soap_muon", "muon")
SCHEDULES = ("sync", "staggered", "background")
# Layout, model and number of ranks. ZeRO's are in test_zero_checkpoints.py, the Trainer's in test_checkpoint_hooks.py.
FRAMEWORKS = [
    ("replicas", "odd", 2),
    ("rows", "odd", 2),
    ("columns", "wide", 2),
    ("fsdp1_full_shard", "odd", 2),
    ("units_full_shard", "odd", 2),
    ("hsdp", "odd", 4),
    ("tensor_parallel", "wide", 4),
]
EVERY = [
    (
        Run(model=model, settings="default", layout=layout, extra={"preconditioner": p, "refresh": schedule}),
        ranks,
    )
    for layout, model, ranks in FRAMEWORKS
    for p in PRECONDITIONERS
    for schedule in SCHEDULES
]


def features(item: tuple[Run, int]) -> set[object]:
    """Return a run's features: preconditioner with refresh mode, and framework with roots or bases."""
    layout, (p, schedule) = item[0].layout, item[0].extra.values()
    return {(p, schedule) if p in PRECONDITIONERS[:3] else p, (layout, p == "shampoo")}


RUNS = fewest(EVERY, features)
CHECKS = [
    Check(f"resumed_{r.layout}_{r.extra['preconditioner']}_{r.extra['refresh']}", ranks, "resuming:differing", r)
    for r, ranks in RUNS
]


@pytest.mark.parametrize("check", CHECKS, ids=named)
def test_a_resumed_run_is_the_unbroken_one_to_the_bit(check: Check, ask: Ask) -> None:
    assert ask(check) == [[]] * check.ranks
