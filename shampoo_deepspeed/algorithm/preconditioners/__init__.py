"""Preconditioners: one small class each, all with the interface of `Preconditioner`."""

from __future__ import annotations

from importlib import import_module

from shampoo_deepspeed.algorithm.preconditioners.base import Preconditioner
from shampoo_deepspeed.options.config import ShampooConfig

__all__ = ["Preconditioner", "build"]


def build(config: ShampooConfig) -> Preconditioner:
    """The preconditioner that the options ask for; ``options.family`` says where its class is."""
    made = config.parts.place
    if isinstance(made, str):
        module, _, name = made.partition(":")
        made = getattr(import_module(module), name)
    found: Preconditioner = made(config)
    return found
