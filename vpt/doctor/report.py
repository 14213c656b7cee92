"""Report of the doctor, as text and as JSON."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vpt.config.schema import Config
from vpt.doctor.classes import Counts, find_class_problems
from vpt.doctor.copies import find_copies
from vpt.doctor.images import find_size_problems, find_unreadable, find_unusual
from vpt.doctor.reading import Reading, read_data
from vpt.doctor.scan import SplitScan, scan_images
from vpt.doctor.training_plan import Input, Plan, input_of, make_plan
from vpt.engine.console import format_table
from vpt.storage.text import printable
from vpt.task_types.base import TaskType, task_type_of
from vpt.task_types.findings import File, Finding, Level, some

VERSION = 2  # of the JSON
MANY = 20  # classes; of more, the table shows the largest and the smallest


@dataclass(frozen=True)
class DoctorReport:
    """Findings about a data set and what training would do with it."""

    config: Config
    task_type: TaskType
    reading: Reading
    scans: dict[str, SplitScan]  # by split
    counts: Counts  # images or boxes of each class, by split; empty if labels could not be read
    input: Input | None  # of the backbone; None if not known here
    findings: list[Finding]  # errors first, then warnings, then notes
    plan: Plan

    @property
    def is_fine(self) -> bool:
        """Whether there are no errors."""
        return not any(finding.level is Level.error for finding in self.findings)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; empty if they could not be read."""
        return tuple(next(iter(self.reading.splits.values())).classes) if self.counts else ()

    def __str__(self) -> str:
        parts = [self._split_table(), self._class_table(), *_format_findings(self.findings), self._plan_text()]
        lines = "\n\n".join(part for part in parts if part).split("\n")
        return "\n".join(map(printable, lines))

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values, see docs/doctor.md."""
        content = {
            "version": VERSION,
            "dataset": self.config.dataset.title,
            "task": self.config.task,
            "classes": list(self.classes),
            "input": None if self.input is None else self.input.to_dict(),
            "splits": {split: self._split_dict(split) for split in self.reading.splits},
            "findings": [finding.to_dict() for finding in self.findings],
            "training": self.plan.to_dict(),
        }
        return dict(storable(content))

    def _split_dict(self, split: str) -> dict[str, Any]:
        scan, counts = self.scans[split], self.counts.get(split)
        by_class = None if counts is None else dict(zip(self.classes, counts.tolist(), strict=True))
        return {
            "images": len(scan.columns),
            "unreadable": len(scan.errors),
            "sizes": dict(zip(("smallest", "median", "largest"), _sizes_of(scan), strict=False)) or None,
            self.task_type.counted + "_of_class": by_class,
        }

    def _split_table(self) -> str:
        rows = []
        for split, scan in self.scans.items():
            sizes = [f"{width} x {height}" for width, height in _sizes_of(scan)] or ["-"] * 3
            rows.append([split, f"{len(scan.columns):,}", f"{len(scan.errors):,}", *sizes])
        return format_table(rows, ["split", "images", "unreadable", "smallest", "median", "largest"])

    def _class_table(self) -> str:
        if not self.counts:
            return ""
        columns = [of_split.tolist() for of_split in self.counts.values()]
        rows = [[name, *(f"{num:,}" for num in row)] for name, *row in zip(self.classes, *columns, strict=True)]
        if len(rows) > MANY:
            order = np.argsort(-self.counts["train"], kind="stable")
            rows = [rows[label] for label in (*order[: MANY // 2], *order[-MANY // 2 :])]
        heading = f"{len(self.classes):,} classes, {self.task_type.counted}"
        heading += f"; the {MANY // 2} largest and the {MANY // 2} smallest" if len(self.classes) > MANY else ""
        return f"{heading}\n{format_table(rows, ['class', *self.counts])}"

    def _plan_text(self) -> str:
        plan, train = self.plan, self.config.train
        used = ", ".join(f"{split} {num:,}" for split, num in plan.images.items())
        how = f"; {some(plan.split_off)} split off from train by dataset.split_seed" if plan.split_off else ""
        steps = f"{plan.steps_per_epoch:,} steps per epoch, {plan.steps:,} in {train.epochs} epochs"
        runs = f"would stop: {plan.stops_at}" if plan.stops_at else f"would run: {used}{how}; {steps}"
        return f"training  {runs}\nnext      {plan.next}"


def check(config: Config, command: str) -> DoctorReport:
    """Read the data set of a run, decode every image once, and report; `command` is that of the run.

    Raises:
        ValueError: There are no images in the configured place, or the backbone is unknown.
    """
    task_type = task_type_of(config)
    expected = input_of(config, task_type)
    reading = read_data(config)
    task_type.report = reading.report
    scans = scan_images(config, reading.splits)
    splits = reading.splits.items()
    counts = {split: samples.class_counts() for split, samples in splits} if reading.has_labels else {}
    found = _find(config, task_type, reading, scans, counts, expected)
    findings = sorted(found, key=lambda finding: list(Level).index(finding.level))
    used = {split: len(samples) - len(scans[split].errors) for split, samples in splits}
    if config.dataset.num_per_class is not None and counts:
        used["train"] = min(used["train"], config.dataset.num_per_class * int((counts["train"] > 0).sum()))
    plan = make_plan(config, used, reading.split_off, findings, command)
    return DoctorReport(config, task_type, reading, scans, counts, expected, findings, plan)


def storable(value: Any) -> Any:
    """Plain values for JSON, with bytes of names that are not UTF-8 as escapes."""
    match value:
        case str():
            return value.encode(errors="backslashreplace").decode()
        case dict():
            return {storable(key): storable(part) for key, part in value.items()}
        case list() | tuple():
            return [storable(part) for part in value]
    return value


def _format_findings(findings: Sequence[Finding]) -> Iterator[str]:
    """All findings, under a heading for each level."""
    for level in Level:
        if members := [finding for finding in findings if finding.level is level]:
            heading = f"{len(members)} {level.value}{'s' if len(members) > 1 else ''}"
            yield "\n".join([heading, *(line for finding in members for line in finding.lines())])
    if not findings:
        yield "no problems found"


def _sizes_of(scan: SplitScan) -> list[tuple[int, int]]:
    """Width and height of the smallest, the median and the largest image by area; empty if none can be read."""
    rows = scan.columns[scan.readable]
    if not len(rows):
        return []
    order = np.argsort(rows["height"].astype(np.int64) * rows["width"], kind="stable")
    return [(int(rows["width"][at]), int(rows["height"][at])) for at in order[[0, (len(order) - 1) // 2, -1]]]


def _find(
    config: Config,
    task_type: TaskType,
    reading: Reading,
    scans: Mapping[str, SplitScan],
    counts: Counts,
    expected: Input | None,
) -> Iterator[Finding]:
    splits, preprocessing = reading.splits, expected.preprocessing if expected else None
    if reading.refusal is not None:
        note = "" if reading.has_labels else "; the images were checked without their labels"
        yield Finding(Level.error, "refused", reading.refusal + note)
    yield from find_unreadable(config, splits, scans, reading.report.left_out)
    yield from find_copies(splits, scans, has_labels=reading.has_labels)
    if counts:
        yield from find_class_problems(task_type, next(iter(splits.values())).classes, counts)
    readable = {split: scans[split].readable for split in counts}
    yield from task_type.check_data(splits, readable, preprocessing, expected.strides if expected else ())
    yield from find_size_problems(splits, scans, preprocessing)
    yield from find_unusual(config, splits, scans)
    for found in reading.report.notes:
        if found.code != "split_off":  # which the plan states
            yield Finding(Level.warning, found.code, found.message, None, tuple(map(File, found.names)))
    if expected is None:
        message = f"the input size of {config.backbone.name} is known on the hub only; image sizes were not compared"
        yield Finding(Level.note, "no_input", message)
