"""Export adapters whose update is one matrix per layer as a plain LoRA, which PEFT alone loads."""

from pathlib import Path

from petl.adapters.export.card import write_companions
from petl.adapters.export.checked_folder import OutputFolder, Reference, unwrap_trained
from petl.adapters.export.conversion import in_one_scale, ranked_config, save_lora, write_lora
from petl.adapters.export.experts import fold, places_of, split_experts
from petl.adapters.export.saved_adapter import SavedAdapter
from petl.core import fingerprint
from petl.core.adapter_file import PREFIX, trained_modules
from petl.core.adapter_folder import Folder
from petl.core.refusals import is_lora
from petl.core.spec.facts import facts_of
from petl.errors import UnsupportedError
from petl.system.files.outputs import check_output, new_folder

NOTE = "A plain LoRA that `petl export --lora` made of the adapter, with the same outputs."
SPLIT = "A LoRA for vLLM, in which each expert has layers of its own; PEFT loads the original."


def export_lora(saved: SavedAdapter, out: Path, tolerance: float | None) -> OutputFolder:
    """Write a saved adapter as a plain LoRA.

    Args:
        tolerance: the largest `Difference.relative`; None: by the dtype of the base model.

    Raises:
        InputError: `out` is taken, the update of the method is not a matrix per layer, or
            the base is another one.
        RunStopped: the outputs of the LoRA differ by more than `tolerance`.
    """
    check_output(out)
    with new_folder(out) as draft:
        lora, adapted = write_lora(saved, draft)
        difference = adapted.compare(lora, tolerance, "LoRA")
        # a LoRA is copied as it is, so there is nothing to say
        note = "" if is_lora(saved.config) else NOTE
        write_companions(saved, draft, Folder(draft).config, note=note)
    return OutputFolder(out, difference)


def export_for_vllm(saved: SavedAdapter, out: Path, tolerance: float | None) -> OutputFolder:
    """Write a saved LoRA as vLLM reads it, if it adapts experts; others as `export_lora` does.

    Args:
        tolerance: as of `export_lora`.

    Raises:
        InputError: as of `export_lora`.
        UnsupportedError: not all stacks are adapted, or ranks differ more than vLLM takes.
        RunStopped: the outputs of the base with the LoRA folded into it differ by more.
    """
    if not facts_of(saved.config).target_parameters:
        return export_lora(saved, out, tolerance)
    check_output(out)
    # folded into it, which quantized weights do not allow
    saved = saved.dense() if saved.is_quantized else saved
    model = saved.model()
    factors = split_experts(model)
    if factors is None:
        return export_lora(saved, out, tolerance)
    ranks = {path: len(each.A) for path, each in factors.items()}
    config = ranked_config(
        saved.config,
        ranks,
        {path: each.scale * len(each.A) for path, each in factors.items()},
        target_modules=sorted({path.rpartition(".")[2] for path in factors}),
    )
    tensors = {
        f"{PREFIX}{path}.lora_{side}.weight": tensor.detach().contiguous().cpu()
        for path, each in factors.items()
        for side, tensor in (("A", each.A), ("B", each.B))
    }
    single = in_one_scale(config, tensors)
    if single is None and (config.rank_pattern or config.alpha_pattern):
        raise UnsupportedError(
            f"the layers of the adapter have ranks from {min(ranks.values())} to "
            f"{max(ranks.values())}, and vLLM takes one for all: export it for PEFT, or merge it"
        )
    config, tensors = single or (config, tensors)
    adapted = Reference.of(model, saved.batches())
    heads, at = trained_modules(model, "default"), places_of(model)
    unwrap_trained(model, keep=True)
    base = model.unload()
    fold(tensors, config.lora_alpha / config.r, at)
    with new_folder(out) as draft:
        difference = adapted.compare(base, tolerance, "LoRA")
        save_lora(config, tensors | heads, draft)
        fingerprint.write(draft, saved.folder.base)
        write_companions(saved, draft, Folder(draft).config, note=SPLIT)
    return OutputFolder(out, difference)
