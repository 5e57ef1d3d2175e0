"""Write an exported model to a folder, if its outputs equal those of the adapted model.

Everything is written to a draft first; the folder appears once all checks have passed.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import PeftConfig, PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from petl.core.compat import BaseTunerLayer
from petl.core.spec.facts import facts_of, modifies_base_weights
from petl.data.tasks.base import IGNORED
from petl.errors import RunStopped, UnsupportedError
from petl.system.files.disk import write_atomic
from petl.system.progress import ProgressItems

# by dtype of the base model, the largest relative difference of the outputs (assumption; measured
# differences of merged tiny models: below 1e-5 in float32, below 2e-2 in bfloat16)
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}

Outputs = Mapping[str, Tensor]  # of a model


@dataclass(frozen=True)
class Difference:
    """Difference between the outputs of two models.

    Attributes:
        relative: norm of the difference over the norm of the outputs.
        largest: largest absolute difference of a logit.
        same: fraction of the examples (of a language model: tokens) with the same highest logit.
        effect: as `relative`, between the adapted model and the model without its adapter layers
            (trained heads kept); `relative` has to be small compared with it.
        cosine: largest difference of the cosine of two examples, whose outputs are vectors; None:
            they are logits.
    """

    relative: float
    largest: float
    same: float
    effect: float
    cosine: float | None = None


@dataclass(frozen=True)
class Change:
    """What a changed adapter does, before its folder is written.

    Attributes:
        difference: of the outputs, on test rows.
        metric: the name of the score on held-out rows; "": there is no run to tell them.
        before, after: the score of the adapter, and of the changed one.
        lost: what the score loses; below 0 if it gains.
    """

    difference: Difference
    metric: str = ""
    before: float = math.nan
    after: float = math.nan
    lost: float = 0.0


@dataclass(frozen=True)
class OutputFolder:
    """A written folder, its size, and how the outputs of what it holds compare."""

    folder: Path
    difference: Difference

    @property
    def bytes(self) -> int:
        """The size of all files in the folder."""
        return folder_bytes(self.folder)


# Comparing


class BatchOutputs(list[Tensor]):
    """The outputs of batches in float32.

    Attributes:
        are_vectors: True if they are vectors of texts, not logits.
    """

    are_vectors = False


@torch.no_grad()
def outputs(
    model: Callable[..., Outputs], batches: Iterable[dict[str, Tensor]], of: str
) -> BatchOutputs:
    """Return the logits of each batch in float32, without padding: classes on the last axis.

    Of a model without head, the vectors of texts: its own, or the mean over the tokens.

    Args:
        of: which model, for the display of the progress.
    """
    found = BatchOutputs()
    for batch in ProgressItems(batches, f"outputs of {of}"):
        output = model(**batch)
        is_headless = "logits" not in output and "start_logits" not in output
        found.are_vectors = is_headless or "sentence_embedding" in output
        found.append(_logits(output, batch))
    return found


def _logits(output: Outputs, batch: dict[str, Tensor]) -> Tensor:
    if "sentence_embedding" in output:
        return output["sentence_embedding"].float()
    if "start_logits" in output:  # question answering: the classes are the tokens
        mask = batch["attention_mask"][:, None]
        return torch.stack([output["start_logits"], output["end_logits"]], 1).float() * mask
    if "logits" not in output:  # a model without head
        return mean_pooled(output["last_hidden_state"].float(), batch["attention_mask"])
    logits = output["logits"].float()
    if logits.dim() != 3:
        return logits
    # outputs at padding are undefined: kernels may compute anything there
    mask = batch["labels"] != IGNORED if "labels" in batch else batch["attention_mask"] == 1
    return logits[mask]


def mean_pooled(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """Return the mean over the tokens of each row, [B, H], from [B, T, H] and a mask [B, T]."""
    mask = attention_mask[..., None].to(hidden.dtype)
    return (hidden * mask).sum(1) / mask.sum(1)


def adapted_outputs(
    model: PeftModel, batches: list[dict[str, Tensor]]
) -> tuple[BatchOutputs, float]:
    """Return the logits of the adapted model, and the relative norm of the adapter's effect."""
    adapted = outputs(model, batches, "the adapted model")
    # adapters of PEFT and of petl derive from this class
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:  # `disable_adapter` would disable the trained head as well
        layer.enable_adapters(False)
    without = outputs(model, batches, "the model without adapter")
    for layer in layers:
        layer.enable_adapters(True)
    return adapted, _relative_distance(adapted, without)


def compare(expected: BatchOutputs, actual: BatchOutputs, effect: float) -> Difference:
    """Compare the outputs of two models; `effect` is that of `adapted_outputs`."""
    pairs = list(zip(expected, actual, strict=True))
    largest = max(float((e - a).abs().max()) for e, a in pairs)
    same = torch.cat([(e.argmax(-1) == a.argmax(-1)).flatten() for e, a in pairs])
    relative = _relative_distance(expected, actual)
    cosine = None
    if expected.are_vectors:
        one, other = (cosines(torch.cat(each)) for each in (expected, actual))
        cosine = float((one - other).abs().max())
    return Difference(relative, largest, float(same.float().mean()), effect, cosine)


def cosines(vectors: Tensor) -> Tensor:
    """The cosines of all pairs of vectors, [N, N] from [N, D]."""
    unit = F.normalize(vectors, dim=-1)
    return unit @ unit.T


def _relative_distance(expected: list[Tensor], actual: list[Tensor]) -> float:
    parts = [(e - a).norm() for e, a in zip(expected, actual, strict=True)]
    norm = torch.stack([e.norm() for e in expected]).norm()
    return float(torch.stack(parts).norm() / norm)


def check(difference: Difference, tolerance: float | None, dtype: torch.dtype, name: str) -> None:
    """Raise RunStopped if outputs differ by more than the tolerance, or are not finite.

    Args:
        tolerance: the largest `difference.relative`; None: by `dtype`, that of the base model.
        name: of the exported model, for the message.
    """
    allowed = TOLERANCE[dtype] if tolerance is None else tolerance
    if not difference.relative <= allowed:  # not `>`, which is False for nan
        raise RunStopped(
            f"the outputs of the {name} differ by {difference.relative:.2e} of their norm, more "
            f"than the tolerance of {allowed:.0e}, so nothing was written; the adapter itself "
            f"changes them by {difference.effect:.2e}"
        )


@dataclass(frozen=True)
class Reference:
    """Outputs of an adapted model, to compare those of the model that it is converted to.

    Attributes:
        batches: the inputs.
        outputs: as of the function `outputs`.
        effect: as of `Difference`.
        dtype: of the base model.
    """

    batches: list[dict[str, Tensor]]
    outputs: BatchOutputs
    effect: float
    dtype: torch.dtype

    @classmethod
    def of(cls, model: PeftModel, batches: list[dict[str, Tensor]]) -> "Reference":
        """Compute the outputs of an adapted model."""
        return cls(batches, *adapted_outputs(model, batches), model.dtype)

    def compare(
        self, model: Callable[..., Outputs], tolerance: float | None, name: str
    ) -> Difference:
        """Compare the outputs of another model, called `name` in the message, with these.

        Raises:
            RunStopped: they differ by more than `tolerance`; None: by the dtype of the base model.
        """
        difference = compare(self.outputs, outputs(model, self.batches, f"the {name}"), self.effect)
        check(difference, tolerance, self.dtype, name)
        return difference


def unwrap_trained(model: PeftModel, *, keep: bool) -> None:
    """Replace PEFT's wrappers of `modules_to_save` by the trained modules, or by the original ones.

    PEFT does so when it unloads, but not for every tuner, nor for heads of several layers.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            trained = module.modules_to_save[module.active_adapters[0]]
            model.set_submodule(name, trained if keep else module.original_module)


# Writing


def refuse_changed_base(folder: Path, config: PeftConfig) -> None:
    """Raise UnsupportedError for tensors that are not what training added to the base model."""
    if modifies_base_weights(config):
        start = facts_of(config).init_lora_weights
        raise UnsupportedError(
            f"{folder} has init_lora_weights={start!r}, which takes its start out of the base "
            "weights, so that its tensors alone are not what training changed: save it with "
            "path_initial_model_for_weight_conversion, or write a merged model with `petl merge`"
        )


def folder_bytes(folder: Path) -> int:
    """Return the size of all files in a folder, in bytes."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def save_model(model: PreTrainedModel, folder: Path) -> None:
    """Save a model as `save_pretrained` does, with its generation config as it is.

    transformers refuses to save one with values that have no effect, such as a temperature without
    sampling, which many published models have: petl has set its padding token, and only an
    unchanged one is excepted.
    """
    if not model.can_generate():
        model.save_pretrained(folder)
        return
    kept, model.generation_config = model.generation_config, GenerationConfig()
    model.save_pretrained(folder)
    model.generation_config = kept
    write_atomic(folder / GENERATION_CONFIG_NAME, kept.to_json_string())
