"""The files of a run: results.json, results.md and plots."""

import json
import traceback
from pathlib import Path
from typing import Any

from benchmarks.gpu.goals import goal_rows
from benchmarks.gpu.steps import STEPS
from jaxvid.atomic import write_file, write_json

COMMAND_COLUMN = "command"
LAST_COLUMNS = ("note", COMMAND_COLUMN)


class Results:
    """The results of a run, which are written after each step.

    If the output folder has results of the same size, those of other steps are kept.

    Args:
        folder: The output folder.
        about: Command, start and settings of the run.
    """

    def __init__(self, folder: Path, about: dict[str, Any]):
        """Read the results of an earlier run."""
        self.folder, self._about = folder, about
        self._steps: dict[str, dict[str, Any]] = {}
        path = folder / "results.json"
        if path.exists():
            earlier = json.loads(path.read_text(encoding="utf-8"))
            if earlier["size"] == about["size"]:
                self._steps = {entry["name"]: entry for entry in earlier["steps"]}

    def is_done(self, name: str) -> bool:
        """Return whether a step has ended without failures, possibly shortened."""
        return self._steps.get(name, {}).get("status") in ("done", "shortened")

    def save(self, result: dict[str, Any], is_complete: bool) -> None:
        """Write results.json with the result of a step; if it is complete, also the other files.

        Results of an earlier run are kept if there was no time to repeat the step.
        """
        name = result["name"]
        if result["status"] != "not run" or name not in self._steps:
            self._steps[name] = {**result, "started": self._about["started"]}
        order = [step.name for step in STEPS]
        self._steps = {name: self._steps[name] for name in order if name in self._steps}
        steps = list(self._steps.values())
        goals = goal_rows(self._steps)
        value = {**self._about, "goals": goals, "steps": steps}
        write_json(self.folder / "results.json", value)
        if is_complete:
            text = format_results(self._about, goals, steps)
            write_file(self.folder / "results.md", text.encode())
            self._draw()

    def _draw(self) -> None:
        """Draw the plots; a failure does not affect results.json and results.md."""
        try:
            from benchmarks.gpu import plots

            plots.draw(self._steps, self.folder)
        except Exception as error:  # e.g. matplotlib is missing
            traceback.print_exc()
            print(f"plots: not drawn: {error!r}", flush=True)


def format_results(about: dict[str, Any], goals: list[dict], steps: list[dict]) -> str:
    """Return the text of results.md."""
    lines = ["# Results", "", f"`{about['command']}`, started {about['started']} (UTC).", ""]
    if about["size"] != "full":
        lines += [f"Sizes: {about['size']}. The goals are for the sizes `full` on a GPU.", ""]
    lines += ["## Goals", "", *format_table(goals), "## Steps", ""]
    summary = [
        {
            "step": entry["name"],
            "measured": entry["title"],
            "status": entry["status"],
            "seconds": entry.get("seconds"),
            "rows": sum(map(len, entry["tables"].values())),
            "started": entry["started"],
        }
        for entry in steps
    ]
    lines += format_table(summary)
    for entry in steps:
        lines += [f"## {entry['name']}: {entry['title']}", "", f"`{entry['command']}`", ""]
        if entry["status"] != "done":
            lines += [f"Status: {entry['status']}.", ""]
        if "error" in entry:
            lines += ["```text", *entry["error"].splitlines(), "```", ""]
        for table, rows in entry["tables"].items():
            lines += [f"### {table}", "", *format_table(rows)]
    return "\n".join(lines)


def format_table(rows: list[dict[str, Any]]) -> list[str]:
    """Return the lines of a Markdown table; columns whose cells are all empty are left out."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    columns = [c for c in columns if any(row.get(c) not in (None, "") for row in rows)]
    columns.sort(key=lambda column: column in LAST_COLUMNS)
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = [format_cell(row.get(column), column) for column in columns]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def format_cell(value: Any, column: str = "") -> str:
    """Format a value: numbers with four significant digits, commands as code."""
    if value is None or value == "":
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    text = str(value).replace("|", "\\|").replace("\n", " ")
    return f"`{text}`" if column == COMMAND_COLUMN else text
