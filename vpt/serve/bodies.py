"""Request bodies, read into memory up to the limits."""

import sys
from collections.abc import AsyncGenerator

from fastapi import HTTPException, Request
from starlette.formparsers import MultiPartException, MultiPartParser

from vpt.serve.batcher import QueueFull
from vpt.serve.decoding import Upload
from vpt.serve.schemas import clean_name

FIELDS = ("images", "file")  # of a form
NUM_HELD = 16  # bodies of the largest size in memory, of all requests together
HOW_TO_SEND = "send a form (curl -F images=@a.jpg) or an image with its type (curl -H 'Content-Type: image/jpeg')"


class Bodies:
    """Reads request bodies into memory, up to `max_body` bytes for each request."""

    def __init__(self, max_body: int) -> None:
        self.max_body = max_body
        self.held = 0  # bytes, of all requests

    async def images(self, request: Request) -> list[Upload]:
        """The image files of a form, or the body itself."""
        content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if content_type.startswith("image/"):
            return [Upload("image", await self.read(request))]
        if content_type != "multipart/form-data":
            raise HTTPException(415, f"not an image: {clean_name(content_type or 'unknown')}; {HOW_TO_SEND}")
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
            raise HTTPException(422, f"the form has no file in the field {' or '.join(FIELDS)}; {HOW_TO_SEND}")
        return uploads

    async def read(self, request: Request) -> bytes:
        """The whole body."""
        return b"".join([chunk async for chunk in self._chunks(request)])

    async def _chunks(self, request: Request) -> AsyncGenerator[bytes, None]:
        length = request.headers.get("content-length", "0")
        if length.isdigit() and int(length) > self.max_body:
            raise self._too_large()
        received = 0
        async for chunk in request.stream():
            received += len(chunk)
            self.held += len(chunk)
            request.state.held = received
            if received > self.max_body:
                raise self._too_large()
            if self.held > NUM_HELD * self.max_body:
                raise QueueFull("too many large requests at a time")
            yield chunk

    def release(self, request: Request) -> None:
        """Free the memory of a finished request."""
        self.held -= getattr(request.state, "held", 0)

    def _too_large(self) -> HTTPException:
        return HTTPException(413, f"the request is larger than {self.max_body:,} bytes; send less at a time")


class _InMemoryParser(MultiPartParser):
    """Starlette's parser without its temporary files."""

    spool_max_size = sys.maxsize
