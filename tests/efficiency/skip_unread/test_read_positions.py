import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import transformers as hf
from matrix_rows import Rows
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import petl
from petl.efficiency.skip_unread.read_positions import FIRST, SkipUnread
from tests.fixtures.tiny_families import DECODER, IMAGE, TEXT, WIDTHS

ENCODER = {**WIDTHS, **TEXT, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CLASSIFIERS = {
    **dict.fromkeys(("Bert", "Roberta", "XLMRoberta", "Camembert"), ENCODER),
    "Electra": {**ENCODER, "embedding_size": 32},
    "DistilBert": {
        **TEXT,
        "dim": 32,
        "n_layers": 2,
        "n_heads": 4,
        "hidden_dim": 64,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "seq_classif_dropout": 0.0,
    },
    **dict.fromkeys(("Llama", "Qwen2", "Mistral"), DECODER),
    "Gemma": {**DECODER, "head_dim": 8},
    **dict.fromkeys(("ViT", "DeiT"), IMAGE),
}
IMAGES = ("ViT", "DeiT")


def build(family: str, attention: str = "sdpa", **fields: Any) -> Any:
    """A classifier of three classes with random weights, biases and norms included."""
    kind = "ImageClassification" if family in IMAGES else "SequenceClassification"
    config = getattr(hf, f"{family}Config")(
        **{**CLASSIFIERS[family], **fields}, num_labels=3, attn_implementation=attention
    )
    torch.manual_seed(0)
    model = getattr(hf, f"{family}For{kind}")(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.0, 0.3)
    return model


def batch_of(family: str) -> dict[str, Tensor]:
    """Rows of which all but one are padded, to different lengths."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.tensor([0, 1, 2])
    if family in IMAGES:
        size = IMAGE["image_size"]
        pixels = torch.randn(3, 3, size, size, generator=generator)
        return {"pixel_values": pixels, "labels": labels}
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] * 2 + [0] * 5])
    # 0 and 1 are padding in some of the families
    ids = torch.randint(5, 20, (3, 7), generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def padded(base: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The batch with the padding token of the model."""
    if "input_ids" not in batch:
        return dict(batch)
    pad = base.config.pad_token_id
    ids = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, pad)
    return {**batch, "input_ids": ids}


def with_lora(base: Any) -> PeftModel:
    heads = [f"classifier.{layer}" for layer in ("dense", "out_proj")]
    config = LoraConfig(
        r=2,
        target_modules="all-linear",
        init_lora_weights=False,
        exclude_modules=["classifier", "pre_classifier", "score", *heads],
    )
    model: Any = get_peft_model(base, config)
    for parameter in model.parameters():
        parameter.requires_grad_(True)  # gradients of all weights are compared
    return model.train()


def run(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Any, dict[str, Tensor], int]:
    """Outputs, gradients of all parameters, and rows of the matrix products of the forward."""
    model.zero_grad()
    with Rows() as rows:
        outputs = model(**batch)
    outputs.loss.backward()
    grads = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    return outputs, grads, rows.total


def assert_same(one: tuple[Any, dict[str, Tensor], int], other: tuple[Any, Any, int]) -> None:
    torch.testing.assert_close(one[0].loss, other[0].loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(one[0].logits, other[0].logits, rtol=1e-5, atol=1e-5)
    assert one[1].keys() == other[1].keys()
    scale = max(float(grad.abs().max()) for grad in other[1].values())
    for name, grad in one[1].items():
        torch.testing.assert_close(grad, other[1][name], rtol=1e-4, atol=1e-6 * scale, msg=name)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", CLASSIFIERS)
def test_loss_and_gradients_equal_the_plain_model(family: str, attention: str) -> None:
    plain = with_lora(build(family, attention))
    model = copy.deepcopy(plain)
    batch = padded(plain.get_base_model(), batch_of(family))
    assert SkipUnread().apply(model) == 1
    expected, found = run(plain, batch), run(model, batch)
    assert_same(found, expected)
    assert found[2] < expected[2]  # it has computed less


def test_a_single_row_is_read_at_its_end_by_a_model_without_a_padding_token() -> None:
    base = build("Llama")
    base.config.pad_token_id = None
    plain = with_lora(base)
    model = copy.deepcopy(plain)
    row = {name: values[:1] for name, values in batch_of("Llama").items()}
    assert SkipUnread().apply(model) == 1
    assert_same(run(model, row), run(plain, row))


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_a_classifier_reads_the_position_that_is_computed(family: str) -> None:
    """The output of the last block has a gradient there only: which the class is known to read."""
    base = build(family)
    lists = [m for m in base.modules() if isinstance(m, nn.ModuleList)]
    outputs: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        output.retain_grad()
        outputs.append(output)

    lists[-1][-1].register_forward_hook(keep)
    batch = padded(base, batch_of(family))
    base.eval()(**batch).loss.backward()
    read = outputs[0].grad.abs().sum(-1) > 0  # ty: ignore[unresolved-attribute]
    last = batch["attention_mask"].sum(1) - 1 if family in DECODERS else torch.zeros(3).long()
    expected = torch.zeros_like(read).scatter(1, last[:, None], value=True)
    assert torch.equal(read, expected)


DECODERS = ("Llama", "Qwen2", "Mistral", "Gemma")


def test_every_listed_class_is_tested() -> None:
    tested = {type(build(family)).__name__ for family in CLASSIFIERS if family not in DECODERS}
    assert tested == set(FIRST)


@pytest.mark.parametrize("family", ["Bert", "Llama", "ViT"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_recomputes_the_same_positions(family: str, reentrant: bool) -> None:
    plain = with_lora(build(family))
    model = copy.deepcopy(plain)
    base: Any = model.get_base_model()
    batch = padded(base, batch_of(family))
    assert SkipUnread().apply(model) == 1
    base.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    assert_same(run(model, batch), run(plain, batch))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_of_two_passes_recomputes_each_at_its_own_positions(reentrant: bool) -> None:
    plain = with_lora(build("Llama"))
    model = copy.deepcopy(plain)
    base: Any = model.get_base_model()
    first = padded(base, batch_of("Llama"))
    pad = base.config.pad_token_id
    second = {**first, "input_ids": first["input_ids"].clone()}
    # the last token of each row is another one than in the first pass
    second["input_ids"][:, 2:] = pad
    second["attention_mask"] = second["input_ids"].ne(pad).long()
    assert SkipUnread().apply(model) == 1
    base.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = []
    for each in (plain.train(), model.train()):
        (each(**first).loss + each(**second).loss).backward()
        found.append({n: p.grad for n, p in each.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "dropout"),
    [("Bert", "attention_probs_dropout_prob"), ("Llama", "attention_dropout")],
)
def test_evaluation_in_bfloat16_computes_the_same(family: str, dropout: str) -> None:
    plain = with_lora(build(family, **{dropout: 0.5})).eval()
    model = copy.deepcopy(plain)
    assert SkipUnread().apply(model) == 1
    batch = padded(plain.get_base_model(), batch_of(family))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(
            model(**batch).logits, plain(**batch).logits, rtol=2e-2, atol=2e-2
        )


def test_a_pass_that_shows_hidden_states_has_all_of_them() -> None:
    plain = with_lora(build("Bert"))
    model = copy.deepcopy(plain)
    assert SkipUnread().apply(model) == 1
    found = model(**batch_of("Bert"), output_hidden_states=True).hidden_states
    expected = plain(**batch_of("Bert"), output_hidden_states=True).hidden_states
    torch.testing.assert_close(found, expected)


def test_a_hook_in_the_block_sees_all_positions() -> None:
    model: Any = with_lora(build("Bert"))
    assert SkipUnread().apply(model) == 1
    shapes: list[tuple[int, ...]] = []
    last = model.get_base_model().bert.encoder.layer[-1]
    handle = last.output.register_forward_hook(lambda *call: shapes.append(call[2].shape))
    model(**batch_of("Bert"))
    handle.remove()
    assert shapes == [(3, 7, 32)]


def test_the_body_alone_computes_all_positions() -> None:
    model: Any = with_lora(build("Bert")).eval()
    body = model.get_base_model().bert
    inputs = {k: v for k, v in batch_of("Bert").items() if k != "labels"}
    expected = body(**inputs).last_hidden_state
    assert SkipUnread().apply(model) == 1
    model(**batch_of("Bert"))
    assert torch.equal(body(**inputs).last_hidden_state, expected)


def test_dropout_in_the_block_keeps_its_rate() -> None:
    """Masks are drawn for the read position alone: the mean over draws is that of all positions."""
    model: Any = with_lora(build("Bert", hidden_dropout_prob=0.5))
    assert SkipUnread().apply(model) == 1
    block = model.get_base_model().bert.encoder.layer[-1]
    kept: list[Tensor] = []
    own = torch.nn.functional.dropout

    def dropout(x: Tensor, p: float = 0.5, *args: Any, **kwargs: Any) -> Tensor:
        y = own(x, p, *args, **kwargs)
        if p == 0.5 and x.shape == (3, 1, 32):
            kept.append((y != 0).float().mean())
        return y

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "dropout", dropout)
        for _ in range(50):
            model(**batch_of("Bert"))
    assert block.training
    assert len(kept) == 100  # after the attention and after the MLP
    assert abs(float(torch.stack(kept).mean()) - 0.5) < 0.02


BY_POSITION = [name for name in petl.list_methods() if petl.method(name).by_position]


@pytest.mark.parametrize("method", BY_POSITION)
def test_a_method_that_says_so_changes_each_position_by_itself(method: str) -> None:
    special: dict[str, Any] = {
        "mos": {"r": 2},
        "compacter": {"phm_dim": 2, "reduction_factor": 4},
        "corda": {"r": 2, "calibration": [batch_of("Bert")]},
    }
    fields = special.get(method, {})
    torch.manual_seed(0)
    plain: Any = petl.wrap(build("Bert"), method, task_type="SEQ_CLS", **fields).train()
    generator = torch.Generator().manual_seed(3)
    for parameter in plain.parameters():
        if parameter.requires_grad:  # away from the start, at which an adapter adds nothing
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    model = copy.deepcopy(plain)
    assert SkipUnread().apply(model) == 1
    expected, found = run(plain, batch_of("Bert")), run(model, batch_of("Bert"))
    assert_same(found, expected)
    assert found[2] < expected[2]


@pytest.mark.parametrize("method", ["mola", "icv", "sherl", "pyra", "increlora"])
def test_methods_that_count_positions_are_left_alone(method: str) -> None:
    assert not petl.method(method).by_position


@pytest.mark.parametrize(
    ("base", "reason"),
    [
        (lambda: hf.ModernBertForSequenceClassification(MODERN), "positions the head"),
        (lambda: build("Bert", chunk_size_feed_forward=1), "no stack of blocks"),
        (lambda: build("Bert", is_decoder=True), "no stack of blocks"),
    ],
)
def test_other_models_are_left_alone(base: Any, reason: str) -> None:
    model = with_lora(base())
    assert reason in SkipUnread().refusal(model)


MODERN = hf.ModernBertConfig(
    **{**WIDTHS, "vocab_size": 32, "classifier_pooling": "mean", "pad_token_id": 0},
    cls_token_id=1,
    sep_token_id=2,
    bos_token_id=1,
    eos_token_id=2,
)


def test_a_head_of_ones_own_is_left_alone() -> None:
    class Mean(nn.Module):
        def forward(self, features: Tensor) -> Tensor:
            return features.mean(1)[:, :3]

    base = build("Roberta")
    base.classifier = Mean()
    model = with_lora(base)
    assert "positions the head" in SkipUnread().refusal(model)
