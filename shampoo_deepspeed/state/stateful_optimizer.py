"""A blockwise optimizer apart from its step: how it is built, its parameter groups, and what it reports."""

from __future__ import annotations

import logging
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from shampoo_deepspeed.distributed.frameworks import UNEVEN_INPUTS, LayoutError, adapters
from shampoo_deepspeed.engine.parameter_registry import ParameterRegistry
from shampoo_deepspeed.options.checks import OptionError
from shampoo_deepspeed.options.combinations import refuse_unused_peak
from shampoo_deepspeed.options.config import GIVEN_NAMES, ShampooConfig, canonical
from shampoo_deepspeed.options.model_search import FoundModels, find_models
from shampoo_deepspeed.options.names import nearest
from shampoo_deepspeed.options.param_groups import checked_group, group_options, printed_group, unknown_keys
from shampoo_deepspeed.runtime.metrics import read
from shampoo_deepspeed.state.averages import Averages
from shampoo_deepspeed.state.units import StateKeeper

logger = logging.getLogger("shampoo_deepspeed")

# What gives a group a kind of weight decay of its own, which may read the ``peak_lr`` of all groups.
OF_DECAY = frozenset({"weight_decay_type", "decoupled_weight_decay", "use_decoupled_weight_decay", "preset"})


class BlockOptimizer(Averages):
    """A blockwise optimizer apart from its step: torch's interface over two parts, the registry and the state keeper.

    Each base class has one subject in a file of its own: units, entries for tools, state dicts, copies, averages.
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
        if not any(isinstance(item, dict) and OF_DECAY & item.keys() for item in given):
            refuse_unused_peak(ShampooConfig.from_options(options))
        for adapter in adapters():
            adapter.admit(type(self))
            if model is None:
                model = adapter.model_under_construction(options, given)
        self.registry, self.state_keeper = ParameterRegistry(process_group), StateKeeper()
        self.entries, self.policies = self.registry.entries, self.registry.policies
        self._warned = False
        self._without_units()
        self.rejected_steps = 0
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

    def join_hook(self, **_: Any) -> Any:
        """Raise LayoutError: a rank that has no inputs left cannot step, as torch's ``Join`` would have it."""
        raise LayoutError(f"Shampoo cannot be one of the joinables of torch's Join: {UNEVEN_INPUTS}")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, at any time; its tensors join at their first gradient.

        Raises:
            OptionError: for an option that is unknown, out of range, or that all groups must share.
        """
        if not isinstance(param_group, dict):
            super().add_param_group(param_group)  # raises
        known = {key for earlier in self.param_groups for key in earlier}
        for key in sorted(unknown_keys(param_group) - known, key=str):
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
            first refresh, and with solvers that compute no eigenvalues. ``update_rms``: root mean square of the
            updates of this rank's elements, before the learning rate and decoupled decay, in the first step after
            an earlier call. ``rejected_steps``: all since the start; that of the very last step is not known yet.
        """
        return read([unit.measured() for unit in self.units], self.rejected_steps)


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


def _check_types(params: Any, model: Any, process_group: Any) -> None:
    module = isinstance(params, nn.Module) and not isinstance(params, nn.ParameterList)
    if module or isinstance(params, (Tensor, Mapping)):
        what = "a Module; give its named_parameters()" if module else type(params).__name__
        raise TypeError(f"params is {what}; allowed: an iterable of parameters, (name, parameter) pairs or groups")
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model = {model!r} is not allowed: None, or the nn.Module that the parameters belong to")
    if process_group is not None and not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(f"process_group = {process_group!r} is not allowed: None, or a torch.distributed.ProcessGroup")
