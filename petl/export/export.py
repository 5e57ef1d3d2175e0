"""Out of petl: an adapter merged into a plain model, or written as a plain LoRA.

Either result is compared with the adapted model before anything is put in its place.
"""

import logging
import shutil
import tempfile
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError
from torch import Tensor, nn

from petl.core.adapter_file import WEIGHTS
from petl.core.compat import BaseTunerLayer
from petl.core.refusals import is_lora, lora_refusal, merge_refusal
from petl.errors import InputError, RunStopped, UnsupportedError
from petl.export.lora import as_lora, save_lora
from petl.export.saved_adapter import Saved, device
from petl.models.loading import load_base
from petl.tasks.rows import IGNORED

logger = logging.getLogger(__name__)
# by dtype of the base, how much of the outputs' norm may differ
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Difference:
    """How far outputs are from those that they should equal.

    Attributes:
        relative: norm of the difference over the norm of the outputs.
        largest: the largest difference of one logit.
        same: share of the rows (tokens, of a language model) with the same highest logit.
        effect: the same as `relative`, between the adapted model and one without its adapter layers
            (trained heads kept): what `relative` has to be small against.
    """

    relative: float
    largest: float
    same: float
    effect: float


@dataclass(frozen=True)
class Written:
    """What was written where, and how it compares; None for a copy."""

    folder: Path
    bytes: int
    difference: Difference | None


# Merging


def merge(saved: Saved, out: Path, tolerance: float | None) -> Written:
    """Write the base model with the adapter merged into it: a folder that `AutoModel` reads.

    Args:
        tolerance: the largest `Difference.relative`; None: by the dtype of the base.

    Raises:
        InputError: `out` is taken, or the method cannot merge.
        RunStopped: the merged model's outputs differ by more than `tolerance`.
    """
    refuse_taken(out)
    refusal = merge_refusal(saved.config)
    if refusal:
        raise UnsupportedError(refusal)
    if saved.is_quantized:
        logger.warning("merging into the dense base model: in few bits, much of it would be lost")
        saved = saved.dense()
    model, batches = saved.model(), saved.batches()
    before, effect = adapted_outputs(model, batches)
    unwrap_trained(model, keep=True)
    merged: Any = model.merge_and_unload(safe_merge=True)
    after = outputs(merged, batches)
    difference = compare(before, after, effect)
    check(difference, tolerance, merged.dtype, "merged model")
    with folder_at(out) as draft:
        merged.save_pretrained(draft)
        saved.processor().save_pretrained(draft)
        del merged, model  # before the same model is read again
        again = load_base(saved.model_at(draft), saved.task).to(device())
        check(compare(after, outputs(again, batches), effect), 1e-6, again.dtype, "model read back")
    return Written(out, size(out), difference)


def unwrap_trained(model: PeftModel, *, keep: bool) -> None:
    """Take away PEFT's wrappers of `modules_to_save`: trained modules stay, or the original ones.

    PEFT would do so when it unloads, but not for every tuner, nor for heads of several layers.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            trained = module.modules_to_save[module.active_adapters[0]]
            model.set_submodule(name, trained if keep else module.original_module)


# A plain LoRA


def export_lora(saved: Saved, out: Path, tolerance: float | None) -> Written:
    """Write the adapter as a plain LoRA, which PEFT loads without petl.

    Args:
        tolerance: the largest `Difference.relative`; None: by the dtype of the base.

    Raises:
        InputError: `out` is taken, or the method is not a LoRA in other words.
        RunStopped: the outputs of the LoRA differ by more than `tolerance`.
    """
    refuse_taken(out)
    refusal = lora_refusal(saved.config)
    if refusal:
        raise UnsupportedError(refusal)
    if is_lora(saved.config):
        with folder_at(out) as draft:
            for name in ("adapter_config.json", WEIGHTS):
                shutil.copy(saved.adapter / name, draft / name)
        return Written(out, size(out), None)
    model, batches = saved.model(), saved.batches()
    before, effect = adapted_outputs(model, batches)
    config, tensors = as_lora(model)
    unwrap_trained(model, keep=False)
    base: Any = model.unload()
    with folder_at(out) as draft:
        save_lora(config, tensors, draft)
        lora = PeftModel.from_pretrained(base, str(draft)).eval()
        difference = compare(before, outputs(lora, batches), effect)
        check(difference, tolerance, base.dtype, "LoRA")
    return Written(out, size(out), difference)


# Comparing


@torch.no_grad()
def outputs(model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> list[Tensor]:
    """Logits of each batch, float32, those of padding set to 0, the choice on the last axis."""
    return [told(model(**batch), batch) for batch in batches]


def told(made: Any, batch: dict[str, Tensor]) -> Tensor:
    """The logits among a model's outputs."""
    if "start_logits" in made:  # a choice among the tokens
        mask = batch["attention_mask"][:, None]
        return torch.stack([made.start_logits, made.end_logits], 1).float() * mask
    logits = made.logits.float()
    if logits.dim() != 3:
        return logits
    mask = batch["labels"] != IGNORED if "labels" in batch else batch["attention_mask"]
    return logits * mask[..., None]


def adapted_outputs(
    model: PeftModel, batches: list[dict[str, Tensor]]
) -> tuple[list[Tensor], float]:
    """Logits of the adapted model, and the relative norm of what the adapter changes in them."""
    adapted = outputs(model, batches)
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:  # not `disable_adapter`, which takes the trained head away as well
        layer.enable_adapters(False)
    without = outputs(model, batches)
    for layer in layers:
        layer.enable_adapters(True)
    return adapted, _distance(adapted, without)


def compare(wanted: list[Tensor], found: list[Tensor], effect: float) -> Difference:
    pairs = list(zip(wanted, found, strict=True))
    largest = max(float((w - f).abs().max()) for w, f in pairs)
    same = torch.cat([(w.argmax(-1) == f.argmax(-1)).flatten() for w, f in pairs])
    return Difference(_distance(wanted, found), largest, float(same.float().mean()), effect)


def _distance(wanted: list[Tensor], found: list[Tensor]) -> float:
    parts = [(w - f).norm() for w, f in zip(wanted, found, strict=True)]
    whole = torch.stack([w.norm() for w in wanted]).norm()
    return float(torch.stack(parts).norm() / whole)


def check(difference: Difference, tolerance: float | None, dtype: torch.dtype, what: str) -> None:
    """Raise RunStopped if outputs differ by more than is allowed, or are not numbers."""
    allowed = TOLERANCE[dtype] if tolerance is None else tolerance
    if not difference.relative <= allowed:
        raise RunStopped(
            f"the outputs of the {what} differ by {difference.relative:.2e} of their norm, more "
            f"than the tolerance of {allowed:.0e}, so nothing was written; the adapter itself "
            f"changes them by {difference.effect:.2e}"
        )


# Writing


def refuse_taken(out: Path) -> None:
    """Raise InputError unless `out` is free: not there, or an empty folder."""
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists():
        raise InputError(f"{out} exists already; choose another folder")


@contextmanager
def folder_at(out: Path) -> Generator[Path]:
    """A folder to write to that becomes `out` at the end of the block, all of it or nothing."""
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".petl-", dir=out.absolute().parent) as place:
            draft = Path(place) / "draft"
            draft.mkdir()
            yield draft
            if out.is_dir():
                out.rmdir()
            draft.rename(out)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write {out}: {error}") from error


def size(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
