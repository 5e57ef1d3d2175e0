"""`petl.retained`: against loops straight from the definitions, and what it leaves as it was."""

import math
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict

import pytest
import torch
from image_text_fixtures import built
from kept_processes import in_processes
from peft import PromptTuningConfig, get_peft_model
from tiny_tokenizers import byte_tokenizer
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

import petl
from petl import testing
from petl.core.types import base_of
from petl.data.tasks.retrieval import Retrieval
from petl.errors import InputError, UnsupportedError
from petl.training.retain import measure
from petl.training.retain.rows import Processes

pytest_plugins = ["training_fixtures"]
TEXTS = [("the quick brown fox " * 3)[: 5 + 7 * n] + str(n) for n in range(9)]
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.3}
METHODS = {"lora": {"r": 4}, "mola": {"r": 2, "num_experts": 3}}


@pytest.fixture
def tokenizer():
    return byte_tokenizer(pad_token="<|im_end|>")


def llama(kind=LlamaForCausalLM, **fields):
    torch.manual_seed(0)
    return kind(LlamaConfig(vocab_size=272, **SIZES, **HEADS, pad_token_id=0, **fields))


def t5():
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=272, decoder_start_token_id=0, **sizes))


def adapted(method, **fields):
    if method == "prompt tuning":
        config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        return testing.stir(get_peft_model(llama(), config))
    fields = {"task_type": "CAUSAL_LM", **METHODS[method], **fields}
    return testing.stir(petl.wrap(llama(), method, **fields))


def log_probabilities(model, ids):
    """Of each position of one text alone, [T - 1, V]; virtual tokens come before it."""
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return logits[-len(ids) : -1].double().log_softmax(-1)


@pytest.mark.parametrize("method", [*METHODS, "prompt tuning"])
def test_losses_divergence_and_agreement_are_those_of_a_loop_over_texts(method, tokenizer):
    model, base = adapted(method), llama()
    found = petl.retained(model, TEXTS, tokenizer, max_length=40, batch_size=4)
    lost, total, kl, same = [], 0, 0.0, 0
    for text, entry in zip(TEXTS, found.texts, strict=True):
        ids = tokenizer(text)["input_ids"][:40]
        p, q = (log_probabilities(each, ids) for each in (base, model))
        target = torch.tensor(ids[1:])[:, None]
        before, after = (-float(x.gather(1, target).mean()) for x in (p, q))
        assert (entry.text, entry.tokens) == (text, len(ids) - 1)
        assert (entry.before, entry.after) == pytest.approx((before, after), rel=1e-5)
        lost.append((len(ids) - 1, after - before))
        total += len(ids) - 1
        kl += float((p.exp() * (p - q)).sum())
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
    mean = sum(n * d for n, d in lost) / total
    assert (found.rows, found.tokens) == (len(TEXTS), total)
    assert found.lost == pytest.approx(mean, rel=1e-4)
    assert found.ratio == pytest.approx(math.exp(mean), rel=1e-4)
    assert found.divergence == pytest.approx(kl / total, rel=1e-4)
    assert found.agreement == pytest.approx(same / total)
    # 2.306: Student's quantile of 8 degrees of freedom in tables
    error = math.sqrt(9 / 8 * sum((n * (d - mean)) ** 2 for n, d in lost)) / total
    assert found.interval == pytest.approx((mean - 2.306 * error, mean + 2.306 * error), rel=1e-3)


def test_an_encoder_reads_the_first_half(tokenizer):
    model = petl.wrap(t5(), "lora", task_type="SEQ_2_SEQ_LM")
    found = petl.retained(testing.stir(model), TEXTS[3:5], tokenizer, base=t5())
    base = t5().eval()
    for text, entry in zip(TEXTS[3:5], found.texts, strict=True):
        ids = tokenizer(text)["input_ids"]
        half = len(ids) // 2
        labels = torch.tensor([ids[half:]])
        with torch.no_grad():
            loss = base(input_ids=torch.tensor([ids[:half]]), labels=labels).loss
        assert entry.tokens == len(ids) - half
        assert entry.before == pytest.approx(float(loss), rel=1e-5)
    assert found.interval is None  # of two texts


@pytest.mark.parametrize("method", ["lora", "mola"])
def test_a_new_adapter_has_lost_nothing_to_the_bit(method, tokenizer):
    model = petl.wrap(llama(), method, task_type="CAUSAL_LM", **METHODS[method])
    found = petl.retained(model, TEXTS, tokenizer)
    assert (found.lost, found.divergence, found.agreement) == (0.0, 0.0, 1.0)
    assert found.loss_before == found.loss_after


def test_order_and_size_of_batches_and_a_base_beside_it_change_nothing(tokenizer):
    model = adapted("lora")
    first = petl.retained(model, TEXTS, tokenizer, batch_size=9)
    for others in (
        petl.retained(model, TEXTS[::-1], tokenizer, batch_size=2),
        petl.retained(model, TEXTS, tokenizer, base=llama()),
    ):
        for name in ("lost", "loss_before", "divergence", "agreement"):
            assert getattr(others, name) == pytest.approx(getattr(first, name), abs=1e-6)


def test_a_tokenizer_of_another_model_is_refused(tokenizer):
    model = adapted("lora")
    last = max(token for text in TEXTS for token in tokenizer(text)["input_ids"])
    base_of(model).resize_token_embeddings(last)
    with pytest.raises(InputError, match=f"{last}"):
        petl.retained(model, TEXTS, tokenizer)


def test_a_large_vocabulary_makes_passes_of_fewer_rows(tokenizer, monkeypatch):
    model, shapes = adapted("lora"), []
    model.register_forward_hook(lambda module, args, output: shapes.append(output.logits.shape))
    whole = petl.retained(model, TEXTS, tokenizer, batch_size=9)
    assert {shape[0] for shape in shapes} == {9}
    shapes.clear()
    most = 3 * 272 * max(len(text) for text in TEXTS)
    monkeypatch.setattr(measure, "LOGITS", most)
    found = petl.retained(model, TEXTS, tokenizer, batch_size=9)
    assert {shape[0] for shape in shapes} == {3}
    assert max(shape.numel() for shape in shapes) <= most
    assert found.lost == pytest.approx(whole.lost, abs=1e-6)
    assert found.divergence == pytest.approx(whole.divergence, abs=1e-6)


def part_of(rank):
    """What a process of two gets; it has the model and the texts of the other one."""
    tokenizer = byte_tokenizer(pad_token="<|im_end|>")
    model = adapted("lora")
    rows = measure.encode_texts(TEXTS, tokenizer, 40)
    passes = []
    model.register_forward_hook(lambda module, args, output: passes.append(len(output.logits)))
    found = measure.compare(model, rows, tokenizer, batch_size=2, processes=Processes(rank, 2))
    return found.entry(), [asdict(each) for each in found.texts], sum(passes)


def test_two_processes_have_the_numbers_of_one(tokenizer):
    alone = petl.retained(adapted("lora"), TEXTS, tokenizer, max_length=40)
    for entry, texts, rows in in_processes(2, ranked):
        assert rows == 2 * 5  # of 9 texts, with and without the adapter
        for name in ("lost", "loss_before", "divergence", "agreement"):
            assert entry[name] == pytest.approx(getattr(alone, name), abs=1e-6)
        assert [text["text"] for text in texts] == TEXTS
        assert [text["after"] for text in texts] == pytest.approx(
            [text.after for text in alone.texts], abs=1e-5
        )


def ranked():
    return part_of(torch.distributed.get_rank())


def test_several_processes_have_equally_many_rows_and_together_all():
    order = list(range(10, 21))
    parts = [Processes(rank, 3).own(order) for rank in range(3)]
    assert {len(part) for part in parts} == {4}
    assert {row for part in parts for row in part} == {*order}


@pytest.mark.parametrize(("layers", "skipped"), [([1], 3), ([0], 0)])
def test_blocks_below_the_first_adapter_run_once(layers, skipped, tokenizer, monkeypatch):
    model = adapted("lora", layers_to_transform=layers)
    calls = Counter()
    for number, block in enumerate(model.base_model.model.model.layers):
        forward = block.mlp.forward
        monkeypatch.setattr(
            block.mlp, "forward", lambda x, n=number, f=forward: calls.update([n]) or f(x)
        )
    whole = petl.retained(model, TEXTS, tokenizer, base=llama(), batch_size=3)
    calls.clear()
    found = petl.retained(model, TEXTS, tokenizer, batch_size=3)
    assert (calls[0], calls[1]) == (6 - skipped, 6)
    assert found.lost == pytest.approx(whole.lost, abs=1e-6)
    assert type(model.base_model.model.model.layers[0]) is type(llama().model.layers[0])


def test_features_of_a_classifier_are_compared_with_their_definitions(tokenizer):
    model = testing.stir(
        petl.wrap(llama(LlamaForSequenceClassification), "lora", task_type="SEQ_CLS")
    ).eval()
    model.base_model.model.config.pad_token_id = tokenizer.pad_token_id
    found = petl.retained(model, TEXTS, tokenizer, batch_size=4)
    sides = []
    for side in (model.disable_adapter, nullcontext):
        with side(), torch.no_grad():
            body = model.base_model.model.model
            ids = [torch.tensor([tokenizer(text)["input_ids"]]) for text in TEXTS]
            sides.append(torch.cat([body(each).last_hidden_state[:, -1] for each in ids]).double())
    X, Y = sides
    drifts = 1 - torch.cosine_similarity(X, Y)
    assert found.drift == pytest.approx(float(drifts.mean()), rel=1e-4)
    assert [each.drift for each in found.texts] == pytest.approx(drifts.tolist(), rel=1e-3)
    assert (found.kind, found.rows) == ("features", 9)
    assert found.interval[0] < found.drift < found.interval[1]
    X, Y = X - X.mean(0), Y - Y.mean(0)
    cka = (Y.T @ X).square().sum() / ((X.T @ X).norm() * (Y.T @ Y).norm())
    assert found.cka == pytest.approx(float(cka), rel=1e-5)


@pytest.mark.parametrize("pooling", ["cls", "last", "mean"])
def test_features_of_an_embedder_are_its_vectors(pooling, tokenizer):
    config = BertConfig(vocab_size=272, **SIZES, num_attention_heads=4)
    base = BertModel(config, add_pooling_layer=False)
    Retrieval(pooling=pooling).adjust(base)
    model = testing.stir(petl.wrap(base, "lora", task_type="FEATURE_EXTRACTION")).eval()
    found = petl.retained(model, TEXTS, tokenizer, batch_size=4)
    sides = []
    for side in (model.disable_adapter, nullcontext):
        with side(), torch.no_grad():
            ids = [torch.tensor([tokenizer(text)["input_ids"]]) for text in TEXTS]
            states = [base(input_ids=each).last_hidden_state[0] for each in ids]
        pools = {"cls": lambda s: s[0], "last": lambda s: s[-1], "mean": lambda s: s.mean(0)}
        sides.append(torch.stack([pools[pooling](each) for each in states]).double())
    drifts = 1 - torch.cosine_similarity(*sides)
    assert found.drift == pytest.approx(float(drifts.mean()), rel=1e-4)


def test_a_new_pooler_in_the_body_is_a_part_of_the_head(tokenizer):
    base = BertForSequenceClassification(BertConfig(vocab_size=272, **SIZES, num_attention_heads=4))
    model = petl.wrap(base.eval(), "lora", task_type="SEQ_CLS", modules_to_save=["pooler"])
    for name, parameter in model.named_parameters():
        if "pooler.modules_to_save" in name:
            parameter.data.add_(torch.randn_like(parameter))
    # what goes into it has not moved
    assert petl.retained(model, TEXTS, tokenizer).drift == 0.0


def test_a_new_adapter_of_a_classifier_has_drifted_by_nothing_to_the_bit(tokenizer):
    model = petl.wrap(llama(LlamaForSequenceClassification), "lora", task_type="SEQ_CLS")
    assert petl.retained(model, TEXTS, tokenizer).drift == 0.0


def test_the_model_and_random_numbers_stay_as_they_were(tokenizer):
    model = adapted("lora", lora_dropout=0.5)
    model.add_adapter("other", model.peft_config["default"])
    model.set_adapter("default")
    model.train()
    model.base_model.model.model.layers[0].eval()
    frozen = next(p for p in model.parameters() if p.requires_grad)
    frozen.requires_grad_(False)
    before = [(p.requires_grad, p.clone()) for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    petl.retained(model, TEXTS, tokenizer)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert model.active_adapters == ["default"]
    for parameter, (needed, value) in zip(model.parameters(), before, strict=True):
        assert parameter.requires_grad == needed
        assert torch.equal(parameter, value)


def test_a_method_that_changes_its_base_needs_one(tokenizer):
    model = petl.wrap(llama(), "lora", init_lora_weights="pissa", task_type="CAUSAL_LM")
    with pytest.raises(UnsupportedError):
        petl.retained(model, TEXTS, tokenizer)
    # PiSSA starts where its base is, up to the rounding of a singular value decomposition
    assert petl.retained(model, TEXTS, tokenizer, base=llama()).lost == pytest.approx(0, abs=1e-5)


def test_what_cannot_be_measured_is_refused(tokenizer):
    model, merged = adapted("lora"), adapted("lora")
    merged.merge_adapter()
    for adapter, texts, settings, words in (
        (model, ["a", ""], {}, "2 retained texts"),
        (model, ["abc", 3], {}, "3 is"),
        (model, "letters.jsonl", {}, "letters.jsonl"),
        (model, TEXTS, {"max_length": 1}, "max_length=1"),
        (model, TEXTS, {"batch_size": 0}, "batch_size=0"),
        (llama(), TEXTS, {}, "adapters"),
        (merged, TEXTS, {}, "unmerge_adapter"),
    ):
        with pytest.raises(petl.InputError, match=words):
            petl.retained(adapter, texts, tokenizer, **settings)


@pytest.mark.parametrize("writes", [True, False])
def test_texts_are_cut_to_the_positions_of_the_model(writes, tokenizer, petl_log):
    if writes:
        sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2}
        base = GPT2LMHeadModel(GPT2Config(vocab_size=272, n_positions=24, **sizes))
        config = {"task_type": "CAUSAL_LM"}
    else:
        sizes = {**SIZES, "num_attention_heads": 4, "max_position_embeddings": 24}
        base = BertModel(BertConfig(vocab_size=272, **sizes))
        config = {"task_type": "FEATURE_EXTRACTION", "target_modules": ["query"]}
    model = testing.stir(petl.wrap(base, "lora", **config))
    found = petl.retained(model, TEXTS, tokenizer)
    assert "cut to the 24 tokens" in petl_log.text
    petl_log.clear()
    assert found == petl.retained(model, TEXTS, tokenizer, max_length=24)
    assert "are cut" not in petl_log.text
    assert found.change != 0


def test_a_processor_for_images_and_text_gives_its_tokenizer():
    base, processor = built("llava")
    model = testing.stir(petl.wrap(base, "lora", task_type="CAUSAL_LM"))
    found = petl.retained(model, TEXTS, processor)
    assert found == petl.retained(model, TEXTS, processor.tokenizer)
    assert found.lost != 0
