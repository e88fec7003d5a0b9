"""The update rule written for reading: plain, unsharded, float64 Shampoo and its family, the exactness tests' oracle.

Shares no code with the package. `Reference.step` reads as the numbered steps of the rule; everything
happens per block, one after another, and nothing is batched.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Options:
    """The options of one parameter, with the package's defaults."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled_weight_decay: bool = True
    epsilon: float = 1e-12
    relative_epsilon: float = 1e-6
    preconditioner: str = "shampoo"
    max_preconditioner_dim: int = 1024
    precondition_frequency: int = 10
    refresh_tolerance: float | None = None
    refresh: str = "sync"
    start_preconditioning_step: int = -1
    grafting: str | None = None
    grafting_beta2: float | None = None
    elementwise: str | None = None
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    use_bias_correction: bool = True
    exponent_override: float | None = None

    @property
    def start(self) -> int:
        return self.precondition_frequency if self.start_preconditioning_step == -1 else self.start_preconditioning_step

    @property
    def graft(self) -> str:
        return self.grafting or ("none" if self.preconditioner == "soap" else "adam")

    @property
    def warm(self) -> str:
        """The element-wise method of a block's first directions, and of its length where grafted."""
        return self.fallback if self.graft == "none" else self.graft

    @property
    def fallback(self) -> str:
        return self.elementwise or ("adam" if self.graft == "none" else self.graft)

    @property
    def graft_beta2(self) -> float:
        if self.grafting_beta2 is not None:
            return self.grafting_beta2
        return 0.999 if self.betas[1] == 1.0 else self.betas[1]


@dataclass
class Block:
    """One box of a (merged) parameter; no factors means that the whole parameter is element-wise."""

    box: tuple[Any, ...]  # slices, or (...,) for the whole parameter
    method: str
    factors: list[Tensor]
    second: Tensor
    first: Tensor
    roots: list[Tensor] = field(default_factory=list)
    bases: list[Tensor] = field(default_factory=list)
    scale: float = 1.0  # KL-Shampoo: of the product of the roots
    rotated: Tensor = field(default_factory=lambda: torch.zeros(()))  # SOAP: weighted sum of (Q'G)^2
    weight: float = 0.0  # SOAP: sum of those weights
    phase: int | None = None  # staggered: steps after the start at which it refreshes first


@dataclass
class Parameter:
    value: Tensor
    options: Options
    merged: tuple[int, ...]
    blocks: list[Block]
    buffer: Tensor
    t: int = 0


def merge(shape: tuple[int, ...], limit: int) -> tuple[int, ...]:
    """Merges small neighbours, last to first, but never to fewer than two dims."""
    dims = [d for d in shape if d != 1]
    merged: list[int] = []
    while dims:
        d = dims.pop()
        if merged and merged[0] * d <= limit and len(dims) + len(merged) >= 2:
            merged[0] *= d
        else:
            merged.insert(0, d)
    return tuple(merged)


def cut(shape: tuple[int, ...], limit: int) -> list[tuple[slice, ...]]:
    pieces = [[slice(a, min(a + limit, d)) for a in range(0, d, limit)] for d in shape]
    return list(product(*pieces))


def multiply(x: Tensor, matrix: Tensor, dim: int) -> Tensor:
    """Multiplies the matrix into one mode of x."""
    return torch.tensordot(matrix, x, dims=([1], [dim])).movedim(0, dim)


def inverse_root(a: Tensor, p: float, o: Options) -> Tensor:
    return root_of(*torch.linalg.eigh(a), p, o)


def root_of(lam: Tensor, q: Tensor, p: float, o: Options) -> Tensor:
    lam = lam - min(lam.min().item(), 0.0) + max(o.epsilon, o.relative_epsilon * lam.max().item())
    power = torch.where(lam > 0, lam, 1.0) ** (-1.0 / p)
    return q @ torch.diag(torch.where(lam > 0, power, 0.0)) @ q.T


def new_block(box: tuple[Any, ...], zero: Tensor, o: Options) -> Block:
    return Block(box, o.warm, [zero.new_zeros(d, d) for d in zero.shape], zero.clone(), zero.clone())


def rotate(x: Tensor, bases: list[Tensor]) -> Tensor:
    for dim, q in enumerate(bases):
        x = multiply(x, q.T, dim)
    return x


def adam_in_basis(block: Block, g: Tensor, m: Tensor, o: Options) -> Tensor:
    """SOAP's direction: v is the mean square of the rotated gradient, with b2 of the second moments."""
    b = o.graft_beta2
    block.rotated = b * block.rotated + (1.0 - b) * rotate(g, block.bases) ** 2
    block.weight = b * block.weight + (1.0 - b)
    below = (block.rotated / block.weight) ** (1.0 / (o.exponent_override or 2.0))
    below = below + o.eps + o.relative_epsilon * below.max()
    u = torch.where(below > 0, rotate(m, block.bases) / below, 0.0)
    return rotate(u, [q.T for q in block.bases])


def off_diagonal(x: Tensor) -> Tensor:
    return x - torch.diag(torch.diagonal(x))


class Reference:
    """Shampoo on named tensors; `overrides` holds options per name, `exclude` the element-wise names."""

    def __init__(
        self,
        params: Mapping[str, Tensor],
        overrides: Mapping[str, Mapping[str, Any]] | None = None,
        exclude: tuple[str, ...] = (),
        dtype: torch.dtype = torch.float64,
        **options: Any,
    ) -> None:
        base = Options(**options)
        self.params: dict[str, Parameter] = {}
        for name, p in params.items():
            o = replace(base, **(overrides or {}).get(name, {}))
            value = p.detach().to(dtype).clone()
            merged = merge(tuple(value.shape), o.max_preconditioner_dim)
            elementwise = name in exclude or len(merged) < 2
            self.params[name] = Parameter(
                value, o, tuple(value.shape) if elementwise else merged, [], torch.zeros_like(value)
            )
            self.params[name].blocks = self._blocks(self.params[name], elementwise)
        self._stagger()

    @staticmethod
    def _blocks(p: Parameter, elementwise: bool) -> list[Block]:
        o = p.options
        if elementwise:
            return [Block((...,), o.fallback, [], torch.zeros_like(p.value), torch.zeros_like(p.value))]
        blocks = []
        for box in cut(p.merged, o.max_preconditioner_dim):
            blocks.append(new_block(box, torch.zeros_like(p.value.view(p.merged)[box]), o))
        return blocks

    def _stagger(self) -> None:
        """Each block of these groups in turn to the step of the window with the least work so far, sum of d^3."""
        work: dict[int, list[int]] = {}
        for p in self.params.values():
            if p.options.refresh == "staggered":
                window = work.setdefault(p.options.precondition_frequency, [0] * p.options.precondition_frequency)
                for block in (b for b in p.blocks if b.factors):
                    block.phase = window.index(min(window))
                    window[block.phase] += sum(len(a) ** 3 for a in block.factors)

    def values(self) -> dict[str, Tensor]:
        return {name: p.value for name, p in self.params.items()}

    @torch.no_grad()
    def step(self, grads: Mapping[str, Tensor | None]) -> None:
        """One step; a gradient of None skips its parameter, decay included."""
        present = [g for g in grads.values() if g is not None]
        if all(p.t == 0 for p in self.params.values()) and not any(g.count_nonzero() for g in present):
            return  # torch's checkpoint helpers and DeepSpeed's stage 0 step once with zeros to create state
        for name, p in self.params.items():
            if (g := grads.get(name)) is not None:
                self._step_parameter(p, g.to(p.value.dtype))

    def _step_parameter(self, p: Parameter, g: Tensor) -> None:
        p.t += 1
        o = p.options
        if not o.decoupled_weight_decay:
            g = g + o.weight_decay * p.value
        direction = torch.zeros(p.merged, dtype=g.dtype)
        for block in p.blocks:
            bg = g.reshape(p.merged)[block.box]
            direction[block.box] = self.step_block(block, bg, p.t, o)
        direction = direction.view(g.shape)
        if o.decoupled_weight_decay:
            direction = direction + o.weight_decay * p.value
        p.value -= o.lr * self._momentum(p, direction, o)

    @classmethod
    def step_block(cls, block: Block, g: Tensor, t: int, o: Options) -> Tensor:
        """Steps 2 to 6 of the rule: the direction of one block in its step t."""
        cls._factors(block, g, o)
        cls._second_moment(block, g, o)
        m = cls._first_moment(block, g, t, o)
        if block.factors and cls._due(block, t, o):
            {"shampoo": cls._refresh, "kl_shampoo": cls._refresh_kl, "soap": cls._refresh_soap}[o.preconditioner](
                block, m, t, o
            )
        return cls._direction(block, g, m, t, o)

    @staticmethod
    def _due(block: Block, t: int, o: Options) -> bool:
        if block.phase is None:
            return t == o.start or (t > o.start and t % o.precondition_frequency == 0)
        late = t - o.start - block.phase
        return late >= 0 and late % o.precondition_frequency == 0

    @staticmethod
    def _factors(block: Block, g: Tensor, o: Options) -> None:
        beta2 = o.betas[1]
        for dim, a in enumerate(block.factors):
            x = g
            if o.preconditioner == "kl_shampoo":
                for other, root in enumerate(block.roots):  # none before the first refresh
                    x = multiply(x, root, other) if other != dim else x
                x = x / (g.numel() / g.shape[dim]) ** 0.5
            unfolded = x.movedim(dim, 0).reshape(g.shape[dim], -1)
            a.mul_(beta2).add_(unfolded @ unfolded.T, alpha=1.0 if beta2 == 1.0 else 1.0 - beta2)

    @staticmethod
    def _roots(block: Block, t: int, o: Options, p: float) -> list[Tensor]:
        correct = o.use_bias_correction and o.betas[1] != 1.0
        scale = 1.0 - o.betas[1] ** t if correct else 1.0
        if o.refresh_tolerance is None:
            return [inverse_root(a / scale, p, o) for a in block.factors]
        spectra = []
        for dim, a in enumerate(block.factors):
            if block.bases:
                q = block.bases[dim]
                inside = q.T @ a @ q / scale
                if off_diagonal(inside).norm() <= o.refresh_tolerance * (a / scale).norm():
                    spectra.append((torch.diagonal(inside), q))
                    continue
            spectra.append(torch.linalg.eigh(a / scale))
        block.bases = [q for _, q in spectra]
        return [root_of(lam, q, p, o) for lam, q in spectra]

    @classmethod
    def _refresh(cls, block: Block, m: Tensor, t: int, o: Options) -> None:
        block.roots = cls._roots(block, t, o, o.exponent_override or 2 * len(block.factors))

    @classmethod
    def _refresh_kl(cls, block: Block, m: Tensor, t: int, o: Options) -> None:
        """Roots of factors with a mean eigenvalue of 1; the geometric mean of the mean eigenvalues goes to scale."""
        correct = o.use_bias_correction and o.betas[1] != 1.0
        means = [a.trace().item() / len(a) / (1.0 - o.betas[1] ** t if correct else 1.0) for a in block.factors]
        means = [mean if mean > 0 else 1.0 for mean in means]
        block.roots = [root * mean**0.5 for root, mean in zip(cls._roots(block, t, o, 2.0), means, strict=True)]
        block.scale = 1.0
        for mean in means:
            block.scale /= mean ** (0.5 / len(means))

    @staticmethod
    def _refresh_soap(block: Block, m: Tensor, t: int, o: Options) -> None:
        """Eigenbases: eigh at first, with v from the factors; then a power step in falling order, v permuted alike.

        Wherever a basis has moved, v is at least M^2.
        """
        moved = not block.bases
        if not block.bases:
            block.weight = 1.0 - o.graft_beta2**t
            seen = t if o.betas[1] == 1.0 else 1.0 - o.betas[1] ** t
            block.rotated = torch.full_like(m, block.weight * block.factors[0].trace().item() / seen)
            for dim, a in enumerate(block.factors):
                lam, q = torch.linalg.eigh(a)
                lam = lam.flip(0).clamp(min=0.0)
                share = lam / lam.sum() if lam.sum() > 0 else lam
                block.bases.append(q.flip(1))
                block.rotated = (block.rotated.movedim(dim, -1) * share).movedim(-1, dim)
        else:
            for dim, (a, q) in enumerate(zip(block.factors, block.bases, strict=True)):
                inside = q.T @ a @ q
                if o.refresh_tolerance is not None and off_diagonal(inside).norm() <= o.refresh_tolerance * a.norm():
                    continue
                order = torch.diagonal(inside).argsort(descending=True)
                ridge = o.relative_epsilon * torch.diagonal(inside).max() * torch.eye(len(a), dtype=a.dtype)
                block.bases[dim] = torch.linalg.qr((a + ridge) @ q[:, order]).Q
                block.rotated = block.rotated.index_select(dim, order)
                moved = True
        if moved:
            block.rotated = torch.maximum(block.rotated, block.weight * rotate(m, block.bases) ** 2)

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
        block.first.mul_(beta1).add_(g, alpha=1.0 - beta1)
        return block.first / (1.0 - beta1**t if o.use_bias_correction else 1.0)

    @staticmethod
    def _direction(block: Block, g: Tensor, m: Tensor, t: int, o: Options) -> Tensor:
        graft = m
        if block.method != "sgd":
            correct = 1.0 - o.graft_beta2**t if block.method.endswith("adam") else 1.0
            graft = m / ((block.second / correct).sqrt() + o.eps)
        if not block.factors or t < o.start + (block.phase or 0):
            return graft
        u = adam_in_basis(block, g, m, o) if o.preconditioner == "soap" else block.scale * m
        for dim, root in enumerate(block.roots):
            u = multiply(u, root, dim)
        if o.graft == "none":
            return u
        norm = u.norm()
        return u * (graft.norm() / norm) if norm > 0 else torch.zeros_like(u)

    @staticmethod
    def _momentum(p: Parameter, u: Tensor, o: Options) -> Tensor:
        if o.momentum == 0.0:
            return u
        p.buffer.mul_(o.momentum).add_(u, alpha=1.0 - o.dampening)
        return (1.0 - o.dampening) * u + o.momentum * p.buffer if o.nesterov else p.buffer
