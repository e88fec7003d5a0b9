"""The command line takes anything: what is wrong is an error that names it, never a traceback."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from shampoo_deepspeed.__main__ import main

LONG = "x" * 5000
DEEP = "[" * 100_000
DIGITS = "9" * 5001
ESTIMATE = ["estimate", "--world-size", "2", "--framework", "ddp"]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 2) -> str:
    """Return the message of a command that is refused with this status."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    message = capsys.readouterr().err
    assert ended.value.code == status, message
    assert message.startswith("python -m shampoo_deepspeed: error: ") and len(message) < 12_000
    return message


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        ([*ESTIMATE, "--model", LONG], 2),
        ([*ESTIMATE, "--model", f"{LONG}/config.json"], 2),
        ([*ESTIMATE, "--shapes", LONG], 2),
        (["estimate", "--world-size", "2", "--model", "llama-3-8b", "--ds-config", LONG], 2),
        (["report", LONG], 2),
        (["inspect", LONG], 1),
    ],
    ids=["model", "config", "shapes", "ds-config", "report", "inspect"],
)
def test_a_path_that_is_too_long_is_named(
    arguments: list[str], status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(capsys, *arguments, status=status)
    assert "File name too long" in message and "xxx" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"model_type": []}', "model_type = [] is not allowed: a name, such as 'llama'"),
        ('{"model_type": null}', "model_type = None is not allowed: a name"),
        ("{}", "is not known"),
        ("[]", "must hold one JSON object, not []"),
        (DEEP, "it is nested too deeply"),
        (f'{{"model_type": "llama", "hidden_size": {DIGITS}}}', "Exceeds the limit"),
        ('{"model_type": "llama", "hidden_size": []}', "hidden_size = [] is not allowed: an integer >= 1"),
        ('{"model_type": "no such kind"}', "is not known"),
        ('{"model_type": "gpt2", "n_embd": []}', "is not known"),
    ],
    ids=range(9),
)
def test_a_config_of_any_form_is_named(
    content: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    for model in (path, tmp_path):
        text = refused(capsys, *ESTIMATE, "--model", str(model))
        assert message in text and str(model) in text


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (f"betas={DEEP}", r"--option 'betas' = .* is not allowed: it is nested too deeply"),
        (f"lr={DIGITS}", r"--option 'lr' = .* is not allowed: Exceeds the limit"),
        (LONG, r"--option 'xxx.* is not allowed: NAME=JSON"),
        (f"{LONG}=1", r"Unknown Shampoo option 'xxx"),
    ],
    ids=range(4),
)
def test_an_option_of_any_form_is_named(option: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert re.search(message, refused(capsys, *ESTIMATE, "--model", "llama-3-8b", "--option", option))


@pytest.mark.parametrize("content", [f"{DEEP}\n", f'{{"step": 1, "loss": {DIGITS}}}\n', b'{"step": 1, "\xff": 1}\n'])
def test_a_log_of_any_form_is_named(content: str | bytes, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for name in ("log.jsonl", "trainer_state.json"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        assert f"{path} cannot be read as a log" in refused(capsys, "report", str(path))
