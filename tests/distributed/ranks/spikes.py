"""What a rank does in the checks of what ranks agree on or see at a step, however the parameters are sharded.

Which gradients are spikes; that autograd sees a step; that a faulty learning rate is refused.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from shampoo_deepspeed import OptionError, Shampoo
from tests.distributed.ranks.fsdp import full

# By step: the factor on all gradients. All but the second of these are spikes.
FACTORS = {4: 200.0, 6: 15.0, 8: 1e4, 10: 1e20}
OPTIONS: dict[str, Any] = {
    "normalize_gradients": False, "precondition_frequency": 3, "max_preconditioner_dim": 5, "elementwise": "adam",
}  # fmt: skip


def spikes(layouts: tuple[str, ...]) -> list[tuple[int, list[Tensor]]]:
    """Return, by layout, the number of rejected steps and the final parameters."""
    return [trained(layout) for layout in layouts]


def built(layout: str) -> tuple[nn.Module, Shampoo]:
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 9))
    if layout == "fsdp2":
        fully_shard(model)
    elif layout == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    return model, Shampoo(model.named_parameters(), model=model, **OPTIONS)


def loss_of(model: nn.Module, step: int) -> Tensor:
    """Return the loss of a batch that is the same on all ranks."""
    loss: Tensor = model(torch.randint(9, (8,), generator=torch.Generator().manual_seed(step))).square().mean()
    return loss


def seen_by_autograd(layouts: tuple[str, ...]) -> list[bool]:
    """Return, by layout, whether every step counts as a change of every parameter's own memory."""
    found = []
    for layout in layouts:
        model, optimizer = built(layout)
        parts = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
        for step in range(4):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            before = [(p._version, part._version) for p, part in zip(model.parameters(), parts, strict=True)]
            optimizer.step()
            after = [(p._version, part._version) for p, part in zip(model.parameters(), parts, strict=True)]
            found.append(all(max(new) > max(old) for new, old in zip(after, before, strict=True)))
        if layout == "ddp":
            loss = loss_of(model, 4)
            optimizer.zero_grad()
            loss.backward(retain_graph=True)
            optimizer.step()
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()
    return found


def faulty_rates(layouts: tuple[str, ...]) -> list[tuple[bool, list[Tensor]]]:
    """Return, by layout, whether steps with a faulty rate changed nothing, and the parameters after others."""
    found = []
    for layout in layouts:
        (model, optimizer), same = built(layout), True
        for step in range(6):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            if step in (2, 4):
                before, good = [full(p) for p in model.parameters()], optimizer.param_groups[0]["lr"]
                optimizer.param_groups[0]["lr"] = float("nan") if step == 2 else -1.0
                with pytest.raises(OptionError, match="in parameter group 0: .*'lr' = "):
                    optimizer.step()
                same &= all(torch.equal(a, full(p)) for a, p in zip(before, model.parameters(), strict=True))
                optimizer.param_groups[0]["lr"] = good
            optimizer.step()
        found.append((same, [full(p) for p in model.parameters()]))
    return found


def trained(layout: str) -> tuple[int, list[Tensor]]:
    """Train with equal data on all ranks."""
    model, optimizer = built(layout)
    for step in range(12):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        for p in model.parameters():
            assert p.grad is not None
            p.grad.mul_(FACTORS.get(step, 1.0))
        optimizer.step()
    optimizer.finish_step()
    return optimizer.rejected_steps, [full(p) for p in model.parameters()]
