"""Names that targets may have: of modules, of experts and routers, and words for several of them.

A *stack* is a parameter that holds a linear layer of each of many experts. It is a target by its
own path, by that of the module of experts, or by a name of `FORMER_NAMES`.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from copy import copy
from typing import Any

from peft import PeftConfig
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from petl.core.compat import (
    SEQ_CLS_HEAD_NAMES,
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    AuxiliaryTrainingWrapper,
    BaseTunerLayer,
    check_target_module_exists,
)
from petl.core.experts.layout import experts_of
from petl.core.layers.class_swap import AdapterDict, original_class
from petl.core.model.linear import linear_names
from petl.core.model.places import place
from petl.core.spec.facts import facts_of
from petl.errors import InputError, UnknownNameError, UnsupportedError, did_you_mean
from petl.ops.expert_linear import ExpertLinears
from petl.system import towers
from petl.system.towers import before_blocks

PRESETS = {
    "block-linear": "every linear layer inside the transformer blocks, of experts too; of a model "
    "for images and text, those of its language model; of a model without any, its convolutions",
    "attention-linear": "those of them that belong to attention",
    "mlp-linear": "those of them that do not",
    "experts": "those of routed experts",
    "shared-experts": "those of experts that every token goes through",
    "router": "what chooses the experts of a token; with lora, or if it is a linear layer",
    "query-value": "the query and value projections (PEFT's table, or their usual names)",
    "language": "the same as block-linear, in a model for images and text",
    "vision": "every linear layer inside the blocks of its vision tower",
    "projector": "every linear layer between the two",
}
ROUTED = re.compile(r"(^|\.)(block_sparse_moe|\w*experts)\.")  # paths inside routed experts
ROUTERS = ("router", "gate")  # names of modules that choose the experts of a token
SHARED = re.compile(r"(^|\.)shared_(\w*expert\w*|mlp)(\.|$)")
LANGUAGE, VISION, PROJECTOR = PARTS = ("language", "vision", "projector")
OTHER = "other"  # such as a tower for sound
USUAL_NAMES = ("q_proj", "v_proj", "query", "value")  # where PEFT's table has no entry
# names of projections in transformers 4, which tutorials have, by the name of their stack; those of
# a tuple are two halves of it
FORMER_NAMES = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}
# the list of most tutorials, some of which a model may lack
TUTORIALS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
NO_EXPERTS = "the method adapts linear layers, and no stacked experts; use lora"


def candidate_names(model: nn.Module) -> list[str]:
    """Return the names of all modules except those inside adapted layers and trained copies."""
    names, skipped = [], tuple[str, ...]()
    for name, module in model.named_modules():
        if not name or (skipped and name.startswith(skipped)):
            continue
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            skipped += (f"{name}.",)
        if isinstance(module, ExpertLinears):
            skipped += (f"{name}.",)
        # the adapters of a block, or of stacks of experts, which are names themselves
        if isinstance(module, AdapterDict | ExpertLinears):
            continue
        names.append(name)
    return names


def model_type_of(model: nn.Module) -> str | None:
    """Return the word of a model's config for its type; None if it has none."""
    return getattr(getattr(model, "config", None), "model_type", None)


def suffixes(name: str) -> list[str]:
    """Return the name, and its remainder after each dot."""
    parts = name.split(".")
    return [".".join(parts[depth:]) for depth in range(len(parts))]


def in_layers(config: PeftConfig, model: nn.Module, name: str) -> bool:
    """Return True if `layers_to_transform` includes the block of the module called `name`.

    With `layers_pattern`, only blocks of lists with one of these names are included.
    """
    indices = facts_of(config).layers_to_transform
    if indices is None or indices == []:
        return True
    where, patterns = place(model, name), patterns_of(config)
    if where is None or (patterns and where.stack.rpartition(".")[2] not in patterns):
        return False
    return where.index in ([indices] if isinstance(indices, int) else indices)


def replicated(config: PeftConfig, model: nn.Module, names: Sequence[str]) -> list[str]:
    """Return complete names, with those of the copies of blocks that `layer_replication` makes.

    PEFT makes them after the names are known.
    """
    order = [
        i for first, end in facts_of(config).layer_replication or () for i in range(first, end)
    ]
    found = []
    for name in names:
        where = place(model, name) if order else None
        copies = [j for j, index in enumerate(order) if where is not None and index == where.index]
        found += [f"{where.stack}.{j}.{where.name}" for j in copies] if where and copies else [name]
    return list(dict.fromkeys(found))


def patterns_of(config: PeftConfig) -> list[str]:
    patterns = facts_of(config).layers_pattern or []
    return [patterns] if isinstance(patterns, str) else patterns


def input_embedding(model: nn.Module) -> nn.Module | None:
    """Return the table of the input tokens; None if the model has none."""
    try:
        return getattr(model, "get_input_embeddings", lambda: None)()
    except NotImplementedError:  # of transformers, for models without text
        return None


def frozen_head(model: nn.Module) -> str:
    """Return the name of a classification head that an adapted model neither trains nor saves."""
    for name in SEQ_CLS_HEAD_NAMES:
        head = model._modules.get(name)
        own = () if head is None else tuple(head.parameters())
        if own and not any(parameter.requires_grad for parameter in own):
            return name
    return ""


def stack_names(model: nn.Module) -> list[str]:
    """Return the paths of the stacks of experts of `model`, adapted or not."""
    found = ((name, experts_of(model.get_submodule(name))) for name in candidate_names(model))
    return [f"{name}.{each}" for name, layout in found if layout for each in layout.stacks]


def router_names(model: nn.Module) -> list[str]:
    """Return the names of the modules with a weight that choose the experts of a token.

    That is a module beside the experts that is called so, or has a row for each of them; or the
    modules inside it.
    """
    found, names = dict[str, None](), candidate_names(model)
    known = set(names)
    for name in names:
        count = _count_experts(model.get_submodule(name), name)
        owner = name.rpartition(".")[0]
        for child, beside in model.get_submodule(owner).named_children() if count else ():
            if child in ROUTERS or _rows(beside) == count:
                inside = (n for n, module in beside.named_modules() if _rows(module))
                paths = (f"{owner}.{child}.{n}".rstrip(".") for n in inside)
                found |= dict.fromkeys(path for path in paths if path in known)
    return list(found)


def _rows(module: nn.Module) -> int:
    """Return the number of rows of a module's own weight; 0 if it has no matrix."""
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    weight = base._parameters.get("weight")
    return len(weight) if weight is not None and weight.dim() == 2 else 0


def _count_experts(module: nn.Module, name: str) -> int:
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        return len(module) if name.endswith("experts") else 0
    layout = experts_of(module)
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return 0 if layout is None else layout.count(base)


def language_path(model: nn.Module) -> str | None:
    """Return the path of the language model inside a model that has a vision tower too, or None.

    "" if the language model is not a module of its own.
    """
    if not isinstance(model, PreTrainedModel):
        return None
    config = model.config
    named = [*vars(config), *config.sub_configs]
    # an encoder reads text too (Florence-2), and may hold the tower itself (T5Gemma 2)
    whole = getattr(config, "is_encoder_decoder", False)
    if whole and isinstance(encoder := getattr(config, "encoder", None), PretrainedConfig):
        named += encoder.sub_configs
    if not any("vision" in name for name in named):
        return None
    decoder = model if whole else model.get_decoder()
    found = (name for name, module in model.named_modules() if module is decoder)
    path = next(found, None)
    if path is None:
        return None
    parts = {name: part_in(name, path) for name, _ in model.named_modules()}
    # a vision transformer has no decoder of its own; its head is no language model
    has_blocks = any(p == LANGUAGE and re.search(r"\.\d+\.", name) for name, p in parts.items())
    return path if has_blocks and VISION in parts.values() else None


def part_in(name: str, language: str) -> str:
    """Return the part that the module called `name` belongs to, one of PARTS, or OTHER.

    Args:
        language: from `language_path`.
    """
    start = before_blocks(name)
    inside = not language or f"{name}.".startswith(f"{language}.")
    rest = start[len(language) :] if inside else start
    sees, joins = bool(towers.VISION.search(rest)), bool(towers.PROJECTOR.search(rest))
    if joins and (sees or not inside):
        return PROJECTOR
    if sees:
        return VISION
    return LANGUAGE if inside and not towers.AUDIO.search(rest) else OTHER


def names_of(part: str, names: Iterable[str], language: str | None) -> list[str]:
    """Return those of `names` in a part; all of them if the model has one part only."""
    if language is None:
        return list(names)
    return [name for name in names if part_in(name, language) == part]


def block_linear_names(
    model: nn.Module, part: str = LANGUAGE, *, with_stacks: bool = False
) -> list[str]:
    """Return the names of linear layers inside blocks; of all if the model has no blocks.

    Routers of experts are not among them: a small change of theirs sends tokens to other experts.

    Args:
        part: of a model for images and text, see `PARTS`; others have one part.
        with_stacks: also return those of stacks of experts.
    """
    routers = set(router_names(model))
    linear = [name for name in linear_names(model) if name not in routers]
    everything = [*linear, *(stack_names(model) if with_stacks else ())]
    names = names_of(part, everything, language_path(model))
    # a model without blocks has other linear layers than its head, too
    return [name for name in names if place(model, name) is not None] or names


def convolution_names(model: nn.Module) -> list[str]:
    """Return the names of the 2-D convolutions inside blocks; of all if the model has no blocks.

    Left out are grouped ones, whose rank must be a multiple of the groups, and subclasses with a
    forward of their own, into whose weights no adapter could be merged.
    """
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and module.groups == 1
        if original_class(module).forward is nn.Conv2d.forward
    ]
    return [name for name in names if place(model, name) is not None] or names


def expand_preset(word: str, model: nn.Module, *, with_stacks: bool = False) -> list[str]:
    """Return the names that a word of `PRESETS` means in `model`.

    Args:
        word: the preset.
        model: the model.
        with_stacks: names of stacks of experts are among them.
    """
    if word in PARTS:
        return _names_of_part(word, model, with_stacks=with_stacks)
    names = block_linear_names(model, with_stacks=with_stacks)
    if word == "block-linear":
        return names
    if word == "experts":
        stacks = set(stack_names(model))
        return [n for n in names if n in stacks or (ROUTED.search(n) and not SHARED.search(n))]
    if word == "shared-experts":
        return [n for n in names if SHARED.search(n) and not n.endswith("gate")]
    if word == "router":
        return router_names(model)
    if word == "query-value":
        model_type = model_type_of(model)
        # PEFT's default targets for LoRA by type of model
        known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model_type or "")
        if isinstance(known, str):  # a regular expression
            matches = [name for name in names if re.fullmatch(known, name)]
        else:
            endings = tuple(f".{suffix}" for suffix in known or USUAL_NAMES)
            matches = [name for name in names if name.endswith(endings)]
        if not matches:
            raise InputError(
                f"target_modules='query-value' is not known for model_type={model_type!r}; "
                "name the projections, for example target_modules=[q_proj, v_proj]"
            )
        return matches
    attention = re.compile(r"attn|attention", re.IGNORECASE)
    in_attention = word == "attention-linear"
    return [name for name in names if bool(attention.search(name)) == in_attention]


def _names_of_part(word: str, model: nn.Module, *, with_stacks: bool) -> list[str]:
    language = language_path(model)
    if language is None:
        raise InputError(
            f"target_modules={word!r} names a part of a model for images and text, and "
            f"{type(model).__name__} has one part only; use block-linear"
        )
    if word == PROJECTOR:
        return names_of(word, linear_names(model), language)
    return block_linear_names(model, word, with_stacks=with_stacks)


def refuse_experts(targets: Iterable[str], model: nn.Module, no_experts: str) -> None:
    """Raise UnsupportedError for a name of a module of experts, if the method adapts none."""
    modules = {name.rpartition(".")[0] for name in stack_names(model)} if no_experts else ()
    for target in targets:
        for name in modules:
            if target in suffixes(name) or re.fullmatch(target, name):
                raise UnsupportedError(
                    f"target {target!r} names the experts of {name}, whose weights are stacked: "
                    f"{no_experts}"
                )


def former_names(
    targets: Iterable[str], stacks: Sequence[str], *, complete: bool = False
) -> set[str]:
    """Return those of `targets` that are names of projections of stacks in transformers 4.

    Args:
        targets: the patterns.
        stacks: paths of the stacks of the model.
        complete: raise InputError for one half of a stack without the other.
    """
    kinds, given, found = {name.rpartition(".")[2] for name in stacks}, {*targets}, set[str]()
    for group in (group for kind in kinds for group in FORMER_NAMES.get(kind, ())):
        present = given & {*group}
        if present == {*group}:
            found |= present
        elif present and complete:
            raise _half(present, group, stacks[0])
    return found


def _half(present: Collection[str], group: Collection[str], stack: str) -> InputError:
    return InputError(
        f"target {min(present)} is one half of the stacked weights of experts, gate and up "
        f"({stack}): name {min({*group} - {*present})} too"
    )


def former_in(expression: str, stack: str) -> tuple[list[str], Sequence[str]]:
    """Return the names in transformers 4 of a stack that a regular expression matches.

    Args:
        expression: for complete names, such as `.*experts\\.(gate|up)_proj`.
        stack: its path, beside which these modules would be.

    Returns:
        Those of one entry of `FORMER_NAMES`, and the whole entry; both empty if it matches none.
    """
    owner, _, kind = stack.rpartition(".")
    for group in FORMER_NAMES.get(kind, ()):
        present = [name for name in group if re.fullmatch(expression, f"{owner}.{name}")]
        if present:
            return present, group
    return [], ()


def has_own_name(expression: str, stack: str) -> bool:
    """Return True if a regular expression matches the path of a stack, or of its module."""
    return any(re.fullmatch(expression, n) for n in (stack, stack.rpartition(".")[0]))


def names_stack(expression: str, stack: str, *, complete: bool = False) -> bool:
    """Return True if a regular expression names a stack, by its own name or the former ones.

    Args:
        complete: raise InputError for one half of a stack without the other.
    """
    if has_own_name(expression, stack):
        return True
    present, group = former_in(expression, stack)
    if complete and len(present) < len(group):
        raise _half(present, group, stack)
    return bool(present) and len(present) == len(group)


def matched_stacks(config: Any, model: nn.Module) -> list[str]:
    """Return the paths of the stacks of experts that the targets of a config name."""
    targets = config.target_modules
    stacks = stack_names(model) if targets is not None else []
    if not stacks:
        return []
    probe = copy(config)
    # by complete names, so that excluded ones and other blocks stay out
    if isinstance(targets, str):
        probe.target_modules = {name for name in stacks if names_stack(targets, name)}
    else:
        former = former_names(targets, stacks)
        kinds = {k for k, groups in FORMER_NAMES.items() for g in groups if former >= {*g}}
        probe.target_modules = {*targets} | kinds
    return [name for name in stacks if _takes(probe, model, name)]


def _takes(config: Any, model: nn.Module, stack: str) -> bool:
    """Return True if the targets name a stack, or its module, and no other field excludes it."""
    both = (stack, stack.rpartition(".")[0])
    everything = copy(config)
    everything.target_modules = {*both}
    return (
        any(check_target_module_exists(config, name) for name in both)
        and all(check_target_module_exists(everything, name) for name in both)
        and in_layers(config, model, stack)
    )


def check_parameters(config: PeftConfig, model: nn.Module) -> None:
    """Check `config.target_parameters`, of which PEFT says too little.

    Raises:
        UnknownNameError: the model lacks one; PEFT adapts the others.
        InputError: layers or modules are left out, which PEFT does for `target_modules` alone.
    """
    given = facts_of(config).target_parameters or ()
    names = [n for n, _ in model.named_parameters(remove_duplicate=False)] if given else []
    known = {suffix for name in names for suffix in suffixes(name)}
    for target in given:
        if target not in known:
            parts = target.count(".") + 1
            last = {".".join(name.split(".")[-parts:]) for name in names}
            raise UnknownNameError(
                f"target_parameters: {target!r} matches no parameter" + did_you_mean(target, last)
            )
    short = next((target for target in given if target not in names), None)
    for field in ("layers_to_transform", "exclude_modules"):
        if short is not None and getattr(config, field, None) is not None:
            raise InputError(
                f"{field} leaves out modules of target_modules alone, and target_parameters names "
                f"{short!r} in all blocks: name complete parameters, or the experts in "
                "target_modules"
            )
