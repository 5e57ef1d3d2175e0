"""Write the files of tests/compatibility: what was saved at commit b7a8cc9 must load for ever.

    python scripts/make_compatibility_fixtures.py   # write what is not there yet

Run once at commit b7a8cc9. The files are a promise to users who have saved adapters: they are never
regenerated, only added to, and this script leaves every file alone that exists. To pin a new saved
form, add an entry to tests/compatibility/compatibility_cases.py and run it again.
"""

import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: see train.py
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "tests" / "compatibility"))

import compatibility_cases as cases
import torch
from compatibility_bases import base, batch, logits
from safetensors.torch import save_file

import petl

FOLDER = Path(__file__).resolve().parents[1] / "tests" / "compatibility"


def write_adapters() -> None:
    """A folder of `adapters/` for each case that has none."""
    for name, case in cases.ADAPTERS.items():
        folder = FOLDER / "adapters" / name
        if folder.exists():
            continue
        model = cases.stir(cases.wrap(name))
        cases.train(model, case.base, case.steps)
        inputs = batch(case.base, number=100)
        found = logits(model, inputs)
        model.save_pretrained(str(folder), save_embedding_layers=False)
        (folder / "README.md").unlink()  # PEFT's template of a model card
        plain = logits(base(case.base), inputs)
        gap = float((logits(petl.load(base(case.base), folder), inputs) - found).abs().max())
        change = float((found - plain).abs().max())
        print(f"{name}: loaded {gap:.1e} off, adapter changes logits by up to {change:.2f}")
        tensors: dict[str, Any] = {f"inputs.{key}": value for key, value in inputs.items()}
        tensors |= {"logits": found, "base_logits": plain}
        save_file({k: t.contiguous() for k, t in tensors.items()}, folder / "expected.safetensors")


def main() -> None:
    torch.set_num_threads(1)
    write_adapters()


if __name__ == "__main__":
    main()
