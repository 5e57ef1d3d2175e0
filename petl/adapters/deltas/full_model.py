"""Prune a fully fine-tuned model against its base model, file by file."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from petl.adapters.deltas.prune import apply, extract, prune
from petl.adapters.deltas.states import names_without
from petl.errors import InputError, first_line
from petl.system.files.disk import check_links, copy_file
from petl.system.files.outputs import check_output, new_folder
from petl.system.files.read import read_json
from petl.system.files.tensor_file import read_file
from petl.system.progress import ProgressItems

SUFFIX = ".safetensors"


def prune_model(
    tuned: Path, base: Path, out: Path, drop: float, *, exclude: Iterable[str] = (), **settings: Any
) -> tuple[int, int]:
    """Write base + pruned(tuned - base) to the folder `out`; one file of `tuned` at a time.

    Args:
        tuned: folder of a fine-tuned model, in safetensors.
        base: folder of the model that it was trained from.
        out: a new folder.
        drop: as `settings`, of `petl.adapters.deltas.prune`.
        exclude: regular expressions of tensors that stay those of `tuned`.

    Returns:
        The number of values that were changed by training and kept, and of all changed ones, both
        without excluded tensors.

    Raises:
        InputError: a folder has no safetensors files, they differ in tensors, or are quantized.
    """
    files, places = weight_files(tuned), places_of(base)
    check_links(tuned)
    refuse_quantized(tuned, base)
    check_output(out)
    excluded = list(exclude)
    kept = changed = chosen = 0
    with new_folder(out) as draft:
        for file in sorted(tuned.iterdir()):
            # config, tokenizer and the index, whose shards keep their names
            if file.is_file() and file.suffix != SUFFIX:
                copy_file(file, draft / file.name)
        for file in ProgressItems(files, "pruning", unit="files"):
            # one shard in memory; the base may be split in another way
            metadata, own = read_file(file)
            # excluded ones may be absent from the base, or of another shape there
            free = {name: own[name] for name in names_without(own, excluded)}
            missing = sorted(free.keys() - places.keys())
            if missing:
                raise InputError(f"{base} has no tensor {missing[0]}, which {tuned} has")
            # only the tensors of this shard
            theirs = read_some(places, free)
            delta = extract(free, theirs)
            chosen += len(delta)
            # a shard may have excluded tensors alone
            pruned = prune(delta, drop, **settings) if delta else {}
            changed += sum(int((tensor != 0).sum()) for tensor in delta.values())
            kept += sum(int((tensor != 0).sum()) for tensor in pruned.values())
            save_file({**own, **apply(theirs, pruned)}, draft / file.name, metadata)
        if not chosen:
            raise InputError(f"{tuned} has no floating-point tensor that is not excluded")
    return kept, changed


def refuse_quantized(*folders: Path) -> None:
    """Raise InputError for a folder of a quantized model, whose codes have no difference."""
    for folder in folders:
        file = folder / "config.json"
        if file.exists() and read_json(file, dict[str, Any]).get("quantization_config"):
            raise InputError(
                f"{folder} holds a quantized model (quantization_config in config.json), which has "
                "no weights to subtract: prune the adapter of its run, without --base"
            )


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model folder."""
    files = sorted(folder.glob(f"*{SUFFIX}")) if folder.is_dir() else []
    # an adapter has safetensors files too, but no base to subtract
    if not files or (folder / "adapter_config.json").exists():
        raise InputError(f"{folder} is not the folder of a model with {SUFFIX} files")
    return files


def places_of(folder: Path) -> dict[str, Path]:
    """Return the file of each tensor of a model folder."""
    places = {}
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as opened:
                places |= dict.fromkeys(opened.keys(), file)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{file} cannot be read: {first_line(error)}") from error
    return places


def read_some(places: dict[str, Path], names: Iterable[str]) -> dict[str, Tensor]:
    """Read some tensors of a model folder."""
    tensors = {}
    for name in names:
        with safe_open(places[name], framework="pt") as opened:
            tensors[name] = opened.get_tensor(name)
    return tensors
