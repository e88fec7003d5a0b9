"""Under DeepSpeed's expert parallelism, all parameters take the trajectory of a dense, unsharded mixture of experts."""

from __future__ import annotations

import pytest
import torch

from tests.support.launch import Ask, Check, named
from tests.support.moe import expected
from tests.support.zoo import relative_error

NORMALIZED = {"grafting": "normalized_adam", "lr": 1e-3}
CHECKS = [
    *(Check(f"experts_zero{stage}", 4, "moe:train", (stage, {}, "")) for stage in (0, 1, 2)),
    *(Check(f"experts_reloaded_zero{stage}", 4, "moe:train", (stage, {}, "state dict")) for stage in (0, 2)),
    *(Check(f"experts_resumed_zero{stage}", 4, "moe:train", (stage, {}, "checkpoint")) for stage in (0, 1, 2)),
    *(Check(f"experts_normalized_zero{stage}", 4, "moe:train", (stage, NORMALIZED, "")) for stage in (0, 1)),
]


@pytest.mark.parametrize("check", CHECKS, ids=named)
def test_the_trajectory_is_that_of_the_dense_mixture(check: Check, ask: Ask) -> None:
    values, wanted = ask(check), expected(check.argument[1])
    assert set().union(*values) == set(wanted)
    found = {(rank, n): relative_error(v[n], wanted[n]) for rank, v in enumerate(values) for n in v}
    worst = max(found, key=lambda k: found[k])
    print(f"{worst} deviates by {found[worst]:.1e}")  # shown by pytest -rP
    assert max(found.values()) <= 1e-5, found
    for one, other in ((0, 2), (1, 3)):  # the replicas of the experts
        assert all(torch.equal(values[one][n], values[other][n]) for n in values[one])
