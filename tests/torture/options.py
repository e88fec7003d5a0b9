"""Any options, valid or not: an optimizer trains 20 steps and all stays finite, or it is refused when it is built.

``python -m tests.torture.options --examples 10000`` tries that many; the suite a few.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from shampoo_deepspeed import OptionError, Shampoo
from shampoo_deepspeed.options import choices
from shampoo_deepspeed.options.config import OPTION_NAMES
from tests.torture.random_examples import check_all, count_from_command_line

STEPS = 20
SHAPES = {"matrix": (4, 3), "blocks": (2, 3, 2), "embed": (5, 2), "bias": (3,)}

# The ends of float64, float32 and of what options allow, and what is no number.
EDGES: list[Any] = [
    0.0, -0.0, 5e-324, 1e-300, 1e-46, 1e-45, 1e-38, 1e-30, 1e-19, 1e-8, 1e-3, 0.1, 0.5, 0.9, 0.99, 1 - 1e-9, 1 - 1e-16,
    1.0, 1 + 1e-9, 2.0, 1e3, 1e6, 1e6 + 1, 1e15, 1e30, 3e38, 1e39, 1e300, 1.7e308, math.inf, -math.inf, math.nan, -1e-9,
    0, 1, 2, 3, -1, -2, 2**31, 2**53, 2**53 + 1, 2**63, 10**12, 10**400, -(10**400), 10**5000, None, True, False, "",
    "auto", "0.1", (), [], {}, (0.9,), (0.9, 0.99),
]  # fmt: skip
reals = st.floats(0.0, 1.0) | st.floats(0.0, 10.0) | st.sampled_from([1e-12, 1e-8, 1e-4, 1e-3, 0.01, 0.1, 0.9, 0.999])
fractions = st.floats(0.0, 1.0, exclude_max=True) | st.sampled_from([1e-6, 0.9, 0.95, 0.999, 1 - 1e-12])
counts = st.integers(1, 12) | st.sampled_from([10**12, 2**53])
betas = st.tuples(fractions, st.floats(0.0, 1.0, exclude_min=True) | st.sampled_from([0.95, 0.999, 1.0, 1e-9]))
roots = st.floats(1e-3, 1e3) | st.sampled_from([0.001, 0.1, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 8.0, 100.0, 1000.0])
dtypes = st.sampled_from(list(choices.DTYPES))


def one_of(*names: str) -> st.SearchStrategy[Any]:
    return st.sampled_from(names)


USUAL: dict[str, st.SearchStrategy[Any]] = {
    "lr": reals,
    "betas": betas,
    "factor_beta": st.none() | st.floats(0.0, 1.0, exclude_min=True),
    "beta3": st.none() | fractions,
    "eps": reals,
    "normalize_gradients": st.booleans(),
    "weight_decay": reals,
    "decoupled_weight_decay": st.booleans(),
    "weight_decay_type": st.none() | one_of(*choices.DECAYS),
    "peak_lr": st.none() | reals,
    "no_decay": st.sampled_from([(), ("*bias",), ("kind:norm",)]),
    "epsilon": reals,
    "relative_epsilon": fractions,
    "early_relative_epsilon": fractions,
    "preconditioner": one_of(*choices.PRECONDITIONERS),
    "max_preconditioner_dim": counts,
    "merge_small_dims": st.booleans(),
    "large_dim": one_of(*choices.LARGE_DIMS),
    "one_sided": st.none() | one_of(*choices.SIDES),
    "batch_dims": st.sampled_from([0, 1]),
    "split": st.sampled_from([(), (2, 2), (1, 3), (1, 2)]),
    "statistics_frequency": st.none() | counts,
    "precondition_frequency": counts,
    "refresh_growth": st.none() | st.just(0.0) | st.floats(0.01, 1.0),
    "refresh_tolerance": st.none() | fractions,
    "refresh": one_of(*choices.REFRESHES),
    "start_preconditioning_step": st.just(-1) | counts,
    "grafting": st.none() | one_of(*choices.GRAFTING_METHODS),
    "grafting_beta2": st.none() | fractions,
    "elementwise": st.none() | one_of(*choices.ELEMENTWISE_METHODS),
    "elementwise_lr": reals,
    "embedding_lr": st.none() | reals,
    "tied_embedding_lr": st.none() | reals,
    "elementwise_betas": st.none() | betas,
    "momentum": fractions,
    "dampening": fractions,
    "nesterov": st.booleans(),
    "ema_decay": fractions,
    "use_bias_correction": st.booleans(),
    "exponent_override": st.none() | roots | st.lists(st.none() | roots, min_size=1, max_size=3),
    "damping": one_of(*choices.DAMPINGS),
    "shrinkage": reals,
    "solver": one_of(*choices.SOLVERS),
    "exclude": st.sampled_from([(), ("embed",), ("*",), ("kind:1d",)]),
    "strict_names": st.booleans(),
    "rules": st.sampled_from([(), ({"match": "matrix", "preconditioner": "soap"},), ({"match": "*", "eps": 0.0},)]),
    "factor_dtype": one_of(*choices.WIDE_DTYPES),
    "root_dtype": dtypes,
    "factor_format": one_of(*choices.FORMATS),
    "root_format": one_of(*choices.FORMATS),
    "moment_format": one_of(*choices.MOMENT_FORMATS),
    "elementwise_format": one_of(*choices.ELEMENTWISE_FORMATS),
    "master_weights": st.booleans(),
    "stochastic_rounding": st.booleans(),
    "apply_dtype": st.none() | dtypes,
    "matmul_precision": st.sampled_from(choices.MATMUL_PRECISIONS),
    "communication_dtype": st.none() | dtypes,
    "compute_device": st.sampled_from(["auto", "shard", "cpu"]),
    "bucket_mb": st.none() | reals,
    "overlap": st.booleans(),
    "failure_limit": counts,
}
# What makes the others matter. An example has some of these and a few others, one of which may be anything at all.
MAIN = (
    "lr", "preconditioner", "grafting", "elementwise", "normalize_gradients", "precondition_frequency", "refresh",
    "exponent_override", "relative_epsilon", "betas", "factor_format", "root_format", "moment_format",
)  # fmt: skip
anything = st.sampled_from(EDGES) | st.floats() | st.integers() | st.tuples(st.floats(), st.floats())
dtypes_of_weights = st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64])
scales = st.sampled_from([1.0, 1.0, 1e-3, 1e-30, 1e-12, 1e6])
places = st.sampled_from(["constructor", "group", "rule"])


@st.composite
def examples(draw: st.DrawFn) -> tuple[dict[str, Any], str, torch.dtype, float]:
    """Draw options, where they are given, the dtype of weights, and the scale of gradients."""
    names = draw(st.sets(st.sampled_from(MAIN), max_size=5)) | draw(st.sets(st.sampled_from(OPTION_NAMES), max_size=3))
    options = {name: draw(USUAL[name]) for name in sorted(names)}
    if draw(st.booleans()):
        options[draw(st.sampled_from(OPTION_NAMES))] = draw(anything)
    return options, draw(places), draw(dtypes_of_weights), draw(scales)


def build(options: dict[str, Any], place: str, parameters: dict[str, nn.Parameter]) -> Shampoo | None:
    """Return the optimizer, or None if the options are refused."""
    base: dict[str, Any] = {"precondition_frequency": 3, "max_preconditioner_dim": 4}
    try:
        if place == "group":
            return Shampoo([{"params": list(parameters.items()), **options}], **base)
        if place == "rule":
            return Shampoo(parameters.items(), **base, rules=[{"match": "*", **options}])
        return Shampoo(parameters.items(), **{**base, **options})
    except OptionError:
        return None


def try_one(options: dict[str, Any], place: str, dtype: torch.dtype, scale: float) -> str:
    """Return whether the options were refused or trained; anything else is an error.

    Raises:
        AssertionError: if weights or state are not finite.
    """
    generator = torch.Generator().manual_seed(0)
    parameters = {
        name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in SHAPES.items()
    }
    optimizer = build(copy.deepcopy(options), place, parameters)
    if optimizer is None:
        return "refused"
    scale = min(scale, 1e3) if dtype == torch.float16 else scale
    for _ in range(STEPS):
        for p in parameters.values():
            p.grad = (torch.randn(p.shape, generator=generator) * scale).to(dtype)
        optimizer.step()
    for name, p in parameters.items():
        assert p.isfinite().all(), f"{name} is not finite"
    for name, tensor in tensors_in(optimizer.state_dict()["shampoo"]):
        assert tensor.isfinite().all(), f"{name} is not finite"
    assert optimizer.rejected_steps == 0
    return "trained"


def tensors_in(state: Any, name: str = "state") -> Iterator[tuple[str, Tensor]]:
    """Yield all floating-point tensors in nested containers, with their places."""
    if isinstance(state, Tensor):
        if state.is_floating_point():
            yield name, state
    elif isinstance(state, dict):
        for key, value in state.items():
            yield from tensors_in(value, f"{name}.{key}")
    elif isinstance(state, (list, tuple)):
        for number, value in enumerate(state):
            yield from tensors_in(value, f"{name}.{number}")


def run(count: int, derandomize: bool = False) -> Counter[str]:
    """Try this many examples; return how many were refused and how many trained."""
    results: Counter[str] = Counter()

    def check(example: tuple[dict[str, Any], str, torch.dtype, float]) -> None:
        results[try_one(*example)] += 1

    check_all(check, examples(), count, derandomize)
    return results


if __name__ == "__main__":
    print(dict(run(count_from_command_line(__doc__, 10_000))))
