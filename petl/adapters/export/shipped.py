"""Which files of a folder go to the Hub and come from it, and checks of what they hold.

A folder is that of an adapter, or of a complete model such as `petl merge` writes. All files are
named here: checkpoints, states of optimizers, code, pickles and whatever else lies in a folder stay
where they are.
"""

import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import TypedDict

from petl.core import fingerprint
from petl.core.adapter_folder import CONFIG, Folder
from petl.core.adapter_widths import record as nested
from petl.core.auto_classes import read_labels
from petl.core.model.layer_widths import FILE as WIDTHS
from petl.core.model.layer_widths import read_widths
from petl.data.tasks.retrieval.base_folder import LENGTHS, MODULES, PROMPTS, modules_of
from petl.data.tasks.retrieval.dense import WEIGHTS
from petl.data.tasks.task_file import FILE as TASK
from petl.data.tasks.task_file import read_task
from petl.errors import InputError
from petl.methods.pela.export import RANKS
from petl.ops.ternary import FILE as TERNARY
from petl.system.files.paths import LABELS
from petl.system.files.read import read_json
from petl.system.files.tensor_file import read_shapes
from petl.training.runs.card_code import BASE
from petl.training.runs.model_card import README

MODEL = "config.json"  # a complete model has it, and no adapter_config.json
INDEX = "model.safetensors.index.json"
ADAPTERS = [
    *(CONFIG, "adapter_model.safetensors", TERNARY, LABELS, TASK, fingerprint.FILE, nested.FILE),
    f"{BASE}/{MODEL}",  # of a base model with random weights
]
MODELS = [
    *(MODEL, "generation_config.json", "model.safetensors", INDEX),
    RANKS,  # of low-rank layers, as `petl export --small` writes them
    *(WIDTHS, TASK),  # of `petl shrink`
    *(MODULES, PROMPTS, LENGTHS),  # of embedders and rerankers
]
BOTH = [
    *(README, "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "normalizer.json", "bpe.codes", "dict.txt"),
    *("source.spm", "target.spm", "target_vocab.json", "vocab-src.json", "vocab-tgt.json"),
    *("prophetnet.tokenizer", "entity_vocab.json", "byte_maps.json", "emoji.json"),
    *("word_shape.json", "word_pronunciation.json"),
    *("chat_template.jinja", "chat_template.json"),
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
]
# parts of the weights; sentencepiece's vocabularies; further chat templates
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
NAMED = re.compile(
    r"(tokenizer|spiece|spm(_char)?|sentencepiece(\.bpe)?)\.model|"
    r"additional_chat_templates/\w+\.jinja"
)


class Index(TypedDict):
    """The content of `INDEX`: the file of each tensor."""

    weight_map: dict[str, str]


def chosen(names: Iterable[str], modules: Iterable[str] = ()) -> list[str]:
    """Return those files of an adapter or a model that are shipped, sorted.

    Args:
        names: paths in the folder or repository, with slashes.
        modules: folders of an embedder's modules, as of `module_folders`; without them, the list
            has `MODULES` if there are some.
    """
    present = set(names)
    is_adapter = CONFIG in present
    places = [str(PurePosixPath(path, name)) for path in modules for name in (MODEL, WEIGHTS)]
    known = {*BOTH, *(ADAPTERS if is_adapter else [*MODELS, *places])}
    return sorted(
        name
        for name in present
        if name in known or NAMED.fullmatch(name) or (SHARD.fullmatch(name) and not is_adapter)
    )


def module_folders(folder: Path) -> dict[str, str]:
    """Return the kind of module in each folder that the `MODULES` of a folder names.

    Raises:
        InputError: the file is damaged, or names a folder outside, or a link.
    """
    file, whole = folder / MODULES, folder.resolve()
    found = {path: kind for kind, path in modules_of(read_json(file), str(file))}
    linked = [path for path in found if (folder / path).resolve() != whole / path]
    if linked:  # whose files are not listed with those of the folder
        raise InputError(f"{folder / linked[0]} is a link: put a copy of the folder in its place")
    return found


def check(folder: Path) -> str:
    """Read the files of a folder strictly; return "adapter" or "model".

    Raises:
        InputError: it is neither; a file is damaged or does not belong; a file could contain code.
    """
    if (folder / CONFIG).is_file():
        Folder(folder).check()
        read_labels(folder)
        read_task(folder)
        nested.read(Folder(folder).file(nested.FILE))
        return "adapter"
    if not (folder / MODEL).is_file():
        raise InputError(f"{folder} has neither {CONFIG} nor {MODEL}: it holds no adapter or model")
    read_json(folder / MODEL, dict)
    for name in _weights(folder):
        if not (folder / name).is_file():
            raise InputError(f"{folder} has no {name}, and petl reads no other format of weights")
        read_shapes(folder / name)
    if (folder / RANKS).is_file():
        read_json(folder / RANKS, dict[str, dict[str, int]])
    read_widths(folder)
    read_task(folder)
    _read_modules(folder)
    return "model"


def _read_modules(folder: Path) -> None:
    """Read the files of an embedder or reranker, if it is one."""
    present = [name for name in (PROMPTS, LENGTHS) if (folder / name).is_file()]
    modules = module_folders(folder) if (folder / MODULES).is_file() else {}
    # without its config, a reader might pool in another way
    present += [f"{path}/{MODEL}" for path, kind in modules.items() if kind in ("Pooling", "Dense")]
    for name in present:
        read_json(folder / name, dict)
    for path, kind in modules.items():
        if kind == "Dense":
            read_shapes(folder / path / WEIGHTS)


def _weights(folder: Path) -> set[str]:
    """The names of the files with the weights of a model."""
    if not (folder / INDEX).is_file():
        return {"model.safetensors"}
    index: Index = read_json(folder / INDEX, Index)
    names = {str(name) for name in index["weight_map"].values()}
    strange = sorted(name for name in names if not SHARD.fullmatch(name))
    if strange:
        raise InputError(f"{folder / INDEX} names {strange[0]}, which is no file of weights")
    return names
