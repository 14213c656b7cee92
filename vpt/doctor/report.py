"""The whole checkup: all looks and comparisons of a data set, as text and as JSON."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vpt.config.schema import Config, OnError
from vpt.data.splits import take_per_class
from vpt.doctor.boxes import find_box_problems, find_small_boxes
from vpt.doctor.classes import Counts, count_classes, find_class_problems
from vpt.doctor.copies import find_copies
from vpt.doctor.findings import Finding, Level, format_findings, printable, some, sort_findings, storable
from vpt.doctor.images import find_ignored, find_size_problems, find_unreadable, find_unusual
from vpt.doctor.reading import Reading, read_data
from vpt.doctor.scan import Looks, look_at
from vpt.doctor.training_plan import Input, Plan, input_of, make_plan
from vpt.engine.console import format_table

VERSION = 1  # of the JSON
MANY = 20  # classes; of more the table shows the largest and the smallest


@dataclass(frozen=True)
class Checkup:
    """What is known of a data set after every picture was looked at once.

    Args:
        config: Of the run that would train on it.
        reading: What was read.
        looks: What was seen, by split.
        counts: Pictures or boxes of each class, by split; empty if labels could not be read.
        input: How the backbone wants its pictures; None if that is not known here.
        findings: Worst first.
        plan: What training would do.
    """

    config: Config
    reading: Reading
    looks: dict[str, Looks]
    counts: Counts
    input: Input | None
    findings: list[Finding]
    plan: Plan

    @property
    def is_fine(self) -> bool:
        """Whether there is no error."""
        return not any(finding.level is Level.error for finding in self.findings)

    @property
    def what(self) -> str:
        """What `counts` counts."""
        return "boxes" if self.config.task == "detection" else "pictures"

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; empty if they could not be read."""
        return tuple(next(iter(self.reading.splits.values())).classes) if self.counts else ()

    def __str__(self) -> str:
        parts = [self._split_table(), self._class_table(), format_findings(self.findings), self._plan_text()]
        lines = "\n\n".join(part for part in parts if part).split("\n")
        return "\n".join(map(printable, lines))

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON has it, see docs/doctor.md."""
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
        looks = self.looks[split]
        counts = self.counts.get(split)
        by_class = None if counts is None else dict(zip(self.classes, counts.tolist(), strict=True))
        names = ("smallest", "median", "largest")
        return {
            "pictures": len(looks.columns),
            "unreadable": len(looks.errors),
            "sizes": dict(zip(names, sizes_of(looks), strict=False)) or None,
            self.what + "_of_class": by_class,
        }

    def _split_table(self) -> str:
        rows = []
        for split, looks in self.looks.items():
            sizes = [f"{width} x {height}" for width, height in sizes_of(looks)] or ["-"] * 3
            rows.append([split, f"{len(looks.columns):,}", f"{len(looks.errors):,}", *sizes])
        return format_table(rows, ["split", "pictures", "unreadable", "smallest", "median", "largest"])

    def _class_table(self) -> str:
        if not self.counts:
            return ""
        columns = [of_split.tolist() for of_split in self.counts.values()]
        rows = [[name, *(f"{num:,}" for num in row)] for name, *row in zip(self.classes, *columns, strict=True)]
        if len(rows) > MANY:
            order = np.argsort(-self.counts["train"], kind="stable")
            ends = [*order[: MANY // 2], *order[-MANY // 2 :]]
            rows = [rows[label] for label in ends]
        heading = f"{len(self.classes):,} classes, {self.what}"
        heading += f"; the {MANY // 2} largest and the {MANY // 2} smallest" if len(self.classes) > MANY else ""
        return f"{heading}\n{format_table(rows, ['class', *self.counts])}"

    def _plan_text(self) -> str:
        plan, train = self.plan, self.config.train
        used = ", ".join(f"{split} {num:,}" for split, num in plan.pictures.items())
        how = f"; {some(plan.split_off)} split off train by dataset.split_seed" if plan.split_off else ""
        steps = f"{plan.steps_per_epoch:,} steps an epoch, {plan.steps:,} in {train.epochs} epochs"
        runs = f"would stop: {plan.stops_at}" if plan.stops_at else f"would run: {used}{how}; {steps}"
        return f"training  {runs}\nnext      {plan.next}"


def check(config: Config, command: str) -> Checkup:
    """Read a data set, look at every picture once, and compare.

    Args:
        config: What would be trained on it, and how.
        command: What would train on it, to be told as what to type next.

    Raises:
        ValueError: There is no picture where the config says, or the backbone is unknown.
    """
    wanted = input_of(config)
    reading = read_data(config)
    looks = look_at(config, reading.splits)
    counts = count_classes(reading.splits) if reading.has_labels else {}
    findings = sort_findings(_find(config, reading, looks, counts, wanted))
    plan = make_plan(config, _used(config, reading.splits, looks, counts), reading.split_off, findings, command)
    return Checkup(config, reading, looks, counts, wanted, findings, plan)


def sizes_of(looks: Looks) -> list[tuple[int, int]]:
    """Width and height of the smallest, the median and the largest picture by area; nothing if none can be read."""
    there = looks.columns[looks.readable]
    if not len(there):
        return []
    order = np.argsort(there["height"].astype(np.int64) * there["width"], kind="stable")
    chosen = [order[0], order[(len(order) - 1) // 2], order[-1]]
    return [(int(there["width"][at]), int(there["height"][at])) for at in chosen]


def _find(
    config: Config, reading: Reading, looks: Mapping[str, Looks], counts: Counts, wanted: Input | None
) -> Iterator[Finding]:
    splits = reading.splits
    if reading.refusal is not None:
        labels = "" if reading.has_labels else "; what follows is of the pictures alone"
        yield Finding(Level.error, "refused", reading.refusal + labels)
    yield from find_unreadable(config, splits, looks, reading.report.left_out)
    yield from find_copies(splits, looks, reading.has_labels)
    if counts:
        what = "boxes" if config.task == "detection" else "pictures"
        yield from find_class_problems(config, next(iter(splits.values())).classes, counts, what)
        yield from _find_refusals(config, splits, looks, counts)
    yield from find_box_problems(splits, reading.report, config.dataset.strict)
    if wanted is not None and wanted.strides and reading.refusal is None:
        yield from find_small_boxes(splits, wanted.preprocessing, wanted.strides)
    yield from find_size_problems(splits, looks, None if wanted is None else wanted.preprocessing)
    yield from find_unusual(config, splits, looks)
    if reading.root is not None and config.dataset.reader == "folder":
        yield from find_ignored(reading.root)
    if wanted is None:
        message = f"the input of {config.backbone.name} is known on the hub only; sizes were not compared with it"
        yield Finding(Level.note, "no_input", message)


def _find_refusals(
    config: Config, splits: Mapping[str, Any], looks: Mapping[str, Looks], counts: Counts
) -> Iterator[Finding]:
    """What a run refuses after the reader."""
    if config.task == "classification" and config.data.on_error is OnError.skip:
        train = splits["train"]
        left = np.bincount(np.array(train.targets, np.int64)[looks["train"].readable], minlength=len(train.classes))
        lost = [train.classes[label] for label in np.flatnonzero((left == 0) & (counts["train"] > 0))]
        if lost:
            message = f"no picture of these classes can be read: {some(lost)}; replace the pictures"
            yield Finding(Level.error, "lost_class", message, "train")
    if config.task == "detection" and "val" in counts and not counts["val"].any():
        yield Finding(Level.error, "no_val_boxes", "there is no box, so that no epoch could be chosen; add some", "val")
    num, seed = config.dataset.num_per_class, config.dataset.split_seed
    if num is not None:
        try:
            take_per_class(splits["train"], num, seed)
        except ValueError as error:
            yield Finding(Level.error, "refused", str(error), "train")


def _used(config: Config, splits: Mapping[str, Any], looks: Mapping[str, Looks], counts: Counts) -> dict[str, int]:
    """Pictures of each split that training would use."""
    used = {split: len(samples) - len(looks[split].errors) for split, samples in splits.items()}
    num = config.dataset.num_per_class
    if num is not None and counts:
        used["train"] = min(used["train"], num * int((counts["train"] > 0).sum()))
    return used
