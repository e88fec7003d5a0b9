"""A rank's blocks of one shape and the same options as stacked tensors, and their step: gradient in, update out."""

from __future__ import annotations

import itertools
import logging
import math
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from shampoo_deepspeed.algorithm import grafting
from shampoo_deepspeed.algorithm.background import Refresh
from shampoo_deepspeed.algorithm.formats import Form, described
from shampoo_deepspeed.algorithm.found_inf import FoundInf
from shampoo_deepspeed.algorithm.narrow_state import MOMENTS, REFRESHED, STATISTICS, NarrowState, Rows, converted
from shampoo_deepspeed.algorithm.preconditioners import Preconditioner, build
from shampoo_deepspeed.algorithm.preconditioners.refresh_result import RefreshResult
from shampoo_deepspeed.algorithm.refresh_errors import free_cached_memory, survivable
from shampoo_deepspeed.linalg.precision import ACCURATE_NORMS
from shampoo_deepspeed.options.config import ShampooConfig
from shampoo_deepspeed.runtime.devices import Arriving
from shampoo_deepspeed.runtime.metrics import RefreshMeter

logger = logging.getLogger(__name__)

# A step makes half a dozen passes over its blocks and as many temporaries. On the CPU these cause page faults and cache
# misses unless few blocks at a time go through all of them; longer stacks do not make kernels faster there.
CACHED_BYTES = 2 << 20
# A refresh holds a dozen temporaries of this size. On the CPU, decompositions run one after another anyway. On
# accelerators, larger batches do not fill a device better, and cuSOLVER takes 32,767 matrices at most.
REFRESHED_BYTES = 512 << 10
REFRESHED_ON_ACCELERATORS = 256 << 20
MOST_REFRESHED = 8192
# The largest root mean square of a block's update without grafting. Without shocks these updates reach about 1.
LONGEST_RMS = 6.0
# The root mean square up to which a preconditioned update counts as zero, if moments were scaled to about 1 before.
FADED = 2.0**-100


class UnreadRefresh(NamedTuple):
    """A refresh of these rows: which of them did not fail is on its way to the CPU.

    If ``found_inf`` has rejected the step, nothing of it counts.
    """

    rows: range
    good: Arriving
    found_inf: FoundInf | None


class BlockStack:
    """State and step of B equal blocks, one row each.

    Args:
        keys: block keys, ``"parameter/index"``, in row order.
        shape: the blocks' shape.
        config: the options when it is built; those that do not shape state may change later, in ``step``.
        dtype: dtype of moments and updates, float32 or float64.
        phases: each row's refresh phase, in ascending order; None if all rows refresh together.
        options: the number of the blocks' options (``Policy.options``).

    Attributes:
        unread: refreshes of which the CPU does not know yet what failed.
        counted_failures: ``failures``, without those of ``unread``.
    """

    def __init__(
        self,
        keys: Sequence[str],
        shape: tuple[int, ...],
        config: ShampooConfig,
        device: torch.device,
        dtype: torch.dtype,
        phases: Sequence[int] | None = None,
        options: int = 0,
    ) -> None:
        self.keys = tuple(keys)
        self.phases = phases
        self.shape = shape
        self.options = options
        self._device = device
        self._dtype = dtype
        self._use(config)
        self._narrow = NarrowState(self._new_state(1, torch.device("meta")), self._config.formats, self.keys, device)
        self.narrow = self._narrow.narrow  # whether any of the state is stored in another form than it is computed with
        self.tensors = self._new_tensors()
        # Without factor matrices there is nothing to refresh, and blocks are preconditioned from the start.
        self._refreshes = any(name.startswith("factor_") for name in self.forms)
        self._meter = RefreshMeter()
        self._reset_counts()

    @cached_property
    def _least(self) -> Tensor:
        """A number that vanishes next to the root mean square of a block whose largest element is 1."""
        return torch.full((), 2.0**-60, dtype=self._dtype, device=self._device)

    @cached_property
    def _zero(self) -> Tensor:
        return torch.zeros((), dtype=self._dtype, device=self._device)

    def _reset_counts(self) -> None:
        self.refreshed = [not self._refreshes] * len(self.keys)
        self.counted_failures = [0] * len(self.keys)
        self.unread: deque[UnreadRefresh] = deque()
        # Rows whose refresh in the background is not installed yet; None if it has not begun since loading.
        self.pending: dict[int, Refresh | None] = {}
        self._has_converted = False

    @property
    def failures(self) -> list[int]:
        """How many refreshes of each row have failed in a row; waits for the last one if that has not been read yet."""
        self._take_unread(waits=True)
        return self.counted_failures

    @property
    def meter(self) -> RefreshMeter:
        """The meter of the refreshes that the device has finished; waits for nothing."""
        self._take_unread(waits=False)
        return self._meter

    def _take_unread(self, waits: bool) -> None:
        """Note the refreshes that nobody has read yet, if they have arrived."""
        while self.unread and (waits or self.unread[0].good.arrived):
            refresh = self.unread.popleft()
            if refresh.found_inf is None or not refresh.found_inf.rejected:
                good = refresh.good.read()
                self._note_refresh(refresh.rows, {place for place, found in enumerate(good) if not found})

    def _new_tensors(self) -> dict[str, Tensor]:
        """The stored state of blocks that have not seen a gradient."""
        if self.narrow:  # all blocks begin alike, so that only one must ever be there in full
            return self._narrow.new_tensors(self._new_state(1, self._device))
        return self._new_state(len(self.keys), self._device)

    def _new_state(self, count: int, device: torch.device) -> dict[str, Tensor]:
        """The state of so many blocks that have not seen a gradient, as the mathematics sees it."""
        name, moments = self._second_moment, (count, *self.shape)
        tensors = self.preconditioner.new_state(count, self.shape, device, self._dtype)
        if self._config.betas[0] != 0.0:
            first = self.preconditioner.first_moment
            tensors[first] = torch.zeros(moments, dtype=self._dtype, device=device)
        if name is not None and name not in tensors:
            tensors[name] = torch.zeros(moments, dtype=self._dtype, device=device)
        return tensors

    @property
    def forms(self) -> Mapping[str, Form]:
        """How each tensor of the state is stored, by name; ``tensors`` has the stored ones."""
        return self._narrow.forms

    def release(self) -> None:
        """Free the state's memory; `renew` must follow before the next step."""
        self._reset_counts()
        self.tensors = {}

    def renew(self) -> None:
        """Start again with new state, after `release`."""
        self.tensors = self._new_tensors()

    def load_row(self, row: int, state: Mapping[str, Tensor], refreshed: bool, failures: int, pending: bool) -> None:
        """Load a stored block, its tensors, perhaps of other formats, and its status, into a row without state."""
        other = state.keys() != self.tensors.keys()
        if other or (self.narrow and any(t.dtype != self.tensors[name].dtype for name, t in state.items())):
            self._load_other_formats(row, state)
        else:
            for name, tensor in state.items():
                self.tensors[name][row].copy_(tensor)
        self.row_is_loaded(row, refreshed, failures, pending)

    def row_is_loaded(self, row: int, refreshed: bool, failures: int, pending: bool) -> None:
        """Note the status of a stored block whose tensors are in a row by now.

        A run that ended with too many failures may resume: one more ends it again.
        """
        self.refreshed[row] = refreshed
        self.counted_failures[row] = min(failures, self._config.failure_limit - 1)
        if pending:
            self.pending[row] = None  # the row's next step begins the refresh again

    def _load_other_formats(self, row: int, state: Mapping[str, Tensor]) -> None:
        changed = converted(state, self.forms, {name: tensor[row : row + 1] for name, tensor in self.tensors.items()})
        if not self._has_converted:
            self._has_converted = True
            logger.warning(
                "blocks of shape %s were saved in other formats, and are converted: %s",
                self.shape,
                ", ".join(f"{name} from {described(before)} to {described(now)}" for name, before, now in changed),
            )

    def _use(self, config: ShampooConfig) -> None:
        """Use these options from now on."""
        self._given, self._config = config, config.for_blocks
        self.preconditioner = build(self._config)
        self._second_moment = _second_moment(self.preconditioner, self._config)

    def step(
        self, first: int, gradients: Tensor, steps: Sequence[int], config: ShampooConfig, found_inf: FoundInf | None
    ) -> Tensor:
        """Updates of the rows from ``first`` on, given their gradients [n, *shape], which are overwritten.

        The updates may share memory with the state: copy them, and do not change them.

        Args:
            steps: each row's step number, counted from 1; rows with 0 take no part: they get update 0 and keep
                their state.
        """
        if config is not self._given:
            self._use(config)
        together = list(self._stepped_together(steps, gradients))
        if len(together) == 1 and together[0][1] > 0:
            return self._advance(first, gradients, together[0][1], found_inf)
        for here, step in together:
            part = gradients[here]
            part.copy_(self._advance(first + here.start, part, step, found_inf) if step > 0 else part.new_zeros(()))
        return gradients

    def _stepped_together(self, steps: Sequence[int], gradients: Tensor) -> Iterator[tuple[slice, int]]:
        """Slices of neighbouring rows with the same step, and that step; on the CPU, short enough for its cache."""
        block = gradients[0].numel() * gradients.element_size()
        most = max(1, CACHED_BYTES // max(1, block)) if gradients.device.type == "cpu" else len(steps)
        begin = 0
        for step, run in itertools.groupby(steps):
            end = begin + len(list(run))
            for start in range(begin, end, most):
                yield slice(start, min(start + most, end)), step
            begin = end

    def _advance(self, first: int, gradients: Tensor, step: int, found_inf: FoundInf | None) -> Tensor:
        """Steps 2 to 7 of the rule (docs/how-a-step-works.md) for neighbouring rows that share a step count.

        Step 1 ends here too, as only the owner of a block has its whole gradient.
        """
        if not self._config.normalize_gradients:
            return self._after_normalizing(first, gradients, step, found_inf, None)
        if gradients.device.type == "cpu":
            doubtful = _normalize_(gradients, self._config.eps)
            updates = self._after_normalizing(first, gradients, step, found_inf, None)
            return updates if doubtful is None else updates * grafting.strengths(doubtful, self._config.eps)
        means = _normalize_there_(gradients, self._least)
        return self._after_normalizing(first, gradients, step, found_inf, means / (means + self._config.eps))

    def _after_normalizing(
        self, first: int, gradients: Tensor, step: int, found_inf: FoundInf | None, strengths: Tensor | None
    ) -> Tensor:
        """``_advance`` after step 1; updates are multiplied by ``strengths`` [B, 1, ..., 1]."""
        rows = range(first, first + len(gradients))
        state = self._opened(slice(first, rows.stop), step)
        if self.pending:
            self._await_background(rows, state, step)
        self.preconditioner.accumulate(state, gradients, step, found_inf)
        if isinstance(state, Rows):
            state.store(STATISTICS)
        installed = self._refresh(rows, state, step, found_inf)
        if len({self.refreshed[row] for row in rows}) == 1:
            updates = self._updates(rows, state, gradients, installed, step, found_inf, strengths)
            if isinstance(state, Rows):
                state.store(MOMENTS)
            return updates
        for here, found in self._alike(rows, installed):
            part, own = _part(state, here), None if strengths is None else strengths[here]
            gradients[here] = self._updates(rows[here], part, gradients[here], found, step, found_inf, own)
        if isinstance(state, Rows):
            state.store(MOMENTS)
        return gradients

    def _opened(self, rows: slice, step: int) -> Mapping[str, Tensor]:
        """The state of some rows as the mathematics sees it; the live tensors where they are stored so."""
        if self.narrow:
            return self._narrow.rows(self.tensors, rows, step)
        return {name: tensor[rows] for name, tensor in self.tensors.items()}

    def squares_so_far(self, steps: Sequence[int]) -> list[tuple[Tensor, float]]:
        """`Preconditioner.squares_so_far` of all rows, of which only a few are decoded at a time."""
        everything, found = slice(0, len(self.keys)), []
        for few in self._few_at_a_time(everything) if self.narrow else [everything]:
            found += self.preconditioner.squares_so_far(self._opened(few, 0), self.shape, steps[few])
        return found

    def _alike(
        self, rows: range, installed: Sequence[tuple[slice, RefreshResult]]
    ) -> Iterator[tuple[slice, list[tuple[slice, RefreshResult]]]]:
        """Neighbouring rows that have all been refreshed or all not, and what was just installed for some of them."""
        for _, places in itertools.groupby(range(len(rows)), lambda place: self.refreshed[rows[place]]):
            found = list(places)
            first, stop = found[0], found[-1] + 1
            within = []
            for whole, result in installed:
                begin, end = max(first, whole.start), min(stop, whole.stop)
                if begin < end:
                    own = result.rows(begin - whole.start, end - whole.start)
                    within.append((slice(begin - first, end - first), own))
            yield slice(first, stop), within

    def _updates(
        self,
        rows: range,
        state: Mapping[str, Tensor],
        gradients: Tensor,
        installed: Sequence[tuple[slice, RefreshResult]],
        step: int,
        found_inf: FoundInf | None,
        strengths: Tensor | None,
    ) -> Tensor:
        """Steps 5 to 7 for rows that are all preconditioned, or all not yet.

        Args:
            installed: the refreshes that were just installed for some of them.
            strengths: factors [B, 1, ..., 1] of the updates, if there are any.
        """
        config, preconditioner, method = self._config, self.preconditioner, self._config.warm_method
        ready, name = self.refreshed[rows[0]], self._second_moment
        second = [] if name is None or (ready and name == preconditioner.filled_by_refresh) else [state[name]]
        kept = [state[preconditioner.first_moment]] if config.betas[0] else []
        own = gradients
        if second and method.startswith(grafting.NORMALIZED):
            own = grafting.normalized(gradients, block_norms(gradients))
        if config.grafting_method == "rms" and not ready:
            return self._warm_to_rms(kept, gradients, step, found_inf, strengths)
        if ready and (preconditioner.rotates_moments or not config.grafts):
            if second:
                grafting.accumulate(method, second, [own], config.second_moment_beta, found_inf)
            return self._updates_in_basis(state, kept, second, gradients, installed, step, found_inf, strengths)
        grafted = grafting.advance(method, kept, second, [gradients], [own], step, config, found_inf)
        # Bias corrections are one factor, which is multiplied in last, because each pass over a block costs time.
        factor = grafted.factor if strengths is None else strengths * grafted.factor
        if not ready:
            return grafted.updates[0] if isinstance(factor, float) and factor == 1.0 else grafted.updates[0] * factor
        moments = grafted.moments[0]
        if not config.normalize_gradients:
            moments, _ = _scaled_moments(moments)
        update = preconditioner.apply(state, gradients, moments, found_inf)
        return _with_length_of(grafted.updates[0], factor, update, self._norms(update))

    def _warm_to_rms(
        self,
        kept: list[Tensor],
        gradients: Tensor,
        step: int,
        found_inf: FoundInf | None,
        strengths: Tensor | None,
    ) -> Tensor:
        """``_updates`` of the given length before the first refresh: in the direction of the first moment."""
        config = self._config
        beta1, corrected = config.betas[0], config.use_bias_correction
        (moments,), correction = grafting.first_moment(
            kept, [gradients], beta1, step, corrected, found_inf, config.beta3
        )
        factors = self._to_rms(moments, moments, correction)
        return moments * (factors if strengths is None else factors * strengths)

    def _updates_in_basis(
        self,
        state: Mapping[str, Tensor],
        kept: list[Tensor],
        second: list[Tensor],
        gradients: Tensor,
        installed: Sequence[tuple[slice, RefreshResult]],
        step: int,
        found_inf: FoundInf | None,
        strengths: Tensor | None,
    ) -> Tensor:
        """``_updates`` if first moments are in the preconditioner's own coordinates, or no length is grafted."""
        config, preconditioner = self._config, self.preconditioner
        seen = preconditioner.project(state, gradients) if preconditioner.rotates_moments else gradients
        beta1, corrected = config.betas[0], config.use_bias_correction
        (moments,), correction = grafting.first_moment(kept, [seen], beta1, step, corrected, found_inf, config.beta3)
        for here, result in installed:
            preconditioner.follow_basis(_part(state, here), result, moments[here] * correction)
        scaled, units = (moments, 1.0) if config.normalize_gradients else _scaled_moments(moments)
        update = preconditioner.apply(state, seen, scaled, found_inf)
        if config.grafting_method == "none":
            lengths = _presence(moments, correction, config) if preconditioner.own_length else correction * units
            own = self._norms(update)
            if own.device.type != "cpu" and strengths is not None and isinstance(lengths, float):
                longest = LONGEST_RMS * math.sqrt(update[0].numel())
                return update.mul_(
                    torch.addcdiv(self._zero, strengths, own.clamp_min_(longest / lengths), value=longest)
                )
            factors = _bounded_factors(update, own, lengths)
            return update.mul_(factors if strengths is None else factors * strengths)
        if config.grafting_method == "rms":
            factors = self._to_rms(update, moments, correction)
            return update.mul_(factors if strengths is None else factors * strengths)
        moments = preconditioner.project_back(state, moments)
        method, beta2 = config.warm_method, config.second_moment_beta
        (length_of,), factor = grafting.update(method, [moments], second, step, beta2, config.eps)
        factor *= correction
        return _with_length_of(
            length_of, factor if strengths is None else strengths * factor, update, self._norms(update)
        )

    def _norms(self, update: Tensor) -> Tensor:
        """The norm of each block of ``update``, as [B, 1, ..., 1], also where its squares are out of range."""
        if self._config.normalize_gradients:  # they are not
            return block_norms(update)
        scales, norms = _scaled_norms(update)
        return scales * norms

    def _to_rms(self, update: Tensor, moments: Tensor, correction: float) -> Tensor:
        """Factors [B, 1, ..., 1] that give each block of ``update`` the root mean square ``UPDATE_RMS``; 0 for zeros.

        They are smaller where first moments have faded (``_presence``). When gradients end, a first moment decays until
        squares underflow. Such a norm is too small, and the factor would be far too large, so these blocks get 0 too.
        """
        length = grafting.UPDATE_RMS * math.sqrt(update[0].numel())
        # Updates of normalized gradients, and first moments themselves, were not made of scaled moments.
        if self._config.normalize_gradients or update is moments:
            own, faded = block_norms(update), math.sqrt(torch.finfo(update.dtype).tiny)
        else:
            own, faded = self._norms(update), FADED
        least = math.sqrt(update[0].numel()) * faded
        if own.device.type != "cpu":
            lengths = torch.threshold(own, least, torch.inf)
            if not self._config.normalize_gradients:
                return length / lengths
            share = correction / _least_norm(moments, self._config)  # see `_presence`
            return torch.addcdiv(
                self._zero, block_norms(moments).clamp_max_(1.0 / share), lengths, value=share * length
            )
        return torch.where(own > least, length / own, 0.0) * _presence(moments, correction, self._config)

    def _refresh(
        self, rows: range, state: Mapping[str, Tensor], step: int, found_inf: FoundInf | None
    ) -> list[tuple[slice, RefreshResult]]:
        """Step 3 of the rule: install what was computed in the background, and refresh what is due.

        Returns:
            What was installed for which of the rows, if the preconditioner's moments have to follow the bases.
        """
        waiting = list(self._waiting(rows)) if self.pending else []
        due = self._due(rows, step)
        if not waiting and not due:
            return []
        unread = not waiting and self._needs_no_read(rows, due)
        # A refresh that waits for the device anyway lets the CPU read the flag here.
        if not unread and found_inf is not None and found_inf.rejected:
            return []
        installed = [found for here, refresh in waiting for found in self._install(rows, state, here, refresh)]
        for here in due:
            if self._config.refresh == "background":
                self._begin(rows[here], _part(state, here), step)
            else:
                for few in self._few_at_a_time(here):
                    installed += self._refresh_now(rows, state, few, step, unread, found_inf)
        return installed if self.preconditioner.rotates_moments else []

    def _needs_no_read(self, rows: range, due: Sequence[slice]) -> bool:
        """Whether these refreshes need no read of an accelerator, as the blocks have roots or bases to fall back to.

        What fails on the device keeps the old ones, and is known before the next refresh, which then reads and tries
        other ways. On the CPU a read costs nothing.
        """
        if self._device.type == "cpu" or self._config.refresh == "background" or self.preconditioner.reads:
            return False
        own = [row for here in due for row in rows[here]]
        failures = self.failures
        return all(self.refreshed[row] and not failures[row] for row in own)

    def _install(
        self, rows: range, state: Mapping[str, Tensor], here: slice, refresh: Refresh | None
    ) -> list[tuple[slice, RefreshResult]]:
        """Install what the background thread has computed for some of the rows; nothing if it could not."""
        assert refresh is not None
        whole = self._result_of(refresh)
        self._meter.take(refresh.meter)
        if whole is None:
            for row in rows[here]:
                del self.pending[row]
            self._note_refresh(rows[here], set(range(len(rows[here]))))
            return []
        result = whole.rows(rows[here][0] - refresh.first, rows[here][-1] + 1 - refresh.first)
        with self._meter.watch.span(self._device):
            part = _part(state, here)
            failed = set(self.preconditioner.install(part, result))
            if isinstance(part, Rows):
                part.store(REFRESHED)
        for row in rows[here]:
            del self.pending[row]
        self._note_refresh(rows[here], failed)
        return [(here, result)]

    def _result_of(self, refresh: Refresh) -> RefreshResult | None:
        """What the thread has computed; None if the device could not."""
        try:
            return refresh.result()
        except RuntimeError as error:
            if not survivable(error):
                raise
            return None

    def _refresh_now(
        self,
        rows: range,
        state: Mapping[str, Tensor],
        here: slice,
        step: int,
        unread: bool,
        found_inf: FoundInf | None,
    ) -> list[tuple[slice, RefreshResult]]:
        """Refresh some of the rows together; if the device cannot, one after the other. Other ranks must not wait.

        Args:
            unread: see ``_needs_no_read``; the step may then be rejected, which ``found_inf`` masks.
        """
        part = _part(state, here)
        try:
            with self._meter.refreshing(self._device) as conditions:
                if unread:
                    asked = conditions if self._meter.asked else None
                    result = self.preconditioner.compute_unread(part, step, asked)
                    assert result.good is not None
                    if found_inf is not None:
                        found_inf.mask_([result.good])
                else:
                    result = self.preconditioner.compute(part, step, conditions)
                failed = set(self.preconditioner.install(part, result))
                if isinstance(part, Rows):
                    part.store(REFRESHED)
            if result.good is None:
                self._note_refresh(rows[here], failed)
            else:
                self.unread.append(UnreadRefresh(rows[here], Arriving(result.good), found_inf))
            return [(here, result)]
        except RuntimeError as error:
            if not survivable(error):
                raise
            logger.warning("a refresh of %d blocks failed: %s", here.stop - here.start, str(error))
        # The error is gone here, and with it the temporaries that its traceback holds.
        free_cached_memory(self._device)
        if here.stop - here.start == 1:
            self._note_refresh(rows[here], {0})
            return []
        ones = (slice(row, row + 1) for row in range(here.start, here.stop))
        return [found for one in ones for found in self._refresh_now(rows, state, one, step, unread, found_inf)]

    def _few_at_a_time(self, here: slice) -> Iterator[slice]:
        """So few rows at a time that the temporaries of a refresh stay small."""
        factors = [math.prod(form.shape) for name, form in self.forms.items() if name.startswith("factor_")]
        largest = max([math.prod(self.shape), *factors])
        most = REFRESHED_BYTES if self._device.type == "cpu" else REFRESHED_ON_ACCELERATORS
        most = max(1, min(MOST_REFRESHED, most // (largest * self.forms[next(iter(self.forms))].dtype.itemsize)))
        for begin in range(here.start, here.stop, most):
            yield slice(begin, min(begin + most, here.stop))

    def _begin(self, rows: range, state: Mapping[str, Tensor], step: int) -> None:
        """Start a refresh in the background; the state stays as it is until these rows' next step, which waits."""
        preconditioner = self.preconditioner
        if isinstance(state, Rows):
            state = state.part(slice(0, len(rows)), alone=True)

        def compute(conditions: list[Tensor]) -> RefreshResult:
            groups = list(self._few_at_a_time(slice(0, len(rows))))
            parts = [preconditioner.compute(_part(state, few), step, conditions) for few in groups]
            return RefreshResult.joined(parts, groups)

        refresh = Refresh(compute, rows[0], self._device)
        self.pending.update(dict.fromkeys(rows, refresh))

    def _await_background(self, rows: range, state: Mapping[str, Tensor], step: int) -> None:
        """Wait for the background refreshes of these rows before their factor matrices change.

        A refresh that was pending when they were saved begins here: it depends only on state that has not changed
        since.
        """
        for here, refresh in list(self._waiting(rows)):
            if refresh is None:
                self._begin(rows[here], _part(state, here), step - 1)
        for _, refresh in self._waiting(rows):
            assert refresh is not None
            self._result_of(refresh)

    def _waiting(self, rows: range) -> Iterator[tuple[slice, Refresh | None]]:
        """Neighbours among these rows whose refresh is pending, as a slice of ``rows``, and that refresh."""
        places = [n for n, row in enumerate(rows) if row in self.pending]
        for (refresh, _), run in itertools.groupby(
            enumerate(places), key=lambda item: (self.pending[rows[item[1]]], item[1] - item[0])
        ):
            found = [place for _, place in run]
            yield slice(found[0], found[-1] + 1), refresh

    def _due(self, rows: range, step: int) -> list[slice]:
        """The rows among these that refresh at this step: one slice at most, as rows are in the order of their phases.

        If refreshes are spread over windows, each row refreshes once per window, at its phase. With
        ``refresh_growth`` the first windows are shorter, and each step in them stands for several phases.
        """
        config = self._config
        if not self._refreshes:
            return []
        if self.phases is None:
            return [slice(0, len(rows))] if config.refreshes_at(step) else []
        if step < config.start:
            return []
        frequency, regular = config.precondition_frequency, config.early_windows[-1]
        if step >= regular:
            place, length = (step - regular) % frequency, frequency
        else:
            begin, length = config.refresh_window(step)
            place = step - begin
        low, high = -(-place * frequency // length), -(-(place + 1) * frequency // length)
        first = bisect_left(self.phases, low, rows.start, rows.stop)
        stop = bisect_left(self.phases, high, first, rows.stop)
        return [slice(first - rows.start, stop - rows.start)] if first < stop else []

    def _note_refresh(self, rows: Sequence[int], failed: set[int]) -> None:
        what = "eigenbasis" if self._config.parts.in_basis else "inverse root"
        for position, row in enumerate(rows):
            if position not in failed:
                self.refreshed[row] = True
                self._meter.rows.add(row)
                self.counted_failures[row] = 0
                continue
            self.counted_failures[row] += 1
            logger.warning(
                "no new %s for block %s: its decomposition failed %d times in a row; the last good one is kept",
                what,
                self.keys[row],
                self.counted_failures[row],
            )


def _second_moment(preconditioner: Preconditioner, config: ShampooConfig) -> str | None:
    """The name of the second moment of grafting or of the updates before the first refresh; None if they have none.

    Updates of a given length need none, nor do blocks without refreshes. If it is not needed after the first refresh,
    it shares the tensor that the refresh fills.
    """
    without = config.grafting_method == "rms" or not (config.grafts or config.parts.statistics)
    if without or not grafting.has_second_moment(config.warm_method):
        return None
    ends = not config.grafts and preconditioner.filled_by_refresh is not None
    return preconditioner.filled_by_refresh if ends else "second_moment"


def _part(state: Mapping[str, Tensor], rows: slice) -> Mapping[str, Tensor]:
    return state.part(rows) if isinstance(state, Rows) else {name: tensor[rows] for name, tensor in state.items()}


def block_norms(stack: Tensor) -> Tensor:
    """Frobenius norm of each block of [B, *shape], as [B, 1, ..., 1]."""
    return torch.linalg.vector_norm(stack, dim=tuple(range(1, stack.ndim)), keepdim=True)


def _normalize_there_(stack: Tensor, least: Tensor) -> Tensor:
    """``_normalize_`` on an accelerator, with few operators and no temporary of the stack's size.

    Args:
        least: what a block of zeros is divided by, 0-d; added to all divisors, next to which it must vanish.

    Returns:
        The root mean squares [B, 1, ..., 1]; blocks of zeros seem to have a huge one.
    """
    # Squares are taken of elements the largest of which is 1, so they are in range, and a norm is 0 or at least 1.
    dims, numel = tuple(range(1, stack.ndim)), math.prod(stack.shape[1:])
    scales = torch.threshold(torch.linalg.vector_norm(stack, math.inf, dim=dims, keepdim=True), 0.0, grafting.UNSEEN)
    means = torch.add(least, block_norms(stack.div_(scales)), alpha=1.0 / math.sqrt(numel))
    stack.div_(means)
    return means.mul_(scales)


def _normalize_(stack: Tensor, eps: float) -> Tensor | None:
    """Divide each block of [B, *shape] on the CPU by its root mean square, in place; a block of zeros stays zero.

    Returns:
        The root mean squares [B, 1, ..., 1], for ``grafting.strengths``; None if all of these are known to be 1.
    """
    scales, norms = _scaled_norms(stack)
    means = norms / math.sqrt(math.prod(stack.shape[1:])) * scales
    stack.div_(torch.where(means > 0, means, 1.0))
    if ((means == 0) | (means > grafting.SURE * eps)).all():
        return None
    return means


def _scaled_norms(stack: Tensor) -> tuple[Tensor, Tensor]:
    """(s, the norm of the block divided by s) for each block, as [B, 1, ..., 1]; s is not 0.

    Squares overflow or underflow long before the elements do. So s is the largest magnitude if squares might not be
    accurate. On the CPU a look at the norms shows whether they are, and s is 1 then, which saves two passes. On an
    accelerator that would be a wait.
    """
    dims = tuple(range(1, stack.ndim))
    if stack.device.type == "cpu":
        norms = block_norms(stack)
        low, high = ACCURATE_NORMS[stack.dtype]
        usual = (norms > low) & (norms < high)
        if usual.all():
            return torch.ones_like(norms), norms
        peaks = torch.maximum(stack.amax(dims, keepdim=True), -stack.amin(dims, keepdim=True))
        peaks = torch.where(usual, 1.0, peaks)  # a block's result must not depend on the others
    else:
        peaks = torch.linalg.vector_norm(stack, math.inf, dim=dims, keepdim=True)
    scales = torch.where(peaks > 0, peaks, 1.0)
    return scales, block_norms(stack / scales)


def _scaled_moments(moments: Tensor) -> tuple[Tensor, Tensor]:
    """First moments of about 1, and by what [B, 1, ..., 1] to multiply what is made of them.

    Roots are bounded such that products of these moments with them stay within float32's range; moments of normalized
    gradients need no scaling. Each block is divided by a power of two, which is exact. A block whose squares would
    underflow counts as zero, like a second moment that has.
    """
    peaks = torch.linalg.vector_norm(moments, math.inf, dim=tuple(range(1, moments.ndim)), keepdim=True)
    units = peaks / torch.frexp(peaks).mantissa / 2.0
    seen = peaks > math.sqrt(torch.finfo(moments.dtype).tiny)
    return moments * torch.where(seen, 1.0 / units, 0.0), torch.where(seen, units, 0.0)


def _with_length_of(other: Tensor, factor: Tensor | float, update: Tensor, own: Tensor) -> Tensor:
    """Scale each block of ``update``, whose norms are ``own``, in place to the length of ``other`` times the factor."""
    lengths = block_norms(other) * factor
    return update.mul_(torch.where(own > 0, lengths / own, 0.0))


def _bounded_factors(update: Tensor, own: Tensor, factors: Tensor | float) -> Tensor:
    """The factors, smaller for blocks of ``update`` that would be longer than ``LONGEST_RMS`` allows.

    Without grafting nothing else bounds the update along directions that the factor matrices have not seen before.
    """
    longest = LONGEST_RMS * math.sqrt(update[0].numel()) / own
    return torch.minimum(longest, factors) if isinstance(factors, Tensor) else longest.clamp_max_(factors)


def _presence(moments: Tensor, correction: float, config: ShampooConfig) -> Tensor | float:
    """Factors [B, 1, ..., 1] up to 1 that shorten updates of a given length once gradients have ended.

    Of normalized gradients, which may be pure noise, the first moment M keeps at least about the root mean square
    sqrt((1 - b1) / (1 + b1)). So if it has less than half of that, as when an expert gets no tokens for some steps, the
    length follows M. Other gradients have no scale to tell that by.
    """
    if not config.normalize_gradients:
        return 1.0
    return (block_norms(moments) * (correction / _least_norm(moments, config))).clamp_max_(1.0)


def _least_norm(moments: Tensor, config: ShampooConfig) -> float:
    """The norm of first moments up to which they show that gradients have ended."""
    beta1 = config.betas[0]
    return 0.5 * math.sqrt((1.0 - beta1) / (1.0 + beta1) * moments[0].numel())


def read_status(status: Sequence[int]) -> tuple[bool, int, bool]:
    """Whether the block was refreshed, failures in a row, whether a refresh is pending."""
    flags, failures = status
    return bool(flags & 1), int(failures), bool(flags & 2)
