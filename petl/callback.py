"""The lifecycle of petl's methods for people who train with Trainer or TRL."""

from contextlib import ExitStack
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from petl.core.lifecycle import Lifecycle, lifecycle
from petl.errors import UnsupportedError


class Callback(TrainerCallback):
    """Add `callbacks=[petl.Callback()]` to a Trainer, SFTTrainer or DPOTrainer.

    It lets the method prepare on the training batches, change after each optimizer step, weighs
    auxiliary losses right under gradient accumulation, logs them apart from the task loss, and has
    checkpoints hold what training can go on from. Methods without auxiliary losses that do not
    change while training work without it.

    Raises:
        UnsupportedError: fp16 loss scaling together with an auxiliary loss.
    """

    def __init__(self) -> None:
        self._lifecycle: Lifecycle | None = None
        self._training = ExitStack()

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
