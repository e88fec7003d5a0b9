"""Runs a function on several ranks of this machine, joined by gloo, and returns their results."""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run_on_ranks(count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Run ``function(*arguments)`` on ``count`` ranks with one thread each, and return the results in rank order.

    Raises:
        RuntimeError: if a rank failed; its own error is on stderr.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        processes = [
            context.Process(target=_rank, args=(rank, count, port, folder, function, arguments))
            for rank in range(count)
        ]
        for process in processes:
            process.start()
        try:
            while any(p.is_alive() for p in processes):
                for process in processes:
                    process.join(0.1)
                if any(p.exitcode for p in processes):
                    break
        finally:
            for process in processes:
                process.kill() if any(p.exitcode for p in processes) else None
                process.join()
        codes = [p.exitcode for p in processes]
        if any(codes):
            raise RuntimeError(f"ranks ended with exit codes {codes}")
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(count)]


def _rank(rank: int, count: int, port: int, folder: str, function: Callable[..., Any], arguments: Any) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        result = function(*arguments)
        dist.barrier()
    finally:
        dist.destroy_process_group()
    torch.save(result, Path(folder) / f"{rank}.pt")


def free_port() -> int:
    """A port of this machine that nothing listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
