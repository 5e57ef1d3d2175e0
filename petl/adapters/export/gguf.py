"""Write an adapter as GGUF, which llama.cpp loads next to its base model (`--lora`).

The adapter becomes a plain LoRA first. llama.cpp multiplies B A by alpha / R, with one alpha for
all layers, so differing scales go into B. Shapes: O out, R rank.

llama.cpp names the tensors of all decoders in one way, which the package gguf knows, and turns
neighboring features in rotary embeddings where transformers turns a feature of the first half of a
head with one of the second. For some architectures its conversion of the base model therefore
reorders the rows of query and key; here the rows of B follow.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mode
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from petl.adapters.export.checked_folder import OutputFolder
from petl.adapters.export.conversion import write_lora
from petl.adapters.export.saved_adapter import SavedAdapter
from petl.core.adapter_file import PREFIX
from petl.data.models.loading import loading
from petl.data.models.sources import read_source
from petl.errors import UnsupportedError
from petl.system.files.outputs import check_output, new_folder
from petl.system.imports.extras import optional

FILE = "adapter.gguf"
USE = """\
to use it: llama-cli -m BASE.gguf --lora {out}/adapter.gguf
BASE.gguf, with the script of llama.cpp: python convert_hf_to_gguf.py BASE --outfile BASE.gguf"""
ALPHA = "adapter.lora.alpha"
MERGE = "`petl merge` writes a model that llama.cpp's convert_hf_to_gguf.py converts completely"


class Decoder(NamedTuple):
    """An architecture of llama.cpp.

    Attributes:
        name: as in `general.architecture`.
        reorders: its conversion reorders the rows of query and key.
    """

    name: str
    reorders: bool


# by transformers' model type: those whose linear layers are one tensor each in llama.cpp
DECODERS = {
    "gemma": Decoder("gemma", False),
    "gemma2": Decoder("gemma2", False),
    "gemma3_text": Decoder("gemma3", False),
    "llama": Decoder("llama", True),
    "mistral": Decoder("llama", True),
    "qwen2": Decoder("qwen2", False),
    "qwen3": Decoder("qwen3", False),
    "smollm3": Decoder("smollm3", True),
}


def export_gguf(saved: SavedAdapter, out: Path, tolerance: float | None) -> OutputFolder:
    """Write a saved adapter as a LoRA in GGUF: a folder with `adapter.gguf`.

    The written file is read again, and outputs are compared with the tensors that it holds.

    Args:
        tolerance: the largest `Difference.relative`; None: by the dtype of the base model.

    Raises:
        InputError: `out` is taken, gguf is not installed, the base model is not among `DECODERS`,
            the update of the method is not a matrix per layer or the file cannot hold it, or
            the base is another one.
        RunStopped: the outputs differ by more than `tolerance`.
    """
    check_output(out)
    # before the model is loaded, which takes long
    optional("gguf", "gguf")
    decoder = decoder_of(saved)
    with tempfile.TemporaryDirectory() as folder, new_folder(out) as draft:
        lora, adapted = write_lora(saved, Path(folder))
        layers = list(layers_of(lora, decoder))
        write_file(layers, decoder, draft / FILE)
        # the file's values replace those in memory, so that the comparison tests the file
        read_file(layers, draft / FILE)
        difference = adapted.compare(lora, tolerance, "GGUF adapter")
    return OutputFolder(out, difference)


def decoder_of(saved: SavedAdapter) -> Decoder:
    """Return the architecture in llama.cpp of an adapter's base model.

    Raises:
        UnsupportedError: it is none of `DECODERS`, or does not generate.
    """
    source = read_source(saved.settings["model"])
    with loading(source):
        # the architecture decides names and row order, so read from the base's own config
        kind = source.config().model_type
    task = saved.task_type
    if kind not in DECODERS or task != "CAUSAL_LM":
        raise UnsupportedError(
            f"an adapter for {kind} with task_type={task} cannot be written as GGUF; possible: "
            f"task_type=CAUSAL_LM for {', '.join(DECODERS)}"
        )
    return DECODERS[kind]


@dataclass(frozen=True)
class GgufLayer:
    """A LoRA layer and its place in the file.

    Attributes:
        name: of the weight in llama.cpp.
        lora: the layer.
        order: which of its rows of B each row in the file is, [O]; None: the same.
    """

    name: str
    lora: Any
    order: Tensor | None

    @property
    def matrices(self) -> tuple[nn.Linear, nn.Linear]:
        """The modules that hold A and B."""
        return self.lora.lora_A["default"], self.lora.lora_B["default"]


def layers_of(
    model: PeftModel, decoder: Decoder, adapter_name: str = "default"
) -> Iterator[GgufLayer]:
    """Yield all layers of a LoRA.

    Raises:
        UnsupportedError: a GGUF adapter cannot hold a part of it.
    """
    gguf = optional("gguf", "gguf")
    # gguf maps its enum to names; here the reverse is needed
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == decoder.name)
    config = model.config
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    # grouped-query attention has fewer heads for keys
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    refuse_trained_modules(model, adapter_name)
    for path, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        source = path.removeprefix(PREFIX)
        refuse_variant(module, source, adapter_name)
        name = names.get_name(source)
        # a tied head has no tensor in the file: llama.cpp uses the embedding's
        if name is None or (name == "output" and config.tie_word_embeddings):
            raise UnsupportedError(
                f"llama.cpp's {decoder.name} has no tensor for {source}, so a GGUF adapter cannot "
                f"change it: train with other target_modules; or {MERGE}"
            )
        count = heads.get(source.rpartition(".")[2]) if decoder.reorders else None
        order = row_order(module.out_features, count) if count else None
        yield GgufLayer(f"{name}.weight", module, order)


def refuse_trained_modules(model: PeftModel, adapter_name: str) -> None:
    """Raise UnsupportedError if weights are trained that are not in a LoRA layer."""
    config: Any = model.peft_config[adapter_name]
    trained = [n for n, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper)]
    if trained or config.bias != "none" or config.trainable_token_indices:
        # one example is enough for the message
        what = trained[0].removeprefix(PREFIX) if trained else "biases or tokens"
        raise UnsupportedError(
            f"the adapter trains {what} besides its LoRA, which a GGUF adapter cannot hold; {MERGE}"
        )


def refuse_variant(layer: LoraLayer, name: str, adapter_name: str) -> None:
    """Raise UnsupportedError unless a layer adds scale * B A to the weight of a linear layer."""
    dense = isinstance(layer.get_base_layer(), nn.Linear)
    if not dense or layer.lora_variant.get(adapter_name) or layer.lora_bias.get(adapter_name):
        raise UnsupportedError(
            f"the update of {name} is not a LoRA of a linear layer (DoRA, another variant, a bias, "
            f"or an embedding), which a GGUF adapter cannot hold; {MERGE}"
        )


def row_order(rows: int, heads: int) -> Tensor:
    """Return the rows of a query or key in llama.cpp's order, [O].

    In a head of transformers feature i is rotated with feature i + D / 2; llama.cpp wants the two
    next to each other.
    """
    # [heads, 2, D / 2] -> [heads, D / 2, 2]
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).flatten()


@torch.no_grad()
def write_file(layers: list[GgufLayer], decoder: Decoder, file: Path) -> None:
    """Write the layers of a LoRA in float32."""
    gguf = optional("gguf", "gguf")
    # llama.cpp divides by R, which it reads from a factor's shape
    alphas = [each.lora.scaling["default"] * each.matrices[0].out_features for each in layers]
    alpha = mode(alphas) or 1.0  # llama.cpp takes 0 as if there were no alpha
    writer = gguf.GGUFWriter(file, decoder.name)
    # without it llama.cpp takes the file for a model
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(ALPHA, alpha)
    for layer, own in zip(layers, alphas, strict=True):
        A, B = (matrix.weight.float().cpu() for matrix in layer.matrices)
        # unchanged where possible: a product would round
        B = B if own == alpha else B * (own / alpha)
        B = B if layer.order is None else B[layer.order]
        writer.add_tensor(f"{layer.name}.lora_a", A.contiguous().numpy())
        writer.add_tensor(f"{layer.name}.lora_b", B.contiguous().numpy())
    # the format's order: header, key-value pairs, tensors
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@torch.no_grad()
def read_file(layers: list[GgufLayer], file: Path) -> None:
    """Replace the tensors and scales of LoRA layers by those in a file."""
    gguf = optional("gguf", "gguf")
    reader = gguf.GGUFReader(file)
    alpha = reader.get_field(ALPHA).contents()
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    for layer in layers:
        A, B = (torch.tensor(tensors[f"{layer.name}.lora_{part}"]) for part in "ab")
        if layer.order is not None:
            B = B[layer.order.argsort()]  # the inverse permutation
        for matrix, values in zip(layer.matrices, (A, B), strict=True):
            matrix.weight.copy_(values)
        # as llama.cpp computes it
        layer.lora.scaling["default"] = alpha / len(A)
