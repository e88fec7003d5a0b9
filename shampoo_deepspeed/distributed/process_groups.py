"""Process groups in addition to a job's own: for large objects, for the thread that writes, and of given ranks."""

from __future__ import annotations

import atexit
import functools
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from shampoo_deepspeed.runtime.devices import communication_device

EXIT_SECONDS = 0.1


@dataclass
class JobState:
    """The groups that are made once in a job, between ``init_process_group`` and ``destroy_process_group``.

    Torch holds groups until they are destroyed. Nothing here keeps one alive after that, with its threads.

    Args:
        cpu_groups: CPU groups, by the group with the same ranks.
        thread_group: the group of the thread that writes.
        groups_of_ranks: groups by their ranks.
    """

    cpu_groups: WeakKeyDictionary[dist.ProcessGroup, weakref.ref[dist.ProcessGroup]] = field(
        default_factory=WeakKeyDictionary
    )
    thread_group: weakref.ref[dist.ProcessGroup] | None = None
    groups_of_ranks: WeakValueDictionary[tuple[int, ...], dist.ProcessGroup] = field(
        default_factory=WeakValueDictionary
    )


# At most one, by the job's default group: if that is another one, another job has begun.
_jobs: WeakKeyDictionary[dist.ProcessGroup, JobState] = WeakKeyDictionary()


def job_state() -> JobState:
    """The state of the present job."""
    world = _world()
    if world not in _jobs:
        _jobs.clear()
        _jobs[world] = JobState()
    return _jobs[world]


def _world() -> dist.ProcessGroup:
    """The job's default group."""
    world = dist.group.WORLD
    assert world is not None
    return world


def exists(group: dist.ProcessGroup) -> bool:
    """Whether a group has not been destroyed."""
    try:
        dist.get_process_group_ranks(group)
    except KeyError:
        return False
    return True


def cpu_group(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A CPU group of the same ranks, for large objects: an accelerator's group would move them through its memory."""
    if "cpu" in dist.get_backend_config(group):
        return group
    known = job_state().cpu_groups
    found = _alive(known.get(group))
    if found is None:
        ranks = dist.get_process_group_ranks(group)
        # If all ranks take part, they count groups alike. Otherwise torch must not name the group by the number of
        # groups that a rank is in: ranks with different numbers would wait for one another forever.
        some = len(ranks) < dist.get_world_size()
        found = dist.new_group(ranks, timeout_of(group), "gloo", use_local_synchronization=some)
        assert found is not None
        known[group] = weakref.ref(found)
    return found


def thread_group() -> dist.ProcessGroup:
    """A group of all ranks for the thread that writes, as two threads must not share one."""
    state = job_state()
    found = _alive(state.thread_group)
    if found is None:
        found = dist.new_group(timeout=timeout_of(_world()), backend="gloo")
        assert found is not None
        state.thread_group = weakref.ref(found)
    return found


def _alive(reference: weakref.ref[dist.ProcessGroup] | None) -> dist.ProcessGroup | None:
    """The group, None if there is none or if it was destroyed."""
    group = None if reference is None else reference()
    return group if group is not None and exists(group) else None


def group_of_ranks(ranks: Sequence[int], spanning: Sequence[dist.ProcessGroup] = ()) -> dist.ProcessGroup:
    """A group of these ranks, made once in a job. Only these ranks take part.

    Args:
        spanning: groups of a mesh of these ranks that this rank is in, one for each dim of the mesh.

    Raises:
        RuntimeError: on all ranks alike, if they would wait for one another forever.
    """
    known, key = job_state().groups_of_ranks, tuple(ranks)
    found = known.get(key)
    if found is None or not exists(found):
        _check_counts(ranks, spanning)
        with _without_splitting():
            found = dist.new_group(list(key), timeout_of(_world()), use_local_synchronization=True)
        assert found is not None
        known[key] = found
    return found


def _check_counts(ranks: Sequence[int], spanning: Sequence[dist.ProcessGroup]) -> None:
    """Raise if these ranks are in different numbers of groups: torch names a group that only they make by that number.

    Under two names each rank would wait for the others until the timeout. The largest and the smallest number travel
    along one dim of the mesh after the other, so that all ranks know those of all.
    """
    count = len(distributed_c10d._world.pg_names)
    numbers = torch.tensor([count, -count])
    for group in spanning:
        moved = numbers.to(communication_device(group, numbers.device))
        dist.all_reduce(moved, dist.ReduceOp.MAX, group=group)
        numbers = moved.cpu()
    most, least = numbers[0].item(), -numbers[1].item()
    if most != least:
        raise RuntimeError(
            f"ranks {list(ranks)} are in {least} to {most} process groups, so torch would give a group that they make "
            "now different names and wait forever; make process groups on all ranks alike before the first step"
        )


def timeout_of(group: dist.ProcessGroup) -> timedelta | None:
    """How long a group's collectives wait for a rank; None if its backend does not tell.

    torch gives a group that is made later its own default, half an hour, not that of the job.
    """
    known: Any = group  # there is no public way to ask
    options = getattr(known._get_backend(known._device_types[0]), "options", None)
    return getattr(options, "_timeout", None)


@contextmanager
def _without_splitting() -> Iterator[None]:
    """Let torch make a group with its own ranks alone, without ncclCommSplit.

    If the job's NCCL group is bound to a device (``init_process_group(device_id=...)``), torch makes other groups by
    splitting it. Then all ranks of the job must take part, even those outside of the new group.
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

    They take the interpreter's lock to release a finished collective's tensors. A thread that still waits for it when
    the interpreter ends aborts the process ("terminate called without an active exception"), even after a successful
    run. ``destroy_process_group()`` ends no thread of a group that a model or a device mesh still holds (torch 2.13).
    """
    atexit.register(time.sleep, EXIT_SECONDS)
