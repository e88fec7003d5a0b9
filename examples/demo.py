"""Trains one small language model twice, with Shampoo and with AdamW, and compares the two runs.

Both runs are causal_lm_deepspeed.py with the same data, model, schedule and seed on the same ranks; they
differ in the DeepSpeed JSON and in the learning rate, which was tuned for AdamW only.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from demo_report import DARK, LIGHT, Run, draw, table

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Contender:
    name: str
    json_file: str
    learning_rate: float


# For AdamW the best of 1, 1.7, 3 and 6e-3 by held-out loss after 400 steps; for Shampoo not searched.
CONTENDERS = (
    Contender("Shampoo", "ds_zero2_shampoo.json", 3e-3),
    Contender("AdamW", "ds_zero2_adamw.json", 1.7e-3),
)


def train(contender: Contender, folder: Path, ranks: int, steps: int) -> None:
    """Run the training script in its own processes; its progress bar goes to our terminal."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command += [str(HERE / "causal_lm_deepspeed.py"), "--deepspeed", str(HERE / contender.json_file)]
    command += ["--output_dir", str(folder), "--save_strategy", "no", "--logging_steps", "1"]
    command += ["--max_steps", str(steps), "--learning_rate", str(contender.learning_rate)]
    environment = {
        "OMP_NUM_THREADS": "1",
        # A private folder: an interrupted build leaves a lock that blocks every later build in the same folder.
        "TORCH_EXTENSIONS_DIR": str(folder / "torch_extensions"),
        # DeepSpeed calls collectives by names that torch is about to rename, once per rank.
        "PYTHONWARNINGS": "ignore::FutureWarning:torch.distributed.c10d_logger",
        "TOKENIZERS_PARALLELISM": "false",
    }
    subprocess.run(command, env=os.environ | environment, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, default=Path("demo_output"))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--ranks", type=int, help="default: one per accelerator, or two on the CPU")
    parser.add_argument("--draw_only", action="store_true", help="train nothing; draw the runs in output_dir")
    parser.add_argument("--readme_pictures", type=Path, help="folder for the README's pictures, docs/images")
    arguments = parser.parse_args()
    output: Path = arguments.output_dir.resolve()
    ranks = arguments.ranks or (torch.accelerator.device_count() if torch.accelerator.is_available() else 2)

    runs = []
    for contender in CONTENDERS:
        folder = output / contender.name.lower()
        if not arguments.draw_only:
            print(f"\n{contender.name}: {arguments.steps} steps on {ranks} ranks, ZeRO-2", flush=True)
            train(contender, folder, ranks, arguments.steps)
        runs.append(Run.read(contender.name, contender.learning_rate, folder / "loss_log.json"))

    picture = output / "shampoo_and_adamw.png"
    title = f"A small Llama on Python's own sources, {ranks} ranks, DeepSpeed ZeRO-2"
    draw(runs, title, picture)
    if arguments.readme_pictures is not None:
        for name, background in (("light", LIGHT), ("dark", DARK)):
            draw(runs, title, arguments.readme_pictures / f"demo_{name}.svg", background)
    report = table(runs)
    (output / "table.txt").write_text(report + "\n")
    print(f"\n{report}\n\npicture: {picture}")


if __name__ == "__main__":
    main()
