"""Inference: classifier, sliding windows, class timelines and attention rollout."""
