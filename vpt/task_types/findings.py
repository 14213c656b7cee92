"""Problems found in a data set, and the files that they concern."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

NUM_SHOWN = 3  # files of a finding in the text; JSON lists all


class Level(StrEnum):
    """Severity of a finding."""

    error = "error"  # training stops, or its metrics are wrong
    warning = "warning"  # training runs, but worse than it could
    note = "note"


@dataclass(frozen=True)
class File:
    """An image that a finding concerns."""

    file: str | None  # path below the root, or another name; None where `detail` names the place
    split: str | None = None  # train, val or test, where known
    detail: str = ""  # the problem
    same_as: str | None = None  # the image that it duplicates

    def __str__(self) -> str:
        parts = [self.file or "", f"same as {self.same_as}" if self.same_as else "", self.detail]
        return ": ".join(part for part in parts if part)


@dataclass(frozen=True)
class Finding:
    """A problem or a note about a data set."""

    level: Level
    code: str  # one word, stable for programs
    message: str  # one line for the user
    split: str | None = None  # the split concerned; None for all
    files: tuple[File, ...] = ()  # all images concerned; empty for a finding about a split or the whole data set
    count: int | None = None  # of images or boxes concerned; None where it does not apply

    def lines(self) -> list[str]:
        """The message and the first files."""
        prefix = f"{self.split}: " if self.split else ""
        shown = [f"    {file}" for file in self.files[:NUM_SHOWN]]
        rest = len(self.files) - NUM_SHOWN
        return [f"  {self.code}: {prefix}{self.message}", *shown, *([f"    and {rest:,} more"] if rest > 0 else [])]

    def to_dict(self) -> dict[str, Any]:
        """The finding as plain JSON values."""
        return {**asdict(self), "files": [*map(asdict, self.files)], "count": self.count or len(self.files) or None}


def some(names: Iterable[str], most: int = 5) -> str:
    """The first names, and how many more there are.

    Example:
        >>> some(["a", "b", "c"], most=2)
        'a, b and 1 more'
    """
    names = list(names)
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest:,} more" if rest > 0 else "")


def share(part: int, whole: int) -> str:
    """A count out of a total, with its percentage.

    Example:
        >>> share(3, 1200)
        '3 of 1,200 (0.2 %)'
    """
    return f"{part:,} of {whole:,} ({100 * part / max(whole, 1):.1f} %)"
