"""The fields of PYRA, the schedules of its paper, and what they mean in a model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from petl.core.model.structure import block_widths
from petl.core.spec.config import config_field, require
from petl.core.types import Fields
from petl.errors import ModuleKindError, UnsupportedError
from petl.methods.families.outer import OuterConfig
from petl.methods.pyra.blocks import check_form

UNSUPPORTED_INNER = {  # by method, the reason that an error gives
    "pyra": "it is the outer method",
    "dkvb": "pyra changes the encoder while it trains, and the keys of dkvb fit the frozen one",
}
# tokens to remove in each block of ViT-B and ViT-L, by number of blocks
SCHEDULES = {
    "low": {12: [16] * 11 + [10], 24: [8] * 23 + [6]},
    "high": {
        12: [40, 34, 30, 24, 18, 14, 10, 8, 4, 4, 3, 3],
        24: [20, 19, 18, 17, 15, 13, 13, 12, 10, 9, 8, 6, 6, 4, 4, 4, 3, 3, 2, 2, 1, 1, 1, 1],
    },
}
OF_BLOCKS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
# models whose heads read the class token, and the distillation token; those of other heads need
# all tokens in their places
KNOWN = {
    "ViTModel", "ViTForImageClassification", "DeiTModel", "DeiTForImageClassification",
    "DeiTForImageClassificationWithTeacher", "ASTModel", "ASTForAudioClassification",
}  # fmt: skip
WITH_A_MASK = ("sdpa", "eager")  # implementations of attention that take a mask of floats


@dataclass
class PyraConfig(OuterConfig):
    """How many tokens are merged, and the inner method."""

    schedule: str | list[int] = config_field(
        "tokens to remove in each block: low or high, the paper's for 12 or 24 blocks, or one "
        "number for each block, such as [4, 2, 0]; limited by the tokens that the image has",
        "high",
        ge=0,
        pattern="|".join(SCHEDULES),
    )
    protected_tokens: int | None = config_field(
        "tokens at the start that are not merged; null: 2 with a distillation token (DeiT, AST), "
        "else 1",
        None,
        choices=(1, 2),
    )
    reactivate: bool = config_field(
        "train the correction of merged tokens; false: plain ToMe", True
    )
    proportional_attention: bool = config_field(
        "merged tokens count in attention as often as tokens are merged in them", True
    )
    inner: str | None = config_field(
        "method that is trained beside it, whose fields can be set too, such as lora; null: none",
        None,
    )
    modules_to_save: list[str] | None = config_field(
        "modules trained in full and saved, such as a head", None
    )
    vector_lr: float | None = config_field(
        "peak learning rate of its vectors in petl's training; null: that of the run",
        None,
        gt=0,
        acts=("reactivate=true", lambda config: config.reactivate),
    )
    num_tokens: int | None = config_field(
        "tokens before the first block; set when a model is wrapped, to refuse other image sizes",
        None,
        ge=1,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.schedule  # a tuple or OmegaConf's list, too
        if not isinstance(given, str):
            self.schedule = list(given)
            require(
                any(given),
                f"schedule={self.schedule} removes no tokens; give a number above 0 for a block",
            )
        for name in OF_BLOCKS[1:] if self.inner is None else ():
            value = getattr(self, name, None)
            require(
                value is None,
                f"{name}={value}: the schedule determines the blocks, with 0 for one that merges "
                "nothing; leave it null",
            )


@dataclass
class PyraLayout:
    """What a config means in a model.

    Attributes:
        blocks: paths of all blocks.
        removed: tokens that each removes, after limiting; 0 for some.
        tokens: tokens that each gets.
        protected: tokens at the start that are not merged, 1 or 2.
        width: C.
        proportional: whether attention counts the sizes of tokens.
    """

    blocks: list[str]
    removed: list[int]
    tokens: list[int]
    protected: int
    width: int
    proportional: bool

    def hosts(self) -> dict[str, Fields]:
        """Return the settings of each block that has an adapter, by path.

        Those are blocks that merge tokens, and those behind them whose attention counts sizes.
        """
        found: dict[str, dict[str, object]] = {}
        before: str | None = None  # the host before this block, which leaves the sizes
        for path, r, tokens in zip(self.blocks, self.removed, self.tokens, strict=True):
            if r or (self.proportional and before is not None):
                found[path] = {"r": r, "tokens": tokens, "before": before}
                found[path] |= {"protected": self.protected, "width": self.width}
                before = path
        return found


def plan_of(config: "PyraConfig", model: nn.Module) -> PyraLayout:
    """Return what a config means in `model`.

    Raises:
        InputError: the model is of another kind, or has other blocks or tokens than the config.
    """
    blocks = block_widths(model)
    stacks = {path.rpartition(".")[0] for path in blocks}
    parent = stacks.pop().rpartition(".")[0] if len(stacks) == 1 else None
    backbone: Any = None if parent is None else model.get_submodule(parent)
    _check_model(model, backbone)
    for path in blocks:
        check_form(path, model.get_submodule(path))
    embeddings: Any = backbone.embeddings
    tokens = embeddings.position_embeddings.shape[1]
    distilled = getattr(embeddings, "distillation_token", None) is not None
    protected = config.protected_tokens or (2 if distilled else 1)
    require(
        config.num_tokens in (None, tokens),
        f"the adapter was made for {config.num_tokens} tokens and {type(model).__name__} has "
        f"{tokens}: load it onto a model of the same image size and patch size",
    )
    wanted, removed, counts = _schedule(config.schedule, len(blocks)), [], []
    for count in wanted:
        counts.append(tokens)
        removed.append(min(count, max(0, (tokens - protected) // 2)))
        tokens -= removed[-1]
    require(
        any(removed),
        f"schedule={config.schedule} merges nothing in {type(model).__name__}, which has "
        f"{counts[0]} tokens, {protected} of them protected",
    )
    _check_attention(config, backbone)
    width = next(iter(blocks.values()))
    return PyraLayout([*blocks], removed, counts, protected, width, config.proportional_attention)


def _schedule(schedule: str | list[int], depth: int) -> list[int]:
    """Return the tokens to remove in each of `depth` blocks."""
    if isinstance(schedule, str):
        known: Mapping[int, list[int]] = SCHEDULES[schedule]
        require(
            depth in known,
            f"schedule={schedule!r} is known for {' or '.join(map(str, known))} blocks, and the "
            f"model has {depth}: give a list of {depth} numbers, the tokens that each removes",
        )
        return known[depth]
    require(
        len(schedule) == depth,
        f"schedule={schedule} has {len(schedule)} numbers, and the model has {depth} blocks: give "
        "one for each",
    )
    return schedule


def _check_model(model: nn.Module, backbone: object) -> None:
    """Raise ModuleKindError unless the model and all around its blocks are of a known class."""
    around = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
    unknown = [m for m in around if KNOWN.isdisjoint(c.__name__ for c in type(m).__mro__)]
    embeddings = getattr(backbone, "embeddings", None)
    if unknown or backbone not in around or not hasattr(embeddings, "position_embeddings"):
        raise ModuleKindError(
            f"pyra merges tokens of {', '.join(sorted(KNOWN))}, and not of "
            f"{type(unknown[0] if unknown else model).__name__}: a head for pixels, masked patches "
            "or boxes needs all tokens in their places, and other encoders are not known to it"
        )


def _check_attention(config: "PyraConfig", backbone: Any) -> None:
    attention = backbone.config._attn_implementation
    if config.proportional_attention and attention not in WITH_A_MASK:
        raise UnsupportedError(
            f"attention {attention!r} takes no mask of numbers, by which merged tokens count; load "
            f"the model with attn_implementation={WITH_A_MASK[0]!r}, or set "
            "proportional_attention=false"
        )
