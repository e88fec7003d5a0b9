"""The state as entries of parameters, for torch's checkpoint tools and those of frameworks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from shampoo_deepspeed.distributed.frameworks import adapters
from shampoo_deepspeed.engine.step_unit import as_count
from shampoo_deepspeed.state.dcp_state import blank_entry, external_entry, unit_entries, with_others
from shampoo_deepspeed.state.dtensor_blocks import on_cpu
from shampoo_deepspeed.state.units import UnitsOfOptimizer


class EntriesForTools(UnitsOfOptimizer):
    """Part of a blockwise optimizer: what tools that know entries of parameters alone get and give back."""

    def _entries_for_a_tool(self) -> dict[int, dict[str, Tensor]] | None:
        """The entries under ``state`` if a framework's checkpoint tool is asking for the state dict, else None."""
        answers = (adapter.state_entries(self) for adapter in adapters())
        return next((entries for entries in answers if entries is not None), None)

    def external_entries(
        self, external: bool, shape_of: Callable[[Tensor], tuple[int, ...]]
    ) -> dict[int, dict[str, Tensor]]:
        """Entries for `Adapter.state_entries` which hold a note in place of the state.

        Args:
            external: whether the state is saved in another place; otherwise there is none yet.
            shape_of: the shape that the tool can take for the note of a tensor.
        """
        entries = {}
        for tensor in (item.tensor for item in self._trained()):
            kept = self.state.get(tensor, {})
            entry = external_entry(tensor, kept.get("step", as_count(0)), external, shape_of(tensor))
            entries[id(tensor)] = with_others(entry, kept)
        return entries

    def gathered_entries(self) -> dict[int, dict[str, Tensor]]:
        """Entries for `Adapter.state_entries` that hold the state. A collective if parameters are sharded.

        They are on the CPU, so that no second copy of the state is on an accelerator: tools first ask for all of them,
        and only then move them.

        Raises:
            RuntimeError: for parameters whose state torch's helpers cannot carry.
        """
        self._build_missing([*self._trained(), *self._loaded_tensors()])
        if any(not unit.fresh for unit in self.units):
            self.state_keeper.refuse_one_rank(self.units)
        configs = self.configs()
        entries: dict[int, dict[str, Any]] = {}
        for unit in self.units:
            made = unit_entries(unit, configs, self.state_keeper.consolidated, self.rejected_steps)
            entries |= dict(zip(map(id, unit.tensors), made, strict=True))
        for tensor in (tensor for group in self.param_groups for tensor in group["params"]):
            kept = self.state.get(tensor, {})
            if id(tensor) in entries or set(kept) - {"step"}:
                others = {name: on_cpu(value) for name, value in kept.items()}
                entries[id(tensor)] = with_others(entries.get(id(tensor), blank_entry()), others)
        return entries

    def _numbered(self, entries: Mapping[int, Any]) -> dict[int, Any]:
        """Entries by number of the tensors, as in torch's state dicts."""
        tensors = (tensor for group in self.param_groups for tensor in group["params"])
        return {number: entries[id(tensor)] for number, tensor in enumerate(tensors) if id(tensor) in entries}

    def _with_left_out(self, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
        """A state dict with what a framework's checkpoint tool was given and has left out of it."""
        answers = (adapter.loaded_entries(self) for adapter in adapters())
        given = next((entries for entries in answers if entries is not None), None)
        if not given or "shampoo" in state_dict:
            return state_dict
        places = [place for group in state_dict["param_groups"] for place in group["params"]]
        tensors = [tensor for group in self.param_groups for tensor in group["params"]]
        found = {place: given[id(t)] for place, t in zip(places, tensors, strict=False) if id(t) in given}
        return {**state_dict, "state": {**state_dict["state"], **found}}


def refuse_own_keys(state_dict: Mapping[str, Any]) -> None:
    """Raise RuntimeError for entries that belong to no parameter, which torch's helpers cannot carry."""
    places = {place for group in state_dict["param_groups"] for place in group["params"]}
    strange = [key for key in state_dict["state"] if key not in places]
    if strange:
        raise RuntimeError(
            f"optimizer.state has an entry {strange[0]!r}, which is no parameter, and torch's checkpoint helpers can "
            "only carry entries of parameters; take it out and save it on its own, or save optimizer.state_dict()"
        )
