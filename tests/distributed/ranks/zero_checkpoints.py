"""What a rank does in the checks of DeepSpeed's own checkpoints: saves, converts, and resumes with a new engine."""

from __future__ import annotations

import os
import shutil
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.checkpoint import ds_to_universal
from torch import Tensor

from shampoo_deepspeed import Shampoo
from tests.distributed.ranks.situations import gathered
from tests.distributed.ranks.zero import build, engine_of, full_masters, full_parameters, parameters, train
from tests.support.scenarios import Scenario

SAVED_AT = 5  # between two refreshes
UNIVERSAL = {"checkpoint": {"load_universal": True}}


def all_ways(argument: tuple[Scenario, Path]) -> dict[str, Any]:
    """Do an uninterrupted run, a resumed one, and one resumed from the converted checkpoint; keep both checkpoints."""
    scenario, folder = argument
    out = saved(scenario, folder)
    out["resumed"] = resumed(scenario, folder)
    if scenario.stage > 0:
        convert(folder)
        out["converted"] = resumed(with_universal(scenario), folder, "converted")
    return out


def same_way(scenario: Scenario) -> dict[str, Any]:
    """Do an uninterrupted run and one resumed under the same stage; return both, and two of Shampoo's options."""
    with shared_folder() as folder:
        whole, again = saved(scenario, folder), resumed(scenario, folder)
    (options, *_) = whole["options"]
    return {
        "whole": whole["whole"], "resumed": again["parameters"], "preconditioner": options["preconditioner"],
        "refresh": options["refresh"],
    }  # fmt: skip


def saved(scenario: Scenario, folder: Path) -> dict[str, Any]:
    """Train with a save in between; return the uninterrupted results, and the contents of DeepSpeed's files."""
    with engine_of(scenario) as engine:
        train(engine, scenario, range(SAVED_AT))
        assert engine.save_checkpoint(str(folder), tag="saved", client_state={"epoch": 3})
        state = engine.basic_optimizer.state
        assert not any(set(values) - {"step"} for values in state.values()), "placeholders are left"
        assert not any("shampoo_checkpoint" in group for group in engine.basic_optimizer.param_groups)
        train(engine, scenario, range(SAVED_AT, scenario.steps))
        whole, options = values(engine, scenario), group_options(engine)
    latest = (folder / "latest").read_text()
    return {"whole": whole, "options": options, "latest": latest, "inner": inner_state(folder / "saved", scenario)}


def resumed(scenario: Scenario, folder: Path, kind: str = "saved") -> dict[str, Any]:
    """Do the rest of the run with a new engine."""
    with engine_of(scenario) as engine:
        path, client_state = engine.load_checkpoint(str(folder))
        assert Path(path).parent.name == kind and client_state["epoch"] == 3
        assert not any(set(values) - {"step"} for values in engine.basic_optimizer.state.values())
        assert not any(fragments(p) for p in engine.module.parameters())
        train(engine, scenario, range(SAVED_AT, scenario.steps))
        return {"parameters": values(engine, scenario), "options": group_options(engine)}


def fragments(parameter: Any) -> Any:
    return getattr(getattr(parameter, "_hp_mapping", None), "optim_fragment", None)


def with_universal(scenario: Scenario) -> Scenario:
    return replace(scenario, config={**scenario.config, **UNIVERSAL})


def values(engine: Any, scenario: Scenario) -> dict[str, Tensor]:
    return full_masters(engine) if scenario.half else full_parameters(engine)


def group_options(engine: Any) -> list[dict[str, Any]]:
    groups = engine.basic_optimizer.param_groups
    return [{name: value for name, value in group.items() if name != "params"} for group in groups]


def inner_state(folder: Path, scenario: Scenario) -> dict[str, Any]:
    """Return the optimizer's part of DeepSpeed's files of rank 0: keys, and bytes of the tensors in its state."""
    if scenario.stage == 0:
        found = torch.load(folder / "mp_rank_00_model_states.pt", weights_only=False)["optimizer"]
        inner = found["optimizer_state_dict"] if scenario.half else found
    else:
        (file,) = folder.glob("*zero_pp_rank_0_mp_rank_00_optim_states.pt")
        found = torch.load(file, weights_only=False)["optimizer_state_dict"]
        inner = found.get("base_optimizer_state") or found["optimizer_state_dict"]
    tensors = [t for state in inner["state"].values() for t in state.values() if isinstance(t, Tensor)]
    return {
        "shampoo": sorted(inner["shampoo"]),
        "bytes": sum(t.untyped_storage().nbytes() for t in tensors),
        "moments": [sorted(set(state) - {"step"}) for state in inner["state"].values()],
    }


def convert(folder: Path, tag: str = "saved", to: str = "converted", inject: bool = False) -> None:
    """Run DeepSpeed's own converter, as its command does without options."""
    no_pools = {"num_extract_workers": 1, "num_merge_workers": 1}
    folders = {"input_folder": str(folder / tag), "output_folder": str(folder / to)}
    try:
        if dist.get_rank() == 0:
            ds_to_universal.main(
                Namespace(keep_temp_folder=False, strict=True, inject_missing_state=inject, **folders, **no_pools)
            )
    finally:
        dist.barrier()


def resumed_elsewhere(argument: tuple[Scenario, Path]) -> dict[str, Any]:
    """Resume from a checkpoint that another number of ranks has saved, converted if its stage needs that."""
    scenario, folder = argument
    if scenario.stage == 0:
        return resumed(scenario, folder, "saved")
    return resumed(with_universal(scenario), folder, "converted")


def moved(argument: tuple[Scenario, Path]) -> dict[str, Any]:
    """Move the converted files: alone (an error), with the environment variable, and together with their state."""
    scenario, folder = argument
    scenario = with_universal(scenario)
    out: dict[str, Any] = {}
    with shared_folder() as another:
        shutil.copytree(folder / "converted", another / "converted")
        shutil.copytree(folder / "saved" / "shampoo", another / "kept")
        shutil.copy(folder / "latest_universal", another)
        hidden = folder / "saved" / "hidden"
        (folder / "saved" / "shampoo").rename(hidden)
        try:
            out["error"] = error_of_loading(scenario, another)
            with environment(SHAMPOO_CHECKPOINT=str(another / "kept")):
                out["by_variable"] = resumed(scenario, another, "converted")
            shutil.move(another / "kept", another / "converted" / "shampoo")
            out["next_to_it"] = resumed(scenario, another, "converted")
        finally:
            hidden.rename(folder / "saved" / "shampoo")
    return out


def error_of_loading(scenario: Scenario, folder: Path) -> tuple[str, str]:
    """Return the error of `load_checkpoint`, and that of a step after it."""
    messages = []
    with engine_of(scenario) as engine:
        for attempt in (lambda: engine.load_checkpoint(str(folder)), lambda: train(engine, scenario, range(1))):
            try:
                attempt()
                messages.append("")
            except Exception as error:
                messages.append(f"{type(error).__name__}: {error}")
    return messages[0], messages[1]


def client(argument: tuple[Scenario, bool]) -> dict[str, Any]:
    """Load into an optimizer that the user has built, before its first step, when its engine is not known yet."""
    scenario, universal = argument
    with shared_folder() as folder:
        with client_engine(scenario) as engine:
            train(engine, scenario, range(SAVED_AT))
            engine.save_checkpoint(str(folder), tag="saved")
            train(engine, scenario, range(SAVED_AT, scenario.steps))
            whole = values(engine, scenario)
        if universal:
            convert(folder)
            scenario = with_universal(scenario)
        with client_engine(scenario) as engine:
            engine.load_checkpoint(str(folder))
            if not universal:
                engine.save_checkpoint(str(folder), tag="again")
            train(engine, scenario, range(SAVED_AT, scenario.steps))
            out = {"whole": whole, "resumed": values(engine, scenario)}
        if not universal:
            shutil.rmtree(folder / "saved", ignore_errors=True)
            with client_engine(scenario) as engine:
                engine.load_checkpoint(str(folder))
                train(engine, scenario, range(SAVED_AT, scenario.steps))
                out["again"] = values(engine, scenario)
        return out


@contextmanager
def client_engine(scenario: Scenario) -> Iterator[Any]:
    model = build(scenario)
    config = scenario.deepspeed_config()
    groups = parameters(scenario, model)
    names = {id(p): n for n, p in model.named_parameters()}
    for group in groups:
        group["params"] = [(names[id(p)], p) for p in group["params"]]
    optimizer = Shampoo(groups, **config.pop("optimizer")["params"])
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    try:
        yield engine
    finally:
        engine.destroy()


def missing(scenario: Scenario) -> dict[str, Any]:
    """Resume if the state is gone or from another save: an error, or on request training with new state."""
    out: dict[str, Any] = {}
    with shared_folder() as folder:
        with engine_of(scenario) as engine:
            train(engine, scenario, range(2))
            engine.save_checkpoint(str(folder), tag="first")
            train(engine, scenario, range(2, SAVED_AT))
            engine.save_checkpoint(str(folder), tag="second")
            at_save = values(engine, scenario)
            out["blocked"] = error_of_saving(engine, folder)
        out["latest"] = (folder / "latest").read_text()
        if dist.get_rank() == 0:
            shutil.rmtree(folder / "second" / "shampoo")
            shutil.copytree(folder / "first" / "shampoo", folder / "second" / "shampoo")
        dist.barrier()
        out["other"] = error_of_loading(scenario, folder)
        if dist.get_rank() == 0:
            shutil.rmtree(folder / "second" / "shampoo")
        dist.barrier()
        out["gone"] = error_of_loading(scenario, folder)
        with environment(SHAMPOO_START_ANEW="1"), engine_of(scenario) as engine:
            engine.load_checkpoint(str(folder))
            out["loaded"] = same(values(engine, scenario), at_save)
            train(engine, scenario, range(SAVED_AT, SAVED_AT + 3))
            out["steps"] = steps(engine)
        return out


def error_of_saving(engine: Any, folder: Path) -> str:
    """Return the error of a save whose folder is blocked by a file."""
    if dist.get_rank() == 0:
        (folder / "third").mkdir()
        (folder / "third" / "shampoo").write_text("in the way")
    dist.barrier()
    try:
        engine.save_checkpoint(str(folder), tag="third")
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def from_adamw(scenario: Scenario) -> dict[str, Any]:
    """Continue with Shampoo from an AdamW checkpoint, loading only the model, in each possible way."""
    out: dict[str, Any] = {}
    with shared_folder() as folder:
        before = replace(scenario, optimizer="AdamW")
        with engine_of(before) as engine:
            train(engine, before, range(SAVED_AT))
            engine.save_checkpoint(str(folder), tag="saved")
            at_save = values(engine, before)
        converted = with_universal(scenario)
        out["refused"] = error_of_loading(scenario, folder)[:1]
        ways: dict[str, tuple[Scenario, dict[str, Any]]] = {
            "states": (scenario, {"load_optimizer_states": False}),
            "all": (scenario, {}),
        }
        if scenario.stage < 3:  # under ZeRO-3, DeepSpeed loads no weights this way
            ways["module"] = (scenario, {"load_module_only": True})
        if scenario.stage > 0:
            convert(folder, inject=True)
            out["refused"] += error_of_loading(converted, folder)
            ways["converted states"] = (converted, {"load_optimizer_states": False})
            ways["converted all"] = (converted, {})
        for name, (with_, arguments) in ways.items():
            asked = {} if arguments else {"SHAMPOO_START_ANEW": "1"}
            with environment(**asked), engine_of(with_) as engine:
                options = group_options(engine)
                engine.load_checkpoint(str(folder), **arguments)
                loaded = same(values(engine, with_), at_save)
                kept = all(own.items() <= now.items() for own, now in zip(options, group_options(engine), strict=True))
                train(engine, with_, range(SAVED_AT, SAVED_AT + 3))
                moved = not same(values(engine, with_), at_save)
                out[name] = {"loaded": loaded, "kept": kept, "moved": moved, "steps": steps(engine)}
    return out


def without_states(scenario: Scenario) -> dict[str, Any]:
    """Load without optimizer states, which leaves the present state as it is."""
    with shared_folder() as folder, engine_of(scenario) as engine:
        train(engine, scenario, range(2))
        engine.save_checkpoint(str(folder))
        train(engine, scenario, range(2, SAVED_AT))
        engine.load_checkpoint(str(folder), load_optimizer_states=False)
        train(engine, scenario, range(SAVED_AT, SAVED_AT + 1))
        return {"steps": steps(engine)}


def other_stage(stages: tuple[Scenario, Scenario]) -> dict[str, Any]:
    """Load a checkpoint of stage 1 at stage 2, which DeepSpeed does without conversion."""
    first, second = stages
    with shared_folder() as folder:
        whole = saved(first, folder)["whole"]
        return {"whole": whole, "resumed": resumed(second, folder)["parameters"]}


def round_robin(scenario: Scenario) -> dict[str, str]:
    """Return the errors of the converter and of the engine."""
    shuffled = replace(scenario, zero={"round_robin_gradients": True})
    with shared_folder() as folder:
        with engine_of(shuffled) as engine:
            train(engine, shuffled, range(2))
            engine.save_checkpoint(str(folder), tag="saved")
        messages = {}
        for name, attempt in {
            "converter": lambda: convert(folder),
            "engine": lambda: engine_of(with_universal(shuffled)).__enter__(),
            "elastic": lambda: engine_of(replace(scenario, zero={"elastic_checkpoint": True})).__enter__(),
        }.items():
            try:
                attempt()
                messages[name] = ""
            except Exception as error:
                messages[name] = f"{type(error).__name__}: {error}"
        return messages


def steps(engine: Any) -> set[int]:
    return {step for unit in engine.basic_optimizer.units for step in unit.steps}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(one[n], other[n]) for n in one)


@contextmanager
def environment(**settings: str) -> Iterator[None]:
    os.environ.update(settings)
    try:
        yield
    finally:
        for name in settings:
            del os.environ[name]


@contextmanager
def shared_folder() -> Iterator[Path]:
    """Create one temporary folder for all ranks, which is removed afterwards."""
    folder = gathered(tempfile.mkdtemp() if dist.get_rank() == 0 else None)[0]
    try:
        yield Path(folder)
        dist.barrier()
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
