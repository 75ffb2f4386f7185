"""Write a miniature of ucf101 with TFDS's own builder, which needs TensorFlow.

    python tests/data/write_ucf101_with_tfds.py DATA_DIR

The videos are text files with a number; `make_frames` replaces their decoding with ffmpeg.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import tensorflow_datasets as tfds

from tests.data.tfds_ucf101 import class_names, make_frames, to_jpeg

VIDEOS = {"train": [(0, 0), (1, 2)], "test": [(2, 100)]}  # `(number, label)`


class LocalFiles:
    """A download manager whose files exist already."""

    downloaded_size = 0

    def __init__(self, folder: Path):
        self._folder = folder

    def download_and_extract(self, urls: dict[str, str]) -> dict[str, str]:
        """Return the folders of the videos and the lists."""
        return dict.fromkeys(urls, str(self._folder))


def main(data_dir: Path) -> None:
    """Write the videos, the lists and the data set."""
    source = data_dir / "source"
    for folder in ("UCF101", "ucfTrainTestlist"):
        (source / folder).mkdir(parents=True)
    for split, videos in VIDEOS.items():
        names = [f"{class_names()[label]}/v_{number}.avi" for number, label in videos]
        (source / "ucfTrainTestlist" / f"{split}list01.txt").write_text("\n".join(names))
        for number, _ in videos:
            (source / "UCF101" / f"v_{number}.avi").write_text(str(number))

    def decode(self, path):
        return [to_jpeg(frame) for frame in make_frames(int(Path(path).read_text()))]

    tfds.features.Video._ffmpeg_decode = decode
    builder = tfds.builder("ucf101:2.0.0", data_dir=data_dir, file_format="array_record")
    builder._make_download_manager = lambda **_: LocalFiles(source)
    builder.download_and_prepare()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
