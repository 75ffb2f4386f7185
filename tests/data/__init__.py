"""Tests of jaxvid/data."""
