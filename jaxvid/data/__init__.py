"""From bytes to uint8 clips. Knows nothing of models."""
