"""`python -m shampoo_deepspeed report`: one page of all that a run's log holds, which needs nothing but itself."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from shampoo_deepspeed.__main__ import main
from shampoo_deepspeed.runtime.report import HEIGHT, LEFT, MOST_POINTS, WIDTH, Scale, page, thinned
from shampoo_deepspeed.runtime.run_log import LogError, RunLog, find_log, read_log
from tests.support.stepping import drive, parameter, shampoo

HISTORY: list[dict[str, Any]] = [
    {"epoch": 0.1, "grad_norm": 1.5, "learning_rate": 1e-3, "loss": 4.0, "shampoo/refresh_ms": 3.0, "step": 1},
    {"epoch": 0.2, "grad_norm": 1.1, "learning_rate": 5e-4, "loss": 3.0, "shampoo/refresh_ms": 0.0, "step": 2},
    {"epoch": 0.2, "eval_loss": 3.5, "eval_runtime": 2.0, "eval_steps_per_second": 9.0, "mine": 7, "step": 2},
    {"epoch": 0.3, "grad_norm": 1.0, "learning_rate": 1e-4, "loss": 2.5, "shampoo/refresh_ms": 1.0, "step": 3},
]


def trainer_state(folder: Path, history: list[dict[str, Any]] = HISTORY) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "trainer_state.json"
    file.write_text(json.dumps({"global_step": 3, "log_history": history}))
    return file


def tree(html: str) -> ElementTree.Element:
    """The page's elements; a page that is not well-formed is an error."""
    assert html.startswith("<!DOCTYPE html>\n")
    return ElementTree.fromstring(html.removeprefix("<!DOCTYPE html>\n"))


def curves(html: str) -> dict[str, list[tuple[float, float]]]:
    """The lines of all plots, as pixels."""
    found = {}
    for line in tree(html).iter("polyline"):
        pairs = [point.split(",") for point in line.get("points", "").split()]
        found[line.get("data-name", "")] = [(float(x), float(y)) for x, y in pairs]
    return found


def heads(html: str) -> list[str]:
    return [head.text or "" for head in tree(html).iter("h2")]


# --- reading ---


def test_a_trainers_log_is_read_without_the_prefix(tmp_path: Path) -> None:
    log = read_log(trainer_state(tmp_path))
    assert log.series["loss"] == [(1, 4.0), (2, 3.0), (3, 2.5)] and log.series["eval_loss"] == [(2, 3.5)]
    assert log.series["refresh_ms"] == [(1, 3.0), (2, 0.0), (3, 1.0)] and log.steps == 3
    assert not {"step", "epoch", "eval_runtime", "eval_steps_per_second"} & set(log.series)


def test_the_metrics_of_a_loop_are_read_as_json_lines(tmp_path: Path) -> None:
    params = [parameter(12, 10)]
    optimizer = shampoo(params, refresh_growth=0.0)
    file = tmp_path / "log.jsonl"
    with file.open("w") as stream:
        for step in range(4):
            drive(optimizer, params, [step])
            stream.write(json.dumps({"step": step + 1, "loss": 1.0 / (step + 1), **optimizer.metrics()}) + "\n")
    log = read_log(tmp_path)
    assert log.source == file and log.series["loss"][-1] == (4, 0.25)
    assert {"refresh_ms", "exchange_ms", "largest_condition_number", "rejected_steps"} <= set(log.series)
    assert "Largest condition number of a factor matrix" in heads(page(log, "run"))


def test_the_latest_checkpoint_has_the_log(tmp_path: Path) -> None:
    for step in (50, 100, 9):
        trainer_state(tmp_path / f"checkpoint-{step}")
    assert find_log(tmp_path) == tmp_path / "checkpoint-100" / "trainer_state.json"
    assert find_log(trainer_state(tmp_path)) == find_log(tmp_path) == tmp_path / "trainer_state.json"


def test_of_a_runs_own_state_and_its_checkpoints_the_one_with_the_last_step_counts(tmp_path: Path) -> None:
    """A run that was continued leaves the state of its first end in its folder."""
    own, checkpoint = trainer_state(tmp_path), trainer_state(tmp_path / "checkpoint-2000")
    for steps, found in (((1000, 2000), checkpoint), ((2000, 2000), own), ((3000, 2000), own)):
        for file, step in zip((own, checkpoint), steps, strict=True):
            file.write_text(json.dumps({"global_step": step, "log_history": HISTORY}))
        assert find_log(tmp_path) == found
    own.write_text(json.dumps({"global_step": [], "log_history": HISTORY}))
    with pytest.raises(LogError, match=re.escape(f"{own}: global_step = [] is not allowed: a whole number")):
        find_log(tmp_path)


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "cannot be read as a log: JSONDecodeError"),
        ("{}", "cannot be read as a log: it has no 'log_history'"),
        ("[]", "is neither a trainer_state.json nor a file of JSON lines"),
        ('{"log_history": [{"loss": 1.0}]}', "entry 1 has no whole number as 'step'"),
        ('{"log_history": [{"step": 1, "loss": "high"}]}', "holds no numbers by step"),
    ],
)
def test_what_is_no_log_is_an_error_that_names_the_file(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "trainer_state.json"
    file.write_text(content)
    with pytest.raises(LogError, match=re.escape(f"{file} {message}" if not message.startswith("entry") else message)):
        read_log(tmp_path)


def test_a_folder_without_a_single_log_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(LogError, match=r"has no log: a trainer_state\.json, also in a checkpoint-N, or one \*\.jsonl"):
        find_log(tmp_path)
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text("")
    with pytest.raises(LogError, match="has several files of JSON lines, a.jsonl, b.jsonl; name one"):
        find_log(tmp_path)
    with pytest.raises(LogError, match="no such file or folder"):
        find_log(tmp_path / "none")


# --- drawing ---


def log_of(**series: list[float]) -> RunLog:
    return RunLog(Path("log.jsonl"), {name: list(enumerate(values, 1)) for name, values in series.items()})


def test_every_series_is_drawn_with_its_shape(tmp_path: Path) -> None:
    html = page(read_log(trainer_state(tmp_path)), "a <run> & more")
    found = curves(html)
    assert set(found) == {"loss", "learning_rate", "grad_norm", "refresh_ms"}  # one evaluation is a dot
    (x1, y1), (x2, y2), (x3, y3) = found["loss"]
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.2) and y1 < y2 < y3  # pixels count downwards
    assert (y2 - y1) / (y3 - y1) == pytest.approx(2 / 3, abs=0.01)
    assert len(list(tree(html).iter("circle"))) == 2  # eval_loss and mine
    assert heads(html)[:3] == ["Loss", "Learning rate", "Gradient norm"] and heads(html)[-1] == "mine"
    assert "a &lt;run&gt; &amp; more" in html


def test_the_page_needs_nothing_but_itself(tmp_path: Path) -> None:
    html = page(read_log(trainer_state(tmp_path)), "run")
    names = {element.tag for element in tree(html).iter()}
    assert not names & {"script", "link", "img", "iframe", "object", "use", "image"}
    assert not {name for element in tree(html).iter() for name in element.attrib} & {"src", "href", "srcset"}
    assert "url(" not in html and "@import" not in html and "http" not in html


def test_values_that_are_not_finite_are_counted_and_not_drawn() -> None:
    html = page(log_of(loss=[3.0, math.nan, 2.0, math.inf], lost=[math.nan]), "run")
    assert "values that are not finite: 2<" in html and "values that are not finite: 1<" in html
    assert len(curves(html)["loss"]) == 2
    assert not re.search(r"\b(nan|inf)\b", html.split("<main>")[1])


@pytest.mark.parametrize("values", [[0.0, 0.0], [5.0, 5.0], [-3.0, -3.0], [7.0], [1e-30, 1e30], [-1e9, 1e9]])
def test_any_range_has_a_plot_within_its_frame(values: list[float]) -> None:
    html = page(log_of(loss=values), "run")
    for element in tree(html).iter():
        for name in ("x1", "x2", "cx", "x"):
            assert 0 <= float(element.get(name, 0)) <= 560
        for name in ("y1", "y2", "cy", "y"):
            assert 0 <= float(element.get(name, 0)) <= 240
    assert all(0 <= x <= 560 and 0 <= y <= 240 for points in curves(html).values() for x, y in points)


@pytest.mark.parametrize(
    "values",
    [
        [0.001, 0.0010000000000000002] * 3,
        [1.0, 1.0 + 1e-15],
        [1e308, -1e308],
        [1.7e308, 1.7e308],
        [-1.7e308, -1.6e308, 1.7e308],
        [5e-324, 1e308],
        [0.0, 5e-324],
        [1e-320, 3e-320],
        [-1e-300, 1e-300],
        [1e15, 1e15 + 1],
    ],
    ids=range(10),
)
def test_values_of_any_size_have_few_ticks_and_a_curve_within_the_frame(values: list[float]) -> None:
    html = page(log_of(loss=values), "run")
    assert 2 <= len(re.findall('class="grid"', html)) <= 12 and len(html) < 10_000
    assert not re.search(r"\b(nan|inf)\b", html.split("</style>")[1])
    [curve] = curves(html).values()
    assert all(LEFT <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in curve)


def test_integers_of_hundreds_of_digits_count_as_not_finite(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    file.write_text(f'{{"step": 1, "loss": {"9" * 400}, "mine": -{"9" * 400}}}\n{{"step": 2, "loss": 1.5}}\n')
    log = read_log(file)
    assert log.series == {"loss": [(1, math.inf), (2, 1.5)], "mine": [(1, -math.inf)]}
    assert "values that are not finite: 1" in page(log, "run")
    file.write_text(f'{{"step": {"9" * 400}, "loss": 1}}\n')
    with pytest.raises(LogError, match=re.escape(f"{file}: entry 1 has no whole number as 'step', at most 2**53")):
        read_log(file)


def test_names_of_any_characters_are_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only a line feed ends a line of JSON; what HTML cannot hold becomes an escape."""
    names = {"a\u2028b": "a\\u2028b", "c\ud800": "c\\ud800", "d\0": "d\\x00", "e\x85<": "e\\x85<", "f\u00e9": "f\u00e9"}
    file = tmp_path / "log.jsonl"
    lines = [json.dumps({"step": step, **dict.fromkeys(names, 1.0)}, ensure_ascii=False) for step in (1, 2)]
    file.write_bytes("\r\n".join(lines).replace("\ud800", "\\ud800").encode())
    assert main(["report", str(file), "--title", "t\udcff"]) == 0
    html = Path(capsys.readouterr().out.strip()).read_text(encoding="utf-8")
    assert set(curves(html)) == set(names.values())
    assert "<h1>t\\udcff</h1>" in html


def test_condition_numbers_have_a_logarithmic_scale() -> None:
    points = curves(page(log_of(largest_condition_number=[1e1, 1e3, 1e5]), "run"))["largest_condition_number"]
    assert points[1][1] == pytest.approx((points[0][1] + points[2][1]) / 2, abs=0.2)


def test_ticks_are_round_and_within_the_range() -> None:
    assert Scale(0.0, 1.0, 0, 100).ticks() == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert Scale(2.9, 4.1, 0, 100).ticks() == pytest.approx([3.0, 3.5, 4.0])
    assert Scale(5.0, 2e4, 0, 100, True).ticks() == [10.0, 100.0, 1000.0, 10000.0]


def test_peaks_stay_when_there_are_too_many_points() -> None:
    values = [(n, 0.0) for n in range(20 * MOST_POINTS)]
    values[7777] = (7777, 5.0)
    few = thinned(values)
    assert len(few) <= MOST_POINTS + 1 and (7777, 5.0) in few and few == sorted(few)
    assert thinned(values[:MOST_POINTS]) == values[:MOST_POINTS]


# --- the command ---


def test_the_command_writes_the_page_next_to_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer_state(tmp_path / "my_run" / "checkpoint-3")
    assert main(["report", str(tmp_path / "my_run")]) == 0
    written = Path(capsys.readouterr().out.strip())
    assert written == tmp_path / "my_run" / "checkpoint-3" / "report.html"
    assert "loss" in curves(written.read_text(encoding="utf-8"))
    other = tmp_path / "page.html"
    assert main(["report", str(tmp_path / "my_run"), "--output", str(other), "--title", "Mine"]) == 0
    assert "<h1>Mine</h1>" in other.read_text(encoding="utf-8")


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer_state(tmp_path)
    for arguments, message in (
        ([str(tmp_path / "none")], "no such file or folder"),
        ([str(tmp_path), "--output", str(tmp_path / "no" / "page.html")], "cannot be written"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["report", *arguments])
        assert ended.value.code == 2 and message in capsys.readouterr().err
