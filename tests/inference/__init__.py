"""Tests of jaxvid/inference."""
