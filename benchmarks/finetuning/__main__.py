"""Command line of the benchmark."""

from __future__ import annotations

import signal
import sys

from benchmarks.finetuning.command import main

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the loop ends its workers
    sys.exit(main())
