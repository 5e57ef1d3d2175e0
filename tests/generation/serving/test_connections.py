"""Clients on this machine who hold connections of `petl serve` open."""

import asyncio
import re
import resource
import socket
import time
from contextlib import ExitStack
from urllib.parse import urlsplit

import httpx
import pytest
from server_fixtures import connected, started

from petl.cli.main import main
from petl.generation.serving import connections
from petl.generation.serving.gate import BODY_BYTES, IMAGE_BODY_BYTES, LARGE_BODIES, Gate

pytest_plugins = ["writer_fixtures", "server_fixtures"]


@pytest.fixture(scope="module")
def server(writers, tmp_path_factory):
    with started(tmp_path_factory.mktemp("server") / "log", f"lora={writers.folder}/lora") as found:
        yield found


def health(server, **headers):
    return httpx.get(server.url.replace("/v1", "/health"), headers=headers, timeout=10)


@pytest.mark.thorough
def test_connections_with_unfinished_headers_keep_nobody_out(server):
    place = urlsplit(server.url)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    number = min(1010, most - 100)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    assert number > connections.OF_ONE_ADDRESS
    with ExitStack() as opened:
        held = []
        for _ in range(number):
            one = opened.enter_context(socket.create_connection((place.hostname, place.port), 5))
            one.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-A")
            held.append(one)
        start = time.monotonic()
        assert health(server).status_code == 200
        assert time.monotonic() - start < 3
        held[0].settimeout(5)
        assert held[0].recv(100) == b""  # the oldest one has made room


@pytest.mark.thorough
def test_headers_have_to_arrive_in_time(server):
    place = urlsplit(server.url)
    with socket.create_connection((place.hostname, place.port), 5) as one:
        one.settimeout(connections.HEADER_SECONDS + 10)
        start = time.monotonic()
        one.sendall(b"GET /health HTTP/1.1\r\n")
        assert one.recv(100) == b""
        assert 1 < time.monotonic() - start < connections.HEADER_SECONDS + 5
    # also of a later request on a connection
    with socket.create_connection((place.hostname, place.port), 5) as one:
        one.settimeout(connections.HEADER_SECONDS + 10)
        one.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        while b"waiting" not in one.recv(1000):
            pass
        one.sendall(b"GET /health HTTP/1.1\r\n")
        assert one.recv(100) == b""


async def answered(scope, receive, send):
    """Reply with 2**25 bytes once the body is there."""
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"x" * 2**25})


async def streamed(scope, receive, send):
    """Reply in parts, each after the one before was taken, as an answer is streamed."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for number in range(1, 2**9 + 1):
        part = {"body": b"x" * 2**16, "more_body": number < 2**9}
        await send({"type": "http.response.body", **part})


BODY = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n{"
GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"


@pytest.mark.parametrize(
    ("app", "begun"),
    [(answered, BODY), (answered, GET), (streamed, GET), (answered, 2 * GET)],
    ids=["body", "reply", "stream", "second reply"],
)
def test_unfinished_bodies_and_unread_replies_keep_nobody_out(monkeypatch, app, begun):
    monkeypatch.setattr(connections, "OF_ONE_ADDRESS", 3)

    async def clients(port, state):
        held = []
        for _ in range(3):
            held.append(await asyncio.open_connection("127.0.0.1", port, limit=2**10))
            held[-1][1].write(begun)
            while state.total_requests + len(state.tasks) < len(held):
                await asyncio.sleep(0.01)
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**26)
        writer.write(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        assert len(await reader.read()) > 2**25
        assert len(state.connections) <= 3
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):  # the oldest one
            await held[0][0].readexactly(2**25)
        for _, each in held:
            each.transport.abort()

    connected(app, clients)


@pytest.mark.parametrize(
    ("app", "asked"),
    [(answered, GET), (streamed, GET), (answered, 2 * GET)],
    ids=["reply", "stream", "second reply"],
)
def test_a_reply_that_is_never_read_ends(monkeypatch, app, asked):
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.01)
    monkeypatch.setattr(connections, "FLUSH_SECONDS", 0.01)
    begun = []

    async def noted(scope, receive, send):
        begun.append(scope)
        await app(scope, receive, send)

    async def clients(port, state):
        _, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**10)
        writer.write(asked)
        while not begun or state.connections:
            await asyncio.sleep(0.01)
        writer.transport.abort()

    connected(noted, clients)


def test_large_bodies_are_few_at_a_time():
    entered, go_on, sent = [], asyncio.Event(), []

    async def app(scope, receive, send):
        entered.append(scope["path"])
        await go_on.wait()

    async def ask(path, *headers, size=1):
        async def receive():
            return {"type": "http.request", "body": b"x" * size, "more_body": False}

        async def send(message):
            sent.append(message.get("status"))

        scope = {"type": "http", "path": path, "headers": [*headers]}
        await gate(scope, receive, send)

    async def clients():
        large = (b"content-length", str(BODY_BYTES + 1).encode())
        tasks = [asyncio.create_task(ask("large", large)) for _ in range(LARGE_BODIES + 3)]
        tasks.append(asyncio.create_task(ask("small", (b"content-length", b"1"))))
        await ask("unannounced", size=BODY_BYTES + 1)
        for _ in range(100):
            await asyncio.sleep(0)
        assert (entered.count("large"), entered.count("small")) == (LARGE_BODIES, 1)
        assert 413 in sent
        go_on.set()
        await asyncio.gather(*tasks)
        assert entered.count("large") == LARGE_BODIES + 3

    gate = Gate(app, body_bytes=IMAGE_BODY_BYTES)
    asyncio.run(clients())


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("evil.example", 403),
        ("evil.example:8000", 403),
        ("localhost.evil.example", 403),
        ("", 403),
        ("localhost", 200),
        ("LOCALHOST:1", 200),
        ("127.0.0.1:80", 200),
        ("[::1]:80", 200),
        ("[::1", 403),
    ],
)
def test_pages_of_other_sites_cannot_use_the_server_under_their_name(server, host, status):
    reply = health(server, Host=host)
    assert reply.status_code == status
    if status == 403:
        assert "--allow-host" in reply.json()["error"]["message"]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.invalid"])
def test_a_host_that_others_reach_needs_a_key(writers, capsys, monkeypatch, host):
    monkeypatch.delenv("PETL_API_KEY", raising=False)
    assert main(["serve", f"{writers.folder}/lora", "--host", host, "--port", "0"]) == 2
    error = capsys.readouterr().err
    assert f"--host={host}" in error
    assert re.search("--api-key.*--allow-anyone", error)
