"""`petl.shrink`: a smaller model of the same class, from one forward pass.

Wang et al. 2025, CFSP (arXiv:2409.13199). Shapes: D width of the model, F channels of an MLP, I
columns of an output projection.

Where we depart from the authors' code: it keeps one channel more than the ratio says, and masks
weights; here they leave the model. Widths are multiples of `multiple`. Heads, the correction of
biases (An et al. 2024, FLAP, arXiv:2312.11983) and equal widths (`widths="even"`) are additions.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from petl.adapters.shrink.calibration import Batches, InputSums
from petl.adapters.shrink.config import odd_parameters, set_list, set_widths, widths_of
from petl.adapters.shrink.counts import counts_by_block, even_counts
from petl.adapters.shrink.heads import Heads, find_heads, note_heads, set_heads
from petl.core.compat import BaseTunerLayer
from petl.core.layers.layer import shape_of
from petl.core.model.changed import changed_copy
from petl.core.model.layer_widths import remember_widths
from petl.core.model.mlp import Mlp, find_mlp, kept_inputs, kept_outputs, matrix_of, note_shape
from petl.core.parameters import check_module, quantization_of
from petl.core.spec.config import require
from petl.errors import UnsupportedError, choose
from petl.system.values import FREE, bounded, integer, real
from petl.training.ranks import METRICS, channel_scores
from petl.training.ranks.importance import blocks_of

EVEN, BY_BLOCK = "even", "by_block"
SPARSITY = bounded(gt=0, lt=1)
WIDTHS = {EVEN: "the same in every block", BY_BLOCK: "by the importance of the block"}
Model = Any  # a PreTrainedModel, of any class


@dataclass(frozen=True)
class Shrunk:
    """A smaller model, and what it kept.

    Attributes:
        model: of the class of the given one.
        kept: by path of a block, the channels of its MLP that stay, "channels", rising; with heads
            also the query heads, "heads".
        importance: of the dense blocks, in order.
        parameters: of the given model, and of this one.
    """

    model: Model
    kept: dict[str, dict[str, Tensor]]
    importance: dict[str, float]
    parameters: tuple[int, int]


def shrink(  # noqa: PLR0913 - all but two by name
    model: PreTrainedModel,
    batches: Batches,
    *,
    sparsity: float = 0.3,
    widths: str = EVEN,
    multiple: int = 8,
    heads: bool = False,
    metric: str = "angular",
    b: float = 1.0,
    c: float = 1.0,
    bias_correction: bool = False,
) -> Shrunk:
    """Return a smaller model: MLPs without the channels that matter least on some batches.

    Channels are scored by `petl.ranks.channel_scores`, from the norms of the inputs of the down
    projection over all tokens that are not padding; those with the largest scores stay, in their
    order. The weights that stay are not changed. Embeddings, norms, the width and the number of
    blocks stay, so `sparsity` is that of the MLPs. One forward pass, in evaluation mode; the given
    model is as before. With several processes each passes its own batches, and all get the same.

    Args:
        model: of any class whose blocks have an MLP with or without a gate.
        batches: model inputs.
        sparsity: fraction of the channels to remove, in (0, 1).
        widths: "even", the same in every block, so that the class of the model loads the result
            from a folder; or "by_block", more where a block is more important, see `keep_ratios`,
            for `petl.load_shrunk`.
        multiple: of which the numbers of channels are multiples, for fast kernels.
        heads: also remove heads of attention, the same number in every block: groups of query heads
            that share a key and a value, by the sum of the channel scores of the output projection.
        metric: of the importance of blocks.
        b, c: exponents of the norms, from 0 and above 0, see `channel_scores`.
        bias_correction: add to the bias of the down projection what the removed channels add on
            average; where it has none, nothing changes.

    Raises:
        InputError: a value is out of range, nothing would be pruned, or the batches do not reach
            every block.
        UnsupportedError: the model has adapters, is quantized, is a mixture of experts, shares
            MLPs, or has blocks without an MLP of a known form.
    """
    FREE.check("bias_correction", bias_correction, bool)
    plan, counts = planned(
        model,
        sparsity=sparsity,
        widths=widths,
        multiple=multiple,
        heads=heads,
        metric=metric,
        b=b,
        c=c,
    )
    sums = InputSums(model, plan.read(), with_means=bias_correction)
    importance = sums.measure(batches, metric)
    if widths == BY_BLOCK:
        counts = counts_by_block(plan.widths, importance, sparsity, multiple)
    kept: dict[str, dict[str, Tensor]] = {}
    for path, mlp in plan.mlps.items():
        scores = plan.scores(mlp, sums.norms(mlp.down), b, c)
        order = scores.sort(descending=True, stable=True).indices  # ties: the smaller index
        kept[path] = {"channels": order[: counts[path]].sort().values}
    groups = {
        path: each.best_groups(model, sums.norms(each.output), sparsity, b, c)
        for path, each in plan.heads.items()
    }
    means = sums.means if bias_correction else {}
    channels = {path: own["channels"] for path, own in kept.items()}
    small = plan.cut(channels, groups, means, even=widths == EVEN)
    for path, own in groups.items():
        kept[path]["heads"] = plan.heads[path].heads_of(own)
    return Shrunk(small, kept, importance, (count(model), count(small)))


def planned(  # noqa: PLR0913 - the arguments of `shrink`
    model: PreTrainedModel,
    *,
    sparsity: float,
    widths: str,
    multiple: int,
    heads: bool,
    metric: str,
    b: float = 1.0,
    c: float = 1.0,
) -> tuple["Plan", dict[str, int]]:
    """Return what `shrink` would prune, and how many channels of each block would stay.

    That is before a pass, which may take minutes; `by_block` as if all blocks were as important.

    Raises:
        InputError, UnsupportedError: as of `shrink`, as far as they need no pass.
    """
    check_module(model, "petl.shrink")
    SPARSITY.check("sparsity", sparsity, float)
    integer(1).check("multiple", multiple, int)
    FREE.check("heads", heads, bool)
    real(0).check("b", b, float)
    # c=0 would score all channels alike
    real(0, above=True).check("c", c, float)
    choose(WIDTHS, widths, "widths")
    choose(METRICS, metric, "metric")
    plan = Plan.of(model, sparsity if heads else 0.0)
    if widths == EVEN:
        return plan, even_counts(plan.widths, sparsity, multiple)
    alike = dict.fromkeys(plan.widths, 1.0)
    return plan, counts_by_block(plan.widths, alike, sparsity, multiple)


def count(model: PreTrainedModel) -> int:
    """Return the number of parameters of a model; tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


@dataclass(frozen=True)
class Plan:
    """What can be pruned in a model.

    Attributes:
        model: the dense one.
        mlps: by path of a block.
        heads: the same; empty if heads stay.
    """

    model: Model
    mlps: dict[str, Mlp]
    heads: dict[str, Heads]

    @classmethod
    def of(cls, model: Model, sparsity: float) -> "Plan":
        """Find MLPs and, with a sparsity, heads of a model.

        Raises:
            UnsupportedError: as of `shrink`.
        """
        name = type(model).__name__
        # adapted layers would be cut without their adapters
        if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            raise UnsupportedError(
                f"{name} has an adapter on it; merge it first (merge_and_unload(), `petl merge`)"
            )
        if quantization_of(model):
            raise UnsupportedError(
                f"{name} is quantized ({quantization_of(model)}), and its weights cannot be cut; "
                "load it without quantization"
            )
        require(
            isinstance(model, PreTrainedModel),
            f"petl.shrink needs a model of transformers, with a config, and got {name}",
        )
        blocks, known = list(blocks_of(model)), widths_of(model.config)
        if not blocks:
            raise UnsupportedError(
                f"{name} has no blocks, that is no list of layers with linear layers; choose "
                "another model"
            )
        mlps = {path: find_mlp(model, path, known) for path in blocks}
        return cls(model, mlps, find_heads(model, blocks, sparsity) if sparsity else {})

    @property
    def widths(self) -> dict[str, int]:
        """Channels of each block, by path."""
        return {path: mlp.width for path, mlp in self.mlps.items()}

    def read(self) -> dict[str, tuple[str, ...]]:
        """Return the layers whose inputs count; of each the layers that are called before it."""
        mlps = {mlp.down: mlp.inputs for mlp in self.mlps.values()}
        return mlps | {heads.output: (heads.query,) for heads in self.heads.values()}

    def scores(self, mlp: Mlp, norms: Tensor, b: float, c: float) -> Tensor:
        """Return the scores of the channels of an MLP, [F]."""
        down = self.matrix(mlp.down)
        # the score does not depend on which of the two is the gate
        inputs = [part for path in mlp.inputs for part in self.matrix(path).split(mlp.width)]
        return channel_scores(down, norms.to(down.device), *inputs, b=b, c=c).cpu()

    def matrix(self, path: str) -> Tensor:
        """Return the weight of a linear layer, [O, I]."""
        return matrix_of(self.model.get_submodule(path)).detach()

    def cut(
        self,
        channels: Mapping[str, Tensor],
        groups: Mapping[str, Tensor],
        means: Mapping[str, Tensor],
        *,
        even: bool,
    ) -> Model:
        """Return a copy of the model with these channels and groups of heads.

        Args:
            channels, groups: by path of a block, what stays.
            means: of the inputs of down projections, whose biases are corrected.
            even: the config is to say how many channels there are.

        Raises:
            UnsupportedError: the class of the model does not take the new sizes.
        """
        # what is replaced is not copied: no second copy of the dense weights
        model, changes = self.model, dict[int, object]()
        for path, mlp in self.mlps.items():
            changes |= self.without_channels(mlp, channels[path], means)
        for path, own in groups.items():
            changes |= self.heads[path].changes(model, own)
        small = changed_copy(model, changes)
        if even:
            # blocks of one width have one new width
            new = {mlp.width: len(channels[path]) for path, mlp in self.mlps.items()}
            set_widths(small.config, new)
        else:
            set_list(small.config, [len(kept) for kept in channels.values()])
        for mlp in self.mlps.values():
            for path in (*mlp.inputs, mlp.down):
                note_shape(small, path)
        for path, own in groups.items():
            heads = self.heads[path]
            set_heads(small.config, heads, len(own))
            note_heads(small, heads, len(own))
            for each in (heads.query, heads.key, heads.value, heads.output):
                note_shape(small, each)
        own = {path for mlp in self.mlps.values() for path in (*mlp.inputs, mlp.down)}
        # the config is checked by what its class builds from it
        odd = odd_parameters(small, self.mlps)
        # what a list in the config says needs no file
        widths = {name.rpartition(".")[0] for name in odd} & own
        if not even:
            odd = [name for name in odd if name.rpartition(".")[0] not in own]
        if odd:
            raise UnsupportedError(
                f"{type(small).__name__} would have {odd[0]} of another shape than its config "
                f"says, {list(small.get_parameter(odd[0]).shape)}; "
                + ("leave heads out" if groups else f"widths={BY_BLOCK} needs no field of a config")
            )
        paths = [path for path, _ in small.named_modules() if path in widths]
        remember_widths(small, {path: [*shape_of(small.get_submodule(path))] for path in paths})
        return small

    def without_channels(
        self, mlp: Mlp, kept: Tensor, means: Mapping[str, Tensor]
    ) -> dict[int, object]:
        """Return the parameters of an MLP with these channels, by the `id` of the given ones."""
        down: Any = self.model.get_submodule(mlp.down)
        at = kept.to(down.weight.device)
        changes = kept_inputs(down, at)
        for path in mlp.inputs:
            # gate and up are the halves of one layer
            both = torch.cat([at, at + mlp.width]) if mlp.fused else at
            changes |= kept_outputs(self.model.get_submodule(path), both)
        if means and down.bias is not None:
            dropped = torch.ones(mlp.width, dtype=torch.bool)
            dropped[kept] = False
            added = self.matrix(mlp.down).cpu().double()[:, dropped] @ means[mlp.down][dropped]
            bias = down.bias.detach() + added.to(down.bias)
            changes[id(down.bias)] = torch.nn.Parameter(bias, requires_grad=down.bias.requires_grad)
        return changes
