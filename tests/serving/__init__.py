"""Tests of jaxvid/serving."""
