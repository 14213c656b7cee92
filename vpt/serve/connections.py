"""Connections of the server, with limits of their number, of the time of a header and of an answer.

uvicorn limits none of these: a client that sends half a header, or never reads its answer, would hold a connection, and
the end of the server, for as long as it likes.
"""

import asyncio
import logging
import math
import resource
import signal
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_S = 10.0  # from the first byte of a connection or a request to the end of its header
SEND_S = 30.0  # for a client to read its answer
MAX_CONNECTIONS = 512
MAX_UNSENT = 64_000_000  # bytes of answers that clients have not read
FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nConnection: close\r\nRetry-After: 1\r\n"
    b'Content-Length: 35\r\n\r\n{"detail": "too many connections"}\n'
)
logger = logging.getLogger(__name__)


class LimitedProtocol(H11Protocol):
    """An HTTP/1.1 connection; when there are too many, the one that has waited longest for a header is closed."""

    _header_timer: asyncio.TimerHandle | None = None
    _send_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the time of the first header, and make room."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # pause_writing and resume_writing see every unsent byte
        self._expect_header()
        if len(self.connections) > max_connections():
            others = [other for other in self._others() if not other.transport.is_closing()]
            waiting = [other for other in others if other._header_timer is not None]
            if waiting:
                min(waiting, key=_header_end).transport.abort()
            else:
                transport.write(FULL)
                transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timers."""
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        for timer in (self._header_timer, self._send_timer):
            if timer is not None:
                timer.cancel()
        self._header_timer = self._send_timer = None

    def data_received(self, data: bytes) -> None:
        """Start the time of a header with its first byte, and stop it with its last."""
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._expect_header()
        elif self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def pause_writing(self) -> None:
        """Start the time of an answer that the client has not read, and limit those of all clients."""
        super().pause_writing()
        self._send_timer = self.loop.call_later(SEND_S, self.transport.abort)
        unsent = [other for other in (self, *self._others()) if other.transport.get_write_buffer_size()]
        if sum(other.transport.get_write_buffer_size() for other in unsent) > MAX_UNSENT:
            min(unsent, key=_send_end).transport.abort()

    def resume_writing(self) -> None:
        """Stop the time of an answer."""
        super().resume_writing()
        if self._send_timer is not None:
            self._send_timer.cancel()
            self._send_timer = None

    def on_response_complete(self) -> None:
        """Answer no further request of a client that has not read its answer."""
        if self.flow.write_paused:
            self.transport.close()
        super().on_response_complete()

    def _expect_header(self) -> None:
        if self._header_timer is None and not self.transport.is_closing():
            self._header_timer = self.loop.call_later(HEADER_S, self.transport.abort)

    def _others(self) -> "list[LimitedProtocol]":
        return [other for other in self.connections if isinstance(other, LimitedProtocol) and other is not self]


class Server(uvicorn.Server):
    """A server that ends at the second signal at once, and reports a lack of file descriptors once."""

    _has_reported = False

    async def startup(self, sockets: Any = None) -> None:
        """Listen."""
        asyncio.get_running_loop().set_exception_handler(self._handle_error)
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end; at the second signal, end without an answer to accepted requests."""
        if self.should_exit:
            signal.signal(sig, signal.SIG_DFL)
            signal.raise_signal(sig)
        super().handle_exit(sig, frame)

    def _handle_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if not context["message"].startswith("socket.accept()"):
            loop.default_exception_handler(context)
        elif not self._has_reported:
            self._has_reported = True
            logger.error("connections cannot be accepted (%s); raise the limit of open files", context["exception"])


def make_server(app: Any, timeout_s: float, log_level: str = "warning") -> Server:
    """A server for the application, whose requests end within a number of seconds."""
    config = uvicorn.Config(
        app,
        http=LimitedProtocol,
        lifespan="on",
        log_level=log_level,
        access_log=False,
        backlog=1 + max_connections() // 5,  # asyncio accepts as many at once, before a connection can be closed
        timeout_graceful_shutdown=math.ceil(timeout_s + SEND_S),
    )
    return Server(config)


def max_connections() -> int:
    """Half of the file descriptors of the process, at most `MAX_CONNECTIONS`."""
    return min(MAX_CONNECTIONS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)


def _header_end(connection: LimitedProtocol) -> float:
    return connection._header_timer.when() if connection._header_timer else math.inf


def _send_end(connection: LimitedProtocol) -> float:
    return connection._send_timer.when() if connection._send_timer else math.inf
