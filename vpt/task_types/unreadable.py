"""Images that cannot be read, handled by `data.on_error` before anything else is done with the data."""

from collections.abc import Mapping, Sequence

from torch.utils.data import Dataset

from vpt.build import choose_num_workers
from vpt.config.errors import ConfigError
from vpt.config.schema import Config, OnError
from vpt.data.images import ImageError
from vpt.data.loaders import build_loader
from vpt.data.samples import Samples, SamplesT, refuse_unreadable
from vpt.engine.console import Progress

BATCH_SIZE = 16

LeftOut = list[tuple[str, str]]  # names of train images that cannot be read, and the reason, with the path


def leave_out_unreadable(
    config: Config, samples: Mapping[str, SamplesT], known: Sequence[tuple[str, str]] = ()
) -> tuple[dict[str, SamplesT], LeftOut]:
    """Samples without train images that cannot be read, and those; if any may be skipped, all images are decoded.

    `data.on_error=stop` leaves out none; `known` are train images that the reader has left out already, and why.

    Raises:
        ImageError: An image of val or test cannot be read, or one of train, and none may be skipped.
        ConfigError: More of train cannot be read than may be skipped, or all images of a class.
    """
    if config.data.on_error is OnError.stop:
        try:
            refuse_unreadable([reason for _, reason in known])
        except ImageError as error:
            raise ImageError(f"{error}, or leave it out of train with data.on_error=skip") from error
        return dict(samples), []
    found = {split: find_unreadable(config, split, members) for split, members in samples.items()}
    train, reasons = samples["train"], found.pop("train")
    for others in found.values():
        refuse_unreadable(list(others.values()))
    left_out = list(known) + [(train.names[index], reason) for index, reason in reasons.items()]
    num_train = len(train) + len(known)
    if len(left_out) > config.data.max_skipped * num_train or (left_out and len(left_out) == num_train):
        raise ConfigError(
            f"{len(left_out):,} of {num_train:,} train images cannot be read, more than data.max_skipped="
            f"{config.data.max_skipped:g} allows; first {left_out[0][1]}; replace or remove them, or raise the limit"
        )
    if not reasons:
        return dict(samples), left_out
    rest = train.take([index for index in range(len(train)) if index not in reasons])
    if lost := sorted(_labels(train) - _labels(rest)):
        raise ConfigError(
            f"class {train.classes[lost[0]]!r}: none of its train images can be read; replace them, or remove the class"
        )
    return {**samples, "train": rest}, left_out


def find_unreadable(config: Config, split: str, samples: Samples) -> dict[int, str]:
    """Decode every image, in as many processes as in training; why images cannot be read, with the path, by index."""
    workers, timeout_s = choose_num_workers(config.num_workers), config.data.timeout_s
    loader = build_loader(
        _Trial(samples), BATCH_SIZE, shuffle=False, num_workers=workers, collate_fn=list, timeout_s=timeout_s
    )
    reasons: list[str] = []
    with Progress(total=len(loader), description=f"check {split}") as progress:
        for batch in loader:
            reasons += batch
            progress.advance(len(batch))
    return {index: reason for index, reason in enumerate(reasons) if reason}


def describe_left_out(left_out: Sequence[tuple[str, str]]) -> list[str]:
    """A line on the images that were left out, if there are any."""
    if not left_out:
        return []
    images = "1 train image" if len(left_out) == 1 else f"{len(left_out):,} train images"
    return [f"{images} cannot be read, left out; first {left_out[0][1]}"]


class _Trial(Dataset[str]):
    """Why an image cannot be read, for each key; empty for most."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __getitem__(self, key: tuple[int, int]) -> str:
        try:
            self.samples.read(key[1])
        except ImageError as error:
            return str(error)
        return ""

    def __len__(self) -> int:
        return len(self.samples)


def _labels(samples: Samples) -> set[int]:
    return {label for index in range(len(samples)) for label in samples.labels_of(index).tolist()}
