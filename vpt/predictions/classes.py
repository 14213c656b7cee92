"""Files of predicted classes: tables (CSV, parquet) and JSON."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vpt.predictions.tables import to_table

Top = Sequence[tuple[int, float]]  # label and probability of the most probable classes, in descending order
TopOfTasks = Mapping[str, Mapping[str, Top]]  # path -> task -> predictions
Classes = Mapping[str, Sequence[str]]  # task -> class names, by label

DIGITS = 6  # of a probability in CSV


def to_class_table(found: TopOfTasks, classes: Classes, ending: str) -> bytes:
    """A table with a row for each image: path, class_1, probability_1, class_2, ...

    With several tasks an image has a row for each, and a column task; a task with fewer classes has empty cells.
    The ending is ".csv", with probabilities to six digits, or ".parquet".

    Example:
        >>> print(to_class_table({"a.jpg": {"fruit": [(1, 0.9)]}}, {"fruit": ["fig", "kiwi"]}, ".csv").decode(), end="")
        path,class_1,probability_1
        a.jpg,kiwi,0.900000
    """
    width = max((len(top) for of_tasks in found.values() for top in of_tasks.values()), default=0)
    names = [f"{name}_{rank}" for rank in range(1, width + 1) for name in ("class", "probability")]
    columns: dict[str, type] = {"path": str, **({"task": str} if len(classes) > 1 else {})}
    columns |= {name: float if name.startswith("probability") else str for name in names}

    def rows() -> Iterator[list[Any]]:
        for path, task, top in _each(found):
            cells = [cell for label, probability in top for cell in (classes[task][label], probability)]
            yield [path, *([task] if len(classes) > 1 else []), *cells, *[None] * (len(names) - len(cells))]

    return to_table(columns, rows(), ending, DIGITS)


def to_class_json(found: TopOfTasks, classes: Classes) -> bytes:
    """A list of {"path": ..., "predictions": [{"class": ..., "probability": ...}, ...]}; several tasks add "task"."""
    rows = [
        {
            "path": path,
            **({"task": task} if len(classes) > 1 else {}),
            "predictions": [{"class": classes[task][label], "probability": value} for label, value in top],
        }
        for path, task, top in _each(found)
    ]
    return (json.dumps(rows, indent=1, ensure_ascii=False) + "\n").encode()


def _each(found: TopOfTasks) -> Iterator[tuple[str, str, Top]]:
    return ((path, task, top) for path, of_tasks in found.items() for task, top in of_tasks.items())
