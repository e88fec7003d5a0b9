"""A process that is forked while a thread of its parent writes a save: it waits for nothing and can save itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os, signal, sys, threading, warnings
warnings.simplefilter("ignore")
import torch
import shampoo_deepspeed.checkpoint.save as saving
from shampoo_deepspeed import CheckpointError, Shampoo, load_shampoo, save_shampoo, wait_for_saves
weight = torch.nn.Parameter(torch.ones(8, 6))
optimizer = Shampoo([("w", weight)], precondition_frequency=2)
def step():
    weight.grad = torch.randn(8, 6)
    optimizer.step()
step()
may_write, write = threading.Event(), saving.write_checkpoint
def held(*arguments):
    if os.getpid() == parent:
        may_write.wait()
    return write(*arguments)
parent, saving.write_checkpoint = os.getpid(), held
future = save_shampoo(optimizer, sys.argv[1] + "/parent", asynchronous=True)
child = os.fork()
if child == 0:
    signal.alarm(60)
    wait_for_saves()
    try:
        future.result()
    except CheckpointError as error:
        assert "the process that this one was forked from" in str(error), error
        step()
        save_shampoo(optimizer, sys.argv[1] + "/child", asynchronous=True).result()
        load_shampoo(optimizer, sys.argv[1] + "/child")
        step()
        sys.exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
may_write.set()
future.result()
wait_for_saves()
load_shampoo(optimizer, sys.argv[1] + "/parent")
step()
"""


@pytest.mark.slow
def test_a_forked_process_neither_waits_for_its_parents_save_nor_disturbs_it(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
