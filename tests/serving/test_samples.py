"""Sample clips of the page."""

import io

import av

from jaxvid.data.synthetic_motion import LABELS, NUM_FRAMES
from jaxvid.serving import samples


def test_only_the_demo_has_samples():
    assert samples.is_demo([*LABELS])
    assert not samples.is_demo([*reversed(LABELS)])
    assert not samples.is_demo(["a", "b"])


def test_one_clip_per_class_and_one_with_all():
    clips = samples.make_samples()
    assert [clip.title for clip in clips] == [*LABELS, "all in turn"]
    assert len({clip.data for clip in clips}) == len(clips)
    lengths = []
    for clip in clips:
        with av.open(io.BytesIO(clip.data)) as container:
            lengths.append(sum(1 for _ in container.decode(video=0)))
    assert lengths == [NUM_FRAMES] * len(LABELS) + [2 * NUM_FRAMES * len(LABELS)]
