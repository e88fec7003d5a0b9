"""With staggered refreshes every host still takes the trajectory of the unsharded reference: phases know no ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.distributed import fsdp_runs, scenarios
from tests.distributed.conftest import Ask
from tests.distributed.fsdp_runs import Run
from tests.distributed.launch import Check
from tests.distributed.scenarios import BOUND, Scenario
from tests.distributed.test_zero import assert_ranks_agree, named
from tests.zoo import relative_error

STAGGERED = {"refresh": "staggered"}
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
    return found


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
