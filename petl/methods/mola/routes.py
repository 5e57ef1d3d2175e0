"""Hooks of a model that run its pre-gated routers before the first layer, and their cache.

`Routes.begin` computes the gates of each running adapter once, from the token ids; the adapted
layers read them with `gates_of`. Shapes: B rows, T tokens, S tokens in the cache, E experts.
"""

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from petl.core.layers.context import add_gradient, is_encoder_decoder
from petl.core.layers.layer import LayerInfo
from petl.core.method import NewAdapters
from petl.core.model.modes import checkpoints_reentrantly
from petl.core.model.places import place
from petl.core.types import Arguments
from petl.errors import InputError, UnsupportedError
from petl.methods.mola.pregate import PreGate
from petl.methods.mola.routing import balance_weights, expert_sums, top_k_gates
from petl.methods.mola.tokens import cache_in, cache_of, tokens_of
from petl.ops import Ctx

ROUTES = "routes of tokens"  # key in `ForwardContext.passed_on`
PRESENT = "router states of tokens"  # key in `ForwardContext.state`
ROUTER = "router"  # in place of a module's path, where losses and metrics are recorded by path


def refuse_unroutable(model: nn.Module, keys: Iterable[str]) -> None:
    """Raise UnsupportedError if a pre-gated router cannot route for these modules of a model."""
    what = f"router_type='pregated' cannot route for {type(model).__name__}"
    if is_encoder_decoder(model):
        raise UnsupportedError(
            f"{what}: encoder and decoder have token ids of their own, which need two routers; "
            "use router_type='linear' or 'recurrent'"
        )
    get_embedding = getattr(model, "get_input_embeddings", None)
    embedding = None if get_embedding is None else get_embedding()
    table = getattr(embedding, "weight", None)
    main_input = getattr(model, "main_input_name", "input_ids")
    if main_input != "input_ids" or not isinstance(table, Tensor) or table.dim() != 2:
        raise UnsupportedError(
            f"{what}: it reads token ids, and the main input of this model is {main_input}, or it "
            "has no table of token embeddings; use router_type='linear' or 'recurrent'"
        )
    for key in keys:
        if place(model, key) is None:
            raise UnsupportedError(
                f"{what}: {key} is in no list of layers, and may see other tokens than input_ids; "
                "leave it out with exclude_modules"
            )


@dataclass
class Gates:
    """The gates of one adapter in a forward pass.

    Attributes:
        shape: rows and tokens, [B, T].
        by_experts: by the number of experts of a layer, [B T, E].
    """

    shape: tuple[int, int]
    by_experts: dict[int, Tensor]


def gates_of(info: LayerInfo, experts: int, x: Tensor) -> Tensor:
    """Return the gates of the tokens in `x` [..., I], an input of a layer with E `experts`: [T, E].

    Raises:
        InputError: the model was not called as a whole, the layer has other tokens than the model's
            input, or reentrant checkpointing was not recognized.
    """
    context = info.context
    found: Gates | None = context.passed_on.get((ROUTES, info.adapter_name))
    if found is None:
        raise InputError(
            f"{info.key} has an adapter with router_type='pregated', whose router has not run: "
            "call the model that was wrapped, not a part of it"
        )
    gate_TE, (B, T) = found.by_experts[experts], found.shape
    if context.rows is not None:
        gate_TE = gate_TE.unflatten(0, (B, T))[list(context.rows)].flatten(0, 1)
        B = len(context.rows)
    if x[..., 0].numel() != B * T or (x.dim() == 3 and x.shape[0] != B):
        raise InputError(
            f"{info.key} has an input of shape {list(x.shape)} and the router [{B}, {T}] tokens: "
            "router_type='pregated' adapts layers that see each token of input_ids once; leave "
            "others out with exclude_modules"
        )
    if context.recording and not torch.is_grad_enabled() and not gate_TE.is_leaf:
        raise InputError(
            f"{info.key}: router_type='pregated' ran in a segment without gradients that is not "
            "reentrant checkpointing of transformers; pass "
            "gradient_checkpointing_kwargs={'use_reentrant': False}"
        )
    return gate_TE


class RouterCacheLayer(DynamicLayer):
    """What a router keeps of past tokens, as a further layer of the model's cache.

    So it is cropped, reordered, copied and reset with the keys and values of the model. `keys` is
    [B, 1, S, N], see `PreGate.forward`; `values` is empty.
    """

    # neither: masks are made from the first layer of either kind, which must be the model's
    is_sliding = None

    def __init__(self, adapter_name: str) -> None:
        super().__init__()
        self.adapter_name = adapter_name

    def add(self, present_BTN: Tensor) -> None:
        """Append the states of new tokens."""
        keys = present_BTN[:, None]
        self.update(keys, keys[..., :0])


def router_layer(cache: Cache, adapter_name: str) -> RouterCacheLayer | None:
    """Return the layer of a cache that belongs to the router of an adapter, or None."""
    own = (layer for layer in cache.layers if isinstance(layer, RouterCacheLayer))
    return next((layer for layer in own if layer.adapter_name == adapter_name), None)


def past_states(cache: Cache | None, adapter_name: str) -> Tensor | None:
    """Return what the router has kept of the tokens in a cache, [B, S, N]; None: there are none.

    Raises:
        InputError: the cache has tokens that the router has not seen.
    """
    if cache is None:
        return None
    layer = router_layer(cache, adapter_name)
    known = 0 if layer is None else layer.get_seq_length()
    layers = [each for each in cache.layers if not isinstance(each, RouterCacheLayer)]
    has_attention = any(isinstance(each, CacheLayerMixin) for each in layers)
    seen = int(cache.get_seq_length()) if has_attention else known
    if seen != known:
        raise InputError(
            f"the cache has {seen} tokens, of which the router of adapter {adapter_name!r} has "
            f"seen {known}: router_type='pregated' needs a cache that was filled with this adapter "
            "active; compute the prompt again"
        )
    states = None if layer is None or known == 0 else layer.keys
    return None if states is None else states[:, 0]


class _Join(torch.autograd.Function):
    """Identity on `x`; in backward each gate gets the gradient that its leaf has collected.

    Reentrant checkpointing runs a backward pass of its own for each segment. It ends at leaves; the
    gradient of `x`, the input of the first segment, is computed after all of them.
    """

    @staticmethod
    def forward(ctx: Ctx, x: Tensor, leaves: list[Tensor], *gates: Tensor) -> Tensor:
        ctx.leaves = leaves
        return x.detach()  # no view: models may change it in place

    @staticmethod
    def backward(ctx: Ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # ty: ignore[incompatible-method-override]
        collected = [leaf.grad for leaf in ctx.leaves]
        for leaf in ctx.leaves:
            leaf.grad = None
        return grad, None, *collected


class Routes:
    """Hooks of one model, whose routers and adapters they read.

    Args:
        new: its first adapters with a pre-gated router.
    """

    def __init__(self, new: NewAdapters[Any, Any]) -> None:
        self.context, self.placed = new.context, new.placed
        self.names = list(inspect.signature(new.model.forward).parameters)
        self.joining: RemovableHandle | None = None

    def attach(self, model: nn.Module) -> list[RemovableHandle]:
        """Register the hooks on the base model, after those of the context."""
        return [
            model.register_forward_pre_hook(self.begin, with_kwargs=True),
            model.register_forward_hook(self.end, with_kwargs=True),
        ]

    def running(self) -> dict[str, PreGate]:
        """Return the routers of the adapters that run in this pass.

        In a mixed batch all of them: so all rows have the same layers in their caches.
        """
        routers: dict[str, PreGate] = {}
        for name, adapters in self.placed.items():
            info = next(iter(adapters.values())).info
            runs = self.context.is_mixed or name in info.layer.active_adapters
            if runs and isinstance(info.shared, PreGate) and not info.layer.disable_adapters:
                routers[name] = info.shared
        return routers

    def begin(self, model: nn.Module, args: tuple[object, ...], kwargs: Arguments) -> Any:
        """Forward pre-hook, after `ForwardContext.begin`: compute the gates of all layers."""
        self._stop_joining()  # of an aborted pass
        routers = self.running()
        if not routers:
            return None
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        cache = cache_in(given)
        reads_embedding = any(router.reads_embedding for router in routers.values())
        is_reentrant = self.context.recording and checkpoints_reentrantly(model)
        present: dict[str, Tensor] = {}
        gates: list[Tensor] = []
        leaves: list[Tensor] = []
        for name, router in routers.items():
            past_BSN = past_states(cache, name)
            if not present:  # the same tokens for all, in the cache too
                past = 0 if past_BSN is None else past_BSN.shape[1]
                tokens = tokens_of(model, given, past, reads_embedding=reads_embedding)
                tokens.check_lookahead(max(each.lookahead for each in routers.values()))
            logits_BTE, present[name] = router(tokens, past_BSN)
            own = self._gates(name, logits_BTE.flatten(0, 1))
            if is_reentrant:
                gates += own.values()
                own = {e: g.detach().requires_grad_(g.requires_grad) for e, g in own.items()}
                leaves += own.values()
            found = Gates((logits_BTE.shape[0], logits_BTE.shape[1]), own)
            self.context.passed_on[ROUTES, name] = found
        self.context.state[PRESENT] = present
        if not is_reentrant:
            return None
        return self._join(model, args, kwargs, lambda x: _Join.apply(x, leaves, *gates))

    def end(self, model: nn.Module, args: Any, kwargs: Mapping[str, Any], output: object) -> None:
        """Forward hook: keep the routers' states on the model's cache, if it has one."""
        self._stop_joining()
        state = self.context.state
        present = state.pop(PRESENT, {})
        if not torch.is_grad_enabled():  # no backward pass will read the gates
            for key in [key for key in state if isinstance(key, tuple) and key[0] == ROUTES]:
                del state[key]
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        cache = cache_in(given) or cache_of(output)
        if cache is None:
            return
        for name, present_BTN in present.items():
            layer = router_layer(cache, name)
            if layer is None:
                layer = RouterCacheLayer(name)
                # after the model's own, which it finds by index
                cache.layers.append(layer)
            layer.add(present_BTN)

    def _gates(self, name: str, logit_TE: Tensor) -> dict[int, Tensor]:
        """Return the gates of an adapter by the number of experts of a layer."""
        placed, config = self.placed[name], self._config(name)
        if self.context.recording and config.router_aux_loss_coef > 0:
            logit_TE = self._balanced(name, logit_TE)
        # a layer with fewer experts has the first logits
        counts = sorted({adapter.num_experts for adapter in placed.values()})
        return {e: top_k_gates(logit_TE[:, :e], config.top_k)[0] for e in counts}

    def _config(self, name: str) -> Any:
        return next(iter(self.placed[name].values())).config

    def _balanced(self, name: str, logit_TE: Tensor) -> Tensor:
        """Return the logits; their backward pass adds the gradient of the router's balance loss."""
        config, context = self._config(name), self.context
        _, picked_TE, prob_TE = top_k_gates(logit_TE, config.top_k)
        picks_E, prob_E = expert_sums(picked_TE, prob_TE, context.mask_of(len(logit_TE)))
        to_weights = partial(balance_weights, k=config.top_k, factor=config.router_aux_loss_coef)
        key = f"{ROUTER}.{name}"
        term = context.weighted_term(key, prob_E, picks_E, to_weights, picks=picks_E)
        return logit_TE if context.scale is None else add_gradient(logit_TE, term, context.scale)

    # Reentrant checkpointing

    def _join(self, model: Any, args: object, kwargs: Arguments, join: Any) -> Any:
        """Apply `join` to the model's embedded tokens in this pass; return its inputs."""
        if kwargs.get("inputs_embeds") is not None:
            return args, {**kwargs, "inputs_embeds": join(kwargs["inputs_embeds"])}
        embedding = model.get_input_embeddings()
        self.joining = embedding.register_forward_hook(lambda module, args, output: join(output))
        return None

    def _stop_joining(self) -> None:
        if self.joining is not None:
            self.joining.remove()
            self.joining = None
