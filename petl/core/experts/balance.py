"""The balance loss of a mixture's own routers, while they train: asked for, and shown in the log.

Classes of transformers whose forward computes it add it to the loss where the config has
`output_router_logits` true, which it is not by default. About half of the configs that have this
field belong to classes that compute none (DeepSeek-V3, Llama 4). Shapes: T tokens, E experts.
"""

import inspect
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from petl.core.compat import BaseTunerLayer
from petl.core.layers.context import ForwardContext
from petl.core.model.heat_map import HeatMap
from petl.core.model.names import router_names

logger = logging.getLogger(__name__)

ASKED = "output_router_logits"  # field of a config
WEIGHTS = ("router_aux_loss_coef", "aux_loss_coef")
TERM = "aux_loss"  # in an output, and of the variable in a forward that computes it
PART = "petl_router_balance"  # attribute of a base model


class RouterBalance:
    """The value of the balance loss in a training pass, and the load of the experts.

    Args:
        base: the base model, which adds the term to its loss.
        weight: of the term in the loss.
    """

    def __init__(self, base: nn.Module, weight: float) -> None:
        self.context, self.weight = ForwardContext(), weight
        self.loads: list[Tensor] = []
        base.register_forward_hook(self._read)

    def _read(self, model: nn.Module, args: object, output: Any) -> None:
        self.context.terms.clear()
        term = output.get(TERM) if isinstance(output, Mapping) else None
        if not model.training or not isinstance(term, Tensor):
            return
        self.context.terms["routers"] = term.detach() * self.weight
        # [T, E] of each layer, where they have that form
        logits = output.get("router_logits") or ()
        self.loads = [each.detach() for each in logits if isinstance(each, Tensor)]

    def series(self) -> dict[str, float]:
        """`router_load_max`: tokens of the busiest first choice over T / E, mean over layers."""
        loads = [
            torch.bincount(each.flatten(0, -2).argmax(-1), minlength=each.shape[-1]).max()
            * (each.shape[-1] / each[..., 0].numel())
            for each in self.loads
        ]
        return {"router_load_max": float(torch.stack(loads).mean())} if loads else {}

    def heat_maps(self) -> list[HeatMap]:
        """No maps."""
        return []


def router_balance(base: nn.Module) -> list[RouterBalance]:
    """Return what reads the balance of routers in the loss of a base model; none without one.

    It is asked for if an adapter trains a router.
    """
    if PART not in vars(base):
        config = _config_with(base, ASKED) if _computes_balance(type(base)) else None
        trained = [n for n in router_names(base) if _is_trained(base.get_submodule(n))]
        if trained and config is None:
            logger.warning(
                "the router %s is trained, and %s has no loss that keeps its experts' load even",
                trained[0],
                type(base).__name__,
            )
        elif trained and not getattr(config, ASKED):
            setattr(config, ASKED, True)
            logger.info("the router %s is trained: its balance is part of the loss", trained[0])
        if not getattr(config, ASKED, False):
            return []
        weight = next((getattr(config, name) for name in WEIGHTS if hasattr(config, name)), 0.0)
        vars(base)[PART] = RouterBalance(base, float(weight))
    return [vars(base)[PART]]


def _is_trained(router: nn.Module) -> bool:
    return isinstance(router, BaseTunerLayer) and any(p.requires_grad for p in router.parameters())


def _computes_balance(kind: type) -> bool:
    """Return True if a forward of a class, or of one that it inherits from, computes the loss."""
    forwards = [
        inspect.unwrap(vars(each)["forward"]) for each in kind.mro() if "forward" in vars(each)
    ]
    codes = [each.__code__ for each in forwards if inspect.isfunction(each)]
    return any(TERM in code.co_varnames for code in codes)


def _config_with(base: nn.Module, field: str) -> PretrainedConfig | None:
    config = getattr(base, "config", None)
    if config is None or hasattr(config, field):
        return config
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    return text if hasattr(text, field) else None
