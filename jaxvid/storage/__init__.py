"""Model folders: weights, model card and preprocessing."""
