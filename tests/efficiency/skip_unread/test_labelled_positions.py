"""Head, loss and last block of causal LMs at labelled positions, against the plain model."""

import copy
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from matrix_rows import Rows
from peft import PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

import petl
from petl.data.tasks.causal_lm import CausalLM
from petl.efficiency.rewrite import AUTO
from petl.efficiency.segment_loss import SegmentLoss
from petl.efficiency.skip_unread.labelled_positions import positions_of
from petl.efficiency.skip_unread.read_positions import SkipUnread
from petl.ops.segmented_loss import shifted
from tests.fixtures.tiny_families import DECODER, FAMILIES, TEXT, WIDTHS

CAUSAL = sorted(name for name, family in FAMILIES.items() if family.causal)
KIN = ("llama", "qwen2")  # whose last block can compute single positions
B, T = 3, 20


def built(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A family's model without dropout, with random weights."""
    base = FAMILIES[name].build().to(dtype)
    torch.manual_seed(3)
    for parameter in base.parameters():
        nn.init.normal_(parameter, 0.0, 0.1)
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
    return base


def wrapped(base: Any, **fields: Any) -> Any:
    model = petl.wrap(base, "lora", r=2, target_modules="block-linear", task_type="CAUSAL_LM")
    for key, value in fields.items():
        setattr(model, key, value)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, 0.0, 0.1)
    return model.train()


def batch_of(share: float = 0.2) -> dict[str, Tensor]:
    """Rows of which two are padded; labels are few, in every row another number."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.tensor([[1] * n + [0] * (T - n) for n in (T, 17, 12)])
    ids = torch.randint(3, 32, (B, T), generator=generator).masked_fill(mask == 0, 0)
    chosen = torch.rand(B, T, generator=generator) < share
    chosen[0, 5] = True
    labels = ids.masked_fill(~chosen | (mask == 0), -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def step(model: Any, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor], int]:
    """Loss, gradients, and rows of the matrix products of the forward pass."""
    model.zero_grad()
    with Rows() as rows:
        loss = model(**batch).loss
    loss.backward()
    grads = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), grads, rows.total


def assert_same(found: tuple[Any, ...], expected: tuple[Any, ...], tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=tolerance)
    assert found[1].keys() == expected[1].keys()
    scale = max(float(grad.abs().max()) for grad in expected[1].values())
    for name, grad in found[1].items():
        torch.testing.assert_close(
            grad, expected[1][name], rtol=100 * tolerance, atol=tolerance * scale, msg=name
        )


@pytest.mark.cells(5)
@pytest.mark.parametrize("head", ["frozen", "trained"])
@pytest.mark.parametrize("family", CAUSAL)
def test_loss_and_gradients_equal_the_plain_model(family: str, head: str) -> None:
    plain = wrapped(built(family))
    if head == "trained":  # with all other weights; its loss is the model's own
        plain.requires_grad_(True)
    model, batch = copy.deepcopy(plain), batch_of()
    base = model.get_base_model()
    if not SegmentLoss().refusal(model, AUTO):  # as `petl train`
        petl.segment_loss(model)
    assert SkipUnread().apply(model) == 1
    expected, found = step(plain, batch), step(model, batch)
    assert_same(found, expected)
    assert model(**batch).logits is None
    assert found[2] < expected[2]  # it has computed less
    assert (base.last_block is not None) == (family in KIN)


PROMPT = {"num_virtual_tokens": 4}  # tokens before those of the batch


@pytest.mark.parametrize(
    ("family", "fields"), [*((each, {}) for each in CAUSAL), ("llama", PROMPT)]
)
def test_evaluation_computes_the_logits_of_labelled_positions(family: str, fields: Any) -> None:
    base, batch = built(family), batch_of()
    config = PromptTuningConfig(task_type="CAUSAL_LM", **fields)
    model = (get_peft_model(base, config) if fields else wrapped(base)).eval()
    task = CausalLM(max_length=T)
    with torch.no_grad():
        expected = task.predict(model(**inputs_of(batch)), batch)
        assert SkipUnread().apply(model) == 1
        with Rows() as rows:
            outputs = task.outputs(model, batch)
        found = task.predict(outputs, batch)
        with Rows() as all_rows:
            logits = model(**inputs_of(batch)).logits  # a pass that asks for nothing has all
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert logits.shape[:2] == (B, T + fields.get("num_virtual_tokens", 0))
    assert len(outputs.logits) == int((batch["labels"][:, 1:] != -100).sum())
    assert rows.total < all_rows.total


def inputs_of(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if name != "labels"}


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_blocks_have_the_same_gradients(reentrant: bool) -> None:
    model, batch = wrapped(built("llama")), batch_of()
    expected = step(model, batch)
    assert SkipUnread().apply(model) == 1
    base = model.get_base_model()
    base.enable_input_require_grads()
    base.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(step(model, batch), expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
def test_any_share_of_labels_in_both_kinds_of_attention(attention: str, share: float) -> None:
    base = built("llama")
    base.set_attn_implementation(attention)
    model, batch = wrapped(base), batch_of(share)
    expected = step(model, batch)
    assert SkipUnread().apply(model) == 1
    assert_same(step(model, batch), expected)
    batch.pop("attention_mask")
    plain = wrapped(base := built("llama"))
    base.set_attn_implementation(attention)
    assert_same(step(model, batch), step(plain, batch))


def test_in_bfloat16_the_loss_is_as_close_as_its_rounding() -> None:
    exact, batch = wrapped(built("llama")), batch_of()
    model = wrapped(built("llama", torch.bfloat16))
    reference, plain = step(exact, batch), step(model, batch)
    assert SkipUnread().apply(model) == 1
    found = step(model, batch)
    assert found[0].dtype == plain[0].dtype
    assert abs(found[0] - reference[0]) <= max(abs(plain[0] - reference[0]), 1e-2)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(step(model, batch)[0], found[0], rtol=2e-2, atol=2e-2)


def test_the_active_one_of_two_adapters_trains() -> None:
    model, batch = wrapped(built("llama")), batch_of()
    model.add_adapter("other", copy.deepcopy(model.active_peft_config))
    model.set_adapter("other")
    for name, parameter in model.named_parameters():
        if "lora_B.other" in name:
            nn.init.normal_(parameter, 0.0, 0.1)
    expected = step(model, batch)
    assert all(".other." in name for name in expected[1])
    assert SkipUnread().apply(model) == 1
    assert_same(step(model, batch), expected)


def test_labels_that_are_shifted_already_and_the_items_of_a_step_are_the_callers() -> None:
    model, batch = wrapped(built("llama")), batch_of()
    batch |= {"shift_labels": F.pad(batch["labels"], (0, 1), value=-100)[:, 1:].roll(1, 0)}
    batch |= {"num_items_in_batch": torch.tensor(31)}
    expected = step(model, batch)
    assert SkipUnread().apply(model) == 1
    assert_same(step(model, batch), expected)


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("items", [None, 31])
def test_a_batch_without_any_label_is_that_of_the_plain_model(
    items: int | None, segmented: bool
) -> None:
    plain = wrapped(built("llama"))
    batch: dict[str, Any] = batch_of()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    if items is not None:
        batch["num_items_in_batch"] = torch.tensor(items)
    model = copy.deepcopy(plain)
    if segmented:
        petl.segment_loss(model)
    assert SkipUnread().apply(model) == 1
    expected, found = step(plain, batch), step(model, batch)
    # a mean over no labels; a sum over none of them, divided by the items of a step
    assert math.isnan(expected[0]) if items is None else expected[0] == 0
    torch.testing.assert_close(found[0], expected[0], equal_nan=True)
    assert found[1].keys() == expected[1].keys()
    assert all(torch.equal(grad, expected[1][name]) for name, grad in found[1].items())
    assert found[2] < expected[2]


def test_a_head_that_is_adapted_and_rows_with_an_adapter_each() -> None:
    base = built("llama")
    model = petl.wrap(
        base, "lora", r=2, target_modules=["lm_head", "q_proj"], task_type="CAUSAL_LM"
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, 0.0, 0.1)
    model.train()
    batch = batch_of()
    expected = step(model, batch)
    assert SkipUnread().apply(model) == 1
    assert_same(step(model, batch), expected)
    model.eval()
    names = ["default", "__base__", "default"]
    with torch.no_grad(), model.logits_at(batch["labels"]) as wanted:
        logits = model(**inputs_of(batch)).logits
        assert logits.shape[:2] == (1, int(wanted.sum()))
    with torch.no_grad():
        whole = model(**inputs_of(batch), adapter_names=names).logits
    assert whole.shape[:2] == (B, T)


def test_positions_are_those_with_labels_and_each_is_there_once() -> None:
    wanted = torch.tensor([[0, 1, 0, 1, 0, 0], [0, 0, 0, 0, 1, 0]]).bool()
    found = positions_of(wanted)
    assert found is not None
    assert found.tolist() == [[1, 3], [4, 0]]
    assert positions_of(torch.ones(2, 4).bool()) is None
    assert positions_of(torch.zeros(2, 4).bool()) is None


def test_what_reads_all_positions_keeps_them() -> None:
    mola = petl.wrap(
        built("llama"), "mola", r=2, num_experts=2, target_modules=["q_proj"], task_type="CAUSAL_LM"
    ).train()
    batch = batch_of()
    expected = step(mola, batch)
    assert SkipUnread().apply(mola) == 1  # the head in evaluation
    assert mola.get_base_model().last_block is None
    found = step(mola, batch)
    assert found[2] == expected[2]
    assert_same(found, expected, 1e-9)
    other = petl.wrap(
        BertForMaskedLM(BertConfig(**WIDTHS, **TEXT)), "lora", target_modules=["query"]
    )
    assert SkipUnread().refusal(other)


def test_a_pass_that_asks_for_hidden_states_has_them_all() -> None:
    model, batch = wrapped(built("llama")), batch_of()
    expected = model(**batch, output_hidden_states=True).hidden_states
    assert SkipUnread().apply(model) == 1
    found = model(**batch, output_hidden_states=True).hidden_states
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_generation_is_as_before() -> None:
    model = wrapped(LlamaForCausalLM(LlamaConfig(**DECODER))).eval()
    ids = torch.randint(3, 32, (2, 5), generator=torch.Generator().manual_seed(0))
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    expected = model.generate(input_ids=ids, **settings)
    assert SkipUnread().apply(model) == 1
    assert torch.equal(model.generate(input_ids=ids, **settings), expected)


def test_shifted_labels_are_those_of_the_next_tokens() -> None:
    assert shifted(torch.tensor([[5, -100, 7]])).tolist() == [[-100, 7, -100]]
