"""Frames of a video as images, read by OpenCV, a dependency of albumentations."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from vpt.data.images import ImageError

EXTENSIONS = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm"})


class Video:
    """The frames 0, n, 2n, ... of a video file, where n is `every`.

    Raises:
        ImageError: The file cannot be read as a video.
    """

    def __init__(self, path: Path, every: int = 1) -> None:
        self.path, self.every = path, every
        with _opened(path) as capture:
            num_frames = sum(1 for _ in iter(capture.grab, False))  # the header's number is wrong in many files
        if num_frames == 0:
            raise ImageError(f"{path}: no frame can be read; convert it to H.264 in .mp4")
        self.numbers = range(0, num_frames, every)

    @property
    def names(self) -> list[Path]:
        """A path for each frame, as if the video were a folder: `clip.mp4/000012.jpg`."""
        return [self.path / f"{number:06d}.jpg" for number in self.numbers]

    def frames(self) -> Iterator[Image.Image]:
        """The frames, mode RGB; raises ImageError if one is missing, because the file was changed meanwhile."""
        import cv2

        with _opened(self.path) as capture:
            for number in range(self.numbers[-1] + 1):
                exists = capture.grab()
                if number % self.every == 0:
                    exists, pixels = capture.retrieve()
                    if not exists:
                        raise ImageError(f"{self.path}: frame {number} cannot be read; was the file changed meanwhile?")
                    yield Image.fromarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB))


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """An open capture of OpenCV."""
    import cv2

    if not path.is_file():
        raise ImageError(f"{path}: no such file")
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)  # the backend that does not read a name as a pattern
    try:
        yield capture
    finally:
        capture.release()
