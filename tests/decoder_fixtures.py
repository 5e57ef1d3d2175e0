"""A decoder with random adapters for trainers that are not ours, and plain SGD."""

from typing import Any

import torch
from peft import PeftModel

import petl
from petl import testing

COEF = 0.5
FIELDS = {
    "lora": {"target_modules": "block-linear"},
    "mola": {"router_aux_loss_coef": COEF},
    "mola_recurrent": {"router_aux_loss_coef": COEF, "router_type": "recurrent"},
    "mos": {"r": 3},
    "binary_mos": {"inner": "mos", "r": 3},
}
LR = 0.1


def wrapped(name: str, **fields: Any) -> PeftModel:
    """A small decoder with random adapters, the same each time."""
    torch.manual_seed(4)
    base = testing.tiny_llama(layers=2, vocabulary=260)
    given = {**FIELDS[name], **fields, "task_type": "CAUSAL_LM"}
    return testing.stir(petl.wrap(base, name.partition("_")[0], **given))


def plain_sgd(model: PeftModel):
    optimizer = torch.optim.SGD(testing.trainable(model).values(), lr=LR)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
