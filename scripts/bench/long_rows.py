"""Section `tokens`: LoRA on one row of 4,096 tokens, with and without tokens that are left out.

A training step and its peak memory: 8 layers of the shape of SmolLM2, of which the upper half keeps
0.4 of the blocks of 64 tokens, by their norms; in a second row it also keeps 0.4 of the channels of
its MLPs for backward. The loss is segmented in all rows.

Then what is lost: the loss of a training pass of SmolLM2 on 2 x 1,024 tokens of the bundled texts,
by what is kept.
"""

import json
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import petl
from bench.clocks import Step, in_turn
from bench.isolated import in_processes, peak_of_steps
from bench.records import Record
from bench.shapes import training_step
from petl.data.models.loading import load_base, load_tokenizer
from petl.data.tasks.causal_lm import CausalLM
from petl.errors import InputError
from petl.training.compose import compose
from petl.training.retain.texts import FILE

SIZES: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 576,
    "num_hidden_layers": 8,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "max_position_embeddings": 4096,
}
TOKENS, KEEP = 4096, 0.4
LOSS_TOKENS = 1024
LAST = [27, 28, 29]  # of 30
KEPT: dict[str, dict[str, Any]] = {
    "all tokens": {"keep": 1.0},
    "keep 0.9": {"keep": 0.9},
    "keep 0.6": {"keep": 0.6},
    "keep 0.4": {"keep": KEEP},
    "keep 0.4, by the oracle": {"keep": KEEP, "scorer": "oracle"},
    "keep 0.4, last three layers": {"keep": KEEP, "layers": LAST},
}
PLAIN = "lora"
ROWS = {"tokens": {"keep": KEEP}, "tokens and channels": {"keep": KEEP, "mlp_keep": KEEP}}
GOALS = {"goal time / LoRA": 1.0, "goal peak / LoRA": 0.7}


def measure(rounds: int, tokens: int = TOKENS, **sizes: Any) -> list[Record]:
    """Return a record for each way to leave something out.

    Args:
        rounds: timed rounds.
        tokens: of the row.
        sizes: of the model, for tests.
    """
    steps = {row: _step(row, tokens, sizes) for row in ROWS}
    plain = _step(PLAIN, tokens, sizes)
    times = in_turn(plain, {**steps, PLAIN: plain}, rounds=rounds, warm_up=1, device="cpu")
    del steps, plain
    peaks = {row: in_processes(_peak, (row, tokens, sizes))[0] for row in (PLAIN, *ROWS)}
    return [
        Record(
            "tokens",
            f"Llama {sizes.get('num_hidden_layers', SIZES['num_hidden_layers'])} x {tokens:,}",
            row,
            ratios={"time / LoRA": times.over(row, PLAIN)},
            counts={"peak / LoRA": peaks[row] / peaks[PLAIN], "peak MB": peaks[row] / 1e6},
            facts=GOALS,
        )
        for row in ROWS
    ]


def losses() -> list[Record]:
    """Return a record for each way to keep tokens; [] where SmolLM2 is not installed."""
    settings = compose(["model=smollm2"]).model
    try:
        task = CausalLM(max_length=LOSS_TOKENS)
        tokenizer = load_tokenizer(settings)
        base = load_base(settings, task, processor=tokenizer)
    except InputError:  # the package that has it is not there
        return []
    model = petl.wrap(base, "lora", r=8, target_modules=["q_proj"]).train()
    texts = [json.loads(line)["text"] for line in FILE.read_text().splitlines()]
    ids = tokenizer("\n\n".join(texts))["input_ids"][: 2 * LOSS_TOKENS]
    rows = torch.tensor(ids).view(2, LOSS_TOKENS)
    records = []
    for row, settings in KEPT.items():
        petl.drop_tokens(model, **settings)
        loss = float(model(input_ids=rows, labels=rows).loss.detach())
        shape = f"SmolLM2, loss of 2 x {LOSS_TOKENS:,} tokens"
        records.append(Record("tokens", shape, row, facts={"loss": loss}))
    return records


def _step(row: str, tokens: int, sizes: dict[str, Any]) -> Step:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = LlamaForCausalLM(LlamaConfig(**{**SIZES, **sizes}))
        ids = torch.randint(base.config.vocab_size, (1, tokens))
    model = petl.wrap(base, "lora", r=8, target_modules="block-linear").train()
    petl.fuse_lora(model)
    petl.segment_loss(model, tokens=512)
    if row != PLAIN:
        petl.drop_tokens(model, **ROWS[row])
    return training_step(model, {"input_ids": ids, "labels": ids})


def _peak(row: str, tokens: int, sizes: dict[str, Any]) -> int:
    torch.set_num_threads(1)
    return peak_of_steps(_step(row, tokens, sizes))
