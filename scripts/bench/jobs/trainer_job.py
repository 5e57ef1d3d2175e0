"""The process of a run by PEFT's LoRA under transformers' Trainer, or TRL's SFTTrainer.

What a careful user writes: rows that are encoded already, the padding of the batch, a learning rate
of its own for the head, weight decay for matrices alone, no checkpoints. Nothing of petl is
imported. Reads one JSON object from standard input: `data`, a folder of `data.export`; `out`, the
file to write; `options`, see `Options`.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import load_from_disk
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from bench.jobs.child import Clock

AUTO = {
    "classification": AutoModelForSequenceClassification,
    "image_classification": AutoModelForImageClassification,
    "causal_lm": AutoModelForCausalLM,
}


@dataclass(frozen=True)
class Options:
    """How one run trains; names are petl's, and of `points` evaluations rows are held out."""

    seed: int
    lr: float
    head_lr: float
    epochs: float
    batch_size: int
    eval_batch_size: int
    weight_decay: float
    warmup: float
    max_grad_norm: float
    grouped: bool
    bf16: bool
    sft: bool
    points: int


def main() -> None:
    """Do one job and write its times and scores."""
    request = json.load(sys.stdin)
    clock, folder = Clock(), Path(request["data"])
    options, about = Options(**request["options"]), json.loads((folder / "about.json").read_text())
    set_seed(options.seed)
    trainer = trainer_of(folder, about, options, clock)
    clock.mark("before training")
    result = trainer.train()
    clock.mark("after training")
    scores = None
    if options.points:
        if clock.points[-1]["step"] < result.global_step:
            trainer.evaluate()
    else:
        rows = load_from_disk(str(folder / "test"))
        scores = scores_of(trainer.evaluate(shaped(rows, about)))
    clock.write(Path(request["out"]), scores=scores, steps=result.global_step)


def trainer_of(folder: Path, about: dict[str, Any], options: Options, clock: Clock) -> Trainer:
    """Return the trainer of a wrapped model, with its rows."""
    # the head of other classes is new
    new = {} if about["task"] == "causal_lm" else {"ignore_mismatched_sizes": True}
    model: Any = AUTO[about["task"]].from_pretrained(about["model"], **about["arguments"], **new)
    model = get_peft_model(model, LoraConfig(**about["lora"]))
    train = load_from_disk(str(folder / ("rest" if options.points else "train")))
    held = load_from_disk(str(folder / "validation")) if options.points else None
    reader = AutoImageProcessor if about["task"] == "image_classification" else AutoTokenizer
    processor = reader.from_pretrained(about["model"])
    trainer_cls, arguments_cls, more = Trainer, TrainingArguments, {}
    if options.sft:
        from trl import SFTConfig, SFTTrainer

        trainer_cls, arguments_cls = SFTTrainer, SFTConfig
        more = {"gradient_checkpointing": False, "max_length": None}

    class Timed(trainer_cls):
        """Keeps the time and the scores of each evaluation."""

        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            began = time.process_time()
            found = super().evaluate(*args, **kwargs)
            clock.note(began, self.state.global_step, scores_of(found))
            return found

    arguments = arguments_cls(
        output_dir=str(folder.parent / "trainer"),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.eval_batch_size,
        learning_rate=options.lr,
        lr_scheduler_type="linear",
        warmup_steps=options.warmup,
        max_grad_norm=options.max_grad_norm,
        train_sampling_strategy="group_by_length" if options.grouped else "random",
        bf16=options.bf16,
        seed=options.seed,
        eval_strategy="steps" if options.points else "no",
        eval_steps=1 / options.points if options.points else None,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        label_names=["labels"],
        use_cpu=not torch.cuda.is_available(),
        **more,
    )
    return Timed(
        model=model,
        args=arguments,
        train_dataset=shaped(train, about),
        eval_dataset=None if held is None else shaped(held, about),
        data_collator=collator(about["task"], processor),
        processing_class=processor,
        compute_metrics=metrics_of(about["task"]),
        preprocess_logits_for_metrics=reduced if about["task"] == "causal_lm" else None,
        optimizers=(optimizer_of(model, options), None),
    )


def optimizer_of(model: Any, options: Options) -> torch.optim.Optimizer:
    """Return AdamW with a rate for the adapter and one for the head; matrices alone decay."""
    groups: dict[tuple[float, float], list[Any]] = {}
    for name, tensor in model.named_parameters():
        if tensor.requires_grad:
            rate = options.lr if "lora_" in name else options.head_lr
            decay = options.weight_decay if tensor.dim() > 1 else 0.0
            groups.setdefault((rate, decay), []).append(tensor)
    parts = [{"params": t, "lr": lr, "weight_decay": w} for (lr, w), t in groups.items()]
    return torch.optim.AdamW(parts, fused=True)


def shaped(rows: Any, about: dict[str, Any]) -> Any:
    """Return rows as the collator reads them fastest: arrays of pixels as tensors."""
    return rows.with_format("torch") if about["task"] == "image_classification" else rows


def collator(task: str, processor: Any) -> Any:
    """Return what pads a batch to its longest row."""
    if task == "image_classification":
        return default_data_collator
    if task == "classification":
        return DataCollatorWithPadding(processor)
    return DataCollatorForSeq2Seq(processor)  # which pads labels too


def reduced(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    """Return the loss of each token in place of its logits, which would fill the memory."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), labels[:, 1:], reduction="none"
    )


def metrics_of(task: str) -> Any:
    """Return the function that scores predictions."""

    def accuracy(found: Any) -> dict[str, float]:
        logits, labels = torch.as_tensor(found.predictions), torch.as_tensor(found.label_ids)
        loss = torch.nn.functional.cross_entropy(logits, labels)
        return {
            "accuracy": float((logits.argmax(-1) == labels).float().mean()),
            "mean_loss": float(loss),
        }

    def loss_of_tokens(found: Any) -> dict[str, float]:
        counts = found.label_ids[:, 1:] != -100
        return {"mean_loss": float(found.predictions[counts].mean())}

    return loss_of_tokens if task == "causal_lm" else accuracy


def scores_of(found: dict[str, float]) -> dict[str, float]:
    """Return the scores under petl's names; Trainer's own loss is a mean of the batches'."""
    names = {"eval_accuracy": "accuracy", "eval_mean_loss": "loss"}
    return {names[name]: value for name, value in found.items() if name in names}


if __name__ == "__main__":
    main()
