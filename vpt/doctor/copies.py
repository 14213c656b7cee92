"""Duplicate images within a split, across splits, and under different labels."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vpt.doctor.scan import SplitScan
from vpt.task_types.findings import File, Finding, Level


@dataclass(frozen=True)
class _Member:
    """An image of a group with equal pixels."""

    split: str
    index: int
    name: str
    file: int

    def duplicates(self, other: "_Member", detail: str = "") -> File:
        how = "the same file" if self.file == other.file else "the same pixels in another file"
        return File(self.name, self.split, detail or how, same_as=other.name)


def find_copies(splits: Mapping[str, Any], scans: Mapping[str, SplitScan], *, has_labels: bool) -> Iterator[Finding]:
    """Images with equal pixels, as findings `leakage`, `duplicates` and, of samples with labels, `contradiction`."""
    leaks: dict[str, list[File]] = {split: [] for split in splits}
    twins: dict[str, list[File]] = {split: [] for split in splits}
    contradictions: list[File] = []
    for group in _groups(splits, scans):
        first_of_split: dict[str, _Member] = {}
        for member in group:
            if member.split in first_of_split:
                twins[member.split].append(member.duplicates(first_of_split[member.split]))
            elif first_of_split:
                leaks[member.split].append(member.duplicates(group[0]))
            first_of_split.setdefault(member.split, member)
        if has_labels:
            first, *others = [f"labelled {splits[one.split].label_text(one.index)}" for one in group]
            if any(label != first for label in others):
                contradictions.append(File(group[0].name, group[0].split, first))
                contradictions += [one.duplicates(group[0], of) for one, of in zip(group[1:], others, strict=True)]
    for split, files in leaks.items():
        text = f"also in another split, which makes the metrics of {split} too high; keep each image in one split"
        yield from _finding(Level.error, "leakage", text, split, files)
    for split, files in twins.items():
        yield from _finding(Level.warning, "duplicates", "in the split more than once; remove the copies", split, files)
    text = "in the data with different labels; keep one of each, with the right label"
    yield from _finding(Level.warning, "contradiction", text, None, contradictions)


def _finding(level: Level, code: str, text: str, split: str | None, files: list[File]) -> Iterator[Finding]:
    if files:
        images = "1 image is" if len(files) == 1 else f"{len(files):,} images are"
        yield Finding(level, code, f"{images} {text}", split, tuple(files))


def _groups(splits: Mapping[str, Any], scans: Mapping[str, SplitScan]) -> Iterator[list[_Member]]:
    """Groups of two or more images with equal pixels, each in the order of the splits."""
    order = list(splits)
    indices = [scans[split].readable for split in order]
    where = np.repeat(np.arange(len(order)), [len(of_split) for of_split in indices])
    places = np.concatenate(indices)
    hashes = np.concatenate([scans[split].columns["pixels"][of] for split, of in zip(order, indices, strict=True)])
    by_hash = np.argsort(hashes, kind="stable")
    starts = np.flatnonzero(np.diff(hashes[by_hash], prepend=hashes[by_hash][:1] + np.uint64(1)))
    groups = [group for group in np.split(by_hash, starts[1:]) if len(group) > 1]
    for group in sorted(groups, key=lambda group: int(group[0])):
        yield [
            _Member(split, index, splits[split].names[index], int(scans[split].columns["file"][index]))
            for split, index in ((order[where[at]], int(places[at])) for at in group)
        ]
