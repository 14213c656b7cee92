"""Tables and JSON of predicted classes."""

import csv
import io
import json

from pyarrow import parquet

from vpt.predictions.classes import to_class_json, to_class_table

FRUIT, COLOUR = ["fig", "kiwi", "sour, plum"], ["red", "green"]
ONE = {"a.jpg": {"fruit": [(2, 0.625), (0, 0.25)]}, "b.jpg": {"fruit": [(1, 2 / 3), (0, 0.1)]}}
TWO = {path: {**of_tasks, "colour": [(0, 1.0)]} for path, of_tasks in ONE.items()}
CLASSES = {"fruit": FRUIT, "colour": COLOUR}


def test_one_task_has_no_column_for_it():
    assert to_class_table(ONE, {"fruit": FRUIT}, ".csv").decode().splitlines() == [
        "path,class_1,probability_1,class_2,probability_2",
        'a.jpg,"sour, plum",0.625000,fig,0.250000',
        "b.jpg,kiwi,0.666667,fig,0.100000",
    ]
    (first, second) = json.loads(to_class_json(ONE, {"fruit": FRUIT}))
    assert list(first) == ["path", "predictions"]
    assert second["predictions"][0] == {"class": "kiwi", "probability": 2 / 3}


def test_several_tasks_have_a_column_and_the_narrower_leaves_cells_empty():
    lines = list(csv.reader(io.StringIO(to_class_table(TWO, CLASSES, ".csv").decode())))
    assert lines[0] == ["path", "task", "class_1", "probability_1", "class_2", "probability_2"]
    assert lines[1][:3] == ["a.jpg", "fruit", "sour, plum"]
    assert lines[2] == ["a.jpg", "colour", "red", "1.000000", "", ""]
    assert [line[:2] for line in lines[3:]] == [["b.jpg", "fruit"], ["b.jpg", "colour"]]
    rows = json.loads(to_class_json(TWO, CLASSES))
    assert [(row["path"], row["task"]) for row in rows] == [tuple(line[:2]) for line in lines[1:]]


def test_parquet_has_the_values_of_csv_with_all_digits():
    rows = list(csv.DictReader(io.StringIO(to_class_table(TWO, CLASSES, ".csv").decode())))
    table = parquet.read_table(io.BytesIO(to_class_table(TWO, CLASSES, ".parquet"))).to_pylist()
    as_text = [
        {key: f"{cell:.6f}" if isinstance(cell, float) else cell or "" for key, cell in row.items()} for row in table
    ]
    assert as_text == rows
    assert table[2]["probability_1"] == 2 / 3
