"""What the tests of training stacks share: batches of text, a plain loop, and what must hold of a run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shampoo_deepspeed import Shampoo
from shampoo_deepspeed.state.unwrap import inner_optimizer
from tests.support.trainings import GLOBAL_BATCH, make_data

STEPS = 12


def batches(steps: int = STEPS) -> list[dict[str, Tensor]]:
    """The same batch again and again, so that every optimizer learns it."""
    rows = make_data(1)[:GLOBAL_BATCH]
    return [{key: torch.stack([row[key] for row in rows]) for key in rows[0]}] * steps


def trained(model: nn.Module, optimizer: Any, given: Iterable[dict[str, Tensor]]) -> list[float]:
    """Train in a plain loop and return the losses."""
    losses = []
    for batch in given:
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def assert_learned(losses: Sequence[float], by: float = 0.05) -> None:
    """All losses are finite, and the last is lower than the first."""
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0] - by, losses


def assert_recognised(optimizer: Any, tokens: str, head: str | None = None) -> Shampoo:
    """The embedding and the head are left out, norms do not decay, and matrices are preconditioned; names are known.

    Args:
        tokens: how the name of the embedding's weight ends.
        head: that of the output head; None for a model whose head is the embedding.
    """
    inner = inner_optimizer(optimizer)
    assert isinstance(inner, Shampoo)
    policies = inner.policies
    (embedding,) = [policy for name, policy in policies.items() if name.endswith(tokens)]
    assert not embedding.preconditioned
    assert embedding.rate == ("embedding_lr" if head is not None else "tied_embedding_lr")
    if head is not None:
        (output,) = [policy for name, policy in policies.items() if name.endswith(head)]
        assert not output.preconditioned
    assert sum(policy.preconditioned for policy in policies.values()) >= 4
    norms = [name for name in policies if "norm" in name]
    assert norms and not any(policies[name].preconditioned for name in norms)
    return inner
