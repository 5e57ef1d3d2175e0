"""Checks of saving, loading, copying and export."""

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.conversion import save_as_lora
from safetensors.torch import load_file, save_file
from torch import Tensor

from petl.core.loading import load
from petl.core.support import Capability
from petl.errors import InputError, UnsupportedError
from petl.testing.case import Case, assert_close, gradients, logits, stir
from petl.testing.catalog import check, of_transformers, own
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
    """Loaded in a new process, without a warning, under any adapter name, it computes the same."""
    model = case.wrap_stirred()
    expected = logits(model, case.batch())
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = in_fresh_process(_logits_after_loading, case, folder, imports=case.imports)
    for way, values in loaded.items():
        # not exactly equal: products may round differently for tensors of another alignment
        allowed = 1e-6 * max(1.0, float(expected.abs().max()))
        assert_close(values, expected, allowed, f"logits before saving and loaded with {way}")


def _logits_after_loading(case: Case, folder: str) -> dict[str, Tensor]:
    values = {}
    with warnings.catch_warnings():
        # a warning about petl's own adapters would reach every user
        warnings.simplefilter("error" if case.promises.own else "ignore")
        for category in (DeprecationWarning, FutureWarning):  # between PEFT and transformers
            warnings.filterwarnings("ignore", category=category, module=r"(?!petl\b)")
        # each way by PEFT and by petl
        for way in WAYS_TO_LOAD:
            for loader in (PeftModel.from_pretrained, load):
                model = loader(case.base(), folder, **way)
                values[f"{loader.__qualname__} {way}"] = logits(model, case.batch())
    return values


@check(own)
def damaged_files_do_not_load(case: Case) -> None:
    """A file that is truncated or has a missing, additional or misshapen tensor is refused."""
    with TemporaryDirectory() as folder:
        case.wrap_stirred().save_pretrained(folder)
        file = Path(folder) / WEIGHTS
        saved = load_file(file)
        load(case.base(), folder)  # the intact file loads
        for damage, tensors in _damaged(saved, case.prefix):
            save_file(tensors, file)
            _assert_refused(lambda: load(case.base(), folder), f"petl.load, {damage}")
            _assert_refused(
                lambda: PeftModel.from_pretrained(case.base(), folder),
                f"PeftModel.from_pretrained, {damage}",
                errors=(InputError, RuntimeError),
            )
        # the intact file again, to truncate it
        save_file(saved, file)
        file.write_bytes(file.read_bytes()[:-20])
        _assert_refused(lambda: load(case.base(), folder), "petl.load, a truncated file")


def _damaged(saved: dict[str, Tensor], prefix: str) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield kinds of damage, in words, and the tensors of a file with it."""
    by_name = {key.rpartition(".")[2]: key for key in saved if prefix in key}
    for name, key in by_name.items():
        yield f"without a {name}", {k: v for k, v in saved.items() if k != key}
    name, key = next(iter(by_name.items()))
    yield f"a {name} of another shape", {**saved, key: torch.stack([saved[key], saved[key]])}
    yield "an additional tensor", {**saved, f"{key}_more": torch.zeros(1)}


def _assert_refused(
    attempt: Callable[[], object], what: str, errors: tuple[type[Exception], ...] = (InputError,)
) -> None:
    try:
        attempt()
    except errors:
        return
    names = " or ".join(error.__name__ for error in errors)
    raise AssertionError(f"{what}: loaded without an error; {names} is expected")


@check(lambda case: own(case) and of_transformers(case))
def transformers_loads_it_or_it_is_refused(case: Case) -> None:
    """`from_pretrained` of the adapter's folder gives the same outputs, or raises with a reason."""
    with TemporaryDirectory() as base, TemporaryDirectory() as folder:
        case.base().save_pretrained(base)
        model_cls = type(case.base())
        model = case.wrap_stirred(model_cls.from_pretrained(base).to(case.device).eval())
        expected = logits(model, case.batch())
        model.save_pretrained(folder)
        loaded, reason = None, ""
        try:
            loaded = model_cls.from_pretrained(folder).to(case.device)
        except UnsupportedError as error:
            reason = str(error)
    if loaded is None:
        assert "PeftModel.from_pretrained" in reason, f"the error names no way to load it: {reason}"
        return
    allowed = 1e-5 * max(1.0, float(expected.abs().max()))
    values = logits(loaded, case.batch())
    assert_close(values, expected, allowed, "logits of the PeftModel and as loaded by transformers")


@check()
def copies_are_the_same_and_apart(case: Case) -> None:
    """A deepcopy and an unpickled model compute and train the same, and share no tensor."""
    model = case.wrap_stirred()
    batch = case.batch()
    expected, gradient = logits(model, batch), gradients(model, batch)
    for kind, twin in (
        ("deepcopy", copy.deepcopy(model)),
        ("pickle", pickle.loads(pickle.dumps(model))),
    ):
        assert torch.equal(logits(twin, batch), expected), f"{kind} computes other logits"
        assert_close_gradients(gradients(twin, batch), gradient, f"{kind} and original")
        stir(twin, seed=3)
        assert torch.equal(logits(model, batch), expected), f"{kind} shares tensors with the model"


def exporting(case: Case) -> bool:
    """Checks for methods that can be saved as a plain LoRA."""
    return case.promises.exports_lora and case.prefix != "lora_"


@check(exporting, of=Capability.LORA_EXPORT)
def exports_as_a_plain_lora(case: Case) -> None:
    """PEFT's `save_as_lora` writes a LoRA that computes the same."""
    model = case.wrap_stirred()
    expected = logits(model, case.batch())
    with TemporaryDirectory() as folder:
        save_as_lora(folder, model, rank=1.0)  # all of the singular values' energy: exact
        exported = PeftModel.from_pretrained(case.base(), folder)
    assert exported.active_peft_config.peft_type == "LORA"
    allowed = 1e-3 * float(expected.abs().max())
    values = logits(exported, case.batch())
    assert_close(values, expected, allowed, "logits of the method and of the exported LoRA")


@check(
    lambda case: own(case) and not case.promises.exports_lora,
    of=Capability.LORA_EXPORT,
    refuses=True,
)
def export_as_lora_is_refused(case: Case) -> None:
    """A method that is not a weight update refuses the export with a reason; no file is written."""
    model = case.wrap_stirred()
    with TemporaryDirectory() as folder:
        target, raised = Path(folder) / "lora", None
        try:
            # PEFT's function asks `supports_lora_conversion`
            save_as_lora(target, model, rank=8)
        except TypeError as error:
            raised = error
        assert raised is not None, (
            f"{case.method} does not export as LoRA by its registry entry (exports_lora=False), "
            "but save_as_lora raised no TypeError"
        )
        assert isinstance(raised, InputError), f"the error gives no reason: {raised}"
        assert not (target / WEIGHTS).exists()
