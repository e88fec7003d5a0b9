"""The checkpoint of format 2 that is kept in the tests: how it was made, and what later versions must load from it.

``python -m tests.support.kept_checkpoint FOLDER`` makes one. The kept one is never replaced, because it stands for the
checkpoints of users.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shampoo_deepspeed import Shampoo, save_shampoo
from tests.support.stepping import drive, parameter

FOLDER = Path(__file__).parents[1] / "data" / "checkpoint_format_2"
SAVED_AT, STEPS = 4, 7
OPTIONS: dict[str, Any] = {
    "lr": 1e-2,
    "betas": (0.9, 0.99),
    "weight_decay": 0.1,
    "momentum": 0.5,
    "max_preconditioner_dim": 8,
    "precondition_frequency": 3,
    "refresh": "sync",
    "relative_epsilon": 1e-3,
    "eps": 1e-4,
    "preconditioner": "shampoo",
    "grafting": "adam",
}


def parameters() -> dict[str, Tensor]:
    """Return two blocks, a vector, a tensor with three dims, and a 16-bit one."""
    return {
        "matrix": parameter(12, 6),
        "vector": parameter(6, seed=1),
        "cube": parameter(5, 4, 3, seed=2),
        "half": parameter(6, 4, seed=3, dtype=torch.bfloat16),
    }


def optimizer(params: dict[str, Tensor]) -> Shampoo:
    return Shampoo(params.items(), **OPTIONS)


def make(folder: Path) -> None:
    params = parameters()
    made = optimizer(params)
    drive(made, list(params.values()), range(SAVED_AT))
    save_shampoo(made, folder / "shampoo")
    torch.save({name: p.detach().clone() for name, p in params.items()}, folder / "weights.pt")
    drive(made, list(params.values()), range(SAVED_AT, STEPS))
    torch.save({name: p.detach().clone() for name, p in params.items()}, folder / "expected.pt")


if __name__ == "__main__":
    make(Path(sys.argv[1]))
