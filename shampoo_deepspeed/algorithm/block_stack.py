"""A rank's blocks of one shape and group as stacked tensors, and their step: gradient in, update out."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shampoo_deepspeed.algorithm import grafting
from shampoo_deepspeed.algorithm.background import Refresh
from shampoo_deepspeed.algorithm.found_inf import FoundInf
from shampoo_deepspeed.algorithm.preconditioners import Preconditioner, build
from shampoo_deepspeed.algorithm.preconditioners.refresh_result import RefreshResult
from shampoo_deepspeed.options.config import ShampooConfig
from shampoo_deepspeed.runtime.metrics import RefreshMeter

logger = logging.getLogger(__name__)

# A step makes half a dozen passes over its blocks and as many temporaries. On the CPU these are page faults and cache
# misses unless few blocks at a time go through all of it; kernels gain nothing there from longer stacks.
CACHED_BYTES = 2 << 20
# A refresh holds a dozen temporaries of this size: on the CPU, where decompositions come one after another anyway, and
# elsewhere, where larger batches than this fill a device no better, and cuSOLVER takes 32,767 matrices at most.
REFRESHED_BYTES = 512 << 10
REFRESHED_ELSEWHERE = 256 << 20
MOST_REFRESHED = 8192


class BlockStack:
    """State and step of B equal blocks, one row each.

    Args:
        keys: block keys, ``"parameter/index"``, in row order.
        shape: the blocks' shape.
        config: options at the time of building; those that do not shape state may change, ``step`` gets them.
        dtype: dtype of moments and updates, float32 or float64.
        phases: each row's refresh phase, in rising order; None where all rows refresh together.
    """

    def __init__(
        self,
        keys: Sequence[str],
        shape: tuple[int, ...],
        config: ShampooConfig,
        device: torch.device,
        dtype: torch.dtype,
        phases: Sequence[int] | None = None,
    ) -> None:
        self.keys = tuple(keys)
        self.phases = phases
        self.shape = shape
        self._device = device
        count = len(self.keys)
        preconditioner = build(config)
        self.tensors = preconditioner.new_state(count, shape, device, dtype)
        if config.betas[0] != 0.0:
            self.tensors[preconditioner.first_moment] = torch.zeros(count, *shape, dtype=dtype, device=device)
        name = _second_moment(preconditioner, config)
        if name is not None and name not in self.tensors:
            self.tensors[name] = torch.zeros(count, *shape, dtype=dtype, device=device)
        self.refreshed = [False] * count
        self.failures = [0] * count
        # Rows whose refresh in the background is not installed so far; None where it has not begun since loading.
        self.pending: dict[int, Refresh | None] = {}
        self.meter = RefreshMeter()

    def step(
        self, first: int, gradients: Tensor, steps: Sequence[int], config: ShampooConfig, found_inf: FoundInf
    ) -> Tensor:
        """Updates of the rows from ``first`` on, given their gradients [n, *shape], which are used up.

        They may be state: copy them and leave them as they are.

        Args:
            steps: the number of each row's step, counted from 1; rows with 0 take no part: they get update 0 and
                keep their state.
        """
        runs = list(self._runs(steps, gradients))
        if len(runs) == 1 and runs[0][2] > 0:
            return self._advance(first, gradients, runs[0][2], config, found_inf)
        for begin, end, step in runs:
            part = gradients[begin:end]
            part.copy_(self._advance(first + begin, part, step, config, found_inf) if step > 0 else part.new_zeros(()))
        return gradients

    def _runs(self, steps: Sequence[int], gradients: Tensor) -> Iterator[tuple[int, int, int]]:
        """(begin, end, step) of neighbouring rows with the same step, on the CPU so few that they stay in its cache."""
        block = gradients[0].numel() * gradients.element_size()
        most = max(1, CACHED_BYTES // max(1, block)) if gradients.device.type == "cpu" else len(steps)
        begin = 0
        for step, run in itertools.groupby(steps):
            end = begin + len(list(run))
            for start in range(begin, end, most):
                yield start, min(start + most, end), step
            begin = end

    def _advance(self, first: int, gradients: Tensor, step: int, config: ShampooConfig, found_inf: FoundInf) -> Tensor:
        """Steps 2 to 6 of the rule for neighbouring rows that share a step count."""
        rows = range(first, first + len(gradients))
        state = {name: tensor[first : rows.stop] for name, tensor in self.tensors.items()}
        preconditioner = build(config)
        self._await_background(rows, state, step, preconditioner)
        if config.takes_statistics(step):
            preconditioner.accumulate(state, gradients, found_inf)
        installed = self._refresh(rows, state, step, config, found_inf)
        if not installed and len({self.refreshed[row] for row in rows}) == 1:
            return self._updates(rows, state, gradients, None, step, config, found_inf)
        for here, result in self._alike(rows, installed):
            part = _part(state, here)
            gradients[here] = self._updates(rows[here], part, gradients[here], result, step, config, found_inf)
        return gradients

    def _alike(
        self, rows: range, installed: Sequence[tuple[slice, RefreshResult]]
    ) -> Iterator[tuple[slice, RefreshResult | None]]:
        """Neighbours among these rows that are preconditioned or not so far, and what was just installed for them."""
        number_of = {n: number for number, (here, _) in enumerate(installed) for n in range(here.start, here.stop)}

        def kind(place: int) -> tuple[bool, int | None]:
            return self.refreshed[rows[place]], number_of.get(place)

        for (_, number), places in itertools.groupby(range(len(rows)), kind):
            found = list(places)
            here = slice(found[0], found[-1] + 1)
            if number is None:
                yield here, None
            else:
                whole, result = installed[number]
                yield here, result.rows(here.start - whole.start, here.stop - whole.start)

    def _updates(
        self,
        rows: range,
        state: dict[str, Tensor],
        gradients: Tensor,
        result: RefreshResult | None,
        step: int,
        config: ShampooConfig,
        found_inf: FoundInf,
    ) -> Tensor:
        """Steps 4 to 6 for rows that are all preconditioned, or all not yet."""
        preconditioner, method = build(config), config.warm_method
        ready, name = self.refreshed[rows[0]], _second_moment(preconditioner, config)
        second = [] if name is None or (ready and name == preconditioner.idle) else [state[name]]
        kept = [state[preconditioner.first_moment]] if config.betas[0] else []
        normalizes = grafting.is_normalized(method) and bool(second)
        own = grafting.normalized(gradients, block_norms(gradients)) if normalizes else gradients
        if ready and (preconditioner.turns or config.grafting_method == "none"):
            if second:
                grafting.accumulate(method, second, [own], config.second_moment_beta, found_inf)
            return self._apart(state, kept, second, gradients, result, step, config, found_inf)
        warm = grafting.advance(method, kept, second, [gradients], [own], step, config, found_inf)
        # What a moment or a update lacks is one number, multiplied in last, as each pass over a block costs.
        if not ready:
            return warm.updates[0] if warm.factor == 1.0 else warm.updates[0] * warm.factor
        update = preconditioner.apply(state, gradients, warm.moments[0], found_inf)
        return _grafted(update, warm.updates[0], warm.factor)

    def _apart(
        self,
        state: dict[str, Tensor],
        kept: list[Tensor],
        second: list[Tensor],
        gradients: Tensor,
        result: RefreshResult | None,
        step: int,
        config: ShampooConfig,
        found_inf: FoundInf,
    ) -> Tensor:
        """The same where first moments are kept in coordinates of the preconditioner's own, or no length is grafted."""
        preconditioner, method, beta2 = build(config), config.warm_method, config.second_moment_beta
        seen = preconditioner.enter(state, gradients)
        beta1, corrected = config.betas[0], config.use_bias_correction
        (moments,), lacking = grafting.first_moment(kept, [seen], beta1, step, corrected, found_inf, config.beta3)
        if result is not None:
            preconditioner.settle(state, result, moments * lacking)
        update = preconditioner.apply(state, seen, moments, found_inf)
        if config.grafting_method == "none":
            return update.mul_(lacking)
        moments = preconditioner.leave(state, moments)
        (warm,), factor = grafting.update(method, [moments], second, step, beta2, config.eps)
        return _grafted(update, warm, factor * lacking)

    def _refresh(
        self, rows: range, state: dict[str, Tensor], step: int, config: ShampooConfig, found_inf: FoundInf
    ) -> list[tuple[slice, RefreshResult]]:
        """Step 3 of the rule: install what was computed in the background, and refresh what is due.

        Gives what was installed, and for which of the rows, where the preconditioner has something to settle then.
        """
        preconditioner = build(config)
        what = "eigenbasis" if config.preconditioner == "soap" else "inverse root"
        waiting, due = list(self._waiting(rows)), self._due(rows, step, config)
        # A refresh waits for the device anyway, so here the CPU may as well read the found_inf.
        if (not waiting and not due) or found_inf.rejected:
            return []
        installed = []
        for here, refresh in waiting:
            assert refresh is not None
            result = refresh.result().rows(rows[here][0] - refresh.first, rows[here][-1] + 1 - refresh.first)
            self.meter.take(refresh.meter)
            with self.meter.watch.span(self._device):
                failed = set(preconditioner.install(_part(state, here), result))
            for row in rows[here]:
                del self.pending[row]
            self._note_refresh(rows[here], failed, what)
            installed.append((here, result))
        for here in due:
            if config.refresh == "background":
                self._begin(rows[here], _part(state, here), step, preconditioner)
                continue
            for few in self._pieces(here):
                with self.meter.refreshing(self._device):
                    result = preconditioner.compute(_part(state, few), step)
                    failed = set(preconditioner.install(_part(state, few), result))
                self._note_refresh(rows[few], failed, what)
                installed.append((few, result))
        return installed if preconditioner.turns else []

    def _pieces(self, here: slice) -> Iterator[slice]:
        """So few rows at a time that what a refresh holds beside the state stays small."""
        factors = [tensor[0].numel() for name, tensor in self.tensors.items() if name.startswith("factor_")]
        largest = max(math.prod(self.shape), *factors)
        most = REFRESHED_BYTES if self._device.type == "cpu" else REFRESHED_ELSEWHERE
        most = max(1, min(MOST_REFRESHED, most // (largest * self.tensors[next(iter(self.tensors))].itemsize)))
        for begin in range(here.start, here.stop, most):
            yield slice(begin, min(begin + most, here.stop))

    def _begin(self, rows: range, state: dict[str, Tensor], step: int, preconditioner: Preconditioner) -> None:
        """Compute in the background; the state stays as it is until these rows' next step, which waits for it."""
        device = next(iter(state.values())).device

        def compute() -> RefreshResult:
            pieces = list(self._pieces(slice(0, len(rows))))
            return RefreshResult.joined([preconditioner.compute(_part(state, few), step) for few in pieces], pieces)

        refresh = Refresh(compute, rows[0], device)
        self.pending.update(dict.fromkeys(rows, refresh))

    def _await_background(
        self, rows: range, state: dict[str, Tensor], step: int, preconditioner: Preconditioner
    ) -> None:
        """Let the background be done with these rows before their factors change.

        What was pending when they were saved begins here: it depends on nothing but state that has not changed since.
        """
        for here, refresh in list(self._waiting(rows)):
            if refresh is None:
                self._begin(rows[here], _part(state, here), step - 1, preconditioner)
        for _, refresh in self._waiting(rows):
            assert refresh is not None
            refresh.result()

    def _waiting(self, rows: range) -> Iterator[tuple[slice, Refresh | None]]:
        """Neighbours among these rows whose refresh is pending, as a slice of ``rows``, and that refresh."""
        places = [n for n, row in enumerate(rows) if row in self.pending]
        for (refresh, _), run in itertools.groupby(
            enumerate(places), key=lambda item: (self.pending[rows[item[1]]], item[1] - item[0])
        ):
            found = [place for _, place in run]
            yield slice(found[0], found[-1] + 1), refresh

    def _due(self, rows: range, step: int, config: ShampooConfig) -> list[slice]:
        """Which of these rows refresh at this step: neighbours, as rows lie in the order of their phases."""
        if self.phases is None:
            return [slice(0, len(rows))] if config.refreshes_at(step) else []
        due = [n for n, row in enumerate(rows) if config.refreshes_at(step, self.phases[row])]
        return [slice(due[0], due[-1] + 1)] if due else []

    def _note_refresh(self, rows: Sequence[int], failed: set[int], what: str) -> None:
        for position, row in enumerate(rows):
            if position not in failed:
                self.refreshed[row] = True
                self.meter.rows.add(row)
                self.failures[row] = 0
                continue
            self.failures[row] += 1
            logger.warning(
                "no %s of block %s: its decomposition failed %d times in a row, last good one kept",
                what,
                self.keys[row],
                self.failures[row],
            )

    def export(self) -> dict[str, Any]:
        """State as tensors and builtins; tensors are the live ones."""
        return {
            "keys": list(self.keys),
            "shape": list(self.shape),
            "refreshed": list(self.refreshed),
            "failures": list(self.failures),
            "pending": [row in self.pending for row in range(len(self.keys))],
            "tensors": dict(self.tensors),
        }

    def incompatibility(self, saved: dict[str, Any]) -> str | None:
        """Why an exported stack's blocks cannot be taken over here, or None."""
        same_shape = tuple(saved["shape"]) == self.shape
        if same_shape and _row_shapes(saved["tensors"]) == _row_shapes(self.tensors):
            return None
        return (
            f"saved state of block {saved['keys'][0]} has shape {tuple(saved['shape'])} "
            f"and {_row_shapes(saved['tensors'])}; "
            f"the options now ask for {self.shape} and {_row_shapes(self.tensors)} "
            "(max_preconditioner_dim, one_sided, large_dim, betas, grafting, preconditioner, ... changed)"
        )

    def load_row(self, row: int, saved: dict[str, Any], saved_row: int) -> None:
        """Take one block's state from an exported stack, which must fit, that holds it at ``saved_row``."""
        for name, tensor in self.tensors.items():
            tensor[row].copy_(saved["tensors"][name][saved_row])
        self.refreshed[row] = bool(saved["refreshed"][saved_row])
        self.failures[row] = int(saved["failures"][saved_row])
        self.mark_pending(row, "pending" in saved and bool(saved["pending"][saved_row]))

    def mark_pending(self, row: int, pending: bool) -> None:
        """Whether a loaded block's refresh was under way when it was saved; its next step then installs it."""
        self.pending.pop(row, None)
        if pending:
            self.pending[row] = None


def _second_moment(preconditioner: Preconditioner, config: ShampooConfig) -> str | None:
    """The name of the second moment of the grafting or first updates, if they have one. What is needed until the
    first refresh only lies where the preconditioner keeps something that begins then."""
    if not grafting.has_second_moment(config.warm_method):
        return None
    ends = config.grafting_method == "none" and preconditioner.idle is not None
    return preconditioner.idle if ends else "second_moment"


def _row_shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape[1:]) for name, tensor in sorted(tensors.items())}


def _part(state: Mapping[str, Tensor], rows: slice) -> dict[str, Tensor]:
    return {name: tensor[rows] for name, tensor in state.items()}


def block_norms(stack: Tensor) -> Tensor:
    """Frobenius norm of each block of [B, *shape], as [B, 1, ..., 1]."""
    return torch.linalg.vector_norm(stack, dim=tuple(range(1, stack.ndim)), keepdim=True)


def _grafted(update: Tensor, warm: Tensor, factor: float) -> Tensor:
    """Blocks of ``update``, in place, each with the length of its block of ``warm`` times the factor."""
    lengths, own = block_norms(warm) * factor, block_norms(update)
    return update.mul_(torch.where(own > 0, lengths / own, 0.0))
