"""What a check runs on: a method with its fields, on a tiny model."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from petl.core.compat import BaseTunerLayer
from petl.core.registry import build_config, method, needs_calibration, wrap
from petl.core.spec.method import Method
from petl.testing.models import TINY_MODELS, Batch, TinyModel


@dataclass(frozen=True)
class Case:
    """A method, its fields and a model; what the method promises is read from the registry.

    Attributes:
        method: one of `petl.list_methods()`, so register or adopt yours first.
        model: a name of `TINY_MODELS`, or a `TinyModel` of your own.
        fields: fields of the method's config.
        starts_at_base: whether the wrapped model computes what the base model does.
        refuses: names of checks that the method answers with a `petl.InputError`, by its nature.
        excused: check names, and why they do not suit the method; they are not run.
        lr: learning rate with which AdamW brings the loss down in 20 steps.
        device: where models and batches are put.
        name: of the case in test ids; made from the rest if empty.
    """

    method: str
    model: str | TinyModel = "llama"
    fields: Mapping[str, Any] = field(default_factory=dict)
    starts_at_base: bool = True
    refuses: tuple[str, ...] = ()
    excused: Mapping[str, str] = field(default_factory=dict)
    lr: float = 1e-2
    device: str = "cpu"
    name: str = ""

    def __str__(self) -> str:
        return f"{self.name or self.method}-{self.tiny.name}"

    @property
    def tiny(self) -> TinyModel:
        return TINY_MODELS[self.model] if isinstance(self.model, str) else self.model

    @property
    def entry(self) -> Method:
        """What the registry knows of the method."""
        return method(self.method)

    @property
    def promises(self) -> Method:
        """The same for the fields of this case, on which a few methods depend."""
        return self.entry.given(self.all_fields())

    @property
    def prefix(self) -> str:
        """The state-dict prefix of the method's tensors."""
        return self.promises.tuner.prefix

    @property
    def imports(self) -> tuple[str, ...]:
        """The module that registers the method, for a fresh process to import."""
        return (self.entry.config_cls.__module__,)

    def base(self) -> PreTrainedModel:
        """A fresh base model, in eval mode, with the same weights each time."""
        return self.tiny.base().to(self.device)

    def batch(self, rows: int = 4, seed: int = 0) -> Batch:
        """Model inputs with labels, the same for the same arguments."""
        return {n: t.to(self.device) for n, t in self.tiny.batch(rows, seed).items()}

    def all_fields(self) -> dict[str, Any]:
        """The case's fields, with the model's task type unless they say otherwise."""
        task = {} if self.tiny.task_type is None else {"task_type": self.tiny.task_type}
        return {**task, **self.fields}

    def without_head(self) -> "Case":
        """The same case, with the head of a classifier left alone."""
        return replace(self, fields={**self.fields, "task_type": None})

    def config(self) -> PeftConfig:
        return build_config(self.method, **self.all_fields())

    def wrap(self, base: nn.Module | None = None, adapter_name: str = "default") -> PeftModel:
        """A freshly wrapped model, the same each time: `base`, or a new one."""
        torch.manual_seed(1)
        calibration = [self.batch(seed=9)] if needs_calibration(self.config()) else None
        return wrap(
            self.base() if base is None else base,
            self.method,
            adapter_name=adapter_name,
            calibration=calibration,
            **self.all_fields(),
        ).eval()

    def wrap_half(self, *, autocast_adapter_dtype: bool) -> PeftModel:
        """The same on a bfloat16 base."""
        torch.manual_seed(1)
        base: Any = self.base().to(torch.bfloat16)
        config = self.config()
        return get_peft_model(base, config, autocast_adapter_dtype=autocast_adapter_dtype).eval()

    def wrap_stirred(self, base: nn.Module | None = None) -> PeftModel:
        """A wrapped model whose adapter does something."""
        return stir(self.wrap(base))


@torch.no_grad()
def stir(model: PeftModel, adapter_name: str = "default", *, seed: int = 2) -> PeftModel:
    """`model`, with noise in every trainable tensor of an adapter, so that it has an effect."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and adapter_name in name.split("."):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise.to(parameter), alpha=0.1)
    return model


@torch.no_grad()
def logits(model: nn.Module, batch: Batch, **kwargs: Any) -> Tensor:
    """The logits of `model` in eval mode, in float32; the mode is put back."""
    was_training = model.training
    model.eval()
    found = model(**batch, **kwargs).logits.float()
    model.train(was_training)
    return found


def gradients(model: nn.Module, batch: Batch, *, weight: float = 1.0) -> dict[str, Tensor]:
    """Gradients of `weight` times the training loss, by name; they are cleared first and after."""
    model.zero_grad()
    model.train()
    (model(**batch).loss * weight).backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def tuner_layers(model: nn.Module) -> dict[str, Any]:
    """The adapted layers of `model` by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)}


def difference(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference."""
    return float((a - b).detach().abs().max())
