"""Text that other people wrote, in terminals and in CSV files."""

import csv
import re
from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

_FORMULA = re.compile(r"'*[=+\-@\t\r]")  # what a spreadsheet runs, and what `to_csv` made of it
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    r"""One line with control characters, and bytes of names that are not UTF-8, as escapes: they control no terminal.

    Example:
        >>> printable("a\x1b[31m.jpg")
        'a\\x1b[31m.jpg'
    """
    return "".join(letter if letter.isprintable() else _escaped(letter) for letter in text)


def to_csv(columns: Iterable[str], rows: Iterable[Sequence[Any]], digits: int | None = None) -> bytes:
    r"""A CSV file of rows with values in the order of the columns; None is an empty cell.

    Text that a spreadsheet would run as a formula, since it begins with `=`, `+`, `-`, `@`, a tab or a carriage return,
    gets an apostrophe before it, and so does such text with apostrophes before it; `plain_cell` removes one. Other
    control characters than tabs and line breaks are escaped. Numbers stay as they are, with `digits` decimals, by
    default all.

    Example:
        >>> print(to_csv(["class", "score"], [["=1+1", -0.5]]).decode(), end="")
        class,score
        '=1+1,-0.5
    """

    def cell(value: Any) -> Any:
        if isinstance(value, str):
            text = _CONTROL.sub(lambda match: _escaped(match[0]), value)
            return f"'{text}" if _FORMULA.match(text) else text
        return f"{value:.{digits}f}" if digits is not None and isinstance(value, float) else value

    lines: list[str] = []
    # Before Python 3.13 a carriage return is quoted only if it is in the end of a line.
    writer = csv.writer(SimpleNamespace(write=lines.append), lineterminator="\r\n")
    writer.writerow(map(cell, columns))
    writer.writerows(map(cell, row) for row in rows)
    return "".join(line.removesuffix("\r\n") + "\n" for line in lines).encode(errors="backslashreplace")


def plain_cell(text: str) -> str:
    """The text of a cell as it was before `to_csv`.

    Example:
        >>> [plain_cell(text) for text in ("'=1+1", "'quoted'", "-1")]
        ['=1+1', "'quoted'", '-1']
    """
    return text[1:] if text.startswith("'") and _FORMULA.match(text) else text


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape").decode()
