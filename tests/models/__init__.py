"""Tests of jaxvid/models."""
