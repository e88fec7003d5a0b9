"""Benchmarks: each prints ratios of measurements from the same run, most of them relative to torch's AdamW."""
