"""The base model of a check, with the adapter: what becomes of it. Imports torch."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn

from petl.adapters.check.findings import NotCheckedError
from petl.adapters.check.folder import PREFIX, WEIGHTS, Subject, module_of
from petl.adapters.export.checked_folder import adapted_outputs
from petl.adapters.export.saved_adapter import SavedAdapter, model_in
from petl.core.adapter_folder import Folder
from petl.core.experts.earlier import in_todays_layout
from petl.core.fingerprint import Fingerprint, difference, fingerprint
from petl.core.loading import check_file
from petl.core.loading import load as load_adapter
from petl.core.model.rounding import lost_share
from petl.core.registry import refusal
from petl.core.support import Capability
from petl.core.types import Groups
from petl.data.models.loading import load_base, loading
from petl.data.models.sources import read_source
from petl.data.tasks.chat_template import within_deadline
from petl.errors import InputError, first_line, shown
from petl.system.files.tensor_file import Shapes
from petl.training.dataloader import Batch


class CheckedAdapter(SavedAdapter):
    """An adapter that is compared on rows that were given, or on random inputs."""

    @property
    def data_if_any(self) -> None:
        """None: the data of a run, which may be a stranger's, are not read."""


class Effect(NamedTuple):
    """What an adapter does to the outputs of its base.

    Attributes:
        change: norm of the difference over the norm of the outputs.
        inputs: what the outputs are of, in words.
        fault: why no output can be used: "are NaN or infinite"; "": they can.
        left_out: by line of the file of data, why the row was not used.
    """

    change: float
    inputs: str
    fault: str
    left_out: Mapping[int, str]


@dataclass(frozen=True)
class Loaded:
    """A base model and the adapter on it.

    Attributes:
        misfit: why the tensors are not those that base and config require; "": they are.
        trained_on: the fingerprint of the base in training; empty: unknown.
        adapted_differ, others_differ: how the weights below the adapter, and all, differ from those
            of the training; "": they do not, or it is not known.
        untrained_copies: names of saved tensors that equal the base's.
        rows: of the file of data; empty: outputs are compared on random inputs.
    """

    saved: SavedAdapter
    misfit: str
    trained_on: Fingerprint = field(default_factory=dict)
    adapted_differ: str = ""
    others_differ: str = ""
    untrained_copies: list[str] = field(default_factory=list)
    adapted: PeftModel | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def model(self) -> PeftModel:
        """The base with the adapter.

        Raises:
            NotCheckedError: the adapter does not fit it.
        """
        if self.adapted is None:
            raise NotCheckedError(
                f"the adapter does not fit {self.saved.settings['model']['name']}"
            )
        return self.adapted

    @cached_property
    def effect(self) -> Effect:
        """What the adapter does to the outputs, on the rows that were given or on random inputs.

        Raises:
            NotCheckedError: the adapter does not fit, or no row can be encoded.
        """
        model = self.model
        batches, left_out = self._batches_of_rows() if self.rows else (self.saved.batches(), {})
        outputs, change = adapted_outputs(model, batches)
        fault = fault_of(batches, outputs) or ("" if isfinite(change) else "overflow")
        used = f"{len(batches)} of {len(self.rows)} rows" if left_out else f"{len(batches)} rows"
        return Effect(change, used if self.rows else "random inputs", fault, left_out)

    def _batches_of_rows(self) -> tuple[list[Batch], dict[int, str]]:
        """The rows as the model reads them, and by line why others are left out."""
        batches, left_out = [], {}
        for line, row in enumerate(self.rows, start=1):
            try:
                batches.append(self._encoded(row))
            # anything: template and tokenizer are a stranger's
            except Exception as error:
                left_out[line] = first_line(error) or type(error).__name__
        if not batches:
            line, reason = next(iter(left_out.items()))
            raise NotCheckedError(f"no row given can be encoded; line {line}: {reason}")
        return batches, left_out

    def _encoded(self, row: Mapping[str, object]) -> Batch:
        """A row as the model reads it: a chat by the template, else its texts one after another.

        Raises:
            InputError: it has no token.
        """
        tokenizer = self.saved.processor
        if isinstance(chat := row.get("messages"), list):
            text = within_deadline(
                lambda: tokenizer.apply_chat_template(chat, tokenize=False), "the chat template"
            )
        else:
            text = "\n".join(value for value in row.values() if isinstance(value, str))
        limits = {"truncation": True, "max_length": 512, "return_tensors": "pt"}
        batch = dict(tokenizer(text, **limits)) if text.strip() else {}
        ids = batch.get("input_ids")
        if ids is None or not ids.numel():
            raise InputError(f"{shown(dict(row))} has no text")
        if not self.saved.task.label_columns:  # the model needs them as decoder inputs
            batch["labels"] = ids
        return self.saved.as_inputs([batch])[0]

    @cached_property
    def no_merge(self) -> str:
        """Why the method cannot be merged; "": it can."""
        return refusal(self.model.peft_config["default"], Capability.MERGE)

    @cached_property
    def lost(self) -> tuple[float, str]:
        """The share of the update that merging rounds off, and into what."""
        return (0.0, "") if self.no_merge else lost_share(self.model, None)


def load(subject: Subject) -> Loaded:
    """Load the base that was given, and the adapter on it.

    Raises:
        NotCheckedError: nothing says which class of model it is, or another rule finds why not.
        InputError: the base cannot be opened.
    """
    settings = opened(str(subject.base))
    if not subject.has(WEIGHTS):
        raise NotCheckedError(f"{subject.name} has no {WEIGHTS}")
    saved = CheckedAdapter(subject.folder, None, {"model": settings}, other_base=True)
    source = saved.folder
    try:
        _, trained_on = source.config, source.base
    except InputError as error:
        return Loaded(saved, str(error))
    try:
        source.check_sealed()  # of which format.changed tells
        task = saved.task
    except InputError as error:
        raise NotCheckedError(str(error)) from error
    try:
        model = saved.base().eval()
    except InputError as error:
        # raises if it is the base that cannot be opened, and not the adapter's tokenizer
        load_base(settings, task, processor=False)
        raise NotCheckedError(str(error)) from error
    present = fingerprint(model)
    try:
        found = _fitting(source, model)
        copies = [*_equal(subject, model)]
        adapted_model = load_adapter(model, subject.folder, other_base=True).eval()
    except InputError as error:
        return Loaded(saved, str(error), trained_on)
    below = {module_of(re.split(r"\.(?:lora_|petl_\w+_adapters)", name)[0]) for name in found}
    adapted = {k: v for k, v in trained_on.items() if k.rpartition(".")[0] in below}
    return Loaded(
        saved,
        "",
        trained_on,
        difference(adapted, present, found),
        difference(trained_on, present, found),
        copies,
        adapted_model,
        subject.rows or [],
    )


def opened(base: str) -> Groups:
    """Return the settings of a base model, whose config can be read.

    Raises:
        InputError: it cannot.
    """
    settings = model_in(Path(base)) if Path(base).is_dir() else {"name": base, "source": "hub"}
    source = read_source(settings)
    with loading(source):
        source.config()
    return settings


def misfit_of(subject: Subject, base: Path) -> str:
    """Return why the tensors do not fit the base in a folder; "": they do. No weights are read.

    Raises:
        NotCheckedError: nothing says which class of model it is, or it cannot be built.
    """
    try:
        saved = CheckedAdapter(subject.folder, None, {"model": opened(str(base))}, other_base=True)
        model = load_base(saved.settings["model"], saved.task, meta=True, processor=False)
    # anything: transformers does not check all values of a config
    except Exception as error:
        raise NotCheckedError(f"{base} cannot be built: {first_line(error)}") from error
    try:
        _fitting(saved.folder, model)
    except InputError as error:
        return str(error)
    return ""


def _fitting(source: Folder, model: nn.Module) -> Shapes:
    """The tensors of an adapter, which are those that base and config require."""
    with in_todays_layout(source, model, source.config) as todays:
        return check_file(model, source.config, todays.weights)


def fault_of(batches: Sequence[Batch], outputs: Sequence[Tensor]) -> str:
    """Return why outputs cannot be used, in words; "": they can."""
    if not all(bool(each.isfinite().all()) for each in outputs):
        return "are NaN or infinite"
    if not any(bool(each.any()) for each in outputs):
        return "are 0"
    same = all(_is_same(*pair) for pair in zip(batches, outputs, strict=True))
    return "are the same for all inputs" if same else ""


def _is_same(batch: Batch, output: Tensor) -> bool:
    """Return True if a batch has several inputs, and one output for all."""
    rows = output.flatten(0, -2)
    varied = any(bool((each != each.flatten()[0]).any()) for each in batch.values())
    return varied and len(rows) > 1 and bool((rows == rows[0]).all())


def _equal(subject: Subject, model: nn.Module) -> Iterator[str]:
    """Yield the names of saved tensors that the base has with the same values."""
    own = model.state_dict()
    for name in subject.weights.stored:
        tensor = own.get(name.removeprefix(PREFIX))
        if tensor is not None:
            saved = torch.from_numpy(subject.weights.values(name).astype("float32"))
            if saved.shape == tensor.shape and bool((tensor.float().cpu() == saved).all()):
                yield name
