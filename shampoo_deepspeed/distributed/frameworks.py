"""What an adapter for a framework (DeepSpeed, FSDP, ...) describes: which boxes of which parameter this rank holds.

An adapter does no mathematics. It is asked at the first step of new tensors, because frameworks swap parameters after
the optimizer is built. If no adapter claims the tensors, they are treated as unsharded (`plain_layouts`).
"""

from __future__ import annotations

import gc
import weakref
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.metadata import entry_points
from operator import attrgetter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shampoo_deepspeed.geometry.boxes import Box, PlacedBox, whole

ENTRY_POINTS = "shampoo_deepspeed.frameworks"

# What to do if DDP's replicas step with different gradients.
UNEQUAL_REPLICAS = (
    "local SGD, no_sync() around a step, or ranks with other data and no all-reduce. The work is divided among the "
    "replicas, so each step needs the same gradients on all of them; to step replicas on their own, let each do all of "
    "the work: build Shampoo from the model without DDP's wrapper (model=ddp.module), without process_group, and with "
    "accelerate call accelerator.prepare()"
)
# What to do if the model has other parameters than the optimizer.
REBUILD = "build the optimizer from the model as it is now: optimizer = Shampoo(model.named_parameters(), ...)"
# What to do about uneven inputs.
UNEVEN_INPUTS = (
    "within join() of DDP, torch's Join, or accelerate's join_uneven_inputs(), a rank with fewer inputs stops "
    "stepping, but each step needs all replicas that divide the work; to let each rank do all of the work, build "
    "Shampoo from the model without DDP's wrapper (model=ddp.module), without process_group, and with accelerate call "
    "accelerator.prepare(); or make the inputs even"
)


class LayoutError(RuntimeError):
    """The framework's shards are inconsistent or not supported; the message explains why."""


@dataclass(frozen=True)
class Parameter:
    """A model parameter by its global shape; the same on all ranks.

    ``group`` is the number of its parameter group. ``name`` is None if no names are known. ``frozen`` says whether it
    required no gradient when it was given to the optimizer. ``position`` sorts the parameters of a group.
    """

    key: str
    shape: tuple[int, ...]
    group: int
    name: str | None = None
    kinds: frozenset[str] = frozenset()
    frozen: bool = False
    position: int = 0


@dataclass(frozen=True)
class FlatMember:
    """One of the parameters that a flat tensor given to an optimizer is made of; ``path`` distinguishes it.

    ``position`` is its place in the order of the unwrapped model's parameters, if known.
    """

    path: str
    shape: tuple[int, ...]
    name: str | None = None
    kinds: frozenset[str] = frozenset()
    position: int | None = None


@dataclass(frozen=True)
class Shard:
    """One box of a parameter that this rank holds.

    The box is contiguous (row-major) from element ``offset`` on in the flattened local tensor number ``tensor``.
    """

    parameter: int
    box: Box
    tensor: int
    offset: int

    @property
    def placed(self) -> PlacedBox:
        """The box, and where it lies in the flattened local tensor."""
        return PlacedBox.contiguous(self.box, self.offset)


@dataclass
class Layout:
    """A step unit: tensors that are stepped together, and this rank's shards in them.

    Args:
        parameters: all of the unit, including those of which this rank holds nothing; the same list on all ranks.
        tensors: the tensors in ``param_groups``; their local parts are all on one device.
        groups: parameter group number of each tensor.
        shards: this rank's shards, and their places in the tensors.
        process_group: the ranks whose shards make up the parameters; None if this rank holds all of them alone.
        may_probe: whether a framework or tool may first call ``step()`` with zero gradients, which must do nothing.
        one_rank_saves: whether the framework stores only one rank's state dict, though ranks own different blocks.
        agrees: whether ranks must ask each other which parameters take part, because a gradient is also None on ranks
            that hold nothing; costs a small all-reduce and a read on the CPU per step.
        homes: the number of the tensor that contains each parameter, even if this rank's part of it is empty; None
            if there is only one tensor. Parameters of one tensor take part in a step together.
        part: which of several equally named sets of parameters this is: with expert parallelism ranks hold different
            experts under the same names.
        parts: how many such sets there are.
        local: the local part of a tensor in ``param_groups``, as a view that can be updated.
        gradient: the gradient of that part, None if the tensor takes no part in the step.
        problem: what is wrong on this rank; raised on all ranks together, so that none waits for another.
        if_unequal: what to do if ranks that hold the same shards have different gradients.
        may_not_step: why no step is possible now, asked at each step; None if one is.
        whole_step: combines a flag, whether a gradient is not finite, over all ranks and all calls of ``step()`` of
            one step of the framework; None if a step of the framework is one call, on the ranks of the process group.
    """

    parameters: list[Parameter]
    tensors: list[Tensor]
    groups: list[int]
    shards: list[Shard]
    process_group: dist.ProcessGroup | None = None
    may_probe: bool = True
    one_rank_saves: bool = False
    agrees: bool = False
    homes: list[int] | None = None
    part: int | None = None
    parts: int = 1
    local: Callable[[Tensor], Tensor] = Tensor.detach
    gradient: Callable[[Tensor], Tensor | None] = attrgetter("grad")
    problem: str | None = None
    if_unequal: str = "all ranks that hold the same shard must step with the same gradient"
    may_not_step: Callable[[], str | None] | None = None
    whole_step: Callable[[Tensor], Tensor] | None = None


@dataclass
class Entry:
    """A parameter as the optimizer was given it; the reference is weak, so nothing unsharded is kept alive.

    ``stand_in`` is a framework's copy of it in ``param_groups``, once an adapter has found it. ``held`` says whether a
    module held it when the optimizer got it.
    """

    parameter: Parameter
    reference: weakref.ref[Tensor] = field(repr=False)
    stand_in: weakref.ref[Tensor] | None = field(default=None, repr=False)
    held: bool = False


@dataclass
class NewTensor:
    """A trainable tensor that belongs to no unit yet, its group's number, and its place in the group."""

    tensor: Tensor
    group: int
    place: int


class Adapter(ABC):
    """The interface of adapters; only `layouts` must be implemented. All ranks call the methods alike.

    If one answer is needed, the first adapter that gives one is used, in the order of the entry points' names.
    """

    @abstractmethod
    def layouts(
        self, optimizer: torch.optim.Optimizer, entries: Sequence[Entry], fresh: Sequence[NewTensor]
    ) -> list[Layout] | None:
        """Layouts that together hold all fresh tensors, or None if these tensors are not this framework's."""

    def model_under_construction(self, options: dict[str, Any], given: Sequence[Any]) -> nn.Module | None:
        """The model whose parameters an optimizer is given, if the framework knows it.

        Called when an optimizer is built, and when a state is loaded before its first step. May complete ``options``
        with defaults that hold under this framework only.
        """
        return None

    def model_found(self, model: nn.Module, options: dict[str, Any], given: Sequence[Any]) -> None:  # noqa: B027
        """Called when an optimizer is built without a model, with an outermost module that holds its parameters.

        May complete ``options`` with defaults that hold under this framework only.
        """

    def attach_model(self, model: nn.Module) -> None:  # noqa: B027 (most frameworks need no model)
        """Called before an optimizer takes parameters, with the model that holds them, if it is known."""

    def admit(self, optimizer_class: type) -> None:  # noqa: B027 (most frameworks take any optimizer)
        """Tell the framework that it can work with this class.

        Raises:
            LayoutError: if the framework builds the optimizer and cannot work with it.
        """

    def global_shape(self, parameter: Tensor) -> tuple[int, ...] | None:
        """The unsharded shape, if the framework hides it; None for a parameter that is not the framework's."""
        return None

    def flat_members(self, tensor: Tensor, name: str | None) -> Sequence[FlatMember] | None:
        """The parameters that a flat tensor is made of, given the tensor's name; None if it is a single one."""
        return None

    def joining(self, waiting: Sequence[NewTensor]) -> list[NewTensor]:
        """The tensors among these, without a gradient here, that join because other ranks have a gradient.

        Called at each step with all trainable tensors that have no unit. Most frameworks give all ranks a gradient or
        none, and need not ask the other ranks.
        """
        return []

    def why_not_whole(self, tensor: Tensor) -> str | None:
        """Why a tensor without a layout of any adapter cannot be treated as unsharded; None if it can."""
        return None

    def state_entries(self, optimizer: Any) -> dict[int, dict[str, Tensor]] | None:
        """What the framework's own checkpoint tool gets as the optimizer's ``state``, by ``id`` of the tensors.

        None unless that tool is asking for the state dict right now. The optimizer is a ``BlockOptimizer``, which has
        ``gathered_entries`` and ``external_entries`` for this.
        """
        return None

    def loaded_entries(self, optimizer: Any) -> dict[int, dict[str, Any]] | None:
        """What the framework's own checkpoint tool was given to load, by ``id`` of the tensors.

        None unless that tool is loading right now. A tool may leave out entries, and values in them, before it calls
        ``load_state_dict``.
        """
        return None

    def note_load(self, optimizer: Any) -> None:  # noqa: B027 (most frameworks keep no state of their own)
        """Called when a loaded state dict says that the state is kept in another place.

        ``optimizer.external_state`` is what ``BlockOptimizer.with_external_state`` was given when it was saved. May run
        on the ranks one after another.
        """

    def weights_will_change(self, optimizer: Any) -> None:  # noqa: B027 (most models have no copies of weights)
        """Drop copies of weights that are about to be changed between two steps. Called on all ranks together."""

    def weights_changed(self, optimizer: Any) -> None:  # noqa: B027 (most models hold the optimizer's tensors)
        """Pass weights on to the model that were changed between two steps. Called on all ranks together."""

    def resume(self, optimizer: Any) -> None:  # noqa: B027 (most frameworks keep no state of their own)
        """Load the state that ``optimizer.external_state`` names, if there is any.

        Called on all ranks together, in steps that may build units, and before averages of a loaded state are used.
        """

    def kept_out(self, optimizer: Any) -> list[NewTensor]:
        """The tensors that the framework steps but keeps out of ``param_groups`` between steps."""
        return []


@cache
def adapters() -> tuple[Adapter, ...]:
    """All installed adapters, ours and others': the entry points ``shampoo_deepspeed.frameworks``.

    With entry points, the core finds adapters without importing them.

    Raises:
        TypeError: if an entry point is not an adapter.
    """
    points = sorted(entry_points(group=ENTRY_POINTS), key=lambda point: point.name)
    found = tuple(point.load() for point in points)
    for point, adapter in zip(points, found, strict=True):
        if not isinstance(adapter, Adapter):
            raise TypeError(f"entry point {point.name!r} of {ENTRY_POINTS} is {adapter!r}, not an instance of Adapter")
    return found


def plain_layouts(
    entries: Sequence[Entry], fresh: Sequence[NewTensor], replicas: dist.ProcessGroup | None
) -> list[Layout]:
    """Layouts of unsharded parameters: of one process, or of replicas, which divide the work if their group is known.

    Either all replicas have a gradient or none has. DistributedDataParallel ensures this: it asks all ranks which
    parameters were used (``find_unused_parameters``), and one that was used anywhere gets its gradient everywhere.

    Raises:
        LayoutError: for tensors that some wrapper has sharded.
    """
    known = {id(e.reference()): e.parameter for e in entries}
    units: dict[tuple[torch.device, torch.dtype], list[NewTensor]] = defaultdict(list)
    for item in fresh:
        _refuse_sharded(item.tensor)
        units[item.tensor.device, compute_dtype(item.tensor)].append(item)
    layouts, wrappers = [], _wrappers_of(fresh) if replicas is not None else []
    for items in units.values():
        parameters = [known[id(item.tensor)] for item in items if id(item.tensor) in known]
        if len(parameters) != len(items):
            raise LayoutError(
                "some tensors in param_groups are not the parameters that the optimizer was built with, and no known "
                "framework has put them there; build the optimizer after wrapping the model, and add new parameters by "
                "add_param_group()"
            )
        _refuse_resized(parameters, items)
        layout = whole_tensors(parameters, items)
        if replicas is not None and dist.get_world_size(replicas) > 1:
            layout.process_group, layout.one_rank_saves = replicas, True
            layout.if_unequal, layout.may_not_step = UNEQUAL_REPLICAS, partial(_uneven_inputs, wrappers)
        layouts.append(layout)
    return layouts


def _wrappers_of(items: Sequence[NewTensor]) -> list[weakref.ref[Any]]:
    """The modules in DistributedDataParallel that hold any of these tensors.

    They are searched for, because a wrapper may be put around the model after the optimizer was built.
    """
    own = {id(item.tensor) for item in items}
    wrapped = (found for found in gc.get_objects() if issubclass(type(found), nn.parallel.DistributedDataParallel))
    return [weakref.ref(ddp) for ddp in wrapped if not own.isdisjoint(map(id, ddp.parameters()))]


def _uneven_inputs(wrappers: Sequence[weakref.ref[Any]]) -> str | None:
    """Why replicas cannot step together if DDP's join() lets some of them end before the others."""
    ddps = (wrapper() for wrapper in wrappers)
    if any(ddp is not None and ddp._join_config.enable for ddp in ddps):
        return UNEVEN_INPUTS
    return None


def whole_tensors(parameters: list[Parameter], items: Sequence[NewTensor]) -> Layout:
    """The layout of unsharded tensors, one parameter each."""
    shards = [Shard(n, whole(item.tensor.shape), n, 0) for n, item in enumerate(items) if item.tensor.numel()]
    homes = list(range(len(items)))
    return Layout(parameters, [i.tensor for i in items], [i.group for i in items], shards, homes=homes)


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of moments and updates: float32 or wider."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _refuse_resized(parameters: Sequence[Parameter], items: Sequence[NewTensor]) -> None:
    """Raise LayoutError if a parameter has been given other sizes in place, as new tokens do to an embedding."""
    for parameter, item in zip(parameters, items, strict=True):
        if parameter.shape != tuple(item.tensor.shape):
            raise LayoutError(
                f"{parameter.key} has the shape {tuple(item.tensor.shape)} and had {parameter.shape} when the "
                f"optimizer was built; {REBUILD}"
            )


def _refuse_sharded(tensor: Tensor) -> None:
    if hasattr(tensor, "device_mesh") and hasattr(tensor, "placements"):
        raise LayoutError("these parameters are DTensors, and no installed adapter supports them")
    for reason in (adapter.why_not_whole(tensor) for adapter in adapters()):
        if reason is not None:
            raise LayoutError(reason)
