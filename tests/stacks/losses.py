"""A callback of Lightning's that keeps each batch's loss and rate."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import Callback


class Losses(Callback):
    """The loss and the learning rate of each batch."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.rates: list[float] = []

    def on_train_batch_end(self, trainer: Any, _: Any, outputs: Any, *__: Any) -> None:
        self.losses.append(outputs["loss"].item())
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
