"""Shocks cost little: one gradient 1,000 times too large, another scale of gradients or another batch size from one
step to the next, and a loss scale that is searched for."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shampoo_deepspeed import Shampoo
from shampoo_deepspeed.options.choices import PRECONDITIONERS

pytestmark = pytest.mark.slow

WIDTH, CLASSES, STEPS, AT = 24, 16, 50, 20
GRAFTINGS = ("rms", "none", "adam", "sgd")
# By step, counted from 0: the factor on the gradient, and the number of samples.
Shock = Callable[[int], tuple[float, int]]
SHOCKS: dict[str, Shock] = {
    "spike": lambda step: (1e3 if step == AT else 1.0, 32),
    "larger_gradients": lambda step: (1e2 if step >= AT else 1.0, 32),
    "smaller_gradients": lambda step: (1e-2 if step >= AT else 1.0, 32),
    "larger_batches": lambda step: (1.0, 256 if step >= AT else 32),
    "smaller_batches": lambda step: (1.0, 32 if step >= AT else 256),
    "loss_scale": lambda step: (2.0 ** (16 - min(step, 8)), 32),
}


class Model(nn.Module):
    """Embeds two tokens and predicts a third."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(CLASSES, WIDTH)
        self.up, self.down = nn.Linear(2 * WIDTH, 3 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, CLASSES, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.down(F.gelu(self.up(self.embed_tokens(tokens).flatten(1))))
        out: Tensor = self.lm_head(self.norm(hidden))
        return out


def samples(step: int, count: int) -> tuple[Tensor, Tensor]:
    """Return pairs of tokens, and what one of two rules makes of the first; the second one says which rule."""
    generator = torch.Generator().manual_seed(step)
    pairs = torch.randint(CLASSES, (count, 2), generator=generator)
    first, second = pairs.unbind(1)
    return pairs, torch.where(second < CLASSES // 2, 5 * first + 3, 7 * first + 1) % CLASSES


def held_out(model: nn.Module) -> float:
    with torch.no_grad():
        pairs, targets = samples(10_000, 512)
        return F.cross_entropy(model(pairs), targets).item()


def train(preconditioner: str, grafting: str, shock: Shock) -> tuple[list[float], list[float]]:
    """Return held-out losses, and the root mean square of all matrices' updates, of every step."""
    torch.manual_seed(1)
    model = Model()
    for p in model.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.1)
    # Without grafting Shampoo's updates have a length of their own, which is about a tenth of the others'.
    rate = 5e-2 if (preconditioner, grafting) == ("shampoo", "none") else 5e-3
    options: dict[str, Any] = {"precondition_frequency": 5, "betas": (0.9, 0.95), "lr": rate}
    optimizer = Shampoo(
        model.named_parameters(), model=model, preconditioner=preconditioner, grafting=grafting, **options
    )
    losses, lengths = [], []
    for step in range(STEPS):
        factor, count = shock(step)
        pairs, targets = samples(step, count)
        optimizer.zero_grad()
        (F.cross_entropy(model(pairs), targets) * factor).backward()
        before = [p.detach().clone() for p in (model.up.weight, model.down.weight)]
        optimizer.step()
        moved = [p.detach() - b for p, b in zip((model.up.weight, model.down.weight), before, strict=True)]
        lengths.append(torch.cat([m.flatten() for m in moved]).square().mean().sqrt().item())
        losses.append(held_out(model))
    return losses, lengths


@cache
def undisturbed(preconditioner: str, grafting: str) -> list[float]:
    return train(preconditioner, grafting, lambda _: (1.0, 32))[0]


@pytest.mark.parametrize("shock", SHOCKS)
@pytest.mark.parametrize("grafting", GRAFTINGS)
@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
def test_a_shock_costs_at_most_twenty_steps_and_no_long_update(preconditioner: str, grafting: str, shock: str) -> None:
    losses, lengths = train(preconditioner, grafting, SHOCKS[shock])
    calm = undisturbed(preconditioner, grafting)
    assert calm[-1] < 0.5 * calm[-20] < 0.2 * calm[0], "without the shock, 20 steps make a difference"
    assert min(losses[-3:]) <= calm[-20]
    after = lengths[10:]  # in the first steps updates are longer anyway
    assert max(after) <= 3.0 * statistics.median(after)
