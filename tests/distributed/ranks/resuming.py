"""What a rank does in the resume checks: trains without interruption, and again with a save and a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel

from shampoo_deepspeed import load_shampoo, save_shampoo
from shampoo_deepspeed.options.parameter_names import clean_name
from tests.distributed.ranks.folders import shared_folder
from tests.distributed.ranks.fsdp import built, full, mesh_rank, sharded
from tests.support.fsdp_runs import Run
from tests.support.zoo import cast, make_batch, micro_batches

RESUMED = (2, 5)  # between refreshes; with frequency 3, in the middle of a window


def differing(run: Run) -> list[str]:
    """Return the names of parameters whose bits differ after a resumed training."""
    with shared_folder() as folder:
        whole, again = trained(run, None), trained(run, Path(folder))
    return [name for name in whole if not torch.equal(whole[name], again[name])]


def trained(run: Run, folder: Path | None) -> dict[str, Tensor]:
    """Train with two micro-batches per step, a falling learning rate, and new optimizers that load the state."""
    model, mesh = sharded(run)
    optimizer = built(model, run)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for step in range(run.steps):
        if folder is not None and step in RESUMED:
            save_shampoo(optimizer, folder)
            kept = scheduler.state_dict()
            optimizer = built(model, run)
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
            scheduler.load_state_dict(kept)
            load_shampoo(optimizer, folder)
        batch: dict[str, Any] = cast(make_batch(run.model, step), run.torch_dtype)
        optimizer.zero_grad()
        for piece in micro_batches(batch, mesh_rank(mesh), mesh.size(), 2):
            (model(**piece) / 2).backward()
        optimizer.step()
        scheduler.step()
    if run.fsdp1:
        with FullyShardedDataParallel.summon_full_params(model):
            return {clean_name(n): p.detach().clone() for n, p in model.named_parameters()}
    return {clean_name(n): full(p) for n, p in model.named_parameters()}
