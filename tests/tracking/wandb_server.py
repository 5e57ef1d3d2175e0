"""A stand-in for W&B's server on this machine: as much of its protocol as W&B's own client asks.

It keeps what it is told, and hands out the runs of a sweep as a server does: an agent registers,
asks again and again what to do, and is told to run something, then to exit.
"""

import gzip
import json
import re
import threading
from collections.abc import Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

ENTITY, PROJECT, SWEEP, AGENT = "somebody", "verbs", "abc123", "QWdlbnQ6MQ=="
OPERATION = re.compile(r"(?:query|mutation)\s+(\w+)")
KEY = "0" * 40  # of the form that the client accepts


class Server(ThreadingHTTPServer):
    """The state of the stand-in.

    Attributes:
        proposals: values of parameters to hand out, one run each; empty: agents are told to exit.
        sweep: the configuration that `wandb sweep` has sent, as YAML.
        asked: the names of the operations that clients asked for, in order.
        runs: by id, the run as it was last sent: its config, group, and what follows.
        streams: by id, what came of a run's files: by file, its lines in order.
        exit_codes: by id, of the runs that are over.
        states: what the agent last said of its runs.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.proposals: list[dict[str, Any]] = []
        self.sweep = ""
        self.asked: list[str] = []
        self.runs: dict[str, dict[str, Any]] = {}
        self.streams: dict[str, dict[str, list[str]]] = {}
        self.exit_codes: dict[str, int] = {}
        self.uploads: dict[str, dict[str, bytes]] = {}
        self.given = 0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def environment(self) -> dict[str, str]:
        """What makes W&B's client talk to this server."""
        return {"WANDB_BASE_URL": self.address, "WANDB_API_KEY": KEY}

    def history(self, run: str) -> list[dict[str, Any]]:
        """What was logged in a run, in order."""
        return [json.loads(line) for line in self.streams[run]["wandb-history.jsonl"]]

    # GraphQL, by the name of the operation

    def answer(self, name: str, given: dict[str, Any]) -> dict[str, Any]:
        self.asked.append(name)
        found = getattr(self, f"on_{name}", None)
        return found(given) if found else {}

    def on_Viewer(self, given: dict[str, Any]) -> dict[str, Any]:
        teams = {"edges": [{"node": {"name": ENTITY}}]}
        viewer = {"id": "1", "entity": ENTITY, "username": ENTITY, "email": "", "flags": "{}"}
        return {"viewer": {**viewer, "teams": teams}}

    def on_UpsertSweep(self, given: dict[str, Any]) -> dict[str, Any]:
        self.sweep = given["config"]
        project = {"id": "2", "name": given["projectName"], "entity": {"id": "3", "name": ENTITY}}
        sweep = {"name": SWEEP, "project": project}
        return {"upsertSweep": {"sweep": sweep, "configValidationWarnings": []}}

    def on_SweepWithRuns(self, given: dict[str, Any]) -> dict[str, Any]:
        sweep = {"id": "4", "name": given["sweep"], "state": "RUNNING", "config": self.sweep}
        return {"project": {"sweep": {**sweep, "runs": {"edges": []}}}}

    def on_CreateAgent(self, given: dict[str, Any]) -> dict[str, Any]:
        assert given["sweep"] == SWEEP
        return {"createAgent": {"agent": {"id": AGENT}}}

    def on_Heartbeat(self, given: dict[str, Any]) -> dict[str, Any]:
        assert given["id"] == AGENT
        commands = [] if json.loads(given["runState"]) else [self.command()]
        return {"agentHeartbeat": {"agent": {"id": AGENT}, "commands": json.dumps(commands)}}

    def command(self) -> dict[str, Any]:
        if not self.proposals:
            return {"type": "exit"}
        self.given += 1
        values = {key: {"value": value} for key, value in self.proposals.pop(0).items()}
        program = yaml.safe_load(self.sweep)["program"]
        return {"type": "run", "run_id": f"run{self.given}", "program": program, "args": values}

    def on_UpsertBucket(self, given: dict[str, Any]) -> dict[str, Any]:
        name = given.get("name") or f"own{len(self.runs) + 1}"
        is_new = name not in self.runs
        sent = {key: value for key, value in given.items() if value is not None}
        self.runs[name] = {**self.runs.get(name, {}), **sent}
        project = {"name": given.get("project") or PROJECT, "entity": {"name": ENTITY}}
        bucket = {
            "id": f"id-{name}",
            "name": name,
            "displayName": self.runs[name].get("displayName", name),
            "sweepName": given.get("sweep"),
            "historyLineCount": 0,
            "project": project,
        }
        return {"upsertBucket": {"bucket": bucket, "inserted": is_new}}

    def on_RunResumeStatus(self, given: dict[str, Any]) -> dict[str, Any]:
        name = given["name"]
        if name not in self.runs:
            return {"model": {"id": "2", "name": given["project"], "bucket": None}}
        lines = self.streams.get(name, {}).get("wandb-history.jsonl", [])
        bucket = {
            "id": f"id-{name}",
            "name": name,
            "summaryMetrics": "{}",
            "historyLineCount": len(lines),
            "eventsLineCount": 0,
            "logLineCount": 0,
            "historyTail": json.dumps(lines[-1:]),
            "eventsTail": json.dumps([]),
            "config": self.runs[name].get("config", "{}"),
            "tags": self.runs[name].get("tags", []),
            "wandbConfig": json.dumps({"t": 1}),
        }
        entity = {"id": "3", "name": ENTITY}
        return {"model": {"id": "2", "name": PROJECT, "entity": entity, "bucket": bucket}}

    def on_CreateRunFiles(self, given: dict[str, Any]) -> dict[str, Any]:
        place = f"{self.address}/upload/{given['run']}"
        files = [{"name": name, "uploadUrl": f"{place}/{name}"} for name in given["files"]]
        made = {"runID": f"id-{given['run']}", "uploadHeaders": [], "files": files}
        return {"createRunFiles": made}

    # The stream of a run's files

    def take(self, run: str, sent: dict[str, Any]) -> None:
        for file, chunk in (sent.get("files") or {}).items():
            self.streams.setdefault(run, {}).setdefault(file, []).extend(chunk["content"])
        if "exitcode" in sent:
            self.exit_codes[run] = sent["exitcode"]


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        sent = self.body()
        parts = self.path.strip("/").split("/")
        if parts == ["graphql"]:
            asked = json.loads(sent)
            name = OPERATION.search(asked["query"])
            assert name is not None
            found = self.server.answer(name[1], asked.get("variables") or {})
            self.reply({"data": found})
        elif parts[-1] == "file_stream":
            self.server.take(parts[-2], json.loads(sent))
            self.reply({})
        else:
            self.reply({})

    def do_PUT(self) -> None:
        run, _, file = self.path.removeprefix("/upload/").partition("/")
        self.server.uploads.setdefault(run, {})[file] = self.body()
        self.reply({})

    def do_GET(self) -> None:
        self.reply({})

    do_HEAD = do_GET

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            sent = b"".join(iter(self.chunk, b""))
        else:
            sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        return gzip.decompress(sent) if self.headers.get("Content-Encoding") == "gzip" else sent

    def chunk(self) -> bytes:
        sent = self.rfile.read(int(self.rfile.readline(), 16))
        self.rfile.readline()
        return sent

    def reply(self, said: dict[str, Any]) -> None:
        body = b"" if self.command == "HEAD" else json.dumps(said).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving() -> Generator[Server]:
    """A server that answers within the block."""
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()
