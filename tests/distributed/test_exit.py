"""A process that has trained with other ranks exits with success, even if torch's threads are still busy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.support.launch import ROOT

# gloo's thread drops the last reference to the tensor while this thread holds the interpreter lock until its end.
BUSY_TO_THE_END = """
import sys, time
import torch
import torch.distributed as dist
from shampoo_deepspeed.distributed.process_groups import delay_exit_for_gloo
from tests.support.stepping import drive, parameter, shampoo
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/store", rank=0, world_size=1)
held = dist.group.WORLD
params = [parameter(8, 6)]
drive(shampoo([("w", params[0])]), params, range(2))
assert delay_exit_for_gloo.cache_info().currsize == 1
sys.setswitchinterval(1000)
tensor = torch.rand(1000)
dist.all_reduce(tensor, async_op=True)
end = time.monotonic() + 0.2
while time.monotonic() < end:
    pass
"""


def test_a_gloo_thread_that_waits_for_the_interpreter_aborts_no_exit(tmp_path: Path) -> None:
    """Without the wait, most such processes end with SIGABRT."""
    command = [sys.executable, "-c", BUSY_TO_THE_END, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


ALONE = """
from shampoo_deepspeed.distributed.process_groups import delay_exit_for_gloo
from tests.support.stepping import drive, parameter, shampoo
params = [parameter(8, 6)]
drive(shampoo([("w", params[0])]), params, range(2))
print(delay_exit_for_gloo.cache_info().currsize, "waits")
"""


def test_a_process_alone_does_not_wait() -> None:
    done = subprocess.run([sys.executable, "-c", ALONE], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout == "0 waits\n", done.stdout + done.stderr
