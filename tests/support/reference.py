"""A readable version of the update rule, the exactness tests' oracle: plain, unsharded float64 Shampoo and its family.

It shares no code with the package. `Reference.step` follows the numbered steps of the rule; everything is computed
block by block, without batching.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from tests.support.narrow import kept


@dataclass(frozen=True)
class Options:
    """The options of one parameter, with the package's defaults."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled_weight_decay: bool = True
    epsilon: float = 1e-12
    relative_epsilon: float = 1e-4
    preconditioner: str = "kl_shampoo"
    max_preconditioner_dim: int | None = None
    precondition_frequency: int = 10
    refresh_tolerance: float | None = None
    refresh: str = "staggered"
    start_preconditioning_step: int = -1
    grafting: str | None = None
    grafting_beta2: float | None = None
    elementwise: str | None = None
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    ema_decay: float = 0.0
    use_bias_correction: bool = True
    exponent_override: float | list[float | None] | None = None
    beta3: float | None = None
    weight_decay_type: str | None = None
    peak_lr: float | None = None
    merge_small_dims: bool = True
    large_dim: str = "block"
    one_sided: str | None = None
    batch_dims: int = 0
    split: tuple[int, ...] = ()
    damping: str = "shift"
    shrinkage: float = 0.0
    solver: str = "auto"
    statistics_frequency: int | None = None
    factor_beta: float | None = 0.95
    early_relative_epsilon: float = 0.01
    refresh_growth: float | None = None
    elementwise_lr: float = 3.0
    tied_embedding_lr: float | None = 9.0
    elementwise_betas: tuple[float, float] | None = None
    normalize_gradients: bool = True
    matmul_precision: str = "highest"
    factor_format: str = "float32"
    root_format: str = "float32"
    moment_format: str = "float32"
    elementwise_format: str = "float32"

    @property
    def growth(self) -> float:
        if self.refresh_growth is None:
            return 0.25 if self.preconditioner == "kl_shampoo" else 0.0
        return self.refresh_growth

    @property
    def limit(self) -> int:
        """Return the block size; without any, Muon's matrices stay whole."""
        return self.max_preconditioner_dim or (2**53 if self.preconditioner == "muon" else 1024)

    @property
    def kl(self) -> bool:
        return self.preconditioner in ("kl_shampoo", "kl_soap")

    @property
    def in_basis(self) -> bool:
        return self.preconditioner in ("soap", "kl_soap", "soap_muon")

    @property
    def orthogonal(self) -> bool:
        return self.preconditioner in ("muon", "soap_muon")

    @property
    def lowers(self) -> bool:
        return self.matmul_precision != "highest"

    @property
    def of_projections(self) -> Options:
        """Return these options with the precision of projections."""
        return replace(self, matmul_precision="highest") if self.orthogonal else self

    @property
    def sampled(self) -> int:
        if self.statistics_frequency is None:
            return 2 if self.kl else 1
        return self.statistics_frequency

    @property
    def start(self) -> int:
        if self.start_preconditioning_step != -1:
            return self.start_preconditioning_step
        return 2 if self.growth else self.precondition_frequency

    @property
    def beta(self) -> float:
        """Return the decay of the factor matrices."""
        return self.betas[1] if self.factor_beta is None else self.factor_beta

    @property
    def for_elementwise(self) -> Options:
        if self.elementwise_betas is None:
            return self
        beta3 = self.beta3 if self.elementwise_betas[0] else None
        return replace(self, betas=self.elementwise_betas, grafting_beta2=None, beta3=beta3)

    @property
    def tracks(self) -> bool:
        """Return whether known bases take a step of orthogonal iteration."""
        return self.solver == "qr" or (self.solver == "auto" and self.in_basis)

    def ridge(self, t: int) -> float:
        return max(self.relative_epsilon, self.early_relative_epsilon / t)

    def window(self, t: int) -> tuple[int, int]:
        """Return start and length of the window of refreshes that contains step t >= start."""
        begin = self.start
        while True:
            longest = self.precondition_frequency
            length = min(longest, max(1, int(self.growth * begin))) if self.growth else longest
            if t < begin + length:
                return begin, length
            begin += length

    def dense(self) -> int:
        """Return the last step up to which factors get every gradient: the start, or the first whole window's begin."""
        t = self.start
        while self.growth and self.window(t)[1] < self.precondition_frequency:
            t = sum(self.window(t))
        return t

    def stands_for(self, t: int, place: int, modes: int) -> int:
        """Return how many gradients that of step t stands for in the factor at a place among so many; 0: not used."""
        n, dense = self.sampled, self.dense()
        used = range(dense + 1 + n * place // modes, t + 1, n)
        return 1 if t <= dense else n * (t in used)

    def counts(self, t: int, place: int, modes: int) -> list[int]:
        """Return what each gradient in a factor after step t stands for, in order."""
        return [n for step in range(1, t + 1) if (n := self.stands_for(step, place, modes))]

    def correction(self, t: int, place: int, modes: int) -> float:
        """Return the sum of the weights in a factor's moving average after step t, if it is corrected for it."""
        corrected = self.use_bias_correction and self.beta != 1.0
        return 1.0 - self.beta ** sum(self.counts(t, place, modes)) if corrected else 1.0

    def share(self, t: int, place: int, modes: int) -> float:
        """Return the share of the identity in a factor of step t, from the weight of each gradient in it."""
        counts, weights = self.counts(t, place, modes), []
        for number, n in enumerate(counts):
            own = n if self.beta == 1.0 else 1.0 - self.beta**n
            weights.append(own * self.beta ** sum(counts[number + 1 :]))
        return min(1.0, self.shrinkage * sum(w * w for w in weights) / sum(weights) ** 2)

    @property
    def graft(self) -> str:
        return self.grafting or ("none" if self.preconditioner in ("soap", "kl_soap") else "rms")

    @property
    def warm(self) -> str:
        """Return the element-wise method of a block's first updates: the grafting method if there is one."""
        return self.fallback if self.graft in ("none", "rms") else self.graft

    @property
    def fallback(self) -> str:
        return self.elementwise or ("adam" if self.graft in ("none", "rms") else self.graft)

    @property
    def graft_beta2(self) -> float:
        if self.grafting_beta2 is not None:
            return self.grafting_beta2
        return 0.999 if self.betas[1] == 1.0 else self.betas[1]


@dataclass
class Block:
    """One box of a (merged) parameter; without factors, the whole parameter is element-wise."""

    box: tuple[Any, ...]  # slices, or (...,) for the whole parameter
    method: str
    factors: dict[int, Tensor]  # by dim: a matrix, or a vector of its diagonal
    second: Tensor
    first: Tensor  # SOAP: in the basis, once there is one
    roots: dict[int, Tensor] = field(default_factory=dict)
    bases: dict[int, Tensor] = field(default_factory=dict)
    scale: float = 1.0  # KL-Shampoo: scale of the product of the roots
    whiteners: dict[int, Tensor] = field(default_factory=dict)  # KL-SOAP: roots of eigenvalues, for its statistics
    rotated: Tensor = field(default_factory=lambda: torch.zeros(()))  # SOAP: weighted sum of (Q'G)^2
    weight: float = 0.0  # SOAP: sum of those weights
    phase: int | None = None  # staggered: steps from the start step to its first refresh
    seen: tuple[int, dict[int, Tensor]] | None = None  # background: step and factors of a refresh to be installed
    ready: bool = False  # whether it has been refreshed, or needs not be
    looks_ahead: bool = False  # whether its momentum is Nesterov's by default
    key: str = ""  # "parameter/index", from which the random bits of its formats follow


@dataclass
class Parameter:
    value: Tensor
    options: Options
    merged: tuple[int, ...]
    blocks: list[Block]
    buffer: Tensor
    peak_lr: float
    tied: bool = False
    t: int = 0
    average: Tensor = field(default_factory=lambda: torch.zeros(()))  # of the values

    @property
    def elementwise_factor(self) -> float:
        own = self.options.tied_embedding_lr if self.tied else None
        return self.options.elementwise_lr if own is None else own


def merge(shape: tuple[int, ...], limit: int, batch: int = 0, on: bool = True) -> tuple[int, ...]:
    """Merge small adjacent dims, from last to first, but never to fewer than two dims; keep the first `batch` dims."""
    dims = [d for d in shape[batch:] if d != 1]
    merged: list[int] = []
    while dims:
        d = dims.pop()
        if on and merged and merged[0] * d <= limit and len(dims) + len(merged) >= 2:
            merged[0] *= d
        else:
            merged.insert(0, d)
    return shape[:batch] + tuple(merged)


def sides(shape: tuple[int, ...], o: Options) -> list[str]:
    """Return the kind of factor of each dim of a parameter: "full", "diagonal" or "none"."""
    if o.preconditioner == "muon":
        return ["none"] * len(shape)
    own = shape[o.batch_dims :]
    kept = {None: range(len(own)), "left": [0], "right": [len(own) - 1], "smaller": [own.index(min(own))]}[o.one_sided]
    large = {"diagonal": "diagonal", "identity": "none"}.get(o.large_dim, "full")
    found = [(large if d > o.limit else "full") if i in kept else "none" for i, d in enumerate(own)]
    return ["none"] * o.batch_dims + found


def cut(shape: tuple[int, ...], limit: int, o: Options | None = None) -> list[tuple[slice, ...]]:
    """Return all blocks. Options add batch dims, dims that are not cut, and a split of the dim as long as its sum."""
    o = o or Options(max_preconditioner_dim=limit)
    kinds, unsplit = sides(shape, o), list(o.split)
    pieces: list[list[slice]] = []
    for i, d in enumerate(shape):
        parts = [d]
        if i >= o.batch_dims and unsplit and sum(unsplit) == d:
            parts, unsplit = unsplit, []
        size = 1 if i < o.batch_dims else limit if kinds[i] == "full" or o.preconditioner == "muon" else d
        along, start = [], 0
        for part in parts:
            along += [slice(a, min(a + size, start + part)) for a in range(start, start + part, size)]
            start += part
        pieces.append(along)
    return list(product(*pieces))


def low(x: Tensor, o: Options) -> Tensor:
    """Return x as an operand of a product: 11 significant bits of each element (TF32) or 8 (bfloat16), or all."""
    if not o.lowers:
        return x
    bits = {"high": 11, "medium": 8}[o.matmul_precision]
    mantissa, exponent = torch.frexp(x)  # the mantissa is from 0.5 to 1
    return (mantissa * 2**bits).round() / 2**bits * torch.pow(torch.tensor(2.0, dtype=x.dtype), exponent)


def multiply(x: Tensor, matrix: Tensor, dim: int, o: Options | None = None) -> Tensor:
    """Multiply one mode of x by the matrix, or by a diagonal matrix given as a vector; matrices in o's precision."""
    if o is not None and matrix.ndim == 2:
        x, matrix = low(x, o), low(matrix, o)
    matrix = torch.diag(matrix) if matrix.ndim == 1 else matrix
    return torch.tensordot(matrix, x, dims=([1], [dim])).movedim(0, dim)


def shrink(a: Tensor, share: float) -> Tensor:
    """Return a mean of the matrix and of the multiple of the identity with its trace; a vector is a diagonal."""
    if a.ndim == 1:
        return shrink(torch.diag(a), share).diagonal()
    return torch.lerp(a, a.trace() / len(a) * torch.eye(len(a), dtype=a.dtype), share)


def inverse_root(a: Tensor, p: float, o: Options) -> Tensor:
    if a.ndim == 1:
        return inverse_root(torch.diag(a), p, o).diagonal()
    lam, q = torch.linalg.eigh(a)
    return root_of(lam, q, p, o)


def root_of(lam: Tensor, q: Tensor, p: float, o: Options) -> Tensor:
    ridge = max(o.epsilon, o.relative_epsilon * lam.max().item())
    if o.damping == "cutoff":
        lam = lam * (lam > ridge)
    elif o.damping == "saturate":
        lam = lam.clamp(min=ridge)
    else:
        lam = lam - min(lam.min().item(), 0.0) + ridge
    power = torch.where(lam > 0, lam, 1.0) ** (-1.0 / p)
    return q @ torch.diag(torch.where(lam > 0, power, 0.0)) @ q.T


def new_block(box: tuple[Any, ...], zero: Tensor, o: Options, kinds: list[str] | None = None) -> Block:
    muon = o.preconditioner == "muon"
    kinds = ["none" if muon else "full"] * zero.ndim if kinds is None else kinds
    factors = {
        dim: zero.new_zeros(d, d) if kinds[dim] == "full" else zero.new_zeros(d)
        for dim, d in enumerate(zero.shape)
        if kinds[dim] != "none"
    }
    return Block(box, o.warm, factors, zero.clone(), zero.clone(), ready=muon, looks_ahead=o.orthogonal)


def rotate(x: Tensor, bases: dict[int, Tensor], o: Options | None = None) -> Tensor:
    for dim, q in bases.items():
        x = multiply(x, q.T, dim, o)
    return x


def back(x: Tensor, bases: dict[int, Tensor], o: Options | None = None) -> Tensor:
    return rotate(x, {dim: q.T for dim, q in bases.items()}, o)


def whitened(block: Block, x: Tensor, dim: int, o: Options) -> Tensor:
    """Return x times another mode's root, up to a rotation. Before the first refresh KL-Shampoo's roots are identities.

    KL-SOAP's is known by basis and eigenvalues, and only the product with the basis is one of matrices.
    """
    if dim in block.whiteners:
        return multiply(multiply(x, block.bases[dim].T, dim, o), block.whiteners[dim], dim)
    if dim in block.roots:
        return multiply(x, block.roots[dim], dim, o)
    return x if o.in_basis else low(x, o)


def first_moment_betas(block: Block, t: int, o: Options) -> tuple[float, float]:
    """Return the weight of the old first moment in M, and the sum of all weights if M is corrected for it."""
    beta1 = o.betas[0]
    if beta1 == 0.0:
        return 0.0, 1.0
    beta3 = beta1 if o.beta3 is None else o.beta3
    if o.beta3 is None and block.looks_ahead:
        beta3 = beta1**2
    return beta3, 1.0 - beta3 * beta1 ** (t - 1) if o.use_bias_correction else 1.0


def adam_in_basis(block: Block, g: Tensor, m: Tensor, o: Options) -> Tensor:
    """Return SOAP's update of a rotated gradient and moment: v is the mean square, with the second moments' b2."""
    b = o.graft_beta2
    block.rotated = b * block.rotated + (1.0 - b) * g**2
    block.weight = b * block.weight + (1.0 - b)
    assert not isinstance(o.exponent_override, list)
    below = (block.rotated / block.weight) ** (1.0 / (o.exponent_override or 2.0))
    below = below + o.eps + o.relative_epsilon * below.max()
    return back(torch.where(below > 0, m / below, 0.0), block.bases, o.of_projections)


def orthogonalised(u: Tensor, o: Options) -> Tensor:
    """Return the block with all singular values near 1, by five steps of Muon's iteration, and a mean square of 0.04.

    As a matrix it is the first dim, after batch dims, against the others. The polynomial acts on its singular values.
    """
    matrix = u.reshape(u.shape[o.batch_dims], -1)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = values / max(values.norm().item(), 1e-300)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return (0.2 * max(matrix.shape) ** 0.5 * (left * values) @ right).reshape(u.shape)


def with_rms(u: Tensor) -> Tensor:
    """Scale u to a root mean square of 0.4."""
    rms = u.square().mean().sqrt()
    return u * (0.4 / rms) if rms > 0 else torch.zeros_like(u)


def presence(m: Tensor, o: Options) -> float:
    """Return 1, or less if m is below half of what pure noise of root mean square 1 leaves in it."""
    noise = ((1.0 - o.betas[0]) / (1.0 + o.betas[0])) ** 0.5
    return min(1.0, m.square().mean().sqrt().item() / (0.5 * noise)) if o.normalize_gradients else 1.0


def strength(g: Tensor, o: Options) -> float:
    """Return 1, or less for a gradient with a root mean square of less than a million eps."""
    rms = g.square().mean().sqrt().item()
    return rms / (rms + o.eps) if o.normalize_gradients and 0.0 < rms <= 1e6 * o.eps else 1.0


def off_diagonal(x: Tensor) -> Tensor:
    return x - torch.diag(torch.diagonal(x))


def mean_square(block: Block, t: int, o: Options) -> float:
    """Return what KL factors say of the mean square of a gradient's elements: the geometric mean of all of theirs."""
    out = 1.0
    for place, (_, a) in enumerate(sorted(block.factors.items())):
        counts = sum(o.counts(t, place, len(block.factors)))
        mean = a.trace().item() / len(a) / (counts if o.beta == 1.0 else 1.0 - o.beta**counts)
        out *= mean ** (1.0 / len(block.factors))
    return out


def fits(q: Tensor, a: Tensor, o: Options) -> bool:
    """Return whether a is diagonal enough in the basis q to keep it."""
    if o.refresh_tolerance is None:
        return False
    return bool(off_diagonal(q.T @ a @ q).norm() <= o.refresh_tolerance * a.norm())


def orthogonal_step(a: Tensor, q: Tensor, t: int, o: Options) -> tuple[Tensor, Tensor]:
    """Return the next basis, in descending order of q'aq, and that order; a ridge keeps directions without gradient.

    In early refreshes it is the one after the next.
    """
    whole = torch.arange(len(a))
    for _ in range(2 if o.tracks and t < o.dense() else 1):
        estimates = torch.diagonal(q.T @ a @ q)
        order = estimates.argsort(descending=True)
        ridge = o.relative_epsilon * estimates.max() * torch.eye(len(a), dtype=a.dtype)
        q, whole = torch.linalg.qr((a + ridge) @ q[:, order]).Q, whole[order]
    return q, whole


class Reference:
    """Shampoo on named tensors.

    Args:
        params: initial values by name.
        overrides: options by name.
        exclude: names of element-wise parameters.
        tied: names of embeddings that are the output head too.
    """

    def __init__(
        self,
        params: Mapping[str, Tensor],
        overrides: Mapping[str, Mapping[str, Any]] | None = None,
        exclude: tuple[str, ...] = (),
        dtype: torch.dtype = torch.float64,
        tied: tuple[str, ...] = ("embed.weight",),
        **options: Any,
    ) -> None:
        base = Options(**options)
        self.params: dict[str, Parameter] = {}
        for name, p in params.items():
            o = replace(base, **(overrides or {}).get(name, {}))
            value = p.detach().to(dtype).clone()
            merged = merge(tuple(value.shape), o.limit, o.batch_dims, o.merge_small_dims)
            large = len(merged) - o.batch_dims >= 2 and max(merged[o.batch_dims :]) > o.limit
            if large and o.large_dim == "adagrad" and name not in exclude:
                exclude, o = (*exclude, name), replace(o, elementwise="adagrad")
            elementwise = name in exclude or len(merged) - o.batch_dims < 2
            elementwise = elementwise or (o.preconditioner != "muon" and set(sides(merged, o)) == {"none"})
            self.params[name] = Parameter(
                value, o, tuple(value.shape) if elementwise else merged, [], torch.zeros_like(value), o.lr, name in tied
            )
            self.params[name].blocks = self._blocks(self.params[name], elementwise)
            for index, block in enumerate(self.params[name].blocks):
                block.key = f"{name}/{index}"
        self._stagger()

    @staticmethod
    def _blocks(p: Parameter, elementwise: bool) -> list[Block]:
        o = p.options
        if elementwise:
            return [Block((...,), o.fallback, {}, torch.zeros_like(p.value), torch.zeros_like(p.value))]
        blocks = []
        for box in cut(p.merged, o.limit, o):
            blocks.append(new_block(box, torch.zeros_like(p.value.view(p.merged)[box]), o, sides(p.merged, o)))
        return blocks

    def _stagger(self) -> None:
        """Assign each block to the phase with the least work so far, measured as the sum of d^3."""
        work: dict[int, list[int]] = {}
        for p in self.params.values():
            if p.options.refresh in ("staggered", "background"):
                window = work.setdefault(p.options.precondition_frequency, [0] * p.options.precondition_frequency)
                for block in (b for b in p.blocks if b.factors):
                    block.phase = window.index(min(window))
                    window[block.phase] += sum(len(a) ** 3 for a in block.factors.values() if a.ndim == 2)

    def values(self) -> dict[str, Tensor]:
        return {name: p.value for name, p in self.params.items()}

    def averages(self) -> dict[str, Tensor]:
        return {name: p.average if p.t else p.value for name, p in self.params.items()}

    @torch.no_grad()
    def step(self, grads: Mapping[str, Tensor | None]) -> None:
        """Do one step; a gradient of None skips its parameter, decay included."""
        present = [g for g in grads.values() if g is not None]
        if all(p.t == 0 for p in self.params.values()) and not any(g.count_nonzero() for g in present):
            return  # torch's checkpoint helpers and DeepSpeed's stage 0 step once with zeros to create state
        for name, p in self.params.items():
            if (g := grads.get(name)) is not None:
                self._step_parameter(p, g.to(p.value.dtype))

    def _step_parameter(self, p: Parameter, g: Tensor) -> None:
        p.t += 1
        o = p.options
        decay = o.weight_decay_type or ("decoupled" if o.decoupled_weight_decay else "l2")
        if decay == "l2":
            g = g + o.weight_decay * p.value
        update = torch.zeros(p.merged, dtype=g.dtype)
        for block in p.blocks:
            bg = g.reshape(p.merged)[block.box]
            elementwise = block.box == (...,)
            update[block.box] = self.step_block(block, bg, p.t, o.for_elementwise if elementwise else o)
            update[block.box] *= p.elementwise_factor if elementwise else 1.0
        update = update.view(g.shape)
        if decay != "l2":
            peak = p.peak_lr if o.peak_lr is None else o.peak_lr
            scale = {"decoupled": 1.0, "corrected": o.lr / peak, "independent": 1.0 / peak}[decay]
            update = update + scale * o.weight_decay * p.value
        before = p.value.clone()
        p.value -= o.lr * self._momentum(p, update, o)
        if o.ema_decay:
            share = max(1.0 - o.ema_decay, 9.0 / (10.0 + p.t))  # of the new weights
            p.average = (1.0 - share) * (before if p.t == 1 else p.average) + share * p.value

    @classmethod
    def step_block(cls, block: Block, g: Tensor, t: int, o: Options) -> Tensor:
        """The end of step 1, and steps 2 to 7 of the rule: return the update of one block in its step t."""
        by = strength(g, o)
        if o.normalize_gradients and g.count_nonzero():
            g = g / g.square().mean().sqrt()
        cls._factors(block, g, t, o)
        cls._second_moment(block, g, o)
        moved = False
        if block.seen is not None:  # in the background: from the factors of the last step
            (before, factors), block.seen, now = block.seen, None, block.factors
            block.factors = factors
            moved = cls._renew(block, before, o)
            block.factors = now
        if block.factors and cls._due(block, t, o):
            if o.refresh == "background":
                block.seen = t, {dim: a.clone() for dim, a in block.factors.items()}
            else:
                moved = cls._renew(block, t, o)
        if o.in_basis and block.ready:
            g = rotate(g, block.bases, o.of_projections)
        m = cls._first_moment(block, g, t, o)
        if moved:
            block.rotated = torch.maximum(block.rotated, block.weight * m**2)
        update = by * cls._update(block, g, m, t, o)
        cls._keep_moments(block, t, o)
        return update

    @classmethod
    def _renew(cls, block: Block, t: int, o: Options) -> bool:
        """Refresh roots or bases; return whether moments are in a basis that has moved."""
        block.ready = True
        if o.in_basis:
            moved = cls._refresh_soap(block, t, o)
        else:
            (cls._refresh_kl if o.kl else cls._refresh)(block, t, o)
            moved = False
        for kind, tensors in (("root", block.roots), ("basis", block.bases)):
            for dim, x in tensors.items():
                tensors[dim] = kept(x, o.root_format if x.ndim == 2 else "float32", f"{kind}_{dim}")
        return moved

    @staticmethod
    def _keep_moments(block: Block, t: int, o: Options) -> None:
        """Round moments as their format does. SOAP's second moment before its first refresh has the tensor of later."""
        if block.box == (...,) and not block.factors:  # element-wise, so its bits follow from the parameter's own key
            random = (block.key.removesuffix("/0"), t)
            block.first = kept(block.first, o.elementwise_format, "exp_avg", random)
            block.second = kept(block.second, o.elementwise_format, "second_moment", random)
            return
        form, random = o.moment_format, (block.key, t)
        block.first = kept(block.first, form, "rotated_exp_avg" if o.in_basis else "exp_avg", random)
        own = o.in_basis and o.graft == "none"
        block.second = kept(block.second, form, "rotated_second_moment" if own else "second_moment", random)
        if block.rotated.shape == block.first.shape:
            block.rotated = kept(block.rotated, form, "rotated_second_moment", random)

    @staticmethod
    def _due(block: Block, t: int, o: Options) -> bool:
        if block.phase is None and not o.growth:
            return t == o.start or (t > o.start and t % o.precondition_frequency == 0)
        if t < o.start:
            return False
        begin, length = o.window(t)
        return t == begin + (block.phase or 0) * length // o.precondition_frequency

    @staticmethod
    def _factors(block: Block, g: Tensor, t: int, o: Options) -> None:
        for place, (dim, a) in enumerate(sorted(block.factors.items())):
            n, x = o.stands_for(t, place, len(block.factors)), g
            if n == 0:
                continue
            beta2 = o.beta**n
            if o.kl:
                for other in sorted(block.factors):
                    x = whitened(block, x, other, o) if other != dim else x
                x = x / (g.numel() / g.shape[dim]) ** 0.5
            x = x if a.ndim == 1 else low(x, o)
            unfolded = x.movedim(dim, 0).reshape(g.shape[dim], -1)
            outer = unfolded @ unfolded.T
            a.mul_(beta2).add_(outer if a.ndim == 2 else outer.diagonal(), alpha=n if beta2 == 1.0 else 1.0 - beta2)
            a.copy_(kept(a, o.factor_format if a.ndim == 2 else "float32", f"factor_{dim}", (block.key, t)))

    @staticmethod
    def _roots(block: Block, t: int, o: Options, p: float) -> dict[int, Tensor]:
        o = replace(o, relative_epsilon=o.ridge(t))
        roots = {}
        for place, (dim, factor) in enumerate(sorted(block.factors.items())):
            here = t, place, len(block.factors)
            a = shrink(factor / o.correction(*here), o.share(*here))
            if (o.refresh_tolerance is None and not o.tracks) or a.ndim == 1:
                roots[dim] = inverse_root(a, p, o)
                continue
            kept = block.bases.get(dim)
            if kept is None or (not fits(kept, a, o) and not o.tracks):
                lam, q = torch.linalg.eigh(a)
            else:
                q = kept if fits(kept, a, o) else orthogonal_step(a, kept, t, o)[0]
                lam = torch.diagonal(q.T @ a @ q)
            block.bases[dim] = q
            roots[dim] = root_of(lam, q, p, o)
        return roots

    @classmethod
    def _refresh(cls, block: Block, t: int, o: Options) -> None:
        p = o.exponent_override
        if isinstance(p, (list, tuple)):
            p = p[len(block.factors) - 1] if len(block.factors) <= len(p) else None
        block.roots = cls._roots(block, t, o, p or 2 * len(block.factors))

    @classmethod
    def _refresh_kl(cls, block: Block, t: int, o: Options) -> None:
        """Compute roots of factors scaled to a mean eigenvalue of 1; scale takes the means' geometric mean."""
        means = {}
        for place, (dim, a) in enumerate(sorted(block.factors.items())):
            means[dim] = a.trace().item() / len(a) / o.correction(t, place, len(block.factors))
        unseen = {dim for dim, mean in means.items() if mean == 0}  # no gradient yet
        means = {dim: max(mean, o.epsilon) if mean > 0 else 1.0 for dim, mean in means.items()}
        block.roots = {dim: root * means[dim] ** 0.5 for dim, root in cls._roots(block, t, o, 2.0).items()}
        block.roots |= {dim: torch.eye(len(block.roots[dim]), dtype=block.first.dtype) for dim in unseen}
        block.scale = 1.0
        for mean in means.values():
            block.scale /= mean ** (0.5 / len(means))

    @staticmethod
    def _refresh_soap(block: Block, t: int, o: Options) -> bool:
        """Compute eigenbases: by eigh at first, with v from the factors; later usually by an orthogonal step.

        v is permuted like the columns, and the first moment follows; return whether a basis has moved.
        """
        m, before = block.first, dict(block.bases)
        moved = not block.bases
        if not block.bases:
            block.weight = 1.0 - o.graft_beta2**t
            counts = sum(o.counts(t, 0, len(block.factors)))
            seen = counts if o.beta == 1.0 else 1.0 - o.beta**counts
            block.rotated = torch.full_like(m, block.weight * next(iter(block.factors.values())).trace().item() / seen)
            if o.kl:
                block.rotated = torch.full_like(m, block.weight * m.numel() * mean_square(block, t, o))
            for dim, a in block.factors.items():
                lam, q = torch.linalg.eigh(a)
                lam = lam.flip(0).clamp(min=0.0)
                share = lam / lam.sum() if lam.sum() > 0 else lam
                block.bases[dim] = q.flip(1)
                block.rotated = (block.rotated.movedim(dim, -1) * share).movedim(-1, dim)
        else:
            for dim, a in block.factors.items():
                if fits(block.bases[dim], a, o):
                    continue
                q, order = orthogonal_step(a, block.bases[dim], t, o)
                block.bases[dim] = q if o.tracks else torch.linalg.eigh(a).eigenvectors.flip(1)
                block.rotated = block.rotated.index_select(dim, order)
                moved = True
        for place, (dim, a) in enumerate(sorted(block.factors.items() if o.kl else ())):
            a, q = a / o.correction(t, place, len(block.factors)), block.bases[dim]
            same = torch.eye(len(a), dtype=a.dtype)
            root = root_of(torch.diagonal(q.T @ a @ q), same, 2.0, replace(o, relative_epsilon=o.ridge(t)))
            mean = (a.trace() / len(a)).clamp_min(o.epsilon if a.trace() > 0 else 0.0)
            block.whiteners[dim] = (root * mean**0.5 if mean > 0 else same).diagonal()
        if moved:
            block.first = rotate(back(m, before), block.bases)
        return moved

    @staticmethod
    def _second_moment(block: Block, g: Tensor, o: Options) -> None:
        if block.method == "sgd":
            return
        if block.method.startswith("normalized"):
            norm = g.norm()
            g = g / norm if norm > 0 else torch.zeros_like(g)
        if block.method.endswith("adagrad"):
            block.second += g * g
        else:
            block.second.mul_(o.graft_beta2).add_(g * g, alpha=1.0 - o.graft_beta2)

    @staticmethod
    def _first_moment(block: Block, g: Tensor, t: int, o: Options) -> Tensor:
        beta1 = o.betas[0]
        if beta1 == 0.0:
            return g
        beta3, weights = first_moment_betas(block, t, o)
        filtered = beta3 * block.first + (1.0 - beta3) * g
        block.first.mul_(beta1).add_(g, alpha=1.0 - beta1)
        return filtered / weights

    @staticmethod
    def _update(block: Block, g: Tensor, m: Tensor, t: int, o: Options) -> Tensor:
        weights = first_moment_betas(block, t, o)[1]  # products are of moments that are not corrected yet
        graft = m
        if o.in_basis and block.ready:
            graft = back(m * weights, block.bases, o.of_projections) / weights
        if block.method != "sgd":
            correct = 1.0 - o.graft_beta2**t if block.method.endswith("adam") else 1.0
            graft = graft / ((block.second / correct).sqrt() + o.eps)
        if not block.ready:
            return with_rms(m) * presence(m, o) if block.factors and o.graft == "rms" else graft
        u = adam_in_basis(block, g, m * weights, o) if o.in_basis else m * weights
        for dim, root in block.roots.items():
            u = multiply(u, root, dim, o)
        u = u * (block.scale / weights)
        if o.orthogonal:
            u = orthogonalised(u, o)
            if o.graft == "none":
                return u * presence(m, o)
        if o.graft == "none":  # no update is very long
            return u * min(1.0, 6.0 / max(u.square().mean().sqrt().item(), 1e-300))
        if o.graft == "rms":
            return with_rms(u) * presence(m, o)
        norm = u.norm()
        return u * (graft.norm() / norm) if norm > 0 else torch.zeros_like(u)

    @staticmethod
    def _momentum(p: Parameter, u: Tensor, o: Options) -> Tensor:
        if o.momentum == 0.0:
            return u
        p.buffer.mul_(o.momentum).add_(u, alpha=1.0 - o.dampening)
        return (1.0 - o.dampening) * u + o.momentum * p.buffer if o.nesterov else p.buffer
