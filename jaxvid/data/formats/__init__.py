"""Readers and writers of video files, JPEG frames, packs and XViT's HDF5 files."""
