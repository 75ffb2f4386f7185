"""Loading of the models on the command line of the server."""

import itertools
from collections.abc import Sequence
from pathlib import Path

from jaxvid.inference.classifier import Classifier
from jaxvid.inference.onnx_export import cached_onnx
from jaxvid.model_path import OF_A_RUN
from jaxvid.models import make_model_config
from jaxvid.serving.engine import Engine, JaxEngine, OnnxEngine
from jaxvid.serving.served_model import ModelDescription, ServedModel
from jaxvid.storage import exported_file
from jaxvid.storage.model_card import load_card
from jaxvid.storage.onnx_network import OnnxNetwork
from jaxvid.storage.preprocessing import read_preprocessing
from jaxvid.weights.resolve import resolve_model


def load_models(names: Sequence[str], dtype: str, engine_name: str = "jax") -> list[ServedModel]:
    """Load the models on the command line.

    Args:
        names: Model folders, or other names of models; see `resolve_model`.
        dtype: Compute dtype; see `Classifier`.
        engine_name: One of `parsers.ENGINES`. `onnxruntime` computes predictions with a float32
            export of the model. ONNX files always use it.

    Raises:
        InputError: A model cannot be loaded or exported.
    """
    models = []
    for name in names:
        short = _short_name(name, [model.name for model in models])
        if name.endswith(".onnx"):
            models.append(_load_onnx(short, Path(name)))
            continue
        folder = resolve_model(name)
        card, classifier = load_card(folder), Classifier(folder, dtype=dtype)
        engine: Engine = JaxEngine(classifier.network, classifier.spec)
        if engine_name == "onnxruntime":
            network = OnnxNetwork(cached_onnx(folder), name)
            engine = OnnxEngine(network, card["activation"], engine)
        description = ModelDescription(
            classifier.labels, classifier.config, classifier.preprocessing
        )
        models.append(ServedModel(short, card, description, engine))
    return models


def _load_onnx(name: str, path: Path) -> ServedModel:
    """Load an exported ONNX file, which can only classify, under a name for requests.

    Raises:
        InputError: The file or its description is missing or damaged.
    """
    network, about = exported_file.open_onnx(path)
    about = about | {"name": about["model"]}
    description = ModelDescription(
        labels=about["labels"],
        config=make_model_config(**about["config"]),
        preprocessing=read_preprocessing(about, path.with_name(f"{path.name}.json")),
    )
    return ServedModel(name, about, description, OnnxEngine(network, about["activation"]))


def _short_name(name: str, taken: Sequence[str]) -> str:
    """Return the name of a model in requests: that of its run, otherwise of its folder or file.

    Args:
        name: The model on the command line, e.g. `runs/motion/model`.
        taken: Names of other models.
    """
    path = Path(name.rstrip("/")).absolute() if "://" not in name else Path(name)
    short = path.stem if path.suffix in (".pth", ".npz", ".safetensors", ".onnx") else path.name
    if short in OF_A_RUN and path.parent.name:
        short = path.parent.name if short == "model" else f"{path.parent.name}-{short}"
    numbered = (f"{short}-{i}" for i in itertools.count(2))
    return next(n for n in itertools.chain([short], numbered) if n not in taken)
