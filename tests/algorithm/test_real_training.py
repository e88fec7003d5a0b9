"""A real training run at the default settings: compares float32 updates with float64 ones at every step.

A float64 twin gets the gradients and the parameters of the float32 run. It either keeps its own state, or takes the
float32 run's state before each step, so that single steps are compared.

Orthogonal iteration orders columns by their eigenvalues. Two that are equal up to rounding may be ordered either way,
and span the same plane with other columns then: in float64 too, where noise of the size of that rounding decides. So a
single step must be near one of those that float64 does from gradients with such noise.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shampoo_deepspeed import Shampoo
from shampoo_deepspeed.options.choices import PRECONDITIONERS
from shampoo_deepspeed.options.family import FAMILY
from tests.support.bare import BARE

pytestmark = pytest.mark.slow

WIDTH, HEADS, LAYERS, LENGTH, BATCH = 48, 4, 2, 48, 12
STEPS = 60
ROUNDING = {"highest": 2.0**-24, "high": 2.0**-11, "medium": 2.0**-8}  # of a product's operands, relative


class RMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


class Layer(nn.Module):
    """A layer as in Llama, but without rotary positions."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = RMSNorm(), RMSNorm()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.gate_proj, self.up_proj = (nn.Linear(WIDTH, 3 * WIDTH, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(3 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.attention_norm(x)
        parts = (f(h).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = parts
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o_proj(mixed.transpose(1, 2).flatten(2))
        h = self.mlp_norm(x)
        return x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


class LanguageModel(nn.Module):
    """A language model of bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(256, WIDTH)
        self.positions = nn.Embedding(LENGTH, WIDTH)
        self.layers = nn.Sequential(*(Layer() for _ in range(LAYERS)))
        self.norm = RMSNorm()
        self.lm_head = nn.Linear(WIDTH, 256, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        logits: Tensor = self.lm_head(self.norm(self.layers(x)))
        return logits


def made_model() -> LanguageModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = LanguageModel()
        for p in model.parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=0.02)
    return model


def batches() -> list[Tensor]:
    """Return windows of a real text that every Python installation has."""
    text = torch.tensor(list(Path(argparse.__file__).read_bytes()))
    generator = torch.Generator().manual_seed(3)
    starts = torch.randint(len(text) - LENGTH - 1, (STEPS, BATCH), generator=generator)
    return [torch.stack([text[s : s + LENGTH + 1] for s in row.tolist()]) for row in starts]


def cosine(left: Tensor, right: Tensor) -> float:
    return F.cosine_similarity(left.double().flatten(), right.double().flatten(), dim=0).item()


class Twins:
    """The float32 run and its float64 twin.

    Only the model's embedding is excluded, so that an ill-conditioned head is among the matrices.
    """

    def __init__(self, **options: Any) -> None:
        self.model = made_model()
        self.own = dict(self.model.named_parameters())
        self.exact = {name: nn.Parameter(p.detach().double()) for name, p in self.own.items()}
        common: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "exclude": ["embed_tokens*"], **options}
        wide = {"factor_dtype": "float64", "root_dtype": "float64"}
        self.optimizer = Shampoo(self.own.items(), **common)
        # Of inverse roots any solver computes the same. Of bases it is part of the rule: tracked ones, the default, are
        # not those of a decomposition, and Muon has no factor matrices to solve for.
        if FAMILY[self.optimizer.param_groups[0]["preconditioner"]].takes_roots:
            wide["solver"] = "eigh"
        wide["matmul_precision"] = "highest"
        self.rounding = ROUNDING[options.get("matmul_precision", "highest")]
        self.reference = Shampoo(self.exact.items(), **(common | wide))
        self.losses: list[float] = []

    def step(self, row: Tensor) -> tuple[dict[str, float], Iterator[dict[str, float]]]:
        """Do one step of both.

        Returns:
            The cosine of each parameter's two steps, and the same with noise in float64's gradients, again and again.
        """
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(row[:, :-1]).flatten(0, 1), row[:, 1:].flatten())
        loss.backward()
        self.losses.append(loss.item())
        before = {name: p.detach().double() for name, p in self.own.items()}
        gradients = {name: p.grad.double() for name, p in self.own.items() if p.grad is not None}
        state = copy.deepcopy(self.reference.state_dict())
        self.optimizer.step()

        def cosines(noise: Callable[[Tensor], Tensor | float]) -> dict[str, float]:
            for name, p in self.exact.items():
                p.data.copy_(before[name])
                p.grad = gradients[name] * (1 + noise(p))
            self.reference.step()
            return {
                name: cosine(p.detach() - before[name], self.exact[name].detach() - before[name])
                for name, p in self.own.items()
            }

        def repeated() -> Iterator[dict[str, float]]:
            generator = torch.Generator().manual_seed(11)
            while True:
                self.reference.load_state_dict(state)
                yield cosines(lambda p: self.rounding * (2 * torch.rand(p.shape, generator=generator) - 1))

        return cosines(lambda p: 0.0), repeated()

    def share_state(self) -> None:
        """Copy the float32 run's state into the twin's blocks; both are the optimizers' own tensors."""
        own, exact = (optimizer.state_dict()["shampoo"]["stacks"] for optimizer in (self.optimizer, self.reference))
        for stack, twin in zip(own, exact, strict=True):
            assert (stack["keys"], stack["refreshed"]) == (twin["keys"], twin["refreshed"])
            for name, tensor in twin["tensors"].items():
                tensor.copy_(stack["tensors"][name])

    def refreshed(self) -> int:
        """Return how many blocks have been refreshed at least once."""
        return sum(sum(stack["refreshed"]) for stack in self.optimizer.state_dict()["shampoo"]["stacks"])


def assert_aligned(twins: Twins, shared: bool, cosine: float = 0.999) -> None:
    """Check each step of the run, so before, at and after every refresh."""
    worst, ties = {}, list[int]()
    for step, row in enumerate(batches(), start=1):
        if shared:
            twins.share_state()
        found, others = twins.step(row)
        if shared and min(found.values()) < cosine:  # blocks do not depend on each other
            ties.append(step)
            for again in islice(others, 8):
                found = {name: max(found[name], again[name]) for name in found}
        worst[step] = min(found.values()), min(found, key=lambda name: found[name])
    assert twins.losses[-1] < 0.75 * twins.losses[0]  # it trains
    assert twins.refreshed() == LAYERS * (4 + 3) + 2  # every matrix of the layers, positions, and the head
    least = sorted(worst.items(), key=lambda item: item[1])[:5]
    print(ties, least)  # shown by pytest -rP
    assert least[0][1][0] >= cosine, least
    assert len(ties) <= STEPS // 20, ties


FREE: dict[str, dict[str, Any]] = {
    "shampoo": {"preconditioner": "shampoo"},
    "coupled_newton": {"preconditioner": "shampoo", "solver": "coupled_newton"},
    "kl_shampoo": {},
    "kl_shampoo_by_coupled_newton": {"solver": "coupled_newton"},
    "bare_shampoo": BARE,
    "bare_shampoo_by_coupled_newton": BARE | {"solver": "coupled_newton"},
    "bare_kl_shampoo": BARE | {"preconditioner": "kl_shampoo"},
    "soap_with_wide_factors": {"preconditioner": "soap", "factor_dtype": "float64"},
}


@pytest.mark.parametrize("options", [pytest.param(options, id=name) for name, options in FREE.items()])
def test_float32_updates_are_those_of_a_float64_run_at_the_default_settings(options: dict[str, Any]) -> None:
    """The two runs are separate from the first step on, so deviations may add up over all refreshes.

    With float32 factor matrices, SOAP's smallest directions are only rounding (docs/solvers.md), so here SOAP has
    float64 ones.
    """
    assert_aligned(Twins(**options), shared=False)


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
def test_float32_updates_are_those_of_float64_from_the_same_state(preconditioner: str) -> None:
    """Single float32 steps are compared at the default settings: before, at and after each refresh."""
    assert_aligned(Twins(preconditioner=preconditioner, lr=1.5e-3), shared=True)


COSINES = {"high": 0.999, "medium": 0.99}


@pytest.mark.parametrize("precision", list(COSINES))
@pytest.mark.parametrize("preconditioner", [name for name in PRECONDITIONERS if FAMILY[name].statistics])
def test_products_of_less_precision_leave_updates_near_those_of_float64(preconditioner: str, precision: str) -> None:
    """Each step is compared from the same state: before, at and after each refresh."""
    twins = Twins(preconditioner=preconditioner, matmul_precision=precision, lr=1.5e-3)
    assert_aligned(twins, True, COSINES[precision])


@pytest.mark.parametrize("precision", list(COSINES))
@pytest.mark.parametrize("preconditioner", ["kl_shampoo", "shampoo"])
def test_deviations_of_less_precise_products_do_not_add_up(preconditioner: str, precision: str) -> None:
    """The two runs are separate. Those in a basis drift apart in any precision, as their smallest directions do."""
    assert_aligned(Twins(preconditioner=preconditioner, matmul_precision=precision), False, COSINES[precision])
