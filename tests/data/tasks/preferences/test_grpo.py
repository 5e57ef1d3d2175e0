"""GRPO: sampled answers, rewards, advantages, and the loss as the paper's sum."""

import json
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from tiny_tokenizers import byte_tokenizer

import petl
from petl import testing
from petl.data.base import encode
from petl.data.objectives import GRPOSettings, reward_function
from petl.data.tasks import task_class
from petl.data.tasks.base import IGNORED
from petl.data.tasks.preferences.rewards import from_file, reward_of
from petl.errors import InputError

decoder = partial(testing.tiny_llama, 2, vocabulary=260)
G, L = 3, 5


@pytest.fixture
def tokenizer():
    return byte_tokenizer(pad_token="<unk>")


def task_on(base, tokenizer, **fields):
    task = task_class("grpo")(max_length=64, plain=True, generations=G, max_new_tokens=L, **fields)
    task.adjust(base)
    prompts = {"who? ": "a", "what is it? ": "b"}
    rows = [{"prompt": q, "given": json.dumps({"answer": a})} for q, a in prompts.items()]
    return task, task.collate(tokenizer)(encode(task, tokenizer, rows))


def test_advantages_compare_answers_to_one_prompt(tokenizer):
    base = decoder()
    task, batch = task_on(base, tokenizer)
    model = petl.wrap(base, "lora", target_modules="block-linear", task_type="CAUSAL_LM")
    seen = []

    def rate(prompts, texts, rows):
        seen.append((prompts, texts, rows))
        return [float(i) ** 2 for i in range(len(texts))]

    task.rate = rate
    found = task.completed(model.train(), batch)
    prompts, texts, rows = seen[0]
    assert prompts == ["who? "] * G + ["what is it? "] * G
    assert [row["answer"] for row in rows] == ["a"] * G + ["b"] * G
    for start, rewards in ((0, [0, 1, 4]), (G, [9, 16, 25])):
        mean = sum(rewards) / G
        spread = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (G - 1))
        expected = [(r - mean) / (spread + 1e-4) for r in rewards]
        assert found["advantages"][start : start + G].tolist() == pytest.approx(expected, 1e-4)
    for ids, labels, prompt, text in zip(
        found["input_ids"], found["labels"], prompts, texts, strict=True
    ):
        assert tokenizer.decode(ids[labels == IGNORED][: len(prompt)]) == prompt
        assert tokenizer.decode(labels[labels != IGNORED], skip_special_tokens=True) == text
    assert model.training
    assert task.metrics()["reward"] == pytest.approx(55 / 6)
    torch.manual_seed(1)
    again = task.completed(model, batch)["input_ids"]
    torch.manual_seed(1)
    assert torch.equal(task.completed(model, batch)["input_ids"], again)


def test_answers_and_reference_have_the_probabilities_of_the_model_at_the_temperature(tokenizer):
    def completed(**generation):
        base = decoder()
        vars(base.generation_config).update(generation)
        task, batch = task_on(base, tokenizer, beta=0.1, temperature=0.4)
        task.rate = lambda prompts, texts, rows: [float(i) for i in range(len(texts))]
        torch.manual_seed(0)
        kept = base.generation_config
        found = task.completed(base.train(), batch)
        assert base.generation_config is kept
        return found

    plain = completed()
    # what published models have in their generation configs changes the answers of users alone
    others = completed(repetition_penalty=50.0, no_repeat_ngram_size=1, min_p=0.9)
    assert torch.equal(plain["input_ids"], others["input_ids"])
    logits = decoder()(**{n: plain[n] for n in ("input_ids", "attention_mask")}).logits.double()
    for row, ids in enumerate(plain["labels"].tolist()):
        for place, token in enumerate(ids[1:]):
            if token != IGNORED:
                exps = [math.exp(value / 0.4) for value in logits[row, place].tolist()]
                known = plain["reference"][row, place].item()
                assert known == pytest.approx(math.log(exps[token] / sum(exps)), abs=1e-4)


@pytest.mark.parametrize("loss", ["dapo", "grpo"])
def test_the_loss_is_the_sum_of_the_paper(loss):
    task = task_class("grpo")(max_length=8, loss=loss, beta=0.3)
    labels = torch.tensor([[IGNORED, 1, 2, IGNORED], [IGNORED, IGNORED, 3, 0]])
    logits = torch.randn(2, 4, 5, dtype=torch.float64)
    reference, advantages = torch.randn(2, 3) - 1, torch.tensor([1.5, -0.5])
    given = {"labels": labels, "advantages": advantages, "reference": reference}
    found = task.own_loss(SimpleNamespace(logits=logits), given)
    by_answer = []
    for row in range(2):
        terms = []
        for place in range(1, 4):
            token = labels[row, place].item()
            if token == IGNORED:
                continue
            exps = [math.exp(value) for value in logits[row, place - 1].tolist()]
            rest = reference[row, place - 1].item() - math.log(exps[token] / sum(exps))
            terms.append(-advantages[row].item() + 0.3 * (math.exp(rest) - rest - 1))
        by_answer.append(terms)
    tokens = [term for terms in by_answer for term in terms]
    means = [sum(terms) / len(terms) for terms in by_answer]
    expected = sum(tokens) / len(tokens) if loss == "dapo" else sum(means) / len(means)
    assert found.item() == pytest.approx(expected, 1e-5)


def test_built_in_rewards():
    rows = [{"answer": "4"}]
    assert reward_of(GRPOSettings())(["q"], [" 4\n"], rows) == [1.0]
    pattern = GRPOSettings(reward="regex", pattern=r"answer: (\d+)")
    assert reward_of(pattern)(["q"], ["the answer: 4."], rows) == [1.0]
    assert reward_of(pattern)(["q"], ["the answer: 5."], rows) == [0.0]
    assert reward_of(GRPOSettings(reward="regex", pattern="so"))(["q"], ["so it is"], rows) == [1.0]


def test_a_function_has_the_arguments_of_trl(tmp_path):
    file = tmp_path / "mine.py"
    head = "def rate(prompts, completions, answer, **_):\n"
    file.write_text(f"{head}    return [completions, answer]")
    place = f"{file}:rate"
    with pytest.raises(InputError):
        reward_of(GRPOSettings(reward=place))
    with pytest.raises(InputError):
        from_file(place, plain=True)(["q"], ["a"], [{"answer": "b"}])
    file.write_text(
        f"{head}    return [float(c[0]['content'] == a) for c, a in zip(completions, answer)]"
    )
    rows = [{"answer": "a"}, {"answer": "b"}]
    reward_function(place)
    assert from_file(place, plain=False)(["q", "q"], ["a", "a"], rows) == [1.0, 0.0]


def test_a_finished_run_needs_no_reward():
    assert GRPOSettings(reward="gone.py:rate").reward == "gone.py:rate"
