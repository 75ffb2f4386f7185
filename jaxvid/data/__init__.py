"""Data sources, decoding and augmentation: from video files to clips."""
