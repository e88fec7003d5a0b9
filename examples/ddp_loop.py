"""Trains a causal language model with DistributedDataParallel in a plain torch loop.

    torchrun --nproc_per_node gpu examples/ddp_loop.py                           # every GPU of this machine
    OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 examples/ddp_loop.py           # two CPU ranks
    torchrun --nproc_per_node 8 examples/ddp_loop.py --model HuggingFaceTB/SmolLM2-135M --text_dir my_texts/ --bf16

Shampoo is given the wrapped model. It finds DDP's process group there and divides the blocks among its ranks. So each
rank keeps state and computes roots only for its share. Without `model=` every rank would do all of the work.
"""

from __future__ import annotations

import torch
from torch.nn.parallel import DistributedDataParallel

from language_model import build_model
from shampoo_deepspeed import Shampoo
from torch_loop import load_batches, parse, process_group, train


def main() -> None:
    example, shampoo, loop = parse()
    with process_group(loop.use_cpu) as ranks:
        torch.manual_seed(loop.seed)
        tokenizer, batches = load_batches(example, loop, ranks)
        model = DistributedDataParallel(build_model(example, tokenizer).to(ranks.device))
        optimizer = Shampoo(model.named_parameters(), model=model, **loop.options(), **shampoo.options())
        train(model, optimizer, batches, loop, ranks, autocast=loop.bf16)
        if loop.output_dir is not None and ranks.rank == 0:
            model.module.save_pretrained(loop.output_dir)
            tokenizer.save_pretrained(loop.output_dir)


if __name__ == "__main__":
    main()
