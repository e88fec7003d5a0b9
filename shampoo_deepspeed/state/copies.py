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
from shampoo_deepspeed.state.units import StateKeeper


class Copies(StateDicts):
    """Part of a blockwise optimizer: what a copy holds, and how it begins."""

    def __getstate__(self) -> dict[str, Any]:
        if any(unit.group is not None for unit in self.units):
            raise RuntimeError("this optimizer cannot be copied: its state is divided among ranks; use state_dict()")
        self.refuse_now("a copy")
        self.finish_step()
        base, note = super().__getstate__(), self.external_state
        if note is None:
            self.take_waiting()
        own = self.state_keeper.state_of(self.units, self.rejected_steps)
        state = own if note is None else SavedState(external=note)
        return {**base, "shampoo": state.to_dict(), "entries": self._entries_by_place()}

    def _entries_by_place(self) -> list[tuple[dict[str, Any], int]]:
        """Each parameter, and the place of its tensor among those of all groups; those in no group are left out.

        Raises:
            RuntimeError: if a framework has put others in their place.
        """
        tensors = [tensor for group in self.param_groups for tensor in group["params"]]
        places = {id(tensor): place for place, tensor in enumerate(tensors)}
        found = [(asdict(e.parameter), places[n]) for e in self.entries if (n := id(e.reference())) in places]
        if sorted(place for _, place in found) != list(range(len(tensors))):
            raise RuntimeError(
                "this optimizer cannot be copied while a framework has replaced its parameters by flat shards"
            )
        return found

    def __setstate__(self, state: dict[str, Any]) -> None:
        saved, parameters = state.pop("shampoo", None), state.pop("entries", None)
        super().__setstate__(state)
        for group in (self.defaults, *self.param_groups):  # which may be older than an option
            for name, value in group_options(ShampooConfig.from_saved({})).items():
                group.setdefault(name, value)
        if parameters is None:
            return
        tensors = [tensor for group in self.param_groups for tensor in group["params"]]
        self.registry, self._warned = ParameterRegistry(None), False
        self.registry.reported = True
        self.entries, self.policies = self.registry.entries, self.registry.policies
        self.entries += [Entry(Parameter(**p), weakref.ref(tensors[place])) for p, place in parameters]
        self._without_units()
        waiting = SavedState.parse({"shampoo": saved})
        self.state_keeper = StateKeeper()
        self.state_keeper.take(waiting)
        self.rejected_steps = waiting.rejected_steps
        self.configs()
