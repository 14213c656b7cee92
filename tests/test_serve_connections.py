"""Connections that send half a header, or never read their answer, end, and hold up neither others nor the server."""

import asyncio
import signal
import socket
import time
from contextlib import ExitStack

import pytest

from tests.helpers import SLOW, listening
from vpt.serve import connections
from vpt.serve.connections import make_server

LARGE = 16_000_000  # bytes; more than the system holds for a connection
GET_LARGE = b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n"


async def application(scope, receive, send):
    """Answers / with a word, and /large with many bytes."""
    if scope["type"] == "lifespan":
        for _ in range(2):
            message = await receive()
            await send({"type": f"{message['type']}.complete"})
        return
    body = b"x" * LARGE if scope["path"] == "/large" else b"hello"
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture
def connect():
    """A function that connects to the server of a client, and sends bytes."""
    with ExitStack() as stack:

        def connect(client, data):
            raw = stack.enter_context(socket.create_connection((client.base_url.host, client.base_url.port), SLOW))
            raw.sendall(data)
            return raw

        yield connect


def wait_until(condition):
    end = time.monotonic() + SLOW
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def num_unread(server):
    return sum(one._send_timer is not None for one in list(server.server_state.connections))


@pytest.mark.parametrize("data", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: x\r\n\r\nGET / HT"])
def test_a_header_that_does_not_end_ends_its_connection(monkeypatch, connect, data):
    monkeypatch.setattr(connections, "HEADER_S", 0.3)
    with listening(application) as (client, server):
        raw = connect(client, data)
        wait_until(lambda: server.server_state.connections)
        begin = time.monotonic()
        while server.server_state.connections:
            assert time.monotonic() - begin < SLOW
            time.sleep(0.05)
            if data and server.server_state.connections:  # a byte at a time does not extend the time
                raw.send(b"x")
        assert client.get("/").text == "hello"


@pytest.mark.slow
def test_unfinished_headers_leave_room_for_others(monkeypatch, connect):
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 5)
    with listening(application) as (client, server):
        for _ in range(20):
            connect(client, b"GET / HT")
        for _ in range(3):
            assert client.get("/", headers={"Connection": "close"}).text == "hello"
        wait_until(lambda: len(server.server_state.connections) <= 5)


def test_a_connection_beyond_the_limit_is_refused_while_all_others_are_answered(monkeypatch, connect):
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 2)
    with listening(application) as (client, server):
        held = [connect(client, GET_LARGE) for _ in range(2)]
        wait_until(lambda: num_unread(server) == 2)
        assert client.get("/").json() == {"detail": "too many connections"}
        for raw in held:
            raw.close()
        wait_until(lambda: not num_unread(server))
        assert client.get("/").text == "hello"


def test_a_client_that_never_reads_its_answer_does_not_delay_the_end(monkeypatch, connect):
    monkeypatch.setattr(connections, "SEND_S", 0.3)
    with listening(application) as (client, server):
        connect(client, 3 * GET_LARGE)
        wait_until(lambda: num_unread(server))
        begin = time.monotonic()
    assert time.monotonic() - begin < 5


def test_a_client_that_reads_gets_a_large_answer_and_may_ask_again():
    with listening(application) as (client, _):
        for _ in range(2):
            assert len(client.get("/large").content) == LARGE


def test_answers_that_are_not_read_have_a_limit_for_all_clients(monkeypatch, connect):
    monkeypatch.setattr(connections, "MAX_UNSENT", int(1.5 * LARGE))
    with listening(application) as (client, server):
        held = [connect(client, GET_LARGE) for _ in range(4)]
        wait_until(lambda: num_unread(server) == len(server.server_state.connections) == 1)
        assert client.get("/").text == "hello"
        sizes = [one.transport.get_write_buffer_size() for one in list(server.server_state.connections)]
        assert 0 < sum(sizes) <= 1.5 * LARGE
        for raw in held:
            raw.close()


def test_a_second_signal_ends_the_process(monkeypatch):
    server, sent = make_server(application, 1), []
    monkeypatch.setattr(signal, "raise_signal", sent.append)
    monkeypatch.setattr(signal, "signal", lambda *arguments: sent.append(arguments))
    server.handle_exit(signal.SIGTERM, None)
    assert (server.should_exit, sent) == (True, [])
    server.handle_exit(signal.SIGTERM, None)
    assert sent == [(signal.SIGTERM, signal.SIG_DFL), signal.SIGTERM]


def test_a_lack_of_file_descriptors_is_reported_once(caplog):
    server, loop = make_server(application, 1), asyncio.new_event_loop()
    lack = {"message": "socket.accept() out of system resource", "exception": OSError(24, "Too many open files")}
    for _ in range(3):
        server._handle_error(loop, lack)
    assert [record.name for record in caplog.records] == ["vpt.serve.connections"]
    server._handle_error(loop, {"message": "another error"})
    assert "another error" in caplog.text
    loop.close()
