"""Times adapters of the `adapters` package: a script, for the environment that has that package.

It needs another transformers than petl, so this imports nothing of petl but the clocks beside it.
Standard input is one JSON object, see `peers.measure`; standard output another: by adapter, the
seconds of its steps and of the floor's beside them, its parameters, and the versions.
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
    asked = json.load(sys.stdin)
    torch.set_num_threads(asked["threads"])
    batch = {name: torch.tensor(rows) for name, rows in asked["batch"].items()}
    base = built(asked["model"], asked["config"])
    models = {row["name"]: adapted(base, row) for row in asked["rows"]}
    base.get_input_embeddings().register_forward_hook(lambda m, args, out: out.requires_grad_())
    times = in_turn(
        stepping(base, batch),
        {name: stepping(model, batch) for name, model in models.items()},
        rounds=asked["rounds"],
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


def built(model: str, config: dict[str, Any]) -> Any:
    """The frozen model, by the names of its class and of its config's."""
    torch.manual_seed(0)
    kind = getattr(transformers, model)
    return kind(kind.config_class(**config)).requires_grad_(False).train()


def adapted(base: Any, row: dict[str, Any]) -> Any:
    """A copy of the model with an adapter of the package that trains, none of its tensors zero."""
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


def stepping(model: Any, batch: dict[str, torch.Tensor]) -> Any:
    trained = [p for p in model.parameters() if p.requires_grad]

    def step() -> None:
        for parameter in trained:
            parameter.grad = None
        model(**batch).loss.backward()

    return step


if __name__ == "__main__":
    main()
