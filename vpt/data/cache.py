"""Pictures that are decoded once, however many epochs and processes read them."""

import itertools
import mmap
import os
import sys
import tempfile
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing.reduction import DupFd
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from vpt.data.images import check_image
from vpt.data.samples import DetectionSamples, Samples
from vpt.storage.files import reserve

Size = tuple[int, int]  # width, height in pixels
SamplesT = TypeVar("SamplesT", Samples, DetectionSamples)

# What the flag of a picture says of its pixels.
MISSING, AS_IN_HEADER, TURNED = 0, 1, 2


class PictureCache:
    """A reader that decodes each picture once, whichever process asks for it first.

    The pixels lie in one temporary file that every process maps into its memory. The file has no name, so the system
    removes it with the last process that has it open, however that ends. Shared memory (/dev/shm) would do the same,
    but holds only 64 MB in many containers.

    Args:
        reader: Decodes the RGB picture of an index.
        sizes: Width and height in the header of each picture. EXIF may turn a picture, which swaps them.

    Raises:
        OSError: The temporary folder has no room.
    """

    def __init__(self, reader: Callable[[int], Image.Image], sizes: Sequence[Size]) -> None:
        self.reader = reader
        self.sizes = tuple(sizes)
        with tempfile.TemporaryFile() as file:
            reserve(file.fileno(), sum(map(num_bytes, self.sizes)) + len(self.sizes))
            self._map(os.dup(file.fileno()))

    def __call__(self, index: int) -> Image.Image:
        """Read a picture, mode RGB."""
        size, start = self.sizes[index], self._starts[index]
        pixels = self._pixels[start : start + num_bytes(size)]
        if self._flags[index] != MISSING:
            return Image.frombytes("RGB", size if self._flags[index] == AS_IN_HEADER else size[::-1], pixels.tobytes())
        image = self.reader(index)
        if image.size in (size, size[::-1]):
            pixels[:] = np.asarray(image).reshape(-1)
            # Only now, so that no other process reads half a picture; one that decodes it too writes the same bytes.
            self._flags[index] = AS_IN_HEADER if image.size == size else TURNED
        return image

    def __getstate__(self) -> dict[str, Any]:
        """For a worker that is started afresh: the open file is handed on by its number, as torch does it."""
        return {"reader": self.reader, "sizes": self.sizes, "handle": DupFd(self._handle)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.reader, self.sizes = state["reader"], state["sizes"]
        self._map(state["handle"].detach())

    def _map(self, handle: int) -> None:
        """Map the file, all pixels first, then a flag for each picture; it stays open as long as this object lives."""
        self._handle = handle
        weakref.finalize(self, os.close, handle)
        buffer = np.frombuffer(mmap.mmap(handle, 0), dtype=np.uint8)
        *self._starts, end = itertools.accumulate(map(num_bytes, self.sizes), initial=0)
        self._pixels, self._flags = buffer[:end], buffer[end:]


def cache_pictures(samples: SamplesT, sizes: Sequence[Size]) -> SamplesT:
    """The same samples behind a `PictureCache`; `sizes` are what `decoded_sizes` says.

    Raises:
        OSError: The temporary folder has no room.
    """
    return replace(samples, reader=PictureCache(samples.read, sizes))


def decoded_sizes(samples: Samples | DetectionSamples, max_bytes: float) -> list[Size] | None:
    """Width and height of all pictures by their headers; None as soon as their pixels are more than `max_bytes`.

    Args:
        samples: Pictures that are files.
        max_bytes: Three bytes are counted for a pixel.
    """
    sizes: list[Size] = []
    for path in samples.paths:
        sizes.append(check_image(path, max_pixels=sys.maxsize))  # the limit of a run was checked when they were found
        max_bytes -= num_bytes(sizes[-1])
        if max_bytes < 0:
            return None
    return sizes


def num_bytes(size: Size) -> int:
    """Bytes of an RGB picture."""
    return size[0] * size[1] * 3
