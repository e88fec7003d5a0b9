"""Global switches of the precision of products, each as a user may set it, and what they read afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

backends: Any = torch.backends


def set_allow_tf32() -> None:
    backends.cuda.matmul.allow_tf32 = True


def set_generic(value: str) -> Callable[[], None]:
    def switch() -> None:
        backends.fp32_precision = value

    return switch


def set_matmul(backend: str, value: str) -> Callable[[], None]:
    def switch() -> None:
        getattr(backends, backend).matmul.fp32_precision = value

    return switch


NEW_NAMES = hasattr(backends.cuda.matmul, "fp32_precision")  # torch 2.8 has the older switches alone
SWITCHES: dict[str, Callable[[], None]] = {
    "none": lambda: None,
    "legacy_highest": lambda: torch.set_float32_matmul_precision("highest"),
    "legacy_high": lambda: torch.set_float32_matmul_precision("high"),
    "legacy_medium": lambda: torch.set_float32_matmul_precision("medium"),
    "allow_tf32": set_allow_tf32,
}
SWITCHES |= (
    {}
    if not NEW_NAMES
    else {
        "generic_tf32": set_generic("tf32"),
        "generic_ieee": set_generic("ieee"),
        "cuda_matmul_tf32": set_matmul("cuda", "tf32"),
        "cuda_matmul_ieee": set_matmul("cuda", "ieee"),
        "cpu_matmul_bf16": set_matmul("mkldnn", "bf16"),
    }
)


def readings() -> dict[str, Any]:
    """Return all readable switches, by new and by old names; some refuse to be read if both names were used."""
    readers: dict[str, Callable[[], Any]] = {
        "generic": lambda: backends.fp32_precision,
        "cuda": lambda: backends.cuda.matmul.fp32_precision,
        "cpu": lambda: backends.mkldnn.matmul.fp32_precision,
        "allow_tf32": lambda: backends.cuda.matmul.allow_tf32,
        "legacy": torch.get_float32_matmul_precision,
        "conv": lambda: backends.cudnn.conv.fp32_precision,
        "autocast": lambda: torch.is_autocast_enabled("cpu"),
    }
    out = {}
    for name, read in readers.items():
        try:
            out[name] = read()
        except (AttributeError, RuntimeError) as refusal:
            out[name] = str(refusal)[:60]
    return out


@pytest.fixture(autouse=True)
def restored_switches() -> Iterator[None]:
    """Restore torch's initial switches, so that other tests do not see these."""
    yield
    if NEW_NAMES:
        backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    for backend in (backends.cuda.matmul, backends.mkldnn.matmul) if NEW_NAMES else ():
        backend.fp32_precision = "none"
