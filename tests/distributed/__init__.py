"""Tests of jaxvid/distributed."""
