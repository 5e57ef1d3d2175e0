"""Answers with frozen weights in 8 or 4 bits beside adapters in float32: `--weights int8|int4`."""

import logging
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Protocol, TypeVar, cast

import torch
from peft import PeftConfig
from torch import nn

from petl.core.compat import TrainableTokensLayer
from petl.core.model.copies import share_weights
from petl.core.registry import require_capability
from petl.core.support import Capability
from petl.core.types import CausalModel, Settings
from petl.errors import UnsupportedError, first_line
from petl.ops.small_weights import (
    Kind,
    SmallWeight,
    can_pack,
    matrix_of,
    pack,
    replace_weight,
    why_unsupported,
)

if TYPE_CHECKING:
    from petl.generation.inference.language_model import LanguageModel

# what a method has to work with: a base whose weights it cannot read as numbers
NEEDS = {"int8": Capability.BASE_8BIT, "int4": Capability.BASE_4BIT}
HEAD: Kind = "int8"  # of an output head, in which few bits cost most
TEXTS, TOKENS = 8, 48  # of the comparison: for an interval, in seconds
logger = logging.getLogger(__name__)
T = TypeVar("T")


class Inspected(Protocol):
    """The part of a saved adapter that is inspected."""

    @property
    def config(self) -> PeftConfig:
        """Its config."""

    @property
    def settings(self) -> Settings:
        """The settings of its run."""


def inspect_small(kind: Kind, found: Mapping[str, Inspected | Settings]) -> None:
    """Raise UnsupportedError, before weights are loaded, for what has no answers with small ones.

    Args:
        found: adapters, or the settings of plain models, by name.
    """
    wanted = f"--weights {kind}"
    if torch.accelerator.is_available():
        raise UnsupportedError(
            f"{wanted} is for a CPU, and this machine has an accelerator: there "
            "model.quantization=bnb_8bit or bnb_4bit trains and answers with small weights"
        )
    if reason := why_unsupported(kind) or why_unsupported(HEAD):
        raise UnsupportedError(f"{wanted} is not possible on this machine: {reason}")
    for name, each in found.items():
        settings = each if isinstance(each, Mapping) else each.settings["model"]
        scheme = settings.get("quantization")
        if scheme is not None:
            raise UnsupportedError(
                f"{wanted} quantizes a full base, and that of {name} is quantized by {scheme}: "
                "leave --weights out"
            )
        if not isinstance(each, Mapping):
            require_capability(each.config, NEEDS[kind], wanted)


class SmallWeights:
    """Packs the frozen weights of models that share them, each weight once.

    Attributes:
        kind: "int8" or "int4".
        before, after: bytes of the weights that were packed.
    """

    def __init__(self, kind: Kind) -> None:
        self.kind: Kind = kind
        self.before = self.after = 0
        # with the weight itself, whose number is otherwise given away again
        self._packed: dict[int, tuple[nn.Parameter, SmallWeight]] = {}

    def frozen(self, model: CausalModel) -> list[tuple[nn.Module, Kind]]:
        """Return the layers of a model without adapters that can be packed, and into what."""
        head = model.get_output_embeddings()
        kinds = ((each, HEAD if each is head else self.kind) for each in model.modules())
        return [(layer, kind) for layer, kind in kinds if can_pack(layer, kind)]

    def replace(self, layers: Iterable[tuple[nn.Module, Kind]], model: nn.Module) -> None:
        """Pack the weights of layers.

        Args:
            layers: from `frozen`, before adapters were added.
            model: with its adapters.
        """
        # adds rows of its own to the weight, and multiplies the sum
        tokens = (each for each in model.modules() if isinstance(each, TrainableTokensLayer))
        kept = {id(each.get_base_layer()) for each in tokens}
        for layer, kind in layers:
            if id(layer) not in kept:
                replace_weight(layer, self._of(layer, kind))

    def replace_in_decoder(
        self, layers: Iterable[tuple[nn.Module, Kind]], model: nn.Module
    ) -> None:
        """Pack the weights of layers of a decoder, and try a pass over two tokens."""
        self.replace(layers, model)
        reads_no_weight(self.kind, lambda: model(input_ids=torch.zeros(1, 2, dtype=torch.long)))

    def _of(self, layer: nn.Module, kind: Kind) -> SmallWeight:
        weight = cast(nn.Parameter, layer.weight)
        if id(weight) not in self._packed:
            self._packed[id(weight)] = weight, pack(matrix_of(layer), kind)
            self.before += weight.nbytes
            self.after += self._packed[id(weight)][1].nbytes
        return self._packed[id(weight)][1]


def reads_no_weight(kind: Kind, compute: Callable[[], T]) -> T:
    """Return what a pass of a packed model computes.

    Raises:
        UnsupportedError: it fails, as where an adapter multiplies the frozen weight itself.
    """
    try:
        with torch.no_grad():
            return compute()
    except RuntimeError as error:
        raise UnsupportedError(
            f"--weights {kind}: a pass fails ({first_line(error)}), as of an adapter that reads "
            "the values of frozen weights; leave it out, or petl merge first"
        ) from error


def answer_small(
    language: "LanguageModel", layers: Iterable[tuple[nn.Module, Kind]], small: SmallWeights
) -> None:
    """Pack the weights of a loaded model, and log what its first adapter's answers lose by it.

    Args:
        layers: from `SmallWeights.frozen`, of its base.
    """
    with language.using(language.names[0]):
        _ = language.drafter  # a trained one is compared with the weights that it was trained on
        full = share_weights(language.model)
        small.replace(layers, language.model)
        tell(language, full, small)


def tell(language: "LanguageModel", full: nn.Module, small: SmallWeights) -> None:
    """Log the bytes of packed weights, and compare a model with that of full weights on texts.

    Raises:
        UnsupportedError: no weight was packed, or an adapter reads the values of one.
    """
    if not small.after:
        raise UnsupportedError(
            f"--weights {small.kind} finds no linear layer with widths of whole groups in "
            f"{language.name}: leave it out"
        )
    logger.info(
        "--weights %s: %.0f MB of weights in %.0f MB",
        small.kind,
        small.before / 1e6,
        small.after / 1e6,
    )
    # by name: imported for this option only
    measured = resolve_name("petl.training.retain.compare:measured")
    texts = resolve_name("petl.training.retain.texts:read_texts")(["bundled"], "--weights")
    chosen = texts[:: len(texts) // TEXTS][:TEXTS]
    settings = {"max_length": TOKENS, "batch_size": TEXTS}
    compare = partial(measured, language.model, chosen, language.tokenizer, base=full, **settings)
    found, _ = reads_no_weight(small.kind, compare)
    logger.info("with weights in %s against full ones, %s", small.kind, found)
