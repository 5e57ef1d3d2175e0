"""Conformance checks for any method, petl's or yours, on tiny models that need no download.

A method that passes them behaves like one of PEFT's: it saves and loads, switches and mixes
adapters, merges or raises with a reason, trains in half precision, under checkpointing, in several
processes, compiled.

    import pytest
    from petl import testing

    import my_method  # calls petl.register or petl.adopt

    CASES = [testing.Case("my_method", model, {"r": 4}) for model in testing.TINY_MODELS]

    @pytest.mark.parametrize(("case", "check"), testing.params(CASES))
    def test_contract(case, check):
        testing.run(check, case)

`params` has ids, and marks for slow checks and missing packages; `checks(case)` returns the names
of the checks that apply to a case: all of them to a method registered with `petl.register`, to an
adopted one those that make sense for any PEFT tuner. The registry has what a method promises
(merging, export to LoRA); exceptions are fields of the case:

    testing.Case("my_method", starts_at_base=False)
    testing.Case("my_method", refuses=("reentrant_checkpointing_gives_the_same_gradients",))
    testing.Case("my_method", excused={"two_processes_equal_one": "ranks draw different masks"})

`run` raises AssertionError with a sentence that has the fault and the bound, and skips the test
with an install line if the check needs a package that is absent. Checks need neither pytest nor a
network, and leave the global random state seeded. `in_fresh_process`, `in_processes` and the tiny
models may be used in other tests, too.
"""

from petl.testing import (  # noqa: F401
    bases,
    experts,
    fields,
    numerics,
    parallel,
    quantization,
    registration,
    saving,
    switching,
    token_rows,
    training,
)
from petl.testing.case import Case, difference, gradients, logits, stir, trainable, tuner_layers
from petl.testing.catalog import CHECKS, Check, check, checks, params, run
from petl.testing.models import (
    OTHER_MODELS,
    TINY_MODELS,
    TinyModel,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_t5,
    tiny_unet,
    tiny_vit,
)
from petl.testing.processes import in_fresh_process, in_processes

__all__ = [
    "CHECKS",
    "OTHER_MODELS",
    "TINY_MODELS",
    "Case",
    "Check",
    "TinyModel",
    "check",
    "checks",
    "difference",
    "gradients",
    "in_fresh_process",
    "in_processes",
    "logits",
    "params",
    "run",
    "stir",
    "tiny_bert",
    "tiny_gpt2",
    "tiny_llama",
    "tiny_t5",
    "tiny_unet",
    "tiny_vit",
    "trainable",
    "tuner_layers",
]
