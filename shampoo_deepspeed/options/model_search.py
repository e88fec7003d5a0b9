"""Finds the model that holds an optimizer's parameters among the modules that exist, if nobody gives it.

No hook and no call frame is needed: the garbage collector knows all modules. torch's global forward hooks would make
``torch.compile`` compile everything twice, and see only what is called. The search keeps nothing.
"""

from __future__ import annotations

import gc
import types
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, compress, groupby, starmap
from typing import Any

from torch import Tensor, nn

from shampoo_deepspeed.options.parameter_names import clean_path

# Types of no interest: what is put in place of objects of these types.
_DROPPED: dict[type, Iterable[Any]] = dict.fromkeys(
    (
        tuple,
        list,
        dict,
        set,
        frozenset,
        type,
        Tensor,
        nn.Parameter,
        types.BuiltinFunctionType,
        types.CellType,
        types.FunctionType,
        types.GetSetDescriptorType,
        types.MethodType,
        types.ModuleType,
        types.WrapperDescriptorType,
        weakref.ref,
    ),
    (),
)


@dataclass(frozen=True)
class FoundModels:
    """The modules that hold an optimizer's parameters.

    Args:
        named_by: those whose names for the parameters are used, the first that has one: the module of which all
            parameters were given, as far as this can be seen.
        outermost: those that no other module holds. They show how the parameters are used.
    """

    named_by: tuple[nn.Module, ...] = ()
    outermost: tuple[nn.Module, ...] = ()


def find_models(tensors: Sequence[Tensor]) -> FoundModels:
    """The modules that hold these tensors; none for tensors that are in no module."""
    holders, parents = _holders_and_parents({id(tensor) for tensor in tensors})
    wanted = {id(tensor): tensor for tensor in tensors if id(tensor) in holders}
    named_by: list[nn.Module] = []
    outermost: dict[int, nn.Module] = {}
    while wanted:
        around = _with_ancestors(holders[next(iter(wanted))], parents)
        outermost |= {id(module): module for module in around if id(module) not in parents}
        chosen = max(around, key=lambda module: _fitness(module, wanted))
        named_by.append(chosen)
        for parameter in chosen.parameters():
            wanted.pop(id(parameter), None)
    return FoundModels(tuple(named_by), tuple(outermost.values()))


def replaced(given: Mapping[str, Tensor], models: Sequence[weakref.ref[nn.Module]], all_gone: bool) -> list[str]:
    """The names of parameters that their models have replaced: they are not in them, but others of their names are.

    Args:
        given: parameters by the names that they had in their models.
        models: those. If one is gone, a wrapper may have been, so that the modules inside it are searched for.
        all_gone: whether parameters are taken for replaced, by whatever, if none is left.
    """
    living = [model for reference in models if (model := reference()) is not None]
    if len(living) < len(models):
        living += find_models(list(given.values())).outermost
    now = [(model, name, p) for model in living for name, p in model.named_parameters()]
    held = {id(p) for _, _, p in now}
    gone = [name for name, tensor in given.items() if id(tensor) not in held]
    if len(gone) == len(given) and all_gone:
        return gone
    own = set(map(id, given.values()))
    others = {clean_path(model, name) for model, name, p in now if p.requires_grad and id(p) not in own} if gone else ()
    return [name for name in gone if name in others]


def _fitness(module: nn.Module, wanted: Iterable[int]) -> tuple[int, bool, int, str]:
    """How well a module explains which parameters were given.

    It holds many of them; it trains no others; it is as far outside as can be; and what is left is decided by names,
    on all ranks alike.
    """
    own = dict(module.named_parameters())
    held = {id(p) for p in own.values()}.intersection(wanted)
    trained = {id(p) for p in own.values() if p.requires_grad or id(p) in held}
    return len(held), trained == held, sum(1 for _ in module.modules()), min(own)


def _holders_and_parents(wanted: set[int]) -> tuple[dict[int, list[nn.Module]], dict[int, list[nn.Module]]]:
    """The modules that hold each wanted tensor, by its ``id``, and the parents of each module, by its own."""
    holders: dict[int, list[nn.Module]] = defaultdict(list)
    parents: dict[int, list[nn.Module]] = defaultdict(list)
    for module in living_modules():
        parts = module.__dict__  # of a module that is being built, it may lack these
        for parameter in list(parts.get("_parameters", {}).values()):
            if id(parameter) in wanted:
                holders[id(parameter)].append(module)
        for child in list(parts.get("_modules", {}).values()):
            parents[id(child)].append(module)
    return dict(holders), dict(parents)


def living_modules(kind: type = nn.Module, known: Iterable[nn.Module] = ()) -> list[nn.Module]:
    """All modules of the process that are of a class, except those that ``gc.freeze`` has hidden.

    Args:
        known: models whose parts are found even then.

    ``gc.get_objects`` also gives what other threads are building right now. A tuple cannot grow while anything else
    holds it, so a single call into C, during which no other thread runs, drops tuples and most other objects.
    """
    runs = groupby(chain.from_iterable(map(gc.get_objects, (None,))), type)
    drop: Callable[[type, Iterable[Any]], Iterable[Any]] = _DROPPED.get
    objects: list[Any] = list(chain.from_iterable(starmap(drop, runs)))  # a run of other types stays
    modules = set(map(id, kinds := _subclasses(kind)))
    found = list(compress(objects, map(modules.__contains__, map(id, map(type, objects)))))
    del kinds  # until here ids are of living classes
    parts = chain(found, (part for model in known for part in model.modules() if isinstance(part, kind)))
    return list({id(part): part for part in parts}.values())


def _subclasses(kind: type) -> list[type]:
    """A class and all that inherit from it."""
    found = {id(kind): kind}  # classes need not be hashable
    left: list[type] = [kind]
    while left:
        below: type
        for below in type.__subclasses__(left.pop()):
            if id(below) not in found:
                found[id(below)] = below
                left.append(below)
    return list(found.values())


def _with_ancestors(modules: Sequence[nn.Module], parents: dict[int, list[nn.Module]]) -> list[nn.Module]:
    """These modules and all that hold them, at any depth."""
    found = {id(module): module for module in modules}
    left = list(modules)
    while left:
        for parent in parents.get(id(left.pop()), ()):
            if id(parent) not in found:
                found[id(parent)] = parent
                left.append(parent)
    return list(found.values())
