"""Rates of element-wise parameters: `elementwise_lr`, and those of token embeddings, tied to the head or not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shampoo_deepspeed import Shampoo


class Model(nn.Module):
    """Tables of tokens, which may be tied to the head, of kinds and of positions, a norm and a matrix."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.tokens, self.kinds, self.positions = nn.Embedding(7, 4), nn.Embedding(5, 4), nn.Embedding(3, 4)
        self.hidden, self.norm = nn.Linear(4, 4, bias=False), nn.LayerNorm(4)
        self.head = nn.Linear(4, 7, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.hidden(self.tokens(x) + self.kinds(x % 5) + self.positions(x % 3))))
        return out


EQUAL: dict[str, Any] = {"elementwise_lr": 1.0, "embedding_lr": None, "tied_embedding_lr": None}


def steps(model: nn.Module, **options: Any) -> dict[str, Tensor]:
    """Return how far each parameter of a copy of the model moves in two steps, which have the same gradients."""
    moved = copy.deepcopy(model)
    optimizer = Shampoo(moved.named_parameters(), model=moved, lr=1e-3, exclude=["*head*", "kind:embedding"], **options)
    for _ in range(2):
        for number, p in enumerate(moved.parameters()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(number))
        optimizer.step()
    before = dict(model.named_parameters())
    return {name: p.detach() - before[name].detach() for name, p in moved.named_parameters()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("options", "factors"),
    [
        ({}, (3.0, 32.0, 9.0)),
        ({"elementwise_lr": 2.0, "embedding_lr": 16.0, "tied_embedding_lr": 5.0}, (2.0, 16.0, 5.0)),
        ({"tied_embedding_lr": None}, (3.0, 32.0, 3.0)),
    ],
    ids=["default", "given", "tied as all"],
)
def test_each_kind_has_its_factor(options: dict[str, Any], factors: tuple[float, float, float], tied: bool) -> None:
    own, embedding, tied_embedding = factors
    torch.manual_seed(0)
    model = Model(tied)
    plain = steps(model, **EQUAL)
    found = steps(model, **options)
    expected = {
        "tokens.weight": tied_embedding if tied else embedding,
        "kinds.weight": embedding,
        "positions.weight": own,
        "hidden.weight": 1.0,
        "norm.weight": own,
        "norm.bias": own,
        "head.weight": own,
    }
    for name, step in found.items():
        torch.testing.assert_close(step, expected[name] * plain[name], rtol=1e-3, atol=1e-6)


def test_without_a_factor_of_their_own_embeddings_have_that_of_all() -> None:
    torch.manual_seed(0)
    model = Model(False)
    plain, found = steps(model, **EQUAL), steps(model, embedding_lr=None)
    for name in ("tokens.weight", "kinds.weight", "norm.weight"):
        torch.testing.assert_close(found[name], 3.0 * plain[name], rtol=1e-3, atol=1e-6)
