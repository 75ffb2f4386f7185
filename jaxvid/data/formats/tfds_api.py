"""TFDS without TensorFlow.

Only this file uses parts of TFDS that are not public. They were checked with tensorflow-datasets
4.9.10. `core.example_serializer` and `proto.tf_example_pb2` encode and decode records in pure
Python. `core.SplitInfo` and `core.ShardedFileTemplate` are argument types of the public
`folder_dataset.write_metadata`.
"""

import contextlib
import dataclasses
import functools
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from jaxvid.errors import InputError, import_or_explain, one_line
from jaxvid.files import check_regular

NAME = "jaxvid"  # name of the data set that `prepare` writes
MAX_METADATA_BYTES = 2**26  # size limit of each metadata file
MAX_RECORDS = 2**40  # maximum number of records in a file
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


@dataclasses.dataclass(frozen=True)
class SplitFiles:
    """Metadata of a split of a TFDS data set.

    Attributes:
        root: Folder of the data set.
        splits: Names of all splits of the data set.
        file_format: Format of the files.
        features: Names of the features of a record.
        labels: Names of the classes, or None if the feature `label` is not a ClassLabel or has no
            classes.
        num_classes: Number of classes; 0 if `labels` is None.
        paths: Files of the split; empty if the split does not exist.
        lengths: Number of records of each file.
    """

    root: str
    splits: list[str]
    file_format: str
    features: list[str]
    labels: list[str] | None
    num_classes: int
    paths: list[str]
    lengths: list[int]


def read_metadata(name: str, split: str, *, is_folder: bool) -> SplitFiles:
    """Read the metadata of a TFDS data set.

    Args:
        name: Folder or name of the data set.
        split: Name of the split.
        is_folder: Whether `name` is a folder.

    Raises:
        InputError: The metadata is missing or damaged, or a required package is not installed.
    """
    tfds = import_tfds()
    if is_folder:
        for path in [*Path(name).glob("*.json"), *Path(name).glob("*.labels.txt")]:
            with contextlib.suppress(FileNotFoundError):  # a broken link, which TFDS reports
                check_regular(path, MAX_METADATA_BYTES)
    try:
        builder = tfds.builder_from_directory(name) if is_folder else tfds.builder(name)
        features, info = dict(builder.info.features), builder.info.splits.get(split)
        label = features.get("label")
        is_label = isinstance(label, tfds.features.ClassLabel)
        files = SplitFiles(
            root=os.path.abspath(builder.data_dir),
            splits=list(builder.info.splits),
            file_format=builder.info.file_format.value,
            features=list(features),
            labels=list(label.names) if is_label and label.num_classes else None,
            num_classes=int(label.num_classes or 0) if is_label else 0,
            paths=[os.path.abspath(path) for path in info.filepaths] if info else [],
            lengths=[int(length) for length in info.shard_lengths] if info else [],
        )
        if len(files.paths) != len(files.lengths):
            raise ValueError(f"{len(files.paths)} files, but {len(files.lengths)} lengths")
        if not all(0 <= length <= MAX_RECORDS for length in files.lengths):
            raise ValueError(
                f"numbers of records from {min(files.lengths)} to {max(files.lengths)}, "
                f"expected 0 to {MAX_RECORDS}"
            )
        return files
    except Exception as error:  # TFDS and protobuf raise exceptions of many types
        remedy = "run jaxvid.data.prepare" if is_folder else "create it with TFDS"
        raise InputError(f"{name}: no readable pack ({one_line(error)}); {remedy}") from None


@functools.cache
def _example_type() -> type:
    """Return the protobuf message class of a record."""
    # The decoding threads of a new process call this at the same time. Without the lock, lazy
    # imports inside TFDS can deadlock: one thread waits for the lock of a module, and another one
    # for that of a lazy attribute.
    with _import_lock:
        from tensorflow_datasets.proto import tf_example_pb2

    return tf_example_pb2.Example


def parse_record(data: bytes) -> dict[str, list]:
    """Parse a record.

    Returns:
        Feature → list of its values, each `bytes`, `int` or `float`. Features without values are
        left out.

    Raises:
        Exception: The record is damaged; the type is one of protobuf's.
    """
    features = _example_type().FromString(data).features.feature
    kinds = {name: feature.WhichOneof("kind") for name, feature in features.items()}
    return {name: getattr(features[name], kind).value for name, kind in kinds.items() if kind}


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
