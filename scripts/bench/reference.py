"""Dense reference implementations of the methods in plain torch, to check steps before timing them.

Shapes: I in, O out, R rank, E experts, K selected experts. In `dense(model)`, the adapted layers
compute the equations of the paper from the same parameters, with nothing fused, gathered or
skipped; auxiliary losses are added to the loss itself.

A method without a reference is benchmarked unchecked; to check it, add a function to `DENSE`.
"""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F

from bench.shapes import Bench, gradient_to_embeddings
from petl.core.layers.block import BlockAdapters, BlockCall, split_arguments
from petl.core.layers.layer import Adapter, AdapterLayer
from petl.efficiency.fused_lora.layer import FusedLoraLinear
from petl.methods.mola.routes import gates_of
from petl.ops.low_rank import keep_mask
from petl.ops.masks import unpack_mask
from petl.ops.quantize import POSITIVE_CODES

Terms = list[Tensor]
Dense = Callable[[Any, Any, Tensor, Terms], Tensor]  # layer, adapter, input, terms of the loss
SideNetwork = Callable[[Any, list[Tensor], Tensor], Tensor]  # adapter, features, last input
T = TypeVar("T")


class NoReferenceError(LookupError):
    """A method has no dense reference."""


def check(bench: Bench, model: PeftModel, tolerance: float) -> str:
    """Compare a step of `model` in float32 with its dense reference; return the error, or "".

    Args:
        tolerance: relative, of the loss and of the norm of each gradient. A gradient that is zero
            but for rounding, as of the bias of keys, has no relative error.

    Raises:
        NoReferenceError: the method has no reference.
    """
    with dense(model) as terms:
        expected = loss_and_gradients(bench, model, terms)
    actual = loss_and_gradients(bench, model)
    if actual.keys() != expected.keys():
        return f"only one step has a gradient of {sorted(actual.keys() ^ expected.keys())[0]}"
    sizes = {name: float(torch.linalg.vector_norm(tensor)) for name, tensor in expected.items()}
    rounding = torch.finfo(torch.float32).eps * max(sizes.values())
    for name, tensor in expected.items():
        difference = float(torch.linalg.vector_norm(actual[name] - tensor))
        error = difference / sizes[name] if sizes[name] else 0.0
        if not (error <= tolerance or difference <= rounding):
            return f"{name} is off by {error:.1e}"
    return ""


def loss_and_gradients(
    bench: Bench, model: PeftModel, terms: Terms | None = None
) -> dict[str, Tensor]:
    """Return the loss of a step, and the gradients of all trainable tensors and the embeddings.

    Without that of the embeddings where the method cuts it off.

    Args:
        terms: terms of the loss, a list that the dense layers fill in forward.
    """
    model.zero_grad()
    torch.manual_seed(3)  # of dropout
    with gradient_to_embeddings(model) as embedded:
        loss = model(**bench.batch).loss
    if terms is not None:
        loss = loss + sum(terms)
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    found = {"the loss": loss.detach(), "the embeddings": embedded[0].grad, **gradients}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


@contextmanager
def dense(model: PeftModel) -> Generator[Terms]:
    """In the block, adapted layers use their references; yields the list of terms of the loss."""
    terms: Terms = []
    replaced: list[nn.Module] = []
    density, distillation = (
        getattr(model, name, None) for name in ("activation_density", "distillation")
    )
    handles = [] if density is None else _watch_density(density, terms)
    if distillation is not None:
        handles += _watch_distillation(distillation, terms, replaced)
    try:
        for layer in model.modules():
            forward = _forward_of(layer)
            if forward is not None:
                layer.forward = partial(forward, terms=terms)
                replaced.append(layer)
        yield terms
    finally:
        for layer in replaced:
            del layer.forward
        for undo in handles:
            undo()


def _forward_of(module: Any) -> Callable[..., Any] | None:
    if isinstance(module, Adapter):
        network = _reference(module, SIDE_NETWORKS)
        return None if network is None else partial(_call_side, network, module)
    if isinstance(module, AdapterLayer):
        adapter: Any = module.adapters["default"]
        form = _reference(adapter, DENSE)
        if form is None and _reference(adapter, SIDE_NETWORKS) is None:
            raise NoReferenceError(f"{type(adapter).__name__} has no reference")
        call = _call_block if isinstance(module, BlockAdapters) else _call
        return None if form is None else partial(call, form, module, adapter)
    if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
        return partial(_call, lora, module, module)
    return None


def _reference(adapter: Adapter, known: Mapping[str, T]) -> T | None:
    names = [cls.__name__ for cls in type(adapter).__mro__]  # a subclass computes the same
    return next((known[name] for name in names if name in known), None)


def _call(form: Dense, layer: Any, adapter: Any, x: Tensor, *, terms: Terms) -> Tensor:
    return form(layer, adapter, x, terms)


def _call_block(
    form: Dense, layer: Any, adapter: Any, *args: Any, terms: Terms, **kwargs: Any
) -> Any:
    x, args, kwargs, keyword = split_arguments(args, kwargs)
    block = BlockCall(layer.base_layer, keyword)
    plain = SimpleNamespace(base_layer=lambda x: block(x, *args, **kwargs))
    return block.complete(form(plain, adapter, x, terms))


def _call_side(
    network: SideNetwork, adapter: Any, features: list[Tensor], last: Tensor, *, terms: Terms
) -> Tensor:
    return network(adapter, features, last)


def value(owner: Any, name: str) -> Tensor:
    """Return a tensor of an adapter as it is used: binarized by method binary."""
    tensor = getattr(owner, name)
    entry = vars(owner).get("quantized_weights", {}).get(name)
    if entry is None:
        return tensor
    if entry.takes_steps:  # the tensor has the gradient of the values alone
        values = entry.stats[1] * book(entry.bits).to(tensor)[entry.codes.long()] + entry.stats[0]
        return values + tensor - tensor.detach()
    return quantized(tensor, entry.bits)


def book(bits: int) -> Tensor:
    """Return all codes, rising."""
    positive = list(POSITIVE_CODES[bits])
    return torch.tensor([-code for code in reversed(positive)] + positive)


def quantized(W: Tensor, bits: int) -> Tensor:
    """Round standardized entries to the nearest code; straight-through gradient."""
    codes = book(bits).to(W)
    Z = (W - W.mean()) / (W.std() + 1e-5)
    nearest = codes[(Z[..., None] - codes).abs().argmin(-1)]
    return W.std() * (nearest - Z.detach() + Z) + W.mean()


def changed(layer: Any, x: Tensor, delta: Tensor) -> Tensor:
    """Return the output of the base layer with `delta` [O, I] added to its weight."""
    base = layer.base_layer
    return F.linear(x, base.weight + delta, base.bias)


# The methods


def lora(layer: Any, adapter: Any, x: Tensor, terms: Terms) -> Tensor:
    """LoRA: B A x, with the same dropout mask as the fused layer."""
    A, B = (value(adapter.lora_A["default"], "weight"), value(adapter.lora_B["default"], "weight"))
    scale = adapter.scaling["default"]
    drop = adapter.lora_dropout["default"]
    if isinstance(layer, FusedLoraLinear) and isinstance(drop, nn.Dropout):
        mask, mean = keep_mask(x, drop.p)  # the same draw, applied in the open
        dropped = x * mask / mean
    else:
        dropped = drop(x)
    return layer.base_layer(x) + F.linear(dropped, scale * (B @ A))


def mola(layer: Any, adapter: Any, x: Tensor, terms: Terms) -> Tensor:
    """MoLA: a loop over all experts with their gates; adds the balance loss.

    The gates and the balance loss of a pre-gated router are those of its hook in both steps; the
    router itself is compared with loops in tests/methods/test_mola_pregate.py.
    """
    config, E, R, scale = adapter.config, adapter.num_experts, adapter.rank, adapter.scale
    A_ERI = value(adapter, "lora_A").unflatten(0, (E, R))
    B_OER = value(adapter, "lora_B").unflatten(1, (E, R))
    is_pregated = config.router_type == "pregated"
    if is_pregated:
        gate_E = gates_of(adapter.info, E, x).unflatten(0, x.shape[:-1])
    else:
        prob_E = F.linear(x, value(adapter, "router")).softmax(-1)
        picked_E = (prob_E >= prob_E.topk(config.top_k).values[..., -1:]).to(prob_E)
        gate_E = prob_E * picked_E / (prob_E * picked_E).sum(-1, keepdim=True)
    y = layer.base_layer(x)
    for e in range(E):
        y = y + gate_E[..., e : e + 1] * F.linear(x, scale * (B_OER[:, e] @ A_ERI[e]))
    if is_pregated:
        return y
    tokens = tuple(range(prob_E.dim() - 1))
    load_E = picked_E.mean(tokens) / config.top_k
    balance = E * (load_E.detach() * prob_E.mean(tokens)).sum()
    terms.append(config.router_aux_loss_coef * adapter.info.settings["layer_weight"] * balance)
    return y


def increlora(layer: Any, adapter: Any, x: Tensor, terms: Terms) -> Tensor:
    """IncreLoRA: B diag(E) A x; adds the orthogonality loss."""
    config, R = adapter.config, adapter.active_rank
    count = R + adapter.reserve
    A, B = adapter.lora_A[:count], adapter.lora_B[:, :count]
    E = torch.cat([adapter.E[:R, 0], A.new_full((count - R,), 1e-5)])
    one = torch.eye(count).to(A)
    gaps = [torch.linalg.matrix_norm(M - one) for M in (A @ A.t(), B.t() @ B)]
    terms.append(config.orth_reg_weight / len(adapter.growth.ranks) * sum(gaps) / 2)
    return changed(layer, x, config.lora_alpha / (R + 1e-5) * (B @ torch.diag(E) @ A))


def mos(layer: Any, adapter: Any, x: Tensor, terms: Terms) -> Tensor:
    """MoS: concatenates the shards of each vector, then as LoRA."""
    config, pool, S = adapter.config, adapter.info.shared, adapter.config.shards_per_vector
    sides = []
    for side in "AB":
        shards = value(pool, f"pool_{side}_{adapter.group}")
        drawn = getattr(adapter, f"index_{side}").tolist()
        rows = [drawn[j * S : (j + 1) * S] for j in range(config.r)]
        sides.append(torch.stack([torch.cat([shards[i] for i in row]) for row in rows]))
    A, B = sides
    return changed(layer, x, config.lora_alpha / config.r * (B.t() @ A))


def bottleneck(layer: Any, adapter: Any, x: Tensor, terms: Terms) -> Tensor:
    """Bottleneck adapter: down, activation, up, a norm and a gate where there is one, residual.

    Parallel ones read the input, gates the residual stream.
    """
    streams = [capture.pop() for capture in getattr(layer, "captures", {}).values()]
    y = layer.base_layer(x)
    h = x if adapter.config.placement == "parallel" else y
    z = adapter.act(F.linear(h, value(adapter, "down_weight"), adapter.down_bias))
    f = F.linear(z, value(adapter, "up_weight"), adapter.up_bias)
    if adapter.config.ln_after:
        f = F.layer_norm(f, f.shape[-1:], adapter.norm_after_weight, adapter.norm_after_bias)
    if adapter.gate == "none":
        return y + f
    if adapter.gate == "large":
        z = F.linear(streams[0], value(adapter, "gate_down_weight"), adapter.gate_down_bias)
        logits = F.linear(adapter.act(z), value(adapter, "gate_up_weight"), adapter.gate_up_bias)
    else:  # middle_x
        logits = F.linear(streams[0] + y + f, value(adapter, "gate_weight"), adapter.gate_bias)
    return 2 * torch.sigmoid(logits) * (y + f)


def polyhistor(layer: Any, adapter: Any, x: Tensor, terms: Terms) -> Tensor:
    """Polyhistor, one task and one width: codes, templates, then a bottleneck with a norm."""
    pool = adapter.info.shared

    def mapped(name: str, v: Tensor) -> Tensor:
        return value(pool, f"{name}_weight") @ v + value(pool, f"{name}_bias")

    inner = torch.cat([value(pool, "task_embedding")[0], value(adapter, "layer_embedding")[0]])
    code = mapped("hyper_out", mapped("hyper_in", inner).relu())
    code = (code - code.mean()) / (code.var(unbiased=False) + 1e-6).sqrt()
    code = code * value(pool, "code_norm_weight") + value(pool, "code_norm_bias")
    R, made = adapter.config.rank, {}
    for side, rows in (("up", adapter.width), ("down", adapter.bottleneck)):
        numbers = mapped(side, code)
        made[side] = numbers[: rows * R].view(rows, R) @ numbers[rows * R :].view(R, -1)
    y = layer.base_layer(x)
    z = adapter.act(F.linear(y, made["down"], mapped("down_shift", code)))
    f = F.linear(z, made["up"], mapped("up_shift", code))
    f = (f - f.mean(-1, keepdim=True)) / (f.var(-1, False, keepdim=True) + 1e-5).sqrt()
    return y + f * mapped("norm_scale", code) + mapped("norm_shift", code)


def compacter(layer: Any, adapter: Any, x: Tensor, terms: Terms) -> Tensor:
    """Compacter: bottleneck whose weights are sums of Kronecker products."""
    y = layer.base_layer(x)
    z = adapter.act(y @ _kronecker(adapter, "down") + adapter.down_bias)
    return y + z @ _kronecker(adapter, "up") + adapter.up_bias


def _kronecker(adapter: Any, side: str) -> Tensor:
    left, right = value(adapter, f"{side}_left"), value(adapter, f"{side}_right")
    terms = zip(value(adapter.info.shared, "rule"), left, right, strict=True)
    return torch.stack([torch.kron(R, a @ b) for R, a, b in terms]).sum(0)


def sherl(adapter: Any, features: list[Tensor], last: Tensor) -> Tensor:
    """SHERL's side network, with one block after another."""
    D, M, G = (value(adapter, f"{name}_weight") for name in ("down", "mix", "gate"))
    z = []
    for i, x in enumerate(features):
        u = F.relu(x @ D[i].t() + adapter.down_bias[i])
        gate = torch.sigmoid(u @ G[i].t() + adapter.gate_bias[i])
        z.append((u @ M[i].t() + adapter.mix_bias[i] + u) * gate)
    guide, tiers = z[-1], z[:-1]
    e = [tier / (tier.norm(dim=-1, keepdim=True) + 1e-6) for tier in tiers]
    w, b = value(adapter, "score_weight")[0], adapter.score_bias
    scores = []
    for i, tier in enumerate(tiers):
        redundancy = sum(F.relu((e[i] * other).sum(-1)) for other in e)
        scores.append(F.relu((tier * guide) @ w + b) / redundancy)
    total = sum(scores) + 1e-6
    parts = (a.div(total)[..., None] * tier for a, tier in zip(scores, tiers, strict=True))
    y = F.relu(guide + sum(parts)) @ value(adapter, "up_weight").t() + adapter.up_bias
    return y + torch.tanh(adapter.residual_gate / adapter.temperature) * last


def icv(layer: Any, adapter: Any, x: Tensor, terms: Terms) -> Tensor:
    """ICV: the cosine scale, with the norm of each state kept."""
    y = layer.base_layer(x)
    size, v = y.norm(dim=-1, keepdim=True), value(adapter, "vector")
    v = v / v.norm()
    away = F.relu(-(y * v).sum(-1, keepdim=True) / size)
    moved = y / size + adapter.config.strength * (1 + away) * v
    return size * moved / moved.norm(dim=-1, keepdim=True)


def sparse(layer: Any, adapter: Any, x: Tensor, terms: Terms) -> Tensor:
    """Sparse: adds the values to a dense copy of the weight."""
    weight = layer.base_layer.weight
    flat = torch.zeros_like(weight).flatten()
    delta = flat.index_put((adapter.indices.long(),), adapter.values)
    return changed(layer, x, delta.view_as(weight))


def pela(layer: Any, adapter: Any, x: Tensor, terms: Terms) -> Tensor:
    """PELA: a dense product in place of the weight."""
    return F.linear(x, adapter.low_B @ adapter.low_A, adapter.bias)


def pst(layer: Any, adapter: Any, x: Tensor, terms: Terms) -> Tensor:
    """PST: a dense masked weight; the mask is the adapter's, since rounding may swap near-ties."""
    weight = layer.base_layer.weight
    beta, alpha1, alpha2 = adapter.scales
    moved = weight + beta * adapter.U @ adapter.V
    scores = moved.abs() + alpha1 * adapter.A @ adapter.B
    scores = scores + alpha2 * (adapter.R[:, None] + adapter.C[None])
    mask = unpack_mask(adapter.mask_now(weight)[0], tuple(weight.shape)).to(moved)
    # straight through: the gradient of the scores is that of the mask
    return F.linear(x, (mask + scores - scores.detach()) * moved, layer.base_layer.bias)


def dsee(layer: Any, adapter: Any, x: Tensor, terms: Terms) -> Tensor:
    """DSEE: a dense masked weight plus a dense update."""
    weight = layer.base_layer.weight
    moved = weight * unpack_mask(adapter.mask, tuple(weight.shape))
    if adapter.is_target:
        flat = (adapter.lora_B @ adapter.lora_A).flatten()
        update = flat.index_add(0, adapter.indices.long(), adapter.values)
        moved = moved + adapter.scale * update.view_as(weight)
    return F.linear(x, moved, layer.base_layer.bias)


DENSE: dict[str, Dense] = {
    "PelaAdapter": pela,
    "MolaAdapter": mola,
    "IncreloraAdapter": increlora,
    "MosAdapter": mos,
    "BottleneckAdapter": bottleneck,
    "CompacterAdapter": compacter,
    "PolyhistorAdapter": polyhistor,
    "SparseAdapter": sparse,
    "IcvAdapter": icv,
    "PstAdapter": pst,
    "DseeAdapter": dsee,
}
SIDE_NETWORKS: dict[str, SideNetwork] = {"SherlAdapter": sherl}  # which no layer calls


def _watch_density(density: Any, terms: Terms) -> list[Callable[[], None]]:
    """Compute the density loss from its formula; return functions that undo the change."""
    layers, config = density.sites.layers, density.config
    weight, config.weight = config.weight, 0.0

    def note(module: nn.Module, args: Any, a: Tensor) -> None:
        h = a.square() / (a.square() + config.eps)
        terms.append(weight * h.mean() / len(layers))

    handles = [density.base.get_submodule(name).register_forward_hook(note) for name in layers]

    def restore() -> None:
        config.weight = weight

    return [restore, *(handle.remove for handle in handles)]


def _watch_distillation(
    distillation: Any, terms: Terms, replaced: list[nn.Module]
) -> list[Callable[[], None]]:
    """Compute the loss `distill` from its formula; return functions that undo the change.

    While layers are replaced, the term itself finds no difference: its teacher is the student.
    """
    base, config = distillation.base, distillation.config
    targets: dict[str, Tensor] = {}
    teaching = False

    def teach(module: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal teaching
        forwards, teaching = {layer: layer.forward for layer in replaced}, True
        calls, distillation.calls = distillation.calls, {}  # its hooks compare nothing here
        for layer in replaced:
            layer.forward = layer.base_layer.forward
        with torch.no_grad():
            base.forward(*args, **kwargs)
        for layer, forward in forwards.items():
            layer.forward = forward
        teaching, distillation.calls = False, calls

    def note(path: str, module: nn.Module, args: Any, output: Any) -> None:
        y = output[0] if isinstance(output, tuple) else output
        if teaching:
            targets[path] = y
        elif path in targets:
            square = (y - targets.pop(path)).square().mean()
            terms.append(config.feature_weight * square / len(distillation.blocks))

    handles = [base.register_forward_pre_hook(teach, with_kwargs=True)]
    handles += [
        base.get_submodule(path).register_forward_hook(partial(note, path))
        for path in distillation.blocks.values()
    ]
    return [handle.remove for handle in handles]
