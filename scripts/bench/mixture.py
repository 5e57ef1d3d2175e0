"""Section `experts`: LoRA on all stacks of experts of a mixture, beside PEFT's own forward pass.

A training step and its peak memory, of one row of random tokens: 8 layers of 32 experts, 4 for each
token, of rank 8. The lower bound is the frozen model with gradients to its inputs.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import petl
from bench.clocks import Step, in_turn
from bench.isolated import in_processes, peak_of_steps
from bench.records import Record
from bench.shapes import training_step
from petl.core.experts.lora import FusedExperts
from petl.core.layers.class_swap import restore_class

SIZES: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 256,
    "moe_intermediate_size": 256,
    "num_experts": 32,
    "num_experts_per_tok": 4,
}
LORA: dict[str, Any] = {
    "r": 8,
    "target_modules": [],
    "target_parameters": ["gate_up_proj", "down_proj"],
}
# by number of tokens, of the time and the peak memory relative to PEFT's
GOALS = {64: (0.25, 0.20), 512: (0.50, 0.42)}
ROWS = FLOOR, OURS, PEFT = "floor", "lora", "PEFT's lora"


def measure(rounds: int, **sizes: Any) -> list[Record]:
    """Return a record for each number of tokens.

    Args:
        rounds: timed rounds.
        sizes: of the model, for tests.
    """
    return [_record(tokens, rounds, sizes) for tokens in GOALS]


def _record(tokens: int, rounds: int, sizes: dict[str, Any]) -> Record:
    floor, ours, peft = (_step(row, tokens, sizes) for row in ROWS)
    times = in_turn(floor, {OURS: ours, PEFT: peft}, rounds=rounds, warm_up=1, device="cpu")
    del floor, ours, peft
    peaks = {row: in_processes(_peak, (row, tokens, sizes))[0] for row in ROWS}
    time, peak = GOALS[tokens]
    return Record(
        "experts",
        f"Qwen3-MoE 8 x {tokens}",
        OURS,
        ratios={"time / LoRA": times.over(OURS, PEFT), "time / floor": times.over_floor(OURS)},
        counts={"peak / LoRA": peaks[OURS] / peaks[PEFT], "peak MB": peaks[OURS] / 1e6},
        facts={"goal time / LoRA": time, "goal peak / LoRA": peak},
    )


def _step(row: str, tokens: int, sizes: dict[str, Any]) -> Step:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**SIZES, **sizes}))
        ids = torch.randint(SIZES["vocab_size"], (1, tokens))
    batch = {"input_ids": ids, "labels": ids}
    if row == FLOOR:
        return _floor(model.requires_grad_(False), batch)
    model = petl.wrap(model, "lora", **LORA).train()
    for layer in model.modules() if row == PEFT else ():
        restore_class(layer, FusedExperts)
    return training_step(model, batch)


def _floor(model: Any, batch: dict[str, Tensor]) -> Step:
    given = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    return training_step(model, {"inputs_embeds": given, "labels": batch["labels"]})


def _peak(row: str, tokens: int, sizes: dict[str, Any]) -> int:
    torch.set_num_threads(1)
    return peak_of_steps(_step(row, tokens, sizes))
