"""class Shampoo: a torch optimizer that preconditions blocks under any sharding. Read `step` first."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shampoo_deepspeed.algorithm.found_inf import FoundInf
from shampoo_deepspeed.distributed.exchange import Bucket, Transit
from shampoo_deepspeed.engine.agreement import agree, rejections
from shampoo_deepspeed.engine.parameter_registry import CHECKED_OPTIONS, Checked
from shampoo_deepspeed.engine.shard_update import AppliedAtOnce, apply_updates, shard_gradients
from shampoo_deepspeed.engine.step_unit import StepUnit
from shampoo_deepspeed.geometry.boxes import Take
from shampoo_deepspeed.linalg.precision import full_precision
from shampoo_deepspeed.options.config import ShampooConfig
from shampoo_deepspeed.options.param_groups import signature_with_options
from shampoo_deepspeed.state.stateful_optimizer import BlockOptimizer

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from shampoo_deepspeed.options.typed import Options

logger = logging.getLogger("shampoo_deepspeed")

# Buckets in flight at a time, each way. A bucket with a refresh computes for several times as long as the others. The
# link would be unused meanwhile if only one bucket were sent ahead.
IN_FLIGHT = 8


class Shampoo(BlockOptimizer):
    """Shampoo (arXiv 1802.09568, 2309.06497) and KL-Shampoo (2509.03378), exact under every sharding.

    For each block (a box of at most ``max_preconditioner_dim`` along each dim of a parameter of order k) with
    gradient G, divided by its parameter's root mean square, one step of the defaults computes:

        X_i = G multiplied along every other dim j by A_j^(−1/2)
        A_i ← β A_i + (1 − β) (X_i)_(i) (X_i)_(i)ᵀ / n_i    along every dim i; β is ``factor_beta``, n_i the size of
        M ← β₁ M + (1 − β₁) G                               the other dims
        U = M ×₁ A_1^(−1/2) ··· ×ₖ A_k^(−1/2)
        W ← W − lr (s U + wd · W)                           s gives s U a root mean square of 0.4 (``grafting``)

    Inverse roots are refreshed densely from the second step on, and every ``precondition_frequency`` steps later;
    before the first refresh U is M. The option ``preconditioner`` chooses Shampoo or SOAP instead. Vectors, scalars,
    embeddings and output heads get Adam's update, at rates of their own (``elementwise_lr``,
    ``embedding_lr``, ``tied_embedding_lr``).

    Args:
        params: parameters, ``(name, parameter)`` pairs, or parameter groups. Names let ``exclude`` and ``no_decay``
            work and become the keys of the state.
        lr: learning rate.
        model: the model that holds the parameters, for names and module types if ``params`` has none. The optimizer
            does not keep it.
        process_group: ranks that hold replicas of unsharded parameters and get equal gradients; they divide the work.
            A ``model`` wrapped in DistributedDataParallel brings its own. Without a group every rank does all of the
            work, with the same result. Sharded parameters do not need it.
        **options: the fields of ``ShampooConfig``; groups may have their own. ``preset="paper"`` stands for those of
            arXiv 2309.06497; options that are given as well take precedence over it.

    Raises:
        OptionError: an unknown option or a value out of range (a ValueError).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = ShampooConfig.lr,
        *,
        model: nn.Module | None = None,
        process_group: dist.ProcessGroup | None = None,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, model, process_group, {"lr": lr, **options})

    @torch.inference_mode(False)  # state that is made in it could not be changed later
    @torch.no_grad()
    @torch.compiler.disable  # torch.compile must leave the step as it is: blocks are batched already
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step of all tensors in ``param_groups`` that have a gradient.

        Raises:
            LayoutError: at the first step, if the framework's shards are inconsistent or not supported.
            RuntimeError: if ``failure_limit`` steps in a row were rejected or roots of a block failed, or if a CUDA
                graph is being captured.
        """
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a step of Shampoo cannot be captured in a CUDA graph: it counts steps on the CPU, and refreshes read "
                "the device; capture forward and backward, and call step() outside of the graph"
            )
        if self.averages_in_use or self.in_step:
            self.refuse_now("step()")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            if self.averages_in_use:
                self.refuse_now("step()")
        units = self._units_now()  # the first time: describes shards, assigns owners, plans transfers
        self.in_step = True  # a signal's handler must not save what is half done
        try:
            self._step_units(units)
        finally:
            self.in_step = False
        return loss

    def _step_units(self, units: Sequence[StepUnit]) -> None:
        """Take one step of these units."""
        configs = self.configs()
        rates = self.registry.rates | {group["shampoo_group"]: group["lr"] for group in self.param_groups}
        self._finish_step(units)
        self.state_keeper.consolidated = None
        work = [(unit, shard_gradients(unit, configs)) for unit in units]
        agreed = agree(work, configs)
        for unit, (_, gradients, active) in work:
            if not any(unit.steps) and unit.layout.may_probe and not agreed.any_gradient():
                self._show_step(unit)
                continue  # a tool's hidden first call, which is only to create state
            found_inf = agreed.found_inf(unit)  # None if the step is known to be accepted
            of_blocks = agreed.found_inf_of_blocks(unit)
            norms, steps = agreed.squared_norms(unit), agreed.count_step(unit, active)
            with full_precision(unit.compute_device.type):
                self._show_step(unit)
                # In one bucket all updates are there at once, so nothing would be saved.
                if len(unit.exchange.buckets) > 1 and AppliedAtOnce.possible(unit, configs, rates):
                    apply = AppliedAtOnce(unit, active, configs, rates, found_inf)
                    _precondition(unit, gradients, apply, steps, configs, of_blocks)
                    unit.elementwise.step(gradients, apply, steps, configs, found_inf, norms)
                    apply.finish()
                    continue
                updates = [torch.empty(n, dtype=unit.dtype, device=unit.device) for n in unit.sizes]
                _precondition(unit, gradients, updates, steps, configs, of_blocks)
                unit.elementwise.step(gradients, updates, steps, configs, found_inf, norms)
                apply_updates(unit, updates, active, configs, rates, found_inf)

    def _units_now(self) -> list[StepUnit]:
        """The step units of the current ``param_groups``; new tensors with a gradient get theirs here."""
        if self.state_keeper.released or len(self.state) < len(self.unit_of):
            self._take_released()
        units: dict[int, StepUnit] = {}
        present, lacks_units, has_changed = Counter[int](), False, False
        for group in self.param_groups:
            for tensor in group["params"]:
                unit = self.unit_of.get(id(tensor))
                if unit is not None:
                    units[id(unit)] = unit
                    present[id(unit)] += 1
                    has_changed |= self.group_of[id(tensor)] != group["shampoo_group"]
                elif tensor.requires_grad or tensor.grad is not None:
                    lacks_units = True
        if has_changed or any(unit.left_out or present[n] != len(unit.tensors) for n, unit in units.items()):
            self._note_groups(units.values())
        return self._units_in_step() if lacks_units or not units else list(units.values())

    def configs(self) -> Mapping[int, ShampooConfig]:
        """Options by number as in the groups now, checked again only if one has changed; ``lr`` may be live."""
        registry = self.registry
        changed = [group for group in self.param_groups if not _unchanged(group, registry.checked)]
        if changed or not all(_same_rate(group, registry.rates) for group in self.param_groups):
            registry.check_again(self.param_groups, changed, self.units)
        return registry.configs

    def finish_step(self) -> None:
        """Read the flags of the last step, which otherwise happens at the next one. Runs no collective."""
        self._finish_step(self.units)

    def _finish_step(self, units: Iterable[StepUnit]) -> None:
        """Count these units' last step if it was rejected."""
        configs = self.registry.configs.values()  # which stay if all groups are taken out
        for _ in rejections(units, next((config.failure_limit for config in configs), 1)):
            self.rejected_steps += 1
            logger.warning(
                "a step was rejected: a gradient was not finite or too large (%d so far)", self.rejected_steps
            )

    def _show_step(self, unit: StepUnit) -> None:
        """Give every tensor a ``step`` entry: torch's tools treat an empty ``state`` as that before the first step."""
        for tensor in unit.tensors:
            self.state[tensor]["step"] = unit.step_tensor


def _unchanged(group: Mapping[str, Any], checked: Mapping[int, Checked]) -> bool:
    """Whether a group has the options that were checked last, apart from ``lr``."""
    known, values = checked.get(group["shampoo_group"]), [group[name] for name in CHECKED_OPTIONS]
    try:
        return known is not None and known.types == list(map(type, values)) and known.values == values
    except (RuntimeError, ValueError):  # a tuple now holds arrays or tensors of several elements
        return False


def _same_rate(group: Mapping[str, Any], rates: Mapping[int, float | Tensor]) -> bool:
    """Whether a group has the learning rate that was checked last; a tensor may have changed in place."""
    return isinstance(group["lr"], float) and group["lr"] is rates.get(group["shampoo_group"])


def _precondition(
    unit: StepUnit,
    gradients: Sequence[Tensor],
    updates: Sequence[Tensor] | Take[Tensor],
    steps: Sequence[int],
    configs: Mapping[int, ShampooConfig],
    found_inf: FoundInf | None,
) -> None:
    """Send gradients to the owners of blocks, step their stacks, and send updates back.

    While a bucket is computed, gradients of the next ones arrive and updates of the last ones leave.
    """
    exchange = unit.exchange
    buckets = exchange.buckets
    exchange.begin_step(waits=not all(config.overlap for config in configs.values()))
    arriving = deque(exchange.send_gradients(bucket, gradients) for bucket in buckets[:IN_FLIGHT])
    leaving: deque[tuple[Bucket, Transit]] = deque()
    for number, bucket in enumerate(buckets):
        shapes = [(stop - first, *unit.stacks[stack].shape) for stack, (first, stop) in bucket.rows]
        blocks = [torch.empty(shape, dtype=unit.dtype, device=unit.compute_device) for shape in shapes]
        exchange.receive_gradients(bucket, arriving.popleft(), gradients, blocks)
        if number + IN_FLIGHT < len(buckets):
            arriving.append(exchange.send_gradients(buckets[number + IN_FLIGHT], gradients))
        if found_inf is not None:
            found_inf.mask_(blocks)
        made = []
        for index, (place, (first, stop)) in enumerate(bucket.rows):
            stack, parameters = unit.stacks[place], unit.parameters_of_rows[place][first:stop]
            rows = [steps[parameter] for parameter in parameters]
            made.append(stack.step(first, blocks[index], rows, configs[stack.options], found_inf).contiguous())
        if len(leaving) == IN_FLIGHT:
            exchange.receive_updates(*leaving.popleft(), updates)
        leaving.append((bucket, exchange.send_updates(bucket, made, updates)))
        del blocks, made  # before those of the next bucket are made
    for bucket, transit in leaving:
        exchange.receive_updates(bucket, transit, updates)


Shampoo.__signature__ = signature_with_options(Shampoo.__init__)  # type: ignore[attr-defined]
