"""Trains a causal language model sharded by FSDP2 (`fully_shard`) in a plain torch loop.

    torchrun --nproc_per_node gpu examples/fully_shard_loop.py --bf16            # every GPU of this machine
    OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 examples/fully_shard_loop.py   # two CPU ranks
    torchrun --nproc_per_node 8 examples/fully_shard_loop.py --model HuggingFaceTB/SmolLM2-135M --text_dir my_texts/

Shampoo takes the sharded parameters as any optimizer does; at the first step it reads from them what each rank holds.
With --bf16 the layers compute in bfloat16 from float32 shards, and gradients are summed in float32.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import HfArgumentParser, PreTrainedModel

from language_model import LanguageModelArguments, LoopArguments, ShampooArguments, batches, build_model, load_text
from process_group import mean_over_ranks, process_group
from shampoo_deepspeed import Shampoo


@dataclass
class FSDPArguments(LoopArguments):
    bf16: bool = field(default=False, metadata={"help": "Compute in bfloat16; weights stay float32"})


def main() -> None:
    parser = HfArgumentParser((LanguageModelArguments, ShampooArguments, FSDPArguments))
    example, shampoo, loop = parser.parse_args_into_dataclasses()
    with process_group(loop.use_cpu) as (device, rank, ranks):
        train(example, shampoo, loop, device, rank, ranks)


def shard(model: PreTrainedModel, device: torch.device, ranks: int, bf16: bool) -> None:
    """Each decoder layer is gathered by itself when it computes; the rest belongs to the root."""
    mesh = init_device_mesh(device.type, (ranks,))
    policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32) if bf16 else MixedPrecisionPolicy()
    layers = [m for m in model.modules() if type(m).__name__ in (model._no_split_modules or ())]
    for module in (*layers, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)


def train(
    example: LanguageModelArguments,
    shampoo: ShampooArguments,
    loop: FSDPArguments,
    device: torch.device,
    rank: int,
    ranks: int,
) -> None:
    torch.manual_seed(loop.seed)
    count = loop.max_steps * loop.per_device_train_batch_size * ranks
    tokenizer, rows = load_text(example, count, loop.seed)
    model = build_model(example, tokenizer).to(device)
    shard(model, device, ranks, loop.bf16)
    optimizer = Shampoo(
        model.named_parameters(),
        model=model,
        lr=loop.learning_rate,
        weight_decay=loop.weight_decay,
        no_decay=["*norm*", "*bias*"],
        **shampoo.options(),
    )
    for step, batch in enumerate(batches(rows.to(device), rank, ranks, loop.max_steps), start=1):
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), loop.max_grad_norm)
        optimizer.step()
        mean = mean_over_ranks(loss, ranks)
        if rank == 0:
            print(f"step {step} loss {mean:.6f}", flush=True)
    if loop.output_dir is not None:
        whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if rank == 0:
            model.save_pretrained(loop.output_dir, state_dict=whole)
            tokenizer.save_pretrained(loop.output_dir)


if __name__ == "__main__":
    main()
