"""A tiny model and data files for each family of tasks over texts.

Import the fixture that a test module uses: `from task_fixtures import families`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest
from training_fixtures import (
    CLASSES,
    FILLERS,
    Finished,
    bert_config,
    llama_config,
    train,
    words,
    write_model,
)
from transformers import BertForMaskedLM, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

import petl
from petl.errors import RunStopped

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}[CLS] {% endif %}{{ m.content }} [SEP] "
    "{% endfor %}"
)
SHORT = [
    "data=files", "data.max_length=32", "train.steps=8", "train.batch_size=8", "train.lr=5e-3",
    "train.eval_steps=4", "train.validation_share=0.2", "train.log_steps=1", "train.warmup=0",
]  # fmt: skip
TELLING = {word: kind for kind, some in CLASSES.items() for word in some}
SETTINGS = {
    "regression": ["data.text_pair=more"],
    "token_classification": [],
    "question_answering": ["data.max_length=14", "data.stride=3"],
    "causal_lm": ["data.prompt=text", "data.answer=target", "data.generate=3"],
    "seq2seq": ["data.generate=3", "data.max_target_length=8"],
}


def stop_run(words: Sequence[str], folder: Path, step: int, patch: pytest.MonkeyPatch) -> None:
    """Run train.py's body until it is killed after `step`."""
    original = petl.Lifecycle.after_step

    def killed(self: Any, number: int, optimizer: Any) -> None:
        original(self, number, optimizer)
        if number == step:
            raise KeyboardInterrupt

    with patch.context() as context:
        context.setattr(petl.Lifecycle, "after_step", killed)
        with pytest.raises((KeyboardInterrupt, RunStopped)):
            train(words, folder)


def figures(run: Finished) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without times."""
    return [{k: v for k, v in line.items() if k != "seconds"} for line in run.metrics]


@dataclass(frozen=True)
class Families:
    """Where the files are; called with a task, the overrides that train it."""

    folder: Path

    def __call__(self, task: str, *more: str) -> list[str]:
        model = {"causal_lm": "llama", "seq2seq": "t5"}.get(task, "bert")
        places = [f"data.train={self.folder}/train.jsonl", f"data.test={self.folder}/test.jsonl"]
        where = ["model=path", f"model.path={self.folder}/{model}", *places, f"data.task={task}"]
        return [*SHORT, *where, *SETTINGS[task], *more]


def row(draw: Random) -> dict[str, Any]:
    """A row that every task reads: a beast and some other words, one number, tags, a question."""
    tokens = draw.choices([*FILLERS, *CLASSES["colour"]], k=draw.randint(4, 14))
    beast = draw.choice(CLASSES["beast"])
    place = draw.randrange(len(tokens))
    tokens.insert(place, beast)
    context = " ".join(tokens)
    start = len(" ".join(tokens[:place])) + bool(place)
    return {
        "text": context,
        "more": draw.choice(FILLERS),
        "label": sum(token in CLASSES["colour"] for token in tokens) / 2,
        "tokens": tokens,
        "tags": ["O" if t not in TELLING else f"B-{TELLING[t]}" for t in tokens],
        "question": "the cat",
        "context": context,
        "answers": {"text": [beast], "answer_start": [start]},
        "target": beast,
    }


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> Families:
    folder = tmp_path_factory.mktemp("families")
    write_model(folder / "bert", BertForMaskedLM, bert_config(), cls_token="[CLS]")
    chat = {"cls_token": "[CLS]", "chat_template": TEMPLATE}
    write_model(folder / "llama", LlamaForCausalLM, wide(llama_config()), **chat)
    t5 = T5Config(
        vocab_size=len(words()),
        d_model=32,
        d_kv=16,
        d_ff=48,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=3,
        decoder_start_token_id=0,
    )
    write_model(folder / "t5", T5ForConditionalGeneration, t5)
    draw = Random(0)
    for name, count in (("train", 60), ("test", 12)):
        lines = (json.dumps(row(draw)) for _ in range(count))
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return Families(folder)


def wide(config: Any) -> Any:
    """A config with room for what is written after the longest row."""
    config.max_position_embeddings = 64
    return config
