"""Pictures that cannot be read: what `data.on_error` says of them, before anything else is done with the data."""

from collections.abc import Mapping, Sequence
from typing import TypeVar

from torch.utils.data import Dataset

from vpt.build import choose_num_workers
from vpt.config.errors import ConfigError
from vpt.config.schema import Config, OnError
from vpt.data.images import ImageError
from vpt.data.loaders import build_loader
from vpt.data.samples import DetectionSamples, Samples, refuse_unreadable
from vpt.engine.console import Progress

BATCH_SIZE = 16

SamplesT = TypeVar("SamplesT", Samples, DetectionSamples)
LeftOut = list[tuple[str, str]]  # names of train pictures that cannot be read, and what is wrong, with the path


def leave_out_unreadable(
    config: Config, samples: Mapping[str, SamplesT], known: Sequence[tuple[str, str]] = ()
) -> tuple[dict[str, SamplesT], LeftOut]:
    """The samples without train pictures that cannot be read, and those; if any may be skipped, all are decoded.

    Args:
        config: The run's config; `data.on_error=stop` leaves out none.
        samples: All splits.
        known: Train pictures that the reader has left out already, and why.

    Raises:
        ImageError: A picture of val or test cannot be read, or one of train, and none may be skipped.
        ConfigError: More of train cannot be read than may be skipped, or all pictures of a class.
    """
    if config.data.on_error is OnError.stop:
        _refuse_known(known)
        return dict(samples), []
    found = {split: find_unreadable(config, split, members) for split, members in samples.items()}
    train, reasons = samples["train"], found.pop("train")
    for others in found.values():
        refuse_unreadable(list(others.values()))
    names: Sequence[str] = train.names
    left_out = list(known) + [(names[index], reason) for index, reason in reasons.items()]
    _refuse_too_many(config, left_out, len(train) + len(known))
    if not reasons:
        return dict(samples), left_out
    rest = train.take([index for index in range(len(train)) if index not in reasons])
    _refuse_lost_classes(train, rest)
    return {**samples, "train": rest}, left_out


def find_unreadable(config: Config, split: str, samples: Samples | DetectionSamples) -> dict[int, str]:
    """Decode every picture, in as many processes as in training: what is wrong with those that cannot be read.

    Returns:
        The reasons, with the path, by the index of the picture.
    """
    loader = build_loader(
        _Trial(samples),
        BATCH_SIZE,
        shuffle=False,
        num_workers=choose_num_workers(config.num_workers),
        collate=list,
        timeout_s=config.data.timeout_s,
    )
    reasons: list[str] = []
    with Progress(total=len(loader), description=f"check {split}") as progress:
        for batch in loader:
            reasons += batch
            progress.advance(len(batch))
    return {index: reason for index, reason in enumerate(reasons) if reason}


def describe_left_out(left_out: Sequence[tuple[str, str]]) -> list[str]:
    """A line on what is left out, if anything is."""
    if not left_out:
        return []
    pictures = "1 train picture" if len(left_out) == 1 else f"{len(left_out):,} train pictures"
    return [f"{pictures} cannot be read, left out; first {left_out[0][1]}"]


class _Trial(Dataset[str]):
    """Reads pictures, and gives what is wrong with each instead of it; nothing is wrong with most."""

    def __init__(self, samples: Samples | DetectionSamples) -> None:
        self.samples = samples

    def __getitem__(self, key: tuple[int, int]) -> str:
        try:
            self.samples.read(key[1])
        except ImageError as error:
            return str(error)
        return ""

    def __len__(self) -> int:
        return len(self.samples)


def _refuse_known(known: Sequence[tuple[str, str]]) -> None:
    try:
        refuse_unreadable([reason for _, reason in known])
    except ImageError as error:
        raise ImageError(f"{error}, or leave it out of train with data.on_error=skip") from error


def _refuse_too_many(config: Config, left_out: Sequence[tuple[str, str]], num_train: int) -> None:
    if len(left_out) > config.data.max_skipped * num_train or (left_out and len(left_out) == num_train):
        raise ConfigError(
            f"{len(left_out):,} of {num_train:,} train pictures cannot be read, more than data.max_skipped="
            f"{config.data.max_skipped:g} allows; first {left_out[0][1]}; replace or remove them, or raise the limit"
        )


def _refuse_lost_classes(before: Samples | DetectionSamples, after: Samples | DetectionSamples) -> None:
    """Refuse to train without any picture of a class that had some."""
    lost = sorted(_labels(before) - _labels(after))
    if lost:
        raise ConfigError(
            f"class {before.classes[lost[0]]!r}: no train picture of it can be read; replace them, or remove the class"
        )


def _labels(samples: Samples | DetectionSamples) -> set[int]:
    if isinstance(samples, Samples):
        return set(samples.targets)
    return {label for labels in samples.labels for label in labels.tolist()}
