"""A temporary folder for all ranks, in its own file because importing Transformers takes other files seconds."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist


@contextmanager
def shared_folder() -> Iterator[Path]:
    """Create a temporary folder that all ranks use."""
    path = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(path)
    try:
        yield Path(path[0])
    finally:
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(path[0])
