"""The base model of a check, with the adapter: what becomes of it. Imports torch."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from petl.adapters.check.findings import NotCheckedError
from petl.adapters.check.folder import PREFIX, WEIGHTS, Subject, module_of
from petl.adapters.export.checked_folder import adapted_outputs
from petl.adapters.export.saved_adapter import SavedAdapter, device, model_in
from petl.core.adapter_folder import Folder
from petl.core.experts.earlier import in_todays_layout
from petl.core.fingerprint import Fingerprint, difference, fingerprint
from petl.core.loading import check_file
from petl.core.loading import load as load_adapter
from petl.core.model.rounding import lost_share
from petl.core.registry import refusal
from petl.core.support import Capability
from petl.data.tasks.chat_template import within_deadline
from petl.errors import InputError
from petl.training.dataloader import Batch, to_device


class CheckedAdapter(SavedAdapter):
    """An adapter that is compared on rows that were given, or on random inputs."""

    @property
    def data_if_any(self) -> None:
        """None: the data of a run, which may be a stranger's, are not read."""


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
    trained_on: Fingerprint
    adapted_differ: str
    others_differ: str
    untrained_copies: list[str]
    adapted: PeftModel | None
    rows: list[dict[str, Any]]

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
    def effect(self) -> tuple[float, str]:
        """By how much of their norm the outputs change, and on what."""
        if not self.rows:
            return adapted_outputs(self.model, self.saved.batches())[1], "random inputs"
        batches = [self._encoded(row) for row in self.rows]
        return adapted_outputs(self.model, batches)[1], f"{len(batches)} rows"

    def _encoded(self, row: Mapping[str, object]) -> Batch:
        """A row as the model reads it: a chat by the template, else its texts one after another."""
        tokenizer = self.saved.processor
        if isinstance(chat := row.get("messages"), list):
            text = within_deadline(
                lambda: tokenizer.apply_chat_template(chat, tokenize=False), "the chat template"
            )
        else:
            text = "\n".join(value for value in row.values() if isinstance(value, str))
        limits = {"truncation": True, "max_length": 512, "return_tensors": "pt"}
        return to_device(dict(tokenizer(text, **limits)), device())

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
        NotCheckedError: nothing says which class of model it is, or the base cannot be loaded.
    """
    if not subject.has(WEIGHTS):
        raise NotCheckedError(f"{subject.name} has no {WEIGHTS}")
    source = Folder(subject.folder)
    try:
        config, trained_on = source.config, source.base
        source.check_sealed()
    except InputError as error:
        raise NotCheckedError(str(error)) from error
    base = str(subject.base)
    settings = model_in(Path(base)) if Path(base).is_dir() else {"name": base, "source": "hub"}
    saved = CheckedAdapter(subject.folder, None, {"model": settings}, other_base=True)
    try:
        model = saved.base().eval()
    except InputError as error:
        raise NotCheckedError(str(error)) from error
    present = fingerprint(model)
    try:
        with in_todays_layout(source, model, config) as todays:
            found = check_file(model, config, todays.weights)
    except InputError as error:
        return Loaded(saved, str(error), trained_on, "", "", [], None, [])
    below = {module_of(re.split(r"\.(?:lora_|petl_\w+_adapters)", name)[0]) for name in found}
    adapted = {k: v for k, v in trained_on.items() if k.rpartition(".")[0] in below}
    return Loaded(
        saved,
        "",
        trained_on,
        difference(adapted, present, found),
        difference(trained_on, present, found),
        [*_equal(subject, model)],
        load_adapter(model, subject.folder, other_base=True).eval(),
        subject.rows or [],
    )


def _equal(subject: Subject, model: nn.Module) -> Iterator[str]:
    """Yield the names of saved tensors that the base has with the same values."""
    own = model.state_dict()
    for name in subject.weights.stored:
        tensor = own.get(name.removeprefix(PREFIX))
        if tensor is not None:
            saved = torch.from_numpy(subject.weights.values(name).astype("float32"))
            if saved.shape == tensor.shape and bool((tensor.float().cpu() == saved).all()):
                yield name
