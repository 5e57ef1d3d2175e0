"""A tuner of petl's own layers, which may share tensors."""

from typing import Any

from torch import nn

from petl.core.layers.adapter_dict import Shelf
from petl.core.layers.layer import AdapterLayer
from petl.core.switching.tuner import SwitchingTuner
from petl.core.tuners.forward_context import ListeningTuner


class PoolingTuner(SwitchingTuner, ListeningTuner):
    """Holds what the layers of each adapter share."""

    tuner_layer_cls = AdapterLayer

    def _pre_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        super()._pre_injection_hook(model, config, adapter_name)
        setattr(self, self.pools_name, Shelf())

    @property
    def pools_name(self) -> str:
        return f"{self.prefix}pools"

    @property
    def pools(self) -> Shelf:
        """By adapter name, the tensors that its layers share."""
        return getattr(self, self.pools_name)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, the tensors that its layers share included."""
        super().delete_adapter(adapter_name)
        if adapter_name in self.pools:
            del self.pools[adapter_name]
