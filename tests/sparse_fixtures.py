"""Small models with sparse adapters, loops over them, and gradients of the dense weight."""

import torch

import petl
from petl import testing
from petl.methods.sparse import SparseAdapter

LINEARS = 21  # of tiny Llama
A, R = 3, 8
CYCLE = {
    "density": 0.05,
    "reselection_steps": R,
    "selection_accumulation_steps": A,
    "total_step": 1000,
}


def wrapped(base=None, **fields):
    base = testing.tiny_llama() if base is None else base
    return petl.wrap(base, "sparse", **(CYCLE | fields))


def adapters(model, name="default"):
    """By path of the module."""
    return {
        a.site.key: a
        for a in model.modules()
        if isinstance(a, SparseAdapter) and a.site.adapter_name == name
    }


@torch.no_grad()
def stirred(model, name="default"):
    for adapter in adapters(model, name).values():
        adapter.values.normal_(std=0.05)
    return model


def batches(count, rows=2):
    llama = testing.TINY_MODELS["llama"]
    return [llama.batch(rows, seed=seed) for seed in range(count)]


def dense_gradients(model, batch, scale=1.0):
    """Gradient of the loss with respect to W + D of each target, as it is stored, written out."""
    plain = testing.tiny_llama().train()
    for key, adapter in adapters(model).items():
        weight = plain.get_submodule(key).weight
        with torch.no_grad():
            weight.view(-1)[adapter.indices.long()] += adapter.values
    (plain(**batch).loss * scale).backward()
    return {key: plain.get_submodule(key).weight.grad for key in adapters(model)}


def step_through(model, optimizer, updates, first=1, stop=None):
    """Train on lists of micro-batches, one list an update, as a loop does."""
    model.train()
    life = petl.lifecycle(model)
    for step, micro in enumerate(updates, first):
        for batch in micro:
            (model(**batch).loss / len(micro)).backward()
        optimizer.step()
        life.after_step(step, optimizer)
        optimizer.zero_grad()
        if step == stop:
            break


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def adamw(model, lr=1e-2):
    return torch.optim.AdamW(trained(model), lr=lr, weight_decay=0.0)
