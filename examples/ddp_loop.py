"""Trains a causal language model with DistributedDataParallel in a plain torch loop.

    torchrun --nproc_per_node gpu examples/ddp_loop.py                           # every GPU of this machine
    OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 examples/ddp_loop.py           # two CPU ranks
    torchrun --nproc_per_node 8 examples/ddp_loop.py --model HuggingFaceTB/SmolLM2-135M --text_dir my_texts/ --bf16

Shampoo is given the wrapped model: it finds DDP's process group there and divides the blocks among its ranks, so that
a rank keeps the state, and computes the roots, of its share only. Without `model=` every rank would do all of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import HfArgumentParser

from language_model import LanguageModelArguments, LoopArguments, ShampooArguments, batches, build_model, load_text
from process_group import mean_over_ranks, process_group
from shampoo_deepspeed import Shampoo


@dataclass
class DDPArguments(LoopArguments):
    bf16: bool = field(default=False, metadata={"help": "Compute in bfloat16 by autocast; weights stay float32"})


def main() -> None:
    parser = HfArgumentParser((LanguageModelArguments, ShampooArguments, DDPArguments))
    example, shampoo, loop = parser.parse_args_into_dataclasses()
    with process_group(loop.use_cpu) as (device, rank, ranks):
        train(example, shampoo, loop, device, rank, ranks)


def train(
    example: LanguageModelArguments,
    shampoo: ShampooArguments,
    loop: DDPArguments,
    device: torch.device,
    rank: int,
    ranks: int,
) -> None:
    torch.manual_seed(loop.seed)
    count = loop.max_steps * loop.per_device_train_batch_size * ranks
    tokenizer, rows = load_text(example, count, loop.seed)
    model = DistributedDataParallel(build_model(example, tokenizer).to(device))
    optimizer = Shampoo(
        model.named_parameters(),
        model=model,
        lr=loop.learning_rate,
        weight_decay=loop.weight_decay,
        no_decay=["*norm*", "*bias*"],
        **shampoo.options(),
    )
    for step, batch in enumerate(batches(rows.to(device), rank, ranks, loop.max_steps), start=1):
        with torch.autocast(device.type, torch.bfloat16, enabled=loop.bf16):
            loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), loop.max_grad_norm)
        optimizer.step()
        mean = mean_over_ranks(loss, ranks)
        if rank == 0:
            print(f"step {step} loss {mean:.6f}", flush=True)
    if loop.output_dir is not None and rank == 0:
        model.module.save_pretrained(loop.output_dir)
        tokenizer.save_pretrained(loop.output_dir)


if __name__ == "__main__":
    main()
