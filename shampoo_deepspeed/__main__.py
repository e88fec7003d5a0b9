"""`python -m shampoo_deepspeed`: `estimate` a run's needs, `inspect` a checkpoint, draw a `report` of a run's log."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shampoo_deepspeed._version import __version__
from shampoo_deepspeed.checkpoint.errors import CheckpointError
from shampoo_deepspeed.checkpoint.inspect import describe
from shampoo_deepspeed.distributed.frameworks import Parameter
from shampoo_deepspeed.estimate import Estimate, estimate
from shampoo_deepspeed.estimate.deepspeed_json import Described, read_deepspeed
from shampoo_deepspeed.estimate.expected_shards import FRAMEWORKS, SUB_GROUP_SIZE
from shampoo_deepspeed.estimate.hardware import HARDWARE, Hardware, calibrated
from shampoo_deepspeed.estimate.model_shapes import BUILT_IN, parameters_of, parameters_of_file
from shampoo_deepspeed.estimate.planner import ADAMW_8BIT
from shampoo_deepspeed.estimate.prediction import Advice, Prediction, advise, predict
from shampoo_deepspeed.estimate.recommend import Overhead, Recommendation, Speed, expected_overhead, recommend
from shampoo_deepspeed.options.checks import LARGEST_INT, short
from shampoo_deepspeed.options.config import ShampooConfig, canonical
from shampoo_deepspeed.options.names import BRIEF
from shampoo_deepspeed.runtime import json_text
from shampoo_deepspeed.runtime.report import page
from shampoo_deepspeed.runtime.run_log import read_log

# Float32 products run at about a tenth of the speed of bfloat16 ones on current accelerators.
FLOAT32_SHARE = 0.1
OVERHEAD = 0.05  # --overhead-budget if none is given
SPEEDS = ("optimizer_tflops", "refresh_tflops", "bandwidth")
NUMBERS = ("tokens_per_step", "tflops", *SPEEDS, "memory_budget", "overhead_budget")
SMALLEST, LARGEST = 1e-30, 1e30  # of these; their products stay finite
MOST_RANKS = 2**20

ESTIMATE_EXAMPLE = """\
  python -m shampoo_deepspeed estimate --model llama-3-8b --world-size 64 --framework zero3
"""
JSON_EXAMPLE = """\
  python -m shampoo_deepspeed estimate --model ./my_model/config.json --world-size 8 --ds-config ds.json --json
"""
DEVICE_EXAMPLE = """\
  python -m shampoo_deepspeed estimate --model llama-3-8b --world-size 8 --framework fsdp2 --device h100 \\
      --tokens-per-step 131072 --option matmul_precision=high --option solver=qr
"""
BUDGET_EXAMPLE = """\
  python -m shampoo_deepspeed estimate --model llama-3-8b --world-size 64 --framework fsdp2 --memory-budget 12 \\
      --tokens-per-step 4e6 --tflops 400
"""
INSPECT_EXAMPLE = """\
  python -m shampoo_deepspeed inspect checkpoints/step_1000
"""
TRAINER_EXAMPLE = """\
  python -m shampoo_deepspeed inspect output/checkpoint-500/shampoo
"""
REPORT_EXAMPLE = """\
  python -m shampoo_deepspeed report output/checkpoint-500
"""
EXAMPLES = ESTIMATE_EXAMPLE + DEVICE_EXAMPLE + INSPECT_EXAMPLE + REPORT_EXAMPLE


class UsageError(ValueError):
    """Arguments that do not go together; the message names them and what is allowed."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 for success, 1 for a failure, 2 for wrong arguments."""
    parser = _parser()
    given = parser.parse_args(arguments)
    try:
        print(_encodable(_answer(given)))
    except (ValueError, CheckpointError, OSError) as error:  # the package's own errors are of the first two kinds
        status = 2 if isinstance(error, ValueError) else 1
        parser.exit(status, _encodable(f"{parser.prog}: error: {error}\n"))
    return 0


def _answer(given: argparse.Namespace) -> str:
    """What a command prints."""
    if given.command == "estimate":
        return _estimate(given)
    return _report(given) if given.command == "report" else describe(Path(given.checkpoint))


def _encodable(text: str) -> str:
    """The text with what the terminal's encoding lacks as escapes."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _parser() -> argparse.ArgumentParser:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m shampoo_deepspeed",
        description="Plan a run with Shampoo before it starts, look into its checkpoints, and draw its log.",
        epilog=f"examples:\n{EXAMPLES}\nCOMMAND --help shows the arguments of a command.",
        formatter_class=plain,
    )
    parser.add_argument("--version", action="version", version=f"shampoo-deepspeed {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = commands.add_parser(
        "estimate",
        help="memory, bytes, FLOPs and balance of a run, before it starts",
        description="Print what each rank of a run will hold, send and compute. Nothing is built.",
        epilog=f"examples:\n{ESTIMATE_EXAMPLE}{JSON_EXAMPLE}{DEVICE_EXAMPLE}{BUDGET_EXAMPLE}",
        formatter_class=plain,
    )
    model = command.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", help=f"{', '.join(BUILT_IN)}; a config.json or its folder; a Hugging Face id")
    model.add_argument("--shapes", help='a JSON file of names and shapes, {"layer.weight": [1024, 4096], ...}')
    command.add_argument("--world-size", type=int, required=True, help="data-parallel ranks")
    command.add_argument(
        "--framework", choices=FRAMEWORKS, help="what shards the model; with --ds-config its ZeRO stage"
    )
    command.add_argument("--shard-ranks", type=int, help="hsdp: ranks that a parameter is sharded over")
    command.add_argument("--ds-config", help="a DeepSpeed JSON: ZeRO stage, sub_group_size, the optimizer's options")
    command.add_argument("--max-preconditioner-dim", type=int, help="block size")
    command.add_argument("--precondition-frequency", type=int, help="steps between two refreshes")
    command.add_argument("--option", action="append", default=[], metavar="NAME=JSON", help="any other option")
    command.add_argument("--weights-dtype", default="float32", help="of what the optimizer updates (not under ZeRO)")
    command.add_argument("--tokens-per-step", type=float, help="on all ranks together; with --tflops gives overhead")
    command.add_argument("--tflops", type=float, help="what a rank reaches in forward and backward")
    place = command.add_mutually_exclusive_group()
    place.add_argument("--device", choices=HARDWARE, help="predicts times by its published speeds; recommends options")
    place.add_argument("--calibrate", action="store_true", help="the same by speeds measured here, in 30 s")
    command.add_argument("--offload", action="store_true", help="shards lie in the CPU's memory, blocks on the device")
    command.add_argument("--optimizer-tflops", type=float, help="what it reaches in float32; default: a tenth of it")
    command.add_argument("--refresh-tflops", type=float, help="what it reaches in refreshes; default: the same")
    command.add_argument("--bandwidth", type=float, help="GB/s of a rank between ranks; default: exchange is hidden")
    command.add_argument("--memory-budget", type=float, help="GiB of optimizer state a rank may hold: recommends")
    command.add_argument("--overhead-budget", type=float, help=f"share of forward and backward, {OVERHEAD}")
    command.add_argument("--json", action="store_true", help="JSON instead of a table")
    look = commands.add_parser(
        "inspect",
        help="what a checkpoint of save_shampoo holds, and whether it is whole",
        description="Check the files of a checkpoint, and print its versions, options, parameters and blocks.",
        epilog=f"examples:\n{INSPECT_EXAMPLE}{TRAINER_EXAMPLE}",
        formatter_class=plain,
    )
    look.add_argument("checkpoint", help="the folder with manifest.json")
    drawn = commands.add_parser(
        "report",
        help="plots of a run's log, as one HTML page",
        description="Draw a log as one HTML page: losses, rates, and the optimizer's metrics. It needs no network.",
        epilog=f"examples:\n{REPORT_EXAMPLE}",
        formatter_class=plain,
    )
    drawn.add_argument("run", help='a Trainer\'s folder or trainer_state.json, or JSON lines with a "step" (*.jsonl)')
    drawn.add_argument("--output", help="the page; default: report.html next to the log")
    drawn.add_argument("--title", help="its heading; default: the name of the run's folder")
    return parser


def _report(given: argparse.Namespace) -> str:
    """Write the page, and return its path."""
    log = read_log(Path(given.run))
    output = Path(given.output) if given.output else log.source.with_name("report.html")
    title = given.title or log.source.resolve().parent.name
    try:
        output.write_text(page(log, title), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--output {str(output)!r} cannot be written: {error}") from None
    return str(output)


def _estimate(given: argparse.Namespace) -> str:
    _check_numbers(given)
    framework, sub_group_size = given.framework, SUB_GROUP_SIZE
    options: dict[str, Any] = {}
    if given.ds_config is not None:
        framework, options, sub_group_size = _from_deepspeed(given.ds_config, given.framework)
    if framework is None:
        raise UsageError(f"--framework is missing: one of {', '.join(FRAMEWORKS)}, or give --ds-config")
    if framework == "hsdp" and given.shard_ranks is None:
        raise UsageError("--shard-ranks is missing: over how many ranks hsdp shards each parameter")
    if framework != "hsdp" and given.shard_ranks is not None:
        raise UsageError(
            f"--shard-ranks {given.shard_ranks} is not allowed with --framework {framework}: it belongs to hsdp"
        )
    config = ShampooConfig.from_options({**options, **_own_options(given)})
    speed = _speed(given)
    parameters = parameters_of_file(given.shapes) if given.shapes else parameters_of(given.model)
    made = estimate(
        parameters,
        given.world_size,
        framework,
        config,
        shard_ranks=given.shard_ranks,
        sub_group_size=sub_group_size,
        weights_dtype=given.weights_dtype,
    )
    overhead = expected_overhead(made, speed) if speed is not None else None
    fitting = None
    if given.memory_budget is not None:
        if not config.parts.statistics:
            raise UsageError(f"--memory-budget is not allowed with {config.preconditioner}, whose matrices are not cut")
        fitting = recommend(parameters, config, made, given.memory_budget * 2**30, speed, given.overhead_budget)
    device = _device(given)
    timed = predict(made, device, given.tokens_per_step, given.tflops, given.offload) if device else None
    advice = _advice(given, parameters, config, made, device)
    if given.json:
        out: dict[str, Any] = {
            "model": given.model or given.shapes,
            "framework": framework,
            "options": config.to_json(),
        }
        out |= made.to_json() | {"overhead": overhead and asdict(overhead)}
        out |= {"recommendation": fitting and asdict(fitting)} if given.memory_budget is not None else {}
        if device and timed:
            shares = {"over_model": timed.over_model, "over_adamw": timed.over_adamw}
            out |= {"device": asdict(device), "predicted_ms": asdict(timed) | shares}
            out |= {"advice": advice and asdict(advice)}
        return json.dumps(out, indent=2)
    lines = [*_heading(given, framework, config), *_table(made), *_overhead_lines(overhead, config)]
    lines += _prediction_lines(given, device, timed) if device and timed else []
    lines += _recommendation_lines(given, fitting, speed)
    return "\n".join(lines + (_advice_lines(given, advice) if device and given.tokens_per_step else []))


def _device(given: argparse.Namespace) -> Hardware | None:
    if given.calibrate:
        return calibrated()
    if given.device is None and given.offload:
        raise UsageError("--offload is not allowed without --device or --calibrate, whose links it needs")
    return HARDWARE[given.device] if given.device else None


def _advice(
    given: argparse.Namespace,
    parameters: Sequence[Parameter],
    config: ShampooConfig,
    made: Estimate,
    device: Hardware | None,
) -> Advice | None:
    if device is None or given.tokens_per_step is None:
        return None
    memory = None if given.memory_budget is None else given.memory_budget * 2**30
    how = {"tokens": given.tokens_per_step, "tflops": given.tflops, "offloaded": given.offload}
    return advise(parameters, config, made, device, given.overhead_budget, memory, **how)


def _own_options(given: argparse.Namespace) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for text in given.option:
        name, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"--option {short(text)} is not allowed: NAME=JSON, as in betas=[0.9,0.95]")
        try:
            options[name] = json_text.parse(value)
        except json.JSONDecodeError:
            options[name] = value
        except ValueError as error:
            raise UsageError(f"--option {short(name, BRIEF)} = {short(value, BRIEF)} is not allowed: {error}") from None
    for name in ("max_preconditioner_dim", "precondition_frequency"):
        if getattr(given, name) is not None:
            options[name] = getattr(given, name)
    return canonical(options)


def _from_deepspeed(path: str, framework: str | None) -> Described:
    """What the DeepSpeed JSON says, which must agree with ``--framework`` if that is given."""
    found = read_deepspeed(path)
    if framework is not None and framework != found.framework:
        raise UsageError(
            f"--framework {framework!r} does not agree with {path!r}, whose ZeRO stage is {found.framework}"
        )
    return found


def _check_numbers(given: argparse.Namespace) -> None:
    """Raise UsageError for numbers of no use, and for those that nothing here would read."""
    if not 1 <= given.world_size <= MOST_RANKS:
        raise UsageError(f"--world-size {given.world_size} is not allowed: an integer from 1 to {MOST_RANKS:,}")
    for name in NUMBERS:
        value = getattr(given, name)
        if value is not None and not SMALLEST <= value <= LARGEST:  # NaN fails too
            allowed = f"a number > 0, from {SMALLEST:g} to {LARGEST:g}"
            raise UsageError(f"{_flag(name)} {value:g} is not allowed: {allowed}")
    device = "--calibrate" if given.calibrate else "--device" if given.device else None
    if device is not None:
        if given.tflops is not None and given.tokens_per_step is None:
            raise UsageError("--tflops is not allowed without --tokens-per-step")
        _refuse(given, SPEEDS, f"with {device}, which has its own speeds")
    elif (given.tokens_per_step is None) != (given.tflops is None):
        raise UsageError("--tokens-per-step and --tflops go together: both, or none")
    elif given.tflops is None:
        _refuse(given, SPEEDS, "without --tokens-per-step and --tflops")
    if given.tokens_per_step is None:
        _refuse(given, ["overhead_budget"], "without --tokens-per-step, of whose time it is a share")
    if device is None and given.memory_budget is None:
        _refuse(given, ["overhead_budget"], "without --memory-budget, --device or --calibrate, which recommend options")
    if given.overhead_budget is None:
        given.overhead_budget = OVERHEAD


def _refuse(given: argparse.Namespace, names: Sequence[str], why: str) -> None:
    for name in names:
        if getattr(given, name) is not None:
            raise UsageError(f"{_flag(name)} is not allowed {why}")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _speed(given: argparse.Namespace) -> Speed | None:
    """The speed that was given; a device has its own."""
    if given.device or given.calibrate or given.tflops is None:
        return None
    slower = given.optimizer_tflops or FLOAT32_SHARE * given.tflops
    return Speed(given.tokens_per_step, given.tflops, slower, given.refresh_tflops or slower, given.bandwidth)


def _heading(given: argparse.Namespace, framework: str, config: ShampooConfig) -> list[str]:
    ranks = f"{given.world_size} rank{'s' if given.world_size > 1 else ''}"
    blocks = "whole matrices" if config.block_size == LARGEST_INT else f"blocks of at most {config.block_size}"
    if any(under.parts.statistics for under in (config, *config.by_rule)):
        blocks += f", refresh every {config.precondition_frequency} steps"
    lines = [f"{given.model or given.shapes} under {framework} on {ranks}, {blocks}"]
    refreshes, steps = config.early_refreshes()
    if refreshes and config.parts.statistics:
        first, last = config.start, config.start + steps
        lines.append(f"refresh_growth: each block refreshes {refreshes} times from step {first} to step {last}")
    return [*lines, ""]


def _table(made: Estimate) -> list[str]:
    kinds = {
        "factor": "factor matrices",
        "root": "inverse roots",
        "exp_avg": "first moment",
        "rotated_exp_avg": "first moment, rotated",
        "second_moment": "second moment",
    }
    rows = [("per rank", "mean", "largest")]
    rows += [(kinds.get(kind, kind), *_spread(values, _bytes)) for kind, values in made.state.items()]
    rows += [("all optimizer state", *_spread(made.state_bytes, _bytes)), ("AdamW's", *_spread(made.adamw, _bytes))]
    rows += [("8-bit AdamW's", *_spread(made.adamw_8bit, _bytes))]
    rows += [("peak of a step on CPUs", *_spread(made.step_peak, _bytes))]
    rows += [("sent a step", *_spread(made.sent, _bytes)), ("received a step", *_spread(made.received, _bytes))]
    rows += [("work a step", *_spread(made.loads, _flops))]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [f"{a.ljust(widths[0])}  {b.rjust(widths[1])}  {c.rjust(widths[2])}" for a, b, c in rows]
    share = made.preconditioned / made.elements if made.elements else 0.0
    return [
        f"{made.elements:,} parameters, {share:.1%} of them preconditioned, in {made.blocks:,} blocks",
        "",
        *lines,
        "",
        f"{made.bytes_per_element:.2f} bytes of state for each parameter; AdamW's are 8, those of 8-bit AdamW "
        f"{ADAMW_8BIT:.2f}",
        f"peak of a step above weights, gradients and state: at most {made.peak_share:.1%} of the state, on CPUs",
        f"slowest rank: {made.imbalance:.3f} of the mean; {_flops(made.mean_step)} in the mean step, "
        f"{_flops(made.fastest_step)} in the fastest, {_flops(made.slowest_step)} in the slowest",
        f"{made.collectives} collectives a step on CPUs and {made.accelerator_collectives} on accelerators, "
        f"in {made.units} step unit{'s' if made.units != 1 else ''}",
    ]


def _overhead_lines(overhead: Overhead | None, config: ShampooConfig) -> list[str]:
    if overhead is None:
        return []
    return [
        f"overhead over forward and backward ({overhead.model_seconds:.3g} s): {overhead.mean:.1%} in the mean of "
        f"{config.precondition_frequency} steps, {overhead.slowest:.1%} in the slowest"
    ]


def _prediction_lines(given: argparse.Namespace, device: Hardware, timed: Prediction) -> list[str]:
    what = "measured here" if device.calibrated else "published speeds"
    rows = [
        ("products", timed.products),
        ("passes over memory", timed.passes),
        ("refreshes", timed.refresh),
        ("launches, beside these", timed.launches),
        ("waits", timed.reads),
        ("exchange not hidden", timed.exchange),
        *([("offload not hidden", timed.offload)] if given.offload else []),
        ("step without refreshes", timed.plain),
        ("mean step", timed.mean),
        ("slowest step", timed.slowest),
        ("fused AdamW", timed.adamw),
        *([("forward and backward", timed.model)] if timed.model is not None else []),
    ]
    lines = ["", f"predicted for {device.name} ({what}), milliseconds; nothing of this has been measured in a run"]
    lines += [f"{name.ljust(24)}{value:10.1f}" for name, value in rows]
    if timed.over_model is not None and timed.over_adamw is not None:
        lines.append(f"{timed.over_model:.1%} of forward and backward; {timed.over_adamw:.1%} slower than with AdamW")
    return [*lines, f"NCCL's buffers and buckets in flight: at most {_bytes(timed.buffers)}"]


def _advice_lines(given: argparse.Namespace, advice: Advice | None) -> list[str]:
    if advice is None:
        return [f"no options keep within {given.overhead_budget:.1%} over AdamW by these predictions"]
    options = ", ".join(f"{name} {'null' if value is None else value}" for name, value in advice.options().items())
    share, state = advice.prediction.over_adamw or 0.0, _bytes(advice.state_bytes)
    return [f"predicted best within {given.overhead_budget:.1%} over AdamW ({share:.1%}, {state} a rank): {options}"]


def _recommendation_lines(given: argparse.Namespace, fitting: Recommendation | None, speed: Speed | None) -> list[str]:
    if given.memory_budget is None:
        return []
    if fitting is None:
        return [f"no block size fits into {given.memory_budget:g} GiB a rank: use more ranks, or another framework"]
    text = (
        f"recommended: max_preconditioner_dim {fitting.max_preconditioner_dim} ({_bytes(fitting.state_bytes)} a rank)"
    )
    if fitting.frequency is not None:
        text += f", precondition_frequency {fitting.frequency} (within {given.overhead_budget:.1%} overhead)"
    elif speed is not None:
        text += f"; no precondition_frequency keeps within {given.overhead_budget:.1%} overhead at this speed"
    return [text]


def _spread(values: Sequence[float], form: Any) -> tuple[str, str]:
    return form(sum(values) / max(1, len(values))), form(max(values, default=0))


def _bytes(value: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:,.2f} GiB"


def _flops(value: float) -> str:
    for unit in ("FLOP", "kFLOP", "MFLOP", "GFLOP"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.3g} TFLOP"


if __name__ == "__main__":
    sys.exit(main())
