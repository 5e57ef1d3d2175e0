"""The fingerprint of a base model: a digest of each of its tensors, saved next to an adapter.

An adapter loads onto any base model of the same shapes, and computes nonsense on all but the one
that it was trained on. Their digests tell the two apart without the base model's files or a hub:

- The digest of a tensor is of its shape and a sample of its values at fixed places, read from the
  device at once. It is the same in every process, on every device and for tied weights.
- Values are rounded to bfloat16, so a model in float32 equals itself in bfloat16. Digests of
  float16 tensors compare only with one another: rounding to both types is not rounding to one.
- Tensors that are not complete and plain in this process have no digest: those that are quantized,
  sharded, offloaded or on the meta device. Of a quantized model that leaves embeddings, norms,
  biases and heads, which compare with those of the same model before quantization.
- Left out are buffers, and what the adapter saves itself, such as a head with random initial
  values. Tensors that only one of two models has do not count as a difference.

It is a guard against mistakes: a change of a few values may fall between the sampled ones, and
whoever can write to the adapter's folder can change it. The file also has a digest of the adapter's
own file of tensors, so that one that a disk or another program changed is refused.

The scale of an adapter is not in its tensors but in its config, which is read with defaults for
what it lacks. So beside the digests the file has the values of the config that say what the tensors
mean, and for a LoRA the rank, scale and variant of each layer as they were in the model. A config
that says something else is refused.
"""

import hashlib
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch
from peft import PeftConfig, PeftModel, PeftType
from torch import Tensor, nn

from petl.core.adapter_file import PREFIX, ROWS, WEIGHTS
from petl.core.compat import (
    PACKAGE,
    BaseTunerLayer,
    LoraLayer,
    ModulesToSaveWrapper,
    extend_method,
    saved_folders,
)
from petl.core.layers.class_swap import AdapterDict
from petl.core.layers.wrappers import without_fsdp1
from petl.core.spec.checks import pattern_value
from petl.core.spec.facts import facts_of
from petl.core.types import Fields, Record
from petl.errors import InputError
from petl.system.files.disk import as_json, follow_umask, sha256, write_atomic
from petl.system.files.read import parse_json, read_json, read_text
from petl.system.files.tensor_file import read_shapes
from petl.version import __version__

FILE, CARD = "base_fingerprint.json", "README.md"
KNOWN = "petl_base"  # attribute of a PeftModel
SIGNATURE = f"""## Load it

Saved by {PACKAGE} {__version__}. `pip install {PACKAGE}`, then:

```python
import petl

model = petl.load(base, FOLDER)
```
"""
VERSION = 2  # 1: without layers and settings
SAMPLES = 512  # per tensor, at least, and fewer than twice as many
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# fields of configs that say what tensors mean: equal ones with another value are another update
MEANING = ("r", "lora_alpha", "alpha", "rank_pattern", "alpha_pattern", "use_rslora", "scaling")
MEANING += ("randlora_alpha", "psoft_alpha", "shadow_alpha", "regularization_alpha")
MEANING += ("use_dora", "bias")  # their complete weights are not compared
# of what FourierFT, VeRA, TinyLoRA and Uni-LoRA do not save
MEANING += ("random_loc_seed", "projection_prng_key", "projection_seed", "proj_seed")
# of bottlenecks, experts, vector banks, PST, SHERL, ICV, and the orthogonal methods OFT and HRA
MEANING += ("non_linearity", "act_fn", "placement", "top_k", "topk", "beta", "gate_temperature")
MEANING += ("strength", "scale", "mode", "keep_norm")
MEANING += ("coft", "use_cayley_neumann", "num_cayley_neumann_terms", "apply_GS")
Fingerprint = Mapping[str, str]  # digest by name of the tensor; empty: unknown
logger = logging.getLogger(__name__)


@torch.no_grad()
def fingerprint(model: nn.Module) -> dict[str, str]:
    """Return the digest of each parameter of `model`, a model without adapters, by name.

    At most 1,023 values of a tensor are read, with one synchronization per device and dtype.
    """
    groups: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = defaultdict(dict)
    for name, parameter in model.named_parameters():
        # quantized, sharded and fake tensors are of other classes
        is_plain = type(parameter) is nn.Parameter and parameter.dtype in DTYPES
        # DeepSpeed's ZeRO-3 leaves empty tensors in place of sharded ones
        if is_plain and not parameter.is_meta and parameter.numel():
            groups[parameter.device, parameter.dtype][name] = parameter
    digests: dict[str, str] = {}
    for (_, dtype), tensors in groups.items():
        samples = [_sample(tensor) for tensor in tensors.values()]
        # NaN has many encodings, and conversion chooses another one on each type of processor
        values = torch.cat(samples).cpu().nan_to_num(0.0, math.inf, -math.inf)
        is_half = dtype == torch.float16
        codes = (values if is_half else values.to(torch.bfloat16)).view(torch.int16)
        parts = codes.split([len(sample) for sample in samples])
        for (name, tensor), part in zip(tensors.items(), parts, strict=True):
            content = str(tuple(tensor.shape)).encode() + part.numpy().tobytes()
            digest = hashlib.blake2b(content, digest_size=4).hexdigest()
            digests[name] = f"float16:{digest}" if is_half else digest
    return digests


def _sample(tensor: Tensor) -> Tensor:
    """Return values of a tensor at a fixed distance from one another, 1-D."""
    # odd, or all values would be of one column where a row has a power of two
    distance = (tensor.numel() // SAMPLES) | 1
    if tensor.is_contiguous():
        return tensor.view(-1)[::distance]
    places = torch.arange(0, tensor.numel(), distance, device=tensor.device)
    return tensor[torch.unravel_index(places, tensor.shape)]  # flattening would copy it


def difference(trained_on: Fingerprint, present: Fingerprint, saved: Iterable[str] = ()) -> str:
    """Return in words how a base model differs from the one of an adapter; "" if it does not.

    Args:
        trained_on: the fingerprint saved with the adapter.
        present: that of the base model in use.
        saved: names of the tensors in the adapter's file, which replace those of the base model.
    """
    names = [name.removeprefix(PREFIX) for name in saved]
    replaced = {name.replace(".base_layer.", ".") for name in names}
    # of a table, rows of tokens are, and more of them give it another size
    replaced |= {f"{name.removesuffix(ROWS)}.weight" for name in names if name.endswith(ROWS)}
    compared = [
        name
        for name in sorted((trained_on.keys() & present.keys()) - replaced)
        if trained_on[name].rpartition(":")[0] == present[name].rpartition(":")[0]
    ]
    others = [name for name in compared if trained_on[name] != present[name]]
    if not others:
        return ""
    return (
        "the base model's weights differ from those that the adapter was trained on: "
        f"{len(others)} of {len(compared)} tensors, such as {others[0]}"
    )


def check_base(
    trained_on: Fingerprint,
    present: Fingerprint,
    saved: Iterable[str],
    *,
    other_base: bool,
    action: str,
    insist: str,
) -> None:
    """Refuse a base model that differs from the one of an adapter.

    Args:
        trained_on, present, saved: as of `difference`.
        other_base: warn in place of refusing it.
        action: what would be done, for the message.
        insist: how to do it nevertheless, for the message.

    Raises:
        InputError: it differs and is not allowed, or `other_base` is neither True nor False.
    """
    if not isinstance(other_base, bool):
        raise InputError(
            f"other_base={other_base!r} is neither True, which allows another base model than that "
            "of the adapter, nor False"
        )
    differs = difference(trained_on, present, saved)
    if differs and not other_base:
        raise InputError(f"{action}: {differs}; use that base model, or insist with {insist}")
    if differs:
        logger.warning("%s: %s; its outputs may be wrong", action, differs)


def check_saved(
    model: PeftModel, folder: Path, *, other_base: bool, action: str, insist: str
) -> None:
    """Call `check_base` for a wrapped model and an adapter that is to be loaded into it.

    Args:
        folder: of the saved adapter.
    """
    file = folder / WEIGHTS
    check_base(
        read(folder / FILE),
        known_fingerprint(model),
        read_shapes(file) if file.is_file() else (),  # PEFT may have saved a pickle
        other_base=other_base,
        action=action,
        insist=insist,
    )


def quantized_then(model: PeftModel, trained_on: Fingerprint) -> bool:
    """Return True if the adapted weights are dense, and had no digest when the adapter trained.

    Then they were quantized, sharded or offloaded, and nothing tells whether they are the same.
    """
    if not trained_on or facts_of(model.active_peft_config).replaces_head:
        return False
    modules = model.get_base_model().named_modules()
    adapted = {f"{name}.weight" for name, m in modules if isinstance(m, BaseTunerLayer)}
    adapted &= known_fingerprint(model).keys()
    return bool(adapted) and adapted.isdisjoint(trained_on)


# What the tensors mean


class LayerUpdate(TypedDict):
    """The update of a LoRA's layer: its rank, its scale, and "lora" or "dora"."""

    rank: int
    scale: float
    variant: str


def settings_of(config: PeftConfig) -> Record:
    """Return the values of a config that say what an adapter's tensors mean, as JSON.

    They are those that are saved: CorDA is saved as a LoRA of twice the rank.
    """
    saved = config.to_dict()
    return parse_json(as_json({name: saved[name] for name in MEANING if name in saved}))


def layers_of(model: PeftModel, adapter_name: str) -> dict[str, LayerUpdate]:
    """Return the layers of a LoRA as they are in a model, by path in the base; others: none."""
    if model.peft_config[adapter_name].peft_type != PeftType.LORA:
        return {}
    variant = variant_of(model.peft_config[adapter_name])
    return {
        path: {"rank": layer.r[adapter_name], "scale": scale, "variant": variant}
        for module, outer in _outside_adapters(model.get_base_model())
        for path, layer in _layers_around(module, outer)
        if adapter_name in layer.r
        for scale in [float(layer.scaling[adapter_name])]
    }


def _layers_around(path: str, layer: object) -> Iterator[tuple[str, LoraLayer]]:
    """Yield the LoRA layers of a module: one, or one for each adapted parameter, by its name."""
    while isinstance(layer, LoraLayer):
        name = getattr(layer, "parameter_name", "")
        yield (f"{path}.{name}" if name else path), layer
        layer = layer.base_layer if name else None


def variant_of(config: PeftConfig) -> str:
    """Return which LoRA a config is of, as far as its layers compute otherwise."""
    return "dora" if facts_of(config).use_dora else "lora"


def layer_in(config: Any, path: str) -> LayerUpdate:
    """Return what the config of a LoRA says about the layer at `path` in the base model."""
    rank = pattern_value(config.rank_pattern, path, config.r)
    alpha = pattern_value(config.alpha_pattern, path, config.lora_alpha)
    scale = alpha / (math.sqrt(rank) if config.use_rslora else rank)
    return {"rank": rank, "scale": scale, "variant": variant_of(config)}


def check_meaning(file: Path | None, config: PeftConfig, path: str | Path) -> None:
    """Raise InputError if an adapter's config says something else than when it was saved.

    Args:
        file: as of `read`.
        config: of the adapter in `path`.
    """
    content = _content(file)
    now = settings_of(config)
    changed = [
        f"{name}={now[name]!r}, not {value!r}"
        for name, value in content.get("settings", {}).items()
        if name in now and now[name] != value
    ]
    for layer, value in content.get("layers", {}).items():
        is_now = layer_in(config, layer)
        if not math.isclose(is_now["scale"], value["scale"], rel_tol=1e-6):
            changed.append(f"a scale of {is_now['scale']:g}, not {value['scale']:g}, on {layer}")
        elif is_now != {**value, "scale": is_now["scale"]}:
            changed.append(f"{is_now} in place of {value} on {layer}")
    if changed:
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise InputError(
            f"the config in {str(path)!r} is not that of its tensors: it has {changed[0]}{more}; "
            f"restore it, or delete {FILE} if the change is meant"
        )


# The file


class Content(TypedDict):
    """The content of the file."""

    version: int
    tensors: dict[str, str]
    settings: NotRequired[Fields]
    layers: NotRequired[dict[str, LayerUpdate]]
    weights: NotRequired[str]  # SHA-256 of adapter_model.safetensors


def write(
    folder: Path,
    digests: Fingerprint,
    settings: Mapping[str, object] | None = None,
    layers: Mapping[str, LayerUpdate] | None = None,
) -> None:
    """Write a fingerprint into an adapter's folder, in place of an earlier one; none if empty.

    Args:
        settings, layers: as of `settings_of` and `layers_of`; None where a config has been changed
            with its tensors.
    """
    meaning = {"settings": settings or {}, "layers": layers or {}}
    content = {"version": VERSION, "tensors": dict(digests), **meaning}
    if any((digests, settings, layers)):
        write_atomic(folder / FILE, as_json(content))
        seal(folder)
    else:
        (folder / FILE).unlink(missing_ok=True)


def seal(folder: Path) -> None:
    """Note in an adapter's fingerprint, if it has one, the digest of its tensors as they are now.

    A compressed file has its own.
    """
    if (folder / FILE).is_file():
        content: dict[str, object] = {**_content(folder / FILE)}
        # of an earlier file, which may be gone
        content.pop("weights", None)
        if (folder / WEIGHTS).is_file():
            content["weights"] = sha256(folder / WEIGHTS)
        write_atomic(folder / FILE, as_json(content))


def check_sealed(tensors: Path, file: Path | None) -> None:
    """Check that a file of tensors is the one that was saved, if the fingerprint `file` tells.

    Raises:
        InputError: it is another one.
    """
    known = _content(file).get("weights")
    if known is not None and known != sha256(tensors):
        raise InputError(
            f"{tensors} is not the file that was saved there: damaged, or changed by another "
            f"program; restore it, or delete {FILE} to use it as it is"
        )


def read(file: Path | None) -> Fingerprint:
    """Return the fingerprint in a file beside an adapter; empty if there is none.

    Raises:
        InputError: the file has other content.
    """
    return _content(file)["tensors"]


def _content(file: Path | None) -> Content:
    empty: Content = {"version": VERSION, "tensors": {}}
    if file is None or not file.is_file():
        return empty
    try:
        content: Content = read_json(file, Content)
    except InputError as error:
        raise InputError(
            f"{error}; delete it to load the adapter without comparing base models"
        ) from error
    if content["version"] > VERSION:
        logger.warning("%s is of a later version of petl: base models are not compared", file)
        return empty
    return content


# Models that know the fingerprint of their base


@dataclass
class Base:
    """What a PeftModel knows of its base model, in its attribute `petl_base`.

    Attributes:
        digests: the fingerprint of the base model, before an adapter changed its weights.
        others: by name, config and fingerprint of adapters that were loaded and do not train. A
            later adapter of the same name has another config.
    """

    digests: Fingerprint
    others: dict[str, tuple[PeftConfig, Fingerprint]] = field(default_factory=dict)


def _save(original: Callable[..., None], model: PeftModel, *args: object, **kwargs: object) -> None:
    """Save adapters as `PeftModel.save_pretrained` does, those of petl with its files."""
    with without_fsdp1(model, kwargs.get("state_dict")):
        original(model, *args, **kwargs)
        if KNOWN in vars(model):
            _save_files(model, *saved_folders(model, args, kwargs))


def _save_files(model: PeftModel, folders: Mapping[str, Path], converted: bool) -> None:
    """Write petl's files beside those of PEFT."""
    for name, folder in folders.items():
        # a conversion writes another config than that of the model
        settings = {} if converted else settings_of(model.peft_config[name])
        layers = {} if converted else layers_of(model, name)
        write(folder, _fingerprint_for(model, name), settings, layers)
        sign_card(folder)
        follow_umask(folder / WEIGHTS)


extend_method(PeftModel, "save_pretrained", _save)


def sign_card(folder: Path) -> None:
    """Add to an adapter's card which package saved it, unless it names the package already."""
    card = folder / CARD
    text = read_text(card) if card.is_file() else ""
    if PACKAGE not in text:
        write_atomic(card, f"{text.rstrip()}\n\n{SIGNATURE}".lstrip())


def _fingerprint_for(model: PeftModel, adapter_name: str) -> Fingerprint:
    """Return the fingerprint to save with an adapter, without modules that it has itself.

    A replaced head often has new random weights in each process.
    """
    base: Base = vars(model)[KNOWN]
    config = model.peft_config[adapter_name]
    of_other, digests = base.others.get(adapter_name, (None, base.digests))
    if of_other is not config:
        digests = base.digests
    is_head = facts_of(config).replaces_head
    saved = tuple(
        f"{path}."
        for path, module in _outside_adapters(model.get_base_model())
        if (isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save)
        or (is_head and isinstance(module, BaseTunerLayer))
    )
    return {name: digest for name, digest in digests.items() if not name.startswith(saved)}


def _outside_adapters(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of a model with their paths, without those of its adapters, idle or not."""
    yield path, module
    for name, child in module.named_children():
        if not isinstance(child, AdapterDict):
            yield from _outside_adapters(child, f"{path}.{name}" if path else name)


def known_fingerprint(model: nn.Module) -> Fingerprint:
    """Return the fingerprint of the base model of a PeftModel, or of a model without adapters."""
    if KNOWN in vars(model):
        return vars(model)[KNOWN].digests
    return {} if isinstance(model, PeftModel) else fingerprint(model)


def remember_base(
    model: PeftModel, digests: Fingerprint, trained_on: Mapping[str, Fingerprint] | None = None
) -> None:
    """Make a PeftModel save fingerprints with its adapters.

    Args:
        digests: the fingerprint of its base model.
        trained_on: by name, the saved fingerprints of adapters that do not train on it.
    """
    base: Base = vars(model).setdefault(KNOWN, Base(digests))
    for name, each in (trained_on or {}).items():
        base.others[name] = model.peft_config[name], each
