"""Forks ranks from a process that has already imported all that checks need: the imports take seconds of each rank.

The server reads one JSON line for each rank from its input, answers with the rank's process id, and writes the exit
code of each into the rank's folder. It ends at the end of its input.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import pkgutil
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any


class ForkedRank:
    """A rank as its launch sees it, with the methods of `subprocess.Popen` that a launch uses."""

    def __init__(self, folder: Path, rank: int, environment: Mapping[str, str]) -> None:
        self._code = folder / f"exit.{rank}"
        process = server()
        assert process.stdin is not None and process.stdout is not None
        request = {"folder": str(folder), "rank": rank, "environment": dict(environment)}
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        self.pid = int(process.stdout.readline())

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        return int(self._code.read_text()) if self._code.exists() else None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self) -> None:
        while self.poll() is None:
            time.sleep(0.01)


@cache
def server() -> subprocess.Popen[str]:
    """The server of this process; it ends with it, as its input does."""
    command = [sys.executable, "-m", "tests.support.rank_server"]
    root = Path(__file__).parents[2]
    env = {**os.environ, "DS_ACCELERATOR": "cpu"}
    process = subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
    # Libraries may print while they are imported.
    assert process.stdout is not None and "ready\n" in process.stdout, "the server of ranks did not start"
    return process


def serve() -> dict[str, Any] | None:
    """Fork until the input ends. Gives in each child its request, and None in the server."""
    import_everything()
    print("ready", flush=True)
    running: dict[int, Path] = {}
    while True:
        asked, _, _ = select.select([sys.stdin], [], [], 0.02 if running else None)
        while running and (ended := os.waitpid(-1, os.WNOHANG))[0]:
            write_code(running.pop(ended[0]), os.waitstatus_to_exitcode(ended[1]))
        if not asked:
            continue
        line = sys.stdin.readline()
        if not line:
            return None
        request: dict[str, Any] = json.loads(line)
        pid = os.fork()
        if pid == 0:
            return request
        running[pid] = Path(request["folder"]) / f"exit.{request['rank']}"
        print(pid, flush=True)


def import_everything() -> None:
    ranks = importlib.import_module("tests.distributed.ranks")
    for module in pkgutil.iter_modules(ranks.__path__):
        importlib.import_module(f"{ranks.__name__}.{module.name}")
    gc.collect()
    gc.freeze()  # so that collections in ranks neither look at these objects nor copy their pages


def write_code(path: Path, code: int) -> None:
    temporary = path.with_suffix(f"{path.suffix}.tmp")
    temporary.write_text(str(code))
    temporary.rename(path)


def become_rank(request: Mapping[str, Any]) -> None:
    """Take the environment and the log of a rank."""
    os.environ.clear()
    os.environ.update(request["environment"])
    log = os.open(Path(request["folder"]) / f"rank{request['rank']}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)


if __name__ == "__main__":
    from tests.support.rank_main import main

    if request := serve():
        become_rank(request)
        main(Path(request["folder"]))
