"""Samplers and loaders of batches `(images, targets)`.

A batch depends on the seed, the epoch and the indices alone. Every random number comes from `stable_seed`, and a key of
the sampler is `(epoch, index)`, so that a data set augments an image without any state of its own. The number of loader
processes, the global random state and the point where a run was resumed change nothing.

Shapes: B batch, C channels, H, W pixels.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from vpt.data.workers import WorkerLoader

TIMEOUT_S = 120.0


def stable_seed(*parts: int | str) -> int:
    """A seed in [0, 2**63) made of the parts; unlike `hash`, the same on every machine and in every process.

    Example:
        >>> stable_seed(0, 1, 2)
        1772749440416956875
    """
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


class EpochSampler(Sampler[tuple[int, int]]):
    """Keys `(epoch, index)` of one epoch, in order or shuffled by seed and epoch only.

    With the `balanced` class numbers of the samples, as many keys are drawn with replacement: first a class, each as
    likely, then one of its samples.

    Example:
        >>> sampler = EpochSampler(3, seed=0, shuffle=False)
        >>> sampler.set_epoch(5)
        >>> list(sampler)
        [(5, 0), (5, 1), (5, 2)]
    """

    def __init__(
        self, num_samples: int, seed: int = 0, shuffle: bool = False, balanced: Sequence[int] | None = None
    ) -> None:
        self.num_samples, self.seed, self.shuffle = num_samples, seed, shuffle
        self.targets = None if balanced is None else torch.tensor(balanced)
        self.epoch, self.num_skipped = 0, 0

    def set_epoch(self, epoch: int, num_skipped: int = 0) -> None:
        """Set the epoch of the next iteration, and how many of its first keys are skipped."""
        self.epoch, self.num_skipped = epoch, num_skipped

    def order(self, epoch: int) -> list[int]:
        """The indices of an epoch, in order: every index once, unless classes are balanced."""
        if not self.shuffle:
            return list(range(self.num_samples))
        generator = torch.Generator().manual_seed(stable_seed(self.seed, "order", epoch))
        if self.targets is not None:
            counts = self.targets.bincount()
            counts = counts[counts > 0]
            classes = torch.randint(len(counts), (self.num_samples,), generator=generator)
            draws = torch.rand(self.num_samples, dtype=torch.float64, generator=generator)
            places = (counts.cumsum(0) - counts)[classes] + (draws * counts[classes]).long()
            drawn: list[int] = self.targets.argsort(stable=True)[places].tolist()
            return drawn
        permutation: list[int] = torch.randperm(self.num_samples, generator=generator).tolist()
        return permutation

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((self.epoch, index) for index in self.order(self.epoch)[self.num_skipped :])

    def __len__(self) -> int:
        return self.num_samples


def build_loader(
    dataset: Dataset[Any],
    batch_size: int,
    *,
    shuffle: bool,
    balanced: Sequence[int] | None = None,
    seed: int = 0,
    num_workers: int = 0,
    collate_fn: Callable[[Any], Any] | None = None,
    timeout_s: float = TIMEOUT_S,
) -> DataLoader[Any]:
    """Build a loader of batches: images (B, 3, H, W) float32 and targets (B,) int64, or what `collate_fn` makes.

    The data set has a length, and returns (image, target) for a key (epoch, index). `shuffle` draws a new order each
    epoch, by `seed`; call `loader.sampler.set_epoch(epoch)` before each. `balanced` is that of `EpochSampler`. With 0
    workers this process reads, with the same result. By default `collate_fn` is that of torch.

    Raises:
        ValueError: The data set is empty.
        LoaderError: While iterating: a loader process dies, or takes more than `timeout_s` seconds for a batch.
    """
    num_samples = len(dataset)  # type: ignore[arg-type]
    if num_samples == 0:
        raise ValueError("the data set is empty")
    options: dict[str, Any] = {
        "pin_memory": torch.cuda.is_available(),
        # Without its own generator every iterator would draw from the global one, and a resumed run would differ.
        "generator": torch.Generator().manual_seed(stable_seed(seed, "loader")),
    }
    sampler = EpochSampler(num_samples, seed, shuffle, balanced)
    if num_workers > 0:
        return WorkerLoader(dataset, batch_size, sampler, num_workers, collate_fn, timeout_s, **options)
    return DataLoader(dataset, batch_size, sampler=sampler, collate_fn=collate_fn, **options)
