"""Videos of one colour each, and a stub network whose predictions for them are known."""

import csv
import json

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxvid.data.synthetic_motion import write_clip
from jaxvid.models import make_model_config, split_params
from jaxvid.storage import model_card, model_folder

# (RGB colour, label) of each video. The stub predicts the label of every video in RIGHT, and a
# different class for every video in WRONG.
RIGHT = [((200, 30, 30), 0), ((30, 200, 30), 1), ((30, 30, 200), 2)] * 4 + [((90, 90, 90), 3)]
WRONG = [((200, 150, 30), 1), ((150, 30, 200), 0), ((30, 30, 30), 2)] * 2
VIDEOS = RIGHT + WRONG
NAMES = ["red", "green", "blue", "grey"]
PREPROCESSING = {"sampling": "segments", "sampling_rate": 16, "mean": 0.0, "std": 1.0}


class ColourStub(nnx.Module):
    """Returns the mean of each colour channel as the logits of three classes.

    The logit of the fourth class is 0.5 plus a bias.
    """

    def __init__(self):
        self.bias = nnx.Param(jnp.zeros(()))

    def __call__(self, video, *, key=None):
        means = video.mean(axis=(1, 2, 3))  # (b c)
        return jnp.concatenate([means, jnp.full((len(video), 1), 0.5) + self.bias[...]], axis=1)


def abstract_stub(_):
    """Return the graphdef and shapes of the stub, in place of `models.abstract_model`."""
    graphdef, params = split_params(ColourStub())
    return graphdef, jax.eval_shape(lambda: params)


def save_stub(folder, bias=0.0, labels_source=None, **config):
    """Save a model folder with the config of a real network and the stub's only weight."""
    card = model_card.make_card(
        make_model_config(**config),
        preprocessing=PREPROCESSING,
        labels=NAMES,
        labels_source=labels_source,
        provenance={},
    )
    model_folder.save_model_folder(folder, {"bias": jnp.full((), bias)}, card)


def make_coloured_videos(folder):
    """Write 19 videos of one colour each (the second is shorter than a clip) and a broken video.

    All 20 are listed in `val.csv`, the broken one at index 7. Return the folder.
    """
    lines = []
    for i, (colour, label) in enumerate(VIDEOS):
        frames = np.full((4 if i == 1 else 12, 36, 48, 3), colour, np.uint8)
        write_clip(folder / f"{i}.mp4", frames)
        lines.append(f"{i}.mp4 {label}")
    (folder / "broken.mp4").write_text("no video")
    lines.insert(7, "broken.mp4 2")
    (folder / "val.csv").write_text("\n".join(lines) + "\n")
    (folder / "train.csv").write_text(lines[0] + "\n")
    (folder / "labels.txt").write_text("".join(f"{name}\n" for name in NAMES))
    return folder


def check_outputs(workdir):
    """Check the outputs of an evaluation of the stub on all 20 videos."""
    report = json.loads((workdir / "eval.json").read_text())
    assert (report["top1"], report["top5"]) == (100 * len(RIGHT) / 20, 95)
    counts = [report[f"num_{name}"] for name in ("videos", "evaluated", "padded", "failed")]
    assert counts == [20, 19, 1, 1]
    assert [round(report["class_accuracy"][name], 2) for name in NAMES] == [
        66.67,
        66.67,
        57.14,
        100,
    ]
    assert report["confusion"] == [[4, 0, 2, 0], [2, 4, 0, 0], [0, 0, 4, 2], [0, 0, 0, 1]]
    with (workdir / "eval_videos.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    expected = [predicted_name(colour) for colour, _ in VIDEOS]
    expected.insert(7, "")
    assert [row["prediction"] for row in rows] == expected
    assert [row["padded"] for row in rows] == ["1" if i == 1 else "0" for i in range(20)]


def predicted_name(colour):
    """Return the class that the stub predicts for a colour."""
    return NAMES[int(np.argmax([*colour, 127.5]))]
