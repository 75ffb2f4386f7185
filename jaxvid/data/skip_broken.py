"""Selection of the training videos that can be read, for `data.skip_broken`."""

from collections.abc import Sequence

from jaxvid.data.file_checks import find_missing
from jaxvid.data.formats.pack_reader import PackRecords
from jaxvid.data.protocols import VideoRecord
from jaxvid.data.records import Selection, files_of
from jaxvid.errors import InputError


def leave_out_broken(
    records: Sequence[VideoRecord], folder: str
) -> tuple[Sequence[VideoRecord], tuple[str, ...]]:
    """Leave out videos that are known to be missing or broken, without opening any video.

    Returns:
        The remaining videos, in order, and the ids of those that are left out.

    Raises:
        InputError: No video is left.
    """
    if isinstance(records, PackRecords):
        broken = set(records.find_broken())
    else:
        broken = {i for i, _ in find_missing(files_of(records))}
    if not broken:
        return records, ()
    remaining = [i for i in range(len(records)) if i not in broken]
    if not remaining:
        raise InputError(
            f"{folder}: all {len(broken)} training videos are missing or broken; check the paths "
            "and the files"
        )
    return Selection(records, remaining), tuple(records[i].id for i in sorted(broken))
