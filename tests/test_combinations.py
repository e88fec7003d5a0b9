"""Every pair of option values, in float64: directions and state of each step are those of the plain reference.

A covering array: few runs that together hold every pair of values of any two options. Tensors have one to four dims,
and blocks are smaller than, equal to and larger than their dims.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shampoo_deepspeed import Shampoo
from shampoo_deepspeed.config import OPTION_NAMES
from tests.reference import Reference
from tests.stepping import made_up, parameter

F64 = torch.float64
STEPS = 20
BOUND = 1e-9
# What stands together in one value could not be combined freely with the rest of it. An iterative solver has the ridge
# of the reference where that is an absolute one.
VALUES: dict[str, list[dict[str, Any]]] = {
    "first_moment": [{"betas0": 0.9}, {"betas0": 0.0}, {"betas0": 0.9, "beta3": 0.4}],
    "factors": [{"betas1": 0.95}, {"betas1": 1.0}],
    "grafting": [{"grafting": g} for g in ("adam", "none", "sgd", "adagrad", "rmsprop", "normalized_adam")],
    "grafting_beta2": [{}, {"grafting_beta2": 0.8}],
    "elementwise": [{}, {"elementwise": "sgd"}, {"elementwise": "rmsprop"}],
    "decay": [{"weight_decay_type": kind} for kind in ("decoupled", "l2", "corrected", "independent")],
    "momentum": [{}, {"momentum": 0.8, "dampening": 0.3}, {"momentum": 0.9, "nesterov": True}],
    "bias": [{}, {"use_bias_correction": False}],
    "root": [{}, {"exponent_override": 2.0}, {"exponent_override": [2.0, None, 8.0]}],
    "regularisation": [
        {},
        {"rank_deficient": "pseudo_inverse", "relative_epsilon": 1e-4},
        {"solver": "coupled_newton", "epsilon": 1e-3, "relative_epsilon": 0.0},
        {"solver": "newton_db", "epsilon": 1e-3, "relative_epsilon": 0.0},
    ],
    "one_sided": [{}, {"one_sided": "left"}, {"one_sided": "right"}, {"one_sided": "smaller"}],
    "large_dim": [{"large_dim": kind} for kind in ("block", "diagonal", "identity", "adagrad")],
    "merging": [{}, {"merge_small_dims": False}],
    "batch_dims": [{}, {"batch_dims": 1}],
    "block": [{"max_preconditioner_dim": n} for n in (4, 6, 1024)],
    "schedule": [
        {"precondition_frequency": 3},
        {"precondition_frequency": 1},
        {"precondition_frequency": 3, "start_preconditioning_step": 7},
    ],
}
SHAPES = {"vector": (5,), "matrix": (6, 4), "conv": (4, 6, 2), "experts": (2, 3, 6, 2)}
Row = tuple[int, ...]


def covering_array() -> list[Row]:
    """Rows of value numbers, one per option; greedily, each row takes as many pairs as it can that are missing."""
    sizes = [len(values) for values in VALUES.values()]
    missing = {
        (a, i, b, j)
        for a, b in itertools.combinations(range(len(sizes)), 2)
        for i, j in itertools.product(range(sizes[a]), range(sizes[b]))
    }
    rows = []
    while missing:
        a, i, b, j = min(missing)
        chosen = {a: i, b: j}
        for option in sorted(set(range(len(sizes))) - {a, b}, key=lambda n: -sizes[n]):
            chosen[option] = max(
                range(sizes[option]),
                key=lambda v: (
                    sum((min((o, w), (option, v)) + max((o, w), (option, v))) in missing for o, w in chosen.items()),
                    -v,
                ),
            )
        rows.append(tuple(chosen[n] for n in range(len(sizes))))
        missing -= pairs_of(rows[-1])
    return rows


def pairs_of(row: Row) -> set[tuple[int, int, int, int]]:
    return {(a, row[a], b, row[b]) for a, b in itertools.combinations(range(len(row)), 2)}


ROWS = covering_array()


def options_of(row: Row) -> dict[str, Any]:
    options: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-6}
    for values, number in zip(VALUES.values(), row, strict=True):
        options.update(values[number])
    options["betas"] = (options.pop("betas0"), options.pop("betas1"))
    return options


def deviation(found: Tensor, expected: Tensor) -> float:
    """Relative, and absolute where nothing is expected."""
    return ((found - expected).norm() / max(expected.norm().item(), 1e-12)).item()


def state_deviations(optimizer: Shampoo, reference: Reference) -> dict[str, float]:
    """Of all that the package keeps of its blocks, at their keys."""
    out = {}
    for stack in optimizer.state_dict()["shampoo"]["stacks"]:
        for row, key in enumerate(stack["keys"]):
            name, _, index = key.rpartition("/")
            block = reference.params[name].blocks[int(index)]
            expected = {"exp_avg": block.first, "second_moment": block.second}
            expected.update({f"factor_{dim}": factor for dim, factor in block.factors.items()})
            expected.update({f"root_{dim}": root for dim, root in block.roots.items()})
            for tensor in stack["tensors"]:
                if tensor in expected:
                    out[f"{key}: {tensor}"] = deviation(stack["tensors"][tensor][row], expected[tensor])
                else:
                    assert tensor.startswith("root_") and not stack["refreshed"][row], tensor
    return out


def test_the_rows_hold_every_pair_and_name_real_options() -> None:
    held = set().union(*(pairs_of(row) for row in ROWS))
    sizes = [len(values) for values in VALUES.values()]
    assert len(held) == sum(a * b for a, b in itertools.combinations(sizes, 2))
    assert len(ROWS) < 2 * math.prod(sorted(sizes)[-2:])
    named = {name for values in VALUES.values() for value in values for name in value} - {"betas0", "betas1"}
    assert named <= set(OPTION_NAMES)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "".join(map(str, row)))
def test_directions_and_state_are_those_of_the_reference(row: Row) -> None:
    options = options_of(row)
    params = {name: parameter(*shape, seed=n, dtype=F64) for n, (name, shape) in enumerate(SHAPES.items())}
    reference = Reference(params, **{name: value for name, value in options.items() if name != "solver"})
    optimizer = Shampoo(params.items(), factor_dtype="float64", root_dtype="float64", **options)
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
        assert max(wrong.values()) < BOUND, (step, options, wrong)
    wrong = state_deviations(optimizer, reference)
    assert all(value < BOUND for value in wrong.values()), (options, wrong)
    values: dict[str, nn.Parameter] = params
    assert all(torch.isfinite(p).all() for p in values.values())
