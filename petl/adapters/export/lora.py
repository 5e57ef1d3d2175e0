"""Export adapters whose update is one matrix per layer as a plain LoRA, which PEFT alone loads."""

from pathlib import Path

from petl.adapters.export.card import write_companions
from petl.adapters.export.checked_folder import OutputFolder
from petl.adapters.export.conversion import write_lora
from petl.adapters.export.saved_adapter import SavedAdapter
from petl.core.adapter_folder import Folder
from petl.core.refusals import is_lora
from petl.system.files.outputs import check_output, new_folder

NOTE = "A plain LoRA that `petl export --lora` made of the adapter, with the same outputs."


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
