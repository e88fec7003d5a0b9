"""Collectives of integers, Python objects and errors: what one rank raises, all of them raise.

If the group is None, this process is alone: nothing is sent, and errors stay as they are.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist

from shampoo_deepspeed.distributed.process_groups import cpu_group, thread_group
from shampoo_deepspeed.runtime.devices import communication_device, current_device

T = TypeVar("T")
Answer = TypeVar("Answer")
# A type of errors that all ranks can build, and the message.
SentError = tuple[type[Exception], str]

CPU = torch.device("cpu")


def job_group(in_a_thread: bool = False) -> dist.ProcessGroup | None:
    """A group of all ranks of the job for objects, None for a single process. A collective.

    Args:
        in_a_thread: for the thread that writes checkpoints.
    """
    if not dist.is_initialized():
        return None
    world = dist.group.WORLD
    assert world is not None
    return thread_group() if in_a_thread else cpu_group(world)


def all_gather_objects(mine: T, group: dist.ProcessGroup | None, device: torch.device = CPU) -> list[T]:
    """The objects of all ranks of a group, on all of them, in the order of ranks. A collective, for small objects.

    Args:
        device: this rank's device, if the group moves objects through an accelerator.
    """
    if group is None:
        return [mine]
    objects: list[T | None] = [None] * dist.get_world_size(group)
    with current_device(device):
        dist.all_gather_object(objects, mine, group=group)
    return objects  # type: ignore[return-value]


def all_gather_numbers(
    mine: Sequence[int], group: dist.ProcessGroup | None, device: torch.device = CPU
) -> list[list[int]]:
    """The integers of all ranks of a group, on all of them, in the order of ranks. A collective.

    For what many ranks send: it costs 8 bytes for each number, and no object is pickled.

    Args:
        mine: at least one number; ranks may have different counts.
        device: as for `all_gather_objects`.
    """
    if group is None:
        return [list(mine)]
    ranks, wire = dist.get_world_size(group), communication_device(group, device)
    longest = torch.tensor([len(mine)], device=wire)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX, group=group)
    width = int(longest) + 1
    row = torch.tensor([len(mine), *mine, *[0] * (width - 1 - len(mine))], device=wire)
    rows = torch.empty(ranks * width, dtype=row.dtype, device=wire)
    dist.all_gather_into_tensor(rows, row, group=group)
    return [numbers[1 : 1 + numbers[0]] for numbers in rows.view(ranks, width).tolist()]


def all_reduce_maxima(mine: Sequence[int], group: dist.ProcessGroup | None, device: torch.device = CPU) -> list[int]:
    """The largest integer of all ranks of a group at each place. A collective, whose cost does not grow with ranks.

    Args:
        mine: as many on each rank.
        device: as for `all_gather_objects`.
    """
    if group is None or not mine:
        return list(mine)
    numbers = torch.tensor(list(mine), device=communication_device(group, device))
    dist.all_reduce(numbers, op=dist.ReduceOp.MAX, group=group)
    return numbers.tolist()


def object_of_rank(rank: int, mine: T, group: dist.ProcessGroup | None, device: torch.device = CPU) -> T:
    """The object of one rank of a group, on all of them. A collective.

    Args:
        rank: its number in the group.
        mine: this rank's object, which is sent only from that rank.
        device: as for `all_gather_objects`.
    """
    if group is None:
        return mine
    objects = [mine]
    with current_device(device):
        dist.broadcast_object_list(objects, src=dist.get_global_rank(group, rank), group=group)
    return objects[0]


def first_rank_that(mine: bool, group: dist.ProcessGroup | None, device: torch.device = CPU) -> int | None:
    """The lowest rank of a group that gives True, None if there is none; the same on all of them. A collective.

    One number is reduced, so it costs next to nothing on many ranks.

    Args:
        device: as for `all_gather_objects`.
    """
    if group is None:
        return 0 if mine else None
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    lowest = torch.tensor([rank if mine else ranks], device=communication_device(group, device))
    dist.all_reduce(lowest, op=dist.ReduceOp.MIN, group=group)
    return None if int(lowest) == ranks else int(lowest)


@contextmanager
def on_all_ranks(group: dist.ProcessGroup | None, device: torch.device = CPU) -> Iterator[None]:
    """Raise on all ranks the error of the first rank that fails within the context. A collective.

    Ranks must not wait for each other within the context. The error has the same type if it can be built from its
    message alone, else the nearest base class that can. On a rank that has failed itself, its own error is the cause.
    Anything that is not an ``Exception``, such as KeyboardInterrupt, is raised at once.

    Args:
        group: the ranks.
        device: as for `all_gather_objects`.
    """
    if group is None:
        yield
        return
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    failed = first_rank_that(error is not None, group, device)
    if failed is not None:
        _raise_first([object_of_rank(failed, _sent(error), group, device)], error)


def decide_on_first_rank(mine: T, decide: Callable[[Sequence[T]], Answer], group: dist.ProcessGroup | None) -> Answer:
    """What the first rank decides from the objects of all ranks, which only it receives. A collective.

    Args:
        mine: this rank's object.
        decide: called on the first rank only, with the objects in the order of ranks; all ranks raise what it raises.
        group: the ranks.
    """
    if group is None:
        return decide([mine])
    first = dist.get_global_rank(group, 0)
    objects: list[T] | None = [mine] * dist.get_world_size(group) if dist.get_rank(group) == 0 else None
    dist.gather_object(mine, objects, dst=first, group=group)
    answer, error = None, None
    if objects is not None:
        try:
            answer = decide(objects)
        except Exception as caught:
            error = caught
    sent: list[tuple[Answer | None, SentError | None]] = [(answer, _sent(error))]
    dist.broadcast_object_list(sent, src=first, group=group)
    answer, failure = sent[0]
    _raise_first([failure], error)
    return answer  # type: ignore[return-value]


def gather_on_first_rank(mine: T, group: dist.ProcessGroup | None) -> list[T] | None:
    """The objects of all ranks of a group, in the order of ranks, on the first one; None on the others. A collective.

    They may be large, so a CPU group of the same ranks moves them, not an accelerator's group.
    """
    if group is None:
        return [mine]
    objects: list[T] | None = [mine] * dist.get_world_size(group) if dist.get_rank(group) == 0 else None
    dist.gather_object(mine, objects, dst=dist.get_global_rank(group, 0), group=cpu_group(group))
    return objects


def _raise_first(errors: Sequence[SentError | None], own: Exception | None) -> None:
    """Raise the first of the ranks' errors, if there is one."""
    for found in errors:
        if found is not None:
            kind, message = found
            raise kind(message) from own


def _sent(error: Exception | None) -> SentError | None:
    """An error in the form that is sent to other ranks."""
    if error is None:
        return None
    message = str(error) or repr(error)
    kinds = (kind for kind in type(error).__mro__ if issubclass(kind, Exception) and _built(kind, message))
    return next(kinds, RuntimeError), message


def _built(kind: type[Exception], message: str) -> bool:
    """Whether another rank can build such an error from its message alone, with the same text."""
    try:
        return str(pickle.loads(pickle.dumps(kind))(message)) == message
    except Exception:
        return False
