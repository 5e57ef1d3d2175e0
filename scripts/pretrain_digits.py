"""Pretrain a small ViT on the digits 0 to 4, for studies of methods for images.

    python scripts/pretrain_digits.py runs/vit
    petl study runs/merged --seeds 0,1,2 --rates 1e-3,3e-3,1e-2 --methods lora \\
        --method "pyra method.inner=lora method.schedule=[25,20,12,4]" \\
        data=digits model=path model.path=runs/vit train.epochs=10 train.batch_size=32

The model is that of configs/model/vit_random.yaml, and the images are training rows of
configs/data/digits.yaml, so that no test row of `data=digits` was seen, and five of its ten classes
are new. Does nothing if the folder has a model.
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: see train.py

import torch
from torch import Tensor, nn

from petl.cli.arguments import COUNT, folder_to_write
from petl.data.base import encode
from petl.data.models.loading import load_base, load_processor
from petl.data.tasks.base import Row, Task
from petl.training import program as app
from petl.training.compose import compose
from petl.training.runs.run_config import read_config

CLASSES = 5  # the digits below this one
BATCH, RATE = 32, 1e-3


def main() -> int:
    """Run the command; return its exit status."""
    arguments = parser().parse_args()
    app.log_to_stderr()
    return app.reported(lambda: pretrain(arguments.folder, arguments.epochs, arguments.rows))


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=folder_to_write, help="where the model is written")
    parser.add_argument("--epochs", type=COUNT, default=30, help="passes over the images")
    parser.add_argument("--rows", type=COUNT, default=None, help="images; default: all")
    return parser


def pretrain(folder: Path, epochs: int, rows: int | None = None) -> None:
    """Train the model on the first classes and write it with its image processor."""
    if (folder / "config.json").is_file():
        print(f"{folder} has a model; nothing to do")
        return
    config = read_config(compose(["+method=lora", "model=vit_random", "data=digits"]))
    data = config.data.read()
    known = [row for row in data.train if row["label"] < CLASSES][:rows]
    right = write_model(folder, config.resolved["model"], data.task, known, epochs)
    print(f"{folder}: {len(known)} images of {CLASSES} classes, {right:.1%} of them right")


def write_model(
    folder: Path, settings: Mapping[str, Any], task: Task, rows: Sequence[Row], epochs: int
) -> float:
    """Train a model on rows and write it with its processor; return the last epoch's accuracy.

    Args:
        settings: of `model`.
        rows: as the task reads them.
    """
    processor = load_processor(settings, task)
    encoded = encode(task, processor, rows)
    pixels = torch.stack([torch.as_tensor(row["pixel_values"]) for row in encoded]).float()
    labels = torch.tensor([row["labels"] for row in encoded])
    torch.manual_seed(0)
    model = load_base(settings, task, processor=processor)
    right = train(model, pixels, labels, epochs)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return right


def train(model: nn.Module, pixels: Tensor, labels: Tensor, epochs: int) -> float:
    """Train all parameters with AdamW and a linear decay; return the last epoch's accuracy."""
    steps = epochs * -(-len(labels) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    right = 0
    for _ in range(epochs):
        right = 0
        for part in torch.randperm(len(labels)).split(BATCH):
            output = model.train()(pixel_values=pixels[part], labels=labels[part])
            output.loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            right += int((output.logits.argmax(-1) == labels[part]).sum())
    model.eval()
    return right / len(labels)


if __name__ == "__main__":
    sys.exit(main())
