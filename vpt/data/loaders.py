"""Sampling and loading: from a data set to batches `(images, targets)`.

What a batch holds is decided by the seed, the epoch and the index alone. Every random number comes from
`stable_seed`, and a key of the sampler is `(epoch, index)`, so that a data set can augment a picture without any
state of its own. The number of workers, the global random state and the point where a run was resumed change nothing.

Shapes: B batch, C channels, H, W pixels.
"""

import hashlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler


def stable_seed(*parts: int | str) -> int:
    """A seed in [0, 2**63) made of the parts: the same on every machine and in every process, unlike `hash`.

    Example:
        >>> stable_seed(0, 1, 2)
        1772749440416956875
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class EpochSampler(Sampler[tuple[int, int]]):
    """Keys `(epoch, index)` of one epoch, in order or shuffled by seed and epoch only.

    Args:
        num_samples: The size of the data set.
        seed: Decides the order of every epoch.
        shuffle: Draw a new order each epoch.

    Example:
        >>> sampler = EpochSampler(3, seed=0, shuffle=False)
        >>> sampler.set_epoch(5)
        >>> list(sampler)
        [(5, 0), (5, 1), (5, 2)]
    """

    def __init__(self, num_samples: int, seed: int = 0, shuffle: bool = False) -> None:
        self.num_samples = num_samples
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration goes through."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = range(self.num_samples)
        if not self.shuffle:
            return ((self.epoch, index) for index in order)
        generator = torch.Generator().manual_seed(stable_seed(self.seed, "order", self.epoch))
        permutation: list[int] = torch.randperm(self.num_samples, generator=generator).tolist()
        return ((self.epoch, index) for index in permutation)

    def __len__(self) -> int:
        return self.num_samples


def build_loader(
    dataset: Dataset[tuple[Tensor, Any]],
    batch_size: int,
    *,
    shuffle: bool,
    seed: int = 0,
    num_workers: int = 0,
    collate: Callable[[Any], Any] | None = None,
) -> DataLoader[Any]:
    """Build a loader of batches: images (B, 3, H, W) float32, targets (B,) int64, or what `collate` makes.

    Call `loader.sampler.set_epoch(epoch)` before each epoch.

    Args:
        dataset: Has a length, and gives (image, target) for a key (epoch, index).
        batch_size: Pictures in a batch.
        shuffle: Draw a new order each epoch.
        seed: Decides the order.
        num_workers: Processes that read pictures; 0 reads in this one, with the same result.
        collate: Makes a batch of a list of items; None stacks each part, as torch does.

    Raises:
        ValueError: The data set is empty.
    """
    num_samples = len(dataset)  # type: ignore[arg-type]
    if num_samples == 0:
        raise ValueError("the data set is empty; check dataset.root")
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=EpochSampler(num_samples, seed, shuffle),
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
        worker_init_fn=_start_worker,
        # Without its own generator every new iterator would draw from the global one, and a resumed run would differ.
        generator=torch.Generator().manual_seed(stable_seed(seed, "loader")),
    )


def _start_worker(_: Any) -> None:
    """One thread per worker; Ctrl-C is for the main process, which saves and then ends its workers."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
