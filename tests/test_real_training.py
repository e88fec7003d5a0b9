"""A real training run at the default settings: what float32 does to directions, seen against float64 at every step."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shampoo_deepspeed import Shampoo

WIDTH, HEADS, LAYERS, LENGTH, BATCH = 48, 4, 2, 48, 12
STEPS = 100


class RMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


class Layer(nn.Module):
    """As in Llama, but for rotary positions."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = RMSNorm(), RMSNorm()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.gate_proj, self.up_proj = (nn.Linear(WIDTH, 3 * WIDTH, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(3 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.attention_norm(x)
        heads = [f(h).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj)]
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.o_proj(mixed.transpose(1, 2).flatten(2))
        h = self.mlp_norm(x)
        return x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


class LanguageModel(nn.Module):
    """Bytes in, logits of the next byte out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(256, WIDTH)
        self.positions = nn.Embedding(LENGTH, WIDTH)
        self.layers = nn.Sequential(*(Layer() for _ in range(LAYERS)))
        self.norm = RMSNorm()
        self.lm_head = nn.Linear(WIDTH, 256, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        logits: Tensor = self.lm_head(self.norm(self.layers(x)))
        return logits


def made_model() -> LanguageModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = LanguageModel()
        for p in model.parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=0.02)
    return model


def batches() -> list[Tensor]:
    """Windows of a real text that every Python has."""
    text = torch.tensor(list(Path(argparse.__file__).read_bytes()))
    generator = torch.Generator().manual_seed(3)
    starts = torch.randint(len(text) - LENGTH - 1, (STEPS, BATCH), generator=generator)
    return [torch.stack([text[s : s + LENGTH + 1] for s in row.tolist()]) for row in starts]


def cosine(left: Tensor, right: Tensor) -> float:
    return F.cosine_similarity(left.double().flatten(), right.double().flatten(), dim=0).item()


@pytest.mark.parametrize("options", [{}, {"solver": "coupled_newton"}], ids=["defaults", "coupled_newton"])
def test_float32_directions_are_those_of_float64_at_the_default_settings(options: dict[str, Any]) -> None:
    """Both get the same gradients and parameters, those of the float32 run; each has a state of its own all the time.

    Only the model's own embedding is excluded, so that an ill-conditioned head is among the matrices.
    """
    model = made_model()
    own = dict(model.named_parameters())
    twins = {name: nn.Parameter(p.detach().double()) for name, p in own.items()}
    common: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "exclude": ["embed_tokens*"]}
    optimizer = Shampoo(own.items(), **common, **options)
    exact = Shampoo(twins.items(), factor_dtype="float64", root_dtype="float64", solver="eigh", **common)
    losses, worst, rows = [], {}, batches()
    for step, row in enumerate(rows, start=1):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(row[:, :-1]).flatten(0, 1), row[:, 1:].flatten())
        loss.backward()
        losses.append(loss.item())
        for name, p in own.items():
            twins[name].data.copy_(p.detach())
            assert p.grad is not None
            twins[name].grad = p.grad.double()
        before = {name: p.detach().clone() for name, p in own.items()}
        optimizer.step()
        exact.step()
        found = {n: cosine(own[n].detach() - before[n], twins[n].detach() - before[n].double()) for n in own}
        worst[step] = min(found.values()), min(found, key=lambda name: found[name])
    assert losses[-1] < 0.75 * losses[0]  # it trains
    assert min(worst.values())[0] >= 0.999, sorted(worst.items(), key=lambda item: item[1])[:5]
