"""Builds, steps and compares optimizers in the single-process tests."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shampoo_deepspeed import Shampoo
from shampoo_deepspeed.algorithm.preconditioners import Preconditioner
from tests.support.zoo import gradients, make_batch

# Blocks are smaller than the parameters, and a few steps contain a refresh. All blocks refresh together, so that
# parameters do not affect each other's phases.
OPTIONS: dict[str, Any] = {
    "lr": 1e-2,
    "weight_decay": 0.1,
    "precondition_frequency": 3,
    "refresh": "sync",
    "max_preconditioner_dim": 8,
}


def shampoo(params: Iterable[Any], **options: Any) -> Shampoo:
    """Return an optimizer with the common options of these tests, and the given ones."""
    return Shampoo(params, **(OPTIONS | options))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: Iterable[int], sometimes: bool = False) -> None:
    """Train the odd model of the zoo on its own batches."""
    for step in steps:
        gradients(model, make_batch("odd", step, sometimes))
        optimizer.step()


def parameter(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    """Return a parameter with random numbers from its own seed."""
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype))


def made_up(like: Tensor, step: int, salt: int = 0) -> Tensor:
    """Return a gradient that depends only on its shape, the step and the salt."""
    generator = torch.Generator().manual_seed(7919 * step + salt)
    return torch.randn(like.shape, generator=generator).to(like.dtype)


def drive(optimizer: torch.optim.Optimizer, params: Sequence[Tensor], steps: Iterable[int], salt: int = 0) -> None:
    """Take steps with made-up gradients, which are independent of the other parameters."""
    for step in steps:
        for number, p in enumerate(params):
            p.grad = made_up(p, step, salt + number)
        optimizer.step()


def refresh(preconditioner: Preconditioner, state: dict[str, Tensor], step: int, moments: Tensor) -> list[int]:
    """Do a whole refresh as a stack does it, and return the rows that failed."""
    result = preconditioner.compute(state, step, [])
    failed = preconditioner.install(state, result)
    preconditioner.follow_basis(state, result, moments)
    return failed


def snapshot(params: Iterable[Tensor]) -> list[Tensor]:
    """Return copies of the present values."""
    return [p.detach().clone() for p in params]


def state_of(optimizer: Shampoo) -> dict[str, Any]:
    """Return a copy of the optimizer's own state, except the number of rejected steps."""
    own: dict[str, Any] = copy.deepcopy(optimizer.state_dict()["shampoo"])
    del own["rejected_steps"]
    return own


def through_a_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return the state dict after torch.save and torch.load with weights_only."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def same_bits(left: Any, right: Any) -> bool:
    """Whether nested containers are equal; tensors to the last bit, including signs of zeros and NaNs."""
    if isinstance(left, Tensor):
        if not isinstance(right, Tensor) or (left.shape, left.dtype) != (right.shape, right.dtype):
            return False
        return torch.equal(_bytes(left), _bytes(right))
    if isinstance(left, Mapping):
        return (
            isinstance(right, Mapping)
            and left.keys() == right.keys()
            and all(same_bits(value, right[key]) for key, value in left.items())
        )
    if isinstance(left, (list, tuple)):
        return type(left) is type(right) and len(left) == len(right) and all(map(same_bits, left, right))
    return bool(left == right)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
