"""Mapping of training and validation to the splits of a TFDS data set."""

from collections.abc import Mapping, Sequence

from jaxvid.data.formats.tfds_api import RECREATE, read_metadata
from jaxvid.errors import InputError

# Split of jaxvid → the TFDS splits that are used if `data.splits` does not choose one.
DEFAULTS = {"train": ("train",), "val": ("val", "validation", "test")}


def find_splits(
    folder: str, chosen: Mapping[str, str], splits: Sequence[str]
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Choose the TFDS splits or slices of a data set.

    Args:
        folder: Folder of the TFDS data set.
        chosen: Split (`train`, `val`) → TFDS split or slice; empty: the first of `DEFAULTS` that
            exists.
        splits: Names of the splits to choose.

    Returns:
        Split → TFDS split or slice; and a note if the videos of `test` are used for validation.

    Raises:
        InputError: There is no default split, or the metadata is missing or damaged.
    """
    names, notes = {}, ()
    known = read_metadata(folder, "train", RECREATE).splits
    for split in splits:
        names[split] = chosen.get(split, "")
        if names[split]:
            continue
        defaults = [name for name in DEFAULTS.get(split, (split,)) if name in known]
        if not defaults:
            raise InputError(
                f"{folder}: has no split {split!r}, only {known}; choose one, or a slice of one, "
                f"as in --config.data.splits.{split}='train[90%:]'"
            )
        names[split] = defaults[0]
        if (split, defaults[0]) == ("val", "test"):
            notes = ("data.splits.val is not set: validation uses the split 'test'",)
    return names, notes
