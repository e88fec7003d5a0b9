"""When each block's basis or inverse roots are refreshed: the phase of every block of a model. Pure functions.

With ``precondition_frequency`` f, a window is f steps. If refreshes are spread over it (``refresh="staggered"``), each
step does about 1/f of the work. In the background the same blocks are due; the result is installed in the block's next
accepted step. Phases are computed only from the optimizer's arguments, so they are the same on all ranks.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence

from shampoo_deepspeed.distributed.frameworks import Parameter
from shampoo_deepspeed.engine.policy import Policy
from shampoo_deepspeed.geometry.blocks import cut_into_blocks
from shampoo_deepspeed.geometry.plan import refresh_cost
from shampoo_deepspeed.options.config import ShampooConfig


def refresh_phases(
    parameters: Iterable[Parameter], policies: Mapping[str, Policy], configs: Mapping[int, ShampooConfig]
) -> dict[str, tuple[int, ...]]:
    """The phases of each parameter's blocks, by its key; only of groups that spread their refreshes.

    Args:
        parameters: all parameters of the optimizer. They are taken by group and in the order of each group,
            independent of shards and step units. Groups of one frequency share a window. Frozen parameters come
            last, so that it makes no difference whether the optimizer has them.
        policies: by parameter key.
        configs: options by the numbers of groups and rules.
    """
    phases: dict[str, tuple[int, ...]] = {}
    windows: dict[int, _Window] = {}
    for parameter in sorted(parameters, key=lambda p: (p.frozen, p.group, p.position)):
        policy = policies[parameter.key]
        config = configs[policy.options]
        if not (config.staggers and policy.preconditioned and any(side != "none" for side in policy.sides)):
            continue
        frequency = config.precondition_frequency
        window = windows.setdefault(frequency, _Window(frequency))
        blocks = cut_into_blocks(policy.merged, policy.cuts)
        phases[parameter.key] = tuple(window.place(refresh_cost(box.lengths, policy.sides)) for box in blocks)
    return phases


class _Window:
    """The refresh cost of each phase so far. A phase without blocks takes no memory: a window may be 10^12 steps."""

    def __init__(self, frequency: int, earlier: Sequence[float] = ()) -> None:
        self._frequency = frequency
        self._heap = [(cost, phase) for phase, cost in enumerate(earlier)]
        self._used = len(self._heap)  # phases from this one on have no blocks
        heapq.heapify(self._heap)

    def place(self, cost: float) -> int:
        """The phase with the least cost, and the first of several; it gets a block of this cost."""
        if self._used < self._frequency and (not self._heap or (0.0, self._used) < self._heap[0]):
            phase, self._used = self._used, self._used + 1
            heapq.heappush(self._heap, (cost, phase))
            return phase
        load, phase = self._heap[0]
        heapq.heapreplace(self._heap, (load + cost, phase))
        return phase


def staggered_phases(costs: Sequence[float], frequency: int, earlier: Sequence[float] = ()) -> list[int]:
    """The phase of each block, in [0, frequency): each goes to the phase with the least refresh cost until then.

    Blocks are taken in the given order, which must be the global one (parameters in the optimizer's order, blocks
    row-major). Then phases depend neither on ranks nor on the framework, and blocks that join later do not change
    those before them. Equal blocks get one phase after the other. No phase costs more than another by more than the
    most expensive block.

    Args:
        costs: refresh cost of each block, any unit.
        frequency: steps in a window, >= 1.
        earlier: cost of each phase by blocks that were placed before; empty for none.

    Raises:
        ValueError: if ``earlier`` is not one number for each phase.
    """
    if earlier and len(earlier) != frequency:
        raise ValueError(f"earlier holds {len(earlier)} phases; with frequency {frequency} there are {frequency}")
    window = _Window(frequency, earlier)
    return [window.place(cost) for cost in costs]
