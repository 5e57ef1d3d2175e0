"""Section `unet`: tuners on the skip connections of a diffusion U-Net, beside LoRA.

In diffusers' U-Net at a quarter of Stable Diffusion's widths, on one random 32 x 32 latent: a
training step relative to that of a LoRA of rank 8 on the projections of attention, and the bytes
that autograd saves in it.
"""

from typing import Any

import torch
from torch import Tensor, nn

import petl
from bench.clocks import in_turn
from bench.counters import kept_bytes
from bench.records import Record
from petl.errors import InputError

WIDTHS = (80, 160, 320, 320)
RATIOS = (1.0, 0.25)
GOALS = {"goal time / LoRA": 0.75, "goal kept / LoRA": 0.65}
LORA: dict[str, Any] = {"r": 8, "target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}


def measure(rounds: int, **settings: Any) -> list[Record]:
    """Return a record for each ratio.

    Args:
        rounds: timed rounds.
        settings: of the U-Net, for tests.
    """
    lora = petl.wrap(_unet(settings), "lora", **LORA).train()
    petl.fuse_lora(lora)  # as train.py does
    rows = {
        f"scedit, ratio {ratio:g}": petl.wrap(_unet(settings), "scedit", ratio=ratio).train()
        for ratio in RATIOS
    }
    inputs = _inputs(settings)
    candidates = {row: _step(model, inputs) for row, model in rows.items()}
    step = _step(lora, inputs)
    times = in_turn(step, candidates, rounds=rounds, warm_up=1, device="cpu")
    saved = _kept(lora, inputs)
    return [
        Record(
            "unet",
            "U-Net of widths " + ", ".join(map(str, settings.get("block_out_channels", WIDTHS))),
            row,
            ratios={"time / LoRA": times.over_floor(row)},
            counts={
                "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
                "kept / LoRA": _kept(model, inputs) / saved,
            },
            facts=GOALS,
        )
        for row, model in rows.items()
    ]


def _unet(settings: dict[str, Any]) -> nn.Module:
    try:
        from diffusers import UNet2DConditionModel  # an optional extra, and slow to import
    except ImportError as error:
        raise InputError(
            "section unet needs diffusers: pip install 'petl-peft[diffusion]'"
        ) from error

    fields = {
        "sample_size": 32,
        "block_out_channels": WIDTHS,
        "cross_attention_dim": 256,
        "norm_num_groups": 16,
        **settings,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet2DConditionModel(**fields)


def _inputs(settings: dict[str, Any]) -> list[Tensor]:
    """Return a latent, a timestep, a text of 77 tokens, and the noise to predict."""
    size, width = settings.get("sample_size", 32), settings.get("cross_attention_dim", 256)
    latent, noise = (torch.randn(1, 4, size, size) for _ in range(2))
    return [latent, torch.tensor([500]), torch.randn(1, 77, width), noise]


def _loss(model: nn.Module, inputs: list[Tensor]) -> Tensor:
    *given, noise = inputs
    return (model(*given).sample - noise).square().mean()


def _step(model: nn.Module, inputs: list[Tensor]) -> Any:
    def step() -> None:
        _loss(model, inputs).backward()
        model.zero_grad()

    return step


def _kept(model: nn.Module, inputs: list[Tensor]) -> int:
    own = [*model.parameters(), *model.buffers(), *inputs]
    return kept_bytes(lambda: _loss(model, inputs), own)
