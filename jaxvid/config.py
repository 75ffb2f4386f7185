"""Config fields: flat names, renamed fields and values, and differences between two configs."""

from collections.abc import Iterable, Mapping

from jaxvid.errors import InputError

# Value of a field that training chooses from the number of videos.
CHOSEN = -1

# Old name → new name. Configs with an old name are refused. Names in the config.json, model.json
# and eval.json of older versions are translated.
RENAMED_FIELDS = {
    "mixup": "mixup_alpha",
    "cutmix": "cutmix_alpha",
    "erase": "erase_prob",
    "data.flip": "data.flip_prob",
}
RENAMED_VALUES = {
    "sampling": {"rate": "uniform_10s", "dense": "dense_stride"},
    "resize": {"antialiased": "pil_bilinear", "bilinear": "torch_bilinear"},
    "remat": {False: "dots", True: "full", "false": "dots", "true": "full"},
}


def check_names(config: Mapping) -> None:
    """Refuse a config with fields or values that were renamed.

    Raises:
        InputError: The message contains the old and the new name.
    """
    for name, value in flatten(config).items():
        if name in RENAMED_FIELDS:
            raise InputError(f"{name}: was renamed to {RENAMED_FIELDS[name]}")
        renamed = RENAMED_VALUES.get(name.rpartition(".")[2], {})
        if isinstance(value, str | bool) and value in renamed:
            raise InputError(f"{name}={value!r}: was renamed to {renamed[value]!r}")


def translate(values: Mapping) -> dict:
    """Replace old names and values in a flat config, preprocessing or protocol of an older file."""
    translated = {}
    for name, value in values.items():
        renamed = RENAMED_VALUES.get(name.rpartition(".")[2], {})
        is_old = isinstance(value, str | bool) and value in renamed
        translated[RENAMED_FIELDS.get(name, name)] = renamed[value] if is_old else value
    return translated


def flatten(tree: Mapping, prefix: str = "") -> dict:
    """Return a nested mapping as a flat dict with dotted names. Tuples become lists."""
    flat = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    return flat


def differences(
    before: Mapping, after: Mapping, *, there: str, here: str, ignore: Iterable[str] = ()
) -> dict[str, str]:
    """Compare two flat configs field by field.

    Args:
        before: The first flat config.
        after: The second flat config.
        there: Origin of `before`, for the messages, e.g. `in FOLDER`.
        here: Origin of `after`, for the messages, e.g. `in the config`.
        ignore: Names of fields that may differ.

    Returns:
        Name → message, e.g. `NAME: VALUE in FOLDER, VALUE in the config`, for each field that
        differs or is missing in one of the configs.
    """
    names = sorted({*before, *after} - {*ignore})
    return {
        name: f"{name}: {_show(before, name)} {there}, {_show(after, name)} {here}"
        for name in names
        if (name in before, before.get(name)) != (name in after, after.get(name))
    }


def _show(values: Mapping, name: str) -> str:
    return repr(values[name]) if name in values else "missing"
