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

# Blocks smaller than the parameters, and a refresh that a few steps cross. All blocks refresh together, so that what
# a parameter does depends on no other one.
OPTIONS: dict[str, Any] = {
    "lr": 1e-2,
    "weight_decay": 0.1,
    "precondition_frequency": 3,
    "refresh": "sync",
    "max_preconditioner_dim": 8,
}


def shampoo(params: Iterable[Any], **options: Any) -> Shampoo:
    """An optimizer with the options of these tests, and some others."""
    return Shampoo(params, **(OPTIONS | options))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: Iterable[int], sometimes: bool = False) -> None:
    """Steps of the odd model of the zoo on its own batches."""
    for step in steps:
        gradients(model, make_batch("odd", step, sometimes))
        optimizer.step()


def parameter(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    """A parameter with numbers of its own."""
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype))


def made_up(like: Tensor, step: int, salt: int = 0) -> Tensor:
    """A gradient that depends on nothing but its shape, the step and the salt."""
    generator = torch.Generator().manual_seed(7919 * step + salt)
    return torch.randn(like.shape, generator=generator).to(like.dtype)


def drive(optimizer: torch.optim.Optimizer, params: Sequence[Tensor], steps: Iterable[int], salt: int = 0) -> None:
    """Steps with made-up gradients: what one parameter gets does not depend on what another one does."""
    for step in steps:
        for number, p in enumerate(params):
            p.grad = made_up(p, step, salt + number)
        optimizer.step()


def refresh(preconditioner: Preconditioner, state: dict[str, Tensor], step: int, moments: Tensor) -> list[int]:
    """A whole refresh as a stack does it; gives the rows that failed."""
    result = preconditioner.compute(state, step, [])
    failed = preconditioner.install(state, result)
    preconditioner.follow_basis(state, result, moments)
    return failed


def snapshot(params: Iterable[Tensor]) -> list[Tensor]:
    """Copies of the present values."""
    return [p.detach().clone() for p in params]


def state_of(optimizer: Shampoo) -> dict[str, Any]:
    """A copy of the optimizer's own state, all but the number of rejected steps."""
    own: dict[str, Any] = copy.deepcopy(optimizer.state_dict()["shampoo"])
    del own["rejected_steps"]
    return own


def through_a_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    """What torch.save and a safe torch.load make of it."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def same_bits(left: Any, right: Any) -> bool:
    """Equality of nested containers; tensors to the last bit, signs of zeros and NaNs included."""
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
