"""Adapter folders as states: compress one, expand it, prune it, combine several.

What `modules_to_save` holds (heads) are full weights, not deltas, and so are DoRA's magnitudes and
the like (`is_whole`): they are never changed. IA3's factors start at 1, all other tensors are taken
as differences from 0.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import CONFIG_NAME

from petl.adapters.deltas.combine import combine
from petl.adapters.deltas.compress import Setting, compress_each
from petl.adapters.deltas.prune import Q, prune
from petl.adapters.deltas.states import coded_names, names_without
from petl.adapters.export.checked_folder import refuse_changed_base
from petl.core.adapter_file import ROWS, WEIGHTS, is_whole, reference_of, starts_at_one, type_of
from petl.core.adapter_folder import Folder
from petl.core.fingerprint import MEANING, seal
from petl.core.spec.facts import facts_of
from petl.core.types import Fields
from petl.errors import InputError
from petl.ops.ternary import FILE, State, Ternary
from petl.system.files.disk import check_links, copy_file, write_atomic
from petl.system.files.outputs import new_folder
from petl.system.files.read import parse_yaml, read_text, with_shape
from petl.training.runs.card_code import BASE, front_matter

# what methods save that change weights in place
FULL_WEIGHTS = {
    "LN_TUNING": "full layer norms",
    "TRAINABLE_TOKENS": "full rows of the embedding",
    "PETL_PELA": "low-rank layers in place of the base's",
}
# of a compressed adapter, where these lost least (docs/results.md)
DENSITY, ALPHA, SCOPE = 0.5, "fit", "tensor"
CARD = "README.md"
FRONT_MATTER = re.compile(r"---\n(.*?)^---\n", re.DOTALL | re.MULTILINE)
RESULTS = ("metrics", "model-index")  # fields of a card with scores of the adapter


@dataclass(frozen=True)
class Material:
    """An adapter folder as a state.

    Attributes:
        folder: the folder.
        config: its config.
        state: its tensors, by name in the file.
        exclude: patterns of the names of full weights.
    """

    folder: Path
    config: PeftConfig
    state: dict[str, Tensor]
    exclude: tuple[str, ...]

    @property
    def reference(self) -> State | None:
        """What its tensors differ from; None: 0."""
        return reference_of(self.config, {n: tensor.shape for n, tensor in self.state.items()})


def read(folder: str | Path) -> Material:
    """Read an adapter folder.

    Raises:
        InputError: there is no adapter, a file is damaged, or its tensors are no deltas.
    """
    folder = Path(folder)
    saved = Folder(folder)
    config, state = saved.config, saved.tensors
    refuse_changed_base(folder, config)
    kind = type_of(config)
    if kind in FULL_WEIGHTS:
        raise InputError(
            f"{folder}: {kind} saves {FULL_WEIGHTS[kind]}, not what they changed, so that there is "
            "nothing to compress, prune or combine"
        )
    # uint8 in an adapter file: signs packed by the method binary
    codes = [name for name, tensor in state.items() if tensor.dtype == torch.uint8]
    if codes:
        raise InputError(
            f"{folder}: {codes[0]} holds packed codes, not numbers; train or save the adapter with "
            "method.save_format=latent"
        )
    heads = facts_of(config).modules_to_save or ()
    # a complete part of the dotted name, not "score" in "scorer"
    exclude = tuple(rf"(^|\.){re.escape(head)}(\.|$)" for head in heads)
    whole = "|".join(map(re.escape, filter(is_whole, state)))
    exclude += (f"^({whole})$",) if whole else ()
    return Material(folder, config, state, exclude)


def compress_adapter(
    folder: str | Path,
    out: str | Path,
    *,
    density: float = DENSITY,
    alpha: float | str = ALPHA,
    scope: str = SCOPE,
    exclude: Iterable[str] = (),
) -> Ternary:
    """Write the adapter in `folder` to the folder `out`, compressed; `petl.load` reads it.

    Args:
        folder: an adapter folder.
        out: a new folder.
        density: fraction of the entries kept; this and the other arguments as of `compress`,
            with other defaults.
        alpha: the magnitude of kept entries in standard deviations, or "fit".
        scope: "global" or "tensor".
        exclude: regular expressions of names that are not coded, in addition to trained heads.

    Raises:
        InputError: an argument is out of range, the adapter cannot be read, or `out` is taken.
    """
    material = read(folder)
    (found,) = compressed_each(material, [(density, alpha)], scope=scope, exclude=exclude)
    write_compressed(material, found, Path(out))
    return found


def compressed_each(
    material: Material,
    settings: Sequence[Setting],
    *,
    scope: str = "global",
    exclude: Iterable[str] = (),
) -> list[Ternary]:
    """Return an adapter compressed by several densities and alphas; as `compress_each`."""
    exclude = (*material.exclude, *exclude)
    reference = material.reference
    return compress_each(
        material.state, settings, scope=scope, exclude=exclude, reference=reference
    )


def write_compressed(material: Material, found: Ternary, out: Path) -> None:
    """Write a compressed adapter to a new folder, with the other files of its folder."""
    with new_folder(out) as draft:
        copy_others(material.folder, draft)
        found.save(draft / FILE)
        amend_card(draft / CARD, CHANGED, NOTE)


CHANGED = """## Changed

Made by petl compress, prune, combine, strength or narrow, without training: scores and sizes in
this card are those of the adapter before.
"""
NOTE = f"""## Compressed

The adapter is in `{FILE}`, compressed by [ComPEFT](https://arxiv.org/abs/2311.13171). petl loads it
as any other; `expand` makes a plain adapter folder of it, for PEFT alone:

```python
model = petl.load(base, FOLDER)
petl.deltas.expand(FOLDER, OUT)
```
"""


def expand(folder: str | Path, out: str | Path) -> None:
    """Write a compressed adapter to the folder `out` as a plain one, for PEFT alone.

    Raises:
        InputError: there is no compressed adapter, it is damaged, or `out` is taken.
    """
    folder, out = Path(folder), Path(out)
    saved = Folder(folder)
    _ = saved.ternary  # raises before anything is written
    with new_folder(out) as draft:
        copy_others(folder, draft)
        saved.copy_weights(draft)
        seal(draft)
        card = draft / CARD
        if card.is_file():
            write_atomic(card, f"{read_text(card).replace(NOTE, '').rstrip()}\n")


def copy_others(folder: Path, out: Path) -> None:
    """Copy the files of an adapter folder but its weights, and the config of a random base."""
    check_links(folder)
    # other subfolders hold no part of the adapter
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.name not in (WEIGHTS, FILE):
            copy_file(file, out / file.name)
    base = Path(BASE, CONFIG_NAME)
    if (folder / base).is_file():
        (out / BASE).mkdir(exist_ok=True)
        copy_file(folder / base, out / base)


def amend_card(card: Path, *notes: str) -> None:
    """Add notes to the card of a changed adapter, if it has one, and remove the Hub's scores.

    Raises:
        InputError: the metadata at its top cannot be read.
    """
    if not card.is_file():
        return
    text = read_text(card)
    head = FRONT_MATTER.match(text)
    if head:
        try:
            fields = with_shape(parse_yaml(head[1]), Fields)
        except ValueError as error:
            raise InputError(f"{card.name} has metadata that cannot be used: {error}") from error
        kept = {key: value for key, value in fields.items() if key not in RESULTS}
        text = front_matter(kept) + text[head.end() :]
    # an adapter that is changed twice needs each note once
    for note in notes:
        text = f"{text.replace(note, '').rstrip()}\n\n{note}"
    write_atomic(card, text)


def write_state(material: Material, state: State, out: Path, record: dict[str, str]) -> None:
    """Write an adapter of the same config with other tensors to a new folder.

    Args:
        record: what was done, by name of the metadata field.
    """
    # safetensors refuses views that are not contiguous
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    with new_folder(out) as draft:
        copy_others(material.folder, draft)
        amend_card(draft / CARD, CHANGED)
        save_file(tensors, draft / WEIGHTS, {"format": "pt", **record})
        seal(draft)


# Pruning


def pruned_names(material: Material, exclude: Iterable[str] = ()) -> list[str]:
    """Return the names of the tensors that pruning changes; `exclude` as of `prune`.

    Of LoRA-like adapters only B: A does not start at 0, and independent masks on both have a
    variance of (1 / (1 - p))^2 - 1 times the square of the update, where one has 1 / (1 - p) - 1.
    """
    free = coded_names(material.state, (*material.exclude, *exclude))
    # "." appended: LoRA of embeddings ends in lora_embedding_B, without a dot
    return [name for name in free if ".lora_B." in f"{name}."] or free


def prune_adapter(
    folder: str | Path,
    out: str | Path,
    drop: float,
    *,
    q: Q = None,
    seed: int = 0,
    exclude: Iterable[str] = (),
) -> dict[str, Tensor]:
    """Write the adapter in `folder` to the folder `out`, pruned at random (DARE).

    Args:
        folder: an adapter folder.
        out: a new folder.
        drop: fraction of the entries set to 0; this and the other arguments as of `prune`.
        q: divisor of the others; None: 1 - drop.
        seed: of the masks.
        exclude: regular expressions of names that are kept, in addition to trained heads.

    Returns:
        The pruned tensors.

    Raises:
        InputError: an argument is out of range, the adapter cannot be read, or `out` is taken.
    """
    material = read(folder)
    state = pruned(material, drop, q=q, seed=seed, exclude=exclude)
    write_pruned(material, state, Path(out), drop=drop, q=q, seed=seed)
    return state


def pruned(
    material: Material,
    drop: float,
    *,
    q: Q = None,
    seed: int = 0,
    exclude: Iterable[str] = (),
) -> dict[str, Tensor]:
    """Return the pruned state of an adapter."""
    chosen, reference = pruned_names(material, exclude), material.reference
    # what has no effect: masks drop differences from it
    start = {name: 0.0 if reference is None else reference[name] for name in chosen}
    delta = {name: material.state[name] - start[name] for name in chosen}
    found = prune(delta, drop, q=q, seed=seed)
    # the difference from a float32 reference is wider than the tensor
    changed = {n: (found[n] + start[n]).to(material.state[n].dtype) for n in chosen}
    return {**material.state, **changed}


def count_kept(material: Material, state: State, names: Iterable[str]) -> int:
    """Return the number of values that differ from what has no effect: 0, or 1 of IA3."""
    start = 1 if starts_at_one(material.config) else 0
    return sum(int((state[name] != start).sum()) for name in names)


def write_pruned(material: Material, state: State, out: Path, **settings: object) -> None:
    """Write a pruned adapter; its metadata `petl_pruned` holds drop, q and seed."""
    write_state(material, state, out, {"petl_pruned": json.dumps(settings)})


# Combining


def combine_tensors(
    materials: Sequence[Material], method: str, *, exclude: Iterable[str] = (), **settings: Any
) -> dict[str, Tensor]:
    """Return the combined state of adapters of one method and size; `settings` as of `combine`.

    Raises:
        InputError: the adapters do not fit together.
    """
    first = materials[0]
    for other in materials[1:]:
        for key in ("peft_type", *MEANING):
            one, two = (
                type_of(m.config) if key == "peft_type" else getattr(m.config, key, None)
                for m in (first, other)
            )
            if one != two:
                raise InputError(
                    f"{first.folder} has {key}={one!r} and {other.folder} {two!r}: tensors of "
                    "other methods or scales cannot be combined; use --level update"
                )
        rows = [{n for n in m.state if n.endswith(ROWS)} for m in (first, other)]
        for name in names_without(rows[0] | rows[1], exclude):
            own = [m.state.get(name) for m in (first, other)]
            if own[0] is None or own[1] is None or not torch.equal(own[0], own[1]):
                raise InputError(
                    f"{first.folder} and {other.folder} have other trained rows of tokens, which "
                    "are full weights, of which there is no sum: --exclude trainable_tokens takes "
                    "those of the first"
                )
    # a head of any adapter is excluded in all
    excluded = {pattern for material in materials for pattern in material.exclude}
    return combine(
        [material.state for material in materials],
        method,
        reference=first.reference,
        exclude=(*sorted(excluded), *exclude),
        **settings,
    )
