"""All uses of PEFT's private API, in one place."""

import copy
import inspect
import re
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial, wraps
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.auto import _BaseAutoPeftModel as AutoPeftClass
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.peft_model import PeftModelForQuestionAnswering
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.adalora import AdaLoraModel
from peft.tuners.adalora.layer import AdaLoraLayer, RankAllocator, SVDConv2d
from peft.tuners.boft.layer import Conv2d as BOFTConv2d
from peft.tuners.boft.layer import get_fbd_cuda
from peft.tuners.ln_tuning import LNTuningModel
from peft.tuners.ln_tuning.layer import LNTuningLayer
from peft.tuners.loha.layer import Conv2d as LoHaConv2d
from peft.tuners.lokr.layer import Conv2d as LoKrConv2d
from peft.tuners.lora import LoraConfig, LoraLayer, LoraModel
from peft.tuners.lora.conversion import _convert_module_to_lora
from peft.tuners.lora.layer import Conv2d as LoraConv2d
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.oft.layer import Conv2d as OFTConv2d
from peft.tuners.oft.layer import OFTRotationModule
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import (
    AuxiliaryTrainingWrapper,
    BaseTuner,
    BaseTunerLayer,
    _check_lora_target_modules_mamba,
    _get_tuner_state_dict_key_prefixes,
    cast_adapter_dtype,
    check_adapters_to_merge,
    check_target_module_exists,
)
from peft.utils import (
    PeftType,
    hotswap,
    register_peft_method,
    transformers_weight_conversion,
)
from peft.utils.constants import (
    SEQ_CLS_HEAD_NAMES,
    TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
)
from peft.utils.other import ModulesToSaveWrapper, get_pattern_key
from peft.utils.quantization_utils import get_quantization_kwargs, resolve_quantization_backend
from peft.utils.transformers_weight_conversion import (
    _MOE_TARGET_MODULE_MAPPING,
)
from torch import Tensor, nn

__all__ = [
    "SEQ_CLS_HEAD_NAMES",
    "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",
    "AdaLoraModel",
    "AutoPeftClass",
    "AuxiliaryTrainingWrapper",
    "BaseTuner",
    "BaseTunerLayer",
    "LoraConfig",
    "LoraLayer",
    "LoraLinear",
    "LoraModel",
    "ModulesToSaveWrapper",
    "ParamWrapper",
    "TrainableTokensLayer",
    "adapter_weights",
    "adapts_convolutions",
    "adapts_norms",
    "add_beside",
    "add_method",
    "adjustments_refused",
    "announce_method",
    "cast_adapter_dtype",
    "check_adapters_to_merge",
    "check_target_module_exists",
    "config_class",
    "default_feedforward",
    "default_targets",
    "drop_base_weights",
    "embedding_weights",
    "freeze_ranks",
    "get_pattern_key",
    "get_quantization_kwargs",
    "has_boft_kernel",
    "read_by_kernels",
    "refused_names",
    "renamed_targets",
    "resolve_quantization_backend",
    "svd_factors",
    "tuner_class",
    "tuner_of",
    "without_noise",
]


PACKAGE = "petl-peft"  # the name by which petl is installed
# HRA's takes no padding in words
CONVOLUTIONS = LoraConv2d, SVDConv2d, LoHaConv2d, LoKrConv2d, OFTConv2d, BOFTConv2d


@contextmanager
def without_noise() -> Generator[None]:
    """Suppress, in the block, warnings of PEFT that its user cannot act on.

    PEFT reads `is_gradient_checkpointing`, which is deprecated in transformers, and without a GPU
    its BOFT warns that the CUDA kernel is missing. It applies a rank to stacked experts, and says
    that it does not. Of `exclude_modules` that match nothing petl warns before, where a user gives
    them; those of a saved adapter may be of modules that only the complete base has.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        warnings.filterwarnings("ignore", "You have passed exclude_modules=")
        warnings.filterwarnings(
            "ignore", r"(?s).*_pattern keys .*\.(gate_up|up|down)_proj'\]", RuntimeWarning
        )
        if not torch.cuda.is_available():
            warnings.filterwarnings("ignore", "Failed to load the CUDA extension")
            warnings.filterwarnings("ignore", "Setting boft_n_butterfly_factor to 1 to speed up")
        yield


@contextmanager
def adjustments_refused() -> Generator[None]:
    """Turn the warning of a PEFT tuner that it replaces an invalid value into an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", r"Invalid `\w+` .*Adjusted", UserWarning)
        yield


def add_method(
    name: str, prefix: str, config_cls: type, tuner_cls: type, *, is_own_prefix: bool = True
) -> None:
    """Register a tuner with PEFT, as type `name` in capitals.

    Args:
        name: of the PEFT type.
        prefix: of its tensors in state dicts.
        config_cls: its config.
        tuner_cls: the tuner.
        is_own_prefix: False for a tuner that derives from one of PEFT's and keeps its tensors.

    Raises:
        ValueError: PEFT or petl already has the type or the prefix.
    """
    peft_type = name.upper()
    if peft_type in announced:
        announced.remove(peft_type)
        for table in TABLES:
            table.pop(peft_type)
            # in one of them, and the first name of a class is that of `tuner_class`
            table.pop(saved_type(peft_type), None)
    # PEFT's own check looks for the prefix among the keys of this mapping, not its values
    elif is_own_prefix and prefix in PEFT_TYPE_TO_PREFIX_MAPPING.values():
        raise ValueError(
            f"the state-dict prefix {prefix!r} is taken by another PEFT method; choose another name"
        )
    else:
        # first: register_peft_method looks the name up in the enum
        extend_peft_types(peft_type)
    register_peft_method(name=name, prefix=prefix, config_cls=config_cls, model_cls=tuner_cls)
    TABLES[0][saved_type(peft_type)] = config_cls


TABLES: tuple[dict[Any, Any], ...] = (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
)
announced: set[str] = set()  # types whose classes `add_method` has not set yet


def announce_method(name: str, prefix: str, config: type, tuner: type) -> None:
    """Register a tuner whose classes are not imported, with stand-ins for them."""
    peft_type = name.upper()
    extend_peft_types(peft_type)
    for table, value in zip(TABLES, (config, tuner, prefix), strict=True):
        table[PeftType[peft_type]] = value
    TABLES[0][saved_type(peft_type)] = config
    announced.add(peft_type)


def saved_type(peft_type: str) -> str:
    """Return how a type of petl is written in adapter_config.json.

    PEFT raises KeyError with these words where petl, and with it the type, is not known.
    """
    return f"{peft_type} of the package {PACKAGE}: pip install {PACKAGE}, then import petl first"


def config_class(peft_type: str) -> type | None:
    """Return the config class of a PEFT type, given as in a saved config, or None."""
    return PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type)


def tuner_class(config_cls: type) -> type[BaseTuner]:
    """Return the tuner class that PEFT uses for configs of this class."""
    # `is`: some of PEFT's configs derive from another method's
    types = (name for name, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items() if cls is config_cls)
    return PEFT_TYPE_TO_TUNER_MAPPING[next(types)]


def tuner_of(peft_type: str | None) -> type[Any]:
    """Return the tuner class that PEFT uses for a type; for prompts, that of the encoder."""
    return PEFT_TYPE_TO_TUNER_MAPPING[PeftType(peft_type)]


def has_boft_kernel() -> bool:
    """Return True if PEFT's CUDA kernel for BOFT's butterflies works; compiles it if necessary."""
    if not torch.cuda.is_available():
        return False
    # PEFT warns while it compiles
    with warnings.catch_warnings(action="ignore"):
        return get_fbd_cuda() is not None


def default_targets(tuner: type[BaseTuner], model_type: str | None) -> set[str] | str | None:
    """Return PEFT's default targets of a tuner for this type of model; None: it has none."""
    table = TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING  # of the only one without its own
    found = getattr(tuner, "target_module_mapping", table).get(model_type or "")
    return set(found) if isinstance(found, list) else found


def default_feedforward(model_type: str | None) -> list[str] | None:
    """Return PEFT's names of the targets of (IA)3 whose input it scales; None: it has none."""
    return TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.get(model_type or "")


def adapts_norms(tuner: type[BaseTuner]) -> bool:
    """Return True for the tuner whose targets are norms."""
    return issubclass(tuner, LNTuningModel)


def adapts_convolutions(tuner: type[BaseTuner]) -> bool:
    """Return True for a tuner with a layer for `nn.Conv2d` that needs no more than targets."""
    return tuner.tuner_layer_cls.__module__ in {layer.__module__ for layer in CONVOLUTIONS}


def renamed_targets(config: PeftConfig, model: nn.Module) -> set[str]:
    """Return the names that PEFT takes for parameters of stacked experts in this model.

    They are names of transformers 4, such as `gate_proj`, where the experts were linear layers.
    """
    if config.peft_type != PeftType.LORA:
        return set()
    for names in _MOE_TARGET_MODULE_MAPPING.values():
        # the router has one name in all kinds of models
        probe = LoraConfig(target_modules=[name for name in names if name != "gate"])
        convert_peft_config_for_transformers(probe, model=model, conversions=None)
        if probe.target_parameters:
            return set(names)
    return set()


def read_by_kernels(config: PeftConfig, model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Return the modules that PEFT's LoRA may not adapt in a Mamba, with the reason."""
    refused = dict[str, str]()
    for name in names:
        try:
            _check_lora_target_modules_mamba(config, model, name.rpartition(".")[2])
        except ValueError:
            refused[name] = "kernels of Mamba read its weight without calling it"
    return refused


def refused_names(config: Any, model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Return why PEFT refuses modules of this model as targets, by name; of most none."""
    refused, renamed = read_by_kernels(config, model, names), renamed_targets(config, model)
    ours = copy.deepcopy(config)
    ours.target_modules = set(names) - refused.keys()
    try:
        convert_peft_config_for_transformers(ours, model=model, conversions=None)
    except ValueError:
        reason = "PEFT takes its name for a part of the experts"
        refused |= {n: reason for n in names if n.rpartition(".")[2] in renamed}
    return refused


def with_new_names(
    original: Callable[..., None], config: Any, model: nn.Module, conversions: object
) -> None:
    """Replace names of transformers 4 in the targets of a config, as PEFT does.

    PEFT also takes the complete name of a module that the model has for one, such as that of the
    `gate_proj` of shared experts, and would then adapt the routed ones instead.
    """
    targets = vars(config).get("target_modules")
    names = targets if isinstance(targets, list | set) else ()
    complete = {name for name in names if "." in name and _has_module(model, name)}
    if not complete:
        original(config, model=model, conversions=conversions)
        return
    config.target_modules = {*targets} - complete
    original(config, model=model, conversions=conversions)
    config.target_modules = {*(config.target_modules or ())} | complete


def _has_module(model: nn.Module, name: str) -> bool:
    # a walk over all modules would grow with the number of adapters
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


_with_new_names = transformers_weight_conversion.convert_peft_config_for_transformers


@wraps(_with_new_names)
def convert_peft_config_for_transformers(
    peft_config: PeftConfig, model: nn.Module, conversions: object
) -> None:
    """Call `with_new_names`; PEFT imports it by this name where it is called."""
    with_new_names(_with_new_names, peft_config, model, conversions)


setattr(  # noqa: B010
    transformers_weight_conversion,
    "convert_peft_config_for_transformers",
    convert_peft_config_for_transformers,
)


def extend_method(cls: type, name: str, extension: Callable[..., object]) -> None:
    """Let a method of another package's class be `extension(original, self, *args, **kwargs)`.

    On the class: a subclass would change the class of a wrapped model, and an attribute of the
    model would keep it in memory by a cycle.
    """
    original = getattr(cls, name)

    @wraps(original)
    def extended(self: object, *args: object, **kwargs: object) -> object:
        return extension(original, self, *args, **kwargs)

    setattr(cls, name, extended)


def saved_folders(
    model: PeftModel, args: Sequence[object], kwargs: Mapping[str, object]
) -> tuple[dict[str, Path], bool]:
    """Return where this process saves each adapter, and whether PEFT converts it meanwhile.

    Args:
        model: whose `save_pretrained` is called.
        args: of that call, without the model; `kwargs` likewise.
    """
    given = inspect.signature(PeftModel.save_pretrained).bind(model, *args, **kwargs).arguments
    is_main = given.get("is_main_process", True)
    names = (given.get("selected_adapters") or model.peft_config) if is_main else ()
    folder = Path(given["save_directory"])
    found = {name: folder / ("" if name == "default" else name) for name in names}
    return found, given.get("path_initial_model_for_weight_conversion") is not None


def with_complete_names(
    inject: Callable[..., None],
    tuner: Any,
    model: nn.Module,
    adapter_name: str,
    *args: object,
    **more: object,
) -> None:
    """Inject a LoRA, and keep complete names of modules whose last part is one of transformers 4.

    PEFT shortens many names to the parts that they share. In a saved config, `down_proj` would then
    stand for the experts, and not for the linear layers that it was made from.
    """
    given = tuner.peft_config[adapter_name].target_modules
    inject(tuner, model, adapter_name, *args, **more)
    config = tuner.peft_config[adapter_name]
    targets = config.target_modules
    shortened = isinstance(targets, list | set) and any("." not in name for name in targets)
    if shortened and not renamed_targets(config, model).isdisjoint(targets):
        is_word = isinstance(given, str)
        config.target_modules = set(tuner.targeted_module_names if is_word else given)


def with_names_of_others(check: Callable[..., None], tuner: Any, config: LoraConfig) -> None:
    """Check the config of a further LoRA, which may have other names for the same parameters.

    PEFT compares names. Complete ones and their ends, to which it renames targets of transformers
    4, are the same parameters, nested in one order.
    """
    own, others = config.target_parameters, tuner.peft_config.values()
    known = [c.target_parameters for c in others if c is not config and c.target_parameters]
    if own and known and _parameters_named(own, tuner) == _parameters_named(known[0], tuner):
        config.target_parameters = copy.copy(known[0])
    check(tuner, config)


def _parameters_named(ends: Iterable[str], tuner: nn.Module) -> set[str]:
    """Return the paths of the base's parameters with one of these ends."""
    names = (f".{name}".replace(".base_layer", "") for name, _ in tuner.named_parameters())
    endings = tuple(f".{name}" for name in ends)
    return {name for name in names if name.endswith(endings)}


def save_config(
    save: Callable[..., None], config: LoraConfig, *args: object, **more: object
) -> None:
    """Save the config of a LoRA, on parameters by a module that is imported with the first one."""
    if config.target_parameters:
        save = partial(resolve_name("petl.core.experts.lora:saved"), save)
    save(config, *args, **more)


# whoever calls them: petl, PEFT's loading, a trainer
extend_method(
    ParamWrapper,
    "__init__",
    lambda *a, **k: resolve_name("petl.core.experts.lora:created")(*a, **k),
)
extend_method(LoraConfig, "save_pretrained", save_config)
extend_method(LoraModel, "inject_adapter", with_complete_names)
extend_method(LoraModel, "_check_new_adapter_config", with_names_of_others)


def tied_with_embedding(names: Callable[..., list[str]], tuner: BaseTuner) -> list[str]:
    """Return the names of the modules tied with the embedding; none where the model shows none."""
    try:
        return names(tuner)
    except NotImplementedError:  # of transformers, for models without `get_input_embeddings`
        return []


extend_method(BaseTuner, "_get_module_names_tied_with_embedding", tied_with_embedding)


def with_tokens(
    hooks: Callable[..., AbstractContextManager[None]],
    tuner: BaseTuner,
    *args: object,
    **kwargs: object,
) -> AbstractContextManager[None]:
    """Let layers beside experts, which see tokens, take `adapter_names` too."""
    given = hooks(tuner, *args, **kwargs)
    if kwargs.get("adapter_names") is None:
        return given
    return resolve_name("petl.core.experts.rows:telling_tokens")(given, tuner.model)


extend_method(LoraModel, "_enable_peft_forward_hooks", with_tokens)


def freeze_ranks(tuner: nn.Module) -> None:
    """Freeze the rank counters (`ranknum`) of PEFT's AdaLoRA; other tuners have none.

    PEFT freezes them and then moves them to the base's device and dtype. If either changes, that
    creates a new parameter, which is trainable.
    """
    if isinstance(tuner, AdaLoraModel):
        for module in tuner.modules():
            if isinstance(module, AdaLoraLayer):
                module.ranknum.requires_grad_(False)


def adapter_weights(tuner: BaseTuner, adapter_name: str) -> dict[str, tuple[nn.Module, str]]:
    """Return the parameters that an adapter trains, by name in the tuner: owner and name in it."""
    prefixes = _get_tuner_state_dict_key_prefixes(tuner, adapter_name=adapter_name)
    for path, layer in tuner.named_modules():
        if isinstance(layer, BaseTunerLayer):
            frozen = layer.frozen_peft_weight_names.get(adapter_name, ())
            # weights that a variant of LoRA has frozen
            prefixes -= {f"{path}.{name}.{adapter_name}" for name in frozen}
        # a layer that is the container of its adapters itself: PEFT would take all of them
        if isinstance(layer, BaseTunerLayer) and isinstance(layer, nn.ModuleDict):
            prefixes -= {f"{path}.{name}" for name in layer if name != adapter_name}
    weights: dict[str, tuple[nn.Module, str]] = {}
    for path, owner in tuner.named_modules():
        for name, _ in owner.named_parameters(recurse=False):
            parts = f"{path}.{name}".split(".")
            if any(".".join(parts[:i]) in prefixes for i in range(1, len(parts) + 1)):
                weights[".".join(parts)] = owner, name
    return weights


def add_beside(layer: BaseTunerLayer, name: str, adapter_name: str, tensor: Tensor) -> None:
    """Add a tensor of an adapter to a layer of PEFT, in a dict of this name by adapter.

    A parameter trains with the adapter; a buffer does not. Both are saved and deleted with it.
    """
    is_trained = isinstance(tensor, nn.Parameter)
    if not hasattr(layer, name):
        setattr(layer, name, nn.ParameterDict() if is_trained else BufferDict(persistent=True))
        # tuples of the class; PEFT walks over these
        if is_trained:
            layer.adapter_layer_names = (*layer.adapter_layer_names, name)
        else:
            layer.other_param_names = (*layer.other_param_names, name)
    getattr(layer, name)[adapter_name] = tensor


def drop_base_weights(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Remove the weights of the base layers under adapted layers from a state dict, in place.

    For the end of `BaseTuner._get_adapter_state_dict`: from the same dict PEFT takes the weight of
    an adapted embedding or output head next, saves it with the adapter, and overwrites the base's
    with it on loading.
    """
    layers = [path for path, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)]
    inside = tuple(f"{path}.base_layer." for path in layers)
    for key in [key for key in state if key.startswith(inside)]:
        del state[key]


def hotswapped(
    model: nn.Module,
    state_dict: dict[str, Tensor],
    adapter_name: str,
    config: LoraConfig,
    parameter_prefix: str = "lora_",
) -> None:
    """Swap the tensors of one LoRA in place, as PEFT does, and those of no other.

    PEFT takes every key that has the adapter's name in it for one of its own, and sets those that
    the new adapter lacks to 0: swapping "foo" would set all of "foobar" to 0.
    """
    own = re.compile(rf"\.{re.escape(parameter_prefix)}[^.]+\.{re.escape(adapter_name)}(\.|$)")
    state = {key: tensor for key, tensor in model.state_dict().items() if own.search(key)}
    vars(model)["state_dict"] = lambda: state  # shadows the method while PEFT looks for keys
    try:
        _hotswap(model, state_dict, adapter_name, config, parameter_prefix)
    finally:
        del vars(model)["state_dict"]


_hotswap = hotswap.hotswap_adapter_from_state_dict
# by setattr: `hotswap_adapter` looks the function up in its module
setattr(hotswap, "hotswap_adapter_from_state_dict", hotswapped)  # noqa: B010


def converted(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_state_dict: dict[str, Tensor],
    adapter_name: str,
) -> dict[str, Tensor]:
    """Rename the tensors of a saved LoRA as transformers 5 renamed modules, but none that fits.

    PEFT applies the patterns for checkpoints of the base to every name, and drops a tensor whose
    new name the model does not have: of Inkling, `k_proj.sconv` would be lost in some blocks.
    """
    names = (name for name, _ in model.named_parameters() if ".lora_" in name)
    present = {re.sub(rf"\.{re.escape(adapter_name)}(?=\.weight$|\.bias$|$)", "", n) for n in names}
    # DoRA's is a module, and saved as if it were a parameter
    present |= {n.removesuffix(".weight") for n in present if n.endswith("_vector.weight")}
    fitting = {key: value for key, value in adapter_state_dict.items() if key in present}
    others = {key: value for key, value in adapter_state_dict.items() if key not in present}
    return fitting | _convert(model, peft_config, others, adapter_name)


_convert = transformers_weight_conversion.convert_peft_adapter_state_dict_for_transformers
# by setattr: `set_peft_model_state_dict` looks the function up in its module
setattr(transformers_weight_conversion, _convert.__name__, converted)


QUESTION_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")


def answered(
    forward: Callable[..., object],
    model: PeftModelForQuestionAnswering,
    *args: object,
    **kwargs: object,
) -> object:
    """Compute the pass of a `PeftModelForQuestionAnswering` with all of its inputs.

    PEFT's own drops `token_type_ids` and `position_ids`: BERT would not tell the question from the
    text, and a merged model, which reads them, would give other answers than the adapter.
    """
    inputs = dict(zip(QUESTION_INPUTS, args, strict=False)) | kwargs
    lost = any(inputs.get(name) is not None for name in QUESTION_INPUTS[2:])
    if not lost or len(args) > len(QUESTION_INPUTS) or model.active_peft_config.is_prompt_learning:
        return forward(model, *args, **kwargs)
    with model._enable_peft_forward_hooks(**inputs):
        special = model.special_peft_forward_args
        return model.base_model(**{k: v for k, v in inputs.items() if k not in special})


extend_method(PeftModelForQuestionAnswering, "forward", answered)


def computed(
    forward: Callable[..., object], model: AdaLoraModel, *args: object, **kwargs: object
) -> object:
    """Compute the pass of an `AdaLoraModel`, also of one that was loaded for inference.

    PEFT adds the penalty of the adapter that trains to a loss, and fails where none does.
    """
    if "trainable_adapter_name" in vars(model):
        return forward(model, *args, **kwargs)
    return model.model.forward(*args, **kwargs)


extend_method(AdaLoraModel, "forward", computed)


def rated(update: Callable[..., None], allocator: object, model: nn.Module) -> None:
    """Rate the triplets of AdaLoRA, those without a gradient as if it were zero.

    PEFT fails for a tensor that a step does not reach, such as that of an indexer.
    """
    absent = [p for n, p in model.named_parameters() if "lora_" in n and p.grad is None]
    for parameter in absent:
        parameter.grad = torch.zeros_like(parameter)
    update(allocator, model)
    for parameter in absent:
        parameter.grad = None


extend_method(RankAllocator, "update_ipt", rated)


def rotated(forward: Callable[..., Tensor], rotation: OFTRotationModule, x: Tensor) -> Tensor:
    """Rotate the input of a layer that OFT adapts.

    PEFT takes every input of four dimensions for that of a convolution; a linear layer may have one
    too (FocalNet, ProphetNet).
    """
    if x.dim() != 4 or rotation.kernel_size != (0, 0):
        return forward(rotation, x)
    return forward(rotation, x.flatten(0, -2)).view(x.shape)


extend_method(OFTRotationModule, "forward", rotated)


def norm_in_use(layer: LNTuningLayer) -> nn.Module:
    """Return the norm that PEFT's layer around it computes with: the trained one, or the base's."""
    names = () if layer.disable_adapters or layer.merged else layer.active_adapters
    return layer.ln_tuning_layers[names[0]] if names else layer.base_layer


def attribute_of_norm(look_up: Callable[..., object], layer: LNTuningLayer, name: str) -> object:
    """Return an attribute of PEFT's layer around a norm; what it lacks, of the norm in use.

    Blocks of Mamba read weight and epsilon of their norm.
    """
    try:
        return look_up(layer, name)
    except AttributeError:
        norm = (
            norm_in_use(layer) if {"base_layer", "ln_tuning_layers"} <= {*layer._modules} else None
        )
        if name not in vars(norm or layer):
            raise
        return getattr(norm, name)


extend_method(LNTuningLayer, "__getattr__", attribute_of_norm)


def attribute_of_convolution(look_up: Callable[..., object], layer: nn.Module, name: str) -> object:
    """Look an attribute of PEFT's layer around a convolution up in that, if the layer has none.

    MobileNets read stride, kernel size and dilation of theirs for the padding of TensorFlow.
    """
    try:
        return look_up(layer, name)
    except AttributeError:
        base = layer._modules.get("base_layer")
        if not isinstance(base, nn.Conv2d) or name not in nn.Conv2d.__constants__:
            raise
        return getattr(base, name)


for _convolution in CONVOLUTIONS:
    extend_method(_convolution, "__getattr__", attribute_of_convolution)
# PEFT's is the base's: a kernel that reads it would compute without the adapter
setattr(LNTuningLayer, "weight", property(lambda layer: norm_in_use(layer).weight))  # noqa: B010


def embedding_weights(model: nn.Module) -> set[str]:
    """Return the names under which PEFT may save the base's own embedding and output head."""
    found: list[nn.Module | None] = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        # transformers raises it for models without text
        with suppress(NotImplementedError):
            found.append(getattr(model, getter, lambda: None)())
    own = [m.get_base_layer() if isinstance(m, BaseTunerLayer) else m for m in found]
    return {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if any(module is embedding for embedding in own)
        for name, _ in module.named_parameters()
    }


def extend_peft_types(value: str) -> None:
    """Add a member to the enum `PeftType`, which `register_peft_method` requires.

    Enums are closed, and PEFT has no other way to add a type, so this writes to the enum's private
    tables.
    """
    if value in PeftType.__members__:
        raise ValueError(f"PEFT already has a method called {value}; ours needs another name")
    # PeftType is a `str` enum, so a member is a str
    member: Any = str.__new__(PeftType, value)
    member._name_ = member._value_ = value
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType._member_names_)
    PeftType._member_names_.append(value)
    PeftType._member_map_[value] = member
    PeftType._value2member_map_[value] = member
    type.__setattr__(PeftType, value, member)
    # look-up by value, by name and by attribute use different tables
    if not (PeftType(value) is PeftType[value] is getattr(PeftType, value) is member):
        raise AssertionError(f"this Python's enum does not take the new member {value}")


def svd_factors(layer: Any, adapter_name: str) -> tuple[Tensor, Tensor]:
    """Return A [R, I] and B [O, R] with B A the update of a layer, R full: PEFT's conversion."""
    # the rank that any update can have, so nothing is cut off
    full_rank = min(layer.in_features, layer.out_features)
    A, B, _ = _convert_module_to_lora(layer, full_rank, adapter_name)
    return A, B
