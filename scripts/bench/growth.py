"""Section `growth`: what rows of data, and runs that are compared, take of time and memory.

Each number of rows is measured in two processes with one empty cache: the first encodes the rows,
the second finds them there. Memory is what a process has of its own (RssAnon): mapped files can be
read again. An exponent above 1 is a cost that grows faster than its work.
"""

import json
import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import torch
import yaml
from datasets import disable_progress_bars
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from bench.isolated import in_processes, quieten
from bench.records import Record
from bench.scale import exponent
from petl.cli.train import train
from petl.data.base import read_data
from petl.data.models.loading import load_tokenizer
from petl.experiments.reports.comparison import compare
from petl.experiments.reports.comparison_report import write_page
from petl.training.compose import compose
from petl.training.dataloader import encode_splits
from petl.training.distributed.launch import start
from petl.training.runs.records import CONFIG
from petl.training.runs.run_config import read_config

ROWS = (4_000, 40_000, 400_000, 4_000_000)
RUNS = (20, 200, 2_000)
WORDS = [f"word{number}" for number in range(5_000)]
LABELS, SEEDS = 8, 10
WATCHED = 0.02  # seconds between two looks at the memory
TICK = 0.01
OWN = "RssAnon:"
Costs = Mapping[str, float]  # seconds by stage, and `MB`
T = TypeVar("T")


def measure(rows: Sequence[int] = ROWS, runs: Sequence[int] = RUNS) -> list[Record]:
    """Return a record for each number of rows and of runs, and one for the growth of each."""
    with TemporaryDirectory() as given:
        folder = Path(given)
        write_model(folder / "model")
        of_rows = [costs_of_rows(folder, count) for count in rows]
        of_runs = costs_of_runs(folder, runs)
    return [*records("rows", rows, of_rows), *records("runs compared", runs, of_runs)]


def records(what: str, counts: Sequence[int], costs: Sequence[Costs]) -> list[Record]:
    """Return a record for each count, and one of exponents."""
    found = [
        Record("growth", what, f"{count:,} {what}", facts=dict(cost))
        for count, cost in zip(counts, costs, strict=True)
    ]
    # the first count is mostly what any costs; clocks of processes have ticks
    slopes = {
        name: exponent(counts[1:], [max(TICK, cost[name]) for cost in costs[1:]])
        for name in costs[0]
    }
    return [*found, Record("growth", what, f"exponent from {counts[1]:,} on", facts=slopes)]


def write_model(folder: Path) -> None:
    """Write a tiny encoder, and a tokenizer that knows the words."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    own = Tokenizer(models.WordLevel({word: i for i, word in enumerate(pieces)}, "[UNK]"))
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]"}
    PreTrainedTokenizerFast(tokenizer_object=own, **special).save_pretrained(folder)
    widths = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(pieces), num_hidden_layers=1, **widths)
    BertModel(config).save_pretrained(folder)


# Rows


def costs_of_rows(folder: Path, count: int) -> Costs:
    """Return what reading, encoding and ordering rows cost, and encoding from the cache."""
    place = folder / f"{count}"
    place.mkdir()
    for name, number in (("train", count), ("test", 100)):
        write_rows(place / f"{name}.jsonl", number)
    words = job(folder / "model", place)
    (first,) = in_processes(prepare, (words, place / "cache"))
    (again,) = in_processes(prepare, (words, place / "cache"))
    shutil.rmtree(place)
    stages = {f"{name} s": first[name] for name in ("read", "encode", "order")}
    return {**stages, "encode again s": again["encode"], "own MB": first["MB"]}


def job(model: Path, data: Path) -> list[str]:
    """Return the settings of a classification of these rows."""
    return [
        *("model=path", f"model.path={model}", "data=files", f"data.train={data}/train.jsonl"),
        *(f"data.test={data}/test.jsonl", "data.max_length=32", "+method=lora"),
        *("train.batch_size=32", "train.epochs=1", "train.linear_probe=false"),
    ]


def write_rows(file: Path, count: int) -> None:
    """Write rows of 6 to 14 words with a label."""
    rng = random.Random(file.name)
    with file.open("w") as out:
        for _ in range(count):
            words = rng.choices(WORDS, k=rng.randint(6, 14))
            line = {"text": " ".join(words), "label": f"class{rng.randrange(LABELS)}"}
            out.write(f"{json.dumps(line)}\n")


def prepare(words: list[str], cache: Path) -> Costs:
    """Read, encode and order the rows of a job in this process; return what it cost."""
    quieten()
    disable_progress_bars()
    torch.set_num_threads(1)
    os.environ["PETL_CACHE"] = str(cache)
    costs: dict[str, float] = {}
    with own_memory(costs):
        config = read_config(cfg := compose(words))
        accelerator = start(0, config.precision)
        tokenizer = load_tokenizer(cfg.model)
        data = timed(costs, "read", lambda: read_data(cfg.data))
        splits = timed(
            costs, "encode", lambda: encode_splits(data, tokenizer, config.train, accelerator)
        )
        timed(costs, "order", lambda: sum(len(step) for step in splits.sampler(config.train)))
    return costs


def timed(costs: dict[str, float], name: str, stage: Callable[[], T]) -> T:
    """Run a stage; add its processor seconds, those of ended child processes included."""
    before = os.times()
    result = stage()
    costs[name] = sum(os.times()[:4]) - sum(before[:4])
    return result


@contextmanager
def own_memory(costs: dict[str, float]) -> Generator[None]:
    """Add the largest memory that this process has of its own in a block, beyond that before."""
    ended, before = threading.Event(), own()
    largest = [before]

    def look() -> None:
        while not ended.wait(WATCHED):
            largest[0] = max(largest[0], own())

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        costs["MB"] = (largest[0] - before) / 1e6


def own() -> int:
    """Return the bytes of this process that no file has."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(OWN))


# Runs


def costs_of_runs(folder: Path, counts: Sequence[int]) -> list[Costs]:
    """Return what comparing so many finished runs costs: a run of a few steps, copied."""
    place = folder / "runs"
    place.mkdir()
    for name in ("train", "test"):
        write_rows(place / f"{name}.jsonl", 100)
    words = job(folder / "model", place)
    first = place / "first"
    in_processes(train_once, ([*words, "train.steps=3", f"train.run={first}"],))
    costs = []
    for count in counts:
        runs = place / f"{count}"
        for number in range(count):
            copy_run(first, runs / f"run-{number}", number)
        costs += in_processes(compared, (runs, place / f"page-{count}"))
    return costs


def train_once(words: list[str]) -> None:
    """Train a run in this process."""
    quieten()
    train(compose(words))


def copy_run(run: Path, copy: Path, number: int) -> None:
    """Copy the records of a run with another seed, and another rate after `SEEDS` of them."""
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("adapter", "checkpoints"))
    settings = yaml.safe_load((copy / CONFIG).read_text())
    settings["train"] |= {"seed": number % SEEDS, "lr": 1e-4 * (1 + number // SEEDS)}
    (copy / CONFIG).write_text(yaml.safe_dump(settings))


def compared(runs: Path, page: Path) -> Costs:
    """Compare runs in this process, and write the page; return what it cost."""
    quieten()
    costs: dict[str, float] = {}
    begin = time.process_time()
    with own_memory(costs):
        write_page(compare([runs]), page)
    return {"compare s": time.process_time() - begin, "own MB": costs["MB"]}
