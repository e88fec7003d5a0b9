"""The plain torch loop of the examples: joins torchrun's processes and trains the model that an example has wrapped."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import HfArgumentParser, PreTrainedTokenizerBase

from language_model import LanguageModelArguments, LoopArguments, ShampooArguments, load_text


class Ranks(NamedTuple):
    """This process's device and rank, and the number of ranks."""

    device: torch.device
    rank: int
    number: int


def parse() -> tuple[LanguageModelArguments, ShampooArguments, LoopArguments]:
    """Parse the command line."""
    parser = HfArgumentParser((LanguageModelArguments, ShampooArguments, LoopArguments))
    example, shampoo, loop = parser.parse_args_into_dataclasses()
    return example, shampoo, loop


@contextmanager
def process_group(use_cpu: bool) -> Iterator[Ranks]:
    """Join the process group while the context lasts."""
    if "RANK" not in os.environ:
        raise SystemExit("start with a launcher, even on one device: torchrun --nproc_per_node 1 ...")
    device = torch.device("cpu")
    accelerator = None if use_cpu else torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        device = torch.device(accelerator.type, int(os.environ["LOCAL_RANK"]))
        torch.accelerator.set_device_index(device.index)
    dist.init_process_group(dist.get_default_backend_for_device(device))
    try:
        yield Ranks(device, dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def load_batches(
    example: LanguageModelArguments, loop: LoopArguments, ranks: Ranks
) -> tuple[PreTrainedTokenizerBase, list[Tensor]]:
    """Return the tokenizer, and this rank's part of each global batch, which is the same on any number of ranks."""
    count = loop.max_steps * loop.per_device_train_batch_size * ranks.number
    tokenizer, rows = load_text(example, count, loop.seed)
    return tokenizer, [batch.chunk(ranks.number)[ranks.rank] for batch in rows.to(ranks.device).chunk(loop.max_steps)]


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: list[Tensor],
    loop: LoopArguments,
    ranks: Ranks,
    autocast: bool = False,
) -> None:
    """Take one step per batch; the first rank prints the global batch's loss. `autocast` computes in bfloat16."""
    for step, batch in enumerate(batches, start=1):
        with torch.autocast(ranks.device.type, torch.bfloat16, enabled=autocast):
            loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), loop.max_grad_norm)
        optimizer.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        if ranks.rank == 0:
            print(f"step {step} loss {total.item() / ranks.number:.6f}", flush=True)
