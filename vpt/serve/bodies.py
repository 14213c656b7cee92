"""Bodies: what clients send, read into memory and no further than the limits."""

import sys
from collections.abc import AsyncGenerator

from fastapi import HTTPException, Request
from starlette.formparsers import MultiPartException, MultiPartParser

from vpt.serve.batcher import QueueFull
from vpt.serve.schemas import Upload, clean_name

FIELDS = ("pictures", "file")  # of a form that hold pictures
NUM_HELD = 16  # bodies of the largest size that are held at a time, all requests together
HOW_TO_SEND = "send a form (curl -F pictures=@a.jpg) or a picture with its type (curl -H 'Content-Type: image/jpeg')"


class Bodies:
    """Reads what clients send, into memory and no further than the limits.

    Args:
        max_body: Most bytes of one request.
    """

    def __init__(self, max_body: int) -> None:
        self.max_body = max_body
        self.held = 0  # bytes, of all requests

    async def pictures(self, request: Request) -> list[Upload]:
        """The picture files of a form, or the one that is the body."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind.startswith("image/"):
            return [Upload("picture", await self.read(request))]
        if kind != "multipart/form-data":
            raise HTTPException(415, f"a body of type {clean_name(kind or 'unknown')} is no picture; {HOW_TO_SEND}")
        parser = _InMemoryParser(request.headers, self._chunks(request))
        try:
            form = await parser.parse()
        except MultiPartException as error:
            raise HTTPException(422, f"the form cannot be read ({error.message}); {HOW_TO_SEND}") from error
        files = [value for field in FIELDS for value in form.getlist(field) if not isinstance(value, str)]
        for file in files:
            file.file.seek(0)
        uploads = [Upload(clean_name(file.filename), file.file.read()) for file in files]
        await form.close()
        if not uploads:
            raise HTTPException(422, f"the form has no file in a field called {' or '.join(FIELDS)}; {HOW_TO_SEND}")
        return uploads

    async def read(self, request: Request) -> bytes:
        """The whole body."""
        return b"".join([chunk async for chunk in self._chunks(request)])

    async def _chunks(self, request: Request) -> AsyncGenerator[bytes, None]:
        """The body, until there is too much of it."""
        length = request.headers.get("content-length", "0")
        if length.isdigit() and int(length) > self.max_body:
            raise self._too_large()
        state, received = request.state, 0
        async for chunk in request.stream():
            received += len(chunk)
            self.held += len(chunk)
            state.held = received
            if received > self.max_body:
                raise self._too_large()
            if self.held > NUM_HELD * self.max_body:
                raise QueueFull("too many large requests at a time")
            yield chunk

    def release(self, request: Request) -> None:
        """Forget the body of a request that is over."""
        self.held -= getattr(request.state, "held", 0)

    def _too_large(self) -> HTTPException:
        return HTTPException(413, f"the request is larger than {self.max_body:,} bytes; send less at a time")


class _InMemoryParser(MultiPartParser):
    """Starlette's, which otherwise puts larger files on the disk."""

    spool_max_size = sys.maxsize
