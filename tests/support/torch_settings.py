"""What a library may change in torch for the whole process, so that tests and checks can be held to leave it."""

from __future__ import annotations

from typing import Any

import torch


def torch_settings() -> dict[str, Any]:
    """Functions and settings of torch; DeepSpeed's ZeRO-3, for one, replaces ``linear`` by one whose sums differ."""
    return {
        "torch.nn.functional.linear": torch.nn.functional.linear,
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "float32 precision": torch.get_float32_matmul_precision(),
        "gradients": torch.is_grad_enabled(),
        "mkldnn": torch.backends.mkldnn.enabled,
    }


def assert_same_settings(before: dict[str, Any]) -> None:
    """Raise an AssertionError that names each setting that is not what it was before."""
    now = torch_settings()
    changed = {name: (value, now[name]) for name, value in before.items() if now[name] != value}
    assert not changed, f"left changed for all tests that follow: {changed}"
