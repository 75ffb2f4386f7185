"""Training: steps, optimiser, checkpoints, metrics and signals."""
