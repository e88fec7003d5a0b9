"""Damage of a finished checkpoint: what is loaded is equal to the bit, or a CheckpointError names the file or field.

    python -m tests.torture.damage --rounds 2

Every byte region of every file is cut, flipped, zeroed, swapped and so on; files and folders are linked, renamed,
deleted, swapped with those of another save, and their clock is set back. Each damage happens before a load, while it
checks, between check and first read, between two reads, and before what was loaded is saved again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from shampoo_deepspeed import save_shampoo
from shampoo_deepspeed.checkpoint import schema
from shampoo_deepspeed.checkpoint.inspect import describe
from tests.support.launch import Check, run_checks
from tests.support.stepping import drive, snapshot, state_of
from tests.torture.figures import Figures
from tests.torture.small_runs import NAMES, STEPS, ending, fresh, made, resumed, stepped

MANIFEST = "manifest.json"
# What a message may name: a file, a field, or a parameter.
WORDS = ("manifest.json", "rank-", "data-", *schema.MANIFEST.required, *(f"\n  {name}: " for name in NAMES))
Bytes = Callable[[bytes, range, random.Random], bytes]


@dataclass(frozen=True)
class Saves:
    """A complete save, another one of the same run, and one of another model."""

    path: Path
    other: Path
    foreign: Path

    def file(self, name: str, of: Path | None = None) -> Path:
        """The path of ``manifest.json``, "data" or "data/<file>" in a save."""
        folder = self.path if of is None else of
        if name == MANIFEST:
            return folder / name
        (data,) = folder.glob("data-" + "[0-9a-f]" * 12)
        return data / name.partition("/")[2] if "/" in name else data


@dataclass(frozen=True)
class Damage:
    """A damage, by name."""

    name: str
    do: Callable[[Saves], None]


def regions(file: Path) -> dict[str, range]:
    """The byte regions of a file: fields of a manifest; length, header and tensors of a file of data."""
    content = file.read_bytes()
    if file.name != MANIFEST:
        begin = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:begin])
        tensors = {
            name: range(begin + entry["data_offsets"][0], begin + entry["data_offsets"][1])
            for name, entry in header.items()
            if name != "__metadata__"
        }
        return {"length": range(8), "header": range(8, begin), **tensors}
    body = json.loads(content)["body"]
    starts = [content.index(f"\n{json.dumps(name)}: ".encode()) for name in body]
    ends = [*starts[1:], len(content) - 2]
    fields = {name: range(a, b) for name, a, b in zip(body, starts, ends, strict=True)}
    return {"head": range(starts[0]), **fields, "tail": range(len(content) - 3, len(content))}


def at(region: range, generator: random.Random) -> tuple[int, int]:
    """A place in a region, and a length that fits behind it."""
    place = generator.randrange(region.start, region.stop)
    return place, generator.randint(1, min(64, region.stop - place))


def cut(content: bytes, region: range, generator: random.Random) -> bytes:
    return content[: at(region, generator)[0]]


def flip(content: bytes, region: range, generator: random.Random) -> bytes:
    place, _ = at(region, generator)
    return content[:place] + bytes([content[place] ^ 1 << generator.randrange(8)]) + content[place + 1 :]


def overwrite(content: bytes, region: range, generator: random.Random, value: int | None) -> bytes:
    place, length = at(region, generator)
    new = generator.randbytes(length) if value is None else bytes([value]) * length
    return content[:place] + new + content[place + length :]


def swap(content: bytes, region: range, generator: random.Random) -> bytes:
    """Two ranges of one length change places; the other one may be in another region."""
    (one, length), other = at(region, generator), generator.randrange(len(content))
    length = min(length, len(content) - other, abs(one - other))
    low, high = sorted((one, other))
    a, b = content[low : low + length], content[high : high + length]
    return content[:low] + b + content[low + length : high] + a + content[high + length :]


def insert(content: bytes, region: range, generator: random.Random) -> bytes:
    place, length = at(region, generator)
    return content[:place] + generator.randbytes(length) + content[place:]


def drop(content: bytes, region: range, generator: random.Random) -> bytes:
    place, length = at(region, generator)
    return content[:place] + content[place + length :]


def again(content: bytes, region: range, generator: random.Random) -> bytes:
    """A range is written once more over what follows it, as by a write that went astray."""
    place, length = at(region, generator)
    return content[: place + length] + content[place : place + length] + content[place + 2 * length :]


def grow(content: bytes, _: range, generator: random.Random) -> bytes:
    return content + generator.randbytes(generator.randint(1, 64))


BYTES: dict[str, Bytes] = {
    "cut": cut, "flip": flip, "zero": partial(overwrite, value=0), "ones": partial(overwrite, value=255),
    "noise": partial(overwrite, value=None), "swap": swap, "insert": insert, "drop": drop, "again": again,
    "grow": grow,
}  # fmt: skip


def in_place(file: Path, change: Callable[[bytes], bytes]) -> None:
    """Change the file itself, not a new one under its name, as a failing disk would."""
    with file.open("r+b") as stream:
        new = change(stream.read())
        stream.seek(0)
        stream.write(new)
        stream.truncate()


def damages_of_bytes(saves: Saves, rounds: int, seed: int) -> Iterator[Damage]:
    """Each kind of damage in each region of each file."""
    for name in names(saves):
        for region, where in regions(saves.file(name)).items() if name != "data" else ():
            for kind, change in BYTES.items():
                for number in range(rounds if where else 0):
                    generator = random.Random(f"{seed} {name} {region} {kind} {number}")

                    def do(
                        now: Saves,
                        name: str = name,
                        where: range = where,
                        change: Bytes = change,
                        generator: random.Random = generator,
                    ) -> None:
                        in_place(now.file(name), lambda content: change(content, where, generator))

                    yield Damage(f"{kind} in {region} of {name}", do)


def names(saves: Saves) -> list[str]:
    """What a save consists of."""
    return [MANIFEST, "data", *(f"data/{file.name}" for file in sorted(saves.file("data").iterdir()))]


def moved(file: Path) -> Path:
    """The file, under another name next to the checkpoint."""
    aside = file.parent.parent / f"{file.name}.aside" if file.parent.name.startswith("data-") else None
    target = (aside or file.with_name(f"{file.name}.aside")).parent.parent / f"moved-{file.name}"
    file.rename(target)
    return target


def remove(file: Path) -> None:
    if file.is_dir() and not file.is_symlink():
        shutil.rmtree(file)
    else:
        file.unlink()


def copy(source: Path, target: Path) -> None:
    remove(target)
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copy2(source, target)


def a_pipe(file: Path) -> None:
    remove(file)
    os.mkfifo(file)


def a_folder(file: Path) -> None:
    remove(file)
    file.mkdir()


def a_socket(file: Path) -> None:
    remove(file)
    before = os.getcwd()
    os.chdir(file.parent)  # the path of a socket must be short
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(file.name)
    os.chdir(before)


def linked(file: Path, target: Path, hard: bool = False) -> None:
    remove(file)
    if hard:
        os.link(target, file)
    else:
        file.symlink_to(target)


def damages_of_names(saves: Saves) -> Iterator[Damage]:
    """Links, renames, deletions, swaps with another save, other kinds of files, clocks."""
    for what in names(saves):
        for name, do in renamings(what).items():
            yield Damage(f"{what}: {name}", do)
    for name, do in MIXTURES.items():
        yield Damage(name, do)


def renamings(what: str) -> dict[str, Callable[[Saves], None]]:
    """What can happen to one of the files, or to the folder of data."""

    def on(do: Callable[[Path], Any]) -> Callable[[Saves], None]:
        return lambda now: void(do(now.file(what)))

    found: dict[str, Callable[[Saves], None]] = {
        "deleted": on(remove),
        "moved away": on(moved),
        "upper case": on(lambda f: f.rename(f.with_name(f.name.upper()))),
        "capital": on(lambda f: f.rename(f.with_name(f.name.capitalize()))),
        "with a space": on(lambda f: f.rename(f.with_name(f"{f.name} "))),
        "with a suffix": on(lambda f: f.rename(f.with_name(f"{f.name}.bak"))),
        "link to itself, moved": on(lambda f: f.symlink_to(moved(f))),
        "dangling link": on(lambda f: linked(f, Path("nowhere"))),
        "link in a circle": on(lambda f: linked(f, Path(f.name))),
        "pipe": on(a_pipe),
        "socket": on(a_socket),
        "folder": on(a_folder),
        "clock set back": on(lambda f: os.utime(f, (0, 0))),
        "clock set forward": on(lambda f: os.utime(f, (2**33, 2**33))),
        "copied, and the copy put in place": on(lambda f: copy(moved(f), touched(f))),
    }
    if what != "data":
        found |= {
            "hard link": on(lambda f: os.link(moved(f), f)),
            "empty": on(lambda f: os.truncate(f, 0)),
            "of another save": lambda now: copy(now.file(what, now.other), now.file(what)),
            "of another model": lambda now: copy(now.file(what, now.foreign), now.file(what)),
            "hard link to another save": lambda now: linked(now.file(what), now.file(what, now.other), hard=True),
            "a device": on(lambda f: linked(f, Path("/dev/zero"))),
            "bytes of another save, in place": lambda now: in_place(
                now.file(what), lambda _: now.file(what, now.other).read_bytes()
            ),
        }
    found["link to another save"] = lambda now: linked(now.file(what), now.file(what, now.other))
    return found


def touched(file: Path) -> Path:
    file.touch()
    return file


def void(_: object) -> None:
    return None


def its_name(now: Saves, of: Path) -> None:
    """The data of another save under the name of this one's."""
    name = now.file("data").name
    remove(now.file("data"))
    shutil.copytree(now.file("data", of), now.path / name)


def between_ranks(now: Saves) -> None:
    """The files of two ranks change names, if there are two; else the only one has another rank's name."""
    files = sorted(now.file("data").iterdir())
    if len(files) == 1:
        files[0].rename(files[0].with_name("rank-1.safetensors"))
        return
    aside = files[0].rename(files[0].with_name("aside"))
    files[1].rename(files[0])
    aside.rename(files[1])


def another_folder(now: Saves) -> None:
    shutil.copytree(now.file("data", now.other), now.path / now.file("data", now.other).name)


def file_by_file(now: Saves, of: Path) -> None:
    """Each file of data replaced by that of another save, the folder kept."""
    for file in now.file("data").iterdir():
        source = now.file("data", of) / file.name
        if source.exists():
            copy(source, file)


def nested(now: Saves) -> None:
    inner = now.path / "inner"
    inner.mkdir()
    now.file("data").rename(inner / now.file("data").name)
    now.file(MANIFEST).rename(inner / MANIFEST)


def backwards(now: Saves) -> None:
    for file in [now.path, *now.path.rglob("*")]:
        os.utime(file, (1, 1))


def in_a_circle(now: Saves) -> None:
    shutil.rmtree(now.path)
    now.path.symlink_to(now.path.name)


def through_a_link(now: Saves) -> None:
    target = now.path.rename(now.path.with_name("elsewhere"))
    now.path.symlink_to(target)


MIXTURES: dict[str, Callable[[Saves], None]] = {
    "data of another save under this one's name": lambda now: its_name(now, now.other),
    "data of another model under this one's name": lambda now: its_name(now, now.foreign),
    "files of another save in this one's folder": lambda now: file_by_file(now, now.other),
    "files of another model in this one's folder": lambda now: file_by_file(now, now.foreign),
    "the files of two ranks swapped": between_ranks,
    "a folder of another save": another_folder,
    "a level deeper": nested,
    "all clocks set back": backwards,
    "the folder behind a link": through_a_link,
    "the folder a link in a circle": in_a_circle,
    "everything deleted": lambda now: shutil.rmtree(now.path),
    "a stale lock": lambda now: void((now.path / "save.lock").write_text("{")),
    "a manifest set aside": lambda now: void((now.path / "manifest.json.data-0123456789ab").write_text("{")),
}


class Trial:
    """One checkpoint, what a load of it gives, and the moments at which it can be damaged."""

    def __init__(self, saves: Saves, work: Path) -> None:
        self.saves, self.work = saves, work
        self.expected = resumed(saves.path)
        self.partly = self.in_two_parts(saves.path, lambda: None)
        self.reads = 0
        with patch("os.preadv", self.counted(os.preadv)):
            fresh(saves.path)

    def counted(self, original: Callable[..., int]) -> Callable[..., int]:
        def call(*args: Any) -> int:
            self.reads += 1
            return original(*args)

        return call

    def copied(self) -> Saves:
        """The saves once more, to be damaged."""
        shutil.rmtree(self.work, ignore_errors=True)
        places = [self.work / name for name in ("saved", "other", "foreign")]
        for source, target in zip((self.saves.path, self.saves.other, self.saves.foreign), places, strict=True):
            shutil.copytree(source, target)
        return Saves(*places)

    def before(self, now: Saves, do: Callable[[], None], _: random.Random) -> Any:
        do()
        return resumed(now.path)

    def during(self, now: Saves, do: Callable[[], None], generator: random.Random) -> Any:
        """Damage right before the n-th read of the check."""
        left, original = generator.randrange(self.reads), os.preadv

        def call(*args: Any) -> int:
            nonlocal left
            left -= 1
            if left == -1:
                do()
            return original(*args)

        with patch("os.preadv", call):
            params, optimizer = fresh(now.path)
        return stepped(params, optimizer)

    def between(self, now: Saves, do: Callable[[], None], _: random.Random) -> Any:
        params, optimizer = fresh(now.path)
        do()
        return stepped(params, optimizer)

    def later(self, now: Saves, do: Callable[[], None], _: random.Random) -> Any:
        return self.in_two_parts(now.path, do)

    def in_two_parts(self, path: Path, do: Callable[[], None]) -> Any:
        """One parameter steps first; the others' state is read after the damage."""
        params, optimizer = fresh(path)
        drive(optimizer, params[:1], range(STEPS, STEPS + 1))
        do()
        drive(optimizer, params, range(STEPS + 1, STEPS + 2))
        return [snapshot(params), state_of(optimizer)]

    def saved_again(self, now: Saves, do: Callable[[], None], generator: random.Random) -> Any:
        """What waits to be read is written again, into the same folder or another one."""
        _, optimizer = fresh(now.path)
        do()
        target = now.path if generator.random() < 0.5 and now.path.is_dir() else self.work / "again"
        save_shampoo(optimizer, target)
        return resumed(target)

    def inspected(self, now: Saves, do: Callable[[], None], _: random.Random) -> Any:
        do()
        describe(now.path)
        return self.expected

    def moments(self) -> list[Callable[[Saves, Callable[[], None], random.Random], Any]]:
        return [self.before, self.during, self.between, self.later, self.saved_again, self.inspected]


def torture(trial: Trial, damages: Sequence[Damage], figures: Figures, seed: int, every: int = 1) -> None:
    """Do each damage at each moment, or only every n-th of these."""
    number = 0
    for damage in damages:
        for moment in trial.moments():
            number += 1
            if number % every:
                continue
            now, generator = trial.copied(), random.Random(f"{seed} {damage.name} {moment.__name__}")
            expected = trial.partly if moment.__name__ == "later" else trial.expected
            action = partial(moment, now, partial(damage.do, now), generator)
            how, text = ending(action, [expected], WORDS)
            figures.tried += 1
            if how in ("equal", "error"):
                figures.seen[how] += 1
            else:
                figures.fault(how, f"{damage.name}, {moment.__name__}: {text}")


def by_one_process(folder: Path) -> Saves:
    """A save, a later one of the same run, and one of another model."""
    saves = Saves(folder / "saved", folder / "other", folder / "foreign")
    params, optimizer = made(STEPS)
    save_shampoo(optimizer, saves.path)
    drive(optimizer, params, range(STEPS, STEPS + 2))
    save_shampoo(optimizer, saves.other)
    foreign, optimizer = made()
    drive(optimizer, foreign[1:], range(2))
    save_shampoo(optimizer, saves.foreign)
    return saves


def by_two_ranks(folder: Path) -> Saves:
    """The same, of two ranks that divide the blocks."""
    result = run_checks([Check("saves", 2, "torture:save", str(folder))], folder / "launch")["saves"]
    assert result.failure is None, result.failure
    return Saves(folder / "saved", folder / "other", folder / "foreign")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1, help="of each kind in each region, at each moment")
    parser.add_argument("--every", type=int, default=1, help="only every n-th damage")
    parser.add_argument("--ranks", nargs="+", type=int, choices=(1, 2), default=(1, 2))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    figures = Figures()
    for ranks in args.ranks:
        with tempfile.TemporaryDirectory() as folder:
            saves = (by_one_process if ranks == 1 else by_two_ranks)(Path(folder) / "saves")
            damages = [*damages_of_names(saves), *damages_of_bytes(saves, args.rounds, args.seed)]
            torture(Trial(saves, Path(folder) / "work"), damages, figures, args.seed, args.every)
    return figures.told()


if __name__ == "__main__":
    raise SystemExit(main())
