"""A saved adapter with all that belongs to it: from a run's folder, or the adapter's alone."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from yaml import YAMLError

from petl import losses
from petl.core.adapter_file import WEIGHTS
from petl.core.adapter_folder import read_config
from petl.core.compat import SEQ_CLS_HEAD_NAMES
from petl.core.loading import load
from petl.core.switching.lora import fuse_lora
from petl.data import RawData, read_data
from petl.data.batch_sampler import chunks
from petl.distributed.launch import start
from petl.errors import InputError, first_line
from petl.imports.plugins import import_modules, not_yet_trusted
from petl.models.loading import load_base, load_processor, loading
from petl.models.sources import DTYPES, read_source
from petl.runs.run_folder import ADAPTER
from petl.runs.settings import GROUPS, read_loss, read_settings
from petl.tasks.base import Task
from petl.tasks.causal_lm import CausalLM
from petl.tasks.classification import Classification
from petl.tasks.question_answering import QuestionAnswering
from petl.tasks.regression import Regression
from petl.tasks.seq2seq import Seq2Seq
from petl.tasks.token_classification import TokenClassification
from petl.training.dataloader import Batch, encode_splits, longest_first, to_device
from petl.training.evaluate import score as score_model

ROWS, BATCH, TOKENS = 32, 8, 16  # of the batches that outputs are compared on
CLASSIFIERS = {"SEQ_CLS": Classification, "TOKEN_CLS": TokenClassification}  # by PEFT's type
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Saved:
    """An adapter on disk.

    Attributes:
        adapter: its folder.
        run: the folder of its run, or None.
        settings: the run's configuration; of an adapter alone, its `model` only.
    """

    adapter: Path
    run: Path | None
    settings: Mapping[str, Any]

    @cached_property
    def config(self) -> PeftConfig:
        return read_config(self.adapter)

    @cached_property
    def data(self) -> RawData:
        """The run's data.

        Raises:
            InputError: they cannot be had any more, or there is no run.
        """
        if self.run is None:
            raise InputError(f"{self.adapter} is an adapter without a run, so its data are unknown")
        return read_data(self.settings["data"])

    @cached_property
    def data_if_any(self) -> RawData | None:
        """The run's data, or None with the reason logged."""
        try:
            return self.data
        except InputError as error:
            logger.warning("comparing on random tokens: %s", error)
            return None

    @cached_property
    def task(self) -> Task:
        """The task: the run's, or what the adapter file tells of it (no names of classes)."""
        if self.data_if_any is not None:
            return self.data_if_any.task
        kind = str(self.config.task_type)
        if kind == "CAUSAL_LM":
            return CausalLM(max_length=TOKENS)
        if kind == "SEQ_2_SEQ_LM":
            return Seq2Seq(max_length=TOKENS, max_target_length=TOKENS)
        if kind == "QUESTION_ANS":
            return QuestionAnswering(max_length=TOKENS, stride=0)
        if kind in CLASSIFIERS:
            classes = [f"LABEL_{i}" for i in range(self._classes())]
            if len(classes) == 1:
                return Regression(max_length=TOKENS)
            return CLASSIFIERS[kind](classes=classes, max_length=TOKENS)
        raise InputError(
            f"{self.adapter} has task_type={self.config.task_type}, for which the model's class is "
            f"not known; {', '.join((*CLASSIFIERS, 'QUESTION_ANS', 'CAUSAL_LM', 'SEQ_2_SEQ_LM'))} "
            "are"
        )

    def _classes(self) -> int:
        """How many classes the saved head tells apart."""
        file = self.adapter / WEIGHTS
        try:
            with safe_open(file, "pt") as opened:
                shapes = {key: opened.get_slice(key).get_shape() for key in sorted(opened.keys())}
        except (OSError, SafetensorError) as error:
            raise InputError(f"the adapter file {file} cannot be read: {error}") from error
        heads = [
            shape[0]
            for key, shape in shapes.items()
            if len(shape) == 2 and set(key.split(".")) & set(SEQ_CLS_HEAD_NAMES)
        ]
        if not heads:
            raise InputError(f"{file} holds no head, so its classes are unknown")
        return heads[-1]

    def model_at(self, folder: Path) -> dict[str, Any]:
        """Settings of `model` that read it from a folder, in the same dtype and way."""
        kept = ("name", "dtype", "attn", "trust_remote_code")
        how = {key: value for key, value in self.settings["model"].items() if key in kept}
        return {**how, "source": "path", "path": str(folder)}

    def in_dtype(self, dtype: str) -> "Saved":
        """The same adapter on a base whose weights are of another type, such as "float32"."""
        model = {**self.settings["model"], "dtype": dtype}
        return replace(self, settings={**self.settings, "model": model})

    def dense(self) -> "Saved":
        """The same adapter on the base as it was before it was quantised."""
        model = {**self.settings["model"], "quantization": None}
        return replace(self, settings={**self.settings, "model": model})

    @property
    def is_quantized(self) -> bool:
        """Whether the adapter was trained on a base in few bits."""
        return self.settings["model"].get("quantization") is not None

    def base(self) -> PreTrainedModel:
        """The base model that the adapter was trained on, on the accelerator if there is one."""
        base = load_base(self.settings["model"], self.task)
        return base if self.is_quantized else base.to(device())

    def model(self) -> PeftModel:
        """The base model with the adapter, in evaluation mode."""
        return load(self.base(), self.adapter).eval()

    def processor(self) -> Any:
        """The model's tokenizer, image processor or feature extractor."""
        return load_processor(self.settings["model"], self.task)

    def batches(self) -> list[Batch]:
        """Model inputs to compare outputs on: test rows, or random tokens where there are none."""
        processor, data = self.processor(), self.data_if_any
        if data is None:
            draw = torch.Generator().manual_seed(0)
            ids = torch.randint(len(processor), (ROWS, TOKENS), generator=draw)
            batches = [
                {"input_ids": part, "attention_mask": torch.ones_like(part)}
                for part in ids.split(BATCH)
            ]
            if not self.task.truths:  # then the decoder reads them
                batches = [{**batch, "labels": batch["input_ids"]} for batch in batches]
        else:
            test = data.test.select(range(min(ROWS, len(data.test))))
            rows, collate = self.task.encode(processor, test), self.task.collate(processor)
            parts = chunks(longest_first(self.task.lengths(rows))[:ROWS], BATCH)
            batches = [collate(list(rows.select(part))) for part in parts]
        dtype = DTYPES[self.settings["model"].get("dtype", "float32")]
        truths = self.task.truths
        return [to_device(as_inputs(batch, truths, dtype), device()) for batch in batches]


def device() -> torch.device:
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def as_inputs(batch: Batch, truths: tuple[str, ...], dtype: torch.dtype) -> Batch:
    """What a model is asked with: the batch without truths, images and sounds in its dtype."""
    inputs = {name: tensor for name, tensor in batch.items() if name not in truths}
    return {k: t.to(dtype) if t.is_floating_point() else t for k, t in inputs.items()}


def score(saved: Saved) -> dict[str, float]:
    """The scores of a run's adapter on the run's test rows, as `train.py` takes them.

    Raises:
        InputError: `saved` is no run, or its data or base cannot be had any more.
    """
    data = saved.data
    cfg = OmegaConf.create(dict(saved.settings))
    settings = read_settings(cfg)
    accelerator = start(settings.seed, settings.computes_in(cfg.model.dtype))
    splits = encode_splits(data, saved.processor(), settings, accelerator)
    model = saved.model()
    if settings.fuse_lora:
        fuse_lora(model)
    losses.attach(model, read_loss(cfg))  # for its figures
    return score_model(model, splits, accelerator, settings.eval_batch_size)


def find(path: str | Path, *, trust_remote_code: bool = False) -> Saved:
    """What is saved at `path`: a run's folder, or an adapter's, of a run or not.

    Raises:
        InputError: there is neither, the message says what is missing; or the run's model brings
            code of its own, which only `trust_remote_code` allows.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(f"{path} is no folder; give that of a run, or of an adapter")
    adapter = folder / ADAPTER if (folder / ADAPTER).is_dir() else folder
    if not (adapter / "adapter_config.json").is_file():
        if (folder / "config.yaml").is_file():
            raise InputError(
                f"{path} is a run that has saved no adapter yet; finish it with train.resume={path}"
            )
        raise InputError(f"{path} holds neither {ADAPTER}/ nor adapter_config.json")
    run = adapter.absolute().parent
    if adapter.name == ADAPTER and (run / "config.yaml").is_file():
        settings = _read_settings(run / "config.yaml")
        if settings["model"].get("trust_remote_code") and not trust_remote_code:
            raise InputError(
                f"the model of {path} brings code of its own: read it, then say --trust-remote-code"
            )
        _import(settings.get("imports"), path, trust_remote_code)
        return Saved(adapter, run, settings)
    return Saved(adapter, None, {"model": _model_of(adapter)})


def _import(names: Any, path: str | Path, trust_remote_code: bool) -> None:
    """Import the modules that registered a run's method; a stranger's run may name any module."""
    new = not_yet_trusted(names)
    if new and not trust_remote_code:
        raise InputError(
            f"{path} imports {', '.join(new)}: check what that is, then add --trust-remote-code"
        )
    import_modules(names)


def _read_settings(file: Path) -> dict[str, Any]:
    try:
        settings: Any = OmegaConf.to_container(OmegaConf.load(file))
        needed = {group: settings[group] for group in GROUPS}
        return needed | {key: settings[key] for key in ("loss", "imports") if settings.get(key)}
    except (OSError, YAMLError, OmegaConfBaseException, KeyError, TypeError) as error:
        raise InputError(
            f"{file} is not the configuration of a run: {first_line(error)}"
        ) from error


def _model_of(adapter: Path) -> dict[str, Any]:
    """Settings of `model` for the base that an adapter's config names."""
    config = read_config(adapter)
    base = config.base_model_name_or_path
    if not base:
        raise InputError(f"{adapter / 'adapter_config.json'} names no base_model_name_or_path")
    if not Path(base).is_dir():
        return {"name": base, "source": "hub", "revision": config.revision}
    settings = {"name": Path(base).name, "source": "path", "path": base}
    source = read_source(settings)
    with loading(source):
        half = getattr(source.config(), "dtype", None) == torch.bfloat16
    return {**settings, "dtype": "bfloat16" if half else "float32"}


def read_scores(run: Path) -> dict[str, float]:
    """The test scores that a run ended with; empty if it has none."""
    try:
        return json.loads((run / "scores.json").read_text())["after"] or {}
    except (OSError, ValueError, KeyError):
        return {}
