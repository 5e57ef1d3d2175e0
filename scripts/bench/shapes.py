"""The benchmark's models, with random weights, and a batch for each.

Shapes: T tokens of a batch, N weights that multiply activations, the head included.
"""

import copy
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
)
from transformers.pytorch_utils import Conv1D

from petl.data.models.sources import read_source
from petl.errors import InputError
from petl.training.compose import compose

CLASSES = 15  # labels of the encoder's head, which sees every token


@dataclass(frozen=True)
class Shape:
    """A model's widths and a batch's size.

    Attributes:
        name: "llama" (a decoder with a gated MLP and a tied head), "minilm" (a BERT encoder), or
            the name of a model in configs/model.
        vocabulary: number of entries, and of outputs of a decoder's head.
        rows: number of rows in a batch, each of `length` tokens.
    """

    name: str
    hidden: int
    heads: int
    kv_heads: int
    ff: int
    layers: int
    vocabulary: int
    rows: int
    length: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    source: Any = field(
        default=None, compare=False
    )  # a transformers config; None: built from the widths

    def __str__(self) -> str:
        half = "" if self.dtype == torch.float32 else " bf16"
        return f"{self.name} {self.layers} x {self.rows * self.length}{half}"

    @property
    def is_decoder(self) -> bool:
        """True for a causal language model."""
        if self.source is None:
            return self.name == "llama"
        return type(self.source) not in MODEL_FOR_MASKED_LM_MAPPING

    @property
    def tokens(self) -> int:
        """T, the tokens of a batch."""
        return self.rows * self.length

    @property
    def kv(self) -> int:
        """Width of keys, and of values."""
        return self.hidden // self.heads * self.kv_heads

    @property
    def product_weights(self) -> int:
        """N, from the widths; for a model of configs/model, from its linear layers."""
        if self.source is not None:
            with torch.device("meta"):
                model_cls, config = self.model()
                layers = model_cls._from_config(config).modules()
            return sum(m.weight.numel() for m in layers if type(m) in (nn.Linear, Conv1D))
        h, ff = self.hidden, self.ff
        layer = 2 * h * h + 2 * h * self.kv + (3 if self.is_decoder else 2) * h * ff
        return self.layers * layer + h * (self.vocabulary if self.is_decoder else CLASSES)

    @property
    def first_layer_saving(self) -> float:
        """Fraction of the lower bound that a step saves if the embeddings need no gradient.

        For attention with separate products for queries, keys and values.
        """
        return 2 * (self.hidden**2 + 2 * self.hidden * self.kv) / (4 * self.product_weights)

    @property
    def kept_by_lora(self) -> int:
        """Bytes per token and layer that LoRA must save beyond the lower bound: (2h + ff) b."""
        return (2 * self.hidden + self.ff) * self.dtype.itemsize

    @property
    def task_type(self) -> str | None:
        """PEFT's task type; None for an encoder, where PEFT would train a head as well."""
        return "CAUSAL_LM" if self.is_decoder else None

    def build(self) -> PreTrainedModel:
        """Build the frozen model in training mode, with the same weights each time."""
        model_cls, config = self.model()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = model_cls._from_config(config)
        return model.to(device=self.device, dtype=self.dtype).requires_grad_(False).train()

    def batch(self, seed: int = 0) -> dict[str, Tensor]:
        """Return token ids and a label for each, without padding."""
        generator = torch.Generator().manual_seed(seed)
        size = (self.rows, self.length)
        ids = torch.randint(3, self.vocabulary, size, generator=generator)
        labels = ids if self.is_decoder else ids % CLASSES
        return {"input_ids": ids.to(self.device), "labels": labels.to(self.device)}

    def model(self) -> tuple[Any, Any]:
        """Return the class of the model, and its config."""
        if self.source is not None:
            return self._of_source()
        shared: Any = {
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.ff,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "max_position_embeddings": max(512, self.length),
            "use_cache": False,
        }
        if self.is_decoder:
            more: Any = {"num_key_value_heads": self.kv_heads, "tie_word_embeddings": True}
            return LlamaForCausalLM, LlamaConfig(**shared, **more)
        # no dropout in the base: it would hide the cost of an adapter and make steps differ
        more = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        more["num_labels"] = CLASSES
        return BertForTokenClassification, BertConfig(**shared, **more)

    def _of_source(self) -> tuple[Any, Any]:
        """`model` for a config of transformers: with the layers of the shape, without dropout."""
        config = copy.deepcopy(self.source)
        config.num_hidden_layers, config.use_cache = self.layers, False
        for name, probability in vars(config).items():
            if isinstance(probability, float) and name.endswith(
                ("dropout", "dropout_prob", "pdrop")
            ):
                setattr(config, name, 0.0)
        if self.is_decoder:
            return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config
        config.num_labels = CLASSES
        return MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING[type(config)], config


LLAMA = Shape("llama", 576, 9, 3, 1536, 6, 9830, 4, 128)
# SmolLM2-135M's layers; a smaller vocabulary, so that the head keeps its fraction of the FLOPs
MINILM = Shape("minilm", 384, 12, 12, 1536, 6, 30522, 16, 64)
SUITES = {
    "quick": {"llama": LLAMA, "minilm": MINILM},
    "full": {"llama": replace(LLAMA, layers=30, vocabulary=49152), "minilm": MINILM},
}


@dataclass
class Bench:
    """A shape with its model and batch; the models that it returns share the frozen weights."""

    shape: Shape
    base: PreTrainedModel = field(init=False)
    batch: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.base, self.batch = self.shape.build(), self.shape.batch()

    def twin(self, *, shared: bool = True) -> PreTrainedModel:
        """Return a copy of the model to wrap, with shared or copied weights."""
        memo = {id(p): p for p in self.base.parameters()} if shared else {}
        return copy.deepcopy(self.base, memo)

    def step(self, model: nn.Module) -> Callable[[], Tensor]:
        """Return a training step of a model on the batch."""
        return training_step(model, self.batch)


def training_step(model: nn.Module, batch: Mapping[str, Tensor]) -> Callable[[], Tensor]:
    """Return a function that runs forward and backward, and returns the detached loss."""
    trained = [p for p in model.parameters() if p.requires_grad]

    def run() -> Tensor:
        for parameter in trained:
            parameter.grad = None
        loss = model(**batch).loss
        loss.backward()
        return loss.detach()

    return run


def random_vit(images: int, **settings: Any) -> tuple[ViTForImageClassification, dict[str, Tensor]]:
    """Return a ViT with random weights, and a batch of random images.

    Args:
        images: of the batch.
        settings: of its config.
    """
    config: Any = ViTConfig(**settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ViTForImageClassification(config)
    pixels = torch.randn(images, 3, config.image_size, config.image_size)
    return model, {"pixel_values": pixels, "labels": torch.zeros(images, dtype=torch.long)}


@contextmanager
def gradient_to_embeddings(model: nn.Module) -> Generator[list[Tensor]]:
    """In the block, require a gradient of the embeddings' output, as the lower bound does.

    Yields a list that contains the output of the last forward pass.
    """
    seen: list[Tensor] = []

    def require(module: nn.Module, args: Any, output: Tensor) -> None:
        seen[:] = [output.requires_grad_()]

    embeddings = embeddings_of(model)
    handle = embeddings.register_forward_hook(require)
    try:
        yield seen
    finally:
        handle.remove()


def embeddings_of(model: nn.Module) -> nn.Module:
    """Return the input embeddings of a model."""
    any_model: Any = model  # the method is not declared by nn.Module
    return any_model.get_input_embeddings()


def suite(name: str, shapes: list[str], device: str) -> list[Shape]:
    """Return shapes of a suite by name; in bfloat16 on an accelerator.

    Raises:
        InputError: no such shape.
    """
    known = SUITES[name]
    unknown = [shape for shape in shapes if shape not in known]
    if unknown:
        raise InputError(f"no shape {unknown[0]!r}; shapes: {', '.join(known)}")
    return [on_device(known[shape], device) for shape in shapes]


def on_device(shape: Shape, device: str) -> Shape:
    """Return the shape on a device; in bfloat16 on an accelerator."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    return replace(shape, dtype=dtype, device=device)


def hydra_shape(words: str) -> Shape:
    """Return the shape of a text model of configs/model, with random weights, in float32.

    Args:
        words: its name, followed by overrides of its settings: "hub model.name=gpt2".

    Raises:
        InputError: there is no such model, or it does not read text.
    """
    name, *others = words.split()
    config = read_source(compose([f"model={name}", *others]).model).config()
    mappings = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING)
    if not any(type(config) in mapping for mapping in mappings):
        raise InputError(
            f"model {name} ({config.model_type}) does not read text; choose a text model"
        )
    return Shape(
        name,
        config.hidden_size,
        config.num_attention_heads,
        getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        config.num_hidden_layers,
        config.vocab_size,
        4,
        128,
        source=config,
    )
