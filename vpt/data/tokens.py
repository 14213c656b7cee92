"""Data set of cached tokens, and the folder that stores them between runs.

Shapes: N tokens, D token width.
"""

import hashlib
import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from vpt.data.samples import Samples
from vpt.storage.files import write_chunks

DIGEST_BYTES = 32
DAY_S = 24 * 3600


class TokenDataset(Dataset[tuple[Tensor, int]]):
    """Tokens of a backbone, (num, N, D) or (num, D), and targets, by the keys of a `ClassificationDataset`."""

    def __init__(self, tokens: Tensor, targets: Sequence[int]) -> None:
        assert len(tokens) == len(targets)
        self.tokens, self.targets = tokens, targets

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, int]:
        index = key[1] if isinstance(key, tuple) else key
        return self.tokens[index], self.targets[index]

    def __len__(self) -> int:
        return len(self.targets)


class TokenFolder:
    """Files of tokens by key, mapped into memory when they are read.

    A file holds the bytes of the tokens and their sha256. It is complete or absent, also if two runs write it at once.
    The first write creates the folder. Beyond `max_bytes` in all the least recently used files are removed.
    """

    def __init__(self, path: Path, max_bytes: float) -> None:
        self.path, self.max_bytes = path, max_bytes

    def read(self, key: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor | None:
        """The tokens of a key; None if there are none, or the file is damaged."""
        path, size = self.path / f"{key}.tokens", math.prod(shape) * dtype.itemsize
        if not path.is_file() or path.stat().st_size != size + DIGEST_BYTES:
            return None
        try:
            content = torch.from_file(str(path), shared=False, size=size + DIGEST_BYTES, dtype=torch.uint8)
        except RuntimeError:  # another run has just removed it
            return None
        if hashlib.sha256(content[:size].numpy().data).digest() != content[size:].numpy().tobytes():
            return None
        with suppress(OSError):  # in a folder of another user
            os.utime(path)  # for the order of removal
        return content[:size].view(dtype).view(*shape)

    def write(self, key: str, parts: Iterable[Tensor], shape: Sequence[int], dtype: torch.dtype) -> None:
        """Write tokens passed in parts, in order of rows; an `OSError` if the disk is full, or no write is allowed."""
        size = math.prod(shape) * dtype.itemsize + DIGEST_BYTES
        self._make_room(size)
        write_chunks(self.path / f"{key}.tokens", _with_digest(parts), size)

    def _make_room(self, size: int) -> None:
        for leftover in self.path.glob(".*.tokens.*"):  # of a run that was killed while writing
            with suppress(FileNotFoundError):  # another run may remove the same files
                if time.time() - leftover.stat().st_mtime > DAY_S:
                    leftover.unlink()
        found = {}
        for file in self.path.glob("*.tokens"):
            with suppress(FileNotFoundError):
                found[file] = file.stat()
        used = sum(status.st_size for status in found.values())
        for file, status in sorted(found.items(), key=lambda item: item[1].st_mtime):
            if used + size <= self.max_bytes:
                break
            used -= status.st_size
            file.unlink(missing_ok=True)  # a run that has mapped it is not affected


def _with_digest(parts: Iterable[Tensor]) -> Iterator[bytes]:
    digest = hashlib.sha256()
    for part in parts:
        content = part.contiguous().view(torch.uint8).numpy().tobytes()
        digest.update(content)
        yield content
    yield digest.digest()


def content_sha256(samples: Samples) -> str:
    """SHA-256 of the content of all images, in order: of the bytes of files, or of pixels if there are no files."""
    digest = hashlib.sha256()
    for index in range(len(samples)):
        if samples.paths:
            content = samples.paths[index].read_bytes()
        else:
            image = samples.read(index)
            content = f"{image.size}".encode() + image.tobytes()
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()
