"""Conversion of weights between PyTorch and JAX."""
