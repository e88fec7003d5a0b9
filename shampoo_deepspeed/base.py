"""What any blockwise optimizer needs beside its step: groups and names, units from hosts, saving and loading."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shampoo_deepspeed import status
from shampoo_deepspeed.config import OPTION_NAMES, OptionError, ShampooConfig, canonical
from shampoo_deepspeed.groups import checked_group, group_options
from shampoo_deepspeed.hosts import (
    CheckpointingHost,
    Entry,
    Fresh,
    Parameter,
    Part,
    SavingHost,
    hosts,
    plain_layouts,
)
from shampoo_deepspeed.metrics import read
from shampoo_deepspeed.naming import clean_name, names_and_kinds
from shampoo_deepspeed.phases import refresh_phases
from shampoo_deepspeed.report import treatment_table
from shampoo_deepspeed.rules import expanded
from shampoo_deepspeed.saved import FORMAT, START_ANEW, SavedState, StateSource, consolidated, lacking
from shampoo_deepspeed.torch_state import (
    FSDP1,
    TorchState,
    asking_helper,
    completed_group,
    elsewhere_entry,
    is_torch_state,
    robust_group,
    unit_entries,
)
from shampoo_deepspeed.unit import Unit, treat

logger = logging.getLogger("shampoo_deepspeed")


class BlockOptimizer(torch.optim.Optimizer):
    """Keeps the parameter groups, asks hosts for layouts at the first step, and saves and loads units.

    Holds weak references to parameters only: hosts replace them by shards, and nothing unsharded may stay alive.
    """

    _warned = False  # that steps do nothing

    def __init__(
        self,
        params: Iterable[Any],
        model: nn.Module | None,
        process_group: dist.ProcessGroup | None,
        options: dict[str, Any],
    ) -> None:
        if isinstance(params, Tensor):
            raise TypeError("params is a Tensor; give an iterable of parameters, (name, parameter) pairs or groups")
        given = list(params)
        options = canonical(options)
        for host in hosts():
            host.admit(type(self))
            model = model or host.model_under_construction(options, given)
        self._replicas = process_group
        self.units: list[Unit] = []
        if model is not None:
            self.note_model(model)
        self._known = names_and_kinds(model) if model is not None else {}
        self.entries: list[Entry] = []
        self._unit_of: dict[int, Unit] = {}
        self.waiting_state: StateSource | None = None  # loaded, and not yet handed out to units
        self._elsewhere: Mapping[str, Any] | None = None  # in effect while a host saves what was saved beside it
        self.awaited: Mapping[str, Any] | None = None  # where a loaded state dict says that the state is
        self._consolidated: SavedState | None = None
        self._loads: dict[int, list[float]] = {}  # of each process group's ranks, by all units so far
        self._configs: dict[int, tuple[tuple[Any, ...], ShampooConfig]] = {}
        self._reported = False
        self.rejected_steps = 0
        super().__init__(given, group_options(ShampooConfig.from_options(options)))
        self._known = {}

    def note_model(self, model: nn.Module) -> None:
        """Tell, before the first step, the wrapped model of parameters that were given earlier, as ``model=`` does.

        Raises:
            RuntimeError: after the first step, when it is settled which rank does what.
        """
        if self.units:
            raise RuntimeError("the wrapped model must be told before the first step")
        if self._replicas is None and isinstance(model, nn.parallel.DistributedDataParallel):
            self._replicas = model.process_group
        for host in hosts():
            host.note_model(model)

    def _units_in_step(self) -> list[Unit]:
        """The units of the current ``param_groups``; new tensors with a gradient get theirs here."""
        units, waiting = self._known_and_waiting()
        if waiting:
            for host in hosts():
                if isinstance(host, CheckpointingHost):
                    host.resume(self)
            units, waiting = self._known_and_waiting()
        joining = {id(item) for host in hosts() for item in host.joining(waiting)} if waiting else set()
        fresh = [item for item in waiting if item.tensor.grad is not None or id(item) in joining]
        if not fresh:
            self._warn_if_idle(units)
            return list(units.values())
        units |= {id(unit): unit for unit in self._new_units(fresh)}
        return list(units.values())

    def _new_units(self, fresh: Sequence[Fresh]) -> list[Unit]:
        """Units of tensors that have none, with what was loaded for them."""
        if self.awaited is not None:
            raise RuntimeError(
                f"the loaded state dict says that the optimizer's state is saved elsewhere ({dict(self.awaited)}); "
                "call load_shampoo(optimizer, path) on all ranks before the first step"
            )
        candidates = (host.layouts(self, self.entries, fresh) for host in hosts())
        layouts = next((found for found in candidates if found is not None), None)
        if layouts is None:
            layouts = plain_layouts(self.entries, fresh, self._replicas)
        configs, made = self.configs(), []
        phases = refresh_phases((entry.parameter for entry in self.entries), configs)
        for layout in layouts:
            carried = self._loads.get(id(layout.process_group))
            unit = Unit(layout, configs, carried, phases)
            if self.waiting_state is not None:
                self.waiting_state.hand_out(unit)
                self.waiting_state = self.waiting_state.without({p.key for p in unit.parameters})
            self._loads[id(layout.process_group)] = unit.loads_so_far
            self.units.append(unit)
            self._unit_of.update((id(t), unit) for t in unit.tensors)
            made.append(unit)
        self._report(configs)
        return made

    def note_state(self, unit: Unit) -> None:
        """Torch's tools take an empty ``state`` for that of an optimizer before its first step."""
        for tensor in unit.tensors:
            self.state[tensor]["step"] = unit.clock

    def _warn_if_idle(self, units: Mapping[int, Unit]) -> None:
        """A wrapper that replaces the model's parameters behind the optimizer's back says nothing itself."""
        if not units and not self._warned and any(group["params"] for group in self.param_groups):
            self._warned = True
            logger.warning(
                "a step found no gradient in any of the optimizer's parameters and did nothing; if the model was "
                "wrapped after the optimizer was built, build the optimizer from the wrapped model"
            )

    def _known_and_waiting(self) -> tuple[dict[int, Unit], list[Fresh]]:
        """The units of the current ``param_groups`` by ``id``, and the trainable tensors that have none yet."""
        waiting: list[Fresh] = []
        units: dict[int, Unit] = {}
        for group in self.param_groups:
            for place, tensor in enumerate(group["params"]):
                unit = self._unit_of.get(id(tensor))
                if unit is not None:
                    units[id(unit)] = unit
                elif tensor.requires_grad or tensor.grad is not None:
                    waiting.append(Fresh(tensor, group["shampoo_group"], place))
        return units, waiting

    def settle(self) -> None:
        """Read the outcome of the last step, which the host does one step late otherwise. Runs no collective."""
        self._settle(self.units)

    def _settle(self, units: Iterable[Unit]) -> None:
        """Count the outcome of these units' last step: its flags have long been copied to the host."""
        limit = self.param_groups[0]["failure_limit"]
        for outcome in {id(u.pending.outcome): u.pending.outcome for u in units if u.pending is not None}.values():
            bad, failures = status.read(outcome)
            in_a_row = 0
            for unit in units:
                if unit.pending is not None and unit.pending.outcome is outcome:
                    unit.settle(bad)
                    in_a_row = max(in_a_row, unit.rejected_in_a_row)
            if bad:
                self.rejected_steps += 1
                logger.warning("a step was rejected: a gradient was not finite (%d so far)", self.rejected_steps)
            if in_a_row >= limit:
                raise RuntimeError(
                    f"{in_a_row} steps in a row were rejected because a gradient was not finite "
                    f"(failure_limit = {limit})"
                )
            if failures:
                raise RuntimeError(
                    f"inverse roots of blocks failed {limit} times in a row (failure_limit = {limit}; their owners' "
                    "logs name them): their factor matrices are not finite or too ill-conditioned; "
                    "lower the learning rate or raise relative_epsilon"
                )

    def _report(self, configs: Mapping[int, ShampooConfig]) -> None:
        first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        if first and not self._reported:
            trained = [e.parameter for e in self.entries if _trains(e.reference())]
            logger.info("Shampoo preconditions:\n%s", treatment_table(trained, configs))
        self._reported = True

    def _config(self, group: dict[str, Any]) -> ShampooConfig:
        """The group's options, checked again only when one has changed; lr may be a live Tensor."""
        values = tuple(group[name] for name in OPTION_NAMES if name != "lr")
        cached = self._configs.get(group["shampoo_group"])
        if cached is None or cached[0] != values:
            config = ShampooConfig(**{name: group[name] for name in OPTION_NAMES})
            if cached is not None and self._has_state(group["shampoo_group"]):
                _refuse_reshaping(cached[1], config)
            cached = self._configs[group["shampoo_group"]] = (values, config)
        return cached[1]

    def _has_state(self, group: int) -> bool:
        return any(parameter.group == group for unit in self.units for parameter in unit.parameters)

    def configs(self) -> dict[int, ShampooConfig]:
        """Options by parameter group number, as the groups say now."""
        for group in self.param_groups:
            self._config(group)
        return expanded({number: config for number, (_, config) in self._configs.items()})

    def groups_apart(self, numbers: Sequence[int]) -> None:
        """Give groups that a host has overwritten their numbers, and the options last seen of each."""
        for group, number in zip(self.param_groups, numbers, strict=True):
            config = self._configs[number][1]
            group.update({name: getattr(config, name) for name in OPTION_NAMES}, shampoo_group=number)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, at any time; its tensors join at their first gradient.

        Raises:
            OptionError: for an option that is unknown, out of range, or that all groups must share.
        """
        group = checked_group(param_group, self.defaults)
        super().add_param_group(group)
        added = self.param_groups[-1]
        try:
            entries = self._new_entries(added, len(self._configs))
            config = ShampooConfig(**{name: added[name] for name in OPTION_NAMES})
            for entry in entries:
                treat(entry.parameter, config)  # raises where options do not fit a shape
            self.entries += entries
        except OptionError:
            self.param_groups.pop()
            raise
        added["shampoo_group"] = len(self._configs)
        self._config(added)

    def _new_entries(self, group: dict[str, Any], number: int) -> list[Entry]:
        """The entries of a new group's parameters."""
        names = group.get("param_names", [None] * len(group["params"]))
        taken = {entry.parameter.key for entry in self.entries}
        entries = []
        for index, (tensor, given) in enumerate(zip(group["params"], names, strict=True)):
            if tensor.is_complex():
                raise OptionError(f"parameter {given or index} is complex; Shampoo takes real parameters only")
            known, kinds = self._known.get(id(tensor), (None, frozenset()))
            name = clean_name(given) if given is not None else known
            for part in _parts(tensor, name, kinds):
                unnamed = ".".join(filter(None, (f"group{number}.{index}", part.path)))
                key = part.name if part.name is not None else unnamed
                if key in taken:
                    raise OptionError(
                        f"two parameters have the name {key!r}; names must differ, they are keys of the state"
                    )
                taken.add(key)
                frozen = not tensor.requires_grad
                turn = part.turn if part.turn is not None else index
                parameter = Parameter(key, part.shape, number, part.name, part.kinds, frozen, turn)
                entries.append(Entry(parameter, weakref.ref(tensor)))
        return entries

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
            ``refresh_ms``, ``exchange_ms`` and ``bytes_moved`` (sent and received): the mean over these steps of the
            milliseconds of refreshes (those in the background too), of those spent packing, awaiting and unpacking what
            moves between ranks, and of its bytes. ``refreshed_share``: of this rank's blocks, how many were refreshed
            in these steps.
            ``largest_condition_number``: of any factor matrix, regularised, at its latest refresh; not there before
            the first one, nor from solvers without eigenvalues. ``rejected_steps``: all so far; the very last step
            is not known yet.
        """
        return read([unit.measured() for unit in self.units], self.rejected_steps)

    def state_dict(self) -> dict[str, Any]:
        """torch's state dict, with this rank's block and element-wise state under ``"shampoo"``.

        Runs no collective and holds tensors and builtins only. Tensors are the live ones.

        To torch.distributed.checkpoint.state_dict, which asks on all ranks, it gives copies instead, under ``"state"``
        (see ``torch_state``), and exchanges pieces of blocks.

        Raises:
            RuntimeError: where ranks own different blocks, the host stores one rank's dict only (replicas), and
                ``consolidate_state_dict`` was not called since the last step; or where FSDP1 asks, which cannot carry
                this state, and no host writes it beside.
        """
        self.settle()
        helper = asking_helper()
        elsewhere = self._elsewhere if self._elsewhere is not None else self.awaited
        if elsewhere is not None and helper is None:
            return self._torch_state_dict({"shampoo": {"format": FORMAT, "elsewhere": dict(elsewhere)}})
        if helper is not None:
            state = self._torch_state_dict({"state": self._numbered(self._entries_for(helper))})
            return {**state, "param_groups": [robust_group(group) for group in state["param_groups"]]}
        self._refuse_one_rank()
        own = (self._consolidated or self._own_state()).to_dict()
        return self._torch_state_dict({"shampoo": own})

    def _refuse_one_rank(self) -> None:
        if self._consolidated is None and any(u.layout.one_rank_saves and u.world_size > 1 for u in self.units):
            raise RuntimeError(
                "each rank owns the Shampoo state of some blocks only, but here one rank's state dict is stored for "
                "all; call optimizer.consolidate_state_dict() on all ranks first"
            )

    def _entries_for(self, helper: str) -> dict[int, dict[str, Tensor]]:
        """What torch's helpers get for ``state``, by id of tensors. A collective where parameters are sharded."""
        elsewhere = self._elsewhere is not None or self.awaited is not None
        if helper == FSDP1 and self.has_state and not elsewhere:
            elsewhere = any(host.save_beside(self) for host in hosts() if isinstance(host, SavingHost))
            if not elsewhere:
                raise RuntimeError(
                    "FSDP1's own optimizer state dict cannot carry Shampoo's state; use save_shampoo(optimizer, path) "
                    "and load_shampoo(optimizer, path), or accelerate's save_state, or the Trainer"
                )
        # All that could have state, so that what is saved and a template of it have the same names.
        tensors = [(t, g, n) for g in self.param_groups for n, t in enumerate(g["params"]) if t.requires_grad]
        if elsewhere or helper == FSDP1:
            steps = {id(tensor): self.state.get(tensor, {}).get("step", torch.zeros(())) for tensor, _, _ in tensors}
            return {id(t): elsewhere_entry(t, steps[id(t)], elsewhere) for t, _, _ in tensors}
        fresh = [Fresh(t, g["shampoo_group"], n) for t, g, n in tensors if id(t) not in self._unit_of]
        if fresh:
            self._new_units(fresh)
        if any(not unit.fresh for unit in self.units):
            self._refuse_one_rank()
        configs, entries = self.configs(), {}
        for unit in self.units:
            made = unit_entries(unit, configs, self._consolidated, self.rejected_steps)
            for tensor, entry in zip(unit.tensors, made, strict=True):
                entries[id(tensor)] = entry
                for name in entry:  # torch takes what it finds here for the names of what it has to load
                    self.state[tensor].setdefault(name, unit.clock)
        return entries

    def _numbered(self, entries: Mapping[int, Any]) -> dict[int, Any]:
        """By number of the tensors, as torch writes state dicts."""
        tensors = (tensor for group in self.param_groups for tensor in group["params"])
        return {number: entries[id(tensor)] for number, tensor in enumerate(tensors) if id(tensor) in entries}

    def _torch_state_dict(self, own: Mapping[str, Any]) -> dict[str, Any]:
        # First of the hooks, so that those of the user see the whole state dict.
        handle = self.register_state_dict_post_hook(
            lambda _, state: state.update({"state": _without_names(state["state"]), **own}), prepend=True
        )
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def _own_state(self) -> SavedState:
        own = SavedState.of_units(self.units, self.rejected_steps)
        return own if self.waiting_state is None else own.joined([self.waiting_state.everything()])

    @contextmanager
    def state_saved_elsewhere(self, where: Mapping[str, Any]) -> Iterator[None]:
        """Within it ``state_dict()`` holds the options, the steps, and ``where`` (builtins) in place of the state.

        For hosts whose own checkpoint keeps the state dict, beside which ``save_shampoo`` has written. A state dict
        that a host's tool has robbed of all but the options can be loaded within it too; ``load_shampoo`` must follow.
        """
        before, self._elsewhere = self._elsewhere, where
        # Tools of torch take an empty state for that of an optimizer before its first step, and would make one.
        empty = [t for group in self.param_groups for t in group["params"] if t.requires_grad] if not self.state else []
        self.state.update((tensor, {"step": torch.zeros(())}) for tensor in empty)
        try:
            yield
        finally:
            self._elsewhere = before
            if empty and not self.units and self.waiting_state is None:
                self.state.clear()

    def consolidate_state_dict(self) -> None:
        """Gather the state of all ranks that share parameters, for the next ``state_dict()``; call it on all ranks.

        As in torch's ZeroRedundancyOptimizer: the first rank of each group then has all of it, to be saved. The copy
        lies on the CPU and is dropped at the next step.
        """
        self.settle()
        parts = [consolidated(unit, SavedState.of_units([unit], self.rejected_steps)) for unit in self.units]
        waiting = [] if self.waiting_state is None else [self.waiting_state.everything()]
        self._consolidated = SavedState({}, [], [], [], self.rejected_steps).joined([*parts, *waiting])

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take options and state; blocks are handed out to their owners at the next step.

        Parameters that had no gradient when the state was saved start anew.

        Raises:
            ValueError: where this is not a Shampoo state dict, or (for parameters without a step so far: at the next
                step) does not fit the parameters.
        """
        parsed: list[SavedState | TorchState] = []
        # Last of the hooks, so that those of the user see the whole state dict and may replace it.
        handle = self.register_load_state_dict_pre_hook(lambda _, state: self._take_apart(state, parsed))
        numbers = [group["shampoo_group"] for group in self.param_groups]
        try:
            super().load_state_dict(state_dict)  # type: ignore[arg-type]
        finally:
            handle.remove()
        if not self.units:  # accelerate loads an empty state while it prepares an optimizer
            given = [tensor for group in self.param_groups for tensor in group["params"]]
            for model in (host.model_under_construction({}, given) for host in hosts()):
                if model is not None:
                    self.note_model(model)
        self._forget_units()
        for group, number in zip(self.param_groups, numbers, strict=True):
            group["shampoo_group"] = number
            self._config(group)
        self.take_state(parsed[0])
        self.awaited = parsed[0].elsewhere
        if self.awaited is not None:
            for host in hosts() if self._elsewhere is None else ():  # otherwise whoever loads knows where it is
                if isinstance(host, CheckpointingHost):
                    host.note_load(self)

    @property
    def has_state(self) -> bool:
        """Whether any parameter has taken a step, in this process or in what was loaded."""
        loaded = self.waiting_state is not None and any(self.waiting_state.steps.values())
        return loaded or any(not unit.fresh for unit in self.units)

    def take_state(self, source: StateSource) -> None:
        """Go on from this state, from the next step on; call it on all ranks. What was there is dropped."""
        self._forget_units()
        self.waiting_state, self.awaited, self._consolidated = source, None, None
        self.rejected_steps = source.rejected_steps
        self.state.clear()
        for tensor in (tensor for group in self.param_groups for tensor in group["params"] if source.steps):
            self.state[tensor]["step"] = torch.tensor(float(max(source.steps.values())))

    def _forget_units(self) -> None:
        """Units are built anew at the next step, on all ranks together: handing out state needs communication."""
        self.units, self._unit_of, self._loads = [], {}, {}

    def _take_apart(self, state_dict: Mapping[str, Any], parsed: list[SavedState | TorchState]) -> dict[str, Any]:
        """Our part goes to ``parsed``, once it is known to fit; the rest is torch's."""
        if "shampoo" not in state_dict and (self._elsewhere is not None or is_torch_state(state_dict)):
            if is_torch_state(state_dict):
                keys = self._keys_by_group()
                parsed.append(TorchState.parse(state_dict, keys))
            else:
                parsed.append(TorchState({}, self._elsewhere))
            groups = [completed_group(group) for group in state_dict["param_groups"]]
            return {**state_dict, "state": {}, "param_groups": groups}
        if "shampoo" not in state_dict and os.environ.get(START_ANEW) == "1":
            logger.warning("the loaded state dict is not Shampoo's (%s = 1): state and options start anew", START_ANEW)
            parsed.append(SavedState({}, [], [], []))
            return {"state": {}, "param_groups": torch.optim.Optimizer.state_dict(self)["param_groups"]}
        saved = SavedState.parse(state_dict)
        rest = {key: value for key, value in state_dict.items() if key != "shampoo"}
        if saved.elsewhere is not None:
            parsed.append(saved)
            return {**rest, "state": {}}
        strange = set(saved.steps) - {entry.parameter.key for entry in self.entries}
        if strange:
            raise ValueError(
                f"the saved state is that of other parameters: {', '.join(sorted(strange)[:5])}"
                f"{', ...' if len(strange) > 5 else ''} are not here; build the optimizer with the same names"
            )
        defaults = group_options(ShampooConfig())
        configs = [ShampooConfig(**{n: g.get(n, v) for n, v in defaults.items()}) for g in state_dict["param_groups"]]
        if len(configs) == len(self.param_groups):
            self._check_units(saved, configs)
        parsed.append(saved)
        return rest

    def _keys_by_group(self) -> list[list[str]]:
        """Keys of the parameters in each group; hosts replace tensors and keep their order."""
        keys: dict[int, list[str]] = {group["shampoo_group"]: [] for group in self.param_groups}
        for entry in self.entries:
            keys[entry.parameter.group].append(entry.parameter.key)
        return [keys[group["shampoo_group"]] for group in self.param_groups]

    def _check_units(self, saved: SavedState, configs: Sequence[ShampooConfig]) -> None:
        """Raise early where a unit stays as it is under these options and no other rank is needed.

        Else the next step finds out, on all ranks together.
        """
        after = {group["shampoo_group"]: config for group, config in zip(self.param_groups, configs, strict=True)}
        before = {number: config for number, (_, config) in self._configs.items()}
        for unit in self.units:
            if unit.group is not None or any(_reshaped(p, before[p.group], after[p.group]) for p in unit.parameters):
                continue
            problem, missing = saved.problem(unit), saved.missing(unit)
            if problem or missing:
                raise ValueError(problem or lacking(missing[0]))

    def __getstate__(self) -> dict[str, Any]:
        if any(unit.group is not None for unit in self.units):
            raise RuntimeError("this optimizer cannot be copied: its state is divided among ranks; use state_dict()")
        self.settle()
        base = super().__getstate__()
        return {**base, "shampoo": self._own_state().to_dict(), "entries": [asdict(e.parameter) for e in self.entries]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        saved, parameters = state.pop("shampoo", None), state.pop("entries", None)
        super().__setstate__(state)
        for group in (self.defaults, *self.param_groups):  # may be from before an option existed
            for name, value in group_options(ShampooConfig()).items():
                group.setdefault(name, value)
        if parameters is None:
            return
        tensors = [tensor for group in self.param_groups for tensor in group["params"]]
        if len(tensors) != len(parameters):
            raise RuntimeError(
                "this optimizer cannot be copied while a host has replaced its parameters by flat shards"
            )
        self._known, self.units, self._unit_of, self._configs, self._loads = {}, [], {}, {}, {}
        self._reported, self._consolidated, self._replicas = True, None, None
        self.entries = [Entry(Parameter(**p), weakref.ref(t)) for p, t in zip(parameters, tensors, strict=True)]
        waiting = SavedState.parse({"shampoo": saved})
        self.waiting_state, self._elsewhere, self.awaited = waiting, None, None
        self.rejected_steps = waiting.rejected_steps
        self.configs()


def _parts(tensor: Tensor, name: str | None, kinds: frozenset[str]) -> Sequence[Part]:
    """What a host says that a tensor is made of; else the one parameter that it is, by its unsharded shape."""
    for host in hosts():
        parts = host.parts(tensor, name)
        if parts is not None:
            return parts
    shapes = (host.global_shape(tensor) for host in hosts())
    shape = next((shape for shape in shapes if shape is not None), tuple(tensor.shape))
    return [Part("", shape, name, kinds)]


def _refuse_reshaping(before: ShampooConfig, after: ShampooConfig) -> None:
    """All ranks raise this before they exchange anything."""
    shape = before.shape_of_state()
    for name, value in after.shape_of_state().items():
        if value != shape[name]:
            raise OptionError(
                f"Shampoo option {name!r} = {getattr(after, name)!r} is not allowed: it was {getattr(before, name)!r} "
                "at the first step, and blocks and state have that shape; load a state dict to start with other options"
            )


def _reshaped(parameter: Parameter, before: ShampooConfig, after: ShampooConfig) -> bool:
    """Whether a parameter's blocks or state would be others under other options."""
    patterns = {"exclude": None, "no_decay": None, "rules": None}  # these count by their effect
    same = {**before.shape_of_state(), **patterns} == {**after.shape_of_state(), **patterns}
    return not same or treat(parameter, before) != treat(parameter, after)


def _without_names(state: Mapping[Any, Mapping[str, Any]]) -> dict[Any, dict[str, Any]]:
    """torch's ``"state"`` without what only stands there for its name."""
    return {
        number: {name: value for name, value in entry.items() if name == "step" or value is not entry.get("step")}
        for number, entry in state.items()
    }


def _trains(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad
