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


@pytest.mark.parametrize("rows", [ROWS, []])
def test_parquet_has_the_cells_of_csv_with_types_and_columns_even_without_rows(rows):
    table = parquet.read_table(io.BytesIO(to_table(COLUMNS, rows, ".parquet")))
    types = [("path", pyarrow.string()), ("class", pyarrow.string()), ("score", pyarrow.float64())]
    assert [(field.name, field.type) for field in table.schema] == types
    assert [list(row.values()) for row in table.to_pylist()] == rows
    lines = list(csv.reader(io.StringIO(to_table(COLUMNS, rows, ".csv").decode())))
    assert lines == [["path", "class", "score"], *([str(cell or "") for cell in row] for row in rows)]
    assert to_table({"class": str}, [["=1"]], ".csv") == b"class\n'=1\n"
    assert to_table({"score": float}, [[2 / 3], [1e-9]], ".csv", digits=3) == b"score\n0.667\n0.000\n"


def test_parquet_without_pyarrow_is_refused_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match=r'\.parquet needs pyarrow, .*; run: uv pip install .*"\.\[parquet\]"'):
        check_table(".parquet")
    check_table(".csv")
