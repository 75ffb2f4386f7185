"""HTTP server for models: the engine, the API and the page of `jaxvid serve`."""
