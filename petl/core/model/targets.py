"""Target modules of a method: presets, matching, the block of a module, checks with suggestions.

A target is a module name, a suffix of one, a regular expression for complete names (a string), or
one of the words in `PRESETS`. A *block* is one entry of a list of layers, such as a decoder layer;
see `is_stack`. A *stack* is a parameter that holds a linear layer of each of many experts; it is a
target by its own path, by that of the module of experts, or by a name of `FORMER_NAMES`.
"""

import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from petl.core.compat import (
    SEQ_CLS_HEAD_NAMES,
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    AuxiliaryTrainingWrapper,
    BaseTunerLayer,
    adapts_norms,
    check_target_module_exists,
    default_targets,
    refused_names,
    renamed_targets,
)
from petl.core.experts.layout import experts_of
from petl.core.layers.class_swap import AdapterDict
from petl.core.model.calls import FUSED_KINDS, IDLE, READ, fused_parent, place_of, uncalled
from petl.core.model.linear import LINEAR_KINDS, is_linear, refuse_other_kind
from petl.core.model.parts import LANGUAGE, PARTS, PROJECTOR, language_path, names_of
from petl.core.model.places import place
from petl.core.parameters import is_norm
from petl.core.spec.blocks import last_blocks
from petl.core.spec.checks import BLOCKS
from petl.core.spec.facts import facts_of
from petl.errors import (
    InputError,
    ModuleKindError,
    UnknownNameError,
    UnsupportedError,
    did_you_mean,
)
from petl.ops.expert_linear import ExpertLinears

logger = logging.getLogger(__name__)

PRESETS = {
    "block-linear": "every linear layer inside the transformer blocks, of experts too; of a model "
    "for images and text, those of its language model",
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
# names of projections in transformers 4, which tutorials have, by the name of their stack; those of
# a tuple are two halves of it
FORMER_NAMES = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}
NO_EXPERTS = "it adapts linear layers, and no stacked experts; use lora"
ROUTED = re.compile(r"(^|\.)(block_sparse_moe|\w*experts)\.")  # paths inside routed experts
SHARED = re.compile(r"(^|\.)shared_(\w*expert\w*|mlp)(\.|$)")
USUAL_NAMES = ("q_proj", "v_proj", "query", "value")  # where PEFT's table has no entry


def linear_names(model: nn.Module) -> list[str]:
    """Return the names of the linear layers of `model`, adapted or not, without its output head."""
    # heads are trained in full or not at all
    heads = {getattr(model, name, None) for name in SEQ_CLS_HEAD_NAMES}
    if isinstance(model, PreTrainedModel):
        heads.add(model.get_output_embeddings())
    heads.discard(None)
    names, skipped = [], tuple[str, ...]()
    for name, module in model.named_modules():
        if skipped and name.startswith(skipped):  # inside an adapted layer or a trained copy
            continue
        kinds = BaseTunerLayer | AuxiliaryTrainingWrapper | ExpertLinears
        if isinstance(module, kinds) or module in heads:
            skipped += (f"{name}.",)
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if is_linear(base) and module not in heads and base not in heads:
            names.append(name)
    return names


def stack_names(model: nn.Module) -> list[str]:
    """Return the paths of the stacks of experts of `model`, adapted or not."""
    found = ((name, experts_of(model.get_submodule(name))) for name in candidate_names(model))
    return [f"{name}.{each}" for name, layout in found if layout for each in layout.stacks]


def router_names(model: nn.Module) -> list[str]:
    """Return the names of the modules beside experts whose weight has a row for each of them."""
    found = []
    for name in candidate_names(model):
        module = model.get_submodule(name)
        count = _count_experts(module, name)
        if not count:
            continue
        owner = name.rpartition(".")[0]
        for child, beside in model.get_submodule(owner).named_children():
            base = beside.get_base_layer() if isinstance(beside, BaseTunerLayer) else beside
            weight = base._parameters.get("weight")
            if weight is not None and weight.dim() == 2 and len(weight) == count:
                found.append(f"{owner}.{child}")
    return list(dict.fromkeys(found))


def _count_experts(module: nn.Module, name: str) -> int:
    if isinstance(module, nn.ModuleList):
        return len(module) if name.endswith("experts") else 0
    layout = experts_of(module)
    return 0 if layout is None else layout.count(module)


def block_linear_names(
    model: nn.Module, part: str = LANGUAGE, *, with_stacks: bool = False
) -> list[str]:
    """Return the names of linear layers inside blocks; of all if the model has no blocks.

    Args:
        part: of a model for images and text, see `PARTS`; others have one part.
        with_stacks: also return those of stacks of experts.
    """
    everything = [*linear_names(model), *(stack_names(model) if with_stacks else ())]
    names = names_of(part, everything, language_path(model))
    # a model without blocks has other linear layers than its head, too
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
        model_type = getattr(getattr(model, "config", None), "model_type", None)
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


def resolve_targets(
    config: Any, model: nn.Module, *, words: tuple[str, ...] = (), no_experts: str = NO_EXPERTS
) -> None:
    """Replace a preset in `config.target_modules` by names, then check every pattern.

    Args:
        config: any PEFT config; its `target_modules` is changed in place.
        model: the base model.
        words: further words that mean "block-linear"; for petl's own methods, "all-linear".
        no_experts: why the method adapts no stacks of experts, which presets then leave out; "": it
            does, and their names are among the targets.

    Raises:
        InputError: a pattern, or all of them together, match nothing, or stacks that the method
            does not adapt.
    """
    resolve_blocks(config, model)
    targets = config.target_modules
    if isinstance(targets, str) and targets in (*PRESETS, *words):
        preset = targets if targets in PRESETS else "block-linear"
        everything = expand_preset(preset, model, with_stacks=not no_experts)
        names = [name for name in everything if in_layers(config, model, name)]
        if not names and no_experts and expand_preset(preset, model, with_stacks=True):
            raise UnsupportedError(f"target_modules={targets!r} is not possible: {no_experts}")
        if not names:
            raise InputError(
                f"target_modules={targets!r} matches no module of {type(model).__name__}"
                + _layer_hint(config)
            )
        stacks = set(stack_names(model))
        linear = [name for name in names if name not in stacks]
        kept = without(model, linear, uncalled(model, linear)) if linear else []
        set_targets(config, model, [*kept, *(name for name in names if name in stacks)])
    check_targets(config, model, no_experts=no_experts)


def set_targets(config: Any, model: nn.Module, names: Sequence[str]) -> None:
    """Set `config.target_modules` to these modules and stacks, and no others."""
    config.target_modules = set(names)
    # a name is also a suffix: "1" would match "0.1" of nested nn.Sequential
    found = {*matched_names(config, model), *matched_stacks(config, model)}
    if not found <= set(names):
        config.target_modules = "|".join(map(re.escape, sorted(names)))


def name_parameters(config: Any, model: nn.Module) -> None:
    """Name the stacks among the targets of a LoRA in `target_parameters`, as PEFT takes them.

    Also weights of routers that are no linear layers. All others then are complete names of
    modules, which PEFT does not take for `FORMER_NAMES`.
    """
    names, stacks = matched_names(config, model), matched_stacks(config, model)
    routers = {n for n in router_names(model) if n in names}
    routers = {n for n in routers if not isinstance(model.get_submodule(n), nn.Linear)}
    stacks += [f"{name}.weight" for name in sorted(routers)]
    # names that PEFT would take for stacks, also for those that are excluded
    if not stacks and renamed_targets(config, model).isdisjoint(config.target_modules):
        return
    targets, halves = config.target_modules, {*FORMER_NAMES["gate_up_proj"]}
    is_list = not isinstance(targets, str)
    if stacks and any(is_list and {*group} <= {*targets} for group in halves):
        # as PEFT does, since each half had a LoRA of its own
        kind = r".*\.gate_up_proj"
        config.rank_pattern = {**(config.rank_pattern or {}), kind: 2 * config.r}
        config.alpha_pattern = {**(config.alpha_pattern or {}), kind: 2 * config.lora_alpha}
    # PEFT adapts those that `target_parameters` names already
    given = tuple(f".{name}" for name in facts_of(config).target_parameters or ())
    more = [name for name in stacks if not given or not f".{name}".endswith(given)]
    config.target_parameters = [*(facts_of(config).target_parameters or ()), *more]
    names = [name for name in names if name not in routers]
    if names:
        set_targets(config, model, names)
    else:
        config.target_modules = set()


def without(
    model: nn.Module, names: Sequence[str], reasons: Mapping[str, str], level: int = logging.INFO
) -> list[str]:
    """Return `names` less those that have a reason, which the log gives.

    Raises:
        ModuleKindError: none is left.
    """
    kept = [name for name in names if name not in reasons]
    if not kept:
        raise uncalled_error(model, reasons)
    places: dict[str, list[str]] = {}
    for name, why in reasons.items():
        places.setdefault(why, []).append(place_of(name))
    for why, found in places.items():
        logger.log(level, "no adapter on %s: %s", ", ".join(dict.fromkeys(found)), why)
    return kept


def uncalled_error(model: nn.Module, reasons: Mapping[str, str]) -> ModuleKindError:
    """Return the error for targets on which an adapter would do nothing, with why."""
    name, why = next(iter(reasons.items()))
    parent = model.get_submodule(name.rpartition(".")[0])
    reads = f"{type(parent).__name__} reads the weight of {name} without calling it"
    return ModuleKindError(
        (reads if why == READ else f"{name}: {why}")
        + ", so an adapter on it would do nothing; choose another target"
    )


def resolve_blocks(config: Any, model: nn.Module) -> None:
    """Replace `config.layers_to_transform` such as "top:0.33" by the indices of the blocks.

    Blocks are those of the lists of layers that hold linear layers; with `layers_pattern`, of the
    lists with one of these names.

    Raises:
        InputError: the model has no blocks, fewer than named, or lists of different lengths.
    """
    given = getattr(config, BLOCKS, None)
    if not isinstance(given, str):
        return
    found = (place(model, name) for name in linear_names(model))
    lengths = {where.stack: where.length for where in found if where is not None}
    patterns = _patterns(config)
    if patterns:
        lengths = {k: n for k, n in lengths.items() if k.rpartition(".")[2] in patterns}
    if len(set(lengths.values())) != 1:
        parts = ", ".join(f"{stack} {length}" for stack, length in lengths.items())
        raise InputError(
            f"layers_to_transform={given} needs blocks, and {type(model).__name__} has "
            + (f"lists of several lengths ({parts}): list indices from 0" if parts else "none")
        )
    config.layers_to_transform = last_blocks(given, next(iter(lengths.values())))


def check_targets(config: Any, model: nn.Module, *, no_experts: str = NO_EXPERTS) -> None:
    """Raise InputError, with suggestions, for a pattern that matches nothing in `model`.

    Args:
        no_experts: see `resolve_targets`.
    """
    targets = config.target_modules
    if targets is None or (isinstance(targets, str) and targets.lower() == "all-linear"):
        return
    names, stacks = candidate_names(model), [] if no_experts else stack_names(model)
    if isinstance(targets, str):
        try:
            matches = any(re.fullmatch(targets, name) for name in (*names, *stacks))
        except re.error as error:
            raise InputError(
                f"target_modules={targets!r} is not a regular expression: {error}"
            ) from error
        if not matches:
            raise _no_match(targets, names, words=(*PRESETS, "all-linear"))
        _refuse_experts([targets], model, no_experts)
    else:
        # PEFT takes none if `target_parameters` names weights instead
        if not targets and not facts_of(config).target_parameters:
            raise InputError(
                f"target_modules={_shown(targets)} names no module; name at least one, or "
                "target_modules=all-linear"
            )
        known = {suffix for name in names for suffix in _suffixes(name)}
        known |= renamed_targets(config, model)
        former = _former_names(targets, stacks, complete=True)
        known |= {suffix for name in stacks for suffix in _suffixes(name)} | former
        unknown = sorted(set(targets) - known)
        if unknown:
            _check_unknown(unknown, names, model, no_experts, has_others=bool(known & {*targets}))
        _refuse_experts(targets, model, no_experts)
    # each pattern matches something, but exclude_modules or layers_to_transform leave nothing
    found = matched_names(config, model) or (not no_experts and matched_stacks(config, model))
    if targets and not found:
        raise InputError(
            f"target_modules={_shown(targets)} matches modules, but none is left after "
            f"exclude_modules={config.exclude_modules}" + _layer_hint(config)
        )


def _check_unknown(
    unknown: Sequence[str], names: list[str], model: nn.Module, no_experts: str, *, has_others: bool
) -> None:
    """Raise for targets that match nothing; warn if they name stacked experts beside others."""
    stacks = stack_names(model)
    of_stacks = {suffix for name in stacks for suffix in _suffixes(name)}
    former = {name for each in FORMER_NAMES.values() for group in each for name in group}
    for target in unknown:
        if not (stacks and no_experts) or target not in of_stacks | former:
            raise _no_match(target, names)
    error = UnsupportedError(
        f"target {', '.join(unknown)} names projections of stacked experts ({stacks[0]}): "
        f"{no_experts}, or name linear layers, as block-linear does"
    )
    if not has_others:
        raise error
    logger.warning("%s", error)


def _refuse_experts(targets: Iterable[str], model: nn.Module, no_experts: str) -> None:
    """Raise UnsupportedError for a name of a module of experts, if the method adapts none."""
    modules = {name.rpartition(".")[0] for name in stack_names(model)} if no_experts else ()
    for target in targets:
        for name in modules:
            if target in _suffixes(name) or re.fullmatch(target, name):
                raise UnsupportedError(
                    f"target {target!r} names the experts of {name}, whose weights are stacked: "
                    f"{no_experts}"
                )


def _former_names(
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
            raise InputError(
                f"target {min(present)} is one half of the stacked weights of experts, gate and up "
                f"({stacks[0]}): name {min({*group} - present)} too"
            )
    return found


def matched_stacks(config: Any, model: nn.Module) -> list[str]:
    """Return the paths of the stacks of experts that the targets of a config name."""
    targets = config.target_modules
    stacks = stack_names(model) if targets is not None else []
    if not stacks:
        return []
    probe = copy(config)
    if not isinstance(targets, str):
        former = _former_names(targets, stacks)
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


def check_parameters(config: Any, model: nn.Module) -> None:
    """Check `config.target_parameters`, of which PEFT says too little.

    Raises:
        UnknownNameError: the model lacks one; PEFT adapts the others.
        InputError: layers or modules are left out, which PEFT does for `target_modules` alone.
    """
    given = facts_of(config).target_parameters or ()
    names = [n for n, _ in model.named_parameters(remove_duplicate=False)] if given else []
    known = {suffix for name in names for suffix in _suffixes(name)}
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


def matched_names(config: Any, model: nn.Module) -> list[str]:
    """Return the names of the modules that PEFT will adapt, in `named_modules` order."""
    names, targets = candidate_names(model), config.target_modules
    if isinstance(targets, list | set):
        # PEFT compares each name with each target, which takes a second with thousands of targets
        suffixes = set(targets)
        names = [name for name in names if not suffixes.isdisjoint(_suffixes(name))]
    found = [name for name in names if check_target_module_exists(config, name)]
    # a module of stacked experts stands for its stacks, see `matched_stacks`
    owners = [name for name in found if experts_of(model.get_submodule(name)) is not None]
    inside = tuple(f"{name}." for name in owners)
    return [name for name in found if name not in owners and not f"{name}.".startswith(inside)]


def chosen_names(config: Any, model: nn.Module, tuner: type[Any]) -> list[str]:
    """Return the names of the modules that a tuner of PEFT's will adapt, by its own words too.

    These are "all-linear", and None, where PEFT chooses by the type of model.
    """
    targets = config.target_modules
    if targets is None:
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        targets = default_targets(tuner, model_type)
    elif isinstance(targets, str) and targets.lower() == "all-linear":
        targets = set(linear_names(model))
    config = copy(config)  # the caller's config keeps the word
    config.target_modules = targets
    return [] if targets is None else matched_names(config, model)


def choose_default(
    config: Any, model: nn.Module, tuner: type[Any], no_experts: str = NO_EXPERTS
) -> None:
    """Set the targets of a tuner of PEFT's that are left to it, where its table has none that fit.

    PEFT knows names by the type of model. They may match a vision tower too, or modules that are no
    linear layers; for other types, these are the layers of `block-linear`.

    Args:
        no_experts: see `resolve_targets`; "": all linear layers are also those of experts.
    """
    targets = config.target_modules
    if isinstance(targets, str) and targets.lower() == "all-linear":
        stacks = [] if no_experts else stack_names(model)
        # PEFT takes every subclass of nn.Linear for a linear layer
        if stacks or any(isinstance(m, nn.Linear) and not is_linear(m) for m in model.modules()):
            set_targets(config, model, [*linear_names(model), *stacks])
        return
    if targets is not None or facts_of(config).target_parameters:
        return
    names = chosen_names(config, model, tuner)
    fits = [
        name
        for name in names_of(LANGUAGE, names, language_path(model))
        if not isinstance(module := model.get_submodule(name), nn.Linear) or is_linear(module)
    ]
    if not fits and adapts_norms(tuner):
        norms = (name for name, module in model.named_modules() if is_norm(module))
        set_targets(config, model, [name for name in norms if place(model, name) is not None])
    elif not fits:
        config.target_modules = "block-linear"
        resolve_targets(config, model, no_experts=no_experts)
        # of (IA)3: the targets whose input is scaled instead of their output
        if getattr(config, "feedforward_modules", ()) is None:
            inside = set(expand_preset("mlp-linear", model))
            config.feedforward_modules = inside & set(matched_names(config, model))
    # PEFT's renaming takes targets that are left to it for none
    elif fits != names or renamed_targets(config, model):
        set_targets(config, model, fits)


def check_kinds(config: Any, model: nn.Module, tuner: type[Any]) -> None:
    """Raise ModuleKindError for a target of a tuner of PEFT's on which no adapter computes.

    That is a subclass of nn.Linear that computes something else, or a child of torch's classes that
    read its weight without calling it.
    """
    kinds = {type(module) for module in model.modules()}
    if not any(issubclass(k, (*FUSED_KINDS, nn.Linear)) and k is not nn.Linear for k in kinds):
        return
    # prompt tuning has none
    names = chosen_names(config, model, tuner) if hasattr(config, "target_modules") else []
    for name in names:
        refuse_other_kind(model.get_submodule(name), name)
    # LoRA replaces the module that owns a parameter
    endings = tuple(f".{name}" for name in facts_of(config).target_parameters or ())
    owned = [name for name, _ in model.named_parameters() if f".{name}".endswith(endings)]
    for name in (*names, *(name.rpartition(".")[0] for name in owned)):
        refuse_fused(model, name)


def refuse_fused(model: nn.Module, name: str) -> None:
    """Raise ModuleKindError for a child of torch's classes that read it without calling it."""
    if fused_parent(model, name) is not None:
        raise uncalled_error(model, {name: READ})


def leave_out(config: Any, model: nn.Module, tuner: type[Any], given: Any) -> None:
    """Take targets on which no adapter would compute out of `config.target_modules`; the log says.

    A module that is never called, but named by a pattern that matches no other, stays: a training
    pass of another kind may call it.

    Args:
        given: the targets as the user gave them.

    Raises:
        ModuleKindError: a pattern matches only modules whose weight is read without calling them.
    """
    names = chosen_names(config, model, tuner)
    reasons = uncalled(model, names)
    is_word = given is None or given in (*PRESETS, "all-linear")
    if is_word:
        reasons |= refused_names(config, model, names)
    for pattern in given if isinstance(given, list | set) else [None]:
        matched = [name for name in names if pattern is None or pattern in _suffixes(name)]
        if is_word or not matched or not reasons.keys() >= set(matched):
            continue
        read = [name for name in matched if reasons[name] == READ]
        if read:
            raise uncalled_error(model, dict.fromkeys(read, READ))
        for name in matched:
            logger.warning("the adapter on %s may not train: %s", name, IDLE)
            del reasons[name]
    if reasons:
        kept = without(model, names, reasons, logging.INFO if is_word else logging.WARNING)
        set_targets(config, model, [*kept, *matched_stacks(config, model)])


def target_shapes(config: Any, model: nn.Module, tuner: type[Any]) -> dict[str, tuple[int, int]]:
    """Return the weight's shape [O, I] of each linear layer that PEFT will adapt, by name."""
    modules = dict(model.named_modules())
    shapes = {}
    for name in chosen_names(config, model, tuner):
        module = modules[name]
        if isinstance(module, LINEAR_KINDS):
            rows, columns = module.weight.shape
            # Conv1D stores [I, O]
            shapes[name] = (columns, rows) if isinstance(module, Conv1D) else (rows, columns)
    return shapes


def _suffixes(name: str) -> list[str]:
    """Return the name, and its remainder after each dot."""
    parts = name.split(".")
    return [".".join(parts[depth:]) for depth in range(len(parts))]


def in_layers(config: Any, model: nn.Module, name: str) -> bool:
    """Return True if `layers_to_transform` includes the block of the module called `name`.

    With `layers_pattern`, only blocks of lists with one of these names are included.
    """
    indices = facts_of(config).layers_to_transform
    if indices is None or indices == []:
        return True
    where, patterns = place(model, name), _patterns(config)
    if where is None or (patterns and where.stack.rpartition(".")[2] not in patterns):
        return False
    return where.index in ([indices] if isinstance(indices, int) else indices)


def _patterns(config: Any) -> list[str]:
    patterns = facts_of(config).layers_pattern or []
    return [patterns] if isinstance(patterns, str) else patterns


def check_saved(config: Any, model: nn.Module) -> None:
    """Raise InputError for a module to save that `model` lacks, which PEFT would ignore.

    PEFT itself adds the usual names of the head of a classifier; these may be absent.
    """
    names = candidate_names(model)
    for module in config.modules_to_save or ():
        if module not in SEQ_CLS_HEAD_NAMES and not any(n.endswith(module) for n in names):
            suffixes = {name.rpartition(".")[2] for name in names}
            raise UnknownNameError(
                f"modules_to_save: {module!r} matches no module" + did_you_mean(module, suffixes)
            )


def check_tokens(config: Any, model: nn.Module) -> None:
    """Raise InputError for a trained token that the embedding of `model` has no row for."""
    given = getattr(config, "trainable_token_indices", None) or {}
    for name, tokens in (given if isinstance(given, Mapping) else {"": given}).items():
        named = (m for n, m in model.named_modules() if n.endswith(name))
        table = next(named, None) if name else input_embedding(model)
        rows = getattr(getattr(table, "weight", None), "shape", (math.inf,))[0]
        if tokens and max(tokens) >= rows:
            raise InputError(
                f"trainable_token_indices has the token {max(tokens)}, and the embedding of "
                f"{type(model).__name__} has {rows:,} rows: resize it to {max(tokens) + 1:,} or "
                "more by model.resize_token_embeddings, as where the adapter was trained"
            )


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


def _no_match(target: str, names: list[str], words: Sequence[str] = ()) -> UnknownNameError:
    # suggest last parts of names, or complete ones for a target with a dot that is no pattern
    suffixes = {name.rpartition(".")[2] for name in names if not name.rpartition(".")[2].isdigit()}
    options = names if "." in target and "*" not in target else suffixes
    return UnknownNameError(
        f"target {target!r} matches no module" + did_you_mean(target, [*words, *options])
    )


def _layer_hint(config: Any) -> str:
    indices = facts_of(config).layers_to_transform
    patterns = f", layers_pattern={', '.join(_patterns(config))}" if _patterns(config) else ""
    return "" if indices is None else f" (layers_to_transform={indices}{patterns})"


def _shown(targets: Any) -> Any:
    return targets if isinstance(targets, str) else sorted(targets)
