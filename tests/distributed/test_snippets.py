"""The code in the README and the docs works: every marked block is executed on two ranks."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.support.launch import Ask, Check, named
from tests.support.snippets import PAGES, Snippet, blocks

CHECKS = [Check(f"snippet_{s.page}_{s.name}", 2, "snippets:execute", s) for s in blocks() if s.name]
# By the end of a snippet's name: what must have trained, and whether ranks divide the blocks among themselves.
WRAPPERS = {
    "json": "DeepSpeedEngine",
    "initialize": "DeepSpeedEngine",
    "ddp": "DistributedDataParallel",
    "fsdp1": "FullyShardedDataParallel",
    "fsdp2": "FSDPLlamaForCausalLM",
}


def test_the_pages_show_every_entry() -> None:
    shown = {page: {s.name for s in blocks() if s.page == page} for page in PAGES}
    for entry in ("deepspeed-json", "trainer-optimizers", "fsdp2"):
        assert entry in shown["README.md"], f"the README does not show {entry}"
    everywhere = set().union(*shown.values())
    for entry in ("trainer-factory", "trainer-name", "deepspeed-initialize", "plain", "ddp", "fsdp1", "accelerate-ddp"):
        assert entry in everywhere, f"no page shows {entry}"


def test_no_code_of_the_pages_is_left_out() -> None:
    unmarked = [f"{s.page}:{s.line}" for s in blocks() if s.language in ("python", "json") and not s.name]
    assert not unmarked, f"put <!-- snippet: name --> right before the fences of {unmarked}"


@pytest.mark.parametrize("check", CHECKS, ids=named)
def test_the_text_itself_trains_with_shampoo(check: Check, ask: Ask) -> None:
    snippet: Snippet = check.argument
    values: list[dict[str, Any]] = ask(check)
    for seen in values:
        assert seen["class"] == "Shampoo" and seen["preconditioned"] > 0
        assert all(math.isfinite(loss) for loss in seen["losses"]) and seen["losses"][-1] < seen["losses"][0] - 0.05
        assert seen["sum"] == values[0]["sum"], "ranks hold different parameters"
    wrapper = WRAPPERS.get(snippet.name.rpartition("-")[2])
    if wrapper is not None:
        assert values[0]["wrapper"] == wrapper
        assert sum(seen["bytes"] for seen in values) > 0, "no rank has given the other an update"
