"""Data sources, decoding and augmentation: from video files to uint8 clips."""
