"""torchtitan: an optimizers container with Shampoo, whose checkpoints are keyed by parameter names. Written for 0.3.

``optimizer=shampoo(lr=3e-3)`` in a configuration, or ``ShampooContainer.Config(param_groups=[...])``, in whose groups
``optimizer_name="Shampoo"`` stands next to torchtitan's own names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer
from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig

from shampoo_deepspeed import Shampoo

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from shampoo_deepspeed.options.typed import Options


SHAMPOO = "Shampoo"
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


class ShampooContainer(OptimizersContainer):
    """torchtitan's container, which knows Shampoo too. Each model part, as a pipeline stage, has its own optimizers.

    Its state has the form of torch's own helpers, flattened by parameter names. torchtitan's copies only tensors of
    which each rank has all, or a shard of a parameter; Shampoo's blocks lie on their owners.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        """The configuration of the base class."""

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Callable[..., Optimizer]:
        return Shampoo if name == SHAMPOO else OptimizersContainer._resolve_optimizer_factory(name)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of all optimizers by parameter names. This is a collective."""
        parts = (get_optimizer_state_dict(part, own, options=FLAT) for part, own in self._by_part())
        return {key: value for state in parts for key, value in state.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` has returned, on any number of ranks. This is a collective."""
        for part, own in self._by_part():
            set_optimizer_state_dict(part, own, state_dict, options=FLAT)

    def _by_part(self) -> Iterator[tuple[nn.Module, list[Optimizer]]]:
        """Yield each model part with the optimizers of its parameters."""
        for part in self.model_parts:
            held = {id(p) for p in part.parameters()}
            yield part, [o for o in self.optimizers if id(o.param_groups[0]["params"][0]) in held]


def shampoo(lr: float = 1e-3, **options: Unpack[Options]) -> ShampooContainer.Config:
    """Return the configuration of one Shampoo for all parameters of a model, as torchtitan's ``default_adamw``."""
    group = ParamGroupConfig(pattern=".*", optimizer_name=SHAMPOO, optimizer_kwargs={"lr": lr, **options})
    return ShampooContainer.Config(param_groups=[group], implementation="for-loop")
