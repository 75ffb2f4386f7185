"""The network that extracts features, and the options of the extraction."""

import dataclasses
from pathlib import Path

from flax import nnx
from jax.sharding import Mesh

from jaxvid.distributed import collectives
from jaxvid.errors import InputError, check_option
from jaxvid.inference.feature_extraction import LAYERS, FeatureProtocol
from jaxvid.models import ModelConfig, Params, make_model_config
from jaxvid.storage import model_card, model_folder
from jaxvid.storage.preprocessing import check_fit, read_preprocessing
from jaxvid.weights.resolve import resolve_model


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureOptions:
    """Options of the extraction.

    Attributes:
        layer: `video` for one vector per video or window, or `frames` for one vector per frame of
            the clip.
        num_clips: Clips per video; None: from the model card. With windows, it must be None.
        num_crops: Crops per clip, 1 or 3; None: from the model card.
        dtype: Compute dtype, one of `precision.DTYPES`.
        window: Length of a window in seconds. None: features of whole videos.
        stride: Time between the starts of consecutive windows in seconds; None without windows.
        batch_size: Videos or windows per batch, over all devices; None: 8 views per device.

    Raises:
        InputError: Options are out of range or cannot be combined.
    """

    layer: str = "video"
    num_clips: int | None = None
    num_crops: int | None = None
    dtype: str = "float32"
    window: float | None = None
    stride: float | None = None
    batch_size: int | None = None

    def __post_init__(self):
        check_option("--layer", self.layer, LAYERS)
        if self.window is None and self.stride is not None:
            raise InputError("--stride needs --window SECONDS")
        if self.window is not None and self.stride is None:
            raise InputError("--window needs --stride SECONDS, the time between starts of windows")
        if self.window is not None and self.num_clips is not None:
            raise InputError("--clips cannot be combined with --window: every window is one clip")
        for name in ("window", "stride"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise InputError(f"--{name}={value:g}: must be a number of seconds above 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network:
    """The network of a model folder, and which features it computes.

    Attributes:
        name: Name of the model in its card.
        config: The model config.
        graphdef: The network's structure.
        params: The weights, on all devices.
        sha256: SHA-256 of the weights.
        protocol: Which features are extracted.
    """

    name: str
    config: ModelConfig
    graphdef: nnx.GraphDef
    params: Params
    sha256: str
    protocol: FeatureProtocol


def load_network(folder: str | Path, options: FeatureOptions, mesh: Mesh) -> Network:
    """Load a model folder; all processes must call it.

    Raises:
        InputError: The folder is unusable, or the number of views is invalid.
    """
    folder = collectives.raise_on_all_processes(resolve_model, folder)
    card = model_card.load_card(folder)
    path = Path(folder) / model_card.CARD_NAME
    preprocessing = read_preprocessing(card, path)
    num_clips = options.num_clips if options.window is None else 1
    preprocessing = preprocessing.with_views(num_clips, options.num_crops)
    config = make_model_config(**card["config"] | {"dtype": options.dtype})
    graphdef, abstract_params = model_folder.abstract_sharded_model(config, mesh)
    check_fit(graphdef, abstract_params, preprocessing, path)
    params = model_folder.load_params(folder, abstract_params)
    return Network(
        name=card["name"],
        config=config,
        graphdef=graphdef,
        params=params,
        sha256=model_folder.fingerprint(params),
        protocol=FeatureProtocol(
            preprocessing=preprocessing,
            layer=options.layer,
            dtype=options.dtype,
            window=options.window,
            stride=options.stride,
        ),
    )
