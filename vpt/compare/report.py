"""The report of a comparison: one HTML file that needs nothing else, with the numbers in it as JSON."""

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
PLACE = "/* data */"  # of the JSON in the template
POLICY = "policy"  # what stands in the template for the digests of its style and script
NUM_PICTURES = 24  # that methods disagree on
SIDE = 144  # pixels of a thumbnail


@dataclass(frozen=True)
class Comparison:
    """All that there is to tell.

    Args:
        plan: What was asked for.
        rows: One for each number of shots and method.
        content: What the report shows, as plain JSON values.
    """

    plan: Plan
    rows: list[Row]
    content: dict[str, Any]

    @classmethod
    def of(cls, runs: Runs, rows: list[Row], command: str) -> "Comparison":
        """Gather what the runs left; a few pictures are read for it.

        Args:
            runs: All of them.
            rows: What became of them.
            command: What was typed.
        """
        plan, first = runs.plan, next(iter(runs.plan.methods))
        config, shown = plan.compose(Trial(first, plan.shots[0], plan.seeds[0], 1.0))
        samples = runs.samples[plan.shots[0]]
        settings = [_setting(runs, rows, shots) for shots in plan.shots]
        disputed = {index for setting in settings for index in setting["disputed"]}
        content = {
            "title": config.dataset.title,
            "task": config.task,
            "metric": runs.kind.select,
            "split": runs.split,
            "backbone": config.backbone.name,
            "classes": list(samples["train"].classes),
            "seeds": list(plan.seeds),
            "rates": list(plan.rates),
            "methods": [_method(plan, name) for name in plan.methods],
            "settings": settings,
            "pictures": {index: _picture(samples[runs.split], index) for index in sorted(disputed)},
            "made": {
                "command": command,
                "machine": describe_machine(build.pick_device(config.device)),
                "config": yaml.safe_dump(json.loads(json.dumps(recipe(shown))), sort_keys=False, allow_unicode=True),
            },
        }
        return cls(plan, rows, content)


def write_report(path: Path, comparison: Comparison) -> None:
    """Write the file; a browser that opens it asks for nothing else, and runs no script but the template's."""
    write_bytes(path, to_html(comparison.content).encode())


def to_html(content: Mapping[str, Any]) -> str:
    """The template with plain values in it; no text in them can end the script tag that holds them."""
    html = TEMPLATE.read_text()
    sources = {tag: f"'sha256-{_digest(html, tag)}'" for tag in ("style", "script")}
    policy = f"default-src 'none'; img-src data:; style-src {sources['style']}; script-src {sources['script']}"
    text = json.dumps(finite(content), ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    return html.replace(f'content="{POLICY}"', f'content="{policy}"').replace(PLACE, text)


def disagreement(answers: Sequence[int]) -> float:
    """How much answers differ, in bits: the entropy of which answer is given how often.

    Example:
        >>> disagreement([3, 3, 3]), disagreement([3, 3, 1, 1])
        (0.0, 1.0)
    """
    shares = [count / len(answers) for count in Counter(answers).values()]
    return -sum(share * math.log2(share) for share in shares) + 0.0


def most_disputed(answers: Sequence[Sequence[int]], targets: Sequence[int], num: int) -> list[int]:
    """Indices of the pictures that methods disagree on most, those first that one of them gets right.

    Of pictures that are alike in that, one of each class comes first, then a second one, and so on.

    Args:
        answers: Of each method, the class of each picture.
        targets: The true class of each picture.
        num: At most so many; a picture on which all agree is none.
    """
    ranks, of_class = [], Counter[tuple[float, bool, int]]()
    for index, (target, *given) in enumerate(zip(targets, *answers, strict=True)):
        amount, is_missed = round(disagreement(given), 9), target not in given
        if amount > 0:
            ranks.append((-amount, is_missed, of_class[amount, is_missed, target], index))
            of_class[amount, is_missed, target] += 1
    return [index for *_, index in sorted(ranks)[:num]]


def _setting(runs: Runs, all_rows: Sequence[Row], shots: int | str | None) -> dict[str, Any]:
    """All of one number of pictures per class."""
    samples, rows = runs.samples[shots], [row for row in all_rows if row.shots == shots]
    train, reported = samples["train"], samples[runs.split]
    answers = [row.answers.predictions for row in rows if row.answers is not None and row.answers.predictions]
    disputed = most_disputed(answers, reported.targets, NUM_PICTURES) if len(answers) > 1 else []
    return {
        "label": describe_shots(shots),
        "per_class": len(train.names) / len(train.classes),
        "pictures": {split: len(members.names) for split, members in samples.items()},
        "rows": [_row(row, reported, disputed) for row in rows],
        "disputed": disputed,
    }


def _row(row: Row, reported: Any, disputed: Sequence[int]) -> dict[str, Any]:
    answers = row.answers
    predictions = [] if answers is None else answers.predictions
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
        "precision": {} if answers is None else answers.precision,
        "answers": {index: predictions[index] for index in disputed} if predictions else {},
    }


def _method(plan: Plan, name: str) -> dict[str, Any]:
    method = plan.methods[name]
    return {
        "name": name,
        "title": method.title,
        "overrides": list(method.overrides),
        "rates": plan.rates_of(name),
    }


def _picture(samples: Any, index: int) -> dict[str, Any]:
    return {
        "name": samples.names[index],
        "truth": samples.targets[index],
        "image": _thumbnail(samples.read(index)),
    }


def _thumbnail(picture: Image.Image) -> str:
    """A small JPEG as a data: URI."""
    small = picture.convert("RGB")
    small.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _digest(html: str, tag: str) -> str:
    (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    return base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
