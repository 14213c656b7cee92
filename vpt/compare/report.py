"""HTML report of a comparison: one self-contained file with its numbers as JSON."""

import base64
import hashlib
import io
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from vpt import build
from vpt.compare.plan import Plan, Trial, describe_shots
from vpt.compare.runs import Row, Runs
from vpt.compare.table import Spread, table_columns
from vpt.config.saved import recipe
from vpt.engine.measure import describe_machine
from vpt.storage.files import finite, write_bytes

TEMPLATE = Path(__file__).with_name("report.html")
PLACE = "/* data */"  # replaced by the JSON
POLICY = "policy"  # replaced by the digests of style and script
NUM_IMAGES = 24  # that methods disagree on
SIDE = 144  # pixels of a thumbnail


@dataclass(frozen=True)
class Comparison:
    """Results of a comparison."""

    plan: Plan
    rows: list[Row]  # one for each number of shots and method
    content: dict[str, Any]  # of the report, as plain JSON values

    @classmethod
    def of(cls, runs: Runs, rows: list[Row], command: str) -> "Comparison":
        """Collect the results of all runs; reads the images that are shown."""
        plan, first = runs.plan, next(iter(runs.plan.methods))
        config, shown = plan.compose(Trial(first, plan.shots[0], plan.seeds[0], 1.0))
        samples = runs.samples[plan.shots[0]]
        settings = [_setting(runs, rows, shots) for shots in plan.shots]
        disputed = {index for setting in settings for index in setting["disputed"]}
        content = {
            "title": config.dataset.title,
            "task": config.task,
            "metric": runs.task_type.main_metric,
            "split": runs.split,
            "backbone": config.backbone.name,
            "classes": list(samples["train"].classes),
            "seeds": list(plan.seeds),
            "rates": list(plan.rates),
            "methods": [
                {"name": name, "title": of.title, "overrides": list(of.overrides), "rates": plan.rates_of(name)}
                for name, of in plan.methods.items()
            ],
            "settings": settings,
            "images": {index: _image(samples[runs.split], index) for index in sorted(disputed)},
            "made": {
                "command": command,
                "machine": describe_machine(build.pick_device(config.device)),
                "config": yaml.safe_dump(json.loads(json.dumps(recipe(shown))), sort_keys=False, allow_unicode=True),
            },
        }
        return cls(plan, rows, content)


def write_report(path: Path, comparison: Comparison) -> None:
    """Write the file; it loads no other file and runs no script but that of the template."""
    write_bytes(path, to_html(comparison.content).encode())


def to_html(content: Mapping[str, Any]) -> str:
    """The template filled with plain values; no text in them can end the script tag around them."""
    html = TEMPLATE.read_text(encoding="utf-8")
    sources = {tag: f"'sha256-{_digest(html, tag)}'" for tag in ("style", "script")}
    policy = f"default-src 'none'; img-src data:; style-src {sources['style']}; script-src {sources['script']}"
    text = json.dumps(finite(content), ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    return html.replace(f'content="{POLICY}"', f'content="{policy}"').replace(PLACE, text)


def disagreement(predictions: Sequence[int]) -> float:
    """The entropy of predictions, in bits.

    Example:
        >>> disagreement([3, 3, 3]), disagreement([3, 3, 1, 1])
        (0.0, 1.0)
    """
    shares = [count / len(predictions) for count in Counter(predictions).values()]
    return -sum(share * math.log2(share) for share in shares) + 0.0


def most_disputed(predictions: Sequence[Sequence[int]], targets: Sequence[int], num: int) -> list[int]:
    """Indices of the images that methods disagree on most; of equals, those first that one of them gets right.

    Remaining ties take one image of each class in turn; images on which all agree are left out. `predictions` has the
    class of each image for each method.
    """
    ranks, of_class = [], Counter[tuple[float, bool, int]]()
    for index, (target, *predicted) in enumerate(zip(targets, *predictions, strict=True)):
        amount, is_missed = round(disagreement(predicted), 9), target not in predicted
        if amount > 0:
            ranks.append((-amount, is_missed, of_class[amount, is_missed, target], index))
            of_class[amount, is_missed, target] += 1
    return [index for *_, index in sorted(ranks)[:num]]


def _setting(runs: Runs, all_rows: Sequence[Row], shots: int | str | None) -> dict[str, Any]:
    """The content for one number of images per class."""
    samples, rows = runs.samples[shots], [row for row in all_rows if row.shots == shots]
    train, reported = samples["train"], samples[runs.split]
    predictions = [row.predictions.predictions for row in rows if row.predictions and row.predictions.predictions]
    disputed = most_disputed(predictions, reported.targets, NUM_IMAGES) if len(predictions) > 1 else []
    return {
        "label": describe_shots(shots),
        "per_class": len(train.names) / len(train.classes),
        "images": {split: len(members.names) for split, members in samples.items()},
        "rows": [_row(row, reported, disputed) for row in rows],
        "disputed": disputed,
    }


def _row(row: Row, reported: Any, disputed: Sequence[int]) -> dict[str, Any]:
    predictions = row.predictions.predictions if row.predictions else []
    confusion = Counter(zip(reported.targets, predictions, strict=True)) if predictions else Counter()
    curves = itertools.zip_longest(*(outcome.curve for outcome in row.finished))
    return {
        **table_columns(row),
        "values": [one.metric(row.split, row.metric) for one in row.finished],
        "curve": [Spread.of(value for value in epoch if value is not None).mean for epoch in curves],
        "search": [
            {"rate": one.trial.rate, "val": one.metric("val", row.metric), "error": one.reason} for one in row.search
        ],
        "confusion": [[*pair, count] for pair, count in sorted(confusion.items())],
        "precision": row.predictions.precision if row.predictions else {},
        "predictions": {index: predictions[index] for index in disputed} if predictions else {},
    }


def _image(samples: Any, index: int) -> dict[str, Any]:
    return {"name": samples.names[index], "truth": samples.targets[index], "image": _thumbnail(samples.read(index))}


def _thumbnail(image: Image.Image) -> str:
    """A small JPEG as a data: URI."""
    small = image.convert("RGB")
    small.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _digest(html: str, tag: str) -> str:
    (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    return base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
