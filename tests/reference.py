"""The update rule written for reading: plain, unsharded, float64 Shampoo, the oracle of the exactness tests.

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
    max_preconditioner_dim: int = 1024
    precondition_frequency: int = 10
    start_preconditioning_step: int = -1
    grafting: str = "adam"
    grafting_beta2: float | None = None
    elementwise: str | None = None
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
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
    rank_deficient: str = "shift"

    @property
    def start(self) -> int:
        return self.precondition_frequency if self.start_preconditioning_step == -1 else self.start_preconditioning_step

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
    factors: dict[int, Tensor]  # by dim: a matrix, or a vector of its diagonal
    second: Tensor
    first: Tensor
    roots: dict[int, Tensor] = field(default_factory=dict)


@dataclass
class Parameter:
    value: Tensor
    options: Options
    merged: tuple[int, ...]
    blocks: list[Block]
    buffer: Tensor
    peak_lr: float
    t: int = 0


def merge(shape: tuple[int, ...], limit: int, batch: int = 0, on: bool = True) -> tuple[int, ...]:
    """Merges small neighbours, last to first, but never to fewer than two dims; the first `batch` dims stay."""
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
    """For each dim of a parameter: "full", "diagonal" or "none"."""
    own = shape[o.batch_dims :]
    kept = {None: range(len(own)), "left": [0], "right": [len(own) - 1], "smaller": [own.index(min(own))]}[o.one_sided]
    large = {"diagonal": "diagonal", "identity": "none"}.get(o.large_dim, "full")
    found = [(large if d > o.max_preconditioner_dim else "full") if i in kept else "none" for i, d in enumerate(own)]
    return ["none"] * o.batch_dims + found


def cut(shape: tuple[int, ...], limit: int, o: Options | None = None) -> list[tuple[slice, ...]]:
    """All blocks; with options also batch dims, dims that are not cut, and a split of the first dim with its sum."""
    o = o or Options(max_preconditioner_dim=limit)
    kinds, unsplit = sides(shape, o), list(o.split)
    pieces: list[list[slice]] = []
    for i, d in enumerate(shape):
        parts = [d]
        if i >= o.batch_dims and unsplit and sum(unsplit) == d:
            parts, unsplit = unsplit, []
        size = 1 if i < o.batch_dims else limit if kinds[i] == "full" else d
        along, start = [], 0
        for part in parts:
            along += [slice(a, min(a + size, start + part)) for a in range(start, start + part, size)]
            start += part
        pieces.append(along)
    return list(product(*pieces))


def multiply(x: Tensor, matrix: Tensor, dim: int) -> Tensor:
    """Multiplies the matrix, or a diagonal one given as a vector, into one mode of x."""
    matrix = torch.diag(matrix) if matrix.ndim == 1 else matrix
    return torch.tensordot(matrix, x, dims=([1], [dim])).movedim(0, dim)


def inverse_root(a: Tensor, p: float, o: Options) -> Tensor:
    if a.ndim == 1:
        return inverse_root(torch.diag(a), p, o).diagonal()
    lam, q = torch.linalg.eigh(a)
    if o.rank_deficient == "pseudo_inverse":
        kept = lam > max(o.epsilon, o.relative_epsilon * lam.max().item())
        return q @ torch.diag(torch.where(kept, torch.where(kept, lam, 1.0) ** (-1.0 / p), 0.0)) @ q.T
    lam = lam - min(lam.min().item(), 0.0) + max(o.epsilon, o.relative_epsilon * lam.max().item())
    power = torch.where(lam > 0, lam, 1.0) ** (-1.0 / p)
    return q @ torch.diag(torch.where(lam > 0, power, 0.0)) @ q.T


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
            merged = merge(tuple(value.shape), o.max_preconditioner_dim, o.batch_dims, o.merge_small_dims)
            large = len(merged) - o.batch_dims >= 2 and max(merged[o.batch_dims :]) > o.max_preconditioner_dim
            if large and o.large_dim == "adagrad" and name not in exclude:
                exclude, o = (*exclude, name), replace(o, elementwise="adagrad")
            elementwise = name in exclude or len(merged) - o.batch_dims < 2 or set(sides(merged, o)) == {"none"}
            self.params[name] = Parameter(
                value, o, tuple(value.shape) if elementwise else merged, [], torch.zeros_like(value), o.lr
            )
            self.params[name].blocks = self._blocks(self.params[name], elementwise)

    @staticmethod
    def _blocks(p: Parameter, elementwise: bool) -> list[Block]:
        o = p.options
        fallback = o.elementwise or ("adam" if o.grafting == "none" else o.grafting)
        if elementwise:
            return [Block((...,), fallback, {}, torch.zeros_like(p.value), torch.zeros_like(p.value))]
        blocks = []
        kinds = sides(p.merged, o)
        for box in cut(p.merged, o.max_preconditioner_dim, o):
            zero = torch.zeros_like(p.value.view(p.merged)[box])
            factors = {
                i: zero.new_zeros(d, d) if kinds[i] == "full" else zero.new_zeros(d)
                for i, d in enumerate(zero.shape)
                if kinds[i] != "none"
            }
            blocks.append(
                Block(box, fallback if o.grafting == "none" else o.grafting, factors, zero.clone(), zero.clone())
            )
        return blocks

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
        decay = o.weight_decay_type or ("decoupled" if o.decoupled_weight_decay else "l2")
        if decay == "l2":
            g = g + o.weight_decay * p.value
        direction = torch.zeros(p.merged, dtype=g.dtype)
        for block in p.blocks:
            bg = g.reshape(p.merged)[block.box]
            self._factors(block, bg, o)
            self._refresh(block, p.t, o)
            self._second_moment(block, bg, o)
            m = self._first_moment(block, bg, p.t, o)
            direction[block.box] = self._direction(block, m, p.t, o)
        direction = direction.view(g.shape)
        if decay != "l2":
            peak = p.peak_lr if o.peak_lr is None else o.peak_lr
            scale = {"decoupled": 1.0, "corrected": o.lr / peak, "independent": 1.0 / peak}[decay]
            direction = direction + scale * o.weight_decay * p.value
        p.value -= o.lr * self._momentum(p, direction, o)

    @staticmethod
    def _factors(block: Block, g: Tensor, o: Options) -> None:
        beta2 = o.betas[1]
        for dim, a in block.factors.items():
            unfolded = g.movedim(dim, 0).reshape(g.shape[dim], -1)
            outer = unfolded @ unfolded.T
            a.mul_(beta2).add_(outer if a.ndim == 2 else outer.diagonal(), alpha=1.0 if beta2 == 1.0 else 1.0 - beta2)

    @staticmethod
    def _refresh(block: Block, t: int, o: Options) -> None:
        if t < o.start or (t != o.start and t % o.precondition_frequency):
            return
        correct = o.use_bias_correction and o.betas[1] != 1.0
        scale = 1.0 - o.betas[1] ** t if correct else 1.0
        p = o.exponent_override
        if isinstance(p, (list, tuple)):
            p = p[len(block.factors) - 1] if len(block.factors) <= len(p) else None
        p = p or 2 * len(block.factors)
        block.roots = {dim: inverse_root(a / scale, p, o) for dim, a in block.factors.items()}

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
        beta3 = beta1 if o.beta3 is None else o.beta3
        filtered = beta3 * block.first + (1.0 - beta3) * g
        block.first.mul_(beta1).add_(g, alpha=1.0 - beta1)
        return filtered / (1.0 - beta3 * beta1 ** (t - 1) if o.use_bias_correction else 1.0)

    @staticmethod
    def _direction(block: Block, m: Tensor, t: int, o: Options) -> Tensor:
        graft = m
        if block.method != "sgd":
            correct = 1.0 - o.graft_beta2**t if block.method.endswith("adam") else 1.0
            graft = m / ((block.second / correct).sqrt() + o.eps)
        if not block.factors or t < o.start:
            return graft
        u = m
        for dim, root in block.roots.items():
            u = multiply(u, root, dim)
        if o.grafting == "none":
            return u
        norm = u.norm()
        return u * (graft.norm() / norm) if norm > 0 else torch.zeros_like(u)

    @staticmethod
    def _momentum(p: Parameter, u: Tensor, o: Options) -> Tensor:
        if o.momentum == 0.0:
            return u
        p.buffer.mul_(o.momentum).add_(u, alpha=1.0 - o.dampening)
        return (1.0 - o.dampening) * u + o.momentum * p.buffer if o.nesterov else p.buffer
