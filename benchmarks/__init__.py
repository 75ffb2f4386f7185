"""Benchmarks: each prints ratios against references that run beside it."""
