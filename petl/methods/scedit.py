"""SCEdit: a residual bottleneck on each skip connection of a diffusion U-Net; the rest is frozen.

Jiang, Mao, Pan, Han, Zhang 2024, "SCEdit: Efficient and Controllable Image Diffusion Generation via
Skip Connection Editing", CVPR (arXiv:2312.11392). This is its SC-Tuner; the tuner for a condition
image (CSC-Tuner) is not implemented.

Shapes: N rows, C channels of a skip, D bottleneck, H and W of the feature map. The blocks of the
decoder, `up_blocks.<i>.resnets.<j>`, get `cat(h, x)` along the channels: the skip x [N, C, H, W] is
last. For each pixel of it, with D = max(1, floor(C ratio)),

    x <- x + scaling (act(x W1^T + b1) W2^T + b2)

W2 and b2 start at zero, where the model is the base. Nothing before the skips trains, so backward
ends at them and the encoder keeps no activations. For that, tensors that enter the model while it
trains are detached: a text embedding that asked for a gradient would rebuild the encoder's graph.

For backward, only x and the parameters are kept; the bottleneck is computed again.

Where we depart from the authors' code: `scaling` counts above 1 too (theirs is ignored there), and
whether a tuner is active is the adapter's state (theirs looks for outputs of zero in each step).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from accelerate.utils import recursively_apply
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from petl.core.layers.layer import Adapter, LayerInfo, LayerShape
from petl.core.method import Method, NewAdapters, Settings, Target, TrainContext, WrapContext
from petl.core.model.heat_map import HeatMap, of_layers
from petl.core.model.names import candidate_names
from petl.core.register import register
from petl.core.spec.config import MethodConfig, config_field, require
from petl.core.support import Capability
from petl.errors import ModuleKindError, UnsupportedError, did_you_mean
from petl.ops.recomputation import recomputed

ONE_ACTIVE = (
    "a skip connection is edited by one adapter at a time, since each of them reads the unedited "
    "skip; activate one, or adapters with different `skips`"
)


@dataclass
class SceditConfig(MethodConfig):
    """Fields of SCEdit; the targets are always the blocks that get the chosen skips."""

    target_modules: set[str] | list[str] | str | None = config_field(
        "the blocks that get the skips; null, as `skips` determines them", None
    )
    ratio: float = config_field("width of a bottleneck / channels of its skip", 1.0, gt=0)
    skips: list[int] | None = config_field(
        "which skips, as the decoder reads them, counted from 0 (the deepest); null: all",
        None,
    )
    non_linearity: str = config_field("a name in transformers' ACT2FN", "gelu")
    scaling: float = config_field(
        "factor of the edit; read at each forward pass, so it may be changed for inference", 1.0
    )

    def check(self) -> None:
        skips = self.skips
        require(skips is None or bool(skips), "skips=[] is empty; name skips, or leave it null")
        require(
            skips is None or all(type(skip) is int and skip >= 0 for skip in skips),
            f"skips={skips} has entries that are no indices from 0, the deepest skip",
        )
        require(
            self.non_linearity in ACT2FN,
            f"non_linearity={self.non_linearity!r} is not in transformers' ACT2FN"
            + did_you_mean(self.non_linearity, ACT2FN),
        )
        for name in ("exclude_modules", "layers_to_transform", "layers_pattern"):
            value = getattr(self, name)
            require(value is None, f"{name}={value}: skips chooses the blocks; leave it null")
        if skips is not None:
            self.skips = sorted(set(skips))

    def width(self, channels: int) -> int:
        """Return D for a skip with so many channels."""
        return max(1, int(channels * self.ratio))


class Skip(NamedTuple):
    """A skip connection, as the block sees it that reads it.

    Attributes:
        host: path of the block.
        shape: channels of the block's input, `cat(h, x)`, and of its output.
        channels: those of x.
    """

    host: str
    shape: LayerShape
    channels: int


def skips_of(model: nn.Module) -> list[Skip]:
    """Return the skip connections of a U-Net in the order in which its decoder reads them.

    Raises:
        ModuleKindError: the model does not have the form of diffusers' U-Nets.
    """
    needs = (
        "scedit needs a U-Net as diffusers has it, with mid_block.resnets and "
        "up_blocks[i].resnets[j] that know in_channels and out_channels"
    )
    name, found = type(model).__name__, []
    last = getattr(getattr(model, "mid_block", None), "resnets", None)
    # those of the last block before the decoder
    h = getattr(last[-1], "out_channels", None) if last else None
    up_blocks = getattr(model, "up_blocks", None)
    if not isinstance(h, int) or not isinstance(up_blocks, nn.ModuleList) or not len(up_blocks):
        raise ModuleKindError(f"{name} has no mid_block and up_blocks of that form: {needs}")
    for i, block in enumerate(up_blocks):
        for j, resnet in enumerate(getattr(block, "resnets", ())):
            host = f"up_blocks.{i}.resnets.{j}"
            I, O = (getattr(resnet, f"{side}_channels", None) for side in ("in", "out"))
            if not isinstance(I, int) or not isinstance(O, int) or h >= I:
                raise ModuleKindError(
                    f"{host} of {name} ({type(resnet).__name__}) has in_channels={I} and "
                    f"out_channels={O} and gets no skip connection beside the {h} channels of the "
                    f"block before it: {needs}"
                )
            found.append(Skip(host, LayerShape(I, O), I - h))
            h = O
    if not found:
        raise ModuleKindError(f"the up_blocks of {name} have no resnets: {needs}")
    return found


def chosen_skips(config: SceditConfig, model: nn.Module) -> list[Skip]:
    """Return the skips of `model` that a config chooses.

    Raises:
        InputError: the model has fewer skips, or is no U-Net.
    """
    found = skips_of(model)
    if config.skips is None:
        return found
    require(
        config.skips[-1] < len(found),
        f"skips={config.skips} is not in [0, {len(found) - 1}]: {type(model).__name__} has "
        f"{len(found)} skip connections",
    )
    return [found[index] for index in config.skips]


class SceditAdapter(Adapter):
    """SC-Tuner of one skip.

    `down_weight` [D, C], `down_bias` [D], `up_weight` [C, D], `up_bias` [C]. Its base is a block
    that gets `cat(h, x)`.
    """

    width_dim = 1

    def __init__(self, shape: LayerShape, config: SceditConfig, info: LayerInfo) -> None:
        super().__init__(shape, config, info)
        C = info.settings["channels"]
        D = config.width(C)
        self.config = config  # not its scaling: that may change
        self.channels = C
        # in a tuple, so that it is no submodule
        self.activations = (ACT2FN[config.non_linearity],)
        bound = C**-0.5  # kaiming-uniform with a = sqrt(5), and the bias of torch's Linear
        self.down_weight = nn.Parameter(torch.empty(D, C).uniform_(-bound, bound))
        self.down_bias = nn.Parameter(torch.empty(D).uniform_(-bound, bound))
        self.up_weight = nn.Parameter(torch.zeros(C, D))
        self.up_bias = nn.Parameter(torch.zeros(C))

    def edited(self, joined: Tensor) -> Tensor:
        """Return `cat(h, x)`, [N, I, H, W], with the edited skip x; the argument is unchanged."""
        h = joined.shape[1] - self.channels
        # a copy: it is kept for backward, where a view would hold all of `joined`
        x = joined.narrow(1, h, self.channels).clone(memory_format=torch.contiguous_format)
        parameters = (self.down_weight, self.down_bias, self.up_weight, self.up_bias)
        change = recomputed(_Bottleneck(self.activations[0]), x, *parameters)
        # `joined` itself must stay: a checkpointed block gets it again
        out = joined.clone()
        out.narrow(1, h, self.channels).add_(change, alpha=self.config.scaling)
        return out

    def with_base(self, x: Tensor, base: nn.Module, *args: object, **kwargs: object) -> Tensor:
        return base(self.edited(x), *args, **kwargs)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Raise UnsupportedError: with a second adapter `y` follows from an edited skip."""
        raise UnsupportedError(ONE_ACTIVE)

    def combination_refusal(self) -> str | None:
        return ONE_ACTIVE


class _Bottleneck:
    """The function `act(x W1^T + b1) W2^T + b2` of each pixel of x [N, C, H, W]."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        self.act = act

    def __call__(self, x: Tensor, *parameters: Tensor) -> Tensor:
        W1, b1, W2, b2 = (parameter.to(x.dtype) for parameter in parameters)
        z = F.conv2d(x, W1[..., None, None], b1)
        return F.conv2d(self.act(z), W2[..., None, None], b2)


@register
class Scedit(Method[SceditConfig, SceditAdapter]):
    """Tuners on the skip connections of a diffusion U-Net."""

    name = "scedit"
    config_cls, adapter_cls = SceditConfig, SceditAdapter
    summary = "tuners on the skip connections of a diffusion U-Net; no backward through the encoder"
    paper = (
        "Jiang et al. 2024, SCEdit: Efficient and Controllable Image Diffusion Generation via "
        "Skip Connection Editing, CVPR, arXiv:2312.11392"
    )
    need = "a diffusion model"
    recommended = "trains on what the skips carry; the encoder half keeps no activations"
    lr = 1e-4
    needs_tuner = "a hook of the model ends backward at the skips, which the tuner has"
    lacks = {
        Capability.MERGE: (
            "scedit edits a feature map, not a weight, and cannot be merged into the model; keep "
            "the adapter, or call unload() for the base model"
        ),
        Capability.TRAIN: (
            "petl has no diffusion task; use it in your own code, such as a training script of "
            'diffusers, with petl.wrap(unet, "scedit", ...) and petl.load(unet, FOLDER)'
        ),
        Capability.NEW_TOKENS: "it is for images",
        Capability.MIXED_BATCH: "the edits of a batch are those of one adapter",
    }

    def targets(self, c: WrapContext[SceditConfig]) -> list[Target]:
        """Return the blocks that get the chosen skips, with the channels of input and output.

        Raises:
            InputError: other targets are given.
        """
        config, found = c.config, {skip.host: skip for skip in chosen_skips(c.config, c.model)}
        given = config.target_modules
        require(
            given is None or set(given) == set(found),
            f"target_modules={given} are not the blocks {set(found)} that skips={config.skips} "
            f"chooses in {type(c.model).__name__}; leave target_modules null, or load the adapter "
            "onto a model of its depth",
        )
        config.target_modules = set(found)
        hosts = [path for path in candidate_names(c.model) if path in found]
        return [Target(path, found[path].shape, is_block=True) for path in hosts]

    def settings(self, c: WrapContext[SceditConfig]) -> dict[str, Settings]:
        """Return the channels of each skip."""
        return {skip.host: {"channels": skip.channels} for skip in chosen_skips(c.config, c.model)}

    def added(self, new: NewAdapters[SceditConfig, SceditAdapter]) -> None:
        """Let backward end at the skips."""
        if new.once("detach"):
            hook = Detach(new.placed)
            new.hooks.append(new.model.register_forward_pre_hook(hook, with_kwargs=True))

    @torch.no_grad()
    def heat_maps(self, t: TrainContext[SceditConfig, SceditAdapter]) -> list[HeatMap]:
        """Return a map of the norms of `up_weight`, by which the edits differ from the start."""
        norms = {host: float(adapter.up_weight.float().norm()) for host, adapter in t.adapters}
        meaning = "The norm of the matrix from the bottleneck to the skip; 0 leaves the skip as is."
        return of_layers(t.model, norms, "edits", "Size of the edits", "norm of W2", meaning)


class Detach:
    """Pre-hook of the model: detach what enters it, in a training pass with an adapter.

    Args:
        placed: by name and host, the adapters of the model.
    """

    def __init__(self, placed: Mapping[str, Mapping[str, SceditAdapter]]) -> None:
        self.placed = placed

    def __call__(self, model: nn.Module, args: object, kwargs: object) -> Any:
        if not (model.training and torch.is_grad_enabled() and self._edits()):
            return None
        return recursively_apply(torch.detach, (args, kwargs))

    def _edits(self) -> bool:
        for name, adapters in self.placed.items():
            layer = next(iter(adapters.values())).info.layer
            if name in layer.active_adapters:
                return not layer.disable_adapters
        return False
