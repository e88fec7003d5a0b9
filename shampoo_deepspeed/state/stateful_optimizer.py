"""Saving and loading the state of a blockwise optimizer: state dicts, copies, and loaded state until units take it."""

from __future__ import annotations

import logging
import os
import reprlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shampoo_deepspeed.distributed.frameworks import (
    UNEVEN_INPUTS,
    Entry,
    LayoutError,
    NewTensor,
    Parameter,
    adapters,
)
from shampoo_deepspeed.engine.parameter_registry import ParameterRegistry
from shampoo_deepspeed.engine.policy import policy_of
from shampoo_deepspeed.engine.step_unit import StepUnit, as_count
from shampoo_deepspeed.options.checks import OptionError, plain
from shampoo_deepspeed.options.config import GIVEN_NAMES, OPTION_NAMES, ShampooConfig, canonical
from shampoo_deepspeed.options.model_search import FoundModels, find_models
from shampoo_deepspeed.options.names import nearest
from shampoo_deepspeed.options.param_groups import checked_group, group_options, printed_group, unknown_keys
from shampoo_deepspeed.runtime.metrics import read
from shampoo_deepspeed.runtime.progress import progress
from shampoo_deepspeed.state.dcp_state import (
    TorchState,
    blank_entry,
    completed_group,
    external_entry,
    is_torch_state,
    others_state,
    robust_group,
    unit_entries,
    with_others,
)
from shampoo_deepspeed.state.dtensor_blocks import is_dtensor
from shampoo_deepspeed.state.state_dict import START_ANEW, SavedState, StateSource, consolidated, lacking

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

    def take_apart(
        self, state_dict: Mapping[str, Any], optimizer: BlockOptimizer
    ) -> tuple[SavedState | TorchState, dict[str, Any]]:
        """Split a loaded state dict into Shampoo's part, after checking that it fits the optimizer, and torch's part.

        Raises:
            ValueError: if this is not a Shampoo state dict, or does not fit.
        """
        if "shampoo" not in state_dict and (self.saved_as is not None or is_torch_state(state_dict)):
            torch_state = TorchState({}, self.saved_as)
            if is_torch_state(state_dict):
                keys = optimizer.registry.keys_by_group()
                numbers = [group["shampoo_group"] for group in optimizer.param_groups]
                torch_state = TorchState.parse(state_dict, [keys[number] for number in numbers])
            groups = [completed_group(group) for group in state_dict["param_groups"]]
            return torch_state, {**state_dict, "state": others_state(state_dict), "param_groups": groups}
        if "shampoo" not in state_dict and os.environ.get(START_ANEW) == "1":
            logger.warning(
                "the loaded state dict is not Shampoo's: starting with new state and options (%s = 1)", START_ANEW
            )
            own = torch.optim.Optimizer.state_dict(optimizer)["param_groups"]
            return SavedState(), {"state": {}, "param_groups": own}
        saved = SavedState.parse(state_dict)
        rest = {key: value for key, value in state_dict.items() if key != "shampoo"}
        if saved.external is not None:
            return saved, {**rest, "state": _without_placeholders(state_dict["state"])}
        _check_parameters(saved, optimizer.entries)
        groups = state_dict["param_groups"]
        configs = [ShampooConfig.from_saved({n: g[n] for n in OPTION_NAMES if n in g}) for g in groups]
        if len(configs) == len(optimizer.param_groups):
            _check_units(saved, optimizer, configs)
        return saved, rest

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


class BlockOptimizer(torch.optim.Optimizer):
    """A blockwise optimizer apart from its step: torch's interface over two parts.

    Attributes:
        registry: the parameters and their options; its ``entries`` and ``policies`` are the optimizer's too.
        state_keeper: state that no unit has.
        units: the step units that have been built; ``unit_of`` is the unit of each tensor, by its ``id``.
        rejected_steps: how many steps were rejected because a gradient was not finite; the last one is not known yet.
    """

    def __init__(
        self,
        params: Any,
        model: nn.Module | None,
        process_group: dist.ProcessGroup | None,
        options: dict[str, Any],
    ) -> None:
        _check_types(params, model, process_group)
        given = [_with_list(item) for item in params]
        options = canonical(options)
        for adapter in adapters():
            adapter.admit(type(self))
            if model is None:
                model = adapter.model_under_construction(options, given)
        self.registry, self.state_keeper = ParameterRegistry(process_group), StateKeeper()
        self.entries, self.policies = self.registry.entries, self.registry.policies
        self.units: list[StepUnit] = []
        self.unit_of: dict[int, StepUnit] = {}
        self._loads: dict[int, list[float]] = {}  # of each process group's ranks, by all units
        self.rejected_steps = 0
        self._warned = False  # whether a warning that a step did nothing was logged
        if model is not None:
            self.attach_model(model)
            self.registry.know_names(FoundModels((model,), (model,)))
        else:
            ShampooConfig.from_options(options)  # wrong ones raise before the search
            self._find_model(given, options)
        super().__init__(given, group_options(ShampooConfig.from_options(options)))
        self.registry.forget_names()

    def _find_model(self, given: Sequence[Any], options: dict[str, Any]) -> None:
        """Take names and kinds from the model that holds the given parameters, as if it had been given.

        But DDP's replicas divide no work: a script that knows nothing of it may save one rank's state dict.
        """
        tensors = _tensors_in(given)
        found = find_models(tensors)
        for adapter in adapters():
            for model in found.outermost:
                adapter.model_found(model, options, given)
            for model in found.named_by:
                adapter.attach_model(model)
        self.registry.know_names(found, tensors)

    def __repr__(self) -> str:
        """In torch's form, with the options that are not at their defaults."""
        groups = [printed_group(number, group) for number, group in enumerate(self.param_groups)]
        return "\n".join([f"{type(self).__name__} (", *groups, "other options are at their defaults", ")"])

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

    def join_hook(self, **_: Any) -> Any:
        """Raise LayoutError: a rank that has no inputs left cannot step, as torch's ``Join`` would have it."""
        raise LayoutError(f"Shampoo cannot be one of the joinables of torch's Join: {UNEVEN_INPUTS}")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, at any time; its tensors join at their first gradient.

        Raises:
            OptionError: for an option that is unknown, out of range, or that all groups must share.
        """
        known = {key for earlier in self.param_groups for key in earlier}
        for key in sorted(unknown_keys(param_group) - known):
            logger.warning(
                "Shampoo has no option %r (= %s in a parameter group) and ignores it%s",
                key,
                reprlib.repr(param_group[key]),
                nearest(key, GIVEN_NAMES),
            )
        super().add_param_group(checked_group(param_group, self.defaults))
        try:
            self.registry.add_group(self.param_groups[-1])
        except OptionError:
            self.param_groups.pop()
            raise

    def configs(self) -> Mapping[int, ShampooConfig]:
        """Options by the numbers of groups and rules, as the groups are now; ``lr`` may be a live tensor."""
        raise NotImplementedError

    def groups_apart(self, numbers: Sequence[int]) -> None:
        """Restore the numbers and the last seen options of groups that a framework has overwritten."""
        for group, number in zip(self.param_groups, numbers, strict=True):
            config = self.registry.checked[number].config
            group.update({name: getattr(config, name) for name in OPTION_NAMES}, shampoo_group=number)

    def finish_step(self) -> None:
        """Read the flags of the last step, which otherwise happens at the next one. Runs no collective."""
        raise NotImplementedError

    def comm_stats(self) -> dict[str, int]:
        """Bytes that this rank sent and received in the last step of all its units, as counted and as planned."""
        out = {
            "bytes_sent": 0,
            "bytes_received": 0,
            "collectives": 0,
            "planned_bytes_sent": 0,
            "planned_bytes_received": 0,
        }
        for unit in self.units:
            stats, (sent, received) = unit.exchange.stats, unit.plan.elements_moved(unit.rank)
            item = unit.exchange.dtype.itemsize
            out["bytes_sent"] += stats.bytes_sent
            out["bytes_received"] += stats.bytes_received
            out["collectives"] += stats.collectives
            out["planned_bytes_sent"] += sent * item
            out["planned_bytes_received"] += received * item
        return out

    def metrics(self) -> dict[str, float]:
        """What this rank's steps took since the last call; cheap, without a collective or a wait for the device.

        Returns:
            ``refresh_ms``: milliseconds per step in refreshes, including those in the background. ``exchange_ms``:
            milliseconds per step of packing, waiting for and unpacking what moves between ranks. ``bytes_moved``:
            bytes sent and received per step. These three are means over the steps since the last call.
            ``refreshed_share``: share of this rank's blocks that were refreshed in these steps.
            ``largest_condition_number``: of any factor matrix, regularised, at its latest refresh; missing before the
            first refresh, and with solvers that compute no eigenvalues. ``rejected_steps``: all since the start; a
            rejection of the very last step is not known yet.
        """
        return read([unit.measured() for unit in self.units], self.rejected_steps)

    def _units_in_step(self) -> list[StepUnit]:
        """The units of the current ``param_groups``; new tensors with a gradient get theirs here."""
        units, waiting = self._known_and_waiting()
        if waiting:
            for adapter in adapters():
                adapter.resume(self)
            units, waiting = self._known_and_waiting()
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
        self.registry.report()
        return made

    def _take_released(self) -> None:
        """Reuse units from before the last load, with the loaded state."""
        keeper = self.state_keeper
        if keeper.released and keeper.external is None:
            present = {id(tensor) for group in self.param_groups for tensor in group["params"]}
            for unit in keeper.taken_again(present, self.configs()):
                self._join(unit)

    def _join(self, unit: StepUnit) -> None:
        """Step this unit from now on, with the state that was loaded for it."""
        self.state_keeper.restore_into(unit)
        self._loads[id(unit.group)] = unit.loads_so_far
        self.units.append(unit)
        self.unit_of.update((id(tensor), unit) for tensor in unit.tensors)

    def _warn_if_nothing_steps(self, units: Mapping[int, StepUnit]) -> None:
        """Warn once if no parameter steps: a wrapper may have replaced the parameters unknown to the optimizer."""
        if not units and not self._warned and any(group["params"] for group in self.param_groups):
            self._warned = True
            logger.warning(
                "a step found no gradient in any of the optimizer's parameters and did nothing; if the model was "
                "wrapped after the optimizer was built, build the optimizer from the wrapped model"
            )

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
            _refuse_own_keys(state_dict)
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

        Parameters that had no gradient when the state was saved start with new state. What others keep in
        ``optimizer.state`` is loaded as torch does it.

        Raises:
            ValueError: if this is not a Shampoo state dict, or does not fit the parameters. For parameters that have
                not stepped yet, the next step raises it.
        """
        numbers = [group["shampoo_group"] for group in self.param_groups]
        loaded: list[SavedState | TorchState] = []

        def take_apart(_: torch.optim.Optimizer, found: Mapping[str, Any]) -> dict[str, Any]:
            state, of_torch = self.state_keeper.take_apart(self._with_left_out(found), self)
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
        self.configs()
        self.take_state(loaded)
        if self._divided():
            self.take_waiting()  # torch's helpers load on all ranks together, but one rank alone may save later
        if self.external_state is not None and self.state_keeper.saved_as is None:  # else the caller knows where it is
            for adapter in adapters():
                adapter.note_load(self)

    def take_state(self, source: StateSource) -> None:
        """Continue from this state at the next step, and drop the present one; call it on all ranks."""
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

    def take_waiting(self) -> None:
        """Build the units of all parameters for which torch's helpers have loaded state, so that it can be saved.

        A collective if ranks divide the work; but then the load has done it already, and nothing is left.

        Raises:
            ValueError: if the state does not fit.
        """
        if isinstance(self.state_keeper.waiting, TorchState):
            self._build_missing(self._loaded_tensors())

    def _divided(self) -> bool:
        """Whether the state of some parameter may be divided among ranks."""
        tensors = (tensor for group in self.param_groups for tensor in group["params"])
        return self.registry.replicas is not None or any(map(is_dtensor, tensors))

    def _build_missing(self, wanted: Iterable[NewTensor]) -> None:
        """Build units of those of these tensors that have none. A collective if ranks divide the work."""
        self._take_released()
        fresh = {id(item.tensor): item for item in wanted if id(item.tensor) not in self.unit_of}
        if fresh:
            self._new_units(list(fresh.values()))

    def _loaded_tensors(self) -> list[NewTensor]:
        """The tensors, trained or frozen, whose loaded state no unit has taken."""
        found: list[NewTensor] = []
        waiting, keys = self.state_keeper.waiting, self.registry.keys_by_group()
        steps = {} if waiting is None else waiting.steps
        for group in self.param_groups if any(steps.values()) else ():
            number, tensors = group["shampoo_group"], group["params"]
            if len(keys[number]) == len(tensors):  # else they are flat shards, which torch's helpers cannot carry
                pairs = enumerate(zip(tensors, keys[number], strict=True))
                found += [NewTensor(tensor, number, place) for place, (tensor, key) in pairs if steps.get(key)]
        return found

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

    def _release_units(self) -> None:
        """Free all units; they take state at the next step, on all ranks together, because that needs communication."""
        self.state_keeper.release(self.units)
        self.units, self.unit_of, self._loads = [], {}, {}

    def _entries_for_a_tool(self) -> dict[int, dict[str, Tensor]] | None:
        """The entries under ``state`` if a framework's checkpoint tool is asking for the state dict, else None."""
        answers = (adapter.state_entries(self) for adapter in adapters())
        return next((entries for entries in answers if entries is not None), None)

    @property
    def state_is_external(self) -> bool:
        """Whether ``state_dict()`` holds a note of where the state is instead of the state."""
        return self.state_keeper.note is not None

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
            entries |= {id(tensor): entry for tensor, entry in zip(unit.tensors, made, strict=True)}
        for tensor in (tensor for group in self.param_groups for tensor in group["params"]):
            kept = self.state.get(tensor, {})
            if id(tensor) in entries or set(kept) - {"step"}:
                entries[id(tensor)] = with_others(entries.get(id(tensor), blank_entry()), kept)
        return entries

    def _trained(self) -> list[NewTensor]:
        """All trainable tensors, so that a save and its template have the same names."""
        return [
            NewTensor(tensor, group["shampoo_group"], place)
            for group in self.param_groups
            for place, tensor in enumerate(group["params"])
            if tensor.requires_grad
        ]

    def _numbered(self, entries: Mapping[int, Any]) -> dict[int, Any]:
        """Entries by number of the tensors, as in torch's state dicts."""
        tensors = (tensor for group in self.param_groups for tensor in group["params"])
        return {number: entries[id(tensor)] for number, tensor in enumerate(tensors) if id(tensor) in entries}

    def __getstate__(self) -> dict[str, Any]:
        if any(unit.group is not None for unit in self.units):
            raise RuntimeError("this optimizer cannot be copied: its state is divided among ranks; use state_dict()")
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
        self.units, self.unit_of, self._loads = [], {}, {}
        waiting = SavedState.parse({"shampoo": saved})
        self.state_keeper = StateKeeper()
        self.state_keeper.take(waiting)
        self.rejected_steps = waiting.rejected_steps
        self.configs()


def _check_parameters(saved: SavedState, entries: Sequence[Entry]) -> None:
    """Raise ValueError if a saved state has parameters that the optimizer does not have."""
    strange = set(saved.steps) - {entry.parameter.key for entry in entries}
    if strange:
        raise ValueError(
            f"the saved state belongs to other parameters: {', '.join(sorted(strange)[:5])}"
            f"{', ...' if len(strange) > 5 else ''} are not here; build the optimizer with the same names"
        )


def _check_units(saved: SavedState, optimizer: BlockOptimizer, configs: Sequence[ShampooConfig]) -> None:
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


# Options that every step reads from the groups; units do not depend on them.
_READ_AT_EACH_STEP = ("lr", "peak_lr", "weight_decay")


def _has_changed(unit: StepUnit, configs: Mapping[int, ShampooConfig]) -> bool:
    """Whether a unit would be built differently now, because its tensors or options have changed."""
    other_options = (_other_options(config, configs.get(number)) for number, config in unit.configs.items())
    return not unit.has_its_tensors() or any(other_options)


def _other_options(before: ShampooConfig, now: ShampooConfig | None) -> bool:
    names = [name for name in OPTION_NAMES if name not in _READ_AT_EACH_STEP]
    return before is not now and (now is None or any(getattr(before, n) != getattr(now, n) for n in names))


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


def _with_list(item: Any) -> Any:
    """A group with a list in place of an iterator, which can be read only once; anything else as it is."""
    if isinstance(item, dict) and isinstance(item.get("params"), Iterator):
        return {**item, "params": list(item["params"])}
    return item


def _tensors_in(given: Sequence[Any]) -> list[Tensor]:
    """All tensors in parameters, (name, parameter) pairs and groups of them; torch refuses what is none of these."""
    items: list[Any] = []
    for item in given:
        params = item.get("params", ()) if isinstance(item, dict) else [item]
        items += [params] if isinstance(params, Tensor) else list(params) if isinstance(params, Iterable) else []
    last = [item[-1] if isinstance(item, tuple) and item else item for item in items]
    return [item for item in last if isinstance(item, Tensor)]


def _is_repeated(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() > 1 and not any(value.stride())


def _refuse_own_keys(state_dict: Mapping[str, Any]) -> None:
    """Raise RuntimeError for entries that belong to no parameter, which torch's helpers cannot carry."""
    places = {place for group in state_dict["param_groups"] for place in group["params"]}
    strange = [key for key in state_dict["state"] if key not in places]
    if strange:
        raise RuntimeError(
            f"optimizer.state has an entry {strange[0]!r}, which is no parameter, and torch's checkpoint helpers can "
            "only carry entries of parameters; take it out and save it on its own, or save optimizer.state_dict()"
        )


def _check_types(params: Any, model: Any, process_group: Any) -> None:
    module = isinstance(params, nn.Module) and not isinstance(params, nn.ParameterList)
    if module or isinstance(params, (Tensor, Mapping)):
        what = "a Module; give its named_parameters()" if module else type(params).__name__
        raise TypeError(f"params is {what}; allowed: an iterable of parameters, (name, parameter) pairs or groups")
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model = {model!r} is not allowed: None, or the nn.Module that the parameters belong to")
    if process_group is not None and not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(f"process_group = {process_group!r} is not allowed: None, or a torch.distributed.ProcessGroup")
