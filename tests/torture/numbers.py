"""Gradients of any pattern and scale: no finite one leaves state that is not finite or useless.

``python -m tests.torture.numbers --examples 2000`` tries that many; the suite a few.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from shampoo_deepspeed import Shampoo
from shampoo_deepspeed.options import choices
from shampoo_deepspeed.options.family import FAMILY
from tests.torture.options import tensors_in
from tests.torture.random_examples import check_all, count_from_command_line

SHAPES = {"matrix": (6, 5), "cube": (3, 4, 2), "embed": (7, 3), "bias": (5,)}
STEPS, AT = 30, 15

Pattern = Callable[[Tensor, float], Tensor]


def _one_huge(g: Tensor, scale: float) -> Tensor:
    g = g.clone()
    g.view(-1)[g.numel() // 2] = scale
    return g


def _rank_one(g: Tensor, scale: float) -> Tensor:
    first = g.reshape(len(g), -1)[:, :1]
    return (first * torch.linspace(0.5, 1.0, g.numel() // len(g), dtype=g.dtype)).reshape(g.shape) * scale


def _one_row(g: Tensor, scale: float) -> Tensor:
    out = torch.zeros_like(g)
    out[0] = g[0] * scale
    return out


# What a shock makes of a usual gradient.
PATTERNS: dict[str, Pattern] = {
    "whole": lambda g, scale: g.sign() * scale,
    "scaled": lambda g, scale: g * min(scale, torch.finfo(g.dtype).max / 8.0),
    "one_huge": _one_huge,
    "rank_one": lambda g, scale: _rank_one(g, min(scale, torch.finfo(g.dtype).max / 8.0)),
    "one_row": lambda g, scale: _one_row(g, min(scale, torch.finfo(g.dtype).max / 8.0)),
    "zeros": lambda g, scale: torch.zeros_like(g),
    "mixed": lambda g, scale: torch.where(g > 0.5, scale, torch.where(g < -0.5, 1.0 / scale, g)),
}
MAX = 3.4e38
SCALES = (
    1e-45,
    1e-40,
    1e-38,
    1e-30,
    1e-20,
    1e-12,
    1e-6,
    1.0,
    300.0,
    1e3,
    1e6,
    1e10,
    1e15,
    1e19,
    1e20,
    1e30,
    1e38,
    3.4e38,
)


@dataclass(frozen=True)
class Case:
    """A run with shocks: options, dtype of weights, which parameters a shock hits and how, and the usual scale."""

    options: dict[str, Any]
    dtype: torch.dtype
    hit: tuple[str, ...]
    pattern: str
    scale: float
    usual: float
    steps: tuple[int, ...]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Draw a case of options that differ in what they keep of gradients."""
    preconditioner = draw(st.sampled_from(choices.PRECONDITIONERS))
    options: dict[str, Any] = {
        "preconditioner": preconditioner,
        "normalize_gradients": draw(st.booleans()),
        "grafting": draw(st.sampled_from([None, *choices.GRAFTING_METHODS])),
        "elementwise": draw(st.sampled_from([None, *choices.ELEMENTWISE_METHODS])),
        "refresh": draw(st.sampled_from(choices.REFRESHES)),
        "eps": draw(st.sampled_from([1e-8, 1e-8, 0.0, 1e-46, 1e-30])),
        "epsilon": draw(st.sampled_from([1e-12, 0.0, 1e-46])),
        "relative_epsilon": draw(st.sampled_from([1e-4, 1e-4, 0.0, 1e-46, 1e-6])),
        "early_relative_epsilon": draw(st.sampled_from([0.01, 0.0, 1e-46])),
        "betas": draw(st.sampled_from([(0.9, 0.999), (0.9, 0.95), (0.0, 0.99), (0.9, 1.0)])),
        "factor_beta": draw(st.sampled_from([0.95, None, 0.5, 1.0])),
        "momentum": draw(st.sampled_from([0.0, 0.0, 0.9])),
        "weight_decay_type": draw(st.sampled_from([None, "l2"])),
        "factor_dtype": draw(st.sampled_from(choices.WIDE_DTYPES)),
        "root_dtype": draw(st.sampled_from(list(choices.DTYPES))),
        "communication_dtype": draw(st.sampled_from([None, "bfloat16"])),
    }
    if preconditioner == "shampoo":
        roots = [0.001, 0.1, 0.5, 1.0, 2.0, 2.7, 8.0, 1000.0]
        options["exponent_override"] = draw(st.sampled_from([None, *roots]))
        options["damping"] = draw(st.sampled_from(choices.DAMPINGS))
        options["large_dim"] = draw(st.sampled_from(choices.LARGE_DIMS))
        options["one_sided"] = draw(st.sampled_from([None, "left", "smaller"]))
    elif FAMILY[preconditioner].in_basis:
        options["exponent_override"] = draw(st.sampled_from([None, 0.001, 0.1, 1.0, 3.0, 1000.0]))
    if FAMILY[preconditioner].statistics is not None and draw(st.booleans()):  # Muon has no bases to keep
        options["refresh_tolerance"] = 0.1
    hit = draw(st.sets(st.sampled_from(sorted(SHAPES)), min_size=1).map(sorted).map(tuple))
    steps = draw(st.sets(st.integers(0, STEPS - 2), min_size=1, max_size=3).map(sorted).map(tuple))
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    usual = draw(st.sampled_from([1.0, 1.0, 1e-3, 1e-12, 1e-30, 100.0]))
    return Case(
        options, dtype, hit, draw(st.sampled_from(sorted(PATTERNS))), draw(st.sampled_from(SCALES)), usual, steps
    )


def gradients(case: Case) -> Iterator[dict[str, Tensor]]:
    """Yield the gradients of each step by parameter, all of them finite."""
    generator = torch.Generator().manual_seed(0)
    largest = torch.finfo(case.dtype).max
    for step in range(STEPS):
        out = {}
        for name, shape in SHAPES.items():
            g = torch.randn(shape, generator=generator, dtype=torch.float64) * min(case.usual, largest / 1e3)
            if step in case.steps and name in case.hit:
                g = PATTERNS[case.pattern](g, min(case.scale, largest))
            out[name] = g.clamp(-largest, largest).to(case.dtype)
        yield out


def try_case(case: Case) -> None:
    """Run a case.

    Raises:
        AssertionError: if weights or state are not finite, or a weight has left the range of the updates.
    """
    generator = torch.Generator().manual_seed(1)
    start = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    parameters = {name: nn.Parameter(value.to(case.dtype)) for name, value in start.items()}
    optimizer = Shampoo(
        parameters.items(),
        lr=1e-3,
        weight_decay=0.1,
        precondition_frequency=3,
        max_preconditioner_dim=5,
        failure_limit=STEPS,
        **case.options,
    )
    for found in gradients(case):
        for name, p in parameters.items():
            p.grad = found[name]
        optimizer.step()
    for name, p in parameters.items():
        assert p.isfinite().all(), f"{name} is not finite"
    for name, tensor in tensors_in(optimizer.state_dict()["shampoo"]):
        assert tensor.isfinite().all(), f"{name} is not finite"
    assert not any(failures for unit in optimizer.units for stack in unit.stacks for failures in stack.failures)
    if case.options["normalize_gradients"]:  # nothing is rejected, and no update is long
        assert optimizer.rejected_steps == 0 or case.dtype == torch.float64 or case.options["communication_dtype"]
        limit = 1e-3 * 24.0 * STEPS * 30.0 * (10.0 if case.options["momentum"] else 1.0)
        for name, p in parameters.items():
            assert (p.float() - start[name]).square().mean().sqrt() < limit, f"{name} has moved too far"


class Model(nn.Module):
    """Two layers on an embedding: blocks, an element-wise matrix and vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, 6)
        self.inner, self.norm, self.outer = nn.Linear(6, 16), nn.LayerNorm(16), nn.Linear(16, TOKENS)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.outer(self.norm(torch.tanh(self.inner(self.embed(tokens)))))
        return out


TOKENS, LOSS_STEPS, LOSS_AT = 12, 131, 30


def _samples(step: int, count: int) -> tuple[Tensor, Tensor]:
    """Return tokens and labels, a third of which are random: the loss has a floor."""
    generator = torch.Generator().manual_seed(step)
    tokens, noise = (torch.randint(TOKENS, (count,), generator=generator) for _ in range(2))
    random = torch.rand(count, generator=generator) < 1 / 3
    return tokens, torch.where(random, noise, (5 * tokens + 3) % TOKENS)


def losses(pattern: str | None, scale: float, dtype: torch.dtype, **options: Any) -> tuple[float, float]:
    """Return the held-out losses before the shock and 100 steps after it; the pattern None is no shock."""
    torch.manual_seed(1)
    model = Model().to(dtype)
    optimizer = Shampoo(
        model.named_parameters(), model=model, lr=options.pop("lr", 1e-2), precondition_frequency=5, **options
    )
    found = []
    for step in range(LOSS_STEPS):
        if step in (LOSS_AT, LOSS_STEPS - 1):
            with torch.no_grad():
                tokens, labels = _samples(10_000, 4096)
                found.append(nn.functional.cross_entropy(model(tokens).double(), labels).item())
        tokens, labels = _samples(step, 64)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(tokens), labels).backward()
        if pattern is not None and step == LOSS_AT:
            for p in model.parameters():
                assert p.grad is not None
                largest = torch.finfo(p.grad.dtype).max
                shock = PATTERNS[pattern](p.grad.double() + 1e-12, min(scale, largest))
                p.grad.copy_(shock.clamp(-largest, largest))
        optimizer.step()
    before, after = found
    return before, after


def run(count: int, derandomize: bool = False) -> None:
    """Try this many cases."""
    check_all(try_case, cases(), count, derandomize)


if __name__ == "__main__":
    wanted = count_from_command_line(__doc__, 2_000)
    run(wanted)
    print(f"{wanted:,} cases, all finite")
