"""Goals for a GPU, and whether the results reach them."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

Rows = list[dict[str, Any]]
Results = dict[str, dict[str, Any]]  # name of a step → its entry in results.json


INFINITE = float("inf")  # a difference that is not finite; results.json has null


class Goal(NamedTuple):
    """A goal.

    Attributes:
        title: What is measured.
        bound: The bound as text.
        measure: Function of the results that returns the measured values, with their names.
        reached: Function of a value: whether it is within the bound.
    """

    title: str
    bound: str
    measure: Callable[[Results], Iterator[tuple[str, Any]]]
    reached: Callable[[Any], bool]


def rows_of(results: Results, step: str, table: str) -> Rows:
    """Return the rows of a table, none if the step was not run."""
    return results.get(step, {}).get("tables", {}).get(table, [])


def _speed_rows(results: Results, train: bool) -> Rows:
    kind = "train" if train else "forward"
    return [
        row for model in ("stam", "xvit") for row in rows_of(results, f"{kind}-{model}", "speed")
    ]


def _best_share(results: Results, train: bool) -> Iterator[tuple[str, Any]]:
    best: dict[str, tuple[float, int]] = {}
    for row in _speed_rows(results, train):
        share = row.get("of the peak (%)")
        if row["side"] == "jaxvid" and share is not None:
            best[row["model"]] = max(best.get(row["model"], (0.0, 0)), (share, row["batch"]))
    for model, (share, batch) in best.items():
        yield f"{model}, batch {batch}", share


def _speed_ups(results: Results) -> Iterator[tuple[str, Any]]:
    rows = _speed_rows(results, False) + _speed_rows(results, True)
    rows += rows_of(results, "pytorch", "options of PyTorch")
    lowest: dict[str, tuple[float, str]] = {}
    for row in rows:
        ratio = row.get("time / first side")
        if row["side"] != "jaxvid" and ratio is not None:
            name = f"{row['model']}, {row['step']}"
            case = f"{row['side']}, batch {row['batch']}"
            lowest[name] = min(lowest.get(name, (INFINITE, "")), (ratio, case))
    for name, (ratio, case) in lowest.items():
        yield f"{name}, {case}", ratio


def _parity(results: Results) -> Iterator[tuple[str, Any]]:
    for row in rows_of(results, "parity", "parity"):
        if row["dtype"] == "float32" and "largest difference" in row:
            yield (
                row["golden file"],
                INFINITE if row["largest difference"] is None else row["largest difference"],
            )


def _shift(results: Results) -> Iterator[tuple[str, Any]]:
    for row in rows_of(results, "shift", "temporal shift"):
        if row["side"] == "shifted" and row.get("time / first side") is not None:
            yield row["step"], 100 * (row["time / first side"] - 1)


def _demo(results: Results) -> Iterator[tuple[str, Any]]:
    for row in rows_of(results, "demo", "demo"):
        yield f"{row['videos']} clips", row["top-1 (%)"]


def _resume(results: Results) -> Iterator[tuple[str, Any]]:
    for row in rows_of(results, "resume", "resume"):
        yield row["resumed run"], row["bit-identical weights"]


def _input_wait(results: Results) -> Iterator[tuple[str, Any]]:
    for row in rows_of(results, "input", "input"):
        if row.get("side") == "pack":
            yield f"{row['threads']} threads", row["input wait (%)"]


def _first_step(start: str) -> Callable[[Results], Iterator[tuple[str, Any]]]:
    def measure(results: Results) -> Iterator[tuple[str, Any]]:
        for row in rows_of(results, "startup", "first step"):
            if row["start"] == start:
                yield "from the start of Python", row["from the start of Python (s)"]

    return measure


GOALS = (
    Goal("largest difference in float32", "≤ 1e-4", _parity, lambda x: x <= 1e-4),
    Goal("top-1 of the demo (%)", "≥ 95", _demo, lambda x: x >= 95),
    Goal("bit-identical resume", "yes", _resume, bool),
    Goal(
        "forward pass, share of the matmul peak (%)",
        "≥ 65",
        lambda results: _best_share(results, False),
        lambda x: x >= 65,
    ),
    Goal(
        "training step, share of the matmul peak (%)",
        "≥ 50",
        lambda results: _best_share(results, True),
        lambda x: x >= 50,
    ),
    Goal("time of PyTorch / time of jaxvid, lowest", "≥ 1.2", _speed_ups, lambda x: x >= 1.2),
    Goal("cost of the temporal shift (%)", "≤ 2", _shift, lambda x: x <= 2),
    Goal("input wait with packs (%)", "≤ 1", _input_wait, lambda x: x <= 1),
    Goal("first step, cold (s)", "≤ 30", _first_step("cold"), lambda x: x <= 30),
    Goal("first step, warm (s)", "≤ 8", _first_step("warm"), lambda x: x <= 8),
)


def goal_rows(results: Results) -> Rows:
    """Return one row per measured value of each goal, or one row if it was not measured."""
    rows = []
    for goal in GOALS:
        values = list(goal.measure(results)) or [("", None)]
        for name, value in values:
            reached = "not measured" if value is None else "yes" if goal.reached(value) else "no"
            value = "not finite" if value == INFINITE else value
            row = {"goal": goal.title, "bound": goal.bound, "of": name, "measured": value}
            rows.append({**row, "reached": reached})
    return rows
