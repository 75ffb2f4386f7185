"""Reading the text of compiled programs."""

import re

OPERATIONS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)


def collectives(text: str) -> list[tuple[str, list[str]]]:
    """Return the collective operations of a compiled program.

    Args:
        text: The program, from `jax.stages.Compiled.as_text`.

    Returns:
        The name of each operation, and the dtypes and shapes of its results on one device, e.g.
        `("all-reduce", ["f32[8,5,32]", "f32[]"])`.
    """
    pattern = rf" = (.*?) ({'|'.join(OPERATIONS)})(?:-start)?\("
    return [
        (operation, re.findall(r"\w+\[[\d,]*\]", results))
        for results, operation in re.findall(pattern, text)
    ]
