"""The tuner of CorDA: PEFT's LoRA on a residual base, saved as a plain LoRA on the original one."""

import logging
from typing import Any

import torch
from peft.tuners.lora import LoraModel
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from petl.core.compat import BaseTunerLayer, add_method
from petl.core.layers.fused_lora import fuse_layers
from petl.core.registry import adopt
from petl.errors import InputError
from petl.methods.corda.config import CordaConfig
from petl.methods.corda.start import QUANTISED, Start, begin

logger = logging.getLogger(__name__)

LARGE = 1e-2  # an error of the split weights, over the largest weight, that is worth a warning
SAME = 1e-5  # how far a start may be from another, over its largest entry, to count as the same
# of each factor: its name, the dimension of its rank, the sign of its start in a file
PAIR = (("lora_A", 0, 1.0), ("lora_B", 1, -1.0))


class CordaModel(LoraModel):
    """The tuner of `CordaConfig`.

    The base weight of each target is W - s B0 A0, with A0, B0 the factors that training began with.
    So `disable_adapter` shows that residual, not the pretrained model; for that, load the saved
    adapter onto a fresh base and disable it there. There is room for one adapter only. `unload` and
    `delete_adapter` put the pretrained weights back.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.starts: dict[str, dict[str, Start]] = {}  # by adapter name and module path
        self.was_disabled = False
        super().__init__(*args, **kwargs)

    def _check_new_adapter_config(self, config: Any) -> None:
        super()._check_new_adapter_config(config)
        if len(self.peft_config) > 1:
            raise InputError(
                "a CorDA adapter has changed the base weights, so no other fits beside it; save it "
                "and load the saved adapters onto the original model, where they combine freely"
            )
        if config.start is None:
            raise InputError(
                "CorDA starts from calibration data: use petl.wrap(model, 'corda', "
                "calibration=batches, ...)"
            )

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Put LoRA in place, then split each weight into the start of the adapter and the rest."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        fuse_layers(model)
        config: Any = self.peft_config[adapter_name]
        starts, config.start = config.start, None
        sizes = {}
        for key, layer in self.layers(adapter_name).items():
            if not starts[key].A.is_meta:
                starts[key], sizes[key] = split(layer, adapter_name, starts[key])
        self.starts[adapter_name] = starts
        if sizes:
            report(sizes)

    def layers(self, adapter_name: str) -> dict[str, Any]:
        """The adapted layers by module path."""
        return {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, BaseTunerLayer) and adapter_name in module.lora_A
        }

    # The pretrained weights

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete the adapter and put the pretrained weights back."""
        layers = self.layers(adapter_name)
        super().delete_adapter(adapter_name)
        self.restore(adapter_name, layers)

    def unload(self) -> nn.Module:
        """The pretrained model, up to the rounding of its weights."""
        layers = {name: self.layers(name) for name in self.starts}
        if any(layer.merged for of_one in layers.values() for layer in of_one.values()):
            self.unmerge_adapter()
        for name, of_one in layers.items():
            self.restore(name, of_one)
        return super().unload()

    @torch.no_grad()
    def restore(self, adapter_name: str, layers: dict[str, Any]) -> None:
        """Add to the base weights what `inject_adapter` took from them."""
        for key, start in self.starts.pop(adapter_name).items():
            base = layers[key].get_base_layer()
            if not base.weight.is_meta:
                base.weight.copy_(wide(base.weight) + update_of(base, start))

    def disable_adapter_layers(self) -> None:
        """Switch the adapter off, which shows the residual weights."""
        if not self.was_disabled:
            logger.info("without its adapter, a CorDA model has the residual weights, not W")
        self.was_disabled = True
        super().disable_adapter_layers()

    # Saving

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: Any,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """A' = [A; A0] and B' = [B, -B0]: the LoRA of twice the rank on the original weights."""
        found = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        for key, tensor, dim, start in halves(model, found, adapter_name):
            found[key] = torch.cat([tensor, start.to(tensor)], dim)
        return found

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Take the trained half of what `_get_adapter_state_dict` put together.

        Raises:
            InputError: the other half is not what this model started from.
        """
        found = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        for key, tensor, dim, start in halves(model, found, adapter_name):
            rank = start.shape[dim]
            second = tensor.narrow(dim, tensor.shape[dim] - min(rank, tensor.shape[dim]), rank)
            if tensor.shape[dim] != 2 * rank or not is_close(second.to(start), start):
                raise InputError(
                    f"{key} does not hold the start of this model beside what was trained; load "
                    "the file onto the original model, or start as before: from the same "
                    "calibration data, on as many processes (method.factors_cache keeps a start)"
                )
            found[key] = tensor.narrow(dim, 0, rank)
        return found


@torch.no_grad()
def split(layer: Any, adapter_name: str, start: Start) -> tuple[Start, Tensor]:
    """Give a layer's adapter its start and take that update from the base weight.

    Returns:
        The start as it is in the adapter, on the CPU; and [2], both over the largest entry of the
        weight: the largest error of base and adapter together, the largest entry of the update.
    """
    A, B = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
    A.copy_(start.A)
    B.copy_(start.B)
    start = Start(A.cpu().clone(), B.cpu().clone(), start.scale)
    base = layer.get_base_layer()
    before, update = wide(base.weight), update_of(base, start)
    base.weight.copy_(before - update)
    error = wide(base.weight) + update - before
    sizes = torch.stack([error.abs().max(), update.abs().max()]) / before.abs().max()
    return start, sizes.cpu()


def wide(tensor: Tensor) -> Tensor:
    """A copy in float32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32), copy=True)


def update_of(base: Any, start: Start) -> Tensor:
    """The update of a start as the base weight lies: [O, I], or [I, O] for Conv1D."""
    A, B = (wide(tensor.to(base.weight.device)) for tensor in (start.A, start.B))
    update = start.scale * (B @ A)
    return update.t() if isinstance(base, Conv1D) else update


def report(sizes: dict[str, Tensor]) -> None:
    """Log how exact the split of the weights is, and how large the start."""
    error, error_at = max((float(pair[0]), key) for key, pair in sizes.items())
    size, size_at = max((float(pair[1]), key) for key, pair in sizes.items())
    logger.log(
        logging.WARNING if error > LARGE else logging.INFO,
        "CorDA: W_res + s B A is W up to %.1e of its largest entry (%s); the largest entry of "
        "s B A is %.2g times that of W (%s)",
        error,
        error_at,
        size,
        size_at,
    )


def halves(
    model: Any, tensors: dict[str, Tensor], adapter_name: str
) -> list[tuple[str, Tensor, int, Tensor]]:
    """Of each factor in a state dict: its key, itself, the dimension of the rank, its start's part.

    The start of B is negative there.
    """
    tuner = model.base_model
    found = []
    for path, start in tuner.starts[adapter_name].items():
        for (name, dim, sign), value in zip(PAIR, start[:2], strict=True):
            key = f"base_model.model.{path}.{name}.{adapter_name}.weight"
            if key in tensors:
                found.append((key, tensors[key], dim, sign * value))
    return found


def is_close(found: Tensor, expected: Tensor) -> bool:
    limit = SAME * float(expected.abs().max())
    return found.shape == expected.shape and bool((found - expected).abs().max() <= limit)


add_method("petl_corda", LoraModel.prefix, CordaConfig, CordaModel, is_own_prefix=False)
adopt(
    "corda",
    CordaConfig,
    lr=3e-4,  # its factors hold large parts of the weights; paper: 2e-5 for 7 B models
    summary="LoRA from the weight's own components, oriented by samples of the task or of what "
    "must survive",
    paper="Yang et al. 2024, CorDA: Context-Oriented Decomposition Adaptation, arXiv:2406.05223",
    exports_lora=True,
    keeps_base=lambda config: False,
    calibration=lambda config: "method 'corda'",
    on_wrap=begin,
    unsupported={
        **dict.fromkeys(("4bit", "8bit", "torchao"), QUANTISED),
        "mixed": "a CorDA adapter has changed the base weights, so no other fits beside it",
    },
)
