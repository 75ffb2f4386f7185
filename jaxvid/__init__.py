"""jaxvid: video transformers in JAX.

model = jaxvid.load_model("FOLDER")       # or create_model("xvit_tiny", num_classes=8)
logits = model(video)                     # normalised float (b t h w c) → (b, num_classes)
print(jaxvid.Classifier("FOLDER").predict("clip.mp4").labels[0])
"""

import importlib

_HOME = {
    "Classifier": "inference.classifier",
    "create_model": "models",
    "load_model": "storage.model_folder",
    "save_model": "storage.model_folder",
}
__all__ = ["Classifier", "create_model", "load_model", "save_model"]


def __getattr__(name: str):
    # On first use: decoding workers and `--help` import this package and need none of JAX.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
