"""Starts DeepSpeed in a script that a launcher has started, on accelerators or, on request, on the CPU."""

from __future__ import annotations

import atexit
import os
import time

import torch

HAS_ACCELERATOR = torch.accelerator.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"


def prepare_deepspeed(use_cpu: bool) -> None:
    """Make this process one of DeepSpeed's ranks; call this before a model is built."""
    if "RANK" not in os.environ:
        raise SystemExit("DeepSpeed needs a launcher, even on one device: start with deepspeed or torchrun")
    if not use_cpu:
        return
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
    import deepspeed

    # Saves a minute of C++ build: this extension only speeds up inference on CPUs.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # On GPUs the Trainer does this; without it, ZeRO-3 would build the model as if there were only one rank.
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    # Without this delay, a gloo thread that waits for the interpreter may abort the process at its exit (torch 2.13).
    # Shampoo adds the delay by itself; AdamW, which the demo also trains, does not.
    atexit.register(time.sleep, 0.1)
