"""Readers and writers: video files, JPEG frames, packs and XViT's HDF5."""
