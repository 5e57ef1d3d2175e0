"""Tiny models, tokenizers and data files on disk, and runs of train.py over them.

Import the fixtures that a test module uses: `from training_fixtures import tiny, launch`.
"""

import csv
import inspect
import json
import logging
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import petl
from petl import app

ROOT = Path(__file__).parent.parent
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
CLASSES = {"colour": ["red", "green", "blue"], "beast": ["cat", "dog"], "tool": ["saw", "axe"]}
FILLERS = ["a", "the", "of", "very", "old", "new", "big", "one"]
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Tiny:
    """Where things lie, and the overrides that use them."""

    folder: Path
    classify: list[str]  # 50 train rows and 20 test rows of three classes, for a BERT with dropout
    steady: list[str]  # the same without dropout
    complete: list[str]  # the texts alone, of uneven length, for a Llama without dropout


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder = tmp_path_factory.mktemp("tiny")
    write_model(folder / "bert", BertForSequenceClassification, bert_config(dropout=0.1))
    write_model(folder / "steady", BertForSequenceClassification, bert_config(dropout=0.0))
    write_model(folder / "llama", LlamaForCausalLM, llama_config())
    draw = Random(0)
    for name, count in (("train", 50), ("test", 20)):
        rows = [example(draw) for _ in range(count)]
        with (folder / f"{name}.csv").open("w", newline="") as opened:
            csv.writer(opened).writerows([("text", "label"), *rows])
    files = ["data=files", f"data.train={folder}/train.csv", f"data.test={folder}/test.csv"]
    short = ["data.max_length=16", "train.steps=4", "train.batch_size=8", "train.frozen_head=false"]
    return Tiny(
        folder,
        ["model=path", f"model.path={folder}/bert", *files, *short],
        ["model=path", f"model.path={folder}/steady", *files, *short],
        ["model=path", f"model.path={folder}/llama", "data.task=causal_lm", *files, *short],
    )


@pytest.fixture
def petl_log(caplog: pytest.LogCaptureFixture) -> Any:
    """What petl logged, from INFO on."""
    caplog.set_level(logging.INFO, logger="petl")
    return caplog


def example(draw: Random) -> tuple[str, str]:
    """A text with one telling word, and its class."""
    label = draw.choice(list(CLASSES))
    words = draw.choices(FILLERS, k=draw.randint(1, 9))
    words.insert(draw.randrange(len(words) + 1), draw.choice(CLASSES[label]))
    return " ".join(words), label


def words() -> list[str]:
    return [*SPECIAL, *FILLERS, *(word for telling in CLASSES.values() for word in telling)]


def bert_config(dropout: float = 0.0) -> BertConfig:
    return BertConfig(
        vocab_size=len(words()),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        pad_token_id=0,
    )


def llama_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(words()),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )


def write_model(folder: Path, kind: Any, config: Any, **settings: Any) -> None:
    torch.manual_seed(0)
    kind(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words())}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        eos_token="[SEP]",
        **settings,
    ).save_pretrained(folder)


@dataclass(frozen=True)
class Finished:
    """What a run left behind."""

    path: Path

    @property
    def scores(self) -> dict[str, Any]:
        return json.loads((self.path / "scores.json").read_text())

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]

    @property
    def adapter(self) -> dict[str, torch.Tensor]:
        return load_file(self.path / "adapter" / "adapter_model.safetensors")

    @property
    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.path / "checkpoints").iterdir())


def stopped_before(run: Finished, folder: Path, checkpoint: str) -> Finished:
    """A copy of a run in `folder`, as if it had been stopped before it wrote this checkpoint."""
    stopped = Finished(shutil.copytree(run.path, folder))
    shutil.rmtree(stopped.path / "checkpoints" / checkpoint)
    shutil.rmtree(stopped.path / "adapter")
    (stopped.path / "scores.json").unlink()
    return stopped


def assert_same_course(run: Finished, expected: Finished, *, atol: float) -> None:
    """Whether two runs have the same adapter, and had the same loss at each step."""
    assert run.adapter.keys() == expected.adapter.keys()
    for name, tensor in expected.adapter.items():
        torch.testing.assert_close(run.adapter[name], tensor, atol=atol, rtol=0, msg=name)
    losses = [[line["loss"] for line in one.metrics] for one in (expected, run)]
    assert losses[0] == pytest.approx(losses[1], abs=atol, rel=0)


def main() -> Callable[[Any], float]:
    """The body of train.py, without Hydra around it."""
    return inspect.unwrap(runpy.run_path(str(ROOT / "train.py"))["main"])


def train(overrides: Sequence[str], folder: Path) -> Finished:
    """Run train.py's body in this process; the run's folder is `folder`."""
    torch.set_num_threads(1)
    main()(app.compose([*overrides, f"train.run={folder}"]))
    return Finished(folder)


def train_until_killed(overrides: Sequence[str], folder: Path, step: int) -> None:
    """Run train.py's body as `train` does, until the method would act on this step."""
    after_step = petl.Lifecycle.after_step

    class Killed(BaseException):
        pass

    def killing(self: petl.Lifecycle, at: int, optimizer: Any) -> None:
        if at == step:
            raise Killed
        after_step(self, at, optimizer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(petl.Lifecycle, "after_step", killing)
        with pytest.raises(Killed):
            train(overrides, folder)


def command_line(overrides: Sequence[str], processes: int = 1) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    several = [*launcher, "--standalone"] if processes > 1 else []
    return [sys.executable, *several, str(ROOT / "train.py"), *overrides]


def command_after(code: str, line: Sequence[str], script: Path) -> list[str]:
    """The command `line` with `code` done before train.py, by way of a file `script`."""
    place = next(i for i, word in enumerate(line) if word.endswith("train.py"))
    goes_on = f"import runpy, sys\nsys.argv[0] = {line[place]!r}\n"
    script.write_text(f"{code}\n{goes_on}runpy.run_path(sys.argv[0], run_name='__main__')\n")
    return [*line[:place], str(script), *line[place + 1 :]]


def slow_after(step: int) -> str:
    """Code for `command_after`: each step after this one takes a second, so a signal is in time."""
    return f"""
import time
import petl
after_step = petl.Lifecycle.after_step
def slowly(self, now, optimizer):
    time.sleep(now > {step})
    after_step(self, now, optimizer)
petl.Lifecycle.after_step = slowly
"""


def launch(
    overrides: Sequence[str], folder: Path, processes: int = 1
) -> subprocess.CompletedProcess[str]:
    """Run train.py as a user does, in `folder`."""
    line = command_line(overrides, processes)
    environment = {**os.environ, **OFFLINE}
    return subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True)
