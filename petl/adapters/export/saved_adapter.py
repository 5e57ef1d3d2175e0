"""A saved adapter with its base model, data and task: from a run's folder or an adapter folder."""

import logging
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel

from petl.core.adapter_folder import Folder
from petl.core.auto_classes import read_labels
from petl.core.compat import SEQ_CLS_HEAD_NAMES
from petl.core.loading import load
from petl.core.types import Groups
from petl.data.base import RawData, data_source, read_data
from petl.data.batch_sampler import chunks
from petl.data.models.loading import load_base, loading
from petl.data.models.saved_processor import load_saved_processor
from petl.data.models.sources import has_tokenizer, packaged_as, read_source
from petl.data.refused_rows import encode_usable
from petl.data.tasks.base import Task
from petl.data.tasks.causal_lm import CausalLM
from petl.data.tasks.classification import Classification
from petl.data.tasks.image_text import ImageText
from petl.data.tasks.media import MediaTask
from petl.data.tasks.question_answering import QuestionAnswering
from petl.data.tasks.regression import Regression
from petl.data.tasks.retrieval import Retrieval
from petl.data.tasks.seq2seq import Seq2Seq
from petl.data.tasks.task_file import FILE as TASK
from petl.data.tasks.task_file import read_task
from petl.data.tasks.token_classification import TokenClassification
from petl.efficiency.rewrite import apply_rewrites, rewrites_of
from petl.errors import InputError
from petl.methods import losses
from petl.system.files.disk import check_links
from petl.system.imports.peft_hook import import_modules, not_yet_trusted
from petl.system.progress import Pass
from petl.training.dataloader import Batch, encode_splits, longest_first, to_device
from petl.training.distributed.launch import start
from petl.training.evaluate import Evaluator
from petl.training.runs.config import GROUPS, RunConfig
from petl.training.runs.lookup import adapter_at
from petl.training.runs.records import (
    ADAPTER,
    CONFIG,
    SCORES,
    read_scores,
    read_stored,
    refuse_interpolations,
)
from petl.training.runs.run_config import read_config as read_run_config

# sizes of the batches that outputs are compared on (assumption: quick, and enough to see an error)
ROWS, BATCH, TOKENS = 32, 8, 16
CLASSIFIERS = {"SEQ_CLS": Classification, "TOKEN_CLS": TokenClassification}  # by PEFT's type
OTHERS = ("QUESTION_ANS", "CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION")
PAIRED = ("SEQ_CLS", "QUESTION_ANS")  # of them, those whose rows may have two texts
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter on disk.

    Attributes:
        adapter: its folder.
        run: the folder of its run, or None.
        settings: the run's configuration; without a run, only its `model`.
        other_base: as of `petl.load`.
    """

    adapter: Path
    run: Path | None
    settings: Groups
    other_base: bool = False

    @cached_property
    def folder(self) -> Folder:
        """The adapter's files."""
        return Folder(self.adapter)

    @property
    def config(self) -> PeftConfig:
        """The adapter's PEFT config."""
        return self.folder.config

    @cached_property
    def run_config(self) -> RunConfig:
        """All settings of the run, checked.

        Raises:
            InputError: there is no run, or a setting cannot be used.
        """
        if self.run is None:
            raise without_run(self.adapter)
        # the adapter that it started from may not be there any more
        train = {**self.settings["train"], "init_from": None, "init_head": None}
        with named(self.run / CONFIG):
            return read_run_config({**self.settings, "train": train}, reads_data=False)

    @cached_property
    def data(self) -> RawData:
        """The run's data, whose task knows the base model.

        Raises:
            InputError: the data or the files of the base cannot be loaded any more, or there is no
                run.
        """
        if self.run is None:
            raise without_run(self.adapter)
        found, source = read_data(self.settings["data"]), read_source(self.settings["model"])
        with loading(source):
            found.task.take_base(source)
        return found

    @cached_property
    def data_if_any(self) -> RawData | None:
        """The run's data; None if they cannot be loaded, with the reason logged."""
        try:
            return self.data
        except InputError as error:
            logger.warning("comparing on random inputs: %s", error)
            return None

    @cached_property
    def task(self) -> Task:
        """The adapter's task, or one derived from its other files."""
        saved = read_task(self.adapter)
        if saved is not None:
            return saved
        if self.data_if_any is not None:
            return self.data_if_any.task
        task_type = self.task_type
        if task_type == "CAUSAL_LM":
            return CausalLM(max_length=TOKENS)
        if task_type == "SEQ_2_SEQ_LM":
            return Seq2Seq(max_length=TOKENS, max_target_length=TOKENS)
        if task_type == "FEATURE_EXTRACTION":
            return Retrieval(max_length=TOKENS)
        if task_type == "QUESTION_ANS":
            return QuestionAnswering(max_length=TOKENS, stride=0)
        if task_type in CLASSIFIERS:
            named = read_labels(self.adapter).get("id2label", {})
            classes = [*named.values()] or [f"LABEL_{i}" for i in range(self._classes())]
            if len(classes) == 1:  # transformers' convention for regression
                return Regression(max_length=TOKENS)
            return CLASSIFIERS[task_type](classes=classes, max_length=TOKENS)
        raise InputError(
            f"{self.adapter} has task_type={self.config.task_type}, which does not determine the "
            "class of the model; supported: "
            f"{', '.join((*CLASSIFIERS, *OTHERS))}: write it into "
            "adapter_config.json"
        )

    @property
    def task_type(self) -> str:
        """PEFT's task type; of an adapter without, as own code wraps models, that of its base."""
        return str(self.config.task_type or self._type_of_base())

    def _type_of_base(self) -> str:
        """Return the task type by the class that was adapted, or the base saved from; "": other."""
        source = read_source(self.settings["model"])
        with loading(source):
            config = source.config()
        adapted = (self.config.auto_mapping or {}).get("base_model_class")
        kind = adapted or (config.architectures or [""])[0]
        if kind.endswith("ForCausalLM"):
            return "CAUSAL_LM"
        is_writer = kind.endswith("ForConditionalGeneration") and config.is_encoder_decoder
        return "SEQ_2_SEQ_LM" if is_writer else ""

    @cached_property
    def saved_task(self) -> Task:
        """The adapter's task as it was trained, with the names of its classes and its lengths.

        Raises:
            InputError: it is unknown.
        """
        saved = read_task(self.adapter)
        if saved is None:
            raise InputError(
                f"{self.adapter} has no {TASK}, so its task and classes are unknown; give the "
                "folder that petl train saved"
            )
        return saved

    @property
    def columns(self) -> Groups:
        """The run's settings under `data`; without a run none, which means their defaults."""
        return self.settings.get("data", {})

    @property
    def precision(self) -> str:
        """The autocast precision of the run; of an adapter alone, that of its base model."""
        if self.run is not None:
            return self.run_config.precision
        return "bf16" if self.settings["model"].get("dtype") == "bfloat16" else "no"

    def _classes(self) -> int:
        """The number of classes of the saved head."""
        # a classification head is a matrix [classes, hidden]
        heads = [
            shape[0]
            for key, (_, shape) in sorted(self.folder.shapes.items())
            if len(shape) == 2 and set(key.split(".")) & set(SEQ_CLS_HEAD_NAMES)
        ]
        if not heads:
            raise InputError(
                f"{self.adapter} contains no classification head: its classes are unknown"
            )
        return heads[-1]  # of a head of several layers, the last one gives the classes

    def model_at(self, folder: Path) -> Groups:
        """Settings of `model` that load it from a folder, with the same dtype and options."""
        names = ("name", "dtype", "attn", "trust_remote_code")
        options = {key: value for key, value in self.settings["model"].items() if key in names}
        return {**options, "source": "path", "path": str(folder)}

    def in_dtype(self, dtype: str) -> "SavedAdapter":
        """The same adapter on a base model of another dtype, such as "float32"."""
        model = {**self.settings["model"], "dtype": dtype}
        return replace(self, settings={**self.settings, "model": model})

    def dense(self) -> "SavedAdapter":
        """The same adapter on the base model before quantization."""
        model = {**self.settings["model"], "quantization": None}
        return replace(self, settings={**self.settings, "model": model})

    @property
    def is_quantized(self) -> bool:
        """True if the adapter was trained on a quantized base model."""
        return self.settings["model"].get("quantization") is not None

    def base(self) -> PreTrainedModel:
        """The base model that the adapter was trained on, on the accelerator if there is one."""
        has_one = has_tokenizer(self.adapter) or read_source(self.settings["model"]).has_tokenizer()
        processor = self.processor if has_one else False  # random inputs need none
        base = load_base(self.settings["model"], self.task, processor=processor)
        # a quantized model was placed while it was loaded
        return base if self.is_quantized else base.to(device())

    def model(self) -> PeftModel:
        """The base model with the adapter, in evaluation mode."""
        base = self.base()
        with Pass("loading the adapter", None, quiet=True):
            return load(base, self.adapter, other_base=self.other_base).eval()

    @cached_property
    def processor(self) -> Any:
        """The tokenizer, image processor or feature extractor that the adapter was trained with."""
        return load_saved_processor(self.settings["model"], self.task, self.adapter)

    def batches(self) -> list[Batch]:
        """Model inputs to compare outputs on: test examples, or random ones without data."""
        data = self.data_if_any
        if data is None:
            batches = self._random_batches()
        else:
            _, (rows,) = encode_usable(
                data,
                self.processor,
                lambda data: [data.test.select(range(min(ROWS, len(data.test))))],
            )
            collate = self.task.collate(self.processor)
            # sorted by length, so that batches have little padding
            parts = chunks(longest_first(self.task.lengths(rows))[:ROWS], BATCH)
            batches = [collate(list(rows.select(part))) for part in parts]
        return self.as_inputs(batches)

    def as_inputs(self, batches: Iterable[Batch]) -> list[Batch]:
        """Return batches without labels, in the dtype of the base model, on the accelerator."""
        dtype = getattr(torch, self.settings["model"].get("dtype", "float32"))
        labels = self.task.label_columns
        return [to_device(as_inputs(batch, labels, dtype), device()) for batch in batches]

    def _random_batches(self) -> list[Batch]:
        """Random model inputs, with all that the task may have; of chats, one batch has images."""
        draw = torch.Generator().manual_seed(0)  # the same inputs before and after an export
        if isinstance(self.task, MediaTask):
            rows = self.task.random_rows(self.processor, ROWS, draw)
        else:
            rows = self._random_texts(draw)
        batches = [
            {name: values[start : start + BATCH] for name, values in rows.items()}
            for start in range(0, ROWS, BATCH)
        ]
        if not self.task.label_columns:  # the model needs them as decoder inputs
            batches = [{**batch, "labels": batch["input_ids"]} for batch in batches]
        if isinstance(self.task, ImageText):  # texts alone do not reach the tower
            batches.append(self.task.random_batch(self.processor, BATCH, draw))
        return batches

    def _random_texts(self, draw: torch.Generator) -> Batch:
        """Rows of random tokens, with all inputs that texts of the task may have."""
        source = read_source(self.settings["model"])
        with loading(source):
            config = source.config().get_text_config()
        ids = torch.randint(config.vocab_size, (ROWS, TOKENS), generator=draw)
        end, types = getattr(config, "eos_token_id", None), getattr(config, "type_vocab_size", 0)
        # BART's classifier reads the last end token, and refuses rows with other numbers of them
        if end in range(config.vocab_size):
            ids[ids == end] = (end + 1) % config.vocab_size
            ids[:, -1] = end
        rows = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        # without them, an exported graph would take two texts for one
        if types > 1 and self.task.peft_task_type in PAIRED:
            rows["token_type_ids"] = torch.randint(types, ids.shape, generator=draw)
        return rows


def device() -> torch.device:
    """Return the accelerator, or the CPU without one."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def as_inputs(batch: Batch, labels: tuple[str, ...], dtype: torch.dtype) -> Batch:
    """Return the inputs of a model: the batch without labels, images and audio in its dtype."""
    inputs = {name: tensor for name, tensor in batch.items() if name not in labels}
    return {k: t.to(dtype) if t.is_floating_point() else t for k, t in inputs.items()}


def score(saved: SavedAdapter, kept: Path | None = None) -> dict[str, float]:
    """Return the scores of a run's adapter on the run's test set, computed as in `petl train`.

    Args:
        kept: the file that the predictions are written to; None: they are not kept.

    Raises:
        InputError: there is no run, or its data or base model cannot be loaded any more.
    """
    config = saved.run_config
    data = saved.data
    settings = config.train
    accelerator = start(settings.seed, config.precision)
    splits = encode_splits(data, saved.processor, settings, accelerator)
    model = saved.model()
    losses.attach(model, config.loss)  # for its metrics
    # the same kernels as in training, or scores differ by rounding
    apply_rewrites(model, rewrites_of(settings, trains=False))
    return Evaluator(model, splits, accelerator, settings.eval_batch_size).test(kept=kept)


def find(
    path: str | Path, *, trust_remote_code: bool = False, other_base: bool = False
) -> SavedAdapter:
    """Find the adapter at `path`: the folder of a run, or an adapter folder, of a run or alone.

    Args:
        other_base: as of `petl.load`, for its base model.

    Raises:
        InputError: there is no adapter; a link in the folder leads out of it; or the run's model
            needs code of its own, which only `trust_remote_code` allows.
    """
    adapter = adapter_at(path)
    run = adapter.absolute().parent  # also for a path to RUN/adapter
    of_run = adapter.name == ADAPTER and (run / CONFIG).is_file()
    check_links(run if of_run else adapter)
    if of_run:
        settings = _read_settings(run / CONFIG)
        if settings["model"].get("trust_remote_code") and not trust_remote_code:
            raise InputError(
                f"the model of {path} needs code of its own: review it, then add "
                "--trust-remote-code"
            )
        _import(settings.get("imports"), path, trust_remote_code)
        return SavedAdapter(adapter, run, settings, other_base)
    return SavedAdapter(adapter, None, {"model": _model_of(adapter)}, other_base)


def _import(names: object, path: str | Path, trust_remote_code: bool) -> None:
    """Import the modules that registered a run's method; a stranger's run may name any module."""
    new = not_yet_trusted(names)
    if new and not trust_remote_code:
        raise InputError(
            f"{path} imports {', '.join(new)}: check what that is, then add --trust-remote-code"
        )
    import_modules(names)


def _read_settings(file: Path) -> Groups:
    """Read the groups of a run's configuration that are needed here."""
    settings = read_stored(file)
    needed: Groups = {group: settings.get(group) for group in GROUPS}
    missing = [group for group, values in needed.items() if not isinstance(values, dict)]
    if missing:
        raise InputError(f"{file} cannot be used: it has no settings of {missing[0]}")
    needed |= {key: settings[key] for key in ("loss", "imports") if settings.get(key)}
    refuse_interpolations(needed, file)
    with named(file):  # the others are read where they are needed
        read_source(needed["model"])
        data_source(needed["data"])
    return needed


def without_run(adapter: Path) -> InputError:
    """Return the error for an adapter folder where a run is needed."""
    return InputError(
        f"{adapter} is an adapter without a run, so its data set is unknown; give the folder of a "
        "run"
    )


@contextmanager
def named(file: Path) -> Generator[None]:
    """Add the name of the file that they are from to errors about settings."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{file}: {error}") from error


def _model_of(adapter: Path) -> Groups:
    """Settings of `model` for the base that an adapter's config names."""
    config = Folder(adapter).config
    base = config.base_model_name_or_path
    if not base:
        raise InputError(f"{adapter / 'adapter_config.json'} has no base_model_name_or_path")
    if not Path(base).is_dir():
        # not a local folder, so a name on the hub
        packaged = packaged_as(base)
        if packaged is not None:
            return packaged
        return {"name": base, "source": "hub", "revision": config.revision}
    return model_in(Path(base))


def model_in(folder: Path) -> Groups:
    """Settings of `model` for a model in a folder, in the dtype of its config."""
    settings = {"name": folder.name, "source": "path", "path": str(folder)}
    source = read_source(settings)
    with loading(source):
        # not in an adapter's config; other half-precision types are not supported
        half = getattr(source.config(), "dtype", None) == torch.bfloat16
    return {**settings, "dtype": "bfloat16" if half else "float32"}


def scores_of(run: Path) -> dict[str, float]:
    """Return the test scores in a run's scores.json; empty if there are none.

    Raises:
        InputError: the file is damaged.
    """
    return (read_scores(run).get("after") or {}) if (run / SCORES).exists() else {}
