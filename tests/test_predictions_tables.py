"""Tables as CSV and as parquet."""

import csv
import io
import sys

import pyarrow
import pytest
from pyarrow import parquet

from vpt.predictions.tables import check_table, to_table

COLUMNS = {"path": str, "class": str, "score": float}
ROWS = [["a, b.jpg", "Größe", 0.123456789], ["c.jpg", None, None]]


def test_parquet_has_the_cells_of_csv_with_types():
    table = parquet.read_table(io.BytesIO(to_table(COLUMNS, ROWS, ".parquet")))
    assert dict(zip(table.schema.names, table.schema.types, strict=True)) == {
        "path": pyarrow.string(),
        "class": pyarrow.string(),
        "score": pyarrow.float64(),
    }
    assert [list(row.values()) for row in table.to_pylist()] == ROWS
    lines = list(csv.reader(io.StringIO(to_table(COLUMNS, ROWS, ".csv").decode())))
    assert lines == [["path", "class", "score"], ["a, b.jpg", "Größe", "0.123456789"], ["c.jpg", "", ""]]


def test_a_table_without_rows_keeps_its_columns():
    table = parquet.read_table(io.BytesIO(to_table(COLUMNS, [], ".parquet")))
    assert table.schema.types == [pyarrow.string(), pyarrow.string(), pyarrow.float64()]
    assert len(table) == 0
    assert to_table(COLUMNS, [], ".csv") == b"path,class,score\n"


def test_numbers_in_csv_are_rounded_to_digits():
    assert to_table({"score": float}, [[2 / 3], [1e-9]], ".csv", digits=3) == b"score\n0.667\n0.000\n"


def test_parquet_without_pyarrow_is_refused_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match=r'\.parquet needs pyarrow, .*; run: uv pip install .*"\.\[parquet\]"'):
        check_table(".parquet")
    check_table(".csv")
