"""A callback that runs the lifecycle of petl's methods in transformers' Trainer and in TRL."""

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, has_length

from petl.core.fingerprint import check_saved
from petl.core.lifecycle import Lifecycle, lifecycle
from petl.core.types import Record
from petl.errors import InputError, UnsupportedError
from petl.system.collectives import made_by
from petl.system.files.disk import write_atomic
from petl.training.retain.compare import retained
from petl.training.retain.measure import base_with
from petl.training.retain.rows import CURVE
from petl.training.runs.checkpoint import LIFECYCLE, contiguous
from petl.training.runs.resume import NOT_RESUMABLE

Given = Any  # what Trainer passes by name: model, optimizer, data loader, and more
logger = logging.getLogger(__name__)


class Callback(TrainerCallback, ExportableState):
    """Trainer callback for petl's methods: `callbacks=[petl.Callback()]`.

    For Trainer, and for TRL's trainers (SFT, DPO, KTO, GRPO, reward). It

    - runs the method's preparation on the training batches, and its updates after optimizer steps
      (such as rank growth);
    - scales auxiliary losses under gradient accumulation, and logs them apart from the task loss;
    - saves the method's training state in checkpoints, for exact resumption;
    - with `retain`, adds what the model has lost on these texts, `retained_lost` in nats per token
      (of models that do not write: `retained_drift`), to `trainer.state.log_history` at evaluations
      and at the end;
    - completes the reference adapter `ref` of TRL's trainers, see `complete_reference`.

    Methods without auxiliary losses that do not change during training work without it.

    The training state is in `lifecycle.safetensors` of each checkpoint. Trainer does not pass the
    checkpoint from which it resumes to callbacks, so the file is searched for in
    `TrainingArguments(resume_from_checkpoint=...)`, in `output_dir`, and where it was written. Its
    metadata has an identifier of the training that wrote it, which is in `trainer_state.json` too.

    Trainer stores the state of callbacks under the name of their class: a class of another name
    would not find the state in existing checkpoints.

    Args:
        other_base: resume even on a base model of other weights than those of the checkpoint.
        retain: texts that are not trained on, tokenized with Trainer's `processing_class`; None:
            not measured. The model has to keep its base (not CorDA or PiSSA).

    Raises:
        InputError: the file in a checkpoint cannot be read, or belongs to another model.
        UnsupportedError: fp16 loss scaling is combined with an auxiliary loss.
    """

    def __init__(self, other_base: bool = False, retain: Sequence[str] | None = None) -> None:
        self.other_base = other_base
        self.retain = None if retain is None else list(retain)
        self._lifecycle: Lifecycle | None = None
        self._training = ExitStack()
        self._measured = -1  # the step of the last measure of retained texts
        self.run = self.folder = ""  # identifier of this training, and folder of its checkpoints

    def state(self) -> Record:
        """The entry of this callback in `trainer_state.json`."""
        # Trainer makes the callback again from "args" on resuming, then sets "attributes"
        args = {"other_base": self.other_base, "retain": self.retain}
        return {"args": args, "attributes": {"run": self.run, "folder": self.folder}}

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Given,
    ) -> None:
        """Complete the reference adapter of TRL's trainers, before its outputs are computed.

        Raises:
            UnsupportedError: Trainer would copy the model to several GPUs by nn.DataParallel.
        """
        if args.n_gpu > 1:  # in one process: the copies of adapters would not be those that train
            raise UnsupportedError(
                f"Trainer uses nn.DataParallel on {args.n_gpu} GPUs of one process, which gives "
                "wrong gradients and losses: start it with torchrun --nproc_per_node "
                f"{args.n_gpu}, or choose one GPU by CUDA_VISIBLE_DEVICES"
            )
        # beta: the weight of the KL term, which needs reference outputs
        if type(args).__module__.startswith("trl.") and hasattr(args, "beta"):
            complete_reference(kwargs["model"])

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Given,
    ) -> None:
        """Prepare the method, or restore its training state."""
        self._lifecycle = method_lifecycle = lifecycle(kwargs["model"])
        # Trainer then multiplies the loss by the number of processes
        method_lifecycle.count_items_over(
            args.world_size if args.average_tokens_across_devices else 1
        )
        self._training.enter_context(method_lifecycle.resumable())
        # a resumed run is already prepared
        if state.global_step == 0:
            loader = kwargs.get("train_dataloader")
            # not by its truth value: one of a stream has no length
            method_lifecycle.prepare([] if loader is None else loader)
        else:
            self._restore(method_lifecycle, args, state)
        self._measured = -1
        if self.retain:  # before anything is trained
            _tokenizer_of(kwargs, len(self.retain))
            base_with(kwargs["model"], None)
        # after `_restore`, which needs the identifier in the checkpoint
        self.run, self.folder = uuid4().hex, str(output_folder(args))
        # a checkpoint written without this callback lacks this entry, which Trainer reads on save
        callback_states(state).setdefault(type(self).__name__, self.state())
        if kwargs.get("optimizer") is not None:
            method_lifecycle.attach_optimizer(
                kwargs["optimizer"], state.global_step, state.max_steps
            )

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Given,
    ) -> None:
        """Set the weight of the auxiliary gradient of each micro-batch of the step."""
        assert self._lifecycle is not None, "on_train_begin made it"
        count = micro_batches_of(args, state, kwargs.get("train_dataloader"))
        # Trainer divides the task loss by it, which does not reach the auxiliary gradient
        self._lifecycle.aux_weight = 1 / count
        self._lifecycle.expect_micro_batches(count)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Given,
    ) -> None:
        """Release what `on_train_begin` set up; measure the retained texts."""
        self._training.close()
        if args.load_best_model_at_end:  # another model than the last evaluation's
            self._measured = -1
        self._measure(args, state, kwargs)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Given,
    ) -> None:
        """Measure the retained texts."""
        self._measure(args, state, kwargs)

    def _measure(self, args: TrainingArguments, state: TrainerState, given: Given) -> None:
        """Log what the model has lost on the retained texts, once a step."""
        if not self.retain or self._measured == state.global_step:
            return
        # an evaluation after the last step is also the end
        self._measured = state.global_step
        tokenizer = _tokenizer_of(given, len(self.retain))
        dtype = torch.bfloat16 if args.bf16 else torch.float16
        # in the precision of the training
        with torch.autocast(args.device.type, dtype, enabled=args.bf16 or args.fp16):
            found = retained(given["model"], self.retain, tokenizer)
        logs = {CURVE[found.kind]: found.change}
        logger.info("step %d: %s", state.global_step, found)
        state.log_history.append({**logs, "step": state.global_step})

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Given,
    ) -> None:
        """Run the method's update after an optimizer step."""
        assert self._lifecycle is not None
        if args.fp16 and self._lifecycle.has_aux:
            raise UnsupportedError(
                f"fp16={args.fp16} is not supported by methods with an auxiliary loss, which loss "
                "scaling does not reach; use bf16=True"
            )
        # Trainer counts the step after this event
        self._lifecycle.after_step(state.global_step + 1, kwargs.get("optimizer"))

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Given,
    ) -> None:
        """Save the training state in the checkpoint."""
        assert self._lifecycle is not None
        # trials of a hyperparameter search have their own folders and are not resumed
        if not args.should_save or args.save_only_model or state.is_hyper_param_search:
            return
        # empty for methods without training state
        tensors = self._lifecycle.state_dict()
        if tensors:
            content = save(contiguous(tensors), identifier(self.run, state.global_step))
            write_atomic(checkpoint_of(output_folder(args), state.global_step) / LIFECYCLE, content)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Given,
    ) -> None:
        """Add the metrics of the method."""
        # evaluation logs have no "loss"
        if self._lifecycle is None or logs is None or "loss" not in logs:
            return
        metrics = self._lifecycle.metrics()
        logs.update(metrics)
        state.log_history[-1].update(metrics)  # a copy of `logs` that Trainer made before

    def _restore(
        self, method_lifecycle: Lifecycle, args: TrainingArguments, state: TrainerState
    ) -> None:
        """Load the training state of the method from the checkpoint."""
        if not method_lifecycle.can_resume:
            logger.warning(
                "resumed training differs from uninterrupted training: %s", NOT_RESUMABLE
            )
        step, saved = state.global_step, self._saved_entry(state)
        # the present folder first: that of the checkpoint may have been moved since
        folders = [output_folder(args), *([Path(saved["folder"])] if saved else [])]
        checkpoints = [checkpoint_of(folder, step) for folder in folders]
        if args.resume_from_checkpoint:
            checkpoints.insert(0, Path(args.resume_from_checkpoint).absolute())
        for checkpoint in checkpoints:
            if checkpoint.is_dir():
                check_saved(
                    method_lifecycle.model,
                    checkpoint,
                    other_base=self.other_base,
                    action=f"resuming from {checkpoint}",
                    insist="petl.Callback(other_base=True)",
                )
                break
        if not method_lifecycle.state_dict():
            return
        wanted = identifier(saved["run"], step) if saved else None
        # read by one process, since the others may not have the folder on their disk
        tensors = made_by(0, lambda: find_state(checkpoints, wanted)) if wanted else None
        if tensors is None:
            logger.warning(
                "found no %s of step %d of the resumed training in %s: the training state of the "
                "method is reset, so results differ from uninterrupted training. Checkpoints "
                "contain the file if they were written with petl.Callback(); pass a checkpoint "
                "that was moved as TrainingArguments(resume_from_checkpoint=FOLDER)",
                LIFECYCLE,
                step,
                " or ".join(str(folder) for folder in dict.fromkeys(checkpoints)),
            )
        else:
            method_lifecycle.load_state_dict(tensors)

    def _saved_entry(self, state: TrainerState) -> dict[str, str]:
        """The attributes of this callback in the checkpoint; empty if there are none."""
        saved = callback_states(state).get(type(self).__name__, [])
        # Trainer saves a list where there are several callbacks of one class
        entries = [entry["attributes"] for entry in (saved if isinstance(saved, list) else [saved])]
        return next((entry for entry in entries if entry.get("run")), {})


def complete_reference(model: object) -> None:
    """Make the adapter `ref`, with which TRL computes reference outputs, equal to `default`.

    TRL's DPO, KTO and GRPO trainers add it to a wrapped model, and copy parameters whose names
    contain `.default.`. Parameters whose names end with `.default` (those of VeRA, (IA)3, MiSS and
    others) and buffers keep their new initial values, so that the reference would not be the model
    at the start of training.
    """
    if isinstance(model, PeftModel) and {"default", "ref"} <= model.peft_config.keys():
        tensors = get_peft_model_state_dict(
            model, adapter_name="default", save_embedding_layers=False
        )
        set_peft_model_state_dict(model, tensors, adapter_name="ref")


def callback_states(state: TrainerState) -> Record:
    """The states of callbacks in `trainer_state.json`, by the names of their classes."""
    return cast(Record, state.stateful_callbacks)


def output_folder(args: TrainingArguments) -> Path:
    """The absolute path of `output_dir`."""
    return Path(args.output_dir or "").absolute()


def checkpoint_of(folder: Path, step: int) -> Path:
    """The folder to which Trainer writes the checkpoint of a step."""
    return folder / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def identifier(run: str, step: int) -> dict[str, str]:
    """Metadata that identify the state of one step of one training."""
    return {"run": run, "step": str(step)}


def find_state(folders: list[Path], wanted: dict[str, str]) -> dict[str, Tensor] | None:
    """Load the state with the metadata `wanted` from the first folder that has it, or None.

    Raises:
        InputError: a file cannot be read.
    """
    for file in (folder / LIFECYCLE for folder in folders):
        if not file.is_file():
            continue
        try:
            with safe_open(file, framework="pt") as opened:
                # a folder may have a checkpoint of this step from another training
                if opened.metadata() == wanted:
                    return {name: opened.get_tensor(name) for name in sorted(opened.keys())}
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"cannot resume from {file} ({error}); choose another checkpoint"
            ) from error
    return None


def _tokenizer_of(given: Given, texts: int) -> PreTrainedTokenizerBase:
    """Return what Trainer tokenizes with.

    Raises:
        InputError: it has none.
    """
    tokenizer = given.get("processing_class")
    if tokenizer is None:
        raise InputError(
            f"petl.Callback(retain=...) tokenizes {texts} texts, and Trainer has no "
            "processing_class: pass the tokenizer as Trainer(processing_class=...)"
        )
    return tokenizer


def micro_batches_of(
    args: TrainingArguments, state: TrainerState, loader: DataLoader | None
) -> int:
    """Return the number of micro-batches of Trainer's coming step: the last one of an epoch has
    those that are left.
    """
    usual = args.gradient_accumulation_steps
    if not has_length(loader):
        return usual
    steps = -(-len(loader) // usual)  # of an epoch
    is_last = state.global_step % steps == steps - 1
    return len(loader) - usual * (steps - 1) if is_last else usual
