"""The oracle of the formats of state: each number by itself, in Python's integers and floats, from their description.

It shares no code with the package.
"""

from __future__ import annotations

import math
import struct
import zlib

import torch
from torch import Tensor

WORD = 2**32


def hashed(x: int) -> int:
    """Return lowbias32 of a number below 2^32."""
    x = (x ^ x >> 16) * 0x7FEB352D % WORD
    x = (x ^ x >> 15) * 0x846CA68B % WORD
    return x ^ x >> 16


def random_bits(key: str, name: str, step: int, element: int) -> int:
    """Return the 16 bits of an element of a block's tensor in a step."""
    seed = hashed(zlib.crc32(key.encode()) ^ hashed(zlib.crc32(f"{name}/{step}".encode())))
    pair, odd = divmod(element % WORD, 2)
    return hashed((seed + 0x9E3779B9 * pair) % WORD) >> (16 if odd else 0) & 0xFFFF


def order_of_triangle(d: int) -> list[tuple[int, int]]:
    """Return row and column of each element of a stored triangle, in LAPACK's rectangular full packed order."""
    columns, shift = (d + 1) // 2, 1 - d % 2
    found = []
    for r in range(d + shift):
        for c in range(columns):
            inside = r - shift >= c
            found.append((r - shift, c) if inside else (columns - 1 + shift + c, columns + r))
    return found


def kept(x: Tensor, form: str, name: str, random: tuple[str, int] | None = None) -> Tensor:
    """Return what a format keeps of a block's tensor.

    Args:
        form: "float32" (as it is), "packed", "bfloat16" or "int8".
        name: of the tensor, which tells whether it is symmetric, and whether it holds squares.
        random: the block's key and its step, to round at random; None: to nearest.
    """
    symmetric = x.ndim == 2 and name.startswith(("factor_", "root_"))
    if form == "float32" or (form == "packed" and not symmetric):
        return x
    places = order_of_triangle(len(x)) if symmetric else None
    values = [x[i, j].item() for i, j in places] if places else x.flatten().tolist()
    if form != "packed":
        values = [struct.unpack("f", struct.pack("f", value))[0] for value in values]
        bits = [None if random is None else random_bits(random[0], name, random[1], n) for n in range(len(values))]
        if form == "bfloat16":
            values = [nearby(v, 8, r) for v, r in zip(values, bits, strict=True)]
        else:
            on_diagonal = [i == j for i, j in places] if places else [False] * len(values)
            off = [0.0 if skip else v for skip, v in zip(on_diagonal, values, strict=True)]
            keep = squares if name.endswith("second_moment") else scaled
            found = [v for n in range(0, len(off), 32) for v in keep(off[n : n + 32], bits[n : n + 32])]
            values = [v if skip else f for skip, v, f in zip(on_diagonal, values, found, strict=True)]
    if places is None:
        return torch.tensor(values, dtype=x.dtype).view(x.shape)
    out = torch.zeros_like(x)
    for (i, j), value in zip(places, values, strict=True):
        out[i, j] = out[j, i] = value
    return out


def rounded(size: float, bits: int | None) -> int:
    """Return a neighbouring integer of a number >= 0."""
    return round(size) if bits is None else math.floor(size + bits / 2**16)


def nearby(value: float, digits: int, bits: int | None) -> float:
    """Return a neighbour of a number that has so many binary digits."""
    step = 2.0 ** (math.frexp(value)[1] - digits)
    return math.copysign(rounded(abs(value) / step, bits) * step, value)


def scaled(run: list[float], bits: list[int | None]) -> list[float]:
    """Return a run of numbers in 127 steps of one power of two up to each side; at random 128 is 64 of the next."""
    peak = max(map(abs, run))
    if peak < 2.0**-126:
        return [0.0] * len(run)
    step = 2.0 ** max(math.frexp(peak)[1] - 7, -126)
    if peak > 127 * step and None not in bits:
        step *= 2.0
    return [math.copysign(min(127, rounded(abs(v) / step, r)) * step, v) for v, r in zip(run, bits, strict=True)]


def squares(run: list[float], bits: list[int | None]) -> list[float]:
    """Return a run of numbers >= 0 with four binary digits, none of them far below the largest's octave."""
    near = [nearby(value, 4, 2**15 if r is None else r) for value, r in zip(run, bits, strict=True)]  # half: up
    least = 9.0 * 2.0 ** (math.frexp(max(near))[1] - 34)
    return [max(number, least) if value > 0.0 else 0.0 for value, number in zip(run, near, strict=True)]
