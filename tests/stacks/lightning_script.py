"""A script for two ranks: Lightning's Trainer with DDP or FSDP2, then again from its checkpoint; writes the losses."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from shampoo_deepspeed.state.unwrap import unwrap
from tests.stacks.losses import Losses
from tests.support.snippets import run_stack_block
from tests.support.stack_runs import STEPS, batches
from tests.support.trainings import make_model


def own_part() -> list[dict[str, Any]]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    return [{key: rows[rank::ranks] for key, rows in batch.items()} for batch in batches()]


def fit(strategy: str, folder: Path, **given: Any) -> tuple[Losses, Any]:
    Module = run_stack_block("lightning")["Module"]

    class Sharded(Module):  # type: ignore[misc, valid-type]
        def configure_model(self) -> None:
            fully_shard(self.model, mesh=self.device_mesh["data_parallel"])

    module = (Sharded if strategy == "fsdp2" else Module)(make_model("llama"))
    seen, saving = Losses(), ModelCheckpoint(folder, every_n_train_steps=STEPS // 2, save_top_k=-1, filename="{step}")
    kind = ModelParallelStrategy(process_group_backend="gloo") if strategy == "fsdp2" else DDPStrategy()
    trainer = Trainer(
        max_steps=STEPS, accelerator="cpu", devices=2, strategy=kind, logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[seen, saving], default_root_dir=folder, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(own_part(), batch_size=None), **given)  # type: ignore[arg-type]
    return seen, unwrap(trainer.optimizers[0])


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for name in sys.argv[1].split(","):
        folder = Path(sys.argv[2]) / name
        whole, optimizer = fit(name, folder)
        rest, _ = fit(name, folder / "again", ckpt_path=str(folder / f"step={STEPS // 2}.ckpt"))
        found = {"losses": whole.losses, "resumed": rest.losses, "bytes": optimizer.comm_stats()["bytes_received"]}
        (Path(sys.argv[2]) / f"{name}-{dist.get_rank()}.json").write_text(json.dumps(found))
