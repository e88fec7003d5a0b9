"""Formats of state: how a stack keeps factor matrices, roots or bases, and moments in fewer bytes. Pure functions.

A format changes what lies in memory and in checkpoints, not what the mathematics sees: that gets float32 (or float64)
tensors, and what it leaves in them is stored again. Rows of a tensor are blocks, and a row depends on its block alone.

- ``"float32"``: as it is.
- ``"packed"``: a symmetric matrix as one triangle, in the order of `triangles`. Exact.
- ``"bfloat16"``: bfloat16, of a symmetric matrix one triangle.
- ``"int8"``: runs of 32 elements with one power of two as their scale, as in MXINT8 of the OCP Microscaling Formats
  Specification 1.0, section 5.2. Of a symmetric matrix one triangle, and its diagonal in float32. Second moments need
  relative accuracy, since the update divides by their root. They get floating-point numbers of 5 exponent and 3
  mantissa bits, whose exponents count from that of the largest in the run.

What accumulates is rounded at random, up with the probability that makes the mean exact (stochastic rounding; Gupta et
al., arXiv 1502.02551, section 3.1), because a slow average rounded to nearest would stand still. The random bits are a
hash of block, tensor, step and element (`random_bits`). So they are the same on every rank and device, and when a run
resumes. A number that the format can hold is never changed: storing again what was read changes nothing.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, wraps

import torch
from torch import Tensor

# Elements of which temporaries are made at a time: 16 MiB in float32 or int32.
PIECE = 1 << 22
# The largest dim of matrices for which it is kept where each element is stored: 6 MiB for each such dim.
KEPT = 1024
Places = Callable[[int, int, int, torch.device], Tensor]
# Elements that share a scale, as in the OCP specification.
RUN = 32
# The range of exponents of scales. 127 times the largest is finite in float32, and the smallest is a normal number.
SMALLEST, LARGEST = -126, 121
# The fraction of 127 / 64 in float32.
ABOVE_127 = 63 << 17
# Largest magnitude of bfloat16.
BFLOAT16_MAX = torch.finfo(torch.bfloat16).max
# Codes of second moments count in eighths of an octave, from 30 octaves below that of the largest in the run.
OCTAVES, EIGHTHS = 30, 8
LARGEST_CODE = OCTAVES * EIGHTHS + EIGHTHS - 1
# The largest finite number of float32, in eighths of an octave.
LARGEST_SQUARE = 254 * EIGHTHS + EIGHTHS - 1
# Names of stored tensors are that of the state's tensor and one of these; only "bfloat16" of other tensors has none.
TRIANGLE, CODES, EXPONENTS, DIAGONAL = ("_" + part for part in ("triangle", "int8", "exponent", "diagonal"))
# The state's tensors that options give a format, by how their names begin.
FACTORS, ROOTS = ("factor_",), ("root_", "basis_")
MOMENTS = ("exp_avg", "rotated_exp_avg", "second_moment", "rotated_second_moment")


@dataclass(frozen=True)
class Form:
    """How one tensor of a stack's state is stored.

    Args:
        name: of the tensor in the state.
        shape: of a row, as the mathematics sees it.
        dtype: as the mathematics sees it.
        format: ``"float32"``, which stands for any dtype as it is, ``"packed"``, ``"bfloat16"`` or ``"int8"``.
        symmetric: whether rows are symmetric matrices, of which only the lower triangles are read.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    format: str
    symmetric: bool

    @property
    def stored(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """The stored tensors by name: dtype, and shape of a row."""
        if self.format == "float32":
            return {self.name: (self.dtype, self.shape)}
        numel = math.prod(self.shape)
        if self.format != "int8":
            dtype = torch.bfloat16 if self.format == "bfloat16" else self.dtype
            if self.symmetric:
                return {self.name + TRIANGLE: (dtype, (triangle_size(self.shape[0]),))}
            return {self.name: (dtype, self.shape)}
        shape = self.shape
        if self.symmetric:
            numel = triangle_size(self.shape[0])
            shape = (numel,)
        found = {self.name + CODES: (torch.int8, shape), self.name + EXPONENTS: (torch.int8, (runs(numel),))}
        if self.symmetric:
            found[self.name + DIAGONAL] = (torch.float32, (self.shape[0],))
        return found

    @property
    def squares(self) -> bool:
        """Whether the elements are means of squares, which the update divides by."""
        return self.name.endswith("second_moment")

    def decode(self, stored: Mapping[str, Tensor]) -> Tensor:
        """The rows [B, *shape] in new tensors, given the stored ones by name; of "float32" the stored tensor itself."""
        if self.format == "float32":
            return stored[self.name]
        source = self._flat(stored)
        out = torch.empty(len(source), *self.shape, dtype=self.dtype, device=source.device)
        for rows in _rows(out):
            if self.symmetric:
                self._decode_matrices(stored, rows, out[rows])
            else:
                flat = out[rows].flatten(1)
                for columns in _columns(flat):
                    flat[:, columns] = self._values(stored, rows, columns).to(self.dtype)
        return out

    def encode_(self, stored: Mapping[str, Tensor], values: Tensor, seeds: Tensor | None) -> None:
        """Store rows [B, *shape], overwriting the stored tensors.

        Args:
            seeds: int32 [B], to round at random; None: to nearest.
        """
        if self.format == "float32":
            stored[self.name].copy_(values)
            return
        for rows in _rows(values):
            own = None if seeds is None else seeds[rows]
            if self.symmetric:
                self._encode_matrices(stored, rows, values[rows], own)
            else:
                flat = values[rows].flatten(1)
                for columns in _columns(flat):
                    self._write(stored, rows, columns, flat[:, columns], own)

    def new(self, count: int, device: torch.device) -> dict[str, Tensor]:
        """Stored tensors of so many rows, all zeros."""
        return {n: torch.zeros(count, *shape, dtype=dtype, device=device) for n, (dtype, shape) in self.stored.items()}

    def _flat(self, stored: Mapping[str, Tensor]) -> Tensor:
        """The stored tensor with one element for each of a row's: [B, n]."""
        return stored[next(iter(self.stored))].flatten(1)

    def _values(self, stored: Mapping[str, Tensor], rows: slice, columns: slice) -> Tensor:
        """Some elements of some stored rows."""
        part = self._flat(stored)[rows, columns]
        if self.format != "int8":
            return part
        exponents = stored[self.name + EXPONENTS][rows, columns.start // RUN : -(-columns.stop // RUN)]
        return from_squares(part, exponents) if self.squares else from_int8(part, exponents)

    def _write(
        self, stored: Mapping[str, Tensor], rows: slice, columns: slice, values: Tensor, seeds: Tensor | None
    ) -> None:
        """Store some elements of some rows."""
        part = self._flat(stored)[rows, columns]
        if self.format == "packed":
            part.copy_(values)
            return
        bits = None if seeds is None else random_bits(seeds, columns.start, values.shape[1])
        values = values.float()
        if self.format == "bfloat16":
            part.copy_(to_bfloat16(values, bits))
            return
        codes, exponents = to_squares(values, bits) if self.squares else to_int8(values, bits)
        part.copy_(codes)
        stored[self.name + EXPONENTS][rows, columns.start // RUN : -(-columns.stop // RUN)] = exponents

    def _strips(self, height: int, width: int) -> Iterator[tuple[int, int]]:
        """So few of these rows at a time that their elements are at most PIECE, and begin with a run."""
        step = max(RUN, PIECE // width // RUN * RUN)
        for begin in range(0, height, step):
            yield begin, min(begin + step, height)

    def _encode_matrices(
        self, stored: Mapping[str, Tensor], rows: slice, matrices: Tensor, seeds: Tensor | None
    ) -> None:
        d, flat = self.shape[0], matrices.flatten(1)
        if self.format == "int8":
            stored[self.name + DIAGONAL][rows] = matrices.diagonal(dim1=-2, dim2=-1).to(torch.float32)
        height, width = rectangle(d)
        for begin, end in self._strips(height, width):
            columns = slice(begin * width, end * width)
            places = places_in_matrix(d, begin, end, flat.device)
            band = flat.index_select(1, places)
            if self.format == "int8":  # the diagonal, which is the largest, would spoil the scales of the others
                for offset in (0, 1):
                    diagonal = begin - 1 + d % 2 + offset
                    band.unflatten(1, (end - begin, width)).diagonal(diagonal, 1, 2).zero_()
            self._write(stored, rows, columns, band, seeds)

    def _decode_matrices(self, stored: Mapping[str, Tensor], rows: slice, out: Tensor) -> None:
        source, d, scales = self._flat(stored)[rows], self.shape[0], None
        if source.shape[1] <= PIECE:  # choosing among float32 numbers is several times as fast
            source = self._values(stored, rows, slice(0, source.shape[1])).to(out.dtype)
        elif self.format == "int8":
            scales = _power_of_two(stored[self.name + EXPONENTS][rows].int().clamp_(SMALLEST, LARGEST))
        for begin, end in self._strips(d, d):
            places = places_in_triangle(d, begin, end, out.device)
            target = out[:, begin:end].view(len(out), -1)  # all of the matrices, or a part of a single one
            if source.dtype == out.dtype:
                torch.index_select(source, 1, places, out=target)
                continue
            target.copy_(source.index_select(1, places))
            if scales is not None:
                target *= scales.index_select(1, places >> RUN.bit_length() - 1)  # the run of each
        if self.format == "int8":
            out.diagonal(dim1=-2, dim2=-1).copy_(stored[self.name + DIAGONAL][rows])


def form_of(name: str, row: Tensor, formats: Mapping[str, str]) -> Form:
    """The form of a tensor of the state.

    Args:
        row: with the shape of a row, on any device.
        formats: of ``"factor"``, ``"root"`` (bases too) and ``"moment"``.
    """
    shape, square = tuple(row.shape), row.ndim == 2
    if name.startswith(FACTORS) and square:
        return Form(name, shape, row.dtype, formats["factor"], True)
    if name.startswith(ROOTS) and square:
        symmetric = name.startswith("root_")
        chosen = formats["root"]
        return Form(name, shape, row.dtype, "float32" if chosen == "packed" and not symmetric else chosen, symmetric)
    chosen = formats["moment"] if name in MOMENTS else "float32"
    return Form(name, shape, row.dtype, chosen, False)


def stored_forms(
    tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]], moments: torch.dtype = torch.float32
) -> dict[str, Form]:
    """The forms of stored tensors, by the state's names.

    Args:
        tensors: dtype and shape of a row by name.
        moments: the dtype in which the mathematics sees what is stored in int8.

    Raises:
        ValueError: if they do not go together; the message names one of them.
    """
    found, left = {}, dict(tensors)
    for name in sorted(tensors):
        base = next((name.removesuffix(suffix) for suffix in (TRIANGLE, CODES) if name.endswith(suffix)), None)
        if base is None:
            continue
        dtype, shape = tensors[name][0], tuple[int, ...](tensors[name][1])
        if name.endswith(TRIANGLE):
            narrow = dtype == torch.bfloat16
            form = Form(base, _square(shape), moments if narrow else dtype, "bfloat16" if narrow else "packed", True)
        elif base + DIAGONAL in tensors:
            form = Form(base, tuple(tensors[base + DIAGONAL][1]) * 2, moments, "int8", True)
        else:
            form = Form(base, shape, moments, "int8", False)
        for part, wanted in form.stored.items():
            own = left.pop(part, None)
            if own is None or (own[0], tuple(own[1])) != wanted:
                raise ValueError(f"{part!r} is {own}, and {name!r} needs {wanted}")
        found[base] = form
    for name, (dtype, whole) in left.items():
        if name in found:
            raise ValueError(f"{name!r} is stored twice")
        found[name] = Form(name, tuple(whole), dtype, "float32", False)
    return found


def described(form: Form) -> str:
    """The form of a tensor, for messages: ``"int8"``, or the dtype if it is stored as it is."""
    return str(form.dtype).removeprefix("torch.") if form.format == "float32" else form.format


def base_name(stored: str) -> str:
    """The name in the state of a stored tensor."""
    for suffix in (TRIANGLE, CODES, EXPONENTS, DIAGONAL):
        stored = stored.removesuffix(suffix)
    return stored


def salts_of(keys: Sequence[str], device: torch.device) -> Tensor:
    """A number for each block: the CRC-32 of its key, int32 [B]."""
    if not keys:
        return torch.empty(0, dtype=torch.int32, device=device)  # a copy from the CPU would be waited for
    return torch.tensor([_signed(zlib.crc32(key.encode())) for key in keys], dtype=torch.int32, device=device)


def seeds_of(salts: Tensor, name: str, step: int) -> Tensor:
    """Seeds of rows for the rounding of a tensor in a step: int32 [B], of the blocks' salts, its name and the step.

    They are `random_bits`' hash, all 32 bits of it, of the salt XOR that hash of the CRC-32 of ``name/step``. Without
    the inner one, blocks whose keys differ by a number as steps do would have each other's bits in other steps, because
    CRCs are linear.
    """
    return _hashed_(salts ^ _signed(_hashed_number(zlib.crc32(f"{name}/{step}".encode()))))


def random_bits(seeds: Tensor, start: int, count: int) -> Tensor:
    """Random numbers from 0 to 65,535 for the elements from ``start`` on: int32 [B, count].

    Elements 2n and 2n + 1 share a hash and take its lower and its upper 16 bits. It is "lowbias32" (Wellons,
    github.com/skeeto/hash-prospector) of the seed plus 0x9e3779b9 times n, all modulo 2^32.
    """
    first, stop = start // 2, -(-(start + count) // 2)
    pairs = torch.arange(first, stop, dtype=torch.int32, device=seeds.device).mul_(_SPREAD) + seeds.unsqueeze(1)
    return _halves(pairs)[:, start - 2 * first :][:, :count].int().bitwise_and_(0xFFFF)


def bits_of(seeds: Tensor, elements: Tensor) -> Tensor:
    """`random_bits` of elements [n] by their numbers, which count modulo 2^32: int32 [B, n]."""
    numbers = elements.to(torch.int32)
    hashes = _hashed_((numbers >> 1).bitwise_and_(0x7FFFFFFF).mul_(_SPREAD) + seeds.unsqueeze(1))
    return (hashes >> (numbers.bitwise_and_(1) << 4)).bitwise_and_(0xFFFF)


def bits_of_ranges(seeds: Sequence[Tensor], ranges: Sequence[tuple[int, int]]) -> Tensor:
    """`random_bits` of ranges of elements, one after the other: int32 [n].

    Args:
        seeds: of each range, 0-d int32.
        ranges: first element, which counts modulo 2^32, and number of elements.
    """
    counts = [(start % 2 + count + 1) // 2 for start, count in ranges]
    x = torch.cat([torch.arange(count, dtype=torch.int32, device=seeds[0].device) for count in counts]).mul_(_SPREAD)
    for part, seed, (start, _) in zip(torch.split(x, counts), seeds, ranges, strict=True):
        part += seed + _signed(start % (1 << 32) // 2 * 0x9E3779B9 % (1 << 32))
    parts = torch.split(_halves(x), [2 * count for count in counts])
    own = [part[start % 2 :][:count] for part, (start, count) in zip(parts, ranges, strict=True)]
    return torch.cat(own).int().bitwise_and_(0xFFFF)


def _halves(x: Tensor) -> Tensor:
    """The lower and then the upper half of the hash of each int32 number, as int16; the numbers are overwritten."""
    return _hashed_(x).view(torch.int16)


_FACTORS = 0x7FEB352D, 0x846CA68B  # of lowbias32


def _hashed_(x: Tensor) -> Tensor:
    """lowbias32 of int32 numbers, in place; products wrap around."""
    x ^= (x >> 16).bitwise_and_(0xFFFF)  # a shift of a negative number keeps its sign
    x *= _signed(_FACTORS[0])
    x ^= (x >> 15).bitwise_and_(0x1FFFF)
    x *= _signed(_FACTORS[1])
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    return x


def _hashed_number(x: int) -> int:
    """lowbias32 of a number below 2^32, of which no tensor is needed."""
    x = (x ^ x >> 16) * _FACTORS[0] % (1 << 32)
    x = (x ^ x >> 15) * _FACTORS[1] % (1 << 32)
    return x ^ x >> 16


def _signed(number: int) -> int:
    """The int32 with these 32 bits."""
    return number - (1 << 32) if number >= 1 << 31 else number


_SPREAD = _signed(0x9E3779B9)


def to_bfloat16(values: Tensor, bits: Tensor | None) -> Tensor:
    """float32 values in bfloat16: to nearest, or at random with `random_bits` of the same shape.

    The error is at most 2^-9 of the magnitude to nearest, and less than 2^-7 at random.
    """
    if bits is None:
        return values.to(torch.bfloat16)
    # The magnitude is cut off after 8 bits; a carry from the random bits below them rounds it up.
    carried = values.clamp(-BFLOAT16_MAX, BFLOAT16_MAX).view(torch.int32).add_(bits).bitwise_and_(~0xFFFF)
    return carried.view(torch.float32).to(torch.bfloat16)


def runs(numel: int) -> int:
    """How many scales so many elements have."""
    return -(-numel // RUN)


def to_int8(values: Tensor, bits: Tensor | None) -> tuple[Tensor, Tensor]:
    """float32 values [B, n] as int8 codes [B, n] and exponents of scales, int8 [B, runs(n)].

    The scale of a run is the power of two for which the largest code is from 64 to 127. Errors are below one scale,
    that is 1/64 of the run's largest magnitude; to nearest they are half as large, except that 128 becomes 127. At
    random, a run whose largest magnitude is above 127 scales has errors of up to two scales. If it could only become
    127, a slow average would never pass a power of two.
    """
    parts = _in_runs(values)
    largest = parts.abs().amax(-1).view(torch.int32)
    biased = largest >> 23
    exponents = torch.where(biased > 0, (biased - 133).clamp_(SMALLEST, LARGEST), 0)
    if bits is not None:  # the largest of such a run becomes 63 or 64 of twice the scale, if both are in range
        doubled = (largest.bitwise_and_(0x7FFFFF) > ABOVE_127) & (biased > 6) & (biased < 254)
        exponents += doubled
    # Down to 2^-126 a number is normal; the run of one below that counts as zeros.
    sizes = (parts * _power_of_two(-exponents).unsqueeze(-1)).abs_()
    # The magnitude is rounded, so that opposite values get opposite codes. A sum with 16 bits is exact if it matters.
    if bits is None:
        sizes = sizes.round_()
    else:
        sizes = sizes.add_(_in_runs(bits).float().mul_(2.0**-16)).floor_()
        halved = (doubled & (sizes.amax(-1) < 64.0)).int()  # so that what was read is stored unchanged
        exponents -= halved
        sizes.mul_((halved + 1).unsqueeze(-1))
    codes = sizes.clamp_(max=127.0).masked_fill_(biased.unsqueeze(-1) == 0, 0.0).copysign_(parts).to(torch.int8)
    return codes.flatten(1)[:, : values.shape[1]], exponents.to(torch.int8)


def from_int8(codes: Tensor, exponents: Tensor) -> Tensor:
    """The float32 values [B, n] of `to_int8`; finite whatever the bytes are."""
    scales = _power_of_two(exponents.int().clamp_(SMALLEST, LARGEST))
    return (_in_runs(codes).float() * scales.unsqueeze(-1)).flatten(1)[:, : codes.shape[1]]


def to_squares(values: Tensor, bits: Tensor | None) -> tuple[Tensor, Tensor]:
    """Non-negative float32 values [B, n] as codes and exponents, as `to_int8`, accurate to an eighth of each value.

    Positive values more than 30 octaves below the largest in their run become the smallest positive code. The exponent
    is that of the largest after rounding, or a slow average would never pass a power of two.
    """
    parts = _in_runs(values).view(torch.int32)
    carry = 1 << 19 if bits is None else _in_runs(bits) << 4
    codes = (parts + carry >> 20).clamp_max_(LARGEST_SQUARE)
    biased = codes.amax(-1) >> 3
    first = (biased - OCTAVES).mul_(EIGHTHS).unsqueeze(-1)
    codes -= first
    codes = torch.maximum(codes, (1 - first).clamp_min_(1)).masked_fill_(parts <= 0, 0)
    return codes.to(torch.uint8).view(torch.int8).flatten(1)[:, : values.shape[1]], (biased - 128).to(torch.int8)


def from_squares(codes: Tensor, exponents: Tensor) -> Tensor:
    """The float32 values [B, n] of `to_squares`; finite and not negative whatever the bytes are."""
    numbers = _in_runs(codes).contiguous().view(torch.uint8).int()
    first = ((exponents.int() + 128).clamp_max_(254) - OCTAVES).mul_(EIGHTHS).unsqueeze(-1)
    found = (numbers.clamp_max(LARGEST_CODE) + first).clamp_min_(0).bitwise_left_shift_(20).view(torch.float32)
    return found.masked_fill_(numbers == 0, 0.0).flatten(1)[:, : codes.shape[1]]


def _in_runs(flat: Tensor) -> Tensor:
    """[B, n] as [B, runs(n), RUN], with zeros at the end."""
    lacking = -flat.shape[1] % RUN
    if lacking:
        flat = torch.cat([flat, flat.new_zeros(len(flat), lacking)], 1)
    return flat.reshape(len(flat), -1, RUN)


def _power_of_two(exponents: Tensor) -> Tensor:
    """2^e in float32 of integers from -126 to 127, exactly on every device."""
    return (exponents.int() + 127).bitwise_left_shift_(23).view(torch.float32)


def triangle_size(d: int) -> int:
    """Elements of a triangle with its diagonal."""
    return d * (d + 1) // 2


def _square(shape: tuple[int, ...]) -> tuple[int, int]:
    """The shape of the matrix whose triangle has this shape.

    Raises:
        ValueError: if there is none.
    """
    d = (math.isqrt(8 * math.prod(shape) + 1) - 1) // 2
    if shape != (triangle_size(d),):
        raise ValueError(f"a triangle cannot have the shape {shape}")
    return d, d


def rectangle(d: int) -> tuple[int, int]:
    """Height and width of the rectangle that holds the lower triangle of a matrix [d, d], row by row.

    It has k = (d + 1) // 2 columns, and d rows, or d + 1 if d is even. The columns of the matrix from k on have room
    above the diagonal of its first k columns (LAPACK's rectangular full packed format; Gustavson et al., ACM TOMS
    37(2), 2010). With s = 1 for even d, else 0: row r, column c holds A[r - s, c] if r - s >= c, and
    A[k - 1 + s + c, k + r] otherwise.
    """
    return d + 1 - d % 2, (d + 1) // 2


def _kept_if_few(places: Places) -> Places:
    """Make the places of matrices of usual size once."""
    kept = lru_cache(maxsize=32)(places)

    def found(d: int, begin: int, end: int, device: torch.device) -> Tensor:
        return (kept if d <= KEPT else places)(d, begin, end, device)

    return wraps(places)(found)


@_kept_if_few
def places_in_matrix(d: int, begin: int, end: int, device: torch.device) -> Tensor:
    """Where in a matrix [d, d] the elements of some rows of its rectangle are: flat, int32 or, if needed, int64."""
    k, s = rectangle(d)[1], 1 - d % 2
    row = torch.arange(begin, end, dtype=_whole(d), device=device).unsqueeze(1)
    column = torch.arange(k, dtype=row.dtype, device=device)
    return torch.where(row - s >= column, (row - s) * d + column, (column + (k - 1 + s)) * d + row + k).flatten()


@_kept_if_few
def places_in_triangle(d: int, begin: int, end: int, device: torch.device) -> Tensor:
    """Where in its rectangle the elements of some rows of a symmetric matrix [d, d] are, as `places_in_matrix`."""
    k, s = rectangle(d)[1], 1 - d % 2
    row = torch.arange(begin, end, dtype=_whole(d), device=device).unsqueeze(1)
    column = torch.arange(d, dtype=row.dtype, device=device)
    low, high = torch.minimum(row, column), torch.maximum(row, column)
    return torch.where(low < k, (high + s) * k + low, (low - k) * k + high - (k - 1 + s)).flatten()


def _whole(d: int) -> torch.dtype:
    """Numbers that count the elements of a matrix [d, d]; smaller ones take half the time."""
    return torch.int32 if d * d < 1 << 31 else torch.int64


def _rows(values: Tensor) -> Iterator[slice]:
    """Rows whose elements are at most PIECE together, or one."""
    most = max(1, PIECE // max(1, values[0].numel())) if len(values) else 1
    for begin in range(0, len(values), most):
        yield slice(begin, min(begin + most, len(values)))


def _columns(flat: Tensor) -> Iterator[slice]:
    """Columns of [B, n] whose elements are at most PIECE together; all begin with a run."""
    step = max(RUN, PIECE // max(1, len(flat)) // RUN * RUN)
    for begin in range(0, flat.shape[1], step):
        yield slice(begin, min(begin + step, flat.shape[1]))
