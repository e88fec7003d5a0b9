"""One rank of a launch: joins the process group, runs the checks in order and writes one result file for each."""

from __future__ import annotations

import faulthandler
import gc
import importlib
import os
import pickle
import signal
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from shampoo_deepspeed.distributed.process_groups import delay_exit_for_gloo
from tests.support.launch import Check, RankResult
from tests.support.torch_settings import assert_same_settings, torch_settings

PARENT_SECONDS = 120.0


def main(folder: Path) -> None:
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    (folder / f"ready.{rank}").touch()
    for index, check in enumerate(pickle.loads((folder / "checks.pickle").read_bytes())):
        modules = len(sys.modules)
        result = attempt(check)
        write(folder / f"{index}.{rank}.pickle", result)
        if result.failure is not None:
            wait_for(folder / f"{index}.go")
        collect_garbage(modules)
        dist.barrier()
    dist.destroy_process_group()
    delay_exit_for_gloo()  # checks without an optimizer use gloo too


def attempt(check: Check) -> RankResult:
    module, _, name = check.function.partition(":")
    value: Any = None
    failure = None
    try:
        print(f"===== {check.name}", flush=True)
        modules = len(sys.modules)
        imported = importlib.import_module(f"tests.distributed.ranks.{module}")
        collect_garbage(modules)
        before, linear = torch_settings(), torch.nn.functional.linear
        try:
            value = getattr(imported, name)(check.argument)
        finally:
            torch.nn.functional.linear = linear  # ZeRO-3 replaces it, and nothing of DeepSpeed restores it
        assert_same_settings(before)
    except BaseException:
        failure = traceback.format_exc()
    return RankResult(value, failure, time.time())


def collect_garbage(modules_before: int) -> None:
    """Collect garbage; if modules were imported meanwhile, exempt their objects from later collections.

    These are half a million objects of torch, transformers and deepspeed, many imported by the first step. DeepSpeed
    and the Trainer start a collection in each training.
    """
    gc.collect()
    if len(sys.modules) > modules_before:
        gc.freeze()


def write(path: Path, result: RankResult) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(pickle.dumps(result))
    temporary.rename(path)  # the parent never sees half a file


def wait_for(permission: Path) -> None:
    """Wait for the parent, which lets this rank continue or kills it, as other ranks may still wait in a collective."""
    deadline = time.monotonic() + PARENT_SECONDS
    while not permission.exists():
        if time.monotonic() > deadline:
            os._exit(1)
        time.sleep(0.02)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
