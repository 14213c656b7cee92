"""Pictures that are there more than once: in a split, in two splits, or under two labels."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vpt.doctor.findings import File, Finding, Level
from vpt.doctor.scan import Looks


@dataclass(frozen=True)
class _Member:
    """A picture of a group of equal ones."""

    split: str
    index: int
    name: str
    label: str
    file: int

    def repeats(self, other: "_Member", **more: str) -> File:
        how = "the same file" if self.file == other.file else "the same pixels, saved anew"
        return File(self.name, self.split, more.get("detail", how), same_as=other.name)


def find_copies(splits: Mapping[str, Any], looks: Mapping[str, Looks], has_labels: bool) -> list[Finding]:
    """Pictures of equal pixels, as findings `leakage`, `duplicates` and `contradiction`."""
    leaks: dict[str, list[File]] = {split: [] for split in splits}
    twins: dict[str, list[File]] = {split: [] for split in splits}
    contradictions: list[File] = []
    for group in _groups(splits, looks):
        first_of_split: dict[str, _Member] = {}
        for member in group:
            if member.split in first_of_split:
                twins[member.split].append(member.repeats(first_of_split[member.split]))
            elif first_of_split:
                leaks[member.split].append(member.repeats(group[0]))
            first_of_split.setdefault(member.split, member)
        if has_labels and len({member.label for member in group}) > 1:
            contradictions += [File(group[0].name, group[0].split, f"is {group[0].label}")]
            contradictions += [member.repeats(group[0], detail=f"is {member.label}") for member in group[1:]]
    return [*_leakage(leaks), *_duplicates(twins), *_contradiction(contradictions)]


def _leakage(leaks: Mapping[str, list[File]]) -> Iterator[Finding]:
    for split, files in leaks.items():
        if files:
            message = f"{_pictures(len(files))} in another split, too, which makes the numbers of {split} too good; "
            yield Finding(Level.error, "leakage", message + "keep each in one split", split, tuple(files))


def _duplicates(twins: Mapping[str, list[File]]) -> Iterator[Finding]:
    for split, files in twins.items():
        if files:
            message = f"{_pictures(len(files))} there more than once; remove the copies"
            yield Finding(Level.warning, "duplicates", message, split, tuple(files))


def _contradiction(files: list[File]) -> Iterator[Finding]:
    if files:
        message = f"{_pictures(len(files))} there under different labels; keep the right one of each"
        yield Finding(Level.warning, "contradiction", message, None, tuple(files))


def _pictures(num: int) -> str:
    return f"{num:,} pictures are" if num > 1 else "1 picture is"


def _groups(splits: Mapping[str, Any], looks: Mapping[str, Looks]) -> Iterator[list[_Member]]:
    """Groups of two or more pictures of equal pixels, each in the order of the splits."""
    order = list(splits)
    indices = [looks[split].readable for split in order]
    where = np.repeat(np.arange(len(order)), [len(of_split) for of_split in indices])
    places = np.concatenate(indices)
    hashes = np.concatenate([looks[split].columns["pixels"][of] for split, of in zip(order, indices, strict=True)])
    by_hash = np.argsort(hashes, kind="stable")
    starts = np.flatnonzero(np.diff(hashes[by_hash], prepend=hashes[by_hash][:1] + np.uint64(1)))
    groups = [group for group in np.split(by_hash, starts[1:]) if len(group) > 1]
    for group in sorted(groups, key=lambda group: int(group[0])):
        yield [_member(order[where[at]], int(places[at]), splits, looks) for at in group]


def _member(split: str, index: int, splits: Mapping[str, Any], looks: Mapping[str, Looks]) -> _Member:
    samples = splits[split]
    return _Member(
        split, index, samples.names[index], samples.label_text(index), int(looks[split].columns["file"][index])
    )
