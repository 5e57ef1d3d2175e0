"""Find the nonlinearities of a model's MLP blocks and their down projections."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from petl.core.compat import BaseTunerLayer
from petl.core.experts.layout import experts_of
from petl.core.model.names import candidate_names
from petl.core.model.places import place
from petl.errors import InputError, UnknownNameError, did_you_mean

# of a layer's name, its module and the values that are counted: the values to go on with
Visit = Callable[[str, nn.Module, Tensor], Tensor]
# names of modules in transformers' MLP blocks
ACTIVATIONS = ("intermediate_act_fn", "act_fn", "activation_fn", "act")
DOWN = ("down_proj", "wo", "fc2", "c_proj", "w2", "lin2", "dense_4h_to_h", "output.dense")
NOT_MLP = re.compile(r"attn|attention|mixer|conv", re.IGNORECASE)
EXPERT = re.compile(r"\.\d+(?=\.)")  # the number of an expert, inside a block


@dataclass(frozen=True)
class ActivationSites:
    """The modules whose values are counted.

    Attributes:
        signal: "activation" (their outputs are counted) or "down_input" (their inputs).
        layers: by module name, the layer that it belongs to; the experts of a block are one layer.
        stacks: by layer, its stack: "encoder" or "decoder", or "" if the model has one stack.
    """

    signal: str
    layers: dict[str, str]
    stacks: dict[str, str]

    def stack(self, name: str) -> str:
        """The stack of the module `name`."""
        return self.stacks[self.layers[name]]


def find_sites(model: nn.Module, signal: str, wanted: Sequence[str] | None) -> ActivationSites:
    """The nonlinearities of the MLP blocks, or with signal "down_input" their down projections.

    Args:
        wanted: names or suffixes of modules to use instead.

    Raises:
        InputError: none is found; the message lists candidates.
    """
    if wanted is not None:
        names = _named(model, wanted)
    else:
        names = activation_names(model) if signal == "activation" else down_names(model)
    layers = {name: _layer(model, name) for name in names}
    return ActivationSites(signal, layers, _stacks(model, list(layers.values())))


def register_hooks(model: nn.Module, sites: ActivationSites, visit: Visit) -> list[RemovableHandle]:
    """Register hooks that replace the counted values by `visit(name, module, values)`."""
    handles = []
    for name in sites.layers:
        module = model.get_submodule(name)
        if sites.signal == "activation":
            handles.append(module.register_forward_hook(partial(_at_output, visit, name)))
        else:
            handles.append(module.register_forward_pre_hook(partial(_at_input, visit, name)))
    return handles


def _at_output(visit: Visit, name: str, module: nn.Module, args: object, output: Tensor) -> Tensor:
    return visit(name, module, output)


def _at_input(
    visit: Visit, name: str, module: nn.Module, args: tuple[Tensor, ...]
) -> tuple[object, ...]:
    return (visit(name, module, args[0]), *args[1:])


def activation_names(model: nn.Module) -> list[str]:
    """Names of the nonlinearities of all MLP blocks; raises as `find_sites` does."""
    experts = _experts(model)
    found = [name for name in candidate_names(model) if _is_mlp_activation(model, name)]
    found += [f"{n}.act_fn" for n in experts if "act_fn" in model.get_submodule(n)._modules]
    found = list(dict.fromkeys(found))
    left = [n for n in experts if f"{n}.act_fn" not in found]
    if left:
        raise _uncounted(model, left[0], "nonlinearity")
    if not found:
        options = [n for n in candidate_names(model) if _is_nonlinearity(model.get_submodule(n))]
        raise InputError(
            f"no activation module found in the MLP blocks of {type(model).__name__}; name them in "
            f"activation_modules, or use signal='down_input'{_listed(options)}"
        )
    return found


def down_names(model: nn.Module) -> list[str]:
    """Names of the down projections of all MLP blocks; raises as `find_sites` does."""
    experts = _experts(model)
    if experts:
        raise _uncounted(model, experts[0], "down projection")
    found = [name for name in candidate_names(model) if _is_down(model, name)]
    if not found:
        linear = [n for n in candidate_names(model) if _is_linear(model.get_submodule(n))]
        raise InputError(
            f"no down projection found in the MLP blocks of {type(model).__name__}; name them in "
            f"activation_modules{_listed(linear)}"
        )
    return found


def _experts(model: nn.Module) -> list[str]:
    """Return the names of the modules that hold stacks of experts; a LoRA is a layer around one."""
    named = ((n, m) for n, m in model.named_modules() if not isinstance(m, BaseTunerLayer))
    return [name for name, module in named if experts_of(module) is not None]


def _uncounted(model: nn.Module, experts: str, what: str) -> InputError:
    """Return the error for experts that have no module for what is counted."""
    return InputError(
        f"the experts of {type(model).__name__} are stacked ({experts}) and have no module for "
        f"their {what}, and what is counted would leave them out: name the modules to count in "
        "activation_modules"
    )


def has_down(model: nn.Module) -> bool:
    """True if all MLP blocks have down projections, and none has stacked experts."""
    return not _experts(model) and any(
        _is_down(model, n) for n in candidate_names(model) if _is_linear(model.get_submodule(n))
    )


def _is_down(model: nn.Module, name: str) -> bool:
    ends = name.endswith(tuple(f".{end}" for end in DOWN))
    # inside a block, and not in attention
    is_mlp = place(model, name) is not None and not NOT_MLP.search(name)
    return ends and is_mlp and _is_linear(model.get_submodule(name))


def _layer(model: nn.Module, name: str) -> str:
    where = place(model, name)
    if where is None:
        return name
    # experts of a block have one name without their number
    return name.removesuffix(where.name) + EXPERT.sub("", where.name.replace(".base_layer", ""))


def _stacks(model: Any, layers: Sequence[str]) -> dict[str, str]:
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return dict.fromkeys(layers, "")
    encoder = model.get_encoder()
    name = next(name for name, module in model.named_modules() if module is encoder)
    return {n: "encoder" if n.startswith(f"{name}.") else "decoder" for n in layers}


def never_zero(model: nn.Module) -> bool:
    """True if nonlinearities of the MLP blocks never return exactly 0, such as SiLU (swish)."""
    # the gate, also if the inputs of down projections are counted
    names = [name for name in candidate_names(model) if _is_mlp_activation(model, name)]
    classes = [type(model.get_submodule(name)).__name__.lower() for name in names]
    return any("silu" in name or "swish" in name for name in classes)


def _named(model: nn.Module, wanted: Sequence[str]) -> list[str]:
    names = candidate_names(model)
    for word in wanted:
        if not any(name == word or name.endswith(f".{word}") for name in names):
            options = {name.rpartition(".")[2] for name in names}
            raise UnknownNameError(
                f"activation_modules: {word!r} matches no module" + did_you_mean(word, options)
            )
    return [n for n in names if any(n == w or n.endswith(f".{w}") for w in wanted)]


def _is_mlp_activation(model: nn.Module, name: str) -> bool:
    parent, _, leaf = name.rpartition(".")
    if leaf not in ACTIVATIONS or NOT_MLP.search(name) or place(model, name) is None:
        return False
    module, owner = model.get_submodule(name), model.get_submodule(parent)
    # [experts, in, out]
    stacked = any(p.dim() == 3 for p in owner.parameters(recurse=False))  # fused experts
    return not any(module.children()) and (stacked or any(map(_is_linear, owner.children())))


def _is_linear(module: nn.Module) -> bool:
    return hasattr(module, "in_features") or hasattr(module, "nf")  # Conv1D has nf


def _is_nonlinearity(module: nn.Module) -> bool:
    cls = type(module)
    is_leaf = not any(module.children()) and not any(True for _ in module.parameters())
    return is_leaf and ("activation" in cls.__module__ or "act" in cls.__name__.lower())


def _listed(options: Sequence[str]) -> str:
    return f"; available: {', '.join(options[:30])}" if options else "; the model has no candidates"
