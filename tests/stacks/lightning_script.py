"""A script for two ranks: Lightning's Trainer with a strategy, then again from its checkpoint; writes the losses."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.utils.data import DataLoader

from shampoo_deepspeed.state.unwrap import unwrap
from tests.stacks.losses import Losses
from tests.support.snippets import run_stack_block
from tests.support.stack_runs import STEPS, batches
from tests.support.trainings import GLOBAL_BATCH, make_model

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # an inference kernel that takes a minute to compile


class ZeroOnCpu(DeepSpeedStrategy):
    """Lightning refuses DeepSpeed on CPUs, though DeepSpeed itself runs there."""

    def __init__(self, stage: int) -> None:
        config = {"zero_optimization": {"stage": stage}, "train_micro_batch_size_per_gpu": GLOBAL_BATCH // 2}
        if stage == 3:
            config["memory_efficient_linear"] = False
        super().__init__(config=config, process_group_backend="gloo")

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", 0)  # Lightning gives DeepSpeed the index

    def setup_environment(self) -> None:
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        self.set_world_ranks()  # there are no device indices to check
        self._init_deepspeed_distributed()


class ShardedOnCpu(FSDPStrategy):
    """FSDP1. Lightning refuses its own class on CPUs, though torch's FSDP runs there, and not a subclass of it."""

    def __init__(self) -> None:
        super().__init__(process_group_backend="gloo", state_dict_type="sharded")


STRATEGIES: dict[str, Callable[[], Any]] = {
    "ddp": DDPStrategy,
    "fsdp1": ShardedOnCpu,
    "fsdp2": lambda: ModelParallelStrategy(2, 1, process_group_backend="gloo"),  # else two ranks are tensor parallel
    "zero2": lambda: ZeroOnCpu(2),
    "zero3": lambda: ZeroOnCpu(3),
}


def own_part() -> list[dict[str, Any]]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    return [{key: rows[rank::ranks] for key, rows in batch.items()} for batch in batches()]


def fit(strategy: str, folder: Path, **given: Any) -> tuple[Losses, Trainer]:
    Module = run_stack_block("lightning")["Module"]

    class Sharded(Module):  # type: ignore[misc, valid-type]
        def configure_model(self: Any) -> None:
            if strategy == "fsdp2":
                fully_shard(self.model, mesh=self.device_mesh["data_parallel"])
            else:  # Lightning's own wrapping names no device, and torch then asks for an accelerator
                self.model = FullyShardedDataParallel(self.model, device_id=torch.device("cpu"), use_orig_params=True)

    module = (Sharded if strategy.startswith("fsdp") else Module)(make_model("llama"))
    seen, saving = Losses(), ModelCheckpoint(folder, every_n_train_steps=STEPS // 2, save_top_k=-1, filename="{step}")
    callbacks = [seen] if strategy == "fsdp1" else [seen, saving]
    trainer = Trainer(
        max_steps=STEPS, accelerator="cpu", devices=2, strategy=STRATEGIES[strategy](), logger=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=callbacks, default_root_dir=folder,
        use_distributed_sampler=False, enable_checkpointing=strategy != "fsdp1",
    )  # fmt: skip
    trainer.fit(module, DataLoader(own_part(), batch_size=None), **given)  # type: ignore[arg-type]
    return seen, trainer


def resumed(strategy: str, folder: Path, trainer: Trainer) -> dict[str, Any]:
    """The losses and rates of a second run, or why there is nothing to begin it from."""
    if strategy == "fsdp1":
        try:
            trainer.save_checkpoint(folder / "refused.ckpt")
        except RuntimeError as error:
            return {"refused": str(error)}
    rest, _ = fit(strategy, folder / "again", ckpt_path=str(folder / f"step={STEPS // 2}.ckpt"))
    return {"resumed": rest.losses, "resumed_rates": rest.rates}


def left_out(optimizer: Any) -> list[str]:
    """The matrices that are not preconditioned."""
    return sorted(
        entry.parameter.key
        for entry in optimizer.entries
        if len(entry.parameter.shape) == 2 and not optimizer.policies[entry.parameter.key].preconditioned
    )


if __name__ == "__main__":
    dist.init_process_group("gloo")
    name, out = sys.argv[1], Path(sys.argv[2])
    whole, trainer = fit(name, out / name)
    optimizer = unwrap(trainer.optimizers[0])
    found = {"losses": whole.losses, "rates": whole.rates, "left_out": left_out(optimizer)}
    found |= {"bytes": optimizer.comm_stats()["bytes_received"]} | resumed(name, out / name, trainer)
    (out / f"{name}-{dist.get_rank()}.json").write_text(json.dumps(found))
