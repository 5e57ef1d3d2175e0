"""The losses against the papers' equations, written as loops over rows and tokens."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from tiny_tokenizers import CHATML, byte_tokenizer

import petl
from petl import testing
from petl.data.base import encode
from petl.data.tasks import task_class
from petl.data.tasks.base import IGNORED

BETA = 0.4
LABELS = torch.tensor(
    [[IGNORED, 3, 1, 2], [IGNORED, IGNORED, 4, 0], [IGNORED, 2, 2, IGNORED], [IGNORED, 1, 3, 4]]
)
LOGITS = torch.randn(4, 4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
REFERENCE = torch.tensor([-4.0, -3.0, -2.5, -5.0])
decoder = partial(testing.tiny_llama, 2, vocabulary=260)


def log_probability(row):
    """The sum over the tokens of an answer, each predicted from the position before it."""
    total = 0.0
    for place, label in enumerate(LABELS[row].tolist()):
        if label != IGNORED:
            exps = [math.exp(value) for value in LOGITS[row, place - 1].tolist()]
            total += math.log(exps[label] / sum(exps))
    return total


RATIOS = [log_probability(row) - REFERENCE[row].item() for row in range(4)]
TOKENS = [3, 2, 2, 3]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def values(name, labels, **fields):
    task = task_class(name)(max_length=8, **fields)
    return task.values(SimpleNamespace(logits=LOGITS), {"labels": LABELS, **labels})


@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "ipo"])
def test_dpo(loss):
    found = values("dpo", {"reference": REFERENCE}, beta=BETA, loss=loss)
    for pair in range(2):
        chosen, rejected = RATIOS[pair], RATIOS[pair + 2]
        by_token = chosen / TOKENS[pair] - rejected / TOKENS[pair + 2]
        expected = {
            "sigmoid": -math.log(sigmoid(BETA * (chosen - rejected))),
            "hinge": max(0, 1 - BETA * (chosen - rejected)),
            "ipo": (by_token - 1 / (2 * BETA)) ** 2,
        }[loss]
        margin = BETA * (chosen - rejected)
        rewards = [margin, BETA * chosen, BETA * rejected]
        assert found[pair].tolist() == pytest.approx([expected, float(margin > 0), *rewards], 1e-5)


def test_equal_rewards_count_half():
    found = values("dpo", {}, beta=BETA)  # without a reference the model is its own
    assert found[:, 1].tolist() == [0.5, 0.5]
    assert found[:, 0].tolist() == pytest.approx([math.log(2)] * 2)


def test_orpo():
    found = values("orpo", {"texts": LABELS}, beta=BETA)
    means = [log_probability(row) / TOKENS[row] for row in range(4)]
    odds = [math.log(math.exp(mean) / (1 - math.exp(mean))) for mean in means]
    for pair in range(2):
        ratio = -math.log(sigmoid(odds[pair] - odds[pair + 2]))
        assert found[pair, 0].item() == pytest.approx(-means[pair] + BETA * ratio, 1e-5)


def test_kto():
    good, point = [1, 0, 0, 1], 0.3
    labels = {"reference": REFERENCE, "good": torch.tensor(good), "point": torch.tensor(point)}
    weights = {"desirable_weight": 2.0, "undesirable_weight": 0.5}
    found = values("kto", labels, beta=BETA, **weights)
    for row, is_good in enumerate(good):
        gain = RATIOS[row] - point if is_good else point - RATIOS[row]
        expected = (2.0 if is_good else 0.5) * (1 - sigmoid(BETA * gain))
        assert found[row].tolist() == pytest.approx(
            [expected, float(gain > 0), BETA * RATIOS[row]], 1e-5
        )


def test_reward_models():
    task = task_class("reward")(max_length=8, center=0.1)
    logits = torch.tensor([[1.0], [0.5], [0.2], [0.7]])
    found = task.values(SimpleNamespace(logits=logits), {"labels": torch.tensor([1, 1, 0, 0.0])})
    for pair, (chosen, rejected) in enumerate([(1.0, 0.2), (0.5, 0.7)]):
        expected = -math.log(sigmoid(chosen - rejected)) + 0.1 * (chosen + rejected) ** 2
        assert found[pair, 0].item() == pytest.approx(expected, 1e-5)
    assert found[:, 1].tolist() == [1, 0]


def test_orpo_of_any_micro_batches_is_that_of_all_pairs():
    lengths = [2, 9, 4, 3, 6, 8]  # of texts, so that a mean of means is another one
    generator = torch.Generator().manual_seed(2)
    texts = [torch.randint(1, 259, (n,), generator=generator).tolist() for n in lengths]
    rows = [
        {"input_ids": ids, "labels": ids, "rejected_ids": [7, i], "rejected_labels": [IGNORED, i]}
        for i, ids in enumerate(texts, 1)
    ]
    base = decoder()
    task = task_class("orpo")(max_length=16, beta=BETA)
    task.adjust(base)
    collate = task.collate(byte_tokenizer(pad_token="<unk>"))

    def step(*sizes):
        """The loss of a step of micro-batches of these sizes, and its gradient."""
        base.zero_grad()
        ends = torch.tensor(sizes).cumsum(0).tolist()
        micro = [collate(rows[end - n : end]) for n, end in zip(sizes, ends, strict=True)]
        weighted = [(batch, n / len(rows)) for batch, n in zip(micro, sizes, strict=True)]
        spare = micro[0], 0.0  # as of a process with fewer rows
        losses = []
        for batch, weight in task.whole_step([*weighted, spare], lambda batch: base(**batch)):
            losses.append(base(**batch).loss * weight)
            losses[-1].backward()
        return sum(losses).item(), base.lm_head.weight.grad.clone()

    def means(ids, labels):
        """The log-probabilities of labels, and their mean."""
        log_p = base(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        found = [log_p[i - 1, t].item() for i, t in enumerate(labels) if i and t != IGNORED]
        return found, sum(found) / len(found)

    tokens, ratios = [], []
    for row in rows:
        chosen, one = means(row["input_ids"], row["labels"])
        _, other = means(row["rejected_ids"], row["rejected_labels"])
        odds = [math.log(math.exp(mean) / (1 - math.exp(mean))) for mean in (one, other)]
        tokens += chosen
        ratios.append(-math.log(sigmoid(odds[0] - odds[1])))
    expected = -sum(tokens) / len(tokens) + BETA * sum(ratios) / len(ratios)
    _, gradient = step(6)
    for sizes in ([6], [4, 2], [1, 5], [1, 1, 1, 1, 1, 1]):
        value, own = step(*sizes)
        assert value == pytest.approx(expected, rel=1e-5)
        torch.testing.assert_close(own, gradient, rtol=1e-4, atol=1e-6)


# Rows and the reference


@pytest.fixture
def tokenizer():
    return byte_tokenizer(pad_token="<unk>", chat_template=CHATML)


def turns(*contents):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


def test_the_loss_is_on_the_answer_and_its_end(tokenizer):
    task = task_class("dpo")(max_length=200)
    row = {"prompt": turns("q"), "chosen": turns("", "yes")[1:], "rejected": turns("", "no")[1:]}
    encoded = encode(task, tokenizer, [row])[0]
    sides = (("input_ids", "labels", "yes"), ("rejected_ids", "rejected_labels", "no"))
    for ids, labels, text in sides:
        learned = [token for token in encoded[labels] if token != IGNORED]
        assert tokenizer.decode(learned) == f"{text}<|im_end|>"
        assert tokenizer.decode(encoded[ids]).endswith(f"assistant\n{text}<|im_end|>\n")
    short = task_class("dpo")(max_length=20)
    assert not encode_columns(short, tokenizer, row)["input_ids"], "no answer within 20 tokens"


def encode_columns(task, tokenizer, row):
    return task.encode_rows(tokenizer, {name: [value] for name, value in row.items()})


@pytest.mark.parametrize("method", ["lora", "mola"])
def test_the_reference_is_the_base_whatever_the_adapter(method, tokenizer):
    base = decoder()
    task = task_class("dpo")(max_length=64, plain=True)
    task.adjust(base)
    rows = [{"prompt": "who? ", "chosen": "a fox", "rejected": "no"}]
    batch = task.collate(tokenizer)(encode(task, tokenizer, rows))
    expected = task.answers(base, batch)
    model = testing.stir(
        petl.wrap(base, method, target_modules="block-linear", task_type="CAUSAL_LM")
    )
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    found = task.completed(model.train(), batch)["reference"]
    torch.testing.assert_close(found, expected)
    assert model.training
    assert before == {name: p.requires_grad for name, p in model.named_parameters()}
    assert not torch.allclose(task.answers(model, batch), expected, atol=1e-3)


def test_prompts_of_kto_meet_the_answer_of_the_row_before(tokenizer):
    task = task_class("kto")(max_length=64, plain=True)
    rows = [
        {"prompt": f"{name}? ", "completion": f"{name}!", "good": name == "a"} for name in "abc"
    ]
    batch = task.collate(tokenizer)(encode(task, tokenizer, rows))
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in batch["other_input_ids"]]
    assert texts == ["a? c!", "b? a!", "c? b!"]
    assert batch["good"].tolist() == [1, 0, 0]
