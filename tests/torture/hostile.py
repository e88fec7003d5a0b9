"""Hostile manifests and data, drawn from the schema: each is refused with a CheckpointError that names the field.

    python -m tests.torture.hostile --examples 20000

What a reader needs for it is measured too: at most a second, and 200 MB over the process before. An example may be as
valid as the checkpoint that was saved, for instance with another learning rate; then it is loaded, and trains.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import logging
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

from shampoo_deepspeed import CheckpointError, load_shampoo, save_shampoo
from shampoo_deepspeed.checkpoint import manifest as manifests
from shampoo_deepspeed.checkpoint import schema, tensor_files, writer
from shampoo_deepspeed.checkpoint.inspect import describe
from shampoo_deepspeed.checkpoint.manifest import Manifest
from tests.support.manifests import body_of, put
from tests.torture.damage import MANIFEST, WORDS
from tests.torture.figures import Figures, Hang, at_most
from tests.torture.small_runs import SECONDS, STEPS, made, stepped

LONGEST, LARGEST = 1.0, 200e6  # seconds of the processor, and bytes over the process before a read
Values = st.SearchStrategy[Any]

whole = st.integers(-(2**70), 2**70) | st.sampled_from([0, 1, -1, 2**31, 2**53, 2**53 + 1, 2**63, 10**19, 10**20])
junk = st.recursive(
    st.none() | st.booleans() | whole | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20)
    | st.sampled_from(["\x1b[31m", "../../etc/passwd", "/dev/zero", "a\x00b", "\u202e", "__class__", "builtins.exec"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


def valid(kind: schema.Kind) -> Values:
    """Values that the schema allows in a field by itself."""
    match kind:
        case schema.Int(low, high):
            return st.integers(low, min(high, low + 9)) | st.integers(low, high) | st.sampled_from([low, high])
        case schema.Text(pattern, _):
            return st.text(max_size=9) if pattern == schema.NAME.pattern else st.from_regex(pattern, fullmatch=True)
        case schema.Truth():
            return st.booleans()
        case schema.Number():
            return st.floats(-1e299, 1e299) | st.integers(-9, 9)
        case schema.ListOf(item, most):
            return st.lists(valid(item), max_size=min(most, 4))
        case schema.Row(items):
            return st.tuples(*map(valid, items)).map(list)
        case schema.MapOf(key, value):
            return st.dictionaries(valid(key), valid(value), max_size=3)
        case schema.Record(required, optional, others):
            known = st.fixed_dictionaries(
                {name: valid(inner) for name, inner in required.items()},
                optional={name: valid(inner) for name, inner in optional.items()},
            )
            more = st.dictionaries(st.text(max_size=9), valid(others), max_size=2) if others else st.just({})
            return st.builds(lambda a, b: b | a, known, more)
        case schema.OrNull(inner):
            return st.none() | valid(inner)
    assert isinstance(kind, schema.Option)
    leaves = st.none() | st.booleans() | st.floats(-1e299, 1e299) | st.integers(-9, 9) | st.text(max_size=9)
    return st.recursive(leaves, lambda inner: st.lists(inner, max_size=3), max_leaves=4)


def kind_at(path: Sequence[Any]) -> schema.Kind:
    """What the schema allows at a path."""
    kind: Any = schema.MANIFEST
    for step in path:
        while isinstance(kind, schema.OrNull):
            kind = kind.kind
        match kind:
            case schema.Record(required, optional, others):
                kind = required.get(step) or optional.get(step) or others
            case schema.MapOf(_, value):
                kind = value
            case schema.ListOf(item, _):
                kind = item
            case schema.Row(items):
                kind = items[step]
    found: schema.Kind = kind
    return found


def paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in a manifest, that of containers too."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else []
    return [path, *(found for key, item in inner for found in paths(item, (*path, key)))]


def replaced(body: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    inner = result = copy.deepcopy(body)
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return result


# Large values of so many parts; what is valid in some field is checked the longest.
LARGE: dict[str, Callable[[int], Any]] = {
    "zeros": lambda n: [0] * n,
    "ones": lambda n: [1] * n,
    "empty lists": lambda n: [[] for _ in range(n)],
    "empty objects": lambda n: [{} for _ in range(n)],
    "lists": lambda n: [[0] * 8 for _ in range(n // 8)],
    "keys": lambda n: {f"k{i}": 0 for i in range(n)},
    "numbers": lambda n: {str(i): {"lr": 0.0} for i in range(n)},
    "options": lambda n: {"lr": 0.0, **{f"k{i}": 0.5 for i in range(n)}},
    "text": lambda n: "x" * (8 * n),
    "wide text": lambda n: "\U0001f600" + "x" * (8 * n),
    "wide texts": lambda n: ["\U0001f600" * 4] * n,
    "long names": lambda n: {"\U0001f600" * 8 + str(i): 0 for i in range(n // 4)},
    "checksums": lambda n: "0" * (8 * n),
    "blocks": lambda n: [[0, "0" * 8] for _ in range(n)],
    "boxes": lambda n: [[0, [i], [1], "0" * 8] for i in range(n)],
    "equal boxes": lambda n: [[0, [0], [1], "0" * 8]] * n,
    "cuts": lambda n: [[1] * n],
    "cuts along dims": lambda n: [[1] * (n // 64)] * 64,
    "files": lambda n: {f"rank-{i}.safetensors": {"bytes": 0} for i in range(n)},
    "layouts": lambda n: {f"{i}:1": [["status", "int64", [4]]] for i in range(n)},
    "layout": lambda n: [["status", "int64", [1] * 64]] * 64,
    "versions": lambda n: {f"k{i}": "x" for i in range(n)},
    "floats": lambda n: [1e-300] * n,
    "deep": lambda n: nested(min(n, 900)),
    "records": lambda n: {
        f"p{i}": {"shape": [], "group": 0, "options": "0", "steps": 0, "merged": None, "cuts": None, "decays": True,
                  "blocks": [], "tensors": {}} for i in range(n // 16)
    },
}  # fmt: skip
PARTS = [b"", b"{", b"[", b'"', b",", b"1e999", b"NaN", b"\xff", b"\\ud800", b"0" * 99]  # of a broken text
TENSOR = ("parameters", "b", "tensors", "elementwise/exp_avg", "boxes")


def nested(depth: int) -> Any:
    found: Any = []
    for _ in range(depth):
        found = [found]
    return found


@dataclass(frozen=True)
class Example:
    """A hostile manifest's bytes, or what to do with the values in the data; in words for a report."""

    what: str
    content: bytes | None = None
    values: tuple[int, int, float | int] | None = None  # the tensor's number, the element's, the value

    def __repr__(self) -> str:
        return self.what


@st.composite
def examples(draw: st.DrawFn, body: Any, tensors: int) -> Example:
    """Draw one example."""
    how = draw(st.sampled_from(["valid", "valid", "field", "field", "fields", "junk", "large", "text", "data"]))
    if how == "valid":
        made = draw(valid(schema.MANIFEST))
        made["directory"] = body["directory"]
        return Example(f"a manifest of the schema {quoted(made)}", writer.encoded(made))
    if how == "data":
        where = draw(st.integers(0, tensors - 1)), draw(st.integers(0, 2**16))
        value = draw(st.floats(width=32) | st.integers(-(2**63), 2**63 - 1))
        return Example(f"the value {value!r} at {where}", values=(*where, value))
    every = [path for path in paths(body) if path]
    if how == "large":
        name, count = draw(st.sampled_from(sorted(LARGE))), draw(st.sampled_from([10**3, 10**4, 10**5, 10**5, 10**6]))
        path = draw(st.sampled_from([*every, *[TENSOR] * 20]))
        return Example(f"{count} {name} at {path}", encoded(replaced(body, path, LARGE[name](count))))
    if how == "text":
        content = bytearray(json.dumps(body).encode())
        for _ in range(draw(st.integers(1, 3))):
            place = draw(st.integers(0, len(content) - 1))
            part = draw(
                st.sampled_from([b"", b"{", b"[", b'"', b",", b"1e999", b"NaN", b"\xff", b"\\ud800", b"0" * 99])
            )
            content[place : place + draw(st.integers(0, 9))] = part
        return Example(f"the text {bytes(content[:200])!r}", raw(bytes(content)))
    changed, told = body, list[str]()
    for _ in range(2 if how == "fields" else 1):
        path = draw(st.sampled_from([path for path in paths(changed) if path]))
        value = draw(junk if how == "junk" else valid(kind_at(path)) if within(path) else junk)
        changed, told = replaced(changed, path, value), [*told, f"{path} = {quoted(value)}"]
    return Example(" and ".join(told), encoded(changed))


def within(path: Sequence[Any]) -> bool:
    """Whether the schema says what is at a path: not inside of options."""
    try:
        return kind_at(path) is not None and not isinstance(kind_at(path[:-1]), schema.Option)
    except (TypeError, AttributeError):
        return False


def encoded(body: Any) -> bytes:
    return raw(json.dumps(body, ensure_ascii=False).encode(errors="surrogatepass"))


def raw(inner: bytes) -> bytes:
    """A manifest of these bytes, with a right checksum."""
    return b'{"format": 2, "crc32": "%s", "body": %s}\n' % (manifests.checksum(inner).encode(), inner)


def quoted(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 300 else f"{text[:300]}..."


class Target:
    """A checkpoint whose manifest and data are replaced, and what reading it takes."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "saved"
        save_shampoo(made(STEPS)[1], self.path)
        self.body = body_of(self.path)
        found = Manifest.read(self.path)
        (self.file,) = (self.path / found.directory).iterdir()
        self.content, self.manifest = self.file.read_bytes(), (self.path / MANIFEST).read_bytes()
        self.stored = [(s, n) for s in found.open_files(self.path)._of_rank[0] for n in range(len(s.form))]

    def put(self, example: Example) -> None:
        self.file.write_bytes(self.content)
        if example.content is not None:
            (self.path / MANIFEST).write_bytes(example.content)
            return
        assert example.values is not None
        number, element, value = example.values
        stored, n = self.stored[number]
        _, dtype, _ = stored.form[n]
        start, size = stored.starts[n], tensor_files.size_of(stored.form[n])
        values = torch.frombuffer(bytearray(self.content[start : start + size]), dtype=dtype)
        new = value if dtype.is_floating_point else int(value) if abs(value) < 2**63 else 2**63 - 1
        values[element % len(values)] = new
        changed = values.view(torch.uint8).numpy().tobytes()
        self.file.write_bytes(self.content[:start] + changed + self.content[start + size :])
        put(self.path, self.body_with(stored, n, manifests.checksum(changed)))

    def body_with(self, stored: Any, n: int, checksum: str) -> Any:
        body = copy.deepcopy(self.body)
        record, digits = body["parameters"][stored.place.parameter], schema.DIGITS
        row = record["blocks"][stored.place.part] if stored.place.box is None else None
        if row is not None:
            row[1] = row[1][: digits * n] + checksum + row[1][digits * (n + 1) :]
        else:
            record["tensors"][stored.place.part]["boxes"][0][3] = checksum
        return body

    def read(self) -> tuple[str, str]:
        """How a load ends, and the step that follows it; or an inspection that is at fault."""
        how, text = self.ended(lambda: stepped(*self.loaded()))
        if how in ("refused", "loaded"):
            other, said = self.ended(lambda: describe(self.path))
            return (how, text) if other in ("refused", "loaded") else (other, said)
        return how, text

    def loaded(self) -> Any:
        params, optimizer = made()
        load_shampoo(optimizer, self.path)
        return params, optimizer

    def ended(self, action: Callable[[], Any]) -> tuple[str, str]:
        try:
            with at_most(SECONDS):
                action()
            return "loaded", ""
        except CheckpointError as error:
            text = str(error)
            good = text.replace("\n", "").isprintable() and any(word in text for word in WORDS)
            return ("refused", text) if good else ("others", f"names no field: {text!r}")
        except Hang:
            return "hangs", "no end in time"
        except BaseException as error:
            if "(failure_limit = " in str(error):  # a state that says of itself that it has failed so often
                return "loaded", ""
            return "bare", traceback.format_exc()


def peak() -> int:
    """The most memory that this process has had since `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) * 1024


def forget_peak() -> None:
    with suppress(OSError):  # then the peak is that of all examples so far, which must pass too
        Path("/proc/self/clear_refs").write_text("5")


def held() -> int:
    """The memory that this process has now. That of the drawing of examples grows, which is not what is measured."""
    gc.collect()
    with suppress(AttributeError):  # only in glibc, which else keeps what an earlier example has freed
        ctypes.CDLL(None).malloc_trim(0)
    forget_peak()
    return peak()


def measured(target: Target, example: Example) -> tuple[str, str]:
    """How a read ends, and whether it took too long or too much; a slow one is tried three times."""
    target.put(example)
    for left in (2, 1, 0):
        empty, begin = held(), time.process_time()
        how, text = target.read()
        seconds, taken = time.process_time() - begin, peak() - empty
        if taken > LARGEST:
            return "others", f"takes {taken / 1e6:.0f} MB more ({text[:200]})"
        if seconds < 2 * LONGEST:  # for a load and an inspection
            return how, text
        if not left:
            return "others", f"takes {seconds:.1f} s ({text[:200]})"
    raise AssertionError


def torture(count: int, seed: int, figures: Figures, derandomize: bool = False) -> None:
    """Try so many examples in this process, which should have done nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        target = Target(Path(folder))
        target.read()

        @settings(
            max_examples=count, deadline=None, derandomize=derandomize, database=None, phases=(Phase.generate,),
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @seeded(seed)
        @given(examples(target.body, len(target.stored)))
        def check(example: Example) -> None:
            figures.tried += 1
            how, text = measured(target, example)
            if how in ("refused", "loaded"):
                figures.seen[how] += 1
            else:
                figures.fault(how, f"{example!r}: {text}")

        check()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    logging.getLogger("shampoo_deepspeed").setLevel(logging.CRITICAL)
    figures = Figures()
    torture(args.examples, args.seed, figures)
    return figures.told()


if __name__ == "__main__":
    raise SystemExit(main())
