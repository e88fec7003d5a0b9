"""Muon: the first moment, orthogonalised; and SOAP-Muon: SOAP's update, orthogonalised."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from shampoo_deepspeed.algorithm.found_inf import FoundInf
from shampoo_deepspeed.algorithm.preconditioners.base import Preconditioner
from shampoo_deepspeed.algorithm.preconditioners.soap import SOAPPreconditioner
from shampoo_deepspeed.linalg.orthogonalise import orthogonalised
from shampoo_deepspeed.options.choices import DTYPES
from shampoo_deepspeed.options.config import ShampooConfig

# Times the root of the longer side this gives an orthogonal matrix a root mean square of 0.2 (arXiv 2502.16982, section
# 2.2), torch.optim.Muon's ``match_rms_adamw``. It is the length only without grafting.
SCALE = 0.2


def orthogonal_updates(stack: Tensor, config: ShampooConfig) -> Tensor:
    """Blocks [B, *shape], each orthogonalised as a matrix: its first dim against the product of the others.

    Batch dims are not part of it. The root mean square of a result is about ``SCALE``.
    """
    work = stack.to(DTYPES[config.apply_dtype] if config.apply_dtype else stack.dtype)
    matrices = work.reshape(len(work), work.shape[1 + config.batch_dims], -1)
    out = orthogonalised(matrices, SCALE * math.sqrt(max(matrices.shape[1:])))
    return out.reshape(stack.shape).to(stack.dtype)


class MuonPreconditioner(Preconditioner):
    """Update orthogonalised(M), without factor matrices (Keller Jordan, 2024; torch.optim.Muon).

    ``beta3`` is the square of ``betas[0]`` unless given, which is Nesterov's momentum. Without grafting the update has
    a root mean square of 0.2; with ``grafting="rms"``, the default, 0.4.
    """

    own_length = True

    def apply(
        self, state: Mapping[str, Tensor], entered: Tensor, moments: Tensor, found_inf: FoundInf | None
    ) -> Tensor:
        return orthogonal_updates(moments, self._config)


class SOAPMuonPreconditioner(SOAPPreconditioner):
    """Update orthogonalised(U) of SOAP's update U, in the original coordinates."""

    own_length = True

    def apply(
        self, state: Mapping[str, Tensor], entered: Tensor, moments: Tensor, found_inf: FoundInf | None
    ) -> Tensor:
        return orthogonal_updates(super().apply(state, entered, moments, found_inf), self._config)
