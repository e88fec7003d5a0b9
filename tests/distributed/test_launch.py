"""The launcher: if a check fails, hangs or dies, only this check fails, and all others still return their results."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.launch import Check, run_checks

BAD = {  # what the failure must mention
    "fail_everywhere": ["rank 0 failed", "rank 1 failed", "wrong on every rank"],
    "fail_on_rank_one": ["rank 1 failed", "wrong on rank one", "all_reduce"],
    "fail_late_on_rank_one": ["rank 1 failed", "wrong on rank one, and no one waits", "the ranks failed differently"],
    "hang_on_rank_one": ["no result in time from ranks [0, 1]", "in hang_on_rank_one", "all_reduce"],
    "die_on_rank_one": ["ended with codes", "7"],
}


def test_only_bad_checks_fail_and_none_hangs(tmp_path: Path) -> None:
    checks = [Check("first", 2, "selftest:add_up", 1)]
    for name in BAD:
        checks += [Check(name, 2, f"selftest:{name}", seconds=2.0), Check(f"after {name}", 2, "selftest:add_up", 5)]
    results = run_checks(checks, tmp_path)
    assert results["first"].values == [3, 3]
    for name, parts in BAD.items():
        assert results[f"after {name}"].values == [11, 11]
        failure = results[name].failure
        assert failure is not None and all(part in failure for part in parts), failure


def test_ranks_that_can_not_start_fail_every_check_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    results = run_checks([Check(n, 2, "selftest:add_up", 1) for n in "abc"], tmp_path / "run", fork=False)
    assert not (tmp_path / "run" / "launch2").exists()
    assert all("no torch here" in (results[n].failure or "") for n in "abc")
