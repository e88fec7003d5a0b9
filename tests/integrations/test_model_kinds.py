"""What Transformers models are treated like if nobody names their parameters: embeddings and heads are left out."""

from __future__ import annotations

import pytest
from torch import nn

from shampoo_deepspeed import Shampoo
from tests.support.model_kinds import MODELS, policies_of


class Holding(nn.Module):
    """A user's module that holds a model beside a layer of its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.own = model, nn.Linear(2, 2)


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_treated_as_if_they_had_been_named(name: str) -> None:
    build, heads, tokens = MODELS[name]
    model = build()
    wanted = policies_of(Shampoo([(n, p) for n, p in model.named_parameters() if p.requires_grad], model=model))
    assert {n for n, (kinds, _) in wanted.items() if "lm_head" in kinds} == heads
    assert {n for n, (_, policy) in wanted.items() if policy.rate == "embedding_lr"} == tokens
    trained = [p for p in model.parameters() if p.requires_grad]
    halves = [{"params": trained[::2]}, {"params": trained[1::2]}]
    assert policies_of(Shampoo(trained)) == wanted
    assert policies_of(Shampoo(p for p in model.parameters() if p.requires_grad)) == wanted
    grouped = policies_of(Shampoo(halves))
    assert {n: kinds for n, (kinds, _) in grouped.items()} == {n: kinds for n, (kinds, _) in wanted.items()}
    held = Holding(model)
    names = [(n, p) for n, p in held.named_parameters() if p.requires_grad]
    for found in (Shampoo([p for _, p in names]), Shampoo(names), Shampoo(names, model=held)):
        assert policies_of(found, "model.") == wanted
