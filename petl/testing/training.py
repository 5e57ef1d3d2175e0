"""Checks of what a method does while it is trained."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import get_peft_model_state_dict
from torch import Tensor, nn
from torch._dynamo.exc import Unsupported
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from petl.core.lifecycle import lifecycle
from petl.core.loading import load
from petl.core.registry import refusal
from petl.errors import UnsupportedError
from petl.testing.case import Case, difference, gradients, logits, trainable, tuner_layers
from petl.testing.catalog import check, own
from petl.testing.models import Batch

STEPS = 20


@check()
def starts_at_the_base_model(case: Case) -> None:
    """A freshly wrapped model computes what the base model does, in eval and in train mode."""
    if not case.starts_at_base:
        return
    batch = case.batch()
    expected = logits(case.base(), batch)
    model = case.wrap()
    for mode in (False, True):
        found = model.train(mode)(**batch).logits
        gap = difference(found, expected)
        allowed = max(1e-5, case.promises.start_tolerance)
        assert gap <= allowed, f"logits differ from the base model's by {gap:.2e}, training={mode}"


@check()
def only_the_adapter_trains(case: Case) -> None:
    """Twenty steps bring the loss down, move each trainable tensor and leave all others alone."""
    model = case.wrap().train()
    batch = case.batch()
    if case.promises.own:
        strange = [n for n in trainable(model) if not _is_adapter(n, case)]
        assert not strange, f"trainable, but no part of the adapter: {strange}"
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = set(trainable(model))
    losses = train(model, batch, steps=STEPS, lr=case.lr).losses
    assert losses[-1] < 0.95 * losses[0], f"the loss went from {losses[0]:.4f} to {losses[-1]:.4f}"
    after = model.state_dict()
    for name, tensor in before.items():
        same = torch.equal(tensor, after[name])
        if name in names:
            assert not same, f"{name} is trainable and did not change in {STEPS} steps"
        elif not _is_adapter(name, case):  # an adapter's buffers may change
            assert same, f"{name} belongs to the base model and changed"


@check(own)
def every_trainable_tensor_gets_a_gradient(case: Case) -> None:
    """One backward pass reaches each trainable tensor, which DDP relies on, and no other."""
    model = case.wrap_stirred()
    found = gradients(model, case.batch())
    missing = sorted(set(trainable(model)) - set(found))
    assert not missing, f"no gradient reaches {missing}"
    assert set(found) <= set(trainable(model))
    broken = sorted(name for name, grad in found.items() if not grad.isfinite().all())
    assert not broken, f"gradients that are not finite: {broken}"


@check(own)
def accumulated_gradients_add_up(case: Case) -> None:
    """Micro-batches weighted by their items give the gradient of the whole batch.

    An auxiliary loss is of the micro-batch, not of the batch; with `lifecycle.aux_weight` each adds
    its share of its own gradient, neither more nor less.
    """
    model = case.wrap_stirred()
    life = lifecycle(model)
    batch = case.batch()
    items = case.tiny.items(batch)
    pieces = [rows_of(batch, [0]), rows_of(batch, [1, 2, 3])]
    weights = [case.tiny.items(piece) / items for piece in pieces]

    def gradient(part: Batch, weight: float, aux_weight: float) -> dict[str, Tensor]:
        life.aux_weight = aux_weight
        return gradients(model, part, weight=weight)

    whole = gradient(batch, 1.0, 0.0)
    task = [gradient(p, w, 0.0) for p, w in zip(pieces, weights, strict=True)]
    assert_close_gradients(add(task), whole, "the task loss of micro-batches and of the batch")
    batched = [gradient(p, w, w) for p, w in zip(pieces, weights, strict=True)]
    full_aux = [gradient(p, 0.0, 1.0) for p in pieces]
    expected = [add([t, scaled(a, w)]) for t, a, w in zip(task, full_aux, weights, strict=True)]
    assert_close_gradients(add(batched), add(expected), "the weighted auxiliary loss")


@check()
def checkpointing_gives_the_same_gradients(case: Case) -> None:
    """Gradient checkpointing, not reentrant, changes neither loss nor gradients."""
    _compare_checkpointing(case, use_reentrant=False)


@check()
def reentrant_checkpointing_gives_the_same_gradients(case: Case) -> None:
    """Nor does the reentrant kind, which runs each block without a graph at first."""
    _compare_checkpointing(case, use_reentrant=True)


def _compare_checkpointing(case: Case, *, use_reentrant: bool) -> None:
    model: Any = case.wrap_stirred()
    batch = case.batch()
    model.enable_input_require_grads()  # frozen embeddings would cut the reentrant kind's graph
    loss = model.train()(**batch).loss
    plain = gradients(model, batch)
    model.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": use_reentrant}
    )
    assert _checkpoints(model), f"{case.tiny.name} has nothing to checkpoint"
    gap = difference(model.train()(**batch).loss, loss)
    assert gap <= 1e-6, f"the loss changes by {gap:.2e}"
    assert_close_gradients(gradients(model, batch), plain, "with and without checkpointing")


def _checkpoints(model: nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


@check(own)
def two_forwards_before_one_backward(case: Case) -> None:
    """Losses of two batches, summed before the backward pass, give the sum of their gradients."""
    model = case.wrap_stirred()
    first, second = case.batch(), case.batch(seed=5)
    expected = add([gradients(model, first), gradients(model, second)])
    model.zero_grad()
    model.train()
    (model(**first).loss + model(**second).loss).backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_close_gradients(found, expected, "one backward pass and two")


@check(own)
def training_forward_leaves_nothing_behind(case: Case) -> None:
    """The same forward twice gives the same loss, and evaluation shows the task's loss alone."""
    model = case.wrap_stirred().train()
    batch = case.batch()
    first, second = (model(**batch).loss.detach() for _ in range(2))
    assert torch.equal(first, second), "the second training forward gives another loss"
    life = lifecycle(model)
    task = model.eval()(**batch).loss.detach()
    expected = first - life.aux_loss()
    gap = difference(task, expected)
    assert gap <= 1e-5, f"training loss minus auxiliary loss is {gap:.2e} off the evaluation loss"
    assert torch.equal(model(**batch).loss, task)


@check()
def resumed_training_equals_a_straight_run(case: Case) -> None:
    """Saved after two steps of four and loaded again, training goes on as if never stopped."""
    batch = case.batch()
    model = case.wrap_stirred().train()
    train(model, batch, steps=4, lr=case.lr)
    expected = get_peft_model_state_dict(model)
    model = case.wrap_stirred().train()
    optimizer = train(model, batch, steps=2, lr=case.lr).optimizer
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        resumed = load(case.base(), folder, is_trainable=True).train()
    lifecycle(resumed).load_state_dict(lifecycle(model).state_dict())
    train(resumed, batch, steps=4, done=2, lr=case.lr, state=optimizer.state_dict())
    found = get_peft_model_state_dict(resumed)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        gap = difference(found[name].float(), tensor.float())
        assert gap <= 1e-6, f"{name} is {gap:.2e} off the straight run"


@check(own)
def training_step_does_not_wait_for_the_device(case: Case) -> None:
    """The method adds no operation that makes the host wait for a result (item, nonzero, ...)."""
    with torch.random.fork_rng(devices=[]), CountWaits() as by_base:
        gradients(case.base(), case.batch())
    model = case.wrap_stirred()
    with CountWaits() as by_model:
        gradients(model, case.batch())
    added = by_model.counts - by_base.counts
    assert not added, f"operations that wait: {dict(added)}"


class CountWaits(TorchDispatchMode):
    """Counts operations whose result the host needs before it can go on, and copies to and from it.

    A constant that is made for a device is a copy; on the CPU there are none.
    """

    WAITING = frozenset(
        {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "is_nonzero"}
    )
    COPYING = frozenset({"_to_copy", "copy_"})

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        result = func(*args, **(kwargs or {}))
        copied = name in self.COPYING and len({t.device for t in _tensors((args, result))}) > 1
        if name in self.WAITING or copied:
            self.counts[name] += 1
        return result


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


@check(own)
def layer_compiles_whole(case: Case) -> None:
    """torch.compile takes one adapted layer, forward and backward, in one graph."""
    model = case.wrap_stirred().train()
    layer: Any = next(iter(tuner_layers(model).values()))
    x = torch.randn(2, 3, layer.in_features, generator=torch.Generator().manual_seed(0))
    x = x.to(case.device)
    plain = layer(x)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    gap = difference(compiled.detach(), plain.detach())
    assert gap <= 1e-5, f"compiled, the layer's output differs by {gap:.2e}"
    compiled.sum().backward()


@check(slow=True)
def model_compiles_whole(case: Case) -> None:
    """torch.compile takes the training step in one graph, and computes the same."""
    model = case.wrap_stirred()
    batch = case.batch()
    plain = gradients(model, batch)
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    try:
        found = gradients(compiled, batch)
    except Unsupported as error:
        raise UnsupportedError(refusal(case.config(), "compile") or str(error)) from error
    assert_close_gradients(
        {n.removeprefix("_orig_mod."): g for n, g in found.items()}, plain, "compiled and not"
    )
    gap = difference(logits(compiled, batch), logits(model, batch))
    assert gap <= 1e-5, f"compiled logits differ by {gap:.2e}"


@dataclass
class Trained:
    """What `train` leaves: the loss of each step, and the optimizer."""

    losses: list[float]
    optimizer: torch.optim.Optimizer


def train(
    model: nn.Module,
    batch: Batch,
    *,
    steps: int,
    lr: float,
    done: int = 0,
    weight: float = 1.0,
    state: dict[str, Any] | None = None,
    **options: Any,
) -> Trained:
    """Train on one batch up to optimizer step `steps`, as any loop drives a method.

    Args:
        done: steps taken before, whose optimizer state is `state`.
        weight: of the loss, for a process that has a share of the batch.
        options: of AdamW, which trains what does not insist on another optimizer.
    """
    life = lifecycle(model)
    if not done:
        life.prepare([batch])
    parts = [{"params": [*trainable(model).values()], "lr": lr, "weight_decay": 0.0}]
    optimizer = life.make_optimizer(parts)
    if optimizer is None:
        optimizer = torch.optim.AdamW(parts, **options)
    life.attach_optimizer(optimizer, done, total_steps=steps)
    if state is not None:
        optimizer.load_state_dict(state)
    losses = []
    for step in range(done + 1, steps + 1):
        loss = model(**batch).loss
        (loss * weight).backward()
        optimizer.step()
        life.after_step(step, optimizer)
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return Trained(losses, optimizer)


def rows_of(batch: Batch, rows: list[int]) -> Batch:
    return {name: tensor[rows] for name, tensor in batch.items()}


def add(gradients: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([g[name] for g in gradients]).sum(0) for name in gradients[0]}


def scaled(gradients: dict[str, Tensor], factor: float) -> dict[str, Tensor]:
    return {name: gradient * factor for name, gradient in gradients.items()}


def assert_close_gradients(
    found: dict[str, Tensor], expected: dict[str, Tensor], what: str, *, tolerance: float = 1e-4
) -> None:
    """Same names, and each gradient equal within `tolerance` of the largest of all of them."""
    assert set(found) == set(expected), f"{what}: {sorted(set(found) ^ set(expected))}"
    largest = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in expected.items():
        gap = difference(found[name], gradient)
        assert gap <= tolerance * largest, f"{what}: gradients of {name} differ by {gap:.2e}"


def _is_adapter(name: str, case: Case) -> bool:
    return case.prefix in name or ".modules_to_save." in name
