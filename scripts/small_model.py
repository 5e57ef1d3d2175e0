"""Compare a model with what PELA makes of it: weights in memory, and time of a forward pass.

  python scripts/small_model.py --compression 2 --tokens 512

The model has SmolLM2-135M's shape and random weights, on which neither figure depends, so nothing
is decomposed. Both models run one after the other, in pairs, on one thread; CPU time is measured.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import petl  # noqa: E402
from petl.methods.pela.export import put_low_rank  # noqa: E402


def shape(layers: int) -> Any:
    """The config of SmolLM2-135M."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        use_cache=False,
    )


def ranks(config: Any, compression: float) -> dict[str, int]:
    """The rank that PELA gives each linear layer, by path."""
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model = petl.wrap(LlamaForCausalLM(config), "pela", compression=compression)
    tuner: Any = model.base_model
    return {key: len(adapter.low_A) for key, adapter in tuner.placed["default"].items()}


@torch.no_grad()
def seconds(model: nn.Module, ids: torch.Tensor) -> float:
    """CPU time of a forward pass, which other processes affect less than wall time."""
    begin = time.process_time()
    model(input_ids=ids)
    return time.process_time() - begin


def megabytes(model: nn.Module) -> float:
    """Bytes of the parameters, in 10^6."""
    return sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6


def main() -> None:
    """Print the figures."""
    from transformers import LlamaForCausalLM

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--compression", type=float, default=2.0, help="c (default: 2)")
    parser.add_argument("--tokens", type=int, default=512, help="of one row (default: 512)")
    parser.add_argument("--layers", type=int, default=30, help="blocks (default: 30)")
    parser.add_argument("--pairs", type=int, default=7, help="pairs of passes (default: 7)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = shape(options.layers)
    whole = LlamaForCausalLM(config).eval()
    small = LlamaForCausalLM(config).eval()
    put_low_rank(small, ranks(config, options.compression), Path("ranks.json"))
    ids = torch.randint(3, config.vocab_size, (1, options.tokens))
    print(f"parameters: {megabytes(whole):.0f} MB -> {megabytes(small):.0f} MB in float32")
    blocks = megabytes(whole.model.layers), megabytes(small.model.layers)
    print(f"of the blocks: {blocks[0]:.1f} MB -> {blocks[1]:.1f} MB")
    for name, one, other in (
        ("with the head", whole, small),
        ("without the head", whole.model, small.model),
    ):
        seconds(one, ids), seconds(other, ids)
        pairs = [(seconds(one, ids), seconds(other, ids)) for _ in range(options.pairs)]
        found = sorted(a / b for a, b in pairs)
        print(
            f"forward of {options.tokens} tokens {name}: {statistics.median(found):.2f} times "
            f"faster (pairs from {found[0]:.2f} to {found[-1]:.2f}); best "
            f"{min(a for a, _ in pairs):.3f} s -> {min(b for _, b in pairs):.3f} s"
        )


if __name__ == "__main__":
    main()
