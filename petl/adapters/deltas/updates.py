"""Combine adapters: their stored tensors, or the updates of any methods, ranks and targets.

The update of a layer, scale B A [O, I], is that of `petl export --lora`. `linear` is exact: the
factors are concatenated. For the other methods the updates are formed, combined entry by entry, and
factorized again by an SVD. Shapes: I in, O out, R rank.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor

from petl.adapters.deltas.adapters import (
    CARD,
    combine_tensors,
    copy_others,
    read,
    write_state,
)
from petl.adapters.deltas.combine import combine
from petl.adapters.deltas.states import coded_names
from petl.adapters.export.checked_folder import refuse_changed_base
from petl.adapters.export.conversion import as_lora, ranked_config, save_lora
from petl.adapters.export.saved_adapter import find
from petl.core import fingerprint
from petl.core.adapter_file import PREFIX
from petl.core.adapter_folder import Folder
from petl.core.refusals import is_lora, is_plain, refuse_more_than_factors
from petl.core.registry import refusal, require_capability
from petl.core.spec.facts import facts_of
from petl.core.support import Capability
from petl.errors import InputError, UnsupportedError
from petl.system.files.outputs import new_folder
from petl.system.progress import Pass, ProgressItems
from petl.system.values import integer, one_of
from petl.training.runs.lookup import adapter_in

LEVELS = one_of("tensors", "update")
Pair = tuple[Tensor, Tensor]  # A [R, I] and B [O, R] with the scale in it


@dataclass(frozen=True)
class Update:
    """The update of an adapter.

    Attributes:
        config: of the LoRA that equals the adapter.
        pairs: the factors of each layer, by its path in the base model.
        heads: trained copies of `modules_to_save`, by name in the file.
    """

    config: LoraConfig
    pairs: dict[str, Pair]
    heads: dict[str, Tensor]


def update_of(
    folder: str | Path, *, trust_remote_code: bool = False, other_base: bool = False
) -> Update:
    """Return the update of a saved adapter.

    Its base model is loaded, unless it is a LoRA of linear layers and nothing else.

    Raises:
        InputError: there is no adapter, its base model cannot be loaded, or the method's update is
            not a matrix per layer, added to the base weights.
    """
    adapter = adapter_in(folder)
    given = Folder(adapter).config
    require_capability(given, Capability.LORA_EXPORT, f"{folder} as a plain LoRA")
    refuse_changed_base(adapter, given)
    plain = update_in(adapter) if is_plain(given) else None
    if plain is not None:
        return plain
    saved = find(folder, trust_remote_code=trust_remote_code, other_base=other_base)
    model = saved.dense().model()
    try:
        refuse_more_than_factors(model)
    except UnsupportedError as error:
        raise UnsupportedError(f"{folder}: {error}") from error
    config, tensors = as_lora(model)
    pairs = {}
    for key in [key for key in tensors if key.endswith(".lora_A.weight")]:
        name = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        # popped: what remains are the trained heads
        A, B = tensors.pop(key), tensors.pop(f"{PREFIX}{name}.lora_B.weight")
        pairs[name] = A.float(), scale_of(config, name, len(A)) * B.float()
    return Update(config, pairs, tensors)


def update_in(adapter: Path) -> Update | None:
    """Return the update that the files of a LoRA tell alone; None if they do not tell all of it."""
    material = read(adapter)
    config: Any = material.config
    others, pairs = dict(material.state), {}
    for key in [key for key in material.state if key.endswith(".lora_A.weight")]:
        name = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        A, B = others.pop(key), others.pop(f"{PREFIX}{name}.lora_B.weight", None)
        layer = fingerprint.layer_in(config, name)
        # of a convolution, of experts, or damaged: loading it tells
        if B is None or A.dim() != 2 or B.dim() != 2 or not len(A) == B.shape[1] == layer["rank"]:
            return None
        pairs[name] = A.float(), layer["scale"] * B.float()
    heads = tuple(config.modules_to_save or ())
    # a tensor of another kind, such as the factors of an embedding
    if not pairs or not all(set(key.split(".")) & set(heads) for key in others):
        return None
    return Update(config, pairs, others)


def scale_of(config: Any, name: str, rank: int) -> float:
    """Return the scale alpha / r of a layer of a LoRA config made by `as_lora`."""
    return config.alpha_pattern.get(name, config.lora_alpha) / rank


def of_another_base(folders: Sequence[str | Path]) -> str | Path | None:
    """Return the first adapter that was trained on another base model than the first of all.

    Args:
        folders: of adapters, or of runs; what has no fingerprint of its base differs from none.
    """
    first, *others = (fingerprint.read(adapter_in(each) / fingerprint.FILE) for each in folders)
    pairs = zip(folders[1:], others, strict=True)
    return next((folder for folder, other in pairs if fingerprint.difference(first, other)), None)


def combined_updates(
    updates: Sequence[Update],
    method: str,
    *,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    exclude: Iterable[str] = (),
    **settings: Any,
) -> tuple[LoraConfig, dict[str, Tensor], float]:
    """Return config and tensors of one LoRA, and the fraction of the norm that its rank loses.

    A layer that an adapter lacks counts as 0; trained heads are those of the first adapter.

    Args:
        updates: at least two.
        method: of `combine`.
        weights: one to an update; None: 1.
        rank: the largest rank of a layer; None: all of it for "linear", else the largest rank of
            the inputs.
        exclude: regular expressions of layers that are those of the first update.
        settings: of `combine`.

    Raises:
        InputError: an argument is out of range, or a layer has another shape in another update.
    """
    if len(updates) < 2:
        raise InputError(f"combining needs at least two adapters, and got {len(updates)}")
    integer(1).check("rank", rank, int | None)
    first = updates[0]
    names = list(dict.fromkeys(name for update in updates for name in update.pairs))
    check_shapes(updates, names)
    replicated = [facts_of(update.config).layer_replication for update in updates]
    if any(blocks != replicated[0] for blocks in replicated):
        raise InputError(
            f"the adapters have layer_replication={replicated}: the blocks of one are not those of "
            "the other; combine adapters that replicate the same blocks"
        )
    chosen = [1.0] * len(updates) if weights is None else list(weights)
    if method == "linear":
        # only for its checks of the arguments
        combine([{"w": torch.zeros(1)} for _ in updates], method, weights=chosen, **settings)
        free = coded_names({name: torch.zeros(1) for name in names}, exclude)
        pairs = {**first.pairs, **{name: concatenated(updates, chosen, name) for name in free}}
    else:
        rank = rank or max(len(A) for update in updates for A, _ in update.pairs.values())
        with Pass("combining the updates", None, quiet=True):
            states = [{name: delta(update, name, updates) for name in names} for update in updates]
            found = combine(states, method, weights=chosen, exclude=exclude, **settings)
        # a dense update as factors of full rank, which `cut` shortens
        pairs = {name: (torch.eye(tensor.shape[1]), tensor) for name, tensor in found.items()}
    lost = whole = 0.0
    if rank is not None:
        for name, pair in ProgressItems(
            [*pairs.items()], "factoring updates", unit="layers", quiet=True
        ):
            pairs[name], dropped, total = cut(pair, rank)
            lost, whole = lost + dropped, whole + total
    config = ranked_config(first.config, {name: len(A) for name, (A, _) in pairs.items()})
    tensors = dict(first.heads)
    for name, (A, B) in pairs.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = A.contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = B.contiguous()
    return config, tensors, (lost / whole) ** 0.5 if whole else 0.0


def check_shapes(updates: Sequence[Update], names: Iterable[str]) -> None:
    """Raise InputError if a layer has other widths in another update."""
    for name in names:
        pairs = (update.pairs[name] for update in updates if name in update.pairs)
        sizes = {(len(B), A.shape[1]) for A, B in pairs}
        if len(sizes) > 1:
            raise InputError(f"{name} has updates of shapes {sorted(sizes)}: the bases differ")


def concatenated(updates: Sequence[Update], weights: Sequence[float], name: str) -> Pair:
    """Return the exact sum of a layer's updates, as factors one after the other."""
    present = [(w, u.pairs[name]) for w, u in zip(weights, updates, strict=True) if name in u.pairs]
    return torch.cat([A for _, (A, _) in present]), torch.cat([w * B for w, (_, B) in present], 1)


def delta(update: Update, name: str, updates: Sequence[Update]) -> Tensor:
    """Return the update of a layer, [O, I]; 0 where the adapter lacks it."""
    if name in update.pairs:
        A, B = update.pairs[name]
        return B @ A
    A, B = next(other.pairs[name] for other in updates if name in other.pairs)
    return torch.zeros(len(B), A.shape[1])


def cut(pair: Pair, rank: int) -> tuple[Pair, float, float]:
    """Return the best factors of at most `rank`, the squared norm that they lose, and the whole."""
    A, B = pair
    U, S, V = torch.linalg.svd((B @ A).double(), full_matrices=False)
    # below 1e-7 of the largest: rounding of float32; a zero update keeps rank 1
    kept = min(rank, max(1, int((S[0] * 1e-7 < S).sum())))
    # half of each singular value in either factor: equal norms
    root = S[:kept].sqrt()
    factors = (root[:, None] * V[:kept]).float(), (U[:, :kept] * root).float()
    return factors, float(S[kept:].square().sum()), float(S.square().sum())


def level_for(folders: Sequence[str | Path]) -> str:
    """Return "update", which keeps more of each adapter, or "tensors" if a method has no update."""
    configs = [Folder(adapter_in(folder)).config for folder in folders]
    whole = (
        is_plain(each) if is_lora(each) else not refusal(each, Capability.LORA_EXPORT)
        for each in configs
    )
    return "update" if all(whole) else "tensors"


def combine_adapters(
    folders: Sequence[str | Path],
    out: str | Path,
    method: str,
    *,
    level: str | None = None,
    rank: int | None = None,
    trust_remote_code: bool = False,
    other_base: bool = False,
    **settings: Any,
) -> float:
    """Write one adapter from several to the folder `out`.

    Args:
        folders: at least two adapter folders, or folders of runs.
        out: a new folder.
        method: of `combine`.
        level: "tensors": the stored tensors, of adapters of one method and size; "update": the
            updates of the layers, of any methods that `petl export --lora` takes. The result is a
            LoRA then. None: as `level_for`.
        rank: with level "update", the largest rank; None: as of `combined_updates`.
        trust_remote_code: with level "update", allow base models to run code of their own.
        other_base: combine adapters of different bases too; with level "update", also as of
            `petl.load`.
        settings: further arguments of `combine`.

    Returns:
        The fraction of the update's norm that `rank` loses; 0 for level "tensors".

    Raises:
        InputError: an argument is out of range, the adapters do not fit together, or `out` is
            taken.
    """
    if len(folders) < 2:
        raise InputError(f"combining needs at least two adapters, and got {len(folders)}")
    LEVELS.check("level", level, str | None)
    if not other_base and (other := of_another_base(folders)):
        raise InputError(
            f"{other} was trained on another base model than {folders[0]}: what it adds means "
            "nothing to the weights of that one; combine adapters of one base, or set "
            "other_base=True (--other-base) if the bases are meant to differ"
        )
    level = level or level_for(folders)
    if level == "tensors":
        if rank is not None:
            raise InputError(f"rank={rank} needs level='update': tensors keep their shapes")
        materials = [read(adapter_in(folder)) for folder in folders]
        state = combine_tensors(materials, method, **settings)
        write_state(materials[0], state, Path(out), {"petl_combined": method})
        return 0.0
    config, tensors, lost = combined_updates(
        [
            update_of(folder, trust_remote_code=trust_remote_code, other_base=other_base)
            for folder in folders
        ],
        method,
        rank=rank,
        **settings,
    )
    with new_folder(Path(out)) as draft:
        # labels, task and tokenizer are of the first adapter, as its head; its card is of a method
        copy_others(adapter_in(folders[0]), draft)
        (draft / CARD).unlink(missing_ok=True)
        save_lora(config, tensors, draft)
        # without what the first adapter's own tensors mean
        fingerprint.write(draft, Folder(draft).base)
    return lost
