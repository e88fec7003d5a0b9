"""What a rank does in the checks of Transformers' own tensor parallelism: trains a model that is cut in part."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from shampoo_deepspeed import Shampoo
from tests.distributed.ranks.folders import shared_folder
from tests.support.plain_runs import steps_of, tiny


def trained(argument: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the full parameters after training, and which of them were plain tensors."""
    kind, options = argument
    with shared_folder() as folder:
        if dist.get_rank() == 0:
            tiny(kind).save_pretrained(folder)
        dist.barrier()
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, distributed_config=DistributedConfig(tp_size=dist.get_world_size())
        )
    optimizer = Shampoo(model.named_parameters(), model=model, **options)
    steps_of(model, optimizer)
    named = dict(model.named_parameters())
    full: dict[str, Tensor] = {n: (p.full_tensor() if hasattr(p, "full_tensor") else p) for n, p in named.items()}
    plain = [n for n, p in named.items() if not hasattr(p, "full_tensor")]
    return {"parameters": {n: p.detach().clone() for n, p in full.items()}, "plain": plain}
