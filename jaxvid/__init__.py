"""jaxvid: video transformers in JAX.

model = jaxvid.load_model("FOLDER")       # or "stam_16"; create_model("xvit_tiny") for new weights
logits = model(video)                     # normalised float (b t h w c) → (b, num_classes)
transform = jaxvid.make_transform(model)  # uint8 frames (t h w c) → normalised clips (v t h w c)
print(jaxvid.Classifier("FOLDER")("clip.mp4"))
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxvid.client import Client
    from jaxvid.inference.classifier import Classifier
    from jaxvid.inference.results import Prediction
    from jaxvid.inference.transform import make_transform
    from jaxvid.model_list import list_models
    from jaxvid.models import create_model
    from jaxvid.storage.model_folder import save_model
    from jaxvid.weights.hub import push_to_hub
    from jaxvid.weights.resolve import load_model

__version__ = "0.1.0"
# Public name → module that defines it.
_MODULES = {
    "Classifier": "inference.classifier",
    "Client": "client",
    "Prediction": "inference.results",
    "create_model": "models",
    "list_models": "model_list",
    "load_model": "weights.resolve",
    "make_transform": "inference.transform",
    "push_to_hub": "weights.hub",
    "save_model": "storage.model_folder",
}
__all__ = [
    "Classifier",
    "Client",
    "Prediction",
    "__version__",
    "create_model",
    "list_models",
    "load_model",
    "make_transform",
    "push_to_hub",
    "save_model",
]


def __getattr__(name: str) -> Any:
    # Import on first use: decoding workers and `--help` import this package, but do not need JAX.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
