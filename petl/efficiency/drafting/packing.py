"""When decoding packs the linear weights of a model, see `petl.ops.packed`."""

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import psutil
from torch import Tensor, nn

from petl.errors import UnsupportedError
from petl.ops.packed import PackedWeights, is_supported, packable, packed_classes, packed_weights

AFTER = 32  # passes over several tokens; packing takes as long as about 35 passes over one


class Packing:
    """The packed weights of a model while it decodes.

    Attributes:
        weights: the copies, once they are used; else None.
    """

    def __init__(self, model: nn.Module, pack: bool | Literal["auto"]) -> None:
        """Decide whether weights may be packed.

        Args:
            model: with its adapters.
            pack: True: from the first pass on; "auto": after some passes, if the copies take less
                than half of the memory that is available.

        Raises:
            UnsupportedError: `pack` is True, and there is nothing that can be packed.
        """
        self.model = model
        self.weights: PackedWeights | None = None
        layers = packable(model) if pack and is_supported() else []
        if pack is True and not layers:
            raise UnsupportedError(
                f"pack=True needs float32 nn.Linear layers on an x86 CPU with oneDNN, and "
                f"{type(model).__name__} on {getattr(model, 'device', 'this device')} in "
                f"{getattr(model, 'dtype', 'its dtype')} has none here; leave it at 'auto'"
            )
        if pack == "auto":
            unique: dict[int, Tensor] = {id(layer.weight): layer.weight for layer in layers}
            size = sum(weight.nbytes for weight in unique.values())
            layers = layers if 2 * size < psutil.virtual_memory().available else []
        # the first passes over several tokens tell whether there will be more
        self._waits = 0 if pack is True else AFTER
        self._copies = packed_weights(model) if layers else None

    def classes(self) -> AbstractContextManager[None]:
        """Let linear layers look for packed copies inside the block."""
        return nullcontext() if self._copies is None else packed_classes(self.model)

    def active(self) -> AbstractContextManager[None]:
        """Use the copies for a pass over several tokens, once they are worth making."""
        if self._copies is None:
            return nullcontext()
        if self.weights is None:
            # counted over calls: many short answers, too, are worth it
            self._copies.wanted += 1
            if self._copies.wanted <= self._waits:
                return nullcontext()
            self._copies.update(self.model)  # once per call: weights may have changed since
            self.weights = self._copies
        return self.weights.active()
