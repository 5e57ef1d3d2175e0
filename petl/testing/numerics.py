"""Checks of half precision and of generation."""

from typing import Any, cast

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor

from petl.core.tuners.asking import method_asked
from petl.testing.case import Case, assert_close, difference, gradients, logits, trainable
from petl.testing.catalog import check, own
from petl.testing.training import train

# allowed relative error of the adapter's effect in bfloat16, which has 8 bits; a router may also
# break a near tie in another way. Assumption.
HALF_ERROR = 0.25


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
    keeps = getattr(method_asked(type(model.base_model)).adapter_cls, "keep_float32", False)
    expected = torch.float32 if keeps else dtype
    wrong = {n: p.dtype for n, p in adapter.items() if p.dtype != expected}
    assert not wrong, f"tensors that are not {expected}: {wrong}"
    batch = _cast(case.batch())
    full = case.wrap_stirred()
    # the same adapter in both precisions
    set_peft_model_state_dict(model, get_peft_model_state_dict(full))
    half = case.base().bfloat16()
    tuner, returned = cast(Any, model.base_model), list[object]()
    keep = lambda module, args, output: returned.append(output)  # noqa: E731
    adapted = [tuner.model.get_submodule(name) for name in tuner.targeted_module_names]
    handles = [layer.register_forward_hook(keep) for layer in adapted]
    found = model(**batch).logits
    for handle in handles:
        handle.remove()
    # an adapter that is the head may keep its scores in float32; Mamba's are in any case
    is_head = keeps and any(output is found for output in returned)
    allowed = torch.float32 if is_head else half(**batch).logits.dtype
    assert found.dtype == allowed, f"the logits are {found.dtype} in place of {allowed}"
    # effects, not logits: rounding of the base model would dominate
    _assert_same_effect(case, logits(model, batch), logits(half, batch), full)
    losses = train(model.train(), batch, steps=3, lr=case.lr).losses
    assert torch.tensor(losses).isfinite().all(), f"losses {losses}"
    assert losses[-1] < losses[0], (
        f"the loss went from {losses[0]:.4f} to {losses[-1]:.4f}: it must fall in 3 steps; if the "
        f"method can, set another Case(lr=...) than {case.lr:g}"
    )


@check(own)
def autocast_computes_the_same(case: Case) -> None:
    """Under bfloat16 autocast a float32 model has the same effect, and gradients are float32."""
    model, batch = case.wrap_stirred(), case.batch()
    with torch.autocast("cpu", torch.bfloat16):
        adapted, base = logits(model, batch), logits(case.base(), batch)
        values = gradients(model, batch)
    _assert_same_effect(case, adapted, base, model)
    for name, gradient in values.items():
        assert gradient.dtype == torch.float32, f"the gradient of {name} is {gradient.dtype}"
        assert gradient.isfinite().all(), f"the gradient of {name} is not finite"


def _assert_same_effect(case: Case, adapted: Tensor, base: Tensor, full: PeftModel) -> None:
    """Compare what the adapter adds to the logits with what it adds in float32."""
    expected = logits(full, case.batch()) - logits(case.base(), case.batch())
    error = float((adapted - base - expected).norm() / expected.norm())
    assert error <= HALF_ERROR, (
        f"the adapter's effect on the logits is {error:.0%} off that in float32: at most "
        f"{HALF_ERROR:.0%} is allowed"
    )


def _cast(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.bfloat16() if t.is_floating_point() else t for n, t in batch.items()}


@check(lambda case: case.tiny.generates)
def cached_generation_equals_uncached(case: Case) -> None:
    """A decoder generates equal tokens with equal scores, with and without its cache."""
    model = case.wrap_stirred()
    batch = case.batch(rows=2)
    # the first six tokens have no padding
    prompt = {name: batch[name][:, :6] for name in ("input_ids", "attention_mask")}
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    settings |= {"return_dict_in_generate": True, "output_scores": True}
    cached, plain = (model.generate(**prompt, **settings, use_cache=c) for c in (True, False))
    plain_model: Any = case.base()
    base = plain_model.generate(**prompt, **settings, use_cache=True)
    assert torch.equal(cached.sequences, plain.sequences), "the cache changes the tokens"
    what = "scores with and without the cache"
    assert_close(torch.stack(cached.scores), torch.stack(plain.scores), 1e-4, what)
    effect = difference(cached.scores[0], base.scores[0])
    assert effect > 1e-3, f"the adapter changes scores in generate by {effect:.2e}, not above 1e-3"
