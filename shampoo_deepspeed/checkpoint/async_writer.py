"""The thread that writes asynchronous saves, and the calls that raise their failures."""

from __future__ import annotations

import atexit
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from weakref import WeakKeyDictionary

import torch.distributed as dist

from shampoo_deepspeed.checkpoint.errors import CheckpointError, printable
from shampoo_deepspeed.distributed.process_groups import exists
from shampoo_deepspeed.state.stateful_optimizer import BlockOptimizer

logger = logging.getLogger("shampoo_deepspeed")


_PENDING = Future[None]()._state


def _new_thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="shampoo-save")


@dataclass
class AsyncWriter:
    """One thread, which writes one save after the other.

    Args:
        thread: the thread.
        unfinished: saves that may still be running, or whose failure no call has raised yet.
        last: each optimizer's last save.
    """

    thread: ThreadPoolExecutor = field(default_factory=_new_thread)
    unfinished: list[Future[None]] = field(default_factory=list)
    last: WeakKeyDictionary[BlockOptimizer, Future[None]] = field(default_factory=WeakKeyDictionary)

    def after_fork(self) -> None:
        """In a forked process, which has none of its parent's threads: saves that were under way are the parent's.

        Their futures raise here, and nobody waits for them.
        """
        for future in self.unfinished:
            future._condition = threading.Condition()  # which the parent's thread may have held at the fork
            if not future.done():
                future._state = _PENDING
                future.set_exception(CheckpointError("the process that this one was forked from writes this save"))
        self.thread = _new_thread()
        self.forget()

    def submit(
        self, optimizer: BlockOptimizer, path: Path, write: Callable[[], None], group: dist.ProcessGroup | None
    ) -> Future[None]:
        """Let the thread write a checkpoint of an optimizer; ``group`` is the one over which it does so."""
        future = self.last[optimizer] = self.thread.submit(_write, path, write, group)
        self.unfinished.append(future)
        return future

    def wait(self, optimizer: BlockOptimizer) -> None:
        """Wait until nothing is being written, because another optimizer may save into the same folder.

        Raises:
            CheckpointError: if the last save of this optimizer has failed; those of others raise theirs.
        """
        wait(self.unfinished)
        mine = self.last.pop(optimizer, None)
        self.unfinished = [future for future in self.unfinished if future is not mine and _failed(future)]
        if mine is not None:
            mine.result()

    def wait_for_all(self) -> None:
        """Wait until nothing is being written.

        Raises:
            CheckpointError: the first failure that no call has raised yet.
        """
        wait(self.unfinished)
        failed = [future for future in self.unfinished if _failed(future)]
        self.forget()
        if failed:
            failed[0].result()

    def forget(self) -> None:
        """Forget all saves and their failures, which keep other objects alive."""
        self.unfinished.clear()
        self.last.clear()


def wait_for_saves() -> None:
    """Wait until no asynchronous save of this process is under way; call it before ``dist.destroy_process_group()``.

    Raises:
        CheckpointError: the first failure of a save, of any optimizer, that no other call has raised yet; it names the
            save's path. The log names further failures.
    """
    WRITER.wait_for_all()


def _failed(future: Future[None]) -> bool:
    return future.cancelled() or future.exception() is not None


def _write(path: Path, write: Callable[[], None], group: dist.ProcessGroup | None) -> None:
    """Write, and log a failure; if the job has ended too early, the error says what the script should do."""
    try:
        write()
    except CheckpointError as error:
        failure = error
        if group is not None and not exists(group):
            failure = CheckpointError(
                f"{path} is not complete: its process group was destroyed while a thread wrote it ({error}). Call "
                "shampoo_deepspeed.wait_for_saves(), or result() of the future, on all ranks before "
                "destroy_process_group()"
            )
        logger.error("the asynchronous save into %s has failed: %s", printable(str(path)), failure)
        raise failure from error


WRITER = AsyncWriter()
atexit.register(WRITER.forget)  # the thread has been joined then; a failure keeps the process group alive
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=WRITER.after_fork)
