"""Rules about config and tensors: format, keys, dead layers, scale, dtype."""

import ast
import math
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any, NotRequired, TypedDict

from petl.adapters.check.findings import Found, NotCheckedError
from petl.adapters.check.folder import (
    BLOCK,
    COMPRESSED,
    CONFIG,
    FINGERPRINT,
    LORA,
    PREFIX,
    WEIGHTS,
    Subject,
    locate,
    module_of,
)
from petl.adapters.check.rule import CheckRule, asked
from petl.adapters.check.weights import TensorFile
from petl.errors import InputError, shown
from petl.system.files.disk import sha256
from petl.system.files.paths import LABELS
from petl.system.files.read import read_json
from petl.system.patterns import risky_patterns
from petl.system.values import type_problem
from petl.training.watch.findings import Finding, Severity

# format


class AdapterEntries(TypedDict, total=False):
    """The entries of adapter_config.json that rules read, where a config has them."""

    base_model_name_or_path: str | None
    task_type: str | None
    target_modules: list[str] | str | None
    exclude_modules: list[str] | str | None
    target_parameters: list[str] | None
    modules_to_save: list[str] | None
    layers_to_transform: list[int] | int | None
    auto_mapping: dict[str, Any] | None
    trainable_token_indices: list[int] | dict[str, list[int]] | None
    layers_pattern: list[str] | str | None


class OtherFields(AdapterEntries, total=False):
    """Those that methods beside LoRA have, with patterns."""

    feedforward_modules: list[str] | str | None
    exclude_params: list[str] | str | None
    rank_pattern: dict[str, Any] | None
    alpha_pattern: dict[str, Any] | None
    lambda_pattern: dict[str, Any] | None
    block_size_pattern: dict[str, Any] | None
    n_frequency_pattern: dict[str, Any] | None


class LoraFields(AdapterEntries, total=False):
    """Those that a LoRA has besides."""

    r: int
    lora_alpha: float | None
    rank_pattern: dict[str, int] | None
    alpha_pattern: dict[str, float] | None
    use_rslora: bool | None
    use_dora: bool | None
    lora_bias: bool | None
    bias: str | None


LAYOUTS = {  # of other programs, by the names of their tensors
    "mlx": re.compile(r"^(model\.)?layers\..*\.lora_[ab]$"),
    "torchtune": re.compile(r"^(layers|output|decoder)\b.*\.lora_[ab]\.weight$"),
    "kohya": re.compile(r"^lora_(unet|te\d?|transformer)_.*\.(lora_(up|down)\.weight|alpha)$"),
    "diffusers": re.compile(
        r"^(unet|transformer|text_encoder\w*)\..*(lora_[AB]\.weight|lora\.(up|down)\.weight)$"
    ),
}
MOST_FILES = 8  # whose headers are read to find out which program wrote a folder


@cache
def peft_types() -> frozenset[str]:
    """Return the types that PEFT and petl know, read from their sources: neither is imported."""
    peft, petl = find_spec("peft"), find_spec("petl")
    found: set[str] = set()
    if peft is not None and peft.origin is not None:
        tree = ast.parse(Path(peft.origin).with_name("utils").joinpath("peft_types.py").read_text())
        kinds = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "PeftType")
        assigned = (n for kind in kinds for n in kind.body if isinstance(n, ast.Assign))
        found |= {n.targets[0].id for n in assigned if isinstance(n.targets[0], ast.Name)}
    if petl is not None and petl.origin is not None:
        methods = Path(petl.origin).with_name("methods").iterdir()
        found |= {f"PETL_{path.stem.upper()}" for path in methods}
    return frozenset(found)


def unknown_type(subject: Subject) -> Iterator[Found]:
    """A method that neither PEFT nor petl has."""
    kind = subject.config.get("peft_type")
    if (isinstance(kind, str) and kind in peft_types()) or layout_of(subject):
        return
    if not isinstance(kind, str) or not is_registered(kind):
        yield Found(f"peft_type={shown(kind)}, which neither PEFT nor petl knows", CONFIG)


def is_registered(kind: str) -> bool:
    """Return True if a package that is installed, or that this process has imported, has a type.

    PEFT, which takes seconds to import, is imported only if there is such a package.
    """
    from petl.system.imports.peft_hook import plugins

    if "peft" not in sys.modules and not plugins():
        return False
    from petl.core.compat import config_class

    return config_class(kind) is not None


def wrong_values(subject: Subject) -> Iterator[Found]:
    """Entries of the config of a wrong type, out of range, or no regular expressions."""
    problem = type_problem(subject.config, LoraFields if subject.kind == "LORA" else OtherFields)
    if subject.kind == "LORA" and not problem:
        ranks = [subject.config.get("r", 1), *(subject.config.get("rank_pattern") or {}).values()]
        problem = f"a rank of {min(ranks)}, which is below 1" if min(ranks) < 1 else ""
    problem = problem or _pattern_problem(subject)
    if problem:
        yield Found(problem, CONFIG)


def _pattern_problem(subject: Subject) -> str:
    try:
        risky_patterns(SimpleNamespace(**subject.config))
    except InputError as error:
        return str(error)
    return ""


def foreign(subject: Subject) -> Iterator[Found]:
    """The layout of another program than PEFT."""
    if program := layout_of(subject):
        yield Found(f"the layout of {program}, which PEFT does not read", subject.name)


def layout_of(subject: Subject) -> str:
    """Return which program other than PEFT wrote the tensors of a folder; "": none known."""
    if "fine_tune_type" in subject.config or "lora_parameters" in subject.config:
        return "mlx"
    files = [name for name in subject.files if name.endswith(".safetensors") and subject.has(name)]
    for name in sorted(files, key=lambda name: name != WEIGHTS)[:MOST_FILES]:
        try:
            names = TensorFile(subject.folder / name).stored
        except InputError:
            continue  # of the adapter's own file, `unreadable` tells
        for program, pattern in LAYOUTS.items():
            if names and sum(bool(pattern.match(each)) for each in names) > len(names) / 2:
                return program
    return ""


def unreadable(subject: Subject) -> Iterator[Found]:
    """No file of weights, a damaged one, one that is a pickle, or one of integers."""
    if layout_of(subject) or subject.has(COMPRESSED) or WEIGHTS in subject.links:
        return
    if WEIGHTS not in subject.files:
        pickles = [name for name in subject.files if name.startswith("adapter_model.")]
        also = f", but {pickles[0]}, which can contain code and is not read" if pickles else ""
        yield Found(f"no {WEIGHTS}{also}", subject.name)
        return
    try:
        stored = TensorFile(subject.folder / WEIGHTS).stored
    except InputError as error:
        yield Found(str(error), WEIGHTS)
        return
    if not stored:
        yield Found("the file has no tensors: the adapter is empty", WEIGHTS)
    factors = {n: s for n, s in stored.items() if subject.kind == "LORA" and LORA.search(n)}
    whole = [name for name, each in factors.items() if not each.is_float]
    if whole:
        what = f"{len(whole)} of {len(stored)} tensors are {stored[whole[0]].dtype}"
        yield Found(f"{what}, and a LoRA has floating-point numbers", whole[0])


def links(subject: Subject) -> Iterator[Found]:
    """Entries that lead out of the folder, or are no files."""
    yield from (Found(reason, name) for name, reason in subject.links.items())


def code(subject: Subject) -> Iterator[Found]:
    """Entries of the config by which PEFT would run code."""
    start = subject.config.get("prompt_tuning_init_state_dict_path")
    if start and not str(start).endswith(".safetensors"):
        yield Found(f"PEFT would unpickle {shown(start)}", CONFIG)
    module = subject.config.get("megatron_core")
    if module not in (None, "megatron.core"):
        yield Found(f"PEFT would import the module {shown(module)}", CONFIG)


# keys

CLASSIFIER = re.compile(r"(^|\.)(classifier|score)\.")  # by PEFT's names
WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
BESIDE = re.compile(  # biases, and embeddings that PEFT saves with an adapter
    r"\.(bias|trainable_tokens_\w+|(embed_tokens|lm_head|wte|embed_in|embed_out|shared|word_\w+|"
    r"embed_positions|wpe|embeddings?)(\.base_layer)?\.weight)$"
)


def prefixes(subject: Subject) -> Iterator[Found]:
    """Names without PEFT's prefix, or with that of a wrapper: PEFT leaves such tensors out."""
    if subject.config.get("target_modules") is None and not subject.config.get("target_parameters"):
        raise NotCheckedError(f"{subject.kind} has no targets")
    # other methods have tensors of the tuner as well, which all layers share
    expected = PREFIX if subject.kind == "LORA" else "base_model."
    names = subject.weights.stored
    twice = (PREFIX * 2, f"{PREFIX}module.")
    for what, found in {
        f"do not begin with {expected}": [n for n in names if not n.startswith(expected)],
        "have the prefix of a second wrapper": [n for n in names if n.startswith(twice)],
        "have that of torch.compile or FSDP": [n for n in names if WRAPPERS.search(n)],
    }.items():
        if found:
            yield Found(
                f"{len(found)} of {len(names)} names {what}: PEFT leaves these out", found[0]
            )


def literals(subject: Subject) -> Iterator[Found]:
    """Targets that were not resolved to modules."""
    targets = subject.config.get("target_modules")
    if targets in ("auto", "all-linear", ["auto"], ["all-linear"]):
        names = sorted({module_of(path).rpartition(".")[2] for path in subject.pairs})
        what = f"target_modules={shown(targets)} names no modules: each program resolves it anew"
        yield Found(what, CONFIG, f"write the names there: {', '.join(names)}")


def is_target(subject: Subject, path: str) -> bool:
    """Return True if the config's targets have a module, by its path in the base model."""
    config = subject.patterns
    if subject.is_stacked(path):
        return True
    blocks, index = config.get("layers_to_transform"), BLOCK.search(path)
    wanted = [blocks] if isinstance(blocks, int) else blocks
    if wanted and index is not None and int(index[1]) not in wanted:
        return False
    targets = config.get("target_modules")
    if isinstance(targets, str):
        return targets in ("auto", "all-linear") or bool(re.fullmatch(targets, path))
    return targets is None or any(f".{path}".endswith(f".{name}") for name in targets)


def strangers(subject: Subject) -> Iterator[Found]:
    """Tensors that belong to no target of the config: PEFT leaves them out."""
    trained = subject.config.get("modules_to_save") or ()
    found = []
    for name in subject.weights.stored if subject.kind == "LORA" else ():
        if ".lora_" in name:
            is_magnitude = "lora_magnitude_vector" in name and not subject.config.get("use_dora")
            known = is_target(subject, module_of(name[: name.rindex(".lora_")])) > is_magnitude
        else:
            path = f".{module_of(name)}"
            # as PEFT compares: "norm" is also the end of "input_layernorm"
            known = bool(BESIDE.search(name)) or any(f"{module}." in path for module in trained)
        found += [] if known else [name]
    if found:
        what = f"{len(found)} of {len(subject.weights.stored)} tensors belong to no target"
        yield Found(f"{what} of the config: PEFT leaves these out", found[0])


def absent(subject: Subject) -> Iterator[Found]:
    """Targets and trained modules of the config without a tensor."""
    paths = [f".{module_of(name)}." for name in subject.pairs]
    names = [f".{module_of(name)}" for name in subject.weights.stored]
    targets = subject.config.get("target_modules")
    lists = targets if isinstance(targets, list) and targets[:1] != ["all-linear"] else []
    without = [each for each in lists if not any(p.endswith(f".{each}.") for p in paths)]
    wanted = subject.config.get("modules_to_save") or []
    lacking = [each for each in wanted if not any(f"{each}." in name for name in names)]
    # PEFT lists two names of heads, of which a model has one
    if lacking in (["classifier"], ["score"]) and {"classifier", "score"} <= {*wanted}:
        lacking = []
    for field, found in {"target_modules": without, "modules_to_save": lacking}.items():
        if found:
            yield Found(f"{', '.join(found)} of {field} has no tensor: the base's is used", CONFIG)


def no_head(subject: Subject) -> Iterator[Found]:
    """A LoRA of a classifier without a tensor of its head: each program draws another one."""
    task, names = subject.config.get("task_type"), subject.weights.stored
    is_known = subject.has(LABELS) or any(CLASSIFIER.search(module_of(name)) for name in names)
    # of modules that the config names, `absent` tells
    is_known = is_known or subject.config.get("modules_to_save") or subject.kind != "LORA"
    if task in ("SEQ_CLS", "TOKEN_CLS") and not is_known:
        yield Found(f"task_type={task}, and no tensor of a classification head", WEIGHTS)


def unpaired(subject: Subject) -> Iterator[Found]:
    """Modules with A alone or B alone, shapes that do not multiply, or DoRA without magnitude."""
    pairs = subject.pairs
    single = [path for path, parts in pairs.items() if not {"lora_A", "lora_B"} <= parts.keys()]
    other = [
        path
        for path, parts in pairs.items()
        if path not in single and parts["lora_A"].shape[:1] != parts["lora_B"].shape[1:2]
    ]
    if single:
        yield Found(f"{len(single)} of {len(pairs)} modules have one of A and B only", single[0])
    if other:
        shapes = [list(each.shape) for each in pairs[other[0]].values()]
        yield Found(f"{len(other)} pairs do not multiply: {shapes}", other[0])
    bare = [path for path, parts in pairs.items() if "lora_magnitude_vector" not in parts]
    if bare and subject.config.get("use_dora"):
        what = f"{len(bare)} of {len(pairs)} modules have no lora_magnitude_vector"
        yield Found(f"{what}, and use_dora is true", bare[0])


def ranks(subject: Subject) -> Iterator[Found]:
    """Modules whose rank is not that of r and rank_pattern."""
    wrong = []
    for path, parts in subject.pairs.items():
        rank = sum(parts["lora_A"].shape[:1]) if "lora_A" in parts else 0
        own = subject.scale_of(module_of(path))[0]
        # the factors of a stack have the ranks of all its experts
        fits = rank % own == 0 if subject.is_stacked(path) else rank == own
        if rank and not fits:
            wrong.append((path, f"{rank}, not {own}"))
    if wrong:
        what = f"{len(wrong)} of {len(subject.pairs)} modules have another rank than the config"
        yield Found(f"{what} says: {wrong[0][1]}", wrong[0][0])


def incomplete(subject: Subject) -> Iterator[Found]:
    """Blocks that lack a module whose neighbours in the block they have."""
    owners: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    for path in map(module_of, subject.pairs):
        if place := BLOCK.search(path):
            owner, _, name = path[place.end() :].rpartition(".")
            owners[f"{path[: place.start()]}.{{}}.{owner}."][name].add(int(place[1]))
    lacking = []
    for owner, modules in owners.items():
        every = sorted(set().union(*modules.values()))
        for name, having in modules.items():
            # of a dense block and one of experts, the one has what the other has not
            instead = set().union(*(each for each in modules.values() if not each & having))
            missing = [block for block in every if block not in having | instead]
            ends = (every[: len(missing)], every[-len(missing) :])
            # architectures differ in every Nth block, and in the first or last ones
            regular = (len(missing) > 1 and missing in ends) or _in_steps(missing)
            if not regular and not _in_steps(having):
                paths = [owner.format(block) + name for block in missing]
                lacking += [path for path in paths if _is_reached(subject, path)]
    if lacking:
        yield Found(
            f"{len(lacking)} modules lack their tensors, and other blocks have them", lacking[0]
        )


TOWERS = re.compile(r"vis|image|audio|speech")  # whose blocks a config counts elsewhere


def cut_off(subject: Subject) -> Iterator[Found]:
    """Blocks without a tensor that the config names, or that the base has above the others."""
    stacks: dict[str, set[int]] = defaultdict(set)
    last: dict[str, list[str]] = defaultdict(list)  # what the modules of a block are called
    for path in map(module_of, subject.pairs):
        if (place := BLOCK.search(path)) and not TOWERS.search(path[: place.start(1)]):
            stacks[path[: place.start(1)]].add(int(place[1]))
            last[path[: place.start(1)]].append(path[place.end(1) :])
    if len(stacks) > 1:
        raise NotCheckedError(f"it adapts {len(stacks)} stacks of blocks")
    for stack, having in stacks.items():
        wanted = [block for block in _expected(subject, having) if block not in having]
        names = dict.fromkeys(last[stack])
        missing = [
            b for b in wanted if any(_is_reached(subject, f"{stack}{b}{name}") for name in names)
        ]
        if missing:
            what = f"{len(missing)} blocks have no tensor, and the config's targets are in them"
            yield Found(f"{what}: {', '.join(map(str, missing[:8]))}", WEIGHTS)


def _expected(subject: Subject, having: set[int]) -> Iterable[int]:
    """The blocks that must have tensors: those of the config, else all above `having`."""
    given = subject.config.get("layers_to_transform")
    if given is not None:
        return [given] if isinstance(given, int) else given
    blocks = sorted(having)
    steps = {b - a for a, b in pairwise(blocks)} or {1}
    count = subject.blocks_of_base
    if len(steps) > 1 and blocks[-1] < count - 1:
        raise NotCheckedError(f"blocks {blocks} are in no regular steps")
    return range(blocks[-1], count, steps.pop())


def _is_reached(subject: Subject, path: str) -> bool:
    excluded = subject.patterns.get("exclude_modules") or ()
    if isinstance(excluded, str):
        is_excluded = bool(re.fullmatch(excluded, path))
    else:
        is_excluded = any(f".{path}".endswith(f".{name}") for name in excluded)
    return is_target(subject, path) and not is_excluded


def _in_steps(blocks: Iterable[int]) -> bool:
    steps = [b - a for a, b in pairwise(sorted(blocks))]
    return len(steps) > 1 and len({*steps}) == 1 and steps[0] > 1


# dead

EXPERT = re.compile(r"\.experts\.\d+\.")  # in the name of a tensor of one expert
LARGEST_RATIO = 1_000  # of the norm of one layer to the median


def without_effect(subject: Subject) -> Iterator[Found]:
    """An update that is zero as a whole."""
    is_lora = subject.kind == "LORA"
    names = subject.factor("B") if is_lora else [*subject.weights.stored]
    # of other methods, which start elsewhere than at 0, no single tensor tells
    if names and all(subject.weights.is_zero(name) for name in names):
        what = "lora_B of all layers" if is_lora else "every tensor"
        yield Found(f"no effect: {what} is zero ({len(names)})", WEIGHTS)


def untrained(subject: Subject) -> Iterator[Found]:
    """Layers whose update is zero, while others have one."""
    names = subject.factor("B")
    if not all(subject.weights.is_zero(name) for name in names):
        both = [*names, *subject.factor("A")]
        zero = [n for n in both if subject.weights.is_zero(n)]
        # an expert that no token of the training met
        alike = {EXPERT.sub(".", name) for name in {*both} - {*zero}}
        zero = [n for n in zero if not EXPERT.search(n) or EXPERT.sub(".", n) not in alike]
        if zero:
            what = f"lora_B or lora_A of {len(zero)} of {len(names)} layers is zero"
            yield Found(f"{what}: they never trained", zero[0])


def zeroed(subject: Subject) -> Iterator[Found]:
    """Trained modules and magnitudes of zeros, which replace those of the base."""
    weights, is_lora = subject.weights, subject.kind == "LORA"
    factors = {name: end[1] for name in weights.stored if (end := LORA.search(name))}
    copies = {n: f".{module_of(n)}" for n in weights.stored if n not in factors}
    for module in subject.config.get("modules_to_save") or ():
        of_it = [name for name, path in copies.items() if f".{module}." in path]
        matrices = [name for name in of_it if len(weights.stored[name].shape) > 1]
        if matrices and all(weights.is_zero(name) for name in matrices):
            what = f"{module} of modules_to_save is zero: its outputs do not depend on its inputs"
            yield Found(what, matrices[0])
    found = [n for n, part in factors.items() if is_lora and "magnitude" in part]
    if zero := [name for name in found if weights.is_zero(name)]:
        what = f"lora_magnitude_vector of {len(zero)} of {len(found)} layers is zero"
        yield Found(f"{what}: their outputs do not depend on their inputs", zero[0])


def not_finite(subject: Subject) -> Iterator[Found]:
    """Entries that are infinite or NaN."""
    weights = subject.weights
    floats = [name for name, stored in weights.stored.items() if stored.is_float]
    broken = {name: count for name in floats if (count := weights.figures(name).broken)}
    if broken:
        what = f"{sum(broken.values()):,} values in {len(broken)} of {len(weights.stored)} tensors"
        yield Found(f"{what} are infinite or NaN", next(iter(broken)))


def constant(subject: Subject) -> Iterator[Found]:
    """Matrices A of which each row repeats one value."""
    equal = [name for name in subject.factor("A") if subject.weights.figures(name).equal]
    if equal:
        yield Found(f"each row of lora_A repeats one value in {len(equal)} layers", equal[0])


def outliers(subject: Subject) -> Iterator[Found]:
    """Layers far larger than the others."""
    norms = {name: subject.weights.figures(name).norm for name in subject.factor("B")}
    middle = median(norms.values()) if norms else 0.0
    large = [name for name, norm in norms.items() if middle and norm > LARGEST_RATIO * middle]
    if large:
        ratio = norms[large[0]] / middle
        yield Found(f"the norm of {len(large)} layers is {ratio:,.0f} times the median", large[0])


EARLIER = "go back to an earlier checkpoint"
TRAIN = "train again: the loss must reach these layers, or leave them out of target_modules"
DEAD = (
    CheckRule("dead.all", Severity.ERROR, without_effect, TRAIN),
    CheckRule("dead.some", Severity.ERROR, untrained, TRAIN),
    CheckRule("dead.zero", Severity.ERROR, zeroed, EARLIER),
    CheckRule("dead.finite", Severity.ERROR, not_finite, EARLIER),
    CheckRule("dead.rows", Severity.ERROR, constant, TRAIN),
    CheckRule("dead.norm", Severity.NOTE, outliers),
)


def dead_layers(folder: Path) -> list[Finding]:
    """Return what the rules about layers that never trained find in an adapter, but for notes."""
    findings, _ = asked(DEAD, locate(str(folder)))
    return [finding for finding in findings if finding.severity != Severity.NOTE]


# scale and dtype


def no_alpha(subject: Subject) -> Iterator[Found]:
    """A LoRA without lora_alpha, or with one of 0 or below."""
    alpha, pattern = subject.config.get("lora_alpha"), subject.config.get("alpha_pattern") or {}
    if subject.kind != "LORA":
        return
    if alpha is None:
        yield Found("lora_alpha is missing: PEFT would take its default of 8", CONFIG)
        return
    values = (alpha, *pattern.values())
    if not all(values):
        yield Found("a lora_alpha of 0: the layers with it have no effect", CONFIG)
    if min(values) < 0:
        yield Found(f"a lora_alpha of {min(values):g}: the update would be subtracted", CONFIG)


class Meaning(TypedDict):
    """What a fingerprint says about the config."""

    settings: NotRequired[dict[str, Any]]
    layers: NotRequired[dict[str, dict[str, Any]]]
    weights: NotRequired[str]


def other_scale(subject: Subject) -> Iterator[Found]:
    """A config that is not the one of the tensors, which petl saved beside them."""
    if not subject.has(FINGERPRINT):
        raise NotCheckedError(f"no {FINGERPRINT} (not written by petl)")
    content: Meaning = read_json(subject.folder / FINGERPRINT, Meaning)
    config = subject.config
    changed = [
        f"{name} is {shown(config[name])} and was {shown(value)}"
        for name, value in content.get("settings", {}).items()
        if name in config and config[name] != value
    ]
    for path, layer in content.get("layers", {}).items() if subject.kind == "LORA" else ():
        scale, was = subject.scale_of(path)[1], layer.get("scale")
        if isinstance(was, float | int) and not math.isclose(scale, was, rel_tol=1e-6):
            changed.append(f"the scale is {scale:g} and was {was:g} on {path}")
    if changed:
        more = f", and {len(changed) - 1} more" if len(changed) > 1 else ""
        yield Found(f"the config is not that of the tensors: {changed[0]}{more}", CONFIG)


def changed(subject: Subject) -> Iterator[Found]:
    """A file of tensors that is not the one that was saved there."""
    if not subject.has(FINGERPRINT):
        raise NotCheckedError(f"no {FINGERPRINT} (not written by petl)")
    content: Meaning = read_json(subject.folder / FINGERPRINT, Meaning)
    known = content.get("weights")
    if known and subject.has(WEIGHTS) and sha256(subject.folder / WEIGHTS) != known:
        yield Found("it is not the file that was saved: damaged, or changed afterwards", WEIGHTS)


LARGE = 60_000  # float16 ends at 65,504


def near_overflow(subject: Subject) -> Iterator[Found]:
    """Tensors in float16 with values near its largest."""
    halves = [name for name, each in subject.weights.stored.items() if each.dtype == "F16"]
    name = max(halves, key=lambda name: subject.weights.figures(name).largest, default="")
    if name and subject.weights.figures(name).largest > LARGE:
        largest = subject.weights.figures(name).largest
        yield Found(f"a value of {largest:,.0f} in float16, which ends at 65,504", name)
