"""Scores of generated answers: exact match and ROUGE.

Shapes: B rows, T tokens of the longest prompt.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor

from petl.data.batch_sampler import chunks
from petl.distributed.engine import is_sharded
from petl.tasks.base import pad_id, rounded
from petl.tasks.metrics import rouge
from petl.training.dataloader import Splits
from petl.training.predictions import Predictions

SCORES = ("exact_match", "rouge1", "rouge2", "rougeL")


@torch.no_grad()
def score_answers(
    model: PeftModel,
    splits: Splits,
    accelerator: Accelerator,
    batch_size: int,
    predictions: Predictions | None = None,
) -> dict[str, float]:
    """Return exact match (white space aside) and ROUGE of answers to the test rows, and a count.

    Answers are decoded greedily, up to `task.generate` tokens or the end token.

    Args:
        predictions: gets those of this process.
    """
    task, tokenizer, device = splits.task, splits.processor, accelerator.device
    is_encoder_decoder = is_pair(model)
    column = "input_ids" if is_encoder_decoder else "_prompt"
    rows = splits.test.select_columns([column, "_answer"])
    # longest prompts first: an out-of-memory error comes early, and padding is small
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][column]))
    # every process generates as many batches as the first, each as long as the longest of any: a
    # sharded model needs all processes in each forward pass
    processes = accelerator.num_processes
    own = chunks(order[accelerator.process_index :: processes], batch_size)
    surplus = math.ceil(math.ceil(len(order) / processes) / batch_size) - len(own)
    was_training = model.training
    model.eval()
    total = torch.zeros(1 + len(SCORES), dtype=torch.float32, device=device)
    for number, part in enumerate(own + [order[:1]] * surplus):
        batch = rows.select(part)
        with accelerator.autocast():
            texts = written(model, tokenizer, list(batch[column]), task.generate or 1)
        if number >= len(own):  # a surplus batch, computed for the other processes
            continue
        for position, text, answer in zip(part, texts, batch["_answer"], strict=True):
            exact = float(text.split() == answer.split())
            scores = {"exact_match": exact, **rouge(text, answer)}
            total += torch.tensor([1.0, *(scores[name] for name in SCORES)], device=device)
            if predictions is not None:
                described = {name: rounded(scores[name]) for name in SCORES}
                predictions.answers[position] = {"label": answer, "prediction": text, **described}
    model.train(was_training)
    # sums and count in one reduction
    count, *sums = accelerator.reduce(total, reduction="sum").tolist()
    return {**{k: v / count for k, v in zip(SCORES, sums, strict=True)}, "answers": count}


@torch.no_grad()
def written(
    model: PeftModel, tokenizer: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[str]:
    """Return the text that a model in evaluation mode writes after each prompt, greedily."""
    base: Any = model.get_base_model()
    inputs = padded(prompts, pad_id(tokenizer), on_left=not is_pair(model))
    # chat models end a turn by a token of their generation config, not by the tokenizer's
    ends = {tokenizer.eos_token_id, *as_list(base.generation_config.eos_token_id)} - {None}
    generated = model.generate(
        **{name: tensor.to(model.device) for name, tensor in inputs.items()},
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=sorted(ends),
        pad_token_id=pad_id(tokenizer),
        synced_gpus=is_sharded(model),
    )
    # a decoder returns the prompt as well
    new = generated if is_pair(model) else generated[:, inputs["input_ids"].shape[1] :]
    return tokenizer.batch_decode(new, skip_special_tokens=True)


def is_pair(model: PeftModel) -> bool:
    """Return True if the model is an encoder with a decoder."""
    base: Any = model.get_base_model()
    return base.config.is_encoder_decoder


def as_list(ids: int | list[int] | None) -> list[int]:
    """Return end tokens as a list: a model may have one, several or none."""
    if ids is None:
        return []
    return ids if isinstance(ids, list) else [ids]


def padded(rows: Sequence[Sequence[int]], pad: int, *, on_left: bool) -> dict[str, Tensor]:
    """Return `input_ids` and `attention_mask`, each [B, T]; decoders need padding on the left."""
    ids = torch.full((len(rows), max(map(len, rows))), pad)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(ids.shape[1] - len(row), None) if on_left else slice(len(row))
        ids[i, place] = torch.as_tensor(row)
        mask[i, place] = 1
    return {"input_ids": ids, "attention_mask": mask}
