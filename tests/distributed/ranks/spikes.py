"""What a rank does in the check of spikes: the ranks must agree which gradients are some, however they are sharded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from shampoo_deepspeed import Shampoo
from tests.distributed.ranks.fsdp import full

# By step: the factor on all gradients. All but the second of these are spikes.
FACTORS = {4: 200.0, 6: 15.0, 8: 1e4, 10: 1e20}
OPTIONS: dict[str, Any] = {
    "normalize_gradients": False, "precondition_frequency": 3, "max_preconditioner_dim": 5, "elementwise": "adam",
}  # fmt: skip


def spikes(layouts: tuple[str, ...]) -> list[tuple[int, list[Tensor]]]:
    """Return, by layout, the number of rejected steps and the final parameters."""
    return [trained(layout) for layout in layouts]


def trained(layout: str) -> tuple[int, list[Tensor]]:
    """Train with equal data on all ranks."""
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 9))
    if layout == "fsdp2":
        fully_shard(model)
    elif layout == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = Shampoo(model.named_parameters(), model=model, **OPTIONS)
    for step in range(12):
        optimizer.zero_grad()
        model(torch.randint(9, (8,), generator=torch.Generator().manual_seed(step))).square().mean().backward()
        for p in model.parameters():
            assert p.grad is not None
            p.grad.mul_(FACTORS.get(step, 1.0))
        optimizer.step()
    optimizer.finish_step()
    return optimizer.rejected_steps, [full(p) for p in model.parameters()]
