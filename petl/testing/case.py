"""The input of a check: a method with its fields, on a tiny model."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from petl.core.compat import BaseTunerLayer
from petl.core.method import Method
from petl.core.registry import build_config, method, needs_calibration, wrap
from petl.core.spec.config import require
from petl.core.spec.facts import facts_of
from petl.core.types import Fields
from petl.system.collectives import num_processes, number
from petl.testing.models import OTHER_MODELS, TINY_MODELS, Batch, TinyModel


@dataclass(frozen=True)
class Case:
    """A method, its fields and a model; the registry has what the method promises.

    Attributes:
        method: one of `petl.list_methods()`, so register or adopt yours first.
        model: a name of `TINY_MODELS` or `OTHER_MODELS`, or a `TinyModel` of your own.
        fields: fields of the method's config.
        starts_at_base: True if the newly wrapped model computes what the base model does.
        refuses: names of checks in which the method must raise a `petl.InputError`.
        excused: names of checks that are not run, and why they do not suit the method.
        acts_with: by field, or several of them, further fields beside which it acts, and its own
            value if none follows from its annotation; see `petl.testing.fields`.
        idle: by field, why it can change nothing on this model.
        lr: learning rate with which AdamW lowers the loss by 5 % in 20 steps.
        device: device of models and batches.
        name: of the case in test ids; the method if empty.
        stands_for_all: True if checks for which one architecture is enough run on this model; None:
            if it is "llama". For a method that cannot adapt it.
    """

    method: str
    model: str | TinyModel = "llama"
    fields: Mapping[str, Any] = field(default_factory=dict)
    starts_at_base: bool = True
    refuses: tuple[str, ...] = ()
    excused: Mapping[str, str] = field(default_factory=dict)
    acts_with: Mapping[str | tuple[str, ...], Mapping[str, Any]] = field(default_factory=dict)
    idle: Mapping[str, str] = field(default_factory=dict)
    lr: float = 1e-2
    device: str = "cpu"
    name: str = ""
    stands_for_all: bool | None = None

    def __str__(self) -> str:
        return f"{self.name or self.method}-{self.tiny.name}"

    @property
    def tiny(self) -> TinyModel:
        """The tiny model."""
        known = TINY_MODELS | OTHER_MODELS
        return known[self.model] if isinstance(self.model, str) else self.model

    @property
    def entry(self) -> Method:
        """The registry's entry for the method."""
        return method(self.method)

    @property
    def promises(self) -> Method:
        """The entry for the fields of this case, on which it depends for a few methods."""
        return self.entry.variant(self.all_fields())

    @property
    def prefix(self) -> str:
        """The state-dict prefix of the method's tensors."""
        return self.promises.tuner.prefix

    @property
    def imports(self) -> tuple[str, ...]:
        """The module that registers the method, for a new process to import."""
        # importing it runs the `register` decorator
        return (self.entry.config_cls.__module__,)

    def base(self) -> PreTrainedModel:
        """Return a new base model, in eval mode, with the same weights each time."""
        base = self.tiny.base().to(self.device)
        if isinstance(base, PreTrainedModel):
            base.tie_weights()  # a copy to a device that is no CUDA may have ended the ties
        return base

    def batch(self, rows: int = 4, seed: int = 0) -> Batch:
        """Return model inputs with labels, the same for the same arguments."""
        return {n: t.to(self.device) for n, t in self.tiny.batch(rows, seed).items()}

    def all_fields(self) -> Fields:
        """Return the case's fields, with the model's task type unless they have another."""
        # PEFT picks the class of the PeftModel, and the head to train, by the task type
        task = {} if self.tiny.task_type is None else {"task_type": self.tiny.task_type}
        return {**task, **self.fields}

    def without_head(self) -> "Case":
        """Return the same case without training the head of a classifier."""
        return replace(self, fields={**self.fields, "task_type": None})

    def config(self) -> PeftConfig:
        """Build the method's config."""
        return build_config(self.method, **self.all_fields())

    def wrap(self, base: nn.Module | None = None, adapter_name: str = "default") -> PeftModel:
        """Wrap `base`, or a new base model; the adapter is the same each time.

        Of several processes, each has its part of the calibration rows if the method divides them.
        """
        torch.manual_seed(1)
        calibration = None
        config = self.config()
        if needs_calibration(config):
            divides = facts_of(config).divides_calibration
            own = slice(number(), None, num_processes()) if divides else slice(None)
            rows = self.batch(seed=9).items()
            calibration = [{name: values[own].contiguous() for name, values in rows}]
        return wrap(
            self.base() if base is None else base,
            self.method,
            adapter_name=adapter_name,
            calibration=calibration,
            **self.all_fields(),
        ).eval()

    def wrap_half(self, *, autocast_adapter_dtype: bool) -> PeftModel:
        """Wrap a new base model in bfloat16."""
        torch.manual_seed(1)
        base = self.base().to(torch.bfloat16)
        config = self.config()
        return get_peft_model(base, config, autocast_adapter_dtype=autocast_adapter_dtype).eval()

    def wrap_stirred(self, base: nn.Module | None = None) -> PeftModel:
        """Wrap a model and `stir` its adapter, so that it has an effect."""
        # most methods start at the base model, where nothing can be compared
        return stir(self.wrap(base))


@torch.no_grad()
def stir(model: PeftModel, adapter_name: str = "default", *, seed: int = 2) -> PeftModel:
    """Add noise to every trainable tensor of an adapter, so that it has an effect.

    Args:
        model: changed in place, and returned.
        adapter_name: the adapter, which must be active (else InputError).
        seed: of the noise.
    """
    # a generator of its own, on the CPU: the same noise on every device
    generator = torch.Generator().manual_seed(seed)
    found = [p for name, p in trainable(model).items() if adapter_name in name.split(".")]
    require(bool(found), f"nothing of adapter {adapter_name!r} trains; activate it first")
    for parameter in found:
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.add_(noise.to(parameter), alpha=0.1)
    return model


@torch.no_grad()
def logits(model: nn.Module, batch: Batch, **kwargs: object) -> Tensor:
    """Return the logits of `model` in eval mode, in float32; the mode is restored."""
    was_training = model.training
    # dropout off
    model.eval()
    values = model(**batch, **kwargs).logits.float()
    model.train(was_training)
    return values


def gradients(model: nn.Module, batch: Batch, *, weight: float = 1.0) -> dict[str, Tensor]:
    """Return the gradients of `weight` times the training loss, by name.

    The model's own gradients are cleared before and after.
    """
    model.zero_grad()
    model.train()
    (model(**batch).loss * weight).backward()
    values = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return values


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable parameters by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def tuner_layers(model: nn.Module) -> dict[str, Any]:
    """Return the adapted layers of `model` by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)}


class LayerCall(nn.Module):
    """An adapted layer with the inputs of other modules that its adapters read."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer
        self.inputs: list[tuple[Any, Tensor]] = []  # the capture, and what it gets

    def forward(self, *args: object, **kwargs: object) -> object:
        """Return the layer's output."""
        for capture, x in self.inputs:
            capture(self.layer, (x,), {})
        return self.layer(*args, **kwargs)


@torch.no_grad()
def first_call(
    model: nn.Module, batch: Batch
) -> tuple[LayerCall, tuple[object, ...], dict[str, object]]:
    """Return the first adapted layer of `model`, and the arguments that it gets for a batch.

    A layer that adapts a whole block gets more than hidden states.
    """
    call = LayerCall(next(iter(tuner_layers(model).values())))
    calls: list[tuple[tuple[object, ...], dict[str, object]]] = []

    def listen(_: object, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        calls.append((args, kwargs))
        for capture in getattr(call.layer, "captures", {}).values():
            call.inputs.append((capture, capture.context.state[capture.place]))

    hook = call.layer.register_forward_pre_hook(listen, with_kwargs=True)
    model(**batch)
    hook.remove()
    return call, *calls[0]


def first_output(output: Any) -> Tensor:
    """Return the output of a layer, the first of several."""
    return output[0] if isinstance(output, tuple) else output


def difference(a: Tensor, b: Tensor) -> float:
    """Return the largest absolute difference of two tensors."""
    return float((a - b).detach().abs().max())


def assert_close(a: Tensor, b: Tensor, allowed: float, what: str) -> None:
    """Raise AssertionError, with difference and bound, if tensors differ by more than `allowed`.

    Args:
        a, b: tensors of one shape.
        allowed: the largest absolute difference.
        what: the beginning of the message, such as "logits after merging".
    """
    gap = difference(a, b)
    assert gap <= allowed, f"{what} differ by {gap:.2e}: at most {allowed:.0e} is allowed"
