"""A binary adapter on a tiny Llama: wrapped, stirred, trained and read."""

import torch

import petl
from petl.testing.models import tiny_llama

MOS = {"inner": "mos", "r": 3, "equivalent_rank": 2}
LORA = {"inner": "lora", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}


def wrapped(**fields):
    torch.manual_seed(0)
    return petl.wrap(tiny_llama(), "binary", **fields).eval()


def stir(model):
    """Random weights, so that the adapter has an effect."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.normal_(std=0.1)
    return model


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def train(model, batch, steps=3):
    optimizer = torch.optim.AdamW(trained(model).values(), lr=1e-2)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return model.eval()


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def effective(model):
    """What each quantised weight is read as, by order."""
    return [spot.read() for spot in model.base_model.reader.spots["default"]]
