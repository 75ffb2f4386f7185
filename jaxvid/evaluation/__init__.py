"""Evaluation: metrics, per-video results, comparison and reports."""
