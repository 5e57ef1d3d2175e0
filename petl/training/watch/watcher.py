"""`petl.watch` and `petl.Watch`: the watcher of a Trainer, of TRL's trainers, or of any loop."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
import xxhash
from accelerate.optimizer import AcceleratedOptimizer
from peft import PeftModel
from torch import nn
from torch.optim import Optimizer
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState

from petl.core.parameters import check_module
from petl.errors import InputError, first_line
from petl.training.integrations.trainer_callback import callback_states
from petl.training.watch.findings import Findings, Report
from petl.training.watch.model import (
    base_of,
    inspect_best,
    inspect_coverage,
    inspect_modes,
    inspect_optimizer,
    inspect_reference,
)
from petl.training.watch.rows import (
    Row,
    digest_of,
    inspect_labels,
    inspect_rows,
    inspect_same_rows,
    sample_rows,
)
from petl.training.watch.steps import Steps

SAME_RATE = 1e-6  # relative distance of learning rates that are equal


class WatchOptions(TypedDict, total=False):
    """The arguments of `petl.Watch`."""

    on: str
    rows: int
    ignore: Sequence[str]


class Watch(TrainerCallback, ExportableState):
    """Tells what goes wrong in silence while a model trains: `callbacks=[petl.Watch()]`.

    For transformers' Trainer and TRL's trainers, with adapters or without; `petl.watch` is the
    same, for any loop as well. It changes nothing: no random number is drawn, no batch is
    consumed, and its hooks are removed after the first steps.

    Matters are told once, through the logger `petl.watch` and `report`. Shares, such as that of
    the tokens that are learned, are in the log of the trainer as `watch/learned` and
    `watch/coverage`.

    Args:
        on: "raise": an error ends the run in its first two steps, where nothing is lost; later
            ones, and warnings, go to the log. "warn": all go to the log.
        rows: number of training rows that are encoded and looked at before the first step.
        ignore: ids of checks to leave out, of "labels", "eos", "bos", "truncated", "same rows",
            "coverage", "gradient", "input", "optimizer", "base", "mode", "weights", "reference",
            "resume" and "best".

    Raises:
        InputError: an error was found; or another value of `on`, `rows` or `ignore`.
    """

    def __init__(self, on: str = "raise", rows: int = 64, ignore: Sequence[str] = ()) -> None:
        if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
            raise InputError(f"rows={rows!r}: give a whole number of at least 1")
        self.findings, self.rows = Findings(on, ignore), rows
        self.trainer: Trainer | None = None
        self.steps: Steps | None = None
        self._optimizer: Optimizer | None = None
        self._resumed: dict[str, Any] = {}  # what the checkpoint says of itself
        self._train_rows = ""  # digest of the rows that were looked at
        self._is_logged = self._has_evaluated = False

    def report(self) -> Report:
        """Return the findings so far."""
        return self.findings.report()

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *error: object) -> None:
        if any(error) and self.steps is not None:  # nothing is said of a loop that did not end
            self.steps.close()
        self.close()

    def close(self) -> None:
        """End the watch: say whether nothing was trained, and remove its hooks."""
        if self.steps is not None:
            self.steps.conclude()
            self.steps.close()

    # Any loop

    def begin(
        self,
        model: nn.Module,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        train: object = None,
        test: object = None,
        optimizer: Optimizer | None = None,
        args: TrainingArguments | None = None,
    ) -> list[Row]:
        """Check what is known before the first step, and watch the first steps.

        Returns:
            The rows that were looked at.

        Raises:
            InputError: an error was found.
        """
        findings, base = self.findings, base_of(model)
        findings.is_early = True
        # of a processor for images or sound, too
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        tokenizer = tokenizer if hasattr(tokenizer, "convert_ids_to_tokens") else None
        length = getattr(args, "max_length", None)

        def look(rows: list[Row]) -> None:
            # models that are not of transformers have rows of any kind
            if isinstance(base, PreTrainedModel):
                inspect_rows(rows, findings, base, tokenizer, length)

        kept = [*model.modules(), tokenizer, self.trainer]
        try:
            found = sample_rows(train, self.rows, kept)
        except Exception as error:  # of a collator that takes no row alone
            found = []
            findings.add("labels", "note", f"no row is looked at alone: {first_line(error)}")
        self._train_rows = digest_of(train, self.rows)
        look(found)
        if test is not None:
            inspect_same_rows(train, test, findings)
        inspect_coverage(model, findings)
        if optimizer is not None:
            inspect_optimizer(model, optimizer, findings)
        findings.settle()

        def look_first(rows: list[Row]) -> None:
            if not found:  # a stream
                look(rows)
            elif not any(finding.id == "labels" for finding in findings.found):
                inspect_labels(rows, findings, base, tokenizer)

        self.close()
        self.steps = Steps(
            model,
            findings,
            looks=not getattr(args, "torch_compile", False),
            accumulates=args is None or args.gradient_accumulation_steps > 1,
            evaluates=args is None,
            when_first=look_first,
        )
        return found

    # Trainer

    def state(self) -> dict[str, object]:
        """The entry of this callback in `trainer_state.json`: what a resumed run must continue."""
        findings, saved = self.findings, {}
        if self._optimizer is not None:
            saved = {
                "rates": [float(group["lr"]) for group in self._optimizer.param_groups],
                "generator": _generator(),
                "rows": self._train_rows,
            }
        args = {"on": findings.on, "rows": self.rows, "ignore": list(findings.ignore)}
        return {"args": args, "attributes": {"saved": saved}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check what is known before the first step."""
        model, loader = kwargs["model"], kwargs.get("train_dataloader")
        optimizer = kwargs.get("optimizer")
        while isinstance(optimizer, AcceleratedOptimizer):
            optimizer = optimizer.optimizer
        sharded = bool(args.fsdp or args.deepspeed)
        self.findings.speaks = state.is_world_process_zero
        rows = self.begin(
            model,
            tokenizer=kwargs.get("processing_class"),
            train=loader,
            test=None if self.trainer is None else self.trainer.eval_dataset,
            optimizer=None if sharded else optimizer,
            args=args,
        )
        if state.global_step:
            self._resumed = _entry(state)
            self._inspect_resumed(args, state, optimizer, kwargs.get("lr_scheduler"))
        elif isinstance(model, PeftModel) and _has_reference(args):
            given = self.trainer is None or getattr(self.trainer, "ref_model", None) is not None
            ids = rows[0].ids if rows else []
            inspect_reference(model, ids, self.findings, by_disabling=not given)
        self._optimizer = optimizer
        # a checkpoint written without this callback lacks this entry, which Trainer reads on save
        callback_states(state).setdefault(type(self).__name__, self.state())
        self.findings.settle()

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Check that a resumed run draws the random numbers that come next."""
        wanted, self._resumed = self._resumed.get("generator"), {}
        # an epoch that begins draws the order of its rows
        if wanted is None or float(state.epoch or 0).is_integer() or _generator() == wanted:
            return
        self.findings.add(
            "resume",
            "error",
            f"the random numbers after step {state.global_step} are not those of the stopped run, "
            "so dropout differs",
            "resume from a checkpoint with its rng_state.pth",
        )
        self.findings.settle()

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the modes of the first evaluation, and its rows if they were not known before."""
        if self._has_evaluated:
            return
        self._has_evaluated = True
        inspect_modes(kwargs["model"], self.findings, "error")
        if "same rows" not in self.findings.checked:
            train, test = kwargs.get("train_dataloader"), kwargs.get("eval_dataloader")
            inspect_same_rows(train, test, self.findings)
        self.findings.settle()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the shares to the first line of the log."""
        if not self._is_logged and state.log_history:
            self._is_logged = True
            # the history has a copy of what trackers get
            for line in (kwargs["logs"], state.log_history[-1]):
                line.update(self.findings.metrics)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that the best checkpoint is restored, and end the watch."""
        self.findings.is_early = False
        best = state.best_model_checkpoint
        if args.load_best_model_at_end and best is not None and not (args.fsdp or args.deepspeed):
            inspect_best(kwargs["model"], Path(best), self.findings)
        self.close()

    def _inspect_resumed(
        self, args: TrainingArguments, state: TrainerState, optimizer: Any, scheduler: object
    ) -> None:
        """Check that learning rate, optimizer and rows of a resumed run continue."""
        findings, step, saved = self.findings, state.global_step, self._resumed
        if not findings.wants("resume"):
            return
        remedy = "resume from a checkpoint that was written with save_only_model=False"
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        pairs = zip(saved.get("rates", rates), rates, strict=False)
        differ = [(a, b) for a, b in pairs if abs(a - b) > SAME_RATE * abs(a)]
        forgot = any("betas" in group for group in optimizer.param_groups) and not optimizer.state
        if forgot or getattr(scheduler, "last_epoch", step) == 0:
            what = f"the optimizer starts anew at step {step}, without its moments or its schedule"
            findings.add("resume", "error", what, remedy)
        elif differ:
            what = f"the learning rate is {differ[0][1]:g} at step {step}, and was {differ[0][0]:g}"
            findings.add("resume", "error", what, remedy)
        if args.ignore_data_skip:
            what = f"the rows of the first {step} steps come again"
            findings.add("resume", "warning", what, "set ignore_data_skip=False")
        elif self._train_rows != saved.get("rows", self._train_rows):
            what = f"the training rows are not those of the first {step} steps"
            findings.add("resume", "error", what, "resume with the same rows, or start anew")


def watch(
    trainer_or_model: Trainer | nn.Module,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    train: object = None,
    test: object = None,
    optimizer: Optimizer | None = None,
    **options: Unpack[WatchOptions],
) -> Watch:
    """Tell what goes wrong in silence while a model trains, see `petl.Watch`.

    Args:
        trainer_or_model: a Trainer or a trainer of TRL, before `train()`; or the model that any
            other loop trains. For such a loop, the more is given, the more is checked.
        tokenizer: of the rows.
        train: encoded training rows: a data set, a list of rows or batches, or a loader.
        test: evaluation rows.
        optimizer: the one that trains the model.
        options: `on`, `rows` and `ignore`, of `petl.Watch`.

    Returns:
        The watcher: `with petl.watch(model) as w:` ends the watch after the block, `w.report()`
        returns what it has found.

    Raises:
        InputError: an error was found; or a value that is not allowed.
    """
    watcher = Watch(**options)
    if not isinstance(trainer_or_model, Trainer):
        check_module(trainer_or_model, "petl.watch")
        watcher.begin(
            trainer_or_model, tokenizer=tokenizer, train=train, test=test, optimizer=optimizer
        )
        return watcher
    given = {"tokenizer": tokenizer, "train": train, "test": test, "optimizer": optimizer}
    named = [name for name, value in given.items() if value is not None]
    if named:
        raise InputError(f"{named[0]}= is for a loop of your own: a trainer has its own; leave it")
    watcher.trainer = trainer_or_model
    trainer_or_model.add_callback(watcher)
    return watcher


def _has_reference(args: TrainingArguments) -> bool:
    """Return True for arguments of TRL whose loss reads outputs of a reference."""
    return type(args).__module__.startswith("trl.") and bool(getattr(args, "beta", 0))


def _generator() -> str:
    return xxhash.xxh3_64_hexdigest(torch.get_rng_state().numpy().tobytes())


def _entry(state: TrainerState) -> dict[str, Any]:
    """Return what a checkpoint has of this callback; nothing if it was not there."""
    saved = callback_states(state).get(Watch.__name__, {})
    entry = saved[0] if isinstance(saved, list) else saved
    return entry.get("attributes", {}).get("saved", {})
