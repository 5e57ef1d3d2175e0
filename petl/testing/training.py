"""Checks of a method during training."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import get_peft_model_state_dict
from torch import Tensor, nn
from torch._dynamo.exc import Unsupported
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from petl.core.lifecycle import lifecycle
from petl.core.loading import load
from petl.core.registry import refusal
from petl.core.support import Capability
from petl.core.types import Record
from petl.errors import UnsupportedError
from petl.testing.case import (
    Case,
    assert_close,
    first_call,
    first_output,
    gradients,
    logits,
    trainable,
)
from petl.testing.catalog import check, of_transformers, own, own_on_llama
from petl.testing.models import Batch

STEPS = 20
SELECTING = 8  # steps in which a method selects something by its defaults
MIN_DROP = 0.05  # by which the loss must fall in so many steps, relative to the first


@check()
def starts_at_the_base_model(case: Case) -> None:
    """A newly wrapped model computes what the base model does, in eval and in train mode."""
    if not case.starts_at_base:
        return
    batch = case.batch()
    expected = logits(case.base(), batch)
    model = case.wrap()
    for mode in (False, True):
        values = model.train(mode)(**batch).logits
        allowed = max(1e-5, case.promises.start_tolerance)
        what = f"with training={mode}, logits of the wrapped model and the base model"
        assert_close(values, expected, allowed, what)


@check()
def only_the_adapter_trains(case: Case) -> None:
    """Twenty steps lower the loss, change each trainable tensor and no other tensor."""
    model = case.wrap().train()
    batch = case.batch()
    if case.promises.own:
        outside = [n for n in trainable(model) if not _is_adapter(n, case)]
        assert not outside, f"trainable, but no part of the adapter: {outside}"
    # state_dict has buffers, too
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = set(trainable(model))
    losses = train(model, batch, steps=STEPS, lr=case.lr).losses
    assert losses[-1] < (1 - MIN_DROP) * losses[0], (
        f"the loss went from {losses[0]:.4f} to {losses[-1]:.4f}: it must fall by {MIN_DROP:.0%} "
        f"in {STEPS} steps; if the method can, set another Case(lr=...) than {case.lr:g}"
    )
    after = model.state_dict()
    for name, tensor in before.items():
        same = torch.equal(tensor, after[name])
        if name in names:
            assert not same, f"{name} is trainable and did not change in {STEPS} steps"
        elif not _is_adapter(name, case):  # an adapter's buffers may change
            assert same, f"{name} belongs to the base model and changed"


@check(own)
def every_trainable_tensor_gets_a_gradient(case: Case) -> None:
    """One backward pass reaches each trainable tensor, as DDP requires, and no other."""
    model = case.wrap_stirred()
    received = gradients(model, case.batch())
    missing = sorted(set(trainable(model)) - set(received))
    assert not missing, f"no gradient reaches {missing}"
    assert set(received) <= set(trainable(model))
    broken = sorted(name for name, grad in received.items() if not grad.isfinite().all())
    assert not broken, f"gradients that are not finite: {broken}"


@check(own)
def accumulated_gradients_add_up(case: Case) -> None:
    """Micro-batches weighted by their items give the gradient of the complete batch.

    An auxiliary loss is of the micro-batch, not of the batch; with `lifecycle.aux_weight` each adds
    exactly that fraction of its own gradient.
    """
    # in float64: an untrained T5 amplifies the rounding of float32 to 2e-4 of its largest gradient
    model = case.wrap_stirred(case.base().double())
    hooks = lifecycle(model)
    batch = {n: t.double() if t.is_floating_point() else t for n, t in case.batch().items()}
    items = case.tiny.items(batch)
    pieces = [rows_of(batch, [0]), rows_of(batch, [1, 2, 3])]
    weights = [case.tiny.items(piece) / items for piece in pieces]

    def gradient(part: Batch, weight: float, aux_weight: float) -> dict[str, Tensor]:
        hooks.aux_weight = aux_weight
        return gradients(model, part, weight=weight)

    complete = gradient(batch, 1.0, 0.0)
    task = [gradient(p, w, 0.0) for p, w in zip(pieces, weights, strict=True)]
    assert_close_gradients(add(task), complete, "the task loss of micro-batches and of the batch")
    # task and auxiliary gradients together, and each alone
    batched = [gradient(p, w, w) for p, w in zip(pieces, weights, strict=True)]
    # the auxiliary gradients alone: the task loss has weight 0
    full_aux = [gradient(p, 0.0, 1.0) for p in pieces]
    expected = [add([t, scaled(a, w)]) for t, a, w in zip(task, full_aux, weights, strict=True)]
    assert_close_gradients(add(batched), add(expected), "the weighted auxiliary loss")


@check(own_on_llama)
def accumulation_selects_the_same(case: Case) -> None:
    """Micro-batches lead to the selections of complete batches: positions, ranks, masks.

    These are the adapter's tensors of integers and flags.
    """
    batch, found = case.batch(), []
    for pieces in ([[0, 1, 2, 3]], [[0], [1], [2, 3]]):
        model = case.wrap_stirred().train()
        if not _selections(model, case):
            return
        parts = [rows_of(batch, rows) for rows in pieces]
        weights = [case.tiny.items(part) / case.tiny.items(batch) for part in parts]
        micro = list(zip(parts, weights, strict=True))
        train(model, batch, steps=SELECTING, lr=case.lr, micro=micro, eps=1e-4)
        found.append(_selections(model, case))
    for name, tensor in found[0].items():
        same = tensor == found[1][name]
        assert same.all(), (
            f"{name}: {int((~same).sum())} of {same.numel()} entries depend on the size of the "
            "micro-batches: a selection must see the gradients of all of them"
        )


def _selections(model: nn.Module, case: Case) -> dict[str, Tensor]:
    state = model.state_dict().items()
    return {n: t for n, t in state if _is_adapter(n, case) and not t.is_floating_point()}


@check(of_transformers, of=Capability.CHECKPOINTING)
def checkpointing_gives_the_same_gradients(case: Case) -> None:
    """Gradient checkpointing (not reentrant) changes neither loss nor gradients."""
    _compare_checkpointing(case, use_reentrant=False)


@check(of_transformers)
def reentrant_checkpointing_gives_the_same_gradients(case: Case) -> None:
    """Reentrant checkpointing, whose first forward has no graph, changes neither."""
    _compare_checkpointing(case, use_reentrant=True)


def _compare_checkpointing(case: Case, *, use_reentrant: bool) -> None:
    model = case.wrap_stirred()
    batch = case.batch()
    # reentrant checkpointing needs inputs that require gradients, which frozen embeddings lack
    model.enable_input_require_grads()
    loss = model.train()(**batch).loss
    plain = gradients(model, batch)
    model.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": use_reentrant}
    )
    assert _checkpoints(model), f"{case.tiny.name} has nothing to checkpoint"
    assert_close(model.train()(**batch).loss, loss, 1e-6, "losses with and without checkpointing")
    assert_close_gradients(gradients(model, batch), plain, "with and without checkpointing")


def _checkpoints(model: nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


@check(own)
def two_forwards_before_one_backward(case: Case) -> None:
    """One backward pass of two summed losses gives the sum of their gradients."""
    model = case.wrap_stirred()
    first, second = case.batch(), case.batch(seed=5)
    # two backward passes, one after the other
    expected = add([gradients(model, first), gradients(model, second)])
    model.zero_grad()
    model.train()
    (model(**first).loss + model(**second).loss).backward()
    summed = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_close_gradients(summed, expected, "one backward pass and two")


@check(own)
def training_forward_leaves_nothing_behind(case: Case) -> None:
    """Two equal forward passes give equal losses, and evaluation gives the task's loss alone."""
    model = case.wrap_stirred().train()
    batch = case.batch()
    first, second = (model(**batch).loss.detach() for _ in range(2))
    assert torch.equal(first, second), "the second training forward gives another loss"
    task = model.eval()(**batch).loss.detach()
    expected = first - lifecycle(model).aux_loss()
    assert_close(task, expected, 1e-5, "evaluation loss and training loss minus auxiliary loss")
    assert torch.equal(model(**batch).loss, task), "the second evaluation gives another loss"


@check()
def resumed_training_equals_a_straight_run(case: Case) -> None:
    """Saved after two steps of four and loaded again, training resumes exactly."""
    batch = case.batch()
    model = case.wrap_stirred().train()
    train(model, batch, steps=4, lr=case.lr)
    expected = get_peft_model_state_dict(model)
    model = case.wrap_stirred().train()
    optimizer = train(model, batch, steps=2, lr=case.lr).optimizer
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        resumed = load(case.base(), folder, is_trainable=True).train()
    # what the adapter file does not have, as a checkpoint would
    lifecycle(resumed).load_state_dict(lifecycle(model).state_dict())
    train(resumed, batch, steps=4, done=2, lr=case.lr, state=optimizer.state_dict())
    state = get_peft_model_state_dict(resumed)
    assert set(state) == set(expected), f"tensors differ: {sorted(set(state) ^ set(expected))}"
    for name, tensor in expected.items():
        what = f"{name} after a resumed run and after an uninterrupted one"
        assert_close(state[name].float(), tensor.float(), 1e-6, what)


@check(own)
def training_step_does_not_wait_for_the_device(case: Case) -> None:
    """The method adds no operation that synchronizes with the device (item, nonzero, ...)."""
    # the random state is restored, so that both passes draw the same dropout
    with torch.random.fork_rng(devices=[]), CountSyncs() as of_base:
        gradients(case.base(), case.batch())
    model = case.wrap_stirred()
    with CountSyncs() as of_model:
        gradients(model, case.batch())
    added = of_model.counts - of_base.counts
    assert not added, f"operations that synchronize with the device: {dict(added)}; 0 are allowed"


class CountSyncs(TorchDispatchMode):
    """Counts operations that make the host wait for the device, and copies between the two.

    A constant that is created for a device is such a copy; with a model on the CPU there are none.
    """

    WAITING = frozenset(
        {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "is_nonzero"}
    )
    COPYING = frozenset({"_to_copy", "copy_"})

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        name = func.overloadpacket.__name__
        result = func(*args, **(kwargs or {}))
        is_copy = name in self.COPYING and len({t.device for t in _tensors((args, result))}) > 1
        if name in self.WAITING or is_copy:
            self.counts[name] += 1
        return result


def _tensors(tree: object) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


@check(own)
def layer_compiles_whole(case: Case) -> None:
    """torch.compile captures one adapted layer, forward and backward, in one graph."""
    model = case.wrap_stirred().train()
    layer, args, kwargs = first_call(model, case.batch())
    plain = first_output(layer(*args, **kwargs))
    torch._dynamo.reset()
    # aot_eager traces forward and backward but needs no C++ compiler
    compiled_layer = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled = first_output(compiled_layer(*args, **kwargs))
    assert_close(compiled.detach(), plain.detach(), 1e-5, "outputs of the layer, compiled or not,")
    compiled.sum().backward()


@check(slow=True, of=Capability.COMPILE)
def model_compiles_whole(case: Case) -> None:
    """torch.compile captures the training step in one graph, and computes the same."""
    model = case.wrap_stirred()
    batch = case.batch()
    plain = gradients(model, batch)
    torch._dynamo.reset()
    # aot_eager needs no C++ compiler
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    try:
        values = gradients(compiled, batch)
    except Unsupported as error:
        raise UnsupportedError(refusal(case.config(), Capability.COMPILE) or str(error)) from error
    assert_close_gradients(
        {n.removeprefix("_orig_mod."): g for n, g in values.items()}, plain, "compiled and not"
    )
    what = "logits, compiled or not,"
    assert_close(logits(compiled, batch), logits(model, batch), 1e-5, what)


@dataclass
class TrainCheck:
    """Result of `train`: the loss of each step, and the optimizer."""

    losses: list[float]
    optimizer: torch.optim.Optimizer


def train(
    model: nn.Module,
    batch: Batch,
    *,
    steps: int,
    lr: float,
    done: int = 0,
    micro: Sequence[tuple[Batch, float]] = (),
    state: Record | None = None,
    **options: Any,
) -> TrainCheck:
    """Train on one batch up to optimizer step `steps`, as a training loop does.

    Args:
        model: a PeftModel, or a wrapper of one.
        batch: inputs with labels.
        steps: the last optimizer step.
        lr: learning rate.
        done: steps taken before; the optimizer's state after them is `state`.
        micro: parts of the batch to accumulate over instead, with the weights of their losses.
        state: of the optimizer.
        options: of AdamW, which is used unless the method requires another optimizer.
    """
    hooks = lifecycle(model)
    if not done:
        hooks.prepare([batch])
    groups = [{"params": [*trainable(model).values()], "lr": lr, "weight_decay": 0.0}]
    # a few methods require an optimizer of their own, such as SM3
    optimizer = hooks.make_optimizer(groups)
    if optimizer is None:
        optimizer = torch.optim.AdamW(groups, **options)
    hooks.attach_optimizer(optimizer, done, total_steps=steps)
    if state is not None:
        optimizer.load_state_dict(state)
    losses = []
    for step in range(done + 1, steps + 1):
        total = 0.0
        for part, weight in micro or [(batch, 1.0)]:
            hooks.aux_weight = weight
            loss = model(**part).loss
            (loss * weight).backward()
            total += float(loss.detach()) * weight
        optimizer.step()
        hooks.after_step(step, optimizer)  # before the gradients are cleared
        optimizer.zero_grad()
        losses.append(total)
    return TrainCheck(losses, optimizer)


def rows_of(batch: Batch, rows: list[int]) -> Batch:
    """Return these rows of a batch."""
    return {name: tensor[rows] for name, tensor in batch.items()}


def add(gradients: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Add gradients by name."""
    return {name: torch.stack([g[name] for g in gradients]).sum(0) for name in gradients[0]}


def scaled(gradients: dict[str, Tensor], factor: float) -> dict[str, Tensor]:
    """Multiply gradients by a factor."""
    return {name: gradient * factor for name, gradient in gradients.items()}


def assert_close_gradients(
    actual: dict[str, Tensor], expected: dict[str, Tensor], what: str, *, tolerance: float = 1e-4
) -> None:
    """Raise AssertionError unless names are equal and gradients close.

    Args:
        actual, expected: gradients by name.
        what: what is compared, the beginning of the message.
        tolerance: allowed difference, relative to the largest entry of all gradients.
    """
    assert set(actual) == set(expected), f"{what}: {sorted(set(actual) ^ set(expected))}"
    # relative to all gradients: some tensors' own are nothing but rounding
    largest = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in expected.items():
        what_of = f"{what}: gradients of {name}"
        assert_close(actual[name], gradient, tolerance * largest, what_of)


def _is_adapter(name: str, case: Case) -> bool:
    return case.prefix in name or ".modules_to_save." in name
