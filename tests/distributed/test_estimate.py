"""The planner predicts to the byte what every rank of a run holds and moves."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shampoo_deepspeed import ShampooConfig
from shampoo_deepspeed.estimate import estimate
from tests.support.fsdp_runs import Run
from tests.support.launch import Ask, Check, named
from tests.support.scenarios import Scenario

SHARDED = Run(steps=4, extra={"momentum": 0.5, "bucket_mb": 0.0001})
WIDE = replace(SHARDED, model="wide", extra={"betas": (0.0, 0.99), "grafting": "sgd", "elementwise": "adam"})
PARTITIONED = Scenario(steps=4, options={"momentum": 0.5})
FRAMEWORKS = {"rows": "fsdp2", "replicas": "ddp", "hsdp": "hsdp"}


def checks() -> list[Check]:
    found = []
    for layout, framework in FRAMEWORKS.items():
        ranks = 4 if framework == "hsdp" else 2
        for base in (SHARDED, WIDE):
            run = replace(base, layout=layout)
            found.append(Check(f"estimate_{framework}_{run.model}", ranks, "estimate:sharded", run))
    for stage in range(4):
        scenario = replace(PARTITIONED, stage=stage, zero={"sub_group_size": 300} if stage == 3 else {})
        found.append(Check(f"estimate_zero{stage}", 2, "estimate:partitioned", scenario))
    return found


@pytest.mark.parametrize("check", checks(), ids=named)
def test_state_and_bytes_are_those_of_the_run(check: Check, ask: Ask) -> None:
    found, asked = ask(check), check.argument
    if isinstance(asked, Run):
        framework, options, size = FRAMEWORKS[asked.layout], asked.options(), 10**9
    else:
        framework = f"zero{asked.stage}" if asked.stage else "ddp"
        options, size = asked.optimizer_options(), asked.zero.get("sub_group_size", 10**9)
    made = estimate(
        found[0]["parameters"],
        check.ranks,
        framework,
        ShampooConfig.from_options(options),
        shard_ranks=2,
        sub_group_size=size,
    )
    assert made.units == found[0]["units"]
    assert made.state_bytes == [rank["state"] for rank in found]
    assert made.state["root"] == [rank["roots"] for rank in found]
    assert made.sent == [rank["bytes_sent"] for rank in found]
    assert made.received == [rank["bytes_received"] for rank in found]
    assert [made.collectives] * check.ranks == [rank["collectives"] for rank in found]
