"""Temporary states of a model, changes that are undone, and passes over calibration data."""

from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from accelerate.utils import send_to_device
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from petl.core.compat import AuxiliaryTrainingWrapper, BaseTunerLayer
from petl.core.types import Calibration
from petl.errors import InputError

B = TypeVar("B", bound=Mapping[str, object])


@contextmanager
def evaluation_mode(model: nn.Module) -> Generator[None]:
    """Inside the block all modules are in evaluation mode; afterwards each is as before."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training  # not `train`, which changes its children as well


@contextmanager
def without_cache(model: nn.Module) -> Generator[None]:
    """Inside the block a model of transformers keeps no keys and values."""
    config: Any = getattr(model, "config", None)
    cache = getattr(config, "use_cache", None)
    if cache is not None:
        config.use_cache = False
    try:
        yield
    finally:
        if cache is not None:
            config.use_cache = cache


@contextmanager
def without_adapters(model: nn.Module) -> Generator[None]:
    """Inside the block the model computes as its base model.

    Unlike PEFT's `disable_adapter`, it leaves `requires_grad` of all parameters alone, so that it
    may be used within a training forward; of prompt-learning methods it is PEFT's.
    """
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        with model.disable_adapter():
            yield
        return
    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    states = [(m, m._disable_adapters) for m in model.modules() if isinstance(m, kinds)]
    for module, _ in states:
        module._disable_adapters = True
    try:
        yield
    finally:
        for module, is_disabled in states:
            module._disable_adapters = is_disabled


def has_enabled_adapter(model: nn.Module) -> bool:
    """Return True if a layer of the model has adapters that are not disabled."""
    first = next((m for m in model.modules() if isinstance(m, BaseTunerLayer)), None)
    return first is not None and not first.disable_adapters


def checkpoints_reentrantly(model: nn.Module) -> bool:
    """Return True if a module of transformers runs under reentrant checkpointing in training."""
    running = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    functions = [getattr(module, "_gradient_checkpointing_func", None) for module in running]
    # a partial of torch's `checkpoint`
    return any(getattr(f, "keywords", {}).get("use_reentrant", False) for f in functions)


# A change that is undone if it fails half-way


class _Before:
    """The class, attributes, children and hooks of a module, without the modules below it."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.cls, self.attributes = module, module.__class__, dict(vars(module))
        kinds = dict, list, set
        self.contents = [(v, v.copy()) for v in self.attributes.values() if isinstance(v, kinds)]

    def restore(self) -> None:
        self.module.__class__ = self.cls
        vars(self.module).clear()
        vars(self.module).update(self.attributes)
        # the same containers, which others may hold
        for container, content in self.contents:
            _fill(container, content)


def _fill(container: Any, content: Any) -> None:
    container.clear()
    (container.extend if isinstance(container, list) else container.update)(content)


@contextmanager
def undone_on_error(model: nn.Module) -> Generator[None]:
    """Give a model its modules, hooks and trained parameters back if the block raises.

    Values of weights are not kept, since a copy would need the memory of the model.
    """
    modules = [_Before(module) for module in model.modules()]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:  # Ctrl-C, too
        for module in modules:
            module.restore()
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
        raise


# A pass over calibration data: a model runs over batches while hooks read what it computes


def forward(model: nn.Module, batch: Mapping[str, object]) -> Any:
    """Run a model on a batch, on the model's device, and return its output."""
    return model(**send_to_device(dict(batch), next(model.parameters()).device))


def checked_batches(batches: Iterable[B]) -> Iterator[B]:
    """Yield the batches that a public function is given.

    Raises:
        InputError: they are a single batch or nothing of batches, or one of them is no mapping.
    """
    if isinstance(batches, Mapping | Tensor | str) or not isinstance(batches, Iterable):
        raise InputError(
            f"batches is of type {type(batches).__name__}: give a list of batches, "
            "batches=[batch], or a DataLoader"
        )
    for batch in batches:
        if not isinstance(batch, Mapping):
            raise InputError(
                f"a batch is of type {type(batch).__name__}: make it a dict of the model's inputs, "
                "such as input_ids and attention_mask"
            )
        yield batch


@contextmanager
def calibration_pass(model: nn.Module, hooks: Iterable[RemovableHandle] = ()) -> Generator[None]:
    """Inside the block a model runs in evaluation mode, without gradients and key-value cache.

    Modes and the cache setting are restored afterwards.

    Args:
        hooks: are removed at the end of the block.
    """
    try:
        with evaluation_mode(model), without_cache(model), torch.no_grad():
            yield
    finally:
        for handle in hooks:
            handle.remove()


def run_over(model: nn.Module, data: Calibration, hooks: Iterable[RemovableHandle] = ()) -> None:
    """Run a model once over calibration data; arguments as of `calibration_pass`."""
    with calibration_pass(model, hooks):
        if callable(data):
            data()
        else:
            for batch in data:
                forward(model, batch)
