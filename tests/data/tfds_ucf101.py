"""A miniature of the TFDS data set `ucf101`, written as TFDS 4.9.10 does, without TensorFlow."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import simplejpeg
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

CLASSES = 101
SIZE = 256  # height and width of the config `ucf101_1_256`
# features.json, as TFDS writes it.
FEATURES = {
    "featuresDict": {
        "features": {
            "label": {
                "classLabel": {"numClasses": str(CLASSES)},
                "pythonClassName": "tensorflow_datasets.core.features.class_label_feature"
                ".ClassLabel",
            },
            "video": {
                "pythonClassName": "tensorflow_datasets.core.features.video_feature.Video",
                "video": {
                    "dtype": "uint8",
                    "encodingFormat": "jpeg",
                    "ffmpegExtraArgs": ["-vf", "scale=256x256"],
                    "shape": {"dimensions": ["-1", "256", "256", "3"]},
                },
            },
        }
    },
    "pythonClassName": "tensorflow_datasets.core.features.features_dict.FeaturesDict",
}


def class_names() -> list[str]:
    """Return the class names in the order of TFDS."""
    from tensorflow_datasets import core

    text = core.tfds_path("video/ucf101_labels.txt").read_text()
    return text.split()


def make_frames(video: int) -> np.ndarray:
    """Return the frames of a video, `(t, h, w, c)` uint8; each frame has a colour of its own."""
    frames = np.zeros((8, SIZE, SIZE, 3), np.uint8)
    frames[..., 0] = 20 * video
    frames[..., 1] = 30 * np.arange(8)[:, None, None]
    return frames


def to_jpeg(frame: np.ndarray) -> bytes:
    """Encode a frame `(h, w, c)` uint8 as JPEG."""
    return simplejpeg.encode_jpeg(frame, quality=95)


def serialize(images: Sequence[bytes], label: int, feature: str = "video") -> bytes:
    """Return the record of a video."""
    values = {
        feature: tf_feature_pb2.Feature(bytes_list=tf_feature_pb2.BytesList(value=images)),
        "label": tf_feature_pb2.Feature(int64_list=tf_feature_pb2.Int64List(value=[label])),
    }
    features = tf_feature_pb2.Features(feature=values)
    return tf_example_pb2.Example(features=features).SerializeToString(deterministic=True)


def write_ucf101(
    data_dir: Path,
    splits: dict[str, list[list[tuple[int, int]]]],
    encode: Callable[[np.ndarray], bytes] = to_jpeg,
    *,
    file_format: str = "array_record",
    feature: str = "video",
) -> Path:
    """Write the data set.

    Args:
        data_dir: Folder of TFDS data sets.
        splits: Split → files → videos `(number, label)`.
        encode: Function that encodes a frame.
        file_format: Format in the metadata.
        feature: Name of the feature with the frames.

    Returns:
        The folder of the data set.
    """
    folder = data_dir / "ucf101" / "ucf101_1_256" / "2.0.0"
    folder.mkdir(parents=True)
    metadata = '{"default_config_name": "ucf101_1_256"}'
    folder.parents[1].joinpath(".config").mkdir()
    (folder.parents[1] / ".config" / "metadata.json").write_text(metadata)
    infos = []
    for split, files in splits.items():
        num_bytes = 0
        for i, videos in enumerate(files):
            name = f"ucf101-{split}.{file_format}-{i:05d}-of-{len(files):05d}"
            writer = ArrayRecordWriter(str(folder / name), "group_size:1")
            for number, label in videos:
                record = serialize([*map(encode, make_frames(number))], label, feature)
                num_bytes += len(record)
                writer.write(record)
            writer.close()
        infos.append(
            {
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                "name": split,
                "numBytes": str(num_bytes),
                "shardLengths": [str(len(videos)) for videos in files],
            }
        )
    info = {
        "configDescription": "256x256 UCF with the first action recognition split.",
        "configName": "ucf101_1_256",
        "description": "A 101-label video classification dataset.",
        "fileFormat": file_format,
        "moduleName": "tensorflow_datasets.video.ucf101",
        "name": "ucf101",
        "releaseNotes": {"2.0.0": "New split API (https://tensorflow.org/datasets/splits)"},
        "splits": infos,
        "version": "2.0.0",
    }
    (folder / "dataset_info.json").write_text(json.dumps(info, indent=2))
    features = json.loads(json.dumps(FEATURES))
    fields = features["featuresDict"]["features"]
    fields[feature] = fields.pop("video")
    (folder / "features.json").write_text(json.dumps(features, indent=4, sort_keys=True))
    (folder / "label.labels.txt").write_text("".join(f"{name}\n" for name in class_names()))
    return folder
