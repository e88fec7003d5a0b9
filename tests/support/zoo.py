"""Small deterministic models and batches for the exactness tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GLOBAL_BATCH = 16  # divides evenly by 1, 2 or 4 ranks times 1, 2 or 4 micro-batches
LENGTH = 6
VOCABULARY = 13
WIDTH = 24


class OddModel(nn.Module):
    """Many awkward parameters: odd shapes, a conv, a tied embedding, a frozen layer, and a layer not always used."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 9)
        self.conv = nn.Conv1d(9, 7, 3, padding=1)  # 7x9x3: order 2 or 3, depending on the block size
        self.mix = nn.Linear(7, 9)
        self.frozen = nn.Linear(9, 9, bias=False)
        self.up = nn.Linear(9, 17)
        self.norm = nn.LayerNorm(17)
        self.down = nn.Linear(17, 9)
        self.small = nn.Linear(9, 5)
        self.row = nn.Linear(5, 1)  # 1x5: element-wise, as only one dim is left
        self.back = nn.Linear(6, 9, bias=False)
        self.sometimes = nn.Linear(9, 9)
        self.head = nn.Linear(9, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight
        self.frozen.weight.requires_grad_(False)

    def forward(self, tokens: Tensor, targets: Tensor, use_sometimes: bool = True) -> Tensor:
        h = self.embed(tokens)
        h = h + self.mix(F.gelu(self.conv(h.transpose(1, 2))).transpose(1, 2))
        h = h + self.frozen(h)
        h = h + self.down(self.norm(F.gelu(self.up(h))))
        small = torch.tanh(self.small(h))
        h = h + self.back(torch.cat([small, self.row(small)], dim=-1))
        if use_sometimes:
            h = h + torch.tanh(self.sometimes(h))
        return F.cross_entropy(self.head(h).flatten(0, 1), targets.flatten())


class WideModel(nn.Module):
    """One transformer block on continuous inputs; its dims (24, 72, 40) are not multiples of the block size 16."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)  # the gradient of a bias of k is only noise
        self.project = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 40)
        self.down = nn.Linear(40, WIDTH)
        self.readout = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        weights = torch.softmax(q @ k.transpose(1, 2) / WIDTH**0.5, dim=-1)
        x = x + self.project(weights @ v)
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return F.cross_entropy(self.readout(x).flatten(0, 1), targets.flatten())


class TinyModel(nn.Module):
    """A model of six elements, so that under some shardings a rank holds none."""

    def __init__(self) -> None:
        super().__init__()
        self.only = nn.Linear(2, 2)

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.only(x[..., :2]).flatten(0, 1), targets.flatten() % 2)


class NarrowModel(nn.Module):
    """A layer of 13 units, which two ranks of tensor parallelism cut into 7 and 6."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, VOCABULARY)
        self.down = nn.Linear(VOCABULARY, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        x = self.norm(x + self.down(F.gelu(self.up(x))))
        return F.cross_entropy(x.flatten(0, 1), targets.flatten())


MODELS: dict[str, Callable[[], nn.Module]] = {
    "odd": OddModel,
    "wide": WideModel,
    "tiny": TinyModel,
    "narrow": NarrowModel,
}


def make_model(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Build a model with the same float32 numbers on every rank and in every dtype."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(20)
        model = MODELS[kind]()
        with torch.no_grad():
            for p in model.parameters():
                if p.ndim == 1:  # not 0 or 1, so that relative deviations of biases and norms make sense
                    p.add_(torch.randn_like(p), alpha=0.3)
    return model.to(dtype)


def make_batch(kind: str, step: int, unused: int | None = None) -> dict[str, Any]:
    """Return a step's global batch; the odd model skips its layer `sometimes` in steps unused, unused + 3, ..."""
    generator = torch.Generator().manual_seed(1000 + step)
    shape = (GLOBAL_BATCH, LENGTH)
    targets = torch.randint(VOCABULARY, shape, generator=generator)
    if kind == "odd":
        tokens = torch.randint(VOCABULARY, shape, generator=generator)
        return {"tokens": tokens, "targets": targets, "use_sometimes": unused is None or step % 3 != unused}
    return {"x": torch.randn(*shape, WIDTH, generator=generator), "targets": targets}


def cast(batch: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in batch.items()}


def micro_batches(batch: dict[str, Any], rank: int, ranks: int, accumulate: int = 1) -> Iterator[dict[str, Any]]:
    """Yield a rank's equal slices; the mean loss over ranks and slices is exactly the mean over the global batch."""
    rows, rest = divmod(GLOBAL_BATCH, ranks * accumulate)
    assert rest == 0, "the global batch must divide evenly"
    for micro in range(accumulate):
        piece = slice((rank * accumulate + micro) * rows, (rank * accumulate + micro + 1) * rows)
        yield {k: v[piece] if isinstance(v, Tensor) else v for k, v in batch.items()}


def gradients(
    model: nn.Module, batch: dict[str, Any], zeros: bool = False, scale: float = 1.0
) -> dict[str, Tensor | None]:
    """Return named gradients of the mean loss times `scale`; with `zeros`, missing ones are zeros, as in DeepSpeed."""
    model.zero_grad(set_to_none=True)
    (model(**cast(batch, next(model.parameters()).dtype)) * scale).backward()
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return {n: torch.zeros_like(p) if zeros and p.grad is None else p.grad for n, p in named.items()}


def relative_error(value: Tensor, expected: Tensor) -> float:
    difference = (value.double() - expected.double()).norm()
    return (difference / expected.double().norm()).item()
