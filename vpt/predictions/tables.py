"""Tables of predictions, as the bytes of a CSV or a parquet file."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vpt.storage.text import to_csv

Columns = Mapping[str, type]  # name -> str or float
ENDINGS = (".csv", ".parquet")
INSTALL = 'uv pip install -p .venv -e ".[parquet]" -c constraints.txt'


def check_table(ending: str) -> None:
    """Raise ValueError if a table of this format needs pyarrow, which is not installed."""
    if ending == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401  # an optional dependency
        except ImportError as error:
            raise ValueError(f"{ending} needs pyarrow, which is not installed; run: {INSTALL}") from error


def to_table(columns: Columns, rows: Iterable[Sequence[Any]], ending: str, digits: int | None = None) -> bytes:
    """A table, ".csv" or ".parquet", whose rows have values in the order of the columns; None is an empty cell.

    In CSV numbers have `digits` decimals; None writes all. Text that begins like a formula is escaped, see `to_csv`.

    Example:
        >>> print(to_table({"path": str, "score": float}, [["a.jpg", 0.75]], ".csv").decode(), end="")
        path,score
        a.jpg,0.75
    """
    if ending == ".parquet":
        return _to_parquet(columns, rows)
    return to_csv(columns, rows, digits)


def _to_parquet(columns: Columns, rows: Iterable[Sequence[Any]]) -> bytes:
    import pyarrow
    from pyarrow import parquet

    types = {str: pyarrow.string(), float: pyarrow.float64()}
    schema = pyarrow.schema([(name, types[type_]) for name, type_ in columns.items()])
    table = pyarrow.table(list(map(list, zip(*rows, strict=True))) or [[] for _ in columns], schema=schema)
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(table, sink)
    return bytes(sink.getvalue().to_pybytes())
