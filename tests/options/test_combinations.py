"""Every option alone and every pair of option values, in float64: updates and state equal the plain reference's.

Tensors have one to four dims, and blocks are smaller than, equal to and larger than their dims.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from shampoo_deepspeed import OptionError, Shampoo, ShampooConfig
from shampoo_deepspeed.algorithm.formats import stored_forms
from shampoo_deepspeed.options.config import GROUP_ONLY, OPTION_NAMES, options_with
from tests.support.combinations import (
    ALONE,
    BOTH_ROUND,
    NO_PAIRS,
    OPTIONS,
    PAIRS,
    REFUSED_PAIRS,
    VALUES,
    Row,
    label,
    options_of,
    pairs_of,
    row_of,
    value_pairs,
)
from tests.support.comparing import block_deviations, deviation
from tests.support.reference import Reference
from tests.support.stepping import made_up, parameter

F64 = torch.float64
STEPS = 24
BOUND = 1e-9
# Of rows with narrow state and lowered operands: where the one ends in the middle, the other is rounded either way.
NARROW_AND_LOWERED = 2e-5
SHAPES = {"vector": (5,), "matrix": (6, 4), "conv": (4, 6, 2), "experts": (3, 2, 3, 2)}
# Options that do not change the rule, and those with their own tests.
NOT_OF_THE_RULE = {"bucket_mb", "overlap", "failure_limit", "strict_names"}
NOT_OF_THE_RULE |= {"communication_dtype", "compute_device", "apply_dtype", "factor_dtype", "root_dtype"}
TRIED_BY_OTHERS = {
    "embedding_lr",
    "tied_embedding_lr",
    "exclude",
    "no_decay",
    "split",
    "master_weights",
    "stochastic_rounding",
    "peak_lr",
    "ema_decay",
}


def state_deviations(optimizer: Shampoo, reference: Reference) -> dict[str, float]:
    """Return the deviations of all block state that the package keeps, by key."""
    out: dict[str, float] = {}
    for stack in optimizer.state_dict()["shampoo"]["stacks"]:
        for row, key in enumerate(stack["keys"]):
            name, _, index = key.rpartition("/")
            p = reference.params[name]
            block = p.blocks[int(index)]
            forms = stored_forms({n: (t.dtype, t.shape[1:]) for n, t in stack["tensors"].items()}, F64)
            tensors = {n: form.decode(stack["tensors"]).to(F64) for n, form in forms.items()}
            if not stack["refreshed"][row]:  # roots and bases have no values yet
                unused = ("root", "basis", "whitening", "scale", "rotated_second", "rotated_weight")
                own = "second_moment" in tensors or p.options.graft == "rms"
                warm = None if own else tensors.get("rotated_second_moment")
                tensors = {n: t for n, t in tensors.items() if not n.startswith(unused)}
                if warm is not None and block.method != "sgd":  # SOAP's element-wise one, until its first refresh
                    tensors["second_moment"] = warm
            rounded = p.options.root_format in ("bfloat16", "int8")
            found = block_deviations(tensors, row, block, p.options.preconditioner, rounded)
            out |= {f"{key}: {tensor}": value for tensor, value in found.items()}
    return out


def reference_of(params: Mapping[str, Tensor], options: dict[str, Any]) -> Reference:
    """Build the reference, which takes rules as overrides by name."""
    overrides = {rule["match"]: {k: v for k, v in rule.items() if k != "match"} for rule in options.get("rules", [])}
    return Reference(params, overrides, **{k: v for k, v in options.items() if k != "rules"})


def test_the_rows_hold_every_pair_and_every_option_of_the_rule() -> None:
    assert set().union(*(pairs_of(row) for row in PAIRS)) == set(value_pairs()) - NO_PAIRS
    assert len(PAIRS) < 100
    named = {name for values in VALUES.values() for value in values for name in value}
    held = named - {"betas0", "betas1"} | {"betas", "lr", "weight_decay", "eps"}
    assert held | NOT_OF_THE_RULE | TRIED_BY_OTHERS | {"decoupled_weight_decay"} == set(OPTION_NAMES)
    assert set(options_with(GROUP_ONLY)) <= held | NOT_OF_THE_RULE | TRIED_BY_OTHERS | {"decoupled_weight_decay"}


def test_options_that_do_not_combine_are_an_error_that_names_what_is_allowed() -> None:
    for pair in value_pairs():
        options = options_of(row_of(*pair))
        if pair not in REFUSED_PAIRS:
            ShampooConfig.from_options(options)
            continue
        with pytest.raises(OptionError, match="is not allowed: .+") as refusal:
            ShampooConfig.from_options(options)
        named = [name for option, number in pair for name in VALUES[OPTIONS[option]][number]]
        assert any(f"Shampoo option {name!r} = " in str(refusal.value) for name in [*named, "split"]), refusal.value


# In a hurry, every second value alone with the default preconditioner is enough.
FAST = [row for row in ALONE if row[0] == 0][::2]
ROWS = [
    *FAST,
    *(
        pytest.param(row, marks=pytest.mark.slow)
        for row in dict.fromkeys(ALONE + PAIRS + BOTH_ROUND)
        if row not in FAST
    ),
]


@pytest.mark.parametrize("row", ROWS, ids=label)
def test_updates_and_state_are_those_of_the_reference(row: Row) -> None:
    options = options_of(row)
    params = {name: parameter(*shape, seed=n, dtype=F64) for n, (name, shape) in enumerate(SHAPES.items())}
    reference = reference_of(params, options)
    optimizer = Shampoo(params.items(), factor_dtype="float64", root_dtype="float64", **options)
    wrong: dict[str, Any]
    bound = NARROW_AND_LOWERED if row in BOTH_ROUND else BOUND
    for step in range(STEPS):
        for n, p in enumerate(params.values()):
            p.grad = made_up(p, step, n)
        before = {n: p.detach().clone() for n, p in params.items()}
        expected_before = {n: value.clone() for n, value in reference.values().items()}
        reference.step({n: p.grad for n, p in params.items()})
        optimizer.step()
        moved = {n: p.detach() - before[n] for n, p in params.items()}
        expected = {n: value - expected_before[n] for n, value in reference.values().items()}
        wrong = {n: deviation(moved[n], expected[n]) for n in params}
        assert max(wrong.values()) < bound, (step, options, wrong)
        if step % 6 == 5:
            wrong = {n: value for n, value in state_deviations(optimizer, reference).items() if not value < bound}
            assert not wrong, (step, options)
    assert all(torch.isfinite(p).all() for p in params.values())
