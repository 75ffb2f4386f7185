"""The evaluation protocol: how many views, and how their scores are combined."""

from jaxvid.config import check_names
from jaxvid.data.clips.clip import make_spec
from jaxvid.distributed import sharding
from jaxvid.errors import InputError

SCORES = {
    "logits": "sum of logits over the views",
    "probabilities": "mean of probabilities over the views",
}
DTYPES = ("float32", "bfloat16")


def check_protocol(config, mesh) -> None:
    """Refuses views, sizes or a batch that cannot be evaluated, before anything else is done.

    Args:
        config: A whole config.
        mesh: Cuts the batches.

    Raises:
        InputError: Names the field and what is possible.
    """
    check_names(config.to_dict())
    sharding.check_batch_size("eval.batch_size", config.eval.batch_size, mesh)
    make_spec(config, num_clips=config.eval.num_clips, num_crops=config.eval.num_crops)
    if config.eval.score not in SCORES:
        known = " and ".join(map(repr, SCORES))
        raise InputError(f"eval.score={config.eval.score!r}: there are {known}")
    if config.eval.dtype not in DTYPES:
        known = " and ".join(map(repr, DTYPES))
        raise InputError(f"eval.dtype={config.eval.dtype!r}: there are {known}")
    if config.eval.every_epochs <= 0:
        raise InputError(f"eval.every_epochs={config.eval.every_epochs}: must be above 0")
