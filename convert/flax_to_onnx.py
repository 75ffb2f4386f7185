"""Make an ONNX model of a network, through the PyTorch reference: `jaxvid export --format onnx`.

PyTorch's exporter was chosen because its graphs are simpler: that of a tiny STAM has about 200
nodes, in which a layer norm is one operator. jax2onnx 0.17 makes 685 nodes, fails on XViT, and
cannot be installed with the versions of Orbax that jaxvid needs.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

import onnx
import torch
from torch import nn

from jaxvid.models import ModelConfig, Params
from jaxvid.storage.preprocessing import Preprocessing, clip_shape

from .flax_to_torch import to_state_dict
from .torch_reference import ImageViT, build_reference

# The oldest version in which GELU is one operator. Read by ONNX Runtime since 1.17 and by TensorRT
# since 10.0.
OPSET = 20
ACTIVATIONS = {"softmax": lambda logits: logits.softmax(dim=-1), "sigmoid": torch.sigmoid}


class Program(nn.Module):
    """A network with its activation: pixels `(b t h w c)` uint8 → logits and probabilities.

    Args:
        network: The PyTorch reference of the network, which takes pixels from 0 to 255.
        activation: Function from logits to probabilities, a key of `ACTIVATIONS`.
    """

    def __init__(self, network: nn.Module, activation: str):
        """Store the arguments."""
        super().__init__()
        self.network, self.activation = network, ACTIVATIONS[activation]

    def forward(self, clips: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits and probabilities, both `(b, num_classes)`."""
        logits = self.network(clips.float())
        return logits, self.activation(logits)


def fold_normalization(patches: nn.Conv2d, preprocessing: Preprocessing) -> None:
    """Change a patch embedding so that it takes pixels from 0 to 255 instead of normalised ones.

    Engines normalise pixels `(..., c)` slowly: in ONNX Runtime, it took more than half of the time
    of a tiny network.
    """
    mean, std = (
        torch.tensor(value, dtype=torch.float64).expand(3).reshape(1, 3, 1, 1)
        for value in (preprocessing.mean, preprocessing.std)
    )
    weight, bias = patches.weight.data.double(), patches.bias.data.double()  # (d c p p), (d)
    patches.bias.data = (bias - (weight * mean / std).sum((1, 2, 3))).float()
    patches.weight.data = (weight / (255 * std)).float()


def make_onnx(
    config: ModelConfig, params: Params, preprocessing: Preprocessing, activation: str
) -> onnx.ModelProto:
    """Return a float32 ONNX model of a network, its normalisation and its activation.

    Args:
        config: The network's config.
        params: Its weights.
        preprocessing: Defines the shape of clips, and `mean` and `std`.
        activation: Function from logits to probabilities, a key of `ACTIVATIONS`.

    Returns:
        A model with the input `clips` `(b, t, h, w, c)` uint8, for any b, and the outputs `logits`
        and `probabilities`, both `(b, num_classes)` float32.

    Raises:
        InputError: The family has no PyTorch reference.
    """
    network = build_reference(config)
    network.load_state_dict(to_state_dict(params, config), strict=True)
    for module in network.modules():
        if isinstance(module, ImageViT):
            module.last_queries = 1
            fold_normalization(module.patch_embed.proj, preprocessing)
    program = Program(network, activation).eval()
    # A batch of one clip would be exported as a fixed batch size.
    clips = torch.zeros(clip_shape(preprocessing.spec, 2), dtype=torch.uint8)
    with _quiet():
        exported = torch.onnx.export(
            program,
            (clips,),
            input_names=["clips"],
            output_names=["logits", "probabilities"],
            opset_version=OPSET,
            dynamic_shapes=({0: torch.export.Dim("b")},),
            dynamo=True,
            verbose=False,
        )
    model = exported.model_proto
    model.producer_name, model.producer_version = "jaxvid", ""
    for node in model.graph.node:  # names of Python functions and source lines
        del node.metadata_props[:]
    del model.graph.value_info[:]
    onnx.checker.check_model(model)
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the progress, warnings and logs of PyTorch's exporter; failures are raised."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
