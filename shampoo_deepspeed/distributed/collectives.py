"""Words between all ranks of a job, about things that lie in one folder for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist

from shampoo_deepspeed.distributed.process_groups import cpu_group, thread_group


def everyone(in_a_thread: bool = False) -> dist.ProcessGroup | None:
    """A group of all ranks for objects, None for a single process. A collective.

    Args:
        in_a_thread: for the thread that writes.
    """
    if not dist.is_initialized():
        return None
    world = dist.group.WORLD
    assert world is not None
    return thread_group(world) if in_a_thread else cpu_group(world)


def gathered(mine: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """What all ranks say, on all ranks: for few words. A collective."""
    if group is None:
        return [mine]
    out: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(out, mine, group=group)
    return out


def decided(mine: Any, decide: Callable[[Sequence[Any]], Any], group: dist.ProcessGroup | None) -> Any:
    """What the first rank makes of all ranks' words; only it ever holds these. A collective.

    Args:
        decide: must not raise, as the others wait for its answer.
    """
    if group is None:
        return decide([mine])
    first = dist.get_global_rank(group, 0)
    words: list[Any] | None = [None] * dist.get_world_size(group) if dist.get_rank(group) == 0 else None
    dist.gather_object(mine, words, dst=first, group=group)
    answer = [None if words is None else decide(words)]
    dist.broadcast_object_list(answer, src=first, group=group)
    return answer[0]
