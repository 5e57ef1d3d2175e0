"""The tuner of CorDA: PEFT's LoRA on residual weights, saved as a plain LoRA on the original ones.

Shapes: I in, O out, R rank.
"""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.lora import LoraModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from petl.core.compat import BaseTunerLayer, add_method, drop_base_weights
from petl.core.layers.conversion import set_refusal
from petl.core.model.heat_map import HeatMap, means, of_layers, role_of
from petl.core.model.weight_changes import MEANING
from petl.core.registry import adopt
from petl.core.support import BASES, Capability
from petl.core.tuners.base import NOT_COMBINED
from petl.efficiency.fused_lora.layer import fuse_layers
from petl.errors import InputError, UnsupportedError
from petl.methods.corda.config import CordaConfig
from petl.methods.corda.initialization import QUANTIZED, InitialFactors, initialize
from petl.system.files.tensor_file import check_finite

logger = logging.getLogger(__name__)

IS_LORA = (
    "CorDA has changed the base weights, to which its update is relative; save_pretrained writes a "
    "plain LoRA on the original weights"
)
# Both relative to the largest entry; assumptions, above the rounding of half precision and float32.
LARGE = 1e-2  # error of the split weights that is logged as a warning
SAME = 1e-5  # difference up to which two initializations count as equal
# of each factor: its name, the dimension of the rank, the sign of its initial value in a file
FACTORS = (("lora_A", 0, 1.0), ("lora_B", 1, -1.0))


class CordaModel(LoraModel):
    """Tuner of `CordaConfig`.

    The base weight of each target is W - s B0 A0, with A0 and B0 the initial factors. So
    `disable_adapter` gives the outputs of that residual, not of the pretrained model; for those,
    load the saved adapter onto a new base model and disable it there. A model can have one CorDA
    adapter only. `unload` and `delete_adapter` restore the pretrained weights.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.initial: dict[str, dict[str, InitialFactors]] = {}  # by adapter name and module path
        self.was_disabled = False
        super().__init__(*args, **kwargs)

    def _check_new_adapter_config(self, config: Any) -> None:
        super()._check_new_adapter_config(config)
        if len(self.peft_config) > 1:
            raise InputError(
                f"cannot add an adapter to one of CorDA ({', '.join(self.peft_config)}), which has "
                "changed the base weights: save it and load the saved adapters onto the original "
                "model. In TRL, pass the original model as ref_model=, or set beta=0 (GRPO)"
            )
        if config.initial is None:
            raise InputError(
                f"CorDA with corda_method={config.corda_method!r} is initialized from calibration "
                "data: use petl.wrap(model, 'corda', calibration=batches, ...)"
            )

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Inject LoRA, then split each weight into the initial update and the residual."""
        # PEFT's initialization is overwritten by `split`
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        # petl's fused kernels for LoRA
        fuse_layers(model)
        config: Any = self.peft_config[adapter_name]
        initial, config.initial = config.initial, None  # configs are copied and saved
        sizes = {}
        for key, layer in self.layers(adapter_name).items():
            # a dry run has no weights to split
            if not initial[key].A.is_meta:
                initial[key], sizes[key] = split(layer, adapter_name, initial[key])
        self.initial[adapter_name] = initial
        set_refusal(self.layers(adapter_name).values(), adapter_name, IS_LORA)
        if sizes:
            log_split(sizes)

    def layers(self, adapter_name: str) -> dict[str, Any]:
        """The layers of an adapter by module path."""
        return {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, BaseTunerLayer) and adapter_name in module.lora_A
        }

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Raise UnsupportedError: the factors are relative to changed base weights."""
        raise UnsupportedError(NOT_COMBINED)

    # The pretrained weights

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete the adapter and restore the pretrained weights."""
        # before deletion: afterwards they cannot be found
        layers = self.layers(adapter_name)
        super().delete_adapter(adapter_name)
        self.restore(adapter_name, layers)

    def unload(self) -> nn.Module:
        """The pretrained model, up to the rounding of its weights."""
        by_adapter = {name: self.layers(name) for name in self.initial}
        # merged weights hold base and adapter
        if any(layer.merged for layers in by_adapter.values() for layer in layers.values()):
            self.unmerge_adapter()
        for name, layers in by_adapter.items():
            self.restore(name, layers)
        return super().unload()

    @torch.no_grad()
    def restore(self, adapter_name: str, layers: dict[str, Any]) -> None:
        """Add the initial update, which `inject_adapter` subtracted, to the base weights."""
        for key, initial in self.initial.pop(adapter_name).items():
            base = layers[key].get_base_layer()
            if not base.weight.is_meta:
                base.weight.copy_(float32_copy(base.weight) + update_of(base, initial))

    def disable_adapter_layers(self) -> None:
        """Disable the adapter; the model then computes with the residual weights."""
        if not self.was_disabled:
            logger.info(
                "a CorDA model with its adapter disabled computes with the residual weights, not "
                "with the pretrained ones; as a reference, use another copy of the original model "
                "(ref_model= in TRL)"
            )
        self.was_disabled = True
        super().disable_adapter_layers()

    # Heat maps

    @torch.no_grad()
    def heat_maps(self) -> list[HeatMap]:
        """The spectrum of the decomposition, and the changes of the pretrained weights."""
        changes, spectra = {}, {}
        for name in self.active_adapters:
            layers = self.layers(name)
            for key, initial in self.initial.get(name, {}).items():
                base = layers[key].get_base_layer()
                # a shard of FSDP2 has no norm of the complete weight
                if isinstance(base.weight, DTensor):
                    continue
                start, update = update_of(base, initial), layers[key].get_delta_weight(name)
                weight = float32_copy(base.weight) + start
                changes[key] = 100 * float((update - start).norm() / weight.norm())
                if initial.spectrum is not None:
                    spectra[key] = initial.spectrum
        title, unit = "Change of the weights", "norm of the update, % of the weight's"
        changed = of_layers(self.model, changes, "weight_change", title, unit, MEANING)
        return [*spectrum_map(self.model, spectra), *changed]

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
        entries = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        for key, tensor, dim, initial in halves(model, entries, adapter_name):
            entries[key] = torch.cat([tensor, initial.to(tensor)], dim)
        # the residuals, which do not fit the factors relative to the original weights
        drop_base_weights(model, state_dict)
        return entries

    @classmethod
    def _convert_state_dict_for_initial_model(cls, *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedError(
            "a CorDA adapter is saved relative to the original weights anyway; leave out "
            "path_initial_model_for_weight_conversion"
        )

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The trained half of the tensors that `_get_adapter_state_dict` concatenated.

        Raises:
            InputError: the other half differs from this model's initial factors.
        """
        check_finite(state_dict, "the adapter file")
        entries = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        for key, tensor, dim, initial in halves(model, entries, adapter_name):
            rank = initial.shape[dim]
            size = min(rank, tensor.shape[dim])  # a file of another rank must not fail here
            second = tensor.narrow(dim, tensor.shape[dim] - size, size)
            if tensor.shape[dim] != 2 * rank or not is_close(second.to(initial), initial):
                raise InputError(
                    f"{key} was saved with other initial factors than this model's; load the file "
                    "onto the original model, or repeat the initialization: same calibration "
                    "data, same number of processes (method.factors_cache stores the factors)"
                )
            entries[key] = tensor.narrow(dim, 0, rank)
        return entries


def spectrum_map(model: nn.Module, spectra: Mapping[str, Tensor]) -> list[HeatMap]:
    """The singular values at powers of two, averaged over layers, as a heat map."""
    if not spectra:
        return []
    most = max(map(len, spectra.values()))
    at = [2**i for i in range(most.bit_length())]
    relative = {
        key: [100 * float(S[i - 1] / S[0]) if i <= len(S) else 0.0 for i in at]
        for key, S in spectra.items()
    }
    rows = means((role_of(model, key), numbers) for key, numbers in relative.items())
    heat_map = HeatMap(
        "spectrum",
        "CorDA: spectrum of the oriented decomposition",
        "% of the largest singular value",
        list(rows),
        [str(i) for i in at],
        list(rows.values()),
        "Singular values of the weight times the covariance of its inputs, relative to the "
        "largest, averaged over layers. Where they fall fast, few components carry the task.",
        column_label="number of the component, from 1",
    )
    return [heat_map]


@torch.no_grad()
def split(layer: Any, adapter_name: str, initial: InitialFactors) -> tuple[InitialFactors, Tensor]:
    """Copy the initial factors to a layer's adapter and subtract their update from the weight.

    Returns:
        The factors as rounded to the adapter's dtype, on the CPU; and a tensor [2]: the largest
        error of residual plus update, and the largest entry of the update, both relative to the
        largest entry of the weight.
    """
    A, B = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
    A.copy_(initial.A)
    B.copy_(initial.B)
    initial = initial._replace(A=A.cpu().clone(), B=B.cpu().clone())
    base = layer.get_base_layer()
    before, update = float32_copy(base.weight), update_of(base, initial)
    # the residual, rounded to the dtype of the base
    base.weight.copy_(before - update)
    error = float32_copy(base.weight) + update - before
    sizes = torch.stack([error.abs().max(), update.abs().max()]) / before.abs().max()
    return initial, sizes.cpu()


def float32_copy(tensor: Tensor) -> Tensor:
    """A copy in float32, or in float64 if the tensor is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32), copy=True)


def update_of(base: Any, initial: InitialFactors) -> Tensor:
    """The initial update in the orientation of the base weight: [O, I], or [I, O] for Conv1D."""
    A, B = (float32_copy(tensor.to(base.weight.device)) for tensor in (initial.A, initial.B))
    update = initial.scale * (B @ A)
    return update.t() if isinstance(base, Conv1D) else update


def log_split(sizes: dict[str, Tensor]) -> None:
    """Log the largest error of the split weights, and the largest initial update."""
    error, error_at = max((float(pair[0]), key) for key, pair in sizes.items())
    size, size_at = max((float(pair[1]), key) for key, pair in sizes.items())
    logger.log(
        logging.WARNING if error > LARGE else logging.INFO,
        "CorDA: W_res + s B A equals W up to %.1e of its largest entry (%s); the largest entry of "
        "s B A is %.2g times that of W (%s)",
        error,
        error_at,
        size,
        size_at,
    )


def halves(
    model: Any, tensors: dict[str, Tensor], adapter_name: str
) -> list[tuple[str, Tensor, int, Tensor]]:
    """For each factor in a state dict: key, tensor, dimension of the rank, initial value.

    The initial value of B is negated, as it is saved.
    """
    tuner = model.base_model
    found = []
    for path, initial in tuner.initial[adapter_name].items():
        for (name, dim, sign), value in zip(FACTORS, initial[:2], strict=True):
            key = f"base_model.model.{path}.{name}.{adapter_name}.weight"
            if key in tensors:
                found.append((key, tensors[key], dim, sign * value))
    return found


def is_close(found: Tensor, expected: Tensor) -> bool:
    """True if the tensors are equal in shape, and in values up to `SAME`."""
    limit = SAME * float(expected.abs().max())
    return found.shape == expected.shape and bool((found - expected).abs().max() <= limit)


add_method("petl_corda", LoraModel.prefix, CordaConfig, CordaModel, is_own_prefix=False)
adopt(
    "corda",
    CordaConfig,
    lr=3e-4,  # below LoRA's: the factors are large parts of the weights; paper: 2e-5 for 7 B models
    summary="LoRA initialized from the weight's components, oriented by samples of the task or of "
    "knowledge to preserve",
    need="keeping what the model knows",
    recommended="starts from the components that samples of the task, or of the knowledge to keep, "
    "use",
    paper="Yang et al. 2024, CorDA: Context-Oriented Decomposition Adaptation, arXiv:2406.05223",
    keeps_base=lambda config: False,
    needs_data=lambda config: "method 'corda'",
    calibrate=initialize,
    lacks={
        Capability.RANKS: "it distributes ranks itself, by rank_budget",
        **dict.fromkeys(BASES, QUANTIZED),
        Capability.MIXED_BATCH: "a CorDA adapter changes the base weights, so the model can have "
        "no other adapter",
    },
)
