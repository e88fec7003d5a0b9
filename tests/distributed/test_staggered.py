"""With staggered or background refreshes, every framework takes the unsharded reference's trajectory."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.support import fsdp_runs, scenarios
from tests.support.exactness import assert_ranks_agree
from tests.support.fsdp_runs import Run
from tests.support.launch import Ask, Check, named
from tests.support.scenarios import BOUND, FAMILY, Scenario
from tests.support.zoo import relative_error

STAGGERED = {"refresh": "staggered"}
BACKGROUND = {"refresh": "background"}
RUN = Run(model="wide", settings="default", dtype="float64", extra=STAGGERED)
SCENARIO = Scenario(model="wide", options=STAGGERED)


def checks() -> list[Check]:
    found = [
        Check(f"staggered_{layout}_{ranks}ranks", ranks, "fsdp:final_parameters", replace(RUN, layout=layout))
        for layout, ranks in (("rows", 2), ("replicas", 2), ("rows", 4), ("hsdp", 4))
    ]
    for stage, ranks in ((2, 2), (3, 2), (3, 4)):
        zero = {"sub_group_size": 300} if stage == 3 else {}
        scenario = replace(SCENARIO, stage=stage, ranks=ranks, zero=zero)
        found.append(Check(f"staggered_zero{stage}_{ranks}ranks", ranks, "zero:final_parameters", scenario))
    return found + in_the_background()


def in_the_background() -> list[Check]:
    """Return background runs; in one of them a new optimizer continues while refreshes are pending."""
    runs = {
        "rows": replace(RUN, layout="rows", resumed_at=4, extra=BACKGROUND),
        "replicas": replace(RUN, layout="replicas", extra=BACKGROUND),
        "soap": replace(RUN, layout="rows", settings="strict", steps=12, extra=BACKGROUND | FAMILY["soap"]),
        "kl_shampoo": replace(RUN, layout="rows", steps=12, extra=BACKGROUND | FAMILY["kl_shampoo"]),
    }
    scenario = replace(SCENARIO, options=BACKGROUND, stage=2, ranks=2)
    return [
        *(Check(f"background_{name}_2ranks", 2, "fsdp:final_parameters", run) for name, run in runs.items()),
        Check("background_zero2_2ranks", 2, "zero:final_parameters", scenario),
    ]


@pytest.mark.parametrize("check", checks(), ids=named)
def test_the_trajectory_is_that_of_the_reference(check: Check, ask: Ask) -> None:
    values, asked = ask(check), check.argument
    if isinstance(asked, Run):
        wanted, bound = fsdp_runs.expected(asked), 1e-10
    else:
        wanted, bound = scenarios.expected(asked), BOUND["strict"]
    assert_ranks_agree(values)
    found = {n: relative_error(values[0][n], wanted[n]) for n in wanted}
    assert max(found.values()) <= bound, found
