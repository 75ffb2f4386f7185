"""Says what a video shows: python -m jaxvid.predict VIDEO... --model FOLDER."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from jaxvid import model_folder, sharding, steps
from jaxvid.data.decode import DecodeError
from jaxvid.data.pipeline import ClipSpec, load_eval_views
from jaxvid.errors import InputError


def predict(videos: Sequence[str | Path], folder: str | Path, *, top_k: int = 5) -> Iterator[dict]:
    """Classifies videos with the network of a model folder, one after the other.

    Args:
        videos: Files.
        folder: The model folder.
        top_k: How many classes to name.

    Yields:
        For each video `{"video", "top": [{"label", "probability"}, ...]}`, most likely first; for
        one that cannot be decoded `{"video", "error"}`.

    Raises:
        InputError: The model folder is unusable or `top_k` is no positive number.
    """
    if top_k < 1:
        raise InputError(f"--top_k={top_k}: must be at least 1")
    sharding.use_compilation_cache()
    card = model_folder.load_card(folder)
    how = card["preprocessing"]
    if not how:
        raise InputError(f"{folder}: model.json says nothing of preprocessing; export it again")
    spec = ClipSpec(**{name: how[name] for name in how if name not in ("mean", "std")})
    model = model_folder.load_model(folder)
    labels = card["labels"] or [str(i) for i in range(model.config.num_classes)]
    classify = jax.jit(lambda clip: jax.nn.softmax(model(clip)))
    for video in videos:
        try:
            views = load_eval_views(video, spec)["video"]
        except DecodeError as error:
            yield {"video": str(video), "error": str(error)}
            continue
        probabilities = np.asarray(classify(steps.normalize(views, how["mean"], how["std"])))[0]
        top = np.argsort(-probabilities)[:top_k]
        yield {
            "video": str(video),
            "top": [{"label": labels[i], "probability": float(probabilities[i])} for i in top],
        }


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0, or 2 if some input was unusable."""
    parser = argparse.ArgumentParser(prog="python -m jaxvid.predict", description=__doc__)
    parser.add_argument("videos", nargs="+", metavar="VIDEO")
    parser.add_argument("--model", required=True, metavar="FOLDER", help="a model folder")
    parser.add_argument("--top_k", type=int, default=5, help="classes to name (default 5)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args(argv)
    failed = 0
    try:
        for result in predict(args.videos, args.model, top_k=args.top_k):
            failed += "error" in result
            if args.json:
                print(json.dumps(result, ensure_ascii=False), flush=True)
            elif "error" in result:
                print(f"error: {result['error']}", file=sys.stderr)
            else:
                print(result["video"])
                for entry in result["top"]:
                    print(f"  {100 * entry['probability']:5.1f} %  {entry['label']}", flush=True)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return InputError.EXIT_CODE
    return InputError.EXIT_CODE if failed else 0


if __name__ == "__main__":
    sys.exit(main())
