"""The lifecycle of petl's methods for people who train with Trainer or TRL."""

import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from petl.core.distributed import made_by
from petl.core.lifecycle import Lifecycle, lifecycle
from petl.errors import InputError, UnsupportedError
from petl.files.disk import replace
from petl.runs.checkpoint import LIFECYCLE, contiguous
from petl.runs.resume import NOT_RESUMABLE, is_resumable

logger = logging.getLogger(__name__)


class Callback(TrainerCallback, ExportableState):
    """Add `callbacks=[petl.Callback()]` to a Trainer, SFTTrainer or DPOTrainer.

    It lets the method prepare on the training batches, change after each optimizer step, weighs
    auxiliary losses right under gradient accumulation, logs them apart from the task loss, and has
    checkpoints hold all that training needs to go on exactly. Methods without auxiliary losses that
    do not change while training work without it.

    What a method keeps for training only is in `lifecycle.safetensors` of each checkpoint. Trainer
    does not tell a callback which checkpoint it resumes from, so that file is looked for in
    `TrainingArguments(resume_from_checkpoint=...)`, in `output_dir`, and where it was written; it
    carries the mark of the training that wrote it, which is in `trainer_state.json` as well.

    Raises:
        InputError: the file of a checkpoint cannot be read, or is about another model.
        UnsupportedError: fp16 loss scaling together with an auxiliary loss.
    """

    def __init__(self) -> None:
        self._lifecycle: Lifecycle | None = None
        self._training = ExitStack()
        self.run = self.folder = ""  # the mark of this training, and where its checkpoints are

    def state(self) -> dict[str, Any]:
        """What Trainer writes into `trainer_state.json` for us."""
        return {"args": {}, "attributes": {"run": self.run, "folder": self.folder}}

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self._lifecycle = life = lifecycle(kwargs["model"])
        life.aux_weight = 1 / args.gradient_accumulation_steps
        life.count_items_over(args.world_size if args.average_tokens_across_devices else 1)
        self._training.enter_context(life.resumable())
        if state.global_step == 0:
            life.prepare(kwargs.get("train_dataloader") or [])
        else:
            self._take_back(life, args, state)
        self.run, self.folder = uuid4().hex, str(output_folder(args))
        # a checkpoint written without this callback lacks the entry that Trainer then wants
        noted_states(state).setdefault(type(self).__name__, self.state())
        if kwargs.get("optimizer") is not None:
            life.attach_optimizer(kwargs["optimizer"], state.global_step, state.max_steps)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self._training.close()

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        assert self._lifecycle is not None
        if args.fp16 and self._lifecycle.has_aux:
            raise UnsupportedError(
                "fp16 loss scaling does not reach the auxiliary loss of this method; use bf16=True"
            )
        self._lifecycle.after_step(state.global_step + 1, kwargs.get("optimizer"))

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        assert self._lifecycle is not None
        # trials of a search have folders of their own, and are not resumed
        if not args.should_save or args.save_only_model or state.is_hyper_param_search:
            return
        tensors = self._lifecycle.state_dict()
        if tensors:
            content = save(contiguous(tensors), mark(self.run, state.global_step))
            replace(checkpoint_of(output_folder(args), state.global_step) / LIFECYCLE, content)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self._lifecycle is None or logs is None or "loss" not in logs:
            return
        figures = self._lifecycle.metrics()
        logs.update(figures)
        state.log_history[-1].update(figures)  # Trainer has put a copy of `logs` there by now

    def _take_back(self, life: Lifecycle, args: TrainingArguments, state: TrainerState) -> None:
        """Load what the method kept for training when the checkpoint was written."""
        if not is_resumable(life):
            logger.warning("resumed training differs from one in one go: %s", NOT_RESUMABLE)
        if not life.state_dict():
            return
        step, known = state.global_step, self._known(state)
        folders = [output_folder(args), *([Path(known["folder"])] if known else [])]
        places = [checkpoint_of(folder, step) for folder in folders]
        if args.resume_from_checkpoint:
            places.insert(0, Path(args.resume_from_checkpoint).absolute())
        wanted = mark(known["run"], step) if known else None
        found = made_by(0, lambda: find_state(places, wanted)) if wanted else None
        if found is None:
            logger.warning(
                "no %s of step %d of the resumed training in %s: what the method keeps for "
                "training begins anew, so this differs from training in one go. Checkpoints hold "
                "it if petl.Callback() was there when they were written; one that was moved is "
                "found with TrainingArguments(resume_from_checkpoint=FOLDER)",
                LIFECYCLE,
                step,
                " or ".join(str(place) for place in dict.fromkeys(places)),
            )
        else:
            life.load_state_dict(found)

    def _known(self, state: TrainerState) -> dict[str, str]:
        """What `state` gave when the checkpoint was written; empty if this was not there."""
        kept = noted_states(state).get(type(self).__name__, [])
        entries = [entry["attributes"] for entry in (kept if isinstance(kept, list) else [kept])]
        return next((entry for entry in entries if entry.get("run")), {})


def noted_states(state: TrainerState) -> dict[str, Any]:
    """By the names of callbacks, what they gave for `trainer_state.json`."""
    return cast(Any, state.stateful_callbacks)


def output_folder(args: TrainingArguments) -> Path:
    return Path(args.output_dir or "").absolute()


def checkpoint_of(folder: Path, step: int) -> Path:
    """Where Trainer puts the checkpoint of a step."""
    return folder / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def mark(run: str, step: int) -> dict[str, str]:
    """What tells the state of one step of one training from all others."""
    return {"run": run, "step": str(step)}


def find_state(folders: list[Path], wanted: dict[str, str]) -> dict[str, Tensor] | None:
    """The state with the mark `wanted` in the first of the folders that holds it, or None.

    Raises:
        InputError: a file cannot be read.
    """
    for file in (folder / LIFECYCLE for folder in folders):
        if not file.is_file():
            continue
        try:
            with safe_open(file, framework="pt") as opened:
                if opened.metadata() == wanted:
                    return {name: opened.get_tensor(name) for name in sorted(opened.keys())}
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{file} cannot be read ({error}); resume from another checkpoint"
            ) from error
    return None
