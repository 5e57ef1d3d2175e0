"""Write the plain small model that PELA's adapter makes of its base model."""

from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig

from petl.adapters.export.checked_folder import (
    OutputFolder,
    Reference,
    save_model,
)
from petl.adapters.export.saved_adapter import SavedAdapter, device
from petl.data.models.loading import save_processor
from petl.data.models.sources import read_source
from petl.errors import UnsupportedError, markdown
from petl.methods.pela import PelaConfig, export, load
from petl.system.files.disk import write_atomic
from petl.system.files.outputs import check_output, new_folder
from petl.system.progress import Pass
from petl.training.runs.model_card import README

USE = "load it by petl.methods.pela.load(AutoConfig.from_pretrained('{out}'), '{out}')"


def export_small(saved: SavedAdapter, out: Path, tolerance: float | None) -> OutputFolder:
    """Write the small model, with its ranks in ranks.json, config and processor.

    Args:
        tolerance: the largest `Difference.relative`; None: by the dtype of the base model.

    Raises:
        InputError: `out` is taken, the adapter is not PELA's, or the base is another one.
        RunStopped: the small model's outputs differ by more than `tolerance`.
    """
    check_output(out)
    if not isinstance(saved.config, PelaConfig):
        raise UnsupportedError(
            f"petl export --small is for method pela, and {saved.adapter} has "
            f"{saved.config.peft_type}; `petl merge` writes a model of the size of the base"
        )
    # the base weights that stay were trained as they are before quantization
    model = (saved.dense() if saved.is_quantized else saved).model()
    adapted = Reference.of(model, saved.batches())
    small: Any = export(model).eval()
    difference = adapted.compare(small, tolerance, "small model")
    with new_folder(out) as draft:
        with Pass("writing the small model", None):
            save_model(small, draft)
        save_processor(saved.settings["model"], saved.task, draft, saved.processor)
        write_atomic(draft / README, card(saved, small))
        del small, model  # frees memory before the same model is loaded again
        reread = load(AutoConfig.from_pretrained(draft), draft).to(device())
        adapted.compare(reread, tolerance, "small model as written")
    return OutputFolder(out, difference)


def card(saved: SavedAdapter, small: nn.Module) -> str:
    """The text of README.md: what the model is, and how it is loaded with and without petl."""
    name, count = type(small).__name__, sum(p.numel() for p in small.parameters())
    source = read_source(saved.settings["model"])
    known = source.on_hub()
    base = markdown(source.name if known is None else known.name)
    return CARD.format(name=name, base=base, count=count)


CARD = """\
# {name}, made smaller by PELA

Low-rank layers in place of linear layers of {base}: {count:,} parameters. Each path in ranks.json
is `nn.Sequential(Linear(in, rank, bias=False), Linear(rank, out))`. With petl:

```python
from transformers import AutoConfig
from petl.methods import pela

model = pela.load(AutoConfig.from_pretrained("."), ".")
```

Without petl:

```python
import json
from pathlib import Path

from safetensors.torch import load_file
from torch.nn import Linear, Sequential
from transformers import AutoConfig, {name}

model = {name}(AutoConfig.from_pretrained("."))
for path, rank in json.load(open("ranks.json"))["ranks"].items():
    old = model.get_submodule(path)
    width, out = (old.nx, old.nf) if hasattr(old, "nf") else (old.in_features, old.out_features)
    has_bias = old.bias is not None
    new = Sequential(Linear(width, rank, bias=False), Linear(rank, out, bias=has_bias))
    vars(new)["weight"] = new[1].weight  # T5 reads its dtype
    model.set_submodule(path, new)
state = {{}}
for file in Path().glob("model*.safetensors"):  # a large model has several
    state |= load_file(file)
missing, unexpected = model.load_state_dict(state, strict=False)
model.tie_weights()  # missing: tied weights at most
model.eval()
```
"""
