"""The optimizers that are compared: torch's, ours, and those of two other packages if they are installed.

All precondition the same matrices. torch's AdamW updates what a peer does not handle (embeddings, norms), and its time
is added to the peer's. Ours updates all parameters itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from benchmarks.gpt import matrices
from shampoo_deepspeed import Shampoo

RULES = ("shampoo", "soap", "kl_shampoo")
REFRESHES = ("sync", "staggered")
FORMATS: dict[str, dict[str, Any]] = {
    "full": {},
    "packed": {"factor_format": "packed", "root_format": "packed"},
    "adamw": {"memory": "adamw"},
    "half": {"memory": "half"},
}
PEERS = {"heavyball": "heavyball", "pytorch_optimizer": "pytorch-optimizer"}


@dataclass(frozen=True)
class Contestant:
    """A name, and a function that builds its optimizers for a model."""

    name: str
    build: Callable[[nn.Module], list[torch.optim.Optimizer]]


def adamw(fused: bool = False) -> Contestant:
    def build(model: nn.Module) -> list[torch.optim.Optimizer]:
        return [torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused or None, foreach=not fused or None)]

    return Contestant("torch AdamW, fused" if fused else "torch AdamW, foreach", build)


def ours(rule: str, refresh: str, block: int, frequency: int, **options: Any) -> Contestant:
    def build(model: nn.Module) -> list[torch.optim.Optimizer]:
        made = Shampoo(
            model.named_parameters(),
            model=model,
            lr=1e-3,
            preconditioner=rule,
            refresh=refresh,
            max_preconditioner_dim=block,
            precondition_frequency=frequency,
            **options,
        )
        return [made]

    return Contestant(f"{rule}, {refresh}", build)


def with_adamw(name: str, make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> Contestant:
    def build(model: nn.Module) -> list[torch.optim.Optimizer]:
        own = [p for _, p in matrices(model)]
        known = {id(p) for p in own}
        rest = [p for p in model.parameters() if id(p) not in known]
        return [make(own), torch.optim.AdamW(rest, lr=1e-3, foreach=True)]

    return Contestant(name, build)


def peers(block: int, frequency: int) -> list[Contestant]:
    """Return torch's Muon, and SOAP and Shampoo of the packages that are installed."""
    found = [with_adamw("torch Muon", lambda own: torch.optim.Muon(own, lr=1e-3))]
    if find_spec("heavyball"):
        import heavyball

        heavyball.utils.compile_mode = None  # nothing here is compiled
        soap: dict[str, Any] = {"precondition_frequency": frequency, "use_precond_schedule": False}
        soap |= {"compile_step": False, "lr": 1e-3}
        found.append(
            with_adamw("HeavyBall SOAP, whole dims", lambda own: heavyball.SOAP(own, max_precond_dim=2048, **soap))
        )
    if find_spec("pytorch_optimizer"):
        import pytorch_optimizer

        shampoo: dict[str, Any] = {"block_size": block, "preconditioning_compute_steps": frequency}
        shampoo |= {"start_preconditioning_step": frequency, "lr": 1e-3}
        found += [
            with_adamw(
                f"pytorch-optimizer ScalableShampoo, block {block}",
                lambda own: pytorch_optimizer.ScalableShampoo(own, **shampoo),
            ),
            with_adamw(
                "pytorch-optimizer SOAP, whole dims",
                lambda own: pytorch_optimizer.SOAP(own, lr=1e-3, precondition_frequency=frequency),
            ),
        ]
    return found


def missing_peers() -> list[str]:
    """Return the packages that are not installed, by the names that `pip install` takes."""
    return [name for module, name in PEERS.items() if not find_spec(module)]
