"""What is known about a module of experts: names and order of its stacks, gate, how rows come.

A *stack* is one parameter [E, O, I] that holds a linear layer of each of E experts. transformers'
decorator `use_experts_implementation` leaves flags on a module, from which the record is read;
classes without it have an entry here, and a class that looks alike is taken for a usual one.
`petl.core.experts.proof` runs the record against the module's own forward pass.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

from torch import Tensor, nn

from petl.core.compat import BaseTunerLayer
from petl.core.layers.class_swap import original_class


class Routing(StrEnum):
    """What the forward pass of a module of experts takes besides rows of tokens."""

    INDEX = "index"  # (x [T, H], experts of each token [T, K], their weights [T, K])
    ALL = "all"  # (x [E T, H]): every token goes through every expert, those of one together
    SIZES = "sizes"  # (x [S, I], sizes): sorted rows, and how many rows each expert has


class StackShape(NamedTuple):
    """The sizes of a stack: E experts of I inputs and O outputs."""

    experts: int
    in_features: int
    out_features: int


@dataclass(frozen=True)
class ExpertsLayout:
    """How the weights of a module of experts are stored and used.

    Attributes:
        up: name of the stack that reads the tokens.
        down: name of the stack whose output is that of the experts; None: `up` is alone.
        transposed: stacks are stored as [E, I, O].
        bias: the stacks have biases [E, O], called `<name>_bias`.
        gated: `up` computes gate and up together; its O is twice the I of `down`.
        interleaved: the rows of gate and up alternate; otherwise those of gate come first.
        norm: `post_expert_norm` follows.
        identity: experts beyond the last one return their input; `up` may have rows for them.
        routing: what the forward pass takes.
    """

    up: str = "gate_up_proj"
    down: str | None = "down_proj"
    transposed: bool = False
    bias: bool = False
    gated: bool = True
    interleaved: bool = False
    norm: bool = False
    identity: bool = False
    routing: Routing = Routing.INDEX

    @property
    def stacks(self) -> tuple[str, ...]:
        """The names of the parameters that adapters can adapt, in the order of computation."""
        return (self.up,) if self.down is None else (self.up, self.down)

    def shape(self, module: nn.Module, name: str) -> StackShape:
        """Return the sizes of the stack called `name`."""
        experts, first, second = _shape(module._parameters[name])
        return StackShape(experts, *((first, second) if self.transposed else (second, first)))

    def count(self, module: nn.Module) -> int:
        """Return the number of experts that compute."""
        return _shape(module._parameters[self.stacks[-1]])[0]

    def activated(self, module: Any, y: Tensor) -> Tensor:
        """Return what `down` reads, [S, I], for the output of `up`, [S, O]."""
        if not self.gated:
            return module.act_fn(y)
        # of classes that limit their gate, and set by the decorator
        if hasattr(module, "_apply_gate"):
            return module._apply_gate(y)
        gate, up = (y[..., ::2], y[..., 1::2]) if self.interleaved else y.chunk(2, dim=-1)
        return module.act_fn(gate) * up

    def implementation(self, module: object) -> str:
        """Return the word of the config for how experts are computed, such as "grouped_mm"."""
        settings = getattr(module, "config", None)
        return getattr(settings, "_experts_implementation", None) or "eager"


# of classes without the decorator
ENTRIES: Mapping[str, ExpertsLayout] = {
    "Llama4TextExperts": ExpertsLayout(transposed=True, routing=Routing.ALL),
    "LongcatFlashExperts": ExpertsLayout(identity=True),
    "JetMoeParallelExperts": ExpertsLayout(
        up="weight", down=None, gated=False, routing=Routing.SIZES
    ),
}
FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")  # of the decorator


def experts_of(module: nn.Module) -> ExpertsLayout | None:
    """Return the layout of a module of stacked experts, adapted or not; None for other modules.

    It changes nothing and computes nothing; whether the module computes so is proven elsewhere.
    """
    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    layout = _read(module)
    if layout is None:
        return None
    stacks = [module._parameters.get(name) for name in layout.stacks]
    is_known = all(p is not None and len(_shape(p)) == 3 for p in stacks)
    return layout if is_known else None


def _read(module: Any) -> ExpertsLayout | None:
    # by name: importing the classes would import their models
    names = {cls.__name__ for cls in original_class(module).__mro__}
    for name in names & ENTRIES.keys():
        return ENTRIES[name]
    if all(hasattr(module, flag) for flag in FLAGS):
        return ExpertsLayout(
            up="gate_up_proj" if module.has_gate else "up_proj",
            transposed=module.is_transposed,
            bias=module.has_bias,
            gated=module.has_gate,
            interleaved=module.has_gate and not module.is_concatenated,
            norm=getattr(module, "has_post_expert_norm", False),
        )
    usual = ExpertsLayout()
    stacks = [module._parameters.get(name) for name in usual.stacks]
    if any(stack is None or len(_shape(stack)) != 3 for stack in stacks):
        return None
    # without flags, only the widths tell on which side the outputs are
    (_, rows, columns), (_, out, inner) = map(_shape, stacks)
    return ExpertsLayout(
        transposed=(rows, columns) != (2 * inner, out),
        bias=f"{usual.up}_bias" in module._parameters,
    )


def _shape(parameter: Any) -> tuple[int, ...]:
    # DeepSpeed keeps the shape of a parameter that is divided among processes
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
