"""Weights between PyTorch's world and this one."""
