"""Compare two finished evaluations: the command `jaxvid compare`."""

if __name__ == "__main__":  # before the imports below, which take a second
    from jaxvid import entry_point

    entry_point.run("jaxvid.compare")

import sys
from collections.abc import Sequence
from pathlib import Path

from jaxvid import parsers
from jaxvid.atomic import OutputPath, check_output, output_path, write_json
from jaxvid.errors import InputError
from jaxvid.evaluation import comparison


def compare(
    before: str | Path, after: str | Path, output: str | Path | None = None
) -> tuple[str, OutputPath | None]:
    """Compare two evaluations on the videos that both have.

    Args:
        before: The `eval.json` of the first evaluation, or its folder.
        after: The same of the second evaluation.
        output: Folder of `comparison.json`, or its address; None: it is not written.

    Returns:
        The text to print, and the file that was written, or None.

    Raises:
        InputError: A file cannot be read or written, or the evaluations cannot be compared.
    """
    file = None if output is None else output_path(f"{output}/{comparison.FILE}")
    if file is not None:
        check_output("--output", file)
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
    return text, None if file is None else write_json(file, result)


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
