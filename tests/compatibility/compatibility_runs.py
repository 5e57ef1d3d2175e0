"""The runs of train.py in `checkpoints/`, which were stopped part way at commit b7a8cc9.

A checkpoint holds the settings of its run, paths included, and resumes only with the same ones. So
all paths are relative to the current directory, which holds `model/`, `train.csv` and `test.csv`.
"""

import csv
import shutil
from collections.abc import Iterator
from pathlib import Path

from compatibility_bases import VOCABULARY, base, formula
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHECKPOINTS = Path(__file__).parent / "checkpoints"
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
WORDS = [f"w{number}" for number in range(VOCABULARY - len(SPECIAL))]
LABELS = ["red", "green", "blue"]
STEPS, SAVED, KILLED = 8, 4, 6  # length, step of the checkpoint, step at which it was killed
COMMON = [
    "model=path",
    "model.path=model",
    "data=files",
    "data.train=train.csv",
    "data.test=test.csv",
    "data.max_length=12",
    f"train.steps={STEPS}",
    f"train.save_steps={SAVED}",
    "train.log_steps=1",
    "train.batch_size=8",
    "train.lr=0.03",  # so high that losses differ between methods after a few steps
    "train.frozen_head=false",
]
RUNS = {
    # the checkpoint is between two growths, and late components have learning rates of their own
    "increlora": ["+method=increlora", "method.tinit=1", "method.deltaT=3", "method.top_h=3"],
    "mola": ["+method=mola", "method.r=2", "method.num_experts='23'", "method.lora_dropout=0.1"],
    # the checkpoint holds latent weights, the result codes
    "binary": ["+method=binary", "method.inner=lora", "+method.r=2"],
    # the checkpoint is within a phase in which gradients are accumulated
    "sparse": [
        "+method=sparse",
        "method.density=0.05",
        "method.reselection_steps=5",
        "method.selection_accumulation_steps=3",
    ],
    "mos": ["+method=mos", "method.r=2", "method.equivalent_rank=2"],
    # changes the base weights at the start, so the run folder has the initial adapter in start/
    "pissa": ["+method=lora", "method.r=2", "++method.init_lora_weights=pissa"],
    # the recipe's eps of 1e-7 magnifies rounding by its inverse
    "deft": ["+method=deft", "method.r=2", "loss.eps=1e-3"],
}


def write_inputs(folder: Path) -> None:
    """Write the model and copy the data of all runs."""
    base("bert").save_pretrained(folder / "model")
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate([*SPECIAL, *WORDS])}, "[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(folder / "model")
    for name in ("train.csv", "test.csv"):
        shutil.copy(CHECKPOINTS / name, folder / name)


def write_data(folder: Path) -> None:
    """Write `train.csv` and `test.csv`: 2 to 9 words a text; the first one determines the class."""
    for name, count in (("train", 40), ("test", 16)):
        with (folder / f"{name}.csv").open("w", newline="") as opened:
            csv.writer(opened).writerows([("text", "label"), *rows(name, count)])


def rows(name: str, count: int) -> Iterator[tuple[str, str]]:
    picked = (formula(name, count, 9) + 1) / 2 * len(WORDS)
    for number, line in enumerate(picked.long().tolist()):
        yield " ".join(WORDS[i] for i in line[: 2 + number % 8]), LABELS[line[0] % len(LABELS)]
