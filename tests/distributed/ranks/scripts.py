"""What a rank does in the checks of scripts: runs one as its command line would, again from where it was saved."""

from __future__ import annotations

import gc
import json
import os
import runpy
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import deepspeed
import torch
import torch.distributed as dist
from accelerate.state import DistributedType, PartialState

from shampoo_deepspeed.integrations import optim_shampoo
from tests.distributed.ranks.folders import shared_folder
from tests.distributed.ranks.trainer import clean_process, logged
from tests.support.script_runs import CONFIG, ScriptRun
from tests.support.tiny_text import prepare, save_lines, save_weights


def run(asked: ScriptRun) -> dict[str, Any]:
    """Run a script to its end, then again from its middle; return what both have written, and what was logged."""
    deepspeed.init_distributed("gloo")
    with shared_folder() as folder:
        if dist.get_rank() == 0:
            prepare(folder)
            save_weights(folder)
            save_lines(folder)
            (folder / CONFIG).write_text(json.dumps(asked.configuration()))
        dist.barrier()
        arguments = asked.arguments(folder, dist.get_world_size())
        with logged() as messages:
            whole = results(asked, arguments, folder)
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(folder / "out" / asked.last)
        dist.barrier()
        resumed = results(asked, arguments + asked.resuming(folder), folder)
    return {"whole": whole, "resumed": resumed, "messages": messages}


def results(asked: ScriptRun, arguments: list[str], folder: Path) -> dict[str, Any]:
    """Run the script and return the JSON files that it has written."""
    environment = asked.environment(folder)
    with clean_process(), sharding_on_cpu(asked.framework == "fsdp2"), patch.object(sys, "argv", ["", *arguments]):
        os.environ.update(environment)
        begin(asked)(asked.command(arguments))
    gc.collect()
    dist.barrier()
    return {name: json.loads((folder / "out" / name).read_text()) for name in asked.written}


def begin(asked: ScriptRun) -> Callable[[list[str]], None]:
    """How a script is started: as Python itself does, or by the module that makes `--optim shampoo` known first."""
    return optim_shampoo.main if asked.by_name else plainly


def plainly(command: list[str]) -> None:
    is_module = command[0] == "-m"
    sys.argv[:] = command[is_module:]
    if is_module:
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(command[0], run_name="__main__")


@contextmanager
def sharding_on_cpu(wanted: bool) -> Iterator[None]:
    """Keep the process group, with which other checks follow; let accelerate shard, which it does not on CPUs.

    accelerate looks for a device's own backend unless it is asked for the CPU; without one it sees a single process.
    """
    join, path = PartialState.__init__, list(sys.path)

    def joined(self: PartialState, cpu: bool = False, **kwargs: Any) -> None:
        fresh = not PartialState._shared_state
        join(self, True, **kwargs)
        if wanted and fresh:
            self._shared_state.update(distributed_type=DistributedType.MULTI_XPU, device=torch.device("cpu"))

    try:
        with patch.object(PartialState, "__init__", joined), patch.object(dist, "destroy_process_group"):
            yield
    finally:
        sys.path[:] = path
