"""Videos as JPEG frames in HDF5 files, as the original XViT program packs them."""

import dataclasses
import os
import re
from pathlib import Path

import numpy as np

from jaxvid.data.decode import DecodeError
from jaxvid.data.lists import check_records, note_line, read_lines, split_line
from jaxvid.data.packs import JpegFrames, import_or_explain
from jaxvid.errors import InputError, one_line


@dataclasses.dataclass(frozen=True)
class H5Record:
    """A labelled video in an HDF5 file.

    Attributes:
        path: The file.
        label: Its class.
        id: Its name in the list.
        key: Of its data set in the file; None: the file's first.
        fps: Frames a second; None: unknown.
    """

    path: Path
    label: int
    id: str
    key: str | None = None
    fps: float | None = None

    def open(self) -> JpegFrames:
        """Opens the video.

        Raises:
            DecodeError: The file is missing or damaged, the key not in it, or it holds no frame.
        """
        h5py = import_or_explain("h5py", "h5py")
        try:
            # Many file systems have no locks, and what is only read needs none.
            file = h5py.File(self.path, "r", locking=False)
        except FileNotFoundError:
            raise DecodeError(f"{self.path} does not exist; restore it") from None
        except OSError as error:
            raise DecodeError(f"{self.path}: cannot be read ({one_line(error)})") from None
        try:
            key = next(iter(file), None) if self.key is None else self.key
            frames = file[key] if key is not None and key in file else None
            if not isinstance(frames, h5py.Dataset) or not frames.shape:
                what = "no data set" if self.key is None else f"no data set {self.key!r}"
                raise DecodeError(f"{self.path}: {what} in it; make the file again")
            if not len(frames):
                raise DecodeError(f"{self.path}: no frame in it; leave the video out")

            def get(i: int) -> bytes:
                jpeg = frames[i]  # an array of bytes, or a string of them
                return jpeg.tobytes() if hasattr(jpeg, "tobytes") else jpeg

            return JpegFrames(str(self.path), len(frames), self.fps, get, file.close)
        except (OSError, RuntimeError, KeyError) as error:
            file.close()
            raise DecodeError(f"{self.path}: cannot be read ({one_line(error)})") from None
        except BaseException:
            file.close()
            raise


def write_h5(path: Path, key: str, jpegs: list[bytes]) -> None:
    """Writes a video as one data set of JPEG byte strings, the same bytes each time."""
    h5py = import_or_explain("h5py", "h5py")
    # In memory first: HDF5 crashes the process where a disk is full.
    with h5py.File(path.name, "w", driver="core", backing_store=False) as file:
        frames = np.empty(len(jpegs), object)
        frames[:] = [np.frombuffer(jpeg, np.uint8) for jpeg in jpegs]
        file.create_dataset(key, data=frames, dtype=h5py.vlen_dtype(np.uint8))
        file.flush()
        path.write_bytes(file.id.get_file_image())


def read_xvit_list(
    folder: Path, split: str, num_classes: int | None, missing: str = "error"
) -> list[H5Record]:
    """Reads XViT's packing of Kinetics or of Something-Something, told apart by their lists.

    Kinetics: `annotations/SPLIT.txt` with `name,num_frames,label`, frames in
    `seq_h5/SPLIT/NAME.h5` or `SPLIT/NAME.h5`; `annotations/SPLIT_fps.txt` is optional.
    Something-Something: `SPLIT_videofolder.txt` with `name num_frames label`, frames in
    `seq_h5/NAME.h5` under NAME, or all in `Something-Something-v2-frames.h5`. As in the original,
    `test` is `val` where it has no list of its own.

    Raises:
        InputError: As `read_list`, and for a name that leads out of the folder.
    """
    found = [
        (path, name)
        for name in dict.fromkeys((split, "val" if split == "test" else split))
        for path in (
            folder / "annotations" / f"{name}.txt",
            folder / f"{name}_videofolder.txt",
        )
        if path.is_file()
    ]
    if not found:
        raise InputError(
            f"{folder}: neither annotations/{split}.txt nor {split}_videofolder.txt is in it"
        )
    path, split = found[0]
    kinetics = path.parent != folder
    packed = folder / "seq_h5" / split if kinetics else folder / "seq_h5"
    if kinetics and not packed.is_dir():
        packed = folder / split
    single = folder / "Something-Something-v2-frames.h5"
    rates = _read_rates(folder, split) if kinetics else {}
    records, lines = [], {}
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        match = re.fullmatch(r"\s*(.+?)(?:\s*,\s*|\s+)(\d+)(?:\s*,\s*|\s+)(\d+)\s*", line, re.ASCII)
        if not match:
            raise InputError(f"{path}:{number}: {line!r} is not 'name,num_frames,label'")
        name, label = match[1], int(match[3])
        if num_classes is not None and label >= num_classes:
            raise InputError(
                f"{path}:{number}: label {label} is out of range: model.num_classes={num_classes} "
                f"allows 0 to {num_classes - 1}; correct the line or the config"
            )
        if os.path.isabs(name) or ".." in Path(name).parts:
            raise InputError(f"{path}:{number}: {name!r} leads out of {packed}; correct the line")
        note_line(path, lines, name, number)
        if kinetics:
            file, key = packed / f"{name}.h5", None
        else:
            file, key = (single if single.is_file() else packed / f"{name}.h5"), name
        records.append(H5Record(file, label, name, key, rates.get(name)))
    return check_records(path, records, list(lines.values()), missing)


def _read_rates(folder: Path, split: str) -> dict[str, float]:
    """Name → frames a second; the original looks for the file in `annotation`."""
    for place in ("annotations", "annotation"):
        path = folder / place / f"{split}_fps.txt"
        if path.is_file():
            break
    else:
        return {}
    rates = {}
    for number, line in enumerate(read_lines(path), start=1):
        name, rate = split_line(line)
        try:
            rates[name] = float(rate) or None
        except ValueError:
            raise InputError(f"{path}:{number}: {line!r} is not 'name,fps'") from None
    return rates
