"""Checks of what is written to disk and read again."""

import copy
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.conversion import save_as_lora
from safetensors.torch import load_file, save_file
from torch import Tensor

from petl.core.loading import load
from petl.errors import InputError
from petl.testing.case import Case, difference, gradients, logits, stir
from petl.testing.catalog import check, own
from petl.testing.processes import in_fresh_process
from petl.testing.training import assert_close_gradients

WEIGHTS = "adapter_model.safetensors"
WAYS_TO_LOAD: tuple[dict[str, Any], ...] = (
    {},
    {"low_cpu_mem_usage": True},
    {"adapter_name": "another_name"},
)


@check()
def reloads_in_a_fresh_process(case: Case) -> None:
    """Loaded elsewhere, without a warning, under any adapter name, it computes the same."""
    model = case.wrap_stirred()
    expected = logits(model, case.batch())
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        found = in_fresh_process(_logits_after_loading, case, folder, imports=case.imports)
    for way, values in found.items():
        gap = difference(values, expected)
        allowed = 1e-6 * max(1.0, float(expected.abs().max()))  # a file's tensors lie elsewhere
        assert gap <= allowed, f"loaded with {way}, logits differ by {gap:.2e}"


def _logits_after_loading(case: Case, folder: str) -> dict[str, Tensor]:
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error" if case.promises.own else "ignore")
        for kind in (DeprecationWarning, FutureWarning):  # between PEFT and transformers
            warnings.filterwarnings("ignore", category=kind, module=r"(?!petl\b)")
        for way in WAYS_TO_LOAD:
            for loader in (PeftModel.from_pretrained, load):
                model = loader(case.base(), folder, **way)
                found[f"{loader.__qualname__} {way}"] = logits(model, case.batch())
    return found


@check(own)
def damaged_files_do_not_load(case: Case) -> None:
    """A file cut off, without a tensor, with one too many or one of another shape is refused."""
    with TemporaryDirectory() as folder:
        case.wrap_stirred().save_pretrained(folder)
        file = Path(folder) / WEIGHTS
        whole = load_file(file)
        load(case.base(), folder)
        for damage, tensors in _damaged(whole, case.prefix):
            save_file(tensors, file)
            _assert_refused(lambda: load(case.base(), folder), f"petl.load, {damage}")
            _assert_refused(
                lambda: PeftModel.from_pretrained(case.base(), folder),
                f"PeftModel.from_pretrained, {damage}",
                kinds=(InputError, RuntimeError),
            )
        save_file(whole, file)
        file.write_bytes(file.read_bytes()[:-20])
        _assert_refused(lambda: load(case.base(), folder), "petl.load, a truncated file")


def _damaged(whole: dict[str, Tensor], prefix: str) -> Iterator[tuple[str, dict[str, Tensor]]]:
    kinds = {key.rpartition(".")[2]: key for key in whole if prefix in key}
    for kind, key in kinds.items():
        yield f"without a {kind}", {k: v for k, v in whole.items() if k != key}
    kind, key = next(iter(kinds.items()))
    yield f"a {kind} of another shape", {**whole, key: torch.stack([whole[key], whole[key]])}
    yield "a tensor too many", {**whole, f"{key}_more": torch.zeros(1)}


def _assert_refused(
    attempt: Any, what: str, kinds: tuple[type[Exception], ...] = (InputError,)
) -> None:
    try:
        attempt()
    except kinds:
        return
    raise AssertionError(f"{what}: loaded as if nothing were wrong")


@check()
def copies_are_the_same_and_apart(case: Case) -> None:
    """A deepcopy, and a pickle read back, compute and train the same and share no tensor."""
    model = case.wrap_stirred()
    batch = case.batch()
    expected, gradient = logits(model, batch), gradients(model, batch)
    for kind, twin in (
        ("deepcopy", copy.deepcopy(model)),
        ("pickle", pickle.loads(pickle.dumps(model))),
    ):
        assert torch.equal(logits(twin, batch), expected), f"{kind} computes something else"
        assert_close_gradients(gradients(twin, batch), gradient, f"{kind} and original")
        stir(twin, seed=3)
        assert torch.equal(logits(model, batch), expected), f"{kind} shares tensors with the model"


def exporting(case: Case) -> bool:
    """Checks for methods that can be saved as a plain LoRA."""
    return case.promises.exports_lora and case.prefix != "lora_"


@check(exporting)
def exports_as_a_plain_lora(case: Case) -> None:
    """PEFT's `save_as_lora` writes a LoRA that computes the same."""
    model = case.wrap_stirred()
    expected = logits(model, case.batch())
    with TemporaryDirectory() as folder:
        save_as_lora(folder, model, rank=1.0)  # all of the singular values' energy: exact
        exported = PeftModel.from_pretrained(case.base(), folder)
    assert exported.active_peft_config.peft_type == "LORA"
    gap = difference(logits(exported, case.batch()), expected)
    assert gap <= 1e-3 * float(expected.abs().max()), f"logits of the LoRA differ by {gap:.2e}"


@check(lambda case: own(case) and not case.promises.exports_lora)
def export_as_lora_is_refused(case: Case) -> None:
    """What is no weight update refuses to be written as one, and leaves nothing behind."""
    model = case.wrap_stirred()
    with TemporaryDirectory() as folder:
        target = Path(folder) / "lora"
        try:
            save_as_lora(target, model, rank=8)
        except TypeError:
            assert not (target / WEIGHTS).exists()
            return
    raise AssertionError(f"{case.method} says that it does not export as LoRA, but it did")
