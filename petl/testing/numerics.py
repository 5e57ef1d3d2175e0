"""Checks of half precision and of generation."""

from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor

from petl.testing.case import Case, difference, gradients, logits, trainable
from petl.testing.catalog import check, own
from petl.testing.training import train

HALF_ERROR = 0.25  # of the adapter's effect: bfloat16 has 8 bits, and a near tie may fall otherwise


@check(own)
def half_precision_base_keeps_a_float32_adapter(case: Case) -> None:
    """On a bfloat16 base the adapter is float32, has the same effect, and trains."""
    model = case.wrap_half(autocast_adapter_dtype=True)
    _check_half(case, model, torch.float32)


@check(own)
def half_precision_adapter_works_too(case: Case) -> None:
    """With `autocast_adapter_dtype=False` the adapter takes the base's bfloat16."""
    model = case.wrap_half(autocast_adapter_dtype=False)
    _check_half(case, model, torch.bfloat16)


def _check_half(case: Case, model: PeftModel, dtype: torch.dtype) -> None:
    adapter = {n: p for n, p in trainable(model).items() if case.prefix in n}
    keeps = getattr(getattr(model.base_model, "adapter_cls", None), "keep_float32", False)
    expected = torch.float32 if keeps else dtype
    wrong = {n: p.dtype for n, p in adapter.items() if p.dtype != expected}
    assert not wrong, f"not {expected}: {wrong}"
    batch = _cast(case.batch())
    full = case.wrap_stirred()
    set_peft_model_state_dict(model, get_peft_model_state_dict(full))
    assert model(**batch).logits.dtype == torch.bfloat16
    _assert_same_effect(case, logits(model, batch), logits(case.base().bfloat16(), batch), full)
    losses = train(model.train(), batch, steps=3, lr=case.lr).losses
    assert torch.tensor(losses).isfinite().all(), f"losses {losses}"
    assert losses[-1] < losses[0], f"the loss went from {losses[0]:.4f} to {losses[-1]:.4f}"


@check(own)
def autocast_computes_the_same(case: Case) -> None:
    """Under bfloat16 autocast a float32 model has the same effect, and gradients are float32."""
    model, batch = case.wrap_stirred(), case.batch()
    with torch.autocast("cpu", torch.bfloat16):
        adapted, base = logits(model, batch), logits(case.base(), batch)
        found = gradients(model, batch)
    _assert_same_effect(case, adapted, base, model)
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32, f"the gradient of {name} is {gradient.dtype}"
        assert gradient.isfinite().all(), f"the gradient of {name} is not finite"


def _assert_same_effect(case: Case, adapted: Tensor, base: Tensor, full: PeftModel) -> None:
    """What the adapter adds to the logits, compared with what it adds in float32."""
    expected = logits(full, case.batch()) - logits(case.base(), case.batch())
    error = float((adapted - base - expected).norm() / expected.norm())
    assert error <= HALF_ERROR, f"the adapter's effect is {error:.0%} off that in float32"


def _cast(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.bfloat16() if t.is_floating_point() else t for n, t in batch.items()}


@check(lambda case: case.tiny.generates)
def cached_generation_equals_uncached(case: Case) -> None:
    """A decoder generates the same tokens, with the same scores, with and without its cache."""
    model: Any = case.wrap_stirred()
    batch = case.batch(rows=2)
    prompt = {name: batch[name][:, :6] for name in ("input_ids", "attention_mask")}
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    settings |= {"return_dict_in_generate": True, "output_scores": True}
    cached, plain = (model.generate(**prompt, **settings, use_cache=c) for c in (True, False))
    plain_model: Any = case.base()
    base = plain_model.generate(**prompt, **settings, use_cache=True)
    assert torch.equal(cached.sequences, plain.sequences), "the cache changes the tokens"
    gap = difference(torch.stack(cached.scores), torch.stack(plain.scores))
    assert gap <= 1e-4, f"the cache changes scores by {gap:.2e}"
    effect = difference(cached.scores[0], base.scores[0])
    assert effect > 1e-3, "the adapter has no effect in generate"
