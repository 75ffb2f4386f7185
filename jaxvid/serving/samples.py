"""Sample clips of the page for the model of the demo."""

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxvid.data import synthetic_motion

SEED = 4  # the data set has other random numbers
TOUR = ("left", "up", "growing", "clockwise", "right", "down", "shrinking", "counter-clockwise")
CLIP_SECONDS = synthetic_motion.NUM_FRAMES / synthetic_motion.FPS


@dataclasses.dataclass(frozen=True)
class Sample:
    """A sample clip.

    Attributes:
        name: File name.
        title: What it shows.
        data: Contents of the MP4 file.
    """

    name: str
    title: str
    data: bytes


def is_demo(labels: Sequence[str]) -> bool:
    """Return whether these are the classes of the demo."""
    return tuple(labels) == synthetic_motion.LABELS


def make_samples() -> list[Sample]:
    """Return one clip per class of the demo, and one that shows all motions in turn."""
    scenes = {label: _render(label) for label in synthetic_motion.LABELS}
    # At half the speed, more windows of the timeline show only one motion.
    tour = np.concatenate([scenes[label].repeat(2, axis=0) for label in TOUR])
    clips = scenes | {"all in turn": tour}
    samples = []
    with tempfile.TemporaryDirectory() as folder:
        for title, frames in clips.items():
            path = Path(folder, f"{title.replace(' ', '_')}.mp4")
            synthetic_motion.write_clip(path, frames)
            samples.append(Sample(path.name, title, path.read_bytes()))
    return samples


def _render(label: str) -> np.ndarray:
    """Render a scene `(t, h, w, c)` of a class."""
    pair, is_backwards = divmod(synthetic_motion.LABELS.index(label), 2)
    frames = synthetic_motion.render_scene(np.random.default_rng([SEED, pair]), pair)
    return frames[::-1] if is_backwards else frames
