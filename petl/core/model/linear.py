"""Which modules are linear layers: their output is x W^T + b, whatever their class is called."""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from petl.core.compat import SEQ_CLS_HEAD_NAMES, AuxiliaryTrainingWrapper, BaseTunerLayer
from petl.core.layers.class_swap import original_class
from petl.errors import ModuleKindError
from petl.ops.expert_linear import ExpertLinears

LINEAR_KINDS = (nn.Linear, Conv1D)
QUANTIZED = ("bitsandbytes.", "torchao.", "transformers.integrations.")  # modules of such classes
LARGEST = 2**24  # entries of a weight with which a class is tried; of larger ones only shapes

_computes: dict[tuple[object, ...], bool] = {}  # by class and settings of a layer


def is_linear(module: nn.Module) -> bool:
    """Return True for Conv1D and nn.Linear, quantized or not; of a subclass, if it computes as one.

    A subclass with a forward of its own is tried on random values: some return several tensors
    (routers of mixtures of experts), or multiply groups of inputs apart.
    """
    if not isinstance(module, nn.Linear):
        return isinstance(module, Conv1D)
    cls = original_class(module)
    weight = module._parameters.get("weight")
    is_plain = type(weight) is nn.Parameter and weight.is_floating_point() and weight.dim() == 2
    if cls.forward is nn.Linear.forward or cls.__module__.startswith(QUANTIZED) or not is_plain:
        return True
    settings = (v for v in vars(module).items() if isinstance(v[1], str | int | float))
    key = (cls, module.bias is None, *(item for item in settings if item[0] != "training"))
    if key not in _computes:
        _computes[key] = _computes_linearly(module, cls)
    return _computes[key]


def _computes_linearly(module: nn.Linear, cls: type[nn.Module]) -> bool:
    device = "cpu" if module.weight.numel() <= LARGEST else "meta"
    generator = torch.Generator().manual_seed(0) if device == "cpu" else None
    layer = copy.copy(module)
    with torch.no_grad(), torch.device(device):
        layer.__dict__ |= {"training": False, "_forward_hooks": {}, "_forward_pre_hooks": {}}
        layer._parameters = {
            name: None if p is None else nn.Parameter(torch.randn(p.shape, generator=generator))
            for name, p in module._parameters.items()
        }
        x = torch.randn(2, 3, module.weight.shape[1], generator=generator)
        expected = F.linear(x, layer.weight, layer.bias)
        try:
            y = cls.forward(layer, x)
        # whatever the class raises: it takes other inputs than a linear layer
        except (RuntimeError, TypeError, ValueError, AttributeError, LookupError):
            return False
        if not isinstance(y, Tensor) or y.shape != expected.shape:
            return False
        return device == "meta" or torch.allclose(y, expected, rtol=1e-4, atol=1e-4)


def refuse_other_kind(module: nn.Module, name: str) -> None:
    """Raise ModuleKindError for a subclass of nn.Linear that computes something else."""
    if isinstance(module, nn.Linear) and not is_linear(module):
        raise ModuleKindError(
            f"{name} is {type(module).__name__}, a subclass of nn.Linear that computes something "
            "else than x W^T + b, so an adapter for linear layers does not fit; choose other "
            "targets, or train it in full by modules_to_save"
        )


def linear_names(model: nn.Module) -> list[str]:
    """Return the names of the linear layers of `model`, adapted or not, without its output head."""
    # heads are trained in full or not at all
    heads = {getattr(model, name, None) for name in SEQ_CLS_HEAD_NAMES}
    if isinstance(model, PreTrainedModel):
        heads.add(model.get_output_embeddings())
    heads.discard(None)
    names, skipped = [], tuple[str, ...]()
    for name, module in model.named_modules():
        if skipped and name.startswith(skipped):  # inside an adapted layer or a trained copy
            continue
        kinds = BaseTunerLayer | AuxiliaryTrainingWrapper | ExpertLinears
        if isinstance(module, kinds) or module in heads:
            skipped += (f"{name}.",)
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if is_linear(base) and module not in heads and base not in heads:
            names.append(name)
    return names
