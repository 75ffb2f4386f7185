"""jaxvid: video transformers in JAX.

model = jaxvid.load_model("FOLDER")       # or create_model("xvit_tiny", num_classes=8)
logits = model(video)                     # normalised float (b t h w c) → (b, num_classes)
print(jaxvid.Classifier("FOLDER").predict("clip.mp4").labels[0])
"""

import importlib

# Public name → module that defines it.
_MODULES = {
    "Classifier": "inference.classifier",
    "create_model": "models",
    "load_model": "storage.model_folder",
    "save_model": "storage.model_folder",
}
__all__ = ["Classifier", "create_model", "load_model", "save_model"]


def __getattr__(name: str):
    # Import on first use: decoding workers and `--help` import this package, but do not need JAX.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
