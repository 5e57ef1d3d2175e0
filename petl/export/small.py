"""Write the plain small model that PELA's adapter makes of its base model."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig

from petl.core.progress import Pass
from petl.errors import UnsupportedError
from petl.export.card import write_companions
from petl.export.checked_folder import (
    Reference,
    Written,
    draft_of,
    folder_bytes,
    refuse_taken,
)
from petl.export.merge import save_model
from petl.export.saved_adapter import Saved, device
from petl.methods.pela import PelaConfig, export, load
from petl.methods.pela.export import write_ranks

USE = "load it by petl.methods.pela.load(AutoConfig.from_pretrained('{out}'), '{out}')"


def export_small(
    saved: Saved, out: Path, tolerance: float | None, *, other_base: str = "refuse"
) -> Written:
    """Write the small model, with its ranks in ranks.json, config and processor.

    Args:
        tolerance: the largest `Difference.relative`; None: by the dtype of the base model.
        other_base: as of `petl.load`.

    Raises:
        InputError: `out` is taken, the adapter is not PELA's, or `other_base` refuses the base.
        RunStopped: the small model's outputs differ by more than `tolerance`.
    """
    refuse_taken(out)
    if not isinstance(saved.config, PelaConfig):
        raise UnsupportedError(
            f"petl export --small is for method pela, and {saved.adapter} has "
            f"{saved.config.peft_type}; `petl merge` writes a model of the size of the base"
        )
    # the base weights that stay were trained as they are before quantization
    model = (saved.dense() if saved.is_quantized else saved).model(other_base=other_base)
    adapted = Reference.of(model, saved.batches())
    small: Any = export(model).eval()
    difference = adapted.compare(small, tolerance, "small model")
    with draft_of(out) as draft:
        with Pass("writing the small model", None):
            save_model(small, draft)
            write_ranks(small, draft)
        write_companions(saved, draft, saved.config, merged=True)
        del small, model  # frees memory before the same model is loaded again
        reread: Any = load(AutoConfig.from_pretrained(draft), draft).to(device())
        adapted.compare(reread, tolerance, "small model as written")
    return Written(out, folder_bytes(out), difference)
