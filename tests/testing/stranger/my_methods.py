"""Two methods outside petl: a plain low-rank update, and one from shared factors."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import petl
from petl.core.spec.config import MethodConfig


@dataclass
class PlainConfig(MethodConfig):
    r: int = field(default=4, metadata={"help": "rank"})
    dropout: float = field(default=0.0, metadata={"help": "dropout of the input"})


class PlainAdapter(petl.Adapter):
    def __init__(self, shape: petl.LayerShape, config: PlainConfig, info: petl.LayerInfo) -> None:
        super().__init__(shape, config, info)
        self.lora_A = nn.Parameter(torch.randn(config.r, shape.in_features) / 8)
        self.lora_B = nn.Parameter(torch.zeros(shape.out_features, config.r))
        self.register_buffer("sign", torch.randint(0, 2, (config.r, 1)) * 2.0 - 1)
        self.dropout = nn.Dropout(config.dropout)

    def drop(self, x: Tensor) -> Tensor:
        return self.dropout(x)

    def factors(self) -> petl.Factors:
        return petl.Factors(self.sign * self.lora_A, self.lora_B, 2.0)


@petl.register
class Plain(petl.Method[PlainConfig, PlainAdapter]):
    name, config_cls, adapter_cls = "plain", PlainConfig, PlainAdapter
    summary, paper = "a low-rank update with fixed signs", "none"


@dataclass
class SharedConfig(MethodConfig):
    r: int = field(default=4, metadata={"help": "rank"})


class Factors(nn.Module):
    """One pair of factors for each shape of layer."""

    def __init__(self, shapes: set[petl.LayerShape], r: int) -> None:
        super().__init__()
        for I, O in sorted(shapes):
            self.register_parameter(f"lora_A_{I}_{O}", nn.Parameter(torch.randn(r, I) / 8))
            self.register_parameter(f"lora_B_{I}_{O}", nn.Parameter(torch.randn(O, r) / 8))


class SharedAdapter(petl.Adapter):
    def __init__(self, shape: petl.LayerShape, config: SharedConfig, info: petl.LayerInfo) -> None:
        super().__init__(shape, config, info)
        self.gain = nn.Parameter(torch.zeros(config.r))

    def factors(self) -> petl.Factors:
        I, O = self.shape
        A, B = (getattr(self.info.shared, f"lora_{name}_{I}_{O}") for name in "AB")
        return petl.Factors(self.gain[:, None] * A, B, 1.0)


@petl.register
class Shared(petl.Method[SharedConfig, SharedAdapter]):
    name, config_cls, adapter_cls = "shared", SharedConfig, SharedAdapter
    summary, paper = "low-rank factors that all layers of a shape share", "none"

    def shared(self, c: petl.WrapContext[SharedConfig]) -> nn.Module:
        return Factors(set(c.shapes.values()), c.config.r)
