"""Training: steps, optimizer, checkpoints, metrics and signals."""
