"""Frozen weights in 8 or 4 bits, multiplied by torch's own kernels for a few rows on a CPU.

A weight W [O, I] becomes codes q and scales s in bfloat16, rounded to the nearest.
int8: W is about s q with q from -127 to 127 and a scale for each output.
int4: W is about s (q - 8) + z with q from 0 to 15, and s and z for each output and 32 inputs.
The input is rounded to bfloat16, products are added up in float32, and the output is rounded to
bfloat16, as in a layer of bfloat16. The kernels are those that torchao calls for a CPU, without its
subclass of tensors, whose dispatch takes longer than a small product; they are private, so that
`why_unsupported` tries them. They have no backward pass. Shapes: I in, O out, T tokens.
"""

from functools import cache
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from petl.ops.packed import PackedLinear

Kind = Literal["int8", "int4"]
KINDS: tuple[Kind, ...] = ("int8", "int4")
GROUP = 32  # inputs that share a scale in 4 bits
OUTPUTS = 16  # the kernel of 4 bits takes multiples of them
ROWS = 16  # beyond, the kernel of 8 bits, which takes row by row, is slower than dense blocks
BLOCK = 2**20  # entries of a block that is made dense: 2 MB, which a cache of the CPU holds
VECTORS = ("AVX2", "AVX512")  # for others, torch's kernels are loops over single numbers


class SmallWeight(NamedTuple):
    """A packed weight.

    Attributes:
        codes: int8 [O, I]; or uint8, two codes in each, in the order of the kernel.
        scales: bfloat16: [O]; or s and z of each group, [I / 32, O, 2].
    """

    codes: Tensor
    scales: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self.codes.nbytes + self.scales.nbytes


def pack(weight: Tensor, kind: Kind) -> SmallWeight:
    """Pack a weight [O, I]; in 4 bits, O is a multiple of 16 and I one of 32."""
    weight = weight.detach().float().contiguous()  # that of Conv1D is a transposed view
    least = torch.finfo(torch.bfloat16).tiny  # scales of rows of zeros
    if kind == "int8":
        scales = (weight.abs().amax(1) / 127).clamp_min(least).bfloat16()
        codes = (weight / scales[:, None]).round_().clamp_(-127, 127).to(torch.int8)
        return SmallWeight(codes, scales)
    groups = weight.unflatten(1, (-1, GROUP))
    low, high = groups.aminmax(dim=-1)
    scales = ((high - low) / 15).clamp_min(least).bfloat16()
    middle = (low + 8 * scales).bfloat16()
    levels = (groups - middle[..., None]).div_(scales[..., None]).round_().add_(8).clamp_(0, 15)
    codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels.flatten(1).int(), 1)
    return SmallWeight(codes, torch.stack([scales, middle], -1).transpose(0, 1).contiguous())


def product(x: Tensor, weight: SmallWeight) -> Tensor:
    """Return `x W^T`, bfloat16 [T, O], for x bfloat16 [T, I]."""
    if weight.codes.dtype == torch.uint8:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, weight.codes, GROUP, weight.scales)
    if len(x) <= ROWS:
        return torch.ops.aten._weight_int8pack_mm(x, weight.codes, weight.scales)
    count, width = weight.codes.shape
    step = min(count, max(1, BLOCK // width))
    y, dense = x.new_empty(len(x), count), x.new_empty(step, width)
    for start in range(0, count, step):
        codes = weight.codes[start : start + step]
        y[:, start : start + step] = F.linear(x, dense[: len(codes)].copy_(codes))
    return y.mul_(weight.scales)


class Small:
    """Of a linear layer with a packed weight; it is put before the class of a live layer.

    Its parameter `weight` has the dtype of the full one and no entries, so that a product with it
    fails: on the meta device, torch multiplies numbers that were never written.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return `x W^T + b`, [..., O] in the dtype of x, for x [..., I]."""
        own = cast(Any, self)
        rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
        y = product(rows, SmallWeight(own.codes, own.scales)).to(x.dtype)
        y = y.view(*x.shape[:-1], y.shape[-1])
        return y if own.bias is None else y + own.bias


# its argument is `input`, which nothing names
class SmallLinear(Small, nn.Linear):  # ty: ignore[lost-keyword-for-regular-parameter]
    """nn.Linear with a packed weight."""


class SmallConv1D(Small, Conv1D):
    """transformers' Conv1D, whose weight is [I, O], with a packed weight."""


CLASSES: dict[type[nn.Module], type[Small]] = {
    nn.Linear: SmallLinear,
    PackedLinear: SmallLinear,
    Conv1D: SmallConv1D,
}


def matrix_of(layer: nn.Module) -> Tensor:
    """Return the weight of a layer as [O, I]."""
    weight = cast(Tensor, layer.weight)
    return weight.t() if isinstance(layer, Conv1D) else weight


def can_pack(layer: nn.Module, kind: Kind) -> bool:
    """Return True for a plain linear layer, of sizes that the kernel takes."""
    weight = layer._parameters.get("weight")
    if type(layer) not in CLASSES or type(weight) is not nn.Parameter:
        return False
    out, width = matrix_of(layer).shape
    fits = kind == "int8" or (out % OUTPUTS == 0 and width % GROUP == 0)
    return fits and weight.is_floating_point() and weight.device.type == "cpu"


def replace_weight(layer: nn.Module, weight: SmallWeight) -> None:
    """Let a layer of `can_pack` multiply a packed weight, and forget its own."""
    empty = torch.empty(0, dtype=cast(Tensor, layer.weight).dtype)
    layer._parameters["weight"] = nn.Parameter(empty, requires_grad=False)
    layer.register_buffer("codes", weight.codes, persistent=False)
    layer.register_buffer("scales", weight.scales, persistent=False)
    layer.__class__ = CLASSES[type(layer)]


@cache
def why_unsupported(kind: Kind) -> str:
    """Return why this processor and torch have no fast product; "": they have, and it was tried."""
    found = torch.backends.cpu.get_cpu_capability()
    if found not in VECTORS:
        return (
            f"torch has kernels for {' and '.join(VECTORS)}, and its level here is {found}: "
            "--engine llama.cpp has others"
        )
    x = torch.arange(32.0).view(1, 32) / 8
    weight = torch.arange(512.0).sub(200).view(16, 32) / 64
    try:
        y = product(x.bfloat16(), pack(weight, kind))
    except (AttributeError, RuntimeError, TypeError) as error:  # other names, another signature
        return f"torch {torch.__version__} has no such kernel ({type(error).__name__})"
    # of the largest output: rounding of codes, which a half of a step of 4 bits bounds
    wrong = (y - x @ weight.t()).abs().max() / y.abs().max()
    return "" if wrong < 0.05 else f"the kernel of torch {torch.__version__} gives other numbers"
