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
    exponent_override: float | None = None

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
    factors: list[Tensor]
    second: Tensor
    first: Tensor
    roots: list[Tensor] = field(default_factory=list)


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
    lam, q = torch.linalg.eigh(a)
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
            merged = merge(tuple(value.shape), o.max_preconditioner_dim)
            elementwise = name in exclude or len(merged) < 2
            self.params[name] = Parameter(
                value, o, tuple(value.shape) if elementwise else merged, [], torch.zeros_like(value)
            )
            self.params[name].blocks = self._blocks(self.params[name], elementwise)

    @staticmethod
    def _blocks(p: Parameter, elementwise: bool) -> list[Block]:
        o = p.options
        fallback = o.elementwise or ("adam" if o.grafting == "none" else o.grafting)
        if elementwise:
            return [Block((...,), fallback, [], torch.zeros_like(p.value), torch.zeros_like(p.value))]
        blocks = []
        for box in cut(p.merged, o.max_preconditioner_dim):
            zero = torch.zeros_like(p.value.view(p.merged)[box])
            factors = [zero.new_zeros(d, d) for d in zero.shape]
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
        if not o.decoupled_weight_decay:
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
        if o.decoupled_weight_decay:
            direction = direction + o.weight_decay * p.value
        p.value -= o.lr * self._momentum(p, direction, o)

    @staticmethod
    def _factors(block: Block, g: Tensor, o: Options) -> None:
        beta2 = o.betas[1]
        for dim, a in enumerate(block.factors):
            unfolded = g.movedim(dim, 0).reshape(g.shape[dim], -1)
            a.mul_(beta2).add_(unfolded @ unfolded.T, alpha=1.0 if beta2 == 1.0 else 1.0 - beta2)

    @staticmethod
    def _refresh(block: Block, t: int, o: Options) -> None:
        if t < o.start or (t != o.start and t % o.precondition_frequency):
            return
        correct = o.use_bias_correction and o.betas[1] != 1.0
        scale = 1.0 - o.betas[1] ** t if correct else 1.0
        p = o.exponent_override or 2 * len(block.factors)
        block.roots = [inverse_root(a / scale, p, o) for a in block.factors]

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
    def _direction(block: Block, m: Tensor, t: int, o: Options) -> Tensor:
        graft = m
        if block.method != "sgd":
            correct = 1.0 - o.graft_beta2**t if block.method.endswith("adam") else 1.0
            graft = m / ((block.second / correct).sqrt() + o.eps)
        if not block.factors or t < o.start:
            return graft
        u = m
        for dim, root in enumerate(block.roots):
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
