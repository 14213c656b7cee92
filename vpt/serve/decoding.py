"""Decoding of uploaded images in processes that end at a deadline.

A small file can keep a decoder busy for minutes, and a thread cannot be stopped. A process can: its own timer ends it,
also when the server is gone, and the next image gets a new one. Bytes go in and pixels come out; nothing is unpickled.
"""

import io
import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from queue import LifoQueue
from typing import Any, cast

from PIL import Image

from vpt.data.images import DEFAULT_DECODING, FORMATS, Decoding, ImageError, read_image

MAX_RATIO = 100  # of the sides: an image of one row would be resized to one that fills the memory


@dataclass(frozen=True)
class Upload:
    """An uploaded image file."""

    name: str
    data: bytes


class Decoders:
    """Processes that decode images, started when they are needed; for as many threads as there are processes.

    Args:
        count: the number of processes.
        limit_s: seconds of processor time for one image.
    """

    def __init__(self, count: int, limit_s: float) -> None:
        self._all = [_Decoder(limit_s) for _ in range(count)]
        self._idle: LifoQueue[_Decoder] = LifoQueue()
        for decoder in self._all:
            self._idle.put(decoder)

    def decode(self, upload: Upload, decoding: Decoding = DEFAULT_DECODING) -> Image.Image:
        """As `read_upload`; also an ImageError if the image takes longer than the limit, or ends the process."""
        decoder = self._idle.get()
        try:
            return decoder.decode(upload, decoding)
        finally:
            self._idle.put(decoder)

    def kill(self) -> None:
        """End all processes; calls of `decode` that run fail."""
        for decoder in self._all:
            decoder.kill()


class _Decoder:
    """A process that decodes one image at a time."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection[Any, Any]

    def decode(self, upload: Upload, decoding: Decoding) -> Image.Image:
        process = self._process or self._start()
        try:
            self._pipe.send_bytes(json.dumps({"name": upload.name, "decoding": asdict(decoding)}).encode())
            self._pipe.send_bytes(upload.data)
            answer = json.loads(self._pipe.recv_bytes())
            if "error" in answer:
                raise ImageError(answer["error"])
            return Image.frombytes("RGB", answer["size"], self._pipe.recv_bytes())
        except (EOFError, OSError) as error:
            process.kill()
            is_late = process.wait() == -signal.SIGPROF
            self._pipe.close()
            self._process = None
            what = f"takes more than {self._limit_s:g} s to decode" if is_late else "ends its decoder"
            raise ImageError(f"{upload.name}: {what}; save it again as a plain JPEG or PNG") from error

    def kill(self) -> None:
        if (process := self._process) is not None:
            process.kill()
            process.wait()

    def _start(self) -> "subprocess.Popen[bytes]":
        self._pipe, other = Pipe()
        command = [sys.executable, "-m", "vpt.serve.decoding", str(other.fileno()), str(self._limit_s)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        with other:  # a session of its own: Ctrl-C is for the server, which finishes what it accepted
            self._process = subprocess.Popen(
                command, env=environment, pass_fds=[other.fileno()], stdin=subprocess.DEVNULL, start_new_session=True
            )
        return self._process


def read_upload(upload: Upload, decoding: Decoding = DEFAULT_DECODING) -> Image.Image:
    """Decode an image from memory as `read_image` does; ImageError, beginning with its name, if it cannot be used."""
    try:
        image = read_image(cast(Any, _NamedBytes(upload)), decoding)
    except TypeError as error:  # from the check whether the file is empty
        what = "not an image, or its header is broken" if upload.data else "the file is empty"
        raise ImageError(f"{upload.name}: {what}; supported are {', '.join(FORMATS)}") from error
    sides = sorted(image.size)
    if sides[1] > MAX_RATIO * sides[0]:
        raise ImageError(f"{upload.name}: {image.width} x {image.height} pixels are too narrow; crop the image")
    return image


class _NamedBytes(io.BytesIO):
    """A file in memory with a name for messages."""

    def __init__(self, upload: Upload) -> None:
        super().__init__(upload.data)
        self._name = upload.name

    def __str__(self) -> str:
        return self._name


def main() -> None:
    """Decode the images that come through a pipe, until it is closed."""
    pipe, limit_s = Connection(int(sys.argv[1])), float(sys.argv[2])
    while True:
        try:
            request, data = json.loads(pipe.recv_bytes()), pipe.recv_bytes()
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_PROF, limit_s)  # its signal ends the process, also inside a decoder
        try:
            options: dict[str, Any] = request["decoding"]
            options |= {name: tuple(value) for name, value in options.items() if isinstance(value, list)}
            image = read_upload(Upload(request["name"], data), Decoding(**options))
            answers = [json.dumps({"size": image.size}).encode(), image.tobytes()]
        except ImageError as error:
            answers = [json.dumps({"error": str(error)}).encode()]
        signal.setitimer(signal.ITIMER_PROF, 0)
        for answer in answers:
            pipe.send_bytes(answer)


if __name__ == "__main__":
    main()
