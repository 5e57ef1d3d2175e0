"""What the model says before and while it trains: coverage, optimizer, base, reference, modes."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer

from petl.core.compat import AuxiliaryTrainingWrapper
from petl.core.model.coverage import coverage_of, is_low
from petl.core.model.modes import evaluation_mode, has_enabled_adapter, without_adapters
from petl.core.parameters import trainable
from petl.core.spec.config import MethodConfig
from petl.core.tuners.gradients import kinds_of, stepped
from petl.system.random_states import states_kept
from petl.training.watch.findings import Findings

MOST = 0.1  # a share of the base's tensors that are trained by mistake, above it an error
EQUAL = 1e-4  # distance of two outputs, relative to the larger, that rounding explains
WEIGHTS = ("adapter_model.safetensors", "model.safetensors")


def base_of(model: nn.Module) -> Any:
    """Return the model without adapters."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def inspect_coverage(model: nn.Module, findings: Findings) -> None:
    """Check which share of the block weights an adapter reaches."""
    found = coverage_of(model) if isinstance(model, PeftModel) else None
    if found is None or not findings.wants("coverage"):
        return
    findings.metrics["watch/coverage"] = found.share
    config: Any = model.active_peft_config
    given = vars(config).get("target_modules")
    # named layers, and places that a method finds by itself, are what was asked for
    places = [given] if isinstance(given, str) else given or ()
    named = any(char.isdigit() for place in places for char in place)
    if is_low(found, config, given) and not named and not isinstance(config, MethodConfig):
        findings.add("coverage", "warning", str(found), "set target_modules='all-linear'")


def inspect_optimizer(model: nn.Module, optimizer: Optimizer, findings: Findings) -> None:
    """Check that an optimizer holds every trained tensor; its steps tell the rest."""
    trained = dict(trainable(model))
    sharded = any(
        not hasattr(p, "data_ptr") or type(p.data) is not Tensor for p in trained.values()
    )
    if not trained or sharded:
        return
    missing = trained.keys() - stepped(model, optimizer).keys()
    if missing:
        # of a whole model, a part may be left out on purpose
        mistaken = isinstance(model, PeftModel) or len(missing) == len(trained)
        findings.add(
            "optimizer",
            "error" if mistaken else "warning",
            f"{len(missing)} of {len(trained)} trained tensors are in no group of the optimizer, "
            f"so they do not train: {kinds_of(missing)}",
            "make the optimizer after the adapters, of all parameters with requires_grad",
        )


def inspect_base(model: nn.Module, trained: Iterable[str], findings: Findings) -> None:
    """Check that no tensor of the base model is trained.

    Args:
        trained: names of the tensors that the optimizer steps.
    """
    if not isinstance(model, PeftModel) or not findings.wants("base"):
        return
    prefix = getattr(model.base_model, "prefix", None) or "prompt_encoder."
    copies = tuple(
        f"{name}." for name, m in model.named_modules() if isinstance(m, AuxiliaryTrainingWrapper)
    )
    biased = any(vars(c).get("bias", "none") != "none" for c in model.peft_config.values())
    own = {name for name in trained if prefix in name or (copies and name.startswith(copies))}
    outside = {n for n in trained if n not in own and not (biased and n.endswith("bias"))}
    if not outside:
        return
    total = sum(1 for name, _ in model.named_parameters() if prefix not in name)
    findings.add(
        "base",
        "error" if len(outside) > MOST * total else "warning",
        f"{len(outside)} of {total} tensors of the base model are trained, and are not saved with "
        f"the adapter: {kinds_of(outside)}",
        "freeze them, or name them in modules_to_save",
    )


def inspect_reference(
    model: PeftModel, ids: list[int], findings: Findings, *, by_disabling: bool
) -> None:
    """Check that the reference of preference training is the model as it is now.

    Args:
        ids: tokens of one row, on which outputs are compared; none: tensors alone.
        by_disabling: the reference is the model without adapters.
    """
    if {"default", "ref"} <= model.peft_config.keys():
        findings.checked.add("reference")
        mine, other = (_saved(model, name) for name in ("default", "ref"))
        differ = [n for n, t in mine.items() if n not in other or not torch.equal(t, other[n])]
        what = (
            f"{len(differ)} of {len(mine)} tensors of the adapter 'ref' are not those of the model"
        )
        if differ:
            remedy = "add petl.Callback() to the trainer, which completes it"
            findings.add("reference", "error", f"{what} at the start", remedy)
    elif by_disabling and ids and has_enabled_adapter(model):
        findings.checked.add("reference")
        inputs = torch.tensor([ids], device=next(model.parameters()).device)
        with states_kept(), evaluation_mode(model), torch.no_grad():
            policy = model(input_ids=inputs)[0].float()
            with without_adapters(model):
                reference = model(input_ids=inputs)[0].float()
        distance = float((policy - reference).abs().max() / policy.abs().max().clamp_min(1e-12))
        if not distance <= EQUAL:
            findings.add(
                "reference",
                "error",
                "the reference is the model without its adapter, and the adapter changes the "
                f"outputs at the start by {distance:.2g} of the largest",
                "give the model at the start as ref_model",
            )


def _saved(model: PeftModel, name: str) -> dict[str, Tensor]:
    return get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)


def inspect_modes(model: nn.Module, findings: Findings, severity: str | None) -> None:
    """Check the modes of a model in a pass without gradients.

    Args:
        severity: of a pass in training mode; None: it may be in that, such as one that samples.
    """
    if not findings.wants("mode"):
        return
    noisy = [n for n, m in model.named_modules() if m.training and getattr(m, "p", 0) and _drops(m)]
    if model.training and severity is not None and noisy:
        findings.add(
            "mode",
            severity,
            f"the evaluation runs in training mode, with {len(noisy)} dropout modules",
            "call model.eval() before it",
        )
    elif not model.training and noisy:
        findings.add(
            "mode",
            "error",
            f"the model is in evaluation mode, and {len(noisy)} dropout modules are in training "
            f"mode: {kinds_of(noisy)}",
            "call model.eval() after adapters are added or loaded",
        )


def _drops(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.dropout._DropoutNd)


def inspect_best(model: nn.Module, folder: Path, findings: Findings) -> None:
    """Check that the tensors of the model are those of the best checkpoint."""
    file = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if not findings.wants("best"):
        return
    remedy = f"load the adapter of {folder}"
    if file is None:
        what = f"the best checkpoint {folder} has none of {', '.join(WEIGHTS)} to restore, so the "
        findings.add("best", "error", f"{what}model is that of the last step", remedy)
        return
    is_adapter = isinstance(model, PeftModel)
    present = _saved(model, model.active_adapters[0]) if is_adapter else model.state_dict()
    best = load_file(file)
    differ = [n for n, t in best.items() if n not in present or not _close(t, present[n])]
    if differ:
        what = f"{len(differ)} of {len(best)} tensors are not those of the best checkpoint {folder}"
        findings.add("best", "error", what, remedy)


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a.double(), b.double().cpu(), 1e-3, 1e-6)
