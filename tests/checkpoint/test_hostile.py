"""A checkpoint from a stranger: whatever its files say, nothing runs, and one CheckpointError names what is wrong."""

from __future__ import annotations

import json
import os
import pickle
import random
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn

from shampoo_deepspeed import CheckpointError, Shampoo, load_shampoo, save_shampoo
from shampoo_deepspeed.__main__ import main as command
from shampoo_deepspeed.checkpoint import manifest as manifests
from shampoo_deepspeed.checkpoint import schema, tensor_files
from shampoo_deepspeed.checkpoint.inspect import describe
from shampoo_deepspeed.checkpoint.manifest import Manifest
from shampoo_deepspeed.geometry.boxes import Box
from shampoo_deepspeed.options.param_groups import KEYS_OF_GROUPS
from tests.support.manifests import body_of, put
from tests.support.stepping import drive, parameter, same_bits, shampoo, state_of
from tests.torture.figures import at_most

STEPS = 3


def made(seed: int = 0, **options: Any) -> tuple[list[nn.Parameter], Shampoo]:
    params = [parameter(8, 6, seed=seed), parameter(12, 6, seed=seed + 1), parameter(6, seed=seed + 2)]
    return params, shampoo(list(zip(["w", "v", "b"], params, strict=True)), momentum=0.9, **options)


def saved(path: Path, **options: Any) -> tuple[list[nn.Parameter], Shampoo]:
    params, optimizer = made(**options)
    drive(optimizer, params, range(STEPS))
    save_shampoo(optimizer, path)
    return params, optimizer


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile") / "saved"
    saved(folder)
    (folder.parent / "manifest.json").write_bytes((folder / "manifest.json").read_bytes())
    return folder


def loaded(path: Path, **how: Any) -> Shampoo:
    params, optimizer = made()
    load_shampoo(optimizer, path, **how)
    drive(optimizer, params, range(STEPS, STEPS + 1))
    return optimizer


def refusal(path: Path) -> str:
    """The message with which a checkpoint is refused, at once, by all that read it."""
    begin = time.process_time()
    messages = []
    for read in (loaded, describe):
        with pytest.raises(CheckpointError) as caught:
            read(path)
        messages.append(str(caught.value))
    assert time.process_time() - begin < 2.0
    assert all(text.isprintable() or "\n" in text for text in messages)
    return messages[0]


class Command:
    """What a pickle of it runs when it is read."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.witness),)


def test_a_checkpoint_full_of_pickles_runs_nothing(tmp_path: Path) -> None:
    saved(tmp_path)
    (data,) = tmp_path.glob("data-*")
    witness = tmp_path.parent / f"{tmp_path.name}-ran"
    crafted = pickle.dumps(Command(witness))
    extra = [folder / name for folder in (tmp_path, data) for name in (".metadata", "__0_0.distcp", "optimizer.pt")]
    for file in extra:
        file.write_bytes(crafted)
    loaded(tmp_path)
    describe(tmp_path)
    for file in (tmp_path / "manifest.json", data / "rank-0.safetensors"):
        file.write_bytes(crafted)
        refusal(tmp_path)
    assert not witness.exists()
    pickle.loads(crafted)
    assert witness.exists()  # so the pickle is a dangerous one


def test_no_module_that_reads_checkpoints_knows_pickle() -> None:
    for module in Path(schema.__file__).parent.glob("*.py"):
        assert not re.search(r"pickle|torch\.load|\.metadata|checkpoint\.filesystem|import dcp", module.read_text())


def test_anyone_can_open_the_files(tmp_path: Path) -> None:
    _, optimizer = saved(tmp_path)
    (file,) = tmp_path.glob("data-*/*.safetensors")
    stack = next(s for s in state_of(optimizer)["stacks"] if "w/0" in s["keys"])
    with safe_open(file, framework="pt") as opened:
        names = set(opened.keys())
        assert {"blocks/w/0/factor_0", "blocks/w/0/status", "shards/w/momentum[0:8, 0:6]"} <= names
        assert "elementwise/b/exp_avg[0:6]" in names
        row = stack["keys"].index("w/0")
        assert same_bits(opened.get_tensor("blocks/w/0/factor_0"), stack["tensors"]["factor_0"][row])


# A wrong value for each kind of field.
WRONG: list[Any] = [
    None, True, -1, 0.5, 10**12, 2**64, 10**19, "", "x", "\x1b[31m", "../../etc", "/etc/passwd", "a/b", [], [[]], {},
    {"a": 1}, [1, 2, 3], [-1], [None], ["x"] * 3, "0" * 8, 16_000_000, [16_000_000], {"\x1b[2J": {}}, [[0, "0" * 8]],
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in a manifest, that of containers too."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else []
    return [path, *(found for key, item in inner for found in places(item, (*path, key)))]


def replaced(body: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    copy = json.loads(json.dumps(body))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return copy


def put_raw(folder: Path, inner: bytes) -> None:
    """A manifest of these bytes, with a right checksum."""
    head = b'{"format": 2, "crc32": "%s", "body": ' % manifests.checksum(inner).encode()
    (folder / "manifest.json").write_bytes(head + inner + b"}\n")


READABLE = (("versions",), ("rejected_steps",), ("world_size",), ("groups",), ("steps",), ("decays",))


def harmless(body: Any, path: tuple[Any, ...]) -> bool:
    """Whether another value here may be as good: a count, a text for people, an option of the group."""
    return any(path[: len(ok)] == ok or path[-1:] == ok for ok in READABLE)


@pytest.fixture
def body(kept: Path) -> Any:
    yield body_of(kept)
    (kept / "manifest.json").unlink()
    (kept / "manifest.json").write_bytes((kept.parent / "manifest.json").read_bytes())


def test_each_field_is_checked(kept: Path, body: Any) -> None:
    """Every field in turn has every kind of wrong value, and is missing."""
    where = [p for p in places(body) if p and "groups" not in p[:1]]
    for number, path in enumerate(where):
        for value in [WRONG[(number + shift) % len(WRONG)] for shift in (0, 7, 13)]:
            try:
                schema.check(replaced(body, path, value))
            except schema.SchemaError as error:
                assert str(error).startswith(str(path[0])) or len(path) == 1, (path, value, error)
            else:
                if replaced(body, path, value) != body and not harmless(body, path):  # it does not fit the files
                    put(kept, replaced(body, path, value))
                    refusal(kept)
    for name in body:
        text = {key: value for key, value in body.items() if key != name}
        put(kept, text)
        if name in schema.MANIFEST.required:  # the others are optional
            assert name in refusal(kept)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_hostile_manifests_by_hypothesis(kept: Path, body: Any, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(places(body)))
    junk = st.recursive(
        st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text()
        | st.sampled_from(WRONG),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
        max_leaves=12,
    )  # fmt: skip
    put_raw(kept, json.dumps(replaced(body, path, data.draw(junk))).encode())
    begin = time.process_time()
    for read in (loaded, describe):
        try:
            read(kept)
        except CheckpointError as error:
            assert "\x1b" not in str(error)
            str(error).encode()
    assert time.process_time() - begin < 2.0


DEEP = b"[" * 100_000
TEXTS: dict[str, tuple[bytes, str]] = {
    "nan": (b'{"a": NaN}', "NaN"),
    "infinity": (b'{"a": -Infinity}', "Infinity"),
    "infinite": (b'{"a": 1e999}', "too large"),
    "digits": (b'{"a": ' + b"9" * 100_000 + b"}", "digits"),
    "deep": (DEEP + DEEP.replace(b"[", b"]"), "nested too deeply"),
    "twice": (b'{"world_size": 1, "world_size": 2}', "'world_size' appears twice"),
    "encoding": (b'{"a": "\xff"}', "utf-8"),
    "surrogate in UTF-8": (b'{"a": "\xed\xa0\x80"}', "utf-8"),
    "not JSON": (b"{]", "Expecting"),
    "many": (b"[" + b"0," * (1 << 21) + b"0]", "values"),
    "empty lists": (b"[" + b"[]," * (1 << 21) + b"0]", "values"),
    "keys": (b"{" + b",".join(b'"%d":0' % n for n in range(1 << 20)) + b"}", "values"),
    "a list": (b"[]", "allowed: an object"),
    "a text": (b'"x"', "allowed: an object"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_what_is_not_strictly_json_is_refused(name: str, kept: Path, body: Any) -> None:
    content, message = TEXTS[name]
    put_raw(kept, content)
    assert message in refusal(kept)


@pytest.mark.parametrize("value", [["x"] * 100_001, [[0.5] * 1001] * 100, {"a": [["x"] * 50_001] * 2}])
def test_an_option_of_too_many_values_is_refused_before_a_message_quotes_it(value: Any, kept: Path, body: Any) -> None:
    body["groups"]["0"]["exclude"] = value
    put(kept, body)
    assert "has too many values; allowed: at most 100000" in refusal(kept)


def test_a_manifest_longer_than_its_data_need_is_not_read(kept: Path, body: Any) -> None:
    with (kept / "manifest.json").open("ab") as file:
        file.truncate(1 << 36)  # a hole, which takes no space
    assert "bytes, and the data next to it need at most" in refusal(kept)


def test_lone_surrogates_and_escapes_are_printed_escaped(
    kept: Path, body: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    body["parameters"]["\ud800"] = body["parameters"].pop("w")
    put(kept, body)
    assert "no valid Unicode" in refusal(kept)
    changed = body_of(kept)
    changed["versions"] = {"torch": "\x1b[31mred\x07", "\u202eevil": "1\r2"}
    changed["groups"]["0"]["exclude"] = ["\x1b]0;title\x07"]
    del changed["parameters"]["\ud800"]
    for name in changed["parameters"]:
        changed["parameters"][name].update(blocks=[], tensors={}, steps=0)
    changed["files"] = {}
    put(kept, changed)
    assert command(["inspect", str(kept)]) == 0
    text = capsys.readouterr().out
    assert "\x1b" not in text and "\u202e" not in text and "\r" not in text and r"\x1b[31mred\x07" in text


COUNTS: dict[str, Callable[[Any], None]] = {
    "blocks of a parameter": lambda b: b["parameters"]["w"].update(
        shape=[4000, 4000], merged=[4000, 4000], cuts=[[1] * 4000, [1] * 4000]
    ),
    "elements": lambda b: b["parameters"]["b"].update(shape=[10**12]),
    "bytes of a file": lambda b: b["files"]["rank-0.safetensors"].update(bytes=10**12),
    "ranks": lambda b: b["parameters"]["w"]["blocks"][0].__setitem__(0, 9_999_999),
    "a tensor of a block": lambda b: next(iter(b["layouts"].values()))[0][2].__setitem__(0, 10**6),
    "checksums": lambda b: b["parameters"]["w"]["blocks"][0].__setitem__(1, ""),
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts_are_bounded_by_what_is_there(name: str, kept: Path, body: Any) -> None:
    COUNTS[name](changed := json.loads(json.dumps(body)))
    put(kept, changed)
    assert "is not valid: " in refusal(kept)


def test_the_sixteen_million_blocks_of_few_bytes_are_never_counted() -> None:
    record = {"shape": [2**24], "merged": [2**24], "cuts": [[1]] * 24, "blocks": []}
    assert any("cuts" in step for step, _ in schema._cut_problems(record))


def link_to(target: Path, elsewhere: Path) -> None:
    target.rename(elsewhere)
    target.symlink_to(elsewhere)


def pipe(target: Path, elsewhere: Path) -> None:
    target.rename(elsewhere)
    os.mkfifo(target)


def folder(target: Path, elsewhere: Path) -> None:
    target.rename(elsewhere)
    target.mkdir()


def a_socket(target: Path, elsewhere: Path) -> None:
    target.rename(elsewhere)
    with socket.socket(socket.AF_UNIX) as bound:
        before = os.getcwd()
        os.chdir(target.parent)  # the path of a socket must be short
        bound.bind(target.name)
        os.chdir(before)


def dangling(target: Path, elsewhere: Path) -> None:
    target.rename(elsewhere)
    target.symlink_to("nowhere")


@pytest.mark.parametrize("how", [link_to, pipe, folder, a_socket, dangling])
@pytest.mark.parametrize("what", ["manifest.json", "data", "file"])
def test_links_and_other_things_in_the_folder_are_refused_by_name(
    what: str, how: Callable[[Path, Path], None], tmp_path: Path
) -> None:
    path = tmp_path / "saved"
    saved(path)
    (data,) = path.glob("data-*")
    target = {"manifest.json": path / "manifest.json", "data": data, "file": data / "rank-0.safetensors"}[what]
    how(target, tmp_path / "moved")
    assert str(target) in refusal(path)


def endless(target: Path, elsewhere: Path) -> None:
    target.rename(elsewhere)
    target.symlink_to("/dev/zero")


def huge(target: Path, elsewhere: Path) -> None:
    target.rename(elsewhere)
    with target.open("wb") as file:
        file.truncate(1 << 40)  # one hole


@pytest.mark.parametrize("how", [link_to, pipe, a_socket, dangling, endless, huge])
def test_a_save_replaces_what_is_in_the_manifests_place_and_does_not_read_it(
    how: Callable[[Path, Path], None], tmp_path: Path
) -> None:
    path = tmp_path / "saved"
    saved(path)
    before = (path / "manifest.json").read_bytes()
    how(path / "manifest.json", tmp_path / "moved")
    with at_most(20):
        saved(path)
    assert not (path / "manifest.json").is_symlink()
    loaded(path)
    assert (tmp_path / "moved").read_bytes() == before


def test_a_folder_in_the_manifests_place_is_an_error(tmp_path: Path) -> None:
    saved(tmp_path)
    folder(tmp_path / "manifest.json", tmp_path / "moved")
    with pytest.raises(CheckpointError, match="cannot be written: .*manifest.json"):
        saved(tmp_path)


def test_links_above_the_folder_are_followed_and_hard_links_are_files(tmp_path: Path) -> None:
    saved(tmp_path / "a" / "saved")
    (tmp_path / "b").symlink_to("a")
    loaded(tmp_path / "b" / "saved")
    copy = tmp_path / "copy"
    for file in (tmp_path / "a" / "saved").rglob("*"):
        if file.is_file():
            target = copy / file.relative_to(tmp_path / "a" / "saved")
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(file, target)
    loaded(copy)


def test_names_that_lead_out_of_the_folder_are_refused(kept: Path, body: Any) -> None:
    for name in ("..", ".", "", "/tmp", "data-../../0", "data-0123456789ab/..", "data-0123456789aB", "data-\n"):
        put(kept, {**body, "directory": name})
        assert "directory" in refusal(kept)
    for name in ("../rank-0.safetensors", "/rank-0.safetensors", "rank-0/1.safetensors", "rank-00.safetensors"):
        put(kept, {**body, "files": {name: {"bytes": 1}}})
        assert "files" in refusal(kept)


def test_a_bit_that_changes_between_check_and_read_is_detected(tmp_path: Path) -> None:
    """Any bit of any byte region, header included, is harmless or an error; never other weights."""
    saved(tmp_path)
    expected, generator = state_of(loaded(tmp_path)), random.Random(0)
    (file,) = tmp_path.glob("data-*/*.safetensors")
    content = file.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    harmless_ = 0
    for number in range(20):
        place = generator.randrange(begin, len(content)) if number % 5 else generator.randrange(begin)
        own, again = made()
        load_shampoo(again, tmp_path)
        with file.open("r+b") as stream:
            stream.seek(place)
            stream.write(bytes([content[place] ^ 1 << generator.randrange(8)]))
        if place < begin:
            drive(again, own, range(STEPS, STEPS + 1))  # the header was compared, and is not read again
            assert same_bits(state_of(again), expected)
            harmless_ += 1
        else:
            with pytest.raises(CheckpointError, match=f"{file} is damaged: the bytes of"):
                drive(again, own, range(STEPS, STEPS + 1))
        with pytest.raises(CheckpointError, match=str(file)):
            loaded(tmp_path)
        file.write_bytes(content)
    assert harmless_ == 4


def test_a_file_cut_short_after_the_check_is_an_error(tmp_path: Path) -> None:
    saved(tmp_path)
    (file,) = tmp_path.glob("data-*/*.safetensors")
    params, optimizer = made()
    load_shampoo(optimizer, tmp_path)
    os.truncate(file, 100)
    with pytest.raises(CheckpointError, match="cut short"):
        drive(optimizer, params, range(STEPS, STEPS + 1))
    with pytest.raises(CheckpointError, match="cut short"):  # and it never goes on without the state
        drive(optimizer, params, range(STEPS, STEPS + 1))


def test_a_header_that_does_not_belong_to_the_manifest_is_refused(kept: Path, body: Any) -> None:
    (file,) = kept.glob("data-*/*.safetensors")
    content = file.read_bytes()
    for before, after in ((b"F32", b"I32"), (b'"shape":[8,8]', b'"shape":[4,9]'), (b"factor_0", b"factor_9")):
        assert before in content
        file.write_bytes(content.replace(before, after, 1))
        assert f"{file} is damaged: from byte" in refusal(kept)
    file.write_bytes((2**63).to_bytes(8, "little") + content[8:])
    assert "is damaged: from byte" in refusal(kept)
    file.write_bytes(content)


def test_files_of_another_save_are_refused(tmp_path: Path) -> None:
    saved(tmp_path / "a")
    params, optimizer = saved(tmp_path / "b")
    drive(optimizer, params, range(3, 4))
    save_shampoo(optimizer, tmp_path / "b")
    files = [next((tmp_path / name).glob("data-*/*.safetensors")) for name in "ab"]
    files[0].write_bytes(files[1].read_bytes())
    assert "is damaged" in refusal(tmp_path / "a")


def put_value(path: Path, name: str, value: float) -> None:
    """Put a value into a tensor of a checkpoint, with right checksums, as a stranger could."""
    found = Manifest.read(path)
    files = found.open_files(path)
    stored = next(s for s in files._of_rank[0] for part in s.form if tensor_files.name_of(s.place, part) == name)
    n = next(n for n, part in enumerate(stored.form) if tensor_files.name_of(stored.place, part) == name)
    file, content = path / found.directory / "rank-0.safetensors", bytearray()
    content += file.read_bytes()
    start, size = stored.starts[n], tensor_files.size_of(stored.form[n])
    values = torch.frombuffer(content[start : start + size], dtype=stored.form[n][1]).clone()
    values[-1] = value
    content[start : start + size] = values.view(torch.uint8).numpy().tobytes()
    file.write_bytes(content)
    body = body_of(path)
    record = body["parameters"][stored.place.parameter]
    crc = manifests.checksum(bytes(content[start : start + size]))
    if stored.place.box is None:
        row = record["blocks"][stored.place.part]
        row[1] = row[1][: 8 * n] + crc + row[1][8 * (n + 1) :]
    else:
        record["tensors"][stored.place.part]["boxes"][0][3] = crc
    put(path, body)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize(
    "name", ["blocks/w/0/factor_0", "elementwise/b/second_moment[0:6]", "shards/v/momentum[0:12, 0:6]"]
)
def test_values_that_are_not_finite_are_refused_by_name(
    name: str, value: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved(tmp_path)
    put_value(tmp_path, name, value)
    with pytest.raises(CheckpointError, match=re.escape(f"values that are not finite, in {name}")):
        loaded(tmp_path)
    assert f"NOT FINITE: {name}" in describe(tmp_path)
    key = name.split("/")[1]
    params, optimizer = made()
    report = load_shampoo(optimizer, tmp_path, strict=False)
    assert set(report.left_out) == {key} and name in caplog.text
    drive(optimizer, params, range(STEPS, STEPS + 1))
    assert state_of(optimizer)["steps"] == {k: 1 if k == key else STEPS + 1 for k in ("w", "v", "b")}


NARROW = {"elementwise_format": "bfloat16", "moment_format": "bfloat16"}
SQUARES: list[tuple[dict[str, Any], str]] = [
    ({}, "elementwise/b/second_moment[0:6]"),
    (NARROW, "elementwise/b/second_moment[0:6]"),
    ({"preconditioner": "soap"}, "elementwise/b/second_moment[0:6]"),
    ({"preconditioner": "soap"}, "blocks/w/0/rotated_second_moment"),
    ({"preconditioner": "soap", **NARROW}, "blocks/w/0/rotated_second_moment"),
    ({"preconditioner": "shampoo", "grafting": "adam"}, "blocks/w/0/second_moment"),
]


@pytest.mark.parametrize("options, name", SQUARES)
def test_negative_means_of_squares_are_refused_by_name(
    options: dict[str, Any], name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved(tmp_path, **options)
    put_value(tmp_path, name, -0.0)
    load_shampoo(made(**options)[1], tmp_path)
    put_value(tmp_path, name, -1.0)
    params, optimizer = made(**options)
    with pytest.raises(CheckpointError, match=re.escape(f"values that are negative, in {name}")):
        load_shampoo(optimizer, tmp_path)
    assert f"NEGATIVE: {name}" in describe(tmp_path)
    key = name.split("/")[1]
    report = load_shampoo(optimizer, tmp_path, strict=False)
    assert set(report.left_out) == {key} and name in caplog.text
    drive(optimizer, params, range(STEPS, STEPS + 1))
    assert all(p.isfinite().all() for p in params)


def test_negative_means_of_squares_are_not_saved(tmp_path: Path) -> None:
    _, optimizer = saved(tmp_path)
    optimizer.units[0].elementwise.views["second_moment"][0].fill_(-1.0)
    with pytest.raises(CheckpointError, match=re.escape("elementwise/b/second_moment[0:6] has values that are neg")):
        save_shampoo(optimizer, tmp_path)
    loaded(tmp_path)


def test_state_that_is_not_finite_is_not_saved_and_the_last_save_stays(tmp_path: Path) -> None:
    params, optimizer = saved(tmp_path)
    stack = next(s for unit in optimizer.units for s in unit.stacks if "w/0" in s.keys)
    stack.tensors["factor_0"][stack.keys.index("w/0"), 1, 0] = float("nan")
    with pytest.raises(CheckpointError, match="blocks/w/0/factor_0 has values that are not finite"):
        save_shampoo(optimizer, tmp_path)
    loaded(tmp_path)


def test_a_manifest_that_names_another_folder_says_what_is_there(tmp_path: Path) -> None:
    saved(tmp_path)
    saved(tmp_path / "older")
    (data,) = tmp_path.glob("data-*")
    data.rename(tmp_path / "data-aaaaaaaaaaaa")
    text = refusal(tmp_path)
    assert f"names {data.name}, which is missing" in text and "data-aaaaaaaaaaaa" in text
    assert f"other complete saves are {tmp_path / 'older'}" in text


@pytest.mark.parametrize("shape", [(6,), (4, 6), (3, 4, 5), ()])
def test_boxes_tile_a_shape_only_if_each_element_is_in_one(shape: tuple[int, ...]) -> None:
    whole = Box((0,) * len(shape), shape)
    assert schema.tiles(shape, [whole]) and not schema.tiles(shape, []) and not schema.tiles(shape, [whole, whole])
    if shape:
        cut = [Box((0, *whole.offsets[1:]), (2, *shape[1:])), Box((2, *whole.offsets[1:]), (shape[0] - 2, *shape[1:]))]
        assert schema.tiles(shape, cut) and not schema.tiles(shape, cut[:1])
        moved = Box((1, *whole.offsets[1:]), cut[1].lengths)
        assert not schema.tiles(shape, [cut[0], moved])
        outside = Box((3, *whole.offsets[1:]), cut[1].lengths)
        assert not schema.tiles(shape, [cut[0], outside])


RESERVED = ["params", "param_names", "shampoo_group", "betas", "rules", "lr", "shampoo_checkpoint"]


@pytest.mark.parametrize("key", RESERVED)
def test_no_key_of_torch_or_of_this_package_comes_from_what_others_keep(key: str, kept: Path, body: Any) -> None:
    body["kept_by_others"] = {"0": {key: []}}
    put(kept, body)
    assert f"kept_by_others['0'] has a key that is {key!r}, which is reserved" in refusal(kept)


def test_no_reserved_key_of_a_group_is_known_to_the_schema(body: Any) -> None:
    for key in KEYS_OF_GROUPS:
        with pytest.raises(schema.SchemaError, match="is reserved for torch or this package"):
            schema.check({**body, "kept_by_others": {"0": {key: 0}}})


SCALAR: dict[str, Any] = {"tensor of 0 dims": 1.0, "dtype": "float32"}
NO_NUMBERS: list[Any] = ["x", None, True, [], {}, {"number": "x"}, SCALAR]
FORMS: list[Any] = [
    {"number": "x"}, {"number": ""}, {"number": 1.0}, {"number": None}, {"number": []}, {"number": "1e999"},
    {**SCALAR, "dtype": "load"}, {**SCALAR, "dtype": "float16"}, {**SCALAR, "dtype": None}, {**SCALAR, "dtype": 1},
    *({**SCALAR, "tensor of 0 dims": wrong} for wrong in NO_NUMBERS),
]  # fmt: skip


@pytest.mark.parametrize("value", FORMS, ids=str)
@pytest.mark.parametrize("around", [lambda v: v, lambda v: [0, v], lambda v: {"a": v}], ids=["", "list", "object"])
def test_numbers_and_tensors_that_others_keep_are_checked(
    value: Any, around: Callable[[Any], Any], kept: Path, body: Any
) -> None:
    body["kept_by_others"] = {"0": {"foo": around(value)}}
    put(kept, body)
    with pytest.raises(CheckpointError, match=r"is not valid: kept_by_others\['0'\]\['foo'\]"):
        Manifest.read(kept)
