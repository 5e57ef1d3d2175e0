"""A narrower adapter: the first k components of one, as a plain adapter of width k."""

from pathlib import Path
from tempfile import TemporaryDirectory

from peft import PeftModel
from safetensors.torch import save_file

from petl.adapters.deltas.adapters import CARD, CHANGED, NOTE, amend_card, copy_others
from petl.core import fingerprint
from petl.core.adapter_file import WEIGHTS
from petl.core.adapter_folder import CONFIG, Folder
from petl.core.adapter_widths import record
from petl.core.adapter_widths.cuts import at_width_in_file
from petl.core.adapter_widths.switch import active_name
from petl.core.types import Record
from petl.system.files.disk import as_json, write_atomic
from petl.system.files.outputs import new_folder
from petl.system.files.read import read_json, read_text

CUT = ("r", "lora_alpha", "rank_pattern", "alpha_pattern")  # fields of a config that say its width


def narrow(model: PeftModel, k: int, folder: str | Path, scale: str | None = None) -> None:
    """Write the first `k` components of the active adapter as an adapter of its method's format.

    Its outputs are those of the model inside `petl.at_width(model, k)`. Trained heads are copied.

    Args:
        model: its active adapter is a LoRA, `mola`, `adapter` or `compacter`.
        k: from 1 to the width of the adapter.
        folder: new or empty.
        scale: as of `petl.at_width`.

    Raises:
        InputError: `k` is out of range, several adapters are active, or the folder is taken.
        UnsupportedError: the components of the adapter have no order.
    """
    name = active_name(model)
    with TemporaryDirectory() as place:
        model.save_pretrained(place, selected_adapters=[name])
        narrow_folder(Path(place, "" if name == "default" else name), k, folder, scale)


def narrow_folder(folder: str | Path, k: int, out: str | Path, scale: str | None = None) -> None:
    """Write the first `k` components of a saved adapter to the new folder `out`.

    Args:
        folder: of the adapter.
        k, scale: as of `narrow`.
        out: new or empty.

    Raises:
        InputError, UnsupportedError: as `narrow`, or a file of the adapter is damaged.
    """
    saved = Folder(folder)
    nested = record.read(saved.file(record.FILE))
    if scale is None:
        scale = "full" if nested is None else nested.scale
    tensors, config = at_width_in_file(saved.config, saved.tensors, k, scale)
    with new_folder(Path(out)) as draft:
        copy_others(Path(folder), draft)
        save_file(tensors, draft / WEIGHTS, {"format": "pt", "petl_width": str(k)})
        fields: Record = {name: getattr(config, name) for name in CUT if hasattr(config, name)}
        write_atomic(draft / CONFIG, as_json({**read_json(draft / CONFIG), **fields}))
        if saved.file(fingerprint.FILE):
            fingerprint.write(draft, saved.base, fingerprint.settings_of(config))
        if nested is not None:
            nested.at_width(k).write(draft)
        card = draft / CARD
        if saved.compressed and card.is_file():
            write_atomic(card, f"{read_text(card).replace(NOTE, '').rstrip()}\n")
        amend_card(card, CHANGED)
