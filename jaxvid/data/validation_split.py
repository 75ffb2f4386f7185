"""Division of labelled videos into training and validation by a hash of their ids."""

import dataclasses
import hashlib
import re
import unicodedata
from collections.abc import Sequence

from jaxvid.data.protocols import VideoRecord
from jaxvid.data.records import VideoFiles, ids_of
from jaxvid.errors import InputError, short_repr


@dataclasses.dataclass(frozen=True)
class ValidationSplit:
    """A share of the videos that is set aside for validation.

    A video's split depends only on its id, `share` and `group`. It is the same on every machine,
    and adding or removing videos does not move any other video.

    Attributes:
        share: Expected share of the validation videos, from 0 (off) to below 1.
        group: Regular expression that is searched in the ids; empty: none. Videos with the same
            captured groups, or the same match if nothing is captured, are in the same split.

    Raises:
        InputError: `share` is out of range, `group` is not a regular expression, or `group` is set
            without a share.
    """

    share: float = 0.0
    group: str = ""

    def __post_init__(self):
        if not 0 <= self.share < 1:
            raise InputError(f"val_share={self.share}: must be at least 0 and below 1")
        if self.group and not self.share:
            raise InputError(f"group={self.group!r}: has no effect without val_share; set it too")
        try:
            re.compile(self.group)
        except re.error as error:
            raise InputError(
                f"group={short_repr(self.group)}: is not a regular expression: {error}; correct it"
            ) from None

    def divide(
        self, videos: Sequence[VideoRecord], source: object
    ) -> tuple[dict[str, Sequence[VideoRecord]], str]:
        """Divide videos into training and validation, in their order.

        Args:
            videos: The videos of all classes.
            source: Their list or folder, for messages.

        Returns:
            `train` and `val` → their videos; and one line that describes the split.

        Raises:
            InputError: `group` does not match an id, or one of the splits would be empty.
        """
        keys = [self._key(id_) for id_ in ids_of(videos)]
        is_val = {key: _hash(key) < self.share for key in set(keys)}
        indices = {"train": [], "val": []}
        for i, key in enumerate(keys):
            indices["val" if is_val[key] else "train"].append(i)
        is_table = isinstance(videos, VideoFiles)
        records = {
            split: videos.select(chosen) if is_table else [videos[i] for i in chosen]
            for split, chosen in indices.items()
        }
        plural = "s" if len(is_val) > 1 else ""
        groups = f" in {len(is_val)} group{plural}" if self.group else ""
        for split, name in (("train", "training"), ("val", "validation")):
            if not records[split]:
                raise InputError(
                    f"{source}: with val_share={self.share:g}, none of the {len(videos)} videos"
                    f"{groups} is a {name} video; change val_share, or write a list for each split"
                )
        num_val = len(records["val"])
        return records, (
            f"{source}: val_share={self.share:g} selects {num_val} of {len(videos)} videos{groups} "
            f"for validation ({100 * num_val / len(videos):.1f} %)"
        )

    def _key(self, id_: str) -> str:
        """Return the text whose hash selects the split of a video.

        Raises:
            InputError: `group` does not match the id.
        """
        if not self.group:
            return id_
        match = re.search(self.group, id_)
        if match is None:
            raise InputError(
                f"group={self.group!r}: does not match {id_!r}; correct the expression"
            )
        captured = [text or "" for text in match.groups()]
        return "\0".join(captured) if any(captured) else match[0]


def _hash(key: str) -> float:
    """Return a number in [0, 1) that is uniformly distributed over the keys.

    The key is normalised first, because some file systems decompose accented letters.
    """
    data = unicodedata.normalize("NFC", key).encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(data, digest_size=6).digest(), "big") / 2**48
