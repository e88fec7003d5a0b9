"""Averaged weights in place of the weights, for evaluation and for saving a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from shampoo_deepspeed.distributed.frameworks import adapters
from shampoo_deepspeed.engine.weight_averages import use_averages, use_weights
from shampoo_deepspeed.state.copies import Copies


class Averages(Copies):
    """Part of a blockwise optimizer: which weights the model has, the optimizer's own or their averages."""

    @torch.inference_mode(False)
    @torch.no_grad()
    def use_averages(self) -> None:
        """Put the moving averages (option ``ema_decay``) into the model; call it on all ranks, between two steps.

        Meanwhile there is a second copy of the shards, and steps and saves raise RuntimeError. Parameters without an
        average keep their weights: those of groups whose ``ema_decay`` is 0, and all before the first step.

        Raises:
            RuntimeError: within a step, or if a loaded state cannot be taken before the first step.
        """
        self.refuse_in_step("use_averages()")
        if not any(group["ema_decay"] for group in self.param_groups):
            return
        self.finish_step()
        self.build_loaded()
        configs, before = self.configs(), self.averages_in_use
        self._announce_change()
        self.averages_in_use = bool(self.units)
        try:
            use_averages(self.units, configs)
        except BaseException:
            self.averages_in_use = before
            raise
        self._pass_weights_on()

    @torch.inference_mode(False)
    @torch.no_grad()
    def use_weights(self) -> None:
        """Put the weights back into the model, to the bit; call it on all ranks. Does nothing if they are there."""
        if self.averages_in_use:
            self._announce_change()
            for unit in self.units:
                use_weights(unit)
            self.averages_in_use = False
            self._pass_weights_on()

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """``with optimizer.averaged_weights(): evaluate(model)``: `use_averages`, and `use_weights` at its end."""
        already = self.averages_in_use
        try:
            self.use_averages()
            yield
        finally:
            if not already:
                self.use_weights()

    def _announce_change(self) -> None:
        for adapter in adapters():
            adapter.weights_will_change(self)

    def _pass_weights_on(self) -> None:
        for adapter in adapters():
            adapter.weights_changed(self)
