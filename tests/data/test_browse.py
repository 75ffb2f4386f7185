"""The contact sheet shows training clips and every evaluation view."""

import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from jaxvid.data import prepare
from jaxvid.data.clip_sheet import make_rows
from jaxvid.data.formats.pack_writer import Settings
from tests.conftest import shrunk_config

ROOT = Path(__file__).parents[2]


def test_the_sheet_has_training_clips_and_all_evaluation_views(motion_folder):
    config = shrunk_config(motion_folder).unlock()
    config.eval.update({"num_clips": 2, "num_crops": 3})
    config.data.flip_prob = 0.5
    rows = make_rows(config.lock(), 2)
    titles = [title for title, _, _ in rows]
    assert len(rows) == 2 + 2 * 6
    assert titles[0].startswith("train: train/00000.mp4, ")
    assert titles[2].startswith("val: val/00000.mp4, ")
    assert titles[7].endswith("view 5")
    assert all(clip.shape == (8, 64, 64, 3) and len(indices) == 8 for _, clip, indices in rows)
    views = rows[2:8]  # of the first validation video: 2 clips of 3 crops each
    _, _, first_clip_indices = views[0]
    _, _, second_clip_indices = views[3]
    assert (first_clip_indices != second_clip_indices).any()
    _, first_crop, _ = views[0]
    _, second_crop, _ = views[1]
    assert (first_crop != second_crop).any()


def test_uint16_views_are_drawn_as_uint8(motion_folder):
    config = shrunk_config(motion_folder).unlock()
    titles, views = [], []
    for resize in ("pil_bilinear", "torch_bilinear"):
        config.data.resize, config.eval.short_side = resize, 64
        _, (title, view, _) = make_rows(config, 1)  # a training clip and an evaluation view
        titles.append(title)
        views.append(view)
    assert titles[0] == titles[1]
    assert all(view.dtype == np.uint8 for view in views)
    assert 0 < abs(views[0].astype(int) - views[1]).mean() < 3  # the resizing differs slightly


def test_browse_command(motion_folder, tmp_path):
    # A pack, because the library that reads it logs lines at level INFO.
    prepare.prepare([motion_folder], tmp_path / "pack", Settings(), workers=2)
    command = [sys.executable, "-m", "jaxvid.data.browse", "--config", "configs/motion.py"]
    data = ["--config.data.source=pack", f"--config.data.folder={tmp_path / 'pack'}"]
    sheet = tmp_path / "new" / "sheet.png"
    result = subprocess.run(
        [*command, *data, "--output", str(sheet), "--count", "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"{sheet}: 2 clips\n"
    with Image.open(sheet) as picture:
        assert picture.size > (500, 300)
    result = subprocess.run([*command, *data], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (
        2,
        "error: --output FILE.png is needed; see --help\n",
    )
