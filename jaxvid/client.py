"""Client of `jaxvid serve`."""
