"""Benchmarks: each prints ratios against torch's AdamW measured in the same run."""
