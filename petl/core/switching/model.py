"""A PeftModel whose own walks over adapters see those that are concerned."""

from collections.abc import Generator
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

from peft import PeftModel

from petl.core.layers.class_swap import Remade, remade
from petl.core.switching.tuner import SwitchingTuner


class SwitchingModel(Remade, PeftModel):
    """Mixed into the class of a PeftModel that has a `SwitchingTuner`.

    PEFT's `disable_adapter` first reports on all adapters, and its `load_adapter` lists the tensors
    of all of them several times.
    """

    @property
    def _tuner(self) -> SwitchingTuner:
        return cast(SwitchingTuner, self.base_model)

    @contextmanager
    def disable_adapter(self) -> Generator[None]:
        """Within it, the model computes as the base model does."""
        with self._tuner.beginning(super().disable_adapter(), self._tuner.awake()):
            yield

    def load_adapter(self, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """Load a trained adapter beside those that are there; see `PeftModel.load_adapter`."""
        with self._tuner.showing({adapter_name}):
            return super().load_adapter(model_id, adapter_name, *args, **kwargs)


@cache
def _switching(plain: type[PeftModel]) -> type[SwitchingModel]:
    """The subclass of `plain` that takes its place."""
    name = plain.__name__  # by which pipelines of transformers know what a model is for
    return remade(SwitchingModel, plain, _switching, name)


def let_switch(model: PeftModel) -> None:
    """Let a model with a `SwitchingTuner` disable and load at the cost of adapters concerned."""
    if isinstance(model.base_model, SwitchingTuner) and not isinstance(model, SwitchingModel):
        model.__class__ = _switching(type(model))
