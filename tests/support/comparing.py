"""Compares the state of the package's blocks with that of the plain reference's blocks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tests.support.reference import Block, back, rotate


def deviation(found: Tensor, expected: Tensor) -> float:
    """Return the relative deviation, or the absolute one if zero is expected."""
    return ((found - expected).norm() / max(expected.norm().item(), 1e-12)).item()


def block_deviations(
    tensors: Mapping[str, Tensor], row: int, block: Block, preconditioner: str, rounded: bool = False
) -> dict[str, float]:
    """Return the deviations of all tensors that the package keeps for one block, by name.

    Signs of a basis's columns are arbitrary. Their order matters only under SOAP, because its second moment has the
    same order. Otherwise a basis belongs to a root, which must be diagonal in it: the columns of equal eigenvalues,
    such as those of a rank-deficient factor, are arbitrary too. If roots and bases are rounded, only their elements can
    be compared, up to signs and order.

    Raises:
        KeyError: if the package keeps a tensor that the reference does not have.
    """
    expected = {"exp_avg": block.first, "second_moment": block.second, "scale": block.first.new_tensor(block.scale)}
    expected |= {"rotated_second_moment": block.rotated, "rotated_weight": block.first.new_tensor(block.weight)}
    expected |= {f"factor_{mode}": factor for mode, factor in block.factors.items()}
    expected |= {f"root_{mode}": root for mode, root in block.roots.items()}
    expected |= {f"whitening_{mode}": powers for mode, powers in block.whiteners.items()}
    found = {}
    bases = {name: stack[row] for name, stack in tensors.items() if name.startswith("basis")}
    inverse = {int(name.rpartition("_")[2]): basis.T for name, basis in bases.items()}
    for name, stack in tensors.items():
        kind, _, mode = name.rpartition("_")
        if kind == "basis":
            own = stack[row]
            if preconditioner in ("soap", "kl_soap", "soap_muon"):
                found[name] = deviation(ordered_projector(own), ordered_projector(block.bases[int(mode)]))
            elif rounded:
                found[name] = deviation(without_signs(own), without_signs(block.bases[int(mode)]))
            else:
                inside = own.T @ block.roots[int(mode)] @ own
                found[name] = deviation(inside.diagonal().diag(), inside)
        elif kind == "whitening":  # the eigenvalues of a root, in the order of the basis
            basis = tensors[f"basis_{mode}"][row]
            own = block.bases[int(mode)]
            wanted = own @ torch.diag(expected[name]) @ own.T
            found[name] = deviation(basis @ torch.diag(stack[row]) @ basis.T, wanted)
        elif name == "rotated_exp_avg":  # not rotated before the first refresh
            found[name] = deviation(rotate(stack[row], inverse), back(block.first, block.bases))
        else:
            found[name] = deviation(stack[row], expected[name])
    return found


def without_signs(basis: Tensor) -> Tensor:
    """Return the magnitudes of a basis's elements, with columns in an order of their own."""
    weights = torch.arange(1.0, len(basis) + 1, dtype=basis.dtype).sqrt()  # rounded columns may agree in an element
    return basis.abs()[:, (weights @ basis.abs()).argsort()]


def ordered_projector(basis: Tensor) -> Tensor:
    """Return a matrix that determines a basis up to the signs of its columns."""
    return basis @ torch.diag(torch.arange(1.0, len(basis) + 1, dtype=basis.dtype)) @ basis.T
