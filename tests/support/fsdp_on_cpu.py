"""Runs a script with accelerate's FSDP on CPUs. accelerate ignores FSDP there, although FSDP2 itself works."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed.fsdp as fsdp
from accelerate.state import DistributedType, PartialState

join = PartialState.__init__
shard = fsdp.fully_shard
sharded: list[str] = []


def pretend_to_have_accelerators(self: PartialState, *args: Any, **kwargs: Any) -> None:
    join(self, *args, **kwargs)
    self._shared_state.update(distributed_type=DistributedType.MULTI_XPU, device=torch.device("cpu"))


def note_and_shard(module: Any, *args: Any, **kwargs: Any) -> Any:
    sharded.append(type(module).__name__)
    return shard(module, *args, **kwargs)


PartialState.__init__ = pretend_to_have_accelerators  # type: ignore[method-assign]
fsdp.fully_shard = note_and_shard
sys.argv = sys.argv[1:]
sys.path.insert(0, str(Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
print(f"sharded: {' '.join(sharded)}")
