"""TFDS without TensorFlow.

Only this file uses parts of TFDS that are not public. They were checked with tensorflow-datasets
4.9.10. `core.example_serializer` and `proto.tf_example_pb2` encode and decode records in pure
Python. `core.SplitInfo` and `core.ShardedFileTemplate` are argument types of the public
`folder_dataset.write_metadata`. `core.read_only_builder`, `core.dataset_info` and `core.splits`
find data sets, read their metadata and resolve slices.
"""

import contextlib
import dataclasses
import functools
import itertools
import os
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from jaxvid.errors import InputError, import_or_explain, one_line
from jaxvid.files import check_regular

NAME = "jaxvid"  # name of the data set that `prepare` writes
MAX_METADATA_BYTES = 2**26  # size limit of each metadata file
MAX_RECORDS = 2**40  # maximum number of records in a file
# Ends of error messages about packs and other TFDS data sets.
PREPARE = "run jaxvid.data.prepare"
RECREATE = "correct data.splits or recreate it with TFDS"
# Feature of a record → field of its protobuf message that contains the values.
KINDS = {
    "frames": "bytes_list",
    "video": "bytes_list",
    "first": "int64_list",
    "num_frames": "int64_list",
    "fps": "float_list",
    "label": "int64_list",
    "id": "bytes_list",
    "times": "bytes_list",
}
_import_lock = threading.Lock()


@functools.cache
def import_tfds() -> ModuleType:
    """Import TFDS.

    Raises:
        InputError: TFDS, array_record or an undeclared dependency of TFDS is not installed.
    """
    for module in ("importlib_resources", "array_record"):
        import_or_explain(module, module)
    tfds = import_or_explain("tensorflow_datasets", "tensorflow-datasets")
    if not hasattr(tfds, "builder_from_directory"):  # TFDS hides ImportErrors of its dependencies
        raise InputError("tensorflow-datasets is incomplete: pip install -r requirements.txt")
    return tfds


# ------------------------------------------------------------------ reading


class FileRange(NamedTuple):
    """Consecutive records of a file of a TFDS data set.

    Attributes:
        path: The file.
        start: Index of the first record in the file.
        length: Number of records.
        split: Name of the split that the file belongs to.
        first: Index of the first record in that split.
    """

    path: str
    start: int
    length: int
    split: str
    first: int


@dataclasses.dataclass(frozen=True)
class SplitFiles:
    """Metadata of a split, or of a slice of one, of a TFDS data set.

    Attributes:
        root: Folder of the data set.
        splits: Names of all splits of the data set.
        file_format: Format of the files: `array_record` if they also exist in this format.
        features: Names of the features of a record.
        labels: Names of the classes, or None if the feature `label` is not a ClassLabel or has no
            classes.
        num_classes: Number of classes; 0 if `labels` is None.
        ranges: Records of the split, file by file; empty if the split does not exist.
        is_whole: Whether the split is one of `splits`, not a slice or a combination.
    """

    root: str
    splits: list[str]
    file_format: str
    features: list[str]
    labels: list[str] | None
    num_classes: int
    ranges: list[FileRange]
    is_whole: bool


def find_folder(name: str, data_dir: str) -> str:
    """Return the folder of a TFDS data set.

    Args:
        name: `NAME`, `NAME/CONFIG` or `NAME/CONFIG:VERSION`. Without a config, the default one is
            used; without a version, the newest.
        data_dir: Folder of TFDS data sets; empty: TFDS's default.

    Raises:
        InputError: There is no such data set, or a required package is not installed.
    """
    import_tfds()
    from tensorflow_datasets.core import constants, read_only_builder
    from tensorflow_datasets.core.utils import error_utils

    try:
        with error_utils.record_error_context():
            folder = read_only_builder._find_builder_dir(name, data_dir=data_dir or None)
    except Exception as error:  # TFDS raises exceptions of many types
        raise InputError(
            f"data.name={name}: is not the name of a TFDS data set ({one_line(error)}); expected "
            "NAME, NAME/CONFIG or NAME/CONFIG:VERSION"
        ) from None
    if folder is None:
        raise InputError(
            f"data.name={name}: not found in {data_dir or constants.DATA_DIR}; create it with "
            "`tfds build --file_format=array_record`, or set data.tfds_dir to the folder that "
            f"contains {name.partition(':')[0].partition('/')[0]}"
        )
    return os.path.abspath(folder)


def read_metadata(folder: str, split: str, remedy: str = PREPARE) -> SplitFiles:
    """Read the metadata of a TFDS data set.

    TFDS's own reader is not used, because it needs TensorFlow for the feature `Video`.

    Args:
        folder: Folder of the data set.
        split: Name of the split, or a slice as in `train[:90%]`.
        remedy: End of the error message.

    Raises:
        InputError: The metadata is missing or damaged, or a required package is not installed.
    """
    import_tfds()
    for path in [*Path(folder).glob("*.json"), *Path(folder).glob("*.labels.txt")]:
        with contextlib.suppress(FileNotFoundError):  # a broken link, which TFDS reports
            check_regular(path, MAX_METADATA_BYTES)
    try:
        return _read_metadata(folder, split)
    except Exception as error:  # TFDS and protobuf raise exceptions of many types
        raise InputError(f"{folder}: no readable pack ({one_line(error)}); {remedy}") from None


def _read_metadata(folder: str, split: str) -> SplitFiles:
    """Read the metadata of a TFDS data set; errors are of any type."""
    from google.protobuf import json_format
    from tensorflow_datasets.core import dataset_info, features, naming, splits
    from tensorflow_datasets.core.proto import feature_pb2

    info = dataset_info.read_proto_from_builder_dir(folder)
    formats = (info.file_format or "tfrecord", *info.alternative_file_formats)
    file_format = "array_record" if "array_record" in formats else formats[0]
    text = (Path(folder) / "features.json").read_text(encoding="utf-8")
    protos = json_format.Parse(text, feature_pb2.Feature()).features_dict.features
    label = protos["label"].class_label if "label" in protos else feature_pb2.ClassLabel()
    labels = None
    if label.num_classes:
        feature = features.ClassLabel(num_classes=label.num_classes)
        names = Path(feature.get_names_filepath(folder, "label"))
        if names.exists() and names.read_text(encoding="utf-8").strip():
            feature.load_metadata(folder, "label")
        labels = list(feature.names)
    template = naming.ShardedFileTemplate(
        dataset_name=info.name, data_dir=folder, filetype_suffix=file_format
    )
    known = splits.SplitDict.from_proto(info.splits, template)
    return SplitFiles(
        root=os.path.abspath(folder),
        splits=list(known),
        file_format=file_format,
        features=list(protos),
        labels=labels,
        num_classes=label.num_classes,
        ranges=_find_ranges(known, split),
        is_whole=split in known,
    )


def _find_ranges(known: Any, split: str) -> list[FileRange]:
    """Return the records of a split or slice.

    Args:
        known: TFDS's `SplitDict` of the data set.
        split: Name of the split, or a slice. An unknown name has no records.

    Raises:
        ValueError: The metadata of a split or the slice is invalid.
    """
    if split not in known and re.fullmatch(r"\w+", split):
        return []
    whole = {}  # file → all its records
    for name, info in known.items():
        paths, lengths = [os.path.abspath(path) for path in info.filepaths], info.shard_lengths
        if len(paths) != len(lengths):
            raise ValueError(f"{len(paths)} files, but {len(lengths)} lengths")
        if not all(0 <= length <= MAX_RECORDS for length in lengths):
            raise ValueError(
                f"numbers of records from {min(lengths)} to {max(lengths)}, "
                f"expected 0 to {MAX_RECORDS}"
            )
        firsts = itertools.accumulate(lengths, initial=0)
        for path, length, first in zip(paths, lengths, firsts, strict=False):
            whole[path] = FileRange(path, 0, length, name, first)
    if split in known:
        return [part for part in whole.values() if part.split == split]
    ranges = []
    for part in known[split].file_instructions:
        file = whole[os.path.abspath(part.filename)]
        first = file.first + part.skip
        ranges.append(FileRange(file.path, part.skip, part.take, file.split, first))
    return ranges


@functools.cache
def _example_type() -> type:
    """Return the protobuf message class of a record."""
    # The decoding threads of a new process call this at the same time. Without the lock, lazy
    # imports inside TFDS can deadlock: one thread waits for the lock of a module, and another one
    # for that of a lazy attribute.
    with _import_lock:
        from tensorflow_datasets.proto import tf_example_pb2

    return tf_example_pb2.Example


def parse_record(data: bytes, names: Iterable[str]) -> dict[str, Sequence]:
    """Parse a record.

    Args:
        data: The record.
        names: Features to return, keys of `KINDS`.

    Returns:
        Feature → its values, each `bytes`, `int` or `float`. Features without values, or with
        values of another type than in `KINDS`, are left out.

    Raises:
        Exception: The record is damaged; the type is one of protobuf's.
    """
    features = _example_type().FromString(data).features.feature
    values = {name: getattr(features[name], KINDS[name]).value for name in names}
    if "fps" in values and not values["fps"]:  # other data sets may store it as an integer
        values["fps"] = features["fps"].int64_list.value
    return {name: value for name, value in values.items() if value}


def make_example(features: dict[str, bytes | int | float]) -> Any:
    """Return a protobuf message with one value per feature.

    Args:
        features: Feature, a key of `KINDS`, → its value.
    """
    example = _example_type()()
    for name, value in features.items():
        getattr(example.features.feature[name], KINDS[name]).value.append(value)
    return example


def take_frames(data: bytes, others: Any) -> Sequence[bytes] | None:
    """Return the feature `frames` of a record whose other features are known.

    `parse_record` and a comparison of the features take 2.5 times as long.

    Args:
        data: The record.
        others: Message with all other features.

    Returns:
        The values; None if the record is damaged or another feature differs.
    """
    try:
        example = _example_type().FromString(data)
    except Exception:  # exceptions of protobuf have no common base
        return None
    frames = example.features.feature["frames"].bytes_list.value  # empty if there are none
    del example.features.feature["frames"]
    return frames if example == others else None


# ------------------------------------------------------------------ writing


def make_features(labels: Sequence[str]) -> Any:
    """Return the features of a record, a `tfds.features.FeaturesDict`.

    The JPEG bytes are declared as text, because `Sequence(Text())` stores bytes unchanged.
    """
    tfds = import_tfds()
    return tfds.features.FeaturesDict(
        {
            "frames": tfds.features.Sequence(tfds.features.Text()),
            "first": np.int32,  # index of the first frame in its video
            "num_frames": np.int32,  # number of frames of the video
            "fps": np.float32,  # 0: unknown
            "label": tfds.features.ClassLabel(names=list(labels)),
            "id": tfds.features.Text(),
            # Times of all frames of the video in seconds, as float64 bytes because TFDS would round
            # floats to float32. Empty except in the first record of a video with a variable frame
            # rate.
            "times": tfds.features.Text(),
        }
    )


def serialize_examples(examples: Iterable[dict], labels: Sequence[str]) -> Iterator[bytes]:
    """Yield examples of `make_features` as bytes; equal examples give identical bytes."""
    features = make_features(labels)
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    serializer = ExampleSerializer(features.get_serialized_info())
    for example in examples:
        proto = serializer.get_tf_example(features.encode_example(example))
        yield proto.SerializeToString(deterministic=True)


def write_metadata(
    folder: Path, labels: Sequence[str], lengths: dict[str, list[int]], sizes: dict[str, int]
) -> None:
    """Write the metadata that `tfds.builder_from_directory` reads.

    Args:
        folder: Folder of the data set.
        labels: Names of the classes.
        lengths: Split → number of records of each file.
        sizes: Split → total size of its files in bytes.
    """
    tfds = import_tfds()
    infos = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=lengths[split],
            num_bytes=sizes[split],
            filename_template=tfds.core.ShardedFileTemplate(
                dataset_name=NAME, data_dir=folder, split=split, filetype_suffix="array_record"
            ),
        )
        for split in lengths
    ]
    tfds.folder_dataset.write_metadata(
        data_dir=folder, features=make_features(labels), split_infos=infos, check_data=False
    )
