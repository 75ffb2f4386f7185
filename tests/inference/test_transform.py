"""The preprocessing of a model as a function."""

import json

import jax
import numpy as np
import pytest

import jaxvid
from jaxvid.data.formats.video_reader import VideoFile
from jaxvid.errors import InputError
from jaxvid.models import merge_params, split_params
from jaxvid.storage.model_card import load_card


def test_the_model_and_its_transform_equal_the_classifier(folders, clips):
    views = {"num_clips": 2, "num_crops": 3}
    folder = folders / "xvit"
    model = jaxvid.load_model(folder)
    with VideoFile(clips[3]) as reader:
        frames = reader.get_frames(range(reader.num_frames))
    classifier = jaxvid.Classifier(folder, **views)
    expected = classifier(clips[3], top_k=8)
    results = []
    for source in (model, folder, str(folder), classifier):
        transform = jaxvid.make_transform(source, **({} if source is classifier else views))
        results.append(transform(frames))
    assert results[0].shape == (6, 8, 64, 64, 3)
    assert jaxvid.make_transform(model)(frames).shape == (1, 8, 64, 64, 3)
    assert results[0].dtype == np.float32
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])
    np.testing.assert_array_equal(transform(clips[3]), results[0])
    probabilities = jax.nn.softmax(jax.jit(model)(results[0]).mean(axis=0))
    order = np.argsort(-probabilities)
    assert tuple(order.tolist()) == expected.indices
    np.testing.assert_allclose(probabilities[order], expected.probabilities, rtol=1e-4)


def test_frame_rate_of_an_array(folders, clips):
    transform = jaxvid.make_transform(folders / "stam")
    with VideoFile(clips[3]) as reader:
        frames, fps = reader.get_frames(range(reader.num_frames)), reader.fps
    np.testing.assert_array_equal(transform(frames, fps), transform(clips[3]))
    assert (transform(frames, 5) != transform(clips[3])).any()


def test_saved_networks_keep_their_preprocessing_but_not_their_class_names(folders, tmp_path):
    jaxvid.save_model(jaxvid.load_model(folders / "xvit"), tmp_path / "again")
    before, after = (load_card(folder) for folder in (folders / "xvit", tmp_path / "again"))
    assert after["preprocessing"] == before["preprocessing"]
    assert (after["labels"], after["activation"]) == (None, before["activation"])
    card = json.loads((tmp_path / "again" / "model.json").read_text())
    (tmp_path / "again" / "model.json").write_text(json.dumps(card | {"activation": "sigmoid"}))
    jaxvid.save_model(
        jaxvid.load_model(tmp_path / "again"), tmp_path / "third", labels=before["labels"]
    )
    assert load_card(tmp_path / "third")["activation"] == "sigmoid"


def test_unknown_preprocessing_is_refused(folders, tmp_path):
    model = jaxvid.load_model(folders / "xvit")
    with pytest.raises(InputError, match="does not come from load_model, .* pass its model folder"):
        jaxvid.make_transform(merge_params(*split_params(model)))
    jaxvid.save_model(merge_params(*split_params(model)), tmp_path / "bare")
    for source in (tmp_path / "bare", jaxvid.load_model(tmp_path / "bare")):
        with pytest.raises(InputError, match="preprocessing is missing; export the model again"):
            jaxvid.make_transform(source)
    with pytest.raises(InputError, match="expected a network, Classifier or model folder, got int"):
        jaxvid.make_transform(5)
    with pytest.raises(InputError, match="num_crops=2: must be one of 1, 3"):
        jaxvid.make_transform(model, num_crops=2)
