"""The small GPT of the benchmarks: 4 layers of width 256, 16 matrices of 256 x 256 to 1024 x 256, 3.7 M parameters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Size:
    """Sizes of the GPT; ``length`` is the number of tokens in a sequence."""

    layers: int = 4
    width: int = 256
    heads: int = 4
    vocab: int = 2048
    length: int = 64


class Layer(nn.Module):
    """Causal attention and a GELU network, each after a norm."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        width = size.width
        self.heads = size.heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.o = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        parts = self.qkv(self.norm1(x)).view(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = parts.unbind()
        seen = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(seen.transpose(1, 2).reshape(rows, length, width))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Learned positions, tied head; ``forward`` returns the mean cross-entropy of the next token."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.wte = nn.Embedding(size.vocab, size.width)
        self.wpe = nn.Embedding(size.length, size.width)
        self.layers = nn.ModuleList(Layer(size) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x)
        logits = functional.linear(self.norm(x), self.wte.weight)
        return functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def build(size: Size, device: torch.device | str = "cpu") -> GPT:
    """Build the model with seeded weights."""
    torch.manual_seed(0)
    return GPT(size).to(device)


def batch(size: Size, tokens: int, number: int, device: torch.device | str = "cpu") -> Tensor:
    """Return token rows [tokens / length, length]: a seeded walk, so that there is something to learn."""
    generator = torch.Generator().manual_seed(number)
    rows = tokens // size.length
    starts = torch.randint(size.vocab, (rows, 1), generator=generator)
    strides = torch.randint(1, 8, (rows, size.length), generator=generator).cumsum(1)
    return ((starts + strides) % size.vocab).to(device)


def matrices(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return the matrices that Shampoo preconditions: weights of the layers, neither embeddings nor norms."""
    return [(name, p) for name, p in model.named_parameters() if p.ndim > 1 and not name.startswith("w")]
