"""`python -m benchmarks`: all benchmarks of speed, memory and training in short, in five minutes of an idle machine.

Longer forms and options: `python -m benchmarks.step_time --help`, and likewise end_to_end, slow_link, memory, scaling,
convergence, and for a GPU accelerator, which comes along where there is one. How exact runs are takes longer:
benchmarks.exactness.
"""

from __future__ import annotations

import torch

from benchmarks import convergence, end_to_end, memory, scaling, slow_link, step_time


def main() -> None:
    """One after another, as each needs the machine for itself."""
    step_time.main(["--rounds", "2"])
    end_to_end.main(["--tokens", "512", "8192", "--rounds", "1"])
    slow_link.main(["--buckets", "1", "8", "--steps", "15"])
    memory.main(["--preconditioner", "shampoo", "soap"])
    scaling.main(["--ranks", "1", "2", "--rounds", "1", "--plan-ranks", "8", "64", "1024", "--models", "llama-3-8b"])
    convergence.main(["--steps", "100", "--layers", "2", "--hidden", "128", "--rates", "2e-3"])
    if torch.cuda.is_available():
        from benchmarks import accelerator  # needs Transformers

        accelerator.main(["--size", "350m", "--block", "1024", "--solver", "eigh", "coupled_newton", "--rounds", "1"])


if __name__ == "__main__":
    main()
