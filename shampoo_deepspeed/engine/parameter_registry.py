"""The parameters that an optimizer was given: their names, policies and options, and new step units of them."""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from shampoo_deepspeed.distributed.frameworks import (
    REBUILD,
    Entry,
    FlatMember,
    LayoutError,
    NewTensor,
    Parameter,
    adapters,
    plain_layouts,
)
from shampoo_deepspeed.engine.first_step_log import nameless_matrices, places_of_work, policy_table, unmatched_patterns
from shampoo_deepspeed.engine.master_weights import refuse_rounding
from shampoo_deepspeed.engine.policy import Policy, policy_of
from shampoo_deepspeed.engine.refresh_schedule import refresh_phases
from shampoo_deepspeed.engine.step_unit import StepUnit
from shampoo_deepspeed.options.checks import OptionError, learning_rate, short
from shampoo_deepspeed.options.config import OPTION_NAMES, ShampooConfig
from shampoo_deepspeed.options.model_search import FoundModels, find_models, replaced
from shampoo_deepspeed.options.parameter_names import as_in_model, clean_names, kinds_by_shape, names_and_kinds
from shampoo_deepspeed.options.rules import expanded

logger = logging.getLogger("shampoo_deepspeed")

# Options that are checked again when a group has changed one; lr is read at every step and may be a tensor.
CHECKED_OPTIONS = tuple(name for name in OPTION_NAMES if name != "lr")

# The dtypes of weights that can be trained. Frozen ones may have any.
TRAINED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Names and kinds of parameters, by ``id``.
Known: TypeAlias = dict[int, tuple[str | None, frozenset[str]]]

# The warning about parameters without names: once in a process, which may build an optimizer for each layer.
WARNED: list[str] = []


class Checked(NamedTuple):
    """The options of a group that were checked last, apart from ``lr``, and their types: False equals 0.0."""

    values: list[Any]
    types: list[type]
    config: ShampooConfig


class ParameterRegistry:
    """Part of an optimizer: keeps its parameters, decides their policies, and builds their step units.

    It holds only weak references to parameters: frameworks replace them by shards, and nothing unsharded may stay
    alive.

    Attributes:
        entries: all parameters, in the order in which they were given.
        policies: how each parameter is treated, by its key.
        checked: the options of each param group that were checked last, by the group's number.
        rates: the learning rate of each group that was checked last.
        configs: options by the numbers of groups and of rules.
        replicas: the ranks that hold replicas of unsharded parameters.
    """

    def __init__(self, replicas: dist.ProcessGroup | None) -> None:
        self.entries: list[Entry] = []
        self.policies: dict[str, Policy] = {}
        self.checked: dict[int, Checked] = {}
        self.rates: dict[int, float | Tensor] = {}
        self.configs: dict[int, ShampooConfig] = {}
        self.replicas = replicas
        self.reported = False
        self._models: list[weakref.ref[nn.Module]] = []  # that have named parameters
        self._searched: set[bool] = set()  # for replaced parameters, in a step without and in one with gradients
        self._known: Known | None = None  # while the optimizer is built

    @property
    def models(self) -> list[nn.Module]:
        """Models that have named parameters, as far as they still exist."""
        return [model for reference in self._models if (model := reference()) is not None]

    def attach_model(self, model: nn.Module) -> None:
        """Attach the wrapped model of the parameters."""
        if self.replicas is None and isinstance(model, nn.parallel.DistributedDataParallel):
            self.replicas = model.process_group
        for adapter in adapters():
            adapter.attach_model(model)

    def know_names(self, models: FoundModels, unheld: Sequence[Tensor] = ()) -> None:
        """Take names and kinds from these models for parameters that are added from now on, until `forget_names`.

        Args:
            unheld: tensors of which the shape may tell something if no model holds them.
        """
        self._known = self._known_from(models, unheld)

    def forget_names(self) -> None:
        """Search again for the models of parameters that are added from now on."""
        self._known = None

    def add_group(self, group: dict[str, Any]) -> None:
        """Register the parameters of a new param group, and give it its number.

        Raises:
            OptionError: for an option that does not fit, and for parameters that cannot be trained; nothing is added.
        """
        number = max(self.checked, default=-1) + 1
        try:
            self.entries += self._new_entries(group, number, self._known_of(group["params"]))
            group["shampoo_group"] = number
            self.check(group)
        except OptionError:
            self.entries[:] = [entry for entry in self.entries if entry.parameter.group != number]
            raise

    def check(self, group: dict[str, Any], units: Iterable[StepUnit] = ()) -> None:
        """Check the options of a group as they are now, and decide the policies of its parameters by them.

        The group then holds them as Python's own numbers, tuples and strings, which state dicts and JSON can hold.

        Args:
            units: those that have been built.

        Raises:
            OptionError: for a value that is not allowed, or that may not change after the first step.
        """
        number = group["shampoo_group"]
        known = self.checked.get(number)
        config = ShampooConfig(**{name: group[name] for name in OPTION_NAMES}).with_peak()
        if known is not None and any(p.group == number for unit in units for p in unit.parameters):
            _refuse_reshaping(known.config, config)
        own = [entry for entry in self.entries if entry.parameter.group == number]
        self.refuse_dtypes(number, config)
        self.policies |= {entry.parameter.key: policy_of(entry.parameter, config) for entry in own}
        group.update({name: getattr(config, name) for name in OPTION_NAMES})
        values = [group[name] for name in CHECKED_OPTIONS]
        self.checked[number] = Checked(values, list(map(type, values)), config)
        self.rates[number] = config.lr
        self.configs = expanded({known: config for known, (_, _, config) in self.checked.items()})

    def refuse_dtypes(self, number: int, config: ShampooConfig) -> None:
        """Raise OptionError if these options cannot be those of a group's trained parameters, by their dtypes."""
        for entry in self.entries:
            tensor = entry.reference()
            if entry.parameter.group == number and tensor is not None and tensor.requires_grad:
                refuse_rounding(config, tensor.dtype)

    def check_again(
        self, groups: Sequence[dict[str, Any]], changed: Sequence[dict[str, Any]], units: Sequence[StepUnit]
    ) -> None:
        """Check what has changed in param groups since they were checked; a faulty scheduler changes no parameter.

        A learning rate on a device is not read, as that would wait.

        Args:
            groups: all of the optimizer.
            changed: those of which options other than ``lr`` have changed.
            units: those that have been built, which follow.

        Raises:
            OptionError: as `check`, for the first group that has a wrong value; all groups keep their options then.
        """
        before = self.checked.copy(), self.rates.copy(), self.configs, self.policies.copy()
        for place, group in enumerate(groups):
            try:
                if any(group is other for other in changed):
                    self.check(group, units)
                else:
                    group["lr"] = self.rates[group["shampoo_group"]] = learning_rate("lr", group["lr"])
            except OptionError as error:
                self.checked, self.rates, self.configs = before[:3]
                self.policies |= before[3]
                named = f" ({short(group['name'])})" if group.get("name") is not None else ""
                raise OptionError(f"in parameter group {place}{named}: {error}") from None
        if changed:
            for unit in units:
                unit.follow(self.policies, self.configs)

    def keys_by_group(self, groups: Sequence[Mapping[str, Any]]) -> dict[int, list[str]]:
        """Keys of the parameters of each group by its number, in the order of its tensors.

        Frameworks replace tensors and keep their order, so it is that in which they were given.
        """
        keys: dict[int, list[str]] = {number: [] for number in self.checked}
        for entry in self.entries:
            keys[entry.parameter.group].append(entry.parameter.key)
        known = self.keys_by_tensor()
        for group in groups:
            if all(id(tensor) in known for tensor in group["params"]):
                keys[group["shampoo_group"]] = [known[id(tensor)] for tensor in group["params"]]
        return keys

    def keys_by_tensor(self) -> dict[int, str]:
        """The key of each parameter that is a tensor of its own, by the tensor's ``id``, unless it was replaced."""
        counts = Counter(id(entry.reference()) for entry in self.entries)
        return {n: e.parameter.key for e in self.entries if counts[n := id(e.reference())] == 1 and n != id(None)}

    def new_units(
        self, optimizer: torch.optim.Optimizer, fresh: Sequence[NewTensor], loads: Mapping[int, Sequence[float]]
    ) -> Iterable[StepUnit]:
        """Build units of tensors that have none, one after the other.

        Args:
            loads: the loads of each process group's ranks by all units, including the last one; by the group's ``id``.
        """
        self._refuse_nameless()
        keys = self.keys_by_tensor()
        for item in fresh:  # they may have been frozen until now
            _refuse_untrainable(item.tensor, keys.get(id(item.tensor), item.place))
            if item.tensor.requires_grad:
                refuse_rounding(self.checked[item.group].config, item.tensor.dtype)
        self._rehome(fresh)
        candidates = (adapter.layouts(optimizer, self.entries, fresh) for adapter in adapters())
        layouts = next((found for found in candidates if found is not None), None)
        if layouts is None:
            layouts = plain_layouts(self.entries, fresh, self.replicas)
        phases = refresh_phases((entry.parameter for entry in self.entries), self.policies, self.configs)
        for layout in layouts:
            prior_loads = loads.get(id(layout.process_group))
            yield StepUnit(layout, self.policies, self.configs, prior_loads, phases)

    def _rehome(self, fresh: Sequence[NewTensor]) -> None:
        """Give parameters that were moved to another group before their first step the options of that one."""
        numbers = {id(item.tensor): item.group for item in fresh}
        for place, entry in enumerate(self.entries):
            parameter, number = entry.parameter, numbers.get(id(entry.reference()))
            if number is not None and number != parameter.group:
                moved = replace(parameter, group=number)
                self.entries[place] = replace(entry, parameter=moved)
                self.policies[moved.key] = policy_of(moved, self.checked[number].config)

    def _refuse_nameless(self) -> None:
        """Raise OptionError on all ranks under ``strict_names`` if nothing tells which parameters are embeddings."""
        if any(config.strict_names for config in self.configs.values()):
            nameless = nameless_matrices([e.parameter for e in self.entries], self.policies, self.configs)
            if nameless is not None:
                raise OptionError(f"strict_names = True: {nameless}")

    def refuse_replaced(self, waiting: Sequence[NewTensor]) -> None:
        """Raise LayoutError at the first step if the model has replaced parameters, so that nothing would train them.

        One that is still in the model is unused or frozen for a while. One that was taken out of it has no successor
        of its name. Neither is an error, and parameters that no module ever held are not judged.

        Args:
            waiting: the trainable tensors in the optimizer's groups.
        """
        trained = any(item.tensor.grad is not None for item in waiting)
        if self.reported or trained in self._searched:
            return
        own = {id(tensor): e for e in self.entries if e.held and (tensor := e.reference()) is not None}
        given = {own[id(item.tensor)].parameter.key: item.tensor for item in waiting if id(item.tensor) in own}
        if all(tensor.grad is not None for tensor in given.values()):
            return
        self._searched.add(trained)
        names = replaced(given, self._models, all_gone=not trained)
        if names:
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            raise LayoutError(
                f"{len(names)} of the optimizer's {len(self.entries)} parameters are no longer the model's and would "
                f"never be trained ({shown}): it was wrapped or converted, or got new layers, after the optimizer was "
                f"built; {REBUILD}"
            )

    def report(self, units: Iterable[StepUnit]) -> None:
        """Log once, on the first rank, how the parameters are treated, and warn about likely mistakes.

        Args:
            units: those of the first step.
        """
        first = not dist.is_initialized() or dist.get_rank() == 0
        if first and not self.reported:
            trained = [e.parameter for e in self.entries if _trains(e)]
            logger.info("Shampoo preconditions:\n%s", policy_table(trained, self.policies, self.configs))
            for line in places_of_work((u.device, u.compute_device, u.plan.loads[u.rank]) for u in units):
                logger.info(line)
            given = [e.parameter for e in self.entries]
            for mistake in unmatched_patterns(given, self.configs.values()):
                logger.warning(mistake)
            nameless = nameless_matrices(given, self.policies, self.configs)
            if nameless is not None and not WARNED:
                WARNED.append(nameless)
                logger.warning(nameless)
        self.reported = True

    def _known_of(self, added: Sequence[Tensor]) -> Known:
        """Names and kinds of a group's parameters, also of one that joins a finished optimizer."""
        if self._known is not None:
            return self._known
        others = (entry.reference() for entry in self.entries)
        return self._known_from(find_models([*added, *(tensor for tensor in others if tensor is not None)]), added)

    def _known_from(self, models: FoundModels, unheld: Sequence[Tensor]) -> Known:
        """What these models tell; later it can be seen whether they still hold the parameters."""
        self._models += [weakref.ref(model) for model in models.named_by]
        return known_from(models, unheld)

    def _new_entries(self, group: dict[str, Any], number: int, known: Known) -> list[Entry]:
        """The entries of a new group's parameters."""
        tensors = group["params"]
        given = group.get("param_names", [None] * len(tensors))
        for name in given:
            if name is not None and not isinstance(name, str):
                raise OptionError(f"{name!r} is not allowed as the name of a parameter: a string is")
        names = _names(tensors, given, known)
        found = []
        for index, (tensor, name) in enumerate(zip(tensors, names, strict=True)):
            if tensor.is_complex():
                raise OptionError(f"parameter {name or index} is complex; Shampoo supports real parameters only")
            if is_lazy(tensor):
                raise OptionError(f"parameter {name or index} of a lazy module has no shape yet; run one forward first")
            _refuse_untrainable(tensor, name or index)
            kinds = known[id(tensor)][1] if id(tensor) in known else frozenset[str]()
            found += [(index, member) for member in _members(tensor, name, kinds)]
        taken = {entry.parameter.key for entry in self.entries}
        count = Counter([*taken, *(member.name for _, member in found)])
        entries = []
        for index, member in found:
            key = member.name
            if key is None or count[key] > 1:  # of a user's equal names none is the right one
                place = ".".join(filter(None, (f"group{number}.{index}", member.path)))
                key = place if given[index] is None else given[index]
            if key in taken:
                raise OptionError(
                    f"two parameters have the name {key!r}; names must differ, as they are the keys of the state"
                )
            taken.add(key)
            position, frozen = member.position, not tensors[index].requires_grad
            position = position if position is not None else index
            parameter = Parameter(key, member.shape, number, member.name, member.kinds, frozen, position)
            held = known.get(id(tensors[index]), (None, None))[0] is not None
            entries.append(Entry(parameter, weakref.ref(tensors[index]), held=held))
        return entries


def known_from(models: FoundModels, unheld: Sequence[Tensor] = ()) -> Known:
    """Names and kinds of the parameters of models, and what the shapes of tensors that no model holds tell."""
    known: Known = {}
    for model in models.outermost:
        for number, (_, kinds) in names_and_kinds(model).items():
            known[number] = (None, kinds | known.get(number, (None, frozenset()))[1])
    for model in reversed(models.named_by):
        for number, (name, kinds) in names_and_kinds(model).items():
            known[number] = (name, kinds | known.get(number, (None, frozenset()))[1])
    loose = [tensor for tensor in unheld if id(tensor) not in known]
    by_shape = kinds_by_shape([_shape(tensor) for tensor in loose])
    return known | {id(tensor): (None, kinds) for tensor, kinds in zip(loose, by_shape, strict=True)}


def _names(tensors: Sequence[Tensor], given: Sequence[str | None], known: Known) -> list[str | None]:
    """The names of parameters without what wrappers have added: a user's, or else the model's."""
    names: list[str | None] = []
    texts: dict[int, str] = {}  # the models say nothing of these
    for place, (tensor, name) in enumerate(zip(tensors, given, strict=True)):
        path, _ = known.get(id(tensor), (None, None))
        names.append(path if name is None or path is None else as_in_model(name, path))
        if name is not None and names[place] is None:
            texts[place] = name
    for place, text in zip(texts, clean_names(list(texts.values())), strict=True):
        names[place] = text
    return names


def _members(tensor: Tensor, name: str | None, kinds: frozenset[str]) -> Sequence[FlatMember]:
    """The parameters in a tensor: those that an adapter knows in a flat tensor, else a single one."""
    for adapter in adapters():
        members = adapter.flat_members(tensor, name)
        if members is not None:
            return members
    return [FlatMember("", _shape(tensor), name, kinds)]


def _refuse_untrainable(tensor: Tensor, name: str | int) -> None:
    """Raise OptionError for a tensor that requires a gradient and that no step could update."""
    if not tensor.requires_grad:
        return
    if _is_view_of_others(tensor):
        raise OptionError(
            f"parameter {name} cannot be written to: its elements share memory, or are negated when they are read; "
            "give a copy, nn.Parameter(tensor.detach().clone())"
        )
    if tensor.dtype not in TRAINED:
        allowed = ", ".join(str(dtype) for dtype in TRAINED)
        raise OptionError(f"parameter {name} is in {tensor.dtype} and is trained; allowed: {allowed}")


def _is_view_of_others(tensor: Tensor) -> bool:
    """Whether writing to an element would change others, or is what torch's kernels do not support."""
    if tensor.layout is not torch.strided:
        return False
    return tensor.is_neg() or any(
        size > 1 and not step for size, step in zip(tensor.shape, tensor.stride(), strict=True)
    )


def _shape(tensor: Tensor) -> tuple[int, ...]:
    """The unsharded shape of a parameter."""
    shapes = (adapter.global_shape(tensor) for adapter in adapters())
    return next((shape for shape in shapes if shape is not None), tuple(tensor.shape))


def _refuse_reshaping(before: ShampooConfig, after: ShampooConfig) -> None:
    """Raise OptionError if an option that shapes state has changed; all ranks do, before they exchange anything."""
    for name in before.reshaped_by(after):
        raise OptionError(
            f"Shampoo option {name!r} = {after.in_force(name)!r} is not allowed: it was {before.in_force(name)!r} "
            "at the first step, and blocks and state depend on it; load a state dict to start with other options"
        )


def _trains(entry: Entry) -> bool:
    """Whether a parameter requires a gradient; of one that a framework has replaced since, whether it did."""
    tensor = entry.reference()
    return not entry.parameter.frozen if tensor is None else tensor.requires_grad
