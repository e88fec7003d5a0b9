"""`python -m benchmarks`: all benchmarks in a short form."""

from benchmarks import step_time

step_time.main()
