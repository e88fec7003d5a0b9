"""save_shampoo and load_shampoo in one process are exact and safe, and name what does not fit."""

from __future__ import annotations

import json
import logging
import multiprocessing
import random
import re
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import shampoo_deepspeed
from shampoo_deepspeed import CheckpointError, Shampoo, load_shampoo, save_shampoo
from shampoo_deepspeed.__main__ import main as command
from shampoo_deepspeed.checkpoint.inspect import describe
from shampoo_deepspeed.checkpoint.manifest import Manifest
from tests.support import kept_checkpoint as kept
from tests.support.manifests import body_of, put
from tests.support.saved_forms import FORMS
from tests.support.stepping import drive, parameter, same_bits, shampoo, snapshot, state_of, train
from tests.support.zoo import make_model, relative_error


def made(**options: Any) -> tuple[nn.Module, Shampoo]:
    """Return the odd model of the zoo and its optimizer."""
    model = make_model("odd")
    return model, shampoo(model.named_parameters(), **options)


def resumed(model: nn.Module, path: Path, **options: Any) -> tuple[nn.Module, Shampoo]:
    """Return a new model with the same weights, and a new optimizer with a checkpoint's state."""
    other, optimizer = made(**options)
    other.load_state_dict(model.state_dict())
    load_shampoo(optimizer, path)
    return other, optimizer


@pytest.mark.slow
@pytest.mark.parametrize(
    "options, steps",
    [
        pytest.param(options, steps, id=f"{steps}-{name}")
        for number, (name, options) in enumerate(FORMS.items())
        for steps in ([1, 3] if number % 2 else [2, 5])
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(options: dict[str, Any], steps: int, tmp_path: Path) -> None:
    model, optimizer = made(**options)
    train(model, optimizer, range(steps), sometimes=True)
    save_shampoo(optimizer, tmp_path)
    other, again = resumed(model, tmp_path, **options)
    for training, with_ in ((model, optimizer), (other, again)):
        train(training, with_, range(steps, steps + 7), sometimes=True)
    assert same_bits(snapshot(model.parameters()), snapshot(other.parameters()))


def test_state_that_no_step_has_used_is_saved_again(tmp_path: Path) -> None:
    model, optimizer = made()
    train(model, optimizer, range(5))
    save_shampoo(optimizer, tmp_path / "a")
    other, again = resumed(model, tmp_path / "a")
    save_shampoo(again, tmp_path / "b")
    save_shampoo(again, tmp_path / "a")
    for path in ("a", "b"):
        third, optimizer3 = resumed(model, tmp_path / path)
        fourth, optimizer4 = made()
        fourth.load_state_dict(model.state_dict())
        optimizer4.load_state_dict(again.state_dict())
        for training, with_ in ((third, optimizer3), (fourth, optimizer4)):
            train(training, with_, range(5, 9))
        assert same_bits(snapshot(third.parameters()), snapshot(fourth.parameters()))
    train(model, optimizer, range(5, 9))
    train(other, again, range(5, 9))
    assert same_bits(snapshot(model.parameters()), snapshot(other.parameters()))
    assert same_bits(snapshot(model.parameters()), snapshot(third.parameters()))


def test_other_rules_are_named(tmp_path: Path) -> None:
    model, optimizer = made(rules=[{"match": "up.weight", "max_preconditioner_dim": 4}])
    train(model, optimizer, range(4))
    save_shampoo(optimizer, tmp_path)
    with pytest.raises(CheckpointError, match="saved with rules = .*'max_preconditioner_dim': 4"):
        resumed(model, tmp_path)


def test_another_block_size_is_named(tmp_path: Path) -> None:
    model, optimizer = made()
    train(model, optimizer, range(4))
    save_shampoo(optimizer, tmp_path)
    with pytest.raises(CheckpointError, match="max_preconditioner_dim = 8, but here it is 4; set it to 8"):
        resumed(model, tmp_path, max_preconditioner_dim=4)


def test_another_name_or_shape_or_policy_is_named(tmp_path: Path) -> None:
    (w, v), gone = (parameter(8, 6), parameter(6)), parameter(4, 4)
    optimizer = shampoo([("w", w), ("v", v), ("gone", gone)])
    drive(optimizer, [w, v, gone], range(4))
    save_shampoo(optimizer, tmp_path)
    wrong: dict[str, tuple[list[Any], dict[str, Any]]] = {
        "has no parameter of this name": ([("w", w), ("v", v), ("gone", gone), ("new", parameter(3, 3))], {}),
        "gone: it is in the checkpoint, but no parameter here": ([("w", w), ("v", v)], {}),
        r"saved with shape \(8, 6\), but has \(6, 8\) here": ([("w", parameter(6, 8)), ("v", v), ("gone", gone)], {}),
        "saved as preconditioned, but here it is element-wise": (
            [("w", w), ("v", v), ("gone", gone)],
            {"exclude": ["w"]},
        ),
        "factor_dtype = 'float32'": ([("w", w), ("v", v), ("gone", gone)], {"factor_dtype": "float64"}),
        "grafting = 'rms', but here it is 'adam'; set": ([("w", w), ("v", v), ("gone", gone)], {"grafting": "adam"}),
        "elementwise = 'adam', but here it is 'sgd'": ([("w", w), ("v", v), ("gone", gone)], {"grafting": "sgd"}),
    }
    for texts, (params, options) in wrong.items():
        with pytest.raises(CheckpointError, match=texts):
            load_shampoo(shampoo(params, **options), tmp_path)


def test_without_strict_what_fits_is_loaded_and_the_rest_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    w, other, gone = parameter(8, 6), parameter(5, 4, seed=1), parameter(3, 3)
    optimizer = shampoo([("w", w), ("other", other), ("gone", gone)])
    drive(optimizer, [w, other, gone], range(4))
    save_shampoo(optimizer, tmp_path)
    again, reshaped = nn.Parameter(w.detach().clone()), parameter(4, 4)
    resumed_ = shampoo([("w", again), ("other", reshaped)])
    caplog.set_level(logging.INFO, logger="shampoo_deepspeed")
    report = load_shampoo(resumed_, tmp_path, strict=False)
    assert report.loaded == ("w",)
    assert "shape" in report.left_out["other"]
    new_state = [text.partition(":")[0] for text in caplog.messages if text.endswith("; it starts with new state")]
    assert new_state == ["other"] and "gone: it is in the checkpoint" in caplog.text
    assert f"resumed Shampoo's state of step 4 from {tmp_path} (1 parameters)" in caplog.text
    drive(optimizer, [w, other], range(4, 8))
    drive(resumed_, [again, reshaped], range(4, 8))
    assert same_bits(w.detach(), again.detach())
    assert state_of(resumed_)["steps"] == {"w": 8, "other": 4}


def test_options_are_loaded_unless_options_is_false(tmp_path: Path) -> None:
    w = parameter(8, 6)
    optimizer = shampoo([("w", w)])
    drive(optimizer, [w], range(2))
    optimizer.param_groups[0]["lr"] = 0.125
    save_shampoo(optimizer, tmp_path)
    for options, lr in ((True, 0.125), (False, 0.5)):
        again = shampoo([("w", w)], lr=0.5)
        load_shampoo(again, tmp_path, options=options)
        assert again.param_groups[0]["lr"] == lr


def test_a_new_save_replaces_the_old_one_and_leaves_nothing_behind(tmp_path: Path) -> None:
    w = parameter(8, 6)
    optimizer = shampoo([("w", w)])
    (tmp_path / "data-0123456789ab").mkdir()
    (tmp_path / "manifest.json.data-0123456789ab").write_text("{")
    for _ in range(2):
        drive(optimizer, [w], range(2))
        save_shampoo(optimizer, tmp_path)
        assert len(list(tmp_path.iterdir())) == 2
    assert Manifest.read(tmp_path).parameters["w"]["steps"] == 4


def test_a_save_that_fails_leaves_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    w = parameter(8, 6)
    optimizer = shampoo([("w", w)])
    drive(optimizer, [w], range(2))
    save_shampoo(optimizer, tmp_path)
    drive(optimizer, [w], range(2))

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("shampoo_deepspeed.checkpoint.writer.os.fsync", full)
        with pytest.raises(CheckpointError, match="No space left"):
            save_shampoo(optimizer, tmp_path)
    load_shampoo(shampoo([("w", w)]), tmp_path)
    assert Manifest.read(tmp_path).parameters["w"]["steps"] == 2


def saved_once(path: Path) -> None:
    """Save a small checkpoint."""
    params = [parameter(8, 6), parameter(6)]
    optimizer = shampoo([("w", params[0]), ("b", params[1])], momentum=0.9)
    drive(optimizer, params, range(4))
    save_shampoo(optimizer, path)


def loaded(path: Path) -> None:
    """Load what `saved_once` has saved, and take a step with it."""
    params = [parameter(8, 6), parameter(6)]
    optimizer = shampoo([("w", params[0]), ("b", params[1])], momentum=0.9)
    load_shampoo(optimizer, path)
    drive(optimizer, params, range(4, 6))


def test_corruption_anywhere_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    saved_once(tmp_path)
    loaded(tmp_path)
    files = [file for file in sorted(tmp_path.rglob("*")) if file.is_file()]
    assert len(files) == 2
    generator = random.Random(0)
    for file in files:
        content = file.read_bytes()
        flips = []
        for place in generator.sample(range(len(content)), 12):
            flipped = bytearray(content)
            flipped[place] ^= 1 << generator.randrange(8)
            flips.append(bytes(flipped))
        for damaged in [*flips, content[: len(content) // 2], b"", content + b" "]:
            file.write_bytes(damaged)
            with pytest.raises(CheckpointError, match=str(file)):
                loaded(tmp_path)
        file.write_bytes(content)
    loaded(tmp_path)
    for file in files:
        content = file.read_bytes()
        file.unlink()
        with pytest.raises(CheckpointError, match="manifest.json|is missing"):
            loaded(tmp_path)
        file.write_bytes(content)


def test_a_missing_checkpoint_and_another_format_are_errors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no complete Shampoo checkpoint"):
        loaded(tmp_path / "nowhere")
    (tmp_path / "data-1").mkdir()
    with pytest.raises(CheckpointError, match="a save into it was interrupted"):
        loaded(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 99, "crc32": "00000000", "body": {}}))
    with pytest.raises(CheckpointError, match="format 99, and this version of shampoo_deepspeed reads 2"):
        loaded(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"crc32": "00000000", "body": {"format": 1}}, indent=1))
    with pytest.raises(CheckpointError, match="is of format 1, which only development versions"):
        loaded(tmp_path)


def kill_after(path: Path, saves: int, seconds: float, first: int) -> None:
    """Start a child that saves after every step, and kill it some time after this many saves."""
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def endless() -> None:
        params = [parameter(96, 64), parameter(64)]
        optimizer = shampoo([("w", params[0]), ("b", params[1])], max_preconditioner_dim=16)
        if first:
            load_shampoo(optimizer, path)
        step = first
        while True:
            sender.send(step)
            drive(optimizer, params, range(step, step + 1))
            step += 1
            save_shampoo(optimizer, path)

    child = multiprocessing.get_context("fork").Process(target=endless)
    child.start()
    for _ in range(saves + 1):
        receiver.recv()
    time.sleep(seconds)
    assert child.is_alive()
    child.kill()
    child.join()


@pytest.mark.slow
def test_a_save_killed_at_any_moment_leaves_a_checkpoint_to_go_on_from(tmp_path: Path) -> None:
    generator, known = random.Random(7), 0
    states: dict[int, Any] = {}
    for _ in range(30):
        kill_after(tmp_path, generator.randrange(3), generator.uniform(0.0, 0.03), known)
        if not (tmp_path / "manifest.json").exists():
            assert known == 0
            continue
        steps = Manifest.read(tmp_path).parameters["w"]["steps"]
        assert steps >= known
        known = steps
        params = [parameter(96, 64), parameter(64)]
        optimizer = shampoo([("w", params[0]), ("b", params[1])], max_preconditioner_dim=16)
        load_shampoo(optimizer, tmp_path)
        drive(optimizer, params, range(known, known + 1))
        states[known + 1] = state_of(optimizer)
    assert known > 20, "the children hardly saved anything"
    params = [parameter(96, 64), parameter(64)]
    unbroken = shampoo([("w", params[0]), ("b", params[1])], max_preconditioner_dim=16)
    for step in range(known + 1):
        drive(unbroken, params, range(step, step + 1))
        if step + 1 in states:
            assert same_bits(state_of(unbroken), states[step + 1])


def test_an_asynchronous_save_holds_the_moment_of_the_call(tmp_path: Path) -> None:
    model, optimizer = made()
    train(model, optimizer, range(4))
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    future = save_shampoo(optimizer, tmp_path, asynchronous=True)
    train(model, optimizer, range(4, 8))
    future.result()
    other, again = made()
    other.load_state_dict(weights)
    load_shampoo(again, tmp_path)
    train(other, again, range(4, 8))
    assert same_bits(snapshot(model.parameters()), snapshot(other.parameters()))


def test_a_failed_asynchronous_save_is_raised_by_the_next_save_at_the_latest(tmp_path: Path) -> None:
    model, optimizer = made()
    train(model, optimizer, range(1))
    (tmp_path / "file").write_text("no folder")
    future = save_shampoo(optimizer, tmp_path / "file" / "below", asynchronous=True)
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_shampoo(optimizer, tmp_path / "good")
    assert future.done()
    save_shampoo(optimizer, tmp_path / "good")


def test_sixteen_bit_moments_take_half_their_bytes(tmp_path: Path) -> None:
    w, b = parameter(128, 96), parameter(96)
    optimizer = shampoo([("w", w), ("b", b)], max_preconditioner_dim=128)
    drive(optimizer, [w, b], range(4))
    state = sum(t.nbytes for s in state_of(optimizer)["stacks"] for t in s["tensors"].values()) + 2 * b.nbytes
    sizes = {}
    for name, dtype in (("full", None), ("half", torch.bfloat16)):
        save_shampoo(optimizer, tmp_path / name, moments_dtype=dtype)
        manifest = Manifest.read(tmp_path / name)
        sizes[name] = sum(facts["bytes"] for facts in manifest.files.values())
    assert state < sizes["full"] < 1.05 * state  # each tensor's metadata is small
    assert sizes["full"] - sizes["half"] == pytest.approx(w.nbytes / 2 + b.nbytes, rel=0.02)  # w has one
    again = shampoo([("w", w), ("b", b)], max_preconditioner_dim=128)
    load_shampoo(again, tmp_path / "half")
    drive(again, [w, b], range(4, 5))
    drive(optimizer, [w, b], range(4, 5))
    (one,), (two,) = state_of(optimizer)["stacks"], state_of(again)["stacks"]
    assert same_bits(one["tensors"]["factor_0"], two["tensors"]["factor_0"])
    error = (one["tensors"]["exp_avg"] - two["tensors"]["exp_avg"]).norm() / one["tensors"]["exp_avg"].norm()
    assert 0 < error < 4e-3


def test_a_large_state_costs_less_than_one_percent_more_on_disk(tmp_path: Path) -> None:
    w = parameter(512, 512)
    optimizer = shampoo([("w", w)], max_preconditioner_dim=256)
    drive(optimizer, [w], range(1))
    save_shampoo(optimizer, tmp_path)
    state = sum(t.nbytes for s in state_of(optimizer)["stacks"] for t in s["tensors"].values())
    assert sum(file.stat().st_size for file in tmp_path.rglob("*")) < 1.01 * state


def test_masters_of_sixteen_bit_parameters_are_saved_and_loaded(tmp_path: Path) -> None:
    p = parameter(8, 6, dtype=torch.bfloat16)
    optimizer = shampoo([("w", p)], lr=1e-5)
    drive(optimizer, [p], range(4))
    save_shampoo(optimizer, tmp_path)
    again = nn.Parameter(p.detach().clone())
    resumed_ = shampoo([("w", again)], lr=1e-5)
    load_shampoo(resumed_, tmp_path)
    drive(optimizer, [p], range(4, 8))
    drive(resumed_, [again], range(4, 8))
    assert same_bits(state_of(optimizer), state_of(resumed_))


def test_inspect_shows_what_a_checkpoint_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved_once(tmp_path)
    assert command(["inspect", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert (
        f"saved by 1 rank with shampoo_deepspeed {shampoo_deepspeed.__version__}, torch" in text
        and "all checksums match" in text
    )
    assert "momentum = 0.9" in text
    assert re.search(r"w +8x6 +0 +4 +1 block, largest 8x6", text)
    assert re.search(r"b +6 +0 +4 +element-wise", text)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(SystemExit, match="1"):
        command(["inspect", str(tmp_path)])
    assert "holds no complete Shampoo checkpoint" in capsys.readouterr().err


def test_inspect_names_a_checkpoint_below_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved_once(tmp_path / "checkpoint-3" / "global_step3" / "shampoo")
    with pytest.raises(SystemExit, match="1"):
        command(["inspect", str(tmp_path / "checkpoint-3")])
    assert f"there is one in {tmp_path / 'checkpoint-3' / 'global_step3' / 'shampoo'}" in capsys.readouterr().err


def test_the_kept_checkpoint_of_format_2_loads_for_ever(tmp_path: Path) -> None:
    weights = torch.load(kept.FOLDER / "weights.pt", weights_only=True)
    params: dict[str, torch.Tensor] = {name: nn.Parameter(value.clone()) for name, value in weights.items()}
    optimizer = kept.optimizer(params)
    report = load_shampoo(optimizer, kept.FOLDER / "shampoo")
    assert set(report.loaded) == set(params)
    drive(optimizer, list(params.values()), range(kept.SAVED_AT, kept.STEPS))
    for name, value in torch.load(kept.FOLDER / "expected.pt", weights_only=True).items():
        bound = 1e-5 if value.dtype == torch.float32 else 2e-3  # other machines may round elements differently
        assert relative_error(params[name].detach(), value) < bound, name
    assert "cube" in describe(kept.FOLDER / "shampoo")
    with pytest.raises(CheckpointError, match="saved with preconditioner = 'shampoo', but here it is 'kl_shampoo'"):
        load_shampoo(Shampoo(params.items(), max_preconditioner_dim=8), kept.FOLDER / "shampoo")


def test_a_manifest_records_the_versions_that_wrote_it(tmp_path: Path) -> None:
    saved_once(tmp_path)
    own = shampoo_deepspeed.__version__
    assert Manifest.read(tmp_path).versions == {"shampoo_deepspeed": own, "torch": torch.__version__}
    assert own == version("shampoo-deepspeed")  # that of the installed package


def test_a_manifest_without_versions_loads(tmp_path: Path) -> None:
    saved_once(tmp_path)
    body = body_of(tmp_path)
    del body["versions"]
    put(tmp_path, body)
    assert Manifest.read(tmp_path).versions == {}
    assert "saved by 1 rank with unknown versions" in describe(tmp_path)
