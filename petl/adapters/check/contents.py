"""Rules about config and tensors: format, keys, dead layers, scale, dtype."""

import ast
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NotRequired, TypedDict

from petl.adapters.check.findings import Found, NotCheckedError
from petl.adapters.check.folder import (
    BLOCK,
    CONFIG,
    FINGERPRINT,
    LORA,
    PREFIX,
    WEIGHTS,
    Subject,
    module_of,
)
from petl.adapters.check.weights import TensorFile
from petl.errors import InputError, shown
from petl.system.files.read import parse_json, read_text
from petl.system.values import type_problem

# format


class Config(TypedDict, total=False):
    """The entries of adapter_config.json that rules read, where a config has them."""

    peft_type: str
    base_model_name_or_path: str | None
    task_type: str | None
    target_modules: list[str] | str | None
    exclude_modules: list[str] | str | None
    target_parameters: list[str] | None
    modules_to_save: list[str] | None
    layers_to_transform: list[int] | int | None
    r: int
    lora_alpha: float
    rank_pattern: dict[str, int] | None
    alpha_pattern: dict[str, float] | None
    use_rslora: bool | None
    use_dora: bool | None
    lora_bias: bool | None
    bias: str | None
    auto_mapping: dict[str, Any] | None
    trainable_token_indices: list[int] | dict[str, list[int]] | None


CONFIG_OF_LORA = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "bias")
HOW = "save the adapter again by save_pretrained"
LAYOUTS = {  # of other programs, by their tensors' names
    "mlx": re.compile(r"^(model\.)?layers\..*\.lora_[ab]$"),
    "torchtune": re.compile(r"^(layers|output|decoder)\b.*\.lora_[ab]\.weight$"),
    "kohya": re.compile(r"^lora_(unet|te\d?|transformer)_.*\.(lora_(up|down)\.weight|alpha)$"),
    "diffusers": re.compile(
        r"^(unet|transformer|text_encoder\w*)\..*(lora_[AB]\.weight|lora\.(up|down)\.weight)$"
    ),
}
REMEDIES = {
    "mlx": "mlx_lm.fuse writes a complete model; petl and PEFT read no mlx adapter",
    "torchtune": "save it in PEFT's format, as torchtune's HF checkpointer does",
    "kohya": "load it by diffusers: pipeline.load_lora_weights(FOLDER)",
    "diffusers": "load it by diffusers: pipeline.load_lora_weights(FOLDER)",
}


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
    if kind in peft_types() or layout_of(subject):
        return
    from petl.core.compat import config_class  # of a package that registers a method

    if not isinstance(kind, str) or config_class(kind) is None:
        yield Found(f"peft_type={shown(kind)}, which neither PEFT nor petl knows", CONFIG, HOW)


def wrong_values(subject: Subject) -> Iterator[Found]:
    """Entries of the config of a wrong type, or out of range."""
    config = {k: v for k, v in subject.config.items() if k not in CONFIG_OF_LORA or v is not None}
    if config.get("peft_type") != "LORA":
        config = {k: v for k, v in config.items() if k not in CONFIG_OF_LORA}
    problem = type_problem(config, Config)
    ranks = (
        [config.get("r", 1), *(config.get("rank_pattern") or {}).values()] if not problem else []
    )
    if not problem and min(ranks, default=1) < 1:
        problem = f"a rank of {min(ranks)}, which is below 1"
    if problem:
        yield Found(problem, CONFIG, HOW)


def foreign(subject: Subject) -> Iterator[Found]:
    """The layout of another program than PEFT."""
    program = layout_of(subject)
    if program:
        yield Found(
            f"the layout of {program}, which PEFT does not read", subject.name, REMEDIES[program]
        )


def layout_of(subject: Subject) -> str:
    """Return which program other than PEFT wrote the tensors of a folder; "": none known."""
    if "fine_tune_type" in subject.config or "lora_parameters" in subject.config:
        return "mlx"
    files = [name for name in subject.files if name.endswith(".safetensors") and subject.has(name)]
    for name in sorted(files, key=lambda name: name != WEIGHTS)[:8]:
        try:
            names = TensorFile(subject.folder / name).stored
        except InputError:
            continue  # of the adapter's file, `unreadable` tells
        for program, pattern in LAYOUTS.items():
            if names and sum(bool(pattern.match(each)) for each in names) > len(names) / 2:
                return program
    return ""


def unreadable(subject: Subject) -> Iterator[Found]:
    """No file of weights, a damaged one, or one that is a pickle."""
    if layout_of(subject) or subject.has("ternary.safetensors"):
        return
    if WEIGHTS not in subject.files:
        pickles = [n for n in subject.files if n.startswith("adapter_model.") and n != WEIGHTS]
        also = f", but {pickles[0]}, which can contain code and is not read" if pickles else ""
        yield Found(f"no {WEIGHTS}{also}", subject.name, "convert it: see docs, check an adapter")
        return
    if subject.has(WEIGHTS):
        try:
            found = TensorFile(subject.folder / WEIGHTS)
        except InputError as error:
            yield Found(str(error), WEIGHTS, HOW)
            return
        if not found.stored:
            yield Found("the file has no tensors: the adapter is empty", WEIGHTS, HOW)


def links(subject: Subject) -> Iterator[Found]:
    """Entries that lead out of the folder, or are no files."""
    for name, reason in subject.links.items():
        yield Found(reason, name, "put a copy of the file there")


def code(subject: Subject) -> Iterator[Found]:
    """Entries of the config by which PEFT would run code."""
    start = subject.config.get("prompt_tuning_init_state_dict_path")
    if start and not str(start).endswith(".safetensors"):
        yield Found(f"PEFT would unpickle {shown(start)}", CONFIG, "set it to null")
    module = subject.config.get("megatron_core")
    if module not in (None, "megatron.core"):
        yield Found(f"PEFT would import the module {shown(module)}", CONFIG, "set it to null")


def scripts(subject: Subject) -> Iterator[Found]:
    """Python files."""
    names = [name for name in subject.files if name.endswith(".py")]
    if names:
        yield Found(f"{len(names)} files of code, such as {names[0]}, were not run", names[0])


# keys

WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
BESIDE = re.compile(
    r"\.(bias|trainable_tokens_\w+|(embed_tokens|lm_head|wte|embed_in|embed_out|shared|word_\w+|"
    r"embed_positions|wpe|embeddings?)(\.base_layer)?\.weight)$"
)  # biases, and embeddings that PEFT saves with an adapter


def prefixes(subject: Subject) -> Iterator[Found]:
    """Names without PEFT's prefix, or with that of a wrapper: PEFT leaves such tensors out."""
    if subject.config.get("target_modules") is None and not subject.config.get("target_parameters"):
        raise NotCheckedError(f"{subject.kind} has no targets")
    names = subject.weights.stored
    without = [name for name in names if not name.startswith(PREFIX)]
    twice = [name for name in names if name.startswith((PREFIX * 2, f"{PREFIX}module."))]
    wrapped = [name for name in names if WRAPPERS.search(name)]
    for found, what in (
        (without, f"do not begin with {PREFIX}"),
        (twice, "have the prefix of a second wrapper: save the unwrapped model"),
        (wrapped, "have the prefix of torch.compile or FSDP"),
    ):
        if found:
            count = f"{len(found)} of {len(names)} names"
            yield Found(f"{count} {what}: PEFT leaves these out", found[0], HOW)


def literals(subject: Subject) -> Iterator[Found]:
    """Targets that were not resolved to modules."""
    targets = subject.config.get("target_modules")
    if targets in ("auto", "all-linear", ["auto"], ["all-linear"]):
        yield Found(
            f"target_modules={shown(targets)} names no modules: each program resolves it otherwise",
            CONFIG,
            f"write the {len(ends(subject.pairs))} names there: {', '.join(ends(subject.pairs))}",
        )


def ends(paths: Iterable[str]) -> list[str]:
    """Return the last parts of paths, each once."""
    return sorted({path.rpartition(".")[2] for path in paths})


def is_target(subject: Subject, path: str) -> bool:
    """Return True if the config's targets have a module, by its path in the base model."""
    config = subject.patterns
    parameters = getattr(config, "target_parameters", None) or ()
    owners = [name.rpartition(".")[0] for name in parameters]
    if any(f".{path}".endswith(f".{owner}") for owner in owners):
        return True
    blocks = getattr(config, "layers_to_transform", None)
    index = BLOCK.search(path)
    if blocks is not None and index is not None:
        wanted = [blocks] if isinstance(blocks, int) else blocks
        if wanted and int(index[1]) not in wanted:
            return False
    targets = config.target_modules
    if isinstance(targets, str):
        return targets in ("auto", "all-linear") or bool(re.fullmatch(targets, path))
    return targets is None or any(f".{path}".endswith(f".{name}") for name in targets)


def strangers(subject: Subject) -> Iterator[Found]:
    """Tensors that belong to no target of the config: PEFT leaves them out."""
    trained = subject.config.get("modules_to_save") or ()
    found = []
    for name in subject.weights.stored if subject.pairs is not None else ():
        end = LORA.search(name)
        if end and end[1] == "lora_magnitude_vector" and not subject.config.get("use_dora"):
            found.append(name)
        elif end or ".lora_" in name:
            place = name[: name.rindex(".lora_")]
            if not is_target(subject, module_of(place)):
                found.append(name)
        elif not BESIDE.search(name):
            path = f".{module_of(name)}"
            if not any(f".{module}." in path for module in trained):
                found.append(name)
    if found:
        yield Found(
            f"{len(found)} of {len(subject.weights.stored)} tensors belong to no target of the "
            "config: PEFT leaves these out",
            found[0],
            "restore the target_modules and modules_to_save that it was trained with",
        )


def absent(subject: Subject) -> Iterator[Found]:
    """Targets and trained modules of the config without a tensor."""
    targets = subject.config.get("target_modules")
    paths = [f".{module_of(name)}" for name in subject.pairs]
    listed = targets if isinstance(targets, list) else ()
    without = [name for name in listed if not any(p.endswith(f".{name}") for p in paths)]
    # of these PEFT lists two, of which a model has one
    heads = {"classifier", "score"}
    wanted = [*(subject.config.get("modules_to_save") or ())]
    names = [f".{module_of(name)}" for name in subject.weights.stored]
    lacking = [each for each in wanted if not any(f".{each}." in name for name in names)]
    if heads <= {*wanted} and len(heads & {*lacking}) == 1:
        lacking = [each for each in lacking if each not in heads]
    if targets not in (["auto"], ["all-linear"]) and without:
        yield Found(
            f"{', '.join(without)} of target_modules has no tensor",
            CONFIG,
            "check the spelling; leave out what the base does not have",
        )
    if lacking:
        yield Found(
            f"{', '.join(lacking)} of modules_to_save has no tensor: the base's is used",
            CONFIG,
            HOW,
        )


def unpaired(subject: Subject) -> Iterator[Found]:
    """Modules with A alone or B alone, or with shapes that do not multiply."""
    single, other = [], []
    for path, parts in subject.pairs.items():
        if not {"lora_A", "lora_B"} <= parts.keys():
            single.append(path)
        elif parts["lora_A"].shape[:1] != parts["lora_B"].shape[1:2]:
            other.append(path)
    if single:
        what = f"{len(single)} of {len(subject.pairs)} modules have one factor only, A or B"
        yield Found(what, single[0], HOW)
    if other:
        shapes = [list(each.shape) for each in subject.pairs[other[0]].values()]
        yield Found(f"{len(other)} pairs do not multiply: {shapes}", other[0], HOW)


def ranks(subject: Subject) -> Iterator[Found]:
    """Modules whose rank is not that of r and rank_pattern."""
    wrong = []
    for path, parts in subject.pairs.items():
        if "lora_A" in parts and parts["lora_A"].shape:
            rank, own = parts["lora_A"].shape[0], subject.scale_of(module_of(path))[0]
            # of experts in one parameter, a pair for each
            stacked = subject.config.get("target_parameters") and rank % own == 0
            if rank != own and not stacked:
                wrong.append((path, rank, own))
    if wrong:
        path, rank, own = wrong[0]
        yield Found(
            f"{len(wrong)} of {len(subject.pairs)} modules have another rank than the config says: "
            f"{rank}, not {own}",
            path,
            "restore r and rank_pattern of the training: they are in the scale",
        )


def incomplete(subject: Subject) -> Iterator[Found]:
    """Blocks that lack a module whose neighbours in the block they have."""
    blocks: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    for path in subject.pairs:
        place = BLOCK.search(path)
        if place:
            owner, _, name = path[place.end() :].rpartition(".")
            blocks[f"{path[: place.start()]}.N.{owner}"][name].add(int(place[1]))
    lacking = []
    for owner, modules in blocks.items():
        every = set().union(*modules.values())
        for name, having in modules.items():
            missing = sorted(every - having)
            if missing and not _is_regular(missing, every) and not _is_regular(having, every):
                lacking += [f"{owner}.{name}".replace(".N.", f".{i}.") for i in missing]
    if lacking:
        yield Found(
            f"{len(lacking)} modules have no tensors, and other blocks have theirs",
            module_of(lacking[0].lstrip(".")),
            HOW,
        )


def _is_regular(some: Iterable[int], every: set[int]) -> bool:
    """Return True for every Nth block, or the first or last ones: architectures differ so."""
    numbers = sorted(some)
    steps = {b - a for a, b in pairwise(numbers)}
    at_end = numbers in (sorted(every)[: len(numbers)], sorted(every)[-len(numbers) :])
    return (len(numbers) > 1 and len(steps) == 1 and steps != {1}) or at_end


# dead

LARGEST_RATIO = 1_000  # of the norm of one layer to the median


def without_effect(subject: Subject) -> Iterator[Found]:
    """An update that is zero as a whole."""
    weights = subject.weights
    names = [*subject.factor("B")] if subject.kind == "LORA" else [*weights.stored]
    # of other methods that start elsewhere than at 0, no tensor tells
    if names and all(is_zero(weights, name) for name in names):
        what = "lora_B of all" if subject.kind == "LORA" else "all"
        yield Found(
            f"no effect: {what} {len(names)} {'layers' if 'B' in what else 'tensors'} is zero",
            WEIGHTS,
            "train it: the loss must reach these layers",
        )


def is_zero(weights: TensorFile, name: str) -> bool:
    """Return True if all entries of a tensor are zero."""
    return weights.stored[name].is_float and not weights.figures(name).largest


def untrained(subject: Subject) -> Iterator[Found]:
    """Layers whose update is zero, while others have one."""
    names = [*subject.factor("B"), *subject.factor("A")]
    zero = [name for name in names if is_zero(subject.weights, name)]
    if zero and len([name for name in zero if "B" in name]) * 2 < len(names):
        yield Found(
            f"lora_B or lora_A of {len(zero)} of {len(names) // 2} layers is zero: they never "
            "trained",
            zero[0],
            "train with these targets, or leave them out of target_modules",
        )


def not_finite(subject: Subject) -> Iterator[Found]:
    """Entries that are infinite or NaN."""
    weights = subject.weights
    broken = {
        name: count
        for name, stored in weights.stored.items()
        if stored.is_float and (count := weights.figures(name).broken)
    }
    if broken:
        yield Found(
            f"{sum(broken.values()):,} values in {len(broken)} of {len(weights.stored)} tensors "
            "are infinite or NaN",
            next(iter(broken)),
            "go back to an earlier checkpoint, and train with a lower learning rate",
        )


def constant(subject: Subject) -> Iterator[Found]:
    """Matrices A of which each row repeats one value."""
    equal = [n for n in subject.factor("A") if subject.weights.figures(n).equal]
    if equal:
        what = f"each row of lora_A repeats one value in {len(equal)} layers"
        yield Found(what, equal[0], HOW)


def outliers(subject: Subject) -> Iterator[Found]:
    """Layers far larger than the others."""
    norms = {name: subject.weights.figures(name).norm for name in subject.factor("B")}
    middle = median(norms.values()) if norms else 0.0
    large = [name for name, norm in norms.items() if middle and norm > LARGEST_RATIO * middle]
    if large:
        ratio = norms[large[0]] / middle
        yield Found(f"the norm of {len(large)} layers is {ratio:,.0f} times the median", large[0])


# scale


def no_alpha(subject: Subject) -> Iterator[Found]:
    """A LoRA without lora_alpha, or with one of 0."""
    if subject.kind != "LORA":
        raise NotCheckedError(f"known for LoRA alone, and this is {subject.kind}")
    alpha = subject.config.get("lora_alpha")
    zero = [k for k, v in (subject.config.get("alpha_pattern") or {}).items() if not v]
    if alpha is None:
        what = "lora_alpha is missing: PEFT would take its default of 8"
    elif not alpha or zero:
        what = f"lora_alpha is 0{f' for {zero[0]}' if alpha else ''}: the adapter has no effect"
    else:
        return
    yield Found(what, CONFIG, "write the value that the adapter was trained with into it")


class Meaning(TypedDict):
    """What a fingerprint says about the config."""

    version: int
    settings: NotRequired[dict[str, Any]]
    layers: NotRequired[dict[str, dict[str, Any]]]


def other_scale(subject: Subject) -> Iterator[Found]:
    """A config that is not the one of the tensors, which petl saved beside them."""
    if not subject.has(FINGERPRINT):
        raise NotCheckedError(f"no {FINGERPRINT} (not written by petl)")
    content: Any = parse_json(read_text(subject.folder / FINGERPRINT))
    problem = type_problem(content, Meaning)
    if problem:
        yield Found(problem, FINGERPRINT, f"delete {FINGERPRINT}")
        return
    config = subject.config
    changed = [
        f"{name} is {shown(config[name])} and was {shown(value)}"
        for name, value in content.get("settings", {}).items()
        if name in config and config[name] != value
    ]
    if subject.kind == "LORA":
        for path, layer in content.get("layers", {}).items():
            scale, was = subject.scale_of(path)[1], layer.get("scale")
            if isinstance(was, float | int) and not math.isclose(scale, was, rel_tol=1e-6):
                changed.append(f"the scale is {scale:g} and was {was:g} on {path}")
    if changed:
        more = f", and {len(changed) - 1} more" if len(changed) > 1 else ""
        yield Found(
            f"the config is not that of the tensors: {changed[0]}{more}",
            CONFIG,
            f"restore it, or delete {FINGERPRINT} if the change is meant",
        )


# dtype

LARGE = 60_000  # float16 ends at 65,504


def near_overflow(subject: Subject) -> Iterator[Found]:
    """Tensors in float16 with values near its largest."""
    halves = Counter(
        {
            name: round(subject.weights.figures(name).largest)
            for name, stored in subject.weights.stored.items()
            if stored.dtype == "F16"
        }
    )
    name, largest = next(iter(halves.most_common(1)), ("", 0))
    if largest > LARGE:
        yield Found(
            f"a value of {largest:,} in float16, which ends at 65,504",
            name,
            "train and save in bfloat16 or float32",
        )
