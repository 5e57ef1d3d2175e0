"""The input embedding and the output head of a model, which drafters read and never change.

Shapes: N positions, H width, V tokens of the vocabulary, D tokens of the draft vocabulary.
"""

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import linear

from petl.core.compat import BaseTunerLayer
from petl.core.layers.context import is_encoder_decoder
from petl.core.types import base_of
from petl.errors import InputError, UnsupportedError
from petl.system.collectives import is_sharded

CHUNK = 4096  # rows of the embedding that are looked up at a time


class Ends:
    """Input embedding and output head of a decoder; no module, so that it is in no state dict.

    Attributes:
        model: of transformers, with its adapters.
        width: H.
        vocabulary: V.
    """

    def __init__(self, model: nn.Module | None) -> None:
        """Find both.

        Raises:
            InputError: there is no model.
            UnsupportedError: it is no decoder with an embedding and a head of one width, or its
                weights are sharded.
        """
        if model is None:
            raise InputError("model=None: this drafter needs the model that it drafts for")
        base = base_of(model)
        name = type(base).__name__
        if is_sharded(base):
            raise UnsupportedError(
                f"the weights of {name} are sharded over processes, and a drafter reads embedding "
                "and head: use a merged base, or one that each process has as a whole"
            )
        head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
        if head is None or embedding is None or is_encoder_decoder(base):
            raise UnsupportedError(
                f"{name} is no decoder with an input embedding and an output head, which this "
                "drafter reads"
            )
        self.model, self.head, self.embedding = base, head, embedding
        self.vocabulary = int(base.config.get_text_config().vocab_size)
        with torch.no_grad():
            self.width = int(self.embed(torch.zeros(1, dtype=torch.long)).shape[-1])
        inner = head.get_base_layer() if isinstance(head, BaseTunerLayer) else head
        if getattr(inner, "in_features", self.width) != self.width:
            raise UnsupportedError(
                f"{name} has embeddings of width {self.width} and a head for width "
                f"{inner.in_features}; this drafter needs one width"
            )
        # gathered rows, and what they were gathered from
        self._rows: tuple[tuple[object, ...], Tensor, Tensor | None] | None = None

    @property
    def device(self) -> torch.device:
        """The device of the head."""
        return next(self.head.parameters()).device

    @torch.no_grad()
    def embed(self, tokens: Tensor) -> Tensor:
        """Return the input embeddings of tokens, [..., H]."""
        weight = next(self.embedding.parameters())
        return self.embedding(tokens.to(weight.device))

    def embedding_rms(self) -> float:
        """Return the root of the mean square of all input embeddings."""
        total = 0.0
        for part in torch.arange(self.vocabulary).split(CHUNK):
            total += float(self.embed(part).double().square().sum())
        return (total / (self.vocabulary * self.width)) ** 0.5

    def logits(self, y: Tensor, vocab: Tensor) -> Tensor:
        """Return the logits of the tokens `vocab` [D] for outputs of the final norm, [N, D].

        Gradients reach `y` only.
        """
        weight = self._plain_weight()
        if weight is None:
            # adapted or quantized: the whole head, whose own parameters get no gradient
            tensors = {name: p.detach() for name, p in self.head.named_parameters()}
            dtype = self.head_dtype()
            whole = functional_call(self.head, tensors, (y.to(dtype),))
            return whole.index_select(-1, vocab).to(y.dtype)
        if 2 * len(vocab) > len(weight):  # no copy of most of the weight
            return self._linear(y, weight, self.head.bias).index_select(-1, vocab)
        return linear(y, *self._gathered(weight, vocab, y.dtype))

    def rows(self, vocab: Tensor) -> Tensor:
        """Return a copy of the head's rows of the tokens `vocab`, [D, H].

        Raises:
            UnsupportedError: the head is adapted or quantized.
        """
        weight = self._plain_weight()
        if weight is None:
            raise UnsupportedError(
                f"the head is {type(self.head).__name__}, whose rows cannot be read; merge its "
                "adapter, or leave it out"
            )
        return weight.index_select(0, vocab).clone()

    def head_dtype(self) -> torch.dtype:
        """Return the dtype of the head's inputs."""
        floating = (p.dtype for p in self.head.parameters() if p.is_floating_point())
        return next(floating, self.model.dtype)

    def _plain_weight(self) -> Tensor | None:
        """Return the head's weight, [V, H]; None if it is adapted, quantized or of another kind."""
        is_plain = isinstance(self.head, nn.Linear) and not isinstance(self.head, BaseTunerLayer)
        weight = self.head.weight if is_plain else None
        if weight is None or type(weight.data) is not Tensor or not weight.is_floating_point():
            return None
        return weight.detach()

    @staticmethod
    def _linear(y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        bias = None if bias is None else bias.detach().to(y.dtype)
        return linear(y, weight.to(y.dtype), bias)

    def _gathered(
        self, weight: Tensor, vocab: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        """Return rows and biases of the tokens `vocab`, gathered once until one of them changes."""
        changes = tuple(
            (t.data_ptr(), 0 if t.is_inference() else t._version) for t in (weight, vocab)
        )
        key = (*changes, len(vocab), dtype)
        if self._rows is None or self._rows[0] != key:
            bias = self.head.bias
            rows = weight.index_select(0, vocab).to(dtype)
            own = None if bias is None else bias.detach().index_select(0, vocab).to(dtype)
            self._rows = (key, rows, own)
        return self._rows[1:]
