"""Trains a causal language model sharded by FSDP2 (`fully_shard`) in a plain torch loop.

    torchrun --nproc_per_node gpu examples/fully_shard_loop.py --bf16            # every GPU of this machine
    OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 examples/fully_shard_loop.py   # two CPU ranks
    torchrun --nproc_per_node 8 examples/fully_shard_loop.py --model HuggingFaceTB/SmolLM2-135M --text_dir my_texts/

Shampoo is given the sharded parameters like any optimizer. At the first step they show it what each rank holds.
With --bf16 the layers compute in bfloat16 from float32 shards, and gradients are summed in float32.
"""

from __future__ import annotations

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import PreTrainedModel

from language_model import build_model
from shampoo_deepspeed import Shampoo
from torch_loop import Ranks, load_batches, parse, process_group, train


def shard(model: PreTrainedModel, ranks: Ranks, bf16: bool) -> None:
    """Shard each decoder layer, so that it is gathered separately when it computes, and the rest with the root."""
    mesh = init_device_mesh(ranks.device.type, (ranks.number,))
    policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32) if bf16 else MixedPrecisionPolicy()
    layers = [m for m in model.modules() if type(m).__name__ in (model._no_split_modules or ())]
    for module in (*layers, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)


def main() -> None:
    example, shampoo, loop = parse()
    with process_group(loop.use_cpu) as ranks:
        torch.manual_seed(loop.seed)
        tokenizer, batches = load_batches(example, loop, ranks)
        model = build_model(example, tokenizer).to(ranks.device)
        shard(model, ranks, loop.bf16)
        optimizer = Shampoo(model.named_parameters(), model=model, **loop.options(), **shampoo.options())
        train(model, optimizer, batches, loop, ranks)
        if loop.output_dir is not None:
            whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
            if ranks.rank == 0:
                model.save_pretrained(loop.output_dir, state_dict=whole)
                tokenizer.save_pretrained(loop.output_dir)


if __name__ == "__main__":
    main()
