"""Benchmarks: each prints ratios, most of them to torch's AdamW, of things measured in the same run."""
