"""A minimal loader of training clips from a pack, which only calls existing libraries.

It reads records with array_record, parses them with protobuf, decodes the frames with simplejpeg,
and crops and mirrors them. Grain shuffles and batches the clips. It checks nothing, handles no
errors, and needs 8 bytes of memory per record. `benchmarks/input_cost.py` compares its cost with
jaxvid's.
"""

from collections.abc import Iterator, Sequence

import cv2
import grain
import numpy as np
import simplejpeg
from array_record.python.array_record_module import ArrayRecordReader
from tensorflow_datasets.proto import tf_example_pb2

from jaxvid.data.formats.jpeg_reader import keep_freed_memory
from jaxvid.data.formats.packed_videos import PackedVideo


def make_batches(
    videos: Sequence[PackedVideo], batch_size: int, num_frames: int, crop: int
) -> Iterator[np.ndarray]:
    """Return an endless iterator of clips `(b, t, crop, crop, c)` uint8, with one thread.

    Args:
        videos: Videos in one file, with one frame per record and a shorter side of at least `crop`
            pixels.
        batch_size: Clips per batch.
        num_frames: Frames per clip, one of each of as many equal segments.
        crop: Height and width of a clip in pixels.
    """
    keep_freed_memory()
    [path] = {str(video.path) for video in videos}
    options = "readahead_buffer_size:0,max_parallelism:0"
    reader = ArrayRecordReader(path, options=options, file_reader_buffer_size=2**15)
    segments = np.arange(num_frames + 1) / num_frames

    def draw(video: PackedVideo, rng: np.random.Generator) -> tuple:
        length = video.listed.num_frames
        bounds = np.round((length - 1) * segments).astype(int)
        numbers = rng.integers(bounds[:-1], bounds[1:], endpoint=True) + video.listed.record
        return numbers.tolist(), rng.random(2), rng.random() < 0.5

    def load(clips: Sequence[tuple]) -> np.ndarray:
        cv2.setNumThreads(0)
        batch = np.empty((len(clips), num_frames, crop, crop, 3), np.uint8)
        for out, (numbers, (down, right), is_mirrored) in zip(batch, clips, strict=True):
            for target, number in zip(out, numbers, strict=True):
                [data] = reader.read(number, number + 1)
                features = tf_example_pb2.Example.FromString(data).features.feature
                jpeg = features["frames"].bytes_list.value[0]
                h, w = simplejpeg.decode_jpeg_header(jpeg)[:2]
                frame = simplejpeg.decode_jpeg(jpeg, colorspace="RGB")
                top, left = int(down * (h - crop + 1)), int(right * (w - crop + 1))
                target[:] = frame[top : top + crop, left : left + crop]
                if is_mirrored:
                    cv2.flip(target, 1, dst=target)
        return batch

    dataset = grain.MapDataset.source(videos).seed(0).shuffle().repeat().random_map(draw)
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=3)
    return iter(dataset.batch(batch_size, batch_fn=load).to_iter_dataset(options))
