"""State dicts of an optimizer: what is saved in them, and how a loaded one is checked and taken over."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from shampoo_deepspeed.distributed.frameworks import Entry, Parameter, adapters
from shampoo_deepspeed.engine.policy import policy_of
from shampoo_deepspeed.engine.step_unit import as_count
from shampoo_deepspeed.options.checks import plain
from shampoo_deepspeed.options.config import OPTION_NAMES, ShampooConfig, replaced_options
from shampoo_deepspeed.state.dcp_state import (
    TorchState,
    completed_group,
    is_torch_state,
    others_state,
    robust_group,
    with_own_formats,
)
from shampoo_deepspeed.state.dtensor_blocks import is_dtensor
from shampoo_deepspeed.state.state_dict import START_ANEW, SavedState, lacking
from shampoo_deepspeed.state.tool_entries import EntriesForTools, refuse_own_keys

logger = logging.getLogger("shampoo_deepspeed")


class StateDicts(EntriesForTools):
    """Part of a blockwise optimizer: `state_dict` and `load_state_dict`, by hooks that run among those of users."""

    def state_dict(self) -> dict[str, Any]:
        """torch's state dict, with this rank's block and element-wise state under ``"shampoo"``.

        Runs no collective and holds tensors and builtins only. Tensors are the live ones.

        Torch's own checkpoint tools call it on all ranks. They get copies under ``"state"`` (see ``dcp_state``), for
        which ranks exchange parts of blocks.

        Raises:
            RuntimeError: if ranks own different blocks, the framework stores one rank's dict only (replicas), and
                ``consolidate_state_dict`` was not called since the last step; or if a tool calls it that cannot carry
                this state.
        """
        self.refuse_now("state_dict()")
        # Torch calls this hook first of all that are registered, so that those of users see the whole state dict.
        handle = self.register_state_dict_post_hook(lambda _, made: self._add_own_state(made), prepend=True)
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def _add_own_state(self, state_dict: dict[str, Any]) -> None:
        """Complete the state dict that torch has made; users' hooks may have changed the state just before."""
        self.finish_step()
        groups = [{key: plain(value) for key, value in group.items()} for group in state_dict["param_groups"]]
        state_dict["param_groups"] = groups
        entries = self._entries_for_a_tool()
        if entries is not None:
            refuse_own_keys(state_dict)
            state_dict["state"] = self._numbered(entries)
            state_dict["param_groups"] = [robust_group(group) for group in groups]
            return
        if not self.state_is_external:
            self.take_waiting()
        state_dict["shampoo"] = self.state_keeper.state_to_save(self.units, self.rejected_steps).to_dict()

    @contextmanager
    def with_external_state(self, where: Mapping[str, Any]) -> Iterator[None]:
        """Let ``state_dict()`` hold the options, the steps, and ``where`` (builtins) in place of the state.

        For frameworks whose own checkpoint keeps the state dict, while ``save_shampoo`` has written the state. A state
        dict from which a framework has stripped all but the options can be loaded within this context too; then call
        ``load_shampoo``.
        """
        before, self.state_keeper.saved_as = self.state_keeper.saved_as, where
        # Torch's tools treat an empty state as that of an optimizer before its first step, and would create one.
        empty = [t for group in self.param_groups for t in group["params"] if t.requires_grad] if not self.state else []
        self.state.update((tensor, {"step": as_count(0)}) for tensor in empty)
        try:
            yield
        finally:
            self.state_keeper.saved_as = before
            if empty and not self.units and self.state_keeper.waiting is None:
                self._forget_steps()

    @property
    def state_is_external(self) -> bool:
        """Whether ``state_dict()`` holds a note of where the state is instead of the state."""
        return self.state_keeper.note is not None

    def consolidate_state_dict(self) -> None:
        """Gather the state of all ranks that share parameters, for the next ``state_dict()``; call it on all ranks.

        As in torch's ZeroRedundancyOptimizer: the first rank of each group then has all of it, to be saved. The copy
        is on the CPU and is dropped at the next step.
        """
        self.finish_step()
        self.take_waiting()
        self.state_keeper.consolidate(self.units, self.rejected_steps)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load options and state; blocks go to their owners at the next step.

        A warning names each option that was given otherwise here, except those that schedules change. Parameters that
        had no gradient when the state was saved start with new state. What others keep in ``optimizer.state`` is loaded
        as torch does it.

        Raises:
            ValueError: if this is not a Shampoo state dict, or does not fit the parameters. For parameters that have
                not stepped yet, the next step raises it.
        """
        self.refuse_now("load_state_dict()")
        numbers = [group["shampoo_group"] for group in self.param_groups]
        loaded: list[SavedState | TorchState] = []

        def take_apart(_: torch.optim.Optimizer, found: Mapping[str, Any]) -> dict[str, Any]:
            state, of_torch = _taken_apart(self._with_left_out(found), self)
            loaded.append(state)
            return of_torch

        # Of all hooks, torch calls the first one last and the other first: those of users see a whole state dict, which
        # they may replace, and then the loaded state.
        handles = [
            self.register_load_state_dict_pre_hook(take_apart),
            self.register_load_state_dict_post_hook(lambda _: self._take_loaded(loaded[-1], numbers), prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)  # type: ignore[arg-type]
        finally:
            for handle in handles:
                handle.remove()

    def _take_loaded(self, loaded: SavedState | TorchState, numbers: Sequence[int]) -> None:
        """Continue from a state whose other part torch has loaded.

        Args:
            numbers: of the groups, which torch has overwritten.
        """
        if not self.units:  # accelerate loads an empty state while it prepares an optimizer
            given = [tensor for group in self.param_groups for tensor in group["params"]]
            for model in (adapter.model_under_construction({}, given) for adapter in adapters()):
                if model is not None:
                    self.attach_model(model)
        self._release_units()
        for group, number in zip(self.param_groups, numbers, strict=True):
            group["shampoo_group"] = number
        before = {number: checked.config for number, checked in self.registry.checked.items()}
        self.configs()
        self._show_other_options(before)
        self.take_state(loaded)
        if self._divided():
            self.take_waiting()  # torch's helpers load on all ranks together, but one rank alone may save later
        if self.external_state is not None and self.state_keeper.saved_as is None:  # else the caller knows where it is
            for adapter in adapters():
                adapter.note_load(self)

    def _show_other_options(self, given: Mapping[int, ShampooConfig]) -> None:
        """Warn of options that a loaded state dict has replaced, except those that schedules change.

        Args:
            given: the options from before the load, by the groups' numbers.
        """
        for number, before in given.items():
            changed = replaced_options(before, self.registry.checked[number].config)
            if changed:
                logger.warning("group %s now uses the loaded state dict's %s", number, changed)

    def _divided(self) -> bool:
        """Whether the state of some parameter may be divided among ranks."""
        tensors = (tensor for group in self.param_groups for tensor in group["params"])
        return self.registry.replicas is not None or any(map(is_dtensor, tensors))

    def groups_apart(self, numbers: Sequence[int]) -> None:
        """Restore the numbers and the last seen options of groups that a framework has overwritten."""
        for group, number in zip(self.param_groups, numbers, strict=True):
            config = self.registry.checked[number].config
            group.update({name: getattr(config, name) for name in OPTION_NAMES}, shampoo_group=number)


def _taken_apart(
    state_dict: Mapping[str, Any], optimizer: StateDicts
) -> tuple[SavedState | TorchState, dict[str, Any]]:
    """Split a loaded state dict into Shampoo's part, after checking that it fits the optimizer, and torch's part.

    Raises:
        ValueError: if this is not a Shampoo state dict, or does not fit.
    """
    if "shampoo" not in state_dict and (optimizer.state_keeper.saved_as is not None or is_torch_state(state_dict)):
        torch_state = TorchState({}, optimizer.state_keeper.saved_as)
        groups = [completed_group(group) for group in state_dict["param_groups"]]
        if is_torch_state(state_dict):
            keys = optimizer.registry.keys_by_group(optimizer.param_groups)
            numbers = [group["shampoo_group"] for group in optimizer.param_groups]
            torch_state = TorchState.parse(state_dict, [keys[number] for number in numbers], numbers)
            groups = [with_own_formats(g, own) for g, own in zip(groups, optimizer.param_groups, strict=True)]
        _checked_options(groups, optimizer)
        return torch_state, {**state_dict, "state": others_state(state_dict), "param_groups": groups}
    if "shampoo" not in state_dict and os.environ.get(START_ANEW) == "1":
        logger.warning(
            "the loaded state dict is not Shampoo's: starting with new state and options (%s = 1)", START_ANEW
        )
        own = torch.optim.Optimizer.state_dict(optimizer)["param_groups"]
        return SavedState(), {"state": {}, "param_groups": own}
    saved = SavedState.parse(state_dict)
    rest = {key: value for key, value in state_dict.items() if key != "shampoo"}
    configs = _checked_options(state_dict["param_groups"], optimizer)
    if saved.external is not None:
        return saved, {**rest, "state": _without_placeholders(state_dict["state"])}
    _check_parameters(saved, optimizer.entries)
    if len(configs) == len(optimizer.param_groups):
        _check_units(saved, optimizer, configs)
    return saved, rest


def _checked_options(groups: Sequence[Mapping[str, Any]], optimizer: StateDicts) -> list[ShampooConfig]:
    """The options of loaded groups; torch itself refuses another number of these than here.

    Raises:
        OptionError: if they are not allowed, or not for the parameters here.
    """
    configs = [ShampooConfig.from_saved({n: g[n] for n in OPTION_NAMES if n in g}) for g in groups]
    for group, config in zip(optimizer.param_groups, configs, strict=False):
        optimizer.registry.refuse_dtypes(group["shampoo_group"], config)
    return configs


def _check_parameters(saved: SavedState, entries: Sequence[Entry]) -> None:
    """Raise ValueError if a saved state has parameters that the optimizer does not have."""
    strange = set(saved.steps) - {entry.parameter.key for entry in entries}
    if strange:
        raise ValueError(
            f"the saved state belongs to other parameters: {', '.join(sorted(strange)[:5])}"
            f"{', ...' if len(strange) > 5 else ''} are not here; build the optimizer with the same names"
        )


def _check_units(saved: SavedState, optimizer: StateDicts, configs: Sequence[ShampooConfig]) -> None:
    """Raise ValueError early for units that these options do not change and that need no other rank.

    For the others, the next step checks on all ranks together.
    """
    after = {group["shampoo_group"]: config for group, config in zip(optimizer.param_groups, configs, strict=True)}
    before = {number: checked.config for number, checked in optimizer.registry.checked.items()}
    for unit in optimizer.units:
        if unit.group is not None or any(_reshaped(p, before[p.group], after[p.group]) for p in unit.parameters):
            continue
        saved.check_fits(unit)
        missing = saved.missing(unit)
        if missing:
            raise ValueError(lacking(missing[0]))


def _reshaped(parameter: Parameter, before: ShampooConfig, after: ShampooConfig) -> bool:
    """Whether a parameter's blocks or state differ between two sets of options."""
    patterns = {"exclude": None, "no_decay": None, "rules": None}  # only their effect counts
    same = {**before.shape_of_state(), **patterns} == {**after.shape_of_state(), **patterns}
    return not same or policy_of(parameter, before) != policy_of(parameter, after)


def _without_placeholders(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """torch's ``"state"`` without the tensors of one repeated element that DeepSpeed's converter demands of a save."""
    return {
        place: {n: v for n, v in kept.items() if not _is_repeated(v)} if isinstance(kept, Mapping) else kept
        for place, kept in state.items()
    }


def _is_repeated(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() > 1 and not any(value.stride())
