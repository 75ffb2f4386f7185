"""Tests of jaxvid/training."""
