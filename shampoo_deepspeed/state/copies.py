"""Copies of an optimizer by ``copy.deepcopy`` and ``pickle``."""

from __future__ import annotations

import weakref
from dataclasses import asdict
from typing import Any

from shampoo_deepspeed.distributed.frameworks import Entry, Parameter
from shampoo_deepspeed.engine.parameter_registry import ParameterRegistry
from shampoo_deepspeed.options.config import ShampooConfig
from shampoo_deepspeed.options.param_groups import group_options
from shampoo_deepspeed.state.state_dict import SavedState
from shampoo_deepspeed.state.state_dict_hooks import StateDicts
from shampoo_deepspeed.state.units import StateKeeper, in_use


class Copies(StateDicts):
    """Part of a blockwise optimizer: what a copy holds, and how it begins."""

    def __getstate__(self) -> dict[str, Any]:
        if any(unit.group is not None for unit in self.units):
            raise RuntimeError("this optimizer cannot be copied: its state is divided among ranks; use state_dict()")
        if self.averages_in_use:
            raise in_use("a copy")
        self.finish_step()
        base, note = super().__getstate__(), self.external_state
        if note is None:
            self.take_waiting()
        own = self.state_keeper.state_of(self.units, self.rejected_steps)
        state = own if note is None else SavedState(external=note)
        return {**base, "shampoo": state.to_dict(), "entries": [asdict(e.parameter) for e in self.entries]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        saved, parameters = state.pop("shampoo", None), state.pop("entries", None)
        super().__setstate__(state)
        for group in (self.defaults, *self.param_groups):  # which may be older than an option
            for name, value in group_options(ShampooConfig.from_saved({})).items():
                group.setdefault(name, value)
        if parameters is None:
            return
        tensors = [tensor for group in self.param_groups for tensor in group["params"]]
        if len(tensors) != len(parameters):
            raise RuntimeError(
                "this optimizer cannot be copied while a framework has replaced its parameters by flat shards"
            )
        self.registry, self._warned = ParameterRegistry(None), False
        self.registry.reported = True
        self.entries, self.policies = self.registry.entries, self.registry.policies
        self.entries += [Entry(Parameter(**p), weakref.ref(t)) for p, t in zip(parameters, tensors, strict=True)]
        self._without_units()
        waiting = SavedState.parse({"shampoo": saved})
        self.state_keeper = StateKeeper()
        self.state_keeper.take(waiting)
        self.rejected_steps = waiting.rejected_steps
        self.configs()
