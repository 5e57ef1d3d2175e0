"""The fields of DKVB, and the head of a model on which it stands."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from petl.core.compat import SEQ_CLS_HEAD_NAMES, BaseTunerLayer
from petl.core.layers.context import is_encoder_decoder
from petl.core.model.linear import LINEAR_KINDS
from petl.core.model.structure import stacks
from petl.core.spec.config import MethodConfig, config_field, require
from petl.core.types import Fields, Record
from petl.errors import InputError, ModuleKindError

HEADS = ("classifier", "score", "head")
VALUE_DIM = 16  # of a value that a linear decoder reads
# PEFT trains and saves a copy of the head of a text classifier, which it finds by these names in
# `modules_to_save`; it accepts no empty list in their place, so they give way to this name
RANDOM = ("projection=random", lambda config: config.projection == "random")
NO_MODULE = "petl_dkvb_trains_no_module"


@dataclass
class DkvbConfig(MethodConfig):
    """Fields of DKVB; its target is always the model's classification head."""

    replaces_head: ClassVar[bool] = True
    divides_calibration: ClassVar[bool] = True

    target_modules: set[str] | list[str] | str | None = config_field(
        "the classification head; null: it is found by its name", None
    )
    codebooks: int = config_field("number of codebooks", 64, ge=1)
    pairs: int = config_field("keys, each with a value, of a codebook", 256, ge=1)
    key_dim: int = config_field("width of a key, with random projections", 8, ge=1, acts=RANDOM)
    projection: str = config_field(
        "random: fixed random projections of the encoder's output; split: its consecutive parts",
        "random",
        choices=("random", "split"),
    )
    key_decay: float = config_field("decay of the keys' moving average", 0.95, ge=0, lt=1)
    key_batches: int = config_field("calibration batches that the keys are learnt from", 20, ge=1)
    dead: float = config_field(
        "keys with a smaller average count restart at a new piece", 0.1, ge=0
    )
    decoder: str = config_field(
        "sum: values are logits, and are averaged; linear: a trained matrix reads the values",
        "sum",
        choices=("sum", "linear"),
    )
    value_dim: int | None = config_field(
        f"width of a value; null: the number of classes, with decoder=linear {VALUE_DIM}",
        None,
        ge=1,
        acts=("decoder=linear", lambda config: config.decoder == "linear"),
    )
    pool: str = config_field(
        "model: what the head gets; mean: the mean of the encoder's last states over the mask",
        "model",
        choices=("model", "mean"),
    )
    optimizer: str = config_field(
        "sgd: plain, with a learning rate of 0.3 by default, and of about 300 for one pass over a "
        "stream of classes; sparse_adam: Adam that changes moments of picked values only, with one "
        "of about 1e-2",
        "sgd",
        choices=("sgd", "sparse_adam"),
    )
    seed: int = config_field("seed of the projections and of the key phase", 0, ge=0, lt=2**32)

    def check(self) -> None:
        for name in ("exclude_modules", "layers_to_transform", "layers_pattern"):
            value = getattr(self, name)
            require(
                value is None,
                f"{name}={value}: dkvb stands on the classification head only; leave it null",
            )
        # a saved config may have them from PEFT
        self.modules_to_save = without_head_names(self.modules_to_save) or None
        require(
            self.modules_to_save is None,
            f"modules_to_save={self.modules_to_save}: the keys stay right only if the encoder "
            "does not change, so dkvb trains no module; leave it null",
        )

    def check_shapes(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Raise InputError if the encoder's output cannot be split into `codebooks` parts."""
        for key, (width, _) in shapes.items():
            require(
                self.projection == "random" or width % self.codebooks == 0,
                f"codebooks={self.codebooks} does not divide {width}, the width of the input of "
                f"{key}, which projection=split needs; choose a divisor, or projection=random",
            )

    def check_new_modules(self, names: Sequence[str]) -> None:
        """Raise InputError if a module without pretrained weights computes the input of the head.

        Args:
            names: of all modules without pretrained weights.
        """
        others = [name for name in names if name.partition(".")[0] not in HEADS]
        require(
            not others or self.pool == "mean",
            f"{', '.join(others)} before the head has no pretrained weights, and dkvb trains the "
            "head only: set pool=mean (method.pool=mean), which reads the encoder instead",
        )

    def width(self, features: int) -> int:
        """Return d for an encoder's output of this width."""
        return self.key_dim if self.projection == "random" else features // self.codebooks

    def value_width(self, classes: int) -> int:
        """Return v for this number of classes."""
        return classes if self.decoder == "sum" else self.value_dim or VALUE_DIM

    def sized(self, size: int) -> Fields:
        """Return the fields for `size` pairs."""
        return {"pairs": size}

    def to_dict(self) -> Record:
        """Return the fields as JSON types, without the names that are there for PEFT only."""
        fields = super().to_dict()
        return {**fields, "modules_to_save": without_head_names(self.modules_to_save) or None}


def without_head_names(names: Sequence[str] | None) -> list[str]:
    """Return names of `modules_to_save` without those of heads, which PEFT adds by itself."""
    return [name for name in names or () if name not in (*SEQ_CLS_HEAD_NAMES, NO_MODULE)]


def head_of(model: nn.Module) -> str:
    """Return the path of the linear layer of a model's classification head, adapted or not.

    Raises:
        ModuleKindError: the model has no such head, or one of several linear layers.
    """
    name = next((name for name in HEADS if hasattr(model, name)), None)
    if name is None:
        raise ModuleKindError(
            f"{type(model).__name__} has no module {', '.join(HEADS[:-1])} or {HEADS[-1]}: dkvb is "
            "a classification head; load the model in its class for classification"
        )
    found, inside = [], ()
    for path, module in model.get_submodule(name).named_modules(prefix=name):
        if inside and path.startswith(inside):
            continue
        if isinstance(module, BaseTunerLayer):  # of an adapter that is there already
            inside += (f"{path}.",)
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if isinstance(base, LINEAR_KINDS) or hasattr(base, "in_features"):
            found.append(path)
    if len(found) != 1:
        kind = type(model.get_submodule(name)).__name__
        raise ModuleKindError(
            f"{name} is {kind} with {len(found)} linear layers, and dkvb stands on a head of one; "
            "load the model in a class with such a head"
        )
    return found[0]


def encoder_of(model: nn.Module) -> str:
    """Return the path of the module whose output are the encoder's last states.

    Raises:
        InputError: it is not known.
    """
    if not is_encoder_decoder(model):
        name = getattr(model, "base_model_prefix", "")
        if name and isinstance(getattr(model, name, None), nn.Module):
            return name
        # body and head are siblings, as in Whisper's encoder
        found = {path.partition(".")[0] for path in stacks(model)}
        if len(found) == 1:
            return found.pop()
    raise InputError(
        f"pool=mean needs the last states of an encoder, and {type(model).__name__} has no single "
        "one; use pool=model"
    )
