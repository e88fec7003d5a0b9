"""Transformers' own tensor parallelism trains as one process does, though norms and gates stay plain tensors."""

from __future__ import annotations

from typing import Any

import pytest

from shampoo_deepspeed import Shampoo
from tests.support.exactness import assert_ranks_agree
from tests.support.launch import Ask, Check, named
from tests.support.plain_runs import steps_of, tiny
from tests.support.scenarios import BOUND, STRICT
from tests.support.zoo import relative_error

OPTIONS: dict[str, Any] = {"lr": 3e-3, "precondition_frequency": 3, "max_preconditioner_dim": 16, **STRICT}
KINDS = ("llama", "mixtral")
CHECKS = [Check(f"transformers_tp_{kind}", 2, "transformers_tp:trained", (kind, OPTIONS)) for kind in KINDS]


@pytest.mark.parametrize("check", CHECKS, ids=named)
def test_a_tensor_parallel_model_trains_as_in_one_process(check: Check, ask: Ask) -> None:
    kind, options = check.argument
    model = tiny(kind)
    steps_of(model, Shampoo(model.named_parameters(), model=model, **options))
    wanted = {name: parameter.detach() for name, parameter in model.named_parameters()}
    seen = ask(check)
    assert_ranks_agree([s["parameters"] for s in seen])
    assert "model.norm.weight" in seen[0]["plain"] and len(seen[0]["plain"]) < len(wanted)
    found = {name: relative_error(value, wanted[name]) for name, value in seen[0]["parameters"].items()}
    assert found.keys() == wanted.keys()
    assert max(found.values()) <= BOUND["strict"], found
