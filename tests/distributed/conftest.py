"""The fixture that returns the result of a test's check; all selected checks of a rank count share one launch."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.launch import Ask, Check, CheckResult, run_checks


@pytest.fixture(scope="session")
def ask(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ask:
    """Return `ask(check)`, which returns the values of all ranks; the check must be a parameter of a selected test."""
    done: dict[int, dict[str, CheckResult]] = {}

    def values(check: Check) -> list[Any]:
        if check.ranks not in done:
            wanted = selected(request.session, check.ranks)
            done[check.ranks] = run_checks(list(wanted.values()), tmp_path_factory.mktemp(f"ranks{check.ranks}"))
        result = done[check.ranks][check.name]
        if result.failure is not None:
            pytest.fail(f"{check.name}: {result.failure}", pytrace=False)
        return result.values

    return values


def selected(session: pytest.Session, ranks: int) -> dict[str, Check]:
    """Return the checks among the parameters of the tests that will run."""
    found: dict[str, Check] = {}
    for item in session.items:
        for value in getattr(getattr(item, "callspec", None), "params", {}).values():
            if isinstance(value, Check) and value.ranks == ranks:
                assert found.setdefault(value.name, value) == value, f"two checks are named {value.name}"
    return found
