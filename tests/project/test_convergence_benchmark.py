"""The convergence benchmark: its interpolation, its search for rates, what it resumes, its tables; and tiny runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.convergence import command, quick
from benchmarks.convergence.analysis import Share, curves, draw, report, share
from benchmarks.convergence.experiments import Experiment, neighbour, next_rate, parse, read_queue
from benchmarks.convergence.loop import next_run
from benchmarks.convergence.models import CELLS, build_model
from benchmarks.convergence.muon import orthogonalized
from benchmarks.convergence.recipes import RECIPES, all_options, build_optimizers
from benchmarks.convergence.results import Result, append, best, read
from benchmarks.convergence.text import is_held_out, load_corpus, make_corpus
from benchmarks.convergence.training import Run, schedule, train


def result(contestant: str, lr: float, loss: float | None, budget: float = 1.0, seed: int = 0, **more: Any) -> Result:
    """A finished run of 100 steps; the optimizer takes twice AdamW's model seconds unless it is AdamW."""
    experiment = Experiment(contestant, steps=100, **more)
    run = experiment.run("llama-4m", seed, budget, lr, "text")
    seconds = 0.0 if contestant.startswith("adamw") else 2.0
    record: dict[str, Any] = {
        "held_out": loss,
        "losses": [],
        "model_seconds": 100 * budget,
        "optimizer_seconds": 100 * seconds * budget,
    }
    return Result(run, experiment.title, record)


# --- interpolation ---


def test_a_share_is_interpolated_over_the_logarithm_of_the_budget() -> None:
    found = share([(0.5, 3.0), (0.25, 4.0), (1.0, 2.0)], 3.5)
    assert found is not None and found.bound == ""
    assert found.value == pytest.approx(math.sqrt(0.25 * 0.5))


def test_a_share_on_a_point_is_that_point() -> None:
    found = share([(0.25, 4.0), (0.5, 3.0)], 3.0)
    assert found is not None and found.bound == "" and found.value == pytest.approx(0.5)
    assert share([(0.25, 4.0), (0.5, 3.0)], 4.0) == Share(0.25)


def test_a_share_beyond_the_runs_is_a_bound() -> None:
    assert share([(0.25, 4.0), (0.5, 3.0)], 2.0) == Share(0.5, ">")
    assert share([(0.25, 4.0), (0.5, 3.0)], 5.0) == Share(0.25, "<")
    assert share([], 5.0) is None


# --- search for rates ---


def test_the_search_goes_on_while_the_best_rate_is_at_an_edge() -> None:
    assert next_rate({3e-3: 2.0, 5e-3: 1.0}) == 8e-3
    assert next_rate({3e-3: 1.0, 5e-3: 2.0}) == 2e-3
    assert next_rate({2e-3: 2.0, 3e-3: 1.0, 5e-3: 2.0}) is None
    assert next_rate({5e-3: 1.0}) == 8e-3
    assert next_rate({5e-3: 1.0, 8e-3: 2.0}) == 3e-3
    assert next_rate({3e-3: math.inf, 5e-3: math.inf}) == 2e-3  # all diverged
    assert next_rate({10.0**-n: float(n) for n in range(9)}) is None  # enough


@pytest.mark.parametrize("lr", [1e-3, 1.2e-3, 5e-4, 8e-3, 1e-2])
def test_neighbours_are_rungs_a_fifth_away(lr: float) -> None:
    above, below = neighbour(lr, +1), neighbour(lr, -1)
    assert above / lr + 1e-9 >= 1.2 and above / lr <= 2.5
    assert lr / below + 1e-9 >= 1.2 and lr / below <= 2.5
    assert neighbour(1.2e-3, +1) == 2e-3 and neighbour(1.2e-3, -1) == 8e-4


def test_an_experiment_walks_from_its_rates_and_resumes() -> None:
    experiment = Experiment("kl", steps=100, rates=(3e-3, 5e-3))

    def rates(results: list[Result]) -> list[float]:
        return [run.lr for run in experiment.wanted(results, "text")]

    assert rates([]) == [3e-3, 5e-3]
    done = [result("kl", 3e-3, 2.0)]
    assert rates(done) == [5e-3]  # no walk before all given rates are there
    done += [result("kl", 5e-3, 1.0), result("kl", 8e-3, 0.5, seed=1), result("kl", 2e-3, 0.1, budget=0.5)]
    assert rates(done) == [8e-3]
    assert rates([*done, result("kl", 8e-3, 1.5)]) == []
    assert [run.lr for run in Experiment("kl", steps=100, rates=(1e-3,), walk=False).wanted(done, "text")] == [1e-3]


def test_best_takes_the_rate_of_the_nearest_budget_of_any_seed() -> None:
    experiment = Experiment("kl", steps=100, seeds=(1,), budgets=(0.35,), rates="best", walk=False)
    assert list(experiment.wanted([], "text")) == []
    done = [result("kl", 3e-3, 2.0), result("kl", 5e-3, 1.0), result("kl", 8e-3, 3.0, budget=0.4)]
    (run,) = experiment.wanted(done, "text")
    assert (run.lr, run.seed, run.budget) == (8e-3, 1, 0.35)
    done.append(result("kl", 8e-3, 3.0, budget=0.35, seed=1))
    assert list(experiment.wanted(done, "text")) == []


def test_other_options_texts_and_versions_are_other_runs() -> None:
    done = [result("kl", 3e-3, 2.0)]
    changes: list[dict[str, Any]] = [{"options": {"eps": 1e-9}}, {"version": "2"}, {"length": 256}, {"steps": 200}]
    for change in changes:
        given: dict[str, Any] = {"steps": 100, "rates": (3e-3,), "walk": False}
        experiment = Experiment("kl", **given | change)
        assert len(list(experiment.wanted(done, "text"))) == 1
    same = Experiment("kl", steps=100, rates=(3e-3,), walk=False, name="another name")
    assert not list(same.wanted(done, "text")) and len(list(same.wanted(done, "another text"))) == 1


def test_the_first_run_that_is_not_under_way_is_next() -> None:
    experiments = [Experiment("kl", rates=(3e-3,), steps=100), Experiment("soap", rates=(5e-3,), steps=100)]
    _, first = next_run(experiments, [], "text", set()) or pytest.fail("nothing")
    owner, second = next_run(experiments, [], "text", {first.key}) or pytest.fail("nothing")
    assert (first.lr, second.lr, owner.contestant) == (3e-3, 5e-3, "soap")
    assert next_run(experiments, [], "text", {first.key, second.key}) is None


# --- queue and results ---


def test_a_queue_may_have_comments_and_wrong_lines(tmp_path: Path) -> None:
    file = tmp_path / "queue.jsonl"
    lines = ["# first", "", '{"contestant": "kl", "budgets": [1], "options": {"eps": 1e-9}}', '{"contestant": "kl"']
    lines += ['{"contestant": "none"}', '{"contestant": "kl", "seed": 1}', '{"contestant": "kl", "cells": ["big"]}']
    file.write_text("\n".join(lines))
    experiments, wrong = read_queue(Experiment, file)
    assert [e.title for e in experiments] == ["kl eps=1e-09"]
    assert [message.split(":")[0] for message in wrong] == ["line 4", "line 5", "line 6", "line 7"]
    assert "no field 'seed'" in wrong[2]


def test_a_run_is_the_same_after_it_was_written_and_read(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    for name in RECIPES:
        written = result(name, 3e-3, 2.5)
        append(file, written)
        assert read(file)[-1] == written
    whole = parse(Experiment, '{"contestant": "kl", "budgets": [1], "rates": [3e-3], "steps": 100, "walk": false}')
    assert list(whole.wanted(read(file), "text")) == []


def test_a_damaged_line_costs_one_run(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    append(file, result("kl", 3e-3, 2.5))
    with file.open("a") as stream:
        stream.write('{"name": "kl", "run": {')
    append(file, result("kl", 5e-3, None))
    assert [(r.run.lr, r.loss) for r in read(file)] == [(3e-3, 2.5), (5e-3, math.inf)]
    assert best(read(file)) == read(file)[0]
    assert best(read(file)[1:]) is None


# --- tables ---

RESULTS = [
    result("adamw", 1e-3, 3.0),
    result("adamw", 2e-3, 3.2),
    result("adamw_b99", 1e-3, 2.9),
    result("adamw", 1e-3, 3.1, seed=1),
    *(result("kl", 5e-3, loss, budget) for budget, loss in ((0.25, 3.4), (0.5, 2.4), (1.0, 2.0))),
    result("kl", 8e-3, 2.5, 0.5),
    *(result("kl", 5e-3, loss, budget, seed=1) for budget, loss in ((0.25, 3.6), (0.5, 2.6))),
    result("muon", 5e-3, None),
]


def test_curves_are_of_the_best_rates_by_budget_and_seed() -> None:
    found = curves(RESULTS)
    assert set(found) == {"adamw", "adamw_b99", "kl"}
    first, second = found["kl"]
    assert [(r.run.budget, r.run.lr, r.loss) for r in first.runs] == [
        (0.25, 5e-3, 3.4),
        (0.5, 5e-3, 2.4),
        (1.0, 5e-3, 2.0),
    ]
    assert second.seed == 1 and second.at(1.0) is None


def test_the_table_compares_with_the_best_adamw_of_the_same_seed() -> None:
    text = report(RESULTS)
    assert text.startswith("**llama-4m, 100 steps of 8 x 128 tokens**")
    (line,) = [line for line in text.splitlines() if line.startswith("| kl ")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    # Both seeds are halfway: 2.9 between 3.4 and 2.4, 3.1 between 3.6 and 2.6.
    assert cells[1:4] == ["2", "0.005", "3.500 ± 0.100"]
    assert cells[6:8] == ["0.35 ± 0.00", "1.06 ± 0.00"]
    # With four times the tokens the model takes 4 of 4 + 2 and not 1 of 1 + 2.
    assert cells[8] == "0.53 ± 0.00"


def test_contestants_of_one_name_and_other_options_stay_apart() -> None:
    found = curves([result("kl", 5e-3, 2.0, name="a"), result("kl", 5e-3, 3.0, name="a", options={"eps": 1e-9})])
    assert set(found) == {"a", "a (2)"}


@pytest.mark.slow
def test_the_picture_has_a_panel_for_each_cell(tmp_path: Path) -> None:
    draw([*RESULTS, result("kl", 1e-3, 2.0, length=64)], tmp_path / "losses.png")
    assert (tmp_path / "losses.png").stat().st_size > 10_000


def test_quick_finds_a_regression_of_three_hundredths(tmp_path: Path) -> None:
    record = tmp_path / "quick.json"
    before = [result("default", 3e-3, 3.0), result("default", 3e-3, 3.2, seed=1)]
    assert not quick.compare(before, record)[1]
    quick.remember(before, record)
    assert quick.compare(before, record)[1]
    small = [result("default", 3e-3, 3.02), result("default", 3e-3, 3.21, seed=1, options={"eps": 1e-9})]
    assert quick.compare(small, record)[1]
    large = [result("default", 3e-3, 3.03), result("default", 3e-3, 3.235, seed=1)]
    assert not quick.compare(large, record)[1]
    assert not quick.compare([result("default", 3e-3, None), before[1]], record)[1]


# --- text, models, training ---


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens of sixty small documents."""
    folder = tmp_path_factory.mktemp("text")
    for n in range(60):
        words = " ".join(f"w{(n * 7 + i * i) % 97} and" for i in range(200))
        (folder / f"{n}.txt").write_text(words)
    (folder / "translations").mkdir()
    (folder / "translations" / "x.txt").write_text("left out")
    return make_corpus(str(folder), folder.parent / f"{folder.name}_tokens")


def test_held_out_documents_are_never_trained_on(tokens: Path) -> None:
    corpus = load_corpus(tokens)
    held = [n for n in range(60) if is_held_out(f"{n}.txt")]
    assert held
    assert (corpus.held_out == 0).sum() == len(held)  # each ends with the token of that meaning
    assert (corpus.train == 0).sum() == 60 - len(held)
    rows = corpus.rows(1, 16)
    assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, corpus.rows(2, 16).tolist()))
    assert not torch.equal(rows, corpus.rows(2, 16)) and torch.equal(rows, corpus.rows(1, 16))
    assert corpus.held_out_rows(5, 16).shape == (5, 16)


@pytest.mark.parametrize(
    "cell, least, most",
    [("llama-4m", 3.5e6, 4.5e6), ("gpt2-4m", 3.5e6, 4.5e6), ("llama-15m", 13e6, 16e6), ("gpt2-15m", 13e6, 16e6)],
)
def test_cells_have_their_size(cell: str, least: float, most: float) -> None:
    with torch.device("meta"):
        model = build_model(cell, 2048, 128, 0)
    assert least < sum(p.numel() for p in model.parameters()) < most
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight  # type: ignore[operator]
    assert tied == (CELLS[cell].architecture == "gpt2")


def test_the_schedule_warms_up_and_ends_near_zero() -> None:
    rates = [schedule(step, 100, 0.1) for step in range(100)]
    assert rates[9] == max(rates) == 1.0 and rates[0] == 0.1
    assert 0 < rates[-1] < 0.02 and rates[10:] == sorted(rates[10:], reverse=True)


@pytest.mark.parametrize("shape", [(8, 20), (20, 8)])
def test_muon_brings_singular_values_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalized(matrix, 5))
    assert ((values > 0.6) & (values < 1.3)).all()


@pytest.mark.parametrize("cell", ["llama-tiny", "gpt2-tiny"])
@pytest.mark.parametrize("name", ["adamw", "muon", "shampoo_p4", "soap"])
def test_each_parameter_belongs_to_one_optimizer_and_decay_to_matrices(name: str, cell: str) -> None:
    model = build_model(cell, 64, 16, 0)
    recipe = RECIPES[name]
    optimizers = build_optimizers(recipe.kind, all_options(recipe.kind, recipe.options), 1e-3, model)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(id(p) for p in model.parameters())
    assert all((p.ndim > 1) == (g["weight_decay"] > 0) for g in groups for p in g["params"])


@pytest.mark.slow
def test_the_default_is_one_of_the_complete_recipes(tokens: Path) -> None:
    """When the default changes, so does the name below, and `--quick --remember` is due."""
    corpus = load_corpus(tokens)

    def losses(name: str) -> list[float]:
        recipe = RECIPES[name]
        options = all_options(recipe.kind, {**recipe.options, "precondition_frequency": 2})
        run = Run("llama-tiny", recipe.kind, options, 3e-3, 0, 1.0, 6, 2, 16, text=corpus.digest)
        return list(train(run, corpus)["losses"])

    assert losses("default") == losses("recipe")


def test_a_diverged_run_is_recorded_as_such(tokens: Path) -> None:
    corpus = load_corpus(tokens)
    run = Run("gpt2-tiny", "adamw", all_options("adamw", {}), 1e30, 0, 1.0, 8, 2, 16, text=corpus.digest)
    record = train(run, corpus)
    assert record["held_out"] is None
    json.dumps(record, allow_nan=False)


@pytest.mark.slow
def test_the_command_runs_what_is_missing_and_reports(
    tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "make_corpus", lambda text, cache: tokens)
    queue = tmp_path / "queue.jsonl"
    line = {"cells": ["gpt2-tiny"], "steps": 4, "batch": 2, "length": 16, "rates": [1e-3], "walk": False}
    failing = line | {"contestant": "kl", "options": {"no_such_option": 1}, "name": "broken"}
    queue.write_text("\n".join(json.dumps(x) for x in (line | {"contestant": "adamw"}, failing)))
    arguments = ["--queue", str(queue), "--output", str(tmp_path / "results.jsonl"), "--jobs", "2"]
    assert command.main(arguments) == 0
    text = capsys.readouterr().out
    assert "gpt2-tiny, adamw, lr 0.001, 4 steps, seed 0: held-out loss" in text
    assert "1 runs failed: broken" in text and "no_such_option" in text
    by_name = {r.name: r for r in read(tmp_path / "results.jsonl")}
    assert math.isfinite(by_name["adamw"].loss) and by_name["adamw"].record["commit"]
    assert command.main(arguments) == 0
    assert "0 runs are known to be missing" in capsys.readouterr().out
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2
