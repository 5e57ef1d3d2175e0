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
(see `petl.core.context`); `outputs.loss` only shows its value. Several processes count together,
but under torch.compile each averages over its own values.
"""

import json
import warnings
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from petl.core.config import about, require
from petl.core.context import ForwardContext
from petl.core.lifecycle import extra_losses
from petl.core.losses import LossConfig, register_loss
from petl.core.processes import num_processes
from petl.core.registry import METHODS
from petl.errors import InputError, UnknownNameError, UnsupportedError, near
from petl.losses.density.modules import find_places, has_down, never_zero
from petl.losses.density.ppl import Search, total
from petl.losses.density.tally import Tally, count_in_loss
from petl.losses.density.tokens import Masks, rows_of, share_active, token_masks
from petl.ops.density import count_nonzero

__all__ = ["ActivationDensity", "ActivationDensityConfig"]

FILE = "density.json"
Batches = Iterable[Mapping[str, Any]]


@dataclass
class ActivationDensityConfig(LossConfig):
    """See the module's docstring; D is the density term."""

    method: str = about("the method that trains, for petl.wrap(model, 'density')", "lora")
    method_config: dict[str, Any] = field(default_factory=dict, metadata={"help": "its fields"})
    weight: float = about("factor of the term, at least 0", 1.0)
    eps: float = about("above 0; a value counts half at its square root", 1e-7)
    activation_modules: list[str] | None = about(
        "names or suffixes of the modules to watch; null: the nonlinearities of the MLP blocks, or "
        "their down projections",
        None,
    )
    signal: str = about(
        "what is counted: activation, the nonlinearity's output, or down_input, the down "
        "projection's input (gate times up)",
        "activation",
    )
    mask_padding: bool = about("leave padding tokens out", False)
    gradient_accumulation_steps: int = about(
        "divides the term, for a trainer that neither divides its loss by the steps it accumulates "
        "over nor says how many items they hold; petl's own loop and petl.Callback need 1",
        1,
    )
    threshold: float = about("for reports: active means |a| > threshold", 0.0)

    def check(self) -> None:
        if self.method not in METHODS:
            raise UnknownNameError(f"no method {self.method!r}" + near(str(self.method), METHODS))
        require(self.weight >= 0, f"weight must be >= 0, got {self.weight}")
        require(self.eps > 0, f"eps must be positive, got {self.eps}")
        require(
            self.signal in ("activation", "down_input"),
            f"signal={self.signal!r} is not activation or down_input",
        )
        steps = self.gradient_accumulation_steps
        require(steps >= 1, f"gradient_accumulation_steps={steps} is not at least 1")
        require(self.threshold >= 0, f"threshold={self.threshold} is negative")


@register_loss(
    "density",
    summary="the share of MLP neurons that are not silent, lowered along with the task's loss",
    paper="Runwal et al. 2025, From PEFT to DEFT: Reducing Activation Density, arXiv:2402.01911",
)
class ActivationDensity:
    """The term on a finished PeftModel, which it makes itself known to.

    Also at `model.activation_density`. Merging, loading and generating are those of the adapter;
    `save_pretrained` writes density.json beside it. Call `remove` before the model is unloaded.

    Attributes:
        loss: the term D of the last training forward, detached and unweighted; None before it.
        figures: what `measure` and `ppl_sparsity` found last.

    Raises:
        InputError: there are no such modules, or the model has the term already.
    """

    config_cls = ActivationDensityConfig

    def __init__(self, model: PeftModel, config: ActivationDensityConfig) -> None:
        if any(isinstance(part, ActivationDensity) for part in extra_losses(model)):
            raise InputError(
                "the model has a density term already; call model.activation_density.remove() first"
            )
        base: Any = model.get_base_model()
        self.model, self.base, self.config = model, base, config
        self.places = find_places(base, config.signal, config.activation_modules)
        self.is_pair = any(self.places.stacks.values())
        self.context = ForwardContext()
        self.factor = 0.0
        self.tally = Tally(self.places.stacks, torch.zeros(()))
        self.masks: Masks = {}
        self.loss: Tensor | None = None
        self.figures: dict[str, float] = {}
        self.hooks = [
            base.register_forward_pre_hook(self._begin, with_kwargs=True),
            *self._visit(self._count),
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
        """Nothing to prepare."""

    def series(self) -> dict[str, float]:
        """`density_loss`: the term D of the last training forward, unweighted."""
        return {} if self.loss is None else {"density_loss": float(self.loss)}

    def _begin(self, model: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        """Forward pre-hook of the base model, which PEFT calls whatever the task."""
        context, config = self.context, self.config
        context.begin(model, args, kwargs)
        if not context.recording:
            return
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
            if self.tally.has_gradient:  # else there is nothing to train: the task's loss stands
                self.context.record("density", self.loss * self.factor)
        return self.context.end(model, args, kwargs, output)

    def _token_masks(self, inputs: Mapping[str, Any]) -> Masks:
        return token_masks(inputs, self.is_pair) if self.config.mask_padding else {}

    def _visit(self, visit: Any) -> list[RemovableHandle]:
        """Hooks that replace what is watched of each module by `visit(name, module, values)`."""
        handles = []
        for name in self.places.layers:
            module = self.base.get_submodule(name)
            if self.config.signal == "activation":
                hook = module.register_forward_hook(partial(_at_output, visit, name))
            else:
                hook = module.register_forward_pre_hook(partial(_at_input, visit, name))
            handles.append(hook)
        return handles

    # Figures

    @torch.no_grad()
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
            warnings.warn(
                "exact zeros never occur with silu; pass threshold or use ppl_sparsity",
                stacklevel=2,
            )
        sums = {name: torch.zeros(2, dtype=torch.float64) for name in self.places.layers}
        masks: Masks = {}  # of the batch under way

        def visit(name: str, module: nn.Module, a: Tensor) -> Tensor:
            rows = rows_of(masks.get(self.places.stack(name)), a)
            shares = share_active(a, threshold, rows).double().cpu()
            sums[name] += torch.stack([shares.sum(), torch.tensor(float(len(shares)))])
            return a

        handles = self._visit(visit)
        try:
            with evaluating(self.model):
                for batch in on_device(batches, self.base):
                    masks.update(self._token_masks(batch))
                    self.model(**batch)
        finally:
            for handle in handles:
                handle.remove()
        summed = total(torch.stack(list(sums.values()))).tolist()
        shares = {n: s / max(count, 1.0) for n, (s, count) in zip(sums, summed, strict=True)}
        found: dict[str, Any] = {"density": _mean(shares.values()), "per_layer": shares}
        for stack in self._stacks_apart():
            found[stack] = _mean(s for n, s in shares.items() if self.places.stack(n) == stack)
        self.figures["density"] = found["density"]
        return found

    def _stacks_apart(self) -> list[str]:
        """Encoder and decoder, if there are both."""
        stacks = set(self.places.stacks.values())
        return sorted(stacks) if len(stacks) > 1 else []

    @torch.no_grad()
    def ppl_sparsity(self, batches: Batches, p: float = 1.0) -> dict[str, Any]:
        """How many neurons can be left out at `p` per cent more perplexity; see `Search`.

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

        def token_mask(name: str, batch: Mapping[str, Any], a: Tensor) -> Tensor | None:
            return rows_of(self._token_masks(batch).get(stacks.stack(name)), a)

        with evaluating(self.model):
            kept = list(on_device(batches, self.base))
            found = Search(self.model, self.base, names, kept, token_mask).run(p)
        self.figures[f"ppl_{p:g}_sparsity"] = found["sparsity"]
        return found

    def report(self, batches: Batches) -> dict[str, float]:
        """Density and PPL-1% sparsity as plain figures for a table of scores.

        The density is left out where it is 1 by nature, the sparsity where no module is a down
        projection.
        """
        kept, figures = list(batches), {}
        if self.config.threshold > 0 or not never_zero(self.base):
            found = self.measure(kept)
            figures["density"] = found["density"]
            figures |= {f"{stack}_density": found[stack] for stack in self._stacks_apart()}
        if has_down(self.base):
            figures["ppl_1_sparsity"] = self.ppl_sparsity(kept)["sparsity"]
        return figures

    # Files

    def save_pretrained(self, save_directory: str, *args: Any, **kwargs: Any) -> None:
        """The adapter as PEFT saves it, and density.json: config, modules and figures."""
        self.save_adapter(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            content = {"name": "density", **asdict(self.config)}
            content |= {"activation_modules": list(self.places.layers), "measured": self.figures}
            path = Path(save_directory) / FILE
            path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _at_output(visit: Any, name: str, module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return visit(name, module, output)


def _at_input(visit: Any, name: str, module: nn.Module, args: Any) -> tuple[Any, ...]:
    return (visit(name, module, args[0]), *args[1:])


@contextmanager
def evaluating(model: nn.Module) -> Generator[None]:
    """Evaluation mode for the time of a block."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def on_device(batches: Batches, model: nn.Module) -> Iterator[dict[str, Any]]:
    """The batches where the model is."""
    device = next(model.parameters()).device
    for batch in batches:
        yield {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)
