"""Shampoo and KL-Shampoo: multiply each mode of a block by the inverse root of its factor matrix.

Shampoo is arXiv 1802.09568 and 2309.06497. In KL-Shampoo (arXiv 2509.03378) the factor matrices minimise a
Kullback-Leibler divergence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from shampoo_deepspeed.algorithm.found_inf import FoundInf
from shampoo_deepspeed.algorithm.preconditioners.base import Preconditioner
from shampoo_deepspeed.algorithm.preconditioners.refresh_result import RefreshResult
from shampoo_deepspeed.geometry.blocks import Side
from shampoo_deepspeed.linalg import on_accelerators
from shampoo_deepspeed.linalg.eigenbases import rayleigh, renewed, root_from_basis
from shampoo_deepspeed.linalg.inverse_root import (
    SCALE,
    RootOfEigenvalues,
    diagonal_root,
    inverse_power,
    inverse_root,
    shrunk,
    symmetric,
)
from shampoo_deepspeed.linalg.mode_products import add_gram_, multiply_along, multiply_modes
from shampoo_deepspeed.options.choices import DTYPES
from shampoo_deepspeed.options.config import ShampooConfig

# KL-Shampoo's share of the bounds in ``inverse_root``: its roots are scaled to mean eigenvalue 1 anyway, and statistics
# rely on that.
KL_SHARE = 0.6
KL_RANGE = 2.0 ** (2.0 * SCALE * KL_SHARE)  # of largest eigenvalues whose roots no bound changes; float32 holds it
# Multiplies a stack along a mode by the inverse root of that mode's factor, up to a rotation of the mode.
Whitening: TypeAlias = Callable[[Tensor, int], Tensor]


class ShampooPreconditioner(Preconditioner):
    """Factor matrices A_i <- b A_i + (1 - b) G_(i) G_(i)^T (b: ``factor_beta``), applied as A_i^(-1/p) along mode i.

    Only the lower triangle of each factor matrix is defined; elements above it may be stale. p is twice the number of
    modes that have a factor at all. A mode may have only the diagonal of its factor, or nothing (``sides``); the rest
    is neither kept nor computed.

    With ``refresh_tolerance`` or ``solver="qr"`` eigenbases are kept too. With a tolerance a refresh keeps a basis
    unless the factor matrix has moved out of it; the diagonal of Q'AQ gives the eigenvalues (arXiv 2506.03595). With
    "qr" a basis that is not kept takes a step of orthogonal iteration instead of being computed anew (two in early
    refreshes), with the ridge in force. Directions below the ridge then hardly move, but their roots are equal too.
    """

    # In float32 a root -1/4 at the default ridge is accurate to 2e-4; see docs/solvers.md.
    _in_float64 = False

    def __init__(self, config: ShampooConfig) -> None:
        super().__init__(config)
        self._beta = config.factors_decay
        self.sampling = Sampling(config.dense_statistics, config.sampling)
        self._bias_correction = config.use_bias_correction
        self._sides: dict[tuple[int, ...], tuple[Side, ...]] = {}
        self._roots: dict[int, float] = {}  # p by the number of modes
        self._epsilon = config.epsilon
        self._tolerance = config.refresh_tolerance
        self._factor_dtype = DTYPES[config.factor_dtype]
        self._root_dtype = DTYPES[config.root_dtype]
        self._apply_dtype = DTYPES[config.apply_dtype] if config.apply_dtype else None
        # Of statistics and applications alone. Refreshes amplify rounding by the ridge's inverse and stay as they are.
        self._precision = config.matmul_precision
        self.reads = self._tolerance is not None  # to compute only what is not good enough

    def new_state(
        self, count: int, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """``factor_i`` and ``root_i`` [count, d_i, d_i] for each dim that has them, [count, d_i] for a diagonal.

        Also ``basis_i`` if bases are kept. Roots are undefined before the first refresh, and a basis of zeros has not
        been computed yet.
        """
        kinds = {"factor": self._factor_dtype, "root": self._root_dtype}
        if self._config.keeps_basis:
            kinds["basis"] = self._root_dtype
        state = {}
        for mode, (d, side) in enumerate(zip(shape, self.sides(shape), strict=True)):
            for kind, own in kinds.items():
                if side == "matrix" or (side == "diagonal" and kind != "basis"):
                    size = (count, d, d) if side == "matrix" else (count, d)
                    state[f"{kind}_{mode}"] = torch.zeros(size, dtype=own, device=device)
        return state

    def sides(self, shape: tuple[int, ...]) -> tuple[Side, ...]:
        """What each dim of a block of this shape has: a factor matrix, its diagonal or nothing."""
        if shape not in self._sides:
            self._sides[shape] = self._config.sides(shape)
        return self._sides[shape]

    def accumulate(self, state: Mapping[str, Tensor], gradients: Tensor, step: int, found_inf: FoundInf | None) -> None:
        self.add(state, [(mode, count, gradients, 1.0) for mode, count in self._due(state, step)], found_inf)

    def accumulate_whitened(
        self, state: Mapping[str, Tensor], gradients: Tensor, step: int, found_inf: FoundInf | None, whiten: Whitening
    ) -> None:
        """Add the gradients to the factors whose step it is, each whitened along every other mode."""
        parts: list[tuple[int, int, Tensor, float]] = []
        modes = modes_of(state)
        for mode, count in self._due(state, step):
            whitened = gradients
            for other in modes:
                if other != mode:
                    whitened = whiten(whitened, other)
            others = gradients[0].numel() // gradients.shape[mode + 1]
            if gradients.device.type == "cpu":
                parts.append((mode, count, whitened / math.sqrt(others), 1.0))
            else:  # a pass over the stack less
                parts.append((mode, count, whitened, float(others)))
        self.add(state, parts, found_inf)

    def _due(self, state: Mapping[str, Tensor], step: int) -> list[tuple[int, int]]:
        """The modes whose factor gets this step's gradient, and how many gradients it stands for."""
        modes = modes_of(state)
        counts = [self.sampling.stands_for(step, place, len(modes)) for place in range(len(modes))]
        return [(mode, count) for mode, count in zip(modes, counts, strict=True) if count]

    def add(
        self, state: Mapping[str, Tensor], parts: Sequence[tuple[int, int, Tensor, float]], found_inf: FoundInf | None
    ) -> None:
        """A <- b^n A + (1 - b^n) XX' / m, for an X that stands for n gradients; for sums A + n XX' / m.

        Args:
            parts: for some modes the mode, n, the stack whose unfolding along the mode is X, and m.
        """
        for mode, count, stack, divisor in parts:
            factor, decay = state[f"factor_{mode}"], self._beta**count
            weight = float(count) if self._beta == 1.0 else 1.0 - decay
            if found_inf is not None:
                factor.mul_(found_inf.keep(decay, factor.dtype))
                decay = 1.0
            add_gram_(factor, stack, mode, decay, weight / divisor, self._precision)

    def compute(self, state: Mapping[str, Tensor], step: int, conditions: list[Tensor]) -> RefreshResult:
        tensors, failed = self._computed(state, step, conditions)
        return RefreshResult(tensors, frozenset(failed))

    def compute_unread(self, state: Mapping[str, Tensor], step: int, conditions: list[Tensor] | None) -> RefreshResult:
        if self._config.keeps_basis:
            return self._tracked(state, step, conditions)
        tensors, _ = self._computed(state, step, conditions, reads=False)
        found = on_accelerators.all_finite([t for name, t in tensors.items() if name != "scale"])
        return RefreshResult(tensors, good=found)

    def _computed(
        self, state: Mapping[str, Tensor], step: int, conditions: list[Tensor] | None, reads: bool = True
    ) -> tuple[dict[str, Tensor], set[int]]:
        """The tensors that a refresh replaces, and the rows that failed; without ``reads`` these are not finite."""
        root, result = self._root_of(state), dict[str, Tensor]()
        failed: set[int] = set()
        for mode in modes_of(state):
            corrected = self.corrected(state, mode, step)
            tensors, wrong = self._refreshed(state, mode, corrected, root, step, conditions, reads)
            result |= tensors
            failed.update(wrong)
        return result, failed

    def _root_of(self, state: Mapping[str, Tensor]) -> float:
        """p."""
        modes = len(modes_of(state))
        if modes not in self._roots:
            self._roots[modes] = self._config.root(modes)
        return self._roots[modes]

    def _tracked(self, state: Mapping[str, Tensor], step: int, conditions: list[Tensor] | None) -> RefreshResult:
        """A refresh by orthogonal iteration, of all modes together, without a read."""
        root, ridge = self._root_of(state), (self._epsilon, relative_ridge(self._config, step))
        tensors: dict[str, Tensor] = {}
        for mode in modes_of(state):
            if state[f"factor_{mode}"].ndim == 2:
                corrected = self.corrected(state, mode, step)
                tensors |= self._refreshed(state, mode, corrected, root, step, conditions, reads=False)[0]
        found = on_accelerators.all_finite([*tensors.values()]) if tensors else None
        if len(tensors) == len(modes_of(state)):
            return RefreshResult(tensors, good=found)
        bases = self.tracked(state, step, ridge[1])
        spectrum = on_accelerators.spectra(bases, self.divisors(bases, state, step), self._config.parts.whitens)
        share = self._share(len(modes_of(state)))
        rule = RootOfEigenvalues(root, *ridge, self._config.damping, None, share)
        half = on_accelerators.scales(spectrum, rule, self._config.normalize_gradients, 2.0 * root)
        half, more = self._half_roots(spectrum, half)
        tensors |= {f"root_{mode}": own for mode, own in on_accelerators.roots(spectrum, half).items()} | more
        good = bases.good(scaled=True)
        for group in bases.groups:
            tensors |= {f"basis_{mode}": basis for mode, basis in group.each(group.bases).items()}
        return RefreshResult(tensors, good=good if found is None else good & found)

    def _half_roots(self, spectrum: on_accelerators.Spectra, half: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Square roots of the eigenvalues of roots [modes, B, n], and other tensors that a refresh replaces."""
        return half, {}

    def tracked(self, state: Mapping[str, Tensor], step: int, ridge: float) -> on_accelerators.Bases:
        """The bases of all modes after their step of orthogonal iteration; needs ``basis_i`` next to ``factor_i``."""
        shrinks = self._config.shrinkage > 0.0
        modes = [mode for mode in modes_of(state) if state[f"factor_{mode}"].ndim == 3]
        matrices = {m: self.corrected(state, m, step) if shrinks else wide(state[f"factor_{m}"]) for m in modes}
        bases = {mode: state[f"basis_{mode}"].to(matrix.dtype) for mode, matrix in matrices.items()}
        return on_accelerators.tracked(matrices, bases, self._config.orthogonal_steps(step), ridge)

    def divisors(self, bases: on_accelerators.Bases, state: Mapping[str, Tensor], step: int) -> list[float]:
        """By what the matrices of ``tracked`` are to be divided, mode by mode."""
        shrinks = self._config.shrinkage > 0.0  # then they are
        return [
            1.0 if shrinks else self._correction(state, mode, step) for group in bases.groups for mode in group.modes
        ]

    def install(self, state: Mapping[str, Tensor], result: RefreshResult) -> list[int]:
        write(state, result.tensors, result)
        return sorted(result.failed)

    def squares_so_far(
        self, state: Mapping[str, Tensor], shape: tuple[int, ...], steps: Sequence[int]
    ) -> list[tuple[Tensor, float]]:
        """By the traces of the first mode's factors, if there are any."""
        modes = modes_of(state)
        if not modes:
            return super().squares_so_far(state, shape, steps)
        factor, own = state[f"factor_{modes[0]}"], self._divisor(shape, modes[0])
        counts = [self.sampling.counted(step, 0, 1).gradients if step else 0 for step in steps]
        factors = [own / weight_of(self._beta, count) if count else 0.0 for count in counts]
        traces = factor if factor.ndim == 2 else factor.diagonal(dim1=-2, dim2=-1)
        return [*zip(traces.double().sum(-1).unbind(), factors, strict=True)]

    def _divisor(self, shape: tuple[int, ...], mode: int) -> float:
        """By what the statistics of a mode are divided."""
        return math.prod(shape) / shape[mode] if self._config.parts.statistics == "whitened" else 1.0

    def corrected(self, state: Mapping[str, Tensor], mode: int, step: int) -> Tensor:
        """The factor matrices of a mode as a refresh sees them, in new tensors.

        They are wide enough to decompose. If asked, they are corrected for their zero start, and shrunk towards a
        multiple of the identity.
        """
        matrices = wide(state[f"factor_{mode}"]) / self._correction(state, mode, step)
        if self._config.shrinkage == 0.0:
            return matrices
        counted = self._counted(state, mode, step)
        return shrunk(matrices, min(1.0, self._config.shrinkage / counted.effective(self._beta)))

    def _counted(self, state: Mapping[str, Tensor], mode: int, step: int) -> Counted:
        """The gradients in the factor of a mode."""
        modes = modes_of(state)
        return self.sampling.counted(step, modes.index(mode), len(modes))

    def _correction(self, state: Mapping[str, Tensor], mode: int, step: int) -> float:
        """By what factor matrices are divided for their zero start, if asked."""
        if not self._bias_correction or self._beta >= 1.0:
            return 1.0
        return 1.0 - self._beta ** self._counted(state, mode, step).gradients

    def _refreshed(
        self,
        state: Mapping[str, Tensor],
        mode: int,
        matrices: Tensor,
        root: float,
        step: int,
        conditions: list[Tensor] | None,
        reads: bool,
    ) -> tuple[dict[str, Tensor], list[int]]:
        """The tensors of one mode that a refresh replaces, by name, and the rows that failed."""
        ridge, damping = (self._epsilon, relative_ridge(self._config, step)), self._config.damping
        share = self._share(len(modes_of(state)))
        if matrices.ndim == 2:
            roots, failed = diagonal_root(matrices, root, *ridge, self._root_dtype, damping, conditions, share, reads)
            return {f"root_{mode}": roots}, failed
        if not self._config.keeps_basis:
            solver = self._config.solver
            roots, failed = inverse_root(
                matrices, root, *ridge, self._root_dtype, solver, damping, self._in_float64, conditions, share, reads
            )
            return {f"root_{mode}": roots}, failed
        matrices = symmetric(matrices)
        before, steps = state[f"basis_{mode}"].to(matrices.dtype), self._config.orthogonal_steps(step)
        found = renewed(matrices, before, steps, self._tolerance, ridge[1], self._in_float64)
        values, rows = found.values, found.stepped
        if len(rows):
            values[rows] = rayleigh(matrices[rows], found.bases[rows])
        roots, overflown = root_from_basis(values, found.bases, root, *ridge, damping, share)
        return {f"root_{mode}": roots, f"basis_{mode}": found.bases}, sorted({*found.failed, *overflown})

    def _share(self, modes: int) -> float:
        """The share of the bounds in ``inverse_root`` that each mode's root has."""
        return 1.0 / modes

    def apply(
        self, state: Mapping[str, Tensor], entered: Tensor, moments: Tensor, found_inf: FoundInf | None
    ) -> Tensor:
        update = moments.to(self._apply_dtype or torch.promote_types(moments.dtype, self._root_dtype))
        roots = {mode: state[f"root_{mode}"] for mode in modes_of(state)}
        # Roots are symmetric, and products on the CPU are faster with transposed ones.
        transposed = {mode: root if root.ndim == 2 else root.mT for mode, root in roots.items()}
        update = multiply_modes(update, transposed, self._precision)
        return update.to(moments.dtype)


class KLShampooPreconditioner(ShampooPreconditioner):
    r"""Factors S_i <- b S_i + (1 - b) X_(i) X_(i)^T / n_i, applied as S_i^(-1/2) along every mode.

    X is G multiplied along every *other* mode j by S_j^(-1/2), and n_i the product of the other dims. Derivation:
    the gradient g = vec(G) has second moment E[gg'], to be fitted by S = S_1 (x) ... (x) S_k. Up to a constant,

        2 KL(N(0, E[gg']) || N(0, S)) = sum_i n_i log det S_i + E[g' S^-1 g],

    and the derivative by S_i^-1 vanishes at S_i = E[X_(i) X_(i)'] / n_i (for a matrix: S_a = E[G S_b^-1 G'] / d_b,
    claim 2 of the paper). The preconditioner is S^(-1/2), so every mode gets the root 2 for any order.

    S determines its factors only up to scalars whose product is 1. Here every S_j is scaled to mean eigenvalue 1 when
    another factor is computed from it. So all factors have the scale of the squared gradient from the first step on,
    and statistics from before and after a refresh have equal weights. Gradients of another scale give the same updates.
    At the minimum the mean eigenvalues of all factors are then equal, and S is that mean times the product of the
    scaled factors. While they differ, their geometric mean takes its place.

    Before the first refresh the other factors count as identities, and after it as they were at the last refresh.
    """

    def __init__(self, config: ShampooConfig) -> None:
        super().__init__(config)
        self._in_float64 = config.decomposes_in_float64

    def new_state(
        self, count: int, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """As for Shampoo, but ``root_i`` is that of the factor scaled to mean eigenvalue 1, and begins as the identity.

        ``scale`` [count] is the factor that the product of the roots lacks.
        """
        state = super().new_state(count, shape, device, dtype)
        for mode in modes_of(state):
            state[f"root_{mode}"].diagonal(dim1=-2, dim2=-1).fill_(1.0)
        return {**state, "scale": torch.ones(count, dtype=dtype, device=device)}

    def accumulate(self, state: Mapping[str, Tensor], gradients: Tensor, step: int, found_inf: FoundInf | None) -> None:
        whole = gradients.to(torch.promote_types(gradients.dtype, self._root_dtype))
        roots = {mode: state[f"root_{mode}"] for mode in modes_of(state)}
        self.accumulate_whitened(state, whole, step, found_inf, partial(multiply_along, roots, self._precision))

    def _computed(
        self, state: Mapping[str, Tensor], step: int, conditions: list[Tensor] | None, reads: bool = True
    ) -> tuple[dict[str, Tensor], set[int]]:
        modes = modes_of(state)
        scale = torch.ones_like(state["scale"])
        result: dict[str, Tensor] = {}
        failed: set[int] = set()
        for mode in modes:
            matrices = self.corrected(state, mode, step)
            mean = matrices.diagonal(dim1=-2, dim2=-1).mean(-1)
            unseen = (mean == 0).view(-1, 1, 1)  # without a gradient roots stay identities, however small the ridge is
            mean = torch.where(mean > 0, scale_of(mean, self._epsilon), 1.0)
            tensors, wrong = self._refreshed(state, mode, matrices, 2.0, step, conditions, reads)
            found = tensors[f"root_{mode}"] * mean.sqrt().view(-1, 1, 1)
            identity = torch.eye(found.shape[-1], dtype=found.dtype, device=found.device)
            tensors[f"root_{mode}"] = torch.where(unseen, identity, found)
            scale *= inverse_power(mean, 2.0 * len(modes))
            result |= tensors
            failed.update(wrong)
        return {**result, "scale": scale}, failed

    def _root_of(self, state: Mapping[str, Tensor]) -> float:
        return 2.0

    def _half_roots(self, spectrum: on_accelerators.Spectra, half: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        seen = spectrum.means > 0
        root = torch.where(seen, scale_of(spectrum.means, self._epsilon), 1.0).pow_(0.25)
        scale = inverse_power(root.prod(0).squeeze(-1), 0.5 * spectrum.count)
        return torch.where(seen, half * root, 1.0), {"scale": scale}

    def _share(self, modes: int) -> float:
        return KL_SHARE

    def apply(
        self, state: Mapping[str, Tensor], entered: Tensor, moments: Tensor, found_inf: FoundInf | None
    ) -> Tensor:
        update = super().apply(state, entered, moments, found_inf)
        return update * state["scale"].view(-1, *[1] * (moments.ndim - 1))


def scale_of(means: Tensor, epsilon: float) -> Tensor:
    """By what KL-Shampoo's factors with these mean eigenvalues are divided to have about 1.

    Where the ridge, or a bound of the root, takes the place of smaller eigenvalues, it takes that of the mean too.
    Roots would else be far from 1 there, and so would what they make of the next gradients.
    """
    return means.clamp(max(epsilon, 1.0 / KL_RANGE), KL_RANGE)


def weight_of(beta: float, gradients: int) -> float:
    """The sum of the weights of so many gradients in a factor matrix."""
    return float(gradients) if beta == 1.0 else 1.0 - beta**gradients


def relative_ridge(config: ShampooConfig, step: int) -> float:
    """``relative_epsilon`` as it is at this step: larger in early ones, if asked."""
    return max(config.relative_epsilon, config.early_relative_epsilon / step)


class Counted(NamedTuple):
    """The gradients in a factor matrix: ``single`` ones, then ``sampled`` ones that stand for ``frequency`` each."""

    single: int
    sampled: int
    frequency: int

    @property
    def gradients(self) -> int:
        """The number of gradients that they stand for together."""
        return self.single + self.sampled * self.frequency

    def effective(self, decay: float) -> float:
        """(sum w)^2 / sum w^2, with w their weights in a moving average of this decay."""
        if decay == 1.0:
            return self.gradients**2 / (self.single + self.sampled * self.frequency**2)
        window, later = decay**self.frequency, decay ** (self.frequency * self.sampled)
        # Each sum of squares is a geometric series, (1 - b)^2 (1 - b^2n) / (1 - b^2).
        squares = (1.0 - window) / (1.0 + window) * (1.0 - later**2)
        squares += later**2 * (1.0 - decay) / (1.0 + decay) * (1.0 - decay ** (2 * self.single))
        return float((1.0 - decay**self.gradients) ** 2 / squares)


class Sampling(NamedTuple):
    """Which steps' gradients factor matrices get: all up to step ``dense``, and later one in ``frequency``.

    Then the modes of a block take turns, so that all steps take the same time. For two modes and a frequency of 2 this
    is the flip-flop iteration: one factor is updated at even steps, the other at odd ones.
    """

    dense: int
    frequency: int

    def stands_for(self, step: int, place: int, modes: int) -> int:
        """How many gradients this step's one stands for in the factor at a place among so many modes; 0: not added."""
        if step <= self.dense:
            return 1
        return 0 if (step - self._first(place, modes)) % self.frequency else self.frequency

    def counted(self, step: int, place: int, modes: int) -> Counted:
        """The gradients in that factor after this step."""
        windows = 1 + (step - self._first(place, modes)) // self.frequency
        return Counted(min(step, self.dense), max(0, windows) if step > self.dense else 0, self.frequency)

    def _first(self, place: int, modes: int) -> int:
        """The first step whose gradient stands for a whole window."""
        return self.dense + 1 + place * self.frequency // modes


def modes_of(state: Mapping[str, Tensor]) -> list[int]:
    """The modes that have a factor, in order."""
    return sorted(int(name.removeprefix("factor_")) for name in state if name.startswith("factor_"))


def wide(matrices: Tensor) -> Tensor:
    """The matrices in float32 or wider."""
    return matrices.to(torch.promote_types(matrices.dtype, torch.float32))


def write(state: Mapping[str, Tensor], tensors: Mapping[str, Tensor], result: RefreshResult) -> None:
    """Write what a refresh has computed; rows for which one mode failed keep the old tensors of all modes."""
    for name, tensor in tensors.items():
        if result.good is not None:
            old = state[name]
            torch.where(by_row(result.good, old), tensor.to(old.dtype), old, out=old)
            continue
        for row in result.failed:
            tensor[row] = state[name][row]
        state[name].copy_(tensor)


def by_row(numbers: Tensor, stack: Tensor) -> Tensor:
    """Numbers [B] such that each counts for its block of [B, *shape]."""
    return numbers.view(-1, *[1] * (stack.ndim - 1))
