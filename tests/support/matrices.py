"""Builds symmetric matrices from their eigenvectors and eigenvalues."""

from __future__ import annotations

import torch
from torch import Tensor


def basis(d: int, seed: int) -> Tensor:
    """Return a random orthogonal matrix in float64."""
    return torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))[0]


def compose(q: Tensor, values: Tensor) -> Tensor:
    return (q * values) @ q.T
