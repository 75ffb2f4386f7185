"""Fine-tunes a converted or trained model folder on videos of your own, on one GPU.

    python main.py --config configs/finetune.py:MODEL_FOLDER,DATA_FOLDER --workdir runs/mine

DATA_FOLDER holds `train.csv` and `val.csv` (a line a video: `path label`) with `labels.txt`, or
`train/CLASS/*.mp4` and `val/CLASS/*.mp4`, or a pack that `jaxvid.data.prepare` wrote. The network,
how frames are sampled and normalised, the views that it is tested on and the number of classes are
read from the two folders.

Made for about a thousand clips: lower blocks learn more slowly (layer-wise decay, as in Bao et al.,
"BEiT", arXiv:2106.08254), 20 epochs, AdamW. Expected accuracy: that depends on your classes; not
run on a released model. For less memory: `--config.accumulate_steps=4`,
`--config.model.remat=true`, or `--config.optimizer.freeze=backbone`, which is also faster.
"""

from pathlib import Path

from ml_collections import ConfigDict

from configs import common


def get_config(folders: str = "") -> ConfigDict:
    """The config.

    Args:
        folders: `MODEL_FOLDER,DATA_FOLDER`.
    """
    from jaxvid.data.sources import guess_source
    from jaxvid.storage.model_card import load_card
    from jaxvid.storage.preprocessing import read_preprocessing

    start, _, folder = folders.partition(",")
    if not (start and folder):
        raise ValueError(
            "configs/finetune.py: name --config configs/finetune.py:MODEL,DATA folders"
        )
    card = load_card(start)
    how = read_preprocessing(card, Path(start) / "model.json")
    source, num_classes = guess_source(Path(folder))
    config = common.train_section(
        batch_size=8, num_epochs=20.0, init_from=start, label_smoothing=0.1
    )
    fields = {"num_classes": num_classes, "dtype": "bfloat16", "drop_path": 0.1}
    config.model = common.model_section(**{**card["config"], **fields})
    config.data = common.data_section(source=source, folder=folder, flip=0.5, num_threads=8)
    config.eval = common.eval_section(batch_size=8)
    for section in (config.data, config.eval):
        section.update({name: value for name, value in how.items() if name in section})
    # Random crops need room, also where a test crop is as large as its frame.
    config.data.short_side = max(how["short_side"], round(how["crop"] * 8 / 7))
    config.data.short_side_max = round(1.25 * config.data.short_side)
    config.optimizer.update(
        learning_rate=1e-3,
        reference_batch_size=256,
        warmup_epochs=2.0,
        weight_decay=0.05,
        clip_norm=1.0,
        layer_decay=0.75,
    )
    config.log_steps = 20
    return config.lock()
