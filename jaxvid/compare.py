"""Compare two finished evaluations: the command `jaxvid compare`."""

if __name__ == "__main__":  # before the imports below, which take a second
    from jaxvid import entry_point

    entry_point.run("jaxvid.compare")

import sys
from collections.abc import Sequence
from pathlib import Path

from jaxvid import parsers
from jaxvid.atomic import check_output
from jaxvid.errors import InputError
from jaxvid.evaluation import comparison


def compare(
    before: str | Path, after: str | Path, output: str | Path | None = None
) -> tuple[str, Path | None]:
    """Compare two evaluations on the videos that both have.

    Args:
        before: The `eval.json` of the first evaluation, or its folder.
        after: The same of the second evaluation.
        output: Folder of `comparison.json`; None: it is not written.

    Returns:
        The text to print, and the file that was written, or None.

    Raises:
        InputError: A file cannot be read or written, or the evaluations cannot be compared.
    """
    if output is not None:
        check_output("--output", Path(output) / "comparison.json")
    first, second = comparison.read_table(before), comparison.read_table(after)
    comparison.check_shared(first, second["videos"], second["labels"], name=second["path"])
    result = comparison.compare_tables(first, second)
    text = "\n".join(
        [
            f"before: {result['before']}",
            f"after:  {result['after']}",
            "",
            comparison.format_tables(result),
            "",
            *comparison.describe(result),
        ]
    )
    return text, None if output is None else comparison.save_comparison(Path(output), result)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    args = parsers.compare().parse_args(argv)
    try:
        text, path = compare(args.before, args.after, args.output)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return InputError.EXIT_CODE
    print(text)
    if path:
        print(path)
    return 0
