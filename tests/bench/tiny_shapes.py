"""Shapes of the bench that take milliseconds."""

from dataclasses import replace

from petl.bench.shapes import LLAMA, MINILM

SMALL = {"hidden": 64, "heads": 4, "ff": 96, "vocabulary": 200, "rows": 2, "length": 16}
TINY_LLAMA = replace(LLAMA, **SMALL, kv_heads=2, layers=2)
TINY_MINILM = replace(MINILM, **SMALL, kv_heads=4, layers=2)
TINY = {"llama": TINY_LLAMA, "minilm": TINY_MINILM}
