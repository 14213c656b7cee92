"""Cache of decoded images, shared by all epochs and processes."""

import itertools
import mmap
import os
import sys
import tempfile
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np
from PIL import Image

from vpt.data.images import Decoding, check_image
from vpt.data.samples import Samples, SamplesT
from vpt.storage.files import reserve

Size = tuple[int, int]  # width, height in pixels

# Flag of an image: not decoded yet, of the size in its header, or with width and height swapped by EXIF.
MISSING, AS_IN_HEADER, TURNED = 0, 1, 2


class ImageCache:
    """A reader that decodes each image once, in whichever process reads it first.

    The pixels are in one temporary file that every process maps into its memory. The file has no name, so the system
    removes it when the last process that has it open ends. Shared memory (/dev/shm) has only 64 MB in many containers.

    `reader` decodes the RGB image of an index; `sizes` are width and height in the headers, which EXIF orientation may
    swap. An `OSError` is raised if the temporary folder has no room.
    """

    def __init__(self, reader: Callable[[int], Image.Image], sizes: Sequence[Size]) -> None:
        self.reader, self.sizes = reader, tuple(sizes)
        with tempfile.TemporaryFile() as file:
            reserve(file.fileno(), sum(map(num_bytes, self.sizes)) + len(self.sizes))
            self._map(os.dup(file.fileno()))

    def __call__(self, index: int) -> Image.Image:
        """Read an image, mode RGB."""
        size, start = self.sizes[index], self._starts[index]
        pixels = self._pixels[start : start + num_bytes(size)]
        if self._flags[index] != MISSING:
            return Image.frombytes("RGB", size if self._flags[index] == AS_IN_HEADER else size[::-1], pixels.tobytes())
        image = self.reader(index)
        if image.size in (size, size[::-1]):
            pixels[:] = np.asarray(image).reshape(-1)
            # Only now, so that no other process reads half an image; one that decodes it too writes the same bytes.
            self._flags[index] = AS_IN_HEADER if image.size == size else TURNED
        return image

    def __getstate__(self) -> dict[str, Any]:
        """For a process that is spawned: the open file is passed by its number, as torch does it."""
        return {"reader": self.reader, "sizes": self.sizes, "handle": DupFd(self._handle)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.reader, self.sizes = state["reader"], state["sizes"]
        self._map(state["handle"].detach())

    def _map(self, handle: int) -> None:
        """Map the file: all pixels, then a flag for each image; it is closed with this object."""
        self._handle = handle
        weakref.finalize(self, os.close, handle)
        buffer = np.frombuffer(mmap.mmap(handle, 0), dtype=np.uint8)
        *self._starts, end = itertools.accumulate(map(num_bytes, self.sizes), initial=0)
        self._pixels, self._flags = buffer[:end], buffer[end:]


def cache_images(samples: SamplesT, sizes: Sequence[Size]) -> SamplesT:
    """The same samples behind an `ImageCache`, which may raise `OSError`; `sizes` come from `decoded_sizes`."""
    return replace(samples, reader=ImageCache(samples.read, sizes))


def decoded_sizes(samples: Samples, max_bytes: float) -> list[Size] | None:
    """Width and height of all image files, from their headers; None if their pixels take more than `max_bytes`."""
    sizes: list[Size] = []
    for path in samples.paths:
        sizes.append(check_image(path, Decoding(sys.maxsize, bands=(1, 1, 1))))  # the reader checked the run's own
        max_bytes -= num_bytes(sizes[-1])
        if max_bytes < 0:
            return None
    return sizes


def num_bytes(size: Size) -> int:
    """Bytes of an RGB image."""
    return size[0] * size[1] * 3
