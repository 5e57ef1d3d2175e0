"""Load a language model with adapters: from runs, adapter folders and folders of plain models."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from petl.adapters.export.saved_adapter import SavedAdapter, device, find, model_in
from petl.core.loading import load
from petl.core.spec.facts import facts_of, modifies_base_weights
from petl.core.types import CausalModel, Processor, Settings
from petl.data.models.loading import load_base, load_processor, loading
from petl.data.models.saved_processor import differences, load_saved_processor
from petl.data.models.sources import read_source
from petl.data.tasks.base import Task, tokenizer_in
from petl.data.tasks.causal_lm import CausalLM
from petl.data.tasks.image_text import ImageText
from petl.data.tasks.seq2seq import Seq2Seq
from petl.data.tasks.task_file import read_task
from petl.data.templates import fill, reads_columns
from petl.efficiency.drafting.folder import CONFIG
from petl.efficiency.fused_lora.switching import fuse_lora
from petl.errors import InputError, UnsupportedError
from petl.generation.inference.language_model import BASE, LanguageModel
from petl.generation.inference.small_weights import SmallWeights, answer_small, inspect_small
from petl.ops.small_weights import Kind
from petl.system.files.disk import check_links
from petl.training.runs.lookup import no_writer

logger = logging.getLogger(__name__)
DEFAULT = "default"  # the name of the first adapter
DRAFTER = "drafter"  # in the folder of a run, an adapter or a model
WRITERS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")  # ends of names of classes
NO_COLUMNS = ("pack", "generate")  # settings of training only, which do not suit all prompts

# an adapter with its run, or the settings under `model` of a plain model
Found = SavedAdapter | Settings


def load_language_model(
    run: str | Path,
    others: Mapping[str, str] | None = None,
    *,
    plain: bool | None = None,
    trust_remote_code: bool = False,
    other_base: bool = False,
    drafting: str = "auto",
    weights: Kind | None = None,
) -> LanguageModel:
    """Load a saved adapter with its base model, or a plain model, and further adapters.

    Args:
        run: folder of a run, of an adapter, or of a model, such as a merged one.
        others: folders of runs or adapters, by name.
        plain: read prompts as plain text, not as turns of the chat template, if there is one; None:
            if the adapter has learned from plain texts.
        other_base: as of `petl.load`.
        drafting: as of `LanguageModel`.
        weights: pack frozen weights into so many bits; None: they stay as they are.

    Raises:
        InputError: there is no such model, it does not write text, an adapter does not fit.
    """
    found = find_model(run, trust_remote_code=trust_remote_code)
    first = {DEFAULT: found} if isinstance(found, SavedAdapter) else {}
    more = {
        name: find(path, trust_remote_code=trust_remote_code)
        for name, path in (others or {}).items()
    }
    # the names of the first adapter and of the base model
    taken = [name for name in more if name in (*first, BASE)]
    if taken:
        raise InputError(f"the adapter name {taken[0]!r} is taken; choose another one")
    refuse_apart({**first, **more})
    given = first | more
    changing = [name for name, saved in given.items() if modifies_base_weights(saved.config)]
    if changing and len(given) > 1:
        raise InputError(
            f"the adapter {changing[0]!r} changes the base weights as it is loaded "
            "(init_lora_weights), which others need: give it alone, take petl serve, or save it "
            "with path_initial_model_for_weight_conversion"
        )
    if weights is not None:
        inspect_small(weights, {str(run): found, **more})
    model, reader = load_writer(found, run)
    small = None if weights is None else SmallWeights(weights)
    layers = [] if small is None else small.frozen(model)
    for name, saved in more.items():
        differing = differences(reader_of(saved, task_of(saved, run)), reader)
        if differing:
            logger.warning(
                "%s of adapter %r differs from that of %s, which all prompts are read with: start "
                "it alone, or with petl serve, where each adapter has its own",
                " and ".join(differing),
                name,
                run,
            )
    for name, saved in (first | more).items():
        model = load(model, saved.adapter, adapter_name=name, other_base=other_base)
    fuse_lora(model)  # as in training, and a switch takes the same time with many adapters
    names = {**({DEFAULT: str(run)} if first else {}), **(others or {})}
    language = reading_as_trained(model.eval(), reader, found, names, plain=plain)
    language = replace(language, drafting=drafting, own_drafter=_own_drafter(Path(run), found))
    if small is not None:
        answer_small(language, layers, small)
    return language


def _own_drafter(folder: Path, found: Found) -> str | None:
    """Return the folder of a model's drafter, beside it or in the run of its adapter."""
    run = found.run if isinstance(found, SavedAdapter) else None
    # the one beside the adapter first, as an adapter may have been copied out of its run
    places = [place / DRAFTER for place in (folder, run) if place is not None]
    return next((str(place) for place in places if (place / CONFIG).is_file()), None)


def refuse_apart(found: Mapping[str, Found]) -> None:
    """Raise InputError for adapters that cannot answer beside each other, or one of several tasks.

    Those with different new tokens give the same numbers to them.
    """
    saved = {name: each for name, each in found.items() if isinstance(each, SavedAdapter)}
    tokens = dict[str, list[str]]()
    for name, each in saved.items():
        learned, tasks = read_task(each.adapter), list(facts_of(each.config).tasks)
        tokens[name] = [] if learned is None else learned.new_tokens or []
        if len(tasks) > 1:
            raise UnsupportedError(
                f"{each.adapter} serves the tasks {', '.join(tasks)}, and a prompt has no task: "
                "use petl predict with rows that name it, or take one as a plain adapter with "
                "petl.methods.polyhistor.export_task"
            )
    first = next(iter(tokens), "")
    other = next((name for name in tokens if tokens[name] != tokens[first]), None)
    if other is not None:
        raise InputError(
            f"{first!r} has the new tokens {tokens[first]} and {other!r} has {tokens[other]}, and "
            "a model has one vocabulary: start each of them alone"
        )


def load_writer(found: Found, path: str | Path) -> tuple[CausalModel, Processor]:
    """Load the base model of `find_model(path)`, on the accelerator if there is one.

    And its reader: the tokenizer, or processor of images and text, that an adapter was trained
    with.

    Raises:
        InputError: it does not write text, or cannot be loaded.
    """
    settings = model_settings(found)
    task = task_of(found, path)
    reader = reader_of(found, task)
    model: Any = load_base(settings, task, processor=reader)
    if settings.get("quantization") is None:  # a quantized model was placed while it was loaded
        model = model.to(device())
    return model, reader


def reader_of(found: Found, task: Task, base: Processor | None = None) -> Processor:
    """The tokenizer, or processor of images and text, of what `find_model` returns.

    Args:
        task: from `task_of`.
        base: as of `load_saved_processor`.
    """
    if not isinstance(found, SavedAdapter):
        return load_processor(found, task)
    return load_saved_processor(found.settings["model"], task, found.adapter, base)


def model_settings(found: Found) -> Settings:
    """The settings under `model` of what `find_model` returns."""
    return found.settings["model"] if isinstance(found, SavedAdapter) else found


def reading_as_trained(
    model: PeftModel | PreTrainedModel,
    reader: Processor,
    found: Found,
    adapters: Mapping[str, str],
    *,
    plain: bool | None = None,
) -> LanguageModel:
    """A loaded model that reads prompts as the adapter of `found` has learned them.

    Args:
        adapters: as of `LanguageModel`.
        plain: as of `load_language_model`.
    """
    config = model.config
    tokenizer = tokenizer_in(reader)
    data = found.settings.get("data", {}) if isinstance(found, SavedAdapter) else {}
    learned = read_task(found.adapter) if isinstance(found, SavedAdapter) else None
    if plain is None:
        plain = isinstance(learned, CausalLM) and not learned.chat
    # an encoder reads questions about images by a template, and other texts as they are
    templates = reader is not tokenizer or not config.is_encoder_decoder
    is_chat = bool(tokenizer.chat_template) and not plain and templates
    system = data.get("system") if is_chat else None
    return LanguageModel(
        model,
        tokenizer,
        str(model_settings(found)["name"]),
        is_chat,
        adapters=adapters,
        # as in training; rows have the parts of a template
        system=fill(system, {}) if system and not reads_columns(system) else None,
        prefix=learned.prefix if isinstance(learned, Seq2Seq) else "",
        columns={key: value for key, value in data.items() if key not in NO_COLUMNS},
        processor=None if reader is tokenizer else reader,
    )


def find_model(path: str | Path, *, trust_remote_code: bool = False) -> Found:
    """Find the adapter at `path`, or return the settings of the plain model there.

    Raises:
        InputError: there is neither.
    """
    folder = Path(path)
    has_model = (folder / "config.json").is_file()
    # an adapter counts as one even if a config.json lies beside it
    if not has_model or (folder / "adapter").is_dir() or (folder / "adapter_config.json").is_file():
        return find(path, trust_remote_code=trust_remote_code)
    check_links(folder)
    return {**model_in(folder), "trust_remote_code": trust_remote_code}


def task_of(found: Found, path: str | Path) -> Task:
    """The task of a model that writes.

    Raises:
        InputError: the model does not write.
    """
    tokens = None
    if isinstance(found, SavedAdapter):
        learned = read_task(found.adapter)
        tokens = None if learned is None else learned.new_tokens
        if isinstance(learned, ImageText):
            return ImageText(max_length=1, new_tokens=tokens)
        kind = found.task_type or "without a task"
        reads = {"CAUSAL_LM": False, "SEQ_2_SEQ_LM": True}.get(kind)  # None: no task that writes
    else:
        source = read_source(found)
        with loading(source):
            config = source.config()
            if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and source.has_processor():
                return ImageText(max_length=1)
        kind = ", ".join(config.architectures or ["no class of model"])
        # a config that names no class is tried
        writes = not config.architectures or kind.endswith(WRITERS)
        reads = bool(config.is_encoder_decoder) if writes else None
    if reads is None:
        raise no_writer(path, kind)
    # lengths are those of the prompts
    if reads:
        return Seq2Seq(max_length=1, max_target_length=1, new_tokens=tokens)
    return CausalLM(max_length=1, new_tokens=tokens)
