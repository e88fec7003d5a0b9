"""Starts a script on CPU ranks by a command, as a user does, and returns its output."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.support.launch import ROOT, free_port

SECONDS = 240


def python_module(name: str) -> list[str]:
    return [sys.executable, "-m", name]


def torchrun(ranks: int) -> list[str]:
    port = str(free_port())
    return [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", port]


def accelerate_launch(config: Path) -> list[str]:
    port = str(free_port())
    return [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), "--main_process_port", port,
    ]  # fmt: skip


def run(command: Sequence[str | Path], folder: Path, **environment: str) -> str:
    """Return what the command prints; it runs in the folder, offline, and may write only there."""
    temporary = folder.parent / f"{folder.name}_temporary"
    temporary.mkdir(exist_ok=True)
    given = {
        "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1", "HF_HOME": str(temporary / "cache"),
        "TORCH_EXTENSIONS_DIR": str(temporary / "extensions"), "TMPDIR": str(temporary),
    }  # fmt: skip
    done = subprocess.run(
        list(map(str, command)),
        cwd=folder,
        env=os.environ | given | environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout


def losses(printed: str) -> list[float]:
    """Return the losses that an example prints, one line per step."""
    found = [(int(step), float(loss)) for step, loss in re.findall(r"step (\d+) loss (\S+)", printed)]
    assert [step for step, _ in found] == list(range(1, len(found) + 1)), printed
    return [loss for _, loss in found]
