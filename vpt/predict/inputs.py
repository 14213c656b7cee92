"""Images to predict, files or frames of a video, read batch by batch ahead of the model."""

import itertools
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

from PIL import Image

from vpt.data.image_files import find_images, split_pattern
from vpt.data.images import Decoding, ImageError, read_image, to_rgb
from vpt.predict.progress_file import Stamp, stamp_of
from vpt.predict.video import EXTENSIONS, Video

NUM_THREADS = 4

PreparedT = TypeVar("PreparedT")
Chunks = Sequence[Sequence[Path]]
Prepare = Callable[[Callable[[Decoding], Image.Image]], PreparedT]
Batches = Generator[list[PreparedT | str]]


class Inputs(Protocol):
    """The images of one input."""

    @property
    def root(self) -> Path:
        """The folder that their names are relative to."""

    @property
    def paths(self) -> Sequence[Path]:
        """All paths, in order."""

    def stamp(self, path: Path) -> Stamp:
        """A value that changes with the image."""

    def read(self, chunks: Chunks, prepare: Prepare[PreparedT]) -> Batches[PreparedT]:
        """Prepare each image, or return why it cannot be read; at most two batches are in memory.

        `chunks` are some of the paths, in order, batch by batch. `prepare` is called from several threads, with a
        function that decodes the image as an upright RGB one.
        """


class ImageFiles:
    """An image file, those of a folder, or those that match a pattern; see `find_images`, also for errors."""

    def __init__(self, path: Path) -> None:
        self.left_out: list[Path] = []  # images in formats that cannot be read
        self.paths = find_images(path, self.left_out)
        folder, pattern = split_pattern(path)
        self.root = folder if pattern or path.is_dir() else path.parent

    def stamp(self, path: Path) -> Stamp:
        """Size and time of the file."""
        return stamp_of(path)

    def read(self, chunks: Chunks, prepare: Prepare[PreparedT]) -> Batches[PreparedT]:
        """Decode and prepare in threads."""

        def work(path: Path) -> PreparedT | str:
            try:
                return prepare(partial(read_image, path))
            except ImageError as error:
                return str(error)

        pool = ThreadPoolExecutor(NUM_THREADS)
        ahead: deque[list[Future[PreparedT | str]]] = deque()
        try:
            for chunk in chunks:
                ahead.append([pool.submit(work, path) for path in chunk])
                if len(ahead) > 1:
                    yield [future.result() for future in ahead.popleft()]
            while ahead:
                yield [future.result() for future in ahead.popleft()]
        finally:
            pool.shutdown(cancel_futures=True)


class Frames:
    """Every n-th frame of a video, see `Video`.

    Raises:
        ImageError: The file cannot be read as a video.
    """

    def __init__(self, path: Path, every: int) -> None:
        self.video = Video(path, every)
        self.paths, self.root = self.video.names, path.parent

    def stamp(self, path: Path) -> Stamp:
        """Size and time of the video."""
        return stamp_of(self.video.path)

    def read(self, chunks: Chunks, prepare: Prepare[PreparedT]) -> Batches[PreparedT]:
        """Decode all frames one by one, and drop those that are not in `chunks`."""
        if not (wanted := set(itertools.chain(*chunks))):
            return
        pairs = zip(self.paths, self.video.frames(), strict=True)
        prepared = (prepare(partial(to_rgb, frame)) for path, frame in pairs if path in wanted)
        for chunk in chunks:
            yield list(itertools.islice(prepared, len(chunk)))


def is_video(path: Path) -> bool:
    """Whether a path ends like a video file."""
    return path.suffix.lower() in EXTENSIONS and not path.is_dir()
