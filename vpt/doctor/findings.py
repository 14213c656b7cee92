"""Findings: what is wrong with data, or good to know of them, and which files it concerns."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

NUM_SHOWN = 3  # files of a finding in the text; JSON has all


class Level(StrEnum):
    """How bad a finding is."""

    error = "error"  # training stops, or what it measures is wrong
    warning = "warning"  # training runs, and is worse than it could be
    note = "note"  # good to know


@dataclass(frozen=True)
class File:
    """A picture that a finding concerns.

    Args:
        file: Its path below the root, or what else names it; None where `detail` says the place.
        split: train, val or test, where that is known.
        detail: What is the matter with it.
        same_as: The picture that it repeats.
    """

    file: str | None
    split: str | None = None
    detail: str = ""
    same_as: str | None = None

    def __str__(self) -> str:
        parts = [self.file or "", f"same as {self.same_as}" if self.same_as else "", self.detail]
        return ": ".join(part for part in parts if part)


@dataclass(frozen=True)
class Finding:
    """Something that was found.

    Args:
        level: How bad it is.
        code: One word that programs can rely on.
        message: One line for a person.
        split: The split that it is about; None if it is about all.
        files: The pictures that it concerns, all of them; none where it is about a split or the data as a whole.
        count: How many pictures or boxes it concerns; None where it is not about single ones.
    """

    level: Level
    code: str
    message: str
    split: str | None = None
    files: tuple[File, ...] = ()
    count: int | None = None

    def lines(self) -> list[str]:
        """The message, and the first files."""
        prefix = f"{self.split}: " if self.split else ""
        shown = [f"    {file}" for file in self.files[:NUM_SHOWN]]
        rest = len(self.files) - NUM_SHOWN
        return [f"  {self.code}: {prefix}{self.message}", *shown, *([f"    and {rest:,} more"] if rest > 0 else [])]

    def to_dict(self) -> dict[str, Any]:
        """The finding as JSON has it."""
        return {
            **asdict(self),
            "files": [asdict(file) for file in self.files],
            "count": self.count or len(self.files) or None,
        }


def sort_findings(findings: Iterable[Finding]) -> list[Finding]:
    """Errors first, then warnings, then notes; else as they were found."""
    return sorted(findings, key=lambda finding: list(Level).index(finding.level))


def format_findings(findings: Sequence[Finding]) -> str:
    """All findings under a heading for each level."""
    parts = []
    for level in Level:
        members = [finding for finding in findings if finding.level is level]
        if members:
            heading = f"{len(members)} {level.value}{'s' if len(members) > 1 else ''}"
            parts.append("\n".join([heading, *(line for finding in members for line in finding.lines())]))
    return "\n\n".join(parts) or "nothing is wrong"


def some(names: Iterable[str], most: int = 5) -> str:
    """A few names, and how many more there are.

    Example:
        >>> some(["a", "b", "c"], most=2)
        'a, b and 1 more'
    """
    names = list(names)
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest:,} more" if rest > 0 else "")


def share(part: int, whole: int) -> str:
    """A part of a whole, with its percentage.

    Example:
        >>> share(3, 1200)
        '3 of 1,200 (0.2 %)'
    """
    return f"{part:,} of {whole:,} ({100 * part / max(whole, 1):.1f} %)"


def printable(text: str) -> str:
    r"""One line as a terminal may see it: control characters, and bytes of names that are no UTF-8, as escapes.

    Example:
        >>> printable("a\x1b[31m.jpg")
        'a\\x1b[31m.jpg'
    """
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def storable(value: Any) -> Any:
    """The same plain values, with bytes of names that are no UTF-8 as escapes, as JSON needs it."""
    match value:
        case str():
            return value.encode(errors="backslashreplace").decode()
        case dict():
            return {storable(key): storable(part) for key, part in value.items()}
        case list() | tuple():
            return [storable(part) for part in value]
    return value


def of_pictures(
    level: Level, code: str, said: str, split: str, names: Sequence[str], details: Mapping[int, str]
) -> Finding:
    """A finding about some pictures of a split; a note about every one of them does not list them.

    Args:
        level: How bad it is.
        code: One word.
        said: What is said of these pictures.
        split: Their split.
        names: Those of all pictures of the split.
        details: What is the matter, by index.
    """
    is_all = level is Level.note and len(details) == len(names)
    files = () if is_all else tuple(File(names[index], split, details[index]) for index in sorted(details))
    message = f"{share(len(details), len(names))} pictures {said}"
    return Finding(level, code, message, split, files, len(details))
