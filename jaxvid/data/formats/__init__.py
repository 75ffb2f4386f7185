"""Readers of video files, JPEG frames, packs and XViT's HDF5 files; writers of packs and HDF5."""
