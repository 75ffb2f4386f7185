"""Tests of jaxvid/evaluation."""
