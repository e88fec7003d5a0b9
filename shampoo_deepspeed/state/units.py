"""The step units of an optimizer, and loaded state until they take it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from shampoo_deepspeed.distributed.frameworks import Entry, LayoutError, NewTensor, Parameter, adapters
from shampoo_deepspeed.engine.parameter_registry import ParameterRegistry
from shampoo_deepspeed.engine.policy import Policy
from shampoo_deepspeed.engine.step_unit import StepUnit, as_count
from shampoo_deepspeed.options.config import OPTION_NAMES, ShampooConfig
from shampoo_deepspeed.runtime.progress import progress
from shampoo_deepspeed.state.dcp_state import TorchState
from shampoo_deepspeed.state.state_dict import SavedState, StateSource, consolidated

logger = logging.getLogger("shampoo_deepspeed")


@dataclass
class StateKeeper:
    """Part of an optimizer: keeps the state that its units do not have, and decides what state dicts hold.

    Without loaded state, ``waiting`` and ``external`` are None: all state is in the units, and parameters without a
    unit have none. Loading frees the units' state; each parameter gets its state from ``waiting`` when it steps again.
    If ``external`` is set, the state must first be loaded from there: no unit may be built and nothing saved.

    Args:
        waiting: loaded state of parameters that have not stepped since.
        external: where a loaded state dict says that the state is kept.
        saved_as: what state dicts hold in place of the state, within ``with_external_state``.
        consolidated: a copy of the state of all ranks, for the next state dict; the next step drops it.
        released: units from before the last load. They are reused with loaded state unless options have changed.
    """

    waiting: StateSource | None = None
    external: Mapping[str, Any] | None = None
    saved_as: Mapping[str, Any] | None = None
    consolidated: SavedState | None = None
    released: list[StepUnit] = field(default_factory=list)

    @property
    def note(self) -> Mapping[str, Any] | None:
        """What state dicts hold in place of the state; None if they hold the state."""
        return self.saved_as if self.saved_as is not None else self.external

    def take(self, source: StateSource) -> None:
        """Hold this state, and nothing else, until units take it."""
        self.waiting, self.external, self.consolidated = source, source.external, None

    def restore_into(self, unit: StepUnit) -> None:
        """Restore what was loaded for a unit without steps. A collective of its ranks."""
        if self.waiting is not None:
            self.waiting.restore_into(unit)
            self.waiting = self.waiting.without({p.key for p in unit.parameters})

    def joined(self, own: SavedState) -> SavedState:
        """The state of units joined with loaded state that no unit has taken."""
        return own if self.waiting is None else own.joined([self.waiting.everything()])

    def state_of(self, units: Sequence[StepUnit], rejected_steps: int) -> SavedState:
        """This rank's state; tensors are the live ones."""
        return self.joined(SavedState.of_units(units, rejected_steps))

    def state_to_save(self, units: Sequence[StepUnit], rejected_steps: int) -> SavedState:
        """What the next state dict holds.

        Raises:
            RuntimeError: as `refuse_one_rank`.
        """
        if self.note is not None:
            return SavedState(external=self.note)
        self.refuse_one_rank(units)
        return self.consolidated or self.state_of(units, rejected_steps)

    def consolidate(self, units: Sequence[StepUnit], rejected_steps: int) -> None:
        """Gather the state of all ranks for the next state dict. A collective."""
        parts = [consolidated(unit, SavedState.of_units([unit], rejected_steps)) for unit in units]
        self.consolidated = self.joined(SavedState(rejected_steps=rejected_steps).joined(parts))

    def refuse_one_rank(self, units: Sequence[StepUnit]) -> None:
        """Raise RuntimeError if one rank's state dict is stored for all but does not hold the state of all."""
        one_rank_saves = any(unit.layout.one_rank_saves and unit.world_size > 1 for unit in units)
        if self.consolidated is None and one_rank_saves:
            raise RuntimeError(
                "each rank owns the Shampoo state of some blocks only, but here one rank's state dict is stored for "
                "all; call optimizer.consolidate_state_dict() on all ranks first"
            )

    def refuse_external(self) -> None:
        """Raise RuntimeError if the state must be loaded from another place first."""
        if self.external is not None:
            raise RuntimeError(
                f"the loaded state dict only says where the optimizer's state is saved ({dict(self.external)}); "
                "call load_shampoo(optimizer, path) on all ranks before the first step"
            )

    def release(self, units: Sequence[StepUnit]) -> None:
        """Free the state of units, because loaded state takes its place.

        Units that have not stepped are dropped: a tool may have asked for them, with tensors that have no gradients.
        """
        stepped = [unit for unit in units if any(unit.steps)]
        for unit in stepped:
            unit.release_state()
        self.released += stepped

    def taken_again(self, present: set[int], configs: Mapping[int, ShampooConfig]) -> list[StepUnit]:
        """Released units of these tensors, with new state; those that would be built differently now are dropped.

        A collective of the units' ranks, which decide alike.

        Args:
            present: ``id`` of all tensors in the optimizer's groups.
            configs: options by number.
        """
        found = [unit for unit in self.released if present.issuperset(map(id, unit.tensors))]
        self.released = [unit for unit in self.released if unit not in found]
        again = [unit for unit in found if not any(unit.any_rank([_has_changed(unit, configs)]))]
        for unit in again:
            unit.new_state()
        return again


class UnitsOfOptimizer(torch.optim.Optimizer):
    """Part of a blockwise optimizer: its units, which take loaded state when they step.

    Attributes:
        registry: the parameters and their options; its ``entries`` and ``policies`` are the optimizer's too.
        state_keeper: state that no unit has.
        units: the step units that have been built; ``unit_of`` is the unit of each tensor, by its ``id``.
        group_of: the number of the group of each of these tensors when its unit was built.
        rejected_steps: how many steps were rejected because a gradient was not finite; the last one is not known yet.
    """

    registry: ParameterRegistry
    entries: list[Entry]
    policies: dict[str, Policy]
    state_keeper: StateKeeper
    rejected_steps: int
    averages_in_use: bool = False  # whether the model has averages in place of weights
    in_step: bool = False  # whether a step is under way
    _warned: bool  # whether a warning that a step did nothing was logged

    def _without_units(self) -> None:
        """Begin without units."""
        self.units: list[StepUnit] = []
        self.unit_of: dict[int, StepUnit] = {}
        self.group_of: dict[int, int] = {}
        self._loads: dict[int, list[float]] = {}  # of each process group's ranks, by all units

    def configs(self) -> Mapping[int, ShampooConfig]:
        """Options by the numbers of groups and rules, as the groups are now; ``lr`` may be a live tensor."""
        raise NotImplementedError

    def finish_step(self) -> None:
        """Read the flags of the last step, which otherwise happens at the next one. Runs no collective."""
        raise NotImplementedError

    @property
    def waiting_state(self) -> StateSource | None:
        """Loaded state that no unit has taken yet."""
        return self.state_keeper.waiting

    @waiting_state.setter
    def waiting_state(self, source: StateSource | None) -> None:
        self.state_keeper.waiting = source

    @property
    def external_state(self) -> Mapping[str, Any] | None:
        """Where a loaded state dict says that the state is kept, until it is loaded from there."""
        return self.state_keeper.external

    @external_state.setter
    def external_state(self, where: Mapping[str, Any] | None) -> None:
        self.state_keeper.external = where

    @property
    def has_state(self) -> bool:
        """Whether any parameter has taken a step, in this process or in what was loaded."""
        waiting = self.state_keeper.waiting
        return any(not unit.fresh for unit in self.units) or (waiting is not None and any(waiting.steps.values()))

    def attach_model(self, model: nn.Module) -> None:
        """Attach the wrapped model of the optimizer's parameters, as ``model=`` does; call it before the first step.

        Raises:
            RuntimeError: after the first step, when ranks have divided the work.
        """
        if self.units:
            raise RuntimeError("call attach_model() before the first step: the ranks have already divided the work")
        self.registry.attach_model(model)
        self.state_keeper.released.clear()  # their ranks may change

    def _units_in_step(self) -> list[StepUnit]:
        """The units of the current ``param_groups``; new tensors with a gradient get theirs here."""
        units, waiting = self._known_and_waiting()
        if waiting:
            for adapter in adapters():
                adapter.resume(self)
            units, waiting = self._known_and_waiting()
        self.registry.refuse_replaced(waiting)
        joining = {id(item) for adapter in adapters() for item in adapter.joining(waiting)} if waiting else set()
        fresh = [item for item in waiting if item.tensor.grad is not None or id(item) in joining]
        if not fresh:
            self._warn_if_nothing_steps(units)
            return list(units.values())
        return [*units.values(), *self._new_units(fresh)]

    def _known_and_waiting(self) -> tuple[dict[int, StepUnit], list[NewTensor]]:
        """The units of the current ``param_groups`` by ``id``, and the trainable tensors that have none yet."""
        waiting: list[NewTensor] = []
        units: dict[int, StepUnit] = {}
        for group in self.param_groups:
            for place, tensor in enumerate(group["params"]):
                unit = self.unit_of.get(id(tensor))
                if unit is not None:
                    units[id(unit)] = unit
                elif tensor.requires_grad or tensor.grad is not None:
                    waiting.append(NewTensor(tensor, group["shampoo_group"], place))
        return units, waiting

    def _new_units(self, fresh: Sequence[NewTensor]) -> list[StepUnit]:
        """Build units of tensors that have none, with the state that was loaded for them."""
        self.state_keeper.refuse_external()
        self.state_keeper.released.clear()  # a framework has replaced their tensors
        self.configs()
        made = []
        with progress("planning the first step", len(fresh), "{} tensors".format) as advance:
            for unit in self.registry.new_units(self, fresh, self._loads):
                self._join(unit)
                made.append(unit)
                advance(len(unit.tensors))
        self.registry.report(made)
        return made

    def refuse_now(self, what: str) -> None:
        """Raise RuntimeError for what cannot be done within a step or while averages are in use."""
        self.refuse_in_step(what)
        if self.averages_in_use:
            raise RuntimeError(
                f"{what} while the model has averaged weights: call optimizer.use_weights() on all ranks first"
            )

    def refuse_in_step(self, what: str) -> None:
        """Raise RuntimeError for what must wait until a step has returned."""
        if self.in_step:
            raise RuntimeError(f"{what} within a step, which has changed only a part of the state: wait for its end")

    def _note_groups(self, units: Iterable[StepUnit]) -> None:
        """Let tensors of these units that are in no group take no part in steps until one has them again.

        Raises:
            LayoutError: for a tensor that is in another group than at its first step.
        """
        key_of = self.registry.keys_by_tensor()
        now = {id(tensor): group["shampoo_group"] for group in self.param_groups for tensor in group["params"]}
        for unit in units:
            for tensor in unit.tensors:
                if now.get(id(tensor), self.group_of[id(tensor)]) != self.group_of[id(tensor)]:
                    raise LayoutError(
                        f"{key_of.get(id(tensor), 'a tensor')} was in another parameter group at its first step: the "
                        "options of its group shape its blocks and state; change those of its own group instead, or "
                        "build a new optimizer"
                    )
            # A framework may keep its flat tensors out of the groups between steps.
            unit.left_out = frozenset(
                n for n, tensor in enumerate(unit.tensors) if id(tensor) in key_of and id(tensor) not in now
            )

    def _begin_anew(self) -> None:
        """Start again with new state where somebody has removed a tensor's entries from ``self.state``."""
        lost = {p.key for unit in self.units for p in self._without_entry(unit)}
        if lost:
            logger.warning("new state for %d parameters, whose optimizer.state was removed", len(lost))
            self.finish_step()
            self.take_state(self.state_keeper.state_of(self.units, self.rejected_steps).without(lost))

    def _without_entry(self, unit: StepUnit) -> list[Parameter]:
        """The unit's parameters that have taken steps and of whose tensors ``self.state`` does not tell it."""
        gone = [number for number, tensor in enumerate(unit.tensors) if "step" not in self.state.get(tensor, ())]
        homes = unit.layout.homes or [0] * len(unit.parameters)
        return [p for p, home, steps in zip(unit.parameters, homes, unit.steps, strict=True) if steps and home in gone]

    def _take_released(self, others: Iterable[Tensor] = ()) -> None:
        """Reuse units from before the last load, with the loaded state; or, where ``self.state`` lost it, new state.

        Args:
            others: tensors that may be stepped though they are in no group now.
        """
        if len(self.state) < len(self.unit_of):
            self._begin_anew()
        keeper = self.state_keeper
        if keeper.released and keeper.external is None:
            present = {id(tensor) for group in self.param_groups for tensor in group["params"]}
            present.update(map(id, others))
            for unit in keeper.taken_again(present, self.configs()):
                self._join(unit)

    def _join(self, unit: StepUnit) -> None:
        """Step this unit from now on, with the state that was loaded for it."""
        self.state_keeper.restore_into(unit)
        self._loads[id(unit.group)] = unit.loads_so_far
        self.units.append(unit)
        self.unit_of.update((id(tensor), unit) for tensor in unit.tensors)
        self.group_of.update((id(t), number) for t, number in zip(unit.tensors, unit.layout.groups, strict=True))

    def _warn_if_nothing_steps(self, units: Mapping[int, StepUnit]) -> None:
        """Warn once if no parameter steps: a wrapper may have replaced the parameters unknown to the optimizer."""
        if not units and not self._warned and any(group["params"] for group in self.param_groups):
            self._warned = True
            logger.warning(
                "a step found no gradient in any of the optimizer's parameters and did nothing; if the model was "
                "wrapped after the optimizer was built, build the optimizer from the wrapped model"
            )

    def take_state(self, source: StateSource) -> None:
        """Continue from this state at the next step, and drop the present one; call it on all ranks."""
        self.refuse_now("a load")
        self._release_units()
        self._forget_steps()
        self.state_keeper.take(source)
        self.rejected_steps = source.rejected_steps
        steps = source.steps
        for tensor in [tensor for group in self.param_groups for tensor in group["params"] if steps]:
            self.state[tensor]["step"] = as_count(max(steps.values()))

    def _forget_steps(self) -> None:
        """Remove what this package keeps in ``self.state``; what others keep there stays."""
        for tensor in [key for key in self.state if isinstance(key, Tensor)]:
            self.state[tensor].pop("step", None)
            if not self.state[tensor]:
                del self.state[tensor]

    def _release_units(self) -> None:
        """Free all units; they take state at the next step, on all ranks together, because that needs communication."""
        self.state_keeper.release(self.units)
        self._without_units()

    def take_waiting(self) -> None:
        """Build the units of all parameters for which torch's helpers have loaded state, so that it can be saved.

        A collective if ranks divide the work; but then the load has done it already, and nothing is left.

        Raises:
            ValueError: if the state does not fit.
        """
        if isinstance(self.state_keeper.waiting, TorchState):
            self._build_missing(self._loaded_tensors())

    def build_loaded(self) -> None:
        """Build the units of all tensors if a state was loaded, which they otherwise take at the next step.

        A collective if ranks divide the work.

        Raises:
            RuntimeError: if there are no tensors that can take it, or the state is still missing.
        """
        keeper = self.state_keeper
        if not self.units:
            for adapter in adapters():
                adapter.resume(self)
        if keeper.waiting is None and not keeper.released:
            return
        kept_out = [item for adapter in adapters() for item in adapter.kept_out(self)]
        self._build_missing([*self._trained(), *self._loaded_tensors(), *kept_out])
        for tensor in (item.tensor for item in kept_out):  # the load has noted the steps of those in the groups only
            if any(self.unit_of[id(tensor)].steps):
                self.state[tensor].setdefault("step", as_count(max(self.unit_of[id(tensor)].steps)))
        if not self.units and self.has_state:
            raise RuntimeError(
                "the averages of the loaded state cannot be used yet: the optimizer's param_groups hold none of its "
                "tensors, and no known framework keeps them; take a training step first"
            )

    def _build_missing(self, wanted: Sequence[NewTensor]) -> None:
        """Build units of those of these tensors that have none. A collective if ranks divide the work."""
        self._take_released(item.tensor for item in wanted)
        fresh = {id(item.tensor): item for item in wanted if id(item.tensor) not in self.unit_of}
        if fresh:
            self._new_units(list(fresh.values()))

    def _loaded_tensors(self) -> list[NewTensor]:
        """The tensors, trained or frozen, whose loaded state no unit has taken."""
        found: list[NewTensor] = []
        waiting, keys = self.state_keeper.waiting, self.registry.keys_by_group(self.param_groups)
        steps = {} if waiting is None else waiting.steps
        for group in self.param_groups if any(steps.values()) else ():
            number, tensors = group["shampoo_group"], group["params"]
            if len(keys[number]) == len(tensors):  # else they are flat shards, which torch's helpers cannot carry
                pairs = enumerate(zip(tensors, keys[number], strict=True))
                found += [NewTensor(tensor, number, place) for place, (tensor, key) in pairs if steps.get(key)]
        return found

    def _trained(self) -> list[NewTensor]:
        """All trainable tensors, so that a save and its template have the same names."""
        return [
            NewTensor(tensor, group["shampoo_group"], place)
            for group in self.param_groups
            for place, tensor in enumerate(group["params"])
            if tensor.requires_grad
        ]


# Options that every step reads from the groups; units do not depend on them.
_READ_AT_EACH_STEP = ("lr", "peak_lr", "weight_decay")


def _has_changed(unit: StepUnit, configs: Mapping[int, ShampooConfig]) -> bool:
    """Whether a unit would be built differently now, because its tensors or options have changed."""
    other_options = (_other_options(config, configs.get(number)) for number, config in unit.configs.items())
    return not unit.has_its_tensors() or any(other_options)


def _other_options(before: ShampooConfig, now: ShampooConfig | None) -> bool:
    names = [name for name in OPTION_NAMES if name not in _READ_AT_EACH_STEP]
    return before is not now and (now is None or any(getattr(before, n) != getattr(now, n) for n in names))
