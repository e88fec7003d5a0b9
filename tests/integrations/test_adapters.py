"""The adapters' entry points: another package can add a framework, and an object that is not an adapter is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from shampoo_deepspeed import Shampoo
from shampoo_deepspeed.distributed.frameworks import ENTRY_POINTS, Adapter, adapters
from tests.support.stepping import same_bits

PACKAGE = '''
from torch import nn
from shampoo_deepspeed.distributed.frameworks import Adapter, FlatMember, Layout, Shard
from shampoo_deepspeed.geometry.boxes import whole


class PackedAdapter(Adapter):
    """For a framework that packs parameters one after the other into a flat tensor with the attribute `shapes`."""

    def flat_members(self, tensor, name):
        if not hasattr(tensor, "shapes"):
            return None
        return [FlatMember(str(n), shape, f"{name}.{n}") for n, shape in enumerate(tensor.shapes)]

    def layouts(self, optimizer, entries, fresh):
        if not all(hasattr(item.tensor, "shapes") for item in fresh):
            return None
        layout = Layout([], [item.tensor for item in fresh], [item.group for item in fresh], [], homes=[])
        for number, item in enumerate(fresh):
            offset = 0
            for entry in (entry for entry in entries if entry.reference() is item.tensor):
                box = whole(entry.parameter.shape)
                layout.shards.append(Shard(len(layout.parameters), box, number, offset))
                layout.parameters.append(entry.parameter)
                layout.homes.append(number)
                offset += box.numel
        return [layout]


ADAPTER = PackedAdapter()
NO_ADAPTER = "no adapter"
'''


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Return a function that installs a package whose entry point is the object of a given name in `PACKAGE`."""

    def install(name: str) -> None:
        (tmp_path / "packed_framework.py").write_text(PACKAGE, encoding="utf-8")
        info = tmp_path / "packed_framework-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: packed-framework\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{ENTRY_POINTS}]\npacked = packed_framework:{name}\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        adapters.cache_clear()

    yield install
    adapters.cache_clear()


def trained(named: list[tuple[str, nn.Parameter]], gradients: list[torch.Tensor]) -> list[torch.Tensor]:
    optimizer = Shampoo(named, lr=0.1, precondition_frequency=1, max_preconditioner_dim=4)
    for gradient in gradients:
        pieces = gradient.split([p.numel() for _, p in named])
        for (_, parameter), piece in zip(named, pieces, strict=True):
            parameter.grad = piece.view_as(parameter).clone()
        optimizer.step()
    return [parameter.detach().flatten() for _, parameter in named]


def test_another_package_s_adapter_is_found_and_describes_its_framework(package: Any) -> None:
    package("ADAPTER")
    shapes = [(6, 4), (3, 5), (7,)]
    start = torch.randn(24 + 15 + 7, generator=torch.Generator().manual_seed(1))
    gradients = list(torch.randn(4, start.numel(), generator=torch.Generator().manual_seed(2)))
    pieces = start.split([24, 15, 7])
    apart = [
        (f"packed.{n}", nn.Parameter(p.view(s).clone())) for n, (p, s) in enumerate(zip(pieces, shapes, strict=True))
    ]
    packed: Any = nn.Parameter(start.clone())
    packed.shapes = shapes
    assert any(type(adapter).__name__ == "PackedAdapter" for adapter in adapters())
    (together,) = trained([("packed", packed)], gradients)
    assert same_bits([together], [torch.cat(trained(apart, gradients))])


def test_an_object_that_is_not_an_adapter_is_refused_by_name(package: Any) -> None:
    package("NO_ADAPTER")
    with pytest.raises(TypeError, match="entry point 'packed' of shampoo_deepspeed.frameworks is 'no adapter', not"):
        Shampoo([nn.Parameter(torch.ones(2, 2))])


def test_an_adapter_needs_only_layouts() -> None:
    class Smallest(Adapter):
        def layouts(self, optimizer: Any, entries: Any, fresh: Any) -> None:
            return None

    adapter, tensor = Smallest(), torch.ones(2)
    assert adapter.model_under_construction({}, []) is None and adapter.joining([]) == []
    assert adapter.global_shape(tensor) is None and adapter.why_not_whole(tensor) is None
    assert adapter.flat_members(tensor, None) is None
    with pytest.raises(TypeError, match="abstract method"):
        Adapter()  # type: ignore[abstract]


def test_our_adapters_keep_no_engines_tensors_or_groups_alive() -> None:
    """An adapter exists as long as the process; engines, tensors and process groups do not."""
    from shampoo_deepspeed.integrations import deepspeed, fsdp1

    class Engine:
        pass

    engine: Any = Engine()
    ours: ModuleType = deepspeed
    adapter = ours.DeepSpeedAdapter()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ours, "_refuse_unsupported", lambda engine: None)
        patch.setattr(ours, "wrap_checkpointing", lambda engine: None)
        adapter._adopt(engine)
    del engine
    assert [reference() for reference in adapter._engines] == [None]

    known, tensor = fsdp1.FSDP1Adapter(), torch.ones(3)
    known._remember(tensor, (), (), "a process group")
    known._remember(tensor, (), (), "a process group")
    assert known._find(tensor) is not None
    del tensor
    assert not known._known
