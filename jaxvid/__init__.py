"""jaxvid: the video transformers STAM and XViT in JAX."""

