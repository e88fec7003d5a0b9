"""The family of rules: each is one line and one class, and so is a new one; docs/how-a-step-works.md shows how."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from shampoo_deepspeed import OptionError, Shampoo, ShampooConfig
from shampoo_deepspeed.algorithm.preconditioners import Preconditioner, build
from shampoo_deepspeed.options.family import FAMILY
from tests.support.combinations import PRECONDITIONERS
from tests.support.snippets import blocks
from tests.support.stepping import same_bits, snapshot


@pytest.mark.parametrize("name", list(FAMILY))
def test_each_line_leads_to_a_class_whose_state_is_what_it_says(name: str) -> None:
    config = ShampooConfig(preconditioner=name)
    made = build(config)
    assert isinstance(made, Preconditioner)
    state = made.new_state(2, (6, 4), torch.device("meta"), torch.float32)
    kinds = {key.rpartition("_")[0] for key in state if key[-1].isdigit()}
    assert ("factor" in kinds) == (FAMILY[name].statistics is not None)
    assert ("root" in kinds) == FAMILY[name].takes_roots
    assert ("basis" in kinds) == FAMILY[name].in_basis == made.rotates_moments
    assert made.own_length == FAMILY[name].orthogonalises


def test_the_oracle_knows_every_rule() -> None:
    assert set(PRECONDITIONERS) == set(FAMILY)


def test_the_new_rule_of_the_docs_trains_and_resumes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's own text; the same is executed on two ranks with the other snippets."""
    (text,) = [s.text for s in blocks() if s.name == "new-rule"]
    with pytest.raises(OptionError, match="'preconditioner' = 'signed' is not allowed: one of shampoo, "):
        ShampooConfig(preconditioner="signed")
    torch.manual_seed(0)
    names: dict[str, Any] = {"model": nn.Sequential(nn.Linear(6, 5, bias=False)), "__name__": "of_the_page"}
    monkeypatch.setitem(FAMILY, "signed", FAMILY["muon"])  # so that it is removed afterwards
    exec(text, names)
    model, optimizer = names["model"], names["optimizer"]
    weight, before = model[0].weight, model[0].weight.detach().clone()
    weight.grad = torch.randn(5, 6)
    optimizer.step()
    # As long as every other update of a fixed length.
    torch.testing.assert_close(weight.detach(), before - 3e-3 * 0.4 * weight.grad.sign())
    other = nn.Parameter(weight.detach().clone())
    resumed = Shampoo([("0.weight", other)], preconditioner="signed", lr=3e-3)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(3):
        weight.grad = other.grad = torch.randn(5, 6)
        optimizer.step()
        resumed.step()
    assert same_bits(snapshot([weight]), snapshot([other]))
