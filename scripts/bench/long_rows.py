"""Section `tokens`: LoRA on one row of 4,096 tokens, with and without tokens that are left out.

A training step and its peak memory: 8 layers of the shape of SmolLM2, of which the upper half keeps
0.4 of the blocks of 64 tokens, by their norms; in a second row it also keeps 0.4 of the channels of
its MLPs for backward. The loss is segmented in all rows.
"""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import petl
from bench.clocks import Step, in_turn
from bench.isolated import in_processes, peak_of_steps
from bench.records import Record
from bench.shapes import training_step

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


def _step(row: str, tokens: int, sizes: dict[str, Any]) -> Step:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = LlamaForCausalLM(LlamaConfig(**{**SIZES, **sizes}))
        ids = torch.randint(SIZES["vocab_size"], (1, tokens))
    model = petl.wrap(base, "lora", r=8, target_modules="block-linear").train()
    petl.fuse_lora(model)
    petl.segment_loss(model, tokens=512)
    if row != PLAIN:
        petl.drop_tokens(model, **ROWS[row])
    return training_step(model, {"input_ids": ids, "labels": ids})


def _peak(row: str, tokens: int, sizes: dict[str, Any]) -> int:
    torch.set_num_threads(1)
    return peak_of_steps(_step(row, tokens, sizes))
