"""A stack's stored tensors, and rows of them as the mathematics sees them: decoded when read, stored when asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from shampoo_deepspeed.algorithm.formats import Form, form_of, salts_of, seeds_of, stored_forms

# What parts of a step may have changed, by how names begin: accumulation, a refresh, and the update.
STATISTICS, REFRESHED, MOMENTS = ("factor_",), ("root_", "basis_"), ()


class Rows(Mapping[str, Tensor]):
    """Rows of a stack's state by the state's names. A tensor is decoded when it is first read.

    Args:
        forms: of all tensors of the state, by name.
        stored: the stored tensors' rows, by stored name; `store` writes to them.
        salts: int32 [B], of the rows' blocks (`formats.salts_of`).
        step: the blocks' step, counted from 1.
        whole: the rows of which these are some, and which. Moments are decoded and stored there, once a step, and what
            else has been decoded there is not decoded again.
    """

    def __init__(
        self,
        forms: Mapping[str, Form],
        stored: Mapping[str, Tensor],
        salts: Tensor,
        step: int,
        whole: tuple[Rows, slice] | None = None,
    ) -> None:
        self._forms, self._stored, self._salts, self._step, self._whole = forms, stored, salts, step, whole
        self._decoded: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        form = self._forms[name]
        if form.format == "float32":
            return self._stored[name]
        if name not in self._decoded:
            if self._whole is not None and (_is_moment(name) or self._whole[0].has_decoded(name)):
                whole, rows = self._whole
                return whole[name][rows]
            self._decoded[name] = form.decode(self._stored)
        return self._decoded[name]

    def has_decoded(self, name: str) -> bool:
        """Whether a tensor is there as the mathematics sees it."""
        return name in self._decoded

    def __iter__(self) -> Iterator[str]:
        return iter(self._forms)

    def __len__(self) -> int:
        return len(self._forms)

    def part(self, rows: slice, alone: bool = False) -> Rows:
        """Some of the rows; ``alone``, for another thread, reads only what is stored, and must not change moments."""
        stored = {name: tensor[rows] for name, tensor in self._stored.items()}
        return Rows(self._forms, stored, self._salts[rows], self._step, None if alone else (self, rows))

    def store(self, kind: tuple[str, ...]) -> None:
        """Store what was decoded of a kind: STATISTICS, REFRESHED or MOMENTS. Later reads see what is stored."""
        for name, form in self._forms.items():
            if form.format == "float32" or not (name.startswith(kind) if kind else _is_moment(name)):
                continue
            shared = self._whole is not None and self._whole[0].has_decoded(name)
            if not shared and name not in self._decoded:
                continue
            # Roots and bases are made anew, so nothing accumulates in them.
            seeds = None if kind == REFRESHED else seeds_of(self._salts, name, self._step)
            form.encode_(self._stored, self[name], seeds)
            self._decoded.pop(name, None)
            if shared:
                self[name].copy_(form.decode(self._stored))


def _is_moment(name: str) -> bool:
    return not name.startswith((*STATISTICS, *REFRESHED))


class NarrowState:
    """How a stack stores its state, if it does not keep all of it as the mathematics sees it.

    ``narrow`` is False if it keeps all of it so, which costs nothing then.

    Args:
        row: the state of one block that has not seen a gradient, each tensor [1, *shape]; only shapes and dtypes count.
        formats: of ``"factor"``, ``"root"`` and ``"moment"``.
        keys: of the stack's blocks, in row order.
    """

    def __init__(
        self, row: Mapping[str, Tensor], formats: Mapping[str, str], keys: Sequence[str], device: torch.device
    ) -> None:
        self.forms = {name: form_of(name, tensor[0], formats) for name, tensor in row.items()}
        self.narrow = any(form.format != "float32" for form in self.forms.values())
        self._salts = salts_of(keys if self.narrow else (), device)

    def new_tensors(self, row: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Stored tensors of all blocks, which all have the state of this one."""
        count, out = len(self._salts), {}
        for name, form in self.forms.items():
            one = form.new(1, row[name].device)
            form.encode_(one, row[name], None)
            out.update({stored: t.expand(count, *t.shape[1:]).contiguous() for stored, t in one.items()})
        return out

    def rows(self, stored: Mapping[str, Tensor], rows: slice, step: int) -> Rows:
        """Some rows of the stored tensors, in their blocks' step."""
        return Rows(self.forms, {name: t[rows] for name, t in stored.items()}, self._salts[rows], step)


def converted(
    state: Mapping[str, Tensor], forms: Mapping[str, Form], targets: Mapping[str, Tensor]
) -> list[tuple[str, Form, Form]]:
    """Load a block that is stored in other formats, rounded to nearest where the stack's is narrower.

    Args:
        state: the stored tensors of one block, without a first dim.
        forms: of the stack's state, by name.
        targets: the stack's stored tensors [1, ...] of that block.

    Returns:
        Name, form before and form now of what was converted.
    """
    before = stored_forms({name: (tensor.dtype, tensor.shape) for name, tensor in state.items()})
    changed = []
    for name, form in forms.items():
        if before[name].stored == form.stored:
            for part in form.stored:
                targets[part][0].copy_(state[part])
            continue
        own = {part: state[part].unsqueeze(0) for part in before[name].stored}
        whole = before[name].decode(own)
        device = targets[next(iter(form.stored))].device
        form.encode_(targets, whole.to(device=device, dtype=form.dtype), None)
        changed.append((name, before[name], form))
    return changed
