"""One client of `petl serve`, with each of its engines: processor seconds of an answer.

    taskset -c 1 python scripts/serve_engines.py FOLDER

The table of docs/how-to/serve.md is from it. FOLDER is that of a plain model or of a LoRA. Each
engine is started by itself, and gets the same requests one after the other, whose prompts differ in
their first word, so that none is reused. Processor seconds of the server are printed, since other
work on a machine does not count in them.
"""

import argparse
import re
import statistics
import subprocess
import sys
import time

import httpx
import psutil

QUESTION = "{} is a planet. Tell a long story about somebody who lives there."
PLANETS = ("Mars", "Venus", "Saturn", "Neptune")
ENGINES = {
    "petl, with drafts": [],
    "petl, without drafts": ["--drafter", "none"],
    "llama.cpp": ["--engine", "llama.cpp"],
    "llama.cpp, float16": ["--engine", "llama.cpp", "--weights", "float16"],
    "llama.cpp, q8_0": ["--engine", "llama.cpp", "--weights", "q8_0"],
}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description="One client of petl serve, with each engine.")
    parser.add_argument("folder")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--engines", nargs="+", default=[*ENGINES], choices=ENGINES)
    given = parser.parse_args()
    print("| engine | processor seconds | seconds | tokens |\n| --- | --: | --: | --: |")
    for name in given.engines:
        of_processor, seconds, tokens = measured(given.folder, ENGINES[name], given.tokens)
        print(f"| {name} | {of_processor:.2f} | {seconds:.2f} | {tokens:.0f} |", flush=True)


def measured(folder: str, words: list[str], tokens: int) -> tuple[float, ...]:
    """Medians of an answer by `petl serve`: processor seconds, seconds, tokens."""
    command = [sys.executable, "-m", "petl", "serve", f"model={folder}", *words, "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        # the line that says where it serves
        found = (re.search(r"serving on (\S+)", line) for line in process.stderr)
        url = next(each[1] for each in found if each)
        answers = [asked(url, process.pid, planet, tokens) for planet in PLANETS]
    finally:
        process.terminate()
        process.wait()
    # the first answer prepares what the others find
    return tuple(statistics.median(each) for each in zip(*answers[1:], strict=True))


def asked(url: str, pid: int, planet: str, tokens: int) -> tuple[float, float, int]:
    """Processor seconds, seconds and tokens of one answer."""
    message = {"role": "user", "content": QUESTION.format(planet)}
    body = {"model": "model", "messages": [message], "max_tokens": tokens, "temperature": 0}
    server, begun = psutil.Process(pid), time.perf_counter()
    before = sum(server.cpu_times()[:2])
    reply = httpx.post(f"{url}/chat/completions", json=body, timeout=600).json()
    spent = sum(server.cpu_times()[:2]) - before
    return spent, time.perf_counter() - begun, reply["usage"]["completion_tokens"]


if __name__ == "__main__":
    main()
