"""How a script starts DeepSpeed: by a launcher, and where it is not to use an accelerator told so."""

from __future__ import annotations

import atexit
import os
import time

import torch

HAS_ACCELERATOR = torch.accelerator.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"


def prepare_deepspeed(use_cpu: bool) -> None:
    """Makes the process one of DeepSpeed's ranks; call it before a model is built."""
    if "RANK" not in os.environ:
        raise SystemExit("DeepSpeed needs a launcher, on one device too: start with deepspeed or torchrun")
    if not use_cpu:
        return
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
    import deepspeed

    # Spares a minute of C++ build: this extension only speeds up inference on CPUs.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # On GPUs the Trainer does this; without it ZeRO-3 would build the model as if there were one rank.
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    # Else a thread of gloo, which may wait for the interpreter, aborts the process that ends (torch 2.13). Shampoo does
    # this by itself; AdamW, which the demo trains beside it, does not.
    atexit.register(time.sleep, 0.1)
