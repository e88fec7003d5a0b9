"""A step counts as a change of each parameter that it changes: a second backward through an old graph is an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.support.stepping import shampoo

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "decay": {"weight_decay": 0.1},
    "coupled_decay": {"weight_decay": 0.1, "decoupled_weight_decay": False},
    "tensor_rate": {"lr": torch.tensor(0.1)},
    "soap": {"preconditioner": "soap"},
    "master_weights": {"dtype": torch.bfloat16},
    "stochastic": {"dtype": torch.bfloat16, "master_weights": False, "stochastic_rounding": True},
    "float64": {"dtype": torch.float64},
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_second_backward_through_a_graph_from_before_a_step_is_an_error(kind: str) -> None:
    options = dict(KINDS[kind])
    dtype = options.pop("dtype", torch.float32)
    matrix, vector, scalar = (nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in ((6, 5), (5,), ()))
    strided, unused = nn.Parameter(torch.ones(5, 6, dtype=dtype).t()), nn.Parameter(torch.ones(6, 5, dtype=dtype))
    frozen = nn.Parameter(torch.ones(4, dtype=dtype), requires_grad=False)
    changed = [matrix, vector, scalar, strided]
    optimizer = shampoo([*changed, unused, frozen], **options)
    for _ in range(3):
        before = [p._version for p in (*changed, unused, frozen)]
        optimizer.zero_grad()
        losses = [p.square().sum() for p in changed]
        for loss in losses:
            loss.backward(retain_graph=True)
        optimizer.step()
        moved = [p._version > v for p, v in zip((*changed, unused, frozen), before, strict=True)]
        assert moved == [True, True, True, True, False, False]
        for loss in losses:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()
