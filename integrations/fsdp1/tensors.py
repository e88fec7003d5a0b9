"""Recognises FSDP1's tensors, and refuses the case in which FSDP1 cannot use a finished optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from accelerate import FullyShardedDataParallelPlugin


def is_flat(tensor: Tensor) -> bool:
    """Whether this is a FlatParameter, which stands for many parameters."""
    return bool(getattr(tensor, "_is_flat_param", False))


def is_fsdp1(tensor: Tensor) -> bool:
    """Whether this is a FlatParameter, or a parameter that was made a view of one."""
    return is_flat(tensor) or bool(getattr(tensor, "_fsdp_flattened", False))


def refuse_flat(plugin: FullyShardedDataParallelPlugin | None) -> None:
    """Raise an error if a finished optimizer would silently train nothing; a deferred one sees the flat vectors.

    Args:
        plugin: accelerate's FSDP plugin, or None.

    Raises:
        ValueError: for FSDP1 with ``use_orig_params=False``.
    """
    if plugin is not None and getattr(plugin, "fsdp_version", 1) == 1 and not plugin.use_orig_params:
        raise ValueError(
            "FSDP1 with use_orig_params = false replaces the model's parameters by flat vectors after the optimizer "
            "was built; use optimizers=(deferred(lr=...), None), or set use_orig_params = true"
        )
