"""Target modules of a method: what they match, what is left out, checks with suggestions.

A target is a module name, a suffix of one, a regular expression for complete names (a string), or
one of the words in `PRESETS`; experts have names of their own, see `names`. A *block* is one
entry of a list of layers, such as a decoder layer; see `is_stack`.
"""

import logging
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from copy import copy
from typing import Any

from peft import LoraConfig, PeftConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from petl.core.compat import (
    SEQ_CLS_HEAD_NAMES,
    BaseTuner,
    adapts_convolutions,
    adapts_norms,
    check_target_module_exists,
    default_feedforward,
    default_targets,
    read_by_kernels,
    refused_names,
    renamed_targets,
)
from petl.core.experts.layout import experts_of
from petl.core.model.calls import FUSED_KINDS, IDLE, READ, fused_parent, place_of, uncalled
from petl.core.model.linear import LINEAR_KINDS, is_linear, linear_names, refuse_other_kind
from petl.core.model.names import (
    FORMER_NAMES,
    LANGUAGE,
    NO_EXPERTS,
    PRESETS,
    TUTORIALS,
    block_linear_names,
    candidate_names,
    convolution_names,
    expand_preset,
    former_in,
    former_names,
    has_own_name,
    in_layers,
    input_embedding,
    language_path,
    matched_stacks,
    model_type_of,
    names_of,
    names_stack,
    patterns_of,
    refuse_experts,
    replicated,
    router_names,
    stack_names,
    suffixes,
)
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
    shown,
)

logger = logging.getLogger(__name__)


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
        set_targets(config, model, _named_by(preset, config, model, no_experts))
    elif given := words_among(targets, model):
        names = [n for word in given for n in _named_by(word, config, model, no_experts)]
        rest = copy(config)
        rest.target_modules = {*targets} - {*given}
        if rest.target_modules:
            check_targets(rest, model, no_experts=no_experts)
            names += [*matched_names(rest, model), *matched_stacks(rest, model)]
        set_targets(config, model, list(dict.fromkeys(names)))
    check_targets(config, model, no_experts=no_experts)


def words_among(targets: object, model: nn.Module) -> list[str]:
    """Return the presets in a list of targets; a word that a module has as its name means that."""
    if not isinstance(targets, list | set | tuple):
        return []
    words = [word for word in PRESETS if word in targets]
    named = {name.rpartition(".")[2] for name in candidate_names(model)} if words else ()
    return [word for word in words if word not in named]


def _named_by(preset: str, config: PeftConfig, model: nn.Module, no_experts: str) -> list[str]:
    """Return the modules and stacks of a preset in the chosen blocks that a pass calls."""
    everything = expand_preset(preset, model, with_stacks=not no_experts)
    names = [name for name in everything if in_layers(config, model, name)]
    if not names and no_experts and expand_preset(preset, model, with_stacks=True):
        raise UnsupportedError(f"target_modules={preset!r} is not possible: {no_experts}")
    if not names:
        raise InputError(
            f"target_modules={preset!r} matches no module of {type(model).__name__}"
            + (_layer_hint(config) or _other_weights(model))
        )
    stacks = set(stack_names(model))
    linear = [name for name in names if name not in stacks]
    kept = without(model, linear, uncalled(model, linear)) if linear else []
    return [*kept, *(name for name in names if name in stacks)]


def choose_convolutions(config: Any, model: nn.Module, tuner: type[BaseTuner]) -> None:
    """Let `block-linear` mean the convolutions of a model without linear layers, where they fit."""
    if config.target_modules not in (None, "block-linear") or not adapts_convolutions(tuner):
        return
    found = [] if block_linear_names(model) else convolution_names(model)
    names = [name for name in found if in_layers(config, model, name)]
    if names:
        set_targets(config, model, names)


def set_targets(config: Any, model: nn.Module, names: Sequence[str]) -> None:
    """Set `config.target_modules` to these modules and stacks, and no others."""
    names = replicated(config, model, names)
    config.target_modules = set(names)
    # a name is also a suffix: "1" would match "0.1" of nested nn.Sequential
    found = {*matched_names(config, model), *matched_stacks(config, model)}
    if not found <= set(names):
        config.target_modules = "|".join(map(re.escape, sorted(names)))
    if hasattr(config, "feedforward_modules"):
        config.feedforward_modules = _feedforward(config, model) & set(names)


def say_idle_exclusions(config: PeftConfig, model: nn.Module) -> None:
    """Warn of each pattern of `exclude_modules` that no module or stack of experts has."""
    given = facts_of(config).exclude_modules or ()
    names = [*candidate_names(model), *stack_names(model)] if given else []
    known = {suffix for name in names for suffix in suffixes(name)}
    for pattern in [given] if isinstance(given, str) else sorted(given):
        is_expression = isinstance(given, str)
        if not (any(re.fullmatch(given, n) for n in names) if is_expression else pattern in known):
            ends = {name.rpartition(".")[2] for name in names}
            hint = did_you_mean(pattern, ends)
            logger.warning(
                "exclude_modules: %r matches nothing, and leaves out nothing%s", pattern, hint
            )


def _feedforward(config: Any, model: nn.Module) -> set[str]:
    """Return the names of the targets of (IA)3 whose input is scaled instead of their output."""
    given, model_type = config.feedforward_modules, model_type_of(model)
    given = default_feedforward(model_type) if given is None else given
    if given is None:
        return set(expand_preset("mlp-linear", model))
    probe = copy(config)
    probe.target_modules = given
    return set(matched_names(probe, model))


def name_parameters(config: Any, model: nn.Module) -> None:
    """Name the stacks among the targets of a LoRA in `target_parameters`, as PEFT takes them.

    Also weights of routers that are no linear layers. All others then are complete names of
    modules, which PEFT does not take for `FORMER_NAMES`.
    """
    names, stacks = matched_names(config, model), matched_stacks(config, model)
    routers = {n for n in router_names(model) if n in names}
    routers = {n for n in routers if not is_linear(model.get_submodule(n))}
    stacks += [f"{name}.weight" for name in sorted(routers)]
    # names that PEFT would take for stacks, also for those that are excluded
    targets, renamed = config.target_modules, renamed_targets(config, model)
    is_list = not isinstance(targets, str)
    # of paths PEFT keeps the last parts as well, also of those that are excluded
    left = {*stack_names(model)} & {*targets} if is_list else set()
    # of a regular expression PEFT keeps the last parts of names alone, which are in all blocks
    is_word = not is_list and targets.lower() == "all-linear"
    is_free = not left and renamed.isdisjoint(targets) if is_list else not renamed
    if not stacks and (is_word or is_free):
        return
    if is_list:
        doubles = any({*group} <= {*targets} for group in FORMER_NAMES["gate_up_proj"])
    else:
        doubles = any(_is_former(targets, stack, renamed) for stack in stacks)
    if stacks and doubles:
        _double_rank(config)
    # PEFT adapts those that `target_parameters` names already
    given = tuple(f".{name}" for name in facts_of(config).target_parameters or ())
    more = [name for name in stacks if not given or not f".{name}".endswith(given)]
    more = replicated(config, model, more)
    if more:
        config.target_parameters = [*(facts_of(config).target_parameters or ()), *more]
    names = [name for name in names if name not in routers]
    if names:
        set_targets(config, model, names)
    else:
        config.target_modules = set()


def _is_former(expression: str, stack: str, renamed: Collection[str]) -> bool:
    """Return True if gate and up of transformers 4 are what an expression names of a stack.

    Where it is the stack's own name too, such as in `.*_proj`, PEFT takes those that it renames.
    """
    present, group = former_in(expression, stack)
    if len(group) < 2 or len(present) < len(group):
        return False
    owner = stack.rpartition(".")[0]
    named = has_own_name(expression, stack)
    return not named or ({*group} <= {*renamed} and not re.fullmatch(expression, owner))


def _double_rank(config: LoraConfig) -> None:
    """Give gate and up together the rank of two, as PEFT does: each had a LoRA of its own."""
    kind = r".*\.gate_up_proj"
    config.rank_pattern = {**(config.rank_pattern or {}), kind: 2 * config.r}
    config.alpha_pattern = {**(config.alpha_pattern or {}), kind: 2 * config.lora_alpha}


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
    patterns = patterns_of(config)
    if patterns:
        lengths = {k: n for k, n in lengths.items() if k.rpartition(".")[2] in patterns}
    if len(set(lengths.values())) != 1:
        parts = ", ".join(f"{stack} {length}" for stack, length in lengths.items())
        raise InputError(
            f"layers_to_transform={given} needs blocks, and {type(model).__name__} has "
            + (f"lists of several lengths ({parts}): list indices from 0" if parts else "none")
        )
    config.layers_to_transform = last_blocks(given, next(iter(lengths.values())))


def check_targets(config: PeftConfig, model: nn.Module, *, no_experts: str = NO_EXPERTS) -> None:
    """Raise InputError, with suggestions, for a pattern that matches nothing in `model`.

    Args:
        no_experts: see `resolve_targets`.
    """
    targets = facts_of(config).target_modules
    if targets is None or (isinstance(targets, str) and targets.lower() == "all-linear"):
        return
    names = replicated(config, model, candidate_names(model))
    stacks = [] if no_experts else replicated(config, model, stack_names(model))
    if isinstance(targets, str):
        try:
            matches = [each for each in stacks if names_stack(targets, each, complete=True)]
            matches += [name for name in names if re.fullmatch(targets, name)]
        except re.error as error:
            raise InputError(
                f"target_modules={targets!r} is not a regular expression: {error}"
            ) from error
        if not matches:
            named = [n for n in stack_names(model) if no_experts and names_stack(targets, n)]
            if named:
                raise _adapts_none(targets, named[0], no_experts)
            raise _no_match(targets, names, words=(*PRESETS, "all-linear"))
        refuse_experts([targets], model, no_experts)
    else:
        # PEFT takes none if `target_parameters` names weights instead
        if not targets and not facts_of(config).target_parameters:
            raise InputError(
                f"target_modules={_shown(targets)} names no module; name at least one, or "
                "target_modules=all-linear"
            )
        known = {suffix for name in names for suffix in suffixes(name)}
        known |= renamed_targets(config, model)
        former = former_names(targets, stacks, complete=True)
        known |= {suffix for name in stacks for suffix in suffixes(name)} | former
        unknown = sorted(set(targets) - known)
        wrong = [name for name in unknown if name not in TUTORIALS]
        # what names stacks that the method does not adapt is said below
        is_known = not (no_experts and stack_names(model)) and bool(known & {*targets})
        if unknown and not wrong and is_known:
            kind = type(model).__name__
            logger.warning("no adapter on %s: %s has no such modules", ", ".join(unknown), kind)
        elif unknown:
            _check_unknown(
                wrong or unknown, names, model, no_experts, has_others=bool(known & {*targets})
            )
        refuse_experts(targets, model, no_experts)
    # each pattern matches something, but exclude_modules or layers_to_transform leave nothing
    found = matched_names(config, model) or (not no_experts and matched_stacks(config, model))
    if targets and not found:
        raise InputError(
            f"target_modules={_shown(targets)} matches modules, but none is left after "
            f"exclude_modules={facts_of(config).exclude_modules}" + _layer_hint(config)
        )


def _check_unknown(
    unknown: Sequence[str], names: list[str], model: nn.Module, no_experts: str, *, has_others: bool
) -> None:
    """Raise for targets that match nothing; warn if they name stacked experts beside others."""
    stacks = stack_names(model)
    of_stacks = {suffix for name in stacks for suffix in suffixes(name)}
    former = {name for each in FORMER_NAMES.values() for group in each for name in group}
    for target in unknown:
        if not (stacks and no_experts) or target not in of_stacks | former:
            raise _no_match(target, names)
    error = _adapts_none(", ".join(unknown), stacks[0], no_experts)
    if not has_others:
        raise error
    logger.warning("%s", error)


def _adapts_none(target: str, stack: str, no_experts: str) -> UnsupportedError:
    return UnsupportedError(
        f"target {target} names projections of stacked experts ({stack}): {no_experts}, or name "
        "linear layers, as block-linear does"
    )


def matched_names(config: PeftConfig, model: nn.Module) -> list[str]:
    """Return the names of the modules that PEFT will adapt, in `named_modules` order."""
    names, targets = candidate_names(model), facts_of(config).target_modules
    if isinstance(targets, list | set):
        # PEFT compares each name with each target, which takes a second with thousands of targets
        given = set(targets)
        names = [name for name in names if not given.isdisjoint(suffixes(name))]
    found = [name for name in names if check_target_module_exists(config, name)]
    # a module of stacked experts stands for its stacks, see `matched_stacks`
    owners = [name for name in found if experts_of(model.get_submodule(name)) is not None]
    inside = tuple(f"{name}." for name in owners)
    return [name for name in found if name not in owners and not f"{name}.".startswith(inside)]


def chosen_names(config: Any, model: nn.Module, tuner: type[BaseTuner]) -> list[str]:
    """Return the names of the modules that a tuner of PEFT's will adapt, by its own words too.

    These are "all-linear", and None, where PEFT chooses by the type of model.
    """
    targets = config.target_modules
    if targets is None:
        targets = default_targets(tuner, model_type_of(model))
    elif isinstance(targets, str) and targets.lower() == "all-linear":
        targets = set(linear_names(model))
    config = copy(config)  # the caller's config keeps the word
    config.target_modules = targets
    return [] if targets is None else matched_names(config, model)


def choose_default(
    config: Any, model: nn.Module, tuner: type[BaseTuner], no_experts: str = NO_EXPERTS
) -> None:
    """Set the targets of a tuner of PEFT's that are left to it, where its table has none that fit.

    PEFT knows names by the type of model. They may match a vision tower too, or modules that are no
    linear layers; for other types, these are the layers of `block-linear`.

    Args:
        no_experts: see `resolve_targets`; "": all linear layers are also those of experts.
    """
    targets = config.target_modules
    if isinstance(targets, str) and targets.lower() == "all-linear":
        others = [] if no_experts else stack_names(model)
        # as PEFT does where it has names for the experts of transformers 4
        if others and renamed_targets(config, model):
            others += router_names(model)
            _double_rank(config)
        # PEFT takes every subclass of nn.Linear for a linear layer
        if others or any(isinstance(m, nn.Linear) and not is_linear(m) for m in model.modules()):
            set_targets(config, model, list(dict.fromkeys([*linear_names(model), *others])))
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
        norms = [name for name, module in model.named_modules() if is_norm(module)]
        norms = names_of(LANGUAGE, norms, language_path(model))
        inside = [name for name in norms if place(model, name) is not None] or norms
        if not inside:
            raise ModuleKindError(f"the norms of {type(model).__name__} have no weights to train")
        set_targets(config, model, inside)
    elif not fits:
        config.target_modules = "block-linear"
        resolve_targets(config, model, no_experts=no_experts)
    # PEFT's renaming takes targets that are left to it for none
    elif fits != names or renamed_targets(config, model):
        set_targets(config, model, fits)


def check_kinds(config: PeftConfig, model: nn.Module, tuner: type[BaseTuner]) -> None:
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


def leave_out(config: PeftConfig, model: nn.Module, tuner: type[BaseTuner], given: object) -> None:
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
    elif closed := read_by_kernels(config, model, names):
        raise uncalled_error(model, closed)
    for pattern in given if isinstance(given, list | set) else [None]:
        matched = [name for name in names if pattern is None or pattern in suffixes(name)]
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


def target_shapes(
    config: PeftConfig, model: nn.Module, tuner: type[BaseTuner]
) -> dict[str, tuple[int, int]]:
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


def check_saved(config: PeftConfig, model: nn.Module) -> None:
    """Raise InputError for a module to save that `model` lacks, which PEFT would ignore.

    PEFT itself adds the usual names of the head of a classifier; these may be absent.
    """
    names = candidate_names(model)
    for module in facts_of(config).modules_to_save or ():
        if module not in SEQ_CLS_HEAD_NAMES and not any(n.endswith(module) for n in names):
            suffixes = {name.rpartition(".")[2] for name in names}
            raise UnknownNameError(
                f"modules_to_save: {module!r} matches no module" + did_you_mean(module, suffixes)
            )


def check_tokens(config: PeftConfig, model: nn.Module) -> None:
    """Raise InputError for trained rows of tokens that `model` lacks, or computes otherwise."""
    given = facts_of(config).trainable_token_indices
    if given is None:
        return
    tables = [
        _table_with(model, name, tokens)
        for name, tokens in (given if isinstance(given, Mapping) else {"": given}).items()
    ]
    whole = facts_of(config).modules_to_save or ()
    both = next((n for n in whole if isinstance(given, Mapping) and n in given), None)
    if both is not None:
        raise InputError(
            f"modules_to_save={[*whole]} trains all rows of {both}, and trainable_token_indices "
            "some of them: leave it out of one of the two"
        )
    # PEFT computes a head that is tied to the embedding with its rows, too
    weights = [getattr(table, "weight", None) for table in tables]
    for path, module in model.named_modules():
        own = module.weight if isinstance(module, nn.Linear) and module.bias is not None else None
        if own is not None and any(own is each for each in weights):
            raise ModuleKindError(
                f"{path} has a bias, which PEFT leaves out where rows of tokens train: take "
                f"modules_to_save=[{path}] in place of trainable_token_indices"
            )


def _table_with(model: nn.Module, name: str, tokens: Sequence[int]) -> nn.Module | None:
    """Return the table that has rows for tokens: the module of this name, ""; the embedding."""
    if not tokens or min(tokens) < 0 or len({*tokens}) < len(tokens):
        raise InputError(
            f"trainable_token_indices={shown(tokens)} are no distinct numbers from 0 on: "
            "petl.add_tokens returns those of new tokens"
        )
    named = (m for n, m in model.named_modules() if n.endswith(name))
    table = next(named, None) if name else input_embedding(model)
    rows = getattr(getattr(table, "weight", None), "shape", (math.inf,))[0]
    if max(tokens) >= rows:
        raise InputError(
            f"trainable_token_indices has the token {max(tokens)}, and the embedding of "
            f"{type(model).__name__} has {rows:,} rows: resize it to {max(tokens) + 1:,} or more "
            "by petl.add_tokens or model.resize_token_embeddings, as where the adapter was trained "
            "(data.new_tokens of a run)"
        )
    return table


def _no_match(target: str, names: list[str], words: Sequence[str] = ()) -> UnknownNameError:
    # suggest last parts of names, or complete ones for a target with a dot that is no pattern
    suffixes = {name.rpartition(".")[2] for name in names if not name.rpartition(".")[2].isdigit()}
    options = names if "." in target and "*" not in target else suffixes
    given = re.split(r"[\s,|]+", target)
    if words and suffixes >= {*given}:  # of a list, it would match
        return UnknownNameError(
            f"target_modules={target!r} is a regular expression for the complete path of a module, "
            f"and matches none; name modules in a list: target_modules=[{','.join(given)}]"
        )
    return UnknownNameError(
        f"target {target!r} matches no module" + did_you_mean(target, [*words, *options])
    )


def _other_weights(model: nn.Module) -> str:
    """Return what holds the weights of a model without linear layers, in words."""
    heads = {getattr(model, name, None) for name in SEQ_CLS_HEAD_NAMES}
    kinds = Counter(
        type(m).__name__
        for m in model.modules()
        if getattr(m._parameters.get("weight"), "ndim", 0) > 1
        if not isinstance(m, nn.Embedding) and m not in heads
    )
    counts = ", ".join(f"{kind} ({count})" for kind, count in kinds.most_common())
    way_out = "; lora, for example, adapts Conv2d" if "Conv2d" in kinds else ""
    return f", whose weights are in {counts}{way_out}" if kinds else ""


def _layer_hint(config: PeftConfig) -> str:
    indices = facts_of(config).layers_to_transform
    patterns = f", layers_pattern={', '.join(patterns_of(config))}" if patterns_of(config) else ""
    return "" if indices is None else f" (layers_to_transform={indices}{patterns})"


def _shown(targets: str | Iterable[str]) -> str | list[str]:
    return targets if isinstance(targets, str) else sorted(targets)
