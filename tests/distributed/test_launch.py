"""The launcher: a check that fails, hangs or dies is blamed alone, and all others still give their results."""
from __future__ import annotations

import time
from pathlib import Path

from tests.distributed.launch import Check, run_checks


def test_only_bad_checks_fail_and_none_hangs(tmp_path: Path) -> None:
    bad = ["fail_everywhere", "fail_on_rank_one", "fail_late_on_rank_one", "hang_on_rank_one", "die_on_rank_one"]
    checks = [Check("first", 2, "selftest:add_up", 1)]
    for name in bad:
        checks += [Check(name, 2, f"selftest:{name}", seconds=2.0), Check(f"after {name}", 2, "selftest:add_up", 5)]
    began = time.monotonic()
    outcomes = run_checks(checks, tmp_path)
    assert time.monotonic() - began < 150
    assert outcomes["first"].values == [3, 3]
    for name in bad:
        assert outcomes[f"after {name}"].values == [11, 11]
    assert "rank 0 failed" in outcomes["fail_everywhere"].failure and "wrong on every rank" in outcomes["fail_everywhere"].failure
    for name in ("fail_on_rank_one", "fail_late_on_rank_one"):
        assert outcomes[name].failure.startswith("rank 1 failed") and "wrong on rank one" in outcomes[name].failure
    assert "from ranks [" in outcomes["hang_on_rank_one"].failure and "time.sleep" not in outcomes["first"].values
    assert "hang_on_rank_one" in outcomes["hang_on_rank_one"].failure
    assert outcomes["die_on_rank_one"].failure and "7" in outcomes["die_on_rank_one"].failure


def test_ranks_that_can_not_start_fail_every_check_once(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "torch").mkdir()  # shadows the real one? the root of the repository comes first, then this folder
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('no torch here')")
    outcomes = run_checks([Check(n, 2, "selftest:add_up", 1) for n in "abc"], tmp_path / "run")
    assert not (tmp_path / "run" / "launch2").exists()
    assert all("no torch here" in outcomes[n].failure for n in "abc")
