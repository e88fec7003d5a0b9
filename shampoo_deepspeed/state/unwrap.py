"""Finds the optimizer inside the wrappers of frameworks."""

from __future__ import annotations

from typing import Any

from shampoo_deepspeed.state.stateful_optimizer import BlockOptimizer


def inner_optimizer(optimizer: Any) -> Any:
    """What is inside the wrappers of accelerate and DeepSpeed, each of which keeps the next as ``optimizer``."""
    seen = set()
    while not isinstance(optimizer, BlockOptimizer) and id(optimizer) not in seen:
        seen.add(id(optimizer))
        inner = getattr(optimizer, "optimizer", None)
        optimizer = optimizer if inner is None else inner
    return optimizer


def unwrap(wrapped: Any) -> BlockOptimizer:
    """The Shampoo optimizer in what ``deepspeed.initialize`` and ``accelerator.prepare`` return, and in a Trainer.

    Args:
        wrapped: an optimizer with any wrappers around it, a DeepSpeed engine, or a Trainer that has begun to train.

    Raises:
        TypeError: if there is no Shampoo inside.
    """
    inner = inner_optimizer(wrapped)
    if isinstance(inner, BlockOptimizer):
        return inner
    what = f"{type(wrapped).__module__}.{type(wrapped).__qualname__}"
    if inner is not wrapped:
        what += f" with {type(inner).__module__}.{type(inner).__qualname__} inside"
    raise TypeError(f"a Shampoo optimizer is needed, or a wrapper, engine or Trainer that holds one; this is {what}")
