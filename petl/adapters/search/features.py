"""What `petl squeeze` searches in a saved adapter: its units, and the folder of a state of them."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file

from petl.adapters.deltas.adapters import copy_others, read, write_compressed
from petl.adapters.export.card import write_companions
from petl.adapters.export.conversion import as_lora, ranked_config, save_lora
from petl.adapters.export.saved_adapter import SavedAdapter
from petl.adapters.search.bits import bits_of, quantized_weights
from petl.adapters.search.density import CompressedCandidate, units_of
from petl.adapters.search.rank import layers_of, rank_of
from petl.adapters.search.tensors import adapter_tensors, config_of, grouped
from petl.adapters.search.units import Feature
from petl.core import fingerprint
from petl.core.adapter_file import PREFIX, WEIGHTS, safetensors_bytes, trained_modules
from petl.core.adapter_folder import Folder
from petl.core.loading import load
from petl.core.refusals import is_lora
from petl.core.registry import require_capability
from petl.core.support import Capability
from petl.ops.quantize import encode
from petl.ops.ternary import FILE
from petl.system.files.tensor_file import Shapes

ADAPTER = "default"  # the name under which `petl.load` adds an adapter
TUNER = "base_model."  # of every name in a PeftModel
# of the smallest file to the largest: digits of counts and of the overall density, and padding
SLACK = 32


class Density(Feature):
    """Densities of ComPEFT, of an adapter of any method."""

    file = FILE

    def __init__(self, saved: SavedAdapter) -> None:
        self.saved = saved
        self.material, self.model = read(saved.adapter), saved.model()
        own = adapter_tensors(self.model)
        groups = grouped(self.model, own.live)
        self.coded = CompressedCandidate.of(self.material.state, groups, self.material.reference)
        self.units = units_of(self.coded, own.live, self.material.reference)
        top = [unit.levels - 1 for unit in self.units]
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / FILE
            # the most digits
            self.coded.mixed(top).save(file)
            self.fixed = file.stat().st_size + SLACK
        self.fixed -= sum(int(unit.costs[-1]) for unit in self.units)

    def write(self, state: Sequence[int], folder: Path) -> None:
        """Write a compressed adapter."""
        write_compressed(self.material, self.coded.mixed(state), folder)


class Rank(Feature):
    """Ranks of a LoRA, or of the LoRA that an adapter can be converted to."""

    unit_bytes = 4  # values are float32

    def __init__(self, saved: SavedAdapter) -> None:
        self.saved = saved
        require_capability(saved.config, Capability.LORA_EXPORT, "a plain LoRA")
        self.model = saved.model() if is_lora(saved.config) else self.converted()
        self.units = rank_of(self.model)
        self.heads = trained_modules(self.model, ADAPTER)
        values = sum(int(unit.costs[-1]) for unit in self.units)
        full = [unit.levels - 1 for unit in self.units]
        self.fixed = safetensors_bytes(self.shapes(full)) - self.unit_bytes * values

    def converted(self) -> PeftModel:
        """Return the adapter as a LoRA on its base model."""
        saved = self.saved.dense()
        config, tensors = as_lora(saved.model())
        with tempfile.TemporaryDirectory() as folder:
            save_lora(config, tensors, Path(folder))
            fingerprint.write(Path(folder), saved.folder.base)
            return load(saved.base(), folder).eval()

    def shapes(self, state: Sequence[int]) -> Shapes:
        """Return dtype and shape of the tensors in the file of a state."""
        tensors = self.tensors(state)
        return {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}

    def tensors(self, state: Sequence[int]) -> dict[str, torch.Tensor]:
        """Return the tensors in the file of a state; B has the scale of its layer."""
        layers = dict(layers_of(self.model, ADAPTER))
        found = dict(self.heads)
        for unit, level in zip(self.units, state, strict=True):
            path = f"{PREFIX}{unit.name}"
            names = (f"{path}.lora_{side}.{ADAPTER}.weight" for side in "AB")
            A, B = (unit.tensors[level][name].float() for name in names)
            rank, scale = unit.values[level], layers[path].scaling[ADAPTER]
            found[f"{path}.lora_A.weight"] = A[:rank].contiguous()
            found[f"{path}.lora_B.weight"] = (scale * B[:, :rank]).contiguous()
        return {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}

    def write(self, state: Sequence[int], folder: Path) -> None:
        """Write a LoRA with a rank for each layer."""
        folder.mkdir()
        ranks = {u.name: u.values[level] for u, level in zip(self.units, state, strict=True)}
        template = config_of(self.model, ADAPTER)
        save_lora(ranked_config(template, ranks), self.tensors(state), folder)
        fingerprint.write(folder, self.saved.folder.base)
        note = f"A LoRA that `petl squeeze` made of the adapter, with {sum(ranks.values())} ranks."
        write_companions(self.saved, folder, Folder(folder).config, note=note)


class Bits(Feature):
    """Bits of the tensors of the method binary."""

    def __init__(self, saved: SavedAdapter) -> None:
        self.saved = saved
        self.model = saved.model()
        self.units = bits_of(self.model)
        self.weights = quantized_weights(self.model, ADAPTER)
        # the largest file: more bits, more digits
        top = [unit.levels - 1 for unit in self.units]
        with tempfile.TemporaryDirectory() as folder:
            self.save(top, Path(folder))
            size = (Path(folder) / WEIGHTS).stat().st_size
        self.fixed = size - sum(int(unit.costs[-1]) for unit in self.units)

    def save(self, state: Sequence[int], folder: Path) -> None:
        """Write config and weights of a state into an existing folder."""
        config = config_of(self.model, ADAPTER)
        pattern, stored, chosen = config.bits_pattern, {}, {}
        tuner: Any = self.model.base_model
        for unit, level in zip(self.units, state, strict=True):
            # of the most bits, as it is stored: rounding a rounded one again would shrink it
            (live, value), bits = *unit.tensors[-1].items(), unit.values[level]
            weight = self.weights[live]
            stored[live] = weight.bits, weight.packed
            if bits != weight.bits:
                weight.bits, weight.packed = bits, encode(value, bits)
            if bits != config.bits:
                chosen[tuner._remove_adapter_name_from_key(live[len(TUNER) :], ADAPTER)] = bits
        try:
            config.bits_pattern = chosen
            tensors = get_peft_model_state_dict(self.model, save_embedding_layers=False)
            save_file(tensors, folder / WEIGHTS, {"format": "pt"})
            config.save_pretrained(str(folder))
        finally:
            config.bits_pattern = pattern
            for live, (bits, packed) in stored.items():
                self.weights[live].bits, self.weights[live].packed = bits, packed

    def write(self, state: Sequence[int], folder: Path) -> None:
        """Write an adapter with bits for each tensor."""
        folder.mkdir()
        copy_others(self.saved.adapter, folder)
        self.save(state, folder)
        fingerprint.seal(folder)


FEATURES: dict[str, Callable[[SavedAdapter], Feature]] = {
    "density": Density,
    "rank": Rank,
    "bits": Bits,
}
