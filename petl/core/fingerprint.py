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
whoever can write to the adapter's folder can change it.
"""

import hashlib
import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypedDict

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftModel
from torch import Tensor, nn

from petl.core.adapter_file import PREFIX, WEIGHTS
from petl.core.compat import BaseTunerLayer, ModulesToSaveWrapper
from petl.core.layers.class_swap import AdapterDict, SwappedClass, swap_class
from petl.errors import InputError
from petl.system.files.disk import as_json, write_atomic
from petl.system.files.read import read_json
from petl.system.files.tensor_file import read_shapes

FILE = "base_fingerprint.json"
CHOICES = ("warn", "refuse", "allow")  # what may be done about another base model
VERSION = 1  # of the way digests are computed
SAMPLES = 512  # per tensor, at least, and fewer than twice as many
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Fingerprint = Mapping[str, str]  # digest by name of the tensor; empty: unknown
logger = logging.getLogger(__name__)


@torch.no_grad()
def fingerprint(model: nn.Module) -> dict[str, str]:
    """Return the digest of each parameter of `model`, a model without adapters, by name.

    At most 1,023 values of a tensor are read, with one synchronization per device and dtype.
    """
    groups: dict[Any, dict[str, Tensor]] = defaultdict(dict)
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
    replaced = {name.removeprefix(PREFIX).replace(".base_layer.", ".") for name in saved}
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
    other_base: str,
    action: str,
    insist: str,
) -> None:
    """Warn, refuse or do nothing if a base model differs from the one of an adapter.

    Args:
        trained_on, present, saved: as of `difference`.
        other_base: one of `CHOICES`.
        action: what would be done, for the message.
        insist: how to do it nevertheless, for the message.

    Raises:
        InputError: it differs and `other_base` is "refuse", or is none of `CHOICES`.
    """
    if other_base not in CHOICES:
        raise InputError(f"other_base={other_base!r} is not one of {', '.join(CHOICES)}")
    differs = "" if other_base == "allow" else difference(trained_on, present, saved)
    if differs and other_base == "refuse":
        raise InputError(f"{action}: {differs}; use that base model, or insist with {insist}")
    if differs:
        logger.warning("%s: %s; its outputs may be wrong", action, differs)


def check_saved(
    model: PeftModel, folder: Path, *, other_base: str, action: str, insist: str
) -> None:
    """Call `check_base` for a wrapped model and an adapter that is to be loaded into it.

    Args:
        folder: of the saved adapter.
    """
    file = folder / WEIGHTS
    check_base(
        read(folder),
        known_fingerprint(model),
        read_shapes(file) if file.is_file() else (),  # PEFT may have saved a pickle
        other_base=other_base,
        action=action,
        insist=insist,
    )


# The file


class Content(TypedDict):
    """The content of the file."""

    version: int
    tensors: dict[str, str]


def write(folder: Path, digests: Fingerprint) -> None:
    """Write a fingerprint into an adapter's folder, in place of an earlier one; none if empty."""
    if digests:
        write_atomic(folder / FILE, as_json({"version": VERSION, "tensors": dict(digests)}))
    else:
        (folder / FILE).unlink(missing_ok=True)


def read(path: str | Path, **where: Any) -> Fingerprint:
    """Return the fingerprint saved with the adapter in `path`; empty if there is none.

    Args:
        path: folder or hub repository.
        where: arguments of `petl.core.adapter_folder.ON_THE_HUB`.

    Raises:
        InputError: the file has other content.
    """
    file = Path(path) / (where.get("subfolder") or "") / FILE
    if not Path(path).is_dir():
        try:
            file = Path(hf_hub_download(str(path), FILE, **where))
        except EntryNotFoundError:  # adapters of PEFT, or of petl 0.1
            return {}
    if not file.is_file():
        return {}
    try:
        content: Content = read_json(file, Content)
    except InputError as error:
        raise InputError(
            f"{error}; delete it to load the adapter without comparing base models"
        ) from error
    if content["version"] != VERSION:
        logger.warning("%s is of another version of petl: base models are not compared", file)
        return {}
    return content["tensors"]


# Models that know the fingerprint of their base


class FingerprintedModel(SwappedClass, PeftModel):
    """Mixin for the class of a PeftModel that saves its base model's fingerprint with adapters.

    Attributes:
        base_fingerprint: of the base model, before an adapter changed its weights.
        adapter_fingerprints: by name, those of adapters that were loaded and do not train.
    """

    base_fingerprint: Fingerprint
    adapter_fingerprints: dict[str, Fingerprint]

    def save_pretrained(
        self,
        save_directory: str,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Save adapters as `PeftModel.save_pretrained` does, each with a fingerprint."""
        super().save_pretrained(
            save_directory,
            safe_serialization,
            selected_adapters,
            save_embedding_layers,
            is_main_process,
            path_initial_model_for_weight_conversion,
            **kwargs,
        )
        if not is_main_process:
            return
        for name in selected_adapters or self.peft_config:
            # where PEFT saves them
            folder = Path(save_directory) / ("" if name == "default" else name)
            write(folder, self._fingerprint_for(name))

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; another one may get its name."""
        super().delete_adapter(adapter_name)
        self.adapter_fingerprints.pop(adapter_name, None)

    def _fingerprint_for(self, adapter_name: str) -> Fingerprint:
        """Return the fingerprint to save with an adapter, without modules that it has itself.

        A replaced head often has new random weights in each process.
        """
        digests = self.adapter_fingerprints.get(adapter_name, self.base_fingerprint)
        is_head = getattr(self.peft_config[adapter_name], "replaces_head", False)
        saved = tuple(
            f"{path}."
            for path, module in _outside_adapters(self.get_base_model())
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
    if isinstance(model, FingerprintedModel):
        return model.base_fingerprint
    return {} if isinstance(model, PeftModel) else fingerprint(model)


def remember_base(
    model: PeftModel, digests: Fingerprint, trained_on: Mapping[str, Fingerprint] | None = None
) -> None:
    """Make a PeftModel save fingerprints with its adapters.

    Args:
        digests: the fingerprint of its base model.
        trained_on: by name, the saved fingerprints of adapters that do not train on it.
    """
    if not isinstance(model, FingerprintedModel):
        swap_class(model, FingerprintedModel)
        fingerprinted: Any = model
        fingerprinted.base_fingerprint, fingerprinted.adapter_fingerprints = digests, {}
    model.adapter_fingerprints.update(trained_on or {})
