"""Layers that an embedding model has behind its pooling, as in EmbeddingGemma and LaBSE.

They are those of sentence-transformers' module Dense: frozen, unless `modules_to_save` has `NAME`.
N texts, D numbers of a vector.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import cast

import safetensors.torch
import torch
from torch import Tensor, nn

from petl.data.tasks.base import BaseFiles
from petl.errors import InputError
from petl.system.values import read_fields

NAME = "petl_dense"  # of the module of all layers in the model
WEIGHTS = "model.safetensors"
ACTIVATIONS = {  # paths in config.json
    f"torch.nn.modules.{place}": kind
    for place, kind in {
        "linear.Identity": nn.Identity,
        "activation.Tanh": nn.Tanh,
        "activation.ReLU": nn.ReLU,
        "activation.GELU": nn.GELU,
        "activation.SiLU": nn.SiLU,
        "activation.Sigmoid": nn.Sigmoid,
    }.items()
}
VECTOR = "sentence_embedding"


@dataclass
class DenseConfig:
    """The content of config.json of a layer; names are those of sentence-transformers."""

    in_features: int
    out_features: int
    bias: bool = True
    activation_function: str = "torch.nn.modules.activation.Tanh"
    module_input_name: str = VECTOR
    module_output_name: str | None = VECTOR
    use_residual: bool = False


class Dense(nn.Module):
    """`act(W x + b)`, to which the input may be added: [N, D] to [N, D']."""

    def __init__(self, config: DenseConfig) -> None:
        super().__init__()
        sizes = (config.in_features, config.out_features)
        self.linear = nn.Linear(*sizes, bias=config.bias)
        self.activation = ACTIVATIONS[config.activation_function]()
        self.use_residual = config.use_residual
        if self.use_residual and sizes[0] != sizes[1]:
            self.residual = nn.Linear(*sizes, bias=False)

    def forward(self, vectors: Tensor) -> Tensor:
        """Return the vectors behind this layer."""
        found = self.activation(self.linear(vectors))
        if not self.use_residual:
            return found
        return found + (self.residual(vectors) if hasattr(self, "residual") else vectors)


class DenseStack(nn.Module):
    """Layers one after the other; they are no blocks, so not a list of layers."""

    def __init__(self, layers: Iterable[Dense]) -> None:
        super().__init__()
        for number, layer in enumerate(layers):
            self.add_module(f"layer{number}", layer)

    def forward(self, vectors: Tensor) -> Tensor:
        """Return the vectors behind the last layer."""
        for layer in self.children():
            vectors = layer(vectors)
        return vectors


class DenseLayers:
    """The layers of a base model's folder.

    Args:
        base: the model.
        paths: of the folders of the layers, in their order.

    Raises:
        InputError: a layer does what petl does not compute.
    """

    def __init__(self, base: BaseFiles, paths: list[str]) -> None:
        self._base = base
        self.configs = {path: self._config(path) for path in paths}

    def _config(self, path: str) -> DenseConfig:
        place = f"{path}/config.json of the base model"
        given = self._base.json_file(f"{path}/config.json")
        if not isinstance(given, Mapping):
            raise InputError(f"{place} is missing, though modules.json names the module Dense")
        config = read_fields(DenseConfig, cast("Mapping[str, object]", given), place)
        if config.activation_function not in ACTIVATIONS:
            raise InputError(
                f"{place} has activation_function={config.activation_function}: petl computes "
                f"{', '.join(ACTIVATIONS)}"
            )
        if (config.module_input_name, config.module_output_name or VECTOR) != (VECTOR, VECTOR):
            raise InputError(
                f"{place} reads {config.module_input_name} and writes {config.module_output_name}: "
                f"petl computes layers from {VECTOR} to it"
            )
        return config

    @property
    def width(self) -> int:
        """Numbers of a vector behind the last layer."""
        return [*self.configs.values()][-1].out_features

    def module(self, width: int) -> DenseStack:
        """The layers with their weights.

        Args:
            width: numbers of a vector before the first one.

        Raises:
            InputError: the weights are missing, or of other sizes.
        """
        layers = []
        for path, config in self.configs.items():
            if config.in_features != width or config.out_features < 1:
                raise InputError(
                    f"{path}/config.json of the base model has in_features={config.in_features} "
                    f"and out_features={config.out_features}: its vectors have {width} numbers"
                )
            width = config.out_features
            # its sizes may be any numbers: no memory for them before those of the weights are known
            with torch.device("meta"):
                layer = Dense(config)
            tensors = self._base.tensors(f"{path}/{WEIGHTS}")
            shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            wanted = {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
            if shapes != wanted:
                raise InputError(
                    f"{path}/{WEIGHTS} of the base model has {shapes or 'no tensors'}, and its "
                    f"config.json needs {wanted}: save the model with sentence-transformers again"
                )
            if not all(t.is_floating_point() and t.isfinite().all() for t in tensors.values()):
                raise InputError(
                    f"{path}/{WEIGHTS} of the base model has tensors with other values than finite "
                    "floats: save the model with sentence-transformers again"
                )
            layer.load_state_dict(tensors, assign=True)
            layers.append(layer)
        return DenseStack(layers)

    def files(self, layers: nn.Module) -> dict[str, object]:
        """The files of the layers, as JSON or bytes by name."""
        found: dict[str, object] = {}
        for (path, config), layer in zip(self.configs.items(), layers.children(), strict=True):
            # versions before 5.7 do not know `use_residual`
            written = {n: v for n, v in vars(config).items() if n != "use_residual" or v}
            found[f"{path}/config.json"] = written
            tensors = {name: t.contiguous() for name, t in layer.state_dict().items()}
            found[f"{path}/{WEIGHTS}"] = safetensors.torch.save(tensors)
        return found
