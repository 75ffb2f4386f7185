"""Attention rollout of networks with known attention: heat maps, bars and output files."""

import dataclasses
import math
import os
import shutil

import av
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import jaxvid
from jaxvid import visualize
from jaxvid.data.clips.clip import ClipSpec
from jaxvid.inference.attention_rollout import AttentionRollout, roll_out
from jaxvid.inference.clip_frames import find_crop_box
from jaxvid.models import merge_params, split_params
from jaxvid.visualize import BAR, BAR_HEIGHT, SHEET_PANEL, draw_frame, draw_sheet

FRAME, ROW, COLUMN = 5, 1, 2  # bright patch: frame of the clip, and position in 4 × 4 patches
PREPROCESSING = {"num_frames": 8, "crop": 64, "short_side": 72, "mean": 0.0, "std": 1.0}
# Height and width of the upright video, rotation tag in degrees, and resize.
GEOMETRIES = [
    ((144, 288), None, "pil_bilinear"),
    ((288, 144), None, "pil_bilinear"),
    ((288, 144), -90, "pil_bilinear"),
    ((144, 288), 90, "torch_bilinear"),
    ((150, 202), 180, "torch_bilinear"),
]


def compute_rollout(video, folder, **options) -> AttentionRollout:
    """Compute the attention rollout of a video with a newly loaded model."""
    return jaxvid.Classifier(folder).attention(video, **options)


def bright_box(size: tuple[int, int]) -> list[int]:
    """Return top, left, bottom and right of the bright patch, in pixels of the uncropped frame."""
    scale = min(size) / PREPROCESSING["short_side"]
    corners = []
    for i in (0, 1):
        for length, patch in zip(size, (ROW, COLUMN), strict=True):
            crop = (length / scale - PREPROCESSING["crop"]) / 2  # offset in the resized frame
            corners.append(round((crop + 16 * (patch + i)) * scale))
    return corners


def write_video(path, size, turn=None):
    """Write 17 dark frames at 4 fps, one with a bright patch; clips sample every second frame.

    Args:
        path: The file.
        size: Height and width of the upright video.
        turn: Rotation tag in degrees, or None.
    """
    frames = np.full((17, *size, 3), 40, np.uint8)
    top, left, bottom, right = bright_box(size)
    frames[2 * FRAME + 1, top:bottom, left:right] = 255
    coded = np.rot90(frames, {None: 0, -90: 1, 90: -1, 180: 2}[turn], axes=(1, 2))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=4)
        stream.height, stream.width = coded.shape[1:3]
        stream.pix_fmt, stream.options = "yuv420p", {"qp": "8"}
        stream.codec_context.thread_count = 1
        if turn:
            stream.set_display_rotation(turn)
        for frame in coded:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def seeker():
    """Return a STAM that attends to the brightest patch and to the frame that contains it.

    Channel 0 is the brightness of a patch, channel 1 is always 1. The only head of the only block
    compares keys from channel 0 with a constant query, and copies channel 0 to channel 2 of the
    class token, from which the aggregator computes its keys.
    """
    model = jaxvid.create_model(
        "stam_tiny",
        width=16,
        depth=1,
        heads=1,
        temporal_depth=1,
        temporal_heads=1,
        temporal_mlp=16,
    )
    graphdef, params = split_params(model)
    params = {
        name: jnp.ones_like(leaf) if name.endswith("scale") else jnp.zeros_like(leaf)
        for name, leaf in params.items()
    }

    def set_weight(name, index, value):
        params[name] = params[name].at[index].set(value)

    set_weight("patch_embed.proj.kernel", (..., 0), 1 / (16 * 16 * 3))
    set_weight("patch_embed.proj.bias", 1, 1.0)
    set_weight("cls_token", (0, 0, 1), 1.0)
    set_weight("blocks.0.attn.qkv.bias", (0, 0), 26.0)  # queries
    set_weight("blocks.0.attn.qkv.kernel", (0, 1, 0), 1.0)  # keys
    set_weight("blocks.0.attn.qkv.kernel", (0, 2, 2), 1.0)  # values
    set_weight("blocks.0.attn.proj.kernel", (2, 2), 1.0)
    layer = "aggregate.transformer_enc.layers.0.self_attn"
    set_weight(f"{layer}.in_proj_bias", (0, 0), 26.0)
    set_weight(f"{layer}.in_proj_weight", (2, 1, 0), 1.0)
    return merge_params(graphdef, params)


@pytest.fixture(scope="module")
def seeker_folder(seeker, tmp_path_factory):
    folder = tmp_path_factory.mktemp("seeker") / "model"
    labels = ["a rather long name of a class", *"bcdefgh"]
    jaxvid.save_model(seeker, folder, preprocessing=PREPROCESSING, labels=labels)
    return folder


def is_lit(picture) -> np.ndarray:
    """Return a mask of the pixels with the colour of strong heat."""
    pixels = np.asarray(picture).astype(int)
    return pixels[..., 0] - pixels[..., 2] > 70


def box_of(mask: np.ndarray) -> list[int]:
    """Return top, left, bottom and right of a mask, which must be a filled rectangle."""
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    box = [rows[0], columns[0], rows[-1] + 1, columns[-1] + 1]
    assert mask[box[0] : box[2], box[1] : box[3]].mean() > 0.98
    return [int(edge) for edge in box]


@pytest.mark.parametrize(("size", "turn", "resize"), GEOMETRIES)
def test_heat_map_covers_the_bright_patch(seeker, tmp_path, size, turn, resize):
    jaxvid.save_model(seeker, tmp_path / "model", preprocessing={**PREPROCESSING, "resize": resize})
    rollout = compute_rollout(write_video(tmp_path / "clip.mp4", size, turn), tmp_path / "model")
    assert rollout.frames.shape == (8, *size, 3)
    np.testing.assert_array_equal(rollout.indices, range(1, 17, 2))
    np.testing.assert_allclose(rollout.times, rollout.indices / 4)
    assert rollout.patch_attention.shape == (8, 4, 4)
    np.testing.assert_allclose(rollout.patch_attention.sum((1, 2)), 1, rtol=1e-5)
    assert rollout.patch_attention[FRAME, ROW, COLUMN] > 0.99
    other_frames = np.delete(rollout.patch_attention, FRAME, axis=0)
    np.testing.assert_allclose(other_frames, 1 / 16, atol=0.01)  # compression leaves some noise
    assert rollout.frame_attention[FRAME] > 0.99
    assert rollout.frame_attention.sum() == pytest.approx(1)
    for t in range(8):
        panel = draw_frame(rollout, t, size[::-1])
        assert panel.size == size[::-1]
        if t != FRAME:
            assert not is_lit(panel).any()
            continue
        lit_box, expected = box_of(is_lit(panel)), bright_box(size)
        # Exact unless the size of a patch is not a whole number of pixels.
        assert np.abs(np.subtract(lit_box, expected)).max() <= (size == (150, 202))


@pytest.mark.parametrize(("size", "turn"), [geometry[:2] for geometry in GEOMETRIES[:3]])
def test_crop_is_outlined_and_the_rest_darkened(seeker_folder, tmp_path, size, turn):
    rollout = compute_rollout(write_video(tmp_path / "clip.mp4", size, turn), seeker_folder)
    plain, heated = (
        np.asarray(draw_frame(rollout, 0, size[::-1], heat=heat)) for heat in (False, True)
    )
    expected = np.zeros(size, bool)  # the crop covers 128 of 144 pixels of the short side
    top, left = ((length - 128) // 2 for length in size)
    expected[top - 1 : top + 129, left - 1 : left + 129] = True
    expected[top : top + 128, left : left + 128] = False
    for picture in (plain, heated):
        np.testing.assert_array_equal((picture > 200).all(-1), expected)
    assert abs(plain[0, 0].astype(int) - 40).max() < 6
    assert abs(heated[0, 0] - 16.0).max() < 6
    assert abs(heated[top, left] - 40.0).max() < 12


@pytest.mark.parametrize(("resize", "width"), [("pil_bilinear", 1952), ("torch_bilinear", 1951)])
def test_crop_box_follows_the_rounding_of_each_resize(resize, width):
    """549 / 63 · 224 is 1952, but torch_bilinear computes 1951 in floating point."""
    spec = ClipSpec(num_frames=8, crop=224, short_side=224, resize=resize)
    left, right = math.ceil((width - 224) / 2) / width, math.ceil((width + 224) / 2) / width
    assert find_crop_box(63, 549, spec) == pytest.approx((0, left, 1, right), abs=1e-9)
    assert find_crop_box(549, 63, spec) == pytest.approx((left, 0, right, 1), abs=1e-9)


def test_contact_sheet_shows_heat_and_bars(seeker_folder, tmp_path):
    clip = write_video(tmp_path / "clip.mp4", (144, 288))
    arguments = [str(clip), "--model", str(seeker_folder), "--output", str(tmp_path / "sheet.PNG")]
    assert visualize.main(arguments) == 0
    with Image.open(tmp_path / "sheet.PNG") as picture:
        pixels = np.asarray(picture)
    top, left, bottom, right = box_of(is_lit(pixels))
    scale = SHEET_PANEL[0] / 288  # the patch is 32 pixels wide in the video
    assert abs(bottom - top - 32 * scale) < 1.5
    assert abs(right - left - 32 * scale) < 1.5
    dark = np.flatnonzero((pixels[top - 2] < 60).all(-1))  # a row of pixels above the heat
    starts = dark[np.diff(dark, prepend=-9) > 7]  # after the gaps between frames
    assert len(starts) == 8
    assert abs(left - starts[FRAME] - bright_box((144, 288))[1] * scale) < 1.5
    bars = (pixels == [int(BAR[i : i + 2], 16) for i in (1, 3, 5)]).all(-1)
    heights = [int(bars[:, start + 20].sum()) for start in starts]
    assert heights[FRAME] >= BAR_HEIGHT - 1  # the line that marks a uniform share covers one pixel
    assert max(np.delete(heights, FRAME)) <= 1


def test_slide_show_shows_heat_beside_the_frame(seeker_folder, tmp_path):
    clip = write_video(tmp_path / "clip.mp4", (288, 144), -90)
    output = tmp_path / "12:30.mp4"
    visualize.visualize(clip, seeker_folder, output)
    with av.open(f"file:{output}") as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == 2  # the rate of the sampled frames
        assert stream.width % 2 == stream.height % 2 == 0
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 8
    expected = visualize.draw_slide(compute_rollout(clip, seeker_folder), FRAME)
    assert frames[FRAME].shape == np.asarray(expected).shape
    for t, frame in enumerate(frames):
        lit = is_lit(frame)
        lit[:100] = False  # text
        assert lit.any() == (t == FRAME)
    top, left, bottom, right = box_of(is_lit(expected))
    # The frame without heat has the bright patch at the same position. It is 180 px wide and to the
    # left of the frame with heat, with a gap of 8 px between them.
    beside = np.asarray(expected)[top:bottom, left - 180 - 8 : right - 180 - 8]
    assert (beside[1:-1, 1:-1] > 240).mean() > 0.98
    assert abs(int(frames[FRAME][top + 9, left + 9, 0]) - 245) < 15


def test_rollout_equals_naive_computation():
    rng = np.random.default_rng(0)
    blocks, t, k, n, extra = 3, 2, 4, 5, 2
    weights = rng.dirichlet(np.full(n + extra, 0.3), (blocks, t, k, n))  # (blocks t k n m)
    shares = roll_out(jnp.asarray(weights, jnp.float32))
    assert shares.shape == (t, n - 1)
    for frame in range(t):
        product = np.eye(n)
        for block in range(blocks):
            attention = sum(weights[block, frame, head] for head in range(k)) / k
            attention = attention[:, :n]
            for row in range(n):
                attention[row] /= attention[row].sum()
            layer = 0.5 * attention + 0.5 * np.eye(n)
            for row in range(n):
                layer[row] /= layer[row].sum()
            product = layer @ product
        expected = product[0, 1:] / product[0, 1:].sum()
        np.testing.assert_allclose(shares[frame], expected, rtol=1e-5)
    # The class token attends only to itself: the patches have equal shares.
    identity = jnp.broadcast_to(jnp.eye(n), (blocks, k, n, n))
    np.testing.assert_allclose(roll_out(identity), np.full(n - 1, 1 / (n - 1)))


@pytest.mark.parametrize(
    ("name", "options", "mixes_frames"),
    [
        ("xvit_tiny", {"head_depth": 2, "summary_tokens": True}, True),
        ("xvit_tiny", {"head": "mean", "shift": "none"}, False),
        ("stam_tiny", {"aggregator": "mean"}, False),
    ],
)
def test_rollout_of_every_architecture(motion_folder, tmp_path, name, options, mixes_frames):
    model = jaxvid.create_model(name, width=16, depth=1, **options)
    preprocessing = {**PREPROCESSING, "mean": [0.1, 0.2, 0.3]}
    jaxvid.save_model(model, tmp_path / "model", preprocessing=preprocessing)
    rollout = compute_rollout(motion_folder / "val" / "00003.mp4", tmp_path / "model")
    assert rollout.patch_attention.shape == (8, 4, 4)
    assert np.isfinite(rollout.patch_attention).all()
    assert rollout.frame_attention.sum() == pytest.approx(1)
    if "mean" in options.values():
        np.testing.assert_array_equal(rollout.frame_attention, np.full(8, 1 / 8))
        assert "averages its frames" in rollout.notes[0]
    else:
        assert np.ptp(rollout.frame_attention) > 0
        assert "attention to each frame" in rollout.notes[0]
    assert ("approximate in time" in rollout.notes[-1]) == mixes_frames
    shares = [share for _, share in rollout.top]
    assert len(shares) == 3
    assert shares == sorted(shares, reverse=True)


def test_clip_option_selects_the_clip(seeker_folder, motion_folder):
    video = motion_folder / "val" / "00003.mp4"
    middles, starts = (compute_rollout(video, seeker_folder, clip=clip).indices for clip in (0, 1))
    np.testing.assert_array_equal(starts, np.arange(8) * 2)
    np.testing.assert_array_equal(middles, starts + 1)


def test_long_texts_are_wrapped(seeker_folder, motion_folder):
    rollout = compute_rollout(motion_folder / "val" / "00003.mp4", seeker_folder)
    short = draw_sheet(rollout)
    long = draw_sheet(dataclasses.replace(rollout, name=" ".join(["Wgj" * 40, "long " * 40])))
    assert long.width == short.width
    assert long.height > short.height + 40
    assert (np.asarray(long)[:, -visualize.GAP :] == 255).all()
    accents = {visualize._draw_text(letter, 15, "#000000", 60).tobytes() for letter in "eéèêñüßж"}
    assert len(accents) == 8  # not the box of a missing glyph
    for width in (60, 200, 480):
        ink = (
            np.asarray(visualize._draw_text("WWW gjq " * 9 + "W" * 99, 15, "#000000", width)) < 128
        )
        assert not ink[-1].any()
        assert not ink[:, -1].any()
        wide = (
            np.asarray(visualize._draw_text("WWW gjq " * 9 + "W" * 99, 15, "#000000", 9999)) < 128
        )
        assert ink.sum() == pytest.approx(wide.sum(), rel=0.02)


def test_file_names_with_invalid_utf8_are_accepted(seeker_folder, motion_folder, tmp_path, capsys):
    video, output = (
        os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9." + end) for end in (b"mp4", b"png")
    )
    shutil.copy(motion_folder / "val" / "00003.mp4", video)
    assert visualize.main([video, "--model", str(seeker_folder), "--output", output]) == 0
    assert capsys.readouterr().out.endswith("caf\ufffd.png\n")
    assert os.path.getsize(output) > 1000


def test_bad_input_gives_one_line_error(seeker, seeker_folder, motion_folder, tmp_path, capsys):
    clip, output = motion_folder / "val" / "00003.mp4", tmp_path / "out.png"
    text = tmp_path / "text.mp4"
    text.write_text("hello")
    (tmp_path / "folder.mp4").mkdir()
    jaxvid.save_model(seeker, tmp_path / "bare")
    graphdef, params = split_params(seeker)
    params = {**params, "head.bias": params["head.bias"] + jnp.nan}
    broken = merge_params(graphdef, params)
    jaxvid.save_model(broken, tmp_path / "broken", preprocessing=PREPROCESSING)
    jaxvid.save_model(seeker, tmp_path / "one", preprocessing=PREPROCESSING, labels=["one"])
    jaxvid.save_model(seeker, tmp_path / "newer", preprocessing={**PREPROCESSING, "gears": 5})
    jaxvid.save_model(seeker, tmp_path / "older", preprocessing={"crop": 64, "short_side": 72})
    cases = [
        (tmp_path / "no.mp4", seeker_folder, output, [], "no.mp4 does not exist"),
        (text, seeker_folder, output, [], "text.mp4: cannot be decoded"),
        (clip, tmp_path / "no", output, [], "no does not exist"),
        (clip, tmp_path / "bare", output, [], "preprocessing is missing; export the model again"),
        (clip, tmp_path / "broken", output, [], "not finite"),
        (clip, tmp_path / "one", output, [], "one/model.json: labels has 1 entries, expected num_"),
        (clip, tmp_path / "newer", output, [], "has the unknown field 'gears'"),
        (clip, tmp_path / "older", output, [], "preprocessing has no num_frames; export"),
        (clip, seeker_folder, tmp_path / "out.gif", [], "suffix must be .png or .mp4"),
        (
            clip,
            seeker_folder,
            tmp_path / "no" / "out.png",
            [],
            "no is not a folder; create it or choose",
        ),
        (clip, seeker_folder, tmp_path / "folder.mp4", [], "cannot be written"),
        (text, seeker_folder, text, [], "text.mp4 is the video itself; choose another"),
        (clip, seeker_folder, output, ["--clip", "3"], "clip=3: must be 0 to 2"),
        (
            clip,
            seeker_folder,
            output,
            ["--clip=3", "--num_clips=5"],
            "must be 1 to 3 with sampling",
        ),
    ]
    for video, folder, path, more, message in cases:
        code = visualize.main([str(video), "--model", str(folder), "--output", str(path), *more])
        errors = capsys.readouterr().err.splitlines()
        assert (code, len(errors)) == (2, 1), errors
        assert message in errors[0]
        assert errors[0].startswith("error: ")
    assert not output.exists()
