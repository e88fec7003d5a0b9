"""Which tensors a blockwise optimizer trains, and how: groups with their options, names, and units from frameworks."""

from __future__ import annotations

import logging
import reprlib
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shampoo_deepspeed.distributed.frameworks import (
    Entry,
    NewTensor,
    Parameter,
    Part,
    adapters,
    plain_layouts,
)
from shampoo_deepspeed.engine.first_step_log import likely_mistakes, policy_table
from shampoo_deepspeed.engine.policy import Policy, policy_of
from shampoo_deepspeed.engine.refresh_schedule import refresh_phases
from shampoo_deepspeed.engine.step_unit import StepUnit
from shampoo_deepspeed.options.checks import OptionError
from shampoo_deepspeed.options.config import OPTION_NAMES, ShampooConfig, canonical
from shampoo_deepspeed.options.param_groups import checked_group, group_options, unknown_keys
from shampoo_deepspeed.options.parameter_names import clean_name, names_and_kinds
from shampoo_deepspeed.options.rules import expanded
from shampoo_deepspeed.runtime.metrics import read

logger = logging.getLogger("shampoo_deepspeed")

# What a group may change at any time is checked when it has changed; lr is read at every step and may be a tensor.
CHECKED_OPTIONS = tuple(name for name in OPTION_NAMES if name != "lr")


class UnitOptimizer(torch.optim.Optimizer):
    """Keeps the parameter groups, asks frameworks for layouts at the first step, and counts what units report.

    Holds weak references to parameters only: frameworks replace them by shards, and nothing unsharded may stay alive.
    """

    _warned = False  # that steps do nothing

    def __init__(
        self,
        params: Iterable[Any],
        model: nn.Module | None,
        process_group: dist.ProcessGroup | None,
        options: dict[str, Any],
    ) -> None:
        _check_types(params, model, process_group)
        given = list(params)
        options = canonical(options)
        for adapter in adapters():
            adapter.admit(type(self))
            model = model or adapter.model_under_construction(options, given)
        self._replicas = process_group
        self.units: list[StepUnit] = []
        if model is not None:
            self.attach_model(model)
        self._known = names_and_kinds(model) if model is not None else {}
        self.entries: list[Entry] = []
        self.policies: dict[str, Policy] = {}  # by parameter key
        self._unit_of: dict[int, StepUnit] = {}
        self._loads: dict[int, list[float]] = {}  # of each process group's ranks, by all units so far
        self._configs: dict[int, tuple[tuple[Any, ...], ShampooConfig]] = {}  # with the values that were checked
        self.expanded_configs: dict[int, ShampooConfig] = {}  # by the numbers of rules too
        self._reported = False
        self.rejected_steps = 0
        super().__init__(given, group_options(ShampooConfig.from_options(options)))
        self._known = {}

    def attach_model(self, model: nn.Module) -> None:
        """Attach the wrapped model of parameters that were given earlier, as ``model=`` does; before the first step.

        Raises:
            RuntimeError: after the first step, when ranks have divided the work.
        """
        if self.units:
            raise RuntimeError("call attach_model() before the first step: ranks have divided the work now")
        if self._replicas is None and isinstance(model, nn.parallel.DistributedDataParallel):
            self._replicas = model.process_group
        for adapter in adapters():
            adapter.attach_model(model)

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
            self._warn_if_idle(units)
            return list(units.values())
        units |= {id(unit): unit for unit in self._new_units(fresh)}
        return list(units.values())

    def _new_units(self, fresh: Sequence[NewTensor]) -> list[StepUnit]:
        """Units of tensors that have none."""
        candidates = (adapter.layouts(self, self.entries, fresh) for adapter in adapters())
        layouts = next((found for found in candidates if found is not None), None)
        if layouts is None:
            layouts = plain_layouts(self.entries, fresh, self._replicas)
        configs, made = self.configs(), []
        phases = refresh_phases((entry.parameter for entry in self.entries), self.policies, configs)
        for layout in layouts:
            prior_loads = self._loads.get(id(layout.process_group))
            unit = StepUnit(layout, self.policies, configs, prior_loads, phases)
            self._join(unit)
            made.append(unit)
        self._report(configs)
        return made

    def _join(self, unit: StepUnit) -> None:
        """Step this unit from now on."""
        self._take_up(unit)
        self._loads[id(unit.group)] = unit.loads_so_far
        self.units.append(unit)
        self._unit_of.update((id(tensor), unit) for tensor in unit.tensors)

    def _take_up(self, unit: StepUnit) -> None:
        """What a subclass does with a new unit before its first step."""

    def _warn_if_idle(self, units: Mapping[int, StepUnit]) -> None:
        """A wrapper that replaces the model's parameters without the optimizer's knowledge gives no warning itself."""
        if not units and not self._warned and any(group["params"] for group in self.param_groups):
            self._warned = True
            logger.warning(
                "a step found no gradient in any of the optimizer's parameters and did nothing; if the model was "
                "wrapped after the optimizer was built, build the optimizer from the wrapped model"
            )

    def _known_and_waiting(self) -> tuple[dict[int, StepUnit], list[NewTensor]]:
        """The units of the current ``param_groups`` by ``id``, and the trainable tensors that have none yet."""
        waiting: list[NewTensor] = []
        units: dict[int, StepUnit] = {}
        for group in self.param_groups:
            for place, tensor in enumerate(group["params"]):
                unit = self._unit_of.get(id(tensor))
                if unit is not None:
                    units[id(unit)] = unit
                elif tensor.requires_grad or tensor.grad is not None:
                    waiting.append(NewTensor(tensor, group["shampoo_group"], place))
        return units, waiting

    def finish_step(self) -> None:
        """Read the flags of the last step, which otherwise happens at the next one. Runs no collective."""
        raise NotImplementedError

    def _report(self, configs: Mapping[int, ShampooConfig]) -> None:
        first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        if first and not self._reported:
            trained = [e.parameter for e in self.entries if _trains(e.reference())]
            logger.info("Shampoo preconditions:\n%s", policy_table(trained, self.policies, configs))
            for mistake in likely_mistakes([e.parameter for e in self.entries], self.policies, configs):
                logger.warning(mistake)
        self._reported = True

    def _config(self, group: dict[str, Any]) -> ShampooConfig:
        """The group's options, checked again only when one has changed; lr may be a live Tensor."""
        values = tuple(group[name] for name in CHECKED_OPTIONS)
        cached = self._configs.get(group["shampoo_group"])
        if cached is None or cached[0] != values:
            config = ShampooConfig(**{name: group[name] for name in OPTION_NAMES})
            if cached is not None and self._has_state(group["shampoo_group"]):
                _refuse_reshaping(cached[1], config)
            self.policies |= self._policies_under(group["shampoo_group"], config)
            cached = self._configs[group["shampoo_group"]] = (values, config)
            self.expanded_configs = expanded({number: known for number, (_, known) in self._configs.items()})
        return cached[1]

    def _policies_under(self, group: int, config: ShampooConfig) -> dict[str, Policy]:
        """How the parameters of a group are treated, decided whenever they join or the group's options change."""
        return {e.parameter.key: policy_of(e.parameter, config) for e in self.entries if e.parameter.group == group}

    def _has_state(self, group: int) -> bool:
        return any(parameter.group == group for unit in self.units for parameter in unit.parameters)

    def configs(self) -> Mapping[int, ShampooConfig]:
        """Options by parameter group number, and of rules by theirs, as the groups say now."""
        raise NotImplementedError

    def groups_apart(self, numbers: Sequence[int]) -> None:
        """Give groups that a framework has overwritten their numbers, and the options last seen of each."""
        for group, number in zip(self.param_groups, numbers, strict=True):
            config = self._configs[number][1]
            group.update({name: getattr(config, name) for name in OPTION_NAMES}, shampoo_group=number)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, at any time; its tensors join at their first gradient.

        Raises:
            OptionError: for an option that is unknown, out of range, or that all groups must share.
        """
        known = {key for earlier in self.param_groups for key in earlier}
        for key in sorted(unknown_keys(param_group) - known):
            logger.warning(
                "Shampoo has no option %r (= %s in a parameter group), and leaves it to whoever reads it there; "
                "options are %s",
                key,
                reprlib.repr(param_group[key]),
                ", ".join(OPTION_NAMES),
            )
        group = checked_group(param_group, self.defaults)
        super().add_param_group(group)
        added = self.param_groups[-1]
        try:
            self.entries += self._new_entries(added, len(self._configs))
            added["shampoo_group"] = len(self._configs)
            self._config(added)
        except OptionError:  # an option that does not fit a shape, too
            self.param_groups.pop()
            self.entries = [e for e in self.entries if e.parameter.group != len(self._configs)]
            raise

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
                position = part.position if part.position is not None else index
                parameter = Parameter(key, part.shape, number, part.name, part.kinds, frozen, position)
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


def _check_types(params: Any, model: Any, process_group: Any) -> None:
    module = isinstance(params, nn.Module) and not isinstance(params, nn.ParameterList)
    if module or isinstance(params, (Tensor, Mapping)):
        what = "a Module; give its named_parameters()" if module else type(params).__name__
        raise TypeError(f"params is {what}; allowed: an iterable of parameters, (name, parameter) pairs or groups")
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model = {model!r} is not allowed: None, or the nn.Module that the parameters belong to")
    if process_group is not None and not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(f"process_group = {process_group!r} is not allowed: None, or a torch.distributed.ProcessGroup")


def _parts(tensor: Tensor, name: str | None, kinds: frozenset[str]) -> Sequence[Part]:
    """The parameters that a tensor is made of, if an adapter knows it as a flat one; else the single one that it is."""
    for adapter in adapters():
        parts = adapter.parts(tensor, name)
        if parts is not None:
            return parts
    shapes = (adapter.global_shape(tensor) for adapter in adapters())
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


def _trains(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad
