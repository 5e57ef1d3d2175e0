"""Section `clients`: answers of `petl serve` beside a loop of `generate`, and beside llama.cpp.

SmolLM2 with a LoRA that is not merged, greedy answers of 48 tokens. First one client in float32,
beside a loop over `PeftModel.generate`; then many clients at once in 16 bits (bfloat16, llama.cpp
float16). Each server is a process of its own; servers and loop answer by turns, with one thread on
one core, and the time of a server is that of its process: other work on the machine does not count.
"""

import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import httpx
import psutil
import torch
from peft import PeftModel
from transformers import AutoTokenizer

import petl
from bench.clocks import Spread
from bench.records import Record
from petl.data.models.loading import load_base, load_tokenizer
from petl.data.tasks.causal_lm import CausalLM
from petl.errors import InputError
from petl.training.compose import compose

QUESTION = "Planet {} is blue. Tell a long story about somebody who lives there."
TOKENS, MANY, WARM_UP = 48, 32, 1
ALONE = {  # one client: rows, and the words of their servers
    "petl serve, no drafts": ("--drafter", "none"),
    "petl serve": (),
    "llama.cpp": ("--engine", "llama.cpp"),
}
LLAMA = "llama.cpp, float16"
AT_ONCE = {
    LLAMA: ("--engine", "llama.cpp", "--weights", "float16"),
    "petl serve, bfloat16": (),
}
GOAL_ALONE, GOAL_MANY = 1.0, 1.25  # of the time: 0.8 of its speed is 1.25 of its time


class Cost(NamedTuple):
    """What answers have cost: processor seconds and seconds, each for a token."""

    processor: float
    elapsed: float


Answer = Callable[[Sequence[str]], Cost]  # of prompts that are asked at once


def measure(
    rounds: int, model: str = "smollm2", tokens: int = TOKENS, many: int = MANY
) -> list[Record]:
    """Return a record for each server; [] where SmolLM2 or llama.cpp is not installed.

    Args:
        rounds: timed rounds of each.
        model: of configs/model, for tests.
        tokens: of an answer.
        many: clients at once.
    """
    try:
        import xllamacpp  # noqa: F401

        with TemporaryDirectory() as name:
            full = saved(model, Path(name, "full"), torch.float32)
            half = saved(model, Path(name, "half"), torch.bfloat16)
            return [*_alone(full, rounds, tokens), *_at_once(half, rounds, tokens, many)]
    except (ImportError, InputError):
        return []


def saved(model: str, folder: Path, dtype: torch.dtype) -> Path:
    """Write a base model and a LoRA with values that are not 0; return the adapter's folder."""
    settings, task = compose([f"model={model}"]).model, CausalLM()
    tokenizer = load_tokenizer(settings)
    base = load_base(settings, task, processor=tokenizer).to(dtype)
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    adapted = petl.wrap(type(base).from_pretrained(folder / "base"), "lora", r=8)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.001 * torch.randn_like(parameter))
    adapted.save_pretrained(folder / "adapter")
    tokenizer.save_pretrained(folder / "adapter")
    return folder / "adapter"


def _alone(adapter: Path, rounds: int, tokens: int) -> list[Record]:
    with ExitStack() as stack, on_one_core():
        servers = {row: stack.enter_context(serving(adapter, w)) for row, w in ALONE.items()}
        answers = {row: asking(*server, tokens) for row, server in servers.items()}
        times = by_turns({"loop": loop(adapter, tokens), **answers}, rounds, 1)
    shape = f"SmolLM2, one client, {tokens} tokens"
    return [
        Record(
            "clients",
            shape,
            row,
            ratios={"time / loop": ratio(times[row], times["loop"])},
            facts={"goal loop": GOAL_ALONE} | per_token(times[row]),
        )
        for row in ALONE
    ]


def _at_once(adapter: Path, rounds: int, tokens: int, many: int) -> list[Record]:
    words = ("--max-batch", str(many))
    with ExitStack() as stack, on_one_core():
        servers = {
            row: stack.enter_context(serving(adapter, (*own, *words)))
            for row, own in AT_ONCE.items()
        }
        answers = {row: asking(*server, tokens) for row, server in servers.items()}
        times = by_turns(answers, rounds, many)
    shape = f"SmolLM2, {many} clients at once, {tokens} tokens each"
    return [
        Record(
            "clients",
            shape,
            row,
            ratios={} if row == LLAMA else {"time / llama.cpp": ratio(times[row], times[LLAMA])},
            facts=({} if row == LLAMA else {"goal llama.cpp": GOAL_MANY}) | per_token(times[row]),
        )
        for row in AT_ONCE
    ]


def by_turns(answers: Mapping[str, Answer], rounds: int, many: int) -> dict[str, list[Cost]]:
    """Ask all by turns; no prompt begins as an earlier one, whose keys and values are kept."""
    times: dict[str, list[Cost]] = {row: [] for row in answers}
    numbers = count(100)
    for turn in range(WARM_UP + rounds):
        prompts = [QUESTION.format(next(numbers)) for _ in range(many)]
        for row, answer in answers.items():
            cost = answer(prompts)
            if turn >= WARM_UP:
                times[row].append(cost)
    return times


def ratio(costs: Sequence[Cost], others: Sequence[Cost]) -> Spread:
    """Return the processor time of answers over that of others of the same round."""
    return Spread.of([a.processor / b.processor for a, b in zip(costs, others, strict=True)])


def per_token(costs: Sequence[Cost]) -> dict[str, float]:
    """Return the milliseconds of a token."""
    return {
        "ms / token": 1e3 * statistics.median(cost.processor for cost in costs),
        "elapsed ms / token": 1e3 * statistics.median(cost.elapsed for cost in costs),
    }


def loop(adapter: Path, tokens: int) -> Answer:
    """Return the loop of a user: a PeftModel answers one prompt after the other."""
    base, task = compose(["model=path", f"model.path={adapter.parent / 'base'}"]).model, CausalLM()
    model = PeftModel.from_pretrained(load_base(base, task), adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(adapter)

    @torch.no_grad()
    def answer(prompts: Sequence[str]) -> Cost:
        begun, spent, written = time.perf_counter(), time.process_time(), 0
        for prompt in prompts:
            turns = [{"role": "user", "content": prompt}]
            options = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
            inputs = tokenizer.apply_chat_template(turns, **options)
            ids = model.generate(**inputs, do_sample=False, max_new_tokens=tokens)
            written += ids.shape[1] - inputs["input_ids"].shape[1]
        elapsed = time.perf_counter() - begun
        return Cost((time.process_time() - spent) / written, elapsed / written)

    return answer


def asking(url: str, pid: int, tokens: int) -> Answer:
    """Return what asks a server, all prompts at once."""
    server = psutil.Process(pid)

    def ask(prompt: str) -> int:
        body = {"model": "adapter", "messages": [{"role": "user", "content": prompt}]}
        body |= {"max_tokens": tokens, "temperature": 0}
        reply = httpx.post(f"{url}/chat/completions", json=body, timeout=600)
        return reply.raise_for_status().json()["usage"]["completion_tokens"]

    def answer(prompts: Sequence[str]) -> Cost:
        begun, before = time.perf_counter(), sum(server.cpu_times()[:2])
        with ThreadPoolExecutor(len(prompts)) as pool:
            written = sum(pool.map(ask, prompts))
        elapsed = time.perf_counter() - begun
        return Cost((sum(server.cpu_times()[:2]) - before) / written, elapsed / written)

    return answer


@contextmanager
def serving(adapter: Path, words: Sequence[str]) -> Generator[tuple[str, int]]:
    """Start `petl serve` with one thread; in the block, it serves at this address."""
    command = [sys.executable, "-m", "petl", "serve", f"adapter={adapter}", *words, "--port", "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    try:
        # the line that says where it serves
        found = (re.search(r"serving on (\S+)", line) for line in process.stderr)
        url = next((each[1] for each in found if each), None)
        if url is None:
            raise RuntimeError(f"{' '.join(command)} ended before it served")
        yield url, process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


@contextmanager
def on_one_core() -> Generator[None]:
    """In the block, this process and those that it starts have one core."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
