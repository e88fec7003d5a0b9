"""Process groups on the CPU, made next to those of a job: for large objects, and for the thread that writes."""

from __future__ import annotations

import atexit
import functools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

EXIT_SECONDS = 0.1


@dataclass
class JobState:
    """What is made once in a job, between ``init_process_group`` and ``destroy_process_group``.

    Args:
        world: the job's default group. Another one means another job, with which this state is dropped.
        cpu_groups: by the group whose ranks they have.
        thread_group: that of the thread that writes.
        groups_of_ranks: by their ranks.
    """

    world: dist.ProcessGroup
    cpu_groups: dict[dist.ProcessGroup, dist.ProcessGroup] = field(default_factory=dict)
    thread_group: dist.ProcessGroup | None = None
    groups_of_ranks: dict[tuple[int, ...], dist.ProcessGroup] = field(default_factory=dict)


_jobs: list[JobState] = []  # the present one, or the last one, or none so far


def job_state() -> JobState:
    """The state of the present job."""
    world = dist.group.WORLD
    assert world is not None
    if not _jobs or _jobs[0].world is not world:
        _jobs[:] = [JobState(world)]
    return _jobs[0]


def exists(group: dist.ProcessGroup) -> bool:
    """Whether a group has not been destroyed since it was made."""
    try:
        dist.get_process_group_ranks(group)
    except KeyError:
        return False
    return True


def cpu_group(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A group of the same ranks for large objects: an accelerator's group would move them through its memory."""
    if "cpu" in dist.get_backend_config(group):
        return group
    known = job_state().cpu_groups
    if group not in known:
        ranks = dist.get_process_group_ranks(group)
        # If all ranks take part they count alike. Else torch names the group by how many groups a rank is in, and
        # ranks that are in different numbers of others would wait for one another for ever.
        some = len(ranks) < dist.get_world_size()
        made = dist.new_group(ranks, backend="gloo", use_local_synchronization=some)
        assert made is not None
        known[group] = made
    return known[group]


def thread_group() -> dist.ProcessGroup:
    """A group of all ranks for the thread that writes, as two threads must not share one."""
    state = job_state()
    if state.thread_group is None:
        state.thread_group = dist.new_group(backend="gloo")
    assert state.thread_group is not None
    return state.thread_group


def group_of_ranks(ranks: Sequence[int]) -> dist.ProcessGroup:
    """A group of these ranks, made once in a job. Only these ranks take part."""
    known, key = job_state().groups_of_ranks, tuple(ranks)
    if key not in known:
        with _without_splitting():
            made = dist.new_group(list(key), use_local_synchronization=True)
        assert made is not None
        known[key] = made
    return known[key]


@contextmanager
def _without_splitting() -> Iterator[None]:
    """Within it torch makes a group of its own ranks alone.

    If the job's NCCL group is bound to a device (``init_process_group(device_id=...)``), torch makes other groups by
    splitting it, and all ranks of the job must take part, also those that have no such group.
    """
    world: Any = dist.group.WORLD
    bound = world.bound_device_id
    world.bound_device_id = None
    try:
        yield
    finally:
        world.bound_device_id = bound


@functools.cache
def delay_exit_for_gloo() -> None:
    """Sleep briefly when the interpreter exits, so that the threads of gloo groups can finish.

    They take the interpreter's lock to let go of a finished collective's tensors. One that still waits for it when the
    interpreter ends aborts the process ("terminate called without an active exception"), however well all went; and
    ``destroy_process_group()`` ends no thread of a group that a model or a device mesh still holds (torch 2.13).
    """
    atexit.register(time.sleep, EXIT_SECONDS)


# A gloo group has threads, which must not outlive the interpreter. The thread that writes was joined before.
atexit.register(_jobs.clear)
