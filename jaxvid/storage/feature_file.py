"""Files of features, with ids and labels: NumPy (.npz), Parquet and Zarr.

All formats have the same contents. An `.npz` file and a Zarr group contain the arrays `features`,
`ids`, `labels`, `label_names`, `padded` and, for windows, `starts` and `ends`. A Parquet file has
one row per video or window, with the columns `id`, `label`, `class`, `padded`, `start`, `end` and
`feature`. `about` (the array, Zarr attribute or Parquet metadata of this name) is a JSON object.
"""

import dataclasses
import errno
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxvid import atomic, object_store, remote, remote_folder
from jaxvid.data.records import NO_LABEL
from jaxvid.errors import InputError, import_or_explain, one_line

FORMAT_VERSION = 1
ZARR_MARK = "zarr.json"  # file that every Zarr group contains
CHUNK_BYTES = 2**22  # size of a chunk of a Zarr array, if it has several


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureTable:
    """Features of `n` videos or windows.

    Attributes:
        features: `(n, d)` float32, or `(n, t, d)`.
        ids: Ids of the videos, `n` texts. The windows of a video have the same id.
        labels: `(n,)` int32 indices of the classes, or `NO_LABEL`.
        label_names: Names of the classes; empty without labels.
        padded: `(n,)` booleans: the video or window is too short for a clip.
        starts: `(n,)` float64 start of each window in seconds; None without windows.
        ends: `(n,)` float64 end of each window in seconds; None without windows.
        about: The model, the layer, the preprocessing, and the videos that could not be decoded.
    """

    features: np.ndarray
    ids: list[str]
    labels: np.ndarray
    label_names: list[str]
    padded: np.ndarray
    starts: np.ndarray | None
    ends: np.ndarray | None
    about: dict[str, Any]

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays of an `.npz` file or a Zarr group, without `about`."""
        arrays = {
            "features": self.features,
            "ids": np.array(self.ids, str),
            "labels": self.labels.astype(np.int32),
            "label_names": np.array(self.label_names, str),
            "padded": self.padded,
        }
        if self.starts is not None:
            arrays |= {"starts": self.starts, "ends": self.ends}
        return arrays


class Format(NamedTuple):
    """A file format.

    Attributes:
        package: The package that it needs, or empty.
        save: Function that writes a table to a path or a file in an object store.
        load: Function that reads a table from a path. It raises exceptions of any type.
    """

    package: str
    save: Callable[[atomic.OutputPath, FeatureTable], None]
    load: Callable[[Path], FeatureTable]


def check_feature_file(option: str, path: atomic.OutputPath) -> None:
    """Refuse an output file before any video is decoded if it cannot be written.

    Args:
        option: The command-line option that names the file.
        path: The file. An existing file is not changed.

    Raises:
        InputError: The suffix is unknown, the package of the format is not installed, or the file
            cannot be written.
    """
    _find_format(option, path)
    if path.suffix != ".zarr":
        atomic.check_output(option, path)
        return
    if isinstance(path, Path):
        exists, is_group = path.exists(), (path / ZARR_MARK).is_file()
        probe = path / "probe" if exists else path
    else:
        stored = object_store.find(str(path))
        exists, is_group, probe = bool(stored), ZARR_MARK in stored, path
    if exists and not is_group:
        raise InputError(f"{option}: {path} exists and is not a Zarr group; choose another name")
    atomic.check_output(option, probe)


def save_features(path: atomic.OutputPath, table: FeatureTable) -> None:
    """Write a file of features atomically. Equal tables give identical files.

    The files of a Zarr group in an object store are replaced one after the other; until the last
    one is written, the group cannot be opened.

    Raises:
        InputError: The file cannot be written.
    """
    _find_format("output", path).save(path, table)


def load_features(path: Path) -> FeatureTable:
    """Read a file of features. A remote file is copied first.

    Raises:
        InputError: The file is missing or damaged, its package is not installed, or the store
            cannot be reached or refuses access.
    """
    file_format = _find_format("features", path)
    path = remote.complete_copy(path)
    if not atomic.resolve(path, ZARR_MARK).exists():
        raise InputError(f"{path} does not exist; write it with jaxvid features")
    try:
        table = file_format.load(path)
        _check_table(table)
        return table
    except Exception as error:  # the libraries raise exceptions of many types
        raise InputError(
            f"{path}: is not a readable file of features ({one_line(error)}); write it with jaxvid "
            "features"
        ) from None


def _find_format(option: str, path: atomic.OutputPath) -> Format:
    """Return the format of a file; refuse an unknown suffix or a missing package."""
    if path.suffix not in FORMATS:
        known = ", ".join(FORMATS)
        raise InputError(f"{option} {path}: the file name must end in one of {known}")
    file_format = FORMATS[path.suffix]
    if file_format.package:
        import_or_explain(file_format.package, file_format.package, f"{path.suffix} files need")
    return file_format


def _check_table(table: FeatureTable) -> None:
    """Raise a ValueError if the columns of a table do not fit each other."""
    if table.about.get("format_version") != FORMAT_VERSION:
        version = table.about.get("format_version")
        raise ValueError(f"format version {version}, but this jaxvid reads {FORMAT_VERSION}")
    columns = [table.ids, table.labels, table.padded]
    columns += [] if table.starts is None else [table.starts, table.ends]
    if table.features.ndim not in (2, 3) or {*map(len, columns)} != {len(table.features)}:
        raise ValueError(
            f"features {table.features.shape} with columns of {[*map(len, columns)]} rows"
        )
    if not NO_LABEL <= table.labels.min(initial=0) <= table.labels.max(initial=0):
        raise ValueError("a label is negative")
    if table.labels.max(initial=NO_LABEL) >= max(len(table.label_names), 1):
        raise ValueError("a label has no class name")


def _from_arrays(arrays: dict[str, np.ndarray], about: dict[str, Any]) -> FeatureTable:
    return FeatureTable(
        features=arrays["features"],
        ids=arrays["ids"].tolist(),
        labels=arrays["labels"],
        label_names=arrays["label_names"].tolist(),
        padded=arrays["padded"],
        starts=arrays.get("starts"),
        ends=arrays.get("ends"),
        about=about,
    )


# ------------------------------------------------------------------ npz


def _save_npz(path: atomic.OutputPath, table: FeatureTable) -> None:
    file = io.BytesIO()
    np.savez(file, **table.to_arrays(), about=np.array(json.dumps(table.about)))
    atomic.write_file(path, file.getvalue())


def _load_npz(path: Path) -> FeatureTable:
    with path.open("rb") as file, np.load(file) as arrays:
        return _from_arrays(dict(arrays), json.loads(str(arrays["about"])))


# ------------------------------------------------------------------ Parquet


def _save_parquet(path: atomic.OutputPath, table: FeatureTable) -> None:
    import pyarrow
    from pyarrow import parquet

    feature = pyarrow.array(np.ascontiguousarray(table.features).reshape(-1))
    for size in table.features.shape[:0:-1]:  # the innermost axis first
        feature = pyarrow.FixedSizeListArray.from_arrays(feature, size)
    names = [table.label_names[c] if c != NO_LABEL else None for c in table.labels.tolist()]
    columns = {
        "id": pyarrow.array(table.ids, pyarrow.string()),
        "label": table.labels.astype(np.int32),
        "class": pyarrow.array(names, pyarrow.string()),
        "padded": table.padded,
    }
    if table.starts is not None:
        columns |= {"start": table.starts, "end": table.ends}
    metadata = {"about": json.dumps(table.about), "label_names": json.dumps(table.label_names)}
    rows = pyarrow.table(columns | {"feature": feature}).replace_schema_metadata(metadata)
    file = io.BytesIO()
    parquet.write_table(rows, file)
    atomic.write_file(path, file.getvalue())


def _load_parquet(path: Path) -> FeatureTable:
    import pyarrow
    from pyarrow import parquet

    with path.open("rb") as file:
        rows = parquet.read_table(file)
    feature, shape = rows["feature"].combine_chunks(), [len(rows)]
    while pyarrow.types.is_fixed_size_list(feature.type):
        shape.append(feature.type.list_size)
        feature = feature.flatten()
    has_windows = "start" in rows.column_names
    return FeatureTable(
        features=feature.to_numpy().reshape(shape),
        ids=rows["id"].to_pylist(),
        labels=rows["label"].to_numpy(),
        label_names=json.loads(rows.schema.metadata[b"label_names"]),
        padded=rows["padded"].to_numpy(),
        starts=rows["start"].to_numpy() if has_windows else None,
        ends=rows["end"].to_numpy() if has_windows else None,
        about=json.loads(rows.schema.metadata[b"about"]),
    )


# ------------------------------------------------------------------ Zarr


def _save_zarr(path: atomic.OutputPath, table: FeatureTable) -> None:
    if not isinstance(path, Path):
        with tempfile.TemporaryDirectory() as folder:
            _save_local_zarr(Path(folder) / path.name, table)
            remote_folder.replace(str(path), Path(folder) / path.name, ZARR_MARK)
        return
    _save_local_zarr(path, table)


def _save_local_zarr(path: Path, table: FeatureTable) -> None:
    import zarr

    path = Path(os.path.realpath(path))
    partial = atomic.staging_dir(path)
    atomic.recover(path, ZARR_MARK)
    try:
        group = zarr.create_group(str(partial), attributes={"about": table.about})
        for name, values in table.to_arrays().items():
            row_bytes = max(1, values.nbytes // max(1, len(values)))
            rows = max(1, min(len(values), CHUNK_BYTES // row_bytes))
            dtype = "str" if values.dtype.kind == "U" else values.dtype
            chunks = (rows, *values.shape[1:])
            array = group.create_array(name, shape=values.shape, chunks=chunks, dtype=dtype)
            array[...] = values.astype(object) if dtype == "str" else values
        atomic.commit(path, ZARR_MARK)
    except OSError as error:
        reason = error.strerror or os.strerror(error.errno or errno.EIO)
        raise InputError(
            f"{path} cannot be written ({reason}); choose another file or free disk space"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        atomic.recover(path, ZARR_MARK)


def _load_zarr(path: Path) -> FeatureTable:
    import zarr

    group = zarr.open_group(str(atomic.resolve(path, ZARR_MARK)), mode="r")
    arrays = {name: array[...] for name, array in group.arrays()}
    return _from_arrays(arrays, dict(group.attrs["about"]))


# Suffix of the file name → its format.
FORMATS = {
    ".npz": Format("", _save_npz, _load_npz),
    ".parquet": Format("pyarrow", _save_parquet, _load_parquet),
    ".zarr": Format("zarr", _save_zarr, _load_zarr),
}
