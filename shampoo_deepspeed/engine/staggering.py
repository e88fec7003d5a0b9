"""When a block's inverse roots are recomputed: all blocks at once, or spread over the window. Pure functions.

With ``precondition_frequency`` f, a window is f steps. Spread over it, each step does about 1/f of the work.
In the background blocks are due as when spread; what is computed then is installed in the block's next accepted step.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def staggered_phases(costs: Sequence[float], frequency: int, earlier: Sequence[float] = ()) -> list[int]:
    """The phase of each block, in [0, frequency): each goes to the phase with the least refresh cost so far.

    Blocks are taken in the given order, which must be the global one (parameters as the optimizer was given them,
    blocks row-major): then phases depend neither on ranks nor on the framework, and what joins later leaves those
    before it as they are. Equal blocks take turns.
    No phase costs more than another by more than the most expensive block.

    Args:
        costs: refresh cost of each block, any unit.
        frequency: steps in a window, >= 1.
        earlier: cost of each phase by blocks that were placed before; empty for none.

    Raises:
        ValueError: where ``earlier`` is not one number for each phase.
    """
    if earlier and len(earlier) != frequency:
        raise ValueError(f"earlier holds {len(earlier)} phases; with frequency {frequency} there are {frequency}")
    heap = [(cost, phase) for phase, cost in enumerate(earlier or [0.0] * frequency)]
    heapq.heapify(heap)
    phases = []
    for cost in costs:
        load, phase = heap[0]
        heapq.heapreplace(heap, (load + cost, phase))
        phases.append(phase)
    return phases


def due_staggered(step: int, start: int, frequency: int, phase: int) -> bool:
    """Whether a block of this phase refreshes: first at ``start + phase``, and then every ``frequency`` steps."""
    return step >= start + phase and (step - start - phase) % frequency == 0
