"""What ``manifest.json`` says: type, keys and range of every field, how fields go together, and how names are written.

It may come from a stranger. Everything that a manifest says is checked here before it is used, in time and memory in
proportion to its length.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import Tensor

from shampoo_deepspeed.checkpoint.errors import CheckpointError, quoted
from shampoo_deepspeed.geometry.boxes import Box
from shampoo_deepspeed.options.choices import DTYPES as DTYPES_OF_OPTIONS
from shampoo_deepspeed.options.config import OPTION_NAMES, ShampooConfig
from shampoo_deepspeed.options.param_groups import DTYPE, FORMS, KEYS_OF_GROUPS, NOT_FINITE, NOT_FINITES, SCALAR
from shampoo_deepspeed.state.block_codec import STATUS, TRIANGLE

FORMAT = 2
PIECE = 1 << 18  # bytes of a box that share one checksum, so that a part can be verified without the rest
DIGITS = 8  # of a checksum, CRC-32 in hexadecimal
_NUMBERED = re.compile(r"(.+)@[0-9]*", re.DOTALL)


class SchemaError(ValueError):
    """A field of a manifest is not as it must be; the message begins with the field's name."""

    def __init__(self, problem: str, *path: str | int) -> None:
        super().__init__(problem)
        self.problem, self.path = problem, list(path)

    def __str__(self) -> str:
        """The field, in the notation of Python, and the problem."""
        first, *rest = self.path or ["the manifest"]
        return str(first) + "".join(f"[{quoted(step)}]" for step in rest) + f" {self.problem}"


class Kind(Protocol):
    """What values of a field may be."""

    def check(self, value: Any) -> None:
        """Raise SchemaError unless a value is of this kind."""
        ...


@dataclass(frozen=True)
class Int:
    """A whole number from ``low`` to ``high``."""

    low: int = 0
    high: int = 2**53

    def check(self, value: Any) -> None:
        if type(value) is not int or not self.low <= value <= self.high:
            raise SchemaError(f"is {quoted(value)}; allowed: a whole number from {self.low} to {self.high}")


@dataclass(frozen=True)
class Text:
    """A text that can be encoded, and matches a pattern."""

    pattern: str = r"(?s:.*)"
    longest: int = 1 << 16
    reserved: frozenset[str] = frozenset()  # texts that have another meaning

    def check(self, value: Any) -> None:
        if type(value) is not str or len(value) > self.longest:
            raise SchemaError(f"is {quoted(value)}; allowed: a text of at most {self.longest} characters")
        if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
            raise SchemaError(f"is {quoted(value)}, which is no valid Unicode")
        if re.fullmatch(self.pattern, value) is None:
            raise SchemaError(f"is {quoted(value)}; allowed: {self.pattern}")
        if value in self.reserved:
            raise SchemaError(f"is {quoted(value)}, which is reserved for torch or this package; allowed: other names")


@dataclass(frozen=True)
class Truth:
    """True or False."""

    def check(self, value: Any) -> None:
        if type(value) is not bool:
            raise SchemaError(f"is {quoted(value)}; allowed: true or false")


@dataclass(frozen=True)
class Number:
    """A finite number."""

    def check(self, value: Any) -> None:
        if type(value) not in (int, float) or not -1e300 < value < 1e300:
            raise SchemaError(f"is {quoted(value)}; allowed: a finite number")


@dataclass(frozen=True)
class ListOf:
    """A list of values of one kind."""

    item: Kind
    most: int = 2**53

    def check(self, value: Any) -> None:
        if type(value) is not list or len(value) > self.most:
            raise SchemaError(f"is {quoted(value)}; allowed: a list of at most {self.most} values")
        for number, item in enumerate(value):
            _within(number, self.item, item)


@dataclass(frozen=True)
class Row:
    """A list with one value of each kind."""

    items: tuple[Kind, ...]

    def check(self, value: Any) -> None:
        if type(value) is not list or len(value) != len(self.items):
            raise SchemaError(f"is {quoted(value)}; allowed: a list of {len(self.items)} values")
        for number, (kind, item) in enumerate(zip(self.items, value, strict=True)):
            _within(number, kind, item)


@dataclass(frozen=True)
class MapOf:
    """An object whose keys are of one kind and whose values are of another."""

    key: Text
    value: Kind

    def check(self, value: Any) -> None:
        if type(value) is not dict:
            raise SchemaError(f"is {quoted(value)}; allowed: an object")
        for name, item in value.items():
            try:
                self.key.check(name)
            except SchemaError as error:
                raise SchemaError(f"has a key that {error.problem}") from None
            _within(name, self.value, item)


@dataclass(frozen=True)
class Record:
    """An object with these keys, and perhaps some more."""

    required: Mapping[str, Kind]
    optional: Mapping[str, Kind] = field(default_factory=dict)
    others: Kind | None = None  # of keys that are not named; None: there must be none

    def check(self, value: Any) -> None:
        if type(value) is not dict:
            raise SchemaError(f"is {quoted(value)}; allowed: an object with {', '.join(self.required)}")
        for name, kind in self.required.items():
            if name not in value:
                raise SchemaError("is missing", name)
            _within(name, kind, value[name])
        for name, item in value.items():
            if name not in self.required:
                extra: Kind | None = self.optional[name] if name in self.optional else self.others  # noqa: SIM401
                if extra is None:
                    raise SchemaError("is not known", name)
                NAME.check(name)
                _within(name, extra, item)


@dataclass(frozen=True)
class OrNull:
    """Null, or a value of a kind."""

    kind: Kind

    def check(self, value: Any) -> None:
        if value is not None:
            self.kind.check(value)


@dataclass(frozen=True)
class Option:
    """The value of an option: text, number, true, false, null, and lists and objects of these.

    It is neither too deep nor too large, as messages about options that differ quote them.
    """

    depth: int = 4
    most: int = 100_000  # values in lists and objects, those within inner ones too

    def check(self, value: Any) -> None:
        if value is None or type(value) is bool:
            return
        if isinstance(value, (list, dict)):
            if not self.depth:
                raise SchemaError("is nested too deeply")
            if _count(value, self.most) > self.most:
                raise SchemaError(f"has too many values; allowed: at most {self.most}")
            kind = replace(self, depth=self.depth - 1)
            (ListOf(kind) if isinstance(value, list) else MapOf(NAME, kind)).check(value)
        else:
            (NAME if isinstance(value, str) else Number()).check(value)


@dataclass(frozen=True)
class Kept(Option):
    """What somebody else keeps in a parameter group, as `param_groups.kept_by_others` writes it."""

    def check(self, value: Any) -> None:
        super().check(value)
        if isinstance(value, dict) and set(value) in FORMS:
            for name, kind in (_KEPT_TENSOR if DTYPE in value else _KEPT_NUMBER).items():
                _within(name, kind, value[name])


@dataclass(frozen=True)
class KeptNumber:
    """A number, perhaps one that is not finite."""

    def check(self, value: Any) -> None:
        if not (isinstance(value, dict) and set(value) == {NOT_FINITE}):
            Number().check(value)


_KEPT_NUMBER: dict[str, Kind] = {NOT_FINITE: Text("|".join(NOT_FINITES))}
_KEPT_TENSOR: dict[str, Kind] = {SCALAR: KeptNumber(), DTYPE: Text("|".join(DTYPES_OF_OPTIONS))}


def _count(value: Any, most: int) -> int:
    """How many values lists and objects hold; counting ends once there are more than ``most``."""
    if not isinstance(value, (list, dict)):
        return 0
    count = len(value)
    for item in value.values() if isinstance(value, dict) else value:
        if count > most:
            break
        count += _count(item, most)
    return count


def _within(step: str | int, kind: Kind, value: Any) -> None:
    try:
        kind.check(value)
    except SchemaError as error:
        error.path.insert(0, step)
        raise


COUNT, NAME = Int(), Text()
KEPT_NAME = Text(reserved=KEYS_OF_GROUPS)
CHECKSUMS = Text(rf"([0-9a-f]{{{DIGITS}}})*", 2**53)
DIRECTORY = Text(r"data-[0-9a-f]{12}")
FILE = Text(r"rank-(0|[1-9][0-9]{0,6})\.safetensors")
DTYPES = ("float64", "float32", "bfloat16", "float16", "int64", "int8")
DIMS = 64
SHAPE = ListOf(COUNT, DIMS)
_NUMBER = r"(0|[1-9][0-9]{0,8})"
# The number of a parameter group or of a rule in it, perhaps of blocks of another dtype or of an earlier save.
OPTIONS = Text(rf"{_NUMBER}( in [a-z0-9]{{1,20}})?( of data-[0-9a-f]{{12}})?")
LAYOUT_KEY = Text(rf"{OPTIONS.pattern}:([0-9]{{1,16}}(x[0-9]{{1,16}}){{0,{DIMS - 1}}})?", 4096)
LAYOUT = ListOf(Row((Text(r"[a-z0-9_]{1,64}"), Text(rf"({'|'.join(DTYPES)})({TRIANGLE})?"), SHAPE)), 64)
BLOCK = Row((Int(0, 10**7 - 1), CHECKSUMS))  # the rank that wrote it, and the checksum of each of its tensors
BOX = Row((Int(0, 10**7 - 1), SHAPE, SHAPE, CHECKSUMS))  # rank, offsets, lengths, and a checksum for each piece
TENSOR = Record({"dtype": Text("|".join(DTYPES)), "boxes": ListOf(BOX)})
PARAMETER = Record(
    {
        "shape": SHAPE,
        "group": Int(0, 10**9 - 1),
        "options": OPTIONS,
        "steps": COUNT,
        "merged": OrNull(SHAPE),
        "cuts": OrNull(ListOf(ListOf(Int(1)), DIMS)),
        "decays": Truth(),
        "blocks": ListOf(BLOCK),
        "tensors": MapOf(Text(r"(elementwise|shards)/[a-z0-9_]{1,64}"), TENSOR),
    },
    {"parts": Int(1, 10**7)},
)
MANIFEST = Record(
    {
        "directory": DIRECTORY,
        "world_size": Int(1, 10**7),
        "rejected_steps": COUNT,
        "groups": MapOf(Text(_NUMBER), Record({"lr": Number()}, others=Option())),
        "layouts": MapOf(LAYOUT_KEY, LAYOUT),
        "files": MapOf(FILE, Record({"bytes": COUNT})),
        "parameters": MapOf(NAME, PARAMETER),
    },
    {"versions": MapOf(NAME, NAME), "kept_by_others": MapOf(Text(_NUMBER), MapOf(KEPT_NAME, Kept()))},
)


def check(body: Any) -> None:
    """Check the contents of a manifest.

    Raises:
        SchemaError: naming the first field that is not of its kind, or does not go together with others.
    """
    MANIFEST.check(body)
    for key, layout in body["layouts"].items():
        lengths = [int(n) for n in key.rpartition(":")[2].split("x") if n]
        _check(_layout_problem(lengths, layout), "layouts", key)
    for name, record in body["parameters"].items():
        for step, problem in _parameter_problems(record, body):
            raise SchemaError(problem, "parameters", name, step)


def fits(key: Any, value: Any) -> bool:
    """Whether a manifest can hold what somebody else keeps in a parameter group under a key."""
    try:
        KEPT_NAME.check(key)
        Kept().check(value)
    except SchemaError:
        return False
    return True


def _check(problem: str | None, *path: str) -> None:
    if problem is not None:
        raise SchemaError(problem, *path)


def _layout_problem(lengths: Sequence[int], layout: Sequence[Any]) -> str | None:
    """What is wrong with the tensors of blocks of these lengths, if anything is."""
    most = max(math.prod(lengths), max(lengths, default=0) ** 2, 2)
    if any(math.prod(shape) > most for _, _, shape in layout):
        return f"has a tensor of more than {quoted(most)} elements"
    if [*map(tuple, layout[-1:])] != [(STATUS[0], STATUS[1], list(STATUS[2]))]:
        return f"does not end with {list(STATUS)}"
    if len({name for name, _, _ in layout}) < len(layout):
        return "names a tensor twice"
    if any(kind.endswith(TRIANGLE) and (len(shape) != 2 or shape[0] != shape[1]) for _, kind, shape in layout):
        return "has a triangle of a tensor that is not square"
    return None


def _parameter_problems(record: Mapping[str, Any], body: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The fields of a parameter that do not go together with others, each with what is wrong."""
    if str(record["group"]) not in body["groups"]:
        yield "group", f"is {record['group']}, and the groups are {quoted(sorted(body['groups']))}"
    if (record["merged"] is None) != (record["cuts"] is None):
        yield "cuts", "and 'merged' must both be null or both lists"
    elif record["cuts"] is None:
        if record["blocks"]:
            yield "blocks", "must be empty without 'cuts'"
    else:
        yield from _cut_problems(record)
        yield from _block_problems(record, body)
    for kind, found in record["tensors"].items():
        problem = _tensor_problem(kind, found, record["shape"], body["files"])
        if problem is not None:
            yield f"tensors/{kind}", problem


def _cut_problems(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if math.prod(record["merged"]) != math.prod(record["shape"]):
        yield "merged", f"is {quoted(record['merged'])}, which has not as many elements as {quoted(record['shape'])}"
    if [sum(lengths) for lengths in record["cuts"]] != record["merged"]:
        yield "cuts", f"do not add up to {quoted(record['merged'])}"
    count = math.prod(map(len, record["cuts"]))
    if len(record["blocks"]) not in (0, count):
        yield "blocks", f"has {len(record['blocks'])} rows, and the cuts make {quoted(count)}"


def _block_problems(record: Mapping[str, Any], body: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for index, (row, lengths) in enumerate(zip(record["blocks"], itertools.product(*record["cuts"]), strict=False)):
        rank, checksums = row
        key = f"{record['options']}:{'x'.join(map(str, lengths))}"
        if key not in body["layouts"]:
            yield "blocks", f"has row {index} with the layout {quoted(key)}, which is missing in 'layouts'"
        elif len(checksums) != DIGITS * len(body["layouts"][key]):
            tensors = len(body["layouts"][key])
            yield "blocks", f"has {len(checksums) // DIGITS} checksums in row {index}, and its layout {tensors} tensors"
        elif f"rank-{rank}.safetensors" not in body["files"]:
            yield "blocks", f"has rank {rank} in row {index}, which is missing in 'files'"


def _tensor_problem(kind: str, found: Mapping[str, Any], whole: Sequence[int], files: Mapping[str, Any]) -> str | None:
    shape = [math.prod(whole)] if kind.startswith("elementwise/") else whole
    boxes = []
    for number, (rank, offsets, lengths, checksums) in enumerate(found["boxes"]):
        if len(offsets) != len(shape) or len(lengths) != len(shape):
            return f"has box {number} with other dims than {quoted(shape)}"
        size = math.prod(lengths) * ITEM_SIZES[found["dtype"]]
        if len(checksums) != DIGITS * pieces(size):
            return f"has {len(checksums) // DIGITS} checksums in box {number} of {quoted(size)} bytes"
        if f"rank-{rank}.safetensors" not in files:
            return f"has rank {rank} in box {number}, which is missing in 'files'"
        boxes.append(Box(tuple(offsets), tuple(lengths)))
    return None if tiles(shape, boxes) else f"has boxes that do not make up {quoted(shape)}"


ITEM_SIZES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int64": 8, "int8": 1}


def pieces(size: int) -> int:
    """How many checksums a box of this many bytes has."""
    return max(1, -(-size // PIECE))


def tiles(shape: Sequence[int], boxes: Sequence[Box]) -> bool:
    """Whether the boxes cover every element of a shape exactly once; in time in proportion to their number.

    Every coordinate gets a random weight, 0 at 0, and a box the product over dims of the weights of its ends minus
    those of its starts. These products add up to that of the whole shape if the boxes cover every element once, and
    otherwise with a probability below 1e-15 (they are different polynomials in the weights).
    """
    ends = [[start + length for start, length in zip(box.offsets, box.lengths, strict=True)] for box in boxes]
    if any(end > n for along in ends for end, n in zip(along, shape, strict=True)):
        return False
    prime, generator = 2**61 - 1, random.SystemRandom()
    weights: list[dict[int, int]] = [{0: 0} for _ in shape]

    def volume(starts: Sequence[int], stops: Sequence[int]) -> int:
        found = 1
        for known, start, stop in zip(weights, starts, stops, strict=True):
            for place in (start, stop):
                if place not in known:
                    known[place] = generator.randrange(prime)
            found = found * (known[stop] - known[start]) % prime
        return found

    covered = sum(volume(box.offsets, along) for box, along in zip(boxes, ends, strict=True)) % prime
    return covered == volume([0] * len(shape), shape)


def layout_key(options: str, shape: Sequence[int]) -> str:
    """The key of a block layout: saved number of its options and block shape."""
    return f"{options}:{'x'.join(map(str, shape))}"


def stored_name(key: str, part: int | None) -> str:
    """A parameter's key in checkpoints: with expert parallelism, ranks hold different ones under the same name.

    A key that looks like that of a part gets an "@" at its end.

    Raises:
        CheckpointError: for a key that no manifest can hold.
    """
    name = f"{key}@{part}" if part is not None else f"{key}@" if _NUMBERED.fullmatch(key) else key
    try:
        NAME.check(name)
    except SchemaError as error:
        raise CheckpointError(f"the name of a parameter {error.problem}; give it another one") from None
    return name


def base_key(name: str) -> str:
    """A parameter's key without the number of its expert-parallel part."""
    found = _NUMBERED.fullmatch(name)
    return found[1] if found else name


def options_record(config: ShampooConfig, lr: float | Tensor) -> dict[str, Any]:
    """A group's options as a manifest has them, in JSON types; ``lr`` is the present one."""
    rate = float(lr.detach() if isinstance(lr, Tensor) else lr)
    options = {name: getattr(config, name) for name in OPTION_NAMES} | {"lr": rate}
    record: dict[str, Any] = json.loads(json.dumps(options))
    return record
