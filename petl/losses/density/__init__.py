"""Activation density: a term that counts, smoothly, the MLP neurons that are not silent.

Runwal et al. 2025, "From PEFT to DEFT: Parameter Efficient Finetuning for Reducing Activation
Density in Transformers", AAAI (arXiv:2402.01911). Any method may lower it; the base stays frozen.
PEFT's own DEFT is another method, so here everything is called density. `ppl_sparsity` is of Luo et
al. 2025, "Sparsing Law", ICML (arXiv:2411.02335).

For the output a [B, T, F] of a nonlinearity (of the gate, in a gated MLP), `h(a) = a^2 / (a^2 +
eps)` tends to 1 where a is not 0. A layer's term is the mean of h over its values, a stack's the
mean over its layers; encoder and decoder add up. With eps 1e-7 only values within some 1e-3 of 0
feel it; a larger eps trains faster and measures something else, so note it with every result.

The term reaches the gradient in the backward pass of the activations themselves, in any trainer
(see `petl.core.layers.context`); `outputs.loss` only shows its value. Several processes count
together, but under torch.compile each averages over its own values.
"""

import json
import logging
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from petl.core.compat import BaseTunerLayer
from petl.core.distributed import num_processes
from petl.core.layers.context import ForwardContext
from petl.core.lifecycle import extra_losses
from petl.core.spec.config import require
from petl.core.spec.losses import WRAP_ONLY, register_loss
from petl.errors import InputError, UnsupportedError
from petl.losses.density.config import ActivationDensityConfig
from petl.losses.density.figures import active_shares, evaluating, mean, on_device, predicts_tokens
from petl.losses.density.modules import find_places, has_down, never_zero, watch
from petl.losses.density.ppl import Search
from petl.losses.density.tally import Tally, count_in_loss
from petl.losses.density.tokens import Masks, rows_of, token_masks
from petl.ops.density import count_nonzero

__all__ = ["ActivationDensity", "ActivationDensityConfig"]

NEVER_ZERO = "exact zeros never occur with silu"
FILE = "density.json"
logger = logging.getLogger(__name__)
Batches = Iterable[Mapping[str, Any]]


@register_loss(
    "density",
    summary="the share of MLP neurons that are not silent, lowered along with the task's loss",
    paper="Runwal et al. 2025, From PEFT to DEFT: Parameter Efficient Finetuning for Reducing "
    "Activation Density in Transformers, AAAI, arXiv:2402.01911",
)
class ActivationDensity:
    """The term on a finished PeftModel, which it makes itself known to.

    Also at `model.activation_density`. Merging, loading and generating are those of the adapter;
    `save_pretrained` writes density.json beside it. Where no adapter is left or switched on there
    is nothing to train, and the task's loss stands alone.

    Attributes:
        loss: the term D of the last training forward, detached and unweighted; None before it.
        figures: what `measure` and `ppl_sparsity` found of the adapter as it is; training empties
            it.

    Raises:
        InputError: there are no such modules, or the model has the term already.
    """

    config_cls = ActivationDensityConfig
    allows_reentrant = False  # its first pass has no graph, the term no way into a gradient

    def __init__(self, model: PeftModel, config: ActivationDensityConfig) -> None:
        if any(isinstance(part, ActivationDensity) for part in extra_losses(model)):
            raise InputError(
                "the model has a density term already; call model.activation_density.remove() first"
            )
        base: Any = model.get_base_model()
        self.model, self.base, self.config = model, base, config
        self.places = find_places(base, config.signal, config.activation_modules)
        self.is_encoder_decoder = any(self.places.stacks.values())
        self.context = ForwardContext()
        self.factor = 0.0
        self.tally = Tally(self.places.stacks, torch.zeros(()))
        self.masks: Masks = {}
        self.loss: Tensor | None = None
        self.figures: dict[str, float] = {}
        self.said: set[str] = set()
        self.hooks = [
            base.register_forward_pre_hook(self._begin, with_kwargs=True),
            *watch(base, self.places, self._count),
            base.register_forward_hook(self._end, with_kwargs=True),
        ]
        self.save_adapter = model.save_pretrained
        model.__dict__ |= {"save_pretrained": self.save_pretrained, "activation_density": self}
        extra_losses(model).append(self)

    @staticmethod
    def check(model: nn.Module, config: ActivationDensityConfig) -> None:
        """Raise InputError unless a base model has the modules that the term is about."""
        find_places(model, config.signal, config.activation_modules)

    def remove(self) -> None:
        """Take the term off the model again."""
        for handle in self.hooks:
            handle.remove()
        extra_losses(self.model).remove(self)
        for name in ("save_pretrained", "activation_density"):
            del self.model.__dict__[name]

    # In training

    def prepare(self, batches: Iterable[Any]) -> None:
        """Refuse a config that weighs what whoever calls this weighs itself."""
        self.config.check_driven()

    def series(self) -> dict[str, float]:
        """`density_loss`: the term D of the last training forward, unweighted."""
        return {} if self.loss is None else {"density_loss": float(self.loss)}

    def _begin(self, model: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        """Forward pre-hook of the base model, which PEFT calls whatever the task."""
        context, config = self.context, self.config
        context.begin(model, args, kwargs)
        if not context.recording:
            return
        self.figures.clear()
        counted = kwargs.get("num_items_in_batch") is not None  # then `context.scale` divides
        self.factor = config.weight / (1 if counted else config.gradient_accumulation_steps)
        assert context.scale is not None
        self.tally = Tally(self.places.stacks, context.scale * self.factor)
        self.masks = self._token_masks(kwargs)

    def _count(self, name: str, module: nn.Module, a: Tensor) -> Tensor:
        """`a`, counted if this is a training forward, and with the term's gradient in backward."""
        context, layer, eps = self.context, self.places.layers[name], self.config.eps
        if not module.training:
            return a
        tally = self.tally if context.recording else None  # None: recomputed by checkpointing
        mask = None
        if tally is not None:
            self._refuse_reentrant()
            mask = rows_of(self.masks.get(self.places.stack(name)), a)
            if torch.compiler.is_compiling():
                return tally.count_compiled(a, layer, eps, mask)
            rows = a[..., 0].numel() if mask is None else mask.sum()
            tally.add(layer, count_nonzero(a, eps, mask), rows * a.shape[-1])
        if not (torch.is_grad_enabled() and a.requires_grad and self.config.weight > 0):
            return a
        return count_in_loss(a, layer, eps, mask, tally)

    def _refuse_reentrant(self) -> None:
        if not torch.is_grad_enabled() and any(
            getattr(module, "gradient_checkpointing", False) for module in self.base.modules()
        ):
            raise UnsupportedError(
                "density needs gradient_checkpointing_kwargs={'use_reentrant': False}"
            )

    def _end(self, model: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> Any:
        """Forward hook of the base model: the term's value goes into the output's loss."""
        if self.context.recording:
            if not self.tally.sums:
                self.context.recording = False
                names = list(self.places.layers)
                raise UnsupportedError(
                    f"none of the {len(names)} activation modules was called, a fused kernel "
                    "passes them by: take signal='down_input', or switch the kernel off; they are "
                    f"{', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"
                )
            if num_processes() > 1 and not torch.compiler.is_compiling():
                assert self.context.scale is not None
                self.tally.over_processes(self.context.scale)
            self.loss = self.tally.value()
            if self.tally.has_gradient and self._has_adapter():
                self.context.record("density", self.loss * self.factor)
        return self.context.end(model, args, kwargs, output)

    def _has_adapter(self) -> bool:
        """Whether there is an adapter, switched on, that the term may train."""
        if any(config.is_prompt_learning for config in self.model.peft_config.values()):
            return True
        layers = (m for m in self.base.modules() if isinstance(m, BaseTunerLayer))
        first = next(layers, None)
        return first is not None and not first.disable_adapters

    def _token_masks(self, inputs: Mapping[str, Any]) -> Masks:
        return token_masks(inputs, self.is_encoder_decoder) if self.config.mask_padding else {}

    # Figures

    def measure(self, batches: Batches, threshold: float | None = None) -> dict[str, Any]:
        """The share of values with `|a| > threshold`, in [0, 1].

        It is taken of each sample, then averaged over samples and over modules: `density`, and
        `encoder` and `decoder` if there are both; `per_layer` has each module. With several
        processes the batches are each one's share.

        Args:
            threshold: None: that of the config. At 0 the exact zeros are what is not counted; what
                that means depends on the nonlinearity.
        """
        threshold = self.config.threshold if threshold is None else threshold
        if threshold == 0 and never_zero(self.base):
            warnings.warn(f"{NEVER_ZERO}; pass threshold or use ppl_sparsity", stacklevel=2)
        return self._measure(batches, threshold)

    @torch.no_grad()
    def _measure(self, batches: Batches, threshold: float) -> dict[str, Any]:
        places, kept = self.places, on_device(batches, self.base)
        with evaluating(self.model):
            shares = active_shares(self._run, self.base, places, kept, threshold, self._token_masks)
        found: dict[str, Any] = {"density": mean(shares.values()), "per_layer": shares}
        for stack in self._stacks_apart():
            found[stack] = mean(s for n, s in shares.items() if places.stack(n) == stack)
        self.figures["density"] = found["density"]
        return found

    def _run(self, batch: Mapping[str, Any]) -> Any:
        return self.model(**batch)

    def _stacks_apart(self) -> list[str]:
        """Encoder and decoder, if there are both."""
        stacks = set(self.places.stacks.values())
        return sorted(stacks) if len(stacks) > 1 else []

    @torch.no_grad()
    def ppl_sparsity(self, batches: Batches, p: float = 1.0) -> dict[str, Any]:
        """How many neurons can be left out at `p` per cent more perplexity; see `Search`.

        Perplexity is the exponential of the model's loss per label. A classifier's is about its
        classes, and says nothing while its head is untrained.

        Returns:
            `sparsity`, 1 - `activation_ratio`, the share of neurons kept, over layers and tokens;
            `per_layer`, the sparsity by down projection; `cett`, the largest common CETT;
            `thresholds` on the neuron's norm by down projection; `ppl_dense` and `ppl_sparse`.

        Raises:
            InputError: p is negative, a batch lacks labels, or there are no down projections.
        """
        require(p >= 0, f"p={p} is negative")
        given = self.config.activation_modules if self.config.signal == "down_input" else None
        names = list(find_places(self.base, "down_input", given).layers)
        stacks = find_places(self.base, "down_input", names)

        def token_mask(name: str, inputs: Mapping[str, Any], a: Tensor) -> Tensor | None:
            return rows_of(self._token_masks(inputs).get(stacks.stack(name)), a)

        with evaluating(self.model):
            kept = list(on_device(batches, self.base))
            found = Search(self.model, self.base, names, kept, token_mask).run(p)
        self.figures[f"ppl_{p:g}_sparsity"] = found["sparsity"]
        return found

    def report(self, batches: Batches) -> dict[str, float]:
        """Density and PPL-1% sparsity as plain figures for a table of scores.

        The sparsity is left out of a model that predicts no tokens, whose perplexity is none, and
        of one whose MLP blocks have no down projections.
        """
        kept = list(batches)
        found = self._measure(kept, self.config.threshold)
        figures = {"density": found["density"]}
        figures |= {f"{stack}_density": found[stack] for stack in self._stacks_apart()}
        why_not = self._no_sparsity()
        if not why_not:
            figures["ppl_1_sparsity"] = self.ppl_sparsity(kept)["sparsity"]
        else:
            self._say_once(f"the scores have no ppl_1_sparsity: {why_not}")
        if self.config.threshold == 0 and never_zero(self.base):
            self._say_once(f"density counts what is not 0, and {NEVER_ZERO}: set loss.threshold")
        return figures

    def _say_once(self, text: str) -> None:
        if text not in self.said:
            self.said.add(text)
            logger.info(text)

    def _no_sparsity(self) -> str:
        """Why there is no figure of PPL-p% sparsity in a report, or ""."""
        if not predicts_tokens(self.base):
            return f"{type(self.base).__name__} predicts no tokens, so it has no perplexity"
        return "" if has_down(self.base) else "no down projection is found in the MLP blocks"

    # Files

    def save_pretrained(self, save_directory: str, *args: Any, **kwargs: Any) -> None:
        """The adapter as PEFT saves it, and density.json: config, modules and figures."""
        self.save_adapter(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            content = {"name": "density", **asdict(self.config), "measured": self.figures}
            content["activation_modules"] = list(self.places.layers)
            for name in WRAP_ONLY:  # adapter_config.json says what trains
                del content[name]
            path = Path(save_directory) / FILE
            path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
