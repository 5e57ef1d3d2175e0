"""Check of rows of tokens that train beside an adapter (`trainable_token_indices`)."""

from dataclasses import replace
from tempfile import TemporaryDirectory
from typing import Any

import torch

from petl.core.loading import load
from petl.core.registry import require_capability
from petl.core.support import Capability
from petl.data.models.new_tokens import indices_of, weights_of
from petl.testing.case import Case, assert_close, gradients, logits, stir, trainable
from petl.testing.catalog import check, of_transformers, on_llama

ROWS = 3  # that train


@check(lambda case: on_llama(case) and of_transformers(case), of=Capability.NEW_TOKENS)
def rows_of_tokens_train(case: Case) -> None:
    """Rows of tokens get the gradients of their table, the adapter its own; both are saved."""
    require_capability(case.config(), Capability.NEW_TOKENS, "trainable_token_indices")
    batch, base = case.batch(), case.base()
    tokens = sorted(set(batch["input_ids"].flatten().tolist()))[-ROWS:]
    rows = indices_of(base, tokens)
    with_rows = replace(case, fields={**case.fields, "trainable_token_indices": rows})
    # the same adapter on a base whose tables train as a whole
    plain, model = case.wrap_stirred(), with_rows.wrap()
    known = dict(trainable(model))
    with torch.no_grad():
        for name, parameter in trainable(plain).items():
            known.pop(name).copy_(parameter)
    assert known, "no row of a token trains"
    original: Any = plain.get_base_model()
    whole = {f"{name}.": weight for name, weight in weights_of(original).items()}
    for weight in whole.values():
        weight.requires_grad_(True)
    torch.manual_seed(0)
    expected = gradients(plain, batch)
    torch.manual_seed(0)
    found = gradients(model, batch)
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in found.items():
        table = next((t for t in whole if t in name and name in known), None)
        wanted = expected[name] if table is None else _of_table(expected, table)[tokens]
        assert_close(gradient, wanted, 1e-4 * scale, f"gradients of {name}")
    stir(model)
    after = logits(model, batch)
    with model.disable_adapter():
        assert_close(logits(model, batch), logits(base, batch), 1e-5, "logits without the adapter")
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = load(case.base(), folder, adapter_name="another_name")
    allowed = 1e-6 * max(1.0, float(after.abs().max()))
    assert_close(logits(loaded, batch), after, allowed, "logits before saving and loaded")


def _of_table(gradients: dict[str, torch.Tensor], table: str) -> torch.Tensor:
    return next(gradient for name, gradient in gradients.items() if table in name)
