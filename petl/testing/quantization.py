"""Checks on base models with quantized weights; skipped without the packages for it."""

from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from petl.core.loading import load
from petl.core.support import Capability
from petl.core.types import Arguments
from petl.data.models.quantization import keep_gradients, quantization_config
from petl.testing.case import Case, assert_close, difference, gradients, logits, stir, trainable
from petl.testing.catalog import check, on_llama
from petl.testing.training import assert_close_gradients, train

STEPS = 5


@check(on_llama, slow=True, package="bitsandbytes", of=Capability.BASE_4BIT)
def trains_on_a_4bit_base(case: Case) -> None:
    """On a 4-bit base (NF4) the adapter trains, after an evaluation too, and reloads."""
    _check(case, "bnb_4bit")


@check(on_llama, slow=True, package="bitsandbytes", of=Capability.BASE_8BIT)
def trains_on_an_8bit_base(case: Case) -> None:
    """On an 8-bit base (bitsandbytes) the adapter trains and reloads."""
    _check(case, "bnb_8bit")


@check(on_llama, slow=True, package="torchao", of=Capability.BASE_TORCHAO)
def trains_on_a_torchao_base(case: Case) -> None:
    """On an 8-bit base (torchao) the adapter trains and reloads."""
    _check(case, "torchao_int8")


def quantized(case: Case, kind: str) -> PreTrainedModel:
    """Return the case's base model, saved and loaded with quantization; the same each time."""
    base = case.base()
    # the output head stays dense, as transformers does by default
    dense = [name for name, m in base.named_modules() if m is base.get_output_embeddings()]
    # loading logs progress and warns of random weights
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with TemporaryDirectory() as folder:
            base.save_pretrained(folder)
            config = quantization_config(kind, torch.float32, dense)
            options: Arguments = {"quantization_config": config, "dtype": torch.float32}
            model = type(base).from_pretrained(folder, **options)
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()
    keep_gradients(model)
    return model.eval()


def _check(case: Case, kind: str) -> None:
    batch, base = case.batch(), quantized(case, kind)
    weights = {type(p) for p in base.parameters()} - {nn.Parameter}
    assert weights, f"no weight of {type(base).__name__} is quantized"
    plain = logits(base, batch)
    assert difference(plain, logits(case.base(), batch)) > 0, "quantization changes no logit"
    model = case.wrap(base)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    if case.starts_at_base:
        allowed = max(1e-2, case.promises.start_tolerance)  # 8-bit products round inputs as well
        what = "logits of the wrapped model and the quantized base"
        assert_close(logits(model, batch), plain, allowed, what)
    stir(model).train()
    losses = train(model, batch, steps=STEPS, lr=case.lr).losses
    assert min(losses[1:]) < losses[0], (
        f"the loss does not fall below the first in {STEPS} steps: {losses}; if the method can, "
        f"set another Case(lr=...) than {case.lr:g}"
    )
    before = gradients(model, batch)
    model.eval()
    # bitsandbytes may pack weights for inference at the first evaluation
    with torch.no_grad():
        model(**batch)
    assert_close_gradients(gradients(model, batch), before, "before and after an evaluation")
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert torch.equal(_raw(parameter), _raw(frozen[name])), f"{name} was trained"
    assert all(p.is_floating_point() for p in trainable(model).values())
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = load(quantized(case, kind), folder)
    what = "logits before saving and reloaded"
    assert_close(logits(again, inputs), logits(model, inputs), 1e-6, what)


def _raw(parameter: Any) -> Any:
    """Return the values of a quantized weight: dequantized by torchao, codes of bitsandbytes."""
    return parameter.dequantize() if hasattr(parameter, "qdata") else parameter.data
