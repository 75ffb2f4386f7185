"""TFDS builder of packs, for users of `tfds build` and `tfds.data_source`.

A data set is a subclass:

    from jaxvid.data.tfds_builder import PackBuilder

    class MyVideos(PackBuilder):
        VERSION = "1.0.0"
        INPUTS = ("/data/my_videos",)

`MyVideos(data_dir=DIR).download_and_prepare()` writes the same bytes as
`jaxvid prepare --input /data/my_videos`. With a `beam_runner` or `beam_options` in TFDS's
`DownloadConfig`, workers of Apache Beam do the work.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any, ClassVar

from jaxvid.data.beam import BeamRunner
from jaxvid.data.formats.pack_index import LABEL_FILE
from jaxvid.data.formats.pack_writer import Settings
from jaxvid.data.formats.tfds_api import NAME, import_tfds, make_features, read_metadata
from jaxvid.data.gather import gather
from jaxvid.data.prepare import prepare
from jaxvid.data.validation_split import ValidationSplit
from jaxvid.errors import InputError

tfds = import_tfds()


@dataclasses.dataclass(frozen=True)
class _ConfiguredRunner(BeamRunner):
    """The runner of a `DownloadConfig`.

    Attributes:
        runner: A runner, its name, or None for the one in the options.
        pipeline_options: `PipelineOptions`, or None.
    """

    runner: Any = None
    pipeline_options: Any = None

    def __post_init__(self):
        pass  # TFDS accepts any runner

    def make_pipeline(self) -> Any:
        """Return an empty `beam.Pipeline`."""
        import apache_beam

        return apache_beam.Pipeline(runner=self.runner, options=self.pipeline_options)


class PackBuilder(tfds.core.DatasetBuilder, skip_registration=True):
    """Base class of TFDS data sets that are packs of jaxvid.

    Attributes:
        INPUTS: Lists and folders as in `jaxvid prepare --input`: class folders, lists, or official
            annotation files of Kinetics or Something-Something.
        PREFIX: Folder that paths in lists are relative to; empty: the list's folder.
        SETTINGS: Settings of the pack; the format must be `arrayrecord`.
        SPLIT: Division of the videos into training and validation.
        DESCRIPTION: Text for TFDS's metadata.

    Raises:
        InputError: The inputs are missing or malformed.
    """

    INPUTS: ClassVar[tuple[str, ...]] = ()
    PREFIX: ClassVar[str] = ""
    SETTINGS: ClassVar[Settings] = Settings()
    SPLIT: ClassVar[ValidationSplit] = ValidationSplit()
    DESCRIPTION: ClassVar[str] = "Videos as JPEG frames, packed by jaxvid."

    def _info(self) -> Any:
        """Return TFDS's metadata; the class names are those of the pack, if it exists."""
        path = Path(self.data_dir) / LABEL_FILE
        if path.is_file():
            labels = path.read_text(encoding="utf-8").splitlines()
        else:
            _, labels = gather(self.INPUTS, self.PREFIX)
        info = tfds.core.DatasetInfo(
            builder=self,
            description=self.DESCRIPTION,
            features=make_features(labels),
            disable_shuffling=True,
        )
        info.set_file_format("array_record")
        return info

    def _download_and_prepare(self, dl_manager: Any, download_config: Any = None) -> None:
        """Write the pack into the folder of the data set. TFDS then writes its metadata.

        Raises:
            InputError: As in `prepare`.
        """
        if self.SETTINGS.format != "arrayrecord":
            raise InputError(f"SETTINGS.format={self.SETTINGS.format}: must be 'arrayrecord'")
        workers = os.cpu_count() or 1
        if download_config and (download_config.beam_runner or download_config.beam_options):
            config = download_config
            workers = _ConfiguredRunner(
                name=str(config.beam_runner or "the runner of beam_options"),
                runner=config.beam_runner,
                pipeline_options=config.beam_options,
            )
        folder = Path(self.data_dir)
        prepare(
            self.INPUTS,
            folder,
            self.SETTINGS,
            workers=workers,
            prefix=self.PREFIX,
            split=self.SPLIT,
        )
        self.info.set_splits(tfds.core.splits.SplitDict(self._split_infos(folder)))

    def _split_infos(self, folder: Path) -> list[Any]:
        """Return TFDS's metadata of the splits of a pack. The names of its files are kept."""
        infos = []
        for split in read_metadata(str(folder), "train").splits:
            ranges = read_metadata(str(folder), split).ranges
            template = tfds.core.ShardedFileTemplate(
                dataset_name=self.name,
                data_dir=folder,
                split=split,
                filetype_suffix="array_record",
                template=f"{NAME}-{{SPLIT}}.{{FILEFORMAT}}-{{SHARD_X_OF_Y}}",
            )
            infos.append(
                tfds.core.SplitInfo(
                    name=split,
                    shard_lengths=[part.length for part in ranges],
                    num_bytes=sum(os.path.getsize(part.path) for part in ranges),
                    filename_template=template,
                )
            )
        return infos

    def _as_dataset(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse `tf.data`, which cannot read ArrayRecord files."""
        raise NotImplementedError("read the data set with tfds.data_source")
