"""Fine-tuning of a converted or trained model on your own videos, on one GPU.

    python main.py --config configs/finetune.py:MODEL,DATA_FOLDER --workdir runs/mine

MODEL is a model folder, or the name of released weights, e.g. `xvit_k600` (`jaxvid models`).
DATA_FOLDER contains `train/CLASS/*.mp4` and `val/CLASS/*.mp4`, or `train.csv` and `val.csv` (one
`path,class name` per line), or a pack written by `jaxvid prepare`. If it contains only
`CLASS/*.mp4` or `train.csv`, or is a single list of all videos, a fifth of the videos is used for
validation (`data.val_share`). The network, its preprocessing and evaluation views come from the
model folder, the classes from the data.

The recipe is AdamW with layer-wise learning-rate decay (Bao et al., "BEiT", arXiv:2106.08254).
Batch size, epochs, warm-up and the intervals of logging, evaluation and checkpoints are chosen from
the number of training videos. Fields that are set on the command line keep their values. For 160
videos or more, the batch size is 8, for 20 epochs. The accuracy depends on your classes. The recipe
has not been run on a released model. To save memory, set `--config.accumulate_steps=4`,
`--config.model.remat=full`, or `--config.optimizer.freeze=backbone`, which is also faster.
"""

import os
from pathlib import Path

from ml_collections import ConfigDict

from configs import common


def get_config(folders: str = "") -> ConfigDict:
    """Return the config.

    Args:
        folders: `MODEL,DATA_FOLDER`, or `MODEL,LIST`.
    """
    from jaxvid.data.sources import guess_source, has_validation
    from jaxvid.remote import local_path
    from jaxvid.storage.model_card import load_card
    from jaxvid.storage.preprocessing import read_preprocessing
    from jaxvid.weights.resolve import resolve_model

    model, _, data = folders.partition(",")
    if not (model and data):
        raise ValueError(
            "configs/finetune.py: expected a model and a data folder; use "
            "--config configs/finetune.py:MODEL,DATA_FOLDER"
        )
    folder = resolve_model(model, isolated=True)
    card = load_card(folder)
    preprocessing = read_preprocessing(card, Path(folder) / "model.json")
    path = local_path(data)
    source, num_classes = guess_source(path)

    fields = card["config"] | {"num_classes": num_classes, "dtype": "bfloat16", "drop_path": 0.1}
    config = common.default_config(fields.pop("name"), **fields)
    config.init_from = model
    # -1: chosen from the number of training videos; see jaxvid/training/schedule_choice.py.
    config.batch_size = -1
    config.num_epochs = -1.0
    config.optimizer.warmup_epochs = -1.0
    config.log_steps = -1
    config.eval.every_epochs = -1.0
    config.checkpoint_every_epochs = -1.0
    config.label_smoothing = 0.1

    config.eval.batch_size = 8
    fields = preprocessing.to_json()
    for section in (config.data, config.eval):
        section.update({name: value for name, value in fields.items() if name in section})
    config.data.source = source
    if path.is_file():
        config.data.folder, config.data.list = os.path.dirname(data) or ".", data
    else:
        config.data.folder = data
    config.data.val_share = 0.0 if has_validation(path, source) else 0.2
    config.data.num_threads = 8
    config.data.flip_prob = 0.5
    # Random crops need a larger frame, even if evaluation crops are as large as the frame.
    config.data.short_side = max(preprocessing.short_side, round(preprocessing.crop * 8 / 7))
    config.data.short_side_max = round(1.25 * config.data.short_side)

    config.optimizer.learning_rate = 1e-3
    config.optimizer.reference_batch_size = 256
    config.optimizer.weight_decay = 0.05
    config.optimizer.clip_norm = 1.0
    config.optimizer.layer_decay = 0.75
    return config.lock()
