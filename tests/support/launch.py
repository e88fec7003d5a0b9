"""Runs many named checks in one launch of ranks and returns what every rank returned, or why it failed.

A launch is a set of Python processes in one process group, forked from one that has imported everything. They work
through a list of checks and write one result file per check and rank. If a check fails only on some ranks, hangs, or
kills a rank, the others may wait in a collective forever. So the parent then ends that launch, reports that check, and
starts again with the rest.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.rank_server import ForkedRank

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 180.0  # importing torch and deepspeed on a loaded machine
AGREE_SECONDS = 5.0  # all ranks that fail for the same reason fail within this time


@dataclass(frozen=True)
class Check:
    """A function `module:name` in tests.distributed.ranks, called with `argument` on every rank of a launch."""

    name: str
    ranks: int
    function: str
    argument: Any = None
    seconds: float = 90.0


Ask = Callable[[Check], list[Any]]  # the fixture `ask`, which returns the values of all ranks


def named(value: object) -> str | None:
    """Return the id of a test that has a check among its parameters."""
    return value.name if isinstance(value, Check) else None


@dataclass
class CheckResult:
    """What the ranks returned, in rank order; `failure` says why the check failed, if it did."""

    values: list[Any] = field(default_factory=list)
    failure: str | None = None


@dataclass
class RankResult:
    """The content of a result file."""

    value: Any
    failure: str | None
    finished: float


def run_checks(checks: Sequence[Check], folder: Path, fork: bool = True) -> dict[str, CheckResult]:
    """Run the checks, all for the same number of ranks; a failing check neither raises an error nor hangs.

    With `fork=False` each rank imports everything itself.
    """
    results: dict[str, CheckResult] = {}
    attempt = 0
    while rest := [c for c in checks if c.name not in results]:
        attempt += 1
        launch = Launch(rest, folder / f"launch{attempt}")
        try:
            launch.start(fork)
            results.update(launch.collect())
            if not launch.ready():  # a new launch would fail in the same way
                results.update({c.name: results[rest[0].name] for c in rest})
        finally:
            launch.end()
    return results


class Launch:
    def __init__(self, checks: Sequence[Check], folder: Path) -> None:
        self.checks, self.folder, self.ranks = list(checks), folder, checks[0].ranks
        self.processes: list[subprocess.Popen[bytes] | ForkedRank] = []
        folder.mkdir(parents=True)
        (folder / "checks.pickle").write_bytes(pickle.dumps(self.checks))

    def start(self, fork: bool) -> None:
        port = free_port()
        for rank in range(self.ranks):
            env = os.environ | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(self.ranks),
                "LOCAL_WORLD_SIZE": str(self.ranks),
                "LOCAL_SIZE": str(self.ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "DS_ACCELERATOR": "cpu",
                "CUDA_VISIBLE_DEVICES": "",
                "OMP_NUM_THREADS": "1",
                "TORCH_EXTENSIONS_DIR": str(self.folder / "extensions"),
                "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            }
            if fork:
                self.processes.append(ForkedRank(self.folder, rank, env))
                continue
            with open(self.folder / f"rank{rank}.log", "wb") as log:
                command = [sys.executable, "-m", "tests.support.rank_main", str(self.folder)]
                self.processes.append(
                    subprocess.Popen(command, env=env, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
                )

    def collect(self) -> dict[str, CheckResult]:
        """Return the results up to the first check that ended the launch."""
        results: dict[str, CheckResult] = {}
        deadline = time.monotonic() + START_SECONDS
        for index, check in enumerate(self.checks):
            deadline = max(deadline, time.monotonic() + check.seconds)
            ended = self._wait(index, deadline)
            results[check.name] = self._result(index, ended)
            if ended:
                break
            deadline = 0.0
        return results

    def _wait(self, index: int, deadline: float) -> str | None:
        """Wait for a check; return why the launch cannot continue, or None."""
        while True:
            missing = [r for r in range(self.ranks) if not self.file(index, r).exists()]
            dead = [
                r for r, p in enumerate(self.processes) if p.poll() is not None and (r in missing or p.returncode != 0)
            ]
            if dead:
                time.sleep(0.5)  # so that other ranks can still report their errors
                return f"ranks {dead} ended with codes {[self.processes[r].returncode for r in dead]}"
            failures = {self.read(index, r).failure for r in range(self.ranks) if r not in missing}
            if not missing and len(failures) == 1:
                (self.folder / f"{index}.go").touch()  # the same failure on all ranks, so no rank waits for another
                return None
            if not missing:
                return "the ranks failed differently"
            if failures - {None}:
                deadline = min(deadline, time.monotonic() + AGREE_SECONDS)
            if time.monotonic() > deadline:
                self._dump_stacks(missing)
                return f"no result in time from ranks {missing}; their stacks are below"
            time.sleep(0.02)

    def _dump_stacks(self, ranks: Sequence[int]) -> None:
        for rank in ranks:
            self.processes[rank].send_signal(signal.SIGUSR1)  # faulthandler prints all threads into the log
        time.sleep(1.0)

    def _result(self, index: int, ended: str | None) -> CheckResult:
        found = {r: self.read(index, r) for r in range(self.ranks) if self.file(index, r).exists()}
        failures = sorted((x.finished, r, x.failure) for r, x in found.items() if x.failure is not None)
        if not failures and (ended is None or len(found) == self.ranks):
            return CheckResult([found[r].value for r in range(self.ranks)])
        lines = [f"rank {rank} failed:\n{text}" for _, rank, text in failures]
        if ended is not None:
            lines.append(ended)
            lines += [f"end of the log of rank {r}:\n{self._log(r)}" for r in range(self.ranks) if r not in found]
        return CheckResult(failure="\n".join(lines))

    def file(self, index: int, rank: int) -> Path:
        """Where a rank leaves the result of a check."""
        return self.folder / f"{index}.{rank}.pickle"

    def read(self, index: int, rank: int) -> RankResult:
        """A rank's result of a check, which must be there."""
        result: RankResult = pickle.loads(self.file(index, rank).read_bytes())
        return result

    def ready(self) -> bool:
        """Whether every rank has reached its first check."""
        return all((self.folder / f"ready.{r}").exists() for r in range(self.ranks))

    def _log(self, rank: int) -> str:
        return (self.folder / f"rank{rank}.log").read_text(errors="replace")[-4000:]

    def end(self) -> None:
        """Give finished ranks a moment to leave the process group, then kill the rest."""
        through = all(self.file(len(self.checks) - 1, r).exists() for r in range(self.ranks))
        deadline = time.monotonic() + (20.0 if through else 0.0)
        while time.monotonic() < deadline and any(p.poll() is None for p in self.processes):
            time.sleep(0.05)
        self.end_now()

    def end_now(self) -> None:
        """Kill all ranks."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
