"""The model to adapt and its processor: from a package, a folder or the hub, or drawn."""

import logging
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModel, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING
from transformers.utils import SAFE_WEIGHTS_NAME, find_adapter_config_file
from transformers.utils import logging as transformers_logging

from petl.errors import InputError, first_line
from petl.files import hub
from petl.models.quantization import keep_gradients, quantization_config
from petl.models.sources import DTYPES, Hub, ModelSource, RandomInit, Settings, read_source
from petl.tasks.base import Task


@contextmanager
def loading(source: ModelSource) -> Generator[None]:
    """Turns what transformers says of a model that cannot be loaded into one sentence.

    Its progress bars and its table of new weights are silenced: `new_modules` tells of them.
    """
    bars, level = (
        transformers_logging.is_progress_bar_enabled(),
        transformers_logging.get_verbosity(),
    )
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise cannot_load(source, error) from error
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def cannot_load(source: ModelSource, error: Exception) -> InputError:
    """The sentence for a model that transformers refused with `error`."""
    if "trust_remote_code" in str(error):
        return InputError(
            f"model {source.name} brings code of its own: read it, then say "
            "model.trust_remote_code=true"
        )
    if SAFE_WEIGHTS_NAME in str(error) and isinstance(error, OSError):  # "no file named ..."
        return InputError(
            f"model {source.name} has no {SAFE_WEIGHTS_NAME}, and no other file of weights is "
            "read, such files can hold code; if you trust it, load it with transformers alone, in "
            "the class for its task, save_pretrained it and its tokenizer, and say model=path "
            "model.path=FOLDER"
        )
    offline = isinstance(source, Hub) and source.options()["local_files_only"]
    if offline and isinstance(error, OSError):
        return hub.not_to_be_had("model", source.name)
    return InputError(f"model {source.name} cannot be loaded: {first_line(error)}")


def refuse_adapter(source: ModelSource) -> None:
    """Raise InputError if there is an adapter in the model's place: transformers would load it."""
    options = source.options()
    revision = options.get("revision", "main")
    local = options["local_files_only"]
    place = str(source.where())
    if find_adapter_config_file(place, revision=revision, local_files_only=local) is not None:
        raise InputError(
            f"model {source.name} holds an adapter (adapter_config.json): give the base model "
            "alone, or the two merged into one"
        )


logger = logging.getLogger(__name__)


def load_processor(cfg: Settings, task: Task) -> Any:
    """What makes the model's inputs for `task`: tokenizer, image processor, feature extractor.

    Raises:
        InputError: the model cannot be had, does not serve the task, or has no such processor.
    """
    if task.reads_text:
        return load_tokenizer(cfg)
    source = read_source(cfg)
    with loading(source):
        check_kind(source.config(), task, source.name)  # else the message would be about files
        return source.processor(task.processor_class)


def load_tokenizer(cfg: Settings) -> PreTrainedTokenizerBase:
    """The model's tokenizer; where it has no padding token, its end token pads.

    Raises:
        InputError: the model cannot be had, or has no tokenizer that can pad.
    """
    source = read_source(cfg)
    with loading(source):
        tokenizer = source.tokenizer()
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise InputError(
                f"the tokenizer of model {source.name} has neither a padding nor an end token: "
                "add one and save it"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(
    cfg: Settings, task: Task, *, meta: bool = False, processor: Any = None
) -> PreTrainedModel:
    """The model with the head that `task` needs, in eval mode, on the CPU.

    Args:
        meta: the same modules on the meta device: shapes, for which no weight is read.
        processor: what `load_processor` gave for this model and task; None: it is read again.

    Raises:
        InputError: the model cannot be had or does not suit the task.
    """
    source = read_source(cfg)
    with loading(source):
        config = source.config()
        check_kind(config, task, source.name)
        for key, value in task.model_kwargs().items():
            setattr(config, key, value)
        settings: dict[str, Any] = {
            "dtype": DTYPES[source.dtype],
            "attn_implementation": source.attn,
        }
        if meta:
            model = without_weights(task, config, source, settings)
        elif isinstance(source, RandomInit):
            model = with_random_weights(task, config, source, settings)
        else:
            model = with_weights(task, config, source, settings)
    if "" in new_modules(model):
        raise InputError(
            f"model {source.name} has new parameters outside of any module, which no adapter can "
            "save: set use_weighted_layer_sum to false in its config"
        )
    task.adjust(model)
    if task.reads_text:
        check_length(model, task, source.name)
        if not meta:
            tokenizer = load_tokenizer(cfg) if processor is None else processor
            fit_tokenizer(model, tokenizer, source.name)
    return model.eval()


def without_weights(
    task: Task, config: PretrainedConfig, source: ModelSource, settings: dict[str, Any]
) -> PreTrainedModel:
    """The model on the meta device."""
    trusted = source.options()["trust_remote_code"]
    with torch.device("meta"):
        model = task.auto_class.from_config(config, trust_remote_code=trusted, **settings)
    model.petl_new_modules = cover(model, head_keys(model, task))
    return model


def with_random_weights(
    task: Task, config: PretrainedConfig, source: RandomInit, settings: dict[str, Any]
) -> PreTrainedModel:
    """A model that nobody trained, its weights drawn from `source.seed` alone."""
    logger.warning(
        "model %s has random weights, drawn from model.seed=%d: nothing was learned before",
        source.name,
        source.seed,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(source.seed)
        model = task.auto_class.from_config(config, **settings)
    model.petl_new_modules = cover(model, head_keys(model, task))
    return model


def with_weights(
    task: Task, config: PretrainedConfig, source: ModelSource, settings: dict[str, Any]
) -> PreTrainedModel:
    """The pretrained model; of a classifier the head may be new, and a pooler before it.

    Raises:
        InputError: its weights are of another kind of model, lie in a file that could hold code, or
            an adapter lies beside them.
    """
    refuse_adapter(source)
    if source.quantization is not None:
        settings = {**settings, **as_quantized(source.quantization, task, config, source, settings)}
    model, report = task.auto_class.from_pretrained(
        source.where(),
        config=config,
        output_loading_info=True,
        use_safetensors=True,  # other files could hold code
        ignore_mismatched_sizes=True,  # a head for another number of classes is made anew
        **source.options(),
        **settings,
    )
    mismatched = {key for key, *_ in report["mismatched_keys"]}
    lacking = set(report["missing_keys"]) | mismatched
    inside = sorted(lacking - head_keys(model, task))
    too_many = len(model.state_dict()) // 2 if task.new_head else 0
    if mismatched.intersection(inside) or len(inside) > too_many:
        raise InputError(
            f"the weights of model {source.name} are not those of a {type(model).__name__}: "
            f"{len(inside)} tensors are missing or of another shape, such as {inside[0]}"
        )
    model.petl_new_modules = cover(model, lacking)
    if getattr(model, "hf_quantizer", None) is not None:
        keep_gradients(model)
    return model


def as_quantized(
    kind: str,
    task: Task,
    config: PretrainedConfig,
    source: ModelSource,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """How `from_pretrained` quantises all linear layers but those of heads, on this device."""
    dense = dense_modules(without_weights(task, config, source, settings), task)
    device = torch.accelerator.current_accelerator(check_available=True)
    place = "cpu" if device is None else f"{device.type}:{torch.accelerator.current_device_index()}"
    return {
        "quantization_config": quantization_config(kind, settings["dtype"], dense),
        "device_map": {"": place},  # quantised weights are not to be moved later
    }


def dense_modules(model: PreTrainedModel, task: Task) -> list[str]:
    """The modules of heads, which quantisation leaves alone."""
    output: Any = model.get_output_embeddings()
    heads = [] if output is None else [n for n, m in model.named_modules() if m is output]
    return [*heads, *cover(model, head_keys(model, task))]


def head_keys(model: PreTrainedModel, task: Task) -> set[str]:
    """The tensors of what the task puts on top of the pretrained body."""
    if not task.new_head:
        return set()
    keys, prefix = set(model.state_dict()), model.base_model_prefix
    if hasattr(model, prefix):
        return {key for key in keys if not key.startswith(f"{prefix}.")}
    with torch.device("meta"):  # the body's parts stand beside the head, as in Whisper's encoder
        return keys - set(AutoModel.from_config(model.config).state_dict())


def new_modules(model: PreTrainedModel) -> list[str]:
    """Modules of a model from `load_base` that no pretrained weights were found for.

    An adapter has to train and save them whole (`modules_to_save`). With `meta` these are the
    modules of the head, since no weight file is looked into.
    """
    return model.petl_new_modules  # ty: ignore[invalid-explicit-return]


def cover(model: nn.Module, keys: set[str]) -> list[str]:
    """The outermost modules that hold only tensors in `keys`, and the owners of what is left."""
    found: list[str] = []
    left = set(keys)
    for name, module in model.named_modules():
        owned = {f"{name}.{key}" for key in module.state_dict()}
        if name and owned and owned <= left:
            found.append(name)
            left -= owned
    return found + sorted({key.rpartition(".")[0] for key in left})


def check_kind(config: PretrainedConfig, task: Task, name: str) -> None:
    """Refuses a model that has no form for the task, and an encoder for the next token."""
    form, own_code = task.auto_class.__name__, getattr(config, "auto_map", None) or {}
    if type(config) not in task.auto_class._model_mapping and form not in own_code:
        raise InputError(
            f"model {name} ({config.model_type}) does not serve {task.name}: "
            f"transformers has no {form} for it; choose one that has by model=hub model.name=NAME, "
            "or one of configs/model"
        )
    decodes = getattr(config, "is_decoder", False) or getattr(config, "is_encoder_decoder", False)
    if task.name == "causal_lm" and type(config) in MODEL_FOR_MASKED_LM_MAPPING and not decodes:
        raise InputError(
            f"model {name} is an encoder ({config.model_type}), which sees the next token and so "
            "cannot learn to predict it: choose a decoder such as model=smollm2, or data with "
            "task: classification"
        )


def check_length(model: PreTrainedModel, task: Task, name: str) -> None:
    """Refuses rows longer than the positions that the model knows."""
    most = positions(model)
    if most is None or task.longest <= most:
        return
    if task.max_length > most:
        raise InputError(
            f"data.max_length={task.max_length} is more than the {most} positions of model {name}"
        )
    raise InputError(
        f"rows and what is written after them may have {task.longest} tokens, more than the {most} "
        f"positions of model {name}: lower data.max_length, data.max_target_length or data.generate"
    )


def positions(model: PreTrainedModel) -> int | None:
    """How many tokens the model can place; None when it has no limit."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa and its kin number positions from behind their padding entry
            skipped = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - skipped
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def fit_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Tells the model which token pads, by which decoders find the last token to classify by.

    Raises:
        InputError: the tokenizer has tokens that the model has no embedding for.
    """
    embedding = model.get_input_embeddings().weight
    assert isinstance(embedding, torch.Tensor)
    rows = embedding.shape[0]
    if len(tokenizer) > rows:
        raise InputError(
            f"the tokenizer of model {name} has {len(tokenizer)} tokens, its embedding only {rows}"
        )
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if model.can_generate() and model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
