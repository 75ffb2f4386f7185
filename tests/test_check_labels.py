"""The program check_labels with real videos and a network that classifies their colours."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

import jaxvid
from jaxvid import check_labels
from jaxvid.data.clips.clip import load_eval_views
from jaxvid.data.synthetic_motion import write_clip
from jaxvid.models import split_params
from jaxvid.storage import model_card, model_folder
from jaxvid.storage.preprocessing import normalize, read_preprocessing

# Alphabetical without punctuation. The names with parentheses are first in alphabetical order.
COLOURS = {
    "blue": (30, 30, 200),
    "(dark) grey": (60, 60, 60),
    "green": (30, 200, 30),
    "red": (200, 30, 30),
    "(sand) yellow": (200, 200, 30),
    "white": (230, 230, 230),
}
NAMES = list(COLOURS)
PREPROCESSING = {"num_frames": 4, "short_side": 36, "crop": 32, "mean": 0.5, "std": 0.5}
PREPROCESSING["sampling"] = "segments"


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Return class folders with three videos per colour, and a broken one."""
    folder = tmp_path_factory.mktemp("colours")
    for name, colour in COLOURS.items():
        (folder / name).mkdir()
        for i in range(3):
            frames = np.full((6, 36, 48, 3), np.array(colour) + 5 * i, np.uint8)
            write_clip(folder / name / f"{i}.mp4", frames)
    (folder / "red" / "broken.mp4").write_text("no video")
    return folder


@pytest.fixture(scope="module")
def model(videos, tmp_path_factory):
    """Return a model folder whose outputs are in the order of `NAMES`, without class names."""
    folder = tmp_path_factory.mktemp("model") / "model"
    network = jaxvid.create_model("stam_tiny", num_classes=6, num_frames=4, image_size=32, width=32)
    jaxvid.save_model(network, folder, preprocessing=PREPROCESSING)
    spec = read_preprocessing(model_card.load_card(folder), folder).spec
    paths = [(path, i) for i, name in enumerate(NAMES) for path in videos.glob(f"{name}/?.mp4")]
    views = np.concatenate([load_eval_views(path, spec)["video"] for path, _ in paths])
    features = np.asarray(network.features(normalize(views, 0.5, 0.5))["video"])
    inputs = np.concatenate([features, np.ones((len(features), 1))], axis=1)
    targets = np.eye(6)[[label for _, label in paths]]
    weights = np.linalg.lstsq(inputs, targets, rcond=None)[0]
    network.head.kernel[...] = jnp.asarray(weights[:-1], jnp.float32)
    network.head.bias[...] = jnp.asarray(weights[-1], jnp.float32)
    jaxvid.save_model(network, folder, preprocessing=PREPROCESSING)
    return folder


def save_with_names(model, folder, names) -> str:
    """Copy a model folder and set its class names; return the new folder."""
    jaxvid.save_model(jaxvid.load_model(model), folder, preprocessing=PREPROCESSING, labels=names)
    return str(folder)


def run(capsys, *arguments) -> tuple[int, str, str]:
    """Run the program; return the exit code, stdout and stderr."""
    code = check_labels.main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def test_a_permuted_head_is_found_and_the_right_order_applied(model, videos, tmp_path, capsys):
    wrong = save_with_names(model, tmp_path / "wrong", sorted(NAMES))
    output = tmp_path / "labels.txt"
    code, out, err = run(capsys, "--model", wrong, "--videos", videos, "--output", output)
    assert code == check_labels.OTHER_ORDER
    assert f"{videos}: 18 videos of 6 classes, 1 not decoded and left out" in out
    assert "broken.mp4: cannot be decoded" in err
    assert re.search(r"100.0 %   81.5 to 100.0 %  alphabetical without punctuation", out)
    assert "The stored order is not plausible; this order fits better: alphabetical with" in out
    assert f"with --labels and {output}" in out
    assert output.read_text().splitlines() == NAMES

    right = save_with_names(model, tmp_path / "right", output.read_text().splitlines())
    code, out, _ = run(capsys, "--model", right, "--videos", videos)
    assert code == 0
    assert "The stored order is plausible" in out


def test_lists_of_names_and_orders_from_files(model, videos, tmp_path, capsys):
    rows = [f'"{path}",{path.parent.name.upper()}' for path in sorted(videos.glob("*/?.mp4"))]
    (tmp_path / "list.csv").write_text("path,label\n" + "\n".join(rows) + "\n")
    (tmp_path / "names.json").write_text(str(NAMES).replace("'", '"'))
    flags = ["--videos", tmp_path / "list.csv", "--labels", tmp_path / "names.json"]
    code, out, err = run(capsys, "--model", model, *flags)  # the model has no names
    assert (code, err) == (check_labels.OTHER_ORDER, "")
    assert f"the best order is: alphabetical without punctuation = {tmp_path}/names.json" in out
    reversed_model = save_with_names(model, tmp_path / "m", NAMES[::-1])
    code, out, _ = run(capsys, "--model", reversed_model, *flags, "--max_videos", 5)
    assert code == check_labels.OTHER_ORDER  # the stored order has no hits
    assert "5 videos of 5 classes" in out
    code, out, _ = run(capsys, "--model", reversed_model, *flags, "--max_videos", 2)
    assert code == check_labels.UNDECIDED
    assert "Nothing can be concluded" in out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a.mp4,rad", r"'rad' is not a class of the model; did you mean 'red'\?"),
        ("a.mp4,7", "classes have numbers instead of names"),
        ("a.mp4,red,blue", "list.csv:1: 'a.mp4,red,blue' is not 'path label'"),
        ("a.mp4,red\na.mp4,blue", "list.csv:2: 'a.mp4' is already in line 1"),
        ("a.mp4,red", "no video can be decoded"),
        ("path,label", "list.csv is empty"),
    ],
)
def test_bad_lists_are_refused_in_one_line(model, tmp_path, line, message, capsys):
    named = save_with_names(model, tmp_path / "m", NAMES)
    (tmp_path / "list.csv").write_text(f"{line}\n")
    code, _, err = run(capsys, "--model", named, "--videos", tmp_path / "list.csv")
    assert code == 2
    assert re.search(f"^error: .*{message}", err.splitlines()[-1])


def test_bad_options_are_refused(model, videos, tmp_path, capsys):
    for flags, message in (
        ([], "the model card has no class names; pass 6 names with --labels FILE"),
        (["--max_videos", 0], "--max_videos=0: must be at least 1"),
        (["--output", tmp_path / "a.json"], "must end in .txt"),
        (["--labels", tmp_path / "none.txt"], "does not exist; choose a file of class names"),
    ):
        code, _, err = run(capsys, "--model", model, "--videos", videos, *flags)
        assert code == 2
        assert message in err
        assert len(err.splitlines()) == 1


def test_predictions_warn_once_about_an_assumed_order(model, tmp_path, capsys):
    network = jaxvid.load_model(model)
    card = model_card.make_card(
        network.config,
        preprocessing=PREPROCESSING,
        labels=NAMES,
        labels_source="assumed: alphabetical",
        provenance={},
    )
    model_folder.save_model_folder(tmp_path / "m", split_params(network)[1], card)
    for _ in range(2):
        jaxvid.Classifier(tmp_path / "m")
    err = capsys.readouterr().err
    assert err.count("the order of the class names is assumed (alphabetical); check it") == 1
