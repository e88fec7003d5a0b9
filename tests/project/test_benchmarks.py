"""The benchmarks' arithmetic, and tiny runs of those that need only one process."""

from collections.abc import Callable

import pytest

from benchmarks import end_to_end, memory, step_time
from benchmarks.__main__ import one_after_another
from benchmarks.gpt import Size, build, matrices
from benchmarks.report import mean, ratio_of_means, slowest, table
from benchmarks.slow_link import Timeline, overlap


def test_numbers_of_windows_are_medians_over_them() -> None:
    steps = [1.0, 3.0, 1.0, 5.0, 2.0, 8.0, 100.0]  # three windows of two; the last step is not a whole window
    assert mean(steps, 2) == 3.0
    assert slowest(steps, 2) == 5.0
    assert ratio_of_means(steps, [1.0, 1.0, 1.0, 2.0, 1.0, 1.0], 2) == 2.0


def test_exposed_is_the_time_that_a_step_waits_for_a_busy_link() -> None:
    timeline = Timeline(link=[(0.0, 2.0), (4.0, 6.0)], waiting=[(1.0, 3.0), (5.5, 5.75)], late=[(2.0, 4.0)])
    assert overlap(timeline.link, timeline.waiting) == 1.25
    assert timeline.exposed() == 1.25
    assert timeline.hidden_share() == 1.0 - 1.25 / 4.0


def test_the_model_is_the_one_of_the_published_numbers() -> None:
    model = build(Size())
    assert sorted({tuple(p.shape) for _, p in matrices(model)}) == [(256, 256), (256, 1024), (768, 256), (1024, 256)]
    assert len(matrices(model)) == 16
    assert sum(p.numel() for p in model.parameters()) == 3_691_008


def test_tables_are_markdown() -> None:
    assert table(["a", "b"], [["x", 1.25], ["y", 1234.5]]).splitlines() == [
        "| a |    b |",
        "|---|------|",
        "| x | 1.25 |",
        "| y | 1234 |",
    ]


@pytest.mark.slow
def test_state_is_the_planners_and_a_peak_is_above_what_a_step_leaves() -> None:
    found = memory.measure("soap", "staggered", 32, 32, 0.01, 2)
    assert found["held"] == found["plan"]["state"]
    assert found["step"].nbytes >= found["weights"]  # one update for each element
    assert sum(found["step"].operators.values()) <= found["step"].nbytes


@pytest.mark.slow
@pytest.mark.parametrize(
    "run, phrases",
    [
        (
            lambda: step_time.main(
                ["--width", "32", "--block", "32", "--frequency", "2", "--rounds", "1", "--no-peers"]
            ),
            ("torch AdamW, foreach", "soap, staggered", "kl_shampoo, sync"),
        ),
        (
            lambda: step_time.main(
                ["--preconditioner", "kl_shampoo", "--refresh", "staggered", "--formats", "full", "packed", "half"]
                + ["--width", "32", "--block", "32", "--frequency", "2", "--rounds", "1", "--no-peers"]
            ),
            ("kl_shampoo, staggered ", "kl_shampoo, staggered, packed", "kl_shampoo, staggered, half"),
        ),
        (
            lambda: end_to_end.main(["--tokens", "64", "--width", "32", "--frequency", "2", "--rounds", "1"]),
            ("shampoo, staggered", "soap, staggered"),
        ),
    ],
    ids=["step_time", "formats", "end_to_end"],
)
def test_tables_name_every_contestant(
    run: Callable[[], None], phrases: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    run()
    text = capsys.readouterr().out
    assert all(phrase in text for phrase in phrases)


def test_all_of_them_show_which_one_runs(capsys: pytest.CaptureFixture[str]) -> None:
    called: list[list[str]] = []

    def run(arguments: list[str]) -> None:
        called.append(arguments)

    one_after_another([(run, ["--rounds", "2"]), (run, [])])
    assert called == [["--rounds", "2"], []]
    lines = capsys.readouterr().err.splitlines()
    assert [line[:5] for line in lines] == ["[1/2]", "[2/2]"] and "--rounds 2 (after 0 min)" in lines[0]
