"""Faults of drafters and servers, for chaos.py: kills, a full disk, damaged bytes, exchanged files.

A drafter that a fault hits is the one that was there or the new one, whole and equal to that of an
undisturbed `petl draft`, and nothing else of its folder changes. A server goes on, or starts again,
and answers as before. Damaged bytes are refused in a few lines, or change nothing. The models are
tiny ones with random weights.
"""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 900  # seconds of a command
FULL = 20_000  # bytes: size limit of files that simulates a full disk; that of the heads is larger
MOST_LINES = 3  # of a refusal
NAMES = ("lora", "other")
DRAFT = (
    *("draft", "run", "+drafter=hydra", "drafter.heads=2", "draft.epochs=2", "draft.measured=1"),
    *("draft.answers=12", "draft.tokens=24", "draft.file=prompts.txt"),
)
QUESTIONS = ("Hi", "a b a b a", "the cat and the dog")


class Broken(Exception):
    """What a fault left is not what it must be."""


def require(holds: object, message: str) -> None:
    """Raise Broken unless a condition holds."""
    if not holds:
        raise Broken(message)


class Place:
    """A folder with a base model, two adapters of it and prompts, in which commands run."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "log.txt"
        sys.path.insert(0, str(ROOT / "tests/fixtures"))
        from tiny_tokenizers import CHATML
        from transformers import LlamaForCausalLM
        from writer_fixtures import adapt, llama_config, write

        write(folder / "llama", LlamaForCausalLM, llama_config(), chat_template=CHATML)
        for seed, name in enumerate(NAMES):
            adapt(LlamaForCausalLM, folder / "llama", "lora", "CAUSAL_LM", folder / name, seed, r=8)
        lines = [f"{question} {number}" for number in range(8) for question in QUESTIONS]
        (folder / "prompts.txt").write_text("\n".join(lines))

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        """Start a command of petl, which writes a new log.txt."""
        own = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        line = [sys.executable, "-m", "petl", *words]
        with self.log.open("wb") as log:
            return subprocess.Popen(
                line, cwd=self.folder, env={**os.environ, **own}, stdout=log, stderr=log
            )

    def run(self, *words: str) -> tuple[int, str]:
        """Run a command of petl; return its exit status and what it printed."""
        status = self.start(*words).wait(TIMEOUT)
        return status, self.log.read_text()

    def require_refused(self, status: int, out: str, file: Path) -> None:
        """Require that a command ended with a message of a few lines."""
        said = out[out.rfind("error: ") :] if "error: " in out else ""
        is_told = status in (1, 2) and said and "Traceback" not in out
        require(is_told, f"{file}, status {status}: {out[-2000:]}")
        require(len(said.splitlines()) <= MOST_LINES, f"{file}, a long message: {said}")


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of all files of a folder, by relative path."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def flip_bit(folder: Path, draw: random.Random) -> Path:
    """Flip one bit of a file of a folder; return the file."""
    file = draw.choice([f for f in sorted(folder.rglob("*")) if f.is_file() and f.stat().st_size])
    content = bytearray(file.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)
    return file


# Drafters


class Drafting:
    """`petl draft`, hit by faults."""

    kinds = ("kill -9", "kill -9 while writing", "SIGTERM", "disk full", "damaged bytes")

    def __init__(self, place: Place) -> None:
        self.place, self.run = place, place.folder / "run"
        self.earlier = self._whole("draft.seed=1")
        start = time.monotonic()
        self.expected = self._whole()
        self.seconds = time.monotonic() - start
        self.text = self._generated()[1]

    def _begin(self, drafter: dict[str, bytes]) -> None:
        """Have an adapter with these files of a drafter."""
        shutil.rmtree(self.run, ignore_errors=True)
        shutil.copytree(self.place.folder / NAMES[0], self.run)
        for name, content in drafter.items():
            (self.run / name).parent.mkdir(exist_ok=True)
            (self.run / name).write_bytes(content)

    def _whole(self, *words: str) -> dict[str, bytes]:
        self._begin({})
        status, out = self.place.run(*DRAFT, *words)
        require(status == 0, out)
        return {k: v for k, v in contents(self.run).items() if k.startswith("drafter/")}

    def _generated(self) -> tuple[int, str]:
        prompts = (word for question in QUESTIONS for word in ("--prompt", question))
        return self.place.run("generate", "run", *prompts, "--max-new-tokens", "24")

    def hit(self, kind: str, draw: random.Random) -> None:
        """Let a fault happen.

        Raises:
            Broken: it left what it must not.
        """
        if kind == "damaged bytes":
            self._begin(self.expected)
            file = flip_bit(self.run / "drafter", draw)
            status, out = self._generated()
            if out != self.text:  # drafts are checked: other ones make no other text
                self.place.require_refused(status, out, file)
            return
        earlier = draw.choice([{}, self.earlier])
        self._begin(earlier)
        before = contents(self.run)
        self._disturb(self.place.start(*DRAFT), kind, draw)
        found = {k: v for k, v in contents(self.run).items() if not k.startswith(".unfinished-")}
        whole = {k: v for k, v in before.items() if k not in earlier} | self.expected
        require(found in (before, whole), f"{kind} left neither drafter in {self.run}")
        status, out = self.place.run(*DRAFT)
        require(status == 0, out)
        require(contents(self.run) == whole, f"another drafter after {kind} in {self.run}")

    def _disturb(self, process: subprocess.Popen[bytes], kind: str, draw: random.Random) -> None:
        if kind == "disk full":
            psutil.Process(process.pid).rlimit(psutil.RLIMIT_FSIZE, (FULL, FULL))
            self.place.require_refused(process.wait(TIMEOUT), self.place.log.read_text(), self.run)
            return
        if kind == "kill -9 while writing":
            while process.poll() is None and not [*self.run.glob(".unfinished-*")]:
                time.sleep(0.002)
        else:
            time.sleep(draw.uniform(0, self.seconds))
        process.send_signal(signal.SIGTERM if kind == "SIGTERM" else signal.SIGKILL)
        process.wait(TIMEOUT)


# Servers


class Serving:
    """`petl serve` of two adapters, hit by faults."""

    kinds = (
        "kill -9 in a request",
        "kill -9 while loading",
        "SIGTERM in a request",
        "client gone in a request",
        "disk full",
        "adapter replaced",
        "damaged bytes",
    )

    def __init__(self, place: Place) -> None:
        self.place, self.seconds = place, 0.0
        start = time.monotonic()
        with self._server() as (_, url):
            self.seconds = time.monotonic() - start
            self.answers = [self._ask(url, name, q) for name in NAMES for q in QUESTIONS]
        self.adapter = contents(place.folder / NAMES[0])

    @contextmanager
    def _server(self) -> Generator[tuple[subprocess.Popen[bytes], str]]:
        """Start a server; yield it and its address, "" if it refused to start."""
        process, url = self.place.start("serve", *NAMES, "--port", "0"), ""
        try:
            while not url and process.poll() is None:
                found = re.search(r"serving on (\S+)", self.place.log.read_text())
                url = found[1] if found else ""
                time.sleep(0.05)
            yield process, url
        finally:
            process.kill()
            process.wait()

    def _request(self, url: str, name: str, question: str, tokens: int) -> urllib.request.Request:
        messages = [{"role": "user", "content": question}]
        body = {"model": name, "messages": messages, "max_tokens": tokens, "temperature": 0.0}
        head = {"Content-Type": "application/json"}
        return urllib.request.Request(f"{url}/chat/completions", json.dumps(body).encode(), head)

    def _ask(self, url: str, name: str, question: str) -> str:
        with urllib.request.urlopen(self._request(url, name, question, 40), timeout=60) as reply:
            return json.load(reply)["choices"][0]["message"]["content"]

    def _require_answers(self, url: str, what: str) -> None:
        found = [self._ask(url, name, q) for name in NAMES for q in QUESTIONS]
        require(found == self.answers, f"other answers after {what}")

    def hit(self, kind: str, draw: random.Random) -> None:
        """Let a fault happen.

        Raises:
            Broken: the server is not as it was.
        """
        adapter = self.place.folder / NAMES[0]
        if kind == "kill -9 while loading":
            process = self.place.start("serve", *NAMES, "--port", "0")
            time.sleep(draw.uniform(0, self.seconds))
            process.kill()
            process.wait()
        damaged = flip_bit(adapter, draw) if kind == "damaged bytes" else None
        with self._server() as (process, url):
            if kind.startswith(("kill -9 in", "SIGTERM", "client")):
                self._leave(process, url, kind, draw)
            if kind == "disk full":
                psutil.Process(process.pid).rlimit(psutil.RLIMIT_FSIZE, (0, 0))
            if kind == "adapter replaced":
                shutil.rmtree(adapter)
                shutil.copytree(self.place.folder / NAMES[1], adapter)
            if damaged is not None and not url:
                self.place.require_refused(process.wait(), self.place.log.read_text(), damaged)
            elif process.poll() is None:
                self._require_answers(url, f"{kind} of {damaged}" if damaged else kind)
        shutil.rmtree(adapter)
        for name, content in self.adapter.items():
            (adapter / name).parent.mkdir(exist_ok=True)
            (adapter / name).write_bytes(content)
        if kind != "damaged bytes":
            with self._server() as (_, url):
                self._require_answers(url, f"a start after {kind}")

    def _leave(
        self, process: subprocess.Popen[bytes], url: str, kind: str, draw: random.Random
    ) -> None:
        """Begin a long request; end the server in it, or the client."""
        host, port = url.removeprefix("http://").removesuffix("/v1").rsplit(":", 1)
        asked = self._request(url, NAMES[0], QUESTIONS[0], 200)
        assert isinstance(asked.data, bytes)
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}:{port}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(asked.data)}\r\n\r\n"
        with socket.create_connection((host, int(port))) as client:
            # at times a part of the body only
            client.sendall(head.encode() + asked.data[: draw.choice([None, 20])])
            time.sleep(draw.uniform(0, 0.3))
            if kind.startswith("kill -9"):
                process.kill()
                process.wait()
            elif kind.startswith("SIGTERM"):
                process.terminate()
                require(process.wait(60) == 0, f"status {process.returncode} after {kind}")


JOBS: dict[str, Callable[[Place], Drafting | Serving]] = {"draft": Drafting, "serve": Serving}


def try_faults(job: str, faults: int, seed: int) -> int:
    """Let faults happen to a job; return the exit status of the command."""
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        tried = JOBS[job](Place(Path(folder)))
        for number in range(faults):
            kind = tried.kinds[number % len(tried.kinds)]
            try:
                tried.hit(kind, draw)
            except Broken as error:
                print(f"[{number + 1}/{faults}] {kind}: {error}", file=sys.stderr)
                return 1
            print(f"[{number + 1}/{faults}] {kind}: survived", flush=True)
    print("what faults left is whole, and equal to what was undisturbed")
    return 0
