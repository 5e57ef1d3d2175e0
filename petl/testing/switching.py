"""Checks of several adapters in one model, of switching them off, and of merging them."""

import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from petl.core.loading import load
from petl.core.registry import refusal
from petl.errors import InputError
from petl.testing.case import Case, difference, logits, stir, trainable, tuner_layers
from petl.testing.catalog import check, merging, own
from petl.testing.training import rows_of


def wrap_two(case: Case) -> PeftModel:
    """A model with adapters "first" (active) and "second", which both do something."""
    model = stir(case.wrap(adapter_name="first"), "first", seed=2)
    add_another(case, model, "second")
    model.set_adapter("second")
    stir(model, "second", seed=3)
    model.set_adapter("first")
    return model.eval()


def add_another(case: Case, model: PeftModel, name: str) -> None:
    """Add an adapter called `name` with the case's config."""
    config: Any = case.config()
    if not case.promises.own:  # PEFT does not know petl's words for targets
        first: Any = next(iter(model.peft_config.values()))
        config.target_modules = first.target_modules
    model.add_adapter(name, config)


@check()
def switching_changes_outputs_and_what_trains(case: Case) -> None:
    """The active adapter alone computes and trains; switched back, the first does as before."""
    model, batch = wrap_two(case), case.batch()
    first = logits(model, batch)
    for name in ("first", "second", "first"):
        model.set_adapter(name)
        strangers = [n for n in trainable(model) if name not in n.split(".")]
        assert not strangers, f"{name} is active, but these train: {strangers}"
        assert trainable(model), f"{name} is active, but nothing trains"
        same = torch.equal(logits(model, batch), first)
        assert same == (name == "first"), f"outputs with {name} active"


@check()
def adapters_do_not_disturb_each_other(case: Case) -> None:
    """Saved from a model with two adapters and loaded alone, an adapter computes the same."""
    model, batch = wrap_two(case), case.batch()
    expected = {}
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for name in ("first", "second"):
            model.set_adapter(name)
            expected[name] = logits(model, batch)
            alone = load(case.base(), Path(folder) / name)
            gap = difference(logits(alone, batch), expected[name])
            assert gap <= 1e-6, f"{name}, loaded alone, differs by {gap:.2e}"
        model.load_adapter(str(Path(folder) / "second"), "third")
    model.set_adapter("third")
    gap = difference(logits(model, batch), expected["second"])
    assert gap <= 1e-6, f"second, loaded beside itself as third, differs by {gap:.2e}"
    model.set_adapter("first")
    assert torch.equal(logits(model, batch), expected["first"]), "loading changed the first"


@check(own)
def both_adapters_can_be_active(case: Case) -> None:
    """With two adapters active a layer adds up what they do, if they are additive."""
    model, batch = wrap_two(case.without_head()), case.batch()  # of heads PEFT allows one
    tuner: Any = model.base_model
    alone = []
    for name in ("first", "second"):
        tuner.set_adapter(name)
        alone.append(logits(model, batch))
    layer = next(iter(tuner_layers(model).values()))
    x = torch.randn(3, 4, layer.in_features, generator=torch.Generator().manual_seed(0))
    x = x.to(case.device)
    base, *single = (_layer_output(layer, x, names) for names in ([], ["first"], ["second"]))
    if case.promises.merges:
        gap = difference(_layer_output(layer, x, ["first", "second"]), sum(single) - base)
        assert gap <= 1e-4, f"the sum of both differs by {gap:.2e}"
    tuner.set_adapter(["first", "second"])
    both = logits(model, batch)
    assert both.isfinite().all()
    assert min(difference(both, one) for one in alone) > 1e-5, "both active computes as one alone"


@torch.no_grad()
def _layer_output(layer: Any, x: Tensor, names: list[str]) -> Tensor:
    layer.set_adapter(names)
    return layer(x)


@check()
def deleted_adapters_leave_no_tensor(case: Case) -> None:
    """Deleting an adapter removes all its tensors, shared ones included, and no other."""
    model, batch = wrap_two(case), case.batch()
    expected = logits(model, batch)
    kept = {key for key in model.state_dict() if "second" not in key.split(".")}
    model.delete_adapter("second")
    assert set(model.state_dict()) == kept
    assert "second" not in model.peft_config
    assert torch.equal(logits(model, batch), expected), "deleting the second changed the first"
    add_another(case, model, "second")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says which one becomes active
        model.delete_adapter("first")
    left = [key for key in model.state_dict() if "first" in key.split(".")]
    assert not left, f"tensors of the deleted adapter are left: {left}"
    assert model.active_adapters == ["second"]


@check()
def disabled_adapters_give_the_base_model(case: Case) -> None:
    """Within `disable_adapter` the outputs are the base model's to the bit; after it, as before."""
    model, batch = case.wrap_stirred(), case.batch()
    base, adapted = logits(case.base(), batch), logits(model, batch)
    assert difference(adapted, base) > 1e-3, "the stirred adapter does nothing"
    with model.disable_adapter():
        gap = difference(logits(model, batch), base)
        assert gap <= 1e-6, f"disabled, the logits differ from the base model's by {gap:.2e}"
    assert torch.equal(logits(model, batch), adapted), "enabled again, it computes something else"


@check(merging)
def merging_and_unmerging_change_nothing(case: Case) -> None:
    """Merged, unmerged, or merged and unloaded, the model computes the same."""
    model, batch = case.wrap_stirred(), case.batch()
    base_weights = _base_weights(model)
    expected = logits(model, batch)
    allowed = 1e-4 * max(1.0, float(expected.abs().max()))
    model.merge_adapter()
    assert difference(logits(model, batch), expected) <= allowed, "merged"
    with model.disable_adapter():
        gap = difference(logits(model, batch), logits(case.base(), batch))
        assert gap <= allowed, f"merged and disabled, it is {gap:.2e} off the base model"
    model.unmerge_adapter()
    assert difference(logits(model, batch), expected) <= allowed, "unmerged"
    for name, weight in _base_weights(model).items():
        gap = difference(weight, base_weights[name])
        assert gap <= 1e-4, f"merging and unmerging moved {name} by {gap:.2e}"
    model.merge_adapter(adapter_names=["default"], safe_merge=True)
    plain = model.merge_and_unload()
    assert type(plain) is type(case.base())
    assert not tuner_layers(plain)
    assert difference(logits(plain, batch), expected) <= allowed, "merged and unloaded"


@check(merging)
def merged_model_computes_the_same(case: Case) -> None:
    """Merged into the base weights, the adapter is gone and the outputs are the same."""
    model, batch = case.wrap_stirred(), case.batch()
    expected, base = logits(model, batch), logits(case.base(), batch)
    allowed = 1e-4 * max(1.0, float(expected.abs().max()))
    assert difference(expected, base) > 10 * allowed, "the stirred adapter does nothing"
    plain = model.merge_and_unload()
    assert not tuner_layers(plain)
    gap = difference(logits(plain, batch), expected)
    assert gap <= allowed, f"merged, the logits differ by {gap:.2e}"


@check(lambda case: own(case) and merging(case))
def safe_merge_refuses_what_is_not_finite(case: Case) -> None:
    """A merge that would write NaN raises and leaves the base weights as they were."""
    model = case.wrap_stirred()
    before = _base_weights(model)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.fill_(torch.nan)
    try:
        model.merge_adapter(safe_merge=True)
    except ValueError:
        after = _base_weights(model)
        changed = [name for name in before if not torch.equal(before[name], after[name])]
        assert not changed, f"a refused merge changed {changed}"
        return
    raise AssertionError("safe_merge wrote weights that are not finite")


@check(lambda case: not merging(case))
def merging_is_refused_before_anything_changes(case: Case) -> None:
    """A method that cannot merge says so, and the model is as before."""
    model, batch = case.wrap_stirred(), case.batch()
    expected, keys = logits(model, batch), set(model.state_dict())
    for attempt in (model.merge_adapter, model.merge_and_unload):
        reason = _refusal(attempt)
        assert reason, f"{attempt.__name__} did not refuse, or gave no reason"
        assert set(model.state_dict()) == keys
        assert torch.equal(logits(model, batch), expected)


@check()
def unloading_gives_the_plain_model(case: Case) -> None:
    """`unload` leaves the base model: its class, tensors, loss, and no hook of ours."""
    plain: Any = case.without_head().wrap_stirred().unload()  # PEFT leaves a trained head in
    fresh = case.base()
    assert type(plain) is type(fresh)
    expected = fresh.state_dict()
    assert set(plain.state_dict()) == set(expected)
    changed = [name for name, t in plain.state_dict().items() if not torch.equal(t, expected[name])]
    assert not changed, f"unload left other values in {changed}"
    assert hooks_of(plain) == hooks_of(fresh), "unload left hooks behind"
    batch = case.batch()
    assert torch.equal(plain.train()(**batch).loss, fresh.train()(**batch).loss)


@check()
def mixed_batch_equals_single_runs(case: Case) -> None:
    """With `adapter_names` each row gets its own adapter, or none; only for inference."""
    batch = case.batch()
    if refusal(case.config(), "mixed"):
        logits(case.wrap(), batch, adapter_names=["default"] * 4)
        return
    model = wrap_two(case)
    names = ["first", "second", "__base__", "first"]
    mixed = logits(model, batch, adapter_names=names)
    for row, name in enumerate(names):
        single = rows_of(batch, [row])
        if name == "__base__":
            expected = logits(case.base(), single)
        else:
            model.set_adapter(name)
            expected = logits(model, single)
        gap = difference(mixed[row], expected[0])
        assert gap <= 1e-5, f"row {row} ({name}) differs from its own run by {gap:.2e}"
    if not case.promises.own:  # whose errors are PEFT's
        return
    _assert_input_error(lambda: model.eval()(**batch, adapter_names=["third"] * 4), "unknown name")
    _assert_input_error(lambda: model.eval()(**batch, adapter_names=["first"]), "too few names")
    _assert_input_error(lambda: model.train()(**batch, adapter_names=names), "train mode")


def _refusal(attempt: Any) -> str:
    try:
        attempt()
    except NotImplementedError as error:
        return str(error)
    return ""


def _assert_input_error(attempt: Any, what: str) -> None:
    try:
        attempt()
    except InputError:
        return
    raise AssertionError(f"adapter_names with {what} was not refused")


def _base_weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items() if "base_layer" in name}


def hooks_of(model: nn.Module) -> dict[str, int]:
    """How many hooks each module has."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    counts = {n: sum(len(getattr(m, k)) for k in kinds) for n, m in model.named_modules()}
    return {name: count for name, count in counts.items() if count}
