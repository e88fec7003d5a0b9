"""The planner: what a run will need, before it starts."""

from shampoo_deepspeed.estimate.planner import Estimate, Step, block_bytes, estimate

__all__ = ["Estimate", "Step", "block_bytes", "estimate"]
