"""SOAP: Adam in the eigenbasis of Shampoo's factor matrices (arXiv 2409.11321)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from shampoo_deepspeed.algorithm.found_inf import FoundInf
from shampoo_deepspeed.algorithm.preconditioners.base import Preconditioner
from shampoo_deepspeed.algorithm.preconditioners.refresh_result import RefreshResult
from shampoo_deepspeed.algorithm.preconditioners.shampoo import (
    ShampooPreconditioner,
    modes_of,
    weight_of,
    wide,
    write,
)
from shampoo_deepspeed.linalg import on_accelerators
from shampoo_deepspeed.linalg.eigenbases import Renewed, known, renewed
from shampoo_deepspeed.linalg.inverse_root import SPREAD, bounded, non_finite, symmetric
from shampoo_deepspeed.linalg.mode_products import multiply_modes
from shampoo_deepspeed.linalg.precision import power
from shampoo_deepspeed.options.choices import DTYPES
from shampoo_deepspeed.options.config import ShampooConfig


class SOAPPreconditioner(Preconditioner):
    """Update Q (Q'M / (sqrt(v) + eps)), where v is the mean square of the rotated gradient Q'G.

    Factor matrices A_i are Shampoo's, Q_i their eigenbases, and ' multiplies along every mode. The first moment is kept
    as Q'M: every step adds the rotated gradient, and a basis that moves rotates it. That equals the paper's M in the
    original basis and saves two products for each mode and step. If the paper's own steps would be too long, or need
    what does not exist yet, the rule is:

    - First refresh (at the start step; before it the element-wise or grafting update is used): Q_i by
      eigendecomposition. The factors have seen all t gradients, and v none. So v starts as their estimate of it: the
      product of the factors' eigenvalues over their trace^(k-1), with the weight of t gradients. That is Adafactor's
      estimate in this basis (claim 1 of the paper). From then on v <- b v + (1 - b) (Q'G)^2, and the sum of weights w
      follows alike; v / w is the corrected mean.
    - Later refreshes: one step of orthogonal iteration (two in early ones), columns ordered by eigenvalue estimate,
      and v permuted alike. It iterates with A + ``relative_epsilon`` l_max I, so that null directions of A stay as
      they are. With ``solver="eigh"`` a decomposition takes the place of the step.
    - When a basis moves, M gets components of which v has seen nothing, and M / sqrt(v) is unbounded. So at each
      refresh that moves the basis v becomes max(v, M^2): no element of that step exceeds Adam's usual 1.
    - ``refresh_tolerance``: a mode's basis is kept if its factor is still diagonal in it to that tolerance.
    - ``relative_epsilon`` times the block's largest sqrt(v) is added to sqrt(v) + eps. In an exactly null direction
      both M and v are rounding noise, and eps as an absolute number fits no scale.
    """

    first_moment = "rotated_exp_avg"
    filled_by_refresh = "rotated_second_moment"
    rotates_moments = True

    def __init__(self, config: ShampooConfig) -> None:
        super().__init__(config)
        self._beta = config.second_moment_beta
        self._root = config.exponent_override if isinstance(config.exponent_override, float) else 2.0
        self._eps = config.eps
        self._relative_epsilon = config.relative_epsilon
        self._tolerance = config.refresh_tolerance
        self._basis_dtype = DTYPES[config.root_dtype]
        self._apply_dtype = DTYPES[config.apply_dtype] if config.apply_dtype else None
        # Of projections. Moments that follow a basis at a refresh keep the result, so these products stay as they are.
        # So do those of updates that are orthogonalised, which lifts the smallest directions to the size of others.
        self._precision = "highest" if config.parts.orthogonalises else config.matmul_precision
        self._factor_dtype = DTYPES[config.factor_dtype]
        self._factors = ShampooPreconditioner(config)
        self.reads = self._tolerance is not None  # to compute only what is not good enough
        self._constants: dict[tuple[float, torch.dtype, torch.device], Tensor] = {}

    def new_state(
        self, count: int, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """``factor_i`` and ``basis_i`` [count, d_i, d_i] of each dim except batch dims, and the second moment.

        That is ``rotated_second_moment`` [count, *shape], and ``rotated_weight`` [count], the sum of the weights of
        the gradients in it.
        """
        state = {}
        for mode, d in enumerate(shape):
            if self._factors.sides(shape)[mode] == "none":
                continue
            state[f"factor_{mode}"] = torch.zeros(count, d, d, dtype=self._factor_dtype, device=device)
            state[f"basis_{mode}"] = torch.zeros(count, d, d, dtype=self._basis_dtype, device=device)
        state["rotated_second_moment"] = torch.zeros(count, *shape, dtype=dtype, device=device)
        state["rotated_weight"] = torch.zeros(count, dtype=dtype, device=device)
        return state

    def accumulate(self, state: Mapping[str, Tensor], gradients: Tensor, step: int, found_inf: FoundInf | None) -> None:
        self._factors.accumulate(state, gradients, step, found_inf)

    def compute(self, state: Mapping[str, Tensor], step: int, conditions: list[Tensor]) -> RefreshResult:
        """New bases, and how the second moment begins or how its columns move."""
        first = ~known(state[f"basis_{modes_of(state)[0]}"])
        moved = first
        result: dict[str, Tensor] = {}
        failed: set[int] = set()
        for mode in modes_of(state):
            found = self._renewed_basis(state, mode, step)
            bases = found.bases.to(self._basis_dtype)
            result |= {f"basis_{mode}": bases, f"values_{mode}": found.values, f"columns_{mode}": found.columns}
            moved = moved | found.moved
            failed.update(found.failed)
        weight = torch.full_like(state["rotated_weight"], 1.0 - self._beta**step)
        trace = self._trace(state, step).to(weight.dtype)
        result |= {"first": first, "moved": moved, "first_weight": weight, "trace": trace}
        return RefreshResult(result, frozenset(failed))

    def compute_unread(self, state: Mapping[str, Tensor], step: int, conditions: list[Tensor] | None) -> RefreshResult:
        """New bases, and how the columns of the second moment move."""
        if self._config.orthogonal_steps(step):
            found = self._factors.tracked(state, step, self._relative_epsilon)
        else:
            matrices = {mode: wide(state[f"factor_{mode}"]) for mode in modes_of(state)}
            before = {mode: state[f"basis_{mode}"].to(matrix.dtype) for mode, matrix in matrices.items()}
            found = on_accelerators.decomposed_anew(matrices, before)
        tensors = self._with_bases(state, found, step, conditions)
        good = found.good(scaled=bool(tensors))
        for group in found.groups:
            bases, order = group.each(group.bases.to(self._basis_dtype)), group.each(group.order)
            tensors |= {f"basis_{mode}": basis for mode, basis in bases.items()}
            tensors |= {f"columns_{mode}": columns for mode, columns in order.items()}
        return RefreshResult(tensors, good=good)

    def _with_bases(
        self, state: Mapping[str, Tensor], bases: on_accelerators.Bases, step: int, conditions: list[Tensor] | None
    ) -> dict[str, Tensor]:
        """What else a refresh replaces; what fails in it is noted in ``bases.wrong``."""
        return {}

    def _install_unread(self, state: Mapping[str, Tensor], result: RefreshResult) -> None:
        """``install`` of what ``compute_unread`` returns: all blocks have bases, and all of these move."""
        found, second = result.tensors, state["rotated_second_moment"]
        for mode in modes_of(state):
            along = [-1, *[d if n == mode else 1 for n, d in enumerate(second.shape[1:])]]
            second = second.gather(mode + 1, found[f"columns_{mode}"].view(along).expand_as(second))
        changed = {name: tensor for name, tensor in found.items() if name in state} | {"rotated_second_moment": second}
        if self.first_moment in state:
            kept = state[self.first_moment]
            changed[self.first_moment] = self._rotated(found, self._rotated(state, kept, back=True)).to(kept.dtype)
        write(state, changed, result)

    def install(self, state: Mapping[str, Tensor], result: RefreshResult) -> list[int]:
        """Install bases, and change the current second moment, which may have seen gradients since ``compute``."""
        if result.good is not None:
            self._install_unread(state, result)
            return []
        found = result.tensors
        second = state["rotated_second_moment"].clone()
        rows = (-1, *[1] * (second.ndim - 1))
        seed = torch.ones_like(second)
        for mode in modes_of(state):
            along = [-1, *[d if n == mode else 1 for n, d in enumerate(second.shape[1:])]]
            seed *= found[f"values_{mode}"].to(seed.dtype).view(along)
            columns = found[f"columns_{mode}"].view(along)
            second = second.gather(mode + 1, columns.expand_as(second))
        weight = torch.where(found["first"], found["first_weight"], state["rotated_weight"])
        second = torch.where(found["first"].view(rows), (found["trace"] * weight).view(rows) * seed, second)
        changed = {"rotated_second_moment": second, "rotated_weight": weight}
        bases = {name: tensor for name, tensor in found.items() if name in state}
        if self.first_moment in state:
            kept = state[self.first_moment]
            plain = torch.where(found["first"].view(rows), kept, self._rotated(state, kept, back=True).to(kept.dtype))
            rotated = self._rotated(bases, plain).to(kept.dtype)
            changed[self.first_moment] = torch.where(found["moved"].view(rows), rotated, kept)
        write(state, {**bases, **changed}, result)
        return sorted(result.failed)

    def follow_basis(self, state: Mapping[str, Tensor], result: RefreshResult, moments: Tensor) -> None:
        """Raise the second moment to at least M^2 in blocks whose basis moved."""
        rows = (-1, *[1] * (moments.ndim - 1))
        second, weight = state["rotated_second_moment"], state["rotated_weight"]
        if result.good is not None:  # second moments are not negative, so a floor of zero is none
            floor = moments.square().to(second.dtype).mul_((weight * result.good).view(rows))
            torch.maximum(second, floor, out=second)
            return
        floor = weight.view(rows) * moments.square().to(second.dtype)
        floored = torch.where(result.tensors["moved"].view(rows), torch.maximum(second, floor), second)
        write(state, {"rotated_second_moment": floored}, result)

    def project(self, state: Mapping[str, Tensor], gradients: Tensor) -> Tensor:
        return self._projected(state, gradients).to(gradients.dtype)

    def project_back(self, state: Mapping[str, Tensor], moments: Tensor) -> Tensor:
        return self._projected(state, moments, back=True).to(moments.dtype)

    def _renewed_basis(self, state: Mapping[str, Tensor], mode: int, step: int) -> Renewed:
        """One mode's bases, and their eigenvalues divided by their sum."""
        # Decompositions are in float64: in the basis all directions count alike, even those of the smallest
        # eigenvalues, which float32 resolves poorly. A step from a known basis loses far less.
        matrices = symmetric(wide(state[f"factor_{mode}"]))
        bases, steps = state[f"basis_{mode}"].to(matrices.dtype), self._config.orthogonal_steps(step)
        found = renewed(matrices, bases, steps, self._tolerance, self._relative_epsilon, in_float64=True)
        values = found.values.clamp_min(0.0)
        total = values.sum(-1, keepdim=True)
        failed = sorted({*found.failed, *non_finite(found.bases)})
        values = torch.where(total > 0, values / total, 0.0)
        return Renewed(found.bases, values, found.columns, found.moved, found.stepped, failed)

    def _trace(self, state: Mapping[str, Tensor], step: int) -> Tensor:
        """The mean of ||G||^2 by the factor matrices [B]; the first mode's stands for all."""
        return self._mean_trace(state, 0, step)

    def _mean_trace(self, state: Mapping[str, Tensor], place: int, step: int) -> Tensor:
        """The trace of the mean statistics [B] of one of the modes that have a factor."""
        modes = modes_of(state)
        seen = self._factors.sampling.counted(step, place, len(modes)).gradients
        weight = weight_of(self._config.factors_decay, seen)
        return wide(state[f"factor_{modes[place]}"]).diagonal(dim1=-2, dim2=-1).sum(-1) / weight

    def squares_so_far(
        self, state: Mapping[str, Tensor], shape: tuple[int, ...], steps: Sequence[int]
    ) -> list[tuple[Tensor, float]]:
        return self._factors.squares_so_far(state, shape, steps)

    def apply(
        self, state: Mapping[str, Tensor], entered: Tensor, moments: Tensor, found_inf: FoundInf | None
    ) -> Tensor:
        second, weight = state["rotated_second_moment"], state["rotated_weight"]
        second.mul_(self._beta if found_inf is None else found_inf.keep(self._beta, second.dtype))
        second.addcmul_(entered, entered, value=1.0 - self._beta)
        there = weight.device.type != "cpu"
        if there:  # in one operator; blocks whose bases are known have a weight
            weight.lerp_(
                self._constant(1.0, weight),
                1.0 - self._beta if found_inf is None else found_inf.scale(1.0 - self._beta),
            )
            mean = second / weight.view(-1, *[1] * (second.ndim - 1))
        else:
            weight.mul_(self._beta if found_inf is None else found_inf.keep(self._beta, weight.dtype))
            weight.add_(1.0 - self._beta if found_inf is None else found_inf.scale(1.0 - self._beta))
            mean = second / weight.clamp_min(torch.finfo(weight.dtype).tiny).view(-1, *[1] * (second.ndim - 1))
        dims, relative = tuple(range(1, mean.ndim)), self._relative_epsilon
        if self._root == 2.0:
            roots = mean.sqrt_()
        else:  # another root may be out of the dtype's range, or so small that the update would be
            roots = power(bounded(mean, mean.amax(dims, keepdim=True), self._root), 1.0 / self._root)
            relative = max(relative, 2.0**-SPREAD)
        largest = roots.amax(dims, keepdim=True)
        if there:
            roots.add_(torch.add(self._constant(self._eps, roots), largest, alpha=relative))
        else:
            roots.add_(largest.mul_(relative).add_(self._eps))
        if self._eps < torch.finfo(roots.dtype).tiny:  # a root may be 0 then, which must give 0
            roots = torch.nn.functional.threshold(roots, 0.0, torch.inf, inplace=True)
        return self._projected(state, moments / roots, back=True).to(moments.dtype)

    def _constant(self, value: float, like: Tensor) -> Tensor:
        """A number as a 0-d tensor, which is made once."""
        key = value, like.dtype, like.device
        if key not in self._constants:
            self._constants[key] = torch.full((), value, dtype=like.dtype, device=like.device)
        return self._constants[key]

    def _projected(self, state: Mapping[str, Tensor], stack: Tensor, back: bool = False) -> Tensor:
        """``_rotated`` in the dtype and precision of a step's products."""
        return self._rotated(state, stack, self._apply_dtype, back, self._precision)

    def _rotated(
        self,
        state: Mapping[str, Tensor],
        stack: Tensor,
        dtype: torch.dtype | None = None,
        back: bool = False,
        precision: str = "highest",
    ) -> Tensor:
        """The stack rotated into the eigenbases, or back."""
        rotated = stack.to(dtype or torch.promote_types(stack.dtype, self._basis_dtype))
        bases = {mode: state[f"basis_{mode}"] for mode in range(stack.ndim - 1) if f"basis_{mode}" in state}
        return multiply_modes(rotated, {mode: basis if back else basis.mT for mode, basis in bases.items()}, precision)
