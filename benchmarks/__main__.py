"""`python -m benchmarks`: short forms of all benchmarks of speed, memory and training, in five minutes.

Run it on an otherwise idle machine. For longer forms and options, see `python -m benchmarks.step_time --help`, and
likewise end_to_end, slow_link, memory, scaling and convergence. benchmarks.accelerator is for GPUs and is included if
there is one. benchmarks.exactness, which measures how exact runs are, takes longer and is not included.
"""

from __future__ import annotations

import torch

from benchmarks import end_to_end, memory, scaling, slow_link, step_time
from benchmarks.convergence import command as convergence


def main() -> None:
    """Run the benchmarks one after another, because each needs the whole machine."""
    step_time.main(["--rounds", "2"])
    end_to_end.main(["--tokens", "512", "8192", "--rounds", "1"])
    slow_link.main(["--buckets", "1", "8", "--steps", "15"])
    memory.main(["--preconditioner", "shampoo", "soap"])
    scaling.main(["--ranks", "1", "2", "--rounds", "1", "--plan-ranks", "8", "64", "1024", "--models", "llama-3-8b"])
    convergence.main(
        [
            "--cells",
            "llama-tiny",
            "gpt2-tiny",
            "--seeds",
            "0",
            "--contestants",
            "adamw",
            "muon",
            "default",
            "soap",
            "kl",
        ]
        + ["--budgets", "1", "--steps", "100", "--rates", "3e-3", "--no-walk"]
        + ["--output", "bench_output/convergence/short.jsonl"]
    )
    if torch.cuda.is_available():
        from benchmarks import accelerator  # needs Transformers

        accelerator.main(["--size", "350m", "--block", "1024", "--solver", "eigh", "coupled_newton", "--rounds", "1"])


if __name__ == "__main__":
    main()
