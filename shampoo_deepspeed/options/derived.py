"""Values in force that follow from several options, such as the default of one that another option decides."""

from __future__ import annotations

import dataclasses
from bisect import bisect_right
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor

from shampoo_deepspeed.geometry.blocks import Side, sides_of
from shampoo_deepspeed.options.checks import LARGEST_INT, bad
from shampoo_deepspeed.options.family import FAMILY, Parts

if TYPE_CHECKING:
    from typing_extensions import Self

# The block size if none is given.
BLOCK_SIZE = 1024
# From this relative ridge on, KL-Shampoo's roots of float32 factor matrices are accurate enough in float32.
WIDE_RIDGE = 1e-5
# Steps of orthogonal iteration in each early refresh, in which factor matrices change most. With one the basis lags
# behind: 0.4 of AdamW's budget then ends 0.5 % above exact roots, and with two as they do (docs/convergence.md).
EARLY_STEPS = 2


class DerivedValues:
    """Part of `ShampooConfig`: what is computed from its options. They are constant, so most values are cached."""

    # The options that are read here; `config.py` has their meaning.
    lr: float | Tensor
    betas: tuple[float, float]
    factor_beta: float | None
    beta3: float | None
    weight_decay: float
    decoupled_weight_decay: bool
    momentum: float
    ema_decay: float
    weight_decay_type: str | None
    peak_lr: float | None
    relative_epsilon: float
    preconditioner: str
    max_preconditioner_dim: int | None
    large_dim: str
    one_sided: str | None
    batch_dims: int
    statistics_frequency: int | None
    precondition_frequency: int
    refresh_growth: float | None
    refresh_tolerance: float | None
    solver: str
    refresh: str
    start_preconditioning_step: int
    grafting: str | None
    grafting_beta2: float | None
    elementwise: str | None
    elementwise_betas: tuple[float, float] | None
    exponent_override: float | tuple[float | None, ...] | None
    factor_format: str
    root_format: str
    moment_format: str
    elementwise_format: str

    def _replaced(self, **changes: Any) -> Self:
        """These options with some changes."""
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]

    @cached_property
    def parts(self) -> Parts:
        """What the preconditioner is made of."""
        return FAMILY[self.preconditioner]

    @cached_property
    def block_size(self) -> int:
        """``max_preconditioner_dim`` in force. Orthogonalised matrices without factor matrices stay whole."""
        if self.max_preconditioner_dim is not None:
            return self.max_preconditioner_dim
        return BLOCK_SIZE if self.parts.statistics else LARGEST_INT

    @cached_property
    def for_blocks(self) -> Self:
        """These options as blocks see them. If they are orthogonalised, Nesterov's momentum is the default."""
        if not self.parts.orthogonalises or self.beta3 is not None or self.betas[0] == 0.0:
            return self
        return self._replaced(beta3=self.betas[0] ** 2)

    @cached_property
    def decay_type(self) -> str:
        """How weight decay enters: l2, decoupled, corrected or independent."""
        return self.weight_decay_type or ("decoupled" if self.decoupled_weight_decay else "l2")

    def decay(self, rate: float | Tensor) -> float | Tensor:
        """The factor with which weights are added to the update, given the learning rate of the step.

        ``corrected`` (arXiv 2506.02285) scales by lr / peak lr, ``independent`` by 1 / peak lr, so that the step's own
        factor lr makes it ``weight_decay * lr / peak_lr``; 0 for ``l2``.
        """
        if self.decay_type in ("l2", "decoupled"):
            return self.weight_decay if self.decay_type == "decoupled" else 0.0
        assert self.peak_lr is not None
        return self.weight_decay * (rate if self.decay_type == "corrected" else 1.0) / self.peak_lr

    @property
    def decays_by_peak(self) -> bool:
        """Whether weight decay is scaled by ``peak_lr``, which nothing else reads."""
        return self.decay_type in ("corrected", "independent")

    def with_peak(self) -> Self:
        """These options, with the current learning rate as the peak if one is needed and none is given."""
        if self.peak_lr is not None or not self.decays_by_peak:
            return self
        peak = float(self.lr)
        if peak == 0.0:
            raise bad("peak_lr", None, f"a number > 0 if lr starts at 0 and weight decay is {self.decay_type}")
        return self._replaced(peak_lr=peak)

    @cached_property
    def applies_at_once(self) -> bool:
        """Whether weights can change piece by piece, as updates arrive: momentum and averages need whole tensors."""
        return not (self.momentum or self.ema_decay)

    @property
    def formats(self) -> dict[str, str]:
        """The format of each kind of a block's state."""
        return {"factor": self.factor_format, "root": self.root_format, "moment": self.moment_format}

    def sides(self, shape: tuple[int, ...]) -> tuple[Side, ...]:
        """What each dim of a merged shape, or of a block of it, has: a factor matrix, a diagonal or nothing."""
        if self.parts.statistics is None:
            return tuple[Side, ...]("none" for _ in shape)
        large = "block" if self.large_dim == "adagrad" else self.large_dim
        return sides_of(shape, self.block_size, large, self.one_sided, self.batch_dims)

    def root(self, count: int) -> float:
        """The p of A^(-1/p) for a block with so many preconditioned dims."""
        if self.parts.whitens:
            return 2.0
        given = self.exponent_override
        if isinstance(given, tuple):
            given = given[count - 1] if count <= len(given) else None
        return 2.0 * count if given is None else given

    @cached_property
    def decomposes_in_float64(self) -> bool:
        """Whether float32 factor matrices are decomposed in float64.

        KL-Shampoo's are if the ridge is small: the root -1/2 doubles float32's error of small eigenvalues, and the next
        statistics are computed from these roots. In SOAP's basis all directions count alike.
        """
        return self.parts.in_basis or (self.parts.whitens and self.relative_epsilon < WIDE_RIDGE)

    @cached_property
    def decompositions(self) -> float:
        """The time of a refresh relative to a decomposition in float32; a QR step takes 65 to 80 % on the CPU."""
        if self.tracks_basis:
            return 0.7
        return 2.0 if self.decomposes_in_float64 else 1.0

    def products(self, order: int) -> float:
        """Products with a matrix of the factor's size, for each step and dim of a block of this order."""
        statistics = float(order) if self.parts.whitens else 1.0
        return statistics / self.sampling + (2.0 if self.parts.in_basis else 1.0)

    @cached_property
    def factors_decay(self) -> float:
        """Decay of the factor matrices for each gradient; 1 for sums."""
        return self.betas[1] if self.factor_beta is None else self.factor_beta

    @cached_property
    def sampling(self) -> int:
        """``statistics_frequency`` in force. KL-Shampoo's statistics cost twice as much as Shampoo's."""
        if self.statistics_frequency is not None:
            return self.statistics_frequency
        return 2 if self.parts.whitens else 1

    @cached_property
    def dense_statistics(self) -> int:
        """The last step up to which every gradient is added to the factor matrices: that of the last early refresh."""
        return self.early_windows[-1]

    @cached_property
    def growth(self) -> float:
        """``refresh_growth`` in force. Only KL-Shampoo bears refreshes by the few gradients of the first steps."""
        if self.refresh_growth is not None:
            return self.refresh_growth
        return 0.25 if self.parts.whitens and not self.parts.in_basis else 0.0

    @cached_property
    def start(self) -> int:
        """The first preconditioned step, counted from 1."""
        start = self.start_preconditioning_step
        if start == -1:
            return 2 if self.growth else self.precondition_frequency
        return start

    @cached_property
    def early_windows(self) -> tuple[int, ...]:
        """The first steps of the windows that are shorter than the frequency, and of the first full window."""
        begins = [self.start]
        while self.growth and (length := max(1, int(self.growth * begins[-1]))) < self.precondition_frequency:
            begins.append(begins[-1] + length)
        return tuple(begins)

    def early_refreshes(self) -> tuple[int, int]:
        """(refreshes of each block, steps) in the windows that are shorter than the frequency; (0, 0) if none is."""
        begins = self.early_windows
        return len(begins) - 1, begins[-1] - begins[0]

    def refresh_window(self, step: int) -> tuple[int, int]:
        """(first step, length) of the window around a step >= ``start``; every block refreshes once per window."""
        begins = self.early_windows
        if step >= begins[-1]:
            return step - (step - begins[-1]) % self.precondition_frequency, self.precondition_frequency
        place = bisect_right(begins, step)
        return begins[place - 1], begins[place] - begins[place - 1]

    def refreshes_at(self, step: int) -> bool:
        """Whether all blocks are refreshed at this step (counted from 1), if refreshes are not spread."""
        if step < self.start or not self.growth:
            return step >= self.start and (step == self.start or step % self.precondition_frequency == 0)
        return self.refresh_window(step)[0] == step

    @cached_property
    def staggers(self) -> bool:
        """Whether refreshes are spread over the window."""
        return self.refresh in ("staggered", "background")

    @cached_property
    def keeps_basis(self) -> bool:
        """Whether eigenbases are kept next to inverse roots, so that a refresh can start from the last ones."""
        return self.parts.takes_roots and (self.refresh_tolerance is not None or self.solver == "qr")

    @cached_property
    def tracks_basis(self) -> bool:
        """Whether known eigenbases take steps of orthogonal iteration at a refresh, instead of being computed anew."""
        return self.solver == "qr" or (self.solver == "auto" and self.parts.in_basis)

    def orthogonal_steps(self, step: int) -> int:
        """Steps of orthogonal iteration that a known eigenbasis takes in a refresh at this step; 0: computed anew."""
        if not self.tracks_basis:
            return 0
        return EARLY_STEPS if step < self.early_windows[-1] else 1

    @cached_property
    def grafting_method(self) -> str:
        """The grafting method in force: as given, else the preconditioner's. SOAP already has Adam's step length."""
        if self.grafting is not None:
            return self.grafting
        return "none" if self.parts.in_basis and not self.parts.orthogonalises else "rms"

    @cached_property
    def grafts(self) -> bool:
        """Whether preconditioned updates get the length of an element-wise method's, which needs its second moment."""
        return self.grafting_method not in ("none", "rms")

    @cached_property
    def warm_method(self) -> str:
        """The method of a block's updates before its first refresh, and of their length after it if grafted."""
        return self.grafting_method if self.grafts else self.elementwise_method

    @cached_property
    def second_moment_beta(self) -> float:
        """Decay of second moments: of grafting, and of SOAP's rotated gradient."""
        if self.grafting_beta2 is not None:
            return self.grafting_beta2
        return self.betas[1] if self.betas[1] < 1.0 else 0.999

    @cached_property
    def elementwise_method(self) -> str:
        """The method of element-wise parameters; without grafting, also of blocks before their first refresh."""
        if self.elementwise is not None:
            return self.elementwise
        return self.grafting_method if self.grafts else "adam"

    @cached_property
    def for_elementwise(self) -> Self:
        """These options with the betas that element-wise parameters have."""
        if self.elementwise_betas is None:
            return self
        beta3 = self.beta3 if self.elementwise_betas[0] else None
        return self._replaced(betas=self.elementwise_betas, elementwise_betas=None, grafting_beta2=None, beta3=beta3)

    def in_force(self, name: str) -> Any:
        """The value of an option of ``shape_of_state``, or what stands for it if none is given."""
        stand_ins: dict[str, Any] = {"grafting": self.grafting_method, "elementwise": self.elementwise_method}
        stand_ins["max_preconditioner_dim"] = self.block_size
        return stand_ins.get(name, getattr(self, name))
