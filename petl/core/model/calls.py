"""What a training pass does with the modules of a model, found on shapes before one is adapted.

An adapter computes when its module is called. Some modules never are: their parent reads the weight
(`dt_proj` of Mamba), or the pass of a task has no use for them (the cross-attention of
`BartForCausalLM`). One forward pass of a copy without values, on the meta device, tells which. Of
blocks that are built alike only the first is run; the others return what it returned.
"""

import inspect
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PretrainedConfig, PreTrainedModel

from petl.core.compat import AuxiliaryTrainingWrapper, BaseTunerLayer
from petl.core.layers.class_swap import original_class
from petl.core.model.copies import ADAPTERS, skeleton_of
from petl.errors import first_line

# They read weights of their children without calling these, at least in evaluation mode (the fast
# path of TransformerEncoderLayer), which no training pass shows.
FUSED_KINDS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
LISTS = (nn.ModuleList, nn.Sequential)
symbolic: Any = _config  # its `patch` is added at run time
PASSING = ("training", "layer_idx", "layer_id")  # attributes on which no call depends
TOKENS = 16  # of the input
Inputs = dict[str, Tensor | bool]
KEPT = 64  # results; one is a few hundred names
READ = "the weight is read without a call of the module"
IDLE = "not called in a training pass"


@dataclass(frozen=True)
class Calls:
    """The modules that a training pass calls, by place: their path with "*" for each index.

    Attributes:
        called: places of modules that it calls.
        read: places of modules that it does not call, though it reads their weight.
        entered: places of the blocks that it calls.
        inputs, outputs: the shape of the first tensor that a module gets and returns, in the order
            in which modules are called.
        reason: why no pass could be run; then the others are empty.
    """

    called: frozenset[str] = frozenset()
    read: frozenset[str] = frozenset()
    entered: frozenset[str] = frozenset()
    inputs: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    outputs: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    reason: str = ""

    def why_no_input(self, source: str, name: str) -> str:
        """Return why the input of one module cannot be that of an adapter on another.

        Returns:
            "" if it can, or nothing is known.
        """
        first, then = place_of(source), place_of(name)
        if first not in self.inputs or then not in self.outputs:
            return ""
        order = list(self.inputs)
        if order.index(first) > order.index(then):
            return f"{source} is called after it"
        given, wanted = self.inputs[first][:-1], self.outputs[then][:-1]
        if given == wanted:
            return ""
        return f"{source} gets {[*given]} tokens in a pass in which it gives {[*wanted]}"

    def why_not(self, name: str) -> str:
        """Return READ or IDLE for a module that is not called; "": it is, or nothing is known.

        Which experts of a list are called depends on the tokens, and towers whose input a pass of
        text lacks are not known.
        """
        where = place_of(name)
        if where in self.called:
            return ""
        if where in self.read:
            return READ
        is_known = any(where.startswith(f"{block}.") for block in self.entered)
        return IDLE if is_known and "expert" not in where else ""

    def width_of(self, name: str) -> int | None:
        """Return the last dimension of what a module returns; None: nothing is known."""
        return self.outputs.get(place_of(name), (None,))[-1]


def place_of(name: str) -> str:
    """Return a path with "*" for each index, which the modules of all blocks share."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def fused_parent(model: nn.Module, name: str) -> nn.Module | None:
    """Return the parent of a module if it is of torch's classes that read their children."""
    parent = model.get_submodule(name.rpartition(".")[0])
    return parent if isinstance(parent, FUSED_KINDS) else None


def uncalled(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Return READ or IDLE, by name, for the modules among `names` that a training pass never calls.

    Where no pass can be run, only what torch's own classes do is known.
    """
    calls = calls_of(model)
    found = {n: READ if fused_parent(model, n) is not None else calls.why_not(n) for n in names}
    return {name: why for name, why in found.items() if why}


def calls_of(model: nn.Module) -> Calls:
    """Return what a training pass calls in a base model, with adapters or without.

    The pass has the inputs of the task of its class: tokens, an image or a sound; of several
    inputs, the text. Nothing is computed, no random number is drawn, and the model is not changed.
    """
    if not isinstance(model, PreTrainedModel):
        return Calls(reason=f"{type(model).__name__} is no model of transformers")
    key = _hash_of(model, model.config)
    if key not in _known:
        _known[key] = _dry_pass(model)
        while len(_known) > KEPT:
            _known.popitem(last=False)
    _known.move_to_end(key)
    return _known[key]


_known: OrderedDict[int, Calls] = OrderedDict()  # by the hash of class, config and modules


def _dry_pass(model: PreTrainedModel) -> Calls:
    found = Calls(reason=f"the inputs of {type(model).__name__} are not known")
    for inputs in training_inputs(model):
        found = _pass_with(inputs, model)
        if not found.reason:
            break
    return found


def _pass_with(inputs: Inputs, model: PreTrainedModel) -> Calls:
    try:
        skeleton = skeleton_of(model)
        with (
            warnings.catch_warnings(action="ignore"),
            torch.random.fork_rng(devices=[]),
            symbolic.patch(meta_nonzero_assume_all_nonzero=True),
            torch.device("meta"),
            torch.no_grad(),
            _Recorder(skeleton) as recorder,
        ):
            skeleton(**{k: v.to("meta") if isinstance(v, Tensor) else v for k, v in inputs.items()})
    # any error of any model's code: nothing is known then
    except Exception as error:
        return Calls(reason=f"a pass on shapes fails: {first_line(error)}")
    return Calls(
        frozenset(recorder.called),
        frozenset(recorder.read - recorder.called),
        frozenset(recorder.entered),
        recorder.inputs,
        recorder.outputs,
    )


# The input


def training_inputs(model: PreTrainedModel) -> Iterator[Inputs]:
    """Yield inputs of a training pass of `model`; of a sound, in the forms that models take."""
    config, names = model.config, inspect.signature(model.forward).parameters
    tokens = torch.zeros(1, TOKENS, dtype=torch.long)
    common: Inputs = {}
    if config.is_encoder_decoder and "decoder_input_ids" in names:
        common["decoder_input_ids"] = tokens
    if "use_cache" in names:
        common["use_cache"] = False
    # an encoder of formulas or sounds gets these, and its decoder the text
    encodes_text = model.main_input_name == "input_ids" or not config.is_encoder_decoder
    if "input_ids" in names and encodes_text:
        masked = {"attention_mask": torch.ones_like(tokens)} if "attention_mask" in names else {}
        yield {"input_ids": tokens, **masked, **common}
        return
    shapes = [*_shapes(model.main_input_name, config)]
    for shape in shapes:
        yield {model.main_input_name: torch.empty(1, *shape), **common}
    if not shapes:  # of a name that is not known
        yield common


def _shapes(name: str, config: object) -> Iterator[tuple[int, ...]]:
    """Yield shapes of an image, or of a sound, of the size that the config gives."""
    parts = [config, *(getattr(config, f"{part}_config", None) for part in ("vision", "encoder"))]

    def size(*words: str, default: int) -> int:
        found = (getattr(part, word, None) for part in reversed(parts) for word in words)
        return next((value for value in found if value), default)

    if name == "pixel_values":
        sides: int | Sequence[int] = size("image_size", default=224)
        height, width = (sides, sides) if isinstance(sides, int) else tuple(sides)[-2:]
        yield size("num_channels", default=3), height, width
    elif name in ("input_features", "input_values"):
        bins = size("feature_projection_input_dim", "num_mel_bins", default=80)
        frames = size("max_length", default=2 * size("max_source_positions", default=100))
        if name == "input_values":
            yield (8000,)  # the wave itself
            yield 1, 8000
        yield from ((bins, frames), (frames, bins), (frames, 4 * bins))  # four frames in one


# The pass


def _hash_of(module: nn.Module, config: PretrainedConfig | None = None) -> int:
    """Return a number that is equal for modules that are built alike: what their pass depends on.

    That is the class, the numbers and words of the module, its tensors' shapes, and the same below
    it; adapters do not count.
    """
    given = config.to_dict() if hasattr(config, "to_dict") else {}
    return hash((repr(given), *_built(module, "")))


def _built(module: nn.Module, path: str) -> Iterator[object]:
    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    elif isinstance(module, AuxiliaryTrainingWrapper):
        module = module.original_module
    yield path, original_class(module)
    for name, value in vars(module).items():
        if isinstance(value, str | int | float) and name not in PASSING:
            yield name, value
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        yield name, None if tensor is None else tuple(tensor.shape)
    for name, child in module._modules.items():
        if child is not None and not isinstance(child, ADAPTERS):
            yield from _built(child, f"{path}.{name}")


@dataclass
class _Recorder(TorchDispatchMode):
    """Records calls of modules, and reads of weights outside of the call of their module."""

    model: nn.Module
    called: set[str] = field(default_factory=set)
    read: set[str] = field(default_factory=set)
    entered: set[str] = field(default_factory=set)
    inputs: dict[str, tuple[int, ...]] = field(default_factory=dict)
    outputs: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()
        self._owners: dict[int, str] = {}
        self._running: set[str] = set()
        for path, module in self.model.named_modules():
            self._prepare(place_of(path), module)
        stacks = {p: m for p, m in self.model.named_modules() if isinstance(m, LISTS)}
        for path, stack in stacks.items():
            # experts inside a block are no blocks
            if not any(path.startswith(f"{other}.") for other in stacks):
                self._run_once(path, stack)

    def _prepare(self, where: str, module: nn.Module) -> None:
        state = vars(module)
        # of the model itself: hooks of accelerate, which move weights to it
        state.pop("forward", None)
        module.training = True
        # blocks would be dropped, or run in another way
        state |= {name: False for name in ("gradient_checkpointing", "layerdrop") if name in state}
        module.register_forward_pre_hook(
            lambda _, args, kwargs: self._begin(where, (*args, *kwargs.values())), with_kwargs=True
        )
        module.register_forward_hook(lambda *given: self._end(where, given[-1]))
        weight = module._parameters.get("weight")
        if weight is None:
            return
        self._owners[id(weight)] = where
        rows = getattr(module, "out_features", None)
        if weight.device.type != "meta" and isinstance(rows, int):
            # quantized: of a class of its own, which a skeleton shares with the model
            state["forward"] = lambda x, **_: x.new_empty(*x.shape[:-1], rows)

    def _begin(self, where: str, given: Sequence[object]) -> None:
        self.called.add(where)
        self._running.add(where)
        first = given[0] if given else None
        if isinstance(first, Tensor) and where not in self.inputs:
            self.inputs[where] = first.shape

    def _end(self, where: str, output: object) -> None:
        self._running.discard(where)
        first = output[0] if isinstance(output, tuple | list) and output else output
        if isinstance(first, Tensor) and where not in self.outputs:
            self.outputs[where] = first.shape

    def _run_once(self, path: str, stack: nn.Module) -> None:
        """Let blocks that are built as an earlier one return what that returned."""
        first: dict[int, dict[object, object]] = {}
        where = place_of(f"{path}.0")
        for block in stack.children():
            outputs = first.setdefault(_hash_of(block), {})
            vars(block)["forward"] = _once(block.forward, outputs)
            block.register_forward_pre_hook(lambda *_: self.entered.add(where))

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        for each in args:
            where = self._owners.get(id(each)) if isinstance(each, nn.Parameter) else None
            if where is not None:
                (self.called if where in self._running else self.read).add(where)
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1  # of a branch that depends on values
        if func is torch.ops.aten._grouped_mm.default:  # meta has none
            return args[0].new_empty(args[0].shape[0], args[1].shape[-1])
        return func(*args, **(kwargs or {}))


def _once(forward: Callable[..., object], outputs: dict[object, object]) -> Callable[..., object]:
    """Let inputs of the same shapes have the same outputs."""

    def run(*args: object, **kwargs: object) -> object:
        shapes = tuple(x.shape for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        if shapes not in outputs:
            outputs[shapes] = forward(*args, **kwargs)
        return outputs[shapes]

    return run
