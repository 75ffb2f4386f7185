"""Pure functions from frames to clips: sampling, resizing, cropping and augmentation."""
