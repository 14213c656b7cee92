"""Tables, files and plot of the benchmark."""

import io
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vpt.benchmark.subjects import Pass, Subject
from vpt.engine.console import format_table
from vpt.engine.measure import median_ratio, spread
from vpt.storage.files import write_bytes, write_json
from vpt.storage.text import to_csv

if TYPE_CHECKING:
    from vpt.benchmark.__main__ import BenchmarkOptions

CONCAT = {"deep": "deep_concat", "shallow": "shallow_concat", "last_cached": "last_concat"}
LINES = {  # colours for colour-blind readers; equal lines stay visible by their widths
    "deep_concat": ("#e69f00", 4.0),
    "shallow_concat": ("#882255", 1.5),
    "shallow": ("#009e73", 1.5),
    "deep": ("#0072b2", 2.5),
}


def make_rows(subjects: Sequence[Subject], options: "BenchmarkOptions") -> list[dict[str, Any]]:
    """A row for each subject, as in the CSV; None where unknown."""
    by_key = {(subject.name, subject.num_tokens): subject.passes for subject in subjects}
    bare = by_key["bare", None]
    rows = []
    for subject in subjects:
        concat = by_key.get((CONCAT.get(subject.name, ""), subject.num_tokens), {})
        tuned = sum(parameter.numel() for parameter in subject.training.parameters() if parameter.requires_grad)
        row: dict[str, Any] = {"subject": subject.name, "num_tokens": subject.num_tokens, "tuned_parameters": tuned}
        for kind, cost in subject.passes.items():
            values = _describe(cost, bare[kind], concat.get(kind), options)
            row |= {f"{kind}_{name}": value for name, value in values.items()}
        rows.append(row)
    columns = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in columns} for row in rows]


def _describe(cost: Pass, bare: Pass, concat: Pass | None, options: "BenchmarkOptions") -> dict[str, Any]:
    """The columns of one pass, relative to those of the bare ViT and of the concat path."""
    seconds = statistics.median(cost.seconds)
    values: dict[str, Any] = {
        "s": seconds,
        "spread": spread(cost.seconds) if len(cost.seconds) > 1 else None,
        "images_per_s": options.batch_size / seconds,
        "flops": cost.flops,
        "peak_fraction": cost.flops / seconds / (options.peak_tflops * 1e12) if options.peak_tflops else None,
    }
    for name, other in {"bare": bare, "concat": concat}.items():
        values[f"flops_vs_{name}"] = other and cost.flops / other.flops
        values[f"time_vs_{name}"] = other and median_ratio(cost.seconds, other.seconds)
    if cost.saved_bytes is not None:
        saved_by_concat = concat.saved_bytes if concat is not None else None
        values["saved_bytes"], values["peak_bytes"] = cost.saved_bytes, cost.peak_bytes
        values["saved_vs_concat"] = saved_by_concat and cost.saved_bytes / saved_by_concat
    return values


def format_rows(rows: Sequence[dict[str, Any]], options: "BenchmarkOptions", title: str) -> str:
    """Two text tables, inference and training step, without columns that have no values."""
    columns = {
        "s": ("ms", 1e3, ",.1f"),
        "spread": ("spread", 1, ".0%"),
        "images_per_s": ("images/s", 1, ",.1f"),
        "flops": ("GFLOPs/image", 1e-9 / options.batch_size, ",.3f"),
        "peak_fraction": ("of peak", 1, ".1%"),
        "saved_bytes": ("saved MiB", 2**-20, ",.1f"),
        "peak_bytes": ("peak MiB", 2**-20, ",.1f"),
        **{f"flops_vs_{name}": (f"FLOPs/{name}", 1, ".3f") for name in ("bare", "concat")},
        **{f"time_vs_{name}": (f"time/{name}", 1, ".3f") for name in ("bare", "concat")},
        "saved_vs_concat": ("saved/concat", 1, ".3f"),
    }
    texts = []
    for kind, name in (("forward", "inference"), ("step", "training step")):
        known = [column for column in columns if any(row.get(f"{kind}_{column}") is not None for row in rows)]
        header = ["subject", "P", "tuned", *(columns[column][0] for column in known)]
        cells = [
            [row["subject"], _cell(row["num_tokens"], 1, "d"), _cell(row["tuned_parameters"], 1, ",d")]
            + [_cell(row[f"{kind}_{column}"], *columns[column][1:]) for column in known]
            for row in rows
            if row[f"{kind}_s"] is not None
        ]
        texts.append(f"{name}: {title}\n\n{format_table(cells, header)}\n")
    return "\n".join(texts)


def _cell(value: float | None, scale: float, spec: str) -> str:
    return "-" if value is None else f"{value * scale:{spec}}"


def write_files(folder: Path, rows: Sequence[dict[str, Any]], record: dict[str, Any], title: str) -> list[str]:
    """Write the CSV, the record of the measurement and, if a prompt was measured, the plot; returns their names."""
    write_bytes(folder / "benchmark.csv", to_csv(rows[0], [[*row.values()] for row in rows]))
    write_json(folder / "benchmark.json", record)
    names = ["benchmark.csv", "benchmark.json"]
    if set(LINES) & {row["subject"] for row in rows}:
        write_bytes(folder / "benchmark.png", _draw(rows, title))
        names.append("benchmark.png")
    return names


def _draw(rows: Sequence[dict[str, Any]], title: str) -> bytes:
    """PNG of ratios against P: inference to the bare ViT, training step to the concat path."""
    from matplotlib.figure import Figure

    saved = ("bytes saved for backward", ":", "s")
    styles = {"flops": ("FLOPs", "-", "o"), "time": ("time", "--", "^"), "saved": saved}
    panels = (("Inference", "forward", "bare"), ("Training step", "step", "concat"))
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    figure.suptitle(title, fontsize=9, color="0.4")
    for axes, (heading, kind, reference) in zip(figure.subplots(1, 2), panels, strict=True):
        drawn: dict[str, dict[str, Any]] = {}
        for name, (color, width) in LINES.items():
            for quantity, (label, line, marker) in styles.items():
                column = f"{kind}_{quantity}_vs_{reference}"
                of_subject = [row for row in rows if row["subject"] == name]
                if points := [(row["num_tokens"], row[column]) for row in of_subject if row.get(column)]:
                    style = {"linestyle": line, "marker": marker, "markersize": 5}
                    axes.plot(*zip(*points, strict=True), color=color, linewidth=width if line == "-" else 1.5, **style)
                    drawn |= {name: {"color": color, "linewidth": width}, label: {"color": "0.3", **style}}
        for label, style in sorted(drawn.items(), key=lambda item: "marker" in item[1]):  # subjects first
            axes.plot([], label=label, **style)
        axes.axhline(1, color="0.3", linewidth=1.2, zorder=1.9)  # above the grid, below the lines
        axes.set(title=heading, xlabel="P, prompt tokens", ylabel=f"ratio to {reference}", ylim=(0, None))
        axes.grid(color="0.92")
        axes.spines[["top", "right"]].set_visible(False)
        if drawn:
            axes.legend(frameon=False, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()
