"""Tests of jaxvid/storage."""
