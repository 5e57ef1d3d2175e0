"""Every registered method trains an embedder, of an encoder and of a decoder, or is refused."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from contract_cases import OWN, adopted, models_of, own
from transformers import PreTrainedModel

import petl
from petl import testing
from petl.data.tasks.base import Pad
from petl.data.tasks.retrieval import Retrieval, batch_of
from petl.testing import Case, TinyModel
from petl.testing.models import VOCABULARY, Batch, tiny_bert, tiny_llama

CHECKS = ("only_the_adapter_trains", "every_trainable_tensor_gets_a_gradient")
WHOLE = {"mola", "mos", "adapter", "sparse"}  # trained for twenty steps on both bases
# methods that adapt neither, and why
REFUSED = {
    "dkvb": "dkvb is a classification head",
    "pyra": "pyra",
    "scedit": "scedit",
    "vl_pet": "vl_pet",
}
# with larger ones, all texts of these random models soon have one vector
RATES = {"lora": 1e-3, "mos": 1e-3, "polyhistor": 3e-3, "rslora": 1e-3, "pst": 5e-3}


def pairs(rows: int = 4, seed: int = 0) -> Batch:
    """A batch of pairs with texts of several lengths, as a run has it."""
    draws = torch.Generator().manual_seed(seed)
    encoded = []
    for _ in range(rows):
        sizes = torch.randint(3, 11, (2,), generator=draws).tolist()
        ids = torch.randint(5, VOCABULARY, (sum(sizes),), generator=draws).tolist()
        encoded.append({"input_ids": ids, "sizes": sizes})
    return batch_of(Pad(0), encoded)


def embedder(build: Callable[[], Any], part: str, pooling: str) -> Callable[[], PreTrainedModel]:
    """A function that builds a base as `data.task=retrieval` has it."""

    def built() -> PreTrainedModel:
        model = getattr(build(), part)
        Retrieval(pooling=pooling).adjust(model)
        return model

    return built


BASES = {
    "bert": TinyModel("bert", embedder(tiny_bert, "bert", "mean"), pairs, "FEATURE_EXTRACTION"),
    "llama": TinyModel("llama", embedder(tiny_llama, "model", "last"), pairs, "FEATURE_EXTRACTION"),
}


def cases():
    """Methods with each base that they can adapt; PEFT's, and decoders, are `thorough`."""
    for base in BASES:
        for name in petl.list_methods():
            if name in REFUSED or base not in models_of(name):
                continue
            case = own(name, base) if name in OWN else adopted(name, base)
            case = replace(case, model=BASES[base], lr=RATES.get(name, case.lr))
            quick = base == "bert" and name in OWN
            marks = [] if quick else [pytest.mark.thorough]
            checks = CHECKS[1:] if quick and name not in WHOLE else CHECKS
            yield pytest.param(case, checks, id=f"{name}-{base}", marks=marks)


@pytest.mark.cells(4)
@pytest.mark.parametrize(("case", "checks"), [*cases()])
def test_a_method_trains_an_embedder(case: Case, checks: tuple[str, ...], tmp_path):
    for check in checks:
        if check in testing.checks(case) and check not in case.excused:
            testing.run(check, case)
    model = case.wrap_stirred()
    inputs = {n: t for n, t in case.batch().items() if n in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected = model(**inputs).sentence_embedding
        base = case.base()(**inputs).sentence_embedding
    assert (expected - base).abs().max() > 1e-4
    model.save_pretrained(tmp_path)
    loaded = petl.load(case.base(), str(tmp_path)).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).sentence_embedding, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", REFUSED)
def test_other_methods_are_refused(name):
    for base in BASES.values():
        case = own(name, base)
        with pytest.raises(petl.InputError, match=REFUSED[name]):
            case.wrap()
