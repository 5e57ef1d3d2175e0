"""Load the base model and its processor: from a package, a folder, the Hub, or random weights."""

import logging
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoModel,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.models.auto.auto_factory import _get_model_class
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
)
from transformers.utils import SAFE_WEIGHTS_NAME, find_adapter_config_file
from transformers.utils import logging as transformers_logging

from petl.core.parameters import max_positions, within_memory
from petl.core.types import Fields
from petl.data.models.sources import (
    HubModel,
    ModelFolder,
    ModelSource,
    RandomInit,
    Settings,
    read_source,
)
from petl.data.tasks.base import P, Task, tokenizer_in
from petl.errors import InputError, first_line
from petl.ops.float32_head import keep_in_float32
from petl.system.files.disk import check_link
from petl.system.files.paths import WIDTHS
from petl.system.progress import Pass

# arguments of a tokenizer that name a folder, or say that it was one
OF_THIS_MACHINE = ("name_or_path", "is_local", "local_files_only", "gguf_file")


@contextmanager
def loading(source: ModelSource) -> Generator[None]:
    """Inside the block, turn errors of transformers about a model into an InputError.

    Progress bars and the table of new weights are disabled; `new_modules` lists these weights.
    """
    # restored at the end, since both settings are global
    progress_bars, level = (
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
        if progress_bars:
            transformers_logging.enable_progress_bar()


def cannot_load(source: ModelSource, error: Exception) -> InputError:
    """The InputError for a model for which transformers raised `error`."""
    if "trust_remote_code" in str(error):
        return InputError(
            f"model {source.name} needs code from its own repository: read that code, then set "
            "model.trust_remote_code=true"
        )
    if SAFE_WEIGHTS_NAME in str(error) and isinstance(error, OSError):  # "no file named ..."
        return InputError(
            f"model {source.name} has no {SAFE_WEIGHTS_NAME}, and petl reads no other format of "
            "weights, since other formats can contain code; if you trust the model, load it with "
            "transformers, in the class for its task, save it and its tokenizer with "
            "save_pretrained, and set model=path model.path=FOLDER"
        )
    # transformers' own message about a missing file does not mention the network
    offline = isinstance(source, HubModel) and source.options()["local_files_only"]
    if offline and isinstance(error, OSError):
        return source.unavailable()
    return InputError(f"model {source.name} cannot be loaded: {first_line(error)}")


def refuse_adapter(source: ModelSource) -> None:
    """Raise InputError if the model's folder contains an adapter, which transformers would load."""
    options = source.options()
    revision = options.get("revision", "main")
    local = options["local_files_only"]
    location = str(source.where())
    if find_adapter_config_file(location, revision=revision, local_files_only=local) is not None:
        raise InputError(
            f"model {source.name} contains an adapter (adapter_config.json): give the base "
            "model without it, or merge the two first (petl merge)"
        )


logger = logging.getLogger(__name__)


def load_processor(cfg: Settings, task: Task[P]) -> P:
    """Load the processor for `task`: a tokenizer, image processor or feature extractor.

    A tokenizer has the task's new tokens.

    Raises:
        InputError: the model is not available, does not support the task, or has no such processor.
    """
    source = read_source(cfg)
    with loading(source):
        task.take_base(source)
    if task.processor_class is AutoTokenizer:
        processor = cast("P", load_tokenizer(source))
    else:
        with loading(source):
            check_task_support(
                source.config(), task, source.name
            )  # a clearer message than one about files
            processor = source.processor(task.processor_class)
        if task.reads_text:
            with_padding_token(processor.tokenizer, source.name)
    if task.new_tokens:
        # not imported by other runs
        from petl.data.models.new_tokens import extend_tokenizer

        extend_tokenizer(tokenizer_in(processor), task.new_tokens)
    return processor


def save_processor(cfg: Settings, task: Task, folder: Path, processor: Any = None) -> None:
    """Write the processor of a model into a folder.

    Args:
        processor: another one for this model; None: it is loaded.

    Raises:
        InputError: a link in the model's folder leads out of it: the copy would contain that file.
    """
    path = getattr(read_source(cfg), "path", None)
    if path is not None:
        given = Path(path).expanduser()
        place = given if given.is_dir() else given.parent
        for file in place.iterdir():
            if file.is_symlink() and file.suffix != ".safetensors":  # weights are often elsewhere
                check_link(file, place)
    processor = load_processor(cfg, task) if processor is None else processor
    for name in OF_THIS_MACHINE:  # a tokenizer saves all that it was loaded with
        getattr(processor, "init_kwargs", {}).pop(name, None)
    processor.save_pretrained(folder)
    if isinstance(processor, ProcessorMixin):
        # vision is loaded only for a model that sees
        from petl.data.models.image_processor import save_left_out

        save_left_out(processor, folder)


def load_tokenizer(cfg: Settings) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer; without padding token, the end token is used for padding.

    Raises:
        InputError: the model is not available, or its tokenizer has no token for padding.
    """
    source = read_source(cfg)
    with loading(source):
        tokenizer = source.tokenizer()
    return with_padding_token(tokenizer, source.name)


def with_padding_token(tokenizer: PreTrainedTokenizerBase, name: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer of the model or adapter `name`, padding by its end token if need be."""
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise InputError(
                f"the tokenizer of model {name} has neither a padding nor an end token: "
                "add one of them and save the tokenizer"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(
    cfg: Settings, task: Task, *, meta: bool = False, processor: object = None
) -> PreTrainedModel:
    """Load the model with the head for `task`, in eval mode, on the CPU.

    Args:
        meta: build the modules on the meta device, without reading weights.
        processor: result of `load_processor` for this model and task; None: load it again;
            False: none is needed, as for random inputs.

    Raises:
        InputError: the model is not available or does not suit the task.
    """
    source = read_source(cfg)
    shown = nullcontext() if meta else Pass(f"loading model {source.name}", None)
    with shown, loading(source):
        task.take_base(source)
        config = source.config()
        check_task_support(config, task, source.name)
        # before the model is built: the number of classes sets the size of the head
        known, settings_of_task = config.id2label, task.model_kwargs()
        other_labels = settings_of_task.get("id2label", known) != known
        for key, value in settings_of_task.items():
            setattr(config, key, value)
        settings: Fields = {
            "dtype": getattr(torch, source.dtype),
            "attn_implementation": source.attn,
        }
        if meta:
            model = meta_model(task, config, source, settings)
        elif isinstance(source, RandomInit):
            model = random_model(task, config, source, settings)
        else:
            model = pretrained_model(task, config, source, settings, other_labels=other_labels)
    if "" in new_modules(model):
        raise InputError(
            f"model {source.name} has new parameters that belong to no submodule, which an adapter "
            "cannot save: set use_weighted_layer_sum to false in its config"
        )
    if task.new_tokens:
        from petl.data.models.new_tokens import extend_tables, pieces_of, plain_of

        processor = processor or load_processor(cfg, task)
        tokenizer = tokenizer_in(processor)
        extend_tables(model, tokenizer, pieces_of(plain_of(tokenizer), task.new_tokens))
    heads = outermost_modules(model, head_keys(model, task))
    keep_in_float32(model.get_submodule(name) for name in heads if name)
    if source.adapter is not None:
        # not imported by other runs
        from petl.data.models.finished_adapter import checked_config, with_adapter

        checked_config(source.adapter)  # shapes do not depend on it
        # also a head that is not new: the base model may have one for these labels
        known = {*new_modules(model), *heads}
        model = model if meta else with_adapter(model, source.adapter, task, known)
    vars(model)["petl_removed_modules"] = removed_by(task, model)
    if task.reads_text:
        check_length(model, task, source.name)
        if not meta and processor is not False:
            tokenizer = load_processor(cfg, task) if processor is None else processor
            set_padding_token(model, tokenizer_in(tokenizer), source.name)
    return model.eval()


def meta_model(
    task: Task, config: PretrainedConfig, source: ModelSource, settings: dict[str, object]
) -> PreTrainedModel:
    """Build the model on the meta device."""
    trusted = source.options()["trust_remote_code"]
    with torch.device("meta"):
        model = task.auto_class.from_config(config, trust_remote_code=trusted, **settings)
        folder = folder_with_widths(source)
        if folder is not None:
            from petl.core.model.layer_widths import put_widths, read_widths

            put_widths(model, read_widths(folder), folder)
    model.petl_new_modules = outermost_modules(model, head_keys(model, task))
    return model


def random_model(
    task: Task, config: PretrainedConfig, source: RandomInit, settings: dict[str, object]
) -> PreTrainedModel:
    """Build an untrained model with random weights from `source.seed`."""
    logger.warning(
        "model %s has random weights from model.seed=%d, it is not pretrained",
        source.name,
        source.seed,
    )
    # leaves the global generator as it was, so that the run's seed counts
    room = within_memory(f"model {source.name}", "lower the sizes in model.settings")
    with torch.random.fork_rng(devices=[]), room:
        torch.manual_seed(source.seed)
        model = task.auto_class.from_config(config, **settings)
    model.petl_new_modules = outermost_modules(model, head_keys(model, task))
    return model


def pretrained_model(
    task: Task,
    config: PretrainedConfig,
    source: ModelSource,
    settings: dict[str, object],
    *,
    other_labels: bool,
) -> PreTrainedModel:
    """Load the pretrained model; the head of a classifier, and a pooler before it, may be new.

    Args:
        other_labels: the pretrained head, if there is one, is for other labels: the layer that
            scores them counts as new even if they are as many.

    Raises:
        InputError: the weights belong to another type of model, are in a format that could contain
            code, or are next to an adapter.
    """
    refuse_adapter(source)
    if source.quantization is not None:
        settings = {
            **settings,
            **quantization_settings(source.quantization, task, config, source, settings),
        }
    with loader_of(task, config, source) as loader:
        model, report = loader.from_pretrained(
            source.where(),
            config=config,
            output_loading_info=True,
            use_safetensors=True,  # other formats can contain code
            ignore_mismatched_sizes=True,  # a head for another number of classes is replaced
            use_kernels=False,  # code of the Hub, in place of layers that an adapter reaches
            **source.options(),
            **settings,
        )
    # a mismatch in the head is expected, in the body it means another model
    mismatched = {key for key, *_ in report["mismatched_keys"]}
    missing = set(report["missing_keys"]) | mismatched
    missing = {key for key in missing if key.partition(".")[0] not in task.unread}
    head = head_keys(model, task)
    in_body = sorted(missing - head)
    # a new pooler is accepted; if more than half of the body is missing, it is another model
    allowed = len(model.state_dict()) // 2 if task.new_head else 0
    if mismatched.intersection(in_body) or len(in_body) > allowed:
        raise InputError(
            f"the weights of model {source.name} do not match {type(model).__name__}: "
            f"{len(in_body)} tensors are missing or have another shape, such as {in_body[0]}"
        )
    if other_labels:
        state = model.state_dict()
        missing |= {key for key in head if state[key].shape[:1] == (config.num_labels,)}
    model.petl_new_modules = outermost_modules(model, missing)
    if isinstance(source, HubModel):  # now: a branch may move while the run trains
        model.petl_commit = source.on_hub().revision
    if getattr(model, "hf_quantizer", None) is not None:
        from petl.data.models.quantization import keep_gradients  # of quantized models

        keep_gradients(model)
    return model


def folder_with_widths(source: ModelSource) -> Path | None:
    """Return the folder of a model with widths.json; None: it has the widths of its config.

    Few models have it: what reads it is imported then alone.
    """
    folder = source.where() if isinstance(source, ModelFolder) else None
    return folder if folder is not None and (folder / WIDTHS).is_file() else None


@contextmanager
def loader_of(task: Task, config: PretrainedConfig, source: ModelSource) -> Generator[Any]:
    """Yield what loads a pretrained model; with widths.json, a class with layers of these widths.

    Models that it has loaded are of the usual class afterwards.
    """
    folder = folder_with_widths(source)
    if folder is None:
        yield task.auto_class
        return
    from petl.core.model.changed import changed_class
    from petl.core.model.layer_widths import put_widths, read_widths

    widths = read_widths(folder)
    # the auto class builds models of one class for each config
    cls = _get_model_class(config, task.auto_class._model_mapping)
    with changed_class(cls, lambda model: put_widths(model, widths, folder)) as loader:
        yield loader


def quantization_settings(
    scheme: str,
    task: Task,
    config: PretrainedConfig,
    source: ModelSource,
    settings: Fields,
) -> dict[str, object]:
    """Arguments with which `from_pretrained` quantizes all linear layers except those of heads."""
    from petl.data.models.quantization import quantization_config  # as in `load_base`

    # names of modules do not depend on weights
    dense = dense_modules(meta_model(task, config, source, settings), task)
    device = torch.accelerator.current_accelerator(check_available=True)
    index = torch.accelerator.current_device_index() if device is not None else 0
    place = "cpu" if device is None else f"{device.type}:{index}"
    return {
        "quantization_config": quantization_config(scheme, settings["dtype"], dense),
        "device_map": {"": place},  # quantized weights must not be moved later
    }


def dense_modules(model: PreTrainedModel, task: Task) -> list[str]:
    """The modules of heads, which are not quantized."""
    output: object = model.get_output_embeddings()
    heads = [] if output is None else [n for n, m in model.named_modules() if m is output]
    return [*heads, *outermost_modules(model, head_keys(model, task))]


def head_keys(model: PreTrainedModel, task: Task) -> set[str]:
    """Names of the tensors of the head that the task adds to the pretrained body."""
    if not task.new_head:
        return set()
    # transformers puts the body under this attribute
    keys, prefix = set(model.state_dict()), model.base_model_prefix
    if hasattr(model, prefix):
        return {key for key in keys if not key.startswith(f"{prefix}.")}
    with torch.device("meta"):  # body and head are siblings, as in Whisper's encoder
        return keys - set(AutoModel.from_config(model.config).state_dict())


def new_modules(model: PreTrainedModel) -> list[str]:
    """Modules of a model from `load_base` that have no pretrained weights for the task.

    An adapter has to train and save them completely (`modules_to_save`). With `meta` these are the
    modules of the head, since no weight file is read.
    """
    return model.petl_new_modules  # ty: ignore[invalid-explicit-return]


def removed_by(task: Task, model: PreTrainedModel) -> list[str]:
    """Adjust a model to its task; return the names of modules that it has no longer."""
    before = [name for name, _ in model.named_modules()]
    task.adjust(model)
    left = {name for name, _ in model.named_modules()}
    return [name for name in before if name not in left]


def outermost_modules(model: nn.Module, keys: set[str]) -> list[str]:
    """The outermost modules whose tensors are all in `keys`, and the owners of other `keys`."""
    outermost: list[str] = []
    remaining = set(keys)
    for name, module in model.named_modules():
        owned = {f"{name}.{key}" for key in module.state_dict()}
        if name and owned and owned <= remaining:
            outermost.append(name)
            remaining -= owned
    return outermost + sorted({key.rpartition(".")[0] for key in remaining})


def check_task_support(config: PretrainedConfig, task: Task, name: str) -> None:
    """Raise InputError if the model has no class for the task, or is an encoder for causal_lm."""
    auto_class, own_code = task.auto_class.__name__, getattr(config, "auto_map", None) or {}
    mapping = task.auto_class._model_mapping  # as a truth value it imports all configs
    # code in the repository may register the class under auto_map
    if (mapping is None or type(config) not in mapping) and auto_class not in own_code:
        instead = "choose another model with model=hub model.name=NAME, or one of configs/model"
        if task.writes and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            instead = "add data.task=image_text, whose rows may be without images, too"
        raise InputError(
            f"model {name} ({config.model_type}) does not support the task {task.name}: "
            f"transformers has no {auto_class} for it; {instead}"
        )
    decodes = getattr(config, "is_decoder", False) or config.is_encoder_decoder
    if task.name == "causal_lm" and type(config) in MODEL_FOR_MASKED_LM_MAPPING and not decodes:
        raise InputError(
            f"model {name} is an encoder ({config.model_type}), whose attention includes the next "
            "token, so it cannot be trained to predict it: choose a decoder such as "
            "model=smollm2, or data with task: classification"
        )


def check_length(model: PreTrainedModel, task: Task, name: str) -> None:
    """Raise InputError if rows may be longer than the model has positions."""
    limit = max_positions(model)
    if limit is None or task.longest <= limit:
        return
    if task.max_length > limit:
        raise InputError(
            f"data.max_length={task.max_length} is more than the {limit} positions of model "
            f"{name}: lower it"
        )
    other = "task" if hasattr(task, "max_new_tokens") else "data"
    names = ("max_new_tokens", "max_target_length", "generate")
    others = [f"{other}.{each}" for each in names if getattr(task, each, None)]
    raise InputError(
        f"rows with generated or target tokens may have {task.longest} tokens, more than the "
        f"{limit} positions of model {name}: lower data.max_length or {' or '.join(others)}"
    )


def set_padding_token(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str
) -> None:
    """Set the model's padding token; decoders find the last token to classify by it.

    Raises:
        InputError: the tokenizer has more tokens than the model has embeddings.
    """
    embedding = model.get_input_embeddings().weight
    assert isinstance(embedding, torch.Tensor)
    rows = embedding.shape[0]
    if len(tokenizer) > rows:
        raise InputError(
            f"the tokenizer of model {name} has {len(tokenizer)} tokens, but its embedding "
            f"has {rows} rows: use the tokenizer of the model"
        )
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    # generation has a config of its own
    if model.can_generate() and model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
