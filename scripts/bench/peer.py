"""Script that times adapters of the `adapters` package, in an environment that has that package.

The package needs another version of transformers than petl, so this imports only `clocks.py`.
Reads one JSON object from standard input, see `peers.measure`; writes one to standard output: by
adapter, the seconds of its steps and of the lower bound, its parameters, and the versions.
"""

import copy
import json
import sys
from importlib.metadata import version
from typing import Any

import adapters  # ty: ignore[import-not-found]
import torch
import transformers
from clocks import in_turn  # ty: ignore[import-not-found]

NOISE = 0.02  # as in contenders.py


def main() -> None:
    """Answer one request."""
    request = json.load(sys.stdin)
    torch.set_num_threads(request["threads"])
    batch = {name: torch.tensor(rows) for name, rows in request["batch"].items()}
    base = build(request["model"], request["config"])
    models = {row["name"]: wrap(base, row) for row in request["rows"]}
    base.get_input_embeddings().register_forward_hook(lambda m, args, out: out.requires_grad_())
    times = in_turn(
        step_of(base, batch),
        {name: step_of(model, batch) for name, model in models.items()},
        rounds=request["rounds"],
        warm_up=2,
        device="cpu",
    )
    trained = {
        name: sum(p.numel() for p in model.parameters() if p.requires_grad)
        for name, model in models.items()
    }
    answer = {
        "floor": times.floor,
        "candidate": times.candidate,
        "parameters": trained,
        "packages": {name: version(name) for name in ("adapters", "transformers", "torch")},
    }
    print(json.dumps(answer))


def build(model: str, config: dict[str, Any]) -> Any:
    """Build the frozen model from the name of its class and the values of its config."""
    torch.manual_seed(0)
    model_cls = getattr(transformers, model)
    return model_cls(model_cls.config_class(**config)).requires_grad_(False).train()


def wrap(base: Any, row: dict[str, Any]) -> Any:
    """Return a copy of the model with a trainable adapter of the package, with noise added."""
    model = copy.deepcopy(base)
    adapters.init(model)
    torch.manual_seed(1)
    model.add_adapter("row", config=getattr(adapters, row["kind"])(**row["fields"]))
    model.train_adapter("row")
    frozen = dict(base.named_parameters())  # the package would train the head as well
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter), alpha=NOISE)
    return model.train()


def step_of(model: Any, batch: dict[str, torch.Tensor]) -> Any:
    """Return a function that makes a forward and backward pass."""
    trained = [p for p in model.parameters() if p.requires_grad]

    def step() -> None:
        for parameter in trained:
            parameter.grad = None
        model(**batch).loss.backward()

    return step


if __name__ == "__main__":
    main()
