"""KL-SOAP: SOAP in the eigenbasis of KL-Shampoo's factor matrices (arXiv 2509.03378)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from shampoo_deepspeed.algorithm.found_inf import FoundInf
from shampoo_deepspeed.algorithm.preconditioners.refresh_result import RefreshResult
from shampoo_deepspeed.algorithm.preconditioners.shampoo import KL_SHARE, modes_of, relative_ridge, scale_of
from shampoo_deepspeed.algorithm.preconditioners.soap import SOAPPreconditioner
from shampoo_deepspeed.linalg import on_accelerators
from shampoo_deepspeed.linalg.eigenbases import rayleigh
from shampoo_deepspeed.linalg.inverse_root import RootOfEigenvalues, inverse_power, symmetric
from shampoo_deepspeed.linalg.mode_products import multiply


class KLSOAPPreconditioner(SOAPPreconditioner):
    """SOAP with factors S_i <- b S_i + (1 - b) X_(i) X_(i)^T / n_i, X = G times S_j^(-1/2) along every other mode j.

    These are KL-Shampoo's factors. Each S_j^(-1/2) is known by the eigenbasis Q_j and eigenvalues l_j of the last
    refresh. X is multiplied by diag(l_j^(-1/2)) Q_j' alone, because a rotation of mode j does not change X_(i) X_(i)^T.
    As there, S_j is scaled to mean eigenvalue 1 before.
    """

    def new_state(
        self, count: int, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """As for SOAP, and ``whitening_i`` [count, d_i]: l_i^(-1/2) by column of the basis; 0 before there is one."""
        state = super().new_state(count, shape, device, dtype)
        for mode in modes_of(state):
            state[f"whitening_{mode}"] = torch.zeros(count, shape[mode], dtype=self._basis_dtype, device=device)
        return state

    def accumulate(self, state: Mapping[str, Tensor], gradients: Tensor, step: int, found_inf: FoundInf | None) -> None:
        whole = gradients.to(torch.promote_types(gradients.dtype, self._basis_dtype))
        self._factors.accumulate_whitened(
            state, whole, step, found_inf, lambda stack, mode: self._whitened(state, stack, mode)
        )

    def _whitened(self, state: Mapping[str, Tensor], stack: Tensor, mode: int) -> Tensor:
        """The stack times diag(l^(-1/2)) Q' along a mode; blocks without a basis stay as they are."""
        scales = state[f"whitening_{mode}"]
        known = scales.any(-1).view(-1, *[1] * (stack.ndim - 1))
        turned = multiply(stack, state[f"basis_{mode}"].mT, mode, self._precision)
        return torch.where(known, multiply(turned, scales, mode), stack)

    def compute(self, state: Mapping[str, Tensor], step: int, conditions: list[Tensor]) -> RefreshResult:
        result = super().compute(state, step, conditions)
        ridge = self._config.epsilon, relative_ridge(self._config, step)
        rule = RootOfEigenvalues(2.0, *ridge, self._config.damping, conditions, KL_SHARE)
        found = {}
        for mode in modes_of(state):
            matrices = symmetric(self._factors.corrected(state, mode, step))
            mean = matrices.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
            scales = rule.of(rayleigh(matrices, result.tensors[f"basis_{mode}"].to(matrices.dtype)))
            scales *= scale_of(mean, self._config.epsilon).sqrt()
            found[f"whitening_{mode}"] = torch.where(mean > 0, scales, 1.0).to(self._basis_dtype)
        return RefreshResult({**result.tensors, **found}, result.failed)

    def _with_bases(
        self, state: Mapping[str, Tensor], bases: on_accelerators.Bases, step: int, conditions: list[Tensor] | None
    ) -> dict[str, Tensor]:
        spectrum = on_accelerators.spectra(bases, self._factors.divisors(bases, state, step), means=True)
        ridge = self._config.epsilon, relative_ridge(self._config, step)
        rule = RootOfEigenvalues(2.0, *ridge, self._config.damping, conditions, KL_SHARE)
        scales = on_accelerators.scales(spectrum, rule, self._config.normalize_gradients)
        scales *= scale_of(spectrum.means, self._config.epsilon).sqrt()
        found = torch.where(spectrum.means > 0, scales, 1.0).to(self._basis_dtype)
        return {f"whitening_{mode}": own for mode, own in spectrum.by_mode(found).items()}

    def _trace(self, state: Mapping[str, Tensor], step: int) -> Tensor:
        """The mean of ||G||^2 [B]: each factor has the scale of an element of the gradient, up to the others'."""
        modes, shape = modes_of(state), state["rotated_second_moment"].shape[1:]
        total = torch.full_like(state["rotated_weight"], float(shape.numel()))
        for place, mode in enumerate(modes):
            mean = self._mean_trace(state, place, step).to(total.dtype) / shape[mode]
            total = total / inverse_power(mean, float(len(modes)))
        return total
