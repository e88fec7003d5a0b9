"""Passes masters that were changed between two steps on to the model, as DeepSpeed does after a step.

File names are DeepSpeed's (0.19.8).
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .engine import Engine


def pass_on(engine: Engine) -> None:
    """Give the model the weights of its masters; a collective of the engine's ranks unless nothing is sharded."""
    wrapper = engine.optimizer
    if engine.zero_optimization_stage() == 3:  # as the end of `step` in runtime/zero/stage3.py
        wrapper._partition_all_parameters()
        for number in range(len(wrapper.fp32_partitioned_groups_flat)):
            wrapper._reassign_or_swap_out_partitioned_parameters(number)
        if wrapper.persistent_parameters:
            wrapper.persistent_parameters[0].all_gather(wrapper.persistent_parameters)
        wrapper.invalidate_secondary_tensor()
    elif hasattr(wrapper, "update_lp_params"):  # ZeRO-1, ZeRO-2 and BF16_Optimizer
        wrapper.update_lp_params()
    else:  # FP16_UnfusedOptimizer; without a wrapper the model has the optimizer's own tensors
        lows, highs = (chain(*getattr(wrapper, name, ())) for name in ("fp16_groups", "fp32_groups"))
        for low, high in zip(lows, highs, strict=True):
            low.data.copy_(high.data)
