"""Table of a comparison: metrics and costs of each method, as text and as CSV."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vpt.compare.plan import describe_shots
from vpt.compare.runs import Outcome, Row
from vpt.engine.console import format_table, percent
from vpt.storage.files import write_bytes
from vpt.storage.text import to_csv

PARTS = ("prompt", "neck", "head", "backbone")


@dataclass(frozen=True)
class Spread:
    """Mean, minimum, maximum and sample standard deviation of a metric over runs; None where there are too few."""

    mean: float | None
    low: float | None
    high: float | None
    std: float | None

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        """Of all values but nan.

        Example:
            >>> Spread.of([0.5, 1.0])
            Spread(mean=0.75, low=0.5, high=1.0, std=0.3535533905932738)
        """
        known = [value for value in values if not math.isnan(value)]
        if not known:
            return cls(None, None, None, None)
        return cls(statistics.fmean(known), min(known), max(known), statistics.stdev(known) if len(known) > 1 else None)

    def __str__(self) -> str:
        if self.mean is None or self.low is None or self.high is None:
            return "-"
        low, high = (f"{100 * value:.1f}" for value in (self.low, self.high))
        return f"{percent(self.mean)}" + (f" ({low} to {high})" if low != high else "")


def table_columns(row: Row) -> dict[str, Any]:
    """The columns of `table.csv`, in fractions, bytes and seconds; None where unknown."""
    metrics = {split: Spread.of(one.metric(split, row.metric) for one in row.finished) for split in ("val", row.split)}
    reported, cost, predictions = metrics[row.split], row.cost, row.predictions
    of_runs = [(one.task_bytes, one.result["seconds"]) for one in row.finished]
    task_bytes, seconds = ([*column] for column in zip(*of_runs, strict=True)) if of_runs else ([], [])
    return {
        "shots": row.shots,
        "method": row.method,
        "split": row.split,
        "metric": row.metric,
        "runs": len(row.finished),
        "mean": reported.mean,
        "min": reported.low,
        "max": reported.high,
        "std": reported.std,
        "val_mean": metrics["val"].mean,
        "rate": row.rate,
        "rate_at_edge": row.is_at_edge,
        "trained": cost.num_tuned,
        **{f"trained_{part}": cost.tuned.get(part, 0) for part in dict.fromkeys([*PARTS, *cost.tuned])},
        "task_bytes": task_bytes[0] if task_bytes else None,
        "train_seconds": statistics.fmean(seconds) if seconds else None,
        "step_flops": cost.step_flops,
        "step_pictures": cost.step_images,
        "backward_bytes": cost.saved_bytes,
        "inference_flops": cost.flops,
        "inference_flops_vs_bare": cost.flops_ratio,
        "switch_ms": None if predictions is None else predictions.switch_ms,
        "shares_batches": None if predictions is None else predictions.is_shared,
        "failed": row.error,
    }


def run_columns(outcome: Outcome, row: Row, output: Path) -> dict[str, Any]:
    """The columns of `runs.csv`; `chosen` runs count in the table."""
    trial, result = outcome.trial, outcome.result
    splits = result.get("metrics", {})
    metrics = {f"{split}_{name}": value for split in splits for name, value in splits[split].items()}
    return {
        "shots": trial.shots,
        "method": trial.method,
        "seed": trial.seed,
        "rate": trial.rate,
        "chosen": outcome in row.outcomes,
        "folder": str(outcome.folder.relative_to(output)),
        **{name: result.get(name) for name in ("best_epoch", "epochs", "steps", "seconds")},
        "task_bytes": outcome.task_bytes or None,
        "failed": outcome.error,
        **metrics,
    }


def write_tables(output: Path, rows: Sequence[Row]) -> None:
    """Write `table.csv`, a line for each row, and `runs.csv`, a line for each run."""
    _write_table(output / "table.csv", [table_columns(row) for row in rows])
    _write_table(output / "runs.csv", [run_columns(one, row, output) for row in rows for one in row.runs])


def _write_table(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write a CSV with the columns of all rows."""
    columns = dict.fromkeys(name for row in rows for name in row)
    write_bytes(path, to_csv(columns, [[row.get(name) for name in columns] for row in rows]))


def describe_table(rows: Sequence[Row]) -> str:
    """The table as text, with notes below it."""
    has_shots, first = any(row.shots is not None for row in rows), rows[0]
    lines = [[*([describe_shots(row.shots)] if has_shots else []), *_cells(row)] for row in rows]
    header = [*(["train"] if has_shots else []), "method", f"{first.split} {first.metric}", "val", "trained"]
    header += ["task kB", "train s", f"GFLOPs per step of {first.cost.step_images}", "backward MB", "inference"]
    notes = [f"{row.method}: {row.error}" for row in rows if row.error]
    if edges := [f"{row.method} x {row.rate:g}" for row in rows if row.is_at_edge]:
        notes.append(f"best rate at an edge of the grid, extend rates: {', '.join(dict.fromkeys(edges))}")
    return "\n".join([format_table(lines, [*header, "switch ms", "shares batches"]), *notes])


def _cells(row: Row) -> list[str]:
    columns = table_columns(row)

    def scaled(name: str, unit: float, places: int = 1) -> str:
        value = columns[name]
        return "-" if value is None else f"{value / unit:,.{places}f}"

    return [
        row.method,
        str(Spread.of(one.metric(row.split, row.metric) for one in row.finished)),
        "-" if columns["val_mean"] is None else percent(columns["val_mean"]),
        f"{columns['trained']:,}",
        scaled("task_bytes", 1e3),
        scaled("train_seconds", 1),
        scaled("step_flops", 1e9),
        scaled("backward_bytes", 1e6),
        scaled("inference_flops_vs_bare", 1, 3),
        scaled("switch_ms", 1),
        {True: "yes", False: "no", None: "-"}[columns["shares_batches"]],
    ]
