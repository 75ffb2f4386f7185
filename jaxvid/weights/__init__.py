"""Weights by name: reading checkpoints without PyTorch, conversion, downloads and their cache."""
