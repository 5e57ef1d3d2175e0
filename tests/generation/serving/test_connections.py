"""Clients on this machine who hold connections of `petl serve` open."""

import re
import resource
import socket
import time
from contextlib import ExitStack
from urllib.parse import urlsplit

import httpx
import pytest
from server_fixtures import started

from petl.cli.main import main
from petl.generation.serving import connections

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
