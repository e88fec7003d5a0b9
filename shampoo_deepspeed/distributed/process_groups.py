"""Process groups on the CPU beside those of a job (for large objects, for the thread that writes), and how they end."""

from __future__ import annotations

import atexit
import functools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

Groups = dict[dist.ProcessGroup, dist.ProcessGroup]

EXIT_SECONDS = 0.1

# By the group beside which they were made.
_FOR_OBJECTS: Groups = {}
_FOR_THREAD: Groups = {}
# By their ranks.
_OF_RANKS: dict[tuple[int, ...], dist.ProcessGroup] = {}


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
    _drop_stale(_FOR_OBJECTS)
    if group not in _FOR_OBJECTS:
        ranks = dist.get_process_group_ranks(group)
        # Where all ranks take part they count alike. Else torch names the group by how many groups a rank is in, and
        # ranks that are in different numbers of others would wait for one another for ever.
        some = len(ranks) < dist.get_world_size()
        made = dist.new_group(ranks, backend="gloo", use_local_synchronization=some)
        assert made is not None
        _FOR_OBJECTS[group] = made
    return _FOR_OBJECTS[group]


def thread_group(world: dist.ProcessGroup) -> dist.ProcessGroup:
    """A group of all ranks for the thread that writes, as two threads must not share one."""
    _drop_stale(_FOR_THREAD)
    if world not in _FOR_THREAD:
        made = dist.new_group(backend="gloo")
        assert made is not None
        _FOR_THREAD[world] = made
    return _FOR_THREAD[world]


def group_of_ranks(ranks: Sequence[int]) -> dist.ProcessGroup:
    """A group of these ranks, made once in a job. Only these ranks take part."""
    key = tuple(ranks)
    if key in _OF_RANKS and not exists(_OF_RANKS[key]):  # of a job that has ended
        del _OF_RANKS[key]
    if key not in _OF_RANKS:
        with _without_splitting():
            made = dist.new_group(list(key), use_local_synchronization=True)
        assert made is not None
        _OF_RANKS[key] = made
    return _OF_RANKS[key]


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


def _drop_stale(groups: Groups) -> None:
    """Forget groups of a job that was ended by ``destroy_process_group``; the next one makes its own."""
    for stale in [group for group, made in groups.items() if not (exists(group) and exists(made))]:
        del groups[stale]


@functools.cache
def delay_exit_for_gloo() -> None:
    """Makes this process wait a moment at its exit, which the threads of gloo groups, the framework's too, need.

    They take the interpreter's lock to let go of a finished collective's tensors. One that still waits for it when the
    interpreter ends aborts the process ("terminate called without an active exception"), however well all went; and
    ``destroy_process_group()`` ends no thread of a group that a model or a device mesh still holds (torch 2.13).
    """
    atexit.register(time.sleep, EXIT_SECONDS)


@atexit.register
def _release() -> None:
    """A gloo group has threads, which must not outlive the interpreter. The thread that writes was joined before."""
    _FOR_OBJECTS.clear()
    _FOR_THREAD.clear()
    _OF_RANKS.clear()
