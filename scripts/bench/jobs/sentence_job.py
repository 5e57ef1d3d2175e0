"""The process of a run by PEFT's LoRA under SentenceTransformerTrainer.

What a careful user writes: MultipleNegativesRankingLoss, batches by the longer text of a pair, no
weight decay of vectors, no checkpoints, InformationRetrievalEvaluator. Nothing of petl is imported.
Reads from standard input what `trainer_job` does; the rows are decoded to texts.
"""

import json
import sys
import time
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, load_from_disk
from peft import LoraConfig, get_peft_model
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.sampler import DefaultBatchSampler
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from transformers import AutoTokenizer, TrainerCallback, set_seed
from transformers.trainer_pt_utils import LengthGroupedSampler

from bench.jobs.child import Clock
from bench.jobs.trainer_job import Options, optimizer_of

METRIC = "cosine_ndcg@10"  # the end of its name in the evaluator's results


def main() -> None:
    """Do one job and write its times and scores."""
    request = json.load(sys.stdin)
    clock, folder = Clock(), Path(request["data"])
    options, about = Options(**request["options"]), json.loads((folder / "about.json").read_text())
    set_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(about["model"])
    model = SentenceTransformer(about["model"], device="cpu")
    model.max_seq_length = about["max_length"]
    get_peft_model(model[0].auto_model, LoraConfig(**about["lora"]))
    for name, tensor in model.named_parameters():
        tensor.requires_grad_("lora_" in name)
    rows = load_from_disk(str(folder / ("rest" if options.points else "train")))
    trainer = trainer_of(model, pairs(rows, tokenizer), rows["sizes"], folder, options)
    held = load_from_disk(str(folder / ("validation" if options.points else "test")))
    evaluator = evaluator_of(held, tokenizer, options.eval_batch_size)

    def evaluate() -> dict[str, float]:
        began = time.process_time()
        with torch.no_grad():
            found = evaluator(model.eval())
        model.train()
        score = next(value for name, value in found.items() if name.endswith(METRIC))
        clock.note(began, trainer.state.global_step, {"ndcg_at_10": score})
        return {"ndcg_at_10": score}

    if options.points:
        trainer.add_callback(Evaluations(evaluate, options.points))
    clock.mark("before training")
    result = trainer.train()
    clock.mark("after training")
    scores = None if options.points else evaluate()
    clock.write(Path(request["out"]), scores=scores, steps=result.global_step)


class Evaluations(TrainerCallback):
    """Calls a function several times in a run, at last at its end."""

    def __init__(self, evaluate: Any, points: int) -> None:
        self.evaluate, self.points = evaluate, points

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluate if it is time."""
        every = max(1, round(state.max_steps / self.points))
        if state.global_step % every == 0 or state.global_step == state.max_steps:
            self.evaluate()


class ByLength(DefaultBatchSampler):
    """Batches of rows of alike lengths, as Trainer's `group_by_length` makes them."""

    def __init__(self, dataset: Dataset, *, lengths: list[int], **kwargs: Any) -> None:
        grouped = LengthGroupedSampler(
            kwargs["batch_size"], lengths=lengths, generator=kwargs["generator"]
        )
        super().__init__(grouped, **kwargs)


def trainer_of(
    model: SentenceTransformer,
    train: Dataset,
    sizes: list[list[int]],
    folder: Path,
    options: Options,
) -> SentenceTransformerTrainer:
    """Return the trainer of a wrapped model on pairs of texts."""
    more = {}
    if options.grouped:
        more["batch_sampler"] = partial(ByLength, lengths=[*map(max, sizes)])
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder.parent / "trainer"),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.lr,
        lr_scheduler_type="linear",
        warmup_steps=options.warmup,
        max_grad_norm=options.max_grad_norm,
        bf16=options.bf16,
        seed=options.seed,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        **more,
    )
    return SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=train,
        loss=MultipleNegativesRankingLoss(model),
        optimizers=(optimizer_of(model, options), None),
    )


def texts(rows: Dataset, tokenizer: Any) -> Iterator[list[str]]:
    """Yield the texts of each row."""
    for ids, sizes in zip(rows["input_ids"], rows["sizes"], strict=True):
        ends = [0, *np.cumsum(sizes)]
        parts = [ids[start:end] for start, end in pairwise(ends)]
        yield tokenizer.batch_decode(parts, skip_special_tokens=True)


def pairs(rows: Dataset, tokenizer: Any) -> Dataset:
    """Return pairs of a query and its document."""
    return Dataset.from_list(
        [{"anchor": one, "positive": two} for one, two in texts(rows, tokenizer)]
    )


def evaluator_of(rows: Dataset, tokenizer: Any, batch_size: int) -> InformationRetrievalEvaluator:
    """Return the evaluator of rows that are queries with the grades of documents, or documents."""
    parts: dict[str, dict[str, str]] = {"query": {}, "document": {}}
    relevant = {}
    columns = (rows[name] for name in ("_role", "_id", "_relevant"))
    for (text,), role, name, grades in zip(texts(rows, tokenizer), *columns, strict=True):
        parts[role][name] = text
        if role == "query":
            relevant[name] = {other for other, grade in json.loads(grades).items() if grade > 0}
    return InformationRetrievalEvaluator(
        parts["query"], parts["document"], relevant, batch_size=batch_size
    )


if __name__ == "__main__":
    main()
